import itertools

import pytest
import torch
from torch.testing import assert_close

from isthmus.next_scale.likelihood import diffusion_bound, signal_to_noise, token_log_likelihood
from isthmus.next_scale.pyramid import next_scale_input
from isthmus.next_scale.tokenizer import MultiScaleVQVAE
from isthmus.next_scale.transformer import NextScaleTransformer
from tests.pipelines.tiny import tiny_pipeline

CODES, SIZES = 3, (1, 2)


def tiny_pair(attention, num_classes):
    """3 codes on scales 1 and 2: 3 * 3^4 = 243 pyramids, all of which can be written down."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        tokenizer = MultiScaleVQVAE(
            codebook_size=CODES, codebook_dim=4, scale_sizes=SIZES, base_channels=32, channel_multipliers=(1,),
            num_res_blocks=1,
        )  # fmt: skip
        transformer = NextScaleTransformer(
            scale_sizes=SIZES, codebook_size=CODES, codebook_dim=4, width=8, num_layers=2, num_heads=2,
            num_classes=num_classes, scale_attention=attention, init_gate=1.0, init_modulation=1.0,
        )  # fmt: skip
        with torch.no_grad():
            for parameter in transformer.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
    # float64: the law is held to 1e-6
    return tokenizer.eval(), transformer.eval().double()


FIRST = torch.tensor(list(itertools.product(range(CODES), repeat=1)))
PYRAMIDS = torch.tensor(list(itertools.product(range(CODES), repeat=5)))


@torch.no_grad()
def reverse_matrices(tokenizer, transformer, label, *, late=False):
    """p(x_1 | x_0) and p(x_2 | x_1) as matrices over all states, from `forward_scale`.

    `late` plants a fault: scale 1 reads the input of one scale too late, the features before x_1.
    """
    labels = torch.full((CODES,), label)
    conditioning, cache = transformer.condition(labels), transformer.new_cache(CODES)
    empty = torch.zeros(CODES, 0, 4, dtype=torch.float64)
    start = torch.zeros(CODES, 4, 2, 2)
    first = transformer.forward_scale(0, empty, conditioning, cache).softmax(dim=-1)[:1, 0]
    state = start if late else tokenizer.add_codes(start, tokenizer.lookup(FIRST), 0)
    inputs = next_scale_input(state, tokenizer.schedule, 1).double()
    second = transformer.forward_scale(1, inputs, conditioning, cache).softmax(dim=-1)
    step = torch.zeros(CODES, len(PYRAMIDS), dtype=torch.float64)
    for column, pyramid in enumerate(PYRAMIDS):
        # a state keeps what it has: x_2 continues one x_1 only
        row = int(pyramid[0])
        step[row, column] = torch.stack([second[row, j, pyramid[1 + j]] for j in range(4)]).prod()
    return first, step


def forward_matrices():
    """M as 0/1 matrices that truncate every pyramid: (x_2 to x_1) and (x_1 to x_0)."""
    drop_second = (PYRAMIDS[:, :1] == FIRST.T).double()
    return drop_second, torch.ones(CODES, 1, dtype=torch.float64)


def kl(q, p):
    return torch.where(q > 0, q * (q.clamp(min=1e-300) / p).log(), 0.0).sum()


def bound_by_matrices(reverse, index):
    """Prior KL, KL of the step, reconstruction, for pyramid `index`; posteriors by Bayes from the forward matrices."""
    drop_second, drop_first = forward_matrices()
    to_first, to_second = reverse
    q1 = drop_second[index]  # q(x_1 | image)
    q0 = q1 @ drop_first  # q(x_0 | image)
    prior = kl(q0, torch.ones(1, dtype=torch.float64))
    # q(x_1 | x_0, image) = q(x_0 | x_1) q(x_1 | image) / q(x_0 | image)
    posterior = drop_first[:, 0] * q1 / q0
    step = kl(posterior, to_first[0])
    reconstruction = -to_second[q1 == 1, index].log().sum()
    return prior, step, reconstruction


@pytest.mark.parametrize("attention", ["markov", "causal"])
@pytest.mark.parametrize("num_classes", [0, 2])
def test_the_law_on_everything_that_can_happen(attention, num_classes):
    tokenizer, transformer = tiny_pair(attention, num_classes)
    pyramids = [PYRAMIDS[:, :1], PYRAMIDS[:, 1:]]
    for label in range(num_classes + 1):
        labels = torch.full((len(PYRAMIDS),), label)
        log_p = token_log_likelihood(tokenizer, transformer, pyramids, labels).sum(dim=1)
        bound = diffusion_bound(tokenizer, transformer, pyramids, labels)
        reverse = reverse_matrices(tokenizer, transformer, label)
        chain = (reverse[0] @ reverse[1])[0]
        for total in (log_p.exp().sum(), chain.sum(), *(m.sum(dim=1) for m in reverse)):
            assert_close(total, torch.ones_like(total), atol=1e-6, rtol=0)
        assert_close(bound.elbo, log_p, atol=1e-6, rtol=0)
        assert_close(chain.log(), log_p, atol=1e-6, rtol=0)
        for index in range(0, len(PYRAMIDS), 17):
            prior, step, reconstruction = bound_by_matrices(reverse, index)
            assert prior == 0 == bound.prior[index]
            assert_close(step, bound.steps[index].sum(), atol=1e-6, rtol=0)
            assert_close(reconstruction, bound.reconstruction[index], atol=1e-6, rtol=0)
            assert_close(prior + step + reconstruction, -log_p[index], atol=1e-6, rtol=0)


@pytest.mark.parametrize("attention", ["markov", "causal"])
def test_an_input_one_scale_too_late_breaks_the_law(attention):
    tokenizer, transformer = tiny_pair(attention, 0)
    pyramids = [PYRAMIDS[:, :1], PYRAMIDS[:, 1:]]
    log_p = token_log_likelihood(tokenizer, transformer, pyramids, torch.zeros(len(PYRAMIDS), dtype=torch.long))
    first, second = reverse_matrices(tokenizer, transformer, 0, late=True)
    assert ((first @ second)[0].log() - log_p.sum(dim=1)).abs().max() > 1e-2


@pytest.mark.parametrize("attention", ["markov", "causal"])
def test_the_bound_in_steps_is_the_likelihood_in_one_pass(attention):
    pipe = tiny_pipeline(scale_attention=attention)
    tokens = [torch.randint(16, (5, n), generator=torch.Generator().manual_seed(n)) for n in pipe.schedule.lengths]
    labels = torch.tensor([0, 1, 2, 3, 0])
    nats = token_log_likelihood(pipe.image_tokenizer, pipe.transformer, tokens, labels)
    bound = diffusion_bound(pipe.image_tokenizer, pipe.transformer, tokens, labels)
    assert_close(bound.elbo, nats.sum(dim=1))
    by_scale = torch.stack([part.sum(dim=1) for part in nats.split(list(pipe.schedule.lengths), dim=1)], dim=1)
    assert_close(torch.cat([bound.steps, bound.reconstruction[:, None]], dim=1), -by_scale)


def test_noise_is_what_is_left_of_the_latents():
    pipe = tiny_pipeline()
    latents = torch.randn(3, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    found = signal_to_noise(pipe.image_tokenizer, latents)
    tokens = pipe.image_tokenizer.requantize(latents)
    for scale in range(3):
        rest = latents - pipe.image_tokenizer.features_up_to(tokens, scale).detach()
        expected = 10 * torch.log10(latents.square().sum((1, 2, 3)) / rest.square().sum((1, 2, 3)))
        assert_close(found[:, scale], expected)

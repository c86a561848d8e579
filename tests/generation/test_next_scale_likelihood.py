import itertools
import math

import pytest
import torch
from torch.testing import assert_close

from isthmus.errors import UserError
from isthmus.generation.next_scale_likelihood import log_likelihood
from isthmus.models.multiscale_vqvae import MultiScaleVQVAE
from isthmus.models.next_scale_transformer import NextScaleTransformer
from tests.pipelines.tiny import tiny_pipeline


@pytest.mark.parametrize("scale_attention", ["markov", "causal"])
def test_all_pyramids_together_have_probability_one(scale_attention):
    with torch.random.fork_rng():
        torch.manual_seed(1)
        tokenizer = MultiScaleVQVAE(
            codebook_size=2, codebook_dim=4, scale_sizes=(1, 2), base_channels=32, channel_multipliers=(1,),
            num_res_blocks=1,
        )  # fmt: skip
        prior = NextScaleTransformer(
            scale_sizes=(1, 2), codebook_size=2, codebook_dim=4, width=8, num_layers=1, num_heads=1, num_classes=1,
            scale_attention=scale_attention,
        )  # fmt: skip
        with torch.no_grad():
            for parameter in prior.parameters():
                parameter.add_(0.5 * torch.randn_like(parameter))
    every = torch.tensor(list(itertools.product(range(2), repeat=5)))
    for label in (0, 1):
        log_p = log_likelihood(tokenizer, prior, list(every.split([1, 4], dim=1)), torch.full((32,), label))
        assert_close(log_p.sum(dim=1).exp().sum(), torch.tensor(1.0))


@pytest.mark.parametrize("scale_attention", ["markov", "causal"])
def test_a_token_costs_what_generation_would_have_drawn_it_with(scale_attention):
    """The logits of the sampling loop, scale by scale with its cache, give the same probabilities."""
    pipe = tiny_pipeline(scale_attention=scale_attention)
    drawn = pipe([0, 2], seed=3)
    labels = torch.tensor(drawn.class_labels)
    log_p = pipe.bits_per_token(class_labels=labels, token_ids=drawn.token_ids) * -math.log(2)
    transformer, cache = pipe.transformer, pipe.transformer.new_cache(2)
    inputs = pipe.image_tokenizer.scale_inputs(drawn.token_ids).split(list(pipe.schedule.lengths[1:]), dim=1)
    conditioning = transformer.condition(labels)
    expected = []
    for scale, ids in enumerate(drawn.token_ids):
        scale_input = inputs[scale - 1] if scale else torch.zeros(2, 0, 4)
        logits = transformer.forward_scale(scale, scale_input, conditioning, cache)
        expected.append(logits.log_softmax(dim=-1).gather(2, ids[..., None])[..., 0])
    assert_close(log_p, torch.cat(expected, dim=1).detach(), atol=1e-5, rtol=1e-4)
    assert_close(pipe.log_prob(class_labels=labels, token_ids=drawn.token_ids), log_p.sum(dim=1))


def test_images_and_their_tokens_cost_the_same():
    pipe = tiny_pipeline()
    images = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    token_ids = pipe.encode(images)
    assert [tuple(ids.shape) for ids in token_ids] == [(3, 1), (3, 4), (3, 16)]
    assert_close(pipe.log_prob(images, ["flag"] * 3), pipe.log_prob(token_ids=token_ids, class_labels=1))
    assert_close(pipe.bits_per_token(images).sum(dim=1) * -math.log(2), pipe.log_prob(images))


def test_decoding_all_tokens_is_the_tokenizers_reconstruction_and_fewer_scales_are_coarser():
    pipe = tiny_pipeline()
    images = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    token_ids = pipe.encode(images)
    whole = torch.as_tensor(pipe.decode(token_ids, output_type="pt")) * 2 - 1
    with torch.no_grad():
        assert_close(whole, pipe.image_tokenizer.decode(token_ids), atol=1e-5, rtol=1e-4)
        first = pipe.image_tokenizer.decode_features(pipe.image_tokenizer.features_up_to(token_ids, 0))
    assert_close(torch.as_tensor(pipe.decode(token_ids[:1], output_type="pt")) * 2 - 1, first, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda ids: ids[:2], "all scales"),
        (lambda ids: [ids[0] + 16, *ids[1:]], "0..15"),
        (lambda ids: [one[:0] for one in ids], "per image"),
    ],
)
def test_tokens_that_are_not_those_of_whole_images_are_refused(change, said):
    pipe = tiny_pipeline()
    token_ids = pipe([0], seed=0).token_ids
    with pytest.raises(UserError, match=said):
        pipe.log_prob(token_ids=change(token_ids), class_labels=torch.zeros(1, dtype=torch.long))


def test_a_likelihood_is_of_images_or_of_tokens():
    pipe = tiny_pipeline()
    with pytest.raises(UserError, match="both or neither"):
        pipe.log_prob()


@pytest.mark.parametrize("token_ids", [[], [torch.zeros(1, 2, dtype=torch.long)], [torch.full((1, 1), 16)]])
def test_tokens_that_cannot_be_decoded_are_refused(token_ids):
    with pytest.raises(UserError, match="token"):
        tiny_pipeline().decode(token_ids)

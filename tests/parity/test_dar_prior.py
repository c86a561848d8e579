"""The published D-AR transformer at small size, as a stock Llama: logits, loss, gradients, draws, filters."""

import pytest
import torch

from isthmus.dar.conversion import build_next_token_prior, convert_next_token_prior_state, halves_apart
from isthmus.dar.llama_decoding import LlamaDecoder
from isthmus.dar.prior import TokenLayout, next_token_inputs, next_token_logits, next_token_loss
from isthmus.dar.sampling import Prefix, generate_tokens
from isthmus.nn.guidance import GuidanceSchedule
from isthmus.nn.sampling import filter_logits
from isthmus.pipelines.options import SamplingOptions
from isthmus.published import read_weights
from tests.testers import assert_gradient, assert_parity

GUIDANCE = {
    "cfg1": 1.0,
    "cfg4": 4.0,
    "cfg1p2to8": GuidanceSchedule("linear", 1.2, 8.0),
    # the published sampler takes 1.001 for a schedule that starts at exactly 1
    "cfg1to4": GuidanceSchedule("linear", 1.001, 4.0),
    # its interval counts from the second token on, and the first is always guided
    "cfg4_interval10": GuidanceSchedule("constant", end=4.0, last_guided_step=11),
}


@pytest.fixture(scope="module")
def io(golden):
    return golden.tensors("dar/gpt.safetensors")


@pytest.fixture(scope="module")
def raw(golden):
    return read_weights(golden.path("dar/gpt_weights.safetensors"))


@pytest.fixture
def converted(raw):
    return convert_next_token_prior_state(raw, num_tokens=32, num_heads=4)


@pytest.fixture
def prior(converted):
    return build_next_token_prior(converted)


@pytest.fixture
def layout(prior):
    return TokenLayout.of(prior.config, codebook_size=128, num_tokens=32)


def greedy(prior, layout, io, guidance, **prefix):
    options = SamplingOptions(guidance_scale=guidance, top_k=1)
    seeds = [(0, i) for i in range(4)]
    return torch.cat(
        list(generate_tokens(prior, layout, io["labels"], seeds, options, stops=[4, 12, 32], **prefix)), dim=1
    )


def test_sizes_are_those_of_the_file(golden, layout, converted, prior):
    config = golden.json("dar/config.json")["gpt"]
    assert (layout.codebook_size, layout.num_classes) == (config["vocab_size"], config["num_classes"])
    assert prior.config.intermediate_size == config["ffn_hidden"]
    assert prior.config.rms_norm_eps == config["norm_eps"]
    assert converted.dropped == {}


def test_teacher_forced_logits_and_loss(io, prior, layout):
    logits = next_token_logits(prior, layout, io["tf_labels"], io["tf_tokens"])
    assert_parity(logits, io["tf_logits_eval"])
    assert_parity(logits[:, :-1], io["tf_logits_train"])
    assert_parity(next_token_loss(logits[:, :-1], io["tf_tokens"]).mean(), io["tf_loss"])


def test_gradients(io, prior, layout):
    inputs = next_token_logits(prior, layout, io["tf_labels"], io["tf_tokens"][:, :-1])
    next_token_loss(inputs, io["tf_tokens"]).mean().backward()
    classes = prior.model.embed_tokens.weight.grad[layout.codebook_size :]
    assert_gradient(classes, io["grad:cls_embedding.embedding_table.weight"])
    assert_gradient(prior.model.norm.weight.grad, io["grad:norm.weight"])
    q, k, v = io["grad:layers.0.attention.wqkv.weight"].split(64)
    attention = prior.model.layers[0].self_attn
    assert_gradient(attention.q_proj.weight.grad, halves_apart(q, 4))
    assert_gradient(attention.k_proj.weight.grad, halves_apart(k, 4))
    assert_gradient(attention.v_proj.weight.grad, v)
    assert torch.count_nonzero(prior.lm_head.weight.grad[layout.codebook_size :]) == 0


def test_greedy_tokens(io, prior, layout):
    for tag, guidance in GUIDANCE.items():
        assert_parity(greedy(prior, layout, io, guidance).int(), io[f"gen_{tag}_tokens"])
    expected = io["gen_sharedprefix8_cfg4_tokens"]
    prefix = expected[:1, :8].expand(4, -1)
    assert torch.equal(prefix, io["gen_cfg4_tokens"][:1, :8].expand(4, -1))
    assert_parity(greedy(prior, layout, io, 4.0, prefix=Prefix(prefix, [8] * 4)).int(), expected)


@pytest.mark.parametrize("tag", ["cfg1", "cfg4", "cfg1p2to8"])
def test_guided_logits_of_every_step(tag, io, prior, layout):
    """Through the decoder's cache, fed the published tokens."""
    decoder, tokens = LlamaDecoder(prior, layout), io[f"gen_{tag}_tokens"].long()
    cache, labels = decoder.new_cache(8), io["labels"].long()
    both = torch.cat([labels, torch.full_like(labels, layout.null_class_id)])
    logits = [decoder.prefill(next_token_inputs(layout, both, tokens[:, :0].repeat(2, 1)), cache)]
    logits += [decoder.step(tokens[:, p].repeat(2), cache) for p in range(31)]
    cond, uncond = torch.stack(logits, dim=1).chunk(2)
    scales = GUIDANCE[tag].values(32) if isinstance(GUIDANCE[tag], GuidanceSchedule) else [GUIDANCE[tag]] * 32
    guided = torch.lerp(uncond, cond, torch.tensor(scales)[:, None])
    # guidance of 8 multiplies the rounding of two networks by 15
    assert_parity(guided, io[f"gen_{tag}_logits"], atol=1e-4)


def test_filters(io):
    for name, filters in {
        "top_k0_top_p0.01": {"top_p": 0.01},
        "top_k0_top_p0.8": {"top_p": 0.8},
        "top_k1_top_p1.0": {"top_k": 1},
        "top_k200_top_p1.0": {"top_k": 128},
        "top_k20_top_p0.5": {"top_k": 20, "top_p": 0.5},
        "top_k5_top_p1.0": {"top_k": 5},
    }.items():
        assert_parity(filter_logits(io["filter_in"], **filters), io[f"filter_{name}"])


def test_rotary_angles(io, prior):
    cos, sin = prior.model.rotary_emb(torch.zeros(()), torch.arange(33).unsqueeze(0))
    assert_parity(cos[0, :, :8], io["freqs_cis"][..., 0])
    assert_parity(sin[0, :, :8], io["freqs_cis"][..., 1])

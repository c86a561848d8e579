"""Published D-AR tokenizers: sizes off the shapes and the stored settings, strictness, what is dropped and why."""

import pytest
import torch

from isthmus.dar.conversion import (
    PublishedSettings,
    build_next_token_prior,
    build_tokenizer_parts,
    convert_diffusion_tokenizer_state,
    convert_next_token_prior_state,
)
from isthmus.dar.decoder import FlowDecoder
from isthmus.dar.prior import TokenLayout
from isthmus.dar.tokenizer import DiffusionTokenizer
from isthmus.errors import UserError
from isthmus.nn.stored_llama import fingerprint
from isthmus.published import build


@pytest.fixture(params=["a", "b"])
def variant(request):
    return request.param


@pytest.fixture
def published(golden, variant):
    """(weights, settings) of a fixture."""
    config = golden.json("dar/config.json")[f"tokenizer_{variant}"]
    return golden.tensors(f"dar/tok_{variant}_weights.safetensors"), PublishedSettings.of(config)


def build_all(raw, settings):
    return build_tokenizer_parts(convert_diffusion_tokenizer_state(raw, settings))


def test_sizes_are_read_off_the_file_which_stays_as_it_is(published, variant):
    raw, _ = published
    before = {key: tensor.clone() for key, tensor in raw.items()}
    converted = convert_diffusion_tokenizer_state(*published)
    of_a = {
        "image_size": 32, "patch_size": 8, "width": 128, "num_layers": 2, "condition_width": 64,
        "num_condition_layers": 2, "num_tokens": 32, "num_groups": 8, "tokens_per_step": 4, "codebook_size": 128,
        "codebook_dim": 8, "table_rows": 1024, "low_rank_queries": True, "query_rank": 8, "rotary_base": 10_000.0,
        "head_width": 64, "quantized": True,
    }  # fmt: skip
    of_b = of_a | {
        "width": 64, "num_layers": 1, "num_condition_layers": 0, "num_tokens": 24, "num_groups": 6,
        "tokens_per_step": 8, "codebook_size": 64, "codebook_dim": 4, "low_rank_queries": False, "rotary_base": 500.0,
    }  # fmt: skip
    del of_b["query_rank"]
    assert converted.tokenizer.arguments == {"a": of_a, "b": of_b}[variant]
    decoder_a = {
        "patch_size": 2, "width": 128, "num_layers": 2, "condition_width": 64, "head_width": 64,
        "rotary_base": 10_000.0, "shared_time_embedding": False, "adaptive_head": False,
    }  # fmt: skip
    decoder_b = decoder_a | {
        "patch_size": 4, "width": 64, "rotary_base": 500.0, "shared_time_embedding": True, "adaptive_head": True,
    }  # fmt: skip
    assert converted.decoder.arguments == {"a": decoder_a, "b": decoder_b}[variant]
    assert converted.scheduler == {
        "a": {"num_tokens": 32, "num_groups": 8, "tokens_per_step": 4, "num_inference_steps": 8, "time_shift": 2,
              "data_std": 0.6},
        "b": {"num_tokens": 24, "num_groups": 6, "tokens_per_step": 8, "num_inference_steps": 9, "time_shift": 3,
              "data_std": 0.5},
    }[variant]  # fmt: skip
    # every dropped key has its reason
    heads = {f"diff_decoder.net.repa_out.{i}.{leaf}" for i in (0, 2, 4) for leaf in ("weight", "bias")}
    assert set(converted.dropped) == heads | {"quantize.codebook_used"}
    assert all(converted.dropped.values())
    # three published layers become one in self-attention, two in cross-attention; weights and biases each
    layers = {"a": 2 + 2, "b": 1}[variant]
    joined = 2 * 2 * (layers + 2) + 2 * 1 * 2
    kept = len(converted.tokenizer.state) + len(converted.decoder.state)
    assert kept + joined + len(converted.dropped) == len(raw)
    assert set(raw) == set(before) and all(torch.equal(raw[key], before[key]) for key in raw)


def test_settings_without_a_configuration_are_those_of_the_published_model():
    assert PublishedSettings.of({}) == PublishedSettings()
    assert PublishedSettings.of({"num_all_queries": 32, "diff_decoder": {"data_std": 0.5}}) == PublishedSettings(
        num_tokens=32, data_std=0.5
    )
    assert PublishedSettings.of({"num_all_queries": 32}, num_tokens=24, num_groups=6).num_tokens == 24


def test_half_precision_files_and_files_without_training_leftovers_are_the_same_networks(published):
    raw, settings = published
    whole = build_all(raw, settings)[:2]
    dropped = convert_diffusion_tokenizer_state(raw, settings).dropped
    less = {key: tensor for key, tensor in raw.items() if key not in dropped}
    half = {key: tensor.half() for key, tensor in raw.items()}  # the fixtures are exact in half precision
    for one, other in zip(whole * 2, [*build_all(less, settings)[:2], *build_all(half, settings)[:2]], strict=True):
        assert {p.dtype for p in other.parameters()} == {torch.float32}
        assert fingerprint(one) == fingerprint(other)


@pytest.mark.slow
def test_every_missing_key_is_an_error(published):
    raw, settings = published
    dropped = convert_diffusion_tokenizer_state(raw, settings).dropped
    for key in set(raw) - set(dropped):
        # on the meta device: the networks of this file are built as many times as it has keys
        with torch.device("meta"), pytest.raises(UserError):
            converted = convert_diffusion_tokenizer_state({k: v for k, v in raw.items() if k != key}, settings)
            of_decoder = key.startswith("diff_decoder")
            part = converted.decoder if of_decoder else converted.tokenizer
            build(FlowDecoder if of_decoder else DiffusionTokenizer, part, "the file")


def test_unknown_keys_and_more_tokens_than_the_tables_hold_are_refused(published):
    raw, settings = published
    for key in ("mask_token", "diff_decoder.net.pos_embed", "encoder_layers.0.attention.r.weight", "diff_decoder.beta"):
        with pytest.raises(UserError, match="no such keys"):
            convert_diffusion_tokenizer_state(raw | {key: torch.zeros(1)}, settings)
    more = {"num_tokens": 4096, "num_groups": 8, "tokens_per_step": None}
    with pytest.raises(UserError, match="table_rows must be at least num_tokens"):
        build_all(raw, PublishedSettings(**vars(settings) | more))


def test_another_file_is_named(golden):
    prior = golden.tensors("dar/gpt_weights.safetensors")
    with pytest.raises(UserError, match="D-AR tokenizer holds query_embedding.weight"):
        convert_diffusion_tokenizer_state(prior, PublishedSettings())


def test_continuous_tokenizers_have_no_codebook(published):
    raw, settings = published
    continuous = PublishedSettings(**vars(settings) | {"quantized": False})
    tokenizer, _, _ = build_all(raw, continuous)
    assert tokenizer.codebook is None
    dropped = convert_diffusion_tokenizer_state(raw, continuous).dropped
    assert "continuous" in dropped["quantize.embedding.weight"]


def published_prior(width=64, num_layers=2, hidden=96, codebook_size=12, num_classes=3):
    """A file with the published keys, random."""
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "cls_embedding.embedding_table.weight": (num_classes + 1, width),
        "tok_embeddings.weight": (codebook_size, width),
        "norm.weight": (width,),
        "output.weight": (codebook_size, width),
    }
    for i in range(num_layers):
        shapes |= {
            f"layers.{i}.attention.wqkv.weight": (3 * width, width),
            f"layers.{i}.attention.wo.weight": (width, width),
            f"layers.{i}.feed_forward.w1.weight": (hidden, width),
            f"layers.{i}.feed_forward.w3.weight": (hidden, width),
            f"layers.{i}.feed_forward.w2.weight": (width, hidden),
            f"layers.{i}.attention_norm.weight": (width,),
            f"layers.{i}.ffn_norm.weight": (width,),
        }
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def test_sizes_of_a_prior_are_read_off_the_file():
    converted = convert_next_token_prior_state(published_prior(), num_tokens=256)
    assert converted.arguments == {
        "codebook_size": 12, "num_classes": 3, "num_tokens": 256, "width": 64, "num_layers": 2, "num_heads": 1,
        "feed_forward_width": 96,
    }  # fmt: skip
    prior = build_next_token_prior(converted)
    assert TokenLayout.of(prior.config, codebook_size=12, num_tokens=256) == TokenLayout(12, 3, 256)
    assert not prior.training


def test_classes_follow_the_codes_and_are_never_predicted():
    raw = published_prior()
    prior = build_next_token_prior(convert_next_token_prior_state(raw, num_tokens=8))
    embedding, head = prior.model.embed_tokens.weight, prior.lm_head.weight
    assert torch.equal(embedding[:12], raw["tok_embeddings.weight"])
    assert torch.equal(embedding[12:], raw["cls_embedding.embedding_table.weight"])
    assert torch.equal(head[:12], raw["output.weight"]) and not head[12:].any()


def test_what_is_dropped_is_listed_with_its_reason():
    caches = {f"layers.0.attention.kv_cache.{x}_cache": torch.zeros(2, 1, 8, 64) for x in "kv"}
    dropped = convert_next_token_prior_state(published_prior() | caches, num_tokens=8).dropped
    assert set(dropped) == set(caches) and all("last image" in why for why in dropped.values())


def test_other_files_are_refused():
    for changed, said in [
        ({"cls_embedding.embedding_table.weight": None}, "its keys begin with layers"),
        ({"layers.0.attention.wqkv.weight": None}, "must be complete"),
        ({"layers.1.attention.wqkv.weight": None}, "does not fit"),
        ({"layers.1.attention.wo.weight": None}, "missing model.layers.1.self_attn.o_proj.weight"),
        ({"layers.1.attention.wo.bias": torch.zeros(64)}, "no such keys"),
        ({"layers.1.attention.wqkv.weight": torch.zeros(128, 64)}, "as many key as query heads"),
        ({"output.weight": torch.zeros(13, 64)}, "one output row per code"),
        ({"cls_embedding.embedding_table.weight": torch.zeros(4, 32)}, "classes as wide"),
    ]:
        raw = {name: value for name, value in (published_prior() | changed).items() if value is not None}
        with pytest.raises(UserError, match=said):
            build_next_token_prior(convert_next_token_prior_state(raw, num_tokens=8))


def test_heads_of_another_width_have_to_be_said():
    with pytest.raises(UserError, match="Pass num_heads"):
        convert_next_token_prior_state(published_prior(width=48), num_tokens=8)
    converted = convert_next_token_prior_state(published_prior(width=48), num_tokens=8, num_heads=3)
    assert converted.arguments["num_heads"] == 3

import pytest
import torch

from isthmus.dar.conversion import build_next_token_prior, convert_next_token_prior_state
from isthmus.dar.prior import TokenLayout
from isthmus.errors import UserError
from isthmus.published import read_weights


def published(width=64, num_layers=2, hidden=96, codebook_size=12, num_classes=3):
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


def test_sizes_are_read_off_the_file():
    converted = convert_next_token_prior_state(published())
    assert converted.arguments == {
        "codebook_size": 12, "num_classes": 3, "num_tokens": 256, "width": 64, "num_layers": 2, "num_heads": 1,
        "feed_forward_width": 96,
    }  # fmt: skip
    prior = build_next_token_prior(converted)
    assert TokenLayout.of(prior.config, codebook_size=12, num_tokens=256) == TokenLayout(12, 3, 256)
    assert not prior.training


def test_classes_follow_the_codes_and_are_never_predicted():
    raw = published()
    prior = build_next_token_prior(convert_next_token_prior_state(raw, num_tokens=8))
    embedding, head = prior.model.embed_tokens.weight, prior.lm_head.weight
    assert torch.equal(embedding[:12], raw["tok_embeddings.weight"])
    assert torch.equal(embedding[12:], raw["cls_embedding.embedding_table.weight"])
    assert torch.equal(head[:12], raw["output.weight"]) and not head[12:].any()


def test_what_is_dropped_is_listed_with_its_reason():
    caches = {f"layers.0.attention.kv_cache.{x}_cache": torch.zeros(2, 1, 8, 64) for x in "kv"}
    dropped = convert_next_token_prior_state(published() | caches).dropped
    assert set(dropped) == set(caches) and all("last image" in why for why in dropped.values())


def test_training_checkpoints_are_unwrapped(tmp_path):
    raw = published()
    torch.save({"model": {f"_orig_mod.{name}": value for name, value in raw.items()}, "steps": 3}, tmp_path / "a.pt")
    converted = convert_next_token_prior_state(read_weights(tmp_path / "a.pt"))
    assert torch.equal(converted.state["lm_head.weight"][:12], raw["output.weight"])


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"cls_embedding.embedding_table.weight": None}, "its keys begin with layers"),
        ({"layers.0.attention.wqkv.weight": None}, "must be complete"),
        ({"layers.1.attention.wqkv.weight": None}, "does not fit"),
        ({"layers.1.attention.wo.weight": None}, "missing model.layers.1.self_attn.o_proj.weight"),
        ({"layers.1.attention.wo.bias": torch.zeros(64)}, "no such keys"),
        ({"layers.1.attention.wqkv.weight": torch.zeros(128, 64)}, "as many key as query heads"),
        ({"output.weight": torch.zeros(13, 64)}, "one output row per code"),
        ({"cls_embedding.embedding_table.weight": torch.zeros(4, 32)}, "classes as wide"),
    ],
)
def test_other_files_are_refused(changed, said):
    raw = {name: value for name, value in (published() | changed).items() if value is not None}
    with pytest.raises(UserError, match=said):
        build_next_token_prior(convert_next_token_prior_state(raw))


def test_heads_of_another_width_have_to_be_said():
    with pytest.raises(UserError, match="Pass num_heads"):
        convert_next_token_prior_state(published(width=48))
    assert convert_next_token_prior_state(published(width=48), num_heads=3).arguments["num_heads"] == 3

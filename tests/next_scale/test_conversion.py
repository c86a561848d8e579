"""Reading published files and renaming their keys: every layout that is understood, every file that is refused."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from isthmus.errors import UserError
from isthmus.next_scale.conversion import (
    build_prior,
    build_tokenizer,
    convert_prior_state,
    convert_tokenizer_state,
    switti_sampling,
)
from isthmus.nn.stored_llama import fingerprint
from isthmus.published import load_strict, read_weights

SCALES = (1, 2, 3, 4)


class Foreign:
    """An object that only running its pickle could bring back."""


@pytest.fixture
def prior_state(golden):
    return dict(golden.tensors("var/var_base_state.safetensors"))


@pytest.fixture
def tokenizer_state(golden):
    return dict(golden.tensors("var/vqvae_state.safetensors"))


@pytest.fixture
def small():
    """A state dict of two tensors: what is read does not depend on what it means."""
    return {"a.weight": torch.arange(6.0).view(2, 3), "b": torch.tensor([1, 2])}


def assert_same(found, expected):
    assert set(found) == set(expected)
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def pth(path, content):
    torch.save(content, path)
    return path


def test_bare_pickles_and_safetensors_hold_the_same(small, tmp_path):
    save_file(small, tmp_path / "weights.safetensors")
    assert_same(read_weights(tmp_path / "weights.safetensors"), small)
    for suffix in (".pth", ".pt", ".bin"):
        assert_same(read_weights(str(pth(tmp_path / f"weights{suffix}", small))), small)


def test_prefixes_of_wrappers_are_taken_off(small, tmp_path):
    for prefix in (
        "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "model.", "model.module.", "var.",
        "ema_model.",
    ):  # fmt: skip
        wrapped = {prefix + key: value for key, value in small.items()}
        assert_same(read_weights(pth(tmp_path / "weights.pth", wrapped), nested=("var",)), small)


def test_parts_that_were_compiled_or_sharded_on_their_own(small, tmp_path):
    wrapped = {"a._orig_mod.weight": small["a.weight"], "_fsdp_wrapped_module._checkpoint_wrapped_module.b": small["b"]}
    assert_same(read_weights(pth(tmp_path / "weights.pth", wrapped)), small)
    twice = {"module.b": small["b"], "b": small["b"]}
    with pytest.raises(UserError, match="holds b twice"):
        read_weights(pth(tmp_path / "weights.pth", twice))


def test_averages_go_before_what_was_trained_and_parts_are_told_apart(small, tmp_path):
    both = {f"model.{key}": value + 1 for key, value in small.items()} | {f"ema.{k}": v for k, v in small.items()}
    assert_same(read_weights(pth(tmp_path / "weights.pth", {"state_dict": both})), small)
    other = {"vae.c.d": torch.zeros(1)} | {f"var.{key}": value for key, value in small.items()}
    assert_same(read_weights(pth(tmp_path / "weights.pth", other), nested=("var", "vae")), small)


def sharded(folder: Path, state, suffix: str) -> Path:
    """Two shards and their listing, as other libraries write them."""
    folder.mkdir()
    stem = {".safetensors": "model", ".bin": "pytorch_model"}[suffix]
    names = [f"{stem}-{i:05d}-of-00002{suffix}" for i in (1, 2)]
    parts = [dict(list(state.items())[i::2]) for i in (0, 1)]
    for name, part in zip(names, parts, strict=True):
        (save_file if suffix == ".safetensors" else torch.save)(part, folder / name)
    places = {key: name for name, part in zip(names, parts, strict=True) for key in part}
    listing = folder / f"{stem}{suffix}.index.json"
    listing.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": places}))
    return listing


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_shards_are_joined(suffix, small, tmp_path):
    listing = sharded(tmp_path / "shards", {f"model.{key}": value for key, value in small.items()}, suffix)
    for path in (listing, listing.parent):
        assert_same(read_weights(path), small)
    first, second = sorted(listing.parent.glob(f"*{suffix}"))
    with pytest.raises(UserError, match=f"one of 2 shards. Pass the listing of all, {listing.name}, which lies beside"):
        read_weights(first)
    second.unlink()
    with pytest.raises(UserError, match=f"{second.name} is not there"):
        read_weights(listing)
    listing.write_text(json.dumps({"weight_map": {"a": "../weights.bin"}}))
    with pytest.raises(UserError, match="must lie beside it"):
        read_weights(listing)
    for text in ("{", "[]", '{"weight_map": 3}', '{"weight_map": {}}'):
        listing.write_text(text)
        with pytest.raises(UserError, match="weight_map|names none"):
            read_weights(listing)
    (tmp_path / "two").mkdir()
    for name in ("a.pth", "b.pth"):
        torch.save(small, tmp_path / "two" / name)
    with pytest.raises(UserError, match="with a.pth, b.pth. Name one file"):
        read_weights(tmp_path / "two")
    (tmp_path / "two" / "a.pth").unlink()
    assert_same(read_weights(tmp_path / "two"), small)


def test_a_file_is_read_by_its_content_and_not_by_its_name(small, tmp_path):
    save_file(small, tmp_path / "weights.pth")
    torch.save(small, tmp_path / "weights.safetensors")
    for name in ("weights.pth", "weights.safetensors"):
        assert_same(read_weights(tmp_path / name), small)


def test_nested_checkpoints(small, tmp_path):
    for content in [
        {"trainer": {"var_wo_ddp": small, "config": {"depth": 2}}, "epoch": 3, "args": {"bs": 1}},
        {"state_dict": small, "step": 7},
        {"state_dict": small, "step": torch.tensor(7)},
        {"model": {key + "x": value for key, value in small.items()}, "ema": small},
        {"model_ema": {"module": small}},
    ]:
        assert_same(read_weights(pth(tmp_path / "weights.pth", content), nested=("var_wo_ddp",)), small)


def test_one_checkpoint_can_hold_both_networks(small, tmp_path):
    other = {"c": torch.zeros(1)}
    path = pth(tmp_path / "weights.pth", {"trainer": {"vae_local": other, "var_wo_ddp": small, "var_opt": {"lr": 1}}})
    assert_same(read_weights(path, nested=("var_wo_ddp",)), small)
    assert_same(read_weights(path, nested=("vae_local",)), other)


def test_objects_are_refused_and_not_run(small, tmp_path):
    path = pth(tmp_path / "weights.pth", {"state_dict": small, "config": Foreign()})
    with pytest.raises(UserError, match="never runs pickled code"):
        read_weights(path)


def test_files_that_are_no_weights(tmp_path):
    for content, said in [
        (b"", "is empty"),
        (b"PK", "not the whole of one"),
        (b"<html>not found</html>", "web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        (b'{"width": 8}', "is JSON"),
        (b"GGUF\x03", "quantized for other software"),
    ]:
        for suffix in (".pth", ".safetensors"):
            path = tmp_path / f"weights{suffix}"
            path.write_bytes(content)
            with pytest.raises(UserError, match=said):
                read_weights(path)


def test_truncated_files(small, tmp_path):
    for path, save in ((tmp_path / "weights.pth", torch.save), (tmp_path / "weights.safetensors", save_file)):
        save(small, path)
        whole = path.read_bytes()
        for share in (0.1, 0.5, 0.99):
            path.write_bytes(whole[: int(len(whole) * share)])
            with pytest.raises(UserError, match="not the whole of one.*copy or download it again"):
                read_weights(path)


def test_absent_files(tmp_path):
    for path in (tmp_path / "absent.pth", tmp_path):
        with pytest.raises(UserError, match="must be a file"):
            read_weights(path)


def test_contents_that_are_no_state_dict(tmp_path):
    for content, said in [
        ([torch.zeros(2)], "must hold a state dict, got list"),
        (torch.zeros(2), "must hold a state dict, got Tensor"),
        ({"epoch": 3, "note": "x"}, "holds no tensors"),
        ({}, "holds no tensors"),
        ({"state_dict": {}}, "holds no tensors"),
        ({"a": torch.zeros(1), "epoch": 3}, r"got others under \['epoch'\]"),
        ({0: torch.zeros(1)}, r"got others under \[0\]"),
    ]:
        with pytest.raises(UserError, match=said):
            read_weights(pth(tmp_path / "weights.pth", content))


def test_every_dropped_key_has_its_reason(prior_state, tokenizer_state):
    prior, tokenizer = convert_prior_state(prior_state), convert_tokenizer_state(tokenizer_state, SCALES)
    assert set(tokenizer.dropped) == {"quantize.ema_vocab_hit_SV"}
    assert set(prior.dropped) == {"lvl_1L", "attn_bias_for_masking"} | {
        f"blocks.{i}.attn.zero_k_bias" for i in range(2)
    }
    assert all(reason for reason in (prior.dropped | tokenizer.dropped).values())
    assert len(prior.state) + len(prior.dropped) == len(prior_state)
    assert len(tokenizer.state) + len(tokenizer.dropped) == len(tokenizer_state)


def test_sizes_are_read_off_the_file(prior_state, tokenizer_state):
    assert convert_prior_state(prior_state, "markov").arguments == {
        "scale_sizes": SCALES,
        "codebook_size": 64,
        "codebook_dim": 8,
        "width": 64,
        "num_layers": 2,
        "num_heads": 2,
        "num_classes": 10,
        "scale_attention": "markov",
        "shared_adaln": False,
        "l2_attention": True,
        "mlp_ratio": 4.0,
        "drop_path": pytest.approx(0.1 * 2 / 24),
    }
    assert convert_tokenizer_state(tokenizer_state, SCALES).arguments == {
        "codebook_size": 64,
        "codebook_dim": 8,
        "scale_sizes": SCALES,
        "phi_indices": None,
        "num_phi": 4,
        "phi_ratio": 0.5,
        "base_channels": 32,
        "channel_multipliers": (1, 2),
        "num_res_blocks": 2,
    }


def test_half_precision_files_become_fp32(prior_state):
    half = {k: v.half() if v.is_floating_point() else v for k, v in prior_state.items()}
    state = convert_prior_state(half).state
    assert all(tensor.dtype == torch.float32 for tensor in state.values())


def test_conversion_does_not_modify_the_file(prior_state, tokenizer_state):
    for state, convert in (
        (prior_state, convert_prior_state),
        (tokenizer_state, lambda s: convert_tokenizer_state(s, SCALES)),
    ):
        before = {key: tensor.clone() for key, tensor in state.items()}
        convert(state)
        assert_same(state, before)


@pytest.mark.parametrize("sharing", ["one", "per-scale", "none"])
def test_sharing_of_phi_is_read_off_the_keys(sharing, tokenizer_state):
    plain = {k: v for k, v in tokenizer_state.items() if "quant_resi" not in k}
    shared = {k.rsplit(".", 1)[-1]: v for k, v in tokenizer_state.items() if "qresi_ls.0" in k}
    if sharing == "one":
        plain |= {f"quantize.quant_resi.qresi.{leaf}": v for leaf, v in shared.items()}
    elif sharing == "per-scale":
        plain |= {f"quantize.quant_resi.{i}.{leaf}": v + i for i in range(4) for leaf, v in shared.items()}
    tokenizer = build_tokenizer(convert_tokenizer_state(plain, SCALES))
    assert len(tokenizer.phi) == {"one": 1, "per-scale": 4, "none": 0}[sharing]
    # four scales: one phi serves all, four serve one each
    assert tokenizer.schedule.phi_indices == ((0, 1, 2, 3) if sharing == "per-scale" else (0, 0, 0, 0))
    if sharing == "per-scale":
        with pytest.raises(UserError, match="one phi for each of 4 scales, but the schedule has 3"):
            convert_tokenizer_state(plain, (1, 2, 4))


def test_the_number_of_scales_comes_from_the_prior(tokenizer_state):
    # the usage statistics have a row per scale, and nothing reads them
    tokenizer = build_tokenizer(convert_tokenizer_state(tokenizer_state, (1, 2, 4, 6, 8)))
    assert tokenizer.schedule.phi_indices == (0, 1, 2, 2, 3)
    assert tokenizer.encode(torch.zeros(1, 3, 16, 16)).token_ids[-1].shape == (1, 64)


def test_the_two_files_exchanged(prior_state, tokenizer_state):
    with pytest.raises(UserError, match="VAR prior holds pos_1LC.*it is a VAR tokenizer. Pass it as such"):
        convert_prior_state(tokenizer_state)
    with pytest.raises(UserError, match="VAR tokenizer holds quantize.embedding.weight.*it is a VAR prior"):
        convert_tokenizer_state(prior_state, SCALES)


def test_what_is_neither_is_told_by_its_keys(prior_state):
    with pytest.raises(UserError, match=r"its keys begin with layers \(2\), head \(1\), such as"):
        convert_prior_state({key: torch.zeros(1) for key in ("layers.0.w", "layers.1.w", "head.weight")})
    with pytest.raises(UserError, match="it has student.pos_1LC.*part under 'student' alone"):
        convert_prior_state(
            {f"student.{key}": value for key, value in prior_state.items()} | {"loss.a": torch.zeros(1)}
        )


def test_a_sharded_and_wrapped_checkpoint_becomes_the_same_model(prior_state, tmp_path):
    wrapped = {f"model.{key}": value for key, value in prior_state.items()}
    found = convert_prior_state(read_weights(sharded(tmp_path / "shards", wrapped, ".safetensors")))
    assert fingerprint(build_prior(found)) == fingerprint(build_prior(convert_prior_state(prior_state)))


def test_unknown_keys_are_refused(prior_state, tokenizer_state):
    with pytest.raises(UserError, match=r"no such keys: \['mask_embed.weight'\]"):
        convert_prior_state(prior_state | {"mask_embed.weight": torch.zeros(1)})
    with pytest.raises(UserError, match="no such keys"):
        convert_tokenizer_state(tokenizer_state | {"quantize.vocab_usage": torch.zeros(1)}, SCALES)
    with pytest.raises(UserError, match="no such keys"):
        # a second layout of phi beside the first would overwrite it
        convert_tokenizer_state(tokenizer_state | {"quantize.quant_resi.0.bias": torch.zeros(8)}, SCALES)


def test_every_missing_key_is_an_error(prior_state, tokenizer_state):
    derivable = {"attn_bias_for_masking", "blocks.0.attn.zero_k_bias", "blocks.1.attn.zero_k_bias"}
    for key in set(prior_state) - derivable:
        with pytest.raises(UserError):
            build_prior(convert_prior_state({k: v for k, v in prior_state.items() if k != key}))
    for key in list(tokenizer_state)[::9] + ["encoder.conv_in.weight", "encoder.down.0.block.0.conv1.weight"]:
        if key != "quantize.ema_vocab_hit_SV":
            with pytest.raises(UserError):
                less = {k: v for k, v in tokenizer_state.items() if k != key}
                build_tokenizer(convert_tokenizer_state(less, SCALES))


def test_derivable_entries_may_be_absent(prior_state):
    less = {k: v for k, v in prior_state.items() if "zero_k_bias" not in k and k != "attn_bias_for_masking"}
    assert fingerprint(build_prior(convert_prior_state(less))) == fingerprint(
        build_prior(convert_prior_state(prior_state))
    )


def test_scales_that_are_not_square_are_refused(prior_state):
    level = prior_state["lvl_1L"].clone()
    level[0, 1] = 0
    with pytest.raises(UserError, match="square number of tokens"):
        convert_prior_state(prior_state | {"lvl_1L": level})


def test_tensors_of_another_shape_are_refused(prior_state):
    with pytest.raises(UserError, match=r"head.bias is \(63,\), expected \(64,\)"):
        build_prior(convert_prior_state(prior_state | {"head.bias": torch.zeros(63)}))


def test_strict_loading_names_the_first_few():
    model = torch.nn.Linear(2, 3)
    with pytest.raises(UserError, match=r"missing bias; unexpected extra; weight is \(1, 2\), expected \(3, 2\)"):
        load_strict(model, {"weight": torch.zeros(1, 2), "extra": torch.zeros(1)}, "the file")
    many = {f"extra{i}": torch.zeros(1) for i in range(9)}
    with pytest.raises(UserError, match="and 5 more"):
        load_strict(model, many | model.state_dict(), "the file")


def test_switti_draws_as_its_published_examples_do():
    """Spec of Switti, 7: the second and the third row of its table, and the first for other sizes."""
    ten, fourteen = (1, 2, 3, 4, 6, 9, 13, 18, 24, 32), (1, 2, 3, 4, 5, 7, 9, 12, 16, 21, 27, 36, 48, 64)
    filters, smooth = "top-k 400, top-p 0.95", "smooth 2-{}:unfiltered"
    for sizes, said in [
        (ten, f"guidance linear:1:7:2-7, {filters}, temperature {'1,' * 8}0.1,0.1, {smooth.format(7)}"),
        (fourteen, f"guidance linear:1:7:10, {filters}, temperature {'1,' * 11}0.1,0.1,0.1, {smooth.format(10)}"),
        ((1, 2, 4, 16), f"guidance linear:1:7, {filters}"),
    ]:
        assert switti_sampling(sizes, 4096).words() == said
    guidance = switti_sampling(ten, 4096).guidance_scale.values(10)
    assert guidance == pytest.approx([1, 1, 7 / 3, 3, 11 / 3, 13 / 3, 5, 17 / 3, 1, 1])

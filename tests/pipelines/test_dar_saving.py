import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from isthmus.errors import UserError
from isthmus.next_scale.pipeline import NextScalePipeline
from isthmus.nn.saved_model import Config
from isthmus.pipelines.folder import FORMAT
from isthmus.pipelines.loading import load_pipeline
from isthmus.pipelines.options import SamplingOptions
from tests.pipelines.tiny_dar import tiny_dar

WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A saved D-AR pipeline; tests that change it copy it first."""
    path = tmp_path_factory.mktemp("models") / "tiny"
    data = {"name": "drawings", "attribution": "CC0"}
    tiny_dar(sampling_defaults={"guidance_scale": 2.0}, data=data).save_pretrained(path)
    return path


@pytest.fixture
def copied(folder, tmp_path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copied"))


def edit_json(path: Path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_saved_pipeline_draws_the_same_wherever_it_lies(folder, copied):
    pipe = tiny_dar(sampling_defaults={"guidance_scale": 2.0})
    expected = pipe([0, 1], seed=3, output_type="latent")
    for path in (folder, str(copied)):
        loaded = load_pipeline(path)
        drawn = loaded(["face", "flag"], seed=3, output_type="latent")
        assert torch.equal(drawn.token_ids, expected.token_ids) and torch.equal(drawn.images, expected.images)
    assert loaded.fingerprint == pipe.fingerprint
    assert loaded.defaults == SamplingOptions(guidance_scale=2.0)
    assert set(loaded.components) == {"image_tokenizer", "decoder", "transformer", "scheduler"}
    assert not loaded.transformer.training and type(loaded.transformer).__module__.startswith("transformers.")


def test_saving_is_quiet(folder, tmp_path, capfd):
    load_pipeline(folder).save_pretrained(tmp_path / "again")
    assert capfd.readouterr() == ("", "")


def test_the_folder_holds_what_the_design_says(folder):
    index = json.loads((folder / "model_index.json").read_text())
    assert index["isthmus_format"] == FORMAT and index["isthmus_version"]
    assert index["transformer"] == ["transformers", "LlamaForCausalLM"]
    assert index["scheduler"] == ["isthmus.dar.scheduler", "FlowMatchingScheduler"]
    assert index["image_tokenizer"] == ["isthmus.dar.tokenizer", "DiffusionTokenizer"]
    assert index["decoder"] == ["isthmus.dar.decoder", "FlowDecoder"]
    card = (folder / "README.md").read_text()
    for part in ("drawings", "CC0", "load_pipeline", "16 in 4 groups", 'class_labels=["face"]', "transformer 0.0"):
        assert part in card
    assert {path.suffix for path in folder.rglob("*") if path.is_file()} == {".json", ".md", ".safetensors"}
    modes = {path.stat().st_mode for path in folder.rglob("*") if path.is_file()}
    assert len(modes) == 1


def test_what_images_depend_on_is_in_the_fingerprint(copied):
    before = load_pipeline(copied).fingerprint
    edit_json(copied / "scheduler" / "scheduler_config.json", time_shift=1.0)
    assert load_pipeline(copied).fingerprint != before
    edit_json(copied / "scheduler" / "scheduler_config.json", time_shift=2.0)
    edit_json(copied / "transformer" / "config.json", transformers_version="4.0")
    assert load_pipeline(copied).fingerprint == before
    path = copied / "transformer" / WEIGHTS
    weights = load_file(path)
    weights["model.norm.weight"] += 1
    save_file(weights, path, metadata={"format": "pt"})
    assert load_pipeline(copied).fingerprint != before


@pytest.mark.parametrize(
    ("file", "changes", "said"),
    [
        ("model_index.json", {"wishes": 1}, "wishes"),
        ("model_index.json", {"transformer": ["os", "system"]}, "LlamaForCausalLM"),
        ("model_index.json", {"scheduler": [None, None]}, "FlowMatchingScheduler"),
        ("model_index.json", {"sampling_defaults": {"topk": 1}}, "topk"),
        ("model_index.json", {"sampling_defaults": {"smooth": True}}, "smooth"),
        ("transformer/config.json", {"wishes": 1}, "wishes"),
        ("transformer/config.json", {"hidden_size": 32}, "expected"),
        ("transformer/config.json", {"num_hidden_layers": 1}, "unexpected"),
        ("transformer/config.json", {"num_hidden_layers": 3}, "missing"),
        ("transformer/config.json", {"architectures": ["MistralForCausalLM"]}, "must hold a LlamaForCausalLM"),
        ("transformer/config.json", {"architectures": None}, "must hold a LlamaForCausalLM"),
        ("transformer/config.json", {"codebook_size": 8}, "codebook_size"),
        ("transformer/config.json", {"max_position_embeddings": 33}, "positions"),
        ("transformer/config.json", {"hidden_act": "gelu"}, "hidden_act"),
        ("decoder/config.json", {"wishes": 1}, "wishes"),
        ("decoder/config.json", {"width": 32}, "expected"),
        ("image_tokenizer/config.json", {"codebook_size": 8}, "expected"),
        ("scheduler/scheduler_config.json", {"wishes": 1}, "wishes"),
        ("scheduler/scheduler_config.json", {"num_groups": 2}, "num_groups"),
        ("scheduler/scheduler_config.json", {"_class_name": "Other"}, "FlowMatchingScheduler"),
    ],
)
def test_settings_that_do_not_fit_are_errors(copied, file, changes, said):
    edit_json(copied / file, **changes)
    with pytest.raises(UserError, match=said):
        load_pipeline(copied)


def test_weights_must_be_complete_and_no_more(copied):
    path = copied / "transformer" / WEIGHTS
    weights = load_file(path)
    save_file(weights | {"extra.weight": torch.zeros(1)}, path)
    with pytest.raises(UserError, match="unexpected extra.weight"):
        load_pipeline(copied)
    weights.pop("lm_head.weight")
    save_file(weights, path)
    with pytest.raises(UserError, match="missing lm_head.weight"):
        load_pipeline(copied)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match="truncated"):
        load_pipeline(copied)
    path.unlink()
    with pytest.raises(UserError, match="transformer/model.safetensors, which is missing"):
        load_pipeline(copied)


def test_a_folder_without_its_scheduler_is_refused(copied):
    (copied / "scheduler" / "scheduler_config.json").unlink()
    with pytest.raises(UserError, match="scheduler_config.json, which is missing"):
        load_pipeline(copied)


def test_shards_load_too(folder, tmp_path):
    tiny_dar(sampling_defaults={"guidance_scale": 2.0}).save_pretrained(tmp_path / "sharded", max_shard_size="10KB")
    assert len(list((tmp_path / "sharded" / "transformer").glob("*.safetensors"))) > 1
    assert load_pipeline(tmp_path / "sharded").fingerprint == load_pipeline(folder).fingerprint


def test_an_interrupted_save_leaves_nothing(tmp_path):
    pipe = tiny_dar()
    pipe.config = Config(pipe.config | {"protocol": object()})  # cannot be written as JSON
    with pytest.raises(TypeError):
        pipe.save_pretrained(tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_families_are_not_mixed_up(folder):
    with pytest.raises(UserError, match="holds a DARPipeline, not a NextScalePipeline"):
        NextScalePipeline.from_pretrained(folder)


def test_bf16_draws(folder):
    loaded = load_pipeline(folder, dtype="bfloat16")
    assert loaded.transformer.dtype == loaded.decoder.dtype == torch.bfloat16
    images = loaded(["face", 1], seed=0, output_type="pt").images
    assert images.dtype == torch.float32 and bool(torch.isfinite(images).all())

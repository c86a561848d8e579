import json
import shutil
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from isthmus.errors import UserError
from isthmus.next_scale.pipeline import NextScalePipeline
from isthmus.nn.saved_model import Config, check_finite, without_values
from isthmus.pipelines.folder import FORMAT
from isthmus.pipelines.loading import choose_device, choose_dtype, load_pipeline
from isthmus.pipelines.options import SamplingOptions
from isthmus.pipelines.request import token_hashes
from tests.pipelines.tiny import tiny_pipeline
from tests.pipelines.tiny_dar import tiny_dar

HERE = Path(__file__).parent
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def copied(saved, tmp_path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "copied"))


def edit_json(path: Path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_saved_pipeline_draws_the_same_wherever_it_lies(saved, tmp_path):
    expected = token_hashes(tiny_pipeline(sampling_defaults={"guidance_scale": 2.0})([0, 1], seed=3).token_ids)
    moved = Path(shutil.copytree(saved, tmp_path / "elsewhere" / "moved"))
    for folder in (saved, str(moved)):
        loaded = load_pipeline(folder)
        assert token_hashes(loaded(["face", "flag"], seed=3).token_ids) == expected
    assert loaded.fingerprint == load_pipeline(saved).fingerprint
    assert loaded.defaults == SamplingOptions(guidance_scale=2.0)
    assert set(loaded.components) == {"image_tokenizer", "transformer", "scheduler"}
    assert loaded.scheduler is None


@pytest.mark.parametrize("pipeline", [tiny_pipeline, tiny_dar])
def test_a_pipeline_loaded_without_values_has_its_shapes_alone(pipeline, tmp_path):
    made = pipeline()
    made.save_pretrained(tmp_path)
    with without_values():
        loaded = load_pipeline(tmp_path)
        for name in ("image_tokenizer", "transformer"):
            shapes, given = getattr(loaded, name).state_dict(), getattr(made, name).state_dict()
            assert all(tensor.is_meta for tensor in shapes.values())
            assert {n: t.shape for n, t in shapes.items()} == {n: t.shape for n, t in given.items()}


def test_the_folder_holds_what_the_design_says(saved):
    index = json.loads((saved / "model_index.json").read_text())
    assert index["isthmus_format"] == FORMAT and index["isthmus_version"] and index["scheduler"] == [None, None]
    assert index["class_names"] == {"0": "face", "1": "flag", "2": "hand"}
    assert index["preprocessing"]["image_size"] == 8
    card = (saved / "README.md").read_text()
    for part in ("drawings", "CC0", "load_pipeline", "Protocol", "1, 2, 4", 'class_labels=["face"]'):
        assert part in card
    assert {path.suffix for path in saved.rglob("*") if path.is_file()} == {".json", ".md", ".safetensors"}


@pytest.mark.parametrize("name", ["format1", "format1_dar"])
def test_a_folder_of_format_1_still_loads(name, tmp_path):
    """Both were written by versions whose base classes were diffusers'."""
    with zipfile.ZipFile(HERE / f"{name}.zip") as archive:
        archive.extractall(tmp_path)
    loaded = load_pipeline(tmp_path / name)
    expected = json.loads((tmp_path / name / "expected.json").read_text())
    token_ids = loaded(["face", "flag", None], seed=3).token_ids
    hashes = token_hashes([token_ids] if isinstance(token_ids, torch.Tensor) else token_ids)
    assert hashes == expected["token_ids_sha256"]
    assert loaded.fingerprint == expected["fingerprint"]
    assert loaded.class_names == {"0": "face", "1": "flag"}
    loaded.save_pretrained(tmp_path / "again")
    assert load_pipeline(tmp_path / "again").fingerprint == expected["fingerprint"]


def test_saving_again_replaces_ours_and_leaves_the_rest(copied):
    (copied / "notes.txt").write_text("mine")
    other = tiny_pipeline(num_classes=2)
    other.save_pretrained(copied)
    assert (copied / "notes.txt").read_text() == "mine"
    assert load_pipeline(copied).fingerprint == other.fingerprint
    assert not list(copied.glob(".partial*"))


def test_an_interrupted_save_leaves_nothing(tmp_path):
    pipe = tiny_pipeline()
    pipe.config = Config(pipe.config | {"protocol": object()})  # cannot be written as JSON
    with pytest.raises(TypeError):
        pipe.save_pretrained(tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_a_newer_format_is_refused_in_words(copied):
    edit_json(copied / "model_index.json", isthmus_format=FORMAT + 1, isthmus_version="9.1")
    with pytest.raises(UserError, match=f"format {FORMAT + 1} .*9.1.*Update Isthmus"):
        load_pipeline(copied)


@pytest.mark.parametrize(
    ("file", "changes", "said"),
    [
        ("model_index.json", {"wishes": 1}, "wishes"),
        ("model_index.json", {"isthmus_format": "1"}, "isthmus_format"),
        ("model_index.json", {"_class_name": "OtherPipeline"}, "OtherPipeline"),
        ("model_index.json", {"transformer": ["os", "system"]}, "NextScaleTransformer"),
        ("model_index.json", {"scheduler": ["isthmus.schedulers", "Later"]}, "scheduler"),
        ("model_index.json", {"sampling_defaults": {"topk": 1}}, "topk"),
        ("transformer/config.json", {"wishes": 1}, "wishes"),
        ("transformer/config.json", {"width": 32}, "expected"),
        ("transformer/config.json", {"num_layers": 1}, "unexpected"),
        ("transformer/config.json", {"_class_name": "MultiScaleVQVAE"}, "NextScaleTransformer"),
        ("image_tokenizer/config.json", {"num_res_blocks": 2}, "missing"),
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
    weights.pop("head.weight")
    save_file(weights, path)
    with pytest.raises(UserError, match="missing head.weight"):
        load_pipeline(copied)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match="truncated"):
        load_pipeline(copied)
    path.unlink()
    with pytest.raises(UserError, match="missing"):
        load_pipeline(copied)


@pytest.mark.parametrize("made", [tiny_pipeline, tiny_dar])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_that_are_not_finite_are_named(made, value, dtype, tmp_path):
    made().to(dtype).save_pretrained(tmp_path)
    for path in tmp_path.rglob("*.safetensors"):
        weights = load_file(path)
        name = sorted(weights)[-1]
        broken = weights[name].clone()
        broken.view(-1)[-1] = value
        save_file(weights | {name: broken}, path, metadata={"format": "pt"})
        with pytest.raises(UserError, match=f"finite, got NaN or infinity in {name} of .*{path.parent.name}"):
            load_pipeline(tmp_path)
        save_file(weights, path, metadata={"format": "pt"})
    assert load_pipeline(tmp_path).num_classes == 3


def test_large_weights_are_finite():
    """Their sum is not."""
    check_finite({"w": torch.full((8,), 3e38), "h": torch.full((8,), 6e4, dtype=torch.float16)}, "a file")


def test_what_is_no_pipeline_is_refused(tmp_path, saved):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "a.txt").write_text("x")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "model_index.json").write_text("{")
    for name, said in [
        ("nowhere", "does not exist"), ("empty", "is empty"), ("file", "is a file"), ("other", "no model_index"),
        ("broken", "JSON"),
    ]:  # fmt: skip
        with pytest.raises(UserError, match=said):
            load_pipeline(tmp_path / name)
    (tmp_path / "half").mkdir()
    shutil.copy(saved / "model_index.json", tmp_path / "half")
    with pytest.raises(UserError, match="config.json"):
        NextScalePipeline.from_pretrained(tmp_path / "half")


def test_shards_load_too(tmp_path, saved):
    tiny_pipeline().save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    assert len(list((tmp_path / "sharded" / "transformer").glob("*.safetensors"))) > 1
    assert load_pipeline(tmp_path / "sharded").fingerprint == load_pipeline(saved).fingerprint


def test_devices_and_types():
    assert choose_device("cpu") == torch.device("cpu")
    assert choose_device("auto").type in ("cpu", "cuda")
    for absent in ("cuda:99", "gpu", "xpu"):
        with pytest.raises(UserError, match="cpu"):
            choose_device(absent)
    assert choose_dtype(None) is torch.float32 and choose_dtype("bfloat16") is torch.bfloat16
    for bad in ("float16", torch.float64):
        with pytest.raises(UserError, match="float32,? (or )?bfloat16"):
            choose_dtype(bad)


def test_bf16_draws(saved):
    loaded = load_pipeline(saved, dtype="bfloat16")
    assert loaded.transformer.dtype == torch.bfloat16
    images = loaded(["face", 1], seed=0, output_type="pt").images
    assert images.dtype == torch.float32 and bool(torch.isfinite(images).all())

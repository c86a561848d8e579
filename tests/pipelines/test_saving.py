import json
import shutil
import zipfile
from pathlib import Path

import pytest
import torch

from isthmus.errors import UserError
from isthmus.next_scale.pipeline import NextScalePipeline
from isthmus.nn.saved_model import check_finite
from isthmus.pipelines.loading import choose_device, choose_dtype, load_pipeline
from tests.testers import token_hashes

HERE = Path(__file__).parent


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


def test_weights_are_finite():
    # large ones, too: their sum is not
    check_finite({"w": torch.full((8,), 3e38), "h": torch.full((8,), 6e4, dtype=torch.float16)}, "a file")
    for value in (float("nan"), float("inf"), -float("inf")):
        for dtype in (torch.float32, torch.bfloat16):
            with pytest.raises(UserError, match="NaN or infinity in w of a file"):
                check_finite({"v": torch.zeros(2), "w": torch.tensor([0, value], dtype=dtype)}, "a file")


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

import json

import pytest

from isthmus.pipelines.loading import load_pipeline
from tests.pipelines.tiny import tiny_pipeline
from tests.training.tiny_runs import write_images

pytestmark = pytest.mark.slow

QUICK = ("--num-steps", 2, "--batch-size", 4, "--width", 8, "--num-blocks", 1, "--num-views", 1)


def test_images_are_those_of_the_model_unless_they_are_named(isthmus, refused, tmp_path):
    model, out = tmp_path / "model", tmp_path / "critic"
    tiny_pipeline(names=False).save_pretrained(model)
    said = refused("train", "critic", model, "--out", out, *QUICK)
    assert "does not say which" in said and "--data" in said
    assert not out.exists()
    data = write_images(tmp_path / "squares.npz", num_classes=3)
    (model / "run.json").write_text(json.dumps({"run": {"data": data, "classes": ["0", "1", "2"]}}))
    assert data in isthmus("train", "critic", model, "--out", out, *QUICK).err
    assert load_pipeline(out, device="cpu").scheduler.mode == "critic"
    assert "classes of the model" in refused("train", "critic", model, "--data", "photos", "--out", tmp_path / "p")

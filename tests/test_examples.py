"""The scripts in examples/ on a tiny model."""

import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from isthmus.pictures import table
from tests.pipelines.tiny import tiny_pipeline
from tests.pipelines.tiny_dar import tiny_dar

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


@pytest.mark.slow
def test_the_layout_strip_has_a_row_per_class_and_ends_with_the_image(tmp_path, monkeypatch):
    tiny_dar().save_pretrained(tmp_path / "model")
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "image.png")
    words = [tmp_path / "model", tmp_path / "image.png", "--out", tmp_path / "strip.png"]
    monkeypatch.setattr(sys, "argv", ["layout_strip.py", *map(str, words)])
    runpy.run_path(str(EXAMPLES / "layout_strip.py"), run_name="__main__")
    strip = np.asarray(Image.open(tmp_path / "strip.png").convert("RGB"))
    # a table enlarges small images to 64 px, and the last column ends 2 px before the edge
    enlarged, last = pixels.repeat(8, axis=0).repeat(8, axis=1), strip[:, -2 - 64 : -2]
    tops = range(len(last) - 63)
    assert sum(np.array_equal(last[top : top + 64], enlarged) for top in tops) == 3, "the image itself, once per class"


@pytest.mark.slow
@pytest.mark.parametrize(("make", "more", "steps"), [(tiny_pipeline, [], 3), (tiny_dar, ["--stop-after", "2"], 2)])
def test_the_table_of_a_diffusers_pipeline_has_a_column_per_step(make, more, steps, tmp_path, monkeypatch):
    make().save_pretrained(tmp_path / "model")
    words = ["with_diffusers.py", str(tmp_path / "model"), "--out", str(tmp_path / "steps.png"), *more]
    # in this process: importing diffusers takes longer than the rest
    monkeypatch.setattr(sys, "argv", words)
    runpy.run_path(str(EXAMPLES / "with_diffusers.py"), run_name="__main__")
    blank = [[Image.new("RGB", (8, 8))] * steps] * 3
    with Image.open(tmp_path / "steps.png") as drawn:
        assert drawn.size == table(blank, row_names=["face", "flag", "hand"], column_names=["step"] * steps).size

"""The scripts in examples/ on a tiny model."""

import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.pipelines.tiny import tiny_pipeline
from tests.pipelines.tiny_dar import tiny_dar

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


@pytest.fixture
def run_example(monkeypatch):
    """Run a script with these words on its command line, in this process."""

    def run(name: str, *words: object) -> None:
        monkeypatch.setattr(sys, "argv", [name, *map(str, words)])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")

    return run


@pytest.mark.slow
def test_the_layout_strip_has_a_row_per_class_and_ends_with_the_image(tmp_path, run_example):
    tiny_dar().save_pretrained(tmp_path / "model")
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "image.png")
    words = [tmp_path / "model", tmp_path / "image.png", "--out", tmp_path / "strip.png"]
    run_example("layout_strip.py", *words)
    strip = np.asarray(Image.open(tmp_path / "strip.png").convert("RGB"))
    # a table enlarges small images to 64 px, and the last column ends 2 px before the edge
    enlarged, last = pixels.repeat(8, axis=0).repeat(8, axis=1), strip[:, -2 - 64 : -2]
    tops = range(len(last) - 63)
    assert sum(np.array_equal(last[top : top + 64], enlarged) for top in tops) == 3, "the image itself, once per class"


@pytest.mark.slow
@pytest.mark.parametrize(("make", "steps"), [(tiny_pipeline, 3), (tiny_dar, 4)])
def test_the_table_of_a_diffusers_pipeline_has_a_column_per_step(make, steps, tmp_path, run_example):
    make().save_pretrained(tmp_path / "model")
    widths = {}
    for count in (steps, 2):
        words = [tmp_path / "model", "--out", tmp_path / f"{count}.png", "--stop-after", count]
        run_example("with_diffusers.py", *words)
        widths[count] = Image.open(tmp_path / f"{count}.png").width
    # a column is 64 px and a gap of 2
    assert widths[steps] - widths[2] == (steps - 2) * 66

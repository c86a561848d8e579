"""Pictures of the demo: rows are what was asked for, and every image is one that the model draws elsewhere too."""

import numpy as np
import pytest
from PIL import Image

from isthmus.data.avatars import AVATAR_STYLES, Avatars
from isthmus.demo.options import DemoOptions
from isthmus.demo.run import Asked, _asked, draw_growth, draw_layouts, draw_samples
from isthmus.evaluation.alignment import held_out_combinations
from tests.pipelines.tiny import tiny_text_pipeline
from tests.pipelines.tiny_dar import tiny_dar

CELL_PX = 66  # images of 8 px enlarged to 64, and the gap beside them
SEED, COLUMNS = 5, 8
STYLES = AVATAR_STYLES[:2]
PROMPTS = ["a critter", "a clay creature, teal body"]


@pytest.fixture
def options(tmp_path) -> DemoOptions:
    return DemoOptions(out=tmp_path, seed=SEED)


@pytest.fixture(scope="module", params=["prompts", "classes"])
def drawn(request):
    """A pipeline and what the demo asks it for."""
    white = (Image.new("RGB", (8, 8), "white"),) * 2
    if request.param == "prompts":
        return tiny_text_pipeline(), Asked(("1", "2"), {"prompt": PROMPTS}, white, "captions")
    pipe = tiny_dar(sampling_defaults={"guidance_scale": 2.0})
    return pipe, Asked(("face", "flag"), {"class_labels": [0, 1]}, (), "classes")


def cells(options: DemoOptions, name: str, num_columns: int, num_rows: int) -> list[list[np.ndarray]]:
    """The images of a table, by row: names are at the left and on top, every pixel is 8 x 8 pixels."""
    with Image.open(options.folder / name) as opened:
        picture = np.asarray(opened.convert("RGB"))
    left, top = picture.shape[1] - num_columns * CELL_PX, picture.shape[0] - num_rows * CELL_PX
    assert left >= 0 and top >= 0
    rows = [picture[top + CELL_PX * i :] for i in range(num_rows)]
    return [[row[:64:8, left + CELL_PX * j :][:, :64:8] for j in range(num_columns)] for row in rows]


def test_samples_are_those_of_a_call_with_the_real_drawing_beside(drawn, options):
    pipe, asked = drawn
    draw_samples(pipe, asked, options)
    rows = cells(options, "samples.png", COLUMNS + bool(asked.real), 2)
    for row, shown in enumerate(rows):
        one = {name: values[row] for name, values in asked.call.items()}
        image = pipe(**one, seed=SEED, image_index=row * COLUMNS + 3).images[0]
        assert np.array_equal(shown[3], np.asarray(image))
        assert not asked.real or shown[-1].min() == 255


def test_growth_ends_with_the_first_sample_of_every_row(drawn, options):
    pipe, asked = drawn
    assert 0 < draw_growth(pipe, asked, options) < 1
    draw_samples(pipe, asked, options)
    samples = cells(options, "samples.png", COLUMNS + bool(asked.real), 2)
    with Image.open(options.folder / "growth.png") as opened:
        steps = opened.width // CELL_PX
    for grown, row in zip(cells(options, "growth.png", steps, 2), samples, strict=True):
        assert np.array_equal(grown[-1], row[0]) and not np.array_equal(grown[0], grown[-1])


def test_layouts_go_from_no_token_of_the_reference_to_half_of_them(options):
    pipe, held_out = tiny_dar(), Avatars(STYLES, image_size=8, split="val", num_images=40)
    asked = Asked(("face", "flag"), {"class_labels": [0, 1]}, (), "classes")
    draw_layouts(pipe, asked, held_out, options)
    lengths, reference = [0, 1, 2, 4, 8], Image.fromarray(held_out.load(0))
    for label, row in enumerate(cells(options, "layout.png", len(lengths) + 1, 2)):
        for kept, shown in zip(lengths, row, strict=False):
            (image,) = pipe(
                label, prefix_image=reference, prefix_tokens=kept, seed=SEED, image_index=label * COLUMNS
            ).images
            assert np.array_equal(shown, np.asarray(image))
        assert np.array_equal(row[-1], np.asarray(reference))


def test_prompts_are_captions_of_every_style_and_of_pairs_that_training_has_not_seen():
    held_out = Avatars(STYLES, image_size=8, split="val", num_images=40)
    asked = _asked(tiny_text_pipeline(), held_out)
    new = held_out_combinations(STYLES, len(STYLES), image_size=8)
    prompts = asked.call["prompt"]
    assert prompts[-len(new) :] == new.captions and held_out.captions is not None
    assert [held_out.captions.index(prompt) % len(STYLES) for prompt in prompts[:2]] == [0, 1]
    assert len(asked.real) == len(asked.names) == len(prompts) <= 8

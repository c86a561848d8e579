import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

from isthmus.dar.pipeline import DARPipeline
from isthmus.demo.options import DemoOptions
from isthmus.demo.run import (
    SAMPLES_PER_CLASS,
    draw_dar_previews,
    draw_layouts,
    draw_reconstructions,
    draw_samples,
    reconstructions,
    shrunk_and_back,
)
from isthmus.pictures import to_pil
from tests.pipelines.tiny_dar import tiny_dar

pytestmark = pytest.mark.slow

CELL_PX = 66  # images of 8 px enlarged to 64, and the gap beside them
SEED = 5


@pytest.fixture(scope="module")
def pipe() -> DARPipeline:
    """A labelled pipeline of 8 px; do not modify it."""
    return tiny_dar(sampling_defaults={"guidance_scale": 2.0})


@pytest.fixture
def images() -> torch.Tensor:
    return torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.fixture
def options(tmp_path) -> DemoOptions:
    return DemoOptions(family="dar", out=tmp_path, seed=SEED)


def cells(options: DemoOptions, name: str, num_columns: int, num_rows: int) -> list[list[np.ndarray]]:
    """The images of a table, by row: names are at the left and on top, every pixel is 8 x 8 pixels."""
    with Image.open(options.folder / name) as opened:
        picture = np.asarray(opened.convert("RGB"))
    left, top = picture.shape[1] - num_columns * CELL_PX, picture.shape[0] - num_rows * CELL_PX
    assert left >= 0 and top >= 0
    rows = [picture[top + CELL_PX * i :] for i in range(num_rows)]
    return [[row[:64:8, left + CELL_PX * j :][:, :64:8] for j in range(num_columns)] for row in rows]


def assert_same_pictures(actual: list[np.ndarray], expected: list[Image.Image]) -> None:
    assert np.array_equal(np.stack(actual), np.stack([np.asarray(image) for image in expected]))


def test_what_is_shrunk_keeps_nothing_but_the_colours_of_its_squares(images):
    shuffled = images.unflatten(3, (4, 2)).flip(4).flatten(3)  # pixels change places inside squares of 2 x 2
    assert not torch.equal(shuffled, images)
    assert_close(shrunk_and_back(shuffled), shrunk_and_back(images), atol=1e-6, rtol=0)
    plain = torch.full((1, 3, 8, 8), 0.25)
    assert_close(shrunk_and_back(plain), plain, atol=1e-6, rtol=0)
    assert_close(shrunk_and_back(images, side=8), images, atol=1e-6, rtol=0)
    edges = torch.cat([-torch.ones(1, 3, 8, 4), torch.ones(1, 3, 8, 4)], dim=3)
    assert shrunk_and_back(edges).abs().max() <= 1


def test_images_are_rebuilt_from_their_own_codes_and_from_others_under_the_same_noise(pipe, images):
    own, other = reconstructions(pipe, images)
    kept = torch.as_tensor(pipe.reconstruct(images, seed=0, image_index=list(range(4)), output_type="pt"))
    assert_close(own, kept * 2 - 1)
    swapped = pipe.decode(pipe.encode(images)[[2, 3, 0, 1]], seed=0, image_index=list(range(4)), output_type="pt")
    assert_close(other, torch.as_tensor(swapped) * 2 - 1)
    # where all images are alike, so are all codes: what differs otherwise is due to the codes alone
    assert torch.equal(*reconstructions(pipe, images[:1].expand(4, -1, -1, -1)))


def test_reconstructions_stand_below_their_images(pipe, images, options):
    rebuilt, _ = reconstructions(pipe, images)
    draw_reconstructions(images, rebuilt, np.array([1, 0, 0, 1]), options)
    rows, order = cells(options, "reconstructions.png", 4, 3), [1, 2, 0, 3]
    for row, shown in zip(rows, (images, rebuilt, shrunk_and_back(images)), strict=True):
        assert_same_pictures(row, to_pil(shown[order]))


def test_previews_end_with_the_first_sample_of_every_class(pipe, options):
    share = draw_dar_previews(pipe, ["face", "flag", "hand"], options)
    assert 0 < share < 1
    rows = cells(options, "previews.png", 4, 3)
    first = pipe([0, 1, 2], seed=SEED, image_index=[label * SAMPLES_PER_CLASS for label in range(3)])
    assert_same_pictures([row[-1] for row in rows], first.images)
    assert not np.array_equal(rows[0][0], rows[0][-1])


def test_samples_are_drawn_into_a_folder_by_class(pipe, options):
    samples = draw_samples(pipe, options)
    assert samples.labels.tolist() == [label for label in range(3) for _ in range(SAMPLES_PER_CLASS)]
    rows = cells(options, "samples.png", 10, 3)
    for label, row in enumerate(rows):
        assert np.array_equal(row[4], samples.image(label * SAMPLES_PER_CLASS + 4))
        assert_same_pictures([row[4]], pipe(label, seed=SEED, image_index=label * SAMPLES_PER_CLASS + 4).images)


def test_layouts_go_from_no_token_of_the_reference_to_half_of_them(pipe, images, options):
    draw_layouts(pipe, images[:1], ["face", "flag", "hand"], options)
    lengths = [0, 1, 2, 4, 8]  # of 16 tokens, and the reference itself comes last
    rows, reference = cells(options, "layout.png", len(lengths) + 1, 3), to_pil(images[:1])
    for label, row in enumerate(rows):
        drawn = [
            pipe(label, prefix_image=images[:1], prefix_tokens=kept, seed=SEED, image_index=label).images[0]
            for kept in lengths
        ]
        assert_same_pictures(row, [*drawn, *reference])
    assert_same_pictures([rows[0][0]], pipe(0, seed=SEED).images)

"""Masks: what is kept, what is filled, what is pasted."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from isthmus.next_scale.canvas import (
    Canvas,
    feathered,
    fill_unknown,
    kept_as_published,
    kept_by_coverage,
    project_onto_small,
    unknown_share,
)

SIZES = (1, 2, 3, 4, 6, 8)


def random_mask(seed: int, side: int = 24, share: float = 0.5) -> torch.Tensor:
    """Some unknown pixels and some unknown boxes."""
    generator = torch.Generator().manual_seed(seed)
    mask = (torch.rand(2, 1, side, side, generator=generator) < share / 4).float()
    corners = torch.randint(0, side, (2, 4), generator=generator).tolist()
    for image, (a, b, c, d) in zip(mask, corners, strict=True):
        image[:, min(a, b) : max(a, b) + 1, min(c, d) : max(c, d) + 1] = 1
    return mask


def pixels_of(token: int, size: int, side: int) -> tuple[slice, slice]:
    """Rows and columns under a token: from floor(i side / size) to ceil((i + 1) side / size)."""
    row, column = divmod(token, size)
    return tuple(slice(i * side // size, -(-(i + 1) * side // size)) for i in (row, column))


@given(st.integers(0, 10**6), st.lists(st.floats(0, 0.99), min_size=len(SIZES), max_size=len(SIZES)))
def test_known_tokens_are_kept_and_unknown_ones_drawn(seed, shares):
    mask = random_mask(seed)
    for size, kept in zip(SIZES, kept_by_coverage(mask, SIZES, shares), strict=True):
        for image in range(2):
            for token in range(size * size):
                rows, columns = pixels_of(token, size, 24)
                pixels = mask[image, 0, rows, columns]
                if not pixels.any():
                    assert kept[image, token]
                if pixels.all():
                    assert not kept[image, token]


@given(st.integers(0, 10**6), st.floats(0, 0.9), st.floats(0, 0.09))
def test_a_larger_share_keeps_no_less_and_a_larger_mask_no_more(seed, share, more):
    mask = random_mask(seed)
    grown = F.max_pool2d(mask, 3, 1, 1)
    shares = (share,) * len(SIZES)
    for plain, generous, strict in zip(
        kept_by_coverage(mask, SIZES, shares),
        kept_by_coverage(mask, SIZES, (share + more,) * len(SIZES)),
        kept_by_coverage(grown, SIZES, shares),
        strict=True,
    ):
        assert bool((generous | ~plain).all()) and bool((plain | ~strict).all())


def test_shares_by_hand():
    mask = torch.zeros(1, 1, 4, 4)
    mask[..., :2, :3] = 1
    assert unknown_share(mask, 2).tolist() == [[1.0, 0.5, 0.0, 0.0]]
    # a cell of 3 over 4 pixels: pixels 0-1, 1-2, 2-3
    assert unknown_share(mask, 3).tolist() == [[1.0, 1.0, 0.5, 0.5, 0.5, 0.25, 0.0, 0.0, 0.0]]


def test_the_published_rule_keeps_the_first_scale_and_agrees_on_whole_cells():
    mask = torch.zeros(1, 1, 32, 32)
    mask[..., 16:] = 1
    kept = kept_as_published(mask, SIZES)
    assert kept[0].tolist() == [[True]]
    assert kept_as_published(torch.ones_like(mask), SIZES)[0].tolist() == [[True]]
    for size, published, ours in zip(SIZES, kept, kept_by_coverage(mask, SIZES, (0.5,) * 6), strict=True):
        if size > 1 and size % 2 == 0:
            assert torch.equal(published, ours)


@given(st.integers(0, 10**6))
def test_filling_never_reads_under_the_mask_and_stays_within_the_known_colours(seed):
    mask = random_mask(seed)
    mask[:, :, 0, 0] = 0
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(2, 3, 24, 24, generator=generator) * 2 - 1
    other = torch.where(mask > 0, torch.full_like(images, float("nan")), images)
    filled = fill_unknown(images, mask)
    assert torch.equal(filled, fill_unknown(other, mask))
    hidden = mask.expand_as(images) > 0
    assert torch.equal(filled[~hidden], images[~hidden])
    for one, known, whole in zip(images, ~hidden, filled, strict=True):
        low, high = one[known].aminmax()
        assert whole.min() >= low - 1e-5 and whole.max() <= high + 1e-5


def test_one_colour_fills_with_itself():
    mask = random_mask(3, side=17)
    mask[:, :, 5, 5] = 0
    images = torch.full((2, 3, 17, 17), 0.25)
    assert_close(fill_unknown(images, mask), images)


@pytest.mark.parametrize("seam_px", [0, 1, 3])
def test_pasting_is_exact_off_the_seam(seam_px):
    mask = torch.zeros(1, 1, 16, 16)
    mask[..., 6:10, 5:9] = 1
    generator = torch.Generator().manual_seed(0)
    new, source = (torch.rand(1, 3, 16, 16, generator=generator) * 2 - 1 for _ in range(2))
    pasted = Canvas(source, mask, mask, [(0, 0, 16, 16)]).pasted(new, seam_px)
    inside = mask.expand_as(new) > 0
    grown = mask if seam_px == 0 else F.max_pool2d(mask, 2 * seam_px + 1, 1, seam_px)
    outside = grown.expand_as(new) == 0
    assert torch.equal(pasted[inside], new[inside]) and torch.equal(pasted[outside], source[outside])
    weights = feathered(mask, seam_px)
    assert bool((weights[:, :, 8, 8:] >= weights[:, :, 8, 8:].roll(-1))[..., :-1].all())


def test_projection_gives_the_small_image_back():
    generator = torch.Generator().manual_seed(0)
    small = torch.rand(2, 3, 6, 8, generator=generator) - 0.5
    large = torch.rand(2, 3, 18, 24, generator=generator) - 0.5
    projected = project_onto_small(large, small)
    assert_close(F.interpolate(projected, size=(6, 8), mode="area"), small, atol=2e-3, rtol=0)
    exact = F.interpolate(small, size=(18, 24), mode="nearest")
    assert_close(project_onto_small(exact, small), exact)

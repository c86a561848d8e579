"""Edits as a pipeline makes them: images and masks of every kind in, pictures out."""

import inspect

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch.testing import assert_close

from isthmus.errors import UserError
from isthmus.next_scale.canvas import extended, kept_as_published, place, to_masks
from isthmus.next_scale.refinement import refined_scales
from isthmus.next_scale.sampling import ScaleSampler
from isthmus.nn.draws import EDIT_STREAMS
from isthmus.pipelines.loading import load_pipeline
from tests.pipelines.tiny import tiny_pipeline
from tests.testers import NETWORK

IMAGES = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
MASK = torch.zeros(8, 8)
MASK[2:7, 3:6] = 1


def picture(width: int = 8, height: int = 8) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def mask_picture(width: int = 8, height: int = 8, mode: str = "L") -> Image.Image:
    mask = np.zeros((height, width), np.uint8)
    mask[height // 4 : height // 2, width // 4 : width // 2] = 255
    return Image.fromarray(mask).convert(mode)


def see_through(mask: Image.Image) -> Image.Image:
    """Black where a mask is black, transparent where it is white."""
    kept = np.asarray(mask) == 0
    return Image.fromarray(np.stack([np.zeros_like(kept)] * 3 + [kept], axis=-1).astype(np.uint8) * 255)


def same(a, b) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.token_ids, b.token_ids, strict=True))


@pytest.mark.parametrize("keeping", ["coverage", "published"])
def test_known_pixels_stay_and_the_others_are_made(pipe, keeping):
    result = pipe.inpaint(IMAGES, MASK, "face", seed=1, seam_px=0, keeping=keeping, output_type="pt")
    source = IMAGES.add(1).div(2)
    known = (MASK == 0).expand_as(source)
    torch.testing.assert_close(result.images[known], source[known], atol=1e-6, rtol=0)
    assert not torch.allclose(result.images[~known], source[~known], atol=1e-2)
    assert result.class_labels == [0, 0] and result.seeds == [(1, 0), (1, 1)]
    assert not torch.allclose(
        pipe.inpaint(IMAGES, MASK, "face", seed=1, paste=False, keeping=keeping, output_type="pt").images[known],
        source[known],
    )


def test_pixels_of_a_picture_come_back_to_the_bit(pipe):
    image = picture()
    [result] = pipe.inpaint(image, mask_picture(), seed=0, seam_px=0).images
    known = np.asarray(mask_picture()) == 0
    assert np.array_equal(np.asarray(result)[known], np.asarray(image)[known])


def test_what_lies_under_the_mask_is_never_read(either):
    other = torch.where(MASK > 0, -IMAGES, IMAGES)
    a, b = (either.inpaint(images, MASK, seed=1, jumps=1, output_type="pt") for images in (IMAGES, other))
    assert same(a, b) and torch.equal(a.images, b.images)
    larger, hidden = (F.interpolate(x, size=(24, 20), mode="nearest") for x in (IMAGES, other))
    mask = F.interpolate(MASK[None, None], size=(24, 20), mode="nearest")
    a, b = (either.inpaint(images, mask, seed=1, output_type="pt") for images in (larger, hidden))
    assert torch.equal(a.images, b.images)
    # VAR's own procedure does read it
    assert not same(*(either.inpaint(images, MASK, seed=1, keeping="published") for images in (IMAGES, other)))


def test_an_edit_is_the_same_in_any_batch(either):
    together = either.inpaint(IMAGES, MASK, ["face", "hand"], seed=7, jumps=1, output_type="pt")
    alone = either.inpaint(IMAGES[1:], MASK, "hand", seed=7, image_index=1, jumps=1, output_type="pt")
    assert all(torch.equal(a[1:], b) for a, b in zip(together.token_ids, alone.token_ids, strict=True))
    torch.testing.assert_close(together.images[1:], alone.images, atol=1e-4, rtol=0)


def test_single_inputs_serve_all(pipe):
    four = pipe.inpaint(IMAGES[:1], MASK, ["face", "flag", None, 2], seed=3)
    assert len(four.images) == 4 and four.class_labels == [0, 1, 3, 2]
    assert len(pipe.inpaint(IMAGES[:1], torch.stack([MASK, MASK.T]), num_images=2, seed=3).images) == 2
    assert len(pipe.outpaint(IMAGES[:1], right=4, num_images=3, seed=3).images) == 3
    assert len(pipe.variations(picture(), 1, num_images=3, seed=3).images) == 3
    assert len(pipe.super_resolve(picture(4, 4), [0, 1], seed=3).images) == 2


def test_masks_of_every_kind():
    plane, expected = np.asarray(mask_picture()), torch.zeros(1, 1, 8, 8)
    tensor = torch.from_numpy(plane.copy())
    expected[..., 2:4, 2:4] = 1
    for mask in [
        mask_picture(), mask_picture(mode="1"), mask_picture(mode="RGB"), see_through(mask_picture()), [mask_picture()],
        plane, plane > 0, plane[None] / 255, plane.astype(np.float64), [plane], (plane > 0,),
        tensor.long(), tensor.long() // 255, tensor[None, None] > 0, [tensor[None, None] > 0],
    ]:  # fmt: skip
        [made] = to_masks(mask)
        assert torch.equal(made, expected)


def test_lists_may_hold_pictures_arrays_and_tensors(pipe):
    image, mask = picture(), mask_picture()
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float().div(127.5).sub(1)
    plane = torch.from_numpy(np.array(mask))
    mixed = pipe.inpaint([pixels, image, pixels[None]], [mask, plane.numpy(), plane > 0], seed=0, output_type="pt")
    alike = pipe.inpaint([image] * 3, [mask] * 3, seed=0, output_type="pt")
    assert same(mixed, alike) and torch.equal(mixed.images, alike.images)


def far_from(mask: torch.Tensor, distance_px: int) -> torch.Tensor:
    """Pixels further from the mask than so many steps, diagonal ones counting as one."""
    reach = F.max_pool2d(mask[None], 2 * distance_px + 1, stride=1, padding=distance_px)[0]
    return reach == 0


@pytest.mark.parametrize("keeping", ["coverage", "published"])
def test_the_seam_lies_beside_the_mask_alone(pipe, keeping):
    """Also in a picture that is no square, whose border on the model's canvas is unknown too."""
    for width, height in ((8, 4), (4, 8), (8, 8)):
        image, mask = IMAGES[:1, :, :height, :width], torch.zeros(1, height, width)
        mask[:, 1:3, :2] = 1
        far, source = far_from(mask, 2).expand(3, -1, -1), image[0].add(1).div(2)
        made = pipe.inpaint(image, mask, "face", seam_px=2, keeping=keeping, seed=0, output_type="pt").images[0]
        assert far.any()
        assert_close(made[far], source[far], atol=1e-6, rtol=0)
        assert not torch.allclose(made[~far], source[~far], atol=1e-2)


def test_outpainting_blends_beside_the_new_margins_alone(pipe):
    image = IMAGES[:1, :, :2, :6]
    made = pipe.outpaint(image, right=2, seam_px=2, seed=0, output_type="pt").images
    assert made.shape == (1, 3, 2, 8)
    assert_close(made[..., :4], image[..., :4].add(1).div(2), atol=1e-6, rtol=0)
    assert not torch.allclose(made[..., 4:6], image[..., 4:].add(1).div(2), atol=1e-2)


def test_margins_are_painted_from_the_picture_by_any_rule():
    plain = torch.full((1, 3, 4, 4), 0.75)
    larger, mask = extended(plain, 2, 1, 2, 3, 0)
    assert_close(larger, torch.full((1, 3, 6, 8), 0.75))
    assert torch.equal(mask[..., 2:, 1:5], torch.zeros(1, 1, 4, 4)) and mask.sum() == 6 * 8 - 16
    for hide in (False, True):
        assert_close(place([larger], [mask], 8, stride=2, hide=hide).pixels, torch.full((1, 3, 8, 8), 0.75))


def test_a_source_of_several_results_is_encoded_once(pipe):
    seen, image, two, form = [], IMAGES[:1], torch.stack([MASK, MASK.T]), {"seed": 1, "output_type": "pt"}
    pipe.image_tokenizer.encoder.register_forward_hook(lambda module, inputs, output: seen.append(len(output)))
    for edit, encoded in [
        (lambda: pipe.inpaint(image, MASK, num_images=3, **form), 1),
        (lambda: pipe.edit_class(image, MASK, [0, 1, 2], **form), 1),
        (lambda: pipe.inpaint(image, MASK, num_images=3, keeping="published", **form), 1),
        (lambda: pipe.inpaint(image, two, **form), 2),
        (lambda: pipe.outpaint(image, right=4, num_images=3, **form), 1),
        (lambda: pipe.super_resolve(image[..., :4, :2], num_images=3, **form), 1),
        (lambda: pipe.variations(image, 1, num_images=3, **form), 1),
    ]:
        seen.clear()
        result = edit()
        assert seen == [encoded] and len(result.images) == len(result.seeds) > 1
        assert not torch.equal(result.images[0], result.images[1])


def test_a_source_of_several_results_gives_what_copies_of_it_give(either):
    copies = IMAGES[:1].expand(3, -1, -1, -1)
    for options in ({"jumps": 1}, {"keeping": "published"}):
        asked = {"seed": 4, "output_type": "pt"} | options
        once, each = (either.inpaint(images, MASK, [0, 1, 2], **asked) for images in (IMAGES[:1], copies))
        assert same(once, each)
        assert_close(once.images, each.images, **NETWORK)


def test_an_edit_reads_other_numbers_than_the_draw_of_its_seed(either):
    free, drawn = either.variations(IMAGES, 0, ["face", "flag"], seed=5), either(["face", "flag"], seed=5)
    assert not any(torch.equal(a, b) for a, b in zip(free.token_ids, drawn.token_ids, strict=True))
    labels, seeds = torch.tensor([0, 1]), [(5, 0), (5, 1)]
    for smooth in (False, True):
        edited = either.variations(IMAGES, 0, ["face", "flag"], seed=5, smooth=smooth, output_type="latent")
        options = either.defaults.override(smooth=smooth)
        scales = list(
            refined_scales(
                ScaleSampler(either.image_tokenizer, either.transformer, labels, seeds, options, streams=EDIT_STREAMS)
            )
        )
        assert all(torch.equal(a, b.token_ids) for a, b in zip(edited.token_ids, scales, strict=True))
        assert_close(edited.images, scales[-1].features)


def test_pictures_of_any_size_keep_their_shape(pipe):
    for width, height, size in ((8, 8, (8, 8)), (16, 8, (8, 4)), (5, 20, (2, 8)), (3, 3, (8, 8))):
        mask = mask_picture(width, height) if width > 3 else torch.eye(3)
        assert pipe.inpaint(picture(width, height), mask, seed=0).images[0].size == size


def test_pictures_of_several_shapes_come_as_a_list(pipe):
    images, masks = [picture(16, 8), picture(8, 16)], [mask_picture(16, 8), mask_picture(8, 16)]
    assert [one.size for one in pipe.inpaint(images, masks, seed=0).images] == [(8, 4), (4, 8)]
    with pytest.raises(UserError, match="several shapes"):
        pipe.inpaint(images, masks, seed=0, output_type="pt")


def test_outpainting_keeps_the_picture_where_it_was_put(pipe):
    result = pipe.outpaint(IMAGES[..., :4], right=4, seed=0, seam_px=0, output_type="pt")
    torch.testing.assert_close(result.images[..., :4], IMAGES[..., :4].add(1).div(2), atol=1e-6, rtol=0)
    assert pipe.outpaint(picture(), left=8, seed=0).images[0].size == (8, 4)
    assert pipe.outpaint(picture(), left=2, top=2, right=2, bottom=2, seed=0).images[0].size == (8, 8)


def test_super_resolution_averages_to_the_small_image(pipe):
    small = F.interpolate(IMAGES, size=(4, 4), mode="area") * 0.5
    result = pipe.super_resolve(small, seed=0, output_type="pt")
    assert result.images.shape == (2, 3, 8, 8)
    back = F.interpolate(result.images, size=(4, 4), mode="area")
    torch.testing.assert_close(back, small.add(1).div(2), atol=5e-3, rtol=0)
    plain = pipe.super_resolve(small, seed=0, paste=False, output_type="pt")
    assert same(result, plain) and not torch.equal(result.images, plain.images)
    large = F.interpolate(small, size=(8, 8), mode="bicubic", align_corners=False, antialias=True).clamp(-1, 1)
    kept = pipe.image_tokenizer.encode(large).token_ids
    # 4 pixels at a stride of 2 fix the scales of side 1 and 2
    assert [torch.equal(a, b) for a, b in zip(result.token_ids, kept, strict=True)] == [True, True, False]
    assert pipe.super_resolve(picture(4, 2), seed=0).images[0].size == (8, 4)


def test_variations_share_the_first_scales(either):
    source = either.encode(IMAGES)
    for first in (0, 1, 3):
        result = either.variations(IMAGES, first, seed=5)
        same_scales = [torch.equal(a, b) for a, b in zip(result.token_ids, source, strict=True)]
        assert all(same_scales[:first]) and not any(same_scales[first:])
    whole = either.variations(IMAGES, 3, seed=5, output_type="pt").images
    torch.testing.assert_close(whole, either.reconstruct(IMAGES, output_type="pt"), atol=1e-4, rtol=0)


def test_edits_of_a_bfloat16_model(saved):
    pipe = load_pipeline(saved, device="cpu", dtype="bfloat16")
    for result in (
        pipe.inpaint(IMAGES, MASK, "face", seed=1, jumps=1),
        pipe.edit_class(IMAGES, MASK, "flag", seed=1),
        pipe.outpaint(IMAGES, right=4, seed=1),
        pipe.super_resolve(IMAGES[..., :4, :4], seed=1),
        pipe.variations(IMAGES, 1, seed=1),
    ):
        assert len(result.images) == 2 and all(one.width == 8 for one in result.images)


def test_a_bfloat16_model_keeps_tokens_and_pixels(saved):
    pipe = load_pipeline(saved, device="cpu", dtype="bfloat16")
    found = pipe.encode(IMAGES)
    varied = pipe.variations(IMAGES, 2, seed=1).token_ids
    assert [torch.equal(a, b) for a, b in zip(varied, found, strict=True)] == [True, True, False]
    edited = pipe.inpaint(IMAGES, MASK, "face", seed=1, seam_px=0, keeping="published", output_type="pt")
    for ours, theirs, kept in zip(
        edited.token_ids, found, kept_as_published(MASK.expand(2, 1, 8, 8), (1, 2, 4)), strict=True
    ):
        assert torch.equal(ours[kept], theirs[kept])
    source, known = IMAGES.add(1).div(2), (MASK == 0).expand_as(IMAGES)
    # the arithmetic of pixels is fp32: what is pasted is not rounded to 8 bits of mantissa
    assert_close(edited.images[known], source[known], atol=1e-6, rtol=0)
    wider = pipe.outpaint(IMAGES[..., :4], right=4, seed=0, seam_px=0, output_type="pt").images
    assert_close(wider[..., :4], source[..., :4], atol=1e-6, rtol=0)
    small = F.interpolate(IMAGES, size=(4, 4), mode="area") * 0.5
    larger = pipe.super_resolve(small, seed=0, output_type="pt").images
    assert_close(F.interpolate(larger, size=(4, 4), mode="area"), small.add(1).div(2), atol=5e-3, rtol=0)


def test_latents_and_seeds(pipe):
    result = pipe.inpaint(IMAGES, MASK, seed=1, output_type="latent")
    assert result.images.shape == (2, 4, 4, 4)
    fresh = pipe.inpaint(IMAGES[:1], MASK)
    [(seed, index)] = fresh.seeds
    assert same(fresh, pipe.inpaint(IMAGES[:1], MASK, seed=seed, image_index=index))


def test_edit_class_is_inpainting_with_a_class(pipe):
    assert same(pipe.edit_class(IMAGES, MASK, "flag", seed=1), pipe.inpaint(IMAGES, MASK, "flag", seed=1))
    with pytest.raises(UserError, match="needs a class"):
        pipe.edit_class(IMAGES, MASK, ["flag", None])


def test_what_is_no_mask_is_refused():
    for masks, said in [
        (["mask.png"], "got str"),
        ([mask_picture(), [[0, 1], [1, 0]]], "got list"),
        (None, "got NoneType"),
        (np.array([["white", "black"]]), "numbers or booleans"),
        ([torch.zeros(2, 2, 2, 2)], "a mask is"),
        (torch.zeros(2, 3, 8, 8), "a mask is"),
        (torch.zeros(8, 8), "empty"),
        (torch.ones(8, 8), "full"),
        (MASK * 0.5, "empty"),
        (MASK * float("nan"), "black to white"),
        (MASK * -1, "black to white"),
        (MASK * 65536, "black to white"),
        ([], "empty list"),
    ]:
        with pytest.raises(UserError, match=said):
            to_masks(masks)


def test_what_cannot_be_edited_is_refused(pipe):
    for call, said in [
        (lambda: pipe.inpaint(IMAGES, torch.eye(4)), "size of its image"),
        (lambda: pipe.inpaint([], MASK), "empty list"),
        (lambda: pipe.inpaint(picture(1, 4), torch.eye(4)[:, :1]), "stride"),
        (lambda: pipe.outpaint(picture(1, 8), right=7), "stride"),
        (lambda: pipe.inpaint(picture(32, 32), torch.eye(2).repeat(16, 16)), "no known pixel"),
        (lambda: pipe.inpaint(IMAGES[:1].repeat(3, 1, 1, 1), torch.stack([MASK, MASK])), "takes one mask"),
        (lambda: pipe.inpaint(IMAGES, MASK, [0, 1, 2]), "takes one image or 3"),
        (lambda: pipe.inpaint(IMAGES[:1], MASK, num_images=0), "at least one image"),
        (lambda: pipe.inpaint(IMAGES, MASK, "ship"), "no class 'ship'"),
        (lambda: pipe.inpaint(IMAGES, MASK, seam_px=-1), "seam_px"),
        (lambda: pipe.inpaint(IMAGES, MASK, paste=False, seam_px=1), "paste=False"),
        (lambda: pipe.inpaint(IMAGES, MASK, keeping="published", max_unknown=0.5), "own rule"),
        (lambda: pipe.inpaint(IMAGES, MASK, jumps=(0, 1, 0)), "keep at least the first"),
        (lambda: pipe.outpaint(IMAGES), "margins"),
        (lambda: pipe.outpaint(IMAGES, left=4, right=-2), "margins"),
        (lambda: pipe.super_resolve(IMAGES), "smaller ones"),
        (lambda: pipe.super_resolve(IMAGES[..., :1, :1]), "stride"),
        (lambda: pipe.super_resolve([picture(4, 4), picture(2, 2)]), "several sizes"),
        (lambda: pipe.variations(IMAGES, 4), "from_scale"),
        (lambda: pipe.variations(picture(1, 8), 1), "stride"),
        (lambda: pipe.variations(IMAGES[..., :4], 1), "8 x 8"),
    ]:
        with pytest.raises(UserError, match=said):
            call()


def test_options_of_a_call_are_taken():
    pipe = tiny_pipeline()
    call = set(inspect.signature(type(pipe).__call__).parameters) - {"num_images_per_class", "callback_on_step_end"}
    for edit in (pipe.inpaint, pipe.outpaint, pipe.edit_class, pipe.super_resolve, pipe.variations):
        assert call - {"self"} <= set(inspect.signature(edit).parameters)
    greedy = [pipe.inpaint(IMAGES, MASK, top_k=1, seed=s, output_type="pt").images for s in (1, 2)]
    assert torch.equal(*greedy)
    with pytest.raises(TypeError, match="inpaint has no option guidance. Did you mean guidance_scale?"):
        pipe.inpaint(IMAGES, MASK, guidance=2.0)

"""Zero-shot edits of held-out images: what is made in a hole, or out of a small image, against what was there."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from isthmus.functional.masks import fill_unknown
from isthmus.functional.shapes import Images
from isthmus.pictures import to_uint8
from isthmus.pipelines.labels import Label
from isthmus.pipelines.next_scale import NextScalePipeline
from isthmus.pipelines.next_scale_output import NextScalePipelineOutput
from isthmus.studies.evaluations import mean_and_interval
from isthmus.studies.experiments import Values
from isthmus.studies.held_out import BATCH, HeldOut
from isthmus.studies.srdd_words import FACTORS, HOLE_PSNR, HOLES, jump_words

_HOLE_SEED = 1
_BOXES = 3


def holes(kind: str, count: int, side: int) -> Float[Tensor, "count 1 side side"]:
    """Masks, 1 in the hole: the central square of half the side, or three boxes of a sixth to a half of it anywhere.

    Mask i is the same whatever the model.
    """
    masks, generator = torch.zeros(count, 1, side, side), np.random.default_rng(_HOLE_SEED)
    for mask in masks:
        if kind == "centre":
            mask[:, side // 4 : 3 * side // 4, side // 4 : 3 * side // 4] = 1
            continue
        for _ in range(_BOXES):
            height, width = generator.integers(max(side // 6, 1), side // 2, 2)
            top, left = generator.integers(0, side - height), generator.integers(0, side - width)
            mask[:, top : top + height, left : left + width] = 1
    return masks


def psnr_inside(
    images: Float[Tensor, "b 3 h w"], originals: Float[Tensor, "b 3 h w"], masks: Float[Tensor, "b 1 h w"]
) -> Float[Tensor, " b"]:
    """PSNR in dB over the pixels under the mask alone; values in [-1, 1], so the peak is 2."""
    error = ((images - originals).square() * masks).sum(dim=(1, 2, 3)) / (3 * masks.sum(dim=(1, 2, 3)))
    return 10 * torch.log10(4 / error.clamp(min=1e-8))


def editing_values(pipeline: NextScalePipeline, held_out: HeldOut, *, jumps: Sequence[int], seed: int) -> Values:
    """Holes made anew under the images' own labels, and images made from small ones.

    Known pixels are put back without a seam, so that all that differs from the original lies in the hole. With the
    rows of the model stand those of methods that read no model: the hole painted over from around, bicubic enlargement.

    Returns:
        images; by_hole: kind -> row -> column -> value with the ends of its 95 % interval; by_factor: the same.
    """
    originals = torch.cat([images for _, images in held_out.batches()])
    side = originals.shape[-1]
    by_hole: dict[str, dict[str, Values]] = {}
    for kind in HOLES:
        masks = holes(kind, len(originals), side)
        rows = {"painted over": torch.where(masks > 0, fill_unknown(originals, masks), originals)}
        for number in jumps:
            rows[jump_words(number)] = _edited(
                held_out,
                lambda rows, labels, numbers, number=number, masks=masks: pipeline.inpaint(
                    originals[rows], masks[rows], labels, seed=seed, image_index=numbers, output_type="pt", seam_px=0,
                    jumps=number,
                ),
            )  # fmt: skip
        by_hole[kind] = {name: _compared(held_out, made, originals, masks) for name, made in rows.items()}
    by_factor: dict[str, dict[str, Values]] = {}
    whole = torch.ones_like(originals[:, :1])
    for factor in FACTORS:
        small = F.interpolate(originals, size=(side // factor,) * 2, mode="area")
        enlarged = F.interpolate(small, size=(side, side), mode="bicubic", align_corners=False).clamp(-1, 1)
        drawn = _edited(
            held_out,
            lambda rows, labels, numbers, small=small: pipeline.super_resolve(
                small[rows], labels, seed=seed, image_index=numbers, output_type="pt"
            ),
        )
        rows = {"bicubic": enlarged, "drawn": drawn}
        by_factor[str(factor)] = {name: _compared(held_out, made, originals, whole) for name, made in rows.items()}
    return {"images": len(held_out), "by_hole": by_hole, "by_factor": by_factor}


def _edited(held_out: HeldOut, edit: Callable[[slice, list[Label], list[int]], NextScalePipelineOutput]) -> Images:
    """All edits, in [-1, 1]; image i has number i, whatever the batch."""
    parts = []
    for start in range(0, len(held_out), BATCH):
        numbers = list(range(start, min(start + BATCH, len(held_out))))
        labels = [held_out.model_ids[i] for i in numbers]
        made = edit(slice(start, start + BATCH), labels, numbers)
        parts.append(torch.as_tensor(made.images).float() * 2 - 1)
    return torch.cat(parts)


def _compared(held_out: HeldOut, made: Images, originals: Images, masks: Float[Tensor, "b 1 h w"]) -> Values:
    pixels = to_uint8(made)
    inside = psnr_inside(torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1, originals, masks)
    found = held_out.compared(pixels)
    del found["PSNR, dB"]  # over all pixels, most of which are the original's own
    return {HOLE_PSNR: mean_and_interval(inside.double().numpy())} | found

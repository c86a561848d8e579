"""Options of a next-scale model's call and of its edits, declared once. This file does not import torch."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Literal, TypedDict

from isthmus.pipelines.options import FOLDER_DEFAULT, CallOptions, Default, Option, SmoothSchedule

if TYPE_CHECKING:
    from isthmus.nn.shapes import TokenPyramid
    from isthmus.text.encoders import TextFeatures
    from isthmus.text.reading import TextReader

Keeping = Literal["coverage", "published"]
"""Which tokens an edit keeps; see `isthmus.next_scale.editing.known_part`."""


class NextScaleOptions(CallOptions, total=False):
    """Options of a call of `NextScalePipeline`, and of every edit."""

    smooth: Annotated[
        bool | SmoothSchedule | Default,
        Option(
            FOLDER_DEFAULT,
            "Mix codes instead of drawing one: softer images (token ids are drawn all the same). A `SmoothSchedule` "
            "does so at some scales.",
        ),
    ]
    text: Annotated[
        "TextFeatures | None",
        Option(None, "Takes the place of `prompt`: what an encoder made of prompts elsewhere, one or one per image."),
    ]
    text_reader: Annotated[
        "TextReader | None",
        Option(None, "What the method of this name returned, to be used again; None reads the prompts of this call."),
    ]
    image_size_condition: Annotated[
        Sequence[int] | Sequence[Sequence[int]] | None,
        Option(
            None,
            "Original height and width in pixels that images are drawn as if they had (models with a size condition): "
            "one pair, or one per image; None is 512 x 512.",
        ),
    ]


class ReadOptions(TypedDict, total=False):
    """What is read beside images and class labels: tokens in the place of images, and prompts."""

    token_ids: Annotated["TokenPyramid | None", Option(None, "Takes the place of images: what `encode` returns.")]
    prompt: Annotated[
        str | Sequence[str] | None,
        Option(None, "What an image shows, in words (models that read text): one text, or one per image."),
    ]
    text: Annotated[
        "TextFeatures | None",
        Option(None, "Takes the place of `prompt`: what an encoder made of prompts elsewhere, one or one per image."),
    ]


class InpaintOptions(NextScaleOptions, total=False):
    """Options of the edits that keep what lies outside a mask."""

    keeping: Annotated[
        Keeping, Option("coverage", '"published" is VAR\'s procedure, which also reads what lies under the mask.')
    ]
    max_unknown: Annotated[
        float | Sequence[float] | None,
        Option(
            None,
            '"coverage" keeps a token with at most this share of unknown pixels, in [0, 1); one number, or one per '
            "scale; None is one half. More keeps more of the coarse scales.",
        ),
    ]
    jumps: Annotated[
        int | Sequence[int],
        Option(
            0,
            "Simple resampling, times per scale (one number for every scale from `jump_scales` on, counted from 0, or "
            "one each); 0 is off. A jump costs `jump_scales` more forwards.",
        ),
    ]
    jump_scales: Annotated[
        int | None,
        Option(None, "How many scales a jump draws again; None is 2. Jumps start behind so many. It needs jumps."),
    ]
    paste: Annotated[bool, Option(True, "Put the known pixels back over the result, blended beside the mask.")]
    seam_px: Annotated[
        int | None,
        Option(
            None,
            "Width of the blend in pixels of the result, on the known side of the mask; None is 1/16 of the model's "
            "size. It needs paste.",
        ),
    ]

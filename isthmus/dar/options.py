"""Options of a D-AR model's call, declared once. This file does not import torch."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Literal

from isthmus.pipelines.options import CallOptions, Option, SamplingOptions

if TYPE_CHECKING:
    from isthmus.dar.llama_decoding import LlamaDecoder
    from isthmus.dar.pipeline import PrefixLengths, TokenInput
    from isthmus.pipelines.images import ImageInput

Solver = Literal["euler", "adams-bashforth", "adams-bashforth-variable"]


class DAROptions(CallOptions, total=False):
    """Options of a call of `DARPipeline`."""

    image_options: Annotated[
        Sequence[SamplingOptions] | None,
        Option(
            None,
            "Settings for each image, in place of those saved with the model; guidance, filters and temperature, where "
            "given, hold for all images.",
        ),
    ]
    num_inference_steps: Annotated[
        int | None, Option(None, "Solver steps of a D-AR model; None takes the number saved with it.")
    ]
    solver: Annotated[
        Solver | None,
        Option(None, "How a D-AR model goes from step to step; None takes the solver saved with it."),
    ]
    prefix_image: Annotated[
        "ImageInput | None",
        Option(
            None,
            "The images begin with the first tokens of this one (one for all, or one for each), which hold their "
            "layout.",
        ),
    ]
    prefix_token_ids: Annotated[
        "TokenInput | None",
        Option(None, "The same, as tokens: (p,) for all images or (b, p), a tensor or lists."),
    ]
    prefix_tokens: Annotated[
        "PrefixLengths",
        Option(
            None, "How many tokens of the prefix are kept (or one number per image): the more, the closer the layout."
        ),
    ]
    llama_decoder: Annotated[
        "LlamaDecoder | None",
        Option(None, "What the method of this name returned, to be used again; None lays the weights out anew."),
    ]
    height: Annotated[
        int | None,
        Option(None, "Of the images in pixels, a multiple of the decoder's patch; None is the size trained on."),
    ]
    width: Annotated[int | None, Option(None, "The same.")]

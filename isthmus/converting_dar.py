"""A published D-AR tokenizer and a published prior as one pipeline."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from isthmus.conversion.dar_prior import build_next_token_prior, convert_next_token_prior_state
from isthmus.conversion.dar_tokenizer import (
    PublishedSettings,
    build_diffusion_tokenizer,
    build_flow_decoder,
    build_scheduler,
    convert_diffusion_tokenizer_state,
)
from isthmus.conversion.reading import read_file, read_weights
from isthmus.errors import UserError
from isthmus.functional.guidance import GuidanceSchedule
from isthmus.generation.options import SamplingOptions
from isthmus.pipelines.dar import DARPipeline


@dataclass
class ConvertedDar:
    """What `convert_dar` returns.

    Attributes:
        pipeline: ready to draw and to save.
        dropped_tokenizer_keys: published key -> why it is not needed.
        dropped_prior_keys: the same for the prior's file.
    """

    pipeline: DARPipeline
    dropped_tokenizer_keys: dict[str, str]
    dropped_prior_keys: dict[str, str]


def convert_dar(
    tokenizer: str | Path,
    prior: str | Path,
    *,
    num_heads: int | None = None,
    class_names: Sequence[str] = (),
    **settings: Any,
) -> ConvertedDar:
    """Published D-AR files to a pipeline.

    Sampling defaults are those of the published evaluation: guidance linear from 1.2 to 8 over the tokens, no filters.

    Args:
        tokenizer: the tokenizer file, which also holds the pixel decoder.
        prior: the Llama's file.
        num_heads: of the prior; None takes heads that are 64 wide, as published.
        class_names: one per class, in the order of the class ids.
        settings: what neither shapes nor the tokenizer file tell, by the names of `PublishedSettings`; what is left
            out comes from the settings in the file, else is that of the published model.

    Raises:
        UserError: a file is unreadable or of another kind, or the two do not belong together.
    """
    file = read_file(tokenizer)
    published = PublishedSettings.of(file.config, **settings)
    parts = convert_diffusion_tokenizer_state(file.weights, published)
    prior_parts = convert_next_token_prior_state(
        read_weights(prior), num_tokens=published.num_tokens, num_heads=num_heads
    )
    if not published.quantized:
        raise UserError(
            f"a prior predicts codes, and the tokenizer in {tokenizer} keeps its tokens continuous. Pass one with a "
            "codebook."
        )
    ours, theirs = parts.tokenizer.arguments.get("codebook_size"), prior_parts.arguments["codebook_size"]
    if ours != theirs:
        raise UserError(
            f"tokenizer and prior must have the same codebook_size, got {ours} in {tokenizer} and {theirs} in {prior}. "
            "Pass the tokenizer that the prior was trained with."
        )
    num_classes = prior_parts.arguments["num_classes"]
    if class_names and len(class_names) != num_classes:
        raise UserError(
            f"the prior has {num_classes} classes, got {len(class_names)} names. "
            "Pass one name per class, in the order of the class ids."
        )
    guidance = GuidanceSchedule("linear", 1.2, 8.0) if num_classes else 1.0
    pipeline = DARPipeline(
        build_diffusion_tokenizer(parts),
        build_flow_decoder(parts),
        build_next_token_prior(prior_parts),
        build_scheduler(parts),
        class_names=class_names,
        sampling_defaults=SamplingOptions(guidance_scale=guidance),
        data={
            "name": f"whatever {Path(prior).name} and {Path(tokenizer).name} were trained on",
            "attribution": "that of the files this model was converted from, and of their training data.",
        },
        protocol="Converted from published D-AR weights; not trained further.",
    )
    return ConvertedDar(pipeline, parts.dropped, prior_parts.dropped)

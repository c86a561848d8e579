"""A published tokenizer and a published prior as one pipeline."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from isthmus.conversion.reading import read_weights
from isthmus.conversion.var import build_prior, build_tokenizer, convert_prior_state, convert_tokenizer_state
from isthmus.errors import UserError
from isthmus.functional.guidance import GuidanceSchedule
from isthmus.generation.options import SamplingOptions
from isthmus.pipelines.next_scale import NextScalePipeline

_HITS = "quantize.ema_vocab_hit_SV"


@dataclass
class ConvertedVar:
    """What `convert_var` returns.

    Attributes:
        pipeline: ready to draw and to save.
        dropped_tokenizer_keys: published key -> why it is not needed.
        dropped_prior_keys: the same for the prior's file.
    """

    pipeline: NextScalePipeline
    dropped_tokenizer_keys: dict[str, str]
    dropped_prior_keys: dict[str, str]


def convert_var(
    tokenizer: str | Path,
    prior: str | Path,
    *,
    scale_attention: Literal["causal", "markov"] = "causal",
    class_names: Sequence[str] = (),
) -> ConvertedVar:
    """Published VAR files to a pipeline; the tokenizer gets the prior's scales.

    Sampling defaults are those of the published evaluation: guidance linear from 1 to 2.5 over the scales (its
    cfg = 1.5), top_k 900 (or the whole codebook where that is smaller), top_p 0.96.

    Raises:
        UserError: a file is unreadable or of another kind, or the two do not belong together.
    """
    raw_tokenizer = read_weights(tokenizer, nested=("vae_local", "vae_wo_ddp", "vae"))
    raw_prior = read_weights(prior, nested=("var_wo_ddp", "var"))
    prior_parts = convert_prior_state(raw_prior, scale_attention)
    wanted = prior_parts.arguments
    # the file says for how many scales it counted code usage; phi is chosen by their number
    num_scales = len(wanted["scale_sizes"])
    counted = len(raw_tokenizer.get(_HITS, ())) or num_scales
    if counted != num_scales:
        raise UserError(
            f"tokenizer and prior must have the same number of scales K, got {counted} in {tokenizer} and "
            f"{num_scales} in {prior}. Pass the tokenizer that the prior was trained with."
        )
    tokenizer_parts = convert_tokenizer_state(raw_tokenizer, wanted["scale_sizes"])
    for name in ("codebook_size", "codebook_dim"):
        ours = tokenizer_parts.arguments[name]
        if ours != wanted[name]:
            raise UserError(
                f"tokenizer and prior must have the same {name}, got {ours} in {tokenizer} and {wanted[name]} in "
                f"{prior}. Pass the tokenizer that the prior was trained with."
            )
    if class_names and len(class_names) != wanted["num_classes"]:
        raise UserError(
            f"the prior has {wanted['num_classes']} classes, got {len(class_names)} names. "
            "Pass one name per class, in the order of the class ids."
        )
    sampling = SamplingOptions(
        guidance_scale=GuidanceSchedule("linear", 1.0, 2.5), top_k=min(900, wanted["codebook_size"]), top_p=0.96
    )
    pipeline = NextScalePipeline(
        build_tokenizer(tokenizer_parts),
        build_prior(prior_parts),
        class_names=class_names,
        sampling_defaults=sampling,
        data={
            "name": f"whatever {Path(prior).name} and {Path(tokenizer).name} were trained on",
            "attribution": "that of the files this model was converted from, and of their training data.",
        },
        protocol=f"Converted from published VAR weights, scale_attention {scale_attention}; not trained further.",
    )
    return ConvertedVar(pipeline, tokenizer_parts.dropped, prior_parts.dropped)

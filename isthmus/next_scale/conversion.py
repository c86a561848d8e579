"""Published VAR and Switti files to Isthmus models: keys renamed one by one, sizes read off, none left out unsaid."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from isthmus.errors import UserError
from isthmus.next_scale.pipeline import NextScalePipeline
from isthmus.next_scale.tokenizer import MultiScaleVQVAE
from isthmus.next_scale.transformer import NextScaleTransformer
from isthmus.nn.component_files import CONFIG, read_json
from isthmus.nn.guidance import GuidanceSchedule
from isthmus.pipelines.options import SamplingOptions, SmoothSchedule
from isthmus.published import (
    Converted,
    ConvertedPipeline,
    build,
    check_belong,
    data_of,
    indexed,
    read_weights,
    rename,
    require,
)
from isthmus.text.pretrained import PretrainedTextEncoder

# (published key, our key); the first pattern that matches the whole key decides
_TOKENIZER_KEYS = [
    (r"(encoder|decoder)\.(conv_in|conv_out|norm_out)\.(\w+)", r"\1.\2.\3"),
    (r"(encoder|decoder)\.mid\.block_([12])\.nin_shortcut\.(\w+)", r"\1.middle.block\2.shortcut.\3"),
    (r"(encoder|decoder)\.mid\.block_([12])\.(norm1|conv1|norm2|conv2)\.(\w+)", r"\1.middle.block\2.\3.\4"),
    (r"(encoder|decoder)\.mid\.attn_1\.(norm|qkv|proj_out)\.(\w+)", r"\1.middle.attention.\2.\3"),
    (
        r"(encoder|decoder)\.(?:down|up)\.(\d+)\.block\.(\d+)\.nin_shortcut\.(\w+)",
        r"\1.levels.\2.blocks.\3.shortcut.\4",
    ),
    (
        r"(encoder|decoder)\.(?:down|up)\.(\d+)\.block\.(\d+)\.(norm1|conv1|norm2|conv2)\.(\w+)",
        r"\1.levels.\2.blocks.\3.\4.\5",
    ),
    (
        r"(encoder|decoder)\.(?:down|up)\.(\d+)\.attn\.(\d+)\.(norm|qkv|proj_out)\.(\w+)",
        r"\1.levels.\2.attentions.\3.\4.\5",
    ),
    (r"encoder\.down\.(\d+)\.downsample\.conv\.(\w+)", r"encoder.levels.\1.resample.conv.\2"),
    (r"decoder\.up\.(\d+)\.upsample\.conv\.(\w+)", r"decoder.levels.\1.resample.conv.\2"),
    (r"(quant_conv|post_quant_conv)\.(\w+)", r"\1.\2"),
    (r"quantize\.embedding\.weight", r"codebook.weight"),
    (r"quantize\.quant_resi\.qresi_ls\.(\d+)\.(\w+)", r"phi.\1.conv.\2"),
    (r"quantize\.quant_resi\.qresi\.(\w+)", r"phi.0.conv.\1"),
    (r"quantize\.quant_resi\.(\d+)\.(\w+)", r"phi.\1.conv.\2"),
]
_TOKENIZER_DROPPED = {r"quantize\.ema_vocab_hit_SV": "usage statistics of training; nothing at inference reads them"}
# of VAR and of Switti
_SHARED_PRIOR_KEYS = [
    (r"word_embed\.(weight|bias)", r"word_embedding.\1"),
    (r"lvl_embed\.weight", r"scale_embedding.weight"),
    (r"pos_start", r"start_position"),
    (r"pos_1LC", r"position"),
    (r"blocks\.(\d+)\.attn\.proj\.(weight|bias)", r"blocks.\1.attention.proj.\2"),
    (r"blocks\.(\d+)\.ffn\.fc1\.(weight|bias)", r"blocks.\1.feed_forward.up.\2"),
    (r"blocks\.(\d+)\.ffn\.fc2\.(weight|bias)", r"blocks.\1.feed_forward.down.\2"),
    (r"head_nm\.ada_lin\.1\.(weight|bias)", r"head_modulation.\1"),
    (r"head\.(weight|bias)", r"head.\1"),
]
_PRIOR_KEYS = [
    *_SHARED_PRIOR_KEYS,
    (r"class_emb\.weight", r"class_embedding.weight"),
    (r"shared_ada_lin\.1\.(weight|bias)", r"shared_modulation.linear.\1"),
    (r"blocks\.(\d+)\.attn\.mat_qkv\.weight", r"blocks.\1.attention.qkv.weight"),
    (r"blocks\.(\d+)\.attn\.(q_bias|v_bias)", r"blocks.\1.attention.\2"),
    (r"blocks\.(\d+)\.attn\.scale_mul_1H11", r"blocks.\1.attention.log_scale"),
    (r"blocks\.(\d+)\.ada_lin\.1\.(weight|bias)", r"blocks.\1.modulation.linear.\2"),
    (r"blocks\.(\d+)\.ada_gss", r"blocks.\1.modulation.offset"),
]
_PRIOR_DROPPED = {
    r"lvl_1L": "scale of every token; follows from scale_sizes",
    r"attn_bias_for_masking": "attention mask; follows from scale_sizes and scale_attention",
    r"blocks\.\d+\.attn\.zero_k_bias": "a buffer of zeros; keys have no bias",
}


def convert_tokenizer_state(raw: Mapping[str, Tensor], scale_sizes: tuple[int, ...]) -> Converted:
    """Published VQVAE weights to `MultiScaleVQVAE` arguments and weights; UserError for an unknown or missing key.

    Sizes come from the shapes, the schedule from the prior: it is not in the file, the network is fully convolutional.
    """
    state, dropped = rename(raw, _TOKENIZER_KEYS, _TOKENIZER_DROPPED, "VAR tokenizer", "quantize.embedding.weight")
    require(state, ("encoder.conv_in.weight", "encoder.levels.0.blocks.0.conv1.weight"), "VAR tokenizer")
    codebook = state["codebook.weight"]
    first_convs = indexed(state, r"encoder\.levels\.(\d+)\.blocks\.0\.conv1\.weight")
    base = state["encoder.conv_in.weight"].shape[0]
    num_phi = len(indexed(state, r"phi\.(\d+)\.conv\.weight"))
    per_scale = any(re.fullmatch(r"quantize\.quant_resi\.\d+\.weight", key) for key in raw)
    if per_scale and num_phi != len(scale_sizes):
        raise UserError(
            f"the tokenizer has one phi for each of {num_phi} scales, but the schedule has {len(scale_sizes)} "
            f"({scale_sizes}). Pass the prior that was trained with this tokenizer."
        )
    arguments = {
        "codebook_size": codebook.shape[0],
        "codebook_dim": codebook.shape[1],
        "scale_sizes": tuple(scale_sizes),
        "phi_indices": tuple(range(num_phi)) if per_scale else None,
        "num_phi": max(num_phi, 1),
        "phi_ratio": 0.5 if num_phi else 0.0,
        "base_channels": base,
        "channel_multipliers": tuple(weight.shape[0] // base for weight in first_convs),
        "num_res_blocks": len(indexed(state, r"encoder\.levels\.0\.blocks\.(\d+)\.conv1\.weight")),
    }
    return Converted(arguments, state, dropped)


def convert_prior_state(raw: Mapping[str, Tensor], scale_attention: str = "causal") -> Converted:
    """Published VAR weights to `NextScaleTransformer` arguments and weights; UserError for unknown or missing keys."""
    state, dropped = rename(raw, _PRIOR_KEYS, _PRIOR_DROPPED, "VAR prior", "pos_1LC")
    scale_sizes = _scale_sizes(raw, "VAR prior")
    block = ("blocks.0.attention.qkv.weight", "blocks.0.feed_forward.up.weight")
    require(state, ("head.weight", "word_embedding.weight", "class_embedding.weight", *block), "VAR prior")
    codebook_size, width = state["head.weight"].shape
    # the file keeps a sequence dimension in the shared variant's offsets
    state = {key: value[0] if key.endswith("modulation.offset") else value for key, value in state.items()}
    log_scale = state.get("blocks.0.attention.log_scale")
    depth = len(indexed(state, r"blocks\.(\d+)\.attention\.qkv\.weight"))
    arguments = {
        "scale_sizes": scale_sizes,
        "codebook_size": codebook_size,
        "codebook_dim": state["word_embedding.weight"].shape[1],
        "width": width,
        "num_layers": depth,
        # without the learned scale per head the file does not say; published heads are 64 wide
        "num_heads": max(width // 64, 1) if log_scale is None else log_scale.shape[1],
        "num_classes": state["class_embedding.weight"].shape[0] - 1,
        "scale_attention": scale_attention,
        "shared_adaln": "shared_modulation.linear.weight" in state,
        "l2_attention": log_scale is not None,
        "mlp_ratio": state["blocks.0.feed_forward.up.weight"].shape[0] / width,
        "drop_path": 0.1 * depth / 24,
    }
    return Converted(arguments, state, dropped)


def _scale_sizes(raw: Mapping[str, Tensor], what: str) -> tuple[int, ...]:
    """Sides of the scales, from the scale of every token."""
    if "lvl_1L" not in raw:
        raise UserError(
            f"a {what} holds lvl_1L, the scale of every token; this file does not. Pass the state dict of the whole "
            "model: averages of its parameters alone lack it."
        )
    counts = torch.bincount(raw["lvl_1L"].flatten().long()).tolist()
    scale_sizes = tuple(round(count**0.5) for count in counts)
    if [s * s for s in scale_sizes] != counts:
        raise UserError(
            f"lvl_1L must give every scale a square number of tokens, got {counts}. Pass the file "
            "of a prior over square images."
        )
    return scale_sizes


_SWITTI_KEYS = [
    *_SHARED_PRIOR_KEYS,
    (r"text_pooler\.(weight|bias)", r"text_start.\1"),
    (r"crop_embed\.weight", r"size_condition.frequency_bits"),
    (r"crop_proj\.(weight|bias)", r"size_condition.projection.\1"),
    (r"blocks\.(\d+)\.crop_cond_scales", r"blocks.\1.size_scale"),
    (r"blocks\.(\d+)\.attn\.to_qkv\.(weight|bias)", r"blocks.\1.attention.qkv.\2"),
    (r"blocks\.(\d+)\.cross_attn\.to_(q|kv)\.(weight|bias)", r"blocks.\1.cross_attention.\2.\3"),
    (r"blocks\.(\d+)\.cross_attn\.proj\.(weight|bias)", r"blocks.\1.cross_attention.proj.\2"),
    (r"blocks\.(\d+)\.attention_y_norm\.weight", r"blocks.\1.text_norm.weight"),
    (r"blocks\.(\d+)\.self_attention_norm1\.weight", r"blocks.\1.attention_norm_in.weight"),
    (r"blocks\.(\d+)\.self_attention_norm2\.weight", r"blocks.\1.attention_norm_out.weight"),
    (r"blocks\.(\d+)\.cross_attention_norm1\.weight", r"blocks.\1.cross_attention_norm_in.weight"),
    (r"blocks\.(\d+)\.cross_attention_norm2\.weight", r"blocks.\1.cross_attention_norm_out.weight"),
    (r"blocks\.(\d+)\.ffn_norm1\.weight", r"blocks.\1.feed_forward_norm_in.weight"),
    (r"blocks\.(\d+)\.ffn_norm2\.weight", r"blocks.\1.feed_forward_norm_out.weight"),
    (r"blocks\.(\d+)\.ffn\.(up|gate|down)_proj\.weight", r"blocks.\1.feed_forward.\2.weight"),
    (r"blocks\.(\d+)\.ada_lin\.1\.(weight|bias)", r"blocks.\1.modulation.\2"),
]
_SWITTI_DROPPED = {key: _PRIOR_DROPPED[key] for key in ("lvl_1L", "attn_bias_for_masking")}


def convert_switti_state(
    raw: Mapping[str, Tensor],
    *,
    num_heads: int | None = None,
    rope_base: float | None = None,
    rope_extent: float | None = None,
    scale_attention: Literal["causal", "markov"] | None = None,
) -> Converted:
    """Published Switti weights to `NextScaleTransformer` arguments and weights (spec of Switti, 10).

    Args:
        num_heads: None takes heads that are 64 wide, as published.
        rope_base: of rotary positions; None is 10,000, as published.
        rope_extent: None is 128, as published.
        scale_attention: None is that of the mask in the file.

    Raises UserError for unknown or missing keys.
    """
    what = "Switti prior"
    state, dropped = rename(raw, _SWITTI_KEYS, _SWITTI_DROPPED, what, "text_pooler.weight")
    scale_sizes = _scale_sizes(raw, what)
    block = ("blocks.0.attention.qkv.weight", "blocks.0.text_norm.weight", "blocks.0.feed_forward.up.weight")
    require(state, ("head.weight", "word_embedding.weight", "start_position", *block), what)
    codebook_size, width = state["head.weight"].shape
    hidden = state["blocks.0.feed_forward.up.weight"].shape[0]
    swiglu, sized = "blocks.0.feed_forward.gate.weight" in state, "size_condition.frequency_bits" in state
    if sized:
        frequencies = state["size_condition.frequency_bits"]
        state["size_condition.frequency_bits"] = frequencies.contiguous().view(torch.int32)
    # the published ratio; of others the middle of those that make this width, which is cut off to a whole number
    ratio = 8 / 3 if int(width * 8 / 3) == hidden else (hidden + 0.5) / width
    rotary = {"rope_base": rope_base, "rope_extent": rope_extent}
    arguments = {
        "scale_sizes": scale_sizes,
        "codebook_size": codebook_size,
        "codebook_dim": state["word_embedding.weight"].shape[1],
        "width": width,
        "num_layers": len(indexed(state, r"blocks\.(\d+)\.attention\.qkv\.weight")),
        "num_heads": max(width // 64, 1) if num_heads is None else num_heads,
        "num_classes": 0,
        "scale_attention": _mask_in(raw) if scale_attention is None else scale_attention,
        "l2_attention": False,
        "mlp_ratio": ratio if swiglu else hidden / width,
        "text_pooled_width": state["text_start.weight"].shape[1],
        "text_width": state["blocks.0.text_norm.weight"].shape[0],
        "norm": "rms_sandwich",
        "position": "learned" if "position" in state else "rope2d",
        "feed_forward": "swiglu" if swiglu else "gelu",
        "size_condition": sized,
        **{name: float(value) for name, value in rotary.items() if value is not None},
    }
    return Converted(arguments, state, dropped)


def _mask_in(raw: Mapping[str, Tensor]) -> Literal["causal", "markov"]:
    """What the last token of a file's mask sees of the first: the mask tells it, config.json may be another's."""
    if "attn_bias_for_masking" not in raw:
        raise UserError(
            "a Switti prior holds attn_bias_for_masking, which tells what a scale sees; this file does not. Pass "
            "scale_attention: markov for Switti, causal for Switti-AR."
        )
    return "causal" if float(raw["attn_bias_for_masking"][0, 0, -1, 0]) == 0 else "markov"


def build_tokenizer(converted: Converted) -> MultiScaleVQVAE:
    """A tokenizer with the converted weights, in eval mode."""
    return build(MultiScaleVQVAE, converted, "the tokenizer file")


def build_prior(converted: Converted) -> NextScaleTransformer:
    """A prior with the converted weights, in eval mode."""
    return build(NextScaleTransformer, converted, "the prior file")


def convert_var(
    tokenizer: str | Path,
    prior: str | Path,
    *,
    scale_attention: Literal["causal", "markov"] = "causal",
    class_names: Sequence[str] = (),
) -> ConvertedPipeline:
    """Published VAR files to a pipeline; the tokenizer gets the prior's scales.

    Sampling defaults are those of the published evaluation: guidance linear from 1 to 2.5 over the scales (its cfg =
    1.5), top_k 900 (or the whole codebook where that is smaller), top_p 0.96. Raises UserError where a file is
    unreadable or of another kind, or the two do not belong together.
    """
    raw_tokenizer = read_weights(tokenizer, nested=("vae_local", "vae_wo_ddp", "vae"))
    raw_prior = read_weights(prior, nested=("var_wo_ddp", "var"))
    prior_parts = convert_prior_state(raw_prior, scale_attention)
    wanted = prior_parts.arguments
    # the file says for how many scales it counted code usage; phi is chosen by their number
    num_scales = len(wanted["scale_sizes"])
    counted = len(raw_tokenizer.get("quantize.ema_vocab_hit_SV", ())) or num_scales
    check_belong("number of scales K", counted, num_scales, tokenizer, prior)
    tokenizer_parts = convert_tokenizer_state(raw_tokenizer, wanted["scale_sizes"])
    for name in ("codebook_size", "codebook_dim"):
        check_belong(name, tokenizer_parts.arguments[name], wanted[name], tokenizer, prior)
    sampling = SamplingOptions(
        guidance_scale=GuidanceSchedule("linear", 1.0, 2.5), top_k=min(900, wanted["codebook_size"]), top_p=0.96
    )
    pipeline = NextScalePipeline(
        build_tokenizer(tokenizer_parts),
        build_prior(prior_parts),
        class_names=class_names,
        sampling_defaults=sampling,
        data=data_of(tokenizer, prior),
        protocol=f"Converted from published VAR weights, scale_attention {scale_attention}; not trained further.",
    )
    return ConvertedPipeline(pipeline, tokenizer_parts.dropped, prior_parts.dropped)


def switti_sampling(scale_sizes: Sequence[int], codebook_size: int) -> SamplingOptions:
    """How the published examples draw: at 512 and 1024 pixels (last side 32 and 64), else the published default.

    Spec of Switti, 7: guidance linear from 1 to 7 over all scales, top_k 400 (or the whole codebook where that is
    smaller), top_p 0.95. The default guides at the first ten scales. The examples leave it out from scale 8 or 11 on
    (at 512 pixels also before scale 2) and draw at temperature 0.1 there; between scale 2 and these they mix codes.
    """
    num_scales = len(scale_sizes)
    first, end, late = {32: (2, 8, 0.1), 64: (0, 11, 0.1)}.get(scale_sizes[-1], (0, 10, 1.0))
    last = end - 1 if end < num_scales else None
    example = late != 1 and end < num_scales
    return SamplingOptions(
        guidance_scale=GuidanceSchedule("linear", 1.0, 7.0, last, first),
        top_k=min(400, codebook_size),
        top_p=0.95,
        temperature=tuple(late if k >= end else 1.0 for k in range(num_scales)) if example else 1.0,
        smooth=SmoothSchedule(2, last, filtered=False) if example else False,
    )


def convert_switti(
    tokenizer: str | Path,
    prior: str | Path,
    text_encoder: str | Path,
    *,
    text_encoder_2: str | Path | None = None,
    num_heads: int | None = None,
    rope_base: float | None = None,
    rope_extent: float | None = None,
    scale_attention: Literal["causal", "markov"] | None = None,
) -> ConvertedPipeline:
    """Published Switti files to a pipeline; the tokenizer gets the prior's scales, also where it counted others.

    Sampling defaults are those of `switti_sampling`.

    Args:
        prior: file, or folder with its config.json.
        text_encoder: folder of transformers with CLIP ViT-L/14 and its tokenizer.
        text_encoder_2: the same of CLIP ViT-bigG/14, whose end word stands for the whole prompt; None for a prior that
            was trained with one encoder.
        num_heads: as for `convert_switti_state`.
        rope_base: None is the `rope_theta` of the config.json beside the prior; without one, 10,000.
        rope_extent: None is the `rope_size` there; without one, 128.
        scale_attention: as for `convert_switti_state`.

    Raises UserError where a file is unreadable or of another kind, or they do not belong together.
    """
    raw_tokenizer = read_weights(tokenizer, nested=("vae_local", "vae_wo_ddp", "vae"))
    raw_prior = read_weights(prior, nested=("var_wo_ddp", "var", "switti"))
    settings = _settings_beside(Path(prior)) if "pos_1LC" not in raw_prior else {}
    prior_parts = convert_switti_state(
        raw_prior,
        num_heads=num_heads,
        rope_base=settings.get("rope_theta") if rope_base is None else rope_base,
        rope_extent=settings.get("rope_size") if rope_extent is None else rope_extent,
        scale_attention=scale_attention,
    )
    wanted = prior_parts.arguments
    # how many scales the tokenizer counted code usage at says nothing: one file serves 512 and 1024 pixels
    tokenizer_parts = convert_tokenizer_state(raw_tokenizer, wanted["scale_sizes"])
    for name in ("codebook_size", "codebook_dim"):
        check_belong(name, tokenizer_parts.arguments[name], wanted[name], tokenizer, prior)
    pipeline = NextScalePipeline(
        build_tokenizer(tokenizer_parts),
        build_prior(prior_parts),
        text_encoder=_text_encoder(*[folder for folder in (text_encoder, text_encoder_2) if folder is not None]),
        sampling_defaults=switti_sampling(wanted["scale_sizes"], wanted["codebook_size"]),
        data=data_of(tokenizer, prior),
        protocol=f"Converted from published Switti weights, scale_attention {wanted['scale_attention']}; not trained "
        "further.",
    )
    return ConvertedPipeline(pipeline, tokenizer_parts.dropped, prior_parts.dropped)


def _settings_beside(prior: Path) -> dict[str, float]:
    """Rotary settings in the config.json beside a prior's weights; nothing where there is none."""
    file = (prior if prior.is_dir() else prior.parent) / CONFIG
    if not file.is_file():
        return {}
    config = read_json(file)
    found = {name: config[name] for name in ("rope_theta", "rope_size") if name in config}
    for name, value in found.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise UserError(f"{name} in {file} must be a number, got {value!r}. Copy or download the file again.")
    return found


def _text_encoder(*folders: str | Path) -> PretrainedTextEncoder:
    """The text encoders in these folders, side by side."""
    encoder = PretrainedTextEncoder.from_folders(*folders)
    # a projection, as SDXL's second encoder has it, makes another vector of the same width
    if any(type(network).__name__ == "CLIPTextModelWithProjection" for network in encoder.networks):
        raise UserError(
            f"Switti reads the end word of a CLIPTextModel, got a CLIPTextModelWithProjection in one of "
            f"{', '.join(map(str, folders))}. Load it as a CLIPTextModel with transformers and save that."
        )
    return encoder

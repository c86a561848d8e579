"""Published D-AR files (tokenizer with its decoder, prior) to one pipeline.

The prior (LlamaGen's transformer with 1-D rotary positions) becomes a stock `LlamaForCausalLM`. Published rotary
positions turn channels (2j, 2j + 1) of a head together, Llama's turn (j, j + half): the rows of queries and keys are
put in the other order. And the classes have a table of their own, which becomes the last rows of the vocabulary; they
are never predicted, so the head gets rows of zeros for them.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import LlamaForCausalLM

from isthmus.dar.decoder import FlowDecoder
from isthmus.dar.pipeline import DARPipeline
from isthmus.dar.prior import TokenLayout, llama_config
from isthmus.dar.scheduler import FlowMatchingScheduler
from isthmus.dar.tokenizer import DiffusionTokenizer
from isthmus.errors import UserError, nearest
from isthmus.nn.guidance import GuidanceSchedule
from isthmus.pipelines.options import SamplingOptions
from isthmus.published import (
    Converted,
    ConvertedPipeline,
    StateDict,
    build,
    check_belong,
    data_of,
    indexed,
    load_strict,
    read_file,
    read_weights,
    rename,
    require,
)

_NET = r"diff_decoder\.net\."
_ATTENTION = r"(qkv|kv|q|q_norm|k_norm|proj)\.(weight|bias)"


def _block_keys(published: str, ours: str) -> list[tuple[str, str]]:
    return [
        (published + r"\.(\d+)\.(gate[12])", ours + r".\1.\2"),
        (published + r"\.(\d+)\.(norm[12])\.(\w+)", ours + r".\1.\2.\3"),
        (published + r"\.(\d+)\.attention\." + _ATTENTION, ours + r".\1.attention.\2.\3"),
        (published + r"\.(\d+)\.mlp\.fc1\.(\w+)", ours + r".\1.feed_forward.up.\2"),
        (published + r"\.(\d+)\.mlp\.fc2\.(\w+)", ours + r".\1.feed_forward.down.\2"),
    ]


# (published key, our key), once queries, keys and values are joined; the first pattern that matches decides
_TOKENIZER_KEYS = [
    (r"patchify\.(weight|bias)", r"patch_embedding.\1"),
    (r"query_embedding\.weight", r"query_table"),
    (r"query_linear\.(weight|bias)", r"query_linear.\1"),
    (r"quant_in_conv\.weight", r"to_code.weight"),
    (r"quant_out_conv\.weight", r"from_code.weight"),
    (r"quantize\.embedding\.weight", r"codebook.weight"),
    (r"decoder_embedding\.weight", r"token_position"),
    *_block_keys("encoder_layers", "encoder"),
    *_block_keys("decoder_layers", "condition_layers"),
]
_TOKENIZER_DROPPED = {r"quantize\.codebook_used": "usage statistics of training; nothing at inference reads them"}

_DECODER_KEYS = [
    (_NET + r"cond_mlp\.(\w+)", r"condition_embedding.\1"),
    (_NET + r"conv_in\.(\w+)", r"patch_embedding.\1"),
    (_NET + r"conv_out\.(\w+)", r"head.\1"),
    (_NET + r"linear_out\.linear\.(\w+)", r"head.\1"),
    (_NET + r"linear_out\.adaLN_modulation\.1\.(\w+)", r"head_modulation.\1"),
    (_NET + r"time_embed\.mlp\.0\.(\w+)", r"time_embedding.up.\1"),
    (_NET + r"time_embed\.mlp\.2\.(\w+)", r"time_embedding.down.\1"),
    (_NET + r"blocks\.(\d+)\.attention\." + _ATTENTION, r"blocks.\1.attention.\2.\3"),
    (_NET + r"blocks\.(\d+)\.cross_attn\." + _ATTENTION, r"blocks.\1.cross_attention.\2.\3"),
    (_NET + r"blocks\.(\d+)\.mlp\.fc1\.(\w+)", r"blocks.\1.feed_forward.up.\2"),
    (_NET + r"blocks\.(\d+)\.mlp\.fc2\.(\w+)", r"blocks.\1.feed_forward.down.\2"),
    (_NET + r"blocks\.(\d+)\.adaLN_modulation\.1\.(\w+)", r"blocks.\1.modulation.\2"),
    (_NET + r"blocks\.(\d+)\.time_embed\.mlp\.0\.(\w+)", r"blocks.\1.time_embedding.up.\2"),
    (_NET + r"blocks\.(\d+)\.time_embed\.mlp\.2\.(\w+)", r"blocks.\1.time_embedding.down.\2"),
    (_NET + r"blocks\.(\d+)\.cond_embed\.0\.(\w+)", r"blocks.\1.condition_embedding.up.\2"),
    (_NET + r"blocks\.(\d+)\.cond_embed\.2\.(\w+)", r"blocks.\1.condition_embedding.down.\2"),
]
_DECODER_DROPPED = {
    _NET + r"repa_out\..*": "alignment head of training (features of a frozen network); no image depends on it"
}


@dataclass(frozen=True, kw_only=True)
class PublishedSettings:
    """What a tokenizer's shapes cannot tell, by our names; the defaults are those of the published tokenizer_v1."""

    image_size: int = 256
    num_tokens: int = 256
    num_groups: int = 8
    tokens_per_step: int | None = None
    num_inference_steps: int = 8
    time_shift: float = 2.0
    data_std: float = 0.6
    rotary_base: float = 10_000.0
    decoder_rotary_base: float = 10_000.0
    quantized: bool = True

    @classmethod
    def of(cls, config: Mapping[str, Any], **overrides: Any) -> "PublishedSettings":
        """Settings of a published configuration (its keys are those of tokenizer_v1.yaml); `overrides` win.

        Raises UserError where one of these is no setting.
        """
        known = {field.name for field in fields(cls)}
        for name in overrides:
            if name not in known:
                raise UserError(f"a published tokenizer has no setting {name}. Leave it out.{nearest(name, known)}")
        ours = {
            "sampling_resolution": "image_size",
            "num_all_queries": "num_tokens",
            "num_query_groups": "num_groups",
            "queries_per_step": "tokens_per_step",
            "num_denoising_steps": "num_inference_steps",
            "rope_base_len": "rotary_base",
            "vq_enable": "quantized",
        }
        of_decoder = {"time_shift": "time_shift", "data_std": "data_std", "rope_base_len": "decoder_rotary_base"}
        found = {ours[key]: config.get(key) for key in ours}
        found |= {of_decoder[key]: (config.get("diff_decoder") or {}).get(key) for key in of_decoder}
        return cls(**{name: value for name, value in found.items() if value is not None} | overrides)


@dataclass
class ConvertedDiffusionTokenizer:
    """One converted tokenizer file, which holds two networks, and the arguments of `FlowMatchingScheduler`."""

    tokenizer: Converted
    decoder: Converted
    scheduler: dict[str, Any]

    @property
    def dropped(self) -> dict[str, str]:
        """Published key -> why it is not needed."""
        return self.tokenizer.dropped | self.decoder.dropped


def convert_diffusion_tokenizer_state(
    raw: Mapping[str, Tensor], settings: PublishedSettings
) -> ConvertedDiffusionTokenizer:
    """Published tokenizer weights to arguments and weights of both networks; UserError for unknown or missing keys."""
    joined = _join_projections(raw)
    of_decoder = {key: tensor for key, tensor in joined.items() if re.match(_NET, key)}
    of_tokenizer = {key: tensor for key, tensor in joined.items() if key not in of_decoder}
    tokenizer = _convert_tokenizer(of_tokenizer, settings)
    decoder = _convert_decoder(of_decoder, settings, seen=joined)
    of_networks = ("image_size", "rotary_base", "decoder_rotary_base", "quantized")
    scheduler = {name: value for name, value in asdict(settings).items() if name not in of_networks}
    return ConvertedDiffusionTokenizer(tokenizer, decoder, scheduler)


def _convert_tokenizer(raw: Mapping[str, Tensor], settings: PublishedSettings) -> Converted:
    what = "D-AR tokenizer"
    state, dropped = rename(raw, _TOKENIZER_KEYS, _TOKENIZER_DROPPED, what, "query_embedding.weight")
    first = ("patch_embedding.weight", "to_code.weight", "from_code.weight", "token_position")
    codebook = ("codebook.weight",) if settings.quantized else ()
    require(state, (*first, *codebook, "encoder.0.attention.q_norm.weight"), what)
    if not settings.quantized and state.pop("codebook.weight", None) is not None:
        dropped["quantize.embedding.weight"] = "its settings say that tokens are continuous (vq_enable is false)"
    for name in ("to_code.weight", "from_code.weight"):
        state[name] = state[name].flatten(1)  # stored as 1x1 convolutions
    width, _, patch_size, _ = state["patch_embedding.weight"].shape
    low_rank = "query_linear.weight" in state
    arguments = {
        "image_size": settings.image_size,
        "patch_size": patch_size,
        "width": width,
        "num_layers": len(indexed(state, r"encoder\.(\d+)\.gate1")),
        "condition_width": state["token_position"].shape[1],
        "num_condition_layers": len(indexed(state, r"condition_layers\.(\d+)\.gate1")),
        "num_tokens": settings.num_tokens,
        "num_groups": settings.num_groups,
        "tokens_per_step": settings.tokens_per_step,
        "codebook_dim": state["to_code.weight"].shape[0],
        "table_rows": state["query_table"].shape[0],
        "low_rank_queries": low_rank,
        "rotary_base": float(settings.rotary_base),
        "head_width": state["encoder.0.attention.q_norm.weight"].shape[0],
        "quantized": settings.quantized,
    }
    if settings.quantized:
        arguments["codebook_size"] = state["codebook.weight"].shape[0]
    if low_rank:
        arguments["query_rank"] = state["query_table"].shape[1]
    return Converted(arguments, state, dropped)


def _convert_decoder(raw: Mapping[str, Tensor], settings: PublishedSettings, *, seen: Iterable[str]) -> Converted:
    what = "D-AR pixel decoder"
    state, dropped = rename(raw, _DECODER_KEYS, _DECODER_DROPPED, what, "diff_decoder.net.conv_in.weight", seen=seen)
    first = ("condition_embedding.weight", "patch_embedding.weight", "head.weight")
    require(state, (*first, "blocks.0.attention.q_norm.weight"), what)
    for name in ("patch_embedding.weight", "head.weight"):
        state[name] = state[name].flatten(1)
    width, channels = state["patch_embedding.weight"].shape
    arguments = {
        "patch_size": round((channels / 3) ** 0.5),
        "width": width,
        "num_layers": len(indexed(state, r"blocks\.(\d+)\.modulation\.weight")),
        "condition_width": state["condition_embedding.weight"].shape[1],
        "head_width": state["blocks.0.attention.q_norm.weight"].shape[0],
        "rotary_base": float(settings.decoder_rotary_base),
        "shared_time_embedding": "time_embedding.up.weight" in state,
        "adaptive_head": "head_modulation.weight" in state,
    }
    return Converted(arguments, state, dropped)


def _join_projections(raw: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """One `qkv` (cross-attention: `kv`) where the file has a layer for each of q, k and v."""
    joined = dict(raw)
    for key in raw:
        match = re.fullmatch(r"(.*\.)(attention\.q|cross_attn\.k)\.(weight|bias)", key)
        if match is None:
            continue
        prefix, first, entry = match.groups()
        kind, letters = ("attention", "qkv") if first == "attention.q" else ("cross_attn", "kv")
        names = [f"{prefix}{kind}.{letter}.{entry}" for letter in letters]
        if missing := [name for name in names if name not in raw]:
            raise UserError(f"a D-AR tokenizer file must be complete, this one lacks {missing}. Pass the whole file.")
        joined[f"{prefix}{kind}.{letters}.{entry}"] = torch.cat([joined.pop(name) for name in names])
    return joined


def build_tokenizer_parts(
    converted: ConvertedDiffusionTokenizer,
) -> tuple[DiffusionTokenizer, FlowDecoder, FlowMatchingScheduler]:
    """Tokenizer and pixel decoder with the converted weights, in eval mode, and the scheduler."""
    return (
        build(DiffusionTokenizer, converted.tokenizer, "the tokenizer file"),
        build(FlowDecoder, converted.decoder, "the tokenizer file"),
        FlowMatchingScheduler(**converted.scheduler),
    )


PUBLISHED_HEAD_WIDTH = 64

# (published key, Llama's key); those in angle brackets are taken apart or put together below
_KEYS = [
    (r"tok_embeddings\.weight", r"<codes>"),
    (r"cls_embedding\.embedding_table\.weight", r"<classes>"),
    (r"output\.weight", r"<head>"),
    (r"norm\.weight", r"model.norm.weight"),
    (r"layers\.(\d+)\.attention\.wqkv\.weight", r"<qkv>.\1"),
    (r"layers\.(\d+)\.attention\.wo\.weight", r"model.layers.\1.self_attn.o_proj.weight"),
    (r"layers\.(\d+)\.feed_forward\.w1\.weight", r"model.layers.\1.mlp.gate_proj.weight"),
    (r"layers\.(\d+)\.feed_forward\.w3\.weight", r"model.layers.\1.mlp.up_proj.weight"),
    (r"layers\.(\d+)\.feed_forward\.w2\.weight", r"model.layers.\1.mlp.down_proj.weight"),
    (r"layers\.(\d+)\.attention_norm\.weight", r"model.layers.\1.input_layernorm.weight"),
    (r"layers\.(\d+)\.ffn_norm\.weight", r"model.layers.\1.post_attention_layernorm.weight"),
]
_DROPPED = {
    r"layers\.\d+\.attention\.kv_cache\.[kv]_cache": "keys and values of the last image the model drew before saving"
}
_WHAT = "D-AR prior"


def convert_next_token_prior_state(
    raw: Mapping[str, Tensor], *, num_tokens: int, num_heads: int | None = None
) -> Converted:
    """Published prior weights to arguments of `TokenLayout` and `llama_config`, and Llama's weights.

    `num_heads` None takes heads that are 64 wide, as in every published size up to XXXL. Raises UserError where a key
    is unknown or missing, or a shape is none of this network's.
    """
    state, dropped = rename(raw, _KEYS, _DROPPED, _WHAT, "cls_embedding.embedding_table.weight")
    first = ("<codes>", "<classes>", "<head>", "<qkv>.0", "model.layers.0.mlp.gate_proj.weight")
    require(state, first, _WHAT)
    codebook_size, width = state["<codes>"].shape
    if not num_heads and width % PUBLISHED_HEAD_WIDTH:
        raise UserError(
            f"the heads of a {_WHAT} are {PUBLISHED_HEAD_WIDTH} wide unless num_heads says otherwise, got width "
            f"{width}. Pass num_heads."
        )
    num_heads = num_heads or width // PUBLISHED_HEAD_WIDTH
    codes, classes, head = (state.pop(name) for name in ("<codes>", "<classes>", "<head>"))
    if head.shape != codes.shape or classes.shape[1] != width or len(classes) < 1:
        raise UserError(
            f"a {_WHAT} has one embedding and one output row per code, and classes as wide, got {tuple(codes.shape)}, "
            f"{tuple(head.shape)} and {tuple(classes.shape)}. Pass a published file."
        )
    if num_heads < 1 or width % (2 * num_heads):
        raise UserError(
            f"num_heads must cut the width of the {_WHAT} ({width}) into heads of an even width, got {num_heads}. Pass "
            "the number it was trained with."
        )
    num_layers = len(indexed(state, r"<qkv>\.(\d+)"))
    for index in range(num_layers):
        state |= _split_qkv(state.pop(f"<qkv>.{index}", None), index, width, num_heads)
    state["model.embed_tokens.weight"] = torch.cat([codes, classes])
    state["lm_head.weight"] = torch.cat([head, torch.zeros_like(classes)])
    arguments = {
        "codebook_size": codebook_size,
        "num_classes": len(classes) - 1,
        "num_tokens": num_tokens,
        "width": width,
        "num_layers": num_layers,
        "num_heads": num_heads,
        "feed_forward_width": state["model.layers.0.mlp.gate_proj.weight"].shape[0],
    }
    return Converted(arguments, state, dropped)


def build_next_token_prior(converted: Converted) -> LlamaForCausalLM:
    """As `build`, of a prior."""
    sizes = dict(converted.arguments)
    layout = TokenLayout(**{name: sizes.pop(name) for name in ("codebook_size", "num_classes", "num_tokens")})
    return load_strict(LlamaForCausalLM(llama_config(layout, **sizes)), converted.state, "the prior file").eval()


def halves_apart(weight: Float[Tensor, "heads_c width"], num_heads: int) -> Float[Tensor, "heads_c width"]:
    """Rows of every head in the order 0, 2, 4, ..., 1, 3, 5, ...: rotated pairs of neighbours become pairs of halves.

    >>> halves_apart(torch.arange(8.0).unsqueeze(1), num_heads=2).flatten().tolist()
    [0.0, 2.0, 1.0, 3.0, 4.0, 6.0, 5.0, 7.0]
    """
    pairs = weight.unflatten(0, (num_heads, -1, 2))
    return pairs.transpose(1, 2).flatten(0, 2)


def _split_qkv(weight: Tensor | None, index: int, width: int, num_heads: int) -> StateDict:
    if weight is None or tuple(weight.shape) != (3 * width, width):
        found = "nothing" if weight is None else str(tuple(weight.shape))
        raise UserError(
            f"a {_WHAT} has as many key as query heads, so layers.{index}.attention.wqkv is {(3 * width, width)}, got "
            f"{found}. Pass a published file."
        )
    q, k, v = weight.split(width)
    prefix = f"model.layers.{index}.self_attn"
    return {
        f"{prefix}.q_proj.weight": halves_apart(q, num_heads),
        f"{prefix}.k_proj.weight": halves_apart(k, num_heads),
        f"{prefix}.v_proj.weight": v,
    }


def convert_dar(
    tokenizer: str | Path,
    prior: str | Path,
    *,
    num_heads: int | None = None,
    class_names: Sequence[str] = (),
    **settings: Any,
) -> ConvertedPipeline:
    """Published D-AR files to a pipeline; the tokenizer's also holds the pixel decoder.

    Sampling defaults are those of the published evaluation: guidance linear from 1.2 to 8 over the tokens, no filters.
    `num_heads` None takes heads that are 64 wide, as published. `settings` are those of `PublishedSettings`, which
    otherwise come from the file, or are the published model's. Raises UserError where a file is unreadable or of
    another kind, or the two do not belong together.
    """
    weights, config = read_file(tokenizer)
    published = PublishedSettings.of(config, **settings)
    parts = convert_diffusion_tokenizer_state(weights, published)
    prior_parts = convert_next_token_prior_state(
        read_weights(prior), num_tokens=published.num_tokens, num_heads=num_heads
    )
    # before the networks are built, which may take a minute
    if not published.quantized:
        raise UserError(f"{tokenizer} has no codebook (vq_enable is off), and a prior needs codes. Pass another one.")
    ours, theirs = (one.arguments["codebook_size"] for one in (parts.tokenizer, prior_parts))
    check_belong("codebook_size", ours, theirs, tokenizer, prior)
    num_classes = prior_parts.arguments["num_classes"]
    guidance = GuidanceSchedule("linear", 1.2, 8.0) if num_classes else 1.0
    image_tokenizer, decoder, scheduler = build_tokenizer_parts(parts)
    pipeline = DARPipeline(
        image_tokenizer,
        decoder,
        build_next_token_prior(prior_parts),
        scheduler,
        class_names=class_names,
        sampling_defaults=SamplingOptions(guidance_scale=guidance),
        data=data_of(tokenizer, prior),
        protocol="Converted from published D-AR weights; not trained further.",
    )
    return ConvertedPipeline(pipeline, parts.dropped, prior_parts.dropped)

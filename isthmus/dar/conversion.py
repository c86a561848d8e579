"""A published D-AR tokenizer file to `DiffusionTokenizer`, `FlowDecoder` and `FlowMatchingScheduler`.

Layers and widths are read off the shapes. What shapes cannot tell (how many tokens, groups and steps there are, the
time shift, ...) comes from the settings stored in the file, from the caller, or is that of the published model.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import Tensor

from isthmus.conversion.renaming import Converted, indexed, load_strict, rename, require
from isthmus.errors import UserError
from isthmus.models.diffusion_tokenizer import DiffusionTokenizer
from isthmus.models.flow_decoder import FlowDecoder
from isthmus.schedulers.flow_matching import FlowMatchingScheduler

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
    """What a tokenizer's shapes cannot tell; the defaults are those of the published model (tokenizer_v1).

    Attributes:
        image_size: side of the training images in pixels.
        num_tokens: tokens of an image.
        num_groups: groups that they fall into.
        tokens_per_step: tokens that drive a step; None is one group.
        num_inference_steps: solver steps.
        time_shift: of the time grid.
        data_std: factor between images and states.
        rotary_base: base of the encoder's rotary angles.
        decoder_rotary_base: base of the pixel decoder's.
        quantized: whether there is a codebook; without one tokens are continuous.
    """

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

        Raises:
            UserError: an override that is no setting.
        """
        unknown = sorted(set(overrides) - {field.name for field in fields(cls)})
        if unknown:
            raise UserError(f"a published tokenizer has no settings {unknown}. Leave them out.")
        places = {
            "image_size": config.get("sampling_resolution"),
            "num_tokens": config.get("num_all_queries"),
            "num_groups": config.get("num_query_groups"),
            "tokens_per_step": config.get("queries_per_step"),
            "num_inference_steps": config.get("num_denoising_steps"),
            "rotary_base": config.get("rope_base_len"),
            "quantized": config.get("vq_enable"),
        }
        decoder = config.get("diff_decoder") or {}
        places |= {
            "time_shift": decoder.get("time_shift"),
            "data_std": decoder.get("data_std"),
            "decoder_rotary_base": decoder.get("rope_base_len"),
        }
        return cls(**{name: value for name, value in places.items() if value is not None} | overrides)


@dataclass
class ConvertedDiffusionTokenizer:
    """One converted tokenizer file, which holds two networks.

    Attributes:
        tokenizer: arguments, weights and dropped keys of `DiffusionTokenizer`.
        decoder: those of `FlowDecoder`.
        scheduler: arguments of `FlowMatchingScheduler`.
    """

    tokenizer: Converted
    decoder: Converted
    scheduler: dict[str, Any]

    @property
    def dropped(self) -> dict[str, str]:
        """Published key -> why it is not needed."""
        return self.tokenizer.dropped | self.decoder.dropped


def convert_diffusion_tokenizer_state(
    raw: Mapping[str, Tensor], settings: PublishedSettings | None = None
) -> ConvertedDiffusionTokenizer:
    """Published tokenizer weights to arguments and weights of both networks.

    Args:
        raw: weights by their published keys.
        settings: what shapes cannot tell; None is the published model's.

    Raises:
        UserError: a key is unknown or missing.
    """
    settings = settings or PublishedSettings()
    joined = _join_projections(raw)
    of_decoder = {key: tensor for key, tensor in joined.items() if re.match(_NET, key)}
    of_tokenizer = {key: tensor for key, tensor in joined.items() if key not in of_decoder}
    tokenizer = _convert_tokenizer(of_tokenizer, settings)
    decoder = _convert_decoder(of_decoder, settings, seen=joined)
    scheduler = asdict(settings)
    for name in ("image_size", "rotary_base", "decoder_rotary_base", "quantized"):
        del scheduler[name]
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
    joined = {}
    for key, tensor in raw.items():
        match = re.fullmatch(r"(.*\.)(attention|cross_attn)\.([qkv])\.(weight|bias)", key)
        if match is None:
            joined[key] = tensor
            continue
        prefix, kind, letter, entry = match.groups()
        letters = "qkv" if kind == "attention" else "kv"
        if letter not in letters:
            joined[key] = tensor
        elif letter == letters[0]:
            names = [f"{prefix}{kind}.{part}.{entry}" for part in letters]
            missing = [name for name in names if name not in raw]
            if missing:
                raise UserError(
                    f"a D-AR tokenizer file must be complete, this one lacks {missing}. Pass the whole file."
                )
            joined[f"{prefix}{kind}.{letters}.{entry}"] = torch.cat([raw[name] for name in names])
        elif f"{prefix}{kind}.{letters[0]}.{entry}" not in raw:
            joined[key] = tensor  # an unknown key, which the rules refuse by its name
    return joined


def build_diffusion_tokenizer(converted: ConvertedDiffusionTokenizer) -> DiffusionTokenizer:
    """A tokenizer with the converted weights, in eval mode."""
    model = DiffusionTokenizer(**converted.tokenizer.arguments)
    load_strict(model, converted.tokenizer.state, "the tokenizer file")
    return model.eval()


def build_flow_decoder(converted: ConvertedDiffusionTokenizer) -> FlowDecoder:
    """A pixel decoder with the converted weights, in eval mode."""
    model = FlowDecoder(**converted.decoder.arguments)
    load_strict(model, converted.decoder.state, "the tokenizer file")
    return model.eval()


def build_scheduler(converted: ConvertedDiffusionTokenizer) -> FlowMatchingScheduler:
    """The scheduler of the converted tokenizer, with the published solver."""
    return FlowMatchingScheduler(**converted.scheduler)

"""A saved Llama as its settings and weights, and the fingerprint of any model.

Decoding reads the weights without importing transformers, which takes longer to import than most draws take. Whatever
needs the network as a module (training, likelihood, export) asks for `module`, which is made then, on the same memory.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from torch import Tensor, nn

from isthmus.errors import UserError
from isthmus.nn.component_files import (
    CONFIG,
    TRANSFORMERS_WEIGHTS,
    read_config,
    remembered,
    stored_shapes,
    weight_files,
)
from isthmus.nn.saved_model import (
    Config,
    ReadFrom,
    check_class,
    check_shapes,
    read_weights,
    values_left_out,
    without_values,
)

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

# what decoding and its checks read; written by every transformers that writes `rope_parameters`
_SETTINGS = frozenset(
    "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim "
    "hidden_act max_position_embeddings rms_norm_eps rope_parameters attention_bias mlp_bias "
    "tie_word_embeddings".split()
)
# what transformers notes about the file, not about the network
_WRITER = {"architectures", "dtype", "transformers_version"}
# what it writes beside the settings of the network, and what a prior of ours adds
_EXTRAS = _WRITER | {"codebook_size", "model_type", "num_words", "prompt_length"}
# settings that decoding does not read
_OTHERS = frozenset(
    "attention_dropout bos_token_id eos_token_id initializer_range pad_token_id pretraining_tp use_cache".split()
)


class StoredLlama:
    """A stock Llama: `config` (a `LlamaConfig`, or a mapping with attributes), `tensors` by name or a `module`."""

    library: ClassVar[str] = "transformers"
    class_name: ClassVar[str] = "LlamaForCausalLM"

    def __init__(
        self, config: Any, tensors: Mapping[str, Tensor] | None = None, module: "LlamaForCausalLM | None" = None
    ):
        self.config: Any = config
        self.read_from: ReadFrom | None = None
        self._tensors, self._module = tensors or {}, module

    @classmethod
    def of(cls, llama: "LlamaForCausalLM | StoredLlama") -> "StoredLlama":
        """A module as a stored Llama; one that is stored stays what it is. Raises UserError for a compiled one."""
        if hasattr(llama, "_orig_mod"):
            raise UserError(
                "drawing reads the weights of a Llama and never calls it, so torch.compile(llama) makes nothing "
                "faster, got a compiled one. Hand over the Llama itself; `isthmus sample --compile` compiles the draw."
            )
        return llama if isinstance(llama, StoredLlama) else cls(llama.config, module=llama)

    @classmethod
    def from_pretrained(cls, folder: str | Path, *, dtype: torch.dtype | None = None) -> "StoredLlama":
        """The Llama in a folder that transformers wrote, as `SavedModel.from_pretrained`; `dtype` None is float32."""
        folder = Path(folder)
        config = read_config(folder)
        check_class(next(iter(config.get("architectures") or ()), None), cls.class_name, folder)
        if not config.keys() >= _SETTINGS or config.keys() - _SETTINGS - _OTHERS - _EXTRAS:
            config = _read_by_transformers(config, folder)
        shapes = llama_shapes(config)
        check_shapes(shapes, stored_shapes(folder, TRANSFORMERS_WEIGHTS), folder)
        if values_left_out():
            tensors = {name: torch.empty(shape) for name, shape in shapes.items()}
            return cls(Config(config), tensors).to(dtype or torch.float32)
        files = weight_files(folder, TRANSFORMERS_WEIGHTS)
        llama = cls(Config(config), read_weights(files, folder)).to(dtype or torch.float32)
        llama.read_from = ReadFrom.now((folder / CONFIG, *files), llama.state_dict())
        return llama

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self["model.norm.weight"].device

    @property
    def dtype(self) -> torch.dtype:
        """Type of the weights."""
        return self["model.norm.weight"].dtype

    @property
    def num_parameters(self) -> int:
        """Number of weights."""
        return sum(tensor.numel() for tensor in self.state_dict().values())

    @property
    def module(self) -> "LlamaForCausalLM":
        """The stock network, in eval mode; made on the weights' own memory when it is first asked for."""
        if self._module is None:
            # imported here: drawing does without
            from transformers import LlamaConfig, LlamaForCausalLM

            tensors = self.state_dict()
            with without_values():
                module = LlamaForCausalLM(LlamaConfig.from_dict(dict(self.config)))
            module.load_state_dict(tensors, assign=True)
            # its table of angles is no weight, so it is still on the meta device
            module.model.rotary_emb = type(module.model.rotary_emb)(config=module.config).to(self.device)
            self._module, self._tensors = module.eval(), {}
        return self._module

    def state_dict(self) -> dict[str, Tensor]:
        """Weights by the names of `LlamaForCausalLM`."""
        if self._module is not None:
            return dict(self._module.state_dict())
        return dict(self._tensors)

    def __getitem__(self, name: str) -> Tensor:
        """The weight of that name."""
        return self._tensors[name] if self._module is None else self._module.get_parameter(name).detach()

    def to(self, *place: torch.device | str | torch.dtype) -> "StoredLlama":
        """Move or cast the weights, in place as modules do: a device, a type or both; returns itself."""
        if self._module is not None:
            cast(Any, self._module).to(*place)
        else:
            self._tensors = {name: cast(Any, weight).to(*place) for name, weight in self.state_dict().items()}
        return self

    def is_same(self, other: "StoredLlama") -> bool:
        """Whether both hold the same weights: one object, or one module."""
        return self is other or (self._module is not None and self._module is other._module)


def llama_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every weight of a Llama without biases whose head is a matrix of its own."""
    width, inner, head = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    queries, keys = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    words = (config["vocab_size"], width)
    shapes = {"model.embed_tokens.weight": words, "model.norm.weight": (width,), "lm_head.weight": words}
    for layer in range(config["num_hidden_layers"]):
        for names, shape in {
            "self_attn.q_proj": (queries, width),
            "self_attn.k_proj self_attn.v_proj": (keys, width),
            "self_attn.o_proj": (width, queries),
            "mlp.gate_proj mlp.up_proj": (inner, width),
            "mlp.down_proj": (width, inner),
            "input_layernorm post_attention_layernorm": (width,),
        }.items():
            shapes |= {f"model.layers.{layer}.{name}.weight": shape for name in names.split()}
    return shapes


def _read_by_transformers(config: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Settings that another version of transformers wrote, as the installed one reads them; UserError for unknown."""
    from transformers import LlamaConfig
    from transformers import __version__ as installed

    unknown = sorted(set(config) - set(LlamaConfig().to_dict()) - _EXTRAS)
    # another version of transformers may know other settings; with the same one the file was edited
    if unknown and config.get("transformers_version") == installed:
        raise UserError(f"{folder / CONFIG} has settings that a Llama does not know: {', '.join(unknown[:4])}.")
    return LlamaConfig.from_dict(config).to_diff_dict()


@contextmanager
def no_progress_bars() -> Iterator[None]:
    """Without the bars that transformers shows for every file it reads or writes."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


# settings that came after format 1 and stand in its folders: at these values a network is what it was before them.
# Those that came after these name themselves (`Recorded.later_arguments`)
_LATER = {"has_mask_embedding": False, "pixel_unshuffle": 1}


def fingerprint(model: nn.Module | StoredLlama) -> str:
    """SHA-256 (hex) over the configuration and all weights, independent of device and memory layout.

    Two models with the same fingerprint give the same tokens. Of a model that is as it was read from large files it is
    kept in the cache folder.
    """
    known: ReadFrom | None = getattr(model, "read_from", None)
    if known is not None and known.still_holds(model.state_dict()):
        return remembered(f"fingerprint 1 {model.dtype}", known.files, lambda: _hashed(model))
    return _hashed(model)


def _hashed(model: nn.Module | StoredLlama) -> str:
    digest = hashlib.sha256()
    config: Any = getattr(model, "config", {})
    # transformers' configurations are no mappings; what differs from their defaults is what makes the network
    values = config.to_diff_dict() if hasattr(config, "to_diff_dict") else dict(config)
    config = {k: v for k, v in values.items() if not (k.startswith("_") or k in _WRITER)}
    later = _LATER | dict(getattr(model, "later_arguments", {}))
    config = {k: v for k, v in config.items() if k not in later or v != later[k]}
    digest.update(json.dumps(config, sort_keys=True, default=list).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()

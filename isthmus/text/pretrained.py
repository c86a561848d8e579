"""Text encoders that others trained: folders of transformers, frozen, one or several side by side.

Side by side is how Switti reads a prompt (two CLIP encoders; spec of Switti, 5). Nothing in a folder is executed: the
networks are named here, their weights are safetensors, and tokenizers are tables.
"""

import hashlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from textwrap import shorten
from typing import Any, cast

import torch
from jaxtyping import Bool, Float, Int
from safetensors import SafetensorError
from torch import Tensor, nn

from isthmus.errors import UserError
from isthmus.nn.component_files import CONFIG, TRANSFORMERS_WEIGHTS, read_json, weight_files
from isthmus.nn.saved_model import Config, ReadFrom, Recorded, SavedModel, check_finite, values_left_out
from isthmus.nn.stored_llama import no_progress_bars
from isthmus.text.encoders import TextFeatures

logger = logging.getLogger("isthmus")

# type of a configuration of transformers -> the network of it that reads text
_NETWORKS = {"t5": "T5EncoderModel", "clip": "CLIPTextModel", "clip_text_model": "CLIPTextModel", "bert": "BertModel"}
_WITH_PROJECTION = "CLIPTextModelWithProjection"
# what transformers notes about a file, not about the network
_ABOUT_FILES = {"architectures", "dtype", "transformers_version"}
# settings by which transformers loads, or even downloads, code
_NAMES_CODE = {"auto_map", "attn_implementation", "quantization_config"}
_TOKENIZER = "tokenizer.json"


class PretrainedTextEncoder(SavedModel):
    """Frozen networks of transformers that read a prompt: T5, CLIP (with its projection or without) or BERT.

    The vectors of words are those of all networks, joined by width. The vector of the whole prompt is the last
    network's: for CLIP the end word behind the last norm (and the projection, where it has one), for others the mean of
    the words that count. Made by `from_folders`, read back by `from_pretrained`; never trained.

    Args:
        networks: modules of transformers.
        tokenizers: one for each network, as the `tokenizers` library writes it (JSON).
        hidden_layers: of each network, whose layer's output the vectors of words are, counted from 1; None takes the
            last, behind its norm.
        max_length: words that are read of a prompt, those that begin and end it included.

    Raises UserError where a network has no such layer or no room for so many words, or its tokenizer is another's.
    """

    def __init__(
        self,
        networks: Sequence[nn.Module],
        tokenizers: Sequence[str],
        hidden_layers: Sequence[int | None],
        max_length: int,
    ):
        super().__init__()
        if not networks or len(hidden_layers) != len(networks):
            raise UserError(
                f"a text encoder has at least one network, and one hidden layer (or None) for each, got "
                f"{len(networks)} and {len(hidden_layers)}."
            )
        self.networks = nn.ModuleList(networks).requires_grad_(False).eval()
        self._tokenizer_files, self.hidden_layers, self.max_length = list(tokenizers), list(hidden_layers), max_length
        for network, layer, tokenizer in zip(networks, hidden_layers, self.tokenizers, strict=True):
            name, config = type(network).__name__, cast(Any, network).config
            if layer is not None and not 0 < layer < config.num_hidden_layers:
                raise UserError(
                    f"hidden_layer must be one of 1 to {config.num_hidden_layers - 1} in this {name}, or None for the "
                    f"last behind its norm, got {layer}."
                )
            # T5 counts distances, so it has room for any number
            room = getattr(config, "max_position_embeddings", max_length)
            if not 2 < max_length <= room:
                raise UserError(
                    f"max_length must be at least 3, and this {name} has room for {room} words, got {max_length}."
                )
            if tokenizer.get_vocab_size() > config.vocab_size:
                raise UserError(
                    f"the tokenizer has {tokenizer.get_vocab_size()} words and its {name} knows {config.vocab_size}. "
                    "Put the tokenizer that the network was trained with into its folder."
                )
        self.config = Config(
            networks=[_settings(network) for network in networks],
            tokenizers=[hashlib.sha256(text.encode()).hexdigest() for text in tokenizers],
            hidden_layers=self.hidden_layers,
            max_length=max_length,
        )

    @classmethod
    def from_folders(
        cls,
        *folders: str | Path,
        hidden_layers: Sequence[int | None] | None = None,
        max_length: int = 77,
    ) -> "PretrainedTextEncoder":
        """The networks and tokenizers in folders that transformers wrote, in fp32; `hidden_layers` None takes the last.

        Raises UserError where a folder is incomplete or holds another network, and as the constructor.
        """
        networks = [_network(Path(folder), torch.float32) for folder in folders]
        tokenizers = [_foreign_tokenizer(Path(folder)) for folder in folders]
        return cls(networks, tokenizers, [None] * len(folders) if hidden_layers is None else hidden_layers, max_length)

    @classmethod
    def from_pretrained(cls, folder: str | Path, *, dtype: torch.dtype | None = None) -> "PretrainedTextEncoder":
        """What `save_pretrained` wrote, on the CPU; its shapes alone inside `without_values`.

        `dtype` None keeps the stored type. Raises UserError where the folder is incomplete or was changed.
        """
        folder = Path(folder)
        settings = cls.load_config(folder)
        parts = [folder / _part(number) for number in range(len(settings["networks"]))]
        for file in (part / _TOKENIZER for part in parts):
            if not file.is_file():
                raise UserError(f"a saved text encoder needs {file}, which is missing. Copy or download it whole.")
        tokenizers = [(part / _TOKENIZER).read_text(encoding="utf-8") for part in parts]
        networks = [_network(part, dtype) for part in parts]
        encoder = cls(networks, tokenizers, settings["hidden_layers"], settings["max_length"])
        if encoder.config.tokenizers != settings["tokenizers"]:
            raise UserError(f"{folder} must have the tokenizers it was saved with, and one is another. Copy it again.")
        if not values_left_out():
            weights = [file for part in parts for file in weight_files(part, TRANSFORMERS_WEIGHTS)]
            files = (folder / CONFIG, *(part / name for part in parts for name in (CONFIG, _TOKENIZER)), *weights)
            encoder.read_from = ReadFrom.now(files, encoder.state_dict())
        return encoder

    def save_pretrained(self, save_directory: str | Path, *, max_shard_size: int | str | None = None) -> None:
        """Write config.json, and of each network a folder as transformers has it, with its tokenizer."""
        Recorded.save_pretrained(self, save_directory)
        limit = {} if max_shard_size is None else {"max_shard_size": max_shard_size}
        for number, (network, tokenizer) in enumerate(zip(self.networks, self._tokenizer_files, strict=True)):
            part = Path(save_directory) / _part(number)
            with no_progress_bars():
                cast(Any, network).save_pretrained(part, **limit)
            (part / _TOKENIZER).write_text(tokenizer, encoding="utf-8")

    @property
    def text_width(self) -> int:
        """Width of the vector of a word."""
        return sum(cast(Any, network).config.hidden_size for network in self.networks)

    @property
    def pooled_width(self) -> int:
        """Width of the vector of a prompt."""
        last: Any = self.networks[-1]
        return last.config.projection_dim if type(last).__name__ == _WITH_PROJECTION else last.config.hidden_size

    def train(self, mode: bool = True) -> "PretrainedTextEncoder":
        """It stays in eval mode, whatever it is part of."""
        return super().train(False)

    @cached_property
    def tokenizers(self) -> list[Any]:
        """A tokenizer of the `tokenizers` library for each network, that cuts what is too long."""
        from tokenizers import Tokenizer

        made = []
        for text in self._tokenizer_files:
            try:
                made.append(Tokenizer.from_str(text))
            except Exception as error:  # the library raises nothing narrower
                raise UserError(
                    f"{_TOKENIZER} must be a tokenizer of the `tokenizers` library, but cannot be read ({error}). "
                    "Copy or download it again."
                ) from error
            made[-1].no_padding()
            made[-1].enable_truncation(self.max_length)
        return made

    def word_ids(self, prompts: Sequence[str]) -> list[tuple[Int[Tensor, "b _"], Bool[Tensor, "b _"]]]:
        """For each network, numbers of the words of each prompt, and True where there is one.

        A prompt that is too long is cut, with a warning that says where.
        """
        return [self._word_ids(tokenizer, prompts) for tokenizer in self.tokenizers]

    def _word_ids(self, tokenizer: Any, prompts: Sequence[str]) -> tuple[Int[Tensor, "b _"], Bool[Tensor, "b _"]]:
        encoded = tokenizer.encode_batch(list(prompts))
        for prompt, one in zip(prompts, encoded, strict=True):
            if one.overflowing:
                cut = max(end for _, end in one.offsets)
                logger.warning(
                    "a prompt has more than the %d words that are read: it is cut before %r, after %r",
                    *(self.max_length, prompt[cut : cut + 40].strip(), prompt[max(cut - 40, 0) : cut]),
                )
        # which number fills rows up does not matter: nothing sees it
        ids = torch.zeros((len(encoded), max(len(one.ids) for one in encoded)), dtype=torch.int64)
        mask = torch.zeros_like(ids, dtype=torch.bool)
        for row, one in enumerate(encoded):
            ids[row, : len(one.ids)] = torch.tensor(one.ids)
            mask[row, : len(one.ids)] = True
        return ids.to(self.device), mask.to(self.device)

    @torch.no_grad()
    def forward(self, words: Sequence[tuple[Int[Tensor, "b _"], Bool[Tensor, "b _"]]]) -> TextFeatures:
        """Features of words by number: for each network the numbers, and True where there is one (`word_ids`)."""
        parts = []
        for network, layer, (ids, mask) in zip(self.networks, self.hidden_layers, words, strict=True):
            # the same numbers in training and from a cache, whatever the loop around it computes in
            with torch.autocast(ids.device.type, enabled=False):
                parts.append(_read(network, layer, ids, mask))
        length = max(part.mask.shape[1] for part in parts)
        whole = [part.padded(length) for part in parts]
        mask = torch.stack([part.mask for part in whole]).any(dim=0)
        return TextFeatures(torch.cat([part.hidden for part in whole], dim=-1), mask, parts[-1].pooled)

    def encode(self, prompts: Sequence[str]) -> TextFeatures:
        """Features of prompts; the empty one stands for no prompt."""
        return self(self.word_ids(prompts))


def _part(number: int) -> str:
    return f"network_{number + 1}"


def _settings(network: nn.Module) -> dict[str, Any]:
    """What differs from the defaults of its kind of network."""
    settings = cast(Any, network).config.to_diff_dict().items()
    return {"class": type(network).__name__} | {
        name: value for name, value in settings if not name.startswith("_") and name not in _ABOUT_FILES
    }


def _read(
    network: nn.Module, layer: int | None, ids: Int[Tensor, "b words"], mask: Bool[Tensor, "b words"]
) -> TextFeatures:
    output = network(input_ids=ids, attention_mask=mask.long(), output_hidden_states=layer is not None)
    hidden: Float[Tensor, "b words width"] = output.last_hidden_state if layer is None else output.hidden_states[layer]
    hidden = hidden.masked_fill(~mask[..., None], 0)
    given = (getattr(output, name, None) for name in ("text_embeds", "pooler_output"))
    pooled = next((vector for vector in given if vector is not None), None)
    if pooled is None:
        pooled = hidden.sum(dim=1) / mask.sum(dim=1, keepdim=True)
    return TextFeatures(hidden, mask, pooled)


def _network(folder: Path, dtype: torch.dtype | None) -> nn.Module:
    """The network in a folder; UserError where it is none of ours, or not whole."""
    import transformers

    if not (folder / CONFIG).is_file():
        what = "has no config.json" if folder.is_dir() else "is no folder"
        raise UserError(
            f"a text encoder must be a folder of transformers, got {folder}, which {what}. Name a folder with the "
            "config.json, the weights and the tokenizer of one."
        )
    config = read_json(folder / CONFIG)
    found = _network_name(config)
    if found is None:
        known = ", ".join(sorted({*_NETWORKS.values(), _WITH_PROJECTION}))
        raise UserError(
            f"a text encoder must be one of {known}, got {config.get('model_type')} ({config.get('architectures')}) in "
            f"{folder}. Pass another folder."
        )
    kind: Any = getattr(transformers, found)
    # its other vector of the whole is trained for another task, and many files lack it
    arguments = {"add_pooling_layer": False} if found == "BertModel" else {}
    with _quietly():
        try:
            own = kind.config_class.from_dict(_harmless(config))
            if values_left_out():
                return kind(own, **arguments)
            network, report = kind.from_pretrained(
                folder,
                config=own,
                dtype=dtype or "auto",
                use_safetensors=True,
                local_files_only=True,
                output_loading_info=True,
                **arguments,
            )
        except _unreadable() as error:
            raise UserError(
                f"the {found} in {folder} cannot be read ({_in_a_line(error)}). It needs a config.json that fits its "
                "weights, and those as safetensors: copy or download it again, or save it as safetensors."
            ) from error
    if missing := sorted(report["missing_keys"]):
        raise UserError(
            f"the weights in {folder} must be those of a whole {found}, missing {', '.join(missing[:4])}. Copy or "
            "download it again."
        )
    check_finite(network.state_dict(), folder)
    return network


def _network_name(config: Mapping[str, Any]) -> str | None:
    """The class that reads text with these settings; None for networks that we do not know."""
    named = config.get("architectures")
    if isinstance(named, list) and _WITH_PROJECTION in named:
        return _WITH_PROJECTION
    return _NETWORKS.get(str(config.get("model_type")))


def _harmless(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of the network that reads text, without those that name code to load."""
    settings = config.get("text_config", config)  # half of a CLIP
    return {name: value for name, value in settings.items() if not name.startswith("_") and name not in _NAMES_CODE}


def _foreign_tokenizer(folder: Path) -> str:
    """The tokenizer in a folder of transformers, as JSON of the `tokenizers` library, with what transformers adds."""
    from transformers import AutoTokenizer

    with _quietly():
        try:
            tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            return tokenizer.backend_tokenizer.to_str()
        except _unreadable() as error:
            raise UserError(
                f"a text encoder needs the files of its tokenizer beside its weights, those in {folder} are missing or "
                f"cannot be read ({_in_a_line(error)}). Copy them into it."
            ) from error


@contextmanager
def _quietly() -> Iterator[None]:
    """Without transformers' bars and its lists of weights that are not used: half of a CLIP reads pictures."""
    from transformers.utils import logging as theirs

    level = theirs.get_verbosity()
    theirs.set_verbosity_error()
    try:
        with no_progress_bars():
            yield
    finally:
        theirs.set_verbosity(level)


def _unreadable() -> tuple[type[Exception], ...]:
    """What transformers raises for files that it cannot use."""
    from huggingface_hub.errors import StrictDataclassError  # takes a moment, and is asked for when something is wrong

    of_python = (
        OSError,
        ValueError,
        RuntimeError,
        LookupError,
        TypeError,
        AttributeError,
        ImportError,
        ArithmeticError,
    )
    return (*of_python, SafetensorError, StrictDataclassError)


def _in_a_line(error: Exception) -> str:
    return shorten(str(error), 200, placeholder="...").removesuffix(".") or type(error).__name__

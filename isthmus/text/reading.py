"""Prompts that are read once: what an encoder made of them is remembered, in memory or on disk, up to a bound.

On disk it is a folder `texts-KEY` with one file, which appears whole or not at all. KEY and the hash in the file say
which weights made it, of which prompts, and whether it is still what was written.
"""

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from isthmus.display import Display
from isthmus.errors import UserError
from isthmus.files import sha256_of_parts, waited_for, write_whole
from isthmus.nn.stored_llama import fingerprint
from isthmus.text.encoders import SmallTextEncoder, TextFeatures
from isthmus.text.pretrained import PretrainedTextEncoder

logger = logging.getLogger("isthmus")

FEATURES = "features.safetensors"
_AT_ONCE = 32  # prompts in one pass of the encoder
_FORMAT = "1"


class TextReader:
    """What an encoder makes of prompts: each is read once, and up to so many bytes of results are kept.

    Args:
        encoder: whose weights do not change meanwhile.
        kept_bytes: the oldest results go first where there are more; at least one is kept.
    """

    def __init__(self, encoder: SmallTextEncoder | PretrainedTextEncoder, *, kept_bytes: int = 2**28):
        self.encoder, self._kept_bytes, self._bytes = encoder, kept_bytes, 0
        self._known: dict[str, TextFeatures] = {}
        self._stored: Mapping[str, TextFeatures] = {}  # on the CPU

    def keep_in(self, folder: Path, prompts: Sequence[str]) -> None:
        """Read these prompts now, in their order and as far as `kept_bytes` reach, and keep the results in a folder; or
        take those that are there already.

        One process reads, others wait for it. A damaged file is made again, with a warning. Where nothing can be
        written, with a warning too, prompts are read when they are first asked for, as without a folder.
        """
        prompts = list(dict.fromkeys(prompts))
        key = sha256_of_parts(_FORMAT, fingerprint(self.encoder), json.dumps(prompts))
        path = folder / f"texts-{key[:16]}" / FEATURES
        try:
            if not (stored := _stored(path, key)):
                with waited_for(path.parent, "the features of captions"):
                    # by another process meanwhile
                    stored = _stored(path, key) or self._written(path, key, prompts)
        except UserError as error:
            logger.warning("the features of captions are not kept on disk: %s", error)
            return
        # the first prompts, as many as `kept_bytes` had room for
        self._stored = dict(zip(prompts, stored, strict=False))
        logger.info("features of captions: using %d in %s", len(stored), path.parent)

    def _written(self, path: Path, key: str, prompts: Sequence[str]) -> list[TextFeatures]:
        if path.exists():
            logger.warning("the features of captions in %s are damaged; they are made again", path)
        read, size = [], 0
        with Display("reading captions", len(prompts), "caption") as bar, torch.no_grad():
            for start in range(0, len(prompts), _AT_ONCE):
                some = self.encoder.encode(prompts[start : start + _AT_ONCE])
                for row in range(len(some)):
                    read.append(_on(_alone(some, row), torch.device("cpu")))
                    size += text_bytes(read[-1])
                bar.update(len(some))
                if size > self._kept_bytes:
                    break
        parts = {
            "hidden": torch.cat([one.hidden[0] for one in read]),
            "mask": torch.cat([one.mask[0] for one in read]),
            "pooled": torch.cat([one.pooled for one in read]),
            "lengths": torch.tensor([one.mask.shape[1] for one in read]),
        }
        # one entry: several would come in any order
        content = save(parts, {"isthmus": json.dumps({"key": key, "sha256": _digest(parts)})})
        path.parent.mkdir(parents=True, exist_ok=True)
        for half in path.parent.glob(".*.partial"):  # of a process that was killed
            half.unlink(missing_ok=True)
        write_whole(path, lambda file: file.write(content))
        return read

    @torch.no_grad()
    def __call__(self, prompts: Sequence[str]) -> TextFeatures:
        """Features of prompts on the encoder's device, padded to the longest."""
        asked = dict.fromkeys(prompts)
        found = {prompt: self._known[prompt] for prompt in asked if prompt in self._known}
        device = self.encoder.device
        found |= {prompt: _on(self._stored[prompt], device) for prompt in asked if prompt in self._stored}
        new = [prompt for prompt in asked if prompt not in found]
        for start in range(0, len(new), _AT_ONCE):
            some = new[start : start + _AT_ONCE]
            read = self.encoder.encode(some)
            for row, prompt in enumerate(some):
                found[prompt] = self._keep(prompt, _alone(read, row))
        return TextFeatures.joined([found[prompt] for prompt in prompts])

    def _keep(self, prompt: str, own: TextFeatures) -> TextFeatures:
        self._known[prompt] = own
        self._bytes += text_bytes(own)
        while self._bytes > self._kept_bytes and len(self._known) > 1:
            self._bytes -= text_bytes(self._known.pop(next(iter(self._known))))
        return own


def _alone(text: TextFeatures, row: int) -> TextFeatures:
    """A prompt without the words that fill its row up; copies, since a view would keep the whole batch."""
    one = text.rows(slice(row, row + 1))
    length = int(one.mask[0].nonzero().max()) + 1
    return TextFeatures(one.hidden[:, :length].clone(), one.mask[:, :length].clone(), one.pooled.clone())


def _on(text: TextFeatures, device: torch.device) -> TextFeatures:
    return TextFeatures(text.hidden.to(device), text.mask.to(device), text.pooled.to(device))


def _stored(path: Path, key: str) -> list[TextFeatures]:
    """What a file holds of the first prompts; nothing where there is none, or it is damaged."""
    if not path.exists():
        return []
    try:
        with safe_open(path, framework="pt") as file:
            said = json.loads((file.metadata() or {})["isthmus"])
            parts = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (it is no mapping)
        if said != {"key": key, "sha256": _digest(parts)}:
            return []
    except (SafetensorError, OSError, ValueError, KeyError):
        return []
    lengths = parts["lengths"].tolist()
    words = zip(parts["hidden"].split(lengths), parts["mask"].split(lengths), strict=True)
    rows = zip(words, parts["pooled"].split(1), strict=True)
    return [TextFeatures(hidden[None], mask[None], pooled) for (hidden, mask), pooled in rows]


def _digest(parts: Mapping[str, Tensor]) -> str:
    content = hashlib.sha256()
    for name, part in sorted(parts.items()):
        content.update(f"{name} {tuple(part.shape)} {part.dtype}".encode())
        content.update(part.contiguous().flatten().view(torch.uint8).numpy().data)
    return content.hexdigest()


def text_bytes(text: TextFeatures) -> int:
    """Bytes that features take."""
    return sum(part.numel() * part.element_size() for part in (text.hidden, text.mask, text.pooled))

"""Published keys to ours, one by one: what is unknown or missing is an error, what is dropped is listed with why."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from isthmus.errors import UserError
from isthmus.models.saved_model import check_finite

StateDict = dict[str, Tensor]
# by what a file is known, the most telling key first
_KINDS = {
    "cls_embedding.embedding_table.weight": "D-AR prior",
    "query_embedding.weight": "D-AR tokenizer",
    "pos_1LC": "VAR prior",
    "quantize.embedding.weight": "VAR tokenizer",
}


@dataclass
class Converted:
    """One converted file.

    Attributes:
        arguments: constructor arguments read off the file.
        state: weights under our names.
        dropped: published key -> why it is not needed.
    """

    arguments: dict[str, Any]
    state: StateDict
    dropped: dict[str, str] = field(default_factory=dict)


def load_strict(model: nn.Module, state: StateDict, what: str) -> None:
    """Load weights of which none may be missing, unexpected or of another shape.

    Raises:
        UserError: names the first few keys that do not fit, or a weight that is not finite.
    """
    own = model.state_dict()
    problems = [f"missing {key}" for key in own if key not in state]
    problems += [f"unexpected {key}" for key in state if key not in own]
    problems += [
        f"{key} is {tuple(state[key].shape)}, expected {tuple(own[key].shape)}"
        for key in own
        if key in state and state[key].shape != own[key].shape
    ]
    if problems:
        more = f" and {len(problems) - 4} more" if len(problems) > 4 else ""
        raise UserError(
            f"{what} does not fit the network: {'; '.join(problems[:4])}{more}. It is incomplete, or of another "
            "network: pass another file."
        )
    check_finite(state, what)
    model.load_state_dict(state)


def rename(
    raw: Mapping[str, Tensor],
    rules: list[tuple[str, str]],
    droppable: dict[str, str],
    what: str,
    landmark: str,
    *,
    seen: Iterable[str] | None = None,
) -> tuple[StateDict, dict[str, str]]:
    """Weights under our names (floats as fp32), and every dropped key with its reason.

    Args:
        raw: the published file.
        rules: (published key, our key) as regular expression and replacement; the first that matches the whole key
            decides.
        droppable: pattern of keys that are not needed -> why.
        what: what such a file is called in errors.
        landmark: a key by which such a file is known.
        seen: keys of the file, where `raw` is a part of it.

    Raises:
        UserError: the landmark is absent, or a key matches nothing.
    """
    if landmark not in raw:
        raise UserError(
            f"a {what} holds {landmark}, this file does not: {_seen(raw if seen is None else seen, landmark)}"
        )
    state, dropped, unknown = {}, {}, []
    for key, tensor in raw.items():
        reason = next((why for pattern, why in droppable.items() if re.fullmatch(pattern, key)), None)
        rule = next(((p, ours) for p, ours in rules if re.fullmatch(p, key)), None)
        if reason:
            dropped[key] = reason
        # two layouts of phi lead to one name of ours: a file has one of them
        elif rule and (ours := re.sub(rule[0], rule[1], key)) not in state:
            state[ours] = tensor.float() if tensor.is_floating_point() else tensor
        else:
            unknown.append(key)
    if unknown:
        raise UserError(
            f"a {what} has no such keys: {sorted(unknown)[:4]} ({len(unknown)} in all). It is of "
            "another network, or was changed: pass a published file."
        )
    return state, dropped


def _seen(keys: Iterable[str], landmark: str) -> str:
    """What a file holds instead of a landmark, and what to do."""
    keys = sorted(keys)
    inside = next((key for key in keys if key.endswith(f".{landmark}")), None)
    if inside is not None:
        return f"it has {inside}. Save the state dict of the part under {inside.removesuffix(f'.{landmark}')!r} alone."
    kind = next((kind for mark, kind in _KINDS.items() if mark in keys), None)
    if kind is not None:
        return f"it is a {kind}. Pass it as such."
    fronts = Counter(key.partition(".")[0] for key in keys)
    shown = ", ".join(f"{front} ({count})" for front, count in fronts.most_common(6)) or "nothing"
    return (
        f"its keys begin with {shown}, such as {keys[:2]}. Pass a published file, or its state dict under those keys."
    )


def require(state: StateDict, keys: tuple[str, ...], what: str) -> None:
    """Nothing where `state` has all of `keys`.

    Raises:
        UserError: one is missing.
    """
    missing = [key for key in keys if key not in state]
    if missing:
        raise UserError(f"a {what} file must be complete, this one lacks what becomes {missing}. Pass the whole file.")


def indexed(state: StateDict, pattern: str) -> list[Tensor]:
    """Tensors whose key matches, ordered by the number in the first group."""
    found = {int(m.group(1)): state[key] for key in state if (m := re.fullmatch(pattern, key))}
    return [found[i] for i in sorted(found)]

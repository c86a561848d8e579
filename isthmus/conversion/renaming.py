"""Published keys to ours, one by one: what is unknown or missing is an error, what is dropped is listed with why."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from isthmus.errors import UserError
from isthmus.models.saved_model import check_finite

StateDict = dict[str, Tensor]


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
        raise UserError(f"{what} does not fit the network: {'; '.join(problems[:4])}{more}. Pass a complete file.")
    check_finite(state, what)
    model.load_state_dict(state)


def rename(
    raw: Mapping[str, Tensor], rules: list[tuple[str, str]], droppable: dict[str, str], what: str, landmark: str
) -> tuple[StateDict, dict[str, str]]:
    """Weights under our names (floats as fp32), and every dropped key with its reason.

    Args:
        raw: the published file.
        rules: (published key, our key) as regular expression and replacement; the first that matches the whole key
            decides.
        droppable: pattern of keys that are not needed -> why.
        what: what such a file is called in errors.
        landmark: a key by which such a file is known.

    Raises:
        UserError: the landmark is absent, or a key matches nothing.
    """
    if landmark not in raw:
        raise UserError(
            f"a {what} holds {landmark}, this file does not (first keys: {sorted(raw)[:3]}). Pass the other file?"
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
            f"a {what} has no such keys: {sorted(unknown)[:4]} ({len(unknown)} in all). Pass a published file."
        )
    return state, dropped


def require(state: StateDict, keys: tuple[str, ...], what: str) -> None:
    """Nothing where `state` has all of `keys`.

    Raises:
        UserError: one is missing.
    """
    missing = [key for key in keys if key not in state]
    if missing:
        raise UserError(
            f"a {what} file must be complete, this one lacks what becomes {missing}. Pass a published file."
        )


def indexed(state: StateDict, pattern: str) -> list[Tensor]:
    """Tensors whose key matches, ordered by the number in the first group."""
    found = {int(m.group(1)): state[key] for key in state if (m := re.fullmatch(pattern, key))}
    return [found[i] for i in sorted(found)]

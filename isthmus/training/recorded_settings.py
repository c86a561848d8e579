"""What a saved model says about its own training: the settings in its run.json, read back."""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from isthmus.errors import UserError

# settings that name a place
_PLACES = ("data", "tokenizer", "from_model", "token_cache")


def recorded_settings(folder: Path) -> dict[str, Any] | None:
    """Settings of the training that made the model in a folder; None where it has no record, or none of ours."""
    return _settings_in(folder / "run.json")


def _settings_in(record: Path) -> dict[str, Any] | None:
    try:
        values = json.loads(record.read_text(encoding="utf-8"))
        return dict(values["run"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


@contextmanager
def explaining_places(record: Path | None, settings: Mapping[str, Any]) -> Iterator[None]:
    """Where relative paths of a record lead nowhere, what is refused inside also says where they came from.

    Args:
        record: the run.json that the settings were read from; None changes nothing.
        settings: those that are used, of that record or given instead.

    Raises:
        UserError: what was raised inside, with that sentence behind it.
    """
    try:
        yield
    except UserError as error:
        recorded = {} if record is None else _settings_in(record) or {}
        lost = [
            f"{name} {place}"
            for name, place in ((name, str(settings.get(name) or "")) for name in _PLACES)
            if place and place == str(recorded.get(name)) and _leads_nowhere(place, str(error))
        ]
        if not lost:
            raise
        raise UserError(
            f"{error} ({', '.join(lost)} comes from {record}, where it is relative to the folder that run was started "
            f"in; here it is looked up from {os.getcwd()}. Start there, or pass it anew.)"
        ) from error


def _leads_nowhere(place: str, error: str) -> bool:
    """Whether an error is about this relative path, which does not exist here."""
    kind, _, path = place.partition(":")
    path = path if kind in ("folder", "npz", "hf") else place
    return path in error and not os.path.isabs(path) and not os.path.exists(os.path.expanduser(path))

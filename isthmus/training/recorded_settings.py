"""What a saved model says about its own training: the settings in its run.json, read back."""

import json
from pathlib import Path
from typing import Any


def recorded_settings(folder: Path) -> dict[str, Any] | None:
    """Settings of the training that made the model in a folder; None where it has no record, or none of ours."""
    try:
        return dict(json.loads((folder / "run.json").read_text(encoding="utf-8"))["run"])
    except (OSError, ValueError, KeyError, TypeError):
        return None

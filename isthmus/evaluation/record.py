"""evaluation.json: every score with everything that made it, and whether two evaluations may be compared.

A record has three parts: the protocol (what was measured against what, which must agree), the subject (what was
measured, which is free), and the circumstances (when, where, with which versions, which should not matter).
"""

import json
import math
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import torch
from dacite import Config, DaciteError, from_dict

import isthmus
from isthmus.errors import UserError
from isthmus.files import write_whole

RECORD = "evaluation.json"
FORMAT = 3

# parts that came after the first record of this format: one without them says nothing of them
_LATER = ("readings", "rebuilt")
_PACKAGES = ("torch", "transformers", "numpy", "pillow", "torch-fidelity")
# lists stand for tuples, and null for a number that was not finite
_JSON = Config(cast=[tuple], type_hooks={float: lambda value: math.nan if value is None else float(value)})


def circumstances(device: torch.device, *, processes: int) -> dict[str, Any]:
    """Date (UTC), versions and hardware, in JSON values."""
    found = {"isthmus": isthmus.__version__, "python": platform.python_version()}
    for package in _PACKAGES:
        with suppress(PackageNotFoundError):  # of an extra that is not installed
            found[package] = version(package)
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": found,
        "device": str(device),
        "hardware": _hardware(device),
        "threads": torch.get_num_threads(),
        "processes": processes,
        "system": platform.platform(),
    }


def timing_words(device: torch.device) -> str:
    """What a time was taken on."""
    return f"{device.type} ({_hardware(device)}), {torch.get_num_threads()} threads"


def _hardware(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    facts = Path("/proc/cpuinfo")
    lines = facts.read_text(encoding="utf-8", errors="replace").splitlines() if facts.is_file() else ()
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return f"{next(named, platform.processor() or platform.machine())}, {os.cpu_count()} cores"


@dataclass(frozen=True, kw_only=True)
class Score:
    """One number, how sure it is, and what it would be for real and for ruined images.

    Attributes:
        name: such as "FD-lite0-192"; it names the features.
        images: images in one measurement; 0 where a score is of no images.
        measurements: disjoint chunks, or subsets, that `value` is the mean of.
        deviation: standard deviation between measurements; None for a single one.
        error: standard error of `value`, where the estimator has one.
        low: lower end of a 95 % interval, for means over images alone: Wilson's of a share, a bootstrap of any other.
        high: its upper end; neither interval is symmetric about `value`.
        floor: the same score of real images that are disjoint from the reference.
        ceiling: the same score of real images of which only mean colour and blur are left.
    """

    name: str
    value: float
    better: Literal["lower", "higher", ""] = ""
    images: int = 0
    measurements: int = 1
    deviation: float | None = None
    error: float | None = None
    low: float | None = None
    high: float | None = None
    floor: float | None = None
    ceiling: float | None = None
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Curve:
    """A score with its unit by scale, position, number of tokens or solver steps, which `along` says."""

    name: str
    along: str
    positions: tuple[str, ...]
    values: tuple[float, ...]
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """What must agree before scores are compared.

    Attributes:
        features: the feature network.
        features_sha256: of its weight file.
        preprocessing: of its input, in words.
        num_samples: N.
        chunk_images: n; distances are means over disjoint chunks of n samples, against n reference images.
        balance: how often each class is drawn, in words.
        image_size: "height x width" in pixels.
        reference: in words.
        reference_images: 0 where a file of statistics does not say.
        train_sha256: of the training images that judge classes and copies; "" without a data set.
        held_out_sha256: likewise.
    """

    features: str
    features_sha256: str
    preprocessing: str
    num_samples: int
    chunk_images: int
    balance: str
    image_size: str
    classes: tuple[str, ...]
    reference: str
    reference_images: int
    reference_sha256: str
    train_sha256: str
    held_out_sha256: str


@dataclass(frozen=True, kw_only=True)
class Subject:
    """What was measured.

    Attributes:
        name: the model's folder or hub id, or the folder or file of images.
        kind: what it is, in a few words.
        fingerprint: SHA-256 of the model's configuration and weights, or of the images.
        seed: image i was drawn from (seed, i); None for images from elsewhere.
        sampling: guidance schedule, filters and temperature.
        steering: solver and steps, where they were given.
    """

    name: str
    kind: str
    fingerprint: str
    seed: int | None = None
    sampling: dict[str, Any]
    steering: dict[str, Any]
    dtype: str = ""


COMBINATION = "combination"
"""In the place of an attribute: two of them at once."""


@dataclass(frozen=True, kw_only=True)
class AttributeCount:
    """How often an attribute was asked for and found, in samples of one style.

    Attributes:
        prompts: which drawings it was asked with, in words.
        attribute: its name, or `COMBINATION`.
        right: how often the reader finds it in the samples.
        real: how often in the real drawings of the same captions.
        chance: how often in real drawings of other captions of the style.
        rebuilt: how often in those real drawings after the model's tokenizer has rebuilt them; None in records of
            before.
    """

    prompts: str
    style: str
    attribute: str
    asked: int
    right: int
    real: int
    chance: int
    rebuilt: int | None = None


@dataclass(frozen=True, kw_only=True)
class Readings:
    """What a reader of attributes saw in samples.

    Attributes:
        reader: its fingerprint, how it was trained, and what share it read right of drawings that it was not trained
            on.
        attributes: names of those that were read.
    """

    reader: dict[str, Any]
    attributes: tuple[str, ...]
    counts: tuple[AttributeCount, ...]


@dataclass(frozen=True, kw_only=True)
class EvaluationRecord:
    """Everything in evaluation.json.

    Attributes:
        data: name, fingerprints and classes of the data set, where one was given.
        circumstances: versions, date, hardware, seconds.
        warnings: what makes a score mislead.
        scores: of the samples; those to read first come first.
        class_scores: class -> name of a score -> value.
        measures: what was measured on held-out images beyond the usual: hashes of LPIPS' weights, solver steps; empty
            where held-out images were not measured, or not yet.
        held_out: reconstruction and likelihood of held-out images.
        sweep: guidance -> scores, where a sweep was asked for.
        readings: attributes that were found in the samples; None where nobody looked for any.
    """

    protocol: Protocol
    subject: Subject
    data: dict[str, Any]
    circumstances: dict[str, Any]
    warnings: tuple[str, ...] = ()
    scores: tuple[Score, ...] = ()
    class_scores: dict[str, dict[str, float]]
    measures: dict[str, Any]
    held_out: tuple[Score, ...] = ()
    curves: tuple[Curve, ...] = ()
    sweep: dict[str, tuple[Score, ...]]
    format: int = FORMAT
    readings: Readings | None = None

    def score(self, name: str) -> Score | None:
        """The score of that name, among those of samples and of held-out images."""
        return next((score for score in self.scores + self.held_out if score.name == name), None)


def write_record(record: EvaluationRecord, folder: Path) -> None:
    """Write evaluation.json, whole or not at all."""
    text = json.dumps(_json_values(asdict(record)), indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / RECORD, text)


def read_record(folder: Path) -> EvaluationRecord:
    """The record of an evaluation folder.

    Raises:
        UserError: there is none, it cannot be read, or a newer or older version wrote it.
    """
    path, values, written = _written(folder)
    if written > FORMAT:
        raise UserError(f"{path} is of format {written}, this version reads {FORMAT}. Update Isthmus.")
    if written < FORMAT:
        raise UserError(
            f"{path} is of format {written}: an earlier version measured some scores in another way, so that they do "
            f"not compare; this version reads {FORMAT}. Evaluate again: samples that are there are used."
        )
    with _undamaged(path):
        # a part that is not there is damage, also where it could be empty
        known = [one.name for one in fields(EvaluationRecord) if one.name in values or one.name not in _LATER]
        return from_dict(EvaluationRecord, {name: values[name] for name in known}, _JSON)


def outdated_subject(folder: Path) -> Subject | None:
    """What a record of an earlier format measured; None for one of this format. Raises UserError where none is read."""
    path, values, written = _written(folder)
    if written >= FORMAT:
        return None
    with _undamaged(path):
        return from_dict(Subject, values["subject"], _JSON)


@contextmanager
def _undamaged(path: Path) -> Iterator[None]:
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError, DaciteError) as error:
        raise UserError(f"{path} is not the record of an evaluation ({error}). Evaluate again.") from error


def number_of_samples(folder: Path) -> int | None:
    """N of an evaluation folder, whatever its format; None where it holds no record that can be read."""
    try:
        return int(_written(folder)[1]["protocol"]["num_samples"])
    except (UserError, KeyError, TypeError, ValueError):
        return None


_WORDS = {
    "features": "feature network",
    "features_sha256": "weights of the feature network",
    "preprocessing": "preprocessing",
    "num_samples": "number of samples N",
    "chunk_images": "images per measurement n",
    "balance": "balance of the classes",
    "image_size": "image size",
    "classes": "classes",
    "reference_images": "number of reference images",
    "reference_sha256": "reference images",
    "train_sha256": "training images",
    "held_out_sha256": "held-out images",
}


def same_protocol(a: EvaluationRecord, b: EvaluationRecord) -> list[str]:
    """In what two evaluations may not be compared, in words; nothing where they may.

    Model, seed, guidance and filters are free, and so are versions, date and hardware.
    """
    differences = []
    for name, words in _WORDS.items():
        ours, theirs = getattr(a.protocol, name), getattr(b.protocol, name)
        if ours != theirs:
            differences.append(f"{words}: {_shown(a, name, ours)} and {_shown(b, name, theirs)}")
    ours, theirs = (record.measures.get("lpips_sha256") for record in (a, b))
    if ours and theirs and ours != theirs:
        differences.append("weights of LPIPS")
    if a.readings and b.readings:
        if a.readings.reader["fingerprint"] != b.readings.reader["fingerprint"]:
            differences.append("reader of attributes")
        if a.readings.attributes != b.readings.attributes:
            differences.append(f"attributes: {', '.join(a.readings.attributes)} and {', '.join(b.readings.attributes)}")
    return differences


def _written(folder: Path) -> tuple[Path, dict[str, Any], int]:
    """The file of a record, its values and its format. Raises UserError where there is none that can be read."""
    path = folder / RECORD if folder.is_dir() else folder
    if not path.is_file():
        raise UserError(f"{folder} holds no {RECORD}. Pass the --out of a finished `isthmus evaluate`.")
    with _undamaged(path):
        values = json.loads(path.read_text(encoding="utf-8"))
        return path, values, int(values["format"])


def _shown(record: EvaluationRecord, name: str, value: Any) -> str:
    if name == "reference_sha256":
        return f"{record.protocol.reference} ({value[:12]})"
    if isinstance(value, tuple):
        return ", ".join(value) or "none"
    return (value[:12] or "none") if name.endswith("sha256") else str(value)


def _json_values(value: Any) -> Any:
    """JSON has no NaN: null stands for it. Later parts that say nothing are left out."""
    if isinstance(value, dict):
        said = {name: inner for name, inner in value.items() if inner is not None or name not in _LATER}
        return {name: _json_values(inner) for name, inner in said.items()}
    if isinstance(value, list | tuple):
        return [_json_values(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value

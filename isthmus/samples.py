"""Folders of drawn images: samples and edits, resumable, each with everything needed to draw it again."""

import hashlib
import inspect
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast
from uuid import uuid4

from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

import isthmus
from isthmus.data.images import UnreadableImage, decode_image
from isthmus.display import Display
from isthmus.errors import UserError
from isthmus.files import alone_in, contents
from isthmus.next_scale.pipeline import NextScalePipeline
from isthmus.next_scale.refinement import Forwards, RefinementMode, ScaleRefinementScheduler
from isthmus.pictures import save_picture, table
from isthmus.pipelines.labels import Label, labels_from_words, resolve_labels
from isthmus.pipelines.loading import dtype_name, load_pipeline
from isthmus.pipelines.memory import batch_size_that_fits, naming_next_batch_size
from isthmus.pipelines.options import FOLDER_DEFAULT
from isthmus.pipelines.request import token_hashes

if TYPE_CHECKING:
    from isthmus.pipelines.loading import AnyPipeline

logger = logging.getLogger("isthmus")

MANIFEST = "samples.json"
_GRID_ROWS, _GRID_COLUMNS, _STRIP_ROWS = 20, 8, 8


@alone_in("out")
def draw_folder(
    model: str,
    out: Path,
    *,
    classes: Sequence[str],
    num_images: int,
    seed: int,
    options: Mapping[str, Any],
    steering: Mapping[str, Any],
    decoding: Mapping[str, bool] | None = None,
    refine: str | None = None,
    prefix_image: Path | None = None,
    grid: bool,
    strip: bool,
    batch_size: int | None,
    device: str,
    dtype: str,
) -> None:
    """Fill `out` with images 0..num_images - 1 of a request; those that are there already stay.

    samples.json says what made the images and, of next-scale models, how many forwards each took.

    Args:
        model: a pipeline folder or hub id.
        out: folder of samples, new or of the same settings.
        classes: names or ids, taken in turn; none are all classes of the model.
        num_images: images in all.
        seed: image i is drawn from (seed, i).
        options: sampling options by name; `FOLDER_DEFAULT` stands for the model's own.
        steering: arguments of a call beyond these, such as the number of solver steps, where the model has them.
        decoding: how tokens are computed (`int8`, `compiled`), where the model has it.
        refine: mode in which tokens are drawn again, where the model refines; None is the model's own.
        prefix_image: file of the image whose first tokens are kept, where the model has prefixes.
        grid: also write grid.png.
        strip: also write strip.png.
        batch_size: images at once; None estimates what fits into memory.
        device: see `load_pipeline`.
        dtype: see `load_pipeline`.

    Raises:
        UserError: an argument is not usable, or `out` holds something else than samples with these settings.
    """
    dtype = dtype_name(dtype, device)
    pipeline = load_pipeline(model, device=device, dtype=dtype)
    if refine is not None:
        if not hasattr(pipeline, "refine_with"):
            raise UserError(f"this model, a {pipeline.kind}, draws no token again. Leave out --refine.")
        cast("NextScalePipeline", pipeline).refine_with(cast(RefinementMode, refine))
    labels = _labels(classes, pipeline)
    sampling = pipeline.defaults.override(**options)
    # one refusal for options the model cannot take, before anything is written
    pipeline.check_options(sampling)
    request = {name: value for name, value in options.items() if value is not FOLDER_DEFAULT} | dict(steering)
    settings = {
        "model": pipeline.fingerprint,
        "class_ids": labels,
        "seed": seed,
        "sampling": sampling.to_dict(),
        "dtype": dtype,
        "device": pipeline.device.type,
    }
    if prefix_image is not None:
        request["prefix_image"] = read_image(prefix_image)
        steering = {**steering, "prefix_image": hashlib.sha256(prefix_image.read_bytes()).hexdigest()}
    decoding = dict(decoding or {})
    if unknown := sorted(decoding.keys() - inspect.signature(pipeline.prepared).parameters.keys()):
        raise UserError(f"this model, a {pipeline.kind}, has no {', '.join(unknown)}. Leave it out.")
    steering = {**steering, **decoding}
    if steering:
        # only where it is given: folders of samples without it stay what they are
        settings["steering"] = dict(steering)
    if batch_size is None:
        batch_size = batch_size_that_fits(pipeline, guided=sampling.guidance_scale != 1)
    request |= pipeline.prepared(batch_size, **decoding)
    _check_request(pipeline, request, seed)
    num_images = max(num_images, _number_in(out, settings))
    forwards = _forwards(pipeline, smooth=sampling.smooth)
    _write_manifest(out, settings, num_images, [], forwards)
    rows = {index: row for index in range(num_images) if (row := _finished(out, index, settings))}
    missing = [index for index in range(num_images) if index not in rows]
    with Display("drawing", len(missing), "image", shown=logger.isEnabledFor(logging.INFO)) as bar:
        for start in range(0, len(missing), batch_size):
            indices = missing[start : start + batch_size]
            rows |= _draw_batch(pipeline, out, indices, labels, seed, request, settings, batch_size)
            bar.update(len(indices))
    _write_manifest(out, settings, num_images, [rows[index] for index in range(num_images)], forwards)
    if grid:
        save_picture(_grid(out, rows), out / "grid.png")
    if strip:
        save_picture(_strip(pipeline, rows, labels, seed, request), out / "strip.png")
    cost = "" if forwards is None else f"; {forwards} forwards each"
    logger.info("%d images in %s (%d drawn now)%s", num_images, out, len(missing), cost)


def _forwards(pipeline: "AnyPipeline", *, smooth: bool) -> Forwards | None:
    """What an image takes of a next-scale model, rounds included; None for other families.

    From the settings, not counted: an image that an earlier call drew, or that shared its batch, took as many.
    """
    if not hasattr(pipeline, "refine_with"):
        return None
    model = cast("NextScalePipeline", pipeline)
    scheduler: ScaleRefinementScheduler = model.scheduler or ScaleRefinementScheduler()
    return scheduler.forwards_of(model.schedule.num_scales, has_cache=not model.transformer.is_markov, smooth=smooth)


def _check_request(pipeline: "AnyPipeline", request: Mapping[str, Any], seed: int) -> None:
    """Raise UserError, before anything is written, where the model does not take the arguments of a request."""
    known = inspect.signature(type(pipeline).__call__).parameters
    unknown = sorted(name for name in request if name not in known)
    if unknown:
        raise UserError(f"this model, a {pipeline.kind}, has no {', '.join(unknown)}. Leave it out.")
    pipeline.stream(seed=seed, **request)  # checks its arguments at once and draws only when it is read


def read_image(path: Path) -> Image.Image:
    """The picture in a file, as RGB. Raises UserError where it cannot be read."""
    try:
        return Image.fromarray(decode_image(path.read_bytes()))
    except UnreadableImage as error:
        raise UserError(f"{path} cannot be read as an image: {error}. Pass another file.") from error


def file_name(index: int) -> str:
    """Name of image `index`."""
    return f"{index:06d}.png"


def _labels(classes: Sequence[str], pipeline: "AnyPipeline") -> list[int]:
    """Class ids, taken in turn over the images: those asked for, or all the model has."""
    names = pipeline.class_names
    given = labels_from_words(classes, names)
    if not classes:
        given = list(range(pipeline.num_classes)) or [None]
    return resolve_labels(given, class_names=names, num_classes=pipeline.num_classes)


def _draw_batch(
    pipeline: "AnyPipeline",
    out: Path,
    indices: Sequence[int],
    labels: Sequence[int],
    seed: int,
    request: Mapping[str, Any],
    settings: Mapping[str, Any],
    batch_size: int,
) -> dict[int, dict[str, Any]]:
    with naming_next_batch_size(batch_size):
        result = pipeline(_request_labels(pipeline, indices, labels), seed=seed, image_index=list(indices), **request)
    assert isinstance(result.images, list), "pictures are asked for"
    rows = {}
    for index, picture, digest in zip(indices, result.images, _hashes(result.token_ids), strict=True):
        label = labels[index % len(labels)]
        row = {
            "file": file_name(index),
            "index": index,
            "seed": seed,
            "class_id": label,
            "label": pipeline.label_name(label),
            "token_ids_sha256": digest,
        }
        text = {name: str(value) for name, value in row.items() if name != "file"}
        text |= {"Software": f"isthmus {isthmus.__version__}", "model": settings["model"], "settings": _json(settings)}
        save_picture(picture, out / file_name(index), text)
        rows[index] = row
    return rows


def _hashes(token_ids: Tensor | Sequence[Tensor]) -> list[str]:
    """One per image; a pyramid is a list of scales, a sequence one tensor."""
    return token_hashes([token_ids] if isinstance(token_ids, Tensor) else token_ids)


def _request_labels(pipeline: "AnyPipeline", indices: Sequence[int], labels: Sequence[int]) -> list[Label]:
    ids = [labels[index % len(labels)] for index in indices]
    return [None if one == pipeline.num_classes else one for one in ids]


def _number_in(out: Path, settings: Mapping[str, Any]) -> int:
    """How many images an earlier run of the same settings was asked for; 0 for a new or empty folder."""
    if not out.exists():
        return 0
    if not out.is_dir():
        raise UserError(f"--out must be a folder, got the file {out}. Choose another name.")
    if not (out / MANIFEST).is_file():
        if contents(out):
            raise UserError(f"--out must be new, empty or a folder of samples, got {out}. Choose another folder.")
        return 0
    try:
        before = json.loads((out / MANIFEST).read_text(encoding="utf-8"))
        earlier, number = before["settings"], int(before["num"])
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise UserError(f"{out / MANIFEST} cannot be read ({error}). Choose another folder.") from error
    changed = [name for name in {**settings, **earlier} if _json(settings.get(name)) != _json(earlier.get(name))]
    if changed:
        raise UserError(
            f"{out} holds samples with other settings ({', '.join(changed)} differ). "
            "Choose another --out; nothing is overwritten."
        )
    return number


def _finished(out: Path, index: int, settings: Mapping[str, Any]) -> dict[str, Any] | None:
    """The row of an image that is there, from its metadata; None where it has to be drawn."""
    path = out / file_name(index)
    if not path.is_file():
        return None
    try:
        with Image.open(path) as image:
            text = dict(image.info)
    except (UnidentifiedImageError, OSError):
        return None
    if text.get("settings") != _json(settings) or text.get("index") != str(index):
        return None
    return {
        "file": path.name,
        "index": index,
        "seed": int(text["seed"]),
        "class_id": int(text["class_id"]),
        "label": text["label"],
        "token_ids_sha256": text["token_ids_sha256"],
    }


def _write_manifest(
    out: Path,
    settings: Mapping[str, Any],
    number: int,
    rows: Sequence[Mapping[str, Any]],
    forwards: Forwards | None,
) -> None:
    out.mkdir(parents=True, exist_ok=True)
    # beside the settings, which decide them: folders of versions that did not write them are continued
    cost = {} if forwards is None else {"forwards_per_image": asdict(forwards)}
    contents = {"isthmus_version": isthmus.__version__, "settings": settings, "num": number, **cost, "images": rows}
    temporary = out / f".{MANIFEST}.{uuid4().hex[:8]}.partial"
    try:
        temporary.write_text(json.dumps(contents, indent=1) + "\n", encoding="utf-8")
        temporary.replace(out / MANIFEST)
    finally:
        temporary.unlink(missing_ok=True)


def _grid(out: Path, rows: Mapping[int, Mapping[str, Any]]) -> Image.Image:
    """Rows are classes in the order asked for; the first images of each."""
    by_label: dict[str, list[Image.Image]] = {}
    for _, row in sorted(rows.items()):
        pictures = by_label.setdefault(row["label"], [])
        if len(pictures) < _GRID_COLUMNS:
            with Image.open(out / row["file"]) as image:
                pictures.append(image.convert("RGB"))
    if len(by_label) == 1:
        # one class fills the picture
        chosen = sorted(rows)[: _GRID_ROWS * _GRID_COLUMNS]
        pictures = []
        for index in chosen:
            with Image.open(out / rows[index]["file"]) as image:
                pictures.append(image.convert("RGB"))
        parts = [pictures[i : i + _GRID_COLUMNS] for i in range(0, len(pictures), _GRID_COLUMNS)]
        return table(parts, row_names=[next(iter(by_label))])
    names = list(by_label)[:_GRID_ROWS]
    return table([by_label[name] for name in names], row_names=names)


def _strip(
    pipeline: "AnyPipeline",
    rows: Mapping[int, Mapping[str, Any]],
    labels: Sequence[int],
    seed: int,
    request: Mapping[str, Any],
) -> Image.Image:
    """The first images, step by step: drawn once more, from their own random numbers."""
    indices = sorted(rows)[:_STRIP_ROWS]
    steps = pipeline.stream(
        _request_labels(pipeline, indices, labels), seed=seed, image_index=indices, output_type="pil", **request
    )
    # a step that was taken again counts as it is in the end
    last = {step.index: step.preview for step in steps if isinstance(step.preview, list)}
    columns = list(last.values())
    return table(
        list(zip(*columns, strict=True)),
        row_names=[rows[index]["label"] for index in indices],
        column_names=pipeline.step_names(len(columns)),
    )


def _json(value: Any) -> str:
    return json.dumps(value, sort_keys=True)


OVERVIEW = "overview.png"
_COLUMNS = 8


@alone_in("out")
def edit_image(
    model: str,
    out: Path,
    method: str,
    *,
    image: Path,
    mask: Path | None,
    classes: Sequence[str],
    num_images: int,
    seed: int,
    settings: Mapping[str, Any],
    options: Mapping[str, Any],
    batch_size: int | None,
    device: str,
    dtype: str,
) -> None:
    """Draw edits of an image and write them when all are drawn; the log says how many forwards they took.

    Args:
        model: a pipeline folder or hub id.
        out: new or empty folder.
        method: name of the method of `NextScalePipeline` that edits.
        image: file to edit.
        mask: file of the mask, for methods that take one.
        classes: names or ids, taken in turn; none is no class.
        num_images: results.
        seed: result i is drawn from (seed, i).
        settings: arguments of the method.
        options: sampling options by name.
        batch_size: results at once; None estimates what fits into memory.
        device: see `load_pipeline`.
        dtype: see `load_pipeline`.

    Raises:
        UserError: an argument is not usable, or memory ran out (names the next batch size to try); nothing is written
            then.
    """
    if contents(out):
        raise UserError(f"--out must be a new or empty folder, got {out}. Choose another; nothing is overwritten.")
    source = read_image(image)
    inputs = [source] if mask is None else [source, read_image(mask)]
    dtype = dtype_name(dtype, device)
    pipeline = load_pipeline(model, device=device, dtype=dtype)
    if not isinstance(pipeline, NextScalePipeline):
        raise UserError(f"edits need a next-scale model (VAR, SRDD), got {model}, a {pipeline.kind}.")
    given = labels_from_words(classes, pipeline.class_names) or [None]
    labels = resolve_labels(given, class_names=pipeline.class_names, num_classes=pipeline.num_classes)
    if batch_size is None:
        batch_size = batch_size_that_fits(pipeline, guided=bool(classes))
    rows: list[tuple[Image.Image, dict[str, Any]]] = []
    forwards: list[int] = []
    for start in range(0, num_images, batch_size):
        indices = list(range(start, min(start + batch_size, num_images)))
        asked = [given[index % len(given)] for index in indices]
        with naming_next_batch_size(batch_size):
            result = getattr(pipeline, method)(
                *inputs, class_labels=asked, seed=seed, image_index=indices, **settings, **options
            )
        forwards.append(result.num_forwards)
        hashes = token_hashes(result.token_ids)
        for index, picture, digest in zip(indices, result.images, hashes, strict=True):
            label = pipeline.label_name(labels[index % len(labels)])
            rows.append((picture, {"index": index, "seed": seed, "label": label, "token_ids_sha256": digest}))
    described = {
        "Software": f"isthmus {isthmus.__version__}",
        "model": pipeline.fingerprint,
        "edit": method,
        "dtype": dtype,
        "image_sha256": _sha256(image),
        **({} if mask is None else {"mask_sha256": _sha256(mask)}),
        "settings": json.dumps({**settings, "sampling": pipeline.defaults.override(**options).to_dict()}),
    }
    for picture, row in rows:
        text = described | {name: str(value) for name, value in row.items()}
        save_picture(picture, out / file_name(row["index"]), text)
    save_picture(_overview(inputs, rows), out / OVERVIEW)
    # in the log and not beside the image: scales that all images of a batch keep are not predicted, so the number is
    # that of a batch, and images must not depend on it
    cost = f"{sum(forwards)} forwards in {len(forwards)} batch{'es' if len(forwards) > 1 else ''}"
    logger.info("%d edits in %s (%s); %s shows them beside the image", len(rows), out, cost, OVERVIEW)


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _overview(inputs: Sequence[Image.Image], rows: Sequence[tuple[Image.Image, Mapping[str, Any]]]) -> Image.Image:
    """The image, the mask where there is one, and the first results, named by their labels."""
    shown = rows[:_COLUMNS]
    # on white where the result has another shape (outpaint, variations): nothing is stretched
    given = [ImageOps.pad(one, shown[0][0].size, Image.Resampling.LANCZOS, color="white") for one in inputs]
    names = ["image", "mask"][: len(given)] + [row["label"] for _, row in shown]
    return table([[*given, *(picture for picture, _ in shown)]], column_names=names)

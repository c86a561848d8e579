"""A folder of edits of one image, and a picture of all of them side by side."""

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps

import isthmus
from isthmus.errors import UserError
from isthmus.files import alone_in, contents
from isthmus.generation.step import token_hashes
from isthmus.pictures import save_picture, table
from isthmus.pipelines.labels import labels_from_words, resolve_labels
from isthmus.pipelines.loading import dtype_name, load_pipeline
from isthmus.pipelines.memory import batch_size_that_fits, naming_next_batch_size
from isthmus.pipelines.next_scale import NextScalePipeline
from isthmus.sampling_run import file_name, read_image

logger = logging.getLogger("isthmus")

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

"""Folders of drawn images: written in batches, resumed image by image, read back.

A folder holds one PNG per image, and samples.json: the settings that decide about all images, how many were asked for,
and, when they are there, a row for each. The text of a PNG says all that draws its image again, so samples.json can be
made again from the images:

- `index`, `seed`, `class_id`, `label`, and `prompt` where there is one: image `index` of the request, drawn from
  (seed, index);
- `model` (fingerprint), `settings` (JSON; not the prompts of other images), `Software`: what drew it, and how;
- `token_ids`: of all steps in a row, little-endian int32, compressed by zlib, in base64; and `token_ids_sha256`, of the
  same bytes before they were compressed.
"""

import base64
import hashlib
import json
import logging
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Int, UInt8
from PIL import Image, ImageOps
from torch import Tensor

import isthmus
from isthmus.data.images import UnreadableImage, decode_image
from isthmus.display import Display
from isthmus.errors import UserError
from isthmus.files import alone_in, check_only, sha256_of_file, write_whole
from isthmus.pictures import save_picture, table
from isthmus.pipelines.labels import Label, labels_from_words, resolve_labels
from isthmus.pipelines.loading import dtype_name, load_pipeline
from isthmus.pipelines.memory import batch_size_that_fits, naming_next_batch_size
from isthmus.pipelines.options import FOLDER_DEFAULT, SamplingOptions
from isthmus.processes import Processes, is_first_process, launched_processes

if TYPE_CHECKING:
    from isthmus.next_scale.refinement import RefinementMode
    from isthmus.pipelines.loading import AnyPipeline

logger = logging.getLogger("isthmus")

MANIFEST = "samples.json"
GRID, STRIP, OVERVIEW = "grid.png", "strip.png", "overview.png"
# what every row of samples.json says
_ROW = {"file": str, "index": int, "class_id": int, "label": str}
_GRID_ROWS, _GRID_COLUMNS, _STRIP_ROWS = 20, 8, 8
_LONGEST_NAME = 70  # letters beside a row of pictures

GROUP = 250
"""No batch of a draw, and none of an evaluation's features, reaches over a multiple of this number: what is rounded
together does not depend on how many images follow."""


@dataclass(frozen=True, eq=False, kw_only=True)
class SampleRequest:
    """The images of a folder: what decides about image i, and the call that draws it.

    Attributes:
        labels: class id of image 0, 1, ...; the null id where no class is asked for.
        seed: image i is drawn from (seed, i).
        sampling: options of the draw, in full.
        settings: everything that decides about an image, in JSON values; another number of images has the same.
        arguments: of the call beside labels, seed and numbers.
        decoding: how tokens are computed (`int8`, `compiled`).
        method: of the pipeline, that draws from `inputs`.
        prompts: of image 0, 1, ...; none for models that read no text.
    """

    labels: Sequence[int]
    seed: int
    sampling: SamplingOptions
    settings: Mapping[str, Any]
    arguments: Mapping[str, Any]
    decoding: Mapping[str, bool] = field(default_factory=dict)
    method: str = "__call__"
    inputs: tuple[Image.Image, ...] = ()
    prompts: Sequence[str] = ()

    def __len__(self) -> int:
        return len(self.labels)

    @classmethod
    def of(
        cls,
        pipeline: "AnyPipeline",
        labels: Sequence[int],
        *,
        classes: Mapping[str, Any],
        seed: int,
        options: Mapping[str, Any] | None = None,
        steering: Mapping[str, Any] | None = None,
        decoding: Mapping[str, bool] | None = None,
        prefix_image: Path | None = None,
        dtype: str = "float32",
        prompts: Sequence[str] = (),
    ) -> "SampleRequest":
        """Images of a call of the pipeline.

        Args:
            labels: class id of every image.
            classes: the rule behind `labels`, whatever their number, in JSON values: `class_ids` and more. Its
                `class_names`, by class id, stand for those of a model without.
            options: sampling options by name; `FOLDER_DEFAULT` and what is left out stand for the model's own.
            steering: arguments of a call beyond these, such as the number of solver steps.
            decoding: how tokens are computed.
            prefix_image: file of the image whose first tokens are kept.
            prompts: of every image, for models that read text; the rule behind them is part of `classes`.

        Raises:
            UserError: the model does not take an argument, or it is not usable.
        """
        options, steering, decoding = dict(options or {}), dict(steering or {}), dict(decoding or {})
        sampling = pipeline.defaults.override(**options)
        pipeline.check_options(sampling)
        arguments = {name: value for name, value in options.items() if value is not FOLDER_DEFAULT} | steering
        if prefix_image is not None:
            arguments["prefix_image"] = read_image(prefix_image)
            steering["prefix_image"] = sha256_of_file(prefix_image)
        pipeline.check_request({"seed": seed, **({"prompt": prompts[0]} if prompts else {}), **arguments}, decoding)
        settings = {
            "model": pipeline.fingerprint,
            **classes,
            "seed": seed,
            "sampling": sampling.to_dict(),
            "dtype": dtype,
            "device": pipeline.device.type,
        }
        if steering or decoding:
            # only where it is given: folders of samples without it stay what they are
            settings["steering"] = steering | decoding
        return cls(
            labels=labels,
            seed=seed,
            sampling=sampling,
            settings=settings,
            arguments=arguments,
            decoding=decoding,
            prompts=prompts,
        )


@dataclass(frozen=True)
class Drawn:
    """What a process did.

    Attributes:
        count: how many images it drew.
        forwards: of each of its batches; 0 where they are not counted.
        forwards_per_image: what any image of the folder took, whoever drew it; None where that is not known.
    """

    count: int
    forwards: tuple[int, ...]
    forwards_per_image: Any


@alone_in("folder")
def draw(
    pipeline: "AnyPipeline",
    folder: Path | str,
    request: SampleRequest,
    *,
    batch_size: int | None = None,
    processes: Processes = Processes(),  # noqa: B008  (frozen)
    title: str = "drawing",
) -> Drawn:
    """Fill a folder with the images of a request; those that are there and whole already stay.

    Args:
        folder: new, empty, or of the same settings; nobody else works in it meanwhile.
        batch_size: images drawn at once; None estimates what fits into memory. It changes no token.
        processes: of a launcher: image i is drawn by process i modulo their number. All wait for each other at the end.

    Raises:
        UserError: the folder holds something else, or memory ran out (names the next batch size to try). What stops the
            first batch leaves nothing behind.
    """
    folder = Path(folder)
    earlier = check_folder(folder, request)
    # nobody writes before everybody has looked
    processes.wait()
    asked = _asked_before(folder)
    number = max(len(request), asked)
    # from the settings, not counted: an image that an earlier call drew, or that shared its batch, took as many; not so
    # an edit, where scales that all images of a batch keep are not predicted
    per_image = pipeline.forwards_per_image(request.sampling) if request.method == "__call__" else None
    mine = [index for index in range(len(request)) if index % processes.count == processes.rank]
    rows = {index: row for index in mine if (row := _finished(folder, index, request))}
    missing = [index for index in mine if index not in rows]
    size = batch_size or batch_size_that_fits(pipeline, guided=request.sampling.guidance_scale != 1)
    prepared = pipeline.prepared(size, **request.decoding) if missing else {}
    method = getattr(pipeline, request.method)
    took, done = [], 0
    shown = processes.is_first and logger.isEnabledFor(logging.INFO)
    with Display(title, len(missing), "image", shown=shown) as bar:
        while done < len(missing):
            batch = [index for index in missing[done : done + size] if index // GROUP == missing[done] // GROUP]
            with naming_next_batch_size(size):
                result = method(*request.inputs, **_call(pipeline, request, batch), **prepared)
            if not done and _asked_before(folder) < number:
                # before the first image: a folder with images says what they are
                _write_manifest(folder, request, number, earlier.get("images") or (), per_image)
            pictures = zip(batch, result.images, _in_a_row(result.token_ids), strict=True)
            rows |= {index: _saved(pipeline, folder, request, index, *one) for index, *one in pictures}
            took.append(getattr(result, "num_forwards", 0))
            done += len(batch)
            bar.update(len(batch))
    processes.wait()
    if processes.is_first:
        # what others drew, and what an earlier call did that asked for more
        rows |= {i: row for i in range(number) if i not in rows and (row := _finished(folder, i, request))}
        _write_manifest(folder, request, number, [rows[index] for index in sorted(rows)], per_image)
    return Drawn(len(missing), tuple(took), per_image)


def check_folder(folder: Path, request: SampleRequest) -> dict[str, Any]:
    """What samples.json says of a folder that has the settings of a request; nothing for a new or empty one.

    Raises UserError where it holds something else.
    """
    if not folder.exists():
        return {}
    if not folder.is_dir():
        raise UserError(f"--out must be a folder, got the file {folder}. Choose another name.")
    if has_chunks(folder):
        raise UserError(
            f"{folder} holds samples of an earlier version (chunk_*.npz), which this one does not go on with. Choose "
            "another --out, or delete the folder to draw them again."
        )
    if not (folder / MANIFEST).is_file():
        check_only(folder, "a folder of samples")
        return {}
    try:
        manifest = _manifest(folder)
        theirs, ours = dict(manifest["settings"]), request.settings
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder / MANIFEST} cannot be read ({error}). Choose another folder.") from error
    changed = [name for name in {**ours, **theirs} if _json(ours.get(name)) != _json(theirs.get(name))]
    if changed:
        raise UserError(
            f"{folder} holds samples with other settings ({', '.join(changed)} differ). "
            "Choose another --out; nothing is overwritten."
        )
    return manifest


def has_chunks(folder: Path) -> bool:
    """Whether a folder holds the samples of an evaluation by a version that kept them in chunks."""
    return any(folder.glob("chunk_*.npz"))


def _asked_before(folder: Path) -> int:
    """How many images a folder was asked for before; 0 for a new one, and where nothing says."""
    try:
        return int(_manifest(folder)["num"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0


@dataclass(frozen=True, eq=False)
class Samples:
    """The images of a folder; iterate to read the pictures, as often as you like.

    Attributes:
        settings: that all images share; empty where the folder does not say.
        rows: of samples.json, in order: `file`, `class_id`, `label` and more.
    """

    folder: Path
    settings: Mapping[str, Any]
    rows: Sequence[Mapping[str, Any]]

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[UInt8[np.ndarray, "h w 3"]]:
        return map(self.image, range(len(self)))

    @cached_property
    def labels(self) -> Int[np.ndarray, " n"]:
        """Class ids of the model; its null id where no class was asked for."""
        return np.array([row["class_id"] for row in self.rows], np.int64)

    @cached_property
    def token_hashes(self) -> list[str]:
        """SHA-256 (hex) of the tokens of every image. Raises UserError where a row has none."""
        if not all("token_ids_sha256" in row for row in self.rows):
            raise UserError(f"{self.folder / MANIFEST} has rows without token_ids_sha256. Draw the samples again.")
        return [row["token_ids_sha256"] for row in self.rows]

    def image(self, index: int) -> UInt8[np.ndarray, "h w 3"]:
        """A picture, 0..255. Raises UserError where it cannot be read."""
        path = self.folder / self.rows[index]["file"]
        try:
            return decode_image(path.read_bytes())
        except (OSError, UnreadableImage) as error:
            raise UserError(f"{path} cannot be read ({error}). Draw the samples again.") from error

    def token_ids(self, index: int) -> Int[np.ndarray, " l"]:
        """Tokens of an image, all steps in a row. Raises UserError where they cannot be read."""
        path = self.folder / self.rows[index]["file"]
        try:
            with Image.open(path) as image:
                return _unpacked(_text(image))
        except (OSError, SyntaxError, ValueError, KeyError, zlib.error) as error:
            raise UserError(f"{path} holds no token ids ({error}). Draw the samples again.") from error


def read(folder: Path | str, num: int | None = None) -> Samples:
    """The finished images of a folder; the first `num` of them where that is given.

    Raises UserError where it is no folder of samples, or there are fewer.
    """
    folder = Path(folder)
    try:
        manifest = _manifest(folder)
        rows, settings = list(manifest["images"])[:num], dict(manifest.get("settings", {}))
        for row in rows:
            if wrong := [name for name, kind in _ROW.items() if not isinstance(row.get(name), kind)]:
                raise ValueError(f"a row has no {wrong[0]}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{folder / MANIFEST} cannot be read ({error}). Draw the samples again.") from error
    if not rows:
        raise UserError(f"{folder} holds no finished samples. Run the command that made it to its end.")
    numbers, wanted = [row["index"] for row in rows], len(rows) if num is None else num
    if numbers != list(range(wanted)):
        absent = sorted(set(range(wanted)) - set(numbers))
        wrong = f"lacks {absent[0]}" if absent else "has them twice or in another order"
        raise UserError(
            f"{folder} is not whole: of samples 0 to {wanted - 1}, {MANIFEST} {wrong}. Run the command that made it to "
            "its end."
        )
    return Samples(folder, settings, rows)


def _manifest(folder: Path) -> dict[str, Any]:
    return json.loads((folder / MANIFEST).read_text(encoding="utf-8"))


def _write_manifest(
    folder: Path, request: SampleRequest, number: int, rows: Sequence[Mapping[str, Any]], forwards: Any
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    # beside the settings, which decide them: folders of versions that did not write them are continued
    cost = {} if forwards is None else {"forwards_per_image": asdict(forwards)}
    values = {"isthmus_version": isthmus.__version__, "settings": request.settings, "num": number, **cost}
    text = json.dumps({**values, "images": rows}, indent=1) + "\n"
    write_whole(folder / MANIFEST, text)


def _call(pipeline: "AnyPipeline", request: SampleRequest, indices: Sequence[int]) -> dict[str, Any]:
    """Arguments of a call that draws some images of a request."""
    ids = [int(request.labels[index]) for index in indices]
    labels: list[Label] = [None if one == pipeline.num_classes else one for one in ids]
    words = {"prompt": [request.prompts[index] for index in indices]} if request.prompts else {}
    return {"class_labels": labels, "seed": request.seed, "image_index": list(indices), **words, **request.arguments}


def _in_a_row(token_ids: Tensor | Sequence[Tensor]) -> Int[np.ndarray, "b l"]:
    """All tokens of every image; a pyramid is a list of scales, a sequence one tensor."""
    return torch.cat([token_ids] if isinstance(token_ids, Tensor) else list(token_ids), dim=1).cpu().numpy()


def _saved(
    pipeline: "AnyPipeline",
    folder: Path,
    request: SampleRequest,
    index: int,
    picture: Image.Image,
    token_ids: Int[np.ndarray, " l"],
) -> dict[str, Any]:
    """Write an image; returns its row."""
    label, names = int(request.labels[index]), request.settings.get("class_names", ())
    named = names and label != pipeline.num_classes
    text = {
        "index": str(index),
        "seed": str(request.seed),
        "class_id": str(label),
        "label": names[label] if named else pipeline.label_name(label),
        **({"prompt": request.prompts[index]} if request.prompts else {}),
        **_packed(token_ids),
        "Software": f"isthmus {isthmus.__version__}",
        "model": request.settings["model"],
        "settings": _json(_own_settings(request)),
    }
    save_picture(picture, folder / file_name(index), text)
    return _row(text)


def _own_settings(request: SampleRequest) -> dict[str, Any]:
    """The settings as an image has them: of all prompts its own decides, which stands beside them."""
    return {name: value for name, value in request.settings.items() if name != "prompts"}


def _row(text: Mapping[str, str]) -> dict[str, Any]:
    """What samples.json says of an image, from the text of its PNG."""
    index = int(text["index"])
    return {
        "file": file_name(index),
        "index": index,
        "seed": int(text["seed"]),
        "class_id": int(text["class_id"]),
        "label": text["label"],
        **({"prompt": text["prompt"]} if "prompt" in text else {}),
        "token_ids_sha256": text["token_ids_sha256"],
    }


def _finished(folder: Path, index: int, request: SampleRequest) -> dict[str, Any] | None:
    """The row of an image that is there, from its metadata; None where it has to be drawn."""
    path = folder / file_name(index)
    if not path.is_file():
        return None
    try:
        with Image.open(path) as image:
            text = _text(image)
            image.verify()
        _unpacked(text)
        # an earlier version wrote the prompts of all images into each
        same = text["settings"] in (_json(_own_settings(request)), _json(request.settings))
        same &= text["index"] == str(index)
        # images that an earlier call asked for beyond these have the settings of the folder
        if request.prompts and index < len(request):
            same &= text["prompt"] == request.prompts[index]
        return _row(text) if same else None
    # PIL raises a SyntaxError for a damaged file
    except (OSError, SyntaxError, ValueError, KeyError, zlib.error):
        return None


def _text(image: Image.Image) -> dict[str, str]:
    return {str(name): value for name, value in image.info.items() if isinstance(value, str)}


def _packed(token_ids: Int[np.ndarray, " l"]) -> dict[str, str]:
    """Tokens as the text of a PNG."""
    values = np.ascontiguousarray(token_ids, "<i4").tobytes()
    packed = base64.b64encode(zlib.compress(values)).decode()
    return {"token_ids": packed, "token_ids_sha256": hashlib.sha256(values).hexdigest()}


def _unpacked(text: Mapping[str, str]) -> Int[np.ndarray, " l"]:
    """Tokens from the text of a PNG. Raises KeyError, ValueError or zlib.error where there are none."""
    values = zlib.decompress(base64.b64decode(text["token_ids"]))
    if hashlib.sha256(values).hexdigest() != text["token_ids_sha256"]:
        raise ValueError("their hash is another")
    return np.frombuffer(values, "<i4").astype(np.int64)


def file_name(index: int) -> str:
    """Of image `index`."""
    return f"{index:06d}.png"


def read_image(path: Path) -> Image.Image:
    """The picture in a file, as RGB. Raises UserError where it cannot be read."""
    try:
        return Image.fromarray(decode_image(path.read_bytes()))
    except (OSError, UnreadableImage) as error:
        raise UserError(f"{path} cannot be read as an image: {error}. Pass another file.") from error


def _json(value: Any) -> str:
    return json.dumps(value, sort_keys=True)


@alone_in("out")
def draw_folder(
    model: str,
    out: Path,
    *,
    classes: Sequence[str],
    prompts: Sequence[str] = (),
    num_images: int,
    seed: int,
    options: Mapping[str, Any],
    steering: Mapping[str, Any],
    decoding: Mapping[str, bool] | None = None,
    refine: "RefinementMode | None" = None,
    prefix_image: Path | None = None,
    grid: bool,
    strip: bool,
    batch_size: int | None,
    device: str,
    dtype: str,
) -> None:
    """`isthmus sample`: images 0..num_images - 1 of a model, and pictures of them.

    A folder `out` that was asked for more images before is filled with these. `classes` are names or ids, taken in
    turn, and so are `prompts`; neither are all classes of the model, or the empty prompt of one that has none. `refine`
    None is the model's own mode. The other arguments are those of `load_pipeline`, `SampleRequest.of` and `draw`.

    Raises:
        UserError: an argument is not usable, or `out` holds something else than samples with these settings.
    """
    with launched_processes() as processes:
        # the first process decides for all: a busy core may measure something else
        dtype = processes.agreed(dtype_name(dtype, processes.device(device)))
        pipeline = load_pipeline(model, device=processes.device(device), dtype=dtype)
        if refine is not None:
            pipeline.refine_with(refine)
        every = [] if prompts else list(range(pipeline.num_classes))
        ids = _class_ids(pipeline, classes) if classes else every or [pipeline.num_classes]
        number = max(num_images, _asked_before(out))
        request = SampleRequest.of(
            pipeline,
            **_in_turn(ids, prompts, number),
            seed=seed,
            options=options,
            steering=steering,
            decoding=decoding,
            prefix_image=prefix_image,
            dtype=dtype,
        )
        drawn = draw(pipeline, out, request, batch_size=batch_size, processes=processes)
        if not processes.is_first:
            return
        samples = read(out, number)
        if grid:
            save_picture(_grid(samples), out / GRID)
        if strip:
            save_picture(_strip(pipeline, samples, request), out / STRIP)
        cost = "" if drawn.forwards_per_image is None else f"; {drawn.forwards_per_image} forwards each"
        by = "" if processes.count == 1 else " by the first process"
        logger.info("%d images in %s (%d drawn now%s)%s", number, out, drawn.count, by, cost)


def _in_turn(ids: Sequence[int], prompts: Sequence[str], number: int) -> dict[str, Any]:
    """Arguments of `SampleRequest.of` for images that take class ids, and prompts where there are any, in turn."""
    return {
        "labels": [ids[index % len(ids)] for index in range(number)],
        "prompts": [prompts[index % len(prompts)] for index in range(number)] if prompts else [],
        "classes": {"class_ids": list(ids)} | ({"prompts": list(prompts)} if prompts else {}),
    }


def _name(row: Mapping[str, Any]) -> str:
    """What pictures say of an image: its prompt, behind its class where it has one, cut where it is long."""
    if "prompt" not in row:
        return row["label"]
    words = " ".join(row["prompt"].split()) or "(no words)"
    words = words if row["label"] == "null" else f"{row['label']}: {words}"
    return words if len(words) <= _LONGEST_NAME else words[: _LONGEST_NAME - 3] + "..."


def _class_ids(pipeline: "AnyPipeline", words: Sequence[str]) -> list[int]:
    """Class ids of labels as they are typed; no class where there is none."""
    names = pipeline.class_names
    labels = labels_from_words(words, names) or [None]
    return resolve_labels(labels, class_names=names, num_classes=pipeline.num_classes)


def _grid(samples: Samples) -> Image.Image:
    """Rows are classes or prompts in the order asked for; the first images of each."""
    # by the whole prompt: two long ones may have one name
    members: dict[tuple[str, str], list[int]] = {}
    for index, row in enumerate(samples.rows):
        members.setdefault((row["label"], row.get("prompt", "")), []).append(index)
    if len(members) == 1:
        # one class fills the picture
        shown = range(min(len(samples), _GRID_ROWS * _GRID_COLUMNS))
        rows = [shown[start : start + _GRID_COLUMNS] for start in range(0, len(shown), _GRID_COLUMNS)]
    else:
        rows = [of_one[:_GRID_COLUMNS] for of_one in list(members.values())[:_GRID_ROWS]]
    names = [_name(samples.rows[row[0]]) for row in rows][: len(members)]
    return table([[Image.fromarray(samples.image(index)) for index in row] for row in rows], row_names=names)


def _strip(pipeline: "AnyPipeline", samples: Samples, request: SampleRequest) -> Image.Image:
    """The first images, step by step: drawn once more, from their own random numbers."""
    indices = list(range(min(len(samples), _STRIP_ROWS)))
    prepared = pipeline.prepared(len(indices), **request.decoding)
    steps = pipeline.stream(**_call(pipeline, request, indices), output_type="pil", **prepared)
    # a step that was taken again counts as it is in the end
    last = {step.index: step.preview for step in steps if isinstance(step.preview, list)}
    columns = list(last.values())
    return table(
        list(zip(*columns, strict=True)),
        row_names=[_name(samples.rows[index]) for index in indices],
        column_names=pipeline.step_names(len(columns)),
    )


@alone_in("out")
def edit_image(
    model: str,
    out: Path,
    method: str,
    *,
    image: Path,
    mask: Path | None,
    classes: Sequence[str],
    prompts: Sequence[str] = (),
    steering: Mapping[str, Any],
    num_images: int,
    seed: int,
    settings: Mapping[str, Any],
    options: Mapping[str, Any],
    batch_size: int | None,
    device: str,
    dtype: str,
) -> None:
    """`isthmus edit`: edits of an image, and overview.png; the log says how many forwards were made now.

    `settings` are arguments of the method of the pipeline. `classes` are names or ids, taken in turn, and so are
    `prompts`; none is no class, and no words.
    The other arguments are those of `draw_folder`.

    Raises:
        UserError: an argument is not usable, `out` holds something else, or memory ran out.
    """
    if not is_first_process():
        return  # a few images: nothing to share
    source = read_image(image)
    inputs = (source,) if mask is None else (source, read_image(mask))
    dtype = dtype_name(dtype, device)
    pipeline = load_pipeline(model, device=device, dtype=dtype)
    if method not in pipeline.edits:
        raise UserError(f"edits need a next-scale model (VAR, SRDD), got {model}, a {pipeline.kind}.")
    ids = _class_ids(pipeline, classes)
    files = {"image_sha256": sha256_of_file(image)} | ({} if mask is None else {"mask_sha256": sha256_of_file(mask)})
    number = max(num_images, _asked_before(out))
    plain = SampleRequest.of(
        pipeline,
        **_in_turn(ids, prompts, number),
        seed=seed,
        options=options,
        steering=steering,
        dtype=dtype,
    )
    request = replace(
        plain,
        settings={**plain.settings, "edit": method, **files, **settings},
        arguments={**settings, **plain.arguments},
        method=method,
        inputs=inputs,
    )
    drawn = draw(pipeline, out, request, batch_size=batch_size)
    samples = read(out, number)
    save_picture(_overview(inputs, samples), out / OVERVIEW)
    batches = len(drawn.forwards)
    cost = f"{sum(drawn.forwards)} forwards in {batches} batch{'' if batches == 1 else 'es'}"
    logger.info("%d edits in %s (%s); %s shows them beside the image", number, out, cost, OVERVIEW)


def _overview(inputs: Sequence[Image.Image], samples: Samples) -> Image.Image:
    """The image, the mask where there is one, and the first results, named by their labels."""
    shown = [Image.fromarray(samples.image(index)) for index in range(min(len(samples), _GRID_COLUMNS))]
    # on white where the result has another shape (outpaint, variations): nothing is stretched
    given = [ImageOps.pad(one, shown[0].size, Image.Resampling.LANCZOS, color="white") for one in inputs]
    names = ["image", "mask"][: len(given)] + [_name(row) for row in samples.rows[: len(shown)]]
    return table([[*given, *shown]], column_names=names)

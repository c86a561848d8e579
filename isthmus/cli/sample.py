"""`isthmus sample` and `isthmus edit`: images from a model, each with everything needed to draw it again."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import tyro

from isthmus.cli.options import DrawOptions, PromptOptions, SteeredDrawOptions, parse
from isthmus.dar.options import DAROptions
from isthmus.errors import UserError
from isthmus.next_scale.options import InpaintOptions
from isthmus.pipelines.options import options_of

logger = logging.getLogger("isthmus")
_DAR, _INPAINT = options_of(DAROptions), options_of(InpaintOptions)


@dataclass(frozen=True, kw_only=True)
class Sample(SteeredDrawOptions, PromptOptions):
    """Draw images from a model. Image i is the same whatever the batch size; run again to fill in missing images."""

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """A pipeline folder (a trained run, a converted checkpoint) or a hub id."""
    out: Path
    """Folder for the images, samples.json, grid.png and strip.png."""
    classes: tuple[str, ...] = ()
    """Names or numbers, taken in turn: a name where a class has it, else a number; id:2 and name:2 say which, `null` is
    no class. None given: all classes of the model, or no class where there are prompts."""
    num: int = 16
    """Number of images."""
    refine: Literal["default", "none", "simple", "masked"] = "default"
    """Draw some tokens again (next-scale models), with the rounds usual in this mode; default: as the model says."""
    prefix_image: Path | None = None
    """Image whose first tokens every image keeps (layout control of D-AR models)."""
    prefix_tokens: Annotated[int | None, _DAR["prefix_tokens"]] = None
    int8: bool = False
    """Decode with 8-bit weights (D-AR models on a CPU): large priors are faster, a token now and then is another."""
    compile: bool = False
    """Compile what predicts tokens, on a CPU with a C++ compiler: pays on GPUs and for many images, after a first wait.
    One seed is one image among compiled draws; others may differ near a tie."""
    grid: bool = False
    """Write grid.png: rows are classes or prompts, names written."""
    strip: bool = False
    """Write strip.png: the first images as they grow, scale by scale or solver step by solver step."""

    def __post_init__(self):
        if self.num < 1:
            raise UserError(f"--num must be at least 1, got {self.num}.")
        super().__post_init__()
        if (self.prefix_image is None) != (self.prefix_tokens is None):
            raise UserError("a layout is kept by --prefix-image FILE and --prefix-tokens M together, got one of them.")
        if self.prefix_image is not None:
            _check_file(self.prefix_image, "--prefix-image")

    def steering(self) -> dict[str, Any]:
        """Arguments that only some models have, where they were given."""
        prefix = {} if self.prefix_tokens is None else {"prefix_tokens": self.prefix_tokens}
        return {**super().steering(), **prefix, **self.asked()}

    def decoding(self) -> dict[str, bool]:
        """How tokens are computed, where it was asked for."""
        return {name: True for name, wanted in (("int8", self.int8), ("compiled", self.compile)) if wanted}


def run(arguments: Sequence[str]) -> None:
    """Draw and save."""
    command = parse(Sample, arguments, prog="isthmus sample")
    # guidance and prompts that cannot be read are refused before the slow imports
    draw, prompts = command.draw(), command.words()
    from isthmus.samples import draw_folder

    draw_folder(
        command.model,
        command.out,
        classes=command.classes,
        prompts=prompts,
        num_images=command.num,
        steering=command.steering(),
        decoding=command.decoding(),
        refine=None if command.refine == "default" else command.refine,
        prefix_image=command.prefix_image,
        grid=command.grid,
        strip=command.strip,
        **draw,
    )


def _check_file(path: Path, option: str) -> None:
    if not path.is_file():
        raise UserError(f"{option} must be an image file, got {path}, which is no file. Check the path.")


_Number = TypeVar("_Number", int, float)


@dataclass(frozen=True, kw_only=True)
class _Edit(DrawOptions, PromptOptions):
    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """A pipeline folder of a next-scale model (VAR, SRDD), or a hub id."""
    image: Path
    """The image to edit."""
    out: Path
    """Folder for the results, samples.json and overview.png."""
    classes: tuple[str, ...] = ()
    """What the results are to be, names or numbers as for `isthmus sample`, taken in turn; none asks for no class."""
    num: int = 4
    """Number of results."""

    def __post_init__(self):
        super().__post_init__()
        if self.num < 1:
            raise UserError(f"--num must be at least 1, got {self.num}.")
        _check_file(self.image, "--image")

    def edit_settings(self) -> dict[str, Any]:
        """Arguments of the method that edits."""
        return {}


@dataclass(frozen=True, kw_only=True)
class _Keeping(_Edit):
    published: bool = False
    """Keep tokens as VAR's published procedure does, which also reads what lies under the mask."""
    max_unknown: tuple[float, ...] = ()
    """A token is kept with at most this share of unknown pixels, in [0, 1): one number, or one per scale; none given:
    0.5. Not with --published."""
    jumps: tuple[int, ...] = ()
    """Simple resampling: after every scale from the third on (see --jump-scales), go back and draw the last ones again,
    so many times; or one number per scale. None given: no jumps."""
    jump_scales: Annotated[int | None, _INPAINT["jump_scales"]] = None
    paste: Annotated[bool, _INPAINT["paste"]] = True
    seam_px: Annotated[int | None, _INPAINT["seam_px"]] = None

    def edit_settings(self) -> dict[str, Any]:
        """Arguments of the edit."""
        per_scale = {"max_unknown": _one_or_each(self.max_unknown, None), "jumps": _one_or_each(self.jumps, 0)}
        given = {name: getattr(self, name) for name in ("jump_scales", "paste", "seam_px")}
        return per_scale | given | {"keeping": "published" if self.published else "coverage"}


@dataclass(frozen=True, kw_only=True)
class Inpaint(_Keeping):
    """Make the pixels under a mask anew. The image is scaled so that its longer side is the model's size."""

    mask: Path
    """Black and white picture of the image's size; white is made."""

    def __post_init__(self):
        super().__post_init__()
        _check_file(self.mask, "--mask")


@dataclass(frozen=True, kw_only=True)
class EditClass(Inpaint):
    """Make the pixels under a mask anew, as part of an image of another class (--classes) or prompt (--prompt). The
    image is scaled so that its longer side is the model's size.
    """

    def __post_init__(self):
        super().__post_init__()
        if not (self.classes or self.prompt or self.prompts):
            raise UserError(
                "--classes or --prompt says what is made under the mask, got none. `isthmus edit inpaint` needs none."
            )


@dataclass(frozen=True, kw_only=True)
class Outpaint(_Keeping):
    """Make what lies beyond the edges. The enlarged picture comes at the model's size."""

    left: int = 0
    """Pixels of the image to add at the left,"""
    top: int = 0
    """at the top,"""
    right: int = 0
    """at the right,"""
    bottom: int = 0
    """and below."""

    def edit_settings(self) -> dict[str, Any]:
        """Arguments of the edit."""
        return super().edit_settings() | {name: getattr(self, name) for name in ("left", "top", "right", "bottom")}


@dataclass(frozen=True, kw_only=True)
class SuperResolve(_Edit):
    """A small image at the model's size: its tokens are the coarse scales, the finer ones are drawn."""

    from_scale: int | None = None
    """First scale (from 0) that is drawn; None is the first that is finer than the small image can tell."""
    max_unknown: tuple[float, ...] = ()
    """Beside the shorter side of a picture that is no square, a token is kept with at most this share of unknown
    pixels, in [0, 1): one number, or one per scale; none given: 0.5."""
    paste: bool = True
    """Mend the result so that, averaged to the small size, it is the small image."""

    def edit_settings(self) -> dict[str, Any]:
        """Arguments of the edit."""
        max_unknown = _one_or_each(self.max_unknown, None)
        return {"from_scale": self.from_scale, "max_unknown": max_unknown, "paste": self.paste}


@dataclass(frozen=True, kw_only=True)
class Variations(_Edit):
    """Images that share the coarse scales with an image, whose central square is taken, at the model's size."""

    from_scale: int = field()
    """First scale (from 0) that is drawn: the smaller, the freer."""

    def edit_settings(self) -> dict[str, Any]:
        """Arguments of the edit."""
        return {"from_scale": self.from_scale}


def _one_or_each(values: tuple[_Number, ...], default: _Number | None) -> tuple[_Number, ...] | _Number | None:
    """An option as methods take it: nothing given is the default, one number serves all scales."""
    return values if len(values) > 1 else values[0] if values else default


def _edit(kind: type[_Edit], command_name: str, method: str, arguments: Sequence[str]) -> None:
    command = parse(kind, arguments, prog=f"isthmus edit {command_name}")
    # guidance and prompts that cannot be read are refused before the slow imports
    draw, prompts = command.draw(), command.words()
    from isthmus.samples import edit_image

    edit_image(
        command.model,
        command.out,
        method,
        image=command.image,
        mask=getattr(command, "mask", None),
        classes=command.classes,
        prompts=prompts,
        steering=command.asked(),
        num_images=command.num,
        settings=command.edit_settings(),
        **draw,
    )


run_inpaint = partial(_edit, Inpaint, "inpaint", "inpaint")
run_class = partial(_edit, EditClass, "class", "edit_class")
run_outpaint = partial(_edit, Outpaint, "outpaint", "outpaint")
run_super_resolve = partial(_edit, SuperResolve, "super-resolve", "super_resolve")
run_variations = partial(_edit, Variations, "variations", "variations")

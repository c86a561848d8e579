"""How pictures are drawn: the options of a call, declared once, and the values that a model carries as its own.

The options of a family add to `CallOptions` (`next_scale/options.py`, `dar/options.py`). Pipelines, command line and
documentation read these declarations; this file does not import torch.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from enum import Enum
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypedDict, get_args

from typing_extensions import Doc

from isthmus.errors import UserError
from isthmus.nn.guidance import Guidance, GuidanceSchedule, guidance_values

if TYPE_CHECKING:
    from isthmus.pipelines.request import Generators, Whole


class Default(Enum):
    """Says "take the value saved with the model" where None already means "off"."""

    FOLDER = "saved with the model"


FOLDER_DEFAULT = Default.FOLDER
OutputType = Literal["pil", "np", "pt", "latent"]


class Option(Doc):
    """What stands beside the type of an option: its default, and a sentence or two for docstrings and `--help`."""

    def __init__(self, default: Any, documentation: str):
        super().__init__(documentation)
        self.default = default


class CallOptions(TypedDict, total=False):
    """Options of a call that both families have."""

    guidance_scale: Annotated[
        Guidance | Default,
        Option(
            FOLDER_DEFAULT,
            "guided = uncond + s (cond - uncond), 1 is off: a number, one per step (scale or token), or a "
            "`GuidanceSchedule`.",
        ),
    ]
    top_k: Annotated[int | None | Default, Option(FOLDER_DEFAULT, "Keep the k likeliest codes.")]
    top_p: Annotated[
        float | int | None | Default,
        Option(FOLDER_DEFAULT, "Keep the likeliest codes that hold this probability together."),
    ]
    temperature: Annotated[
        float | int | Sequence[float] | Default,
        Option(FOLDER_DEFAULT, "Divides the logits; of a next-scale model also one number per scale."),
    ]
    prompt: Annotated[
        str | Sequence[str] | None,
        Option(None, "What the image shows, in words (models that read text): one text, or one per image."),
    ]
    negative_prompt: Annotated[
        str | None, Option(None, "What guidance leads away from; None is the empty prompt. It needs guidance.")
    ]
    seed: Annotated[
        "Whole | None",
        Option(None, "One number for the request, or a list with one per image; None draws a fresh one."),
    ]
    generator: Annotated[
        "Generators", Option(None, "Makes the list of seeds instead: one generator, or one per image.")
    ]
    image_index: Annotated[
        "Whole",
        Option(
            0,
            "Number of the first image in the whole request, or one number per image. An image depends on its seed and "
            "number alone: not on the batch, nor on its place in it.",
        ),
    ]
    output_type: Annotated[
        OutputType,
        Option(
            "pil",
            '"pil", "np" (b, h, w, 3) or "pt" (b, 3, h, w) in [0, 1], or "latent": features of a next-scale model, '
            "images of a D-AR model that are not clamped.",
        ),
    ]


def options_of(kind: type) -> dict[str, Option]:
    """Default and meaning of every option of a typed dictionary, by name, inherited ones first.

    >>> options_of(CallOptions)["output_type"].default
    'pil'
    """
    # not get_type_hints: types that need torch are written as text
    hints = kind.__annotations__.items()
    return {name: option for name, hint in hints for option in get_args(hint) if isinstance(option, Option)}


@dataclass(frozen=True)
class SmoothSchedule:
    """Which scales mix codes instead of drawing one, and from what.

    The default is VAR's smoothing, `smooth=True`: all scales, behind the filters. Switti's is another (its spec, 7).

    Attributes:
        first: first scale that does, from 0; a shortened schedule is counted as the full one.
        last: last scale that does; None is the last of all.
        filtered: whether top_k and top_p act before the codes are mixed.

    Raises UserError where `last` lies before `first`, or `first` below 0.
    """

    first: int = 0
    last: int | None = None
    filtered: bool = True

    def __post_init__(self):
        if self.first < 0 or (self.last is not None and self.last < self.first):
            raise UserError(
                f"smoothing needs a first scale from 0 and none after its last, got {self.first} to {self.last}. "
                "smooth=False turns it off."
            )

    def covers(self, scale: int) -> bool:
        """Whether codes are mixed at this scale."""
        return self.first <= scale and (self.last is None or scale <= self.last)


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """Values of the options that are saved with a model (`CallOptions`, `NextScaleOptions`); None is off.

    A draw divides the guided logits by the temperature, or by that of its scale, before it filters them.

    >>> SamplingOptions.from_dict(SamplingOptions(top_k=3).to_dict()) == SamplingOptions(top_k=3)
    True
    """

    guidance_scale: Guidance = 1.0
    top_k: int | None = None
    top_p: float | None = None
    temperature: float | int | Sequence[float] = 1.0
    smooth: bool | SmoothSchedule = False

    def __post_init__(self):
        guidance, steps = self.guidance_scale, 1
        if not isinstance(guidance, (int, float, GuidanceSchedule)):
            object.__setattr__(self, "guidance_scale", tuple(guidance))
            steps = len(guidance)
        guidance_values(guidance, steps)
        if not isinstance(self.temperature, (int, float)):
            object.__setattr__(self, "temperature", tuple(self.temperature))

    @property
    def smoothing(self) -> SmoothSchedule | None:
        """Which scales mix codes; None where none does."""
        return SmoothSchedule() if self.smooth is True else self.smooth or None

    def temperature_at(self, step: int) -> float:
        """The temperature of a step; one number is that of all steps."""
        return float(self.temperature if isinstance(self.temperature, (int, float)) else self.temperature[step])

    def check(self, *, codebook_size: int, num_steps: int) -> None:
        """Raise UserError for what a model of so many codes and guided steps cannot draw with."""
        if self.top_k is not None and not 1 <= self.top_k <= codebook_size:
            raise UserError(
                f"top_k must be 1..{codebook_size} (the codebook size), got {self.top_k}. Leave it out to turn it off."
            )
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UserError(f"top_p must lie in (0, 1], got {self.top_p}. Leave it out to turn it off.")
        temperatures = self.temperature
        temperatures = (temperatures,) * num_steps if isinstance(temperatures, (int, float)) else temperatures
        if len(temperatures) != num_steps:
            raise UserError(
                f"temperature as a sequence needs one value per scale ({num_steps}), got {len(temperatures)}. "
                "Pass one number for all scales."
            )
        for value in temperatures:
            if not (value > 0 and math.isfinite(value)):
                raise UserError(f"temperature must be positive and finite, got {value}. Use top_k=1 for greedy tokens.")
        guidance_values(self.guidance_scale, num_steps)

    def override(self, **given: Any) -> "SamplingOptions":
        """These options, but for the values given; `FOLDER_DEFAULT` keeps the value that is here.

        >>> SamplingOptions(top_k=3, top_p=0.9).override(top_k=None, top_p=FOLDER_DEFAULT)
        SamplingOptions(guidance_scale=1.0, top_k=None, top_p=0.9, temperature=1.0, smooth=False)
        """
        return replace(self, **{name: value for name, value in given.items() if value is not FOLDER_DEFAULT})

    def words(self) -> str:
        """The options in a few words; filters that are off, and a temperature of 1, are left out.

        Smoothing is told by its scales where not all are smoothed.

        >>> SamplingOptions(guidance_scale=GuidanceSchedule("linear", 1.0, 2.5), top_p=0.9).words()
        'guidance linear:1:2.5, top-p 0.9'
        >>> SamplingOptions(temperature=(1, 1, 0.1), smooth=SmoothSchedule(1, 1, filtered=False)).words()
        'guidance 1, temperature 1,1,0.1, smooth 1-1:unfiltered'
        """
        parts = [f"guidance {guidance_text(self.guidance_scale)}"]
        parts += [] if self.top_k is None else [f"top-k {self.top_k}"]
        parts += [] if self.top_p is None else [f"top-p {self.top_p:g}"]
        parts += [] if self.temperature == 1 else [f"temperature {temperature_text(self.temperature)}"]
        smoothing = self.smoothing
        if smoothing is not None:
            parts.append("smooth" if smoothing == SmoothSchedule() else f"smooth {smooth_text(smoothing)}")
        return ", ".join(parts)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        values = asdict(self)
        if isinstance(self.guidance_scale, GuidanceSchedule):
            values["guidance_scale"] = self.guidance_scale.to_dict()
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "SamplingOptions":
        """The options that `to_dict` wrote, what is left out by default; UserError for an unknown name or bad value."""
        known = sorted(field.name for field in fields(cls))
        if unknown := sorted(set(values).difference(known)):
            raise UserError(f"sampling options are {', '.join(known)}; got {unknown[0]!r}. Leave it out.")
        guidance = values.get("guidance_scale", cls.guidance_scale)
        guidance = GuidanceSchedule(**guidance) if isinstance(guidance, Mapping) else guidance
        smooth = values.get("smooth", cls.smooth)
        smooth = SmoothSchedule(**smooth) if isinstance(smooth, Mapping) else smooth
        return cls(**{**values, "guidance_scale": guidance, "smooth": smooth})


def saved_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Those of a call's options that are saved with a model."""
    return {field.name: options[field.name] for field in fields(SamplingOptions) if field.name in options}


# LAST, FIRST-LAST or FIRST-
_GUIDED = re.compile(r"(?:(?P<first>\d+)-)?(?P<last>-?\d+)|(?P<only_first>\d+)-")
_SMOOTH = re.compile(r"(\d+)-(\d*)(:unfiltered)?")


def parse_guidance(text: str) -> Guidance:
    """Guidance as it is written on the command line.

    A number; `linear:START:END` or `cosine:START:END` over the scales, with `:LAST` for the last guided scale
    (from 0) or `:FIRST-LAST` (or `:FIRST-`) for the first too, `constant:START:END:LAST` likewise; or one number per
    step (scale or token), separated by commas. UserError for any other text.

    >>> parse_guidance("2"), parse_guidance("1,1.5,2")
    (2.0, (1.0, 1.5, 2.0))
    >>> parse_guidance("linear:1:2.5")
    GuidanceSchedule(kind='linear', start=1.0, end=2.5, last_guided_step=None, first_guided_step=0)
    >>> parse_guidance("linear:1:7:2-7").values(10)[1:4]
    (1.0, 2.333333333333333, 3.0)
    """
    kind, *numbers = text.strip().split(":")
    try:
        if not numbers:
            values = tuple(float(value) for value in kind.split(","))
            return values[0] if len(values) == 1 else values
        if kind in ("constant", "linear", "cosine") and len(numbers) in (2, 3):
            steps = _GUIDED.fullmatch(numbers[2] if len(numbers) == 3 else "0-")
            if steps is not None:
                first, last = steps["first"] or steps["only_first"] or 0, steps["last"]
                guided = (None if last is None else int(last), int(first))
                return GuidanceSchedule(kind, float(numbers[0]), float(numbers[1]), *guided)
    except UserError:
        raise
    except ValueError:
        pass  # not numbers: the one message below says what is
    raise UserError(
        f"guidance must be a number, linear:START:END, cosine:START:END or one number per step (scale or token), "
        f"got {text!r}. For example 2.0 or linear:1:2.5; 1 is off."
    )


def guidance_text(guidance: Guidance) -> str:
    """Guidance as `parse_guidance` reads it.

    >>> guidance_text(1.5), guidance_text((1.0, 2.0)), guidance_text(GuidanceSchedule("linear", 1.0, 2.5, 3))
    ('1.5', '1,2', 'linear:1:2.5:3')
    """
    if isinstance(guidance, (int, float)):
        return _shortest(guidance)
    if not isinstance(guidance, GuidanceSchedule):
        return ",".join(map(_shortest, guidance))
    first = f"{guidance.first_guided_step}-" if guidance.first_guided_step else ""
    last = "" if guidance.last_guided_step is None else str(guidance.last_guided_step)
    guided = [first + last] if first or last else []
    return ":".join([guidance.kind, _shortest(guidance.start), _shortest(guidance.end), *guided])


def temperature_text(temperature: float | Sequence[float]) -> str:
    """One number, or one per scale with commas between them."""
    return ",".join(map(_shortest, [temperature] if isinstance(temperature, (int, float)) else temperature))


def parse_smooth(text: str) -> SmoothSchedule:
    """Smoothing as it is written in settings: `FIRST-LAST` or `FIRST-`, scales from 0, and `:unfiltered` behind it.

    UserError for any other text.

    >>> parse_smooth("2-7:unfiltered")
    SmoothSchedule(first=2, last=7, filtered=False)
    """
    found = _SMOOTH.fullmatch(text.strip())
    if found is None:
        raise UserError(
            f"smoothing must be FIRST-LAST or FIRST- (scales, from 0), with :unfiltered behind it where no filter acts "
            f"before, got {text!r}. For example 2-7:unfiltered."
        )
    return SmoothSchedule(int(found[1]), int(found[2]) if found[2] else None, found[3] is None)


def smooth_text(smooth: SmoothSchedule) -> str:
    """Smoothing as `parse_smooth` reads it.

    >>> smooth_text(SmoothSchedule(2))
    '2-'
    """
    last = "" if smooth.last is None else str(smooth.last)
    return f"{smooth.first}-{last}{'' if smooth.filtered else ':unfiltered'}"


def _shortest(value: float) -> str:
    """The shortest text that is read as this number."""
    text = f"{value:g}"
    return text if float(text) == value else repr(float(value))


def guidance_on(guidance_scale: Guidance, scale_sizes: Sequence[int], parent_sizes: Sequence[int]) -> tuple[float, ...]:
    """One guidance value per scale; a schedule is read at the position its side has in the parent's scales.

    A model on a shortened set of scales is thus guided at every resolution as the full one is.

    >>> guidance_on(GuidanceSchedule("linear", 1.0, 4.0), (2, 4), (1, 2, 3, 4))
    (2.0, 4.0)
    """
    if not isinstance(guidance_scale, GuidanceSchedule):
        return guidance_values(guidance_scale, len(scale_sizes))
    by_side = dict(zip(parent_sizes, guidance_scale.values(len(parent_sizes)), strict=True))
    return tuple(by_side[side] for side in scale_sizes)

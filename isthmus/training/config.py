"""Runs as typed, frozen values: what a training does, said once, written to `run.json`, checked before it starts.

This file imports nothing heavy: the command line is derived from it.
"""

import difflib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import MISSING, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar, get_type_hints

from isthmus.errors import UserError, nearest
from isthmus.pipelines.options import SamplingOptions, guidance_text, parse_guidance, parse_smooth, smooth_text
from isthmus.training.arguments import arguments_of


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW and its learning rate, a pure function of the step."""

    learning_rate: float = 3e-4
    """Peak learning rate."""
    schedule: Literal["constant", "linear", "cosine", "exponential", "two-slope"] = "linear"
    """Course after the warm-up and the plateau, down to final_ratio."""
    warmup_steps: int = 100
    """Steps of linear warm-up."""
    warmup_start: float = 0.005
    """Share of the peak at step 0 of the warm-up."""
    plateau: float = 0.05
    """Share of the steps after the warm-up that stay at the peak."""
    knee: float = 0.8
    """two-slope only: share of the steps after which the rate has lost 40 % of its way."""
    final_ratio: float = 0.1
    """Share of the peak at the last step."""
    weight_decay: float = 0.05
    """Weight decay of matrices at the first step; biases, gains, position and scale tables have none."""
    final_weight_decay: float | None = None
    """Weight decay at the last step, reached on a cosine; None keeps it constant."""
    beta1: float = 0.9
    """First moment of AdamW."""
    beta2: float = 0.95
    """Second moment of AdamW."""
    eps: float = 1e-8
    """Epsilon of AdamW."""
    max_grad_norm: float = 2.0
    """Gradients are clipped to this norm."""

    def __post_init__(self):
        must("be positive", self, "learning_rate", "eps", "max_grad_norm", "final_ratio", "warmup_start")
        must("lie in [0, 1]", self, "plateau", "knee", "beta1", "beta2", "warmup_start")
        must("not be negative", self, "warmup_steps", "weight_decay")


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """Random views of a training image; None takes what suits the data set."""

    resize_ratio: float | None = None
    """The shorter side is resized to this times the image size before the random crop."""
    flip: bool | None = None
    """Mirror half of the views, where a data set says that this keeps the meaning."""
    max_shift: float | None = None
    """Largest shift, as a share of the image size."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """What every training shares."""

    data: str = "openmoji"
    """avatars[:STYLE,...], emoji, openmoji, photos, folder:PATH, npz:PATH or hf:NAME[:SPLIT]."""
    out: Path = Path("runs/unnamed")
    """Folder of the run: checkpoints, logs, previews and, at the end, the model."""
    preset: str = ""
    """Name of the preset this run started from; `isthmus info presets` lists them."""
    from_model: str = ""
    """Model to start from (folder or hub id); empty trains from scratch."""
    classes: tuple[str, ...] | None = None
    """Classes of the data set to use, by name; None takes all."""
    image_column: str | None = None
    """hf: data only: column of the images; None is the first that holds images."""
    label_column: str | None = None
    """hf: data only: column of the classes, texts or whole numbers; none reads no labels; None takes a ClassLabel
    column, else one named label or labels."""
    caption_column: str | None = None
    """hf: data only: column of the captions, which are texts; None reads none."""
    max_images: int | None = None
    """avatars: drawings to train on, over all styles; None is 20000. Other data, priors only: images that are encoded
    into the token cache; None takes all. The token cache of a stream needs a number."""
    stream: bool = False
    """Read hf: data as a stream instead of by index, for sets that do not fit on the disk; draw avatars without end."""
    shuffle_buffer: int = 1000
    """Streams of hf: data only: examples that are mixed; 0 keeps the order of the data set."""
    strict: bool = False
    """Refuse a data set with unreadable files instead of skipping them."""
    seed: int = 0
    """Decides every random choice of the run."""
    num_steps: int = 1000
    """Optimizer steps."""
    batch_size: int = 32
    """Images per optimizer step, over all processes and accumulation."""
    accumulate: int = 1
    """Parts a batch is split into, to fit into memory."""
    ema_decay: float = 0.999
    """Decay of the averaged weights that are saved and sampled; the first steps average over fewer."""
    mixed_precision: Literal["auto", "no", "bf16"] = "auto"
    """auto: bf16 on a GPU that has it, and on a CPU whose products run at least twice as fast in it (measured at the
    start); float32 elsewhere. Weights, averages, losses and the search for codes stay float32."""
    num_workers: int | None = None
    """Data loading processes; None decides by the data set."""
    log_every: int = 50
    """Steps between log lines."""
    validate_every: int = 500
    """Steps between measurements on held-out images."""
    preview_every: int = 500
    """Steps between preview pictures."""
    save_every: int = 500
    """Steps between checkpoints."""
    keep_checkpoints: int = 2
    """Newest checkpoints that are kept."""
    track: tuple[str, ...] = ()
    """Trackers that accelerate knows (tensorboard, wandb, ...), beside the JSONL log."""
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    """Random views."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """Optimizer."""

    def __post_init__(self):
        # in Python a folder is often written as text
        object.__setattr__(self, "out", Path(self.out))
        must(
            "be positive", self, "num_steps", "batch_size", "accumulate", "log_every", "validate_every", "preview_every"
        )
        must("be positive", self, "save_every", "keep_checkpoints", "max_images")
        must("not be negative", self, "seed", "shuffle_buffer")
        must("lie in [0, 1]", self, "ema_decay")
        if self.batch_size % self.accumulate:
            raise UserError(
                f"batch_size must be a multiple of accumulate, got {self.batch_size} and {self.accumulate}. "
                "Each part of a batch holds batch_size / accumulate images."
            )
        if self.optim.warmup_steps > self.num_steps:
            raise UserError(
                f"optim.warmup_steps must not exceed num_steps, got {self.optim.warmup_steps} and {self.num_steps}. "
                "Shorten the warm-up."
            )

    def tied_to_length(self, before: int, taken: int) -> list[str]:
        """Settings by which steps depend on `num_steps`: the first `taken` of `before` would have been others here."""
        schedule, decay = self.optim.schedule, self.optim.final_weight_decay
        tied = [] if schedule == "constant" else [f"optim.schedule {schedule}"]
        return tied if decay is None else [*tied, f"optim.final_weight_decay {decay}"]


@dataclass(frozen=True, kw_only=True)
class PriorSampling:
    """How previews are drawn, and the defaults the saved pipeline carries."""

    guidance: str = "linear:1:2.5"
    """Guidance: a number, or linear:START:END or cosine:START:END over the scales (or tokens). 1 is off."""
    top_k: int | None = None
    """Keep the k likeliest codes."""
    top_p: float | None = 0.96
    """Keep the likeliest codes that hold this probability together."""
    temperature: float | tuple[float, ...] = 1.0
    """Divides the logits; of a next-scale model also one number per scale."""
    smooth: bool | str = False
    """True mixes codes instead of drawing one: softer images (next-scale models). FIRST-LAST (scales, from 0) does so
    there alone, with :unfiltered behind it before any filter."""

    @classmethod
    def of(cls, options: SamplingOptions) -> "PriorSampling":
        """The defaults of a saved model."""
        values = dict(vars(options))
        smooth = options.smooth if isinstance(options.smooth, bool) else smooth_text(options.smooth)
        return cls(guidance=guidance_text(values.pop("guidance_scale")), **{**values, "smooth": smooth})

    def options(self) -> SamplingOptions:
        """What a pipeline reads. Raises UserError for guidance or smoothing that cannot be read."""
        values = dict(vars(self))
        smooth = self.smooth if isinstance(self.smooth, bool) else parse_smooth(self.smooth)
        return SamplingOptions(guidance_scale=parse_guidance(values.pop("guidance")), **{**values, "smooth": smooth})


@dataclass(frozen=True, kw_only=True)
class PerceptualLoss:
    """What the losses of all tokenizers share."""

    perceptual: float = 0.0
    """Distance of frozen features."""
    perceptual_network: Literal["lite0", "lpips"] = "lite0"
    """EfficientNet-Lite0 (comes with Isthmus) or LPIPS on VGG16 (needs lpips_weights)."""
    lpips_weights: tuple[Path, ...] = ()
    """LPIPS only: files that hold the VGG16 weights and the linear heads."""

    def __post_init__(self):
        must("not be negative", self, "perceptual")
        if (self.perceptual_network == "lpips") != bool(self.lpips_weights):
            raise UserError(
                f"loss.lpips_weights go with loss.perceptual_network lpips, got {len(self.lpips_weights)} files with "
                f"{self.perceptual_network}. Pass both or neither."
            )


@dataclass(frozen=True, kw_only=True)
class ImagesRun(Run):
    """What the trainings of all tokenizers share: images, and a codebook that is cared for."""

    freeze_encoder: bool = False
    """Train only what decodes (with --from): token ids stay what they were."""
    continuous_steps: int = 100
    """First steps of a new tokenizer without quantisation; its codebook then starts from encoder outputs (0:
    from those of the first step; D-AR: at random). One that goes on from a model (--from) has its codebook."""
    revive_every: int = 100
    """Steps between revivals of codes that nothing uses; 0 leaves them dead."""
    usage_warning: float = 0.2
    """Share of codes in use under which a warning is printed."""

    def __post_init__(self):
        super().__post_init__()
        must("not be negative", self, "continuous_steps", "revive_every")
        must("lie in [0, 1]", self, "usage_warning")
        if self.max_images is not None and (self.stream or self.data.partition(":")[0] != "avatars"):
            what = "a stream" if self.stream else self.data
            raise UserError(
                f"a tokenizer trains on all images there are, but for the number of avatars, got {self.max_images} for "
                f"{what}. Leave out --max-images."
            )
        if self.freeze_encoder and not self.from_model:
            raise UserError("freeze_encoder needs a trained encoder, got no model. Pass --from MODEL.")

    def revives_at(self, step: int) -> bool:
        """Whether unused codes move after this step; not at the end, since a code that has moved needs to settle."""
        late = step > 0.8 * self.num_steps
        return bool(self.revive_every) and step % self.revive_every == 0 and not (self.freeze_encoder or late)

    def tied_to_length(self, before: int, taken: int) -> list[str]:
        """Also the end of revival, which is a share of the steps."""
        tied, other = super().tied_to_length(before, taken), replace(self, num_steps=before)
        if any(self.revives_at(step) != other.revives_at(step) for step in range(1, taken + 1)):
            tied.append(f"revive_every {self.revive_every}")
        return tied


@dataclass(frozen=True, kw_only=True)
class TokensRun(Run):
    """What the trainings of all priors share: a frozen tokenizer, whose tokens are cached."""

    tokenizer: str = ""
    """Folder of the trained tokenizer (a run of `isthmus train tokenizer`, or any pipeline); with --from its own."""
    num_views: int = 8
    """Augmented views per image in the token cache; of avatars, which do not move, there is one."""
    token_cache: Path | None = None
    """Folder of the token cache; runs of one tokenizer, data set and seed may share it. None is `tokens` in --out."""
    label_dropout: float = 0.1
    """Share of labels replaced by the null label, for guidance."""
    checkpoint_activations: bool = False
    """Recompute activations in the backward pass, for memory."""
    parallel: Literal["ddp", "fsdp2"] = "ddp"
    """How several processes share the model: a copy each, or shards (GPUs)."""
    sampling: PriorSampling = field(default_factory=PriorSampling)
    """Previews and saved defaults."""

    def __post_init__(self):
        super().__post_init__()
        object.__setattr__(self, "tokenizer", str(self.tokenizer))
        if self.token_cache is not None:
            object.__setattr__(self, "token_cache", Path(self.token_cache))
        must("be positive", self, "num_views")
        if self.stream and self.max_images is None:
            raise UserError("a stream has no end, so its token cache needs one. Pass --max-images NUMBER.")
        must("lie in [0, 1]", self, "label_dropout")
        if self.from_model and self.tokenizer:
            raise UserError(
                f"a model to start from brings its own tokenizer, got --tokenizer {self.tokenizer} as well. "
                "Leave it out."
            )


SMALL = "small"


@dataclass(frozen=True, kw_only=True)
class CaptionsConfig(arguments_of("isthmus.text.tokenizer:TextTokenizer", ["max_length"])):
    """Captions and their words, of priors of both families; None takes the default, or with --from the model's."""

    encoder: str = ""
    """What reads captions."""
    num_words: int | None = None
    """small: words of the vocabulary that is learned from the training captions; None is 2000."""
    drop: float = 0.1
    """Share of captions replaced by the empty one, for guidance."""

    def __post_init__(self):
        must("lie in [0, 1]", self, "drop")
        if self.max_length is not None and self.max_length < 3:
            raise UserError(f"text.max_length must be at least 3, got {self.max_length}.")
        if self.num_words is not None and self.num_words < 256:
            raise UserError(f"text.num_words must be at least 256, one for each byte, got {self.num_words}.")

    def check_read(self, from_model: str) -> None:
        """Raise UserError for settings of a new run that reads no captions."""
        if not self.encoder and not from_model and self != type(self)():
            raise UserError("settings of text belong to a run that reads captions, got no encoder. Pass --text small.")


@dataclass(frozen=True, kw_only=True)
class TextConfig(
    CaptionsConfig, arguments_of("isthmus.text.encoders:SmallTextEncoder", ["width", "num_layers", "num_heads"])
):
    """Captions in the place of classes, and what reads them; None takes the default, or with --from the model's."""

    encoder: str = ""
    """small: an encoder that is trained together with the prior. A folder of a text encoder of transformers (T5, CLIP,
    BERT), or of one that a model was saved with: it stays frozen. Empty reads no captions, or with --from a model of
    texts goes on with its encoder."""
    cross_attention: bool | None = None
    """Whether every block looks at the words, or the prior knows the vector of the whole caption alone; None is yes."""

    def __post_init__(self):
        super().__post_init__()
        must("be positive", self, "width", "num_heads")
        must("not be negative", self, "num_layers")
        if self.encoder not in ("", SMALL):
            for name in ("width", "num_layers", "num_heads", "num_words"):
                if (value := getattr(self, name)) is not None:
                    raise UserError(
                        f"text.{name} is of the small encoder, got {value} with {self.encoder}. Leave it out."
                    )


AnyRun = TypeVar("AnyRun", bound=Run)


def run_to_json(run: Run) -> dict[str, Any]:
    """Plain values of a run, for run.json; fields that came later are left out at their defaults, as of before."""
    return json.loads(json.dumps(_without_later(run), default=str))


def _without_later(config: Any) -> dict[str, Any]:
    """Values by name, without fields that came later and stand at their defaults."""
    values = {}
    for one in fields(config):
        value = getattr(config, one.name)
        default = one.default if one.default_factory is MISSING else one.default_factory()
        if not (one.metadata.get("later") and value == default):
            values[one.name] = _without_later(value) if is_dataclass(value) else value
    return values


def run_from_json(kind: type[AnyRun], values: dict[str, Any]) -> AnyRun:
    """The run that `run_to_json` wrote. Raises UserError for a field of another version or kind of run."""
    return _from_plain(kind, values, "")


def _from_plain(kind: type[Any], values: dict[str, Any], prefix: str) -> Any:
    hints = get_type_hints(kind)
    unknown = sorted(set(values) - set(hints))
    if unknown:
        raise UserError(
            f"{kind.__name__} has no field {prefix + unknown[0]}.{nearest(unknown[0], hints)} Pass the run.json of "
            "such a run, of this version."
        )
    made = {}
    for name, value in values.items():
        hint = hints[name]
        if isinstance(hint, type) and is_dataclass(hint):
            value = _from_plain(hint, value, f"{prefix}{name}.")
        elif isinstance(value, list):  # JSON has no tuples
            value = tuple(Path(v) if "Path" in str(hint) else v for v in value)
        elif hint is Path or (hint == Path | None and value is not None):
            value = Path(value)
        made[name] = value
    return kind(**made)


_RULES: dict[str, Callable[[Any], bool]] = {
    "be positive": lambda value: value > 0,
    "not be negative": lambda value: value >= 0,
    "lie in [0, 1]": lambda value: 0 <= value <= 1,
    "lie in [0, 1)": lambda value: 0 <= value < 1,
}


def must(rule: str, config: object, *names: str) -> None:
    """Raise `UserError` where a named field is given (not None) and breaks a rule of `_RULES`."""
    for name in names:
        value = getattr(config, name)
        if value is not None and not _RULES[rule](value):
            raise UserError(f"{name} must {rule}, got {value}.")


def read_run_record(path: Path) -> dict[str, Any]:
    """What a run.json holds, its settings under "run"; nothing where it is missing, or none of ours."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        return {**record, "run": dict(record["run"])}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


@contextmanager
def explaining_places(record: Path, settings: Mapping[str, Any]) -> Iterator[None]:
    """Where relative paths that came from a record lead nowhere, what is refused inside also says so.

    `settings` are those that are used: what they share with the record was read from it.
    """
    try:
        yield
    except UserError as error:
        recorded = read_run_record(record).get("run", {})
        lost = [
            f"{name} {place}"
            for name in ("data", "tokenizer", "from_model", "token_cache")
            if (place := settings.get(name)) and place == recorded.get(name) and _leads_nowhere(place, str(error))
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


IMAGENET_IMAGES = 1_281_167


@dataclass(frozen=True)
class Preset(Generic[AnyRun]):
    """A run to start from."""

    about: str
    run: AnyRun
    expected_params_millions: float | None = None
    """Parameters of the network, checked by a test; None where the model decides."""
    reported_fid: float | None = None
    """What its authors report, if anything."""
    source: str = ""
    """Where that figure comes from."""


def preset_run(presets: Mapping[str, Preset[AnyRun]], kind: str, name: str) -> AnyRun:
    """The run of the preset of that name. Raises `UserError` for an unknown name, with the nearest known ones."""
    if name not in presets:
        near = difflib.get_close_matches(name, presets, n=3, cutoff=0.3)
        hint = f"Did you mean {' or '.join(near)}?" if near else f"Known: {', '.join(presets)}."
        raise UserError(f"{kind} presets have no {name!r}. {hint}")
    return replace(presets[name].run, preset=name)

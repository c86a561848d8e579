"""Options of `isthmus study`, and what they resolve to. This file imports nothing heavy: the command line is derived
from it.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

from isthmus.dar.options import Solver
from isthmus.dar.runs import (
    DiffusionTokenizerRun,
    NextTokenPriorRun,
    diffusion_tokenizer_preset,
    next_token_prior_preset,
)
from isthmus.errors import UserError
from isthmus.next_scale.runs import DistillRun, PriorRun, TokenizerRun, distill_preset, prior_preset, tokenizer_preset
from isthmus.training.config import Run, TokensRun

BALANCE: Literal["data"] = "data"
"""Classes of samples: as often as in the data, whose mix the reference has. Another would be part of every distance."""


STUDIED = "avatars:gaze,moods,planets,stack"
"""Data of all studies: four styles of few parts that are told apart at 32 px. There is no end of them, so no model
copies them, and references are of any size."""
_OPENMOJI_CLASSES = ("face", "flag", "hand", "person")


@dataclass(frozen=True, kw_only=True)
class Amount:
    """Samples per model, and the shares of the presets' steps that are trained."""

    num: int
    tokenizer_steps: float = 1.0
    prior_steps: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Budget:
    """Tables that a budget fills (none are all), how many seeds, and how much of everything.

    `few` is for data sets that end: a prior of a thousand images has learned them by heart where one of avatars begins.
    None is for studies of avatars alone.
    """

    tables: tuple[str, ...] = ()
    seeds: int
    endless: Amount
    few: Amount | None = None


@dataclass(frozen=True, kw_only=True)
class StudySetting:
    """Everything that decides the results of a study, which fills in folders and seeds of the two runs.

    `seeds` are those of the trainings and of what is drawn, `num` samples per model and guidance, `guidances` those
    beside the prior's own, `threads` torch's on the CPU. `batch_size` images are drawn at once; None: what fits.
    """

    tokenizer: Run
    prior: TokensRun
    seeds: tuple[int, ...]
    num: int
    guidances: tuple[str, ...]
    batch_size: int | None = None
    device: str = "cpu"
    threads: int = 1

    @property
    def own_guidance(self) -> str:
        """The guidance that priors are saved with."""
        return self.prior.sampling.guidance

    @property
    def seed_words(self) -> str:
        """In a sentence."""
        return ", ".join(map(str, self.seeds))


@dataclass(frozen=True, kw_only=True)
class StudyOptions(ABC):
    """Scripted experiments at equal data, parameters, steps and seeds, with a report. The same command goes on."""

    budgets: ClassVar[Mapping[str, Budget]]

    budget: Literal["quick", "full"] = "quick"
    """quick: some of the tables (srdd: 12 minutes of one core with bf16 products at --num 1000); full: all, with more
    seeds and steps, in hours."""
    seeds: int | None = None
    """Trainings of every model, with seeds 0, 1, ...; None is 1 for quick and 5 (text: 3) for full."""
    out: Path | None = None
    """Folder of everything; None is named after the study and the budget."""
    tables: tuple[str, ...] = ()
    """Tables to fill, by name; none given: those of the budget."""
    data: str = STUDIED
    """As for `isthmus train`: avatars[:STYLE,...], emoji, openmoji, photos, folder:PATH, npz:PATH, hf:NAME[:SPLIT]."""
    classes: tuple[str, ...] = ()
    """Classes of the data set, or `all`; none given: all, but of openmoji face, flag, hand and person."""
    num: int | None = None
    """Samples per model and setting; None is the budget's, 5000 in full on avatars."""
    batch_size: int | None = None
    """Images drawn at once; None estimates what fits into memory."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where everything runs."""
    threads: int | None = None
    """Threads of torch on the CPU; None leaves its default."""

    def __post_init__(self):
        for name in ("seeds", "num", "batch_size", "threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"--{name.replace('_', '-')} must be at least 1, got {value}.")
        if self.num is not None and self.num < 2:
            raise UserError(f"--num must be at least 2 (a distance compares sets), got {self.num}.")

    @property
    def bought(self) -> Budget:
        """By `budget`."""
        return self.budgets[self.budget]

    @property
    def chosen_classes(self) -> tuple[str, ...] | None:
        """Names of the classes; None is all of them.

        >>> DarStudyOptions().chosen_classes, DarStudyOptions(data="openmoji").chosen_classes
        (None, ('face', 'flag', 'hand', 'person'))
        """
        classes = tuple(self.classes) or (_OPENMOJI_CLASSES if self.data == "openmoji" else ("all",))
        return None if classes == ("all",) else classes

    @property
    def amount(self) -> Amount:
        """What the budget buys of these data."""
        few = None if self.data.partition(":")[0] == "avatars" else self.bought.few
        return few or self.bought.endless

    def tables_among(self, known: tuple[str, ...]) -> tuple[str, ...]:
        """Tables to fill, in the order of the report. Raises `UserError` for an unknown name.

        >>> DarStudyOptions(tables=("order", "solvers")).tables_among(("solvers", "guidance", "order"))
        ('solvers', 'order')
        """
        unknown = [name for name in self.tables if name not in known]
        if unknown:
            raise UserError(f"--tables takes names of {', '.join(known)}, got {unknown[0]}.")
        return tuple(name for name in known if name in (self.tables or self.bought.tables or known))

    @abstractmethod
    def setting(self, device: str, threads: int) -> StudySetting:
        """What the options resolve to on a device ("cpu", "cuda"). Raises `UserError` for unknown presets."""

    def _shared(self, device: str, threads: int) -> dict[str, Any]:
        return {
            "seeds": tuple(range(self.seeds or self.bought.seeds)),
            "num": self.num or self.amount.num,
            "batch_size": self.batch_size,
            "device": device,
            "threads": threads,
        }


@dataclass(frozen=True, kw_only=True)
class DarSetting(StudySetting):
    """Everything that decides the results of a study of D-AR, with rules and numbers of solver steps."""

    tokenizer: DiffusionTokenizerRun
    prior: NextTokenPriorRun
    # off, the paper's constant and its linear schedule
    guidances: tuple[str, ...] = ("1", "1.5", "linear:1.1:8")
    solvers: tuple[Solver, ...] = ("euler", "adams-bashforth", "adams-bashforth-variable")
    solver_steps: tuple[int, ...] = (4, 8, 16)


@dataclass(frozen=True, kw_only=True)
class DarStudyOptions(StudyOptions):
    """Reconstruction by number of tokens, previews, solvers, guidance schedules and the order of the tokens of D-AR.

    quick trains one tokenizer and prior and fills some tables; full trains five of each and fills all. The same command
    goes on where it was stopped.
    """

    budgets = {
        "quick": Budget(
            tables=("reconstruction", "solvers", "guidance", "order"),
            seeds=1,
            endless=Amount(num=2000),
            # few samples for guidance: the table costs a minute and a half beside the trainings
            few=Amount(num=100, tokenizer_steps=0.75, prior_steps=0.5),
        ),
        "full": Budget(
            seeds=5,
            endless=Amount(num=5000, tokenizer_steps=2.0, prior_steps=2.0),
            # n of the reference: with several seeds, their spread says more than a second chunk of each
            few=Amount(num=529),
        ),
    }

    preset_tokenizer: str = "dar-small-32"
    """Preset of the tokenizer (`isthmus info presets`); bigger ones are for GPUs."""
    preset_prior: str = "dar-prior-small"
    """Preset of the prior."""

    def setting(self, device: str, threads: int) -> DarSetting:
        """What the options resolve to on a device ("cpu", "cuda"). Raises `UserError` for unknown presets."""
        images = {"data": self.data, "classes": self.chosen_classes}
        tokenizer = diffusion_tokenizer_preset(self.preset_tokenizer)
        prior = next_token_prior_preset(self.preset_prior)
        return DarSetting(
            tokenizer=replace(
                tokenizer,
                num_steps=round(tokenizer.num_steps * self.amount.tokenizer_steps),
                continuous_steps=round(tokenizer.continuous_steps * self.amount.tokenizer_steps),
                **images,
            ),
            prior=replace(prior, num_steps=round(prior.num_steps * self.amount.prior_steps), **images),
            **self._shared(device, threads),
        )


@dataclass(frozen=True, kw_only=True)
class SrddSetting(StudySetting):
    """Everything that decides the results of a study of SRDD.

    All students share the run `student`, in which the study fills in teacher, scales and seed; `rounds` are of timing.
    """

    tokenizer: TokenizerRun
    prior: PriorRun
    student: DistillRun
    # constant ones
    guidances: tuple[str, ...] = ("1", "1.5", "2", "3", "5")
    rounds: int = 9


@dataclass(frozen=True, kw_only=True)
class SrddStudyOptions(StudyOptions):
    """Masks, guidance, scale schedules, loss weights, signal-to-noise ratio, refinement, distillation and editing.

    Every comparison has equal data, parameters, steps and seeds. quick trains one seed and fills some tables; full
    trains five and fills all. The same command goes on where it was stopped.
    """

    # the prior of the comparisons is trained longer where there is time: short trainings favour no side for sure
    budgets = {
        "quick": Budget(
            tables=("masks", "guidance", "snr"),
            seeds=1,
            endless=Amount(num=2000),
            # three trainings are four fifths of its quarter of an hour
            few=Amount(num=500, tokenizer_steps=0.75, prior_steps=2 / 3),
        ),
        "full": Budget(
            seeds=5,
            endless=Amount(num=5000, tokenizer_steps=2.0, prior_steps=3.0),
            few=Amount(num=529, prior_steps=1.5),
        ),
    }

    preset_tokenizer: str = "small-32"
    """Preset of the tokenizer (`isthmus info presets`); bigger ones are for GPUs."""
    preset_prior: str = "srdd-small"
    """Preset of the prior; its mask and its loss weights are what the study varies."""
    preset_student: str = "distill-small"
    """Preset of the students that learn a shorter schedule."""

    def setting(self, device: str, threads: int) -> SrddSetting:
        """What the options resolve to on a device ("cpu", "cuda"). Raises `UserError` for unknown presets."""
        images = {"data": self.data, "classes": self.chosen_classes}
        tokenizer, prior = tokenizer_preset(self.preset_tokenizer), prior_preset(self.preset_prior)
        longer = self.amount.prior_steps
        return SrddSetting(
            tokenizer=replace(tokenizer, num_steps=round(tokenizer.num_steps * self.amount.tokenizer_steps), **images),
            prior=replace(
                prior,
                num_steps=round(prior.num_steps * longer),
                validate_every=max(round(prior.validate_every * longer), 1),
                scale_loss="token-uniform",
                **images,
            ),
            # a student sees the images that its teacher saw, and draws as it does
            student=replace(
                distill_preset(self.preset_student),
                num_views=prior.num_views,
                augment=prior.augment,
                sampling=prior.sampling,
                baseline=False,  # the student without a teacher is an experiment of its own
                **images,
            ),
            **self._shared(device, threads),
        )


@dataclass(frozen=True, kw_only=True)
class TextSetting(StudySetting):
    """Everything that decides the results of a study of words.

    `arms` are names of those of `isthmus.studies.text`, `text_encoder` the folder of the frozen encoder of one of them,
    `dar_tokenizer` and `dar_prior` are those of the Llama, `num_classes` the styles that the arm of classes knows;
    `rounds` are of timing.
    """

    tokenizer: TokenizerRun
    prior: PriorRun
    dar_tokenizer: DiffusionTokenizerRun
    dar_prior: NextTokenPriorRun
    arms: tuple[str, ...]
    num_classes: int
    text_encoder: str = ""
    # the prior's own alone
    guidances: tuple[str, ...] = ()
    rounds: int = 9


@dataclass(frozen=True, kw_only=True)
class TextStudyOptions(StudyOptions):
    """Ways to tell a prior of words: the class alone, the mean of the words, an encoder, cross-attention, rotary
    positions, a frozen encoder, words before a Llama's tokens; at equal data, parameters, steps and seeds.

    What is drawn is read back: attributes, and pairs of them that no training image has. quick trains one seed of three
    ways; full trains three of all. The same command goes on where it was stopped.
    """

    budgets = {
        # before a thousand steps a prior knows little more of its words than the style
        "quick": Budget(seeds=1, endless=Amount(num=1000, prior_steps=10 / 3)),
        "full": Budget(seeds=3, endless=Amount(num=2000, tokenizer_steps=2.0, prior_steps=6.0)),
    }
    data: str = "avatars:gaze,moods"
    """avatars[:STYLE,...]; of few styles a small prior learns the words sooner."""

    _ARMS: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "quick": ("class", "pooled", "cross"),
        "full": ("class", "bag", "pooled", "cross", "rotary", "prefix"),
    }

    preset_tokenizer: str = "small-32"
    """Preset of the tokenizer (`isthmus info presets`); bigger ones are for GPUs."""
    preset_prior: str = "srdd-small"
    """Preset of the prior; what it is told of words is what the study varies."""
    preset_dar_tokenizer: str = "dar-small-32"
    """Preset of the tokenizer of the Llama (full)."""
    preset_dar_prior: str = "dar-prior-small"
    """Preset of the Llama; it takes the steps and batches of the other priors."""
    text_encoder: Path | None = None
    """Folder of a frozen text encoder of transformers (BERT, T5 or CLIP), such as MiniLM: one more row, whatever the
    budget. None leaves that row out."""

    def __post_init__(self):
        super().__post_init__()
        if self.data.partition(":")[0] != "avatars":
            raise UserError(
                f"a study of words reads what drawings show, which is known of avatars alone, got {self.data}. Pass "
                "--data avatars[:STYLE,...]."
            )
        if self.text_encoder is not None and not self.text_encoder.expanduser().is_dir():
            raise UserError(f"--text-encoder must be the folder of a text encoder, got {self.text_encoder}.")

    def setting(self, device: str, threads: int) -> TextSetting:
        """What the options resolve to on a device ("cpu", "cuda"). Raises `UserError` for unknown presets or styles."""
        # not at the top of the file: it loads numpy, which no help needs
        from isthmus.data.opening import class_names
        from isthmus.data.source import choose_classes

        images = {"data": self.data, "classes": self.chosen_classes}
        styles = choose_classes(class_names(self.data, image_size=32), self.chosen_classes, source=self.data)
        tokenizer, prior = tokenizer_preset(self.preset_tokenizer), prior_preset(self.preset_prior)
        dar_tokenizer, longer = diffusion_tokenizer_preset(self.preset_dar_tokenizer), self.amount.prior_steps
        frozen = () if self.text_encoder is None else ("frozen",)
        prior = replace(
            prior,
            num_steps=round(prior.num_steps * longer),
            validate_every=max(round(prior.validate_every * longer), 1),
            **images,
        )
        alike = ("num_steps", "batch_size", "validate_every", "data", "classes")
        return TextSetting(
            tokenizer=replace(tokenizer, num_steps=round(tokenizer.num_steps * self.amount.tokenizer_steps), **images),
            prior=prior,
            dar_tokenizer=replace(
                dar_tokenizer,
                num_steps=round(dar_tokenizer.num_steps * self.amount.tokenizer_steps),
                continuous_steps=round(dar_tokenizer.continuous_steps * self.amount.tokenizer_steps),
                **images,
            ),
            dar_prior=replace(
                next_token_prior_preset(self.preset_dar_prior), **{name: getattr(prior, name) for name in alike}
            ),
            arms=self._ARMS[self.budget] + frozen,
            num_classes=len(styles),
            text_encoder="" if self.text_encoder is None else str(self.text_encoder.expanduser()),
            **self._shared(device, threads),
        )

"""The experiments of the study of SRDD: which models are trained, drawn from and timed, and how."""

import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from isthmus.data.batches import CachedTokens, EvaluationImages, training_batches
from isthmus.data.opening import open_source
from isthmus.data.source import WantedColumns
from isthmus.data.token_cache import TokenCache
from isthmus.evaluation.features import sample_features
from isthmus.evaluation.guards import pixel_digest
from isthmus.evaluation.record import timing_words
from isthmus.next_scale.canvas import fill_unknown
from isthmus.next_scale.likelihood import signal_to_noise
from isthmus.next_scale.pipeline import NextScalePipeline, NextScalePipelineOutput
from isthmus.next_scale.refinement import ScaleRefinementScheduler
from isthmus.next_scale.runs import DistillRun, PriorRun
from isthmus.next_scale.tokenizer import MultiScaleVQVAE
from isthmus.next_scale.train_prior import NextScalePriorTask
from isthmus.next_scale.train_tokenizer import load_tokenizer
from isthmus.nn.component_files import read_config
from isthmus.nn.shapes import Images
from isthmus.pictures import to_uint8
from isthmus.pipelines.labels import Label
from isthmus.pipelines.loading import choose_device, load_pipeline
from isthmus.samples import SampleRequest, draw, read
from isthmus.studies.experiments import Experiment, Values, Work
from isthmus.studies.measures import (
    BATCH,
    EvaluationSetting,
    HeldOut,
    SampleProtocol,
    evaluation_values,
    interleaved_seconds,
    mean_and_interval,
    peak_bytes,
)
from isthmus.studies.options import BALANCE, SrddSetting
from isthmus.training.config import Run, run_to_json
from isthmus.training.optim import adamw
from isthmus.training.run import column, last, read_log
from isthmus.training.saved_networks import TOKENIZER_FOLDER
from isthmus.training.train_prior import train_prior
from isthmus.training.train_tokenizer import train_tokenizer

MODES = ("none", "simple", "masked")
"""Ways to refine a draw."""

TAUGHT, UNTAUGHT = "taught", "untaught"
WEIGHTS = {TAUGHT: 1.0, UNTAUGHT: 0.0}
"""`distillation_weight` of both students, which start from the same weights of the teacher."""

DRAWING = "drawing"
"""The experiment that times draws of teacher and student."""

HOLES = ("centre", "random")
FACTORS = (2, 4)
HOLE_PSNR = "PSNR in the hole, dB"
"""Edits: kinds of holes, factors of super-resolution, and what is measured of both."""


def jump_words(number: int) -> str:
    """How often scales were drawn again, for the name of a row.

    >>> jump_words(0), jump_words(1), jump_words(2)
    ('drawn', 'drawn, 1 jump', 'drawn, 2 jumps')
    """
    return "drawn" if not number else f"drawn, {number} jump{'s' if number > 1 else ''}"


TOKENIZER, SHORT_TOKENIZER, SNR = "tokenizer", "tokenizer-short", "snr"


@dataclass(frozen=True)
class Variant:
    """A prior that differs from the others in one thing.

    Attributes:
        name: of its experiments.
        mask: of the attention between scales.
        scale_loss: weights of the scales in the loss.
        tokenizer: whose scales it predicts.
        refines: whether it is trained for refinement too.
    """

    name: str
    mask: Literal["causal", "markov"] = "markov"
    scale_loss: Literal["token-uniform", "lognormal"] = "token-uniform"
    tokenizer: str = TOKENIZER
    refines: bool = False


MARKOV = Variant("markov")
CAUSAL = Variant("causal", mask="causal")
SHORT = Variant("short", tokenizer=SHORT_TOKENIZER)
LOGNORMAL = Variant("lognormal", scale_loss="lognormal")
REFINING = Variant("refining", refines=True)
VARIANTS = {variant.name: variant for variant in (MARKOV, CAUSAL, SHORT, LOGNORMAL, REFINING)}


def every_second(scale_sizes: Sequence[int]) -> tuple[int, ...]:
    """Every second scale from the first on, and the last: what the paper's ten scales become when six are left.

    >>> every_second((1, 2, 3, 4, 5, 6, 8, 10, 13, 16)), every_second((1, 2, 3, 4, 6, 8))
    ((1, 3, 5, 8, 13, 16), (1, 3, 6, 8))
    """
    kept = tuple(scale_sizes[::2])
    return kept if kept[-1] == scale_sizes[-1] else (*kept, scale_sizes[-1])


def prior_run(setting: SrddSetting, variant: Variant, seed: int) -> PriorRun:
    """The run of a variant; where it goes and its tokenizer's folder are not said yet."""
    return replace(
        setting.prior,
        seed=seed,
        scale_loss=variant.scale_loss,
        refinement_probability=setting.refinement_probability if variant.refines else 0.0,
        model=replace(setting.prior.model, scale_attention=variant.mask),
    )


def tokenizer_experiment(setting: SrddSetting) -> Experiment:
    """The one tokenizer that all priors share."""
    return Experiment(name=TOKENIZER, kind="tokenizer", settings={"run": _run(setting.tokenizer)}, seconds=300)


def priors(setting: SrddSetting, variants: Iterable[Variant]) -> Iterator[Experiment]:
    """Tokenizers, then every variant with every seed."""
    yield tokenizer_experiment(setting)
    for variant in variants:
        if variant.tokenizer == SHORT_TOKENIZER:
            yield Experiment(name=SHORT_TOKENIZER, kind="shortened", after=(TOKENIZER,), seconds=2)
        for seed in setting.seeds:
            run = _run(prior_run(setting, variant, seed))
            yield Experiment(
                name=f"prior-{variant.name}-seed{seed}",
                kind="prior",
                settings={"variant": variant.name, "seed": seed, "run": run},
                after=(variant.tokenizer,),
                seconds=0.45 * setting.prior.num_steps,
            )


def samples(setting: SrddSetting, variants: Iterable[Variant]) -> Iterator[Experiment]:
    """Every variant's evaluation at its own guidance, after its training."""
    variants = list(variants)
    yield from priors(setting, variants)
    for variant in variants:
        yield from _evaluations(setting, variant, "samples", (setting.prior.sampling.guidance,))


def sweeps(setting: SrddSetting, variants: Iterable[Variant]) -> Iterator[Experiment]:
    """Every variant at every guidance of the sweep, and at its own."""
    variants = list(variants)
    yield from samples(setting, variants)
    for variant in variants:
        yield from _evaluations(setting, variant, "sweep", setting.guidances)


def cost(setting: SrddSetting, variants: Iterable[Variant]) -> Experiment:
    """Time and memory of variants against each other, at the first seed; times are those of one device and threads."""
    names = [variant.name for variant in variants]
    seed = setting.seeds[0]
    return Experiment(
        name=f"cost-{'-'.join(names)}",
        kind="cost",
        settings={
            "variants": names,
            "seed": seed,
            "rounds": setting.rounds,
            "device": setting.device,
            "threads": setting.threads,
        },
        after=tuple(f"prior-{name}-seed{seed}" for name in names),
        seconds=40,
    )


def snr(setting: SrddSetting) -> Iterator[Experiment]:
    """The signal-to-noise ratio of held-out images, which needs a tokenizer alone."""
    yield tokenizer_experiment(setting)
    yield Experiment(name=SNR, kind="snr", after=(TOKENIZER,), seconds=5)


def refinements(setting: SrddSetting, variants: Iterable[Variant]) -> Iterator[Experiment]:
    """Every variant's draws in every mode of refinement."""
    variants = list(variants)
    yield from samples(setting, (MARKOV,))
    yield from priors(setting, variants)
    for variant in variants:
        for seed in setting.seeds:
            yield Experiment(
                name=f"refined-{variant.name}-seed{seed}",
                kind="refined",
                settings={
                    "variant": variant.name,
                    "seed": seed,
                    "num": setting.num,
                    "balance": BALANCE,
                    "modes": list(MODES),
                },
                after=(f"prior-{variant.name}-seed{seed}",),
                seconds=15 + 0.03 * setting.num * len(MODES),
            )


def distillations(setting: SrddSetting) -> Iterator[Experiment]:
    """Students of the Markov model, with and without its word, their samples and the time of a draw."""
    yield from samples(setting, (MARKOV,))
    for seed in setting.seeds:
        teacher, students = f"prior-{MARKOV.name}-seed{seed}", []
        for kind, weight in WEIGHTS.items():
            student = f"student-{kind}-seed{seed}"
            students.append(student)
            yield Experiment(
                name=student,
                kind="student",
                settings={"seed": seed, "weight": weight, "run": _run(replace(setting.student, seed=seed))},
                after=(teacher,),
                seconds=0.5 * setting.student.num_steps,
            )
            yield Experiment(
                name=f"samples-{student}",
                kind="student-samples",
                settings={
                    "student": student,
                    "seed": seed,
                    "num": setting.num,
                    "balance": BALANCE,
                    "guidances": [own_guidance(setting)],
                },
                after=(student,),
                seconds=25 + 0.03 * setting.num,
            )
    yield Experiment(
        name=DRAWING,
        kind="drawing",
        settings={"seed": setting.seeds[0], "device": setting.device, "threads": setting.threads},
        after=(f"prior-{MARKOV.name}-seed{setting.seeds[0]}", f"student-{TAUGHT}-seed{setting.seeds[0]}"),
        seconds=10,
    )


def edits(setting: SrddSetting, variants: Iterable[Variant]) -> Iterator[Experiment]:
    """Every variant's edits of held-out images."""
    variants = list(variants)
    yield from priors(setting, variants)
    for variant in variants:
        for seed in setting.seeds:
            yield Experiment(
                name=f"edits-{variant.name}-seed{seed}",
                kind="edits",
                settings={"variant": variant.name, "seed": seed, "jumps": list(setting.jumps)},
                after=(f"prior-{variant.name}-seed{seed}",),
                seconds=30,
            )


def own_guidance(setting: SrddSetting) -> str:
    """The guidance that the prior is saved with."""
    return setting.prior.sampling.guidance


def model_folder(folder: Path, experiment: str) -> Path:
    """Where a training writes its model."""
    return folder / experiment / "run"


def _evaluations(setting: SrddSetting, variant: Variant, kind: str, guidances: Sequence[str]) -> Iterator[Experiment]:
    for seed in setting.seeds:
        yield Experiment(
            name=f"{kind}-{variant.name}-seed{seed}",
            kind="evaluation",
            settings={
                "variant": variant.name,
                "seed": seed,
                "guidances": list(guidances),
                "num": setting.num,
                "balance": BALANCE,
            },
            after=(f"prior-{variant.name}-seed{seed}",),
            seconds=25 + 0.03 * setting.num * len(guidances),
        )


_FILLED_IN = ("out", "tokenizer", "token_cache", "from_model", "scale_sizes", "distillation_weight")


def _run(run: Run) -> dict[str, Any]:
    """A run without what the study fills in."""
    return {name: value for name, value in run_to_json(run).items() if name not in _FILLED_IN}


DRAWN_IMAGES = 16


def cost_values(runs: Mapping[str, PriorRun], device: torch.device, *, rounds: int) -> Values:
    """Seconds per training step and per image by round, and peak bytes of both, of trained runs.

    Models are timed in turn within a round, so that whatever else the machine does hits all of them.
    """
    steps = {name: training_step(run, device) for name, run in runs.items()}
    step_seconds = interleaved_seconds(steps, device, rounds=rounds)
    step_bytes = {name: peak_bytes(step, device) for name, step in steps.items()}
    del steps
    draws = {name: drawing(run, device) for name, run in runs.items()}
    draw_seconds = interleaved_seconds(draws, device, rounds=rounds)
    # without the pixel decoder, which is the same for all and would hide what the priors hold
    draw_bytes = {name: peak_bytes(drawing(run, device, pixels=False), device) for name, run in runs.items()}
    return {
        name: {
            "batch_size": run.batch_size,
            "step_seconds": step_seconds[name],
            "step_bytes": step_bytes[name],
            "drawn_at_once": DRAWN_IMAGES,
            "image_seconds": [seconds / DRAWN_IMAGES for seconds in draw_seconds[name]],
            "image_bytes": draw_bytes[name] / DRAWN_IMAGES,
            "timed_on": timing_words(device),
        }
        for name, run in runs.items()
    }


def training_step(run: PriorRun, device: torch.device) -> Callable[[], None]:
    """One optimizer step of a run, as its training does it, on a network that starts anew and one batch.

    Precision is float32, whatever the training uses on a GPU.
    """
    family = NextScalePriorTask(run)
    family.tokenizer.to(device)
    network = family.network.to(device).train()  # pyright: ignore[reportArgumentType]
    assert run.token_cache is not None, "the study shares its caches"
    cache = TokenCache.open(run.token_cache, family.tokenizer)
    tokens = CachedTokens(cache, seed=run.seed, balanced=family.train.balanced)
    batch = next(training_batches(tokens, batch_size=run.batch_size, num_workers=0))
    optimizer = adamw(network, run.optim)

    def step() -> None:
        family.losses(network, batch, 0).total.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), run.optim.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def drawing(run: PriorRun, device: torch.device, *, pixels: bool = True) -> Callable[[], None]:
    """Drawing `DRAWN_IMAGES` images at once at the guidance of the run; without `pixels`, their tokens and features."""
    pipeline = load_pipeline(str(run.out), device=device)
    assert isinstance(pipeline, NextScalePipeline), "the prior's run writes one"
    labels = [i % max(pipeline.num_classes, 1) if pipeline.num_classes else None for i in range(DRAWN_IMAGES)]

    def draw() -> None:
        pipeline(labels, seed=0, output_type="pt" if pixels else "latent")

    draw()  # warms up
    return draw


_HOLE_SEED = 1
_BOXES = 3


def holes(kind: str, count: int, side: int) -> Float[Tensor, "count 1 side side"]:
    """Masks, 1 in the hole: the central square of half the side, or three boxes of a sixth to a half of it anywhere.

    Mask i is the same whatever the model.
    """
    masks, generator = torch.zeros(count, 1, side, side), np.random.default_rng(_HOLE_SEED)
    for mask in masks:
        if kind == "centre":
            mask[:, side // 4 : 3 * side // 4, side // 4 : 3 * side // 4] = 1
            continue
        for _ in range(_BOXES):
            height, width = generator.integers(max(side // 6, 1), side // 2, 2)
            top, left = generator.integers(0, side - height), generator.integers(0, side - width)
            mask[:, top : top + height, left : left + width] = 1
    return masks


def psnr_inside(
    images: Float[Tensor, "b 3 h w"], originals: Float[Tensor, "b 3 h w"], masks: Float[Tensor, "b 1 h w"]
) -> Float[Tensor, " b"]:
    """PSNR in dB over the pixels under the mask alone; values in [-1, 1], so the peak is 2."""
    error = ((images - originals).square() * masks).sum(dim=(1, 2, 3)) / (3 * masks.sum(dim=(1, 2, 3)))
    return 10 * torch.log10(4 / error.clamp(min=1e-8))


def editing_values(pipeline: NextScalePipeline, held_out: HeldOut, *, jumps: Sequence[int], seed: int) -> Values:
    """Holes made anew under the images' own labels, and images made from small ones.

    Known pixels are put back without a seam, so that all that differs from the original lies in the hole. With the
    rows of the model stand those of methods that read no model: the hole painted over from around, bicubic enlargement.

    Returns:
        images; by_hole: kind -> row -> column -> value with the ends of its 95 % interval; by_factor: the same.
    """
    originals = torch.cat([images for _, images in held_out.batches()])
    side = originals.shape[-1]
    by_hole: dict[str, dict[str, Values]] = {}
    for kind in HOLES:
        masks = holes(kind, len(originals), side)
        rows = {"painted over": torch.where(masks > 0, fill_unknown(originals, masks), originals)}
        for number in jumps:
            rows[jump_words(number)] = _edited(
                held_out,
                lambda rows, labels, numbers, number=number, masks=masks: pipeline.inpaint(
                    originals[rows], masks[rows], labels, seed=seed, image_index=numbers, output_type="pt", seam_px=0,
                    jumps=number,
                ),
            )  # fmt: skip
        by_hole[kind] = {name: _compared(held_out, made, originals, masks) for name, made in rows.items()}
    by_factor: dict[str, dict[str, Values]] = {}
    whole = torch.ones_like(originals[:, :1])
    for factor in FACTORS:
        small = F.interpolate(originals, size=(side // factor,) * 2, mode="area")
        enlarged = F.interpolate(small, size=(side, side), mode="bicubic", align_corners=False).clamp(-1, 1)
        drawn = _edited(
            held_out,
            lambda rows, labels, numbers, small=small: pipeline.super_resolve(
                small[rows], labels, seed=seed, image_index=numbers, output_type="pt"
            ),
        )
        rows = {"bicubic": enlarged, "drawn": drawn}
        by_factor[str(factor)] = {name: _compared(held_out, made, originals, whole) for name, made in rows.items()}
    return {"images": len(held_out), "by_hole": by_hole, "by_factor": by_factor}


def _edited(held_out: HeldOut, edit: Callable[[slice, list[Label], list[int]], NextScalePipelineOutput]) -> Images:
    """All edits, in [-1, 1]; image i has number i, whatever the batch."""
    parts = []
    for start in range(0, len(held_out), BATCH):
        numbers = list(range(start, min(start + BATCH, len(held_out))))
        labels = [held_out.model_ids[i] for i in numbers]
        made = edit(slice(start, start + BATCH), labels, numbers)
        parts.append(torch.as_tensor(made.images).float() * 2 - 1)
    return torch.cat(parts)


def _compared(held_out: HeldOut, made: Images, originals: Images, masks: Float[Tensor, "b 1 h w"]) -> Values:
    pixels = to_uint8(made)
    inside = psnr_inside(torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1, originals, masks)
    found = held_out.compared(pixels)
    del found["PSNR, dB"]  # over all pixels, most of which are the original's own
    return {HOLE_PSNR: mean_and_interval(inside.double().numpy())} | found


def equal_schedulers(num_scales: int) -> Mapping[str, ScaleRefinementScheduler]:
    """No refinement, and every mode at one cost: a round at each of the second to fourth scales, or a jump over these.

    >>> schedulers = equal_schedulers(6)
    >>> schedulers["masked"].rounds_of(6), schedulers["simple"].rounds_of(6), schedulers["simple"].jump_scales
    ((0, 1, 1, 1, 0, 0), (0, 0, 0, 1, 0, 0), 3)
    """
    last = min(3, num_scales - 1)
    rounds = tuple(int(1 <= scale <= last) for scale in range(num_scales))
    jump = tuple(int(scale == last) for scale in range(num_scales))
    return {
        "none": ScaleRefinementScheduler(),
        "simple": ScaleRefinementScheduler(mode="simple", rounds=jump, jump_scales=last),
        "masked": ScaleRefinementScheduler(mode="masked", rounds=rounds),
    }


def refined_values(
    pipeline: NextScalePipeline, setting: EvaluationSetting, folder: Path, *, seed: int, modes: Sequence[str]
) -> Values:
    """Scores of samples that were drawn in each of `modes`, and the forwards of a draw; image i is the same request.

    The samples lie in a folder per mode; what was drawn earlier is used again.
    """
    protocol = SampleProtocol.of(pipeline, setting)
    schedulers = equal_schedulers(pipeline.schedule.num_scales)
    by_mode, forwards = {}, {}
    for mode in modes:
        pipeline.scheduler = schedulers[mode]
        labels, rule = protocol.classes.model_ids.tolist(), protocol.classes.rule
        request = SampleRequest.of(pipeline, labels, classes=rule, seed=seed)
        draw(pipeline, folder / mode, request, batch_size=setting.batch_size, title=mode)
        samples = read(folder / mode, len(request))
        cost = pipeline.forwards_per_image(request.sampling)
        assert cost is not None, "it is known of next-scale models"
        forwards[mode] = cost.most
        by_mode[mode] = protocol.scored(
            sample_features(protocol.real.network, samples), [pixel_digest(image) for image in samples]
        )
    return protocol.values("by_mode", by_mode) | {"forwards": forwards}


_TIMED_IMAGES, _ROUNDS = 8, 7


def load_next_scale(folder: Path, device: str) -> NextScalePipeline:
    """A model of the study."""
    pipeline = load_pipeline(str(folder), device=choose_device(device))
    assert isinstance(pipeline, NextScalePipeline), "the study trains no other models"
    return pipeline


def drawing_values(models: Mapping[str, NextScalePipeline], *, seed: int) -> Values:
    """Milliseconds of wall time per image, with what a draw consists of: medians over rounds that take turns."""
    rounds: dict[str, list[float]] = {name: [] for name in models}
    for turn in range(_ROUNDS + 1):
        for name, model in models.items():
            labels = [i % model.num_classes if model.num_classes else None for i in range(_TIMED_IMAGES)]
            start = time.perf_counter()
            model(labels, seed=seed, output_type="pil")  # pictures: the device is waited for
            if turn:  # the first warms up
                rounds[name].append(time.perf_counter() - start)
    device = next(iter(models.values())).device
    return {"timed_on": timing_words(device)} | {
        name: {
            "ms": 1e3 / _TIMED_IMAGES * statistics.median(rounds[name]),
            "scales": "-".join(map(str, model.schedule.sizes)),
            "tokens": model.schedule.num_tokens,
        }
        for name, model in models.items()
    }


def srdd_work(setting: SrddSetting, folder: Path) -> Mapping[str, Work]:
    """The function behind every kind of experiment."""
    evaluations = EvaluationSetting.of(
        setting.prior, num=setting.num, batch_size=setting.batch_size, device=setting.device
    )

    def tokenizer(experiment: Experiment) -> Values:
        run = replace(setting.tokenizer, out=model_folder(folder, experiment.name))
        train_tokenizer(run)
        log = read_log(run.out / "log.jsonl")
        sizes = load_tokenizer(str(run.out)).schedule.sizes
        return {"psnr": last(log, "val/psnr"), "usage": last(log, "val/usage"), "scale_sizes": list(sizes)}

    def shortened(experiment: Experiment) -> Values:
        return {"scale_sizes": shorten(model_folder(folder, TOKENIZER), model_folder(folder, experiment.name))}

    def prior(experiment: Experiment) -> Values:
        run = placed_run(setting, folder, experiment.settings["variant"], experiment.settings["seed"])
        train_prior(run)
        return training_values(run)

    def evaluation(experiment: Experiment) -> Values:
        facts = experiment.settings
        model = model_folder(folder, f"prior-{facts['variant']}-seed{facts['seed']}")
        place = folder / experiment.name / "evaluation"
        return evaluation_values(model, place, evaluations, seed=facts["seed"], guidances=facts["guidances"])

    def cost(experiment: Experiment) -> Values:
        facts = experiment.settings
        runs = {name: placed_run(setting, folder, name, facts["seed"]) for name in facts["variants"]}
        return cost_values(runs, choose_device(setting.device), rounds=facts["rounds"])

    def snr(experiment: Experiment) -> Values:
        tokenizer = load_tokenizer(str(model_folder(folder, TOKENIZER)))
        tokenizer.to(choose_device(setting.device))
        held_out = open_source(
            setting.prior.data,
            image_size=tokenizer.image_size,
            split="val",
            classes=setting.prior.classes,
            columns=WantedColumns(setting.prior.image_column, setting.prior.label_column),
        )
        ratios = snr_by_scale(tokenizer, EvaluationImages(held_out, tokenizer.image_size))
        return {
            "images": len(ratios),
            "scale_sizes": list(tokenizer.schedule.sizes),
            "decibels": [mean_and_interval(of_scale) for of_scale in ratios.T],
        }

    def refined(experiment: Experiment) -> Values:
        facts = experiment.settings
        model = model_folder(folder, f"prior-{facts['variant']}-seed{facts['seed']}")
        pipeline = load_next_scale(model, setting.device)
        place = folder / experiment.name / "samples"
        return refined_values(pipeline, evaluations, place, seed=facts["seed"], modes=facts["modes"])

    def student(experiment: Experiment) -> Values:
        facts = experiment.settings
        run = student_run(setting, folder, experiment.name, facts["seed"], facts["weight"])
        train_prior(run)
        return training_values(run)

    def student_samples(experiment: Experiment) -> Values:
        facts = experiment.settings
        model, place = model_folder(folder, facts["student"]), folder / experiment.name / "evaluation"
        return evaluation_values(model, place, evaluations, seed=facts["seed"], guidances=facts["guidances"])

    def drawing(experiment: Experiment) -> Values:
        seed = experiment.settings["seed"]
        names = {"teacher": f"prior-{MARKOV.name}-seed{seed}", "student": f"student-{TAUGHT}-seed{seed}"}
        models = {who: load_next_scale(model_folder(folder, name), setting.device) for who, name in names.items()}
        return drawing_values(models, seed=seed)

    def edits(experiment: Experiment) -> Values:
        facts = experiment.settings
        model = model_folder(folder, f"prior-{facts['variant']}-seed{facts['seed']}")
        pipeline = load_next_scale(model, setting.device)
        held_out = HeldOut.of(pipeline, evaluations)
        return editing_values(pipeline, held_out, jumps=facts["jumps"], seed=facts["seed"])

    return {
        "refined": refined,
        "student": student,
        "student-samples": student_samples,
        "drawing": drawing,
        "edits": edits,
        "tokenizer": tokenizer,
        "shortened": shortened,
        "prior": prior,
        "evaluation": evaluation,
        "cost": cost,
        "snr": snr,
    }


def placed_run(setting: SrddSetting, folder: Path, variant_name: str, seed: int) -> PriorRun:
    """A variant's run with its folders: the token cache is shared by all that read the same tokens."""
    variant = VARIANTS[variant_name]
    return replace(
        prior_run(setting, variant, seed),
        out=model_folder(folder, f"prior-{variant.name}-seed{seed}"),
        tokenizer=str(model_folder(folder, variant.tokenizer)),
        token_cache=folder / "token-caches" / f"{variant.tokenizer}-seed{seed}",
    )


def student_run(setting: SrddSetting, folder: Path, name: str, seed: int, weight: float) -> DistillRun:
    """A student's run with its teacher, scales and folder; its token cache is its own.

    That of a taught student also holds the tokens of the teacher's schedule.
    """
    teacher = model_folder(folder, f"prior-{MARKOV.name}-seed{seed}")
    sizes = read_config(teacher / "transformer")["scale_sizes"]
    return replace(
        setting.student,
        seed=seed,
        from_model=str(teacher),
        scale_sizes=every_second(sizes),
        distillation_weight=weight,
        out=model_folder(folder, name),
    )


def training_values(run: PriorRun | DistillRun) -> Values:
    """Held-out bits per token of a finished training, by step and at the end by scale."""
    log = read_log(run.out / "log.jsonl")
    steps, bits = column(log, "val/bits_per_token")
    by_scale: dict[str, Any] = {}
    while np.isfinite(value := last(log, f"val/bits_scale{len(by_scale)}")):
        by_scale[str(len(by_scale))] = value
    return {"steps": steps, "bits_per_token": bits, "bits_by_scale": list(by_scale.values())}


def shorten(source: Path, target: Path) -> list[int]:
    """Write the tokenizer of `source` with every second scale; returns the sides that are left.

    The weights are the same, and every side keeps its phi (`ScaleSchedule.derive`): the tokens of an image are those
    that the residual search finds on the shorter schedule.
    """
    parent = load_tokenizer(str(source))
    schedule = parent.schedule.derive(every_second(parent.schedule.sizes))
    arguments = {name: value for name, value in parent.config.items() if not name.startswith("_")}
    arguments |= {"scale_sizes": schedule.sizes, "phi_indices": schedule.phi_indices}
    tokenizer = MultiScaleVQVAE(**arguments)
    tokenizer.load_state_dict(parent.state_dict())
    tokenizer.save_pretrained(target / TOKENIZER_FOLDER)  # pyright: ignore[reportCallIssue]
    return list(schedule.sizes)


def snr_by_scale(tokenizer: MultiScaleVQVAE, images: EvaluationImages, *, batch_size: int = 32) -> np.ndarray:
    """Signal-to-noise ratios, dB, of every image (rows) after every scale (columns)."""
    rows = []
    for start in range(0, len(images), batch_size):
        chosen = range(start, min(start + batch_size, len(images)))
        pixels = torch.stack([torch.as_tensor(images[i]["image"]) for i in chosen]).to(tokenizer.device)
        with torch.no_grad():
            latents = tokenizer.latents(pixels)
        rows.append(signal_to_noise(tokenizer, latents).cpu().double())
    return torch.cat(rows).numpy()

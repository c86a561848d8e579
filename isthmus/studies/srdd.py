"""`isthmus study srdd`: the study, and what its models can do beside drawing: refinement, distillation, editing.

The tables of priors that are trained differently are in `srdd_priors.py`. Each table stands below the experiments that
it reads. Claims: Kumar, Nair and Patel, "Scale-Wise VAR is Secretly Discrete Diffusion".
"""

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from isthmus.evaluation.features import sample_features
from isthmus.evaluation.guards import pixel_digest
from isthmus.evaluation.held_out import LITE0, PSNR
from isthmus.evaluation.record import timing_words
from isthmus.next_scale.canvas import fill_unknown
from isthmus.next_scale.pipeline import NextScalePipeline, NextScalePipelineOutput
from isthmus.next_scale.refinement import ScaleRefinementScheduler
from isthmus.nn.component_files import read_config
from isthmus.nn.shapes import Images
from isthmus.pictures import to_uint8
from isthmus.pipelines.loading import choose_device
from isthmus.samples import SampleRequest, draw, read
from isthmus.studies.experiments import Experiment, Values
from isthmus.studies.measures import HeldOut, SampleScorer, evaluation, interleaved_seconds, mean_and_interval
from isthmus.studies.options import BALANCE, SrddSetting
from isthmus.studies.srdd_priors import (
    BITS,
    CAUSAL,
    IMAGE_TIME,
    MARKOV,
    PER_IMAGE,
    REFINING,
    SRDD,
    SrddFound,
    SrddLab,
    bits_per_image,
    drawing,
    equal,
    every_second,
    guidance,
    masks,
    on_priors,
    priors,
    samples,
    schedules,
    settings_of,
    snr,
    training_values,
    weighting,
)
from isthmus.studies.study import Study
from isthmus.studies.tables import FRECHET, Claim, Direction, Reading, Row, StudyTable, study_table
from isthmus.training.train_prior import train_prior

MODES = ("none", "simple", "masked")
"""Ways to refine a draw."""


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


def refined_samples(lab: SrddLab, experiment: Experiment) -> Values:
    """Scores of samples drawn in each mode, in a folder each, and the forwards of a draw; image i is one request."""
    pipeline: NextScalePipeline = lab.pipeline(experiment.after[0])
    scorer, drawn, forwards = SampleScorer(pipeline, lab), {}, {}
    schedulers, seed = equal_schedulers(pipeline.schedule.num_scales), experiment.settings["seed"]
    for mode in MODES:
        pipeline.scheduler = schedulers[mode]
        labels, rule = scorer.classes.model_ids.tolist(), scorer.classes.rule
        request, place = SampleRequest.of(pipeline, labels, classes=rule, seed=seed), lab.folder / experiment.name
        draw(pipeline, place / "samples" / mode, request, batch_size=lab.setting.batch_size, title=mode)
        images = read(place / "samples" / mode, len(request))
        forwards[mode] = pipeline.forwards_per_image(request.sampling).most
        drawn[mode] = sample_features(scorer.real.network, images), [pixel_digest(image) for image in images]
    return scorer.values("by_mode", drawn) | {"forwards": forwards}


def _refinements(setting: SrddSetting) -> Iterator[Experiment]:
    yield from samples(setting, MARKOV)
    yield from priors(setting, MARKOV, REFINING)
    yield from on_priors(
        setting, (MARKOV, REFINING), "refined", refined_samples, seconds=15 + 0.03 * setting.num * len(MODES),
        num=setting.num, balance=BALANCE, modes=list(MODES),
    )  # fmt: skip


@study_table("Refinement", _refinements)
def refinement(found: SrddFound) -> StudyTable:
    """No refinement, jumps and masked rounds, on a plain model and on one that was trained for it."""
    models = {"refined-markov": "", "refined-refining": " (trained for it)"}
    # floor and ceiling are those of the evaluation
    experiments, forwards = (*models, "samples-markov"), found.first("refined-markov", "forwards")
    rows = [
        found.sample_row(mode + suffix, model, "by_mode", mode, facts={"forwards": str(forwards[mode])})
        for model, suffix in models.items()
        for mode in MODES
    ]
    says = "resampling refines draws (the paper's figures are unknown)"
    return StudyTable(
        about=f"Draws of the Markov model as they are ({forwards['none']} forwards), and refined in two ways at "
        f"equal numbers of forwards ({forwards['masked']}): one round at each of the second to fourth scales, where "
        "the least likely 30 % of the tokens are drawn again (masked), or one jump back over these scales (simple). "
        "What refines is judged against the cheaper plain draw. "
        f"{equal(found.setting)} The second model differs in one thing: half of its training examples show some of "
        f"their own tokens. {found.protocol_words(*experiments)}",
        first_column="refinement",
        rows=(*rows, *found.real_rows("samples-markov")),
        claims=tuple(
            Claim(f"{mode.capitalize()} {says}", SRDD, mode + suffix, f"none{suffix}", FRECHET)
            for mode in MODES[1:]
            for suffix in models.values()
        ),
        notes=found.warnings(*experiments),
    )


TAUGHT, UNTAUGHT = "student-taught", "student-untaught"
WEIGHTS = {TAUGHT: 1.0, UNTAUGHT: 0.0}
"""`distillation_weight` of both students, which start from the same weights of the teacher."""


def _distillations(setting: SrddSetting) -> Iterator[Experiment]:
    yield from samples(setting, MARKOV)
    for seed in setting.seeds:
        for name, weight in WEIGHTS.items():
            run = settings_of(replace(setting.student, seed=seed))
            yield Experiment(
                name=f"{name}-seed{seed}",
                kind="student",
                work=trained_student,
                settings={"seed": seed, "weight": weight, "run": run},
                after=(f"prior-markov-seed{seed}",),
                seconds=0.5 * setting.student.num_steps,
            )
            yield Experiment(
                name=f"samples-{name}-seed{seed}",
                kind="student-samples",
                work=evaluation,
                settings={
                    "student": f"{name}-seed{seed}",
                    "seed": seed,
                    "num": setting.num,
                    "balance": BALANCE,
                    "guidances": [setting.own_guidance],
                },
                after=(f"{name}-seed{seed}",),
                seconds=25 + 0.03 * setting.num,
            )
    first = setting.seeds[0]
    yield Experiment(
        name="drawing",
        kind="drawing",
        work=timed_draws,
        settings={"seed": first, "device": setting.device, "threads": setting.threads},
        after=(f"prior-markov-seed{first}", f"{TAUGHT}-seed{first}"),
        seconds=10,
    )


def trained_student(lab: SrddLab, experiment: Experiment) -> Values:
    """Train a student; its token cache is its own, since that of a taught one holds the teacher's schedule too."""
    teacher = lab.run_folder(experiment.after[0])
    run = replace(
        lab.setting.student,
        seed=experiment.settings["seed"],
        from_model=str(teacher),
        scale_sizes=every_second(read_config(teacher / "transformer")["scale_sizes"]),
        distillation_weight=experiment.settings["weight"],
        out=lab.run_folder(experiment.name),
    )
    train_prior(run)
    return training_values(run)


_TIMED_IMAGES, _ROUNDS = 8, 7


def timed_draws(lab: SrddLab, experiment: Experiment) -> Values:
    """Milliseconds of wall time per image, with what a draw consists of: medians over rounds that take turns."""
    device = choose_device(lab.setting.device)
    models = dict(zip(("teacher", "student"), map(lab.pipeline, experiment.after), strict=True))
    draws = {name: drawing(model, _TIMED_IMAGES, "pil") for name, model in models.items()}
    seconds = interleaved_seconds(draws, device, rounds=_ROUNDS)
    return {"timed_on": timing_words(device)} | {
        name: {
            "ms": 1e3 / _TIMED_IMAGES * statistics.median(seconds[name]),
            "scales": "-".join(map(str, model.schedule.sizes)),
            "tokens": model.schedule.num_tokens,
        }
        for name, model in models.items()
    }


@study_table("Scale distillation", _distillations)
def distillation(found: SrddFound) -> StudyTable:
    """A student on every second scale, with and without its teacher."""
    setting, drawn = found.setting, found.results["drawing"]
    names = ("teacher, all scales", "student", "student without the teacher")
    experiments, rows = ("samples-markov", f"samples-{TAUGHT}", f"samples-{UNTAUGHT}"), []
    for name, experiment, who in zip(names, experiments, ("teacher", "student", "student"), strict=True):
        of_model = drawn[who]
        cells = {BITS: found.held_out_score(experiment, BITS), **bits_per_image(found, experiment)}
        if name != names[-1]:
            cells[IMAGE_TIME] = {0: Reading(of_model["ms"])}
        facts = {"scales": of_model["scales"], "tokens": str(of_model["tokens"])}
        rows.append(found.sample_row(name, experiment, facts=facts, cells=cells))
    near_optimal = "1-3-5-8-13-16 is near-optimal: fewer scales do not cost quality"
    helps = "Scales are removed by distillation: the teacher helps (the paper's figures are unknown)"
    likelihood = "The same, in the likelihood of held-out images under the short schedule"
    return StudyTable(
        about="Scale distillation of the Markov model: students on every second scale start from the teacher's "
        f"weights and are trained for {setting.student.num_steps} steps of {setting.student.batch_size} images, with "
        "what the teacher says (its rollouts, and its distribution where both know the state) or on the tokens of the "
        f"images alone. Seeds {setting.seed_words}, a teacher each. {found.protocol_words(*experiments)}"
        f" Times: {drawn['timed_on']}, eight images drawn at once with their own guidance, pixels included.",
        first_column="model",
        rows=(*rows, *found.real_rows("samples-markov")),
        claims=(
            Claim(near_optimal, SRDD, "student", "teacher, all scales", FRECHET),
            Claim(helps, SRDD, "student", "student without the teacher", FRECHET),
            Claim(likelihood, SRDD, "student", "student without the teacher", PER_IMAGE),
        ),
        notes=(
            "Bits per image of teacher and students are bits of different codes: only the students compare. The claim "
            "of near-optimality has no margin; only a difference beyond its interval decides.",
            *found.warnings(*experiments),
        ),
    )


HOLES, FACTORS = ("centre", "random"), (2, 4)
JUMPS = {0: "drawn", 1: "drawn, 1 jump"}
"""How often scales of an edit are drawn again, and the name of the row."""
HOLE_PSNR = "PSNR in the hole, dB"

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


def measured_edits(lab: SrddLab, experiment: Experiment) -> Values:
    """Holes made anew under the images' own labels, and images made from small ones.

    Known pixels are put back without a seam, so that all that differs from the original lies in the hole. With the
    rows of the model stand those of methods that read no model: the hole painted over from around, bicubic enlargement.
    by_hole and by_factor: kind -> row -> column -> value with the ends of its 95 % interval.
    """
    pipeline: NextScalePipeline = lab.pipeline(experiment.after[0])
    images, seed = HeldOut(pipeline, lab), experiment.settings["seed"]
    originals = torch.cat([batch for _, batch, _ in images.batches()])
    side, whole = originals.shape[-1], torch.ones_like(originals[:, :1])
    by_hole, by_factor = {}, {}
    for kind in HOLES:
        hole = holes(kind, len(originals), side)
        made = {"painted over": torch.where(hole > 0, fill_unknown(originals, hole), originals)}
        for jumps, name in JUMPS.items():
            edits = [
                pipeline.inpaint(
                    batch, hole[rows], labels, seed=seed, image_index=rows.start, output_type="pt", seam_px=0,
                    jumps=jumps,
                )
                for rows, batch, labels in images.batches()
            ]  # fmt: skip
            made[name] = _joined(edits)
        by_hole[kind] = {name: _compared(images, edited, originals, hole) for name, edited in made.items()}
    for factor in FACTORS:
        small = F.interpolate(originals, size=(side // factor,) * 2, mode="area")
        enlarged = F.interpolate(small, size=(side, side), mode="bicubic", align_corners=False).clamp(-1, 1)
        edits = [
            pipeline.super_resolve(small[rows], labels, seed=seed, image_index=rows.start, output_type="pt")
            for rows, _, labels in images.batches()
        ]
        made = {"bicubic": enlarged, "drawn": _joined(edits)}
        by_factor[str(factor)] = {name: _compared(images, edited, originals, whole) for name, edited in made.items()}
    return {"images": len(images), "by_hole": by_hole, "by_factor": by_factor}


def _joined(edits: Sequence[NextScalePipelineOutput]) -> Images:
    """In [-1, 1]."""
    return torch.cat([torch.as_tensor(made.images).float() * 2 - 1 for made in edits])


def _compared(images: HeldOut, made: Images, originals: Images, masks: Float[Tensor, "b 1 h w"]) -> Values:
    pixels = to_uint8(made)
    inside = psnr_inside(torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1, originals, masks)
    found = images.compared(pixels)
    del found[PSNR]  # over all pixels, most of which are the original's own
    return {HOLE_PSNR: mean_and_interval(inside.double().numpy())} | found


def _edits(setting: SrddSetting) -> Iterator[Experiment]:
    yield from priors(setting, MARKOV, CAUSAL)
    yield from on_priors(setting, (MARKOV, CAUSAL), "edits", measured_edits, seconds=30, jumps=list(JUMPS))


@study_table("Zero-shot editing", _edits)
def editing(found: SrddFound) -> StudyTable:
    """Holes and small images, made by both masks and by no model."""
    kinds = {f"{hole} hole": ("by_hole", hole, "painted over", JUMPS.values()) for hole in HOLES}
    kinds |= {f"{factor}x": ("by_factor", str(factor), "bicubic", ["drawn"]) for factor in FACTORS}
    rows: list[Row] = []
    for kind, (by, at, without_model, ways) in kinds.items():
        rows.append(found.held_out_row(f"{kind}, {without_model}", "edits-markov", by, at, without_model, once=True))
        rows += [
            found.held_out_row(f"{kind}, {model} {way}", f"edits-{model}", by, at, way)
            for model in (MARKOV.name, CAUSAL.name)
            for way in ways
        ]
    better: dict[str, Direction] = {HOLE_PSNR: "higher", LITE0: "lower"}
    edits_better = "SRDD edits better than VAR without training (the paper's figures are unknown)"
    resampling = "Simple resampling inside the hole is what the diffusion view adds"
    return StudyTable(
        about="Zero-shot edits of held-out images under their own labels, at the models' own guidance: a central hole "
        "of half the side, three boxes of a sixth to a half of the side anywhere, and images made from ones of a half "
        f"and a quarter of the side. {equal(found.setting)} Known pixels are put back without a seam, so what differs "
        "from the original lies in the hole (2x, 4x: anywhere; the result is mended to be the small image when "
        "averaged).",
        first_column="edit",
        rows=tuple(rows),
        claims=(
            *(
                Claim(edits_better, SRDD, f"{hole} hole, markov drawn", f"{hole} hole, causal drawn", column, direction)
                for hole in HOLES
                for column, direction in better.items()
            ),
            *(
                Claim(resampling, SRDD, f"{hole} hole, markov {JUMPS[1]}", f"{hole} hole, markov drawn", LITE0)
                for hole in HOLES
            ),
        ),
        notes=(
            f"{HOLE_PSNR}: over the pixels of the hole, or all of them (2x, 4x). PSNR asks for the original pixels, "
            "which no model can know: a blur scores well. The lite0 distance and r-FD (against the same images) ask "
            "for a likely picture.",
        ),
    )


def summary(setting: SrddSetting) -> str:
    """First paragraph of the report."""
    return (
        f"Next-scale models on {setting.prior.data}: one tokenizer {setting.tokenizer.preset or 'of its own'} "
        f"({setting.tokenizer.num_steps} steps), priors {setting.prior.preset or 'of their own'} "
        f"({setting.prior.num_steps} steps each), seeds {setting.seed_words}. All priors share the tokenizer, so the "
        "spread over seeds is that of priors and samples."
    )


SRDD_STUDY: Study[SrddSetting] = Study(
    name="srdd",
    title="Study: SRDD and VAR",
    tables=(masks, guidance, schedules, weighting, snr, refinement, distillation, editing),
    summary=summary,
)

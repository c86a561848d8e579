"""`isthmus study dar`: reconstruction, previews, solvers, guidance and token order of D-AR models.

Source of the claims: Gao and Shou, "D-AR: Diffusion via Autoregressive Models". Each table stands below the experiment
that it reads.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from isthmus.dar.pipeline import DARPipeline
from isthmus.evaluation.features import Features, extract_features
from isthmus.evaluation.guards import pixel_digest
from isthmus.evaluation.held_out import LITE0, PSNR, reconstructions_by_stage
from isthmus.evaluation.images import ruined
from isthmus.evaluation.record import timing_words
from isthmus.pictures import to_uint8
from isthmus.pipelines.labels import Label
from isthmus.pipelines.memory import batch_size_that_fits
from isthmus.studies.experiments import Experiment, Values, for_every_seed, run_settings
from isthmus.studies.measures import HeldOut, Lab, Pictures, SampleScorer, evaluation, mean_and_interval
from isthmus.studies.options import BALANCE, DarSetting
from isthmus.studies.study import Study
from isthmus.studies.tables import CLASS, FRECHET, Claim, Direction, Found, Panel, StudyTable, panels_of, study_table
from isthmus.training.run import column, last, read_log
from isthmus.training.train_prior import train_prior
from isthmus.training.train_tokenizer import train_tokenizer

DarLab = Lab[DarSetting]
DarFound = Found[DarSetting]

REBUILT, BITS = "r-FD-lite0-192", "bits per token"
_PAPER = "D-AR (arXiv 2505.23660)"


def models(setting: DarSetting) -> Iterator[Experiment]:
    """A tokenizer and its prior for every seed."""
    for seed in setting.seeds:
        tokenizer, prior = replace(setting.tokenizer, seed=seed), replace(setting.prior, seed=seed)
        yield Experiment(
            name=f"tokenizer-seed{seed}",
            kind="tokenizer",
            work=trained_tokenizer,
            settings={"seed": seed, "run": run_settings(tokenizer)},
            seconds=0.52 * tokenizer.num_steps,
        )
        yield Experiment(
            name=f"prior-seed{seed}",
            kind="prior",
            work=trained_prior,
            settings={"seed": seed, "run": run_settings(prior)},
            after=(f"tokenizer-seed{seed}",),
            seconds=0.26 * prior.num_steps,
        )


def on_models(
    setting: DarSetting, name: str, work: Callable[[DarLab, Experiment], Values], *, seconds: float, **details: Any
) -> Iterator[Experiment]:
    """The models, then an experiment on each."""
    yield from models(setting)
    yield from for_every_seed(setting.seeds, name, work, after="prior", seconds=seconds, **details)


def trained_tokenizer(lab: DarLab, experiment: Experiment) -> Values:
    """What a training measures at its end."""
    run = replace(lab.setting.tokenizer, seed=experiment.settings["seed"], out=lab.run_folder(experiment.name))
    train_tokenizer(run)
    log = read_log(run.out / "log.jsonl")
    return {name: last(log, f"val/{name}") for name in ("psnr", "psnr_shuffled", "usage")}


def trained_prior(lab: DarLab, experiment: Experiment) -> Values:
    """Held-out bits per token while training."""
    run = replace(
        lab.setting.prior,
        seed=experiment.settings["seed"],
        tokenizer=str(lab.run_folder(experiment.after[0])),
        out=lab.run_folder(experiment.name),
    )
    train_prior(run)
    steps, bits = column(read_log(run.out / "log.jsonl"), "val/bits_per_token")
    return {"steps": steps, "bits_per_token": bits}


def trained(setting: DarSetting) -> str:
    """What the models of every row share."""
    return (
        f"Equal in all rows: models and images; tokenizers of {setting.tokenizer.num_steps} steps, priors of "
        f"{setting.prior.num_steps}, seeds {setting.seed_words}, a tokenizer and a prior each."
    )


def rebuilt_by_tokens(lab: DarLab, experiment: Experiment) -> Values:
    """Reconstructions from the first tokens, by how many; then the images themselves and what a blur leaves."""
    pipeline: DARPipeline = lab.pipeline(experiment.after[0])
    held_out = HeldOut(pipeline, lab)
    parts: dict[str, list[Pictures]] = {}
    for rows, images, _ in held_out.batches():
        for name, rebuilt in reconstructions_by_stage(pipeline, images, first_index=rows.start).items():
            parts.setdefault(name, []).append(rebuilt)
    return {
        "images": len(held_out),
        "by_tokens": {name: held_out.compared(np.concatenate(rebuilt)) for name, rebuilt in parts.items()},
        "floor": held_out.class_accuracy(held_out.headline),
        "ceiling": held_out.compared(np.stack(list(ruined(held_out.images)))),
    }


@study_table(
    "Reconstruction by number of tokens",
    lambda setting: on_models(setting, "reconstruction", rebuilt_by_tokens, seconds=25),
)
def reconstruction(found: DarFound) -> StudyTable:
    """Reconstruction against the number of tokens kept."""
    kept = {
        int(name.split()[0]): found.held_out_row(name, "reconstruction", "by_tokens", name)
        for name in found.first("reconstruction", "by_tokens")
    }
    floor, ceiling = (found.held_out_row(side, "reconstruction", side) for side in ("floor", "ceiling"))
    return StudyTable(
        about=f"Held-out images, rebuilt from their first tokens: the preview after the last solver step that these "
        f"tokens drive. {trained(found.setting)} Features lite0, images of {found.setting.prior.data}. Floor: the "
        "images themselves; ceiling: the images blurred to almost their mean colour.",
        first_column="tokens kept",
        rows=(*kept.values(), floor, ceiling),
        panels=panels_of((PSNR, LITE0, CLASS), "tokens kept", {"held-out images": kept}, floor),
        notes=(
            "We know no figure of the paper for reconstructions from fewer tokens; its figures are for previews of "
            "samples (the next table). r-FD is of the reconstructions against the same images.",
        ),
    )


def scored_previews(lab: DarLab, experiment: Experiment) -> Values:
    """Scores of the previews after every solver step, of the same samples throughout; only features are kept.

    A preview is the jump from the state to the image (`pipeline.stream`), in 8-bit values; the last is the image.
    """
    pipeline: DARPipeline = lab.pipeline(experiment.after[0])
    scorer = SampleScorer(pipeline, lab)
    network, labels = scorer.real.network, scorer.classes.model_ids
    size = lab.setting.batch_size or batch_size_that_fits(pipeline, guided=pipeline.defaults.guidance_scale != 1)
    names = pipeline.step_names(pipeline.scheduler.config["num_inference_steps"])
    features: list[list[Features]] = [[] for _ in names]
    digests: list[list[str]] = [[] for _ in names]
    with tqdm(total=len(labels), desc="previews", unit="image", disable=None) as bar:
        for start in range(0, len(labels), size):
            chosen = labels[start : start + size]
            ids: list[Label] = [None if label == pipeline.num_classes else int(label) for label in chosen]
            steps = pipeline.stream(ids, seed=experiment.settings["seed"], image_index=start, output_type="latent")
            for step in steps:
                pictures = to_uint8(torch.as_tensor(step.preview))
                features[step.index].append(extract_features(network, pictures))
                digests[step.index] += map(pixel_digest, pictures)
            bar.update(len(chosen))
    whole = [{space: np.concatenate([part[space] for part in parts]) for space in parts[0]} for parts in features]
    # where two steps wait for the same tokens, the later one stands for them
    return scorer.values("by_step", dict(zip(names, zip(whole, digests, strict=True), strict=True)))


# tokens of the paper's model -> FID of its previews (D-AR-L)
_PREVIEW_FID = {64: 7.38, 128: 3.94, 192: 2.93, 256: 2.44}


@study_table(
    "Previews by group of tokens",
    lambda setting: on_models(
        setting, "previews", scored_previews, seconds=30 + 0.2 * setting.num,
        guidance=setting.own_guidance, num=setting.num, balance=BALANCE,
    ),
)  # fmt: skip
def previews(found: DarFound) -> StudyTable:
    """Samples after every group of tokens."""
    names = list(found.first("previews", "by_step"))
    rows = {int(name.split()[0]): found.sample_row(name, "previews", "by_step", name) for name in names}
    quarters = {tokens: f"{tokens * max(rows) // 256} tokens" for tokens in _PREVIEW_FID}
    floor, ceiling = found.real_rows("previews", "by_step", names[-1])
    return StudyTable(
        about=f"The same samples after every group of tokens. {trained(found.setting)} "
        + found.protocol_words("previews"),
        first_column="preview after",
        rows=(*rows.values(), floor, ceiling),
        claims=tuple(
            Claim(
                f"Previews improve: FID {_PREVIEW_FID[later]} after {later} of 256 tokens, {_PREVIEW_FID[earlier]} "
                f"after {earlier}",
                _PAPER, quarters[later], quarters[earlier], FRECHET,
            )
            for earlier, later in pairwise(_PREVIEW_FID)
            if quarters[later] in names and quarters[earlier] in names
        ),
        panels=panels_of((FRECHET, CLASS), "tokens", {"previews": rows}, floor),
        notes=found.warnings("previews"),
    )  # fmt: skip


def rebuilt_by_solver(lab: DarLab, experiment: Experiment) -> Values:
    """Reconstructions from all that a solver reads, by its rule and number of steps."""
    pipeline: DARPipeline = lab.pipeline(experiment.after[0])
    held_out, own = HeldOut(pipeline, lab), pipeline.scheduler.config
    batches = [(rows.start, pipeline.encode(images)) for rows, images, _ in held_out.batches()]
    values = {}
    for solver in lab.setting.solvers:
        for number in lab.setting.solver_steps:
            begin, parts = time.perf_counter(), []
            for start, token_ids in batches:
                rebuilt = pipeline.decode(
                    token_ids,
                    num_inference_steps=number,
                    solver=solver,
                    seed=0,
                    image_index=start,
                    output_type="latent",
                )
                parts.append(to_uint8(torch.as_tensor(rebuilt)))
            seconds = time.perf_counter() - begin
            compared = held_out.compared(np.concatenate(parts))
            values[f"{solver}, {number} steps"] = compared | {"ms per image": [1000 * seconds / len(held_out)]}
    return {
        "images": len(held_out),
        "by_solver": values,
        "trained_steps": f"{own['solver']}, {own['num_inference_steps']} steps",
        "timed_on": timing_words(pipeline.device),
    }


# its times are those of one device and number of threads
@study_table(
    "Solver and number of steps",
    lambda setting: on_models(
        setting, "solvers", rebuilt_by_solver, seconds=110, solvers=list(setting.solvers),
        steps=list(setting.solver_steps), device=setting.device, threads=setting.threads,
    ),
)  # fmt: skip
def solvers(found: DarFound) -> StudyTable:
    """Rules and numbers of solver steps."""
    setting, first = found.setting, found.first("solvers")
    rows = {name: found.held_out_row(name, "solvers", "by_solver", name) for name in first["by_solver"]}

    def claim(says: str, first: str, second: str, direction: Direction = "lower") -> Claim:
        return Claim(says, _PAPER, first, second, REBUILT, direction)

    lines = {
        solver: {steps: rows[f"{solver}, {steps} steps"].cells[REBUILT] for steps in setting.solver_steps}
        for solver in setting.solvers
    }
    two_step = "8 two-step (Adams-Bashforth) steps beat 8 of Euler: rFID 1.52 against 1.58"
    sixteen = "16 steps of Euler are worse than 8: rFID 1.93 against 1.58"
    return StudyTable(
        about=f"Held-out images, rebuilt from their tokens by several rules of a solver step. {trained(setting)} The "
        f"model's own is {first['trained_steps']}. With fewer steps than groups only some groups "
        "are read.",
        first_column="solver",
        rows=tuple(rows.values()),
        claims=(
            claim("8 steps of Euler beat 4: rFID 1.58 against 2.35", "euler, 8 steps", "euler, 4 steps"),
            claim(two_step, "adams-bashforth, 8 steps", "euler, 8 steps"),
            claim(sixteen, "euler, 16 steps", "euler, 8 steps", "higher"),
        ),
        panels=(Panel(REBUILT, "solver steps", lines),),
        notes=(
            "adams-bashforth has the published coefficients, which are those of an even grid; adams-bashforth-variable "
            "those of the uneven grid that is walked, which the paper does not have. ms per image is of one pass, "
            f"on {first['timed_on']}.",
        ),
    )


def _guidances(setting: DarSetting) -> list[str]:
    """The prior's own guidance and the others, each once."""
    return list(dict.fromkeys((setting.own_guidance, *setting.guidances)))


@study_table(
    "Guidance schedules",
    lambda setting: on_models(
        setting, "guidance", evaluation, kind="evaluation",
        seconds=30 + 0.15 * setting.num * len(_guidances(setting)),
        guidances=_guidances(setting), num=setting.num, balance=BALANCE,
    ),
)  # fmt: skip
def guidance(found: DarFound) -> StudyTable:
    """Guidance schedules over the tokens."""
    rows = [found.sample_row(words, "guidance", guidance=words) for words in _guidances(found.setting)]
    linear = "Guidance rising linearly from 1.1 to 8 beats constant 1.5: FID 2.44 against 3.50 (D-AR-L)"
    return StudyTable(
        about="Guidance over the tokens: off (1), constant, or rising linearly; guided = unguided + s (with class - "
        f"without). {trained(found.setting)} {found.setting.own_guidance} is the preset's own. "
        + found.protocol_words("guidance"),
        first_column="schedule",
        rows=(*rows, *found.real_rows("guidance")),
        claims=(
            Claim("Constant guidance 1.5 beats none: FID 3.50 against 7.43 (D-AR-L)", _PAPER, "1.5", "1", FRECHET),
            Claim(linear, _PAPER, "linear:1.1:8", "1.5", FRECHET),
        ),
        notes=found.warnings("guidance"),
    )


def bits_by_place(lab: DarLab, experiment: Experiment) -> Values:
    """Bits of every token of held-out images: means by position, and by group with the ends of their 95 % interval."""
    pipeline: DARPipeline = lab.pipeline(experiment.after[0])
    parts = [pipeline.bits_per_token(images, labels) for _, images, labels in HeldOut(pipeline, lab).batches()]
    bits = torch.cat(parts).cpu().double().numpy()
    size = pipeline.image_tokenizer.tokens_per_group
    groups = [bits[:, start : start + size].mean(axis=1) for start in range(0, bits.shape[1], size)]
    return {
        "images": len(bits),
        "tokens_per_group": size,
        "by_position": bits.mean(axis=0).tolist(),
        "by_group": [mean_and_interval(group) for group in groups],
        "all": mean_and_interval(bits.mean(axis=1)),
    }


@study_table("Order of the tokens", lambda setting: on_models(setting, "order", bits_by_place, seconds=10))
def order(found: DarFound) -> StudyTable:
    """What tokens cost by their place in the order."""
    size, groups = found.first("order", "tokens_per_group"), len(found.first("order", "by_group"))
    names = {f"tokens {group * size + 1} to {(group + 1) * size}": ("by_group", group) for group in range(groups)}
    rows = [found.held_out_row(name, "order", *path, column=BITS) for name, path in {**names, "all": ("all",)}.items()]
    points = found.points("order", "by_position", range(1, groups * size + 1))
    return StudyTable(
        about=f"Bits per token of held-out images given their class, by place in the order. {trained(found.setting)}",
        first_column="tokens",
        rows=tuple(rows),
        panels=(Panel(BITS, "position of the token", {"held-out images": points}),),
        notes=(
            "The paper has no bits by position. Its figure for the order is FID 2.44 coarse to fine against 4.17 fine "
            "to coarse: that takes a prior trained on the reverse order and is not measured here.",
        ),
    )


def summary(setting: DarSetting) -> str:
    """First paragraph of the report."""
    return (
        f"D-AR models on {setting.prior.data}: tokenizers {setting.tokenizer.preset or 'of their own'} "
        f"({setting.tokenizer.num_steps} steps) and priors {setting.prior.preset or 'of their own'} "
        f"({setting.prior.num_steps} steps), seeds {setting.seed_words}. A seed is a tokenizer with a prior of its "
        "own, so the spread over seeds is that of whole models."
    )


DAR_STUDY: Study[DarSetting] = Study(
    name="dar",
    title="Study: D-AR",
    tables=(reconstruction, previews, solvers, guidance, order),
    summary=summary,
)

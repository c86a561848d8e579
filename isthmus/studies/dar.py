"""`isthmus study dar`: reconstruction, previews, solvers, guidance and token order of D-AR models.

Source of the claims: Gao and Shou, "D-AR: Diffusion via Autoregressive Models".
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import reduce
from itertools import pairwise
from operator import getitem
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from tqdm.auto import tqdm

from isthmus.dar.options import Solver
from isthmus.dar.pipeline import DARPipeline
from isthmus.dar.runs import DiffusionTokenizerRun, NextTokenPriorRun
from isthmus.evaluation.features import Features, extract_features
from isthmus.evaluation.guards import pixel_digest
from isthmus.evaluation.held_out import reconstructions_by_stage
from isthmus.evaluation.images import ruined
from isthmus.evaluation.record import timing_words
from isthmus.pictures import to_uint8
from isthmus.pipelines.labels import Label
from isthmus.pipelines.loading import choose_device, load_pipeline
from isthmus.pipelines.memory import batch_size_that_fits
from isthmus.studies.experiments import Experiment, Results, Values, Work, results_by_seed
from isthmus.studies.measures import (
    BATCH,
    FRECHET,
    EvaluationSetting,
    HeldOut,
    Pictures,
    SampleProtocol,
    by_both_distances,
    evaluation_values,
    mean_and_interval,
    protocol_words,
    real_image_cells,
    sample_facts,
    sample_readings,
    score_readings,
    warning_notes,
)
from isthmus.studies.options import BALANCE, DarSetting
from isthmus.studies.study import Study
from isthmus.studies.tables import (
    Claim,
    Direction,
    Panel,
    Reading,
    Readings,
    Row,
    StudyTable,
    TableSpec,
    line_of,
    written_readings,
)
from isthmus.training.config import Run, run_to_json
from isthmus.training.run import column, last, read_log
from isthmus.training.train_prior import train_prior
from isthmus.training.train_tokenizer import train_tokenizer


def tokenizer_run(setting: DarSetting, seed: int) -> DiffusionTokenizerRun:
    """The run of a tokenizer; where it goes is not said yet."""
    return replace(setting.tokenizer, seed=seed)


def prior_run(setting: DarSetting, seed: int) -> NextTokenPriorRun:
    """The run of a prior; where it goes and its tokenizer's folder are not said yet."""
    return replace(setting.prior, seed=seed)


def models(setting: DarSetting) -> Iterator[Experiment]:
    """A tokenizer and its prior for every seed."""
    for seed in setting.seeds:
        tokenizer, prior = tokenizer_run(setting, seed), prior_run(setting, seed)
        yield Experiment(
            name=f"tokenizer-seed{seed}",
            kind="tokenizer",
            settings={"seed": seed, "run": _run(tokenizer)},
            seconds=0.52 * tokenizer.num_steps,
        )
        yield Experiment(
            name=f"prior-seed{seed}",
            kind="prior",
            settings={"seed": seed, "run": _run(prior)},
            after=(f"tokenizer-seed{seed}",),
            seconds=0.26 * prior.num_steps,
        )


def on_held_out(setting: DarSetting, kind: str, *, seconds: float, **settings: Any) -> Iterator[Experiment]:
    """One experiment for every seed that reads held-out images, after the models."""
    yield from models(setting)
    for seed in setting.seeds:
        yield Experiment(
            name=f"{kind}-seed{seed}",
            kind=kind,
            settings={"seed": seed, **settings},
            after=(f"prior-seed{seed}",),
            seconds=seconds,
        )


def evaluations(setting: DarSetting) -> Iterator[Experiment]:
    """Every model at its own guidance and at the others."""
    guidances = all_guidances(setting)
    yield from models(setting)
    for seed in setting.seeds:
        yield Experiment(
            name=f"guidance-seed{seed}",
            kind="evaluation",
            settings={"seed": seed, "guidances": list(guidances), "num": setting.num, "balance": BALANCE},
            after=(f"prior-seed{seed}",),
            seconds=30 + 0.15 * setting.num * len(guidances),
        )


def previews(setting: DarSetting) -> Iterator[Experiment]:
    """Samples after every solver step, at the model's own guidance."""
    yield from models(setting)
    for seed in setting.seeds:
        yield Experiment(
            name=f"previews-seed{seed}",
            kind="previews",
            settings={
                "seed": seed,
                "guidance": setting.prior.sampling.guidance,
                "num": setting.num,
                "balance": BALANCE,
            },
            after=(f"prior-seed{seed}",),
            seconds=30 + 0.2 * setting.num,
        )


def all_guidances(setting: DarSetting) -> Sequence[str]:
    """The prior's own guidance and the others, each once."""
    return tuple(dict.fromkeys((setting.prior.sampling.guidance, *setting.guidances)))


def model_folder(folder: Path, experiment: str) -> Path:
    """Where a training writes its model."""
    return folder / experiment / "run"


def _run(run: Run) -> dict[str, Any]:
    """A run without what the study fills in."""
    return {name: value for name, value in run_to_json(run).items() if name not in ("out", "tokenizer", "token_cache")}


def reconstruction_values(pipeline: DARPipeline, held_out: HeldOut) -> Values:
    """Reconstructions from the first tokens, by how many; then the images themselves and what a blur leaves."""
    parts: dict[str, list[Pictures]] = {}
    for start, images in held_out.batches():
        for name, rebuilt in reconstructions_by_stage(pipeline, images, first_index=start).items():
            parts.setdefault(name, []).append(rebuilt)
    values = {name: held_out.compared(np.concatenate(rebuilt)) for name, rebuilt in parts.items()}
    right = held_out.right(held_out.headline)
    floor = {} if right is None else {"class accuracy (nearest mean)": mean_and_interval(right)}
    return {
        "images": len(held_out),
        "by_tokens": values,
        "floor": floor,
        "ceiling": held_out.compared(np.stack(list(ruined(held_out.images)))),
    }


def solver_values(pipeline: DARPipeline, held_out: HeldOut, *, solvers: Sequence[str], steps: Sequence[int]) -> Values:
    """Reconstructions from all that a solver reads, by its rule and number of steps."""
    token_ids = torch.cat([pipeline.encode(images) for _, images in held_out.batches()])
    values = {}
    for solver in solvers:
        for number in steps:
            begin, parts = time.perf_counter(), []
            for start in range(0, len(held_out), BATCH):
                found = pipeline.decode(
                    token_ids[start : start + BATCH],
                    num_inference_steps=number,
                    solver=cast(Solver, solver),
                    seed=0,
                    image_index=start,
                    output_type="latent",
                )
                parts.append(to_uint8(torch.as_tensor(found)))
            seconds = time.perf_counter() - begin
            name = f"{solver}, {number} steps"
            values[name] = held_out.compared(np.concatenate(parts))
            values[name]["ms per image"] = [1000 * seconds / len(held_out)]
    return {
        "images": len(held_out),
        "by_solver": values,
        "trained_steps": _own_steps(pipeline),
        "timed_on": timing_words(pipeline.device),
    }


def order_values(pipeline: DARPipeline, held_out: HeldOut) -> Values:
    """Bits of every token of held-out images: means by position, and by group with the ends of their 95 % interval."""
    parts = [
        pipeline.bits_per_token(images, list(held_out.model_ids[start : start + BATCH]))
        for start, images in held_out.batches()
    ]
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


def _own_steps(pipeline: DARPipeline) -> str:
    config = pipeline.scheduler.config
    return f"{config['solver']}, {config['num_inference_steps']} steps"


def dar_work(setting: DarSetting, folder: Path) -> Mapping[str, Work]:
    """The function behind every kind of experiment."""
    evaluations = EvaluationSetting.of(
        setting.prior, num=setting.num, batch_size=setting.batch_size, device=setting.device
    )

    def tokenizer(experiment: Experiment) -> Values:
        run = replace(tokenizer_run(setting, experiment.settings["seed"]), out=model_folder(folder, experiment.name))
        train_tokenizer(run)
        log = read_log(run.out / "log.jsonl")
        names = ("val/psnr", "val/psnr_shuffled", "val/usage")
        return {name.removeprefix("val/"): last(log, name) for name in names}

    def prior(experiment: Experiment) -> Values:
        seed = experiment.settings["seed"]
        run = replace(
            prior_run(setting, seed),
            tokenizer=str(model_folder(folder, f"tokenizer-seed{seed}")),
            out=model_folder(folder, experiment.name),
        )
        train_prior(run)
        steps, bits = column(read_log(run.out / "log.jsonl"), "val/bits_per_token")
        return {"steps": steps, "bits_per_token": bits}

    def model(experiment: Experiment) -> DARPipeline:
        place = model_folder(folder, f"prior-seed{experiment.settings['seed']}")
        pipeline = load_pipeline(str(place), device=choose_device(setting.device))
        assert isinstance(pipeline, DARPipeline), "the prior's run writes one"
        return pipeline

    def held_out(pipeline: DARPipeline) -> HeldOut:
        return HeldOut.of(pipeline, evaluations)

    def reconstruction(experiment: Experiment) -> Values:
        pipeline = model(experiment)
        return reconstruction_values(pipeline, held_out(pipeline))

    def solvers(experiment: Experiment) -> Values:
        pipeline, facts = model(experiment), experiment.settings
        return solver_values(pipeline, held_out(pipeline), solvers=facts["solvers"], steps=facts["steps"])

    def order(experiment: Experiment) -> Values:
        pipeline = model(experiment)
        return order_values(pipeline, held_out(pipeline))

    def evaluation(experiment: Experiment) -> Values:
        facts = experiment.settings
        place = model_folder(folder, f"prior-seed{facts['seed']}")
        target = folder / experiment.name / "evaluation"
        return evaluation_values(place, target, evaluations, seed=facts["seed"], guidances=facts["guidances"])

    def previews(experiment: Experiment) -> Values:
        return preview_values(model(experiment), evaluations, seed=experiment.settings["seed"])

    return {
        "tokenizer": tokenizer,
        "prior": prior,
        "reconstruction": reconstruction,
        "solvers": solvers,
        "order": order,
        "evaluation": evaluation,
        "previews": previews,
    }


def preview_values(pipeline: DARPipeline, setting: EvaluationSetting, *, seed: int) -> Values:
    """Scores of the previews after every solver step, of the same samples throughout; only features are kept.

    A preview is the jump from the state to the image (`pipeline.stream`), in 8-bit values; the last is the image.
    """
    protocol = SampleProtocol.of(pipeline, setting)
    network, labels = protocol.real.network, protocol.classes.model_ids
    size = setting.batch_size or batch_size_that_fits(pipeline, guided=pipeline.defaults.guidance_scale != 1)
    names = pipeline.step_names(pipeline.scheduler.config["num_inference_steps"])
    features: list[list[Features]] = [[] for _ in names]
    digests: list[list[str]] = [[] for _ in names]
    with tqdm(total=len(labels), desc="previews", unit="image", disable=None) as bar:
        for start in range(0, len(labels), size):
            chosen = labels[start : start + size]
            ids: list[Label] = [None if label == pipeline.num_classes else int(label) for label in chosen]
            for step in pipeline.stream(ids, seed=seed, image_index=start, output_type="latent"):
                pictures = to_uint8(torch.as_tensor(step.preview))
                features[step.index].append(extract_features(network, pictures))
                digests[step.index] += map(pixel_digest, pictures)
            bar.update(len(chosen))
    by_step = {}
    # where two steps wait for the same tokens, the later one stands for them
    for name, parts, digest in zip(names, features, digests, strict=True):
        whole = {space: np.concatenate([part[space] for part in parts]) for space in parts[0]}
        by_step[name] = protocol.scored(whole, digest)
    return protocol.values("by_step", by_step)


REBUILT, CLASS, BITS = "r-FD-lite0-192", "class accuracy (nearest mean)", "bits per token"
_PAPER = "D-AR (arXiv 2505.23660)"
# tokens of the paper's model -> FID of its previews (D-AR-L)
_PREVIEW_FID = {64: 7.38, 128: 3.94, 192: 2.93, 256: 2.44}


def reconstruction(setting: DarSetting, results: Results) -> StudyTable:
    """Reconstruction against the number of tokens kept."""
    found = by_seed(setting, results, "reconstruction")
    first = next(iter(found.values()))
    facts = {"images": str(first["images"]), "seeds": seeds(setting)}
    rows = [Row(name=name, facts=facts, cells=readings_at(found, "by_tokens", name)) for name in first["by_tokens"]]
    rows += [Row(name=side, facts=facts, cells=readings_at(found, side)) for side in ("floor", "ceiling")]
    kept = {name: int(name.split()[0]) for name in first["by_tokens"]}
    return StudyTable(
        about=f"Held-out images, rebuilt from their first tokens: the preview after the last solver step that these "
        f"tokens drive. {trained(setting)} Features lite0, images of {setting.prior.data}. Floor: the images "
        "themselves; ceiling: the images blurred to almost their mean colour.",
        first_column="tokens kept",
        rows=tuple(rows),
        panels=tuple(
            Panel(
                title=column,
                along="tokens kept",
                lines=(
                    line_of("held-out images", {kept[row.name]: row.cells[column] for row in rows if row.name in kept}),
                ),
                level=_level(rows, column),
            )
            for column in ("PSNR, dB", "lite0 distance", CLASS)
            if column in rows[0].cells
        ),
        notes=(
            "We know no figure of the paper for reconstructions from fewer tokens; its figures are for previews of "
            "samples (the next table). r-FD is of the reconstructions against the same images.",
        ),
    )


def preview_scores(setting: DarSetting, results: Results) -> StudyTable:
    """Samples after every group of tokens."""
    found = by_seed(setting, results, "previews")
    measured = list(found.values())
    first = measured[0]
    names, total = list(first["by_step"]), max(int(name.split()[0]) for name in first["by_step"])
    facts = facts_of(first, setting.prior.sampling.guidance, setting)
    rows = [
        Row(
            name=name,
            facts=facts,
            cells=score_readings({seed: values["by_step"][name] for seed, values in found.items()}),
        )
        for name in names
    ]
    quarters = {tokens: f"{tokens * total // 256} tokens" for tokens in _PREVIEW_FID}
    claims = tuple(
        Claim(
            says=f"Previews improve: FID {_PREVIEW_FID[later]} after {later} of 256 tokens, {_PREVIEW_FID[earlier]} "
            f"after {earlier}",
            source=_PAPER,
            first=quarters[later],
            second=quarters[earlier],
            column=FRECHET,
            direction="lower",
        )
        for earlier, later in pairwise(_PREVIEW_FID)
        if quarters[later] in names and quarters[earlier] in names
    )
    side = {"protocol": first["protocol"], "by_guidance": {"": first["by_step"][names[-1]]}}
    real = [Row(name=word, cells=real_image_cells(side, "", word)) for word in ("floor", "ceiling")]
    return StudyTable(
        about=f"The same samples after every group of tokens. {trained(setting)} {protocol_words(measured)}",
        first_column="preview after",
        rows=(*rows, *real),
        claims=by_both_distances(*claims),
        panels=tuple(
            Panel(
                title=column,
                along="tokens",
                lines=(line_of("previews", {int(row.name.split()[0]): row.cells[column] for row in rows}),),
                level=_level(real, column),
            )
            for column in (FRECHET, CLASS)
            if column in rows[0].cells
        ),
        notes=warning_notes(measured),
    )


def solvers(setting: DarSetting, results: Results) -> StudyTable:
    """Rules and numbers of solver steps."""
    found = by_seed(setting, results, "solvers")
    first = next(iter(found.values()))
    facts = {"images": str(first["images"]), "seeds": seeds(setting)}
    rows = [Row(name=name, facts=facts, cells=readings_at(found, "by_solver", name)) for name in first["by_solver"]]

    def claim(says: str, better: str, worse: str, direction: Direction = "lower") -> Claim:
        return Claim(says=says, source=_PAPER, first=better, second=worse, column=REBUILT, direction=direction)

    lines = []
    for solver in setting.solvers:
        by_steps = {steps: _row(rows, f"{solver}, {steps} steps").cells[REBUILT] for steps in setting.solver_steps}
        lines.append(line_of(solver, by_steps))
    return StudyTable(
        about=f"Held-out images, rebuilt from their tokens by several rules of a solver step. {trained(setting)} The "
        f"model's own is {first['trained_steps']}. With fewer steps than groups only some groups "
        "are read.",
        first_column="solver",
        rows=tuple(rows),
        claims=by_both_distances(
            claim("8 steps of Euler beat 4: rFID 1.58 against 2.35", "euler, 8 steps", "euler, 4 steps"),
            claim(
                "8 two-step (Adams-Bashforth) steps beat 8 of Euler: rFID 1.52 against 1.58",
                "adams-bashforth, 8 steps",
                "euler, 8 steps",
            ),
            claim(
                "16 steps of Euler are worse than 8: rFID 1.93 against 1.58",
                "euler, 16 steps",
                "euler, 8 steps",
                "higher",
            ),
        ),
        panels=(Panel(title=REBUILT, along="solver steps", lines=tuple(lines)),),
        notes=(
            "adams-bashforth has the published coefficients, which are those of an even grid; adams-bashforth-variable "
            "those of the uneven grid that is walked, which the paper does not have. ms per image is of one pass, "
            f"on {first['timed_on']}.",
        ),
    )


def guidance(setting: DarSetting, results: Results) -> StudyTable:
    """Guidance schedules over the tokens."""
    found = by_seed(setting, results, "guidance")
    measured, own = list(found.values()), setting.prior.sampling.guidance
    first = measured[0]
    rows = [
        Row(name=words, facts=sample_facts(first, words, setting.seeds), cells=sample_readings(found, words))
        for words in all_guidances(setting)
    ]
    real = [Row(name=side, cells=real_image_cells(first, own, side)) for side in ("floor", "ceiling")]
    return StudyTable(
        about="Guidance over the tokens: off (1), constant, or rising linearly; guided = unguided + s (with class - "
        f"without). {trained(setting)} {own} is the preset's own. {protocol_words(measured)}",
        first_column="schedule",
        rows=(*rows, *real),
        claims=by_both_distances(
            Claim(
                says="Constant guidance 1.5 beats none: FID 3.50 against 7.43 (D-AR-L)",
                source=_PAPER, first="1.5", second="1", column=FRECHET, direction="lower",
            ),
            Claim(
                says="Guidance rising linearly from 1.1 to 8 beats constant 1.5: FID 2.44 against 3.50 (D-AR-L)",
                source=_PAPER, first="linear:1.1:8", second="1.5", column=FRECHET, direction="lower",
            ),
        ),
        notes=warning_notes(measured),
    )  # fmt: skip


def order(setting: DarSetting, results: Results) -> StudyTable:
    """What tokens cost by their place in the order."""
    found = by_seed(setting, results, "order")
    first = next(iter(found.values()))
    size, groups = first["tokens_per_group"], len(first["by_group"])
    facts = {"images": str(first["images"]), "seeds": seeds(setting)}
    rows = [
        Row(
            name=f"tokens {group * size + 1} to {(group + 1) * size}",
            facts=facts,
            cells={BITS: {seed: Reading(*values["by_group"][group]) for seed, values in found.items()}},
        )
        for group in range(groups)
    ]
    everything = {seed: Reading(*values["all"]) for seed, values in found.items()}
    positions = {
        place + 1: {seed: Reading(values["by_position"][place]) for seed, values in found.items()}
        for place in range(groups * size)
    }
    return StudyTable(
        about=f"Bits per token of held-out images given their class, by place in the order. {trained(setting)}",
        first_column="tokens",
        rows=(*rows, Row(name="all", facts=facts, cells={BITS: everything})),
        panels=(Panel(title=BITS, along="position of the token", lines=(line_of("held-out images", positions),)),),
        notes=(
            "The paper has no bits by position. Its figure for the order is FID 2.44 coarse to fine against 4.17 fine "
            "to coarse: that takes a prior trained on the reverse order and is not measured here.",
        ),
    )


def trained(setting: DarSetting) -> str:
    """What the models of every row share."""
    return (
        f"Equal in all rows: models and images; tokenizers of {setting.tokenizer.num_steps} steps, priors of "
        f"{setting.prior.num_steps}, seeds {seeds(setting)}, a tokenizer and a prior each."
    )


def seeds(setting: DarSetting) -> str:
    """Training seeds, in words."""
    return ", ".join(map(str, setting.seeds))


def by_seed(setting: DarSetting, results: Results, kind: str) -> dict[int, Values]:
    """Results of one experiment for every seed."""
    return results_by_seed(results, kind, setting.seeds)


def facts_of(values: Values, guidance: str, setting: DarSetting) -> dict[str, str]:
    """What stands beside every number of samples."""
    return sample_facts(values, guidance, setting.seeds)


def readings_at(found: Mapping[int, Values], *path: str) -> dict[str, Readings]:
    """Readings by column of what lies at `path` in the results of every seed."""
    return written_readings({seed: reduce(getitem, path, values) for seed, values in found.items()})


def _level(rows: Sequence[Row], column: str) -> tuple[str, float] | None:
    """The floor as a line, where the column has one."""
    floor = next((row.cells.get(column) for row in rows if row.name == "floor"), None)
    return None if not floor else ("real images", next(iter(floor.values())).value)


def _row(rows: Sequence[Row], name: str) -> Row:
    return next(row for row in rows if row.name == name)


def _solver_experiments(setting: DarSetting) -> Sequence[Experiment]:
    wanted = {
        "solvers": list(setting.solvers),
        "steps": list(setting.solver_steps),
        # its times are those of one device and number of threads
        "device": setting.device,
        "threads": setting.threads,
    }
    return list(on_held_out(setting, "solvers", seconds=110, **wanted))


DAR_TABLES: tuple[TableSpec[DarSetting], ...] = (
    TableSpec(
        name="reconstruction",
        title="Reconstruction by number of tokens",
        experiments=lambda setting: list(on_held_out(setting, "reconstruction", seconds=25)),
        make=reconstruction,
    ),
    TableSpec(
        name="previews",
        title="Previews by group of tokens",
        experiments=lambda setting: list(previews(setting)),
        make=preview_scores,
    ),
    TableSpec(name="solvers", title="Solver and number of steps", experiments=_solver_experiments, make=solvers),
    TableSpec(
        name="guidance",
        title="Guidance schedules",
        experiments=lambda setting: list(evaluations(setting)),
        make=guidance,
    ),
    TableSpec(
        name="order",
        title="Order of the tokens",
        experiments=lambda setting: list(on_held_out(setting, "order", seconds=10)),
        make=order,
    ),
)
"""All tables of the study. A further one joins by an entry here."""


def summary(setting: DarSetting) -> list[str]:
    """First paragraphs of the report."""
    return [
        f"D-AR models on {setting.prior.data}: tokenizers {setting.tokenizer.preset or 'of their own'} "
        f"({setting.tokenizer.num_steps} steps) and priors {setting.prior.preset or 'of their own'} "
        f"({setting.prior.num_steps} steps), seeds {seeds(setting)}. A seed is a tokenizer with a prior of its own, so "
        "the spread over seeds is that of whole models.",
    ]


DAR_STUDY: Study[DarSetting] = Study(name="dar", title="Study: D-AR", tables=DAR_TABLES, work=dar_work, summary=summary)

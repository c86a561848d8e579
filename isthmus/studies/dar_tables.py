"""The tables of the study of D-AR, each a function of results, with the paper's figures beside them."""

from collections.abc import Mapping, Sequence
from functools import reduce
from itertools import pairwise
from operator import getitem

from isthmus.studies.dar_experiments import all_guidances, evaluations, on_held_out, previews
from isthmus.studies.dar_options import DarSetting
from isthmus.studies.evaluations import (
    FRECHET,
    by_both_distances,
    protocol_words,
    real_image_cells,
    sample_facts,
    sample_readings,
    score_readings,
    warning_notes,
)
from isthmus.studies.experiments import Experiment, Results, Values, results_by_seed
from isthmus.studies.readings import Reading, Readings, written_readings
from isthmus.studies.tables import Claim, Direction, Panel, Row, StudyTable, TableSpec, line_of

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

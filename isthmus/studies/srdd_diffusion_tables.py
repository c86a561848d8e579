"""The tables about what the diffusion view brings: refinement, scale distillation and edits."""

import math
from collections.abc import Mapping, Sequence

from isthmus.studies.evaluations import (
    FRECHET,
    by_both_distances,
    held_out_readings,
    protocol_words,
    sample_facts,
    sample_readings,
    score_readings,
    warning_notes,
)
from isthmus.studies.experiments import Experiment, Results, Values, results_by_seed
from isthmus.studies.readings import Reading, Readings, written_readings
from isthmus.studies.srdd_experiments import (
    CAUSAL,
    MARKOV,
    REFINING,
    Variant,
    distillations,
    edits,
    own_guidance,
    refinements,
)
from isthmus.studies.srdd_options import SrddSetting
from isthmus.studies.srdd_tables import BITS, by_seed, equal, evaluations, real_rows, variant_row
from isthmus.studies.srdd_words import DRAWING, FACTORS, HOLE_PSNR, HOLES, MODES, TAUGHT, UNTAUGHT, jump_words
from isthmus.studies.tables import Claim, Direction, Row, StudyTable, TableSpec

PER_IMAGE = "bits per image"
DISTANCE = "lite0 distance"


def refinement(setting: SrddSetting, results: Results) -> StudyTable:
    """No refinement, jumps and masked rounds, on a plain model and on one that was trained for it."""
    models = {MARKOV: "", REFINING: " (trained for it)"}
    rows = [
        _refined_row(setting, results, variant, mode, mode + suffix)
        for variant, suffix in models.items()
        for mode in MODES
    ]
    refined = [values for variant in models for values in by_seed(setting, results, "refined", variant).values()]
    # floor and ceiling are those of the evaluation
    measured = [*refined, *evaluations(setting, results, (MARKOV,))]
    forwards = refined[0]["forwards"]
    claims = [
        Claim(
            says=f"{how} resampling refines draws (the paper's figures are unknown)",
            source="SRDD (arXiv 2509.22636)", first=mode + suffix, second=f"none{suffix}", column=FRECHET,
            direction="lower",
        )
        for mode, how in (("simple", "Simple"), ("masked", "Masked"))
        for suffix in models.values()
    ]  # fmt: skip
    return StudyTable(
        about=f"Draws of the Markov model as they are ({forwards['none']} forwards), and refined in two ways at "
        f"equal numbers of forwards ({forwards['masked']}): one round at each of the second to fourth scales, where "
        "the least likely 30 % of the tokens are drawn again (masked), or one jump back over these scales (simple). "
        "What refines is judged against the cheaper plain draw. "
        f"{equal(setting)} The second model differs in one thing: half of its training examples show some of their "
        f"own tokens. {protocol_words(measured)}",
        first_column="refinement",
        rows=(*rows, *real_rows(setting, results, MARKOV)),
        claims=by_both_distances(*claims),
        notes=warning_notes(measured),
    )


def distillation(setting: SrddSetting, results: Results) -> StudyTable:
    """A student on every second scale, with and without its teacher."""
    drawn = results[DRAWING]
    teacher = by_seed(setting, results, "samples", MARKOV)
    students = [
        values
        for kind in (TAUGHT, UNTAUGHT)
        for values in results_by_seed(results, f"samples-student-{kind}", setting.seeds).values()
    ]
    measured = [*teacher.values(), *students]
    rows = [
        variant_row(
            setting, results, MARKOV, "teacher, all scales", facts=_schedule_facts(drawn["teacher"]),
            cells=_bits_per_image(teacher) | _milliseconds(drawn["teacher"]),
        ),
        *(
            _student_row(setting, results, kind, name, drawn["student"])
            for kind, name in ((TAUGHT, "student"), (UNTAUGHT, "student without the teacher"))
        ),
    ]  # fmt: skip
    return StudyTable(
        about="Scale distillation of the Markov model: students on every second scale start from the teacher's "
        f"weights and are trained for {setting.student.num_steps} steps of {setting.student.batch_size} images, with "
        "what the teacher says (its rollouts, and its distribution where both know the state) or on the tokens of the "
        f"images alone. Seeds {', '.join(map(str, setting.seeds))}, a teacher each. "
        + protocol_words(measured)
        + f" Times: {drawn['timed_on']}, eight images drawn at once with their own guidance, pixels included.",
        first_column="model",
        rows=(*rows, *real_rows(setting, results, MARKOV)),
        claims=by_both_distances(
            Claim(
                says="1-3-5-8-13-16 is near-optimal: fewer scales do not cost quality",
                source="SRDD (arXiv 2509.22636)", first="student", second="teacher, all scales", column=FRECHET,
                direction="lower",
            ),
            Claim(
                says="Scales are removed by distillation: the teacher helps (the paper's figures are unknown)",
                source="SRDD (arXiv 2509.22636)", first="student", second="student without the teacher",
                column=FRECHET, direction="lower",
            ),
            Claim(
                says="The same, in the likelihood of held-out images under the short schedule",
                source="SRDD (arXiv 2509.22636)", first="student", second="student without the teacher",
                column=PER_IMAGE, direction="lower",
            ),
        ),
        notes=(
            "Bits per image of teacher and students are bits of different codes: only the students compare. The claim "
            "of near-optimality has no margin; only a difference beyond its interval decides.",
            *warning_notes(measured),
        ),
    )  # fmt: skip


def editing(setting: SrddSetting, results: Results) -> StudyTable:
    """Holes and small images, made by both masks and by no model."""
    models = {MARKOV: "markov", CAUSAL: "causal"}
    found = {variant: by_seed(setting, results, "edits", variant) for variant in models}
    first = next(iter(found[MARKOV].values()))
    facts = {"images": str(first["images"]), "seeds": ", ".join(map(str, setting.seeds))}
    rows = []
    for hole in HOLES:
        at = {0: first["by_hole"][hole]["painted over"]}
        rows.append(Row(name=f"{hole} hole, painted over", facts=facts, cells=written_readings(at)))
        for variant, name in models.items():
            for number in setting.jumps:
                what = jump_words(number)
                at = {seed: values["by_hole"][hole][what] for seed, values in found[variant].items()}
                rows.append(Row(name=f"{hole} hole, {name} {what}", facts=facts, cells=written_readings(at)))
    for factor in map(str, FACTORS):
        at = {0: first["by_factor"][factor]["bicubic"]}
        rows.append(Row(name=f"{factor}x, bicubic", facts=facts, cells=written_readings(at)))
        for variant, name in models.items():
            at = {seed: values["by_factor"][factor]["drawn"] for seed, values in found[variant].items()}
            rows.append(Row(name=f"{factor}x, {name} drawn", facts=facts, cells=written_readings(at)))
    better: dict[str, Direction] = {HOLE_PSNR: "higher", DISTANCE: "lower"}
    claims = [
        Claim(
            says="SRDD edits better than VAR without training (the paper's figures are unknown)",
            source="SRDD (arXiv 2509.22636)", first=f"{hole} hole, markov drawn", second=f"{hole} hole, causal drawn",
            column=column, direction=direction,
        )
        for hole in HOLES
        for column, direction in better.items()
    ] + [
        Claim(
            says="Simple resampling inside the hole is what the diffusion view adds",
            source="SRDD (arXiv 2509.22636)", first=f"{hole} hole, markov {jump_words(number)}",
            second=f"{hole} hole, markov drawn", column=DISTANCE, direction="lower",
        )
        for hole in HOLES
        for number in setting.jumps
        if number
    ]  # fmt: skip
    return StudyTable(
        about="Zero-shot edits of held-out images under their own labels, at the models' own guidance: a central hole "
        "of half the side, three boxes of a sixth to a half of the side anywhere, and images made from ones of a half "
        f"and a quarter of the side. {equal(setting)} Known pixels are put back without a seam, so what differs from "
        "the original lies in the hole (2x, 4x: anywhere; the result is mended to be the small image when averaged).",
        first_column="edit",
        rows=tuple(rows),
        claims=tuple(claims),
        notes=(
            f"{HOLE_PSNR}: over the pixels of the hole, or all of them (2x, 4x). PSNR asks for the original pixels, "
            "which no model can know: a blur scores well. The lite0 distance and r-FD (against the same images) ask "
            "for a likely picture.",
        ),
    )


def _refined_row(setting: SrddSetting, results: Results, variant: Variant, mode: str, name: str) -> Row:
    found = by_seed(setting, results, "refined", variant)
    first = next(iter(found.values()))
    cells = score_readings({seed: values["by_mode"][mode] for seed, values in found.items()})
    forwards = {"forwards": str(first["forwards"][mode])}
    return Row(name=name, facts=forwards | sample_facts(first, own_guidance(setting), setting.seeds), cells=cells)


def _student_row(setting: SrddSetting, results: Results, kind: str, name: str, drawn: Values) -> Row:
    samples = results_by_seed(results, f"samples-student-{kind}", setting.seeds)
    own = own_guidance(setting)
    facts = _schedule_facts(drawn) | sample_facts(next(iter(samples.values())), own, setting.seeds)
    times = _milliseconds(drawn) if kind == TAUGHT else {}
    return Row(name=name, facts=facts, cells=sample_readings(samples, own) | _bits_per_image(samples) | times)


def _schedule_facts(drawn: Values) -> dict[str, str]:
    return {"scales": drawn["scales"], "tokens": str(drawn["tokens"])}


def _milliseconds(drawn: Values) -> dict[str, Readings]:
    return {"ms per image": {0: Reading(drawn["ms"])}}


def _bits_per_image(found: Mapping[int, Values]) -> dict[str, Readings]:
    nats = held_out_readings(found, "nats per image")
    bits = held_out_readings(found, BITS)
    return {BITS: bits, PER_IMAGE: {seed: one.times(1 / math.log(2)) for seed, one in nats.items()}}


def _refinement_experiments(setting: SrddSetting) -> Sequence[Experiment]:
    return list(refinements(setting, (MARKOV, REFINING)))


DIFFUSION_TABLES: tuple[TableSpec[SrddSetting], ...] = (
    TableSpec(
        name="refinement",
        title="Refinement",
        experiments=_refinement_experiments,
        make=refinement,
    ),
    TableSpec(
        name="distillation",
        title="Scale distillation",
        experiments=lambda setting: list(distillations(setting)),
        make=distillation,
    ),
    TableSpec(
        name="editing",
        title="Zero-shot editing",
        experiments=lambda setting: list(edits(setting, (MARKOV, CAUSAL))),
        make=editing,
    ),
)
"""The tables of what these models can do beside drawing; they follow those of `SRDD_TABLES`."""

"""`isthmus study srdd`: what mask, guidance, schedule, weights, refinement and distillation do, all else being equal.

Each table is a function of results, with what the papers claim beside them: Kumar, Nair and Patel, "Scale-Wise VAR is
Secretly Discrete Diffusion", and the sibling works HMAR, MVAR and Markov-VAR.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise

from isthmus.studies.experiments import Experiment, Results, Values, results_by_seed
from isthmus.studies.measures import (
    FRECHET,
    by_both_distances,
    held_out_readings,
    protocol_words,
    real_image_cells,
    sample_facts,
    sample_readings,
    score_readings,
    warning_notes,
)
from isthmus.studies.options import SrddSetting
from isthmus.studies.srdd import (
    CAUSAL,
    DRAWING,
    FACTORS,
    HOLE_PSNR,
    HOLES,
    LOGNORMAL,
    MARKOV,
    MODES,
    REFINING,
    SHORT,
    SHORT_TOKENIZER,
    SNR,
    TAUGHT,
    TOKENIZER,
    UNTAUGHT,
    Variant,
    cost,
    distillations,
    edits,
    jump_words,
    own_guidance,
    refinements,
    samples,
    snr,
    srdd_work,
    sweeps,
)
from isthmus.studies.study import Study
from isthmus.studies.tables import (
    Claim,
    Direction,
    Line,
    Panel,
    Reading,
    Readings,
    Row,
    StudyTable,
    TableSpec,
    line_of,
    written_readings,
)

BITS, CLASS = "bits per token", "class accuracy (nearest mean)"
STEP_TIME, STEP_MEMORY = "ms per training step", "MB per training step"
IMAGE_TIME, IMAGE_MEMORY = "ms per image", "MB per image"
TIMED = (STEP_TIME, IMAGE_TIME)

_MVAR = "MVAR"
_ARITHMETIC = "arithmetic"


def masks(setting: SrddSetting, results: Results) -> StudyTable:
    """Causal (VAR) against Markov (SRDD)."""
    names = {CAUSAL: "causal", MARKOV: "markov"}
    measured = evaluations(setting, results, names)
    costs = results[cost(setting, names).name]
    rows = [
        variant_row(setting, results, variant, name, cells=bits(setting, results, variant) | cost_cells(costs, variant))
        for variant, name in names.items()
    ]
    return StudyTable(
        about=f"The mask between scales: all earlier scales (VAR) or the image so far alone (SRDD). {equal(setting)} "
        + protocol_words(measured) + times_words(setting, costs),
        first_column="mask",
        rows=(*rows, *real_rows(setting, results, MARKOV)),
        timed=TIMED,
        claims=by_both_distances(
            Claim(
                says="A history of one scale beats all scales in a short run: FID 4.35 against 4.84",
                source=_MVAR, first="markov", second="causal", column=FRECHET, direction="lower",
            ),
            Claim(
                says="No history is worse than the full one: FID 3.64 against 3.41 at d16",
                source="Markov-VAR",
                first="markov", second="causal", column=FRECHET, direction="higher",
            ),
            Claim(
                says="Markov models take less memory: 10.9 to 3.8 GB at d16 while drawing, the cache is gone",
                source=_MVAR, first="markov", second="causal", column=IMAGE_MEMORY, direction="lower",
            ),
            Claim(
                says="The mask alone saves about 4 % of the arithmetic of drawing at 256 px, 11 % at 512 px",
                source=_ARITHMETIC, first="markov", second="causal", column=IMAGE_TIME, direction="lower",
            ),
        ),
        panels=(
            convergence(setting, results, names),
            by_scale(setting, results, names),
        ),
        notes=(
            "Bits per token are of held-out images, without guidance or filters. We know no figure of SRDD's own "
            "for convergence or bits per token, so those columns have no claim beside them. Memory is what tensors "
            "hold at its peak beyond weights and optimizer state.",
            *warning_notes(measured),
        ),
    )  # fmt: skip


def guidance(setting: SrddSetting, results: Results) -> StudyTable:
    """Both masks at every guidance."""
    rows, lines = [], {FRECHET: [], CLASS: []}
    measured = evaluations(setting, results, (CAUSAL, MARKOV), kinds=("samples", "sweep"))
    own = setting.prior.sampling.guidance
    for variant in (CAUSAL, MARKOV):
        swept = by_seed(setting, results, "sweep", variant)
        found = {guidance: sample_readings(swept, guidance) for guidance in setting.guidances}
        found[own] = sample_readings(by_seed(setting, results, "samples", variant), own)
        facts = next(iter(swept.values()))
        rows += [
            Row(name=f"{variant.name}, {guidance}", facts=sample_facts(facts, guidance, setting.seeds), cells=cells)
            for guidance, cells in found.items()
        ]
        for column, its_lines in lines.items():
            constant = {float(one): found[one][column] for one in setting.guidances if column in found[one]}
            if constant:
                its_lines.append(line_of(variant.name, constant))
    floors = real_image_cells(results[f"sweep-{MARKOV.name}-seed{setting.seeds[0]}"], setting.guidances[0], "floor")
    return StudyTable(
        about="Guidance: guided = unguided + s (with class - without), 1 is off; a schedule rises over the scales. The "
        "models are those of the mask comparison. " + protocol_words(measured),
        first_column="mask, guidance",
        rows=(*rows, *real_rows(setting, results, MARKOV)),
        panels=tuple(
            Panel(
                title=f"{column} (constant guidance)",
                along="guidance",
                lines=tuple(its_lines),
                level=("real images", floors[column][0].value) if column in floors else None,
            )
            for column, its_lines in lines.items()
            if its_lines
        ),
        notes=(
            "The paper studies classifier-free guidance, but its values could not be read: there is no "
            "figure to agree with.",
            *warning_notes(measured),
        ),
    )


def schedules(setting: SrddSetting, results: Results) -> StudyTable:
    """All scales against every second one."""
    names = {MARKOV: "all scales", SHORT: "every second scale"}
    sides = {MARKOV: TOKENIZER, SHORT: SHORT_TOKENIZER}
    measured = evaluations(setting, results, names)
    costs = results[cost(setting, names).name]
    rows = []
    for variant, name in names.items():
        sizes = results[sides[variant]]["scale_sizes"]
        scales = {"scales": "-".join(map(str, sizes)), "tokens": str(sum(side * side for side in sizes))}
        cells = rebuilt(setting, results, variant) | cost_cells(costs, variant)
        rows.append(variant_row(setting, results, variant, name, facts=scales, cells=cells))
    return StudyTable(
        about="Scale schedules of the Markov model on one tokenizer: all of its scales, or every second one and the "
        "last, which turns the paper's ten scales into its 1-3-5-8-13-16. " + equal(setting) + " "
        + protocol_words(measured) + times_words(setting, costs),
        first_column="schedule",
        rows=(*rows, *real_rows(setting, results, MARKOV)),
        timed=TIMED,
        claims=by_both_distances(
            Claim(
                says="1-3-5-8-13-16 is near-optimal: fewer scales do not cost quality",
                source="SRDD (arXiv 2509.22636)",
                first="every second scale", second="all scales", column=FRECHET, direction="lower",
            ),
            Claim(
                says="20 % less computation with six scales in place of ten (here any saving counts)",
                source="SRDD (arXiv 2509.22636)",
                first="every second scale", second="all scales", column=IMAGE_TIME, direction="lower",
            ),
        ),
        notes=(
            "Near-optimal has no margin: the claim is read as a distance that is not higher, so only a "
            "difference beyond its interval decides. Bits are given per image, since the schedules have different "
            "tokens; they are bits of different codes. The tokenizer was trained with all of its scales.",
            *warning_notes(measured),
        ),
    )  # fmt: skip


def weighting(setting: SrddSetting, results: Results) -> StudyTable:
    """Loss weights over scales."""
    names = {MARKOV: "token-uniform", LOGNORMAL: "log-normal"}
    measured = evaluations(setting, results, names)
    rows = [
        variant_row(setting, results, variant, name, cells=bits(setting, results, variant))
        for variant, name in names.items()
    ]
    return StudyTable(
        about="Weights of the scales in the loss of the Markov model: the same for every token (VAR), or a log-normal "
        f"bump on the middle scales. {equal(setting)} " + protocol_words(measured),
        first_column="weights",
        rows=(*rows, *real_rows(setting, results, MARKOV)),
        claims=by_both_distances(
            Claim(
                says="Weights per scale in place of the uniform token loss: d16 FID 3.01 against VAR's 3.3 to 3.55 "
                "(with what else that work changes)",
                source="HMAR",
                first="log-normal", second="token-uniform", column=FRECHET, direction="lower",
            ),
        ),
        panels=(convergence(setting, results, names), by_scale(setting, results, names)),
        notes=(
            "Bits per token weigh every token alike, which is what the token-uniform loss minimises.",
            *warning_notes(measured),
        ),
    )  # fmt: skip


def noise(setting: SrddSetting, results: Results) -> StudyTable:
    """Signal-to-noise ratio after every scale."""
    found = results[SNR]
    names = [f"{side} x {side}" for side in found["scale_sizes"]]
    column = "SNR, dB"
    rows = tuple(
        Row(name=name, facts={"images": str(found["images"])}, cells={column: {0: Reading(*interval)}})
        for name, interval in zip(names, found["decibels"], strict=True)
    )
    claims = tuple(
        Claim(
            says=f"The signal-to-noise ratio of the state rises with every scale: {after} above {before}",
            source="SRDD (arXiv 2509.22636)",
            first=after,
            second=before,
            column=column,
            direction="higher",
        )
        for before, after in pairwise(names)
    )
    means = [mean for mean, _, _ in found["decibels"]]
    bars = [(high - low) / 2 for _, low, high in found["decibels"]]
    line = Line(name="held-out images", x=range(len(names)), y=means, half_widths=bars)
    return StudyTable(
        about="|f|^2 / |f - F_k|^2 of the encoder's latents f and the sum of the codes up to scale k, mean of the "
        "decibels over held-out images with a 95 % bootstrap interval; one tokenizer.",
        first_column="state after scale",
        rows=rows,
        claims=claims,
        panels=(Panel(title="signal-to-noise ratio, dB", along="scale", lines=(line,)),),
    )


def equal(setting: SrddSetting) -> str:
    """What the trainings of a comparison share."""
    run = setting.prior
    return (
        f"Equal in all rows: tokenizer, images ({run.data}), width and blocks, {run.num_steps} steps of "
        f"{run.batch_size} images, seeds {', '.join(map(str, setting.seeds))}."
    )


def evaluations(
    setting: SrddSetting, results: Results, variants: Iterable[Variant], *, kinds: Sequence[str] = ("samples",)
) -> list[Values]:
    """Every evaluation of these models that a table reads."""
    return [
        values for variant in variants for kind in kinds for values in by_seed(setting, results, kind, variant).values()
    ]


def times_words(setting: SrddSetting, costs: Values) -> str:
    """How times were taken."""
    one = next(iter(costs.values()))
    return (
        f" Times: {len(one['step_seconds'])} interleaved rounds at seed {setting.seeds[0]}, a step of "
        f"{one['batch_size']} images, {one['drawn_at_once']} images drawn at once with their own guidance, pixels "
        f"included in the time but not in the memory, on {one['timed_on']}."
    )


def variant_row(
    setting: SrddSetting,
    results: Results,
    variant: Variant,
    name: str,
    *,
    facts: Mapping[str, str] | None = None,
    cells: Mapping[str, Readings],
) -> Row:
    """A model at its own guidance."""
    own, found = setting.prior.sampling.guidance, by_seed(setting, results, "samples", variant)
    beside = sample_facts(next(iter(found.values())), own, setting.seeds)
    return Row(name=name, facts={**(facts or {}), **beside}, cells={**sample_readings(found, own), **cells})


def real_rows(setting: SrddSetting, results: Results, variant: Variant) -> list[Row]:
    """Floor and ceiling of the sample scores."""
    values, own = results[f"samples-{variant.name}-seed{setting.seeds[0]}"], setting.prior.sampling.guidance
    return [Row(name=side, cells=real_image_cells(values, own, side)) for side in ("floor", "ceiling")]


def by_seed(setting: SrddSetting, results: Results, kind: str, variant: Variant) -> dict[int, Values]:
    """Results of one experiment for every seed."""
    return results_by_seed(results, f"{kind}-{variant.name}", setting.seeds)


def bits(setting: SrddSetting, results: Results, variant: Variant) -> dict[str, Readings]:
    """Bits per token of held-out images."""
    return {BITS: held_out_readings(by_seed(setting, results, "samples", variant), BITS)}


def rebuilt(setting: SrddSetting, results: Results, variant: Variant) -> dict[str, Readings]:
    """What the tokens keep of held-out images, and what they cost."""
    found = by_seed(setting, results, "samples", variant)
    nats = held_out_readings(found, "nats per image")
    in_bits = {seed: one.times(1 / math.log(2)) for seed, one in nats.items()}
    # one tokenizer, whatever the seed of the prior
    psnr = held_out_readings({0: next(iter(found.values()))}, "PSNR, dB")
    return {"bits per image": in_bits, "PSNR of reconstructions, dB": psnr}


def cost_cells(costs: Values, variant: Variant) -> dict[str, Readings]:
    """Time by round, and memory."""
    one = costs[variant.name]

    def rounds(name: str) -> Readings:
        return {turn: Reading(1000 * seconds) for turn, seconds in enumerate(one[name])}

    return {
        STEP_TIME: rounds("step_seconds"),
        # memory is counted, not sampled: it has no spread
        STEP_MEMORY: {0: Reading.around(one["step_bytes"] / 1e6, 0.0)},
        IMAGE_TIME: rounds("image_seconds"),
        IMAGE_MEMORY: {0: Reading.around(one["image_bytes"] / 1e6, 0.0)},
    }


def convergence(setting: SrddSetting, results: Results, names: Mapping[Variant, str]) -> Panel:
    """Bits per token of held-out images while training."""
    lines = []
    for variant, name in names.items():
        found = by_seed(setting, results, "prior", variant)
        steps = next(iter(found.values()))["steps"]
        per_step = {step: dict(enumerate(reading_column(found, "bits_per_token", i))) for i, step in enumerate(steps)}
        lines.append(line_of(name, per_step))
    return Panel(title="bits per token of held-out images", along="step", lines=tuple(lines))


def by_scale(setting: SrddSetting, results: Results, names: Mapping[Variant, str]) -> Panel:
    """The same at the end, by scale."""
    lines = []
    for variant, name in names.items():
        found = by_seed(setting, results, "prior", variant)
        count = len(next(iter(found.values()))["bits_by_scale"])
        lines.append(
            line_of(name, {k: dict(enumerate(reading_column(found, "bits_by_scale", k))) for k in range(count)})
        )
    return Panel(title="bits per token at the end, by scale", along="scale (from 0)", lines=tuple(lines))


def reading_column(found: Mapping[int, Values], name: str, index: int) -> list[Reading]:
    """Entry `index` of a list in the results of all seeds."""
    return [Reading(values[name][index]) for values in found.values()]


def _masks_experiments(setting: SrddSetting) -> Sequence[Experiment]:
    return [*samples(setting, (MARKOV, CAUSAL)), cost(setting, (CAUSAL, MARKOV))]


def _schedules_experiments(setting: SrddSetting) -> Sequence[Experiment]:
    return [*samples(setting, (MARKOV, SHORT)), cost(setting, (MARKOV, SHORT))]


SRDD_TABLES: tuple[TableSpec[SrddSetting], ...] = (
    TableSpec(name="masks", title="Causal against Markov mask", experiments=_masks_experiments, make=masks),
    TableSpec(
        name="guidance",
        title="Guidance",
        experiments=lambda setting: list(sweeps(setting, (MARKOV, CAUSAL))),
        make=guidance,
    ),
    TableSpec(name="schedules", title="Scale schedules", experiments=_schedules_experiments, make=schedules),
    TableSpec(
        name="weighting",
        title="Weights of the scales in the loss",
        experiments=lambda setting: list(samples(setting, (MARKOV, LOGNORMAL))),
        make=weighting,
    ),
    TableSpec(
        name="snr",
        title="Signal-to-noise ratio per scale",
        experiments=lambda setting: list(snr(setting)),
        make=noise,
    ),
)
"""All tables of the study. A further one joins by an entry here."""


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


def summary(setting: SrddSetting) -> list[str]:
    """First paragraphs of the report."""
    one_tokenizer = f"tokenizer {setting.tokenizer.preset or 'of its own'} ({setting.tokenizer.num_steps} steps)"
    return [
        f"Next-scale models on {setting.prior.data}: one {one_tokenizer}, priors "
        f"{setting.prior.preset or 'of their own'} ({setting.prior.num_steps} steps each), seeds "
        f"{', '.join(map(str, setting.seeds))}. All priors share the tokenizer, so the spread over seeds is that of "
        "priors and samples.",
    ]


SRDD_STUDY: Study[SrddSetting] = Study(
    name="srdd", title="Study: SRDD and VAR", tables=(*SRDD_TABLES, *DIFFUSION_TABLES), work=srdd_work, summary=summary
)

"""The tables of the study of SRDD, each a function of results, with what papers claim beside them."""

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise

from isthmus.studies.evaluations import (
    FRECHET,
    by_both_distances,
    held_out_readings,
    protocol_words,
    real_image_cells,
    sample_facts,
    sample_readings,
    warning_notes,
)
from isthmus.studies.experiments import Experiment, Results, Values, results_by_seed
from isthmus.studies.readings import Reading, Readings
from isthmus.studies.srdd_experiments import (
    CAUSAL,
    LOGNORMAL,
    MARKOV,
    SHORT,
    SHORT_TOKENIZER,
    SNR,
    TOKENIZER,
    Variant,
    cost,
    samples,
    snr,
    sweeps,
)
from isthmus.studies.srdd_options import SrddSetting
from isthmus.studies.tables import Claim, Line, Panel, Row, StudyTable, TableSpec, line_of

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

"""`isthmus study text`: what a small prior makes of words, by the way in which it is told of them.

Arms differ in nothing but what reads the caption and where the prior looks at it: no words at all (the class alone),
the mean of the words, the vector of an encoder, the words themselves by cross-attention, rotary positions in the place
of learned ones, a frozen encoder in the place of the small one; and words before the tokens of a Llama (D-AR), which
has a tokenizer of its own. What is asked for is read back from the pixels (`isthmus.evaluation.alignment`).
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any, Literal

import torch

from isthmus.dar.runs import NextTokenPriorRun, WordsConfig
from isthmus.dar.train_prior import build_prior, layout_of
from isthmus.data.batches import CachedTokens, training_batches
from isthmus.data.token_cache import TokenCache
from isthmus.evaluation.alignment import COMBINATIONS, SEEDS
from isthmus.evaluation.held_out import NO_WORDS, OTHER_WORDS
from isthmus.evaluation.record import COMBINATION, timing_words
from isthmus.evaluation.statistics import wilson_interval
from isthmus.next_scale.pipeline import NextScalePipeline
from isthmus.next_scale.runs import PriorRun
from isthmus.next_scale.transformer import NextScaleTransformer
from isthmus.nn.saved_model import without_values
from isthmus.pipelines.loading import AnyPipeline, choose_device
from isthmus.registry import task_of
from isthmus.studies.experiments import Experiment, Values, for_every_seed, run_settings
from isthmus.studies.measures import Lab, Timed, evaluation, interleaved_seconds, timing_experiment
from isthmus.studies.options import BALANCE, TextSetting
from isthmus.studies.study import Study
from isthmus.studies.tables import (
    KERNEL,
    Claim,
    Direction,
    Found,
    Panel,
    Reading,
    Readings,
    Row,
    StudyTable,
    score_reading,
    study_table,
)
from isthmus.text.encoders import SmallTextEncoder
from isthmus.text.tokenizer import TextTokenizer
from isthmus.training.arguments import given
from isthmus.training.captions import encoder_of
from isthmus.training.config import SMALL, TextConfig
from isthmus.training.cost import num_parameters
from isthmus.training.optim import adamw
from isthmus.training.run import column, last, read_log
from isthmus.training.train_prior import PriorTask, train_prior
from isthmus.training.train_tokenizer import train_tokenizer

TextLab = Lab[TextSetting]
TextFound = Found[TextSetting]

TOKENIZER, DAR_TOKENIZER = "tokenizer", "tokenizer-dar"
NUM_WORDS = 512
"""Words of the small encoders and of the Llama: captions of a few styles have fewer words than the usual 2,000."""


@dataclass(frozen=True)
class Arm:
    """A way to tell a prior of words; `frozen` reads them with the encoder of the setting, which is never trained, and
    `prefix` is a Llama that reads them before its tokens.
    """

    name: str
    row: str
    reads: Literal["nothing", "bag", "encoder", "frozen", "prefix"] = "encoder"
    cross_attention: bool = True
    position: Literal["learned", "rope2d"] | None = None


CLASS = Arm("class", "class only", reads="nothing", cross_attention=False)
BAG = Arm("bag", "bag of words", reads="bag", cross_attention=False)
POOLED = Arm("pooled", "pooled encoder", cross_attention=False)
CROSS = Arm("cross", "encoder and cross-attention")
ROTARY = Arm("rotary", "the same, rotary positions", position="rope2d")
FROZEN = Arm("frozen", "frozen encoder and cross-attention", reads="frozen")
PREFIX = Arm("prefix", "words before a Llama's tokens", reads="prefix", cross_attention=False)
ARMS = {arm.name: arm for arm in (CLASS, BAG, POOLED, CROSS, ROTARY, FROZEN, PREFIX)}


def arms_of(setting: TextSetting) -> list[Arm]:
    """Those of a setting, in the order of the tables."""
    return [ARMS[name] for name in setting.arms]


def tokenizer_of(arm: Arm) -> str:
    """The experiment that trains the tokenizer of an arm."""
    return DAR_TOKENIZER if arm.reads == "prefix" else TOKENIZER


def prior_run(setting: TextSetting, arm: Arm, seed: int) -> PriorRun | NextTokenPriorRun:
    """The run of an arm, with as many trained parameters as that of `CROSS`; without its folders."""
    if arm.reads == "prefix":
        return replace(_llama_run(setting, _feed_forward_width(setting)), seed=seed)
    return replace(_arm_run(setting, arm, _feed_forward_ratio(setting, arm)), seed=seed)


def _llama_run(setting: TextSetting, feed_forward_width: int | None) -> NextTokenPriorRun:
    run = setting.dar_prior
    model = replace(run.model, feed_forward_width=feed_forward_width)
    return replace(run, text=WordsConfig(encoder=SMALL, num_words=NUM_WORDS), model=model)


@cache
def _feed_forward_width(setting: TextSetting) -> int:
    """Inner width that gives the Llama as many parameters as `CROSS` has."""
    wanted = trained_parameters(setting, _arm_run(setting, CROSS, None))
    one, two = (trained_parameters(setting, _llama_run(setting, width)) for width in (256, 512))
    return 256 + round(256 * (wanted - one) / (two - one))


def _arm_run(setting: TextSetting, arm: Arm, mlp_ratio: float | None) -> PriorRun:
    text = TextConfig()
    if arm.reads in ("bag", "encoder"):
        layers = 0 if arm.reads == "bag" else None
        text = TextConfig(encoder=SMALL, num_layers=layers, num_words=NUM_WORDS, cross_attention=arm.cross_attention)
    elif arm.reads == "frozen":
        text = TextConfig(encoder=setting.text_encoder, cross_attention=arm.cross_attention)
    model = replace(setting.prior.model, position=arm.position)
    model = model if mlp_ratio is None else replace(model, mlp_ratio=mlp_ratio)
    return replace(setting.prior, text=text, model=model)


@cache
def _feed_forward_ratio(setting: TextSetting, arm: Arm) -> float | None:
    """`mlp_ratio` that gives an arm as many trained parameters as `CROSS` has; None for that itself."""
    if arm == CROSS:
        return None
    wanted, own = (trained_parameters(setting, _arm_run(setting, one, None)) for one in (CROSS, arm))
    with without_values():
        config = _transformer(setting, _arm_run(setting, arm, None)).config
    width, per_unit = config["width"], config["num_layers"] * (2 * config["width"] + 1)
    return (round(width * config["mlp_ratio"]) + round((wanted - own) / per_unit)) / width


def trained_parameters(setting: TextSetting, run: PriorRun | NextTokenPriorRun) -> int:
    """Of a run of the study, with those of a small encoder; no weight is made."""
    with without_values():
        if isinstance(run, NextTokenPriorRun):
            words = TextTokenizer(merges=[("", "")] * (NUM_WORDS - 256))
            layout = layout_of(given(setting.dar_tokenizer.model), 0, words)
            return num_parameters(build_prior(run, layout, None, ()))
        encoder = encoder_of(run.text, None)
        small = None
        if isinstance(encoder, SmallTextEncoder):
            # made of the words that will be learned, as far as numbers go
            small = SmallTextEncoder(**{**encoder.config, "merges": [("", "")] * (NUM_WORDS - 256)})
        network = _transformer(setting, run)
        return num_parameters(network) + (0 if small is None else num_parameters(small))


def _transformer(setting: TextSetting, run: PriorRun) -> NextScaleTransformer:
    """A prior of this run, without values."""
    encoder, text = encoder_of(run.text, None), {}
    if encoder is not None:
        width = encoder.text_width if run.text.cross_attention else None
        text = {"text_pooled_width": encoder.pooled_width, "text_width": width}
    tokens = given(setting.tokenizer.model)
    shared = {name: tokens[name] for name in ("scale_sizes", "codebook_size", "codebook_dim") if name in tokens}
    classes = 0 if text else setting.num_classes
    return NextScaleTransformer(num_classes=classes, **shared, **text, **given(run.model))


def placed_run(lab: TextLab, arm: Arm, seed: int) -> PriorRun | NextTokenPriorRun:
    """The run of an arm with its folders; arms of one tokenizer and seed share their tokens."""
    return replace(
        prior_run(lab.setting, arm, seed),
        out=lab.run_folder(f"prior-{arm.name}-seed{seed}"),
        tokenizer=str(lab.run_folder(tokenizer_of(arm))),
        token_cache=lab.folder / "token-caches" / f"{tokenizer_of(arm)}-seed{seed}",
    )


def trained_tokenizer(lab: TextLab, experiment: Experiment) -> Values:
    """What the training measures at its end."""
    run = lab.setting.dar_tokenizer if experiment.name == DAR_TOKENIZER else lab.setting.tokenizer
    run = replace(run, out=lab.run_folder(experiment.name))
    train_tokenizer(run)
    log = read_log(run.out / "log.jsonl")
    return {"psnr": last(log, "val/psnr"), "usage": last(log, "val/usage")}


def trained_prior(lab: TextLab, experiment: Experiment) -> Values:
    """Train an arm: held-out bits per token by step, and how many parameters were trained."""
    run = placed_run(lab, ARMS[experiment.settings["arm"]], experiment.settings["seed"])
    train_prior(run)
    steps, bits = column(read_log(run.out / "log.jsonl"), "val/bits_per_token")
    pipeline = lab.pipeline(experiment.name)
    trained = num_parameters(pipeline.transformer)
    if isinstance(pipeline, NextScalePipeline) and isinstance(pipeline.text_encoder, SmallTextEncoder):
        trained += num_parameters(pipeline.text_encoder)
    return {"steps": steps, "bits_per_token": bits, "parameters": trained}


def priors(setting: TextSetting) -> Iterator[Experiment]:
    """The tokenizers, then every arm with every seed."""
    tokenizers = {TOKENIZER: (setting.tokenizer, 0.1), DAR_TOKENIZER: (setting.dar_tokenizer, 0.4)}
    for name in dict.fromkeys(map(tokenizer_of, arms_of(setting))):
        run, each = tokenizers[name]
        yield Experiment(
            name=name,
            kind="tokenizer",
            work=trained_tokenizer,
            settings={"run": run_settings(run)},
            seconds=each * run.num_steps,
        )
    for seed in setting.seeds:
        for arm in arms_of(setting):
            yield Experiment(
                name=f"prior-{arm.name}-seed{seed}",
                kind="prior",
                work=trained_prior,
                settings={"arm": arm.name, "seed": seed, "run": run_settings(prior_run(setting, arm, seed))},
                after=(tokenizer_of(arm),),
                seconds=0.2 * setting.prior.num_steps,
            )


def evaluations(setting: TextSetting) -> Iterator[Experiment]:
    """Samples of every arm, scored, with the attributes that they show."""
    yield from priors(setting)
    for arm in arms_of(setting):
        yield from for_every_seed(
            setting.seeds, f"samples-{arm.name}", evaluation, kind="evaluation", after=f"prior-{arm.name}",
            seconds=20 + 0.04 * setting.num, arm=arm.name, guidances=[setting.own_guidance], num=setting.num,
            balance=BALANCE, attributes=["all"],
        )  # fmt: skip


def cost(setting: TextSetting) -> Experiment:
    """Time of all arms against each other."""
    return timing_experiment("cost", measured_cost, setting, seconds=30, arms=setting.arms)


_DRAWN_IMAGES = 16


def measured_cost(lab: TextLab, experiment: Experiment) -> Values:
    """Seconds per training step and per image, by round."""
    facts, device = experiment.settings, choose_device(lab.setting.device)
    runs = {name: placed_run(lab, ARMS[name], facts["seed"]) for name in facts["arms"]}
    steps = {name: training_step(run, device) for name, run in runs.items()}
    step_seconds = interleaved_seconds(steps, device, rounds=facts["rounds"])
    del steps
    models = dict(zip(runs, map(lab.pipeline, experiment.after), strict=True))
    prompts = list(lab.images("val").captions or ())[:_DRAWN_IMAGES]
    draws = {name: partial(_draw, model, prompts) for name, model in models.items()}
    draw_seconds = interleaved_seconds(draws, device, rounds=facts["rounds"])
    return {
        "batch_size": lab.setting.prior.batch_size,
        "drawn_at_once": len(prompts),
        "timed_on": timing_words(device),
        "by_arm": {
            name: {
                "step_seconds": step_seconds[name],
                "image_seconds": [seconds / len(prompts) for seconds in draw_seconds[name]],
            }
            for name in runs
        },
    }


def _draw(model: AnyPipeline, prompts: Sequence[str]) -> None:
    if model.reads_text:
        model(prompt=prompts, seed=0, output_type="pt")
    else:
        model([i % model.num_classes for i in range(len(prompts))], seed=0, output_type="pt")


def training_step(run: PriorRun | NextTokenPriorRun, device: torch.device) -> Timed:
    """One optimizer step of a run on networks that start anew and one batch, captions included, in float32."""
    task: PriorTask = task_of(run)(run)
    task.place(device)
    assert run.token_cache is not None, "the study shares its caches"
    cache = TokenCache.open(run.token_cache, task.tokenizer)
    task.with_cache(cache)
    network: Any = task.network
    network.to(device).train()
    tokens = CachedTokens(cache, seed=run.seed, balanced=task.train.balanced)
    batch = next(training_batches(tokens, batch_size=run.batch_size, num_workers=0))
    optimizer = adamw(network, run.optim)

    def step() -> None:
        with task.regularisation():
            task.losses(network, batch, 0).total.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), run.optim.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


RIGHT = {
    f"attributes right, {SEEDS}": "attributes right",
    f"attributes right, {COMBINATIONS}": "attributes right, held-out pairs",
    f"combinations right, {COMBINATIONS}": "held-out pairs right",
}
"""Scores of an evaluation, and the columns that they are here."""
SINGLE, UNSEEN, BOUND = RIGHT.values()
OWN, WITHOUT, OTHER = "bits per token", "without the caption", "under another's caption"
READ_FROM = {OWN: "bits per token", WITHOUT: f"bits per token {NO_WORDS}", OTHER: f"bits per token {OTHER_WORDS}"}
PARAMETERS, STEP, IMAGE = "trained parameters, millions", "ms per training step", "ms per image"
_EXPECTED = "an expectation of this library"
_PAPER = "Infinity, Switti (they look at words in every block)"


def equal(setting: TextSetting) -> str:
    """What the arms share."""
    run = setting.prior
    return (
        f"Equal in all rows: tokenizer, drawings ({run.data}), their captions, {run.num_steps} steps of "
        f"{run.batch_size} images, seeds {setting.seed_words}, and the number of trained parameters: what an arm saves "
        "at its encoder it has in the feed-forward of its blocks."
    )


def _samples(arm: Arm) -> str:
    return f"samples-{arm.name}"


@study_table("Words: what is drawn", lambda setting: [*evaluations(setting), cost(setting)])
def words(found: TextFound) -> StudyTable:
    """Attributes and combinations that samples show, by arm."""
    setting, costs, rows = found.setting, found.results["cost"], []
    chosen = arms_of(setting)
    for arm in chosen:
        scores = found.by_seed(_samples(arm), "by_guidance", setting.own_guidance)
        cells = {
            column: {seed: score_reading(of_seed[name]) for seed, of_seed in scores.items()}
            for name, column in (*RIGHT.items(), (KERNEL, KERNEL))
        }
        times = {STEP: costs["by_arm"][arm.name]["step_seconds"], IMAGE: costs["by_arm"][arm.name]["image_seconds"]}
        cells |= {
            name: {turn: Reading(1000 * seconds) for turn, seconds in enumerate(rounds)}
            for name, rounds in times.items()
        }
        trained = {
            seed: Reading(count / 1e6) for seed, count in found.by_seed(f"prior-{arm.name}", "parameters").items()
        }
        cells[PARAMETERS] = {0: next(iter(trained.values()))}
        rows.append(Row(name=arm.row, facts=_beside(found, arm), cells=cells))
    first = found.first(_samples(chosen[0]), "by_guidance", setting.own_guidance)
    for side, what in (("floor", "the drawings of the captions"), ("ceiling", "drawings of other captions")):
        ends = {column: first[name][side] for name, column in (*RIGHT.items(), (KERNEL, KERNEL))}
        rows.append(Row(name=what, cells={name: {0: Reading(end)} for name, end in ends.items() if end is not None}))

    def claim(
        says: str, first: Arm, second: Arm, column: str, direction: Direction = "higher", source: str = _EXPECTED
    ):
        return Claim(says, source, first.row, second.row, column, direction)

    claims = (
        claim("An encoder's vector of the whole caption teaches single attributes", POOLED, CLASS, SINGLE),
        claim("An encoder reads more than the mean of the words", POOLED, BAG, SINGLE),
        claim("Cross-attention draws single attributes better", CROSS, POOLED, SINGLE, source=_PAPER),
        claim("Cross-attention binds attributes that were never seen together", CROSS, POOLED, BOUND, source=_PAPER),
        claim("Words cost no quality: the distance is not higher", CROSS, CLASS, KERNEL, "lower"),
        claim(
            "Rotary positions draw what learned ones do, or better", ROTARY, CROSS, SINGLE, source="Switti (uses them)"
        ),
        claim("A frozen encoder of sentences reads better than a small one", FROZEN, CROSS, SINGLE),
        claim("A frozen encoder of sentences binds better than a small one", FROZEN, CROSS, BOUND),
        claim("Words cost time: a step takes longer than one of classes", CROSS, CLASS, STEP),
        claim("A Llama that reads words before its tokens draws attributes as well, or better", PREFIX, CROSS, SINGLE),
        claim("A Llama that reads words before its tokens binds as well, or better", PREFIX, CROSS, BOUND),
    )
    names = {arm.row for arm in chosen}
    return StudyTable(
        about="What samples show of their captions. A prompt is the caption of a held-out drawing, or (held-out pairs) "
        "of a drawing with two attributes that no training image has together; the class alone is asked for the same "
        "captions without being told them, so it is chance. A reader of pixels finds the attributes; what it finds in "
        f"the real drawings of the captions is all that can be seen. {equal(setting)} "
        f"{found.protocol_words(*map(_samples, chosen))} Times: {len(costs['by_arm'][chosen[0].name]['step_seconds'])} "
        f"interleaved rounds, a step of {costs['batch_size']} images in float32, {costs['drawn_at_once']} images drawn "
        f"at once, on {costs['timed_on']}.",
        first_column="the prior is told",
        rows=tuple(rows),
        claims=tuple(one for one in claims if {one.first, one.second} <= names),
        timed=(STEP, IMAGE),
        notes=(
            "A share of attributes counts every attribute that was asked for; a held-out pair is right where both of "
            "its attributes are.",
            *([_OF_ITS_OWN] if PREFIX in chosen else []),
            *([] if setting.text_encoder else [_NO_ENCODER]),
            *found.warnings(*map(_samples, chosen)),
        ),
    )


_NO_ENCODER = (
    "No row has a frozen encoder: none was given. `--text-encoder FOLDER` (a BERT, T5 or CLIP of transformers, such as "
    "MiniLM) adds it."
)


_OF_ITS_OWN = (
    "The Llama draws through a tokenizer of its own (D-AR), trained for as many steps as its preset and budget say: "
    "its row differs in that too, and its bits are bits of other tokens."
)


def _beside(found: TextFound, arm: Arm) -> Mapping[str, str]:
    protocol = found.first(_samples(arm), "protocol")
    return {"N": str(protocol["num_samples"]), "seeds": found.setting.seed_words}


@study_table("Words: what captions are worth in bits", evaluations)
def likelihood(found: TextFound) -> StudyTable:
    """Bits per token of held-out drawings with their captions, without, and with another's."""
    setting, rows, lines = found.setting, [], {}
    for arm in arms_of(setting):
        scores = {name: found.held_out_score(_samples(arm), score) for name, score in READ_FROM.items()}
        cells: dict[str, Readings] = {name: readings for name, readings in scores.items() if readings}
        rows.append(Row(name=arm.row, facts={"seeds": setting.seed_words}, cells=cells))
        experiment = f"prior-{arm.name}"
        lines[arm.row] = found.points(experiment, "bits_per_token", found.first(experiment, "steps"))
    names = {arm.row for arm in arms_of(setting)}

    def claim(says: str, first: Arm, second: Arm) -> Claim:
        return Claim(says, _EXPECTED, first.row, second.row, OWN, "lower")

    claims = (
        claim("A caption says more of a drawing than its class", POOLED, CLASS),
        claim("An encoder reads more than the mean of the words", POOLED, BAG),
        claim("Cross-attention reads more than the vector of the whole", CROSS, POOLED),
        claim("Rotary positions are as good as learned ones, or better", ROTARY, CROSS),
        claim("A frozen encoder of sentences reads more than a small one", FROZEN, CROSS),
    )
    return StudyTable(
        about="Bits per token of held-out drawings, under their own captions, under the empty one, and under that of "
        "another drawing of their style; the class alone is told the style. The tokens are the same in all rows. "
        f"{equal(setting)}",
        first_column="the prior is told",
        rows=tuple(rows),
        claims=tuple(one for one in claims if {one.first, one.second} <= names),
        panels=(Panel("bits per token of held-out drawings", "step", lines),),
        notes=(
            "What a caption is worth is the difference of the first two columns; another's caption costs more than "
            "none where a prior believes what it is told.",
            *([_OF_ITS_OWN] if PREFIX in arms_of(setting) else []),
        ),
    )


@study_table("Words: which attributes", evaluations)
def attributes(found: TextFound) -> StudyTable:
    """Attributes right by style and by kind, on held-out seeds."""
    setting, rows = found.setting, []
    kinds: dict[str, Any] = {"parts": lambda one: not one["attribute"].endswith("colour")}
    kinds["colours"] = lambda one: one["attribute"].endswith("colour")
    counts = {arm: found.by_seed(_samples(arm), "attributes") for arm in arms_of(setting)}
    styles = list(dict.fromkeys(one["style"] for of_seed in counts.values() for one in next(iter(of_seed.values()))))
    kinds |= {style: partial(_is_of, style) for style in styles}

    def share(counted: Sequence[Mapping[str, Any]], which: str, chosen: Any) -> Reading | None:
        mine = [
            one for one in counted
            if one["prompts"] == SEEDS and one["attribute"] != COMBINATION and chosen(one)
        ]  # fmt: skip
        asked = sum(one["asked"] for one in mine)
        if not asked:
            return None
        interval = wilson_interval(sum(one[which] for one in mine), asked)
        return Reading(interval.mean, interval.low, interval.high)

    def row(name: str, of_seed: Mapping[int, Any], which: str) -> Row:
        cells = {
            kind: {seed: one for seed, counted in of_seed.items() if (one := share(counted, which, chosen))}
            for kind, chosen in kinds.items()
        }
        return Row(name=name, cells={kind: readings for kind, readings in cells.items() if readings})

    for arm, of_seed in counts.items():
        rows.append(row(arm.row, of_seed, "right"))
    once = {0: next(iter(next(iter(counts.values())).values()))}
    rows += [row("the drawings of the captions", once, "real"), row("drawings of other captions", once, "chance")]
    return StudyTable(
        about="Attributes right on held-out seeds, by kind and by style: a part is a shape or a variant (a tall face, "
        f"wink eyes), a colour belongs to a part (a green face). {equal(setting)}",
        first_column="the prior is told",
        rows=tuple(rows),
    )


def _is_of(style: str, one: Mapping[str, Any]) -> bool:
    return one["style"] == style


def summary(setting: TextSetting) -> str:
    """First paragraph of the report."""
    return (
        f"Next-scale priors of captions on {setting.prior.data}: one tokenizer "
        f"{setting.tokenizer.preset or 'of its own'} ({setting.tokenizer.num_steps} steps), priors from "
        f"{setting.prior.preset or 'a recipe of their own'} ({setting.prior.num_steps} steps each), "
        f"{len(setting.arms)} ways to tell them of words, seeds {setting.seed_words}. All priors share the tokenizer, "
        "so the spread over seeds is that of priors and samples."
    )


TEXT_STUDY: Study[TextSetting] = Study(
    name="text",
    title="Study: words",
    tables=(words, likelihood, attributes),
    summary=summary,
)

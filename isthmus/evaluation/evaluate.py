"""`isthmus evaluate`, as a story: draw samples, measure the real images, score one against the other, write.

`evaluate_images` scores a set of images; `evaluate_model` draws one, scores it likewise, and adds what the model does
with held-out images. Everything on disk is made once: samples, their features, evaluation.json, then the report. A
second run with all of it there only writes the report again. A model that reads text is told captions of held-out
images; what samples of avatars show of them is read (`alignment.py`).
"""

import json
import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int

from isthmus.data.source import ANY_COLUMNS, WantedColumns
from isthmus.errors import UserError
from isthmus.evaluation.adm_npz import StatisticsOrigin, write_adm_images, write_statistics
from isthmus.evaluation.alignment import AttributesRead, AttributeTest, attributes_to_read
from isthmus.evaluation.classes import Balance, SampleClasses, choose_classes, matched_classes
from isthmus.evaluation.features import FeatureNetwork, Features, extract_features, feature_network, sample_features
from isthmus.evaluation.guards import check_duplicates, check_value_range, pixel_digest
from isthmus.evaluation.held_out import THE_USUAL, Measures, held_out_scores
from isthmus.evaluation.images import ImageSet, open_images
from isthmus.evaluation.record import (
    RECORD,
    Curve,
    EvaluationRecord,
    Protocol,
    Score,
    Subject,
    circumstances,
    outdated_subject,
    read_record,
    write_record,
)
from isthmus.evaluation.reference import open_splits
from isthmus.evaluation.report import ATTRIBUTES, REPORT_FILES, look_at_samples, write_report
from isthmus.evaluation.scores import RealImages, RealSides, data_facts
from isthmus.evaluation.statistics import mean_and_covariance
from isthmus.files import alone_in, check_only
from isthmus.nn.guidance import Guidance
from isthmus.pictures import save_picture
from isthmus.pipelines.labels import names_in_order
from isthmus.pipelines.loading import AnyPipeline, choose_device, dtype_name, load_pipeline
from isthmus.pipelines.options import guidance_text
from isthmus.processes import is_first_process, launched_processes
from isthmus.samples import SampleRequest, Samples, check_folder, draw, has_chunks, read

logger = logging.getLogger("isthmus")

SAMPLES_FOLDER, SWEEP_FOLDER, COMBINATIONS_FOLDER = "samples", "sweep", "combinations"
NPZ, STATISTICS = "samples.npz", "statistics.npz"

# what an evaluation writes: a folder that holds nothing else may be scored (again)
_OURS = frozenset((SAMPLES_FOLDER, SWEEP_FOLDER, COMBINATIONS_FOLDER, NPZ, STATISTICS, *REPORT_FILES))


def scored_record(
    out: Path, protocol: Protocol, subject: Subject, *, sweep: list[str], attributes: tuple[str, ...] = ()
) -> EvaluationRecord | None:
    """The record of an earlier run that scored the same samples in the same way; None where they are to be scored.

    `attributes` are those that are read.

    Its `measures` are empty where held-out images were not measured to the end. Raises UserError where `out` holds the
    evaluation of something else, or other things.
    """
    if not (out / RECORD).is_file():
        check_only(out, "the folder of an evaluation", ours=_OURS)
        return None
    before, measured = None, outdated_subject(out)
    if measured is None:
        before = read_record(out)
        measured = before.subject
    # a model that was moved is the same model
    if replace(measured, name=subject.name) != subject:
        raise UserError(
            f"{out} holds the evaluation of {measured.name} with other weights or options. "
            "Choose another --out; nothing is overwritten."
        )
    if before is None:
        logger.info("%s is scored again: an earlier version of Isthmus measured it", out)
        return None
    read = () if before.readings is None else before.readings.attributes
    if before.protocol != protocol or list(before.sweep) != sweep or read != attributes:
        logger.info("%s is scored again: it was measured in another way before", out)
        return None
    return before


def _write_statistics(path: Path, features: Features, network: FeatureNetwork) -> None:
    """Write mean and covariance of the features in the headline space, as --reference reads them, and their origin."""
    mean, covariance, count = mean_and_covariance([features[network.headline]])
    origin = StatisticsOrigin(network.headline, network.weights_sha256, network.preprocessing, count)
    write_statistics(path, mean.numpy(), covariance.numpy(), origin)


def remove_by_products(out: Path) -> None:
    """Delete what would be of other samples beside a new record; what a command asks for is written again."""
    for name in (NPZ, STATISTICS):
        (out / name).unlink(missing_ok=True)


def _finish(record: EvaluationRecord, out: Path) -> None:
    """Write the report, and say the first scores and where the others are."""
    write_report(record, out)
    for warning in record.warnings:
        logger.info("%s", warning)
    for score in record.scores[:4]:
        logger.info("%s", _line(score))
    logger.info(
        "N = %d, n = %d; all scores: %s", record.protocol.num_samples, record.protocol.chunk_images, out / "report.md"
    )


def _line(score: Score) -> str:
    ends = {"floor": score.floor, "ceiling": score.ceiling}
    beside = ", ".join(f"{name} {value:.4g}" for name, value in ends.items() if value is not None)
    return f"{score.name}: {score.value:.4g}" + (f" ({beside})" if beside else "")


@dataclass(frozen=True, eq=False)
class _Measured:
    """A set of images with what scores need; `labels` are in the order of `names`, the classes of the data set."""

    images: ImageSet
    features: Features
    labels: Int[np.ndarray, " n"] | None
    names: tuple[str, ...]


def _score(
    main: _Measured,
    others: Mapping[str, _Measured],
    real: RealImages,
    out: Path,
    *,
    subject: Subject,
    balance: str,
    facts: Mapping[str, Any],
    warnings: Sequence[str | None] = (),
    told: str = "",
    attributes: AttributesRead | None = None,
) -> EvaluationRecord:
    """Every set of images against the real ones; the pictures of the report are saved, the record is written.

    `facts` are circumstances with the `seconds` so far; `others` are those of a sweep, by guidance. `told` says which
    prompts samples were drawn from, `attributes` what they show of them.
    """
    start = time.perf_counter()
    # before anything is scored: the guard may refuse
    said = {words: [_duplicates(words, one.images)] for words, one in others.items()}
    scored = real.scores(main.features, main.labels, main.names)
    sweep = {}
    for words, one in others.items():
        swept = real.scores(one.features, one.labels, one.names)
        sweep[words] = (*swept.scores, *(attributes.sweep[words] if attributes else ()))
        said[words] += [warning for warning in swept.warnings if warning not in scored.warnings]
    looked = look_at_samples(main.images, main.labels, main.names, out, scored.neighbours, real.splits)
    if attributes and attributes.worst is not None:
        save_picture(attributes.worst, out / ATTRIBUTES)
    first, *rest = scored.scores
    of_sweep = [f"Guidance {words}: {one}" for words, found in said.items() for one in found if one]
    record = EvaluationRecord(
        protocol=real.protocol(len(main.images), balance),
        subject=subject,
        data={} if real.splits is None else data_facts(real.splits) | ({"prompts": told} if told else {}),
        circumstances={**facts, "seconds": {**facts["seconds"], "scoring": time.perf_counter() - start}},
        warnings=(*scored.warnings, *filter(None, (looked, *warnings)), *of_sweep),
        scores=(first, *(attributes.scores if attributes else ()), *rest),
        class_scores=scored.by_class,
        measures={},
        sweep=sweep,
        readings=attributes and attributes.readings,
    )
    # without measures of held-out images yet: what stops them does not cost the scores
    write_record(record, out)
    return record


def _duplicates(guidance: str, images: ImageSet) -> str | None:
    """The warning of samples at one guidance of a sweep. Raises UserError, which names it, where most are equal."""
    try:
        return check_duplicates([pixel_digest(image) for image in images])
    except UserError as error:
        raise UserError(f"guidance {guidance}: {error}") from error


@alone_in("out")
def evaluate_images(
    samples: Path,
    out: Path,
    *,
    reference: Path | None = None,
    data: str | None = None,
    classes: Sequence[str] = (),
    columns: WantedColumns = ANY_COLUMNS,
    max_images: int | None = None,
    features: str = "lite0",
    statistics: bool = False,
    device: str = "auto",
) -> None:
    """Score anyone's images, as `open_images` reads them, against others or against a data set.

    Of several processes under torchrun the first one works; there is nothing to share.

    Args:
        out: folder of evaluation.json and the report; new, or of the same images.
        reference: images or statistics to measure against; None takes those of the data set.
        data: data set whose training images judge classes and copies; None leaves both out.
        classes: of the data; none are all.
        max_images: avatars of the training split, as for `open_source`.
        statistics: also write statistics.npz, mean and covariance of the images' features.

    Raises:
        UserError: an argument is not usable, a guard refuses, or `out` holds something else.
    """
    if not is_first_process():
        return  # there is nothing to draw, so nothing to share
    where = choose_device(device)
    network = feature_network(features, device=where)
    images = open_images(samples)
    size = images.size()
    if data is not None and size[0] != size[1]:
        raise UserError(f"a data set is brought to square images, the samples are {size}. Pass --reference instead.")
    splits = None
    if data is not None:
        splits = open_splits(
            data,
            image_size=size[0],
            classes=tuple(classes),
            wanted=(),
            columns=columns,
            max_images=max_images,
            num_samples=len(images),
        )
    real = RealImages.of(network, splits, reference, size=size)
    known = matched_classes(images, splits)
    subject = Subject(
        name=str(samples), kind="images from elsewhere", fingerprint=images.fingerprint, sampling={}, steering={}
    )
    done = scored_record(out, real.protocol(len(images), known.words), subject, sweep=[])
    if done is None or statistics:
        start = time.perf_counter()
        check_value_range(images)
        found = extract_features(network, images.shown("samples"))
        seconds = {"features": time.perf_counter() - start}
        if done is None:
            remove_by_products(out)
        if statistics:
            _write_statistics(out / STATISTICS, found, network)
        if done is None:
            main = _Measured(images, found, known.labels, known.names)
            facts = circumstances(where, processes=1) | {"seconds": seconds}
            balance, warnings = known.words, [known.warning]
            done = _score(main, {}, real, out, subject=subject, balance=balance, facts=facts, warnings=warnings)
    _finish(done, out)


@alone_in("out")
def evaluate_model(
    model: str,
    out: Path,
    *,
    data: str,
    classes: Sequence[str] = (),
    columns: WantedColumns = ANY_COLUMNS,
    max_images: int | None = None,
    num: int,
    seed: int = 0,
    options: Mapping[str, Any],
    steering: Mapping[str, Any],
    features: str = "lite0",
    reference: Path | None = None,
    balance: Balance = "uniform",
    attributes: Sequence[str] = (),
    sweep: Sequence[Guidance] = (),
    npz: bool = False,
    statistics: bool = False,
    measures: Measures = THE_USUAL,
    batch_size: int | None = None,
    device: str = "auto",
    dtype: str = "float32",
    real_sides: RealSides | None = None,
) -> None:
    """Draw `num` images of a model, score them and the model's held-out figures, and write `out`.

    Under torchrun the processes share the drawing; the first one scores and writes. Arguments without words are those
    of `SampleRequest.of`, `load_pipeline` and `evaluate_images`.

    Args:
        out: folder of samples, evaluation.json and the report; new, or of an evaluation of the same model.
        data: the data set, as for `open_source`: its held-out images, classes and training images.
        classes: of the data; none are those of the model.
        num: N, images in all.
        balance: every class equally often, or as often as in the data.
        attributes: names of those that are read from samples, all or none (`attributes_to_read`).
        sweep: guidances that are drawn and scored beside.
        npz: also write samples.npz for ADM's evaluator.
        measures: what is measured on held-out images beyond the usual.
        batch_size: images drawn, rebuilt or read at once; None estimates what fits. It changes no score.
        real_sides: what was measured of real images before, for many evaluations.

    Raises:
        UserError: an argument is not usable, a guard refuses, or `out` holds something else.
    """
    with launched_processes() as processes:
        # everything that can be refused is refused before anything is written
        network = feature_network(features, device=choose_device(processes.device(device)))
        # the first process decides for all: a busy core may measure something else
        dtype = processes.agreed(dtype_name(dtype, processes.device(device)))
        pipeline = load_pipeline(model, device=processes.device(device), dtype=dtype)
        names, side = names_in_order(pipeline.class_names), pipeline.image_size
        splits = open_splits(
            data,
            image_size=side,
            classes=tuple(classes),
            wanted=names,
            columns=columns,
            max_images=max_images,
            num_samples=num,
        )
        chosen = choose_classes(pipeline, splits, num, balance)
        read_names = attributes_to_read(attributes, splits, reads_text=pipeline.reads_text)
        real = RealImages.of(network, splits, reference, size=(side, side), sides=real_sides)
        measures.check(pipeline)
        lpips, extra = measures.lpips(), measures.facts()

        drawing: dict[str, Any] = {"seed": seed, "steering": steering, "dtype": dtype}
        asked = _requests(pipeline, chosen, out, options, sweep, drawing)
        to_draw = {words or SAMPLES_FOLDER: one for words, one in asked.items()}
        test = AttributeTest.of(splits, chosen, read_names) if read_names else None
        if test is not None:
            request = _of_combinations(pipeline, test, chosen, options=options, **drawing)
            to_draw[COMBINATIONS_FOLDER] = out / COMBINATIONS_FOLDER, request
        # a finished evaluation of an earlier version is read; its chunks are refused where samples are needed
        if not any(has_chunks(folder) for folder, _ in to_draw.values()):
            for folder, wanted in to_draw.values():
                check_folder(folder, wanted)
        subject = Subject(
            name=model,
            kind=pipeline.kind,
            fingerprint=pipeline.fingerprint,
            seed=seed,
            sampling=json.loads(json.dumps(asked[""][1].sampling.to_dict())),
            steering=dict(steering),
            dtype=dtype,
        )
        told = f"captions of {len(splits.held_out):,} held-out images, in turn" if chosen.prompts else ""
        swept = [words for words in asked if words]
        done = scored_record(out, real.protocol(num, chosen.words), subject, sweep=swept, attributes=read_names)
        if done is None or done.measures != extra or npz or statistics:
            # before anything is drawn: the guards of the reference may refuse
            if done is None and processes.is_first:
                real.measured(num)
            start, drawn = time.perf_counter(), 0
            for words, (folder, wanted) in to_draw.items():
                title = f"guidance {words}" if words in swept else words
                drawn += draw(pipeline, folder, wanted, batch_size=batch_size, processes=processes, title=title).count
            if not processes.is_first:
                return
            seconds = {"drawing": time.perf_counter() - start} if drawn else {}
            samples = read(asked[""][0], num)
            found: list[_Measured] = []
            attributes_read: AttributesRead | None = None
            if done is None:
                remove_by_products(out)
                start = time.perf_counter()
                found = [_measured(read(folder, num), chosen, network) for folder, _ in asked.values()]
                seconds["features"] = time.perf_counter() - start
                if test is not None:
                    start = time.perf_counter()
                    unseen = read(out / COMBINATIONS_FOLDER, len(test.combinations))
                    sets = {words: one.images for words, one in zip(asked, found, strict=True)}
                    attributes_read = test.read(pipeline, sets, _images(unseen), batch_size=batch_size)
                    seconds["attributes"] = time.perf_counter() - start
            # before the guards of the samples: what they refuse may still be looked at elsewhere
            if npz:
                labels = chosen.model_ids if pipeline.num_classes else None
                write_adm_images(out / NPZ, samples, num, labels, chosen.model_names)
            if statistics:
                _write_statistics(out / STATISTICS, sample_features(network, samples), network)
            if done is None:
                main, *others = found
                facts = circumstances(pipeline.device, processes=processes.count) | {"seconds": seconds}
                sets = dict(zip(swept, others, strict=True))
                said = {"balance": chosen.words, "told": told, "facts": facts, "attributes": attributes_read}
                done = _score(main, sets, real, out, subject=subject, **said)
            if done.measures != extra:
                start = time.perf_counter()
                scores, curves = held_out_scores(
                    pipeline,
                    splits.held_out,
                    network,
                    chosen.ids,
                    lpips=lpips,
                    solver_steps=measures.solver_steps,
                    batch_size=batch_size,
                )
                done.circumstances["seconds"]["held-out images"] = time.perf_counter() - start
                drawn_ids = map(samples.token_ids, range(num))
                curves += usage_curves(drawn_ids, pipeline.stage_lengths, pipeline.codebook_size)
                done = replace(done, measures=extra, held_out=tuple(scores), curves=tuple(curves))
                write_record(done, out)
        if processes.is_first:
            _finish(done, out)


def samples_folder(out: Path, guidance: str = "") -> Path:
    """Where an evaluation draws, at its own guidance or at one of its sweep in words (`guidance_text`).

    >>> samples_folder(Path("scores"), "linear:1:2").as_posix()
    'scores/sweep/linear-1-2'
    """
    return out / SWEEP_FOLDER / guidance.replace(":", "-") if guidance else out / SAMPLES_FOLDER


def _requests(
    pipeline: AnyPipeline,
    chosen: SampleClasses,
    out: Path,
    options: Mapping[str, Any],
    sweep: Sequence[Guidance],
    drawing: Mapping[str, Any],
) -> dict[str, tuple[Path, SampleRequest]]:
    """Folders and images by guidance; that of the options is ""."""
    guidances = {guidance_text(one): {"guidance_scale": one} for one in sweep}
    labels, asked = chosen.model_ids.tolist(), {}
    for words, guided in {"": {}, **guidances}.items():
        folder = samples_folder(out, words)
        words_of_all: dict[str, Any] = {"classes": chosen.rule, "prompts": chosen.prompts}
        request = SampleRequest.of(pipeline, labels, options={**options, **guided}, **words_of_all, **drawing)
        asked[words] = folder, request
    return asked


def _of_combinations(
    pipeline: AnyPipeline, test: AttributeTest, chosen: SampleClasses, **drawing: Any
) -> SampleRequest:
    """Images that are asked for combinations of attributes that training has not seen."""
    asked = test.combinations
    # a model of texts alone is told of no class
    ids = [chosen.ids[label] if chosen.ids else pipeline.num_classes for label in asked.labels]
    rule = {"class_ids": list(chosen.ids), "captions": asked.source.fingerprint}
    return SampleRequest.of(
        pipeline, ids, classes=rule, prompts=asked.captions if pipeline.reads_text else (), **drawing
    )


def _measured(samples: Samples, chosen: SampleClasses, network: FeatureNetwork) -> _Measured:
    """Drawn images, whose features are kept beside them."""
    labels = chosen.labels if chosen.names else None
    return _Measured(_images(samples), sample_features(network, samples), labels, chosen.names)


def _images(samples: Samples) -> ImageSet:
    return ImageSet(str(samples.folder), "", None, (), len(samples), at=samples.image)


def usage_curves(
    token_ids: Iterable[Int[np.ndarray, " l"]], stage_lengths: Mapping[str, int], codebook_size: int
) -> list[Curve]:
    """Share of the codes in use, and perplexity of their frequencies (1 where one code is always drawn), by stage."""
    # not at the top of the file: it loads what only trainings need
    from isthmus.training.codebook import code_counts, perplexity

    ends = np.cumsum(list(stage_lengths.values()))
    counts = torch.zeros(len(ends), codebook_size, dtype=torch.float64)
    for ids in token_ids:
        counts += code_counts([torch.from_numpy(part)[None] for part in np.split(ids, ends[:-1])], codebook_size)
    curves = {"codes in use (share)": (counts > 0).double().mean(dim=1), "perplexity of the codes": perplexity(counts)}
    return [
        Curve(name=name, along="tokens", positions=tuple(stage_lengths), values=tuple(values.tolist()))
        for name, values in curves.items()
    ]

"""`isthmus evaluate`, as a story: draw or read samples, measure the real images, score one against the other, write.

Everything on disk is made once: samples in chunks, then evaluation.json, then the report. A second run with all of it
there only writes the report again.
"""

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from isthmus.errors import UserError
from isthmus.evaluation.adm_npz import write_adm_images
from isthmus.evaluation.circumstances import circumstances
from isthmus.evaluation.feature_networks import FeatureNetwork, feature_network
from isthmus.evaluation.features import extract_features
from isthmus.evaluation.guards import check_value_range
from isthmus.evaluation.held_out import held_out_scores
from isthmus.evaluation.image_sets import ImageSet, Picture, open_images
from isthmus.evaluation.likelihood_scores import stage_lengths
from isthmus.evaluation.model_samples import (
    Balance,
    ModelSamples,
    choose_classes,
    guidance_words,
    model_samples,
    model_subject,
)
from isthmus.evaluation.processes import launched_processes
from isthmus.evaluation.protocol import (
    RECORD,
    Curve,
    EvaluationRecord,
    Protocol,
    Score,
    Subject,
    read_record,
    write_record,
)
from isthmus.evaluation.real_side import (
    DataSplits,
    RealSide,
    Reference,
    choose_reference,
    measure_real_side,
    open_splits,
)
from isthmus.evaluation.report import write_report
from isthmus.evaluation.report_pictures import look_at_samples
from isthmus.evaluation.scoring import nearest_training_images, score_samples, statistics_space
from isthmus.evaluation.usage import code_counts, usage_curves
from isthmus.functional.guidance import Guidance
from isthmus.pipelines.loading import choose_device, load_pipeline

logger = logging.getLogger("isthmus")


def evaluate_model(
    model: str,
    out: Path,
    *,
    data: str,
    classes: Sequence[str] = (),
    num: int,
    seed: int = 0,
    options: Mapping[str, Any],
    steering: Mapping[str, Any],
    features: str = "lite0",
    reference: Path | None = None,
    balance: Balance = "uniform",
    sweep: Sequence[Guidance] = (),
    npz: bool = False,
    batch_size: int | None = None,
    device: str = "auto",
    dtype: str = "float32",
) -> None:
    """Draw `num` images of a model, score them and the model's held-out figures, and write `out`.

    Under torchrun the processes share the drawing; the first one scores and writes.

    Args:
        model: a pipeline folder or hub id.
        out: folder of samples, evaluation.json and the report; new, or of an evaluation of the same model.
        data: the data set, as for `open_source`: its held-out images, classes and training images.
        classes: of the data; none are those of the model.
        num: N, images in all.
        seed: image i is drawn from (seed, i).
        options: sampling options by name; `FOLDER_DEFAULT` stands for the model's own.
        steering: solver and steps of a D-AR model, where given.
        features: as for `feature_network`.
        reference: images or statistics to measure against; None takes those of the data set.
        balance: every class equally often, or as often as in the data.
        sweep: guidances that are drawn and scored beside.
        npz: also write samples.npz for ADM's evaluator.
        batch_size: images drawn at once; None estimates what fits. It changes no score.
        device: see `load_pipeline`.
        dtype: see `load_pipeline`.

    Raises:
        UserError: an argument is not usable, a guard refuses, or `out` holds something else.
    """
    with launched_processes() as processes:
        # everything that can be refused is refused here, before anything is written
        network = feature_network(features, device=choose_device(processes.device(device)))
        pipeline = load_pipeline(model, device=processes.device(device), dtype=dtype)
        names = tuple(pipeline.class_names[str(i)] for i in range(len(pipeline.class_names)))
        splits = open_splits(data, image_size=pipeline.image_size, classes=tuple(classes), wanted=names)
        chosen = choose_classes(pipeline, splits, num, balance)
        size = (pipeline.image_size, pipeline.image_size)
        against = choose_reference(splits, reference, image_size=pipeline.image_size)
        _check_fit(against, network, size)

        def prepared(folder: Path, guided: Mapping[str, Any]) -> ModelSamples:
            return model_samples(
                pipeline, chosen, folder, network, seed=seed, options=guided, steering=steering, dtype=dtype
            )

        main = prepared(out / "samples", options)
        others = {
            guidance_words(one): prepared(
                out / "sweep" / guidance_words(one).replace(":", "-"), {**options, "guidance_scale": one}
            )
            for one in sweep
        }
        protocol = Protocol(
            **_measured_with(network, against, num, size),
            balance=chosen.words,
            classes=splits.class_names,
        )
        subject = model_subject(model, main, steering, dtype)
        done = _finished_record(out, protocol, subject, sweep=list(others))

        # before anything is drawn: the guards of the reference may refuse
        real = None
        if done is None and processes.is_first:
            real = measure_real_side(against, splits, network, protocol.chunk_images)
        start = time.perf_counter()
        drawn = main.draw(network, batch_size=batch_size, processes=processes)
        for words, samples in others.items():
            samples.draw(network, batch_size=batch_size, processes=processes, title=f"guidance {words}")
        processes.wait()
        if not processes.is_first:
            return
        seconds = {"drawing": time.perf_counter() - start} if drawn else {}
        if npz:
            write_adm_images(out / "samples.npz", _images(main), num, main.classes.model_ids)
        if done is None:
            assert real is not None, "the first process has measured them"
            facts = circumstances(pipeline.device, processes=processes.count)
            done = _score_model(
                main, others, splits, against, real, network, protocol, subject, facts | {"seconds": seconds}, out
            )
            write_record(done, out)
        write_report(done, out)
        _say(done, out)


def evaluate_images(
    samples: Path,
    out: Path,
    *,
    reference: Path | None = None,
    data: str | None = None,
    classes: Sequence[str] = (),
    features: str = "lite0",
    device: str = "auto",
) -> None:
    """Score anyone's images: an .npz file or a folder, against another or against a data set.

    Args:
        samples: as for `open_images`.
        out: folder of evaluation.json and the report; new, or of the same images.
        reference: images or statistics to measure against; None takes those of the data set.
        data: data set whose training images judge classes and copies; None leaves both out.
        classes: of the data; none are all.
        features: as for `feature_network`.
        device: where features are computed.

    Raises:
        UserError: an argument is not usable, a guard refuses, or `out` holds something else.
    """
    where = choose_device(device)
    network = feature_network(features, device=where)
    images = open_images(samples)
    size = images.size()
    if data is not None and size[0] != size[1]:
        raise UserError(f"a data set is brought to square images, the samples are {size}. Pass --reference instead.")
    splits = None if data is None else open_splits(data, image_size=size[0], classes=tuple(classes), wanted=())
    against = choose_reference(splits, reference, image_size=min(size))
    _check_fit(against, network, size)
    labels, names = _matched_labels(images, splits)
    protocol = Protocol(
        **_measured_with(network, against, len(images), size),
        balance="as in the samples",
        classes=() if splits is None else splits.class_names,
    )
    subject = Subject(
        name=str(samples), kind="images from elsewhere", fingerprint=images.fingerprint, sampling={}, steering={}
    )
    done = _finished_record(out, protocol, subject, sweep=[])
    if done is None:
        start = time.perf_counter()
        check_value_range(images)
        found = extract_features(network, images.shown("samples"))
        real = measure_real_side(against, splits, network, protocol.chunk_images)
        scored = score_samples(found, labels, against, real, network, names)
        near = nearest_training_images(found, real, network)
        warning = look_at_samples(images, labels, names, out, near, splits)
        done = EvaluationRecord(
            protocol=protocol,
            subject=subject,
            data={} if splits is None else _data(splits),
            circumstances=circumstances(where, processes=1) | {"seconds": {"all": time.perf_counter() - start}},
            warnings=(*scored.warnings, *([warning] if warning else [])),
            scores=scored.scores,
            class_scores=scored.by_class,
            sweep={},
        )
        write_record(done, out)
    write_report(done, out)
    _say(done, out)


def _score_model(
    main: ModelSamples,
    others: Mapping[str, ModelSamples],
    splits: DataSplits,
    against: Reference,
    real: RealSide,
    network: FeatureNetwork,
    protocol: Protocol,
    subject: Subject,
    facts: dict[str, Any],
    out: Path,
) -> EvaluationRecord:
    """Every set of samples against the real images, then the model on held-out images."""
    num, start = len(main), time.perf_counter()
    labels, names = (main.classes.labels if main.classes.names else None), main.classes.names
    found = main.store.features(num)
    scored = score_samples(found, labels, against, real, network, names)
    sweep = {}
    for words, samples in others.items():
        sweep[words] = score_samples(samples.store.features(num), labels, against, real, network, names).scores
    near = nearest_training_images(found, real, network)
    images = ImageSet(str(main.store.folder), "", labels, names, num, lambda: _images(main))
    warning = look_at_samples(images, labels, names, out, near, splits)
    facts["seconds"]["scoring"] = time.perf_counter() - start
    start = time.perf_counter()
    held_out, curves = held_out_scores(main.pipeline, splits.held_out, network, main.classes.ids)
    facts["seconds"]["held-out images"] = time.perf_counter() - start
    return EvaluationRecord(
        protocol=protocol,
        subject=subject,
        data=_data(splits),
        circumstances=facts,
        warnings=(*scored.warnings, *([warning] if warning else [])),
        scores=scored.scores,
        class_scores=scored.by_class,
        held_out=tuple(held_out),
        curves=(*curves, *_usage(main)),
        sweep=sweep,
    )


def _check_fit(against: Reference, network: FeatureNetwork, size: tuple[int, int]) -> None:
    """Raise UserError where the reference has another image size than the samples, or statistics of other features."""
    if against.images is None:
        statistics_space(against, network)
    elif against.images.size() != size:
        raise UserError(
            f"samples and reference must have one size, got {size} and {against.images.size()}. Resize one of them."
        )


def _measured_with(network: FeatureNetwork, against: Reference, num: int, size: tuple[int, int]) -> dict[str, Any]:
    return {
        "features": network.name,
        "features_sha256": network.weights_sha256,
        "preprocessing": network.preprocessing,
        "num_samples": num,
        "chunk_images": against.images_per_measurement(num),
        "image_size": f"{size[0]} x {size[1]}",
        "reference": against.words,
        "reference_images": 0 if against.images is None else len(against.images),
        "reference_sha256": against.fingerprint,
    }


def _finished_record(out: Path, protocol: Protocol, subject: Subject, *, sweep: list[str]) -> EvaluationRecord | None:
    """The record of an earlier run that asked for the same; None where there is something to do.

    Raises:
        UserError: `out` is a file, or holds the evaluation of something else, or other things.
    """
    if out.exists() and not out.is_dir():
        raise UserError(f"--out must be a folder, got the file {out}. Choose another name.")
    if not (out / RECORD).is_file():
        foreign = [
            path.name
            for path in (out.iterdir() if out.exists() else ())
            if path.name not in ("samples", "sweep", "samples.npz")
        ]
        if any(not name.startswith(".") and not name.endswith((".png", ".svg")) for name in foreign):
            raise UserError(
                f"--out must be new, empty or the folder of an evaluation, got {out}. Choose another folder."
            )
        return None
    before = read_record(out)
    if before.subject != subject:
        raise UserError(
            f"{out} holds the evaluation of {before.subject.name} with other weights or options. "
            "Choose another --out; nothing is overwritten."
        )
    if before.protocol != protocol or list(before.sweep) != sweep:
        logger.info("%s is scored again: it was measured in another way before", out)
        return None
    return before


def _matched_labels(images: ImageSet, data: DataSplits | None) -> tuple[Int[np.ndarray, " n"] | None, tuple[str, ...]]:
    """Classes of images from elsewhere in the order of the data set; None where they cannot be told."""
    if data is None or images.labels is None or not data.class_names:
        return None, ()
    names = data.class_names
    if images.class_names:
        if not set(images.class_names) <= set(names):
            logger.warning("%s has classes that %s has not; class scores are left out", images.name, data.spec)
            return None, ()
        return np.array([names.index(name) for name in images.class_names])[images.labels], names
    if images.labels.min() < 0 or images.labels.max() >= len(names):
        logger.warning("%s has labels beyond the classes of %s; class scores are left out", images.name, data.spec)
        return None, ()
    return images.labels, names


def _data(splits: DataSplits) -> dict[str, Any]:
    return {
        "name": splits.spec,
        "classes": list(splits.class_names),
        "training images": splits.num_train,
        "training images measured": len(splits.train),
        "held-out images": len(splits.held_out),
        "train fingerprint": splits.train.fingerprint,
        "held-out fingerprint": splits.held_out.fingerprint,
        "attribution": splits.attribution,
    }


def _images(samples: ModelSamples) -> Iterator[Picture]:
    return (image for chunk in samples.store.read(len(samples)) for image in chunk.images)


def _usage(samples: ModelSamples) -> list[Curve]:
    stages, size = stage_lengths(samples.pipeline), samples.pipeline.codebook_size
    counts = sum(
        (code_counts(chunk.token_ids, list(stages.values()), size) for chunk in samples.store.read(len(samples))),
        start=np.zeros((len(stages), size), np.int64),
    )
    return usage_curves(counts, list(stages), "tokens")


def _say(record: EvaluationRecord, out: Path) -> None:
    """The first scores, and where the others are."""
    for warning in record.warnings:
        logger.info("%s", warning)
    for score in record.scores[:4]:
        logger.info("%s", _line(score))
    logger.info(
        "N = %d, n = %d; all scores: %s", record.protocol.num_samples, record.protocol.chunk_images, out / "report.md"
    )


def _line(score: Score) -> str:
    beside = [
        f"{name} {value:.4g}"
        for name, value in (("floor", score.floor), ("ceiling", score.ceiling))
        if value is not None
    ]
    return f"{score.name}: {score.value:.4g}" + (f" ({', '.join(beside)})" if beside else "")

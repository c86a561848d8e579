"""`isthmus evaluate`, as a story: draw samples, measure the real images, score one against the other, write.

Everything on disk is made once: samples in chunks, then evaluation.json, then the report. A second run with all of it
there only writes the report again.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from isthmus.data.source import ANY_COLUMNS, WantedColumns
from isthmus.errors import UserError
from isthmus.evaluation.adm_npz import write_adm_images
from isthmus.evaluation.circumstances import circumstances
from isthmus.evaluation.evaluation_folder import (
    NPZ,
    SAMPLES_FOLDER,
    STATISTICS,
    SWEEP_FOLDER,
    finish,
    remove_by_products,
    scored_record,
    write_sample_statistics,
)
from isthmus.evaluation.feature_networks import FeatureNetwork, feature_network
from isthmus.evaluation.guards import check_duplicates, pixel_digest
from isthmus.evaluation.held_out import THE_USUAL, Measures, held_out_scores
from isthmus.evaluation.image_sets import ImageSet, Picture
from isthmus.evaluation.likelihood_scores import stage_lengths
from isthmus.evaluation.model_samples import (
    Balance,
    ModelSamples,
    choose_classes,
    model_samples,
    model_subject,
)
from isthmus.evaluation.processes import launched_processes
from isthmus.evaluation.protocol import Curve, EvaluationRecord, Protocol, Subject, write_record
from isthmus.evaluation.real_side import (
    DataSplits,
    RealSide,
    RealSides,
    Reference,
    choose_reference,
    open_splits,
)
from isthmus.evaluation.reference_facts import data_facts, fitting, protocol_of
from isthmus.evaluation.report_pictures import look_at_samples
from isthmus.evaluation.scoring import score_samples
from isthmus.evaluation.usage import code_counts, usage_curves
from isthmus.files import alone_in
from isthmus.functional.guidance import Guidance
from isthmus.generation.options import guidance_text
from isthmus.pipelines.labels import names_in_order
from isthmus.pipelines.loading import choose_device, dtype_name, load_pipeline


@alone_in("out")
def evaluate_model(
    model: str,
    out: Path,
    *,
    data: str,
    classes: Sequence[str] = (),
    columns: WantedColumns = ANY_COLUMNS,
    num: int,
    seed: int = 0,
    options: Mapping[str, Any],
    steering: Mapping[str, Any],
    features: str = "lite0",
    reference: Path | None = None,
    balance: Balance = "uniform",
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

    Under torchrun the processes share the drawing; the first one scores and writes.

    Args:
        model: a pipeline folder or hub id.
        out: folder of samples, evaluation.json and the report; new, or of an evaluation of the same model.
        data: the data set, as for `open_source`: its held-out images, classes and training images.
        classes: of the data; none are those of the model.
        columns: of an hf: table.
        num: N, images in all.
        seed: image i is drawn from (seed, i).
        options: sampling options by name; `FOLDER_DEFAULT` stands for the model's own.
        steering: solver and steps of a D-AR model, where given.
        features: as for `feature_network`.
        reference: images or statistics to measure against; None takes those of the data set.
        balance: every class equally often, or as often as in the data.
        sweep: guidances that are drawn and scored beside.
        npz: also write samples.npz for ADM's evaluator.
        statistics: also write statistics.npz, mean and covariance of the samples' features.
        measures: what is measured on held-out images beyond the usual.
        batch_size: images drawn, rebuilt or read at once; None estimates what fits. It changes no score.
        device: see `load_pipeline`.
        dtype: see `load_pipeline`.
        real_sides: what was measured of real images before, for many evaluations; None measures anew.

    Raises:
        UserError: an argument is not usable, a guard refuses, or `out` holds something else.
    """
    with launched_processes() as processes:
        # everything that can be refused is refused here, before anything is written
        network = feature_network(features, device=choose_device(processes.device(device)))
        # the first process decides for all: a busy core may measure something else
        dtype = processes.agreed(dtype_name(dtype, processes.device(device)))
        pipeline = load_pipeline(model, device=processes.device(device), dtype=dtype)
        names = names_in_order(pipeline.class_names)
        splits = open_splits(
            data, image_size=pipeline.image_size, classes=tuple(classes), wanted=names, columns=columns
        )
        chosen = choose_classes(pipeline, splits, num, balance)
        size = (pipeline.image_size, pipeline.image_size)
        against = fitting(choose_reference(splits, reference, size=size), network, size)
        measures.check(pipeline)
        lpips, extra = measures.lpips(), measures.facts()

        def prepared(folder: Path, guided: Mapping[str, Any]) -> ModelSamples:
            return model_samples(
                pipeline, chosen, folder, network, seed=seed, options=guided, steering=steering, dtype=dtype
            )

        main = prepared(out / SAMPLES_FOLDER, options)
        others = {
            guidance_text(one): prepared(
                out / SWEEP_FOLDER / guidance_text(one).replace(":", "-"), {**options, "guidance_scale": one}
            )
            for one in sweep
        }
        protocol = protocol_of(network, against, splits, num, size, chosen.words)
        subject = model_subject(model, main, steering, dtype)
        done = scored_record(out, protocol, subject, sweep=list(others))

        # before anything is drawn: the guards of the reference may refuse
        real = None
        if done is None and processes.is_first:
            real = (real_sides or RealSides()).measure(against, splits, network, protocol.chunk_images)
        start = time.perf_counter()
        drawn = main.draw(network, batch_size=batch_size, processes=processes)
        for words, samples in others.items():
            samples.draw(network, batch_size=batch_size, processes=processes, title=f"guidance {words}")
        processes.wait()
        if not processes.is_first:
            return
        seconds = {"drawing": time.perf_counter() - start} if drawn else {}
        if done is None:
            remove_by_products(out)
        if npz:
            labels = main.classes.model_ids if pipeline.num_classes else None
            write_adm_images(out / NPZ, _images(main), num, labels, chosen.model_names)
        if statistics:
            write_sample_statistics(out / STATISTICS, main.store.features(num), network)
        if done is None:
            assert real is not None, "the first process has measured them"
            facts = circumstances(pipeline.device, processes=processes.count)
            done = _score_samples(
                main, others, splits, against, real, network, protocol, subject, facts | {"seconds": seconds}, out
            )
            # without measures of held-out images yet: what stops them does not cost the scores
            write_record(done, out)
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
            done = replace(done, measures=extra, held_out=tuple(scores), curves=(*curves, *_usage(main)))
            write_record(done, out)
        finish(done, out)


def _score_samples(
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
    """Every set of samples against the real images."""
    num, start = len(main), time.perf_counter()
    labels, names = (main.classes.labels if main.classes.names else None), main.classes.names
    # before anything is scored: the guard may refuse
    said = {words: [_duplicates(words, samples)] for words, samples in others.items()}
    scored = score_samples(main.store.features(num), labels, against, real, network, names)
    sweep = {}
    for words, samples in others.items():
        swept = score_samples(samples.store.features(num), labels, against, real, network, names)
        sweep[words] = swept.scores
        said[words] += [warning for warning in swept.warnings if warning not in scored.warnings]
    of_sweep = [f"Guidance {words}: {one}" for words, found in said.items() for one in found if one]
    images = ImageSet(str(main.store.folder), "", labels, names, num, lambda: _images(main))
    warning = look_at_samples(images, labels, names, out, scored.neighbours, splits)
    facts["seconds"]["scoring"] = time.perf_counter() - start
    return EvaluationRecord(
        protocol=protocol,
        subject=subject,
        data=data_facts(splits),
        circumstances=facts,
        warnings=(*scored.warnings, *([warning] if warning else []), *of_sweep),
        scores=scored.scores,
        class_scores=scored.by_class,
        measures={},
        sweep=sweep,
    )


def _images(samples: ModelSamples) -> Iterator[Picture]:
    return (image for chunk in samples.store.read(len(samples)) for image in chunk.images)


def _duplicates(guidance: str, samples: ModelSamples) -> str | None:
    """The warning of samples at one guidance of a sweep. Raises `UserError`, which names it, where most are equal."""
    try:
        return check_duplicates([pixel_digest(image) for image in _images(samples)])
    except UserError as error:
        raise UserError(f"guidance {guidance}: {error}") from error


def _usage(samples: ModelSamples) -> list[Curve]:
    stages, size = stage_lengths(samples.pipeline), samples.pipeline.codebook_size
    counts = sum(
        (code_counts(chunk.token_ids, list(stages.values()), size) for chunk in samples.store.read(len(samples))),
        start=np.zeros((len(stages), size), np.int64),
    )
    return usage_curves(counts, list(stages), "tokens")

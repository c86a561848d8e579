"""What is measured on the models of a distillation: cost, time, likelihood, and what their images look like."""

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int

from isthmus.data.batches import EvaluationImages
from isthmus.data.source import ImageSource
from isthmus.evaluation.class_scores import NearestClassMean
from isthmus.evaluation.feature_networks import feature_network
from isthmus.evaluation.features import extract_features
from isthmus.evaluation.statistics import Gaussian, frechet_distance
from isthmus.functional.next_scale_cost import sampling_flops
from isthmus.functional.shapes import Images
from isthmus.pictures import spread, to_uint8
from isthmus.pipelines.next_scale import NextScalePipeline
from isthmus.training.next_scale_family import held_out_bits

TIMED_IMAGES, ROUNDS = 8, 7
_HELD_OUT, _REFERENCE = 1024, 4096
_SPACE = "lite0-192"
_SIZES = ("width", "num_layers", "mlp_ratio", "codebook_size", "codebook_dim", "shared_adaln")


@dataclass(frozen=True)
class ModelFigures:
    """One model of the report.

    Attributes:
        fingerprint: of the pipeline.
        scale_sizes, scale_attention: schedule and mask.
        tokens, forwards: per image; guidance doubles the rows of a forward, not their number. A model that refines its
            draws spends more forwards than it has scales.
        gflop: per image, every scale predicted once, without guidance and without pixels.
        cache_values: keys and values per row; 0 for a Markov model.
        wall_ms, cpu_ms: measured per image, with the model's own guidance and filters, pixels included.
        bits_per_token, bits_per_image: of held-out images under the model's own schedule.
        frechet, class_consistency: of drawn images; None where they were left out.
    """

    fingerprint: str
    scale_sizes: list[int]
    scale_attention: str
    tokens: int
    forwards: int
    gflop: float
    cache_values: int
    wall_ms: float
    cpu_ms: float
    bits_per_token: float
    bits_per_image: float
    frechet: float | None
    class_consistency: float | None


def measured_times(models: Mapping[str, NextScalePipeline], *, seed: int) -> dict[str, tuple[float, float]]:
    """Milliseconds of wall and of CPU time per image: medians over rounds in which the models take turns."""
    rounds: dict[str, list[tuple[float, float]]] = {name: [] for name in models}
    for turn in range(ROUNDS + 1):
        for name, model in models.items():
            wall, cpu = time.perf_counter(), time.process_time()
            model(class_labels(model, TIMED_IMAGES), seed=seed, output_type="pil")  # pictures: the device is waited for
            if turn:  # the first warms up
                rounds[name].append((time.perf_counter() - wall, time.process_time() - cpu))
    per_image = 1e3 / TIMED_IMAGES
    return {
        name: (per_image * statistics.median(w for w, _ in taken), per_image * statistics.median(c for _, c in taken))
        for name, taken in rounds.items()
    }


class ImageJudge:
    """Judges drawn images by features of EfficientNet-Lite0 (192-d, pooled) against real ones.

    Args:
        real: images whose class means and Gaussian are the reference: a few thousand, spread evenly over it.
        image_size: side in pixels.
    """

    def __init__(self, real: ImageSource, image_size: int):
        self._network, self._image_size = feature_network("lite0"), image_size
        rows, labels = self._rows(real, _REFERENCE)
        self._reference = Gaussian.of(rows)
        self._means = NearestClassMean.fit(rows, labels)

    def frechet(self, rows: Float[np.ndarray, "n d"]) -> float:
        """Frechet distance of features to the reference."""
        return frechet_distance(Gaussian.of(rows), self._reference)

    def consistency(self, rows: Float[np.ndarray, "n d"], labels: Int[np.ndarray, " n"]) -> float:
        """Share of images whose nearest class mean is that of their label."""
        return self._means.accuracy(rows, labels)

    def accuracy_of(self, images: ImageSource) -> float:
        """The same share of real images: the ceiling of drawn ones."""
        return self.consistency(*self._rows(images, _HELD_OUT))

    def features(self, images: Images) -> Float[np.ndarray, "n d"]:
        """Features (n, 192) of images in [-1, 1]."""
        return extract_features(self._network, to_uint8(images))[_SPACE]

    def _rows(self, images: ImageSource, limit: int) -> tuple[Float[np.ndarray, "n d"], Int[np.ndarray, " n"]]:
        """Features and labels of so many images."""
        views, chosen = EvaluationImages(images, self._image_size), spread(len(images), limit)
        pixels = (to_uint8(torch.as_tensor(views[i]["image"]).unsqueeze(0))[0] for i in chosen)
        return extract_features(self._network, pixels)[_SPACE], np.asarray(images.labels)[chosen]


def model_figures(
    model: NextScalePipeline,
    fingerprint: str,
    times: tuple[float, float],
    held_out: ImageSource,
    judge: ImageJudge | None,
    *,
    num_images: int,
    seed: int,
) -> ModelFigures:
    """Everything about one model; `judge` None leaves out what is measured on drawn images."""
    config, schedule, markov = model.transformer.config, model.schedule, model.transformer.is_markov
    flops = sampling_flops(schedule.sizes, markov=markov, **{name: config[name] for name in _SIZES})
    bits = _bits(model, held_out)
    frechet, consistency = None, None
    if judge is not None:
        labels = class_labels(model, num_images)
        rows = judge.features(_drawn(model, labels, seed))
        frechet = judge.frechet(rows)
        if model.num_classes > 1:
            consistency = judge.consistency(rows, np.array(labels))
    return ModelFigures(
        fingerprint=fingerprint,
        scale_sizes=list(schedule.sizes),
        scale_attention=config["scale_attention"],
        tokens=schedule.num_tokens,
        forwards=model(class_labels(model, TIMED_IMAGES), seed=seed, output_type="latent").num_forwards,
        gflop=flops / 1e9,
        cache_values=0 if markov else 2 * config["num_layers"] * schedule.num_tokens * config["width"],
        wall_ms=times[0],
        cpu_ms=times[1],
        bits_per_token=bits,
        bits_per_image=bits * schedule.num_tokens,
        frechet=frechet,
        class_consistency=consistency,
    )


@torch.no_grad()
def _bits(model: NextScalePipeline, held_out: ImageSource) -> float:
    tokenizer, schedule, views = model.image_tokenizer, model.schedule, EvaluationImages(held_out, model.image_size)
    ids, labels, chosen = [], [], spread(len(views), _HELD_OUT)
    for start in range(0, len(chosen), 64):
        batch = views.__getitems__(chosen[start : start + 64])
        latents = tokenizer.latents(batch["image"].to(model.device))
        ids.append(torch.cat(tokenizer.requantize(latents, schedule), dim=1))
        labels.append(batch["class_label"].to(model.device))
    return held_out_bits(model.transformer, tokenizer, schedule, (torch.cat(ids), torch.cat(labels)))[
        "val/bits_per_token"
    ]


def _drawn(model: NextScalePipeline, labels: Sequence[int | None], seed: int) -> Images:
    """Images in [-1, 1]; image i is image i of the seed."""
    parts = []
    for start in range(0, len(labels), 32):
        output = model(labels[start : start + 32], seed=seed, image_index=start, output_type="pt")
        parts.append(torch.as_tensor(output.images).cpu() * 2 - 1)
    return torch.cat(parts)


def class_labels(model: NextScalePipeline, count: int) -> list[int | None]:
    """Class after class in turn; no class for a model without."""
    return [i % model.num_classes if model.num_classes else None for i in range(count)]

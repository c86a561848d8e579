import math

import numpy as np
import pytest
import torch

from isthmus.errors import UserError
from isthmus.evaluation.features import FeatureNetwork, feature_network
from isthmus.evaluation.held_out import (
    ReconstructionMeter,
    as_floats,
    likelihood_scores,
    reconstruction_report,
    reconstructions_by_stage,
)
from isthmus.evaluation.statistics import Gaussian
from isthmus.nn.perceptual import Lite0Distance
from isthmus.pictures import to_uint8
from tests.evaluation.photo_crops import photo_crops
from tests.pipelines.tiny import tiny_pipeline
from tests.pipelines.tiny_dar import tiny_dar

pytestmark = pytest.mark.slow

TINY = {"next-scale": tiny_pipeline, "dar": tiny_dar}


@pytest.fixture(scope="module")
def network() -> FeatureNetwork:
    return feature_network("lite0")


@pytest.fixture(params=TINY)
def pipe(request):
    return TINY[request.param]()


def crops(pipe, count: int) -> np.ndarray:
    return photo_crops("chelsea", count, side=pipe.image_size)


def test_equal_images_are_at_no_distance(network):
    images = photo_crops("chelsea", 4)
    meter = ReconstructionMeter(network, Lite0Distance(), None)
    meter.update(images[:3], images[:3])
    meter.update(images[3:], images[3:])
    from isthmus.evaluation.features import extract_features

    scores = meter.scores(Gaussian.of(extract_features(network, images)["lite0-192"]))
    assert len(scores) == 4
    assert scores.ssim is not None
    np.testing.assert_allclose(scores.ssim, 1)
    np.testing.assert_allclose(scores.perceptual, 0, atol=1e-6)
    assert scores.frechet < 1e-3 and scores.psnr.min() > 99


def test_one_level_of_255_everywhere_by_hand(network):
    images = np.full((2, 16, 16, 3), 100, np.uint8)
    meter = ReconstructionMeter(network, Lite0Distance(), None)
    meter.update(images, images + 1)
    from isthmus.evaluation.features import extract_features

    scores = meter.scores(Gaussian.of(extract_features(network, images)["lite0-192"]))
    np.testing.assert_allclose(scores.psnr, 20 * math.log10(255), rtol=1e-4)


def test_distances_are_measured_where_the_features_are(network):
    perceptual = Lite0Distance()
    elsewhere = FeatureNetwork(
        lambda images: {}, name="net", spaces=network.spaces, preprocessing="", weights_sha256="",
        device=torch.device("meta"),
    )  # fmt: skip
    ReconstructionMeter(elsewhere, perceptual, None)
    assert {tensor.device.type for tensor in perceptual.state_dict().values()} == {"meta"}


def test_the_last_stage_is_the_whole_reconstruction(pipe):
    images = as_floats(crops(pipe, 3))
    stages = reconstructions_by_stage(pipe, images, first_index=5)
    last = list(stages.values())[-1]
    if hasattr(pipe, "decoder"):
        whole = pipe.reconstruct(images, seed=0, image_index=5, output_type="latent")
    else:
        whole = pipe.image_tokenizer.decode(pipe.image_tokenizer.encode(images).token_ids)
    assert np.abs(last.astype(int) - to_uint8(torch.as_tensor(whole))).max() <= 1
    assert len(stages) == len(pipe.stage_lengths)


def test_a_report_does_not_depend_on_the_batch(pipe, network):
    images = crops(pipe, 5)
    steps = (2,) if hasattr(pipe, "decoder") else ()
    one, other = (reconstruction_report(pipe, images, network, batch_size=size, solver_steps=steps) for size in (2, 5))
    assert list(one.by_stage) == list(other.by_stage) and list(one.by_solver_steps) == list(steps)
    for a, b in zip([*one.by_stage.values(), one.ruined], [*other.by_stage.values(), other.ruined], strict=True):
        np.testing.assert_allclose(a.psnr, b.psnr, rtol=1e-3)
        np.testing.assert_allclose(a.frechet, b.frechet, rtol=1e-3)
    assert one.whole is list(one.by_stage.values())[-1]


def test_solver_steps_need_a_solver(network):
    pipe = tiny_pipeline()
    with pytest.raises(UserError, match="D-AR"):
        reconstruction_report(pipe, crops(pipe, 2), network, solver_steps=(4,))


def test_a_report_needs_two_images(network):
    pipe = tiny_pipeline()
    with pytest.raises(UserError, match="at least 2"):
        reconstruction_report(pipe, crops(pipe, 1), network)


def test_likelihoods_are_the_pipelines_own(pipe):
    images = crops(pipe, 5)
    labels = [0, None, 2, 1, 1]
    scores = likelihood_scores(pipe, images, labels, batch_size=2)
    expected = pipe.log_prob(as_floats(images), labels)
    np.testing.assert_allclose(scores.nats_per_image, -expected.numpy(), rtol=1e-4)
    lengths = pipe.stage_lengths
    assert sum(lengths.values()) == len(scores.by_position) and list(scores.by_stage) == list(lengths)
    weighted = sum(scores.by_stage[name] * length for name, length in lengths.items())
    np.testing.assert_allclose(weighted / len(scores.by_position), scores.bits_per_token.mean(), rtol=1e-6)


@pytest.mark.parametrize("labels", [[0], [0, 1, 2]])
def test_every_image_needs_a_label(labels):
    pipe = tiny_pipeline()
    with pytest.raises(UserError, match="one class label for each"):
        likelihood_scores(pipe, crops(pipe, 2), labels)

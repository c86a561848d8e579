import math
from pathlib import Path

import numpy as np
import pytest
import torch

from isthmus.errors import UserError
from isthmus.evaluation.features import FeatureNetwork, extract_features, feature_network
from isthmus.evaluation.held_out import (
    LITE0,
    OWN_WORDS,
    PSNR,
    Measures,
    ReconstructionMeter,
    as_floats,
    held_out_scores,
    rebuilt,
    reconstruction_report,
    reconstructions_by_stage,
    token_bits,
)
from isthmus.evaluation.images import ImageSet
from isthmus.evaluation.statistics import Gaussian
from isthmus.nn.perceptual import Lite0Distance
from isthmus.pictures import to_uint8
from tests.evaluation.photo_crops import photo_crops
from tests.pipelines.tiny import tiny_pipeline, tiny_text_pipeline
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
    scores = meter.scores(Gaussian.of(extract_features(network, images)["lite0-192"]))
    assert {name: len(values) for name, values in scores.values.items()} == {PSNR: 4, "SSIM": 4, LITE0: 4}
    np.testing.assert_allclose(scores.values["SSIM"], 1)
    np.testing.assert_allclose(scores.values[LITE0], 0, atol=1e-6)
    assert scores.frechet < 1e-3 and scores.values[PSNR].min() > 99


def test_one_level_of_255_everywhere_by_hand(network):
    images = np.full((2, 16, 16, 3), 100, np.uint8)
    meter = ReconstructionMeter(network, Lite0Distance(), None)
    meter.update(images, images + 1)
    scores = meter.scores(Gaussian.of(extract_features(network, images)["lite0-192"]))
    np.testing.assert_allclose(scores.values[PSNR], 20 * math.log10(255), rtol=1e-4)


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
    if pipe.has_solver:
        whole = pipe.reconstruct(images, seed=0, image_index=5, output_type="latent")
    else:
        whole = pipe.image_tokenizer.decode(pipe.image_tokenizer.encode(images).token_ids)
    assert np.abs(last.astype(int) - to_uint8(torch.as_tensor(whole))).max() <= 1
    assert len(stages) == len(pipe.stage_lengths)


def test_rebuilt_images_are_the_last_stage_whatever_the_batch(pipe):
    pictures = crops(pipe, 5)
    last = list(reconstructions_by_stage(pipe, as_floats(pictures)).values())[-1]
    images = ImageSet("crops", "", None, (), 5, at=lambda i: pictures[i])
    for size in (2, None):
        found = np.stack(list(rebuilt(pipe, images, batch_size=size)))
        assert found.dtype == np.uint8 and np.abs(last.astype(int) - found).max() <= 1


def test_a_report_does_not_depend_on_the_batch(pipe, network):
    images = crops(pipe, 5)
    steps = (2,) if pipe.has_solver else ()
    one, other = (reconstruction_report(pipe, images, network, batch_size=size, solver_steps=steps) for size in (2, 5))
    assert list(one.by_stage) == list(other.by_stage) and list(one.by_solver_steps) == list(map(str, steps))
    for a, b in zip([*one.by_stage.values(), one.ruined], [*other.by_stage.values(), other.ruined], strict=True):
        np.testing.assert_allclose(a.values[PSNR], b.values[PSNR], rtol=1e-3)
        np.testing.assert_allclose(a.frechet, b.frechet, rtol=1e-3)


def test_what_a_model_cannot_be_asked_is_refused():
    pipe = tiny_pipeline()
    with pytest.raises(UserError, match="D-AR"):
        Measures(solver_steps=(4,)).check(pipe)
    with pytest.raises(UserError, match="num_inference_steps"):
        Measures(solver_steps=(0,)).check(tiny_dar())
    with pytest.raises(UserError, match="16 pixels"):
        Measures(lpips_weights=(Path("any.pth"),)).check(pipe)


def test_likelihoods_are_the_pipelines_own(pipe):
    images, labels = crops(pipe, 5), [0, None, 2, 1, 1]
    bits = token_bits(pipe, images, labels, batch_size=2)[OWN_WORDS]
    assert bits.shape == (5, sum(pipe.stage_lengths.values()))
    expected = pipe.log_prob(as_floats(images), labels)
    np.testing.assert_allclose(bits.sum(axis=1) * math.log(2), -expected.numpy(), rtol=1e-4)


def test_captions_are_read_beside_none_and_those_of_others(network):
    pipe, pictures = tiny_text_pipeline(), photo_crops("chelsea", 4, side=8)
    captions, others = ["a cat", "", "an eye", "fur"], ["an eye", "fur", "a cat", ""]
    images = ImageSet("crops", "1", None, (), 4, at=lambda i: pictures[i], captions=captions)
    scores, curves = held_out_scores(pipe, images, network, ())
    found = {score.name: score for score in scores}
    pixels = as_floats(pictures)
    for words, name in (
        (captions, "bits per token"),
        ("", "bits per token without words"),
        (others, "bits per token under another's caption"),
    ):
        bits = pipe.bits_per_token(pixels, prompt=words).double().mean().item()
        assert found[name].value == pytest.approx(bits, rel=1e-4), name
    assert "given their caption" in found["nats per image"].note
    assert "their own captions save" in found["bits per token without words"].note
    # the same without words for a model that reads none
    plain, _ = held_out_scores(tiny_pipeline(), images, network, ())
    assert [score.name for score in plain] == [name for name in found if "word" not in name and "another" not in name]
    assert any(curve.name == "bits per token" for curve in curves)

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from isthmus.errors import UserError
from isthmus.evaluation.features import extract_features, feature_network, score_name
from isthmus.nn.perceptual import packaged_weights
from isthmus.nn.precision import whole_fp32
from tests.evaluation.photo_crops import photo_crops


@pytest.fixture(scope="module")
def dinov2(tmp_path_factory) -> Path:
    """A tiny random DINOv2 as transformers saves it."""
    from transformers import Dinov2Config, Dinov2Model

    folder = tmp_path_factory.mktemp("networks") / "tiny-dino"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = Dinov2Config(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, patch_size=14, image_size=224)
        Dinov2Model(config).save_pretrained(folder)
    return folder


def test_tf32_is_off_inside_and_as_it_was_outside():
    before = (torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32)
    try:
        for allowed in (True, False):
            torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = allowed
            with pytest.raises(KeyError), whole_fp32():
                assert not torch.backends.cudnn.allow_tf32 and not torch.backends.cuda.matmul.allow_tf32
                raise KeyError
            assert torch.backends.cudnn.allow_tf32 is torch.backends.cuda.matmul.allow_tf32 is allowed
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_features_on_a_gpu_are_those_on_the_cpu():
    """To fp32's rounding: with TF32 they are a thousandth away."""
    images = photo_crops("coffee", 8)
    one, other = (extract_features(feature_network("lite0", device=place), images) for place in ("cpu", "cuda"))
    for space, rows in one.items():
        assert np.linalg.norm(other[space] - rows) < 1e-4 * np.linalg.norm(rows)


def test_lite0_says_what_it_is():
    network = feature_network("lite0")
    assert network.weights_sha256 == hashlib.sha256(packaged_weights().read_bytes()).hexdigest()
    assert network.input_size is None and network.logits is None


def test_dinov2_gives_the_class_token_of_the_published_preprocessing(dinov2):
    from transformers import Dinov2Model

    network = feature_network(f"dinov2:{dinov2}")
    assert network.name == "dinov2:tiny-dino" and network.spaces == {"dinov2-tiny-dino-16": 16}
    assert network.weights_sha256 == hashlib.sha256((dinov2 / "model.safetensors").read_bytes()).hexdigest()
    image = photo_crops("coffee", 1, side=60)[0][:, :48]
    # shorter side 48 -> 256, then the central 224 pixels, as Pillow resizes 8-bit pictures
    resized = np.array(Image.fromarray(image).resize((256, 320), Image.Resampling.BICUBIC))
    pixels = torch.from_numpy(resized[48:272, 16:240]).permute(2, 0, 1).float() / 255
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    with torch.no_grad():
        normalised = ((pixels - mean[:, None, None]) / std[:, None, None]).unsqueeze(0)
        expected = Dinov2Model.from_pretrained(dinov2).eval()(normalised).pooler_output.numpy()
    found = extract_features(network, [image])["dinov2-tiny-dino-16"]
    # two resizers differ by a level of 255 here and there
    np.testing.assert_allclose(found, expected, atol=0.02)


def test_dinov2_features_do_not_depend_on_the_batch(dinov2):
    network, images = feature_network(f"dinov2:{dinov2}"), photo_crops("coffee", 3)
    one, other = (extract_features(network, images, batch_size=size)["dinov2-tiny-dino-16"] for size in (1, 3))
    np.testing.assert_allclose(one, other, atol=1e-5)


def test_folders_without_a_dinov2_are_refused(tmp_path, dinov2):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="config.json and safetensors"):
        feature_network(f"dinov2:{tmp_path / 'empty'}")
    from transformers import LlamaConfig

    LlamaConfig(hidden_size=8, num_attention_heads=1).save_pretrained(tmp_path / "llama")
    with pytest.raises(UserError, match="is a llama"):
        feature_network(f"dinov2:{tmp_path / 'llama'}")


def test_a_weight_file_is_not_opened_unless_it_is_the_published_one(tmp_path):
    path = tmp_path / "weights-inception-2015-12-05-6726825d.pth"
    # a pickle that would act if it were opened
    path.write_bytes(b"cos\nsystem\n(S'touch " + str(tmp_path / "opened").encode() + b"'\ntR.")
    with pytest.raises(UserError, match="6726825d0af5"):
        feature_network(f"inception:{path}")
    assert not (tmp_path / "opened").exists()
    with pytest.raises(UserError, match="must be a file"):
        feature_network(f"inception:{tmp_path / 'absent.pth'}")


def test_other_names_are_refused():
    for spec in ("vgg", "inception", "dinov2:", "lite0:x", ""):
        with pytest.raises(UserError, match="features must be lite0"):
            feature_network(spec)


def test_fid_is_one_thing_only():
    assert score_name("frechet", "inception-2048", 10_000, 299) == "FID"
    assert score_name("frechet", "inception-2048", 9_999, 299) == "FD-inception-2048"
    assert score_name("frechet", "inception-2048", 50_000, None) == "FD-inception-2048"
    assert score_name("frechet", "lite0-1280", 50_000, None) == "FD-lite0-1280"
    assert score_name("kernel", "inception-2048", 500, 299) == "KID"

import pytest
import torch
from torch.nn import functional as F

from isthmus.errors import UserError
from isthmus.nn.perceptual import (
    HEAD_WIDTH,
    TAP_BLOCKS,
    TAP_CHANNELS,
    EfficientNetLite0,
    SameConv2d,
    packaged_weights,
)


@pytest.fixture(scope="module")
def network() -> EfficientNetLite0:
    return EfficientNetLite0()


def photograph(name: str) -> torch.Tensor:
    """A photograph of scikit-image's wheel as the network was trained on: centre crop, 224 x 224, in [-1, 1]."""
    import skimage.data

    pixels = torch.from_numpy(getattr(skimage.data, name)()).permute(2, 0, 1)[None].float() / 127.5 - 1
    side = min(pixels.shape[-2:])
    top, left = (pixels.shape[-2] - side) // 2, (pixels.shape[-1] - side) // 2
    square = pixels[..., top : top + side, left : left + side]
    return F.interpolate(square, (224, 224), mode="bicubic", antialias=True).clamp(-1, 1)


# ImageNet's numbers: 281 tabby, 282 tiger cat, 285 Egyptian cat; 967 espresso
@pytest.mark.parametrize(("name", "classes"), [("chelsea", {281, 282, 285}), ("coffee", {967})])
def test_known_pictures_are_named_right(network, name, classes):
    probabilities = network(photograph(name)).softmax(dim=1)[0]
    assert int(probabilities.argmax()) in classes
    assert probabilities[sorted(classes)].sum() > 0.8


def test_features_have_the_published_widths_and_halve_the_side(network):
    features = network.features(torch.zeros(2, 3, 64, 64))
    assert [tap.shape for tap in features.taps] == [
        (2, channels, 64 >> level, 64 >> level) for level, channels in enumerate(TAP_CHANNELS, start=1)
    ]
    assert features.pooled.shape == (2, HEAD_WIDTH)


def test_any_image_size_is_accepted(network):
    assert [tap.shape[-2:] for tap in network.taps(torch.zeros(1, 3, 33, 18))] == [
        (17, 9), (9, 5), (5, 3), (3, 2), (2, 1)
    ]  # fmt: skip


def test_a_choice_of_taps_gives_the_same_maps(network):
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    every = dict(zip(TAP_BLOCKS, network.taps(images), strict=True))
    torch.testing.assert_close(network.taps(images, (2, 10)), (every[2], every[10]))


@pytest.mark.parametrize("blocks", [(), (4, 2), (2, 2), (-1, 3), (16,)])
def test_taps_that_are_none_are_refused(network, blocks):
    with pytest.raises(UserError, match="taps must be increasing block numbers from 0 to 15"):
        network.taps(torch.zeros(1, 3, 32, 32), blocks)


def test_folding_equals_normalising_with_the_stored_statistics(network):
    """The stem with its batch normalisation written out, from the file itself."""
    published = torch.load(packaged_weights(), weights_only=True)
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1
    inputs = (255 * (images + 1) / 2 - 127) / 128
    expected = F.batch_norm(
        F.conv2d(F.pad(inputs, (0, 1, 0, 1)), published["_conv_stem.weight"], stride=2),
        published["_bn0.running_mean"],
        published["_bn0.running_var"],
        published["_bn0.weight"],
        published["_bn0.bias"],
        eps=1e-3,
    )
    torch.testing.assert_close(network.stem(images * 127.5 / 128 + 0.5 / 128), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("side", "kernel", "stride"), [(8, 3, 2), (7, 3, 2), (8, 5, 2), (7, 5, 2), (1, 5, 2), (6, 3, 1)]
)
def test_same_padding_centres_the_kernel(side, kernel, stride):
    """A kernel of ones on an image of ones counts the pixels it covers: symmetric, or one more at the start."""
    convolution = SameConv2d(1, 1, kernel, stride, bias=False)
    torch.nn.init.ones_(convolution.weight)
    covered = convolution(torch.ones(1, 1, side, side))
    assert covered.shape[-1] == -(-side // stride)
    starts = [position * stride - _before(side, kernel, stride) for position in range(covered.shape[-1])]
    counts = torch.tensor([float(len(range(max(s, 0), min(s + kernel, side)))) for s in starts])
    torch.testing.assert_close(covered[0, 0], counts[:, None] * counts[None])


def _before(side: int, kernel: int, stride: int) -> int:
    return max((-(-side // stride) - 1) * stride + kernel - side, 0) // 2


def test_frozen_but_open_to_gradients_of_the_input(network):
    images = (torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(2)) * 2 - 1).requires_grad_()
    network.train()
    network.features(images).pooled.sum().backward()
    assert images.grad is not None and images.grad.abs().sum() > 0
    assert not any(parameter.requires_grad for parameter in network.parameters())
    with torch.no_grad():
        trained = network(images)
        torch.testing.assert_close(network.eval()(images), trained, rtol=0, atol=0)


def test_a_foreign_file_is_refused_in_words(tmp_path):
    state = torch.load(packaged_weights(), weights_only=True)
    del state["_fc.bias"]
    state["extra"] = torch.zeros(1)
    torch.save(state, tmp_path / "other.pth")
    with pytest.raises(UserError, match=r"other\.pth lacks 1 of them \(first: \['_fc\.bias'\]\) and has 1 others"):
        EfficientNetLite0(tmp_path / "other.pth")

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional as F

from isthmus.errors import UserError
from isthmus.nn.perceptual import (
    HEAD_WIDTH,
    TAP_BLOCKS,
    TAP_CHANNELS,
    EfficientNetLite0,
    Lite0Distance,
    LPIPSDistance,
    SameConv2d,
    packaged_weights,
    ssim,
    tap_distance,
    unit_channels,
)
from isthmus.published import lpips_distance, perceptual_distance


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
def test_known_pictures_are_named_right(network):
    for name, classes in (("chelsea", {281, 282, 285}), ("coffee", {967})):
        probabilities = network(photograph(name)).softmax(dim=1)[0]
        assert int(probabilities.argmax()) in classes
        assert probabilities[sorted(classes)].sum() > 0.8


def test_features_have_the_published_widths_and_halve_the_side(network):
    features = network.features(torch.zeros(2, 3, 64, 64))
    assert [tap.shape for tap in features.taps] == [
        (2, channels, 64 >> level, 64 >> level) for level, channels in enumerate(TAP_CHANNELS, start=1)
    ]
    assert features.pooled.shape == (2, HEAD_WIDTH)
    # any size is accepted
    assert [tap.shape[-2:] for tap in network.taps(torch.zeros(1, 3, 33, 18))] == [
        (17, 9), (9, 5), (5, 3), (3, 2), (2, 1)
    ]  # fmt: skip


def test_a_choice_of_taps_gives_the_same_maps(network):
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    every = dict(zip(TAP_BLOCKS, network.taps(images), strict=True))
    torch.testing.assert_close(network.taps(images, (2, 10)), (every[2], every[10]))
    for blocks in ((), (4, 2), (2, 2), (-1, 3), (16,)):
        with pytest.raises(UserError, match="taps must be increasing block numbers from 0 to 15"):
            network.taps(images, blocks)


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


def test_same_padding_centres_the_kernel():
    """A kernel of ones on an image of ones counts the pixels it covers: symmetric, or one more at the start."""
    for side, kernel, stride in ((8, 3, 2), (7, 3, 2), (8, 5, 2), (7, 5, 2), (1, 5, 2), (6, 3, 1)):
        convolution = SameConv2d(1, 1, kernel, stride, bias=False)
        torch.nn.init.ones_(convolution.weight)
        covered = convolution(torch.ones(1, 1, side, side))
        assert covered.shape[-1] == -(-side // stride)
        before = max((covered.shape[-1] - 1) * stride + kernel - side, 0) // 2
        starts = [position * stride - before for position in range(covered.shape[-1])]
        counts = torch.tensor([float(len(range(max(s, 0), min(s + kernel, side)))) for s in starts])
        torch.testing.assert_close(covered[0, 0], counts[:, None] * counts[None])


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
    with pytest.raises(UserError, match=r"other\.pth must .*missing _fc\.bias; unexpected extra"):
        EfficientNetLite0(tmp_path / "other.pth")


CONVOLUTIONS = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)
WIDTHS = (64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512)


@pytest.fixture(scope="module")
def vgg_weights() -> dict[str, torch.Tensor]:
    """Random weights under torchvision's names for VGG16 (its classifier left out) and LPIPS' names for the heads."""
    generator = torch.Generator().manual_seed(0)
    weights, channels = {}, 3
    for index, width in zip(CONVOLUTIONS, WIDTHS, strict=True):
        weights[f"features.{index}.weight"] = (
            torch.randn(width, channels, 3, 3, generator=generator) / (channels * 4.5) ** 0.5
        )
        weights[f"features.{index}.bias"] = torch.randn(width, generator=generator) * 0.01
        channels = width
    for index, width in enumerate((64, 128, 256, 512, 512)):
        weights[f"lin{index}.model.1.weight"] = torch.rand(1, width, 1, 1, generator=generator)
    return weights


def some_images(count: int = 2, side: int = 32, seed: int = 3) -> torch.Tensor:
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def test_tap_distance_by_hand():
    """Two places: the same direction (0 apart) and orthogonal directions (|(1,0) - (0,1)|^2 = 2); the mean is 1."""
    a = torch.tensor([[[[2.0, 5.0]], [[0.0, 0.0]]]])
    b = torch.tensor([[[[7.0, 0.0]], [[0.0, 3.0]]]])
    torch.testing.assert_close(tap_distance(a, b), torch.tensor([1.0]))


def test_all_zero_features_have_finite_gradients():
    zeros = torch.zeros(1, 4, 2, 2, requires_grad=True)
    (unit_channels(zeros) - 1).square().sum().backward()
    assert zeros.grad is not None and torch.isfinite(zeros.grad).all()


def test_lite0_distance_is_zero_only_for_equal_images_and_symmetric(network):
    distance, images = Lite0Distance(network=network), some_images()
    torch.testing.assert_close(distance(images, images), torch.zeros(2))
    apart = distance(images, images.flip(0))
    assert (apart > 0.1).all()
    torch.testing.assert_close(apart[0], apart[1], rtol=1e-4, atol=1e-5)


def test_lite0_distance_grows_with_noise(network):
    distance, images = Lite0Distance(network=network), some_images(side=64) * 0.2
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(9))
    grown = [float(distance(images + level * noise, images).mean()) for level in (0.02, 0.1, 0.4)]
    assert grown == sorted(grown)


def test_an_image_does_not_feel_its_neighbours_and_taps_add_up(network):
    distance, images, targets = Lite0Distance(network=network), some_images(), some_images(seed=4)
    parts = [Lite0Distance(taps=(tap,), network=network)(images, targets) for tap in (0, 4)]
    torch.testing.assert_close(Lite0Distance(taps=(0, 4), network=network)(images, targets), sum(parts))
    alone = torch.cat([distance(images[i : i + 1], targets[i : i + 1]) for i in range(2)])
    torch.testing.assert_close(distance(images, targets), alone, rtol=1e-4, atol=1e-5)


def test_gradients_reach_the_image_and_nothing_else(network):
    images, targets = some_images().requires_grad_(), some_images(seed=4).requires_grad_()
    Lite0Distance(network=network)(images, targets).sum().backward()
    assert images.grad is not None and images.grad.abs().sum() > 0
    assert targets.grad is None


def test_lpips_equals_its_definition(vgg_weights):
    """The definition written out once more, from the published names."""
    images, targets = some_images(), some_images(seed=4)
    shift = torch.tensor([-0.030, -0.088, -0.188])[None, :, None, None]
    scale = torch.tensor([0.458, 0.448, 0.450])[None, :, None, None]

    def taps(x):
        x = (x - shift) / scale
        maps = []
        for index in CONVOLUTIONS:
            if index in (5, 10, 17, 24):
                x = torch.nn.functional.max_pool2d(x, 2)
            weight, bias = vgg_weights[f"features.{index}.weight"], vgg_weights[f"features.{index}.bias"]
            x = torch.relu(torch.nn.functional.conv2d(x, weight, bias, padding=1))
            if index in (2, 7, 14, 21, 28):
                maps.append(torch.nn.functional.normalize(x, dim=1))
        return maps

    expected = sum(
        torch.nn.functional.conv2d((a - b) ** 2, vgg_weights[f"lin{i}.model.1.weight"]).mean(dim=(1, 2, 3))
        for i, (a, b) in enumerate(zip(taps(images), taps(targets), strict=True))
    )
    torch.testing.assert_close(LPIPSDistance(vgg_weights)(images, targets), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_lpips_reads_the_published_forms(vgg_weights, tmp_path):
    """One safetensors file; torchvision's checkpoint beside the heads; a saved LPIPS module. All the same distance."""
    whole, body, heads, module = (tmp_path / n for n in ("a.safetensors", "vgg16.pth", "heads.pth", "lpips.pth"))
    save_file(vgg_weights, whole)
    features = {k: v for k, v in vgg_weights.items() if k.startswith("features.")}
    lins = {k: v for k, v in vgg_weights.items() if k.startswith("lin")}
    torch.save(features | {"classifier.0.weight": torch.zeros(1)}, body)
    torch.save(lins, heads)
    slices = {f"net.slice1.{k.removeprefix('features.')}": v for k, v in features.items()}
    torch.save(
        slices | lins | {"lins.0.model.1.weight": lins["lin0.model.1.weight"], "scaling_layer.shift": torch.zeros(1)},
        module,
    )

    images, targets = some_images(1), some_images(1, seed=4)
    expected = LPIPSDistance(vgg_weights)(images, targets)
    for files in ([whole], [body, heads], [module]):
        torch.testing.assert_close(perceptual_distance("lpips", lpips_weights=files)(images, targets), expected)


def test_lpips_refuses_what_does_not_fit(vgg_weights, tmp_path):
    incomplete = {k: v for k, v in vgg_weights.items() if k != "lin3.model.1.weight"}
    for weights, said in (
        (incomplete, r"missing lin3\.model\.1\.weight"),
        (vgg_weights | {"fire.weight": torch.zeros(1)}, r"unexpected fire\.weight"),
        (vgg_weights | {"lin0.model.1.weight": torch.zeros(1, 32, 1, 1)}, r"lin0\.model\.1\.weight is \(1, 32, 1, 1\)"),
    ):
        with pytest.raises(UserError, match=said):
            LPIPSDistance(weights)
    torch.save(vgg_weights | {"features.0.bias": torch.full((64,), torch.nan)}, tmp_path / "nan.pth")
    with pytest.raises(UserError, match=r"NaN or infinity in features.0.bias of .*nan\.pth"):
        lpips_distance(tmp_path / "nan.pth")


def test_a_run_names_its_distance():
    assert isinstance(perceptual_distance("lite0", taps=(0, 2)), Lite0Distance)


def test_it_is_the_published_index():
    from skimage.metrics import structural_similarity

    generator = torch.Generator().manual_seed(0)
    images = torch.rand(2, 3, 20, 17, generator=generator) * 2 - 1
    targets = (images + 0.2 * torch.randn(2, 3, 20, 17, generator=generator)).clamp(-1, 1)
    expected = [
        structural_similarity(
            a.double().numpy(), b.double().numpy(), channel_axis=0, data_range=2, gaussian_weights=True,
            sigma=1.5, use_sample_covariance=False,
        )
        for a, b in zip(images, targets, strict=True)
    ]  # fmt: skip
    np.testing.assert_allclose(ssim(images, targets).numpy(), expected, rtol=1e-5)


def test_two_flat_images_by_hand():
    # no variance: only (2 m n + c) / (m^2 + n^2 + c) with c = 0.02^2 is left
    a, b = torch.full((1, 3, 12, 12), 0.5), torch.full((1, 3, 12, 12), -0.1)
    torch.testing.assert_close(ssim(a, b), torch.tensor([(-0.1 + 4e-4) / (0.25 + 0.01 + 4e-4)]))
    with pytest.raises(UserError, match="at least 11 px"):
        ssim(torch.zeros(1, 3, 10, 12), torch.zeros(1, 3, 10, 12))

import pytest
import torch
from safetensors.torch import save_file

from isthmus.errors import UserError
from isthmus.nn.perceptual import (
    EfficientNetLite0,
    Lite0Distance,
    LPIPSDistance,
    perceptual_distance,
    tap_distance,
    unit_channels,
)

CONVOLUTIONS = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)
WIDTHS = (64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512)


@pytest.fixture(scope="module")
def lite0() -> EfficientNetLite0:
    return EfficientNetLite0()


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


def test_lite0_distance_is_zero_only_for_equal_images_and_symmetric(lite0):
    distance, images = Lite0Distance(network=lite0), some_images()
    torch.testing.assert_close(distance(images, images), torch.zeros(2))
    apart = distance(images, images.flip(0))
    assert (apart > 0.1).all()
    torch.testing.assert_close(apart[0], apart[1], rtol=1e-4, atol=1e-5)


def test_lite0_distance_grows_with_noise(lite0):
    distance, images = Lite0Distance(network=lite0), some_images(side=64) * 0.2
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(9))
    grown = [float(distance(images + level * noise, images).mean()) for level in (0.02, 0.1, 0.4)]
    assert grown == sorted(grown)


def test_taps_add_up(lite0):
    images, targets = some_images(), some_images(seed=4)
    parts = [Lite0Distance(taps=(tap,), network=lite0)(images, targets) for tap in (0, 4)]
    torch.testing.assert_close(Lite0Distance(taps=(0, 4), network=lite0)(images, targets), sum(parts))


def test_an_image_does_not_feel_its_neighbours(lite0):
    distance, images, targets = Lite0Distance(network=lite0), some_images(), some_images(seed=4)
    alone = torch.cat([distance(images[i : i + 1], targets[i : i + 1]) for i in range(2)])
    torch.testing.assert_close(distance(images, targets), alone, rtol=1e-4, atol=1e-5)


def test_gradients_reach_the_image_and_nothing_else(lite0):
    images, targets = some_images().requires_grad_(), some_images(seed=4).requires_grad_()
    Lite0Distance(network=lite0)(images, targets).sum().backward()
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
    with pytest.raises(UserError, match=r"Missing 1 \(first: \['lin3\.model\.1\.weight'\]\)"):
        LPIPSDistance(incomplete)
    with pytest.raises(UserError, match=r"unknown 1 \(first: \['fire\.weight'\]\)"):
        LPIPSDistance(vgg_weights | {"fire.weight": torch.zeros(1)})
    with pytest.raises(UserError, match=r"of another shape 1 \(first: \['lin0\.model\.1\.weight \(1, 32, 1, 1\)'\]\)"):
        LPIPSDistance(vgg_weights | {"lin0.model.1.weight": torch.zeros(1, 32, 1, 1)})
    with pytest.raises(UserError, match="is none"):
        LPIPSDistance.from_files(tmp_path / "absent.pth")


@pytest.mark.parametrize("name", ["cut.pth", "cut.safetensors"])
def test_lpips_names_a_truncated_file(name, tmp_path):
    (tmp_path / name).write_bytes(b"\x80\x02garbage")
    with pytest.raises(UserError, match=f"{name} cannot be read"):
        LPIPSDistance.from_files(tmp_path / name)


def test_lpips_runs_no_pickled_code(tmp_path):
    torch.save({"features.0.weight": UserError("any object")}, tmp_path / "objects.pth")
    with pytest.raises(UserError, match=r"objects\.pth cannot be read"):
        LPIPSDistance.from_files(tmp_path / "objects.pth")


def test_a_run_names_its_distance():
    assert isinstance(perceptual_distance("lite0", taps=(0, 2)), Lite0Distance)
    with pytest.raises(UserError, match="lpips distance needs weight files"):
        perceptual_distance("lpips")

"""Frozen features that the decoder's are aligned with: maps of the right places, from files that are checked."""

import json

import pytest
import torch
from transformers import Dinov2Config, Dinov2Model, ViTConfig

from isthmus.dar.runs import DiffusionTokenizerLoss
from isthmus.dar.tokenizer_losses import DINOv2Features, Lite0Features, feature_shape, frozen_features
from isthmus.errors import UserError


@pytest.fixture(scope="module")
def dino(tmp_path_factory):
    """A tiny DINOv2 as transformers saves it, with patches of 2 px; and the network itself."""
    folder = tmp_path_factory.mktemp("dino")
    torch.manual_seed(0)
    config = Dinov2Config(
        hidden_size=12, num_hidden_layers=1, num_attention_heads=2, mlp_ratio=2, patch_size=2, image_size=32
    )
    network = Dinov2Model(config).eval()
    network.save_pretrained(folder)
    return folder, network


def test_lite0_maps_lie_on_the_grid_of_the_finest_tap():
    network = Lite0Features((2, 4))
    features = network(torch.randn(2, 3, 32, 32))
    assert features.shape == (2, 24 + 40, 8, 8) and feature_shape(network, 32) == (64, 8)
    lengths = features.split([24, 40], dim=1)
    for part in lengths:
        torch.testing.assert_close(part.norm(dim=1), torch.ones(2, 8, 8), atol=1e-4, rtol=0)
    assert not any(p.requires_grad for p in network.parameters())


def test_dinov2_gives_normalised_patch_features_in_their_places(dino):
    folder, network = dino
    loss = DiffusionTokenizerLoss(alignment=1.0, alignment_network="dinov2", alignment_folder=folder)
    teacher = frozen_features(loss)
    # 16 x 16 patches of 2 px: an image of 32 px goes in as it is, but for the normalisation
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    normalized = ((images + 1) / 2 - mean.view(1, 3, 1, 1)) / std.view(1, 3, 1, 1)
    with torch.no_grad():
        rows = network(pixel_values=normalized).last_hidden_state[:, 1:]
    features = teacher(images)
    assert features.shape == (2, 12, 16, 16) and feature_shape(teacher, 64) == (12, 16)
    torch.testing.assert_close(features[:, :, 3, 5], rows[:, 3 * 16 + 5], atol=1e-5, rtol=0)
    assert not any(p.requires_grad for p in teacher.parameters()) and not teacher.training


def test_other_folders_are_refused_in_words(dino, tmp_path):
    folder, _ = dino
    with pytest.raises(UserError, match="alignment_folder must hold a DINOv2"):
        DINOv2Features(tmp_path / "nowhere")
    ViTConfig().save_pretrained(tmp_path / "vit")
    with pytest.raises(UserError, match="got a vit"):
        DINOv2Features(tmp_path / "vit")
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(UserError, match="safetensors"):
        DINOv2Features(tmp_path / "bare")
    deeper = json.loads((folder / "config.json").read_text()) | {"num_hidden_layers": 2}
    deeper |= {"out_features": None, "out_indices": None, "stage_names": None}
    (tmp_path / "bare" / "config.json").write_text(json.dumps(deeper))
    (tmp_path / "bare" / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    with pytest.raises(UserError, match="lacks"):
        DINOv2Features(tmp_path / "bare")

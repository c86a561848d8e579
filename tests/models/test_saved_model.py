import copy
import pickle

import pytest
import torch

from isthmus.dar.scheduler import FlowMatchingScheduler
from isthmus.dar.tokenizer import DiffusionTokenizer
from isthmus.errors import UserError
from isthmus.nn.saved_model import Config, Recorded, records_arguments, without_values

SIZES = {
    "image_size": 8, "patch_size": 4, "width": 8, "num_layers": 1, "condition_width": 8, "num_condition_layers": 1,
    "num_tokens": 4, "num_groups": 2, "codebook_size": 16, "codebook_dim": 4, "head_width": 4,
}  # fmt: skip


class Pair(Recorded):
    @records_arguments
    def __init__(self, left: int, right: tuple[int, ...] = (1, 2), *, name: str = "pair"):
        self.total = left + sum(right)


def test_arguments_are_recorded_with_their_defaults():
    assert Pair(3).config == {"left": 3, "right": (1, 2), "name": "pair"}
    assert Pair(3, name="other").config.name == "other"
    with pytest.raises(TypeError, match="left"):
        Pair()


def test_a_configuration_cannot_be_changed_and_can_be_copied():
    config = Config(width=8, sizes=(1, 2))
    for change in (lambda: config.__setitem__("width", 4), lambda: setattr(config, "width", 4)):
        with pytest.raises(TypeError, match="width"):
            change()
    with pytest.raises(AttributeError, match="'depth'"):
        config.depth  # noqa: B018
    for again in (copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
        assert again == config and type(again) is Config


def test_what_is_saved_comes_back(tmp_path):
    Pair(3, (4, 5)).save_pretrained(tmp_path)
    again = Pair.from_pretrained(tmp_path)
    assert again.total == 12 and list(again.config.right) == [4, 5]
    with pytest.raises(UserError, match="must hold a FlowMatchingScheduler, got Pair"):
        FlowMatchingScheduler.from_pretrained(tmp_path)


def test_networks_without_values_have_the_same_shapes_and_take_no_random_numbers():
    before = torch.get_rng_state()
    with without_values():
        empty = DiffusionTokenizer(**SIZES)
    assert torch.equal(torch.get_rng_state(), before)
    real = DiffusionTokenizer(**SIZES)
    assert {n: t.shape for n, t in empty.state_dict().items()} == {n: t.shape for n, t in real.state_dict().items()}
    assert empty.device.type == "meta"


def test_a_type_is_for_weights_alone(tmp_path):
    # the norm of the latents counts its batches in whole numbers
    model = DiffusionTokenizer(**SIZES, latent_norm=True)
    model.save_pretrained(tmp_path)
    loaded = DiffusionTokenizer.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert loaded.dtype == torch.bfloat16 and not loaded.training
    assert loaded.latent_batch_norm.num_batches_tracked.dtype == torch.int64
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value.to(loaded.state_dict()[name].dtype)), name

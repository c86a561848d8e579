import pytest
import torch
from torch.testing import assert_close

from isthmus.errors import UserError
from isthmus.models.token_critic import TokenCritic, critic_measures
from tests.testers import ModelLaws, randomized

ARGUMENTS = {"scale_sizes": (1, 2, 4), "codebook_size": 10, "codebook_dim": 4, "width": 8, "num_blocks": 2}


class TestTokenCritic(ModelLaws):
    def floats(self, output):
        return output.plausibility

    @pytest.fixture
    def model(self):
        return randomized(TokenCritic(**ARGUMENTS))

    @pytest.fixture
    def inputs(self):
        generator = torch.Generator().manual_seed(0)
        maps = [torch.randn(3, 4, side, side, generator=generator) for side in (2, 4)]
        logits = torch.randn(3, 4, 10, generator=generator)
        return *maps, critic_measures(logits, torch.tensor([[0, 1, 2, 3]] * 3)), 2

    def test_an_image_alone(self, model, inputs):
        codes, features, measures, side = inputs
        whole = model(*inputs).plausibility
        assert whole.shape == (3, 4)
        assert_close(model(codes[1:2], features[1:2], measures[1:2], side).plausibility[0], whole[1])

    def test_a_side_of_another_model(self, model, inputs):
        with pytest.raises(UserError, match="sides"):
            model(*inputs[:3], 3)


def test_measures_by_hand():
    logits = torch.log(torch.tensor([[[0.5, 0.25, 0.25]]]))
    found = critic_measures(logits, torch.tensor([[1]]))[0, 0]
    assert_close(found, torch.tensor([0.25, 2**1.5, 0.25]).log() * torch.tensor([1, 1, 0]) + torch.tensor([0, 0, 0.25]))


def test_filtered_logits_have_finite_entropy():
    logits = torch.tensor([[[0.0, 0.0, float("-inf")]]])
    assert_close(critic_measures(logits, torch.tensor([[0]]))[0, 0, 1], torch.tensor(2.0).log())


def test_width_fits_the_norm():
    with pytest.raises(UserError, match="multiple of 8"):
        TokenCritic(**(ARGUMENTS | {"width": 12}))

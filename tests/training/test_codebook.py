"""A codebook starts from the data, its dead codes come back to life, and how much of it is used is counted."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from isthmus.dar import train_tokenizer as dar
from isthmus.dar.tokenizer import DiffusionTokenizer
from isthmus.errors import UserError
from isthmus.next_scale import train_tokenizer as next_scale
from isthmus.next_scale.runs import TokenizerRun
from isthmus.next_scale.tokenizer import MultiScaleVQVAE
from isthmus.nn.quantization import k_means
from isthmus.training.codebook import CodebookUsage, code_counts, perplexity, set_codes
from isthmus.training.config import OptimConfig
from isthmus.training.optim import ExponentialMovingAverage
from tests.testers import randomized

CODEBOOK = "codebook.weight"


def test_k_means_lowers_the_distortion_of_its_start_and_repeats():
    points = torch.randn(400, 4, generator=torch.Generator().manual_seed(0))

    def distortion(means: torch.Tensor) -> float:
        return float(torch.cdist(points, means).min(dim=1).values.square().mean())

    by_rounds = [distortion(k_means(points, 8, seed=0, num_rounds=rounds)) for rounds in (0, 1, 3, 10)]
    assert by_rounds == sorted(by_rounds, reverse=True) and by_rounds[-1] < 0.9 * by_rounds[0]
    assert torch.equal(k_means(points, 8, seed=0), k_means(points, 8, seed=0))


def test_every_mean_ends_as_the_mean_of_its_points():
    points = torch.randn(100, 2, generator=torch.Generator().manual_seed(1))
    means = k_means(points, 4, seed=0, num_rounds=200)
    nearest = torch.cdist(points, means).argmin(dim=1)
    for index, mean in enumerate(means):
        torch.testing.assert_close(points[nearest == index].mean(dim=0), mean)


def test_fewer_points_than_means_gives_distinct_means():
    means = k_means(torch.randn(3, 4), 8, seed=0)
    assert len(means.unique(dim=0)) == 8 and means.isfinite().all()


class CodebookLaws:
    """A subclass has a fixture `model` with 16 codes and says what its codes start from and move to."""

    def first_codes(self, model: nn.Module, images: Tensor, *, seed: int) -> Tensor:
        raise AssertionError("a test class says what its codebook starts from")

    def new_codes(self, model: nn.Module, latents: Tensor, count: int) -> Tensor:
        raise AssertionError("a test class says what its dead codes move to")

    def test_a_codebook_from_the_data_is_nearer_than_a_random_one_and_depends_on_the_seed_alone(self, model):
        images, errors, average = torch.rand(32, 3, 8, 8) * 2 - 1, [], ExponentialMovingAverage(model, 0.9)
        for start in (False, True, True):
            if start:
                set_codes(model, CODEBOOK, self.first_codes(model.train(), images, seed=0), average)
            with torch.no_grad():
                errors.append(self.error(model.eval(), images))
        assert errors[1] == errors[2] < 0.5 * errors[0]
        assert torch.equal(average.averages[CODEBOOK], model.codebook.weight)

    def test_only_dead_codes_move_and_their_averages_with_them(self, model):
        latents = model.latents(torch.randn(8, 3, 8, 8)).detach()
        before, dead = model.codebook.weight.clone(), torch.arange(16) % 2 == 0
        average = ExponentialMovingAverage(model, 0.9)
        set_codes(model, CODEBOOK, self.new_codes(model, latents, 8), average, rows=dead)
        for codes in (model.codebook.weight, average.averages[CODEBOOK]):
            assert torch.equal((codes != before).any(dim=1), dead)


class TestMultiScaleCodebook(CodebookLaws):
    @pytest.fixture
    def model(self) -> MultiScaleVQVAE:
        return MultiScaleVQVAE(
            codebook_size=16, codebook_dim=4, scale_sizes=(1, 2, 4), base_channels=32, channel_multipliers=(1, 1),
            num_res_blocks=1,
        )  # fmt: skip

    def first_codes(self, model, images, *, seed):
        return next_scale.first_codes(model, images, seed=seed)

    def new_codes(self, model, latents, count):
        return next_scale.random_residuals(model, latents, count, seed=0, step=5)

    def error(self, model, images):
        latents = model.latents(images)
        return (model.features_up_to(model.requantize(latents), 2) - latents).square().mean().item()

    def test_following_residuals_without_error_leaves_only_what_phi_cannot_undo(self, model):
        latents = torch.randn(2, 4, 4, 4)
        vectors = next_scale.residual_vectors(model, latents, exact=True)
        assert [len(rows) for rows in vectors] == [2, 8, 32]
        # scale 0 codes the mean of the latents
        torch.testing.assert_close(vectors[0], latents.mean(dim=(2, 3)))


class TestUnitCodebook(CodebookLaws):
    @pytest.fixture
    def model(self) -> DiffusionTokenizer:
        arguments = {
            "image_size": 8, "patch_size": 4, "width": 16, "num_layers": 1, "condition_width": 16,
            "num_condition_layers": 1, "head_width": 8, "num_tokens": 4, "num_groups": 2, "codebook_size": 16,
            "codebook_dim": 4, "latent_norm": True,
        }  # fmt: skip
        return randomized(DiffusionTokenizer(**arguments))

    def first_codes(self, model, images, *, seed):
        return dar.first_codes(model, images, 16, seed=seed)

    def new_codes(self, model, latents, count):
        return dar.random_latents(latents, count, seed=0, step=5)

    def error(self, model, images):
        encoded = model.encode(images)
        return (encoded.quantized - encoded.latents).square().mean().item()

    def test_it_starts_as_unit_vectors_and_leaves_running_statistics_alone(self, model):
        statistics = model.latent_batch_norm.running_mean.clone()
        codes = dar.first_codes(model.train(), torch.randn(32, 3, 8, 8), 16, seed=0)
        torch.testing.assert_close(codes.norm(dim=1), torch.ones(16))
        assert torch.equal(model.latent_batch_norm.running_mean, statistics) and model.training

    def test_every_dead_code_moves_to_a_latent_of_its_own(self, model):
        latents = model.latents(torch.randn(8, 3, 8, 8)).detach()
        rows = dar.random_latents(latents, 8, seed=0, step=5)
        hits = (rows.unsqueeze(1) == latents.flatten(0, 1)).all(dim=2)
        assert hits.any(dim=1).all() and len(hits.int().argmax(dim=1).unique()) == 8
        # there is no end of codes, but of latents
        assert len(dar.random_latents(latents, 40, seed=0, step=5).unique(dim=0)) == 32


def one_hot(*hits):
    return torch.tensor(hits, dtype=torch.float32)


def test_counts_are_per_scale():
    token_ids = [torch.tensor([[3], [3]]), torch.tensor([[0, 1, 1, 2], [2, 2, 2, 2]])]
    assert code_counts(token_ids, 5).tolist() == [[0, 0, 0, 2, 0], [1, 2, 5, 0, 0]]


def test_constant_hits_are_their_own_average_from_the_first_step():
    usage = CodebookUsage(num_scales=2, codebook_size=3)
    counts = one_hot([1, 0, 0], [1, 2, 1])
    assert usage.hits().sum() == 0 and not usage.used().any()
    for step in range(1, 6):
        usage.update(counts)
        assert usage.step == step
        torch.testing.assert_close(usage.hits(), counts)


def test_average_by_hand():
    usage = CodebookUsage(num_scales=1, codebook_size=2, decay=0.5)
    usage.update(one_hot([4, 0]))
    usage.update(one_hot([0, 4]))
    # (0.5 * 0.5 * 4, 0.5 * 4) / (1 - 0.25)
    torch.testing.assert_close(usage.hits(), one_hot([4 / 3, 8 / 3]))


def test_perplexity_of_known_distributions():
    usage = CodebookUsage(num_scales=3, codebook_size=4)
    assert perplexity(usage.hits()).tolist() == [1, 1, 1]
    usage.update(one_hot([8, 0, 0, 0], [2, 2, 0, 0], [1, 1, 1, 1]))
    torch.testing.assert_close(perplexity(usage.hits()), one_hot(1, 2, 4))
    assert usage.used().sum(dim=1).tolist() == [1, 2, 4]


def test_threshold_follows_the_tokens_of_the_scale():
    # 100 and 10,000 tokens over 4 codes: alike would be 25 and 2,500 hits, 8 % of that 2 and 200
    usage = CodebookUsage(num_scales=2, codebook_size=4)
    usage.update(one_hot([47, 49, 3, 1], [4_700, 4_990, 300, 10]))
    assert usage.used().tolist() == [[True, True, True, False]] * 2


def test_saved_usage_goes_on_as_if_never_interrupted():
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randint(0, 9, (2, 5), generator=generator).float() for _ in range(6)]
    straight, first, second = (CodebookUsage(num_scales=2, codebook_size=5) for _ in range(3))
    for counts in batches:
        straight.update(counts)
    for counts in batches[:3]:
        first.update(counts)
    state = first.state_dict()
    first.update(batches[3])  # what was saved is a copy
    second.load_state_dict(state)
    for counts in batches[3:]:
        second.update(counts)
    assert torch.equal(second.hits(), straight.hits()) and second.step == straight.step


def test_state_of_another_tokenizer_is_refused():
    for state in ({}, {"average": torch.zeros(1, 5), "step": torch.tensor(3)}):
        with pytest.raises(UserError, match="codebook usage"):
            CodebookUsage(num_scales=2, codebook_size=5).load_state_dict(state)


def test_steps_revive_until_the_last_fifth_and_tie_a_run_to_its_length():
    run = TokenizerRun(revive_every=10, num_steps=100)
    assert [step for step in range(1, 101) if run.revives_at(step)] == list(range(10, 81, 10))
    longer = replace(run, num_steps=200, optim=OptimConfig(schedule="constant"))
    # the steps 90 and 100 would have revived in a run of 200; of the first 85 none does otherwise
    assert longer.tied_to_length(100, 100) == ["revive_every 10"] and longer.tied_to_length(100, 85) == []
    for other in ({"revive_every": 0}, {"freeze_encoder": True, "from_model": "m"}):
        assert replace(longer, **other).tied_to_length(100, 100) == []

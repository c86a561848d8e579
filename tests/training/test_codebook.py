"""The codebook starts from the data and its dead codes come back to life."""

import torch

from isthmus.next_scale.tokenizer import MultiScaleVQVAE
from isthmus.next_scale.train_tokenizer import initialize_codebook, k_means, residual_vectors, revive_codes


def tiny() -> MultiScaleVQVAE:
    torch.manual_seed(0)
    return MultiScaleVQVAE(
        codebook_size=16, codebook_dim=4, scale_sizes=(1, 2, 4), base_channels=32, channel_multipliers=(1, 1),
        num_res_blocks=1,
    )  # fmt: skip


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


def test_following_residuals_without_error_leaves_only_what_phi_cannot_undo():
    model = tiny()
    latents = torch.randn(2, 4, 4, 4)
    vectors = residual_vectors(model, latents, exact=True)
    assert [len(rows) for rows in vectors] == [2, 8, 32]
    # scale 0 codes the mean of the latents
    torch.testing.assert_close(vectors[0], latents.mean(dim=(2, 3)))


def test_a_codebook_from_the_data_beats_a_random_one():
    model = tiny()
    images = torch.rand(32, 3, 8, 8) * 2 - 1
    latents = model.latents(images)

    @torch.no_grad()
    def error() -> float:
        ids = model.requantize(latents)
        return float((model.features_up_to(ids, 2) - latents).square().mean())

    before = error()
    initialize_codebook(model, images, seed=0)
    assert error() < before


def test_revival_moves_dead_codes_only():
    model = tiny()
    dead = torch.zeros(16, dtype=torch.bool)
    dead[[3, 5]] = True
    before = model.codebook.weight.detach().clone()
    latents = torch.randn(2, 4, 4, 4)
    assert revive_codes(model, dead, latents, seed=0, step=1) == 2
    changed = (model.codebook.weight != before).any(dim=1)
    assert torch.equal(changed, dead)
    assert revive_codes(model, torch.zeros(16, dtype=torch.bool), latents, seed=0, step=1) == 0

"""Losses by hand, and draws that belong to a position whatever the batch."""

from itertools import combinations

import pytest
import torch
import torch.nn.functional as F

from isthmus.next_scale.pyramid import ScaleSchedule
from isthmus.next_scale.train_prior import next_scale_loss, path_factors, scale_subset, scale_weights, select_scales
from isthmus.training.images import dropped_labels

SCHEDULE = ScaleSchedule((1, 2, 3), (0, 0, 0))


def test_token_uniform_is_the_plain_mean_over_tokens():
    logits, ids = torch.randn(2, 14, 5), torch.randint(5, (2, 14))
    weights = scale_weights("token-uniform", SCHEDULE.sizes)
    losses = next_scale_loss(logits, ids, SCHEDULE, weights, scales=(0, 1, 2))
    torch.testing.assert_close(losses.total, F.cross_entropy(logits.flatten(0, 1), ids.flatten()))


def test_lognormal_weights_are_the_published_ones():
    # spec of VAR, 4.4
    sizes = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
    published = [0.0247, 0.0642, 0.1150, 0.1379, 0.1402, 0.1329, 0.1208, 0.1054, 0.0882, 0.0709]
    assert scale_weights("lognormal", sizes) == pytest.approx(published, abs=5e-5)
    sizes = (1, 2, 3, 4, 6, 9, 13, 18, 24, 32)
    published = [0.0196, 0.0667, 0.1141, 0.1389, 0.1379, 0.1246, 0.1112, 0.1037, 0.0958, 0.0876]
    assert scale_weights("lognormal", sizes) == pytest.approx(published, abs=5e-5)


def test_mean_over_all_subsets_of_scales_is_the_full_loss():
    logits, ids = torch.randn(2, 14, 5), torch.randint(5, (2, 14))
    for kind in ("token-uniform", "lognormal"):
        weights, parts = scale_weights(kind, SCHEDULE.sizes), []
        full = next_scale_loss(logits, ids, SCHEDULE, weights, scales=(0, 1, 2)).total
        for chosen in combinations(range(3), 2):
            rows = [select_scales(values, SCHEDULE, chosen) for values in (logits, ids)]
            parts.append(next_scale_loss(*rows, SCHEDULE, weights, scales=chosen).total)
        torch.testing.assert_close(torch.stack(parts).mean(), full)


def test_draws_belong_to_positions_not_to_batches():
    labels, positions = torch.arange(64) % 3, torch.arange(100, 164)
    whole = dropped_labels(labels, positions, rate=0.5, null_class_id=3, seed=1)
    halves = [
        dropped_labels(labels[part], positions[part], rate=0.5, null_class_id=3, seed=1)
        for part in (slice(0, 20), slice(20, 64))
    ]
    assert torch.equal(whole, torch.cat(halves))
    assert 10 < int((whole == 3).sum()) < 54
    factors = path_factors(positions, (0.0, 0.5), seed=1)
    assert torch.equal(factors[7:9], path_factors(positions[7:9], (0.0, 0.5), seed=1))
    assert set(factors[:, 0].flatten().tolist()) == {1.0} and set(factors[:, 1].flatten().tolist()) == {0.0, 2.0}
    assert path_factors(positions, (0.0, 0.0), seed=1) is None


def test_dropping_none_or_all():
    labels, positions = torch.arange(8) % 2, torch.arange(8)
    assert torch.equal(dropped_labels(labels, positions, rate=0.0, null_class_id=2, seed=0), labels)
    assert dropped_labels(labels, positions, rate=1.0, null_class_id=2, seed=0).eq(2).all()


def test_every_scale_gets_its_turn():
    drawn = [scale_subset(6, 2, seed=0, step=step) for step in range(200)]
    assert all(len(scales) == 2 and scales == tuple(sorted(scales)) for scales in drawn)
    assert {k for scales in drawn for k in scales} == set(range(6))
    assert scale_subset(6, None, seed=0, step=0) == tuple(range(6)) == scale_subset(6, 9, seed=0, step=0)

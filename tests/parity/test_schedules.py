"""Tables of the published code: phi per scale, Gumbel temperature, stochastic depth, guidance."""

import pytest

from isthmus.next_scale.pyramid import ScaleSchedule, default_phi_indices
from isthmus.next_scale.transformer import NextScaleTransformer
from isthmus.nn.guidance import GuidanceSchedule
from isthmus.nn.sampling import smooth_temperature


def test_phi_of_every_number_of_scales(golden):
    tables = golden.json("var/schedules.json")["phi_index_per_scale(share_quant_resi=4)"]
    assert {int(k) for k in tables} == set(range(2, 15))
    for num_scales, table in tables.items():
        assert list(default_phi_indices(int(num_scales), 4)) == table, num_scales


def test_phi_of_derived_schedules():
    for sizes in [(1, 2, 3, 4, 5, 6, 8, 10, 13, 16), (1, 2, 3, 4, 6, 9, 13, 18, 24, 32)]:
        # phi goes by index, not by side: the published file has one table for both
        assert default_phi_indices(len(sizes), 4) == (0, 0, 1, 1, 1, 2, 2, 3, 3, 3)
    official = ScaleSchedule((1, 2, 3, 4, 5, 6, 8, 10, 13, 16), default_phi_indices(10, 4))
    derived = official.derive((1, 3, 5, 8, 13, 16))
    assert derived.phi_indices == (0, 1, 1, 2, 3, 3)
    assert derived.phi_indices != default_phi_indices(6, 4)


def test_gumbel_temperature(golden):
    tables = golden.json("var/schedules.json")["gumbel_tau(i of K)"]
    for num_scales, table in tables.items():
        found = [smooth_temperature(k / (int(num_scales) - 1)) for k in range(int(num_scales))]
        assert found == pytest.approx(table, abs=1e-12)
    assert smooth_temperature(2.0) == 0.005


def test_stochastic_depth(golden):
    for depth, table in golden.json("var/schedules.json")["drop_path"].items():
        arguments = {"scale_sizes": (1, 2), "codebook_size": 4, "codebook_dim": 2, "width": 8, "num_heads": 2}
        prior = NextScaleTransformer(**arguments, num_layers=int(depth), num_classes=1, drop_path=0.1 * int(depth) / 24)
        assert prior.drop_path_rates == pytest.approx(table, abs=1e-7)


def test_published_guidance_is_a_linear_schedule():
    # published: (1 + t) cond - t uncond with t = cfg k / (K - 1), which is scale 1 + t here
    for cfg in (0.0, 1.5, 4.0):
        found = GuidanceSchedule("linear", 1.0, 1.0 + cfg).values(10)
        assert found == pytest.approx([1 + cfg * k / 9 for k in range(10)])

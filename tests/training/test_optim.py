"""Rates are the published functions of the step, decay spares what the published groups spare, averages by hand."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from isthmus.next_scale.transformer import NextScaleTransformer
from isthmus.training.config import OptimConfig
from isthmus.training.optim import (
    ExponentialMovingAverage,
    adamw,
    decays,
    learning_rate,
    set_rates,
    weight_decay,
)

PUBLISHED = {
    "lin0|wpe=0.1": {"schedule": "linear", "plateau": 0.05, "final_ratio": 0.1},
    "lin0|wpe=0.01": {"schedule": "linear", "plateau": 0.05, "final_ratio": 0.01},
    "lin|wpe=0.01": {"schedule": "linear", "plateau": 0.15, "final_ratio": 0.01},
    "lin00|wpe=0.01": {"schedule": "linear", "plateau": 0.0, "final_ratio": 0.01},
    "lin0.8|wpe=0.01": {"schedule": "two-slope", "knee": 0.8, "final_ratio": 0.01},
    "cos|wpe=0.01": {"schedule": "cosine", "final_ratio": 0.01},
    "exp|wpe=0.01": {"schedule": "exponential", "plateau": 0.15, "final_ratio": 0.01},
}


def test_rates_equal_the_published_tables(golden):
    tables = golden.json("var/schedules.json")
    published = next(value for key, value in tables.items() if key.startswith("lr_wd"))
    for name, settings in PUBLISHED.items():
        config = OptimConfig(
            learning_rate=3e-4, warmup_steps=20, weight_decay=0.05, final_weight_decay=0.08, **settings
        )
        for step, rate, decay, _ in published[name]:
            assert learning_rate(step, config, 1000) == pytest.approx(rate, rel=1e-9), name
            assert weight_decay(step, config, 1000) == pytest.approx(decay, rel=1e-9), name


@given(st.sampled_from(["linear", "cosine", "exponential", "two-slope"]), st.integers(2, 300), st.integers(0, 50))
def test_rate_stays_between_its_ends_and_falls_after_the_warm_up(schedule, num_steps, warmup_steps):
    config = OptimConfig(schedule=schedule, learning_rate=1.0, warmup_steps=min(warmup_steps, num_steps - 1))
    rates = [learning_rate(step, config, num_steps) for step in range(num_steps)]
    assert all(0 < rate <= 1 for rate in rates)
    falling = rates[config.warmup_steps :]
    assert all(after <= before + 1e-12 for before, after in pairwise(falling))


def tiny_transformer(**arguments):
    return NextScaleTransformer(
        scale_sizes=(1, 2), codebook_size=8, codebook_dim=4, width=8, num_layers=1, num_heads=2, num_classes=3,
        **arguments,
    )  # fmt: skip


def test_decay_groups_are_the_published_ones():
    for shared_adaln in (False, True):
        model = tiny_transformer(shared_adaln=shared_adaln)
        decayed = {name for name, p in model.named_parameters() if decays(name, p)}
        expected = {"word_embedding.weight", "class_embedding.weight", "head_modulation.weight", "head.weight"}
        expected |= {f"blocks.0.{n}.weight" for n in ("attention.qkv", "attention.proj")}
        expected |= {f"blocks.0.feed_forward.{n}.weight" for n in ("up", "down")}
        expected |= {"shared_modulation.linear.weight"} if shared_adaln else {"blocks.0.modulation.linear.weight"}
        assert decayed == expected


def test_set_rates_reaches_every_group():
    model = tiny_transformer()
    config = OptimConfig(learning_rate=0.5, warmup_steps=0, schedule="constant", weight_decay=0.25)
    optimizer = adamw(model, config)
    assert set_rates(optimizer, 3, config, 10) == 0.5
    assert sorted((g["lr"], g["weight_decay"]) for g in optimizer.param_groups) == [(0.5, 0.0), (0.5, 0.25)]
    assert sum(len(g["params"]) for g in optimizer.param_groups) == len(list(model.parameters()))


def test_averages_by_hand_leave_out_what_is_frozen():
    model = nn.Linear(1, 1)
    model.bias.requires_grad_(False)
    with torch.no_grad():
        model.weight.fill_(1.0)
    ema = ExponentialMovingAverage(model, decay=0.5)
    assert set(ema.averages) == {"weight"}
    with torch.no_grad():
        model.weight.fill_(3.0)
    ema.update(model)  # the first decay is min(0.5, 1/10)
    torch.testing.assert_close(ema.averages["weight"], torch.tensor([[0.1 * 1 + 0.9 * 3]]))
    ema.num_updates = 1000
    ema.update(model)
    torch.testing.assert_close(ema.averages["weight"], torch.tensor([[0.5 * 2.8 + 0.5 * 3]]))


def test_state_of_averages_round_trip_and_restart():
    model = nn.Linear(2, 2)
    ema = ExponentialMovingAverage(model, decay=0.9)
    ema.update(model)
    other = ExponentialMovingAverage(nn.Linear(2, 2), decay=0.9)
    other.load_state_dict(ema.state_dict())
    assert other.num_updates == 1 and torch.equal(other.averages["weight"], ema.averages["weight"])
    with torch.no_grad():
        model.weight.zero_()
    ema.restart("weight", model.weight, rows=torch.tensor([True, False]))
    assert ema.averages["weight"][0].eq(0).all() and ema.averages["weight"][1].ne(0).all()

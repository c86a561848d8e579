"""Averages by hand, and a restart that forgets only what was set by hand."""

import torch
from torch import nn

from isthmus.training.optim import ExponentialMovingAverage


def test_averages_by_hand():
    model = nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        model.weight.fill_(1.0)
    ema = ExponentialMovingAverage(model, decay=0.5)
    with torch.no_grad():
        model.weight.fill_(3.0)
    ema.update(model)  # the first decay is min(0.5, 1/10)
    torch.testing.assert_close(ema.averages["weight"], torch.tensor([[0.1 * 1 + 0.9 * 3]]))
    ema.num_updates = 1000
    ema.update(model)
    torch.testing.assert_close(ema.averages["weight"], torch.tensor([[0.5 * 2.8 + 0.5 * 3]]))


def test_state_round_trip_and_restart():
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


def test_frozen_parameters_are_left_out():
    model = nn.Linear(2, 2)
    model.bias.requires_grad_(False)
    assert set(ExponentialMovingAverage(model, decay=0.9).averages) == {"weight"}

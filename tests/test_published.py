"""Files with settings beside the weights: two known classes come back inert, anything else is refused, nothing runs."""

import argparse
import io
import pickle
import sys
import types

import pytest
import torch

from isthmus.errors import UserError
from isthmus.published import load_strict, read_file, read_weights

RAN = []


def ran(*args):
    """What a pickle would call if anything in it were run."""
    RAN.append(args)


class Config:
    """As in the published training code: settings under `_data`, and code that must never run here."""

    def __init__(self, data):
        self._data = data

    def __setstate__(self, state):
        ran(state)
        self.__dict__.update(state)


class Dangerous:
    """Its pickle is a call."""

    def __reduce__(self):
        return print, ("this must never be printed",)


@pytest.fixture
def small():
    return {"a.weight": torch.arange(6.0).view(2, 3), "b": torch.tensor([1, 2])}


@pytest.fixture
def published_config(monkeypatch):
    """Makes a settings object whose class pickle knows as `config_util.Config`; the module is there while it saves.

    Not a mock: pickle writes the name of the module it finds a class in, and published files name this one.
    """
    module = types.ModuleType("config_util")
    monkeypatch.setattr(Config, "__module__", "config_util")
    module.Config = Config
    monkeypatch.setitem(sys.modules, "config_util", module)
    return Config


def saved(path, content):
    torch.save(content, path)
    return path


def test_settings_of_a_training_file_become_plain_values(small, published_config, tmp_path):
    config = published_config({"num_all_queries": 32, "diff_decoder": published_config({"time_shift": 2})})
    content = {
        "model": {key: value + 1 for key, value in small.items()},
        "ema": {f"_orig_mod.{key}": value for key, value in small.items()},
        "optimizer": {"state": {}, "param_groups": [{"lr": 1e-4}]},
        "steps": 7,
        "args": argparse.Namespace(lr=1e-4, image_size=256),
        "config": config,
    }
    path = saved(tmp_path / "tokenizer.pt", content)
    RAN.clear()
    weights, config = read_file(path)
    assert config == {"num_all_queries": 32, "diff_decoder": {"time_shift": 2}}
    assert set(weights) == set(small)
    assert all(torch.equal(weights[key], small[key]) for key in small)  # the EMA copy, its prefix taken off
    assert RAN == []  # not even the class's own __setstate__


def test_settings_of_other_kinds(small, published_config, tmp_path, monkeypatch):
    path = saved(tmp_path / "tokenizer.pt", {"model": small, "config": published_config({"vq_dim": 8})})
    # as on a reader's machine, which has no such module
    monkeypatch.delitem(sys.modules, "config_util")
    assert read_file(path)[1] == {"vq_dim": 8}
    for config in ({"vq_dim": 8}, argparse.Namespace(vq_dim=8)):
        assert read_file(saved(path, {"model": small, "config": config}))[1] == {"vq_dim": 8}
    for no_settings in (None, 3, ["vq_dim"], "v1"):
        assert read_file(saved(path, {"model": small, "config": no_settings}))[1] == {}
    assert read_file(saved(path, small))[1] == {}


def test_an_object_of_another_class_is_refused_and_not_run(small, published_config, tmp_path, capsys):
    for content in (
        {"model": small, "config": Dangerous()},
        {"model": small, "args": argparse.Namespace(hook=Dangerous())},
        {"model": small, "config": published_config({"hook": Dangerous()})},
    ):
        with pytest.raises(UserError, match="never runs pickled code"):
            read_weights(saved(tmp_path / "weights.pt", content))

    # a pickle may name a known class and call it with anything: it gets an empty object
    class Caller:
        def __reduce__(self):
            return argparse.Namespace, (), {"lr": 1.0}

    _, config = read_file(saved(tmp_path / "weights.pt", {"model": small, "config": Caller()}))
    assert config == {"lr": 1.0}
    assert capsys.readouterr().out == ""


def test_allowing_the_two_names_is_over_when_the_file_is_read(small, tmp_path):
    path = saved(tmp_path / "weights.pt", {"model": small, "args": argparse.Namespace(lr=1.0)})
    before = set(torch.serialization.get_safe_globals())
    read_weights(path)
    assert set(torch.serialization.get_safe_globals()) == before
    with pytest.raises(pickle.UnpicklingError):
        torch.load(io.BytesIO(path.read_bytes()), weights_only=True)


def test_weights_that_are_not_finite_are_refused():
    model = torch.nn.Linear(2, 1)
    state = {"weight": torch.tensor([[1.0, float("nan")]]), "bias": torch.zeros(1)}
    with pytest.raises(UserError, match="NaN or infinity in weight of the prior file"):
        load_strict(model, state, "the prior file")
    assert torch.isfinite(model.weight).all()

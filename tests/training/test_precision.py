"""Training with products in bf16: what stays fp32, and a run that goes on in the type it began with."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from isthmus.training.config import Run
from tests.training.tiny_runs import FAMILIES, assert_same, killed_after, prior_run, train

pytestmark = pytest.mark.slow

TRAININGS = [(family, kind) for family in FAMILIES for kind in ("tokenizer", "prior")]


@pytest.fixture(scope="module")
def straight(tmp_path_factory, images) -> dict[tuple[str, str], Run]:
    """Every training in bf16 without an interruption."""
    runs: dict[tuple[str, str], Run] = {}
    for name, family in FAMILIES.items():
        folder = tmp_path_factory.mktemp("bf16")
        tokenizer = runs[name, "tokenizer"] = family.tokenizer_run(images, folder / "tokenizer", mixed_precision="bf16")
        prior = family.prior_run(images, folder / "prior", tokenizer.out, mixed_precision="bf16")
        runs[name, "prior"] = prior
        train(tokenizer), train(prior)
    return runs


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {
        f"{path.parent.name}/{path.name}/{name}": tensor
        for path in sorted(folder.rglob("*.safetensors"))
        for name, tensor in load_file(path).items()
    }


@pytest.mark.parametrize("training", TRAININGS)
def test_an_interrupted_run_in_bf16_goes_on_bit_for_bit_and_keeps_everything_in_fp32(tmp_path, straight, training):
    run = straight[training]
    again = train(killed_after(4, run, tmp_path / "run"))
    checkpoints = [folder / "checkpoints" / "checkpoint-00000006" for folder in (run.out, again)]
    assert_same(*map(tensors_of, checkpoints))
    optimizer = torch.load(checkpoints[0] / "optimizer.bin", weights_only=True)["state"]
    moments = [value for state in optimizer.values() for value in state.values() if isinstance(value, torch.Tensor)]
    kept = [*tensors_of(checkpoints[0]).values(), *moments]
    assert kept and not [t.dtype for t in kept if t.is_floating_point() and t.dtype != torch.float32]


def test_the_type_and_its_reason_are_recorded(tmp_path, images, trained_tokenizer):
    folder = train(prior_run(images, tmp_path / "run", trained_tokenizer, num_steps=2, mixed_precision="auto"))
    precision = json.loads((folder / "run.json").read_text())["precision"]
    assert precision["why"].startswith("bf16: products" if precision["bf16"] else "float32: products")


@pytest.mark.parametrize("bf16", [True, False, None])
def test_a_run_goes_on_in_the_type_it_began_with(tmp_path, images, straight, trained_tokenizer, trained_prior, bf16):
    """Whatever a machine measures: the record of the folder decides; one of a version that did not measure, fp32."""
    before = straight["next-scale", "prior"] if bf16 else prior_run(images, trained_prior, trained_tokenizer)
    run = replace(killed_after(2, before, tmp_path / "run"), mixed_precision="auto")
    record = json.loads((run.out / "run.json").read_text())
    record["run"]["mixed_precision"] = "auto"
    del record["precision"]
    if bf16 is not None:
        record["precision"] = {"bf16": bf16, "why": "as it was measured"}
    (run.out / "run.json").write_text(json.dumps(record))
    train(run)
    precision = json.loads((run.out / "run.json").read_text())["precision"]
    assert precision == record.get("precision", {"bf16": False, "why": "float32: as the run began"})
    assert_same(*(tensors_of(each.out / "checkpoints" / "checkpoint-00000006") for each in (before, run)))


def test_runs_of_two_types_fit_into_one_process(tmp_path, images, trained_tokenizer):
    for number, name in enumerate(("no", "bf16", "no")):
        train(prior_run(images, tmp_path / str(number), trained_tokenizer, num_steps=2, mixed_precision=name))

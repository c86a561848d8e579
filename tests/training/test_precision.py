"""Training with products in bf16: what stays fp32, and a run that goes on in the type it began with."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from isthmus.training.train_prior import train_prior
from isthmus.training.train_tokenizer import train_tokenizer
from tests.training.tiny_dar_runs import diffusion_tokenizer_run, next_token_prior_run
from tests.training.tiny_runs import prior_run, tokenizer_run

pytestmark = pytest.mark.slow

TRAININGS = {
    "tokenizer": (tokenizer_run, train_tokenizer),
    "prior": (prior_run, train_prior),
    "diffusion tokenizer": (diffusion_tokenizer_run, train_tokenizer),
    "next-token prior": (next_token_prior_run, train_prior),
}


@pytest.fixture(scope="module")
def straight(tmp_path_factory, images) -> dict[str, Path]:
    """Every training in bf16 without an interruption."""
    folders: dict[str, Path] = {}
    for name, before in zip(TRAININGS, (None, "tokenizer", None, "diffusion tokenizer"), strict=True):
        folder = tmp_path_factory.mktemp("bf16") / "run"
        folders[name] = train(name, images, folder, None if before is None else folders[before])
    return folders


def train(name: str, images: str, out: Path, tokenizer: Path | None, *, mixed_precision: str = "bf16") -> Path:
    make, training = TRAININGS[name]
    run = make(images, out) if tokenizer is None else make(images, out, tokenizer)
    training(replace(run, mixed_precision=mixed_precision))
    return out


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {
        f"{path.parent.name}/{path.name}/{name}": tensor
        for path in sorted(folder.rglob("*.safetensors"))
        for name, tensor in load_file(path).items()
    }


def forget_after(out: Path, step: int) -> None:
    for checkpoint in (out / "checkpoints").iterdir():
        if int(checkpoint.name.split("-")[1]) > step:
            shutil.rmtree(checkpoint)


@pytest.mark.parametrize("name", TRAININGS)
def test_an_interrupted_run_in_bf16_goes_on_bit_for_bit(tmp_path, images, straight, name):
    out = tmp_path / "run"
    shutil.copytree(straight[name], out)
    forget_after(out, 4)
    tokenizer = json.loads((out / "run.json").read_text())["run"].get("tokenizer")
    train(name, images, out, Path(tokenizer) if tokenizer else None)
    expected, found = (tensors_of(folder / "checkpoints" / "checkpoint-00000006") for folder in (straight[name], out))
    assert expected.keys() == found.keys()
    assert not [key for key in expected if not torch.equal(expected[key], found[key])]


@pytest.mark.parametrize("name", TRAININGS)
def test_weights_averages_and_statistics_are_kept_in_fp32(straight, name):
    checkpoint = straight[name] / "checkpoints" / "checkpoint-00000006"
    optimizer = torch.load(checkpoint / "optimizer.bin", weights_only=True)["state"]
    moments = [value for state in optimizer.values() for value in state.values() if isinstance(value, torch.Tensor)]
    kept = [*tensors_of(checkpoint).values(), *moments]
    assert kept and not [t.dtype for t in kept if t.is_floating_point() and t.dtype != torch.float32]


def test_the_type_and_its_reason_are_recorded(tmp_path, images, trained_tokenizer):
    folder = train("prior", images, tmp_path / "run", trained_tokenizer, mixed_precision="auto")
    precision = json.loads((folder / "run.json").read_text())["precision"]
    assert precision["why"].startswith("bf16: products" if precision["bf16"] else "float32: products")


@pytest.mark.parametrize("bf16", [True, False])
def test_a_run_goes_on_in_the_type_it_began_with(tmp_path, images, trained_tokenizer, bf16):
    """Whatever a machine measures: the record of the folder decides about the rest of the run."""
    straight = train(
        "prior", images, tmp_path / "straight", trained_tokenizer, mixed_precision="bf16" if bf16 else "no"
    )
    out = tmp_path / "run"
    shutil.copytree(straight, out)
    forget_after(out, 2)
    record = json.loads((out / "run.json").read_text())
    record["run"]["mixed_precision"] = "auto"
    record["precision"] = {"bf16": bf16, "why": "as it was measured"}
    (out / "run.json").write_text(json.dumps(record))
    train("prior", images, out, trained_tokenizer, mixed_precision="auto")
    assert json.loads((out / "run.json").read_text())["precision"] == record["precision"]
    expected, found = (tensors_of(folder / "checkpoints" / "checkpoint-00000006") for folder in (straight, out))
    assert not [key for key in expected if not torch.equal(expected[key], found[key])]


def test_a_run_of_a_version_that_did_not_measure_goes_on_in_float32(tmp_path, images, trained_tokenizer):
    straight = train("prior", images, tmp_path / "straight", trained_tokenizer, mixed_precision="no")
    forget_after(straight, 2)
    record = json.loads((straight / "run.json").read_text())
    record["run"]["mixed_precision"] = "auto"
    del record["precision"]
    (straight / "run.json").write_text(json.dumps(record))
    train("prior", images, straight, trained_tokenizer, mixed_precision="auto")
    assert json.loads((straight / "run.json").read_text())["precision"]["bf16"] is False


def test_runs_of_two_types_fit_into_one_process(tmp_path, images, trained_tokenizer):
    for name in ("no", "bf16", "no"):
        train(
            "prior",
            images,
            tmp_path / f"{name}{len(list(tmp_path.iterdir()))}",
            trained_tokenizer,
            mixed_precision=name,
        )

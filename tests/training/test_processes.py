"""Two processes train what one trains, on the same global batch, whatever is shared out."""

import json
import shutil
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from safetensors.torch import load_file

from isthmus.next_scale.runs import PriorRun, TokenizerRun
from isthmus.next_scale.transformer import NextScaleTransformer
from isthmus.training.config import run_to_json
from isthmus.training.saved_networks import averaged_model
from isthmus.training.train_prior import train_prior
from isthmus.training.train_tokenizer import train_tokenizer
from tests.made_once import made_once
from tests.testers import LOGGED
from tests.training.test_runs import forget_after
from tests.training.tiny_runs import prior_run, tokenizer_run
from tests.training.two_processes import same_tensors, three_steps, tiny_prior

REPOSITORY = Path(__file__).resolve().parents[2]


def log_lines(out: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def assert_same_log(first: Path, second: Path) -> None:
    """Every number of every step, measurements on held-out images included."""
    for a, b in zip(log_lines(first), log_lines(second), strict=True):
        assert b == pytest.approx(a, **LOGGED), f"step {a['step']}"


@dataclass(frozen=True)
class Runs:
    """Runs of this process (`one`) and of two (`two`), by name, and what the two said."""

    folder: Path
    one: dict[str, TokenizerRun | PriorRun]
    two: dict[str, TokenizerRun | PriorRun]
    said: list[dict[str, object]]


def train(run: TokenizerRun | PriorRun) -> None:
    train_tokenizer(run) if isinstance(run, TokenizerRun) else train_prior(run)


@pytest.fixture(scope="module")
def runs(tmp_path_factory, images, trained_tokenizer) -> Runs:
    """Train everything once with one process and once with two (started together, since a start takes seconds)."""
    return made_once(tmp_path_factory, "processes", lambda folder: trained_runs(folder, images, trained_tokenizer))


def trained_runs(folder: Path, images: str, trained_tokenizer: Path) -> Runs:
    long = {"num_steps": 20, "save_every": 10, "preview_every": 20, "validate_every": 10}
    one = {
        # usage, revival, the discriminator and its adaptive weight
        "tokenizer": tokenizer_run(images, folder / "one-tokenizer", revive_every=2, **long),
        # stochastic depth, label dropout, a batch in two parts
        "prior": prior_run(images, folder / "one-prior", trained_tokenizer, accumulate=2, **long),
        # steps that leave some weights without a gradient
        "scales": prior_run(images, folder / "one-scales", trained_tokenizer, scales_per_step=1),
    }
    for run in one.values():
        train(run)
    two = {name: replace(run, out=folder / f"two-{name}") for name, run in one.items()}
    # one process's run, stopped half-way, to be continued by two
    for name in ("tokenizer", "prior"):
        two[f"continued-{name}"] = replace(one[name], out=folder / f"continued-{name}")
        shutil.copytree(one[name].out, folder / f"continued-{name}")
        forget_after(folder / f"continued-{name}", 10)
    sharded = prior_run(images, folder / "no-gpu", trained_tokenizer, parallel="fsdp2")
    plan = {
        "tokenizers": [run_to_json(run) for run in two.values() if isinstance(run, TokenizerRun)],
        "priors": [run_to_json(run) for run in two.values() if isinstance(run, PriorRun)],
        "refused": [run_to_json(run) for run in (sharded, replace(one["prior"], batch_size=2, out=folder / "odd"))],
    }
    (folder / "plan.json").write_text(json.dumps(plan))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    subprocess.run(
        [*launch, "-m", "tests.training.two_processes", str(folder)],
        cwd=REPOSITORY,
        check=True,
        timeout=300,
    )
    said = [json.loads((folder / f"said-{rank}.json").read_text()) for rank in (0, 1)]
    return Runs(folder, one, two, said)


pytestmark = pytest.mark.slow


@pytest.mark.parametrize("name", ["tokenizer", "prior", "scales"])
def test_two_processes_train_what_one_trains(runs, name):
    assert len([line for line in log_lines(runs.two[name].out) if "train/loss" in line]) == runs.one[name].num_steps
    assert_same_log(runs.one[name].out, runs.two[name].out)


@pytest.mark.parametrize("name", ["tokenizer", "prior"])
def test_two_processes_continue_what_one_began(runs, name):
    assert_same_log(runs.one[name].out, runs.two[f"continued-{name}"].out)


@pytest.mark.parametrize("name", ["tokenizer", "prior"])
def test_one_process_continues_what_two_began(runs, tmp_path, name):
    run = replace(runs.two[name], out=tmp_path / "run")
    shutil.copytree(runs.two[name].out, run.out)
    forget_after(run.out, 10)
    train(run)
    assert_same_log(runs.one[name].out, run.out)


def test_both_processes_stop_at_the_same_step(runs):
    assert [said["stop"] for said in runs.said] == [[False, False, True]] * 2


def test_what_processes_cannot_do_is_refused(runs):
    for said in runs.said:
        no_gpu, odd = said["refused"]
        assert "fsdp2 needs several processes on GPUs" in no_gpu
        assert "processes x accumulate = 2 x 2, got 2" in odd
    assert not (runs.folder / "no-gpu").exists()


@pytest.mark.parametrize("shared_adaln", [False, True])
def test_a_sharded_network_ends_as_its_whole_twin(runs, shared_adaln):
    """After three clipped steps: gradient norms, EMA, its saved and reloaded state, the exported model."""
    folder, twin = runs.folder / f"sharded-{shared_adaln}", tiny_prior(shared_adaln=shared_adaln)
    ema, norms, _ = three_steps(twin)
    assert json.loads((folder / "norms.json").read_text()) == pytest.approx(norms, **LOGGED)
    for name in ("ema", "reloaded"):
        same_tensors(ema.state_dict(), load_file(folder / f"{name}.safetensors"))
    exported = NextScaleTransformer.from_pretrained(folder / "averaged")
    same_tensors(averaged_model(twin, ema).state_dict(), exported.state_dict())

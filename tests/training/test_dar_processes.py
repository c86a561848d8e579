"""Two processes train D-AR as one does, on the same global batch."""

import json
import shutil
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from safetensors.torch import load_file

from isthmus.dar.runs import DiffusionTokenizerRun, NextTokenPriorRun
from isthmus.dar.train_prior import averaged_llama
from isthmus.training.config import run_to_json
from isthmus.training.train_prior import train_prior
from isthmus.training.train_tokenizer import train_tokenizer
from tests.made_once import made_once
from tests.testers import LOGGED
from tests.training.test_dar_runs import forget_after
from tests.training.test_processes import assert_same_log, log_lines
from tests.training.tiny_dar_runs import diffusion_tokenizer_run, next_token_prior_run
from tests.training.two_dar_processes import three_steps, tiny_objective
from tests.training.two_processes import same_tensors

REPOSITORY = Path(__file__).resolve().parents[2]
AnyRun = DiffusionTokenizerRun | NextTokenPriorRun

pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class Runs:
    """Runs of this process (`one`) and of two (`two`), by name."""

    folder: Path
    one: dict[str, AnyRun]
    two: dict[str, AnyRun]


def train(run: AnyRun) -> Path:
    return train_tokenizer(run) if isinstance(run, DiffusionTokenizerRun) else train_prior(run)


@pytest.fixture(scope="module")
def runs(tmp_path_factory, images) -> Runs:
    return made_once(tmp_path_factory, "dar-processes", lambda folder: trained_runs(folder, images))


def trained_runs(folder: Path, images: str) -> Runs:
    long = {"num_steps": 12, "save_every": 6, "preview_every": 12, "validate_every": 6}
    # codebook start, usage, revival, uneven counts of tokens, statistics of the whole batch
    tokenizer = diffusion_tokenizer_run(images, folder / "one-tokenizer", revive_every=2, **long)
    loss, model = replace(tokenizer.loss, times="uniform"), replace(tokenizer.model, latent_norm=True)
    tokenizer = replace(tokenizer, loss=loss, model=model)
    # label dropout, every dropout of the Llama, a batch in two parts
    prior = next_token_prior_run(images, folder / "one-prior", folder / "one-tokenizer", accumulate=2, **long)
    one = {"tokenizer": tokenizer, "prior": prior}
    for run in one.values():
        train(run)
    two = {name: replace(run, out=folder / f"two-{name}") for name, run in one.items()}
    for name, run in one.items():
        two[f"continued-{name}"] = replace(run, out=folder / f"continued-{name}")
        shutil.copytree(run.out, folder / f"continued-{name}")
        forget_after(folder / f"continued-{name}", 6)
    plan = {
        "tokenizers": [run_to_json(run) for run in two.values() if isinstance(run, DiffusionTokenizerRun)],
        "priors": [run_to_json(run) for run in two.values() if isinstance(run, NextTokenPriorRun)],
    }
    (folder / "plan.json").write_text(json.dumps(plan))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    subprocess.run(
        [*launch, "-m", "tests.training.two_dar_processes", str(folder)],
        cwd=REPOSITORY,
        check=True,
        timeout=300,
    )
    return Runs(folder, one, two)


@pytest.mark.parametrize("name", ["tokenizer", "prior"])
def test_two_processes_train_what_one_trains(runs, name):
    assert len([line for line in log_lines(runs.two[name].out) if "train/loss" in line]) == runs.one[name].num_steps
    assert_same_log(runs.one[name].out, runs.two[name].out)


@pytest.mark.parametrize("name", ["tokenizer", "prior"])
def test_two_processes_continue_what_one_began(runs, name):
    assert_same_log(runs.one[name].out, runs.two[f"continued-{name}"].out)


def test_a_sharded_llama_ends_as_its_whole_twin(runs):
    twin = tiny_objective()
    ema, norms = three_steps(twin)
    assert json.loads((runs.folder / "norms.json").read_text()) == pytest.approx(norms, **LOGGED)
    same_tensors(averaged_llama(twin, ema).state_dict(), load_file(runs.folder / "sharded.safetensors"))

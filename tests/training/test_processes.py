"""Two processes train what one trains, on the same global batch, whatever is shared out."""

import json
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from safetensors.torch import load_file

from isthmus.dar.train_prior import averaged_llama
from isthmus.next_scale.transformer import NextScaleTransformer
from isthmus.training.config import Run, run_to_json
from isthmus.training.saved_networks import averaged_model
from tests.made_once import made_once
from tests.testers import LOGGED
from tests.training.tiny_runs import (
    SMALL_TEXT,
    SMALL_WORDS,
    assert_same_log,
    diffusion_tokenizer_run,
    killed_after,
    log_lines,
    next_token_prior_run,
    prior_run,
    tokenizer_run,
    train,
    with_captions,
)
from tests.training.tiny_teacher import distill_run
from tests.training.two_processes import same_tensors, three_llama_steps, three_steps, tiny_objective, tiny_prior

REPOSITORY = Path(__file__).resolve().parents[2]
TRAININGS = ("tokenizer", "prior", "diffusion-tokenizer", "next-token-prior")

pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class Runs:
    """Runs of this process (`one`) and of two (`two`), by name, and what the two said."""

    folder: Path
    one: dict[str, Run]
    two: dict[str, Run]
    said: list[dict[str, object]]


@pytest.fixture(scope="module")
def runs(tmp_path_factory, images, trained_tokenizer, trained_dar_tokenizer) -> Runs:
    """Train everything once with one process and once with two (started together, since a start takes seconds)."""
    return made_once(
        tmp_path_factory,
        "processes",
        lambda folder: trained_runs(folder, images, trained_tokenizer, trained_dar_tokenizer),
    )


def trained_runs(folder: Path, images: str, multi_scale: Path, diffusion: Path) -> Runs:
    long = {"num_steps": 12, "save_every": 6, "preview_every": 12, "validate_every": 6}
    captioned = with_captions(images, folder / "captioned.npz")
    dar = diffusion_tokenizer_run(images, folder / "one-diffusion-tokenizer", revive_every=2, **long)
    one: dict[str, Run] = {
        # usage, revival, the discriminator and its adaptive weight
        "tokenizer": tokenizer_run(images, folder / "one-tokenizer", revive_every=2, **long),
        # stochastic depth, label dropout, a batch in two parts
        "prior": prior_run(images, folder / "one-prior", multi_scale, accumulate=2, **long),
        # an encoder of captions that is trained along
        "captions": prior_run(captioned, folder / "one-captions", multi_scale, text=SMALL_TEXT),
        # what teacher and student are told by an encoder that no process trains
        "student": distill_run(captioned, folder / "one-student", folder / "one-captions", scale_sizes=(1, 4)),
        # rows of captions that each process fills up to a length of its own
        "words": next_token_prior_run(captioned, folder / "one-words", diffusion, text=SMALL_WORDS),
        # steps that leave some weights without a gradient
        "scales": prior_run(images, folder / "one-scales", multi_scale, scales_per_step=1),
        # codebook start, uneven counts of tokens, statistics of the whole batch
        "diffusion-tokenizer": replace(
            dar, loss=replace(dar.loss, times="uniform"), model=replace(dar.model, latent_norm=True)
        ),
        # every dropout of the Llama
        "next-token-prior": next_token_prior_run(
            images, folder / "one-next-token-prior", diffusion, accumulate=2, **long
        ),
    }
    for run in one.values():
        train(run)
    two = {name: replace(run, out=folder / f"two-{name}") for name, run in one.items()}
    # one process's run, stopped half-way, to be continued by two
    two |= {f"continued-{name}": killed_after(6, one[name], folder / f"continued-{name}") for name in TRAININGS}
    sharded = prior_run(images, folder / "no-gpu", multi_scale, parallel="fsdp2")
    refused = (sharded, replace(one["prior"], batch_size=2, out=folder / "odd"))
    plan = {
        name: [(type(run).__name__, run_to_json(run)) for run in planned]
        for name, planned in (("trained", two.values()), ("refused", refused))
    }
    (folder / "plan.json").write_text(json.dumps(plan))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launch, "-m", "tests.training.two_processes", str(folder)]
    subprocess.run(command, cwd=REPOSITORY, check=True, timeout=300)
    said = [json.loads((folder / f"said-{rank}.json").read_text()) for rank in (0, 1)]
    return Runs(folder, one, two, said)


def test_two_processes_train_what_one_trains(runs):
    for name in (*TRAININGS, "captions", "student", "words", "scales"):
        lines = [line for line in log_lines(runs.two[name].out) if "train/loss" in line]
        assert len(lines) == runs.one[name].num_steps, name
        assert_same_log(runs.one[name].out, runs.two[name].out)


def test_two_processes_continue_what_one_began(runs):
    for name in TRAININGS:
        assert_same_log(runs.one[name].out, runs.two[f"continued-{name}"].out)


@pytest.mark.parametrize("name", TRAININGS)
def test_one_process_continues_what_two_began(runs, tmp_path, name):
    run = killed_after(6, runs.two[name], tmp_path / "run")
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


def test_a_sharded_network_ends_as_its_whole_twin(runs):
    """After three clipped steps: gradient norms, EMA, its saved and reloaded state, the exported model."""
    for shared_adaln in (False, True):
        folder, twin = runs.folder / f"sharded-{shared_adaln}", tiny_prior(shared_adaln=shared_adaln)
        ema, norms, _ = three_steps(twin)
        assert json.loads((folder / "norms.json").read_text()) == pytest.approx(norms, **LOGGED)
        for name in ("ema", "reloaded"):
            same_tensors(ema.state_dict(), load_file(folder / f"{name}.safetensors"))
        exported = NextScaleTransformer.from_pretrained(folder / "averaged")
        same_tensors(averaged_model(twin, ema).state_dict(), exported.state_dict())


def test_a_sharded_llama_ends_as_its_whole_twin(runs):
    twin = tiny_objective()
    ema, norms = three_llama_steps(twin)
    assert json.loads((runs.folder / "llama-norms.json").read_text()) == pytest.approx(norms, **LOGGED)
    same_tensors(averaged_llama(twin, ema).state_dict(), load_file(runs.folder / "llama.safetensors"))

"""Killed, interrupted or out of space: the same command again ends where an undisturbed run ends, bit for bit."""

import io
import json
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout, suppress
from dataclasses import replace
from pathlib import Path

import pytest

from isthmus.cli import main
from isthmus.next_scale.runs import PriorRun, TokenizerRun
from isthmus.training.checkpoints import newest_checkpoint
from isthmus.training.config import Run, run_to_json
from tests.made_once import made_once
from tests.training.tiny_runs import assert_same, killed_after, prior_run, tokenizer_run, train, weights

REPOSITORY = Path(__file__).resolve().parents[2]
MODEL = {"tokenizer": "image_tokenizer", "prior": "transformer"}

pytestmark = pytest.mark.slow


def command(run: Run, folder: Path) -> list[str]:
    """`isthmus` words that start a run, and start it again."""
    record = folder / f"{run.out.name}.json"
    record.write_text(json.dumps(run_to_json(run)))
    return ["train", "tokenizer" if isinstance(run, TokenizerRun) else "prior", "--config", str(record)]


def start(words: list[str]) -> "subprocess.Popen[str]":
    """`isthmus` in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "isthmus", *words],
        cwd=REPOSITORY,
        stderr=subprocess.PIPE,
        text=True,
    )


def until(seen: Callable[[], bool], process: "subprocess.Popen[str]") -> None:
    """Wait until something is seen of a process that must still be at work then."""
    while not seen():
        with suppress(subprocess.TimeoutExpired):
            _, said = process.communicate(timeout=0.01)
            pytest.fail(f"ended before it was disturbed, with {process.returncode}: {said}")


def step_of(out: Path) -> int:
    newest = newest_checkpoint(out)
    return int(newest.name.split("-")[1]) if newest else 0


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, images, trained_tokenizer) -> dict[str, TokenizerRun | PriorRun]:
    """Straight runs, long enough to be caught at work."""
    return made_once(tmp_path_factory, "undisturbed", lambda folder: straight_runs(folder, images, trained_tokenizer))


def straight_runs(folder: Path, images: str, trained_tokenizer: Path) -> dict[str, TokenizerRun | PriorRun]:
    often = {"save_every": 50, "validate_every": 50, "preview_every": 50}
    # the discriminator starts at step 2, codes are revived at every step from 3 to 11
    first = tokenizer_run(images, folder / "tokenizer", num_steps=14, **often)
    first = replace(first, loss=replace(first.loss, adversarial_start=0.15))
    second = prior_run(images, folder / "prior", trained_tokenizer, num_steps=30, **often)
    train(first), train(second)
    return {"tokenizer": first, "prior": second}


@pytest.mark.parametrize("kind", ["tokenizer", "prior"])
def test_a_killed_run_goes_on_bit_for_bit(tmp_path, undisturbed, kind):
    run = replace(undisturbed[kind], out=tmp_path / "run", save_every=1)
    words = command(run, tmp_path)
    process = start(words)
    until(lambda: step_of(run.out) >= 3, process)
    process.kill()
    process.communicate()
    killed_after = step_of(run.out)
    assert process.returncode == -signal.SIGKILL and 3 <= killed_after < run.num_steps
    assert not (run.out / MODEL[kind]).exists()

    # the kill may have hit a checkpoint half-way
    checkpoints = run.out / "checkpoints"
    half = checkpoints / f"checkpoint-{killed_after + 1:08d}.partial"
    half.mkdir(exist_ok=True)
    (half / "model.safetensors").write_bytes(b"half")
    assert main(words) == 0
    assert_same(weights(run.out / MODEL[kind]), weights(undisturbed[kind].out / MODEL[kind]))
    assert len(list(checkpoints.iterdir())) == run.keep_checkpoints
    # all but the two measurements at the end, which a log gets once as well
    steps = [json.loads(line)["step"] for line in (run.out / "log.jsonl").read_text().splitlines()]
    assert steps == [*range(1, run.num_steps + 1), run.num_steps]


def test_ctrl_c_saves_and_the_command_goes_on(tmp_path, undisturbed):
    run = replace(undisturbed["tokenizer"], out=tmp_path / "run")
    words = command(run, tmp_path)
    process = start(words)
    until((run.out / "log.jsonl").exists, process)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate()
    assert process.returncode == 130
    assert said.endswith("isthmus: interrupted\n") and "Traceback" not in said
    # nothing but the interruption makes a checkpoint before the end
    assert 0 < step_of(run.out) < run.num_steps and not (run.out / "image_tokenizer").exists()
    assert main(words) == 0
    assert_same(weights(run.out / "image_tokenizer"), weights(undisturbed["tokenizer"].out / "image_tokenizer"))


def on_a_small_disk(words: list[str], limit: int | None) -> tuple[int, str]:
    """Exit code of a command whose files may not grow beyond a limit, as on a disk that is full, and what it said."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    # both streams: pytest keeps them in files, which would have the limit as well
    with io.StringIO() as said, redirect_stderr(said), redirect_stdout(said):
        resource.setrlimit(resource.RLIMIT_FSIZE, (before[0] if limit is None else limit, before[1]))
        try:
            code = main(words)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        return code, said.getvalue()


def test_a_full_disk_is_one_line_and_leaves_no_half(tmp_path, images, trained_tokenizer, trained_prior):
    tokenizer = tokenizer_run(images, tmp_path / "tokenizer", num_steps=3)
    prior = prior_run(images, tmp_path / "prior", trained_tokenizer, num_steps=3)
    # finished runs that have lost their models, to be exported again
    finished = [
        killed_after(6, tokenizer_run(images, trained_tokenizer), tmp_path / "finished-tokenizer"),
        killed_after(6, prior_run(images, trained_prior, trained_tokenizer), tmp_path / "finished-prior"),
    ]
    # bytes: the tokenizer's weights take 0.9 MB and its optimizer's state 2 MB, those of the prior 47 and 116 kB
    limits = [
        (tokenizer, 500_000), (tokenizer, 1_500_000), (tokenizer, None),
        (prior, 20_000), (prior, 100_000), (prior, None),
        (finished[0], 500_000), (finished[0], None), (finished[1], 500_000), (finished[1], None),
    ]  # fmt: skip
    for run, limit in limits:
        code, said = on_a_small_disk(command(run, tmp_path), limit)
        files = sorted(str(path.relative_to(run.out)) for path in run.out.rglob("*") if path.is_file())
        about = f"{run.out.name} with {limit}: {code}, {said}, {files}"
        model = ("image_tokenizer" if isinstance(run, TokenizerRun) else "transformer") + "/config.json"
        assert (model in files) == (limit is None), about
        assert not any("partial" in name for name in files), about
        if limit is None:
            assert code == 0, about
            continue
        errors = [line for line in said.splitlines() if line.startswith("isthmus: error")]
        assert code == 2 and len(errors) == 1 and "could not be written" in errors[0], about
        assert "Free some space" in errors[0] and "Traceback" not in said, about
        assert "model_index.json" not in files, about
        if run not in finished:
            assert not any(name.startswith("checkpoints/") for name in files), about
    logged = [json.loads(line)["step"] for line in (tokenizer.out / "log.jsonl").read_text().splitlines()]
    assert logged == [1, 2, 3, 3], "attempts without a checkpoint leave nothing in the log"

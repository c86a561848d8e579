"""Whole runs: an interrupted one equals a straight one, and what a run refuses it refuses before training."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from isthmus import load_pipeline
from isthmus.errors import UserError
from isthmus.next_scale.runs import PriorModel
from isthmus.next_scale.train_prior import with_new_classes
from isthmus.training.config import run_from_json, run_to_json
from isthmus.training.run import check_folder
from isthmus.training.train_prior import train_prior
from isthmus.training.train_tokenizer import train_tokenizer
from tests.testers import TRAINED_ATOL
from tests.training.tiny_runs import OPTIM, prior_run, tokenizer_run, write_images

pytestmark = pytest.mark.slow

WEIGHTS = "diffusion_pytorch_model.safetensors"


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / WEIGHTS)


def assert_same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert set(first) == set(second)
    different = [name for name in first if not torch.equal(first[name], second[name])]
    assert not different, different


def forget_after(out: Path, step: int) -> None:
    """What a kill right after the checkpoint of `step` leaves: no later checkpoint, no model, a longer log."""
    for checkpoint in (out / "checkpoints").iterdir():
        if int(checkpoint.name.split("-")[1]) > step:
            shutil.rmtree(checkpoint)
    for name in ("image_tokenizer", "transformer", "model_index.json"):
        path = out / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


@pytest.fixture
def image_folder(tmp_path) -> Path:
    """Three hundred images of two classes as files, which `datasets` reads as a stream."""
    folder = tmp_path / "files"
    for i in range(300):
        path = folder / "ab"[i % 2] / f"{i:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((9, 9, 3), (i * 7) % 255, np.uint8)).save(path)
    return folder


@pytest.mark.parametrize("step", [2, 4])
def test_a_tokenizer_run_goes_on_bit_for_bit(tmp_path, images, trained_tokenizer, step):
    out = tmp_path / "run"
    shutil.copytree(trained_tokenizer, out)
    forget_after(out, step)
    train_tokenizer(tokenizer_run(images, out))
    assert_same(weights(out / "image_tokenizer"), weights(trained_tokenizer / "image_tokenizer"))
    lines = [(out / "log.jsonl").read_text(), (trained_tokenizer / "log.jsonl").read_text()]
    assert lines[0] == lines[1]


@pytest.mark.parametrize("step", [2, 4])
def test_a_prior_run_goes_on_bit_for_bit(tmp_path, images, trained_tokenizer, trained_prior, step):
    out = tmp_path / "run"
    shutil.copytree(trained_prior, out)
    forget_after(out, step)
    train_prior(prior_run(images, out, trained_tokenizer))
    assert_same(weights(out / "transformer"), weights(trained_prior / "transformer"))


def test_a_finished_run_only_exports(tmp_path, images, trained_tokenizer, trained_prior):
    out = tmp_path / "run"
    shutil.copytree(trained_prior, out)
    shutil.rmtree(out / "transformer")
    log = (out / "log.jsonl").read_text()
    train_prior(prior_run(images, out, trained_tokenizer))
    assert_same(weights(out / "transformer"), weights(trained_prior / "transformer"))
    assert (out / "log.jsonl").read_text() == log


def test_accumulation_changes_nothing_but_memory(tmp_path, images, trained_tokenizer):
    whole = prior_run(images, tmp_path / "whole", trained_tokenizer)
    parts = replace(whole, out=tmp_path / "parts", accumulate=2)
    for run in (whole, parts):
        train_prior(run)
    first, second = (weights(run.out / "transformer") for run in (whole, parts))
    for name, value in first.items():
        torch.testing.assert_close(second[name], value, rtol=1e-4, atol=TRAINED_ATOL)


def test_a_trained_run_is_a_pipeline_with_the_names_of_its_classes(trained_prior):
    pipe = load_pipeline(trained_prior, device="cpu")
    assert list(pipe.class_names.values()) == ["0", "1"]
    assert len(pipe(["1", 0, None], seed=0).images) == 3


@pytest.mark.parametrize("num_classes, count, side", [(0, 8, 12), (1, 8, 12), (2, 3, 8)])
def test_unlabelled_one_class_and_three_images(tmp_path, num_classes, count, side):
    data = write_images(tmp_path / "d.npz", count=count, num_classes=num_classes, side=side)
    train_tokenizer(tokenizer_run(data, tmp_path / "t", num_steps=3))
    train_prior(prior_run(data, tmp_path / "p", tmp_path / "t", num_steps=2))
    pipe = load_pipeline(tmp_path / "p", device="cpu")
    assert pipe.num_classes == num_classes
    assert len(pipe(num_images=2, seed=0).images) == 2


def test_grey_images(tmp_path):
    for i in range(6):
        path = tmp_path / "grey" / "abc"[i % 3] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((10, 14), 40 * i, np.uint8)).save(path)
    data = f"folder:{tmp_path / 'grey'}"
    train_tokenizer(tokenizer_run(data, tmp_path / "t", num_steps=3))
    train_prior(prior_run(data, tmp_path / "p", tmp_path / "t", num_steps=2))
    assert load_pipeline(tmp_path / "p", device="cpu").class_names == {"0": "a", "1": "b", "2": "c"}


def test_a_stream_trains_both_and_goes_on_at_the_right_example(tmp_path, image_folder):
    data = f"hf:{image_folder}"
    changes = {"stream": True, "shuffle_buffer": 0, "num_steps": 4, "log_every": 1}
    straight = tokenizer_run(data, tmp_path / "straight", **changes)
    train_tokenizer(straight)
    shutil.copytree(straight.out, tmp_path / "again")
    forget_after(tmp_path / "again", 2)
    train_tokenizer(replace(straight, out=tmp_path / "again"))
    assert_same(weights(tmp_path / "again" / "image_tokenizer"), weights(straight.out / "image_tokenizer"))
    train_prior(prior_run(data, tmp_path / "p", straight.out, stream=True, max_images=12, num_steps=2))
    assert load_pipeline(tmp_path / "p", device="cpu").num_classes == 2
    with pytest.raises(UserError, match="max-images"):
        prior_run(data, tmp_path / "q", straight.out, stream=True)
    with pytest.raises(UserError, match="cannot choose classes"):
        train_tokenizer(replace(straight, out=tmp_path / "r", classes=("a",)))


def test_fine_tuning_starts_where_the_source_stands(tmp_path, trained_prior):
    source = load_pipeline(trained_prior, device="cpu").transformer
    model = with_new_classes(source, 5, {}, "source").eval()
    inputs = torch.randn(2, 20, 4)
    with torch.no_grad():
        before = source(torch.tensor([source.null_class_id] * 2), inputs).logits
        for label in (0, 4, model.null_class_id):
            assert torch.equal(model(torch.tensor([label] * 2), inputs).logits, before)
        known = with_new_classes(source, 3, {}, "source", kept={2: 0}).eval()
        old = source(torch.tensor([0, source.null_class_id]), inputs).logits
        assert torch.equal(known(torch.tensor([2, 0]), inputs).logits, old)


def test_fine_tuning_learns_new_classes(tmp_path, trained_prior):
    data = write_images(tmp_path / "new.npz", count=24, num_classes=2, seed=5)
    run = prior_run(
        data, tmp_path / "f", "", num_steps=50, batch_size=8, from_model=str(trained_prior), model=PriorModel(),
        validate_every=1, save_every=50, preview_every=50, optim=replace(OPTIM, learning_rate=3e-3),
        ema_decay=0.5,
    )  # fmt: skip
    train_prior(run)
    lines = [json.loads(line) for line in (run.out / "log.jsonl").read_text().splitlines()]
    bits = [line["val/bits_per_token"] for line in lines if "val/bits_per_token" in line]
    assert bits[-1] < bits[0] - 0.2


def test_tokenizer_fine_tuning_with_a_frozen_encoder_keeps_the_tokens(tmp_path, images, trained_tokenizer):
    run = tokenizer_run(images, tmp_path / "f", from_model=str(trained_tokenizer), freeze_encoder=True, num_steps=3)
    train_tokenizer(replace(run, model=replace(run.model, dropout=None)))
    before, after = weights(trained_tokenizer / "image_tokenizer"), weights(run.out / "image_tokenizer")
    for name in before:
        kept = name.startswith(("encoder.", "quant_conv.", "codebook.", "phi."))
        assert torch.equal(before[name], after[name]) == kept, name


def test_random_scales_train_as_well(tmp_path, images, trained_tokenizer):
    run = prior_run(images, tmp_path / "s", trained_tokenizer, scales_per_step=1, checkpoint_activations=True)
    train_prior(run)
    assert (run.out / "model_index.json").is_file()


def test_run_json_repeats_a_run(tmp_path, images, trained_prior):
    record = json.loads((trained_prior / "run.json").read_text())
    run = run_from_json(type(prior_run(images, tmp_path, "")), record["run"])
    assert run_to_json(run) == record["run"]
    with pytest.raises(UserError, match="no field optim.momentum"):
        run_from_json(type(run), record["run"] | {"optim": {"momentum": 1}})


def test_a_record_of_a_version_without_these_fields_goes_on(tmp_path, images, trained_prior):
    folder = shutil.copytree(trained_prior, tmp_path / "before")
    record = json.loads((folder / "run.json").read_text())
    settings = record["run"] | {"out": str(folder)}
    for name in ("image_column", "label_column"):
        assert settings.pop(name) is None
    (folder / "run.json").write_text(json.dumps(record | {"run": settings}))
    run = run_from_json(type(prior_run(images, tmp_path, "")), settings)
    check_folder(run)
    check_folder(replace(run, label_column="none"))  # read as then, where labels were plain values
    with pytest.raises(UserError, match="image_column: None -> other"):
        check_folder(replace(run, image_column="other"))


def test_a_diverging_run_stops_and_names_the_last_good_checkpoint(tmp_path, images, trained_tokenizer):
    run = prior_run(
        images, tmp_path / "nan", trained_tokenizer, optim=replace(OPTIM, learning_rate=1e30, max_grad_norm=1e30)
    )
    with pytest.raises(UserError, match="must be finite"):
        train_prior(run)
    assert not (run.out / "model_index.json").exists()


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"tokenizer": ""}, "needs a tokenizer"),
        ({"tokenizer": "nowhere/at-all"}, "nowhere/at-all"),
        ({"data": "folder:nowhere"}, "nowhere"),
        ({"classes": ("0", "zebra")}, "zebra"),
        ({"scales_per_step": 1, "model": PriorModel(width=16, num_heads=2, scale_attention="causal")}, "Markov"),
    ],
)
def test_what_does_not_fit_is_refused_before_training(tmp_path, images, trained_tokenizer, changes, message):
    run = replace(prior_run(images, tmp_path / "out", trained_tokenizer), **changes)
    with pytest.raises(UserError, match=message):
        train_prior(run)
    assert not run.out.exists()


def test_another_run_in_the_same_folder_is_refused(images, trained_tokenizer, trained_prior):
    with pytest.raises(UserError, match="seed: 0 -> 1"):
        train_prior(prior_run(images, trained_prior, trained_tokenizer, seed=1))
    with pytest.raises(UserError, match="PriorRun"):
        train_tokenizer(tokenizer_run(images, trained_prior))


def test_a_run_does_not_go_on_with_other_images(tmp_path, trained_tokenizer):
    data = write_images(tmp_path / "d.npz", seed=1)
    run = prior_run(data, tmp_path / "run", trained_tokenizer)
    train_prior(run)
    write_images(tmp_path / "d.npz", seed=2)
    with pytest.raises(UserError, match="data_fingerprint"):
        train_prior(run)


def test_contradictions_to_the_saved_model_are_refused(tmp_path, images, trained_tokenizer, trained_prior):
    run = prior_run(images, tmp_path / "x", "", from_model=str(trained_prior), model=PriorModel(width=32))
    with pytest.raises(UserError, match=r"model\.width is 16"):
        train_prior(run)
    with pytest.raises(UserError, match="image_size"):
        train_tokenizer(tokenizer_run(images, tmp_path / "y", image_size=20))

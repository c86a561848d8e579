"""Tiny runs of both families on images made here, 8 px and seconds of training, and how two of them are compared."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from isthmus.dar.runs import (
    DiffusionTokenizerLoss,
    DiffusionTokenizerModel,
    DiffusionTokenizerRun,
    FlowDecoderModel,
    LlamaModel,
    NextTokenPriorRun,
    WordsConfig,
)
from isthmus.next_scale.runs import PriorModel, PriorRun, TokenizerLoss, TokenizerModel, TokenizerRun
from isthmus.training.config import OptimConfig, PriorSampling, Run, TextConfig, TokensRun
from isthmus.training.train_prior import train_prior
from isthmus.training.train_tokenizer import train_tokenizer
from tests.testers import LOGGED

OPTIM = OptimConfig(learning_rate=1e-3, warmup_steps=2, weight_decay=0.01)
# every training takes six steps
SIX = {
    "num_steps": 6,
    "batch_size": 4,
    "save_every": 2,
    "keep_checkpoints": 9,
    "log_every": 1,
    "validate_every": 3,
    "preview_every": 6,
    "num_workers": 0,
    "mixed_precision": "no",  # on every processor the same arithmetic
    "optim": OPTIM,
}
SMALL_TEXT = TextConfig(encoder="small", num_words=300, width=16, num_layers=1, num_heads=2, max_length=12)
SMALL_WORDS = WordsConfig(encoder="small", num_words=300, max_length=12)
# two steps without quantisation, a codebook from encoder outputs, revival at every step
CODES = {"continuous_steps": 2, "revive_every": 1}


def write_images(path: Path, *, count: int = 12, num_classes: int = 2, side: int = 12, seed: int = 0) -> str:
    """An npz of coloured squares on white, the class deciding the colour; returns its data spec."""
    generator = np.random.default_rng(seed)
    images = np.full((count, side, side, 3), 255, dtype=np.uint8)
    labels = np.arange(count) % max(num_classes, 1)
    for image, label in zip(images, labels, strict=True):
        top, left = generator.integers(0, side // 2, size=2)
        image[top : top + side // 2, left : left + side // 2, label % 3] = generator.integers(0, 100)
    np.savez(path, arr_0=images, **({"arr_1": labels} if num_classes else {}))
    return f"npz:{path}"


COLOURS = ("a red square", "a green square")


def with_captions(data: str, path: Path) -> str:
    """A copy of an npz of squares whose colour is said in words; returns its data spec."""
    arrays = np.load(data.removeprefix("npz:"))
    words = np.array([COLOURS[label] for label in arrays["arr_1"]])
    np.savez(path, arr_0=arrays["arr_0"], arr_1=arrays["arr_1"], captions=words)
    return f"npz:{path}"


def tokenizer_run(data: str, out: Path, **changes) -> TokenizerRun:
    """Three scales, with the discriminator from step 2 on."""
    run = TokenizerRun(
        data=data,
        out=out,
        model=TokenizerModel(
            codebook_size=16,
            codebook_dim=4,
            scale_sizes=(1, 2, 4),
            base_channels=32,
            channel_multipliers=(1, 1),
            num_res_blocks=1,
            num_phi=2,
        ),
        loss=TokenizerLoss(adversarial=0.1, adversarial_start=0.3, adversarial_warmup=0.3, discriminator_channels=8),
        **SIX,
        **CODES,
    )
    return replace(run, **changes)


def prior_run(data: str, out: Path, tokenizer: Path | str, **changes) -> PriorRun:
    """A two-block SRDD prior with stochastic depth and label dropout."""
    model = PriorModel(width=16, num_layers=2, num_heads=2, scale_attention="markov", drop_path=0.2, init_gate=0.5)
    run = PriorRun(data=data, out=out, tokenizer=str(tokenizer), num_views=2, model=model, **SIX)
    return replace(run, **changes)


# every optional loss but those with frozen networks, which take a while
LOSS = DiffusionTokenizerLoss(jump=1.0, readout=1.0, readout_size=4, noise_levels=2, times="balanced")
FROZEN = replace(
    LOSS, perceptual=0.1, perceptual_taps=(0, 2), alignment=0.1, alignment_layer=1, readout_from="condition"
)


def diffusion_tokenizer_run(data: str, out: Path, **changes) -> DiffusionTokenizerRun:
    """Four tokens in two groups."""
    run = DiffusionTokenizerRun(
        data=data,
        out=out,
        validation_images=4,
        model=DiffusionTokenizerModel(
            image_size=8,
            patch_size=4,
            width=16,
            num_layers=1,
            condition_width=16,
            num_condition_layers=1,
            head_width=8,
            num_tokens=4,
            num_groups=2,
            codebook_size=16,
            codebook_dim=4,
            table_rows=4,
            # narrow queries, or the encoder's output says which token it is and hardly anything about the image
            low_rank_queries=False,
            query_std=0.01,
            init_gate=1.0,
        ),
        decoder=FlowDecoderModel(
            patch_size=2, width=16, num_layers=2, head_width=8, position_table=True, prediction="image", init_gate=0.5
        ),
        loss=LOSS,
        **SIX,
        **CODES,
    )
    return replace(run, **changes)


def next_token_prior_run(data: str, out: Path, tokenizer: Path | str, **changes) -> NextTokenPriorRun:
    """A two-block Llama with every dropout."""
    run = NextTokenPriorRun(
        data=data,
        out=out,
        tokenizer=str(tokenizer),
        num_views=2,
        model=LlamaModel(width=16, num_layers=2, num_heads=2, feed_forward_width=32),
        sampling=PriorSampling(guidance="2", top_p=0.95),
        **SIX,
    )
    return replace(run, **changes)


@dataclass(frozen=True)
class Family:
    """How the runs of a family are made, and the fixtures that have trained ones."""

    tokenizer_run: Callable[..., Run]
    prior_run: Callable[..., TokensRun]
    tokenizer: str
    prior: str


FAMILIES = {
    "next-scale": Family(tokenizer_run, prior_run, "trained_tokenizer", "trained_prior"),
    "D-AR": Family(diffusion_tokenizer_run, next_token_prior_run, "trained_dar_tokenizer", "trained_dar_prior"),
}


def train(run: Run) -> Path:
    """Train a run of either kind; returns its folder."""
    return train_prior(run) if isinstance(run, TokensRun) else train_tokenizer(run)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """What is saved of the network in a folder, and by `COMPONENT/NAME` of those in the folders in it."""
    found = {name: value for path in folder.glob("*.safetensors") for name, value in load_file(path).items()}
    for path in folder.glob("*/*.safetensors"):
        found |= {f"{path.parent.name}/{name}": value for name, value in load_file(path).items()}
    return found


def assert_same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    """Equal bit for bit."""
    assert first and set(first) == set(second)
    different = [name for name in first if not torch.equal(first[name], second[name])]
    assert not different, different


def log_lines(out: Path) -> list[dict[str, float]]:
    """What a run has measured."""
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def assert_same_log(first: Path, second: Path) -> None:
    """Every number of every step, measurements on held-out images included, as of one training."""
    for a, b in zip(log_lines(first), log_lines(second), strict=True):
        assert b == pytest.approx(a, **LOGGED), f"step {a['step']}"


def forget_after(out: Path, step: int) -> None:
    """What a kill right after the checkpoint of `step` leaves: no later checkpoint, no model, a longer log."""
    for checkpoint in (out / "checkpoints").iterdir():
        if int(checkpoint.name.split("-")[1]) > step:
            shutil.rmtree(checkpoint)
    parts = ("image_tokenizer", "decoder", "scheduler", "transformer", "text_encoder", "text_tokenizer")
    for name in (*parts, "model_index.json"):
        path = out / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def killed_after(step: int, run: Any, out: Path) -> Any:
    """A copy in `out` of a finished run as a kill after this step leaves it; returns the run that continues it."""
    shutil.copytree(run.out, out)
    forget_after(out, step)
    return replace(run, out=out)

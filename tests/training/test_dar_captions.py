"""D-AR trained on captions: a Llama that reads their words before the tokens."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from isthmus.cli.train import run_prior
from isthmus.dar.pipeline import DARPipeline
from isthmus.dar.prior import TokenLayout
from isthmus.dar.runs import LlamaModel, NextTokenPriorRun, WordsConfig
from isthmus.dar.train_prior import NextTokenObjective, NextTokenPriorTask, ResidualDropout
from isthmus.data.opening import open_source
from isthmus.errors import UserError
from isthmus.pipelines.loading import load_pipeline
from isthmus.training.config import run_from_json, run_to_json
from tests.dar.tiny_prior import tiny_prior
from tests.testers import NETWORK
from tests.training.tiny_runs import (
    SMALL_WORDS,
    assert_same,
    diffusion_tokenizer_run,
    killed_after,
    log_lines,
    next_token_prior_run,
    train,
    weights,
)


@pytest.fixture(scope="session")
def text_prior(captioned, trained, trained_dar_tokenizer) -> Path:
    """Run folder of a Llama of captions, trained for six steps."""
    return trained(
        "trained-dar-text-prior",
        lambda out: next_token_prior_run(captioned, out, trained_dar_tokenizer, text=SMALL_WORDS),
    )


def test_a_run_of_captions_ends_in_a_model_that_is_asked_in_words(text_prior):
    model = load_pipeline(text_prior, device="cpu")
    assert isinstance(model, DARPipeline) and model.text_tokenizer is not None
    assert model.num_classes == 0 and not model.class_names and model.config["data"]["prompt"].endswith("square")
    assert len(model.text_tokenizer.words(["a red square"])[0]) == 3
    drawn = model(prompt=["a red square", "a green square"], seed=1)
    assert drawn.prompts == ["a red square", "a green square"] and len(drawn.images) == 2
    assert model.defaults.guidance_scale == 2.0
    head = weights(text_prior / "transformer")["lm_head.weight"]
    assert len(head) == 16 + 1 + model.text_tokenizer.num_words and not head[16:].any() and head[:16].any(dim=1).all()
    assert len(log_lines(text_prior)) == 8
    assert (text_prior / "previews" / "samples-00000006.png").is_file()


def test_a_killed_run_of_captions_goes_on_bit_for_bit(tmp_path, text_prior, captioned, trained_dar_tokenizer):
    run = next_token_prior_run(captioned, text_prior, trained_dar_tokenizer, text=SMALL_WORDS)
    again = killed_after(2, run, tmp_path / "again")
    train(again)
    assert_same(weights(again.out), weights(text_prior))


@pytest.mark.slow
def test_other_captions_cost_bits(tmp_path):
    labels = np.arange(40) % 2
    shades = np.random.default_rng(0).integers(0, 60, (40, 1, 1, 1)) + labels[:, None, None, None] * 190
    images = np.broadcast_to(shades, (40, 8, 8, 3)).astype(np.uint8)
    np.savez(tmp_path / "shades.npz", arr_0=images, captions=np.array(["a dark image", "a light image"])[labels])
    data, often = f"npz:{tmp_path / 'shades.npz'}", {"save_every": 500, "validate_every": 500, "preview_every": 500}
    first = diffusion_tokenizer_run(data, tmp_path / "tokenizer", **often)
    # linear queries, or so short a training ends in codes that say nothing of the image
    train(replace(first, model=replace(first.model, latent_norm=True, linear_query_rank=4, linear_query_side=4)))
    run = next_token_prior_run(data, tmp_path / "run", first.out, text=SMALL_WORDS, **often)
    optim = replace(run.optim, learning_rate=1e-2)
    run = replace(run, num_steps=100, batch_size=8, optim=optim, embedding_dropout=0.0, residual_dropout=0.0)
    model = load_pipeline(train(run), device="cpu")
    source = open_source(data, image_size=model.image_size, split="val")
    images = [Image.fromarray(source.load(i)) for i in range(len(source))]
    said = list(source.captions or ())
    other = [{"a dark image": "a light image"}.get(one, "a dark image") for one in said]
    right, none, wrong = (model.bits_per_token(images, prompt=words).mean() for words in (said, "", other))
    assert right < none < wrong and wrong > 1.2 * right
    # as the run has measured it, caption by caption
    assert log_lines(run.out)[-1]["val/bits_per_token"] == pytest.approx(float(right), rel=1e-3)


def test_losses_do_not_depend_on_how_far_rows_are_filled_up():
    """Dropouts included: what is drawn of a sample follows from its place alone."""
    layout = TokenLayout(24, 3, 12, num_words=256, prompt_length=9)
    llama = tiny_prior(layout).train()
    objective = NextTokenObjective(llama, layout, embedding_dropout=0.3).train()
    dropout = ResidualDropout(llama, 0.3, longest=layout.num_positions - 1)
    labels, ids = torch.tensor([3, 1]), torch.randint(24, (2, 12), generator=torch.Generator().manual_seed(0))
    words, seeds = [[5, 250, 7], [9]], torch.arange(8).view(2, 2, 2)
    with dropout.attached():
        dropout.seeds = seeds
        together = objective(labels, ids, [1, 2], layout.padded(words)).nats
        for row in range(2):
            dropout.seeds = seeds[row : row + 1]
            own = layout.padded(words[row : row + 1])
            alone = objective(labels[row : row + 1], ids[row : row + 1], [row + 1], own)
            torch.testing.assert_close(alone.nats[0], together[row], **NETWORK)
        alone.total.backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in llama.parameters())


def test_fine_tuning_keeps_words_and_adds_them_to_classes(tmp_path, text_prior, trained_dar_prior, captioned):
    again = next_token_prior_run(captioned, tmp_path / "again", "", from_model=str(text_prior), model=LlamaModel())
    again = replace(again, num_steps=2, optim=replace(again.optim, warmup_steps=1))
    train(again)
    old, new = (load_pipeline(folder, device="cpu") for folder in (text_prior, again.out))
    assert old.text_tokenizer.config == new.text_tokenizer.config
    assert old.token_layout == new.token_layout and old.fingerprint != new.fingerprint
    both = replace(again, out=tmp_path / "both", from_model=str(trained_dar_prior), text=SMALL_WORDS)
    train(both)
    model = load_pipeline(both.out, device="cpu")
    assert model.num_classes == 2 and model.reads_text and model.token_layout.first_word == 19
    assert len(model([0, 1], prompt="a red square", seed=0).images) == 2


def test_settings_of_text_enter_a_record_only_where_there_are_some(tmp_path, captioned, trained_dar_tokenizer):
    plain = next_token_prior_run(captioned, tmp_path, trained_dar_tokenizer)
    assert "text" not in run_to_json(plain)
    run = replace(plain, text=SMALL_WORDS)
    assert run_from_json(NextTokenPriorRun, run_to_json(run)) == run


def test_what_does_not_fit_is_refused_in_words(
    tmp_path, images, captioned, text_prior, trained_dar_prior, trained_dar_tokenizer
):
    new = next_token_prior_run(images, tmp_path / "run", trained_dar_tokenizer, text=SMALL_WORDS)
    tuned = next_token_prior_run(captioned, tmp_path / "run", "", from_model=str(text_prior), model=LlamaModel())
    refused = [
        (new, "images with captions"),
        (replace(new, data=captioned, model=LlamaModel()), r"needs model\.width"),
        (replace(tuned, data=images), "images with captions"),
        (replace(tuned, text=WordsConfig(max_length=20)), r"text\.max_length is 12"),
        (replace(tuned, text=WordsConfig(num_words=400)), "keeps its words"),
        (replace(tuned, from_model=str(trained_dar_prior), text=WordsConfig(drop=0.2)), "reads no texts"),
    ]
    for run, words in refused:
        with pytest.raises(UserError, match=words):
            NextTokenPriorTask(run)
    with pytest.raises(UserError, match="not what an encoder makes of them, got text.encoder bert"):
        run_prior(["--tokenizer", str(trained_dar_tokenizer), "--data", captioned, "--text", "bert"])
    with pytest.raises(UserError, match="Pass --text small"):
        replace(new, text=WordsConfig(num_words=300))
    assert not (tmp_path / "run").exists()


def test_words_may_be_bytes(tmp_path, captioned, trained_dar_tokenizer):
    text = replace(SMALL_WORDS, num_words=256)
    run = next_token_prior_run(captioned, tmp_path / "run", trained_dar_tokenizer, text=text)
    model = load_pipeline(train(replace(run, num_steps=2, preview_every=2)), device="cpu")
    assert model.token_layout.num_words == 256 and len(model(prompt="a red square", seed=0).images) == 1


def test_a_dry_run_counts_words(tmp_path, captioned, trained_dar_tokenizer):
    wide = LlamaModel(width=256, num_layers=2, num_heads=4)
    run = next_token_prior_run(captioned, tmp_path / "run", trained_dar_tokenizer, model=wide)
    costs = []
    for text in (WordsConfig(), SMALL_WORDS, replace(SMALL_WORDS, max_length=40)):
        said = NextTokenPriorTask.describe(replace(run, text=text))
        costs.append(float(said.split("cost")[1].split("GFLOP")[0]))
    assert "captions of 2 kinds, up to 40 words of 2" in said and costs[0] < costs[1] < costs[2]
    assert not run.out.exists()

"""Training on captions: what a sample is told follows from its place, and models of classes take texts in."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from isthmus.data.npz import NpzSource
from isthmus.data.opening import open_source
from isthmus.errors import UserError
from isthmus.next_scale.pipeline import NextScalePipeline
from isthmus.next_scale.runs import PriorModel, PriorRun
from isthmus.next_scale.train_prior import NextScalePriorTask, with_text
from isthmus.next_scale.transformer import NextScaleTransformer
from isthmus.pipelines.loading import load_pipeline
from isthmus.text.encoders import SmallTextEncoder, TextFeatures
from isthmus.text.pretrained import PretrainedTextEncoder
from isthmus.training.captions import Captions, warn_of_cut_captions, with_words
from isthmus.training.config import TextConfig, run_from_json, run_to_json
from isthmus.training.images import dropped
from tests.text.test_pretrained import write_network
from tests.training.tiny_runs import (
    COLOURS,
    SMALL_TEXT,
    assert_same,
    killed_after,
    log_lines,
    prior_run,
    tokenizer_run,
    train,
    weights,
    with_captions,
    write_images,
)


@pytest.fixture(scope="session")
def text_prior(captioned, trained, trained_tokenizer) -> Path:
    """Run folder of a prior of captions, trained for six steps."""
    return trained("trained-text-prior", lambda out: prior_run(captioned, out, trained_tokenizer, text=SMALL_TEXT))


def test_a_run_of_captions_ends_in_a_model_that_is_asked_in_words(text_prior, captioned, trained_tokenizer):
    model = load_pipeline(text_prior, device="cpu")
    assert isinstance(model, NextScalePipeline) and isinstance(model.text_encoder, SmallTextEncoder)
    assert model.num_classes == 0 and not model.class_names and model.config["data"]["prompt"].endswith("square")
    assert model.null_text is not None
    for name, value in vars(model.text_encoder.encode([""])).items():
        torch.testing.assert_close(vars(model.null_text)[name], value)
    drawn = model(prompt=["a red square", "a green square"], seed=1)
    assert drawn.prompts == ["a red square", "a green square"] and len(drawn.images) == 2
    assert len(log_lines(text_prior)) == 8
    assert (text_prior / "previews" / "samples-00000006.png").is_file()


def test_a_killed_run_of_captions_goes_on_bit_for_bit(tmp_path, text_prior, captioned, trained_tokenizer):
    run = prior_run(captioned, text_prior, trained_tokenizer, text=SMALL_TEXT)
    again = killed_after(2, run, tmp_path / "again")
    train(again)
    assert_same(weights(again.out), weights(text_prior))


@pytest.mark.slow
@pytest.mark.parametrize("cross_attention", [True, False])
def test_other_captions_cost_bits(tmp_path, cross_attention):
    data = with_captions(write_images(tmp_path / "squares.npz", count=40), tmp_path / "captioned.npz")
    often = {"save_every": 500, "validate_every": 500, "preview_every": 500, "log_every": 150}
    first = tokenizer_run(data, tmp_path / "tokenizer", num_steps=40, **often)
    train(replace(first, loss=replace(first.loss, adversarial=0.0)))
    run = prior_run(data, tmp_path / "run", first.out, num_steps=150, batch_size=8, **often)
    run = replace(run, optim=replace(run.optim, learning_rate=1e-2))
    model = load_pipeline(train(replace(run, text=replace(SMALL_TEXT, cross_attention=cross_attention))), device="cpu")
    source = open_source(data, image_size=model.image_size, split="val")
    images = [Image.fromarray(source.load(i)) for i in range(len(source))]
    assert source.captions is not None
    right, none = (model.bits_per_token(images, prompt=said) for said in (list(source.captions), ""))
    wrong = model.bits_per_token(images, prompt=[COLOURS[COLOURS[0] == said] for said in source.captions])
    assert right.mean() < none.mean() < wrong.mean() and wrong.mean() > 1.2 * right.mean()


def test_a_frozen_encoder_stays_what_it_is(tmp_path, captioned, trained_tokenizer):
    folder = write_network("bert", tmp_path / "bert")
    run = prior_run(captioned, tmp_path / "run", trained_tokenizer, text=TextConfig(encoder=str(folder)))
    model = load_pipeline(train(run), device="cpu")
    given = PretrainedTextEncoder.from_folders(folder)
    assert_same(dict(model.text_encoder.state_dict()), dict(given.state_dict()))
    assert model.transformer.config["text_width"] == 16
    [kept] = (run.out / "tokens").glob("texts-*/features.safetensors")
    stored, words = load_file(kept), json.loads((run.out / "tokens" / "captions.json").read_text())
    assert len(stored["lengths"]) == len(
        {"", *words, *(open_source(captioned, image_size=8, split="val").captions or ())}
    )
    again = killed_after(4, run, tmp_path / "again")
    train(again)
    assert_same(weights(again.out), weights(run.out))


def test_settings_of_text_enter_a_record_only_where_there_are_some(tmp_path, captioned, trained_tokenizer):
    plain = prior_run(captioned, tmp_path, trained_tokenizer)
    assert "text" not in run_to_json(plain)
    run = replace(plain, text=SMALL_TEXT)
    assert run_from_json(PriorRun, run_to_json(run)) == run


def test_a_sample_is_told_the_caption_of_its_image_whatever_the_batch():
    class Shuffling(NpzSource):
        def __init__(self) -> None: ...

        def varied_caption(self, caption: str, generator: np.random.Generator) -> str:
            return " ".join(generator.permutation(caption.split()))

    texts = [f"image {number} has words" for number in range(5)]
    captions = Captions(Shuffling(), texts, drop=0.3, seed=3)
    images, positions = torch.arange(40) % 5, torch.arange(40)
    whole = captions.told(images, positions)
    parts = [captions.told(images[i : i + 7], positions[i : i + 7]) for i in range(0, 40, 7)]
    assert whole == [one for part in parts for one in part]
    gone = dropped(positions, rate=0.3, seed=3).tolist()
    assert any(gone) and [one == "" for one in whole] == gone
    told = [(image, one) for image, one in zip(images.tolist(), whole, strict=True) if one]
    assert all(sorted(one.split()) == sorted(texts[image].split()) for image, one in told)
    assert len({one for image, one in told if image == 0}) > 1


@pytest.mark.parametrize("num_classes", [0, 3])
@pytest.mark.parametrize("design", [{}, {"norm": "rms_sandwich", "l2_attention": False}])
def test_a_model_of_classes_that_is_told_texts_starts_as_itself(num_classes, design):
    sizes = {"scale_sizes": (1, 2), "codebook_size": 8, "codebook_dim": 4, "width": 8, "num_layers": 2, "num_heads": 2}
    before = NextScaleTransformer(num_classes=num_classes, init_gate=1.0, **sizes, **design).eval()
    after = with_text(before, text_pooled_width=6, text_width=5).eval()
    labels, inputs = torch.tensor([0, num_classes]), torch.randn(2, 4, 4)
    text = TextFeatures(torch.randn(2, 3, 5), torch.ones(2, 3, dtype=torch.bool), torch.randn(2, 6))
    assert torch.equal(after(labels, inputs, text=text).logits, before(labels, inputs).logits)
    after(labels, inputs, text=text).logits.square().sum().backward()
    assert after.text_start is not None and after.text_start.weight.grad is not None
    assert after.text_start.weight.grad.any()


def test_words_are_learned_from_captions_alone(captioned):
    planned = SmallTextEncoder(width=8, num_layers=1, num_heads=2)
    captions = ["a red square", "a green square"] * 3
    first, second = (with_words(planned, captions, 300).config["merges"] for _ in range(2))
    assert first == second and 0 < len(first) <= 300 - 256
    assert len(with_words(planned, captions, None).tokenizer.words(["a red square"])[0]) == 3


def test_captions_that_are_cut_are_counted_once(caplog):
    encoder = SmallTextEncoder(width=8, num_layers=1, num_heads=2, max_length=4)
    warn_of_cut_captions(encoder.tokenizer, ["red", "reddish", "a red cat"])  # a word of this encoder is a byte
    assert "2 of 3 captions are longer than the 4 words" in caplog.text
    caplog.clear()
    encoder.word_ids(["a red cat"], warn=False)
    assert not caplog.text


def test_fine_tuning_keeps_words_and_adds_them_to_classes(tmp_path, text_prior, trained_prior, captioned):
    again = prior_run(captioned, tmp_path / "again", "", from_model=str(text_prior), model=PriorModel())
    again = replace(again, num_steps=2, optim=replace(again.optim, warmup_steps=1))
    train(again)
    old, new = (load_pipeline(folder, device="cpu").text_encoder for folder in (text_prior, again.out))
    assert old.config == new.config and not torch.equal(old.norm.weight, new.norm.weight)
    both = replace(again, out=tmp_path / "both", from_model=str(trained_prior), text=SMALL_TEXT)
    train(both)
    model = load_pipeline(both.out, device="cpu")
    assert model.num_classes == 2 and model.reads_text
    assert len(model([0, 1], prompt="a red square", seed=0).images) == 2


def test_what_does_not_fit_is_refused_in_words(
    tmp_path, images, captioned, text_prior, trained_prior, trained_tokenizer
):
    new = prior_run(images, tmp_path / "run", trained_tokenizer, text=SMALL_TEXT)
    tuned = prior_run(captioned, tmp_path / "run", "", from_model=str(text_prior), model=PriorModel())
    refused = [
        (new, "images with captions"),
        (replace(new, data=captioned, text=TextConfig(encoder="nowhere")), "no folder"),
        (replace(tuned, text=TextConfig(width=32)), r"text\.width is 16"),
        (replace(tuned, text=TextConfig(num_words=400)), "keeps its text encoder"),
        (replace(tuned, text=TextConfig(cross_attention=False)), "keeps its network"),
        (replace(tuned, from_model=str(trained_prior), text=TextConfig(drop=0.2)), "reads no texts"),
    ]
    for run, words in refused:
        with pytest.raises(UserError, match=words):
            NextScalePriorTask(run)
    with pytest.raises(UserError, match="--text small"):
        prior_run(captioned, tmp_path, trained_tokenizer, text=TextConfig(width=32))


def test_a_dry_run_counts_the_encoder(tmp_path, captioned, trained_tokenizer):
    run = prior_run(captioned, tmp_path / "run", trained_tokenizer)
    sizes = []
    for text in (TextConfig(), replace(SMALL_TEXT, width=64), replace(SMALL_TEXT, width=128)):
        said = NextScalePriorTask.describe(replace(run, text=text))
        sizes.append(float(said.split("parameters")[1].split("M")[0]))
    assert "captions of 2 kinds" in said and sizes[0] < sizes[1] < sizes[2]
    assert not run.out.exists()

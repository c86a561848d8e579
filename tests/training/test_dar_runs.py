"""Whole D-AR runs: an interrupted one equals a straight one, every option trains, what does not fit is refused."""

import copy
import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

from isthmus import load_pipeline
from isthmus.dar.prior import TokenLayout, next_token_logits
from isthmus.dar.runs import DiffusionTokenizerModel, FlowSettings, LlamaModel
from isthmus.dar.train_prior import NextTokenPriorTask, with_new_classes
from isthmus.dar.train_tokenizer import load_parts
from isthmus.errors import UserError
from isthmus.next_scale.train_prior import NextScalePriorTask
from isthmus.training.config import PriorSampling, run_from_json
from isthmus.training.train_prior import train_prior
from isthmus.training.train_tokenizer import train_tokenizer
from tests.made_once import made_once
from tests.training.test_processes import assert_same_log, log_lines
from tests.training.test_runs import assert_same, weights
from tests.training.tiny_dar_runs import FROZEN, LOSS, diffusion_tokenizer_run, next_token_prior_run
from tests.training.tiny_runs import OPTIM, prior_run, write_images

pytestmark = pytest.mark.slow

PARTS = ("image_tokenizer", "decoder")
MODELS = (*PARTS, "scheduler", "transformer", "model_index.json")


@pytest.fixture(scope="module")
def trained(tmp_path_factory, images) -> Path:
    """Run folder of a diffusion tokenizer trained for six steps."""

    def train(folder: Path) -> Path:
        return train_tokenizer(diffusion_tokenizer_run(images, folder / "run"))

    return made_once(tmp_path_factory, "trained-dar-tokenizer", train)


@pytest.fixture(scope="module")
def trained_prior(tmp_path_factory, images, trained) -> Path:
    """Run folder (= pipeline folder) of a Llama trained for six steps."""

    def train(folder: Path) -> Path:
        return train_prior(next_token_prior_run(images, folder / "run", trained))

    return made_once(tmp_path_factory, "trained-dar-prior", train)


def forget_after(out: Path, step: int) -> None:
    """What a kill right after the checkpoint of `step` leaves."""
    for checkpoint in (out / "checkpoints").iterdir():
        if int(checkpoint.name.split("-")[1]) > step:
            shutil.rmtree(checkpoint)
    for name in MODELS:
        path = out / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def llama_weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "transformer" / "model.safetensors")


@pytest.mark.parametrize("step", [2, 4])
def test_a_tokenizer_run_goes_on_bit_for_bit(tmp_path, images, trained, step):
    out = tmp_path / "run"
    shutil.copytree(trained, out)
    forget_after(out, step)
    train_tokenizer(diffusion_tokenizer_run(images, out))
    for part in PARTS:
        assert_same(weights(out / part), weights(trained / part))
    assert (out / "log.jsonl").read_text() == (trained / "log.jsonl").read_text()


@pytest.mark.parametrize("step", [2, 4])
def test_a_prior_run_goes_on_bit_for_bit(tmp_path, images, trained, trained_prior, step):
    out = tmp_path / "run"
    shutil.copytree(trained_prior, out)
    forget_after(out, step)
    train_prior(next_token_prior_run(images, out, trained))
    assert_same(llama_weights(out), llama_weights(trained_prior))
    assert (out / "log.jsonl").read_text() == (trained_prior / "log.jsonl").read_text()


def test_accumulation_changes_nothing_but_memory(tmp_path, images, trained):
    tokenizer = diffusion_tokenizer_run(images, tmp_path / "whole", revive_every=0)
    prior = next_token_prior_run(images, tmp_path / "prior", trained, embedding_dropout=0.2)
    for run, train in ((tokenizer, train_tokenizer), (prior, train_prior)):
        parts = replace(run, out=tmp_path / f"{run.out.name}-parts", accumulate=2)
        train(run), train(parts)
        assert_same_log(run.out, parts.out)


def test_a_run_of_everything_optional(tmp_path, images):
    run = diffusion_tokenizer_run(images, tmp_path / "run", loss=FROZEN, checkpoint_activations=True, num_steps=3)
    model = replace(run.model, latent_norm=True, position_table=True, low_rank_queries=True, tokens_per_step=3)
    decoder = replace(run.decoder, shared_time_embedding=True, adaptive_head=True, modulation_std=0.02)
    flow = FlowSettings(num_inference_steps=5, time_shift=1.5, data_std=0.5, solver="adams-bashforth-variable")
    train_tokenizer(replace(run, model=model, decoder=decoder, flow=flow))
    parts = load_parts(str(run.out))
    assert parts.decoder.config["position_table"] == 4 and parts.decoder.config["adaptive_head"]
    assert parts.scheduler.config["solver"] == "adams-bashforth-variable" and len(parts.scheduler.windows()) == 5
    values = log_lines(run.out)[-2]
    assert {"train/alignment", "train/perceptual", "train/readout", "train/jump", "train/flow"} <= set(values)
    # the heads are not part of what is saved
    assert not any("alignment" in name or "readout" in name for name in weights(run.out / "decoder"))


def test_recomputed_activations_change_nothing(tmp_path, images, trained):
    run = diffusion_tokenizer_run(images, tmp_path / "a", checkpoint_activations=True)
    train_tokenizer(run)
    assert_same(weights(run.out / "decoder"), weights(trained / "decoder"))
    prior = next_token_prior_run(images, tmp_path / "b", trained, num_steps=3)
    for out, recomputes in ((tmp_path / "b", False), (tmp_path / "c", True)):
        train_prior(replace(prior, out=out, checkpoint_activations=recomputes))
    # with dropout: the recomputation must draw the same masks
    assert_same(llama_weights(tmp_path / "c"), llama_weights(tmp_path / "b"))


def test_measurements_name_the_gap_and_a_deaf_decoder_is_reported_in_words(tmp_path, images, caplog):
    # nothing of the tokens reaches the pixels before the modulation has learnt
    run = diffusion_tokenizer_run(images, tmp_path / "run", num_steps=3, loss=replace(LOSS, jump=0.0))
    with caplog.at_level(logging.WARNING, "isthmus"):
        train_tokenizer(replace(run, optim=replace(OPTIM, learning_rate=1e-6)))
    last = log_lines(run.out)[-1]
    assert last["val/gap"] == pytest.approx(last["val/psnr"] - last["val/psnr_shuffled"], abs=1e-5)
    assert abs(last["val/gap"]) < 0.1
    assert "hardly listens to the codes" in caplog.text
    assert {"val/usage", "val/perplexity_group0", "val/perplexity_group1"} <= set(last)


def test_continuous_tokens_train_but_no_prior_predicts_them(tmp_path, images):
    run = diffusion_tokenizer_run(images, tmp_path / "run", num_steps=3)
    train_tokenizer(replace(run, model=replace(run.model, quantized=False)))
    assert "codebook.weight" not in weights(run.out / "image_tokenizer")
    with pytest.raises(UserError, match="continuous"):
        train_prior(next_token_prior_run(images, tmp_path / "prior", run.out))


def test_a_trained_run_is_a_pipeline_with_the_names_of_its_classes(trained_prior):
    pipe = load_pipeline(trained_prior, device="cpu")
    assert list(pipe.class_names.values()) == ["0", "1"]
    assert len(pipe(["1", 0, None], seed=0).images) == 3


@pytest.mark.parametrize("num_classes, count", [(0, 8), (1, 3)])
def test_unlabelled_one_class_and_three_images(tmp_path, num_classes, count):
    data = write_images(tmp_path / "d.npz", count=count, num_classes=num_classes)
    train_tokenizer(diffusion_tokenizer_run(data, tmp_path / "t", num_steps=3))
    train_prior(next_token_prior_run(data, tmp_path / "p", tmp_path / "t", num_steps=2))
    pipe = load_pipeline(tmp_path / "p", device="cpu")
    assert pipe.num_classes == num_classes and len(pipe(num_images=2, seed=0).images) == 2


def test_head_rows_of_classes_stay_zero_and_nothing_of_the_dropouts_is_saved(trained_prior):
    state = llama_weights(trained_prior)
    head = state["lm_head.weight"]
    assert head.shape[0] == 16 + 3 and not head[16:].any() and head[:16].any(dim=1).all()
    assert set(state) == set(load_pipeline(trained_prior, device="cpu").transformer.state_dict())
    config = json.loads((trained_prior / "transformer" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert not any(config[name] for name in config if "dropout" in name)


def test_fine_tuning_starts_where_the_source_stands(trained_prior):
    source = load_pipeline(trained_prior, device="cpu").transformer
    old, new = TokenLayout(16, 2, 4), TokenLayout(16, 5, 4)
    model = with_new_classes(source, new, LlamaModel(), "source").eval()
    ids = torch.randint(16, (2, 4))
    with torch.no_grad():
        before = next_token_logits(source, old, torch.tensor([old.null_class_id] * 2), ids)
        for label in (0, 4, new.null_class_id):
            assert torch.equal(next_token_logits(model, new, torch.tensor([label] * 2), ids), before)
        known = with_new_classes(source, new, LlamaModel(), "source", kept={3: 1}).eval()
        expected = next_token_logits(source, old, torch.tensor([1, old.null_class_id]), ids)
        assert torch.equal(next_token_logits(known, new, torch.tensor([3, 0]), ids), expected)
    with pytest.raises(UserError, match=r"model\.width is 16"):
        with_new_classes(source, new, LlamaModel(width=32), "source")
    # settings that a run cannot name stay as well
    config = copy.deepcopy(source.config)
    config.num_key_value_heads, config.rms_norm_eps = 1, 1e-3
    grouped = with_new_classes(LlamaForCausalLM(config), new, LlamaModel(), "source")
    assert (grouped.config.num_key_value_heads, grouped.config.rms_norm_eps) == (1, 1e-3)


def test_fine_tuning_learns_new_classes(tmp_path, trained_prior):
    data = write_images(tmp_path / "new.npz", count=24, num_classes=2, seed=5)
    run = next_token_prior_run(
        data, tmp_path / "f", "", num_steps=30, batch_size=8, from_model=str(trained_prior), model=LlamaModel(),
        validate_every=1, save_every=30, preview_every=30, optim=replace(OPTIM, learning_rate=1e-2), ema_decay=0.5,
    )  # fmt: skip
    train_prior(run)
    bits = [line["val/bits_per_token"] for line in log_lines(run.out) if "val/bits_per_token" in line]
    assert bits[-1] < bits[0] - 0.2


def test_tokenizer_fine_tuning_with_a_frozen_encoder_keeps_the_tokens(tmp_path, images, trained):
    run = diffusion_tokenizer_run(images, tmp_path / "f", from_model=str(trained), freeze_encoder=True, num_steps=3)
    train_tokenizer(replace(run, continuous_steps=0, flow=FlowSettings(num_inference_steps=3)))
    before, after = weights(trained / "image_tokenizer"), weights(run.out / "image_tokenizer")
    for name in before:
        trains = name.startswith(("from_code.", "token_position", "condition_layers."))
        assert torch.equal(before[name], after[name]) != trains, name
    assert len(load_parts(str(run.out)).scheduler.windows()) == 3


def test_a_frozen_encoder_with_latent_norm_keeps_the_tokens_of_other_images(tmp_path, images):
    """Running statistics decide about ids as weights do: fine-tuning on other images must not move them."""
    source = diffusion_tokenizer_run(images, tmp_path / "source")
    train_tokenizer(replace(source, model=replace(source.model, latent_norm=True)))
    other = write_images(tmp_path / "other.npz", count=24, num_classes=2, seed=7)
    run = diffusion_tokenizer_run(other, tmp_path / "f", from_model=str(source.out), freeze_encoder=True)
    train_tokenizer(replace(run, model=DiffusionTokenizerModel()))
    before, after = (load_parts(str(folder)).image_tokenizer for folder in (source.out, run.out))
    pixels = torch.rand(8, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert torch.equal(before.encode(pixels).token_ids, after.encode(pixels).token_ids)
    moved = [
        name for name, value in before.named_buffers() if not torch.equal(value, dict(after.named_buffers())[name])
    ]
    assert not moved


def test_everything_frozen_goes_to_the_device_of_the_training(tmp_path, images, trained, trained_tokenizer):
    """Previews decode: a decoder that stayed behind would end a run on a GPU at its first one."""
    dar = NextTokenPriorTask(next_token_prior_run(images, tmp_path / "dar", trained))
    dar.place(torch.device("meta"))
    assert dar.parts.decoder.device.type == dar.parts.image_tokenizer.device.type == "meta"
    next_scale = NextScalePriorTask(prior_run(images, tmp_path / "next-scale", trained_tokenizer))
    next_scale.place(torch.device("meta"))
    assert next_scale.tokenizer.device.type == next_scale.encoder.device.type == "meta"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_prior_run_with_previews_ends_on_a_gpu(tmp_path, images, trained):
    train_prior(next_token_prior_run(images, tmp_path / "gpu", trained, preview_every=2))
    assert len(list((tmp_path / "gpu" / "previews").iterdir())) == 3


def test_run_json_repeats_a_run(tmp_path, images, trained, trained_prior):
    for folder, run in (
        (trained, diffusion_tokenizer_run(images, trained)),
        (trained_prior, next_token_prior_run(images, trained_prior, trained)),
    ):
        record = json.loads((folder / "run.json").read_text())
        assert record["kind"] == type(run).__name__ and run_from_json(type(run), record["run"]) == run


def test_what_does_not_fit_is_refused_before_training(tmp_path, images, trained, trained_tokenizer):
    tokenizer = diffusion_tokenizer_run(images, tmp_path / "out")
    refused = [
        (replace(tokenizer, decoder=replace(tokenizer.decoder, patch_size=3)), r"decoder\.patch_size"),
        (replace(tokenizer, loss=replace(LOSS, alignment=1.0, alignment_layer=5)), "alignment_layer"),
        (replace(tokenizer, loss=replace(LOSS, canvas=1.0)), r"loss\.canvas needs"),
        (replace(tokenizer, loss=replace(LOSS, latest_time=0.2)), "latest_time"),
        (replace(tokenizer, model=replace(tokenizer.model, num_tokens=5)), "multiple of num_groups"),
        (replace(tokenizer, from_model=str(trained), model=replace(tokenizer.model, width=32)), r"model\.width is 16"),
        (replace(tokenizer, from_model=str(trained_tokenizer)), "holds no decoder"),
    ]
    for run, message in refused:
        with pytest.raises(UserError, match=message):
            train_tokenizer(run)
    prior = next_token_prior_run(images, tmp_path / "out", trained)
    for run, message in [
        (replace(prior, tokenizer=""), "needs a tokenizer"),
        (replace(prior, tokenizer=str(trained_tokenizer)), "holds no decoder"),
        (replace(prior, model=LlamaModel(width=16)), r"model\.num_layers"),
        (replace(prior, model=LlamaModel(width=18, num_layers=1, num_heads=2)), "even|twice the heads"),
        (replace(prior, sampling=PriorSampling(guidance="strong")), "strong"),
        (replace(prior, sampling=PriorSampling(guidance="1,2")), "one value per step"),
        (replace(prior, sampling=PriorSampling(top_p=1.5)), "top_p"),
        (replace(prior, sampling=PriorSampling(top_k=17)), r"1\.\.16"),
        (replace(prior, sampling=PriorSampling(temperature=-1.0)), "temperature"),
        (replace(prior, sampling=PriorSampling(smooth=True)), r"sampling\.smooth"),
    ]:
        with pytest.raises(UserError, match=message):
            train_prior(run)
    assert not (tmp_path / "out").exists()


def test_runs_of_the_two_families_do_not_mix(tmp_path, images, trained, trained_prior):
    with pytest.raises(UserError, match="which is a DARPipeline"):
        train_prior(prior_run(images, tmp_path / "out", "", from_model=str(trained_prior)))
    with pytest.raises(UserError, match="DiffusionTokenizerRun"):
        train_prior(next_token_prior_run(images, trained, trained))
    with pytest.raises(UserError, match="settings"):
        train_tokenizer(diffusion_tokenizer_run(images, trained, seed=1))

"""Whole runs: an interrupted one equals a straight one, and what a run refuses it refuses before training."""

import copy
import json
import logging
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import LlamaForCausalLM

from isthmus import load_pipeline
from isthmus.dar import train_prior as dar
from isthmus.dar.prior import TokenLayout, next_token_logits
from isthmus.dar.runs import DiffusionTokenizerModel, FlowSettings, LlamaModel
from isthmus.dar.train_tokenizer import load_parts
from isthmus.data.token_cache import TokenCache
from isthmus.errors import UserError
from isthmus.next_scale import train_prior as next_scale
from isthmus.next_scale.runs import PriorModel
from isthmus.nn.guidance import GuidanceSchedule
from isthmus.pipelines.options import SamplingOptions, SmoothSchedule
from isthmus.registry import task_of
from isthmus.training.config import PriorSampling, Run, run_from_json, run_to_json
from isthmus.training.run import check_folder
from tests.testers import TRAINED_ATOL
from tests.training.tiny_runs import (
    FAMILIES,
    FROZEN,
    LOSS,
    OPTIM,
    Family,
    assert_same,
    assert_same_log,
    diffusion_tokenizer_run,
    killed_after,
    log_lines,
    next_token_prior_run,
    prior_run,
    tokenizer_run,
    train,
    weights,
    write_images,
)

pytestmark = pytest.mark.slow


def test_settings_of_draws_survive_a_run_record():
    options = SamplingOptions(
        guidance_scale=GuidanceSchedule("linear", 1.0, 7.0, 7, 2),
        temperature=(1.0, 0.1),
        smooth=SmoothSchedule(2, 7, filtered=False),
    )
    for one in (options, SamplingOptions(), SamplingOptions(smooth=True)):
        sampling = PriorSampling.of(one)
        plain = json.loads(json.dumps(asdict(sampling)))
        assert PriorSampling(**{k: tuple(v) if isinstance(v, list) else v for k, v in plain.items()}).options() == one


class TrainingLaws:
    """A subclass names its family, whose runs of six steps are trained once."""

    family: Family
    # how a loss is measured on the whole batch alone, which other parts of it would change
    whole_batch: dict[str, Any]
    # of a prior that learns two new classes
    fine_tuning: dict[str, Any]
    # settings of a tokenizer that goes on from another, and what of it stays as it was
    frozen: dict[str, Any]
    kept: Callable[[str], bool]

    @pytest.fixture
    def tokenizer(self, request) -> Path:
        return request.getfixturevalue(self.family.tokenizer)

    @pytest.fixture
    def prior(self, request) -> Path:
        return request.getfixturevalue(self.family.prior)

    def misfits(self, images: str, out: Path, tokenizer: Path, prior: Path) -> list[tuple[Run, str]]:
        raise AssertionError("a test class says which runs are refused, and what the refusal names")

    @pytest.mark.parametrize("steps", [(2, 6), (4, 2), (6, 4)])
    def test_a_run_goes_on_bit_for_bit_and_a_finished_one_only_exports(self, tmp_path, images, tokenizer, prior, steps):
        runs = self.family.tokenizer_run(images, tokenizer), self.family.prior_run(images, prior, tokenizer)
        for step, straight in zip(steps, runs, strict=True):
            run = killed_after(step, straight, tmp_path / straight.out.parent.name)
            assert train(run) == run.out
            assert_same(weights(run.out), weights(straight.out))
            assert (run.out / "log.jsonl").read_text() == (straight.out / "log.jsonl").read_text()

    def test_accumulation_changes_nothing_but_memory(self, tmp_path, images, tokenizer, prior):
        whole = self.family.tokenizer_run(images, tmp_path / "whole", revive_every=0, **self.whole_batch)
        train(whole)
        for run in (whole, self.family.prior_run(images, prior, tokenizer)):
            parts = replace(run, out=tmp_path / f"{run.out.name}-parts", accumulate=2)
            train(parts)
            assert_same_log(run.out, parts.out)
        first, second = weights(prior / "transformer"), weights(parts.out / "transformer")
        for name, value in first.items():
            torch.testing.assert_close(second[name], value, rtol=1e-4, atol=TRAINED_ATOL)

    def test_a_trained_run_is_a_pipeline_with_the_names_of_its_classes(self, prior):
        pipe = load_pipeline(prior, device="cpu")
        assert list(pipe.class_names.values()) == ["0", "1"]
        assert len(pipe(["1", 0, None], seed=0).images) == 3

    @pytest.mark.parametrize("num_classes, count, side", [(0, 8, 12), (1, 3, 8)])
    def test_unlabelled_one_class_and_three_images(self, tmp_path, num_classes, count, side):
        data = write_images(tmp_path / "d.npz", count=count, num_classes=num_classes, side=side)
        train(self.family.tokenizer_run(data, tmp_path / "t", num_steps=3))
        train(self.family.prior_run(data, tmp_path / "p", tmp_path / "t", num_steps=2))
        pipe = load_pipeline(tmp_path / "p", device="cpu")
        assert pipe.num_classes == num_classes
        assert len(pipe(num_images=2, seed=0).images) == 2

    def test_fine_tuning_learns_new_classes(self, tmp_path, prior):
        data = write_images(tmp_path / "new.npz", count=24, num_classes=2, seed=5)
        run = self.family.prior_run(
            data, tmp_path / "f", "", batch_size=8, from_model=str(prior), validate_every=1, save_every=50,
            preview_every=50, ema_decay=0.5, **self.fine_tuning,
        )  # fmt: skip
        train(run)
        bits = [line["val/bits_per_token"] for line in log_lines(run.out) if "val/bits_per_token" in line]
        assert bits[-1] < bits[0] - 0.2

    def test_tokenizer_fine_tuning_with_a_frozen_encoder_keeps_the_tokens(self, tmp_path, images, tokenizer):
        run = self.family.tokenizer_run(
            images, tmp_path / "f", from_model=str(tokenizer), freeze_encoder=True, num_steps=3, **self.frozen
        )
        train(run)
        before, after = weights(tokenizer / "image_tokenizer"), weights(run.out / "image_tokenizer")
        for name, value in before.items():
            assert torch.equal(value, after[name]) == self.kept(name), name

    def test_everything_frozen_goes_to_the_device_of_the_training(self, tmp_path, images, tokenizer):
        """Previews decode: a decoder that stayed behind would end a run on a GPU at its first one."""
        run = self.family.prior_run(images, tmp_path / "run", tokenizer)
        task = task_of(run)(run)
        task.place(torch.device("meta"))
        frozen = [task.tokenizer, task.encoder, *vars(getattr(task, "parts", task.tokenizer)).values()]
        placed = {part.device.type for part in frozen if isinstance(part, torch.nn.Module)}
        assert placed == {"meta"}

    def test_run_json_repeats_a_run(self, images, tokenizer, prior):
        for run in (self.family.tokenizer_run(images, tokenizer), self.family.prior_run(images, prior, tokenizer)):
            record = json.loads((run.out / "run.json").read_text())
            assert record["kind"] == type(run).__name__ and record["run"] == run_to_json(run)
            assert run_from_json(type(run), record["run"]) == run
            with pytest.raises(UserError, match="no field optim.momentum"):
                run_from_json(type(run), record["run"] | {"optim": {"momentum": 1}})

    def test_what_does_not_fit_is_refused_before_training(self, tmp_path, images, tokenizer, prior):
        for run, message in self.misfits(images, tmp_path / "out", tokenizer, prior):
            with pytest.raises(UserError, match=message):
                train(run)
        assert not (tmp_path / "out").exists()


class TestNextScale(TrainingLaws):
    family = FAMILIES["next-scale"]
    whole_batch = {"loss": replace(tokenizer_run("", Path()).loss, adversarial=0.0)}
    fine_tuning = {"num_steps": 50, "model": PriorModel(), "optim": replace(OPTIM, learning_rate=3e-3)}
    frozen: dict[str, Any] = {}

    def kept(self, name):
        return name.startswith(("encoder.", "quant_conv.", "codebook.", "phi."))

    def misfits(self, images, out, tokenizer, prior):
        run = prior_run(images, out, tokenizer)
        return [
            (replace(run, tokenizer=""), "needs a tokenizer"),
            (replace(run, tokenizer="nowhere/at-all"), "nowhere/at-all"),
            (replace(run, data="folder:nowhere"), "nowhere"),
            (replace(run, classes=("0", "zebra")), "zebra"),
            (
                replace(run, scales_per_step=1, model=PriorModel(width=16, num_heads=2, scale_attention="causal")),
                "Markov",
            ),
            (prior_run(images, out, "", from_model=str(prior), model=PriorModel(width=32)), r"model\.width is 16"),
            (tokenizer_run(images, out, image_size=20), "image_size"),
        ]

    def test_fine_tuning_starts_where_the_source_stands(self, prior):
        source = load_pipeline(prior, device="cpu").transformer
        model = next_scale.with_new_classes(source, 5).eval()
        inputs = torch.randn(2, 20, 4)
        with torch.no_grad():
            before = source(torch.tensor([source.null_class_id] * 2), inputs).logits
            for label in (0, 4, model.null_class_id):
                assert torch.equal(model(torch.tensor([label] * 2), inputs).logits, before)
            known = next_scale.with_new_classes(source, 3, kept={2: 0}).eval()
            old = source(torch.tensor([0, source.null_class_id]), inputs).logits
            assert torch.equal(known(torch.tensor([2, 0]), inputs).logits, old)


class TestDAR(TrainingLaws):
    family = FAMILIES["D-AR"]
    whole_batch: dict[str, Any] = {}
    fine_tuning = {"num_steps": 30, "model": LlamaModel(), "optim": replace(OPTIM, learning_rate=1e-2)}
    frozen = {"continuous_steps": 0, "flow": FlowSettings(num_inference_steps=3)}

    def kept(self, name):
        return not name.startswith(("from_code.", "token_position", "condition_layers."))

    def misfits(self, images, out, tokenizer, prior):
        run, llama = diffusion_tokenizer_run(images, out), next_token_prior_run(images, out, tokenizer)
        return [
            (replace(run, decoder=replace(run.decoder, patch_size=3)), r"decoder\.patch_size"),
            (replace(run, loss=replace(LOSS, alignment=1.0, alignment_layer=5)), "alignment_layer"),
            (replace(run, loss=replace(LOSS, canvas=1.0)), r"loss\.canvas needs"),
            (replace(run, loss=replace(LOSS, latest_time=0.2)), "latest_time"),
            (replace(run, model=replace(run.model, num_tokens=5)), "multiple of num_groups"),
            (replace(run, from_model=str(tokenizer), model=replace(run.model, width=32)), r"model\.width is 16"),
            (replace(llama, tokenizer=""), "needs a tokenizer"),
            (replace(llama, model=LlamaModel(width=16)), r"model\.num_layers"),
            (replace(llama, model=LlamaModel(width=18, num_layers=1, num_heads=2)), "even|twice the heads"),
            (next_token_prior_run(images, out, "", from_model=str(prior), model=LlamaModel(width=32)), "width is 16"),
            (replace(llama, sampling=PriorSampling(guidance="strong")), "strong"),
            (replace(llama, sampling=PriorSampling(guidance="1,2")), "one value per step"),
            (replace(llama, sampling=PriorSampling(top_p=1.5)), "top_p"),
            (replace(llama, sampling=PriorSampling(top_k=17)), r"1\.\.16"),
            (replace(llama, sampling=PriorSampling(temperature=-1.0)), "temperature"),
            (replace(llama, sampling=PriorSampling(smooth=True)), r"sampling\.smooth"),
            (replace(llama, sampling=PriorSampling(temperature=(1.0, 0.1))), r"sampling\.temperature"),
        ]

    def test_a_run_of_everything_optional(self, tmp_path, images):
        run = diffusion_tokenizer_run(images, tmp_path / "run", loss=FROZEN, checkpoint_activations=True, num_steps=3)
        model = replace(run.model, latent_norm=True, position_table=True, low_rank_queries=True, tokens_per_step=3)
        decoder = replace(run.decoder, shared_time_embedding=True, adaptive_head=True, modulation_std=0.02)
        flow = FlowSettings(num_inference_steps=5, time_shift=1.5, data_std=0.5, solver="adams-bashforth-variable")
        train(replace(run, model=model, decoder=decoder, flow=flow))
        parts = load_parts(str(run.out))
        assert parts.decoder.config["position_table"] == 4 and parts.decoder.config["adaptive_head"]
        assert parts.scheduler.config["solver"] == "adams-bashforth-variable" and len(parts.scheduler.windows()) == 5
        values = log_lines(run.out)[-2]
        assert {"train/alignment", "train/perceptual", "train/readout", "train/jump", "train/flow"} <= set(values)
        # the heads are not part of what is saved
        assert not any("alignment" in name or "readout" in name for name in weights(run.out / "decoder"))

    def test_recomputed_activations_change_nothing(self, tmp_path, images, tokenizer, prior):
        # with dropout: the recomputation must draw the same masks
        for run in (diffusion_tokenizer_run(images, tokenizer), next_token_prior_run(images, prior, tokenizer)):
            again = replace(run, out=tmp_path / run.out.parent.name, checkpoint_activations=True)
            train(again)
            assert_same(weights(again.out), weights(run.out))

    def test_measurements_name_the_gap_and_a_deaf_decoder_is_reported_in_words(self, tmp_path, images, caplog):
        # nothing of the tokens reaches the pixels before the modulation has learnt
        run = diffusion_tokenizer_run(images, tmp_path / "run", num_steps=3, loss=replace(LOSS, jump=0.0))
        with caplog.at_level(logging.WARNING, "isthmus"):
            train(replace(run, optim=replace(OPTIM, learning_rate=1e-6)))
        last = log_lines(run.out)[-1]
        assert last["val/gap"] == pytest.approx(last["val/psnr"] - last["val/psnr_shuffled"], abs=1e-5)
        assert abs(last["val/gap"]) < 0.1
        assert "hardly listens to the codes" in caplog.text
        assert {"val/usage", "val/perplexity_group0", "val/perplexity_group1"} <= set(last)

    def test_continuous_tokens_train_but_no_prior_predicts_them(self, tmp_path, images):
        run = diffusion_tokenizer_run(images, tmp_path / "run", num_steps=3)
        train(replace(run, model=replace(run.model, quantized=False)))
        assert not any("codebook" in name for name in weights(run.out / "image_tokenizer"))
        assert not any("train/usage" in line for line in log_lines(run.out))
        with pytest.raises(UserError, match="continuous"):
            train(next_token_prior_run(images, tmp_path / "prior", run.out))

    def test_head_rows_of_classes_stay_zero_and_nothing_of_the_dropouts_is_saved(self, prior):
        state = weights(prior / "transformer")
        head = state["lm_head.weight"]
        assert head.shape[0] == 16 + 3 and not head[16:].any() and head[:16].any(dim=1).all()
        assert set(state) == set(load_pipeline(prior, device="cpu").transformer.state_dict())
        config = json.loads((prior / "transformer" / "config.json").read_text())
        assert config["architectures"] == ["LlamaForCausalLM"]
        assert not any(config[name] for name in config if "dropout" in name)

    def test_fine_tuning_starts_where_the_source_stands(self, prior):
        source = load_pipeline(prior, device="cpu").transformer
        old, new = TokenLayout(16, 2, 4), TokenLayout(16, 5, 4)
        model = dar.with_vocabulary(source, new).eval()
        ids = torch.randint(16, (2, 4))
        with torch.no_grad():
            before = next_token_logits(source, old, torch.tensor([old.null_class_id] * 2), ids)
            for label in (0, 4, new.null_class_id):
                assert torch.equal(next_token_logits(model, new, torch.tensor([label] * 2), ids), before)
            known = dar.with_vocabulary(source, new, kept={3: 1}).eval()
            expected = next_token_logits(source, old, torch.tensor([1, old.null_class_id]), ids)
            assert torch.equal(next_token_logits(known, new, torch.tensor([3, 0]), ids), expected)
        # settings that a run cannot name stay as well
        config = copy.deepcopy(source.config)
        config.num_key_value_heads, config.rms_norm_eps = 1, 1e-3
        grouped = dar.with_vocabulary(LlamaForCausalLM(config), new)
        assert (grouped.config.num_key_value_heads, grouped.config.rms_norm_eps) == (1, 1e-3)

    def test_a_frozen_encoder_with_latent_norm_keeps_the_tokens_of_other_images(self, tmp_path, images):
        """Running statistics decide about ids as weights do: fine-tuning on other images must not move them."""
        source = diffusion_tokenizer_run(images, tmp_path / "source")
        train(replace(source, model=replace(source.model, latent_norm=True)))
        other = write_images(tmp_path / "other.npz", count=24, num_classes=2, seed=7)
        run = diffusion_tokenizer_run(
            other, tmp_path / "f", from_model=str(source.out), freeze_encoder=True, **self.frozen
        )
        train(replace(run, model=DiffusionTokenizerModel()))
        assert len(load_parts(str(run.out)).scheduler.windows()) == 3
        before, after = (load_parts(str(folder)).image_tokenizer for folder in (source.out, run.out))
        pixels = torch.rand(8, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
        assert torch.equal(before.encode(pixels).token_ids, after.encode(pixels).token_ids)
        moved = [
            name for name, value in before.named_buffers() if not torch.equal(value, dict(after.named_buffers())[name])
        ]
        assert not moved

    @pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
    def test_a_prior_run_with_previews_ends_on_a_gpu(self, tmp_path, images, tokenizer):
        train(next_token_prior_run(images, tmp_path / "gpu", tokenizer, preview_every=2))
        assert len(list((tmp_path / "gpu" / "previews").iterdir())) == 3


def test_runs_of_the_two_families_do_not_mix(
    tmp_path, images, trained_tokenizer, trained_dar_tokenizer, trained_dar_prior
):
    out = tmp_path / "out"
    for run, message in (
        (prior_run(images, out, "", from_model=str(trained_dar_prior)), "which is a DARPipeline"),
        (diffusion_tokenizer_run(images, out, from_model=str(trained_tokenizer)), "holds no decoder"),
        (next_token_prior_run(images, out, trained_tokenizer), "holds no decoder"),
        (next_token_prior_run(images, trained_tokenizer, trained_dar_tokenizer), "holds a TokenizerRun"),
    ):
        with pytest.raises(UserError, match=message):
            train(run)
    assert not out.exists()


def test_another_run_in_the_same_folder_is_refused(images, trained_tokenizer, trained_prior):
    for run, message in (
        (prior_run(images, trained_prior, trained_tokenizer, seed=1), "other settings .seed: 0 -> 1"),
        (tokenizer_run(images, trained_tokenizer, seed=1), "other settings .seed: 0 -> 1"),
        (tokenizer_run(images, trained_prior), "holds a PriorRun, this is a TokenizerRun"),
    ):
        with pytest.raises(UserError, match=message):
            train(run)


@pytest.fixture
def image_folder(tmp_path) -> Path:
    """Three hundred images of two classes as files, which `datasets` reads as a stream."""
    folder = tmp_path / "files"
    for i in range(300):
        path = folder / "ab"[i % 2] / f"{i:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((9, 9, 3), (i * 7) % 255, np.uint8)).save(path)
    return folder


def test_grey_images(tmp_path):
    for i in range(6):
        path = tmp_path / "grey" / "abc"[i % 3] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((10, 14), 40 * i, np.uint8)).save(path)
    data = f"folder:{tmp_path / 'grey'}"
    train(tokenizer_run(data, tmp_path / "t", num_steps=3))
    train(prior_run(data, tmp_path / "p", tmp_path / "t", num_steps=2))
    assert load_pipeline(tmp_path / "p", device="cpu").class_names == {"0": "a", "1": "b", "2": "c"}


def test_a_stream_trains_both_and_goes_on_at_the_right_example(tmp_path, image_folder):
    data = f"hf:{image_folder}"
    changes = {"stream": True, "shuffle_buffer": 0, "num_steps": 4, "log_every": 1}
    straight = tokenizer_run(data, tmp_path / "straight", **changes)
    train(straight)
    again = train(killed_after(2, straight, tmp_path / "again"))
    assert_same(weights(again), weights(straight.out))
    train(prior_run(data, tmp_path / "p", straight.out, stream=True, max_images=12, num_steps=2))
    assert load_pipeline(tmp_path / "p", device="cpu").num_classes == 2
    with pytest.raises(UserError, match="max-images"):
        prior_run(data, tmp_path / "q", straight.out, stream=True)
    with pytest.raises(UserError, match="cannot choose classes"):
        train(replace(straight, out=tmp_path / "r", classes=("a",)))


def test_avatars_without_end_go_on_at_the_right_drawing_and_a_prior_has_their_captions(tmp_path, monkeypatch):
    monkeypatch.setenv("ISTHMUS_CACHE", str(tmp_path / "cache"))
    straight = tokenizer_run("avatars:gaze,stack", tmp_path / "straight", stream=True, num_steps=4)
    train(straight)
    again = train(killed_after(2, straight, tmp_path / "again"))
    assert_same(weights(again), weights(straight.out))
    prior = prior_run(straight.data, tmp_path / "p", straight.out, stream=True, max_images=12, num_steps=2, num_views=3)
    train(prior)
    cache = TokenCache(prior.out / "tokens")
    # nothing moves, so the views would be equal
    assert cache.num_views == 1 and len(cache.captions) == 12
    assert [words.split(",")[0] for words in cache.captions[:2]] == ["a shape with eyes", "a stack of stones"]
    assert load_pipeline(prior.out, device="cpu").class_names == {"0": "gaze", "1": "stack"}
    with pytest.raises(UserError, match="Leave out --max-images"):
        replace(straight, max_images=12)


def test_a_record_of_a_version_without_these_fields_goes_on(tmp_path, images, trained_prior):
    folder = killed_after(6, prior_run(images, trained_prior, ""), tmp_path / "before").out
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
        train(run)
    assert not (run.out / "model_index.json").exists()


def test_a_run_does_not_go_on_with_other_images(tmp_path, trained_tokenizer):
    data = write_images(tmp_path / "d.npz", seed=1)
    run = prior_run(data, tmp_path / "run", trained_tokenizer, num_steps=2)
    train(run)
    write_images(tmp_path / "d.npz", seed=2)
    with pytest.raises(UserError, match="data_fingerprint"):
        train(run)

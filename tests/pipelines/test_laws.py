"""Laws that the pipelines of both families keep: a subclass says how its pipeline is made, and inherits the tests."""

import inspect
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from isthmus.errors import UserError
from isthmus.next_scale.pipeline import NextScalePipeline
from isthmus.nn.saved_model import Config, without_values
from isthmus.pipelines.folder import FORMAT
from isthmus.pipelines.loading import load_pipeline
from isthmus.pipelines.memory import batch_size_that_fits
from isthmus.pipelines.options import SamplingOptions
from tests.pipelines.tiny import tiny_pipeline
from tests.pipelines.tiny_dar import tiny_dar
from tests.testers import NETWORK, token_hashes

SAVED = {"guidance_scale": 2.0, "top_k": 8}


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def hashes(result: Any) -> list[str]:
    """One per image, of all its tokens."""
    token_ids = result.token_ids
    return token_hashes([token_ids] if isinstance(token_ids, torch.Tensor) else token_ids)


class CallLaws:
    """Of drawing. A subclass has `make` (a tiny pipeline of 3 classes at 8 px), and what a family has of its own."""

    make: Callable[..., Any]
    num_steps: int
    """Steps of a stream."""
    num_guided_steps: int

    @pytest.fixture(scope="class")
    @classmethod
    def subject(cls) -> Any:
        """Do not modify it."""
        return cls.make(sampling_defaults=SAVED)

    def test_labels_by_name_index_or_null(self, subject):
        result = subject(["flag", 0, None], seed=1)
        assert result.class_labels == [1, 0, 3]
        assert [image.size for image in result.images] == [(8, 8)] * 3
        assert subject("hand", seed=0).class_labels == [2]
        assert subject(["face", "flag"], num_images=5, seed=0).class_labels == [0, 1, 0, 1, 0]
        assert subject(["face", "flag"], num_images_per_class=2, seed=0).class_labels == [0, 0, 1, 1]
        assert subject(num_images=2, seed=0).class_labels == [3, 3]

    def test_an_image_is_the_same_in_any_batch(self, subject):
        labels = ["face", 1, None, 2, 0]
        together = subject(labels, seed=7, image_index=10, output_type="pt")
        assert together.seeds == [(7, 10 + i) for i in range(5)]
        for i, label in enumerate(labels):
            alone = subject(label, seed=7, image_index=10 + i, output_type="pt")
            assert hashes(alone) == [hashes(together)[i]]
            assert_close(alone.images[0], together.images[i], atol=1e-4, rtol=0)
        order = [3, 0, 4]
        shuffled = subject([labels[i] for i in order], seed=7, image_index=[10 + i for i in order])
        assert hashes(shuffled) == [hashes(together)[i] for i in order]

    def test_stream_shows_every_step_and_ends_with_the_image(self, subject):
        called = subject([0, 1], seed=3, output_type="pt")
        steps = list(subject.stream([0, 1], seed=3, output_type="pt"))
        assert [(step.index, step.total) for step in steps] == [(i, self.num_steps) for i in range(self.num_steps)]
        assert token_hashes([step.token_ids for step in steps]) == hashes(called)
        assert_close(steps[-1].preview, called.images, **NETWORK)
        assert not torch.equal(steps[0].preview, steps[-1].preview)
        assert len(subject.step_names(self.num_steps)) == self.num_steps

    def test_a_preview_is_the_viewer_s_own(self, subject):
        last = list(subject.stream([0], seed=3, output_type="latent"))[-1].preview.clone()
        for step in subject.stream([0], seed=3, output_type="latent"):
            seen = step.preview.clone()
            step.preview.zero_()
        assert torch.equal(seen, last)

    def test_the_callback_sees_every_step(self, subject):
        seen = []
        result = subject(0, seed=3, callback_on_step_end=seen.append)
        assert [step.index for step in seen] == list(range(self.num_steps))
        assert all(step.preview is None for step in seen)
        assert token_hashes([step.token_ids for step in seen]) == hashes(result)

    def pixels(self, pipe: Any, latent: torch.Tensor) -> torch.Tensor:
        """What "latent" holds, as images in [-1, 1]."""
        raise AssertionError("a test class says what its latents are")

    def test_output_types_agree(self, subject):
        pt, array, pil, latent = (
            subject([0, 1], seed=1, output_type=kind).images for kind in ("pt", "np", "pil", "latent")
        )
        assert pt.shape == (2, 3, 8, 8) and 0 <= pt.min() and pt.max() <= 1
        assert np.array_equal(array, pt.permute(0, 2, 3, 1).numpy())
        assert np.abs(np.asarray(pil[0]) / 255 - array[0]).max() <= 0.5 / 255 + 1e-6
        assert_close(self.pixels(subject, latent).add(1).div(2), pt, **NETWORK)
        latent.requires_grad_()
        self.pixels(subject, latent).sum().backward()  # the caller may go on computing with it

    def test_defaults_come_from_the_model_and_none_turns_them_off(self, subject):
        assert hashes(subject(0, seed=1, **SAVED)) == hashes(subject(0, seed=1))
        off = subject([0, 1, 2], seed=1, guidance_scale=1, top_k=None)
        assert hashes(off) == hashes(type(self).make()([0, 1, 2], seed=1))

    def test_call_and_stream_take_the_same_options(self, subject):
        call, stream = (
            inspect.signature(function).parameters for function in (type(subject).__call__, type(subject).stream)
        )
        own = {"callback_on_step_end", "preview"}
        taken = [[(p.name, p.default, p.kind) for p in each.values() if p.name not in own] for each in (call, stream)]
        assert taken[0] == taken[1]
        assert all(f"{name}: " in type(subject).__call__.__doc__ for name in call.keys() - {"self"})

    def test_an_unknown_option_names_the_nearest(self, subject):
        for function in (subject, subject.stream):
            with pytest.raises(TypeError, match="has no option guidance. Did you mean guidance_scale?"):
                function(guidance=2.0)

    def test_unlabelled_models_need_no_labels(self):
        make = type(self).make
        pipe = make(num_classes=0)
        assert pipe(num_images=2, seed=0).class_labels == [0, 0]
        with pytest.raises(UserError, match="nothing to guide towards"):
            pipe(num_images=2, guidance_scale=2.0)
        with pytest.raises(UserError, match="no classes"):
            pipe("face")
        with pytest.raises(UserError, match="nothing to guide towards"):
            make(num_classes=0, sampling_defaults=SamplingOptions(guidance_scale=2.0))

    def test_what_cannot_be_used_is_refused_in_words(self, subject):
        """Of every rule one: where it lies, all its cases are tested."""
        for arguments, said in [
            ({"class_labels": "fcae"}, "Did you mean face"),
            ({"class_labels": 3}, r"0\.\.2, got 3"),
            ({"class_labels": -1}, r"0\.\.2"),
            ({"class_labels": True}, r"0\.\.2"),
            ({"class_labels": []}, "at least one"),
            ({"num_images": 0}, "at least one"),
            ({"num_images": 2, "num_images_per_class": 2}, "one of them"),
            ({"top_k": 17}, r"1\.\.16"),
            ({"guidance_scale": float("nan")}, "finite"),
            ({"guidance_scale": [1.0, 2.0]}, rf"one value per step \({self.num_guided_steps}\)"),
            ({"seed": 1, "generator": torch.Generator()}, "got both"),
            ({"seed": [1, 2]}, r"one number per image \(1\)"),
            ({"seed": -1}, "negative"),
            ({"seed": [1], "image_index": 3}, "image_index"),
            ({"generator": [torch.Generator()] * 2}, "generators needs one per image"),
        ]:
            for function in (subject, subject.stream):
                with pytest.raises(UserError, match=said):
                    function(**arguments)  # at once, not at the first step

    def test_the_memory_estimate_grows_with_the_work(self, subject):
        assert 1 <= batch_size_that_fits(subject, guided=True) <= 64
        assert subject.bytes_per_image(guided=True) >= subject.bytes_per_image(guided=False) > 0

    def test_what_a_caller_sets_as_torchs_defaults_changes_nothing(self, subject):
        options = {"seed": 3, "guidance_scale": 1.5, "temperature": 0.9, "output_type": "pt"}
        before = subject([0, 1], **options).images
        torch.set_default_dtype(torch.float64)
        torch.set_default_device("meta")
        try:
            after = subject([0, 1], **options).images
        finally:
            torch.set_default_dtype(torch.float32)
            torch.set_default_device(None)
        assert torch.equal(before, after)


class PipelineLaws(CallLaws):
    """Of drawing and of saved folders."""

    weights: str
    """File of the transformer's weights."""
    head: str
    """One of them."""
    components: dict[str, list[Any]]
    """Entries of model_index.json."""
    on_the_card: str
    misfits: list[tuple[str, dict[str, Any], str]]
    """Settings of a file that do not fit, and what is said of them."""

    @pytest.fixture(scope="class")
    @classmethod
    def folder(cls, tmp_path_factory) -> Path:
        """A saved pipeline; tests that change it copy it first."""
        path = tmp_path_factory.mktemp("models") / "tiny"
        data = {"name": "drawings", "attribution": "CC0"}
        cls.make(sampling_defaults={"guidance_scale": 2.0}, data=data).save_pretrained(path)
        return path

    @pytest.fixture
    def copied(self, folder, tmp_path) -> Path:
        return Path(shutil.copytree(folder, tmp_path / "copied"))

    def test_what_would_not_be_faster_or_not_be_exact_is_refused(self, folder):
        pipe = type(self).make()
        with pytest.raises(UserError, match="got a compiled"):
            pipe.transformer = torch.compile(pipe.transformer, backend="eager")
        for ask in (lambda: pipe.to("cpu", torch.float16), lambda: load_pipeline(folder, dtype="float16")):
            with pytest.raises(UserError, match="65504.*bfloat16"):
                ask()
        assert pipe.dtype == torch.float32

    def test_a_saved_pipeline_draws_the_same_wherever_it_lies(self, folder, copied):
        pipe = type(self).make(sampling_defaults={"guidance_scale": 2.0})
        expected = pipe([0, 1], seed=3, output_type="latent")
        for path in (folder, str(copied)):
            loaded = load_pipeline(path)
            drawn = loaded(["face", "flag"], seed=3, output_type="latent")
            assert hashes(drawn) == hashes(expected) and torch.equal(drawn.images, expected.images)
        assert loaded.fingerprint == pipe.fingerprint
        assert loaded.defaults == SamplingOptions(guidance_scale=2.0)
        # a text encoder is named by folders that have one
        assert set(loaded.components) - {"text_encoder", "text_tokenizer"} == self.components.keys()
        assert not loaded.transformer.training

    def test_a_pipeline_loaded_without_values_has_its_shapes_alone(self, folder):
        made = type(self).make()
        with without_values():
            loaded = load_pipeline(folder)
            for name in ("image_tokenizer", "transformer"):
                shapes, given = getattr(loaded, name).state_dict(), getattr(made, name).state_dict()
                assert all(tensor.is_meta for tensor in shapes.values())
                assert {n: t.shape for n, t in shapes.items()} == {n: t.shape for n, t in given.items()}

    def test_the_folder_holds_what_the_design_says(self, folder):
        index = json.loads((folder / "model_index.json").read_text())
        assert index["isthmus_format"] == FORMAT and index["isthmus_version"]
        assert {name: index[name] for name in self.components} == self.components
        assert index["class_names"] == {"0": "face", "1": "flag", "2": "hand"}
        assert index["preprocessing"]["image_size"] == 8
        card = (folder / "README.md").read_text()
        for part in ("drawings", "CC0", "load_pipeline", "Protocol", 'class_labels=["face"]', self.on_the_card):
            assert part in card
        files = [path for path in folder.rglob("*") if path.is_file()]
        assert {path.suffix for path in files} == {".json", ".md", ".safetensors"}
        assert len({path.stat().st_mode for path in files}) == 1

    def test_saving_is_quiet(self, subject, tmp_path, capfd):
        subject.save_pretrained(tmp_path / "again")
        assert capfd.readouterr() == ("", "")

    def test_saving_again_replaces_ours_and_leaves_the_rest(self, copied):
        (copied / "notes.txt").write_text("mine")
        other = type(self).make(num_classes=2)
        other.save_pretrained(copied)
        assert (copied / "notes.txt").read_text() == "mine"
        assert load_pipeline(copied).fingerprint == other.fingerprint
        assert not list(copied.glob(".partial*"))

    def test_an_interrupted_save_leaves_nothing(self, tmp_path):
        pipe = type(self).make()
        pipe.config = Config(pipe.config | {"protocol": object()})  # cannot be written as JSON
        with pytest.raises(TypeError):
            pipe.save_pretrained(tmp_path / "model")
        assert list(tmp_path.iterdir()) == []

    def test_shards_load_too(self, folder, tmp_path):
        pipe = type(self).make(sampling_defaults={"guidance_scale": 2.0})
        pipe.save_pretrained(tmp_path / "sharded", max_shard_size="10KB")
        assert len(list((tmp_path / "sharded" / "transformer").glob("*.safetensors"))) > 1
        assert load_pipeline(tmp_path / "sharded").fingerprint == load_pipeline(folder).fingerprint

    def test_settings_that_do_not_fit_are_errors(self, copied):
        for file, changes, said in [
            ("model_index.json", {"wishes": 1}, "wishes"),
            ("model_index.json", {"isthmus_format": "1"}, "isthmus_format"),
            ("model_index.json", {"_class_name": "OtherPipeline"}, "OtherPipeline"),
            ("model_index.json", {"transformer": ["os", "system"]}, self.components["transformer"][1]),
            ("model_index.json", {"sampling_defaults": {"topk": 1}}, "topk"),
            ("model_index.json", {"isthmus_format": FORMAT + 1, "isthmus_version": "9.1"}, "9.1.*Update Isthmus"),
            ("transformer/config.json", {"wishes": 1}, "wishes"),
            ("image_tokenizer/config.json", {"codebook_size": 8}, "expected"),
            *self.misfits,
        ]:
            written = (copied / file).read_text()
            edit_json(copied / file, **changes)
            with pytest.raises(UserError, match=said):
                load_pipeline(copied)
            (copied / file).write_text(written)

    def test_weights_must_be_complete_and_no_more(self, copied):
        path = copied / "transformer" / self.weights
        weights = load_file(path)
        save_file(weights | {"extra.weight": torch.zeros(1)}, path)
        with pytest.raises(UserError, match="unexpected extra.weight"):
            load_pipeline(copied)
        weights.pop(self.head)
        save_file(weights, path)
        with pytest.raises(UserError, match=f"missing {self.head}"):
            load_pipeline(copied)
        path.write_bytes(path.read_bytes()[:-100])
        with pytest.raises(UserError, match="truncated"):
            load_pipeline(copied)
        path.unlink()
        with pytest.raises(UserError, match=f"transformer/{self.weights}, which is missing"):
            load_pipeline(copied)

    def test_weights_that_are_not_finite_are_named(self, tmp_path):
        type(self).make().to(torch.bfloat16).save_pretrained(tmp_path)
        for path in tmp_path.rglob("*.safetensors"):
            weights = load_file(path)
            name = sorted(weights)[-1]
            broken = weights[name].clone()
            broken.view(-1)[-1] = float("nan")
            save_file(weights | {name: broken}, path, metadata={"format": "pt"})
            with pytest.raises(UserError, match=f"finite, got NaN or infinity in {name} of .*{path.parent.name}"):
                load_pipeline(tmp_path)
            save_file(weights, path, metadata={"format": "pt"})
        assert load_pipeline(tmp_path).num_classes == 3

    def test_bf16_draws(self, folder):
        loaded = load_pipeline(folder, dtype="bfloat16")
        networks = [part for part in loaded.components.values() if isinstance(part, torch.nn.Module)]
        assert all(part.dtype == torch.bfloat16 for part in networks)
        images = loaded(["face", 1], seed=0, output_type="pt").images
        assert images.dtype == torch.float32 and bool(torch.isfinite(images).all())


class TestNextScaleLaws(PipelineLaws):
    """SRDD: every scale reads the features alone."""

    make = tiny_pipeline
    num_steps = num_guided_steps = 3
    weights, head = "diffusion_pytorch_model.safetensors", "head.weight"
    components = {
        "image_tokenizer": ["isthmus.next_scale.tokenizer", "MultiScaleVQVAE"],
        "transformer": ["isthmus.next_scale.transformer", "NextScaleTransformer"],
        "scheduler": [None, None],
    }
    on_the_card = "1, 2, 4"
    misfits = [
        ("model_index.json", {"scheduler": ["isthmus.schedulers", "Later"]}, "scheduler"),
        ("transformer/config.json", {"width": 32}, "expected"),
        ("transformer/config.json", {"num_layers": 1}, "unexpected"),
        ("transformer/config.json", {"_class_name": "MultiScaleVQVAE"}, "NextScaleTransformer"),
        ("image_tokenizer/config.json", {"num_res_blocks": 2}, "missing"),
    ]

    def pixels(self, pipe, latent):
        return pipe.image_tokenizer.decode_features(latent)


class TestCausalNextScaleLaws(CallLaws):
    """VAR: keys and values of earlier scales are kept."""

    num_steps = num_guided_steps = 3
    pixels = TestNextScaleLaws.pixels

    @staticmethod
    def make(**options: Any) -> NextScalePipeline:
        return tiny_pipeline(scale_attention="causal", **options)


class TestDARLaws(PipelineLaws):
    make = tiny_dar
    num_steps, num_guided_steps = 4, 16
    weights, head = "model.safetensors", "lm_head.weight"
    components = {
        "image_tokenizer": ["isthmus.dar.tokenizer", "DiffusionTokenizer"],
        "decoder": ["isthmus.dar.decoder", "FlowDecoder"],
        "transformer": ["transformers", "LlamaForCausalLM"],
        "scheduler": ["isthmus.dar.scheduler", "FlowMatchingScheduler"],
    }
    on_the_card = "16 in 4 groups"
    misfits = [
        ("model_index.json", {"scheduler": [None, None]}, "FlowMatchingScheduler"),
        ("model_index.json", {"sampling_defaults": {"smooth": True}}, "smooth"),
        ("transformer/config.json", {"hidden_size": 32}, "expected"),
        ("transformer/config.json", {"num_hidden_layers": 1}, "unexpected"),
        ("transformer/config.json", {"num_hidden_layers": 3}, "missing"),
        ("transformer/config.json", {"architectures": ["MistralForCausalLM"]}, "must hold a LlamaForCausalLM"),
        ("transformer/config.json", {"architectures": None}, "must hold a LlamaForCausalLM"),
        ("transformer/config.json", {"codebook_size": 8}, "codebook_size"),
        ("transformer/config.json", {"max_position_embeddings": 33}, "positions"),
        ("transformer/config.json", {"hidden_act": "gelu"}, "hidden_act"),
        ("decoder/config.json", {"wishes": 1}, "wishes"),
        ("decoder/config.json", {"width": 32}, "expected"),
        ("scheduler/scheduler_config.json", {"wishes": 1}, "wishes"),
        ("scheduler/scheduler_config.json", {"num_groups": 2}, "num_groups"),
        ("scheduler/scheduler_config.json", {"_class_name": "Other"}, "FlowMatchingScheduler"),
    ]

    def pixels(self, pipe, latent):
        return latent.clamp(-1, 1)

    def test_what_images_depend_on_is_in_the_fingerprint(self, copied):
        before = load_pipeline(copied).fingerprint
        edit_json(copied / "scheduler" / "scheduler_config.json", time_shift=1.0)
        assert load_pipeline(copied).fingerprint != before
        edit_json(copied / "scheduler" / "scheduler_config.json", time_shift=2.0)
        edit_json(copied / "transformer" / "config.json", transformers_version="4.0")
        assert load_pipeline(copied).fingerprint == before
        path = copied / "transformer" / self.weights
        weights = load_file(path)
        weights["model.norm.weight"] += 1
        save_file(weights, path, metadata={"format": "pt"})
        assert load_pipeline(copied).fingerprint != before

    def test_a_folder_without_its_scheduler_is_refused(self, copied):
        (copied / "scheduler" / "scheduler_config.json").unlink()
        with pytest.raises(UserError, match="scheduler_config.json, which is missing"):
            load_pipeline(copied)

    def test_families_are_not_mixed_up(self, folder):
        with pytest.raises(UserError, match="holds a DARPipeline, not a NextScalePipeline"):
            NextScalePipeline.from_pretrained(folder)

    def test_the_llama_is_a_stock_module(self, folder):
        assert type(load_pipeline(folder).transformer).__module__.startswith("transformers.")

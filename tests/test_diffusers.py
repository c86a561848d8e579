"""Our pipelines as pipelines of the real diffusers, both families under one set of laws."""

import io
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from isthmus.errors import UserError
from isthmus.next_scale.pipeline import NextScalePipeline
from isthmus.next_scale.refinement import ScaleRefinementScheduler
from isthmus.pipelines.loading import load_pipeline
from isthmus.text.encoders import SmallTextEncoder
from tests.pipelines.tiny import tiny_pipeline, tiny_text_pipeline
from tests.pipelines.tiny_dar import WORDS, tiny_dar

# importing diffusers takes longer than the tests: only the fixture does it
pytestmark = pytest.mark.slow
REPOSITORY = Path(__file__).resolve().parent.parent
MAKE = {"next-scale": tiny_pipeline, "dar": tiny_dar}
STEPS = {"next-scale": 3, "dar": 4}
TIMES = {"next-scale": [1, 2, 4]}


@pytest.fixture(scope="session")
def adapter():
    import isthmus.diffusers

    return isthmus.diffusers


@pytest.fixture(scope="session")
def folders(tmp_path_factory) -> dict[str, Path]:
    parent = tmp_path_factory.mktemp("diffusers")
    for family, make in MAKE.items():
        make(sampling_defaults={"guidance_scale": 2.0}).save_pretrained(parent / family)
    return {family: parent / family for family in MAKE}


@pytest.fixture(params=list(MAKE))
def family(request) -> str:
    return request.param


@pytest.fixture
def pipe(adapter, folders, family):
    made = adapter.from_pretrained(folders[family])
    made.set_progress_bar_config(disable=True)
    return made


@pytest.fixture
def own(folders, family):
    return load_pipeline(folders[family])


@pytest.fixture
def next_scale(adapter):
    made = adapter.from_pipeline(tiny_pipeline())
    made.set_progress_bar_config(disable=True)
    return made


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def tokens_of(output) -> torch.Tensor:
    ids = output.token_ids
    return ids if isinstance(ids, torch.Tensor) else torch.cat(ids, dim=1)


def test_one_seed_makes_one_image_whoever_is_asked(pipe, own):
    labels = ["flag", None]
    for random in (
        lambda: {"generator": generators(7)[0]},
        lambda: {"generator": generators(7, 8)},
        lambda: {"seed": 7, "image_index": [3, 1]},
        lambda: {"seed": np.array([7, 8])},
    ):
        ours = own(labels, top_k=8, output_type="np", **random())
        theirs = pipe(class_labels=labels, top_k=8, output_type="np", **random())
        assert torch.equal(tokens_of(theirs), tokens_of(ours))
        assert np.array_equal(theirs.images, ours.images)
        assert (theirs.class_labels, theirs.seeds) == (ours.class_labels, ours.seeds)
    # a fresh seed is returned
    drawn = pipe(["face"], output_type="pt")
    assert not torch.equal(drawn.images, pipe(["face"], output_type="pt").images)
    ((seed, index),) = drawn.seeds
    assert torch.equal(drawn.images, pipe(["face"], seed=seed, image_index=index, output_type="pt").images)


def test_it_is_called_as_dit_is(pipe):
    from diffusers import ImagePipelineOutput

    ids = pipe.get_label_ids(["face", "hand"])
    assert ids == [0, 2] and pipe.get_label_ids("hand") == [2] and pipe.labels == {"face": 0, "flag": 1, "hand": 2}
    output = pipe(ids, 1.5, generators(7)[0])
    assert isinstance(output, ImagePipelineOutput) and output[0] is output.images
    (images,) = pipe(class_labels=ids, guidance_scale=1.5, generator=generators(7)[0], return_dict=False)
    assert [image.tobytes() for image in images] == [image.tobytes() for image in output.images]
    several = pipe(ids, seed=1, num_images_per_prompt=2, output_type="pt")
    assert several.class_labels == [0, 0, 2, 2] and several.images.shape == (4, 3, 8, 8)
    latents = pipe(ids, seed=1, output_type="latent").images
    assert torch.equal(pipe.decode_latents(latents, "pt"), pipe(ids, seed=1, output_type="pt").images)


def test_a_label_is_a_name_or_one_of_its_words(adapter):
    names = ["tench, Tinca tinca", "crane", "crane, machine"]
    plain = tiny_pipeline(names=False)
    pipe = adapter.from_pipeline(NextScalePipeline(plain.image_tokenizer, plain.transformer, class_names=names))
    assert pipe.get_label_ids(["Tinca tinca", "tench, Tinca tinca", "machine"]) == [0, 0, 2]
    assert pipe.get_label_ids(["crane"]) == [1], "the whole name of one class"
    with pytest.raises(UserError, match="no class 'tenche'.*tench"):
        pipe.get_label_ids("tenche")


def test_a_callback_sees_every_step_and_changes_nothing(pipe, own, family):
    seen = []

    def look(given, step, t, kwargs):
        assert given is pipe
        seen.append((step, float(t), kwargs["token_ids"], pipe.decode_latents(kwargs["latents"], "pt")))
        return kwargs

    output = pipe(
        ["face"],
        seed=3,
        output_type="pt",
        callback_on_step_end=look,
        callback_on_step_end_tensor_inputs=["latents", "token_ids"],
    )
    expected = list(own.stream(["face"], seed=3, output_type="pt"))
    assert [step for step, *_ in seen] == [step.index for step in expected] == list(range(STEPS[family]))
    assert pipe.num_timesteps == STEPS[family]
    times = TIMES.get(family) or own.scheduler.times()[:-1].tolist()
    assert [t for _, t, *_ in seen] == times
    for (_, _, token_ids, picture), step in zip(seen, expected, strict=True):
        assert torch.equal(token_ids, step.token_ids) and torch.equal(picture, step.preview)
    assert torch.equal(seen[-1][3], output.images)
    for change in (
        lambda kwargs: {"latents": kwargs["latents"] + 1},
        lambda kwargs: kwargs["latents"].add_(1) is None,
        lambda kwargs: {**kwargs, "prompt_embeds": kwargs["latents"]},
    ):
        with pytest.raises(UserError, match="looks on"):
            pipe(0, seed=0, callback_on_step_end=lambda pipe, step, t, kwargs, change=change: change(kwargs))


def test_an_interrupted_call_returns_the_image_so_far(pipe, own):
    def stop(given, step, t, kwargs):
        given._interrupt = step == 1

    output = pipe(["face", "flag"], seed=3, output_type="pt", callback_on_step_end=stop)
    steps = list(own.stream(["face", "flag"], seed=3, output_type="pt"))[:2]
    assert torch.equal(output.images, steps[-1].preview)
    assert torch.equal(tokens_of(output), torch.cat([step.token_ids for step in steps], dim=1))
    assert pipe.interrupt
    whole = pipe(["face", "flag"], seed=3, output_type="pt")
    assert torch.equal(whole.images, own(["face", "flag"], seed=3, output_type="pt").images)


def test_callbacks_that_are_objects_name_their_tensors(pipe, family):
    from diffusers.callbacks import PipelineCallback

    class Look(PipelineCallback):
        tensor_inputs = ["token_ids"]
        seen = 0

        def callback_fn(self, pipeline, step_index, timesteps, callback_kwargs):
            Look.seen += list(callback_kwargs) == ["token_ids"]
            return callback_kwargs

    shown = io.StringIO()
    pipe.set_progress_bar_config(file=shown, mininterval=0, desc="drawing")
    pipe(0, seed=0, callback_on_step_end=Look())
    assert Look.seen == STEPS[family]
    # and the bar counts steps
    assert "drawing" in shown.getvalue() and f"{STEPS[family]}/{STEPS[family]}" in shown.getvalue()
    with pytest.raises(UserError, match="latents and token_ids, got 'prompt_embeds'"):
        pipe(0, callback_on_step_end=print, callback_on_step_end_tensor_inputs=["prompt_embeds"])


def test_what_other_pipelines_take_is_answered_with_ours(pipe):
    for given, said in [
        ({"prompt": "a cat"}, "got 'a cat'.*class_labels="),
        ({"negative_prompt": "dog"}, "guidance_scale="),
        ({"latents": torch.zeros(1)}, "got Tensor.*seed= or generator="),
        ({"eta": 0.0}, "leave it out"),
        ({"image": torch.zeros(1)}, "pipe.native"),
        ({"callback": print}, "callback_on_step_end="),
        ({"num_images_per_prompt": 2, "num_images_per_class": 2}, "Pass one"),
    ]:
        with pytest.raises(UserError, match=said):
            pipe(0, **given)
    # None asks for nothing
    pipe(0, seed=0, **dict.fromkeys(("prompt", "negative_prompt", "latents", "eta", "image", "callback")))
    with pytest.raises(TypeError, match="'wishes'"):
        pipe(0, wishes=1)


def test_a_dar_model_takes_other_steps_and_sides_and_those_of_a_next_scale_model_are_its_own(next_scale, adapter):
    own = tiny_dar()
    pipe = adapter.from_pipeline(own)
    given = {"num_inference_steps": 8, "height": 16, "width": 8, "solver": "euler", "seed": 5, "output_type": "pt"}
    drawn = pipe(["face"], **given)
    assert torch.equal(drawn.images, own(["face"], **given).images) and drawn.images.shape == (1, 3, 16, 8)
    assert pipe.num_timesteps == 8
    with pytest.raises(UserError, match="3 scales .1, 2, 4., got num_inference_steps=50.*distill"):
        next_scale(0, num_inference_steps=50)
    with pytest.raises(UserError, match="8 pixels, got width=512"):
        next_scale(0, width=512)
    next_scale(0, seed=0, num_inference_steps=3, height=8, width=8)


def test_what_it_saves_is_ours(pipe, own, tmp_path, adapter):
    pipe.save_pretrained(tmp_path / "saved", max_shard_size="20KB", safe_serialization=True)
    assert len(list((tmp_path / "saved" / "image_tokenizer").glob("*.safetensors"))) > 1
    assert load_pipeline(tmp_path / "saved").fingerprint == own.fingerprint
    again = adapter.from_pretrained(tmp_path / "saved")
    assert again.native.config == own.config and again.name_or_path == str(tmp_path / "saved")
    for wrong in ({"safe_serialization": False}, {"variant": "fp16"}, {"push_to_hub": True}):
        with pytest.raises(UserError, match=next(iter(wrong))):
            pipe.save_pretrained(tmp_path / "other", **wrong)
    assert not (tmp_path / "other").exists()


def test_types_are_those_that_the_model_computes_in(pipe, folders, family, adapter):
    half = adapter.from_pretrained(folders[family], torch_dtype=torch.bfloat16)
    assert {part.dtype for part in half.components.values() if isinstance(part, torch.nn.Module)} == {torch.bfloat16}
    expected = load_pipeline(folders[family], dtype="bfloat16")([0], seed=1, output_type="pt").images
    assert torch.equal(half([0], seed=1, output_type="pt").images, expected)
    assert torch.equal(pipe.to("cpu", torch.bfloat16)([0], seed=1, output_type="pt").images, expected)
    assert pipe.to(dtype=torch.float32).dtype == pipe.native.dtype == torch.float32
    for refused in (
        lambda: pipe.to(torch.float16),
        lambda: adapter.from_pretrained(folders[family], dtype=torch.float16),
    ):
        with pytest.raises(UserError, match="float32 or bfloat16, got float16"):
            refused()
    with pytest.raises(UserError, match="Pass dtype"):
        adapter.from_pretrained(folders[family], dtype=torch.float32, torch_dtype=torch.float32)


def test_a_device_map_is_the_name_of_a_device(pipe, folders, family, adapter):
    for name in ("cpu", "auto", "balanced") if not torch.cuda.is_available() else ("cpu",):
        mapped = adapter.from_pretrained(folders[family], device_map=name)
        assert mapped.hf_device_map == "cpu" == mapped.to("cpu").device.type
    assert pipe.hf_device_map is None
    with pytest.raises(UserError, match="present here .*cpu.*got cuda:99"):
        adapter.from_pretrained(folders[family], device_map="cuda:99")


def test_loading_answers_with_ours_too(folders, family, adapter):
    foreign = [
        ({"variant": "fp16"}, "torch_dtype="),
        ({"quantization_config": object()}, "torch_dtype=torch.bfloat16"),
        ({"use_safetensors": False}, "no others are read"),
        ({"max_memory": {0: "1GB"}}, "device_map="),
        ({"trust_remote_code": True}, "No code"),
    ]
    for given, said in foreign:
        with pytest.raises(UserError, match=said):
            adapter.from_pretrained(folders[family], **given)
    asks_nothing = {name: None for given, _ in foreign for name in given}
    adapter.from_pretrained(folders[family], **asks_nothing | {"use_safetensors": True, "low_cpu_mem_usage": True})


def test_offloading_has_an_order_of_parts(pipe, own):
    modules = {name for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}
    order = pipe.model_cpu_offload_seq.split("->")
    assert modules <= set(order) <= pipe.components.keys() and order[-1] != "transformer"
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="requires accelerator"):
            pipe.enable_model_cpu_offload()
    # the same code with the one device that is always here
    pipe.enable_model_cpu_offload(device="cpu")
    expected = tokens_of(own(["face"], seed=3))
    for _ in range(2):
        assert torch.equal(tokens_of(pipe(["face"], seed=3)), expected)
    with pytest.raises(UserError, match="no class"):
        pipe("nobody")
    pipe.remove_all_hooks()
    assert torch.equal(tokens_of(pipe(["face"], seed=3)), expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_offloaded_parts_are_on_the_device_during_a_call_alone(pipe):
    pipe.enable_model_cpu_offload()
    during = []

    def look(pipe, step, t, kwargs):
        during.extend(part.device.type for part in pipe.components.values() if isinstance(part, torch.nn.Module))

    pipe(["face"], seed=3, callback_on_step_end=look)
    assert set(during) == {"cuda"}
    after = {part.device.type for part in pipe.components.values() if isinstance(part, torch.nn.Module)}
    assert after == {"cpu"}


def test_components_are_exchanged_where_they_belong_together(next_scale, folders, adapter):
    own, masked = tiny_pipeline(), ScaleRefinementScheduler(mode="masked")
    own.scheduler = next_scale.scheduler = masked
    expected = tokens_of(own(["face"], seed=3))
    assert torch.equal(tokens_of(next_scale(["face"], seed=3)), expected)
    assert next_scale.config.scheduler == ("isthmus.next_scale.refinement", "ScaleRefinementScheduler")
    loaded = adapter.from_pretrained(folders["next-scale"], scheduler=masked)
    assert loaded.scheduler is masked and loaded.native.fingerprint == next_scale.native.fingerprint
    next_scale.scheduler = None
    assert torch.equal(tokens_of(next_scale(["face"], seed=3)), tokens_of(tiny_pipeline()(["face"], seed=3)))
    next_scale.native.refine_with("masked")
    assert next_scale.scheduler is next_scale.components["scheduler"] is next_scale.native.scheduler is not None


def test_what_cannot_be_done_and_components_that_do_not_fit_are_refused(pipe, family):
    for name, said in [
        ("enable_sequential_cpu_offload", "enable_model_cpu_offload"),
        ("enable_group_offload", "enable_model_cpu_offload"),
        ("enable_attention_slicing", "scaled_dot_product_attention"),
        ("enable_xformers_memory_efficient_attention", "scaled_dot_product_attention"),
        ("push_to_hub", "hf upload"),
    ]:
        with pytest.raises(UserError, match=said):
            getattr(pipe, name)()
    before = pipe.native
    with pytest.raises(UserError, match="transformer must be a .*got Linear"):
        pipe.transformer = torch.nn.Linear(1, 1)
    with pytest.raises(UserError, match="torch.compile.*Pass the module itself"):
        pipe.transformer = torch.compile(pipe.transformer, backend="eager")
    with pytest.raises(UserError):
        pipe.image_tokenizer = {"next-scale": tiny_dar, "dar": tiny_pipeline}[family]().image_tokenizer
    assert pipe.native is before


def test_a_scheduler_that_jumps_back_is_counted_by_its_last_draws(next_scale):
    next_scale.native.refine_with("simple")
    own, seen = tiny_pipeline(), []
    own.refine_with("simple")
    look = lambda pipe, step, t, kwargs: seen.append(step)  # noqa: E731
    drawn = next_scale(["face"], seed=3, callback_on_step_end=look)
    assert torch.equal(tokens_of(drawn), tokens_of(own(["face"], seed=3))) and len(seen) > 3
    back = next(i for i, (before, step) in enumerate(pairwise(seen)) if step < before) + 1

    def stop(pipe, step, t, kwargs):
        pipe._interrupt = len(seen) == back
        seen.append(step)

    expected = seen[back]
    seen.clear()
    partly = next_scale(["face"], seed=3, callback_on_step_end=stop)
    assert len(partly.token_ids) == expected + 1, "no tokens of scales that the image is without"


def test_a_model_without_classes_takes_none(family, adapter):
    own = MAKE[family](num_classes=0)
    pipe = adapter.from_pipeline(own)
    assert pipe.labels == {} and torch.equal(tokens_of(pipe(seed=3)), tokens_of(own(seed=3)))
    assert len(pipe(num_images_per_prompt=2, seed=3).images) == 2
    with pytest.raises(UserError, match="no classes"):
        pipe(["face"])


def test_prompts_are_drawn_as_our_own_pipeline_draws_them(adapter, tmp_path):
    own = tiny_text_pipeline(sampling_defaults={"guidance_scale": 2.0})
    own.save_pretrained(tmp_path / "text")
    pipe = adapter.from_pretrained(tmp_path / "text")
    pipe.set_progress_bar_config(disable=True)
    asked = {"negative_prompt": "a dog", "seed": 3, "output_type": "pt"}
    expected = own(prompt=["a cat", ""], num_images_per_class=2, **asked).images
    drawn = pipe(prompt=["a cat", ""], num_images_per_prompt=2, **asked).images
    read = pipe(text=own.text_encoder.encode(["a cat", ""]), num_images_per_prompt=2, **asked).images
    assert len(drawn) == 4 and torch.equal(drawn, expected) and torch.equal(read, expected)
    with pytest.raises(UserError, match="has no classes"):
        pipe("face", prompt="a cat")
    other = SmallTextEncoder(width=12)
    changed = adapter.from_pretrained(tmp_path / "text", text_encoder=other)
    with torch.no_grad():
        assert torch.equal(changed.native.null_text.pooled, other.encode([""]).pooled)


def test_prompts_of_a_d_ar_model(adapter, tmp_path):
    own = tiny_dar(words=WORDS, sampling_defaults={"guidance_scale": 2.0})
    own.save_pretrained(tmp_path / "text")
    pipe = adapter.from_pretrained(tmp_path / "text")
    pipe.set_progress_bar_config(disable=True)
    asked = {"negative_prompt": "a body", "seed": 3, "output_type": "pt"}
    expected = own([0, 1], prompt=["a critter", ""], num_images_per_class=2, **asked).images
    drawn = pipe([0, 1], prompt=["a critter", ""], num_images_per_prompt=2, **asked).images
    assert len(drawn) == 4 and torch.equal(drawn, expected)
    assert pipe.text_tokenizer.config == WORDS.config
    with pytest.raises(UserError, match="It draws classes"):
        adapter.from_pipeline(tiny_dar())(prompt="a critter")


def test_it_is_a_diffusion_pipeline_of_our_components_and_shares_the_weights(pipe, own, adapter):
    import diffusers

    assert isinstance(pipe, diffusers.DiffusionPipeline)
    assert pipe.components.keys() == own.components.keys()
    assert all(getattr(pipe, name) is part for name, part in pipe.components.items())
    assert pipe.native.fingerprint == own.fingerprint
    assert (pipe.device, pipe.dtype) == (torch.device("cpu"), torch.float32)
    again = type(pipe).from_pipe(pipe)
    assert all(again.components[name] is part for name, part in pipe.components.items())
    assert again.native.config == pipe.native.config
    assert torch.equal(tokens_of(again(["face"], seed=3)), tokens_of(pipe(["face"], seed=3)))
    shared = adapter.from_pipeline(pipe.native)
    assert shared.native is pipe.native and type(shared) is type(pipe)


def test_a_class_takes_the_models_of_its_family(folders, adapter):
    with pytest.raises(UserError, match="takes a NextScalePipeline, got DARPipeline"):
        adapter.NextScaleDiffusionPipeline.from_pretrained(folders["dar"])
    loaded = adapter.DARDiffusionPipeline.from_pretrained(folders["dar"])
    assert type(loaded) is adapter.DARDiffusionPipeline


def test_diffusers_own_loader_fails_and_the_card_says_what_does_not(folders, family, adapter):
    from diffusers import DiffusionPipeline

    with pytest.raises(AttributeError, match="no attribute (NextScale|DAR)Pipeline"):
        DiffusionPipeline.from_pretrained(folders[family])
    card = (folders[family] / "README.md").read_text()
    code = next(block for block in card.split("```python\n")[1:] if "isthmus.diffusers" in block).split("```")[0]
    names: dict = {}
    code = code.replace("path/to/this/folder", str(folders[family])).replace('.save("sample.png")', "")
    exec(code, names)
    assert isinstance(names["pipe"], DiffusionPipeline)


def test_without_diffusers_the_extra_is_named():
    code = (
        "import sys; sys.modules['diffusers'] = None\n"
        "from isthmus.errors import UserError\n"
        "try:\n    import isthmus.diffusers\nexcept UserError as error:\n    print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY, check=True)
    assert 'pip install "isthmus[diffusers]"' in done.stdout

"""For those who live in diffusers: a real `DiffusionPipeline` of any of our pipelines, on the same folders and weights.

The only module that imports diffusers (extra `diffusers`). Nothing is computed here: a call is a call of our own
pipeline, which stays in reach as `native`, so one seed makes one image whichever way it is asked for.
"""

import functools
import inspect
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NoReturn, SupportsIndex

import torch
from torch import Tensor, nn

from isthmus.dar.pipeline import DARPipeline
from isthmus.errors import UserError
from isthmus.next_scale.pipeline import NextScalePipeline
from isthmus.next_scale.tokenizer import pixels_of
from isthmus.nn.guidance import Guidance
from isthmus.nn.stored_llama import StoredLlama
from isthmus.pipelines.base import SavedPipeline, index_entry, one_of
from isthmus.pipelines.labels import resolve_labels
from isthmus.pipelines.loading import choose_device, choose_dtype, load_pipeline
from isthmus.pipelines.options import FOLDER_DEFAULT, Default
from isthmus.pipelines.request import (
    GenerationStep,
    Generators,
    Labels,
    OutputType,
    Pictures,
    Whole,
    as_output,
    check_output_type,
    image_seeds,
    spread,
)
from isthmus.text.encoders import TextFeatures

try:
    from diffusers import DiffusionPipeline, ImagePipelineOutput
    from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
except ModuleNotFoundError as error:
    if error.name != "diffusers":
        raise  # it is there: what it lacks is for it to say
    raise UserError(
        'isthmus.diffusers needs the package diffusers, which is not installed. Run: pip install "isthmus[diffusers]", '
        "or use isthmus.load_pipeline, which does without."
    ) from error

Callback = Callable[..., Any]
# what a person can do who passes an argument of other pipelines; None passed for one of them asks for nothing
_NO_TEXT = "It draws classes: pass class_labels= (pipe.labels has their names), or nothing for no class."
_CALL_ADVICE = {
    **dict.fromkeys(("prompt", "prompt_2", "prompt_embeds", "pooled_prompt_embeds", "prompt_embeds_mask"), _NO_TEXT),
    **dict.fromkeys(
        ("negative_prompt", "negative_prompt_2", "negative_prompt_embeds", "negative_pooled_prompt_embeds"),
        "Guidance leads away from the null class: guidance_scale= alone sets it, and 1 is off.",
    ),
    "true_cfg_scale": "guidance_scale= is that scale, and 1 is off.",
    "latents": "What is random in an image comes from its seed: pass seed= or generator=.",
    **dict.fromkeys(
        ("callback", "callback_steps"), "Pass callback_on_step_end=, which is called with (pipe, step, t, kwargs)."
    ),
    **dict.fromkeys(
        "eta guidance_rescale clip_skip max_sequence_length control_image ip_adapter_image ip_adapter_image_embeds "
        "cross_attention_kwargs attention_kwargs joint_attention_kwargs".split(),
        "There is nothing in this model that it could change: leave it out.",
    ),
}
_LOAD_ADVICE = {
    "variant": "A folder holds its weights once: torch_dtype= sets the type they are loaded in.",
    "quantization_config": "Draws read the weights by name, as they are saved: torch_dtype=torch.bfloat16 halves them.",
    "use_safetensors": "Weights are safetensors, and no others are read: leave it out.",
    "low_cpu_mem_usage": "Weights are always read once, into the place they stay: leave it out.",
    "token": "Log in once with `hf auth login`, or set HF_TOKEN.",
    "subfolder": "Pass the path of that folder itself.",
    **dict.fromkeys(
        ("custom_pipeline", "trust_remote_code"),
        "No code of a folder is executed: the classes are those of the installed Isthmus.",
    ),
    "force_download": "Remove the model from the hub's cache, or pass another cache_dir=.",
    **dict.fromkeys(
        ("max_memory", "offload_folder", "offload_state_dict"),
        "All parts of this model work on one device: pass device_map= with its name, or enable_model_cpu_offload().",
    ),
}
# what these ask for is done anyway
_ALWAYS = {
    **{"use_safetensors": True, "low_cpu_mem_usage": True, "trust_remote_code": False, "force_download": False},
    **{"safe_serialization": True, "push_to_hub": False},
}
_SAVE_ADVICE = {
    "safe_serialization": "Weights are always written as safetensors: leave it out.",
    "variant": "A folder holds its weights once: leave it out, or cast them with pipe.to(dtype) before.",
    "push_to_hub": "Save a folder, and upload it: hf upload OWNER/NAME FOLDER.",
}


@dataclass
class IsthmusPipelineOutput(ImagePipelineOutput):
    """diffusers' output, and what our own pipeline returns beside the images; interrupted, those of finished steps."""

    images: Pictures  # pyright: ignore[reportIncompatibleVariableOverride]  tensors too
    token_ids: Tensor | list[Tensor] | None = None
    class_labels: list[int] | None = None
    seeds: list[tuple[int, int]] | None = None


def _part(name: str) -> Any:
    """A component of `native`; setting it makes a new one, which checks that the parts belong together."""

    def read(self: "IsthmusPipeline") -> Any:
        return getattr(self.native, name)

    def write(self: "IsthmusPipeline", value: Any) -> None:
        if value is not read(self):
            self._adopt(_rebuilt(self.native, {name: value}))

    return property(read, write, doc=f"The component `{name}` of `native`.")


def _constructor(native: type[SavedPipeline]) -> Callable[..., None]:
    """A constructor with the arguments of `native`, off which diffusers reads what the components are."""

    @functools.wraps(native.__init__)
    def construct(self: "IsthmusPipeline", *args: Any, **kwargs: Any) -> None:
        DiffusionPipeline.__init__(self)
        bound = inspect.signature(native).bind(*args, **kwargs)
        bound.apply_defaults()
        _check_parts(native, bound.arguments)
        self._adopt(native(*args, **kwargs))

    return construct


class IsthmusPipeline(DiffusionPipeline):
    """Base of the two families; `from_pretrained` and `from_pipeline` pick the one that a model needs.

    `native` is our own pipeline; editing, likelihood and streams are called there. Setting a component makes a new one.
    """

    native_class: ClassVar[type[SavedPipeline]]
    _call_advice: ClassVar[Mapping[str, str]] = _CALL_ADVICE
    _load_advice: ClassVar[Mapping[str, str]] = _LOAD_ADVICE
    _callback_tensor_inputs: ClassVar[list[str]] = ["latents", "token_ids"]
    _interrupt: bool = False
    num_timesteps: int = 0
    native: Any

    @classmethod
    def from_pipeline(cls, pipeline: SavedPipeline) -> "IsthmusPipeline":
        """A `DiffusionPipeline` of a pipeline of ours (UserError: of others), on the same memory."""
        kinds = {kind.native_class: kind for kind in _FAMILIES if issubclass(kind, cls)}
        if type(pipeline) not in kinds:
            wanted = " or ".join(native.__name__ for native in kinds)
            raise UserError(
                f"{cls.__name__} takes a {wanted}, got {type(pipeline).__name__}. "
                "isthmus.diffusers.from_pipeline and from_pretrained pick the class that fits."
            )
        made = kinds[type(pipeline)](**pipeline.arguments)
        made._adopt(pipeline)
        return made

    @classmethod
    def from_pretrained(  # pyright: ignore[reportIncompatibleMethodOverride]  what it does not take is said
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        torch_dtype: torch.dtype | str | None = None,
        dtype: torch.dtype | str | None = None,
        device_map: str | torch.device | None = None,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        **others: Any,
    ) -> "IsthmusPipeline":
        """The pipeline of a folder that Isthmus saved, or of the hub.

        Args:
            torch_dtype: type of the weights, float32 (the default), bfloat16 or "auto"; one for all parts. `dtype` is
                the newer name of the same.
            device_map: None loads to the CPU; the name of a device, "auto" (CUDA where there is one), or "balanced",
                which on a machine with one accelerator is that one.
            others: components by name, which take the place of the saved ones.

        Raises UserError where there is no such model or device, or an argument belongs to other pipelines.
        """
        given = {name: others.pop(name) for name in list(others) if name in cls._part_names()}
        _refuse(others, cls._load_advice, f"{cls.__name__}.from_pretrained")
        if torch_dtype is not None and dtype is not None:
            raise UserError(f"torch_dtype and dtype are one thing, got {torch_dtype} and {dtype}. Pass dtype.")
        device = _mapped_device(device_map)
        pipeline = load_pipeline(
            pretrained_model_name_or_path,
            device=device,
            dtype=torch_dtype if dtype is None else dtype,
            revision=revision,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
        )
        made = cls.from_pipeline(_rebuilt(pipeline, given) if given else pipeline)
        made.register_to_config(_name_or_path=str(pretrained_model_name_or_path))
        if device_map is not None:
            made.hf_device_map = str(device)
        return made

    @torch.no_grad()
    def __call__(
        self,
        class_labels: Labels = None,
        guidance_scale: Guidance | Default = FOLDER_DEFAULT,
        generator: Generators = None,
        num_inference_steps: int | None = None,
        output_type: OutputType = "pil",
        return_dict: bool = True,
        *,
        seed: Whole | None = None,
        image_index: Whole = 0,
        num_images_per_prompt: SupportsIndex | None = None,
        callback_on_step_end: Callback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        **options: Any,
    ) -> IsthmusPipelineOutput | tuple[Pictures]:
        """Draw images, called as `DiTPipeline` is; what is not said here is as in a call of our own pipeline.

        Args:
            guidance_scale: guided = uncond + s (cond - uncond), and 1 is off; the default is the model's own.
            generator: one, or one per image: makes the seeds of the images.
            num_inference_steps: solver steps of a D-AR model; the steps of a next-scale model are its scales.
            output_type: "pil", "np" (b, h, w, 3) or "pt" (b, 3, h, w) in [0, 1], or "latent".
            return_dict: False gives the tuple (images,).
            num_images_per_prompt: images per label and prompt, next to each other.
            callback_on_step_end: called with (pipe, step, t, kwargs) after every step: t is the side of the scale, or
                the flow time at which the solver step began. It returns None, or the kwargs as they came.
            callback_on_step_end_tensor_inputs: what kwargs holds: "latents" (for `decode_latents`) and "token_ids"
                (those of the step), both copies.
            options: what else a call of our own pipeline takes (`top_k`, `temperature`, `num_images`, ...).

        Raises UserError where an argument is not usable, or belongs to other pipelines; the message names ours.
        """
        options = self._own_options(options, num_inference_steps, num_images_per_prompt)
        if isinstance(callback_on_step_end, (PipelineCallback, MultiPipelineCallbacks)):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs
        for name in callback_on_step_end_tensor_inputs:
            if name not in (known := self._callback_tensor_inputs):
                raise UserError(f"callback_on_step_end_tensor_inputs may name {' and '.join(known)}, got {name!r}.")
        check_output_type(output_type)
        counts = (options.pop("num_images", None), options.pop("num_images_per_class", 1))
        ids, words = self._spread(class_labels, options, *counts)
        seeds = image_seeds(len(ids), seed=seed, generator=generator, image_index=image_index)
        self._interrupt, self.num_timesteps = False, len(times := self._times(options))
        tokens: list[Tensor] = []
        latents = None
        progress_bar: Any = self.progress_bar  # diffusers' decorator hides its arguments from type checkers
        with self._placed(), progress_bar(total=len(times)) as bar:
            steps: Iterator[GenerationStep] = self.native.stream(
                [None if label == self.native.num_classes else label for label in ids],
                guidance_scale=guidance_scale,
                output_type="latent",
                **_as_arguments(seeds),
                **(options | words),
            )
            for step in steps:
                # a jump back draws scales once more: those that came after its first are no part of the latents
                tokens[step.index :], latents = [step.token_ids], step.preview
                bar.update(step.index + 1 - bar.n)
                if callback_on_step_end is not None:
                    available = {"latents": latents, "token_ids": step.token_ids}
                    copies = {name: available[name].clone() for name in callback_on_step_end_tensor_inputs}
                    returned = callback_on_step_end(self, step.index, times[step.index], dict(copies))
                    _check_unchanged(returned, copies, available)
                if self._interrupt:
                    break
            assert isinstance(latents, Tensor), "a model has at least one step"
            images = self.decode_latents(latents, output_type)
        if not return_dict:
            return (images,)
        return IsthmusPipelineOutput(images, self._joined(tokens), ids, seeds)

    def decode_latents(self, latents: Tensor, output_type: OutputType = "pil") -> Pictures:
        """Pictures of the latents that a callback saw, or that `output_type="latent"` returned."""
        return latents if output_type == "latent" else as_output(self._pixels(latents), output_type)

    @property
    def interrupt(self) -> bool:
        """Whether the call ends after the step that runs; a callback sets `_interrupt`."""
        return self._interrupt

    @property
    def labels(self) -> dict[str, int]:
        """Class name -> class id, as `DiTPipeline` has them: also each part of a name that has commas, where only one
        class has it; empty where classes have no names.
        """
        ids_of: dict[str, set[int]] = {}
        for index, name in self.native.class_names.items():
            for word in {name, *(part.strip() for part in name.split(","))}:
                ids_of.setdefault(word, set()).add(int(index))
        return {word: next(iter(ids)) for word, ids in sorted(ids_of.items()) if len(ids) == 1}

    def get_label_ids(self, label: str | Sequence[str]) -> list[int]:
        """Class ids of names, or of one name; UserError, with the nearest names, where not just one class has it."""
        known, words = self.labels, [label] if isinstance(label, str) else label
        names, number = self.native.class_names, self.native.num_classes
        return [
            known[word] if word in known else resolve_labels([word], class_names=names, num_classes=number)[0]
            for word in words
        ]

    def to(self, *args: Any, **kwargs: Any) -> "IsthmusPipeline":
        """Move or cast the weights of all components, in place: a device, a type that we compute in, or both."""
        for asked in (*args, kwargs.get("dtype")):
            if isinstance(asked, torch.dtype):
                choose_dtype(asked)
        super().to(*args, **kwargs)
        return self

    def save_pretrained(  # pyright: ignore[reportIncompatibleMethodOverride]  what it does not take is said
        self, save_directory: str | Path, *, max_shard_size: int | str | None = None, **others: Any
    ) -> None:
        """Write the folder that our own pipeline writes; `load_pipeline` and `from_pretrained` here read it."""
        _refuse(others, _SAVE_ADVICE, "save_pretrained")
        self.native.save_pretrained(save_directory, max_shard_size=max_shard_size)

    def push_to_hub(self, *_: Any, **__: Any) -> NoReturn:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Refused."""
        raise UserError(f"uploading is not done here, got push_to_hub(). {_SAVE_ADVICE['push_to_hub']}")

    def _read_by_name(self, *_: Any, **__: Any) -> NoReturn:
        """Refused."""
        raise UserError(
            "layers cannot go to the device one by one or in groups here, because steps read weights by name; got "
            "enable_sequential_cpu_offload() or enable_group_offload(). Use enable_model_cpu_offload()."
        )

    enable_sequential_cpu_offload = enable_group_offload = _read_by_name

    def _own_attention(self, *_: Any, **__: Any) -> NoReturn:
        """Refused."""
        raise UserError(
            "attention runs in torch's scaled_dot_product_attention, which takes a memory-saving kernel itself; got "
            "enable_attention_slicing() or enable_xformers_memory_efficient_attention(). Leave it out."
        )

    enable_attention_slicing = enable_xformers_memory_efficient_attention = _own_attention

    @classmethod
    def _part_names(cls) -> set[str]:
        kinds = [kind.native_class for kind in _FAMILIES if issubclass(kind, cls)]
        return {name for kind in kinds for name in (*kind.parts, *kind.optional_parts)}

    def _adopt(self, pipeline: Any) -> None:
        """Take our own pipeline, and tell diffusers which components it has."""
        self.native = pipeline
        parts = {**pipeline.parts, **pipeline.optional_parts}
        given = {name: getattr(pipeline, name) is not None for name in parts}
        entries = {
            name: tuple(index_entry(one_of(part, getattr(pipeline, name)))) if given[name] else (None, None)
            for name, part in parts.items()
        }
        self.register_to_config(**entries, **pipeline.config)

    @contextmanager
    def _placed(self) -> Iterator[None]:
        """With offloading: all parts on the device during a call, for every step needs them, and none after it."""
        if getattr(self, "_all_hooks", None):
            for part in self.components.values():
                if isinstance(part, nn.Module):
                    part.to(self._offload_device)
        try:
            yield
        finally:
            self.maybe_free_model_hooks()

    def _own_options(
        self, options: dict[str, Any], num_inference_steps: int | None, num_images_per_prompt: SupportsIndex | None
    ) -> dict[str, Any]:
        """Arguments of `native.stream`, given under its names or under diffusers'; UserError for those of others."""
        known = set(inspect.signature(type(self.native).stream).parameters)
        if not self.native.reads_text:
            known -= {"prompt", "negative_prompt", "text"}
        options = options | {"num_inference_steps": num_inference_steps}
        if num_images_per_prompt is not None:
            if "num_images_per_class" in options:
                raise UserError("num_images_per_prompt and num_images_per_class are one thing, got both. Pass one.")
            options["num_images_per_class"] = num_images_per_prompt
        self._refuse_foreign({name: value for name, value in options.items() if name not in known})
        return {name: value for name, value in options.items() if name in known}

    def _refuse_foreign(self, foreign: dict[str, Any]) -> None:
        _refuse(foreign, self._call_advice, f"a call of {type(self).__name__}")

    def _spread(
        self, class_labels: Labels, options: Mapping[str, Any], *counts: Any
    ) -> tuple[list[int], dict[str, Any]]:
        """Class id of every image, and options of the call that have an entry for every image as well."""
        asked = self.native.asked(class_labels, *(options.get(name) for name in ("prompt", "text", "negative_prompt")))
        asked = asked.images(spread(list(range(len(asked))), *counts))
        words = {}
        if isinstance(asked.texts, TextFeatures):
            words = {"text": asked.texts.rows(torch.tensor(asked.rows))}
        elif asked.prompts is not None:
            words = {"prompt": asked.prompts}
        return asked.class_labels, words

    @abstractmethod
    def _times(self, options: Mapping[str, Any]) -> list[Tensor]:
        """What `t` is in each step."""

    def _pixels(self, latents: Tensor) -> Tensor:
        """Images in [-1, 1] of latents."""
        return latents

    def _joined(self, token_ids: list[Tensor]) -> Tensor | list[Tensor]:
        """Tokens of all steps, as our own pipeline returns them."""
        return token_ids


class NextScaleDiffusionPipeline(IsthmusPipeline):
    """A next-scale model (VAR, SRDD) as a `DiffusionPipeline`; arguments are those of `NextScalePipeline`."""

    native_class = NextScalePipeline
    __init__ = _constructor(NextScalePipeline)
    model_cpu_offload_seq = "text_encoder->transformer->image_tokenizer"
    _optional_components = ["scheduler", "text_encoder"]
    _edits = (
        "Edits have calls of their own: pipe.native.inpaint(image, mask), outpaint, super_resolve, edit_class, "
        "variations."
    )
    _call_advice = {
        **_CALL_ADVICE,
        **dict.fromkeys(("image", "mask_image", "strength"), _edits),
        **dict.fromkeys(
            ("timesteps", "sigmas", "solver"), "The steps of this model are its scales, in their order: leave it out."
        ),
    }
    image_tokenizer = _part("image_tokenizer")
    transformer = _part("transformer")
    scheduler = _part("scheduler")
    text_encoder = _part("text_encoder")

    def _refuse_foreign(self, foreign: dict[str, Any]) -> None:
        sizes, side = self.native.schedule.sizes, self.native.image_size
        asked = foreign.pop("num_inference_steps", None)
        if asked not in (None, len(sizes)):
            raise UserError(
                f"the steps of this model are its {len(sizes)} scales ({', '.join(map(str, sizes))}), got "
                f"num_inference_steps={asked}. Leave it out. `isthmus distill` makes a model with fewer."
            )
        for name in ("height", "width"):
            if (asked := foreign.pop(name, None)) not in (None, side):
                raise UserError(f"both sides of its images are {side} pixels, got {name}={asked}. Leave it out.")
        super()._refuse_foreign(foreign)

    def _times(self, options: Mapping[str, Any]) -> list[Tensor]:
        return [torch.tensor(side) for side in self.native.schedule.sizes]

    def _pixels(self, latents: Tensor) -> Tensor:
        return pixels_of(self.native.image_tokenizer, latents)


class DARDiffusionPipeline(IsthmusPipeline):
    """A D-AR model as a `DiffusionPipeline`; arguments are those of `DARPipeline`."""

    native_class = DARPipeline
    __init__ = _constructor(DARPipeline)
    model_cpu_offload_seq = "transformer->image_tokenizer->decoder"
    _optional_components = ["text_tokenizer"]
    _edits = (
        "prefix_image= keeps the layout of an image, pipe.native.restart(image, strength) runs the last steps again."
    )
    _call_advice = {
        **_CALL_ADVICE,
        **dict.fromkeys(("image", "mask_image", "strength"), _edits),
        **dict.fromkeys(("timesteps", "sigmas"), "num_inference_steps= and solver= choose the steps."),
    }
    _load_advice = {
        **_LOAD_ADVICE,
        "quantization_config": _LOAD_ADVICE["quantization_config"]
        + " On a CPU, a call with llama_decoder=pipe.native.llama_decoder(int8=True) decodes with 8-bit weights.",
    }
    image_tokenizer = _part("image_tokenizer")
    decoder = _part("decoder")
    transformer = _part("transformer")
    scheduler = _part("scheduler")
    text_tokenizer = _part("text_tokenizer")

    def _times(self, options: Mapping[str, Any]) -> list[Tensor]:
        return list(self.native.scheduler.times(options["num_inference_steps"])[:-1])

    def _joined(self, token_ids: list[Tensor]) -> Tensor:
        return torch.cat(token_ids, dim=1)


_FAMILIES: tuple[type[Any], ...] = (NextScaleDiffusionPipeline, DARDiffusionPipeline)
from_pretrained = IsthmusPipeline.from_pretrained
from_pipeline = IsthmusPipeline.from_pipeline


def _rebuilt(pipeline: SavedPipeline, given: Mapping[str, Any]) -> SavedPipeline:
    """A pipeline with other components, on the memory of those that stay; UserError where they do not fit together."""
    kind: Any = type(pipeline)
    if strange := given.keys() - {**kind.parts, **kind.optional_parts}:
        raise UserError(f"a {kind.__name__} has no component {min(strange)}. Leave it out.")
    _check_parts(kind, {**pipeline.components, **given})
    arguments = {**pipeline.arguments, **given}
    if "text_encoder" in given:
        arguments["null_text"] = None  # another encoder makes another of it
    return kind(**arguments)


def _check_parts(kind: type[SavedPipeline], parts: Mapping[str, Any]) -> None:
    """Raise UserError unless every component in `parts` is of the class that a pipeline has there."""
    for name, wanted in {**kind.parts, **kind.optional_parts}.items():
        value = parts[name]
        if value is None and name in kind.optional_parts:
            continue
        if type(value).__name__ == "OptimizedModule":
            more = " For decoding, pass llama_decoder=pipe.native.llama_decoder(compiled=True) to a call."
            raise UserError(
                "torch.compile of a component speeds up nothing here, because steps do not run through its forward; "
                f"got a compiled {name}. Pass the module itself.{more if wanted is StoredLlama else ''}"
            )
        kinds = wanted if isinstance(wanted, tuple) else (wanted,)
        known = (StoredLlama.class_name, StoredLlama.__name__)
        known = known if wanted is StoredLlama else tuple(one.__name__ for one in kinds)
        if type(value).__name__ not in known:
            raise UserError(f"{name} must be a {known[0]}, got {type(value).__name__}. Pass one of this family.")


def _as_arguments(seeds: Sequence[tuple[int, int]]) -> dict[str, Any]:
    """Arguments of a call that draws from exactly these pairs; of several seeds, each has one image, its first."""
    if len({seed for seed, _ in seeds}) > 1:
        return {"seed": [seed for seed, _ in seeds]}
    return {"seed": seeds[0][0], "image_index": [index for _, index in seeds]}


def _mapped_device(device_map: str | torch.device | None) -> torch.device:
    """The device that a `device_map` of diffusers names; UserError where it is absent, or "balanced" over many."""
    if device_map is None:
        return torch.device("cpu")
    if device_map == "balanced":
        if torch.cuda.device_count() > 1:
            raise UserError(
                "all parts of a model work on one device, because each step needs all of them; got device_map="
                f"'balanced' and {torch.cuda.device_count()} devices. Pass the name of one, such as 'cuda:0'."
            )
        return choose_device("auto")
    return choose_device(device_map)


def _refuse(arguments: Mapping[str, Any], advice: Mapping[str, str], where: str) -> None:
    """Raise what the caller needs to know about arguments that are not ours; None asks for nothing."""
    for name, value in arguments.items():
        if name not in advice:
            raise TypeError(f"{where} got an unexpected argument {name!r}")
        if value is not None and value is not _ALWAYS.get(name):
            short = repr(value) if isinstance(value, (bool, int, float, str)) else type(value).__name__
            raise UserError(f"{name} is no argument of this model, got {short}. {advice[name]}")


def _check_unchanged(returned: Any, copies: Mapping[str, Tensor], originals: Mapping[str, Any]) -> None:
    """Raise UserError where a callback has changed the tensors it got, or returned others."""
    same = all(torch.equal(copy, originals[name]) for name, copy in copies.items())
    if returned is not None:
        same = same and isinstance(returned, Mapping)
        same = same and all(value is copies.get(name) for name, value in returned.items())
    if not same:
        raise UserError(
            "a callback looks on and changes no step, because tokens that are drawn stay; it changed tensors, or "
            "returned others. Return nothing: `pipe._interrupt = True` ends a call, and edits are calls of pipe.native."
        )

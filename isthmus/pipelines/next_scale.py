"""The pipeline of the next-scale family (VAR and SRDD): labels and seeds in, images out.

Source of the method: Tian et al., "Visual Autoregressive Modeling"; Kumar et al., "Scale-Wise VAR is Secretly Discrete
Diffusion".
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, get_args

import torch
from diffusers import DiffusionPipeline
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from huggingface_hub import HfApi
from jaxtyping import Int
from torch import Tensor

import isthmus
from isthmus.errors import UserError
from isthmus.functional.guidance import Guidance, guidance_values
from isthmus.functional.quantization import Scale
from isthmus.functional.sampling import check_filters
from isthmus.functional.shapes import Images, LatentMap
from isthmus.generation.next_scale import generate_scales, shared_schedule
from isthmus.generation.options import FOLDER_DEFAULT, Default, SamplingOptions
from isthmus.generation.step import GenerationStep, Pictures
from isthmus.models.fingerprint import fingerprint

# eagerly, and by name: loading looks the component classes up in the modules that model_index.json names
from isthmus.models.multiscale_vqvae import MultiScaleVQVAE
from isthmus.models.next_scale_transformer import NextScaleTransformer
from isthmus.pictures import to_pil
from isthmus.pipelines.card import model_card
from isthmus.pipelines.components import check_settings, load_component
from isthmus.pipelines.folder import FORMAT, INDEX_NAME, read_index, replaced_within, written_whole
from isthmus.pipelines.hub import model_folder
from isthmus.pipelines.labels import Label, resolve_labels
from isthmus.pipelines.seeds import image_seeds

OutputType = Literal["pil", "np", "pt", "latent"]


@dataclass
class NextScalePipelineOutput:
    """What a call returns.

    Attributes:
        images: as `output_type` says; "latent" gives the features (b, d, grid, grid).
        token_ids: one int tensor (b, s_k * s_k) per scale, on the CPU.
        class_labels: class id of every image; `null_class_id` where no class was asked for.
        seeds: (seed, image index) of every image: `pipe(label, seed=seed, image_index=index)` draws it again.
    """

    images: Pictures
    token_ids: list[Int[Tensor, "b _"]]
    class_labels: list[int]
    seeds: list[tuple[int, int]]


@dataclass
class _Request:
    class_labels: list[int]
    seeds: list[tuple[int, int]]
    options: SamplingOptions
    output_type: OutputType


class NextScalePipeline(DiffusionPipeline):
    """An image tokenizer and a next-scale transformer that draw images together.

    Args:
        image_tokenizer: turns tokens into pixels.
        transformer: predicts the tokens of a scale; its scales are the tokenizer's, or some of them.
        scheduler: optional component of samplers that redraw tokens.
        class_names: one name per class, or index -> name; nothing for models without names.
        sampling_defaults: options of a call that names none, stored in the folder.
        preprocessing: how training images were made; None describes the usual way.
        data: `name` and `attribution` (licence line) of the training data, for the card.
        protocol: how the model was trained and measured, for the card.

    Raises:
        UserError: the components do not belong together, or names or defaults do not fit them.
    """

    _optional_components = ["scheduler"]

    def __init__(
        self,
        image_tokenizer: MultiScaleVQVAE,
        transformer: NextScaleTransformer,
        scheduler: SchedulerMixin | None = None,
        class_names: Sequence[str] | Mapping[str, str] | None = None,
        sampling_defaults: SamplingOptions | Mapping[str, Any] | None = None,
        preprocessing: Mapping[str, Any] | None = None,
        data: Mapping[str, Any] | None = None,
        protocol: str = "",
    ):
        super().__init__()
        self.register_modules(image_tokenizer=image_tokenizer, transformer=transformer, scheduler=scheduler)
        self.schedule = shared_schedule(image_tokenizer, transformer)
        self.num_classes: int = transformer.null_class_id
        if not isinstance(class_names, Mapping):
            # a mapping: diffusers takes a list of strings in model_index.json for a component
            class_names = {str(index): name for index, name in enumerate(class_names or ())}
        if class_names and sorted(class_names, key=int) != [str(index) for index in range(self.num_classes)]:
            raise UserError(
                f"class_names needs one name per class ({self.num_classes}), got {len(class_names)}. "
                "Pass the names of the data the transformer was trained on, or none."
            )
        if not isinstance(sampling_defaults, SamplingOptions):
            sampling_defaults = SamplingOptions.from_dict(sampling_defaults or {})
        self.check_options(sampling_defaults)
        self.defaults = sampling_defaults
        self.class_names: dict[str, str] = dict(class_names)
        self.register_to_config(
            class_names=self.class_names,
            sampling_defaults=sampling_defaults.to_dict(),
            preprocessing=dict(preprocessing or _usual_preprocessing(image_tokenizer.image_size)),
            data=dict(data or {}),
            protocol=protocol,
        )

    def __call__(
        self,
        class_labels: Label | Sequence[Label] | Int[Tensor, " n"] = None,
        num_images: int | None = None,
        *,
        num_images_per_class: int = 1,
        guidance_scale: Guidance | Default = FOLDER_DEFAULT,
        top_k: int | None | Default = FOLDER_DEFAULT,
        top_p: float | int | None | Default = FOLDER_DEFAULT,
        temperature: float | int | Default = FOLDER_DEFAULT,
        seed: int | Sequence[int] | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        image_index: int | Sequence[int] = 0,
        smooth: bool | Default = FOLDER_DEFAULT,
        output_type: OutputType = "pil",
        callback_on_step_end: Callable[[GenerationStep], object] | None = None,
    ) -> NextScalePipelineOutput:
        """Draw images.

        Args:
            class_labels: names, indices or None (no class), one per image; a single one may stand alone.
            num_images: how many images in all, labels taken in turn; None draws one per label.
            num_images_per_class: images per label, next to each other, where `num_images` is not given.
            guidance_scale: guided = uncond + s (cond - uncond), 1 = off: a number, one per scale, or a
                `GuidanceSchedule`. Like every option below it defaults to the value saved with the model.
            top_k: keep the k likeliest codes; None is off.
            top_p: keep the likeliest codes that hold this probability together; None is off.
            temperature: divides the logits.
            seed: one number for the request, or a list with one per image; None draws a fresh one.
            generator: makes the list of seeds instead: one generator, or one per image.
            image_index: number of the first image in the whole request, or one number per image. An image depends
                on its seed and number alone: not on the batch, nor on its place in it.
            smooth: mix codes instead of drawing one (softer images; token ids are drawn all the same).
            output_type: "pil", "np" (b, h, w, 3) or "pt" (b, 3, h, w) in [0, 1], or "latent" (features).
            callback_on_step_end: called with a `GenerationStep` (without preview) after every scale.

        Raises:
            UserError: a label, an option or a seed is not usable; the message says why.
        """
        request = self._request(
            class_labels, num_images, num_images_per_class, seed, generator, image_index, output_type,
            guidance_scale=guidance_scale, top_k=top_k, top_p=top_p, temperature=temperature, smooth=smooth,
        )  # fmt: skip
        token_ids, features = [], None
        for scale in self._scales(request):
            token_ids.append(scale.token_ids.cpu())
            features = scale.features
            if callback_on_step_end is not None:
                callback_on_step_end(GenerationStep(scale.index, self.schedule.num_scales, token_ids[-1]))
        assert features is not None
        images = self._pictures(features, request.output_type)
        return NextScalePipelineOutput(images, token_ids, request.class_labels, request.seeds)

    def stream(
        self,
        class_labels: Label | Sequence[Label] | Int[Tensor, " n"] = None,
        num_images: int | None = None,
        *,
        num_images_per_class: int = 1,
        guidance_scale: Guidance | Default = FOLDER_DEFAULT,
        top_k: int | None | Default = FOLDER_DEFAULT,
        top_p: float | int | None | Default = FOLDER_DEFAULT,
        temperature: float | int | Default = FOLDER_DEFAULT,
        seed: int | Sequence[int] | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        image_index: int | Sequence[int] = 0,
        smooth: bool | Default = FOLDER_DEFAULT,
        output_type: OutputType = "pil",
    ) -> Iterator[GenerationStep]:
        """Draw images and show them while they grow: one `GenerationStep` with a preview per scale.

        The arguments, the tokens and the last preview are those of a call. Bad arguments raise at once, before the
        first step is asked for.
        """
        request = self._request(
            class_labels, num_images, num_images_per_class, seed, generator, image_index, output_type,
            guidance_scale=guidance_scale, top_k=top_k, top_p=top_p, temperature=temperature, smooth=smooth,
        )  # fmt: skip
        return (
            GenerationStep(
                scale.index,
                self.schedule.num_scales,
                scale.token_ids.cpu(),
                self._pictures(scale.features, output_type),
            )
            for scale in self._scales(request)
        )

    def check_options(self, options: SamplingOptions) -> None:
        """Raise UserError where this model cannot draw with these options."""
        check_filters(
            top_k=options.top_k,
            top_p=options.top_p,
            temperature=options.temperature,
            codebook_size=self.image_tokenizer.config["codebook_size"],
        )
        values = guidance_values(options.guidance_scale, self.schedule.num_scales)
        if self.num_classes == 0 and any(value != 1 for value in values):
            raise UserError(
                "this model has no classes, so there is nothing to guide towards: guidance_scale must be 1, got "
                f"{options.guidance_scale}. Leave it out."
            )

    def label_name(self, class_id: int) -> str:
        """Name of a class id: its class name, the number where classes have no names, "null" for no class."""
        return "null" if class_id == self.num_classes else self.class_names.get(str(class_id), str(class_id))

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of configuration and weights of both components: what images depend on beside the options."""
        both = fingerprint(self.image_tokenizer) + fingerprint(self.transformer)
        return hashlib.sha256(both.encode()).hexdigest()

    def card(self) -> str:
        """The README.md that `save_pretrained` writes."""
        markov = self.transformer.is_markov
        return model_card(
            kind="SRDD (next-scale transformer, Markov over scales)" if markov else "VAR (next-scale transformer)",
            version=isthmus.__version__,
            image_size=self.image_tokenizer.image_size,
            class_names=self.class_names,
            num_classes=self.num_classes,
            scale_sizes=self.schedule.sizes,
            num_parameters={
                name: sum(p.numel() for p in getattr(self, name).parameters())
                for name in ("image_tokenizer", "transformer")
            },
            sampling=self.defaults,
            data=self.config["data"],
            protocol=self.config["protocol"],
        )

    def save_pretrained(self, save_directory: str | Path, *, max_shard_size: int | str | None = None) -> None:
        """Write the pipeline folder: model_index.json, components as safetensors, and the card README.md.

        A new or empty folder appears whole or not at all. In a folder that has other files they stay, and ours take
        the place of earlier ones when all are written.
        """
        folder = Path(save_directory)
        fresh = not folder.exists() or (folder.is_dir() and not any(folder.iterdir()))
        with written_whole(folder) if fresh else replaced_within(folder) as temporary:
            self._write(temporary, max_shard_size)

    def push_to_hub(self, repo_id: str, *, private: bool | None = None, token: str | None = None) -> str:
        """Upload exactly what `save_pretrained` writes, card included; returns the address of the commit."""
        api = HfApi(token=token)
        with TemporaryDirectory() as parent:
            folder = Path(parent) / "model"
            self.save_pretrained(folder)
            repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
            return str(api.upload_folder(repo_id=repo_id, folder_path=folder))

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        dtype: torch.dtype | None = None,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
    ) -> "NextScalePipeline":
        """The pipeline saved in a folder, or on the hub; an existing path wins. Weights stay on the CPU.

        `load_pipeline` also picks the class and the device.

        Raises:
            UserError: there is no such folder or model, it is incomplete, or it has settings we do not know.
        """
        folder = model_folder(
            pretrained_model_name_or_path,
            revision=revision,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
        )
        index = read_index(folder)
        if index.get("_class_name") != cls.__name__:
            raise UserError(f"{folder} holds a {index.get('_class_name')}, not a {cls.__name__}. Use load_pipeline.")
        values = {k: v for k, v in index.items() if not k.startswith(("_", "isthmus_"))}
        check_settings(values, cls, folder / INDEX_NAME)
        kinds = {"image_tokenizer": MultiScaleVQVAE, "transformer": NextScaleTransformer}
        for name, kind in kinds.items():
            if values.pop(name, None) != [kind.__module__, kind.__name__]:
                raise UserError(f"{folder / INDEX_NAME} must name {kind.__name__} as its {name}. Save the model again.")
        if values.pop("scheduler", [None, None]) != [None, None]:
            raise UserError(f"{folder} has a scheduler that this version does not know. Update Isthmus.")
        components = {name: load_component(kind, folder / name, dtype=dtype) for name, kind in kinds.items()}
        return cls(**components, **values)

    @classmethod
    def load_config(cls, *args: Any, **kwargs: Any) -> Any:
        """As in diffusers, without the two entries that say which version wrote the folder."""
        loaded = super().load_config(*args, **kwargs)
        index = loaded[0] if isinstance(loaded, tuple) else loaded
        for name in ("isthmus_format", "isthmus_version"):
            index.pop(name, None)
        return loaded

    def to_json_string(self) -> str:
        """Contents of model_index.json."""
        written = json.loads(super().to_json_string())
        written |= {"isthmus_format": FORMAT, "isthmus_version": isthmus.__version__}
        written.pop("_name_or_path", None)
        return json.dumps(written, indent=2, sort_keys=True) + "\n"

    def _write(self, folder: Path, max_shard_size: int | str | None) -> None:
        super().save_pretrained(folder, max_shard_size=max_shard_size)
        (folder / "README.md").write_text(self.card(), encoding="utf-8")
        for weights in folder.rglob("*.safetensors"):
            # safetensors writes for the owner alone; a model is as readable as the rest of its folder
            weights.chmod((folder / INDEX_NAME).stat().st_mode)

    def _request(
        self,
        class_labels: Label | Sequence[Label] | Int[Tensor, " n"],
        num_images: int | None,
        num_images_per_class: int,
        seed: int | Sequence[int] | None,
        generator: torch.Generator | Sequence[torch.Generator] | None,
        image_index: int | Sequence[int],
        output_type: OutputType,
        **options: Any,
    ) -> _Request:
        if output_type not in get_args(OutputType):
            raise UserError(f"output_type must be one of {', '.join(get_args(OutputType))}, got {output_type!r}.")
        resolved = self.defaults.override(**options)
        self.check_options(resolved)
        if isinstance(class_labels, Tensor):
            class_labels = class_labels.tolist()
        elif class_labels is None or isinstance(class_labels, (int, str)):
            class_labels = [class_labels]
        ids = resolve_labels(list(class_labels), class_names=self.class_names, num_classes=self.num_classes)
        ids = _spread(ids, num_images, num_images_per_class)
        seeds = image_seeds(len(ids), seed=seed, generator=generator, image_index=image_index)
        return _Request(ids, seeds, resolved, output_type)

    def _scales(self, request: _Request) -> Iterator[Scale]:
        labels = torch.tensor(request.class_labels, device=self.device)
        return generate_scales(self.image_tokenizer, self.transformer, labels, request.seeds, request.options)

    def _pictures(self, features: LatentMap, output_type: OutputType) -> Pictures:
        if output_type == "latent":
            return features
        images = self._decode(features)
        if output_type == "pil":
            return to_pil(images)
        scaled = images.float().add(1).div(2)
        return scaled if output_type == "pt" else scaled.permute(0, 2, 3, 1).cpu().numpy()

    def _decode(self, features: LatentMap) -> Images:
        # on CPUs oneDNN convolves channels-last maps about twice as fast; the weights stay as they are
        layout = torch.channels_last if features.device.type == "cpu" else torch.contiguous_format
        features = features.to(self.image_tokenizer.dtype, memory_format=layout)
        with torch.inference_mode():
            images = self.image_tokenizer.decode_features(features)
        # copied out of inference mode: a tensor the caller may use anywhere
        return images.clone(memory_format=torch.contiguous_format)


def _spread(ids: list[int], num_images: int | None, num_images_per_class: int) -> list[int]:
    """Class id of every image of a request."""
    if not ids:
        raise UserError("at least one class label is needed, got an empty list. Pass None for images without a class.")
    if num_images_per_class < 1 or (num_images is not None and num_images < 1):
        raise UserError(f"at least one image is needed, got {num_images} and {num_images_per_class} per class.")
    if num_images is None:
        return [one for one in ids for _ in range(num_images_per_class)]
    if num_images_per_class != 1:
        raise UserError("num_images is the number of all images, got num_images_per_class as well. Pass one of them.")
    return [ids[i % len(ids)] for i in range(num_images)]


def _usual_preprocessing(image_size: int) -> dict[str, Any]:
    return {"image_size": image_size, "resize": "shorter side, antialiased", "crop": "center", "value_range": [-1, 1]}

"""What pipelines of every family share: labels and seeds of a call, and a folder written whole and read strictly."""

import hashlib
import json
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar, TypeVar

import torch
from diffusers import DiffusionPipeline
from huggingface_hub import HfApi

import isthmus
from isthmus.errors import UserError
from isthmus.functional.guidance import guidance_values
from isthmus.functional.sampling import check_filters
from isthmus.generation.options import SamplingOptions
from isthmus.models.fingerprint import fingerprint
from isthmus.pipelines.card import model_card
from isthmus.pipelines.components import check_settings
from isthmus.pipelines.folder import FORMAT, INDEX_NAME, read_index, replaced_within, written_whole
from isthmus.pipelines.hub import model_folder
from isthmus.pipelines.labels import resolve_labels
from isthmus.pipelines.request import Generators, Labels, OutputType, Request, check_output_type, label_list, spread
from isthmus.pipelines.seeds import image_seeds

Pipeline = TypeVar("Pipeline", bound="SavedPipeline")
Loader = Callable[..., Any]


class SavedPipeline(DiffusionPipeline):
    """Base of the pipelines. A family adds its call, its components and what the abstract members below ask for.

    Attributes:
        parts: component name -> (class, function that loads it from its folder).
        optional_parts: the same, of components that a model may do without.
        num_classes: 0 for models without classes.
        class_names: index (as text) -> name; empty where classes have no names.
        defaults: options of a call that names none.
    """

    parts: ClassVar[Mapping[str, tuple[type, Loader]]] = {}
    optional_parts: ClassVar[Mapping[str, tuple[type, Loader]]] = {}
    num_classes: int
    class_names: dict[str, str]
    defaults: SamplingOptions

    @property
    @abstractmethod
    def codebook_size(self) -> int:
        """Number of codes a token is drawn from."""

    @property
    @abstractmethod
    def num_guided_steps(self) -> int:
        """Number of steps a guidance schedule runs over: scales, or tokens."""

    @property
    @abstractmethod
    def kind(self) -> str:
        """What the model is, in a few words."""

    @property
    @abstractmethod
    def layout(self) -> str:
        """How tokens are laid out, in a sentence for the card."""

    @abstractmethod
    def step_names(self, num_steps: int) -> list[str]:
        """A short name for each step of a stream, for the columns of a picture."""

    @abstractmethod
    def bytes_per_image(self, *, guided: bool) -> int:
        """Peak bytes that one more image in a batch takes, roughly."""

    def _describe(
        self,
        class_names: Sequence[str] | Mapping[str, str] | None,
        sampling_defaults: SamplingOptions | Mapping[str, Any] | None,
        preprocessing: Mapping[str, Any] | None,
        data: Mapping[str, Any] | None,
        protocol: str,
    ) -> None:
        """Check and keep what is stored beside the components.

        Raises:
            UserError: names or defaults do not fit the components.
        """
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
        self.class_names = dict(class_names)
        self.register_to_config(
            class_names=self.class_names,
            sampling_defaults=sampling_defaults.to_dict(),
            preprocessing=dict(preprocessing or _usual_preprocessing(self.image_size)),
            data=dict(data or {}),
            protocol=protocol,
        )

    @property
    def image_size(self) -> int:
        """Side of the images, in pixels."""
        return self.image_tokenizer.image_size

    def check_options(self, options: SamplingOptions) -> None:
        """Raise UserError where this model cannot draw with these options."""
        check_filters(
            top_k=options.top_k,
            top_p=options.top_p,
            temperature=options.temperature,
            codebook_size=self.codebook_size,
        )
        values = guidance_values(options.guidance_scale, self.num_guided_steps)
        if self.num_classes == 0 and any(value != 1 for value in values):
            raise UserError(
                "this model has no classes, so there is nothing to guide towards: guidance_scale must be 1, got "
                f"{options.guidance_scale}. Leave it out."
            )

    def prepared(self, num_images: int) -> dict[str, Any]:
        """Arguments worth computing once for many calls of `num_images` images each."""
        return {}

    def label_name(self, class_id: int) -> str:
        """Name of a class id: its class name, the number where classes have no names, "null" for no class."""
        return "null" if class_id == self.num_classes else self.class_names.get(str(class_id), str(class_id))

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of configuration and weights of all components: what images depend on beside the options."""
        given = [name for name in self.optional_parts if getattr(self, name) is not None]
        joined = "".join(_fingerprint(getattr(self, name)) for name in (*self.parts, *given))
        return hashlib.sha256(joined.encode()).hexdigest()

    def card(self) -> str:
        """The README.md that `save_pretrained` writes."""
        models = {name: getattr(self, name) for name in self.parts}
        return model_card(
            kind=self.kind,
            version=isthmus.__version__,
            image_size=self.image_size,
            class_names=self.class_names,
            num_classes=self.num_classes,
            layout=self.layout,
            num_parameters={
                name: sum(p.numel() for p in model.parameters())
                for name, model in models.items()
                if isinstance(model, torch.nn.Module)
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
        cls: type[Pipeline],
        pretrained_model_name_or_path: str | Path,
        *,
        dtype: torch.dtype | None = None,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
    ) -> Pipeline:
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
        for name, (part, _) in cls.parts.items():
            if values.pop(name, None) != [_library(part), part.__name__]:
                raise UserError(f"{folder / INDEX_NAME} must name {part.__name__} as its {name}. Save the model again.")
        present = dict(cls.parts)
        for name in cls._optional_components:
            found, known = values.pop(name, [None, None]), cls.optional_parts.get(name)
            if found == [None, None]:
                continue
            if known is None or found != [_library(known[0]), known[0].__name__]:
                raise UserError(f"{folder} has a {name} that this version does not know. Update Isthmus.")
            present[name] = known
        components = {name: load(part, folder / name, dtype=dtype) for name, (part, load) in present.items()}
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
        # diffusers does not take note of an optional component that is set later
        self.register_modules(**{name: getattr(self, name) for name in self.optional_parts})
        super().save_pretrained(folder, max_shard_size=max_shard_size)
        (folder / "README.md").write_text(self.card(), encoding="utf-8")
        for weights in folder.rglob("*.safetensors"):
            # safetensors writes for the owner alone; a model is as readable as the rest of its folder
            weights.chmod((folder / INDEX_NAME).stat().st_mode)

    def _request(
        self,
        class_labels: Labels,
        num_images: int | None,
        num_images_per_class: int,
        seed: int | Sequence[int] | None,
        generator: Generators,
        image_index: int | Sequence[int],
        output_type: OutputType,
        **options: Any,
    ) -> Request:
        check_output_type(output_type)
        resolved = self.defaults.override(**options)
        self.check_options(resolved)
        ids = resolve_labels(label_list(class_labels), class_names=self.class_names, num_classes=self.num_classes)
        ids = spread(ids, num_images, num_images_per_class)
        seeds = image_seeds(len(ids), seed=seed, generator=generator, image_index=image_index)
        return Request(ids, seeds, resolved, output_type)


def _library(part: type) -> str:
    """How model_index.json names the home of a component class: the package for transformers, the module for ours."""
    return "transformers" if part.__module__.startswith("transformers.") else part.__module__


def _fingerprint(part: Any) -> str:
    if isinstance(part, torch.nn.Module):
        return fingerprint(part)
    settings = {name: value for name, value in part.config.items() if not name.startswith("_")}
    return json.dumps(settings, sort_keys=True, default=list)


def _usual_preprocessing(image_size: int) -> dict[str, Any]:
    return {"image_size": image_size, "resize": "shorter side, antialiased", "crop": "center", "value_range": [-1, 1]}

"""What pipelines of both families share: the call's request, a folder written whole and read strictly, its card."""

import hashlib
import inspect
import json
import logging
import math
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, SupportsIndex, TypeVar, cast

import torch
from jaxtyping import Float
from torch import Tensor

import isthmus
from isthmus.errors import UserError
from isthmus.files import check_writable
from isthmus.nn.guidance import guidance_values
from isthmus.nn.saved_model import Config, Recorded, SavedModel, check_settings
from isthmus.nn.shapes import Images
from isthmus.nn.stored_llama import StoredLlama, fingerprint
from isthmus.pipelines.classification import (
    DEFAULT_VIEW_NOISE,
    Candidates,
    CandidateScores,
    ClassificationOutput,
    check_classification,
    perturbed_views,
)
from isthmus.pipelines.folder import (
    FORGOTTEN,
    FORMAT,
    INDEX_NAME,
    model_folder,
    read_index,
    replaced_within,
    written_whole,
)
from isthmus.pipelines.images import ImageInput
from isthmus.pipelines.labels import label_list, listed_names, names_in_order, resolve_labels
from isthmus.pipelines.options import SamplingOptions, saved_options
from isthmus.pipelines.prompts import Asked, asked_for, prompt_list
from isthmus.pipelines.request import Labels, Request, check_output_type, image_seeds, spread

logger = logging.getLogger("isthmus")

Pipeline = TypeVar("Pipeline", bound="SavedPipeline")
Part = type[SavedModel] | type[Recorded] | type[StoredLlama]

_CLASSIFIED_AT_ONCE = 8  # images

# optional components that came after format 1: a folder without one says nothing of it, as those of before
_LATER = ("text_encoder", "text_tokenizer")


class SavedPipeline:
    """Base of the pipelines. A family adds its call, its components and what the abstract members below ask for.

    Attributes:
        parts: component name -> class; each is an attribute of that name.
        optional_parts: the same, of components that a model may do without; None stands for none. Several classes are
            those that it may be of.
        config: what is stored beside the components.
        num_classes: 0 for models without classes.
        class_names: index (as text) -> name, by number; empty where classes have no names.
        defaults: options of a call that names none.
        edits: names of the methods that edit an image.
        has_solver: whether `num_inference_steps` is an argument of its calls and reconstructions.
    """

    parts: ClassVar[Mapping[str, Part]] = {}
    optional_parts: ClassVar[Mapping[str, Part | tuple[Part, ...]]] = {}
    config: Config
    image_tokenizer: Any
    num_classes: int
    class_names: dict[str, str]
    defaults: SamplingOptions
    edits: ClassVar[tuple[str, ...]] = ()
    has_solver: ClassVar[bool] = False

    def __setattr__(self, name: str, value: Any) -> None:
        # what torch.compile makes; asked for by its mark, since its class is in a module that takes seconds to import
        if name in (*self.parts, *self.optional_parts) and hasattr(value, "_orig_mod"):
            raise UserError(
                f"a pipeline calls its parts step by step, which torch.compile(part) leaves as slow as it was, got a "
                f"compiled {name}. Hand over the part itself; what can be compiled is an option of the draw "
                "(docs/sampling.md)."
            )
        super().__setattr__(name, value)

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

    @property
    def reads_text(self) -> bool:
        """Whether images follow prompts."""
        return False

    @abstractmethod
    def step_names(self, num_steps: int) -> list[str]:
        """A short name for each step of a stream, for the columns of a picture."""

    @property
    @abstractmethod
    def stage_lengths(self) -> dict[str, int]:
        """Tokens of every stage (scale, or group of tokens) by its name, in the order of generation."""

    @abstractmethod
    def reconstruct_by_stage(self, images: Images, *, first_index: int = 0) -> dict[str, Images]:
        """Reconstructions in [-1, 1], not clamped, by the name of the stage, in order; the last is the whole one.

        `images` are in [-1, 1] and of the model's size (else UserError). Image i of them starts from the noise of
        (0, first_index + i), where a reconstruction starts from noise.
        """

    @abstractmethod
    def encode(self, images: ImageInput) -> Any:
        """All tokens of images, coarse to fine, on the CPU."""

    @abstractmethod
    def _token_nats(
        self, images: ImageInput | None, class_labels: Labels, token_ids: Any, prompt: object = None
    ) -> Float[Tensor, "_ n"]:
        """Log p(token | class, prompt, tokens before it) of every token, on the CPU; arguments as for `log_prob`."""

    @abstractmethod
    def _latents(self, images: ImageInput) -> Iterable[Float[Tensor, "b ..."]]:
        """What the image tokenizer makes of images before they are quantised, a few images each."""

    @abstractmethod
    def _scores(
        self,
        latents: Iterable[Float[Tensor, "rows ..."]],
        asked: Asked,
        *,
        num_views: int,
        keep: int,
        margin_nats: float | None,
    ) -> Iterator[CandidateScores]:
        """Log-likelihoods under everything asked for of a few images each, by the rules of `score_pairs`.

        The `num_views` rows of an image lie next to each other.
        """

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
        """Check and keep what is stored beside the components; UserError where names or defaults do not fit them."""
        names = names_in_order(class_names) if isinstance(class_names, Mapping) else tuple(class_names or ())
        if names and len(names) != self.num_classes:
            raise UserError(
                f"class_names needs one name per class: {self.num_classes} classes, got {len(names)} names. "
                "Pass the names of the data the transformer was trained on, or none."
            )
        if not isinstance(sampling_defaults, SamplingOptions):
            sampling_defaults = SamplingOptions.from_dict(sampling_defaults or {})
        self.check_options(sampling_defaults)
        self.defaults = sampling_defaults
        # a mapping: a list of two strings in model_index.json is a component
        self.class_names = {str(index): name for index, name in enumerate(names)}
        usual = {"resize": "shorter side, antialiased", "crop": "center", "value_range": [-1, 1]}
        self.config = Config(
            class_names=self.class_names,
            sampling_defaults=sampling_defaults.to_dict(),
            preprocessing=dict(preprocessing or {"image_size": self.image_size, **usual}),
            data=dict(data or {}),
            protocol=protocol,
        )

    @property
    def components(self) -> dict[str, Any]:
        """Every component by name; None for an optional one that this model does without."""
        return {name: getattr(self, name) for name in (*self.parts, *self.optional_parts)}

    @property
    def arguments(self) -> dict[str, Any]:
        """Those of the constructor."""
        return {**self.components, **self.config}

    def stored(self, name: str) -> Any:
        """A component as it is kept, for reading alone."""
        return getattr(self, name)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.image_tokenizer.device

    @property
    def dtype(self) -> torch.dtype:
        """Type of the weights."""
        return self.image_tokenizer.dtype

    def to(self: Pipeline, *place: torch.device | str | torch.dtype) -> Pipeline:
        """Move or cast the weights of all components, in place: a device, a type or both; returns the pipeline."""
        check_not_float16(*place)
        for name in (*self.parts, *self.optional_parts):
            part = self.stored(name)
            if isinstance(part, (torch.nn.Module, StoredLlama)):
                cast(Any, part).to(*place)  # as torch takes them: its overloads know no union
        return self

    @property
    def image_size(self) -> int:
        """Side of the images, in pixels."""
        return self.image_tokenizer.image_size

    def check_options(self, options: SamplingOptions) -> None:
        """Raise UserError where this model cannot draw with these options."""
        options.check(codebook_size=self.codebook_size, num_steps=self.num_guided_steps)
        values = guidance_values(options.guidance_scale, self.num_guided_steps)
        if self.num_classes == 0 and not self.reads_text and any(value != 1 for value in values):
            raise UserError(
                "this model has no classes, so there is nothing to guide towards: guidance_scale must be 1, got "
                f"{options.guidance_scale}. Leave it out."
            )

    def check_request(self, arguments: Mapping[str, Any], decoding: Mapping[str, bool] | None = None) -> None:
        """Raise UserError where a call of this model cannot take these arguments; nothing is drawn.

        `decoding` says how tokens are computed, as for `prepared`.
        """
        for call, given in ((type(self).__call__, arguments), (type(self).prepared, decoding or {})):
            unknown = sorted(given.keys() - inspect.signature(call).parameters.keys())
            if unknown:
                raise UserError(f"this model, a {self.kind}, has no {', '.join(unknown)}. Leave it out.")
        # checks its arguments at once and draws only when it is read
        cast(Any, self).stream(**{"seed": 0, **arguments})

    def refine_with(self, mode: Any) -> None:
        """Draw tokens again from now on, in one of the modes of a family that can. Raises UserError where it cannot."""
        raise UserError(f"this model, a {self.kind}, draws no token again. Leave out --refine.")

    def forwards_per_image(self, options: SamplingOptions) -> Any:
        """What a draw with these options costs, as a dataclass with a text; None where a family does not count it."""
        return None

    def prepared(self, num_images: int) -> dict[str, Any]:
        """Arguments worth computing once for many calls of `num_images` images each."""
        return {}

    def log_prob(
        self,
        images: ImageInput | None = None,
        class_labels: Labels = None,
        *,
        token_ids: Any = None,
        prompt: str | Sequence[str] | None = None,
    ) -> Float[Tensor, " b"]:
        """Exact log-likelihood, in nats, of the tokens of images, or of `token_ids` as `encode` returns them.

        It is that of the model without guidance and filters, at temperature 1, under `class_labels` (names, indices or
        None for no class) and under `prompt`, where the model reads text: one per image or one for all. Raises
        UserError where something is not usable, or both or neither of images and tokens are given.
        """
        return self._token_nats(images, class_labels, token_ids, prompt).sum(dim=1)

    def bits_per_token(
        self,
        images: ImageInput | None = None,
        class_labels: Labels = None,
        *,
        token_ids: Any = None,
        prompt: str | Sequence[str] | None = None,
    ) -> Float[Tensor, "_ n"]:
        """Bits that every token costs, in the order of generation; arguments as for `log_prob`."""
        return -self._token_nats(images, class_labels, token_ids, prompt) / math.log(2)

    def classify(
        self,
        images: ImageInput,
        class_labels: Labels = None,
        top_k: int = 1,
        *,
        prompts: Sequence[str] | None = None,
        prune_nats: float | int | None = 8.0,
        num_views: int = 1,
        view_noise: float | int | None = None,
        seed: SupportsIndex = 0,
        image_index: int = 0,
    ) -> ClassificationOutput:
        """The most probable classes or prompts of images, by Bayes' rule with equal priors over unguided
        log-likelihoods.

        Args:
            images: as for `encode`.
            class_labels: classes to choose from, names or indices; None is all of the model.
            prompts: texts to choose from instead, of a model that reads text.
            top_k: how many classes to return; at least so many are looked at to the end.
            prune_nats: after every scale (D-AR: after one group of tokens, two, four and so on), a class further below
                the best than this is dropped; None drops none, and is exact.
            num_views: log-likelihoods are averaged over the image and `num_views` - 1 perturbed copies of its latents.
            view_noise: standard deviation of the perturbation, as a share of that of the latents, in [0, 1]; None is
                0.1. It needs more than one view.
            seed: of the perturbations; image i draws from (seed, image_index + i), whatever the batch.
            image_index: number of the first image.
        """
        candidates = self._candidates(class_labels, prompts)
        number = len(candidates.ids)
        check_classification(
            top_k=top_k, num_candidates=number, num_views=num_views, noise=view_noise, prune_nats=prune_nats
        )
        noise = DEFAULT_VIEW_NOISE if view_noise is None else view_noise

        def views() -> Iterator[Tensor]:
            first = image_index
            for some in (some for latents in self._latents(images) for some in latents.split(_CLASSIFIED_AT_ONCE)):
                seeds = image_seeds(len(some), seed=seed, image_index=first)
                first += len(some)
                yield perturbed_views(some, seeds, num_views=num_views, noise=noise)

        parts = self._scores(views(), candidates.asked, num_views=num_views, keep=top_k, margin_nats=prune_nats)
        return ClassificationOutput.of(CandidateScores.joined(list(parts)), candidates, top_k)

    def _candidates(self, class_labels: Labels, prompts: Sequence[str] | None) -> Candidates:
        """The classes or prompts to choose from; UserError for others than those of the model."""
        if prompts is not None:
            names = prompt_list(prompts)
            if class_labels is not None:
                raise UserError("images are sorted by prompts or by classes, got both. Pass one of them.")
            if len(set(names)) < len(names):
                raise UserError(f"every prompt to choose from is named once, got {names}.")
            return Candidates(self.asked(None, names), list(range(len(names))), names)
        if class_labels is None:
            if self.num_classes == 0 and self.reads_text:
                raise UserError("this model has no classes to choose from. Pass prompts.")
            ids = list(range(self.num_classes))
        else:
            given = label_list(class_labels)
            if any(label is None for label in given):
                raise UserError("classes to choose from are names or indices, got None. Leave it out.")
            ids = self.class_ids(given)
            if len(set(ids)) < len(ids):
                raise UserError(f"every class to choose from is named once, got {given}.")
        return Candidates(self.asked(ids or None), ids, [self.label_name(one) for one in ids])

    def _check_evidence(self, class_labels: Labels, prompt: object) -> None:
        """Raise UserError where an image has neither a class nor words that evidence could be for."""
        if "" in prompt_list(prompt) and any(label is None for label in label_list(class_labels)):
            what = "prompt" if self.num_classes == 0 and self.reads_text else "class"
            raise UserError(f"evidence is evidence for a {what}, got None. Pass a {what} for every image.")

    def _tokens_of(self, images: ImageInput | None, token_ids: Any) -> Any:
        """The tokens that a likelihood is of."""
        if (images is None) == (token_ids is None):
            raise UserError("a likelihood is that of images or of token_ids, got both or neither. Pass one of them.")
        return token_ids if images is None else self.encode(images)

    def class_ids(self, class_labels: Labels) -> list[int]:
        """Ids of labels, however they were given; UserError for what is no class of this model."""
        return resolve_labels(class_labels, class_names=self.class_names, num_classes=self.num_classes)

    def asked(
        self, class_labels: Labels, prompt: object = None, text: Any = None, negative_prompt: object = None
    ) -> Asked:
        """What images are to be, one class and one text each; no prompt is read yet.

        Arguments as for a call. Raises UserError where they do not fit each other or the model.
        """
        if not self.reads_text:
            for name, given in (("prompt", prompt), ("text", text), ("negative_prompt", negative_prompt)):
                if given is not None:
                    shown = "" if name == "text" else f" {given!r}"
                    instead = "Pass class_labels." if self.num_classes else "Leave it out."
                    raise UserError(f"this model reads no text, got the {name}{shown}. {instead}")
            return Asked(self.class_ids(class_labels))
        if self.num_classes == 0:
            strange = [label for label in label_list(class_labels) if label is not None]
            if strange:
                raise UserError(
                    f"this model draws prompts and has no classes, got the class {strange[0]!r}. Pass prompt instead."
                )
        return asked_for(self.class_ids(class_labels), prompt, text, negative_prompt)

    def label_name(self, class_id: int) -> str:
        """Name of a class id: its class name, the number where classes have no names, "null" for no class."""
        return "null" if class_id == self.num_classes else self.class_names.get(str(class_id), str(class_id))

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of configuration and weights of all components: what images depend on beside the options."""
        stored = (self.stored(name) for name in (*self.parts, *self.optional_parts))
        return hashlib.sha256("".join(_fingerprint(part) for part in stored if part is not None).encode()).hexdigest()

    def card(self) -> str:
        """The README.md that `save_pretrained` writes: Markdown with the front matter the hub reads."""
        names = names_in_order(self.class_names)
        shown = listed_names(names) + (f" and {len(names) - 20} more" if len(names) > 20 else "")
        count = self.num_classes
        classes = f"{count} ({shown})" if names else str(count) if count else "none (unlabelled)"
        # a JSON string is a Python string, in the quotes that the rest of the card has
        first = json.dumps(names[0], ensure_ascii=False) if names else "0"
        argument = f"class_labels=[{first}], " if count else ""
        pipeline_tag, words = "unconditional-image-generation", ""
        if self.reads_text:
            prompt = json.dumps(self.config["data"].get("prompt") or "what the image shows", ensure_ascii=False)
            pipeline_tag, argument, words = "text-to-image", f"{argument}prompt={prompt}, ", f" --prompt {prompt}"
        sizes = []
        for name in (*self.parts, *self.optional_parts):
            part = self.stored(name)
            if isinstance(part, (torch.nn.Module, StoredLlama)):
                weights = part.state_dict().values() if isinstance(part, StoredLlama) else part.parameters()
                sizes.append(f"{name} {sum(weight.numel() for weight in weights) / 1e6:.2f}M")
        data = self.config["data"]
        attribution = data.get("attribution") or "unknown. Find out before you publish this model or its images."
        return f"""---
library_name: isthmus
pipeline_tag: {pipeline_tag}
license: other
tags:
- isthmus
- image-generation
- autoregressive
---

# {self.kind}

Images of {self.image_size} x {self.image_size} pixels. Classes: {classes}.{" Reads prompts." if words else ""}
{self.layout} Parameters: {"; ".join(sizes)}.

## Load

```python
from isthmus import load_pipeline

pipe = load_pipeline("path/to/this/folder")
pipe({argument}num_images=4, seed=0).images[0].save("sample.png")
```

or `isthmus sample path/to/this/folder{words} --num 16 --out samples`. Saved with Isthmus {isthmus.__version__}.

With diffusers (`pip install "isthmus[diffusers]"`; its own `DiffusionPipeline.from_pretrained` knows no Isthmus):

```python
from isthmus.diffusers import from_pretrained

pipe = from_pretrained("path/to/this/folder")  # a DiffusionPipeline
pipe({argument}seed=0).images[0].save("sample.png")
```

Defaults saved with the model: {self.defaults.words()}.

## Data and licence

Trained on: {data.get("name") or "unknown"}.
Licence: {attribution}

## Protocol

{self.config["protocol"] or "Not recorded."}
"""

    def save_pretrained(self, save_directory: str | Path, *, max_shard_size: int | str | None = None) -> None:
        """Write the pipeline folder: model_index.json, components as safetensors, and the card README.md.

        A new or empty folder appears whole or not at all. In a folder that has other files they stay, and ours take
        the place of earlier ones when all are written.
        """
        folder = Path(save_directory)
        check_writable(folder, "the output folder")
        with replaced_within(folder) if folder.is_dir() else written_whole(folder) as temporary:
            self._write(temporary, max_shard_size)

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

        `load_pipeline` also picks the class and the device. Raises UserError where there is no such folder or model, it
        is incomplete, or it has settings we do not know.
        """
        folder = model_folder(
            pretrained_model_name_or_path, revision=revision, cache_dir=cache_dir, local_files_only=local_files_only
        )
        check_not_float16(dtype)
        index = read_index(folder)
        if index.get("_class_name") != cls.__name__:
            raise UserError(f"{folder} holds a {index.get('_class_name')}, not a {cls.__name__}. Use load_pipeline.")
        values = {k: v for k, v in index.items() if not k.startswith(("_", "isthmus_"))}
        for name, instead in FORGOTTEN.items():
            if values.pop(name, [None, None]) != [None, None]:
                logger.warning("%s was saved with a %s, which is ignored: %s.", folder, name, instead)
        check_settings(values, cls, folder / INDEX_NAME)
        components = {}
        for name, part in {**cls.parts, **cls.optional_parts}.items():
            entry = values.pop(name, None)
            # the class alone: folders of format 1 name the modules of their time
            found = entry[1] if isinstance(entry, list) and len(entry) == 2 else entry
            if found is None and name in cls.optional_parts:
                continue
            kinds = {index_entry(kind)[1]: kind for kind in (part if isinstance(part, tuple) else (part,))}
            if found not in kinds:
                raise UserError(
                    f"{folder / INDEX_NAME} must name {' or '.join(kinds)} as its {name}, got {found}. Update "
                    "Isthmus, or save the model again."
                )
            settings = {"dtype": dtype} if issubclass(kinds[found], (SavedModel, StoredLlama)) else {}
            components[name] = kinds[found].from_pretrained(folder / name, **settings)
        return cls(**components, **cls._read_beside(folder), **values)

    @classmethod
    def _read_beside(cls, folder: Path) -> dict[str, Any]:
        """Arguments of the constructor that a family keeps in files of its own beside the components."""
        return {}

    def _write(self, folder: Path, max_shard_size: int | str | None) -> None:
        # in diffusers' layout a component is [library, class]
        entries = {
            name: [None, None] if self.stored(name) is None else index_entry(one_of(part, self.stored(name)))
            for name, part in {**self.parts, **self.optional_parts}.items()
            if name not in _LATER or self.stored(name) is not None
        }
        versions = {"isthmus_format": FORMAT, "isthmus_version": isthmus.__version__}
        index = {"_class_name": type(self).__name__, **versions, **entries, **self.config}
        text = json.dumps(_sorted(index), indent=2) + "\n"
        for name, part in self.components.items():
            if isinstance(part, torch.nn.Module):
                # None is the writer's own limit, which is not the same for all of them
                limit = {} if max_shard_size is None else {"max_shard_size": max_shard_size}
                cast(Any, part).save_pretrained(folder / name, **limit)
            elif part is not None:
                part.save_pretrained(folder / name)
        (folder / "README.md").write_text(self.card(), encoding="utf-8")
        (folder / INDEX_NAME).write_text(text, encoding="utf-8")
        for weights in folder.rglob("*.safetensors"):
            # safetensors writes for the owner alone; a model is as readable as the rest of its folder
            weights.chmod((folder / INDEX_NAME).stat().st_mode)

    def _request(
        self,
        class_labels: Labels,
        num_images: SupportsIndex | None,
        num_images_per_class: SupportsIndex,
        options: Mapping[str, Any],
    ) -> Request:
        """The request of a call; `options` holds every one of `CallOptions`."""
        words = {name: options.get(name) for name in ("prompt", "text", "negative_prompt")}
        asked = self.asked(class_labels, **words)
        asked = asked.images(spread(list(range(len(asked))), num_images, num_images_per_class))
        check_output_type(options["output_type"])
        resolved = self.defaults.override(**saved_options(options))
        self.check_options(resolved)
        guidance = guidance_values(resolved.guidance_scale, self.num_guided_steps)
        # options of single images may guide these
        unguided = all(value == 1 for value in guidance) and options.get("image_options") is None
        if words["negative_prompt"] is not None and unguided:
            raise UserError(
                "guidance leads away from negative_prompt, and guidance_scale is 1, which is off. Pass guidance_scale, "
                "or leave negative_prompt out."
            )
        given = {name: options[name] for name in ("seed", "generator", "image_index")}
        return Request(asked, image_seeds(len(asked), **given), resolved, options["output_type"])


def check_not_float16(*asked: object) -> None:
    """Raise UserError where float16 is among what is asked for."""
    if torch.float16 in asked or "float16" in asked:
        raise UserError(
            "dtype must be float32 or bfloat16, got float16: networks trained in float32 or bfloat16 may hold features "
            "above 65504, its largest number, and one of them spoils an image without a word. Take bfloat16, which is "
            "as fast and as small."
        )


def index_entry(part: Part) -> list[str]:
    """How model_index.json names a component: [library, class], where the library of our own is their module."""
    if issubclass(part, StoredLlama):
        return [part.library, part.class_name]
    return [part.__module__, part.__name__]


def one_of(part: Part | tuple[Part, ...], value: object) -> Part:
    """The class of a component; where it may be of several, the one that `value` is of."""
    return cast(Part, type(value)) if isinstance(part, tuple) else part


def _fingerprint(part: Any) -> str:
    if isinstance(part, (torch.nn.Module, StoredLlama)):
        return fingerprint(part)
    settings = {name: value for name, value in part.config.items() if not name.startswith("_")}
    return json.dumps(settings, sort_keys=True, default=list)


def _sorted(value: Any) -> Any:
    """Mappings with their keys in order, at every depth: numbers by their value, words after them."""
    if not isinstance(value, Mapping):
        return value
    keys = sorted(value, key=lambda key: (0, int(key), key) if key.isdecimal() else (1, 0, key))
    return {key: _sorted(value[key]) for key in keys}

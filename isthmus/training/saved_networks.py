"""What both families do with networks that a run leaves behind, or starts from."""

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from isthmus.data.huggingface import ImageStream
from isthmus.data.source import ImageSource
from isthmus.errors import UserError
from isthmus.nn.saved_model import SavedModel, without_values
from isthmus.pipelines.options import SamplingOptions, parse_guidance
from isthmus.training.checkpoints import gathered
from isthmus.training.config import PriorSampling, Run
from isthmus.training.optim import ExponentialMovingAverage

AnyModel = TypeVar("AnyModel", bound=SavedModel)

TOKENIZER_FOLDER = "image_tokenizer"


def averaged_model(model: AnyModel, ema: ExponentialMovingAverage, *, prefix: str = "") -> AnyModel:
    """A whole copy of `model` that holds the averages (and its own frozen weights), in eval mode.

    `prefix` begins the names of its parameters where the averages are those of a larger module. Every process must
    call it where weights are sharded.
    """
    state = gathered(dict(model.state_dict())) | gathered(ema.averages_under(prefix))
    with without_values():
        copy = type(model)(**{k: v for k, v in model.config.items() if not k.startswith("_")})
    copy.load_state_dict({name: value.to(model.device, copy=True) for name, value in state.items()}, assign=True)
    return copy.eval().requires_grad_(False)


def kept_classes(class_names: Sequence[str], saved_names: Sequence[str]) -> dict[int, int]:
    """Label -> label in a saved model, for classes that both know by name. Numbers are no names: they mean anything.

    >>> kept_classes(("flag", "tree", "0"), ("face", "flag", "0"))
    {0: 1}
    """
    known = {name: label for label, name in enumerate(saved_names)}
    return {i: known[name] for i, name in enumerate(class_names) if name in known and not name.isdigit()}


def refuse_contradictions(
    model: SavedModel, wanted: Mapping[str, object], name: str, *, options: str = "model"
) -> None:
    """A model that is trained on keeps its network; `options` is the run's field that holds what is wanted.

    Raises:
        UserError: an argument in `wanted` differs from the saved model's.
    """
    for option, value in wanted.items():
        present = model.config[option]
        if value != (tuple(present) if isinstance(present, (list, tuple)) else present):
            raise UserError(
                f"{options}.{option} is {present} in {name}, got {value}. Leave it out: a model that is fine-tuned "
                "keeps its network."
            )


def sampling_options(
    settings: PriorSampling, *, codebook_size: int, num_classes: int, num_guided_steps: int
) -> SamplingOptions:
    """A run's settings of draws for its model; without classes there is nothing to guide.

    Raises:
        UserError: the model cannot draw with them. Asked at the start, that costs nothing; the first preview may come
            after days.
    """
    guidance = parse_guidance(settings.guidance) if num_classes else 1.0
    options = SamplingOptions(
        guidance_scale=guidance,
        top_k=settings.top_k,
        top_p=settings.top_p,
        temperature=settings.temperature,
        smooth=settings.smooth,
    )
    options.check(codebook_size=codebook_size, num_steps=num_guided_steps)
    return options


def data_record(source: ImageSource | ImageStream) -> dict[str, Any]:
    """`data` of a pipeline: name and licence line of what it was trained on."""
    return {"name": source.name, "attribution": source.attribution}


def tokenizer_record(source: ImageSource | ImageStream) -> dict[str, Any]:
    """training.json of a tokenizer, which belongs to no pipeline yet."""
    return {"data": source.name, "attribution": source.attribution, "class_names": list(source.class_names)}


def protocol(run: Run) -> str:
    """How a model was trained, in a sentence for its card."""
    return (
        f"{run.num_steps} steps of {run.batch_size} images, seed {run.seed}, averaged weights (decay "
        f"{run.ema_decay}); settings and data fingerprint are in run.json, measurements in log.jsonl"
    )

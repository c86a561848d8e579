"""Which family a saved model or a run is of: the only place that knows. Values are "module:Name"."""

from importlib import import_module
from typing import Any

# class of a saved pipeline (`_class_name` in model_index.json)
PIPELINES = {
    "NextScalePipeline": "isthmus.next_scale.pipeline:NextScalePipeline",
    "DARPipeline": "isthmus.dar.pipeline:DARPipeline",
}
# what `isthmus info` says of its folder, from configurations alone
DESCRIPTIONS = {
    "NextScalePipeline": "isthmus.next_scale.runs:describe_folder",
    "DARPipeline": "isthmus.dar.runs:describe_folder",
}
# class of a run (`kind` in run.json) -> what it trains, for the loops in training/
TASKS = {
    "TokenizerRun": "isthmus.next_scale.train_tokenizer:MultiScaleTokenizerTask",
    "PriorRun": "isthmus.next_scale.train_prior:NextScalePriorTask",
    "DistillRun": "isthmus.next_scale.distillation:ScaleDistillationTask",
    "DiffusionTokenizerRun": "isthmus.dar.train_tokenizer:DiffusionTokenizerTask",
    "NextTokenPriorRun": "isthmus.dar.train_prior:NextTokenPriorTask",
}
# class of a saved tokenizer -> the presets that are meant where none is named: to go on from it, or from its prior, or
# for a new prior
DEFAULT_PRESETS = {
    "MultiScaleVQVAE": {
        "tokenizer": "finetune-tokenizer",
        "prior": "finetune-prior",
        "new prior": "srdd-small",
        "new causal prior": "var-small",
    },
    "DiffusionTokenizer": {
        "tokenizer": "finetune-dar-tokenizer",
        "prior": "finetune-dar-prior",
        "new prior": "dar-prior-small",
    },
}


def imported(place: str) -> Any:
    """The object at "module:Name"; the module is imported now, which may take seconds.

    >>> imported("isthmus.errors:UserError").__name__
    'UserError'
    """
    module, name = place.split(":")
    return getattr(import_module(module), name)


def task_of(run: object) -> Any:
    """The class of the task that a run trains."""
    return imported(TASKS[type(run).__name__])

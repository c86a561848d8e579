"""Isthmus: autoregressive transformers that are diffusion models, on one's own images.

Names are loaded when they are first used, so that ``import isthmus`` and ``isthmus --help`` answer at once.

>>> import isthmus
>>> "NextScalePipeline" in dir(isthmus)
True
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from isthmus.dar.decoder import FlowDecoder
    from isthmus.dar.pipeline import DARPipeline
    from isthmus.dar.runs import DiffusionTokenizerRun, NextTokenPriorRun
    from isthmus.dar.scheduler import FlowMatchingScheduler
    from isthmus.dar.tokenizer import DiffusionTokenizer
    from isthmus.dar.train_tokenizer import train_diffusion_tokenizer
    from isthmus.errors import UserError
    from isthmus.next_scale.pipeline import NextScalePipeline
    from isthmus.next_scale.pyramid import ScaleSchedule
    from isthmus.next_scale.refinement import ScaleRefinementScheduler
    from isthmus.next_scale.runs import PriorRun, TokenizerRun
    from isthmus.next_scale.tokenizer import MultiScaleVQVAE
    from isthmus.next_scale.train_tokenizer import train_tokenizer
    from isthmus.next_scale.transformer import NextScaleTransformer
    from isthmus.nn.guidance import GuidanceSchedule
    from isthmus.pipelines.loading import load_pipeline
    from isthmus.pipelines.options import SamplingOptions
    from isthmus.pipelines.request import GenerationStep
    from isthmus.training.train_prior import train_prior

__version__ = "0.1.0"

__all__ = [
    "DARPipeline",
    "DiffusionTokenizer",
    "DiffusionTokenizerRun",
    "FlowDecoder",
    "FlowMatchingScheduler",
    "GenerationStep",
    "GuidanceSchedule",
    "MultiScaleVQVAE",
    "NextScalePipeline",
    "NextScaleTransformer",
    "NextTokenPriorRun",
    "PriorRun",
    "SamplingOptions",
    "ScaleRefinementScheduler",
    "ScaleSchedule",
    "TokenizerRun",
    "UserError",
    "__version__",
    "load_pipeline",
    "train_diffusion_tokenizer",
    "train_prior",
    "train_tokenizer",
]

_HOMES = {
    "DARPipeline": "isthmus.dar.pipeline",
    "DiffusionTokenizer": "isthmus.dar.tokenizer",
    "DiffusionTokenizerRun": "isthmus.dar.runs",
    "FlowDecoder": "isthmus.dar.decoder",
    "FlowMatchingScheduler": "isthmus.dar.scheduler",
    "GenerationStep": "isthmus.pipelines.request",
    "GuidanceSchedule": "isthmus.nn.guidance",
    "MultiScaleVQVAE": "isthmus.next_scale.tokenizer",
    "NextScalePipeline": "isthmus.next_scale.pipeline",
    "NextScaleTransformer": "isthmus.next_scale.transformer",
    "NextTokenPriorRun": "isthmus.dar.runs",
    "PriorRun": "isthmus.next_scale.runs",
    "SamplingOptions": "isthmus.pipelines.options",
    "ScaleRefinementScheduler": "isthmus.next_scale.refinement",
    "ScaleSchedule": "isthmus.next_scale.pyramid",
    "TokenizerRun": "isthmus.next_scale.runs",
    "UserError": "isthmus.errors",
    "load_pipeline": "isthmus.pipelines.loading",
    "train_diffusion_tokenizer": "isthmus.dar.train_tokenizer",
    "train_prior": "isthmus.training.train_prior",
    "train_tokenizer": "isthmus.next_scale.train_tokenizer",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'isthmus' has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(_HOMES))

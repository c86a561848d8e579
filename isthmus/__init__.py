"""Isthmus: autoregressive transformers that are diffusion models, on one's own images.

Names are loaded when they are first used, so that ``import isthmus`` and ``isthmus --help`` answer at once.

>>> import isthmus
>>> "NextScalePipeline" in dir(isthmus)
True
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from isthmus.errors import UserError
    from isthmus.functional.guidance import GuidanceSchedule
    from isthmus.functional.pyramid import ScaleSchedule
    from isthmus.generation.options import SamplingOptions
    from isthmus.generation.step import GenerationStep
    from isthmus.models.diffusion_tokenizer import DiffusionTokenizer
    from isthmus.models.flow_decoder import FlowDecoder
    from isthmus.models.multiscale_vqvae import MultiScaleVQVAE
    from isthmus.models.next_scale_transformer import NextScaleTransformer
    from isthmus.pipelines.dar import DARPipeline
    from isthmus.pipelines.loading import load_pipeline
    from isthmus.pipelines.next_scale import NextScalePipeline
    from isthmus.schedulers.flow_matching import FlowMatchingScheduler
    from isthmus.schedulers.scale_refinement import ScaleRefinementScheduler
    from isthmus.training.config import PriorRun, TokenizerRun
    from isthmus.training.dar_config import DiffusionTokenizerRun, NextTokenPriorRun
    from isthmus.training.train_diffusion_tokenizer import train_diffusion_tokenizer
    from isthmus.training.train_prior import train_prior
    from isthmus.training.train_tokenizer import train_tokenizer

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
    "DARPipeline": "isthmus.pipelines.dar",
    "DiffusionTokenizer": "isthmus.models.diffusion_tokenizer",
    "DiffusionTokenizerRun": "isthmus.training.dar_config",
    "FlowDecoder": "isthmus.models.flow_decoder",
    "FlowMatchingScheduler": "isthmus.schedulers.flow_matching",
    "GenerationStep": "isthmus.generation.step",
    "GuidanceSchedule": "isthmus.functional.guidance",
    "MultiScaleVQVAE": "isthmus.models.multiscale_vqvae",
    "NextScalePipeline": "isthmus.pipelines.next_scale",
    "NextScaleTransformer": "isthmus.models.next_scale_transformer",
    "NextTokenPriorRun": "isthmus.training.dar_config",
    "PriorRun": "isthmus.training.config",
    "SamplingOptions": "isthmus.generation.options",
    "ScaleRefinementScheduler": "isthmus.schedulers.scale_refinement",
    "ScaleSchedule": "isthmus.functional.pyramid",
    "TokenizerRun": "isthmus.training.config",
    "UserError": "isthmus.errors",
    "load_pipeline": "isthmus.pipelines.loading",
    "train_diffusion_tokenizer": "isthmus.training.train_diffusion_tokenizer",
    "train_prior": "isthmus.training.train_prior",
    "train_tokenizer": "isthmus.training.train_tokenizer",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'isthmus' has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(_HOMES))

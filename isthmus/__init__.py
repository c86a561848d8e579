"""Isthmus: autoregressive transformers that are diffusion models, on one's own images.

Names are loaded when they are first used, so that ``import isthmus`` and ``isthmus --help`` answer at once.

>>> import isthmus
>>> "NextScalePipeline" in dir(isthmus)
True
"""

from typing import TYPE_CHECKING, Any

from isthmus.registry import PIPELINES, imported

if TYPE_CHECKING:
    from isthmus.dar.decoder import FlowDecoder as FlowDecoder
    from isthmus.dar.pipeline import DARPipeline as DARPipeline
    from isthmus.dar.runs import DiffusionTokenizerRun as DiffusionTokenizerRun
    from isthmus.dar.runs import NextTokenPriorRun as NextTokenPriorRun
    from isthmus.dar.scheduler import FlowMatchingScheduler as FlowMatchingScheduler
    from isthmus.dar.tokenizer import DiffusionTokenizer as DiffusionTokenizer
    from isthmus.errors import UserError as UserError
    from isthmus.next_scale.pipeline import NextScalePipeline as NextScalePipeline
    from isthmus.next_scale.pyramid import ScaleSchedule as ScaleSchedule
    from isthmus.next_scale.refinement import ScaleRefinementScheduler as ScaleRefinementScheduler
    from isthmus.next_scale.runs import PriorRun as PriorRun
    from isthmus.next_scale.runs import TokenizerRun as TokenizerRun
    from isthmus.next_scale.tokenizer import MultiScaleVQVAE as MultiScaleVQVAE
    from isthmus.next_scale.transformer import NextScaleTransformer as NextScaleTransformer
    from isthmus.nn.guidance import GuidanceSchedule as GuidanceSchedule
    from isthmus.pipelines.loading import load_pipeline as load_pipeline
    from isthmus.pipelines.options import SamplingOptions as SamplingOptions
    from isthmus.pipelines.options import SmoothSchedule as SmoothSchedule
    from isthmus.pipelines.request import GenerationStep as GenerationStep
    from isthmus.training.train_prior import train_prior as train_prior
    from isthmus.training.train_tokenizer import train_tokenizer as train_tokenizer

__version__ = "0.1.0"

# name -> "module:Name"
_HOMES = {
    **PIPELINES,
    "DiffusionTokenizer": "isthmus.dar.tokenizer:DiffusionTokenizer",
    "DiffusionTokenizerRun": "isthmus.dar.runs:DiffusionTokenizerRun",
    "FlowDecoder": "isthmus.dar.decoder:FlowDecoder",
    "FlowMatchingScheduler": "isthmus.dar.scheduler:FlowMatchingScheduler",
    "GenerationStep": "isthmus.pipelines.request:GenerationStep",
    "GuidanceSchedule": "isthmus.nn.guidance:GuidanceSchedule",
    "MultiScaleVQVAE": "isthmus.next_scale.tokenizer:MultiScaleVQVAE",
    "NextScaleTransformer": "isthmus.next_scale.transformer:NextScaleTransformer",
    "NextTokenPriorRun": "isthmus.dar.runs:NextTokenPriorRun",
    "PriorRun": "isthmus.next_scale.runs:PriorRun",
    "SamplingOptions": "isthmus.pipelines.options:SamplingOptions",
    "ScaleRefinementScheduler": "isthmus.next_scale.refinement:ScaleRefinementScheduler",
    "ScaleSchedule": "isthmus.next_scale.pyramid:ScaleSchedule",
    "SmoothSchedule": "isthmus.pipelines.options:SmoothSchedule",
    "TokenizerRun": "isthmus.next_scale.runs:TokenizerRun",
    "UserError": "isthmus.errors:UserError",
    "load_pipeline": "isthmus.pipelines.loading:load_pipeline",
    "train_prior": "isthmus.training.train_prior:train_prior",
    "train_tokenizer": "isthmus.training.train_tokenizer:train_tokenizer",
}
__all__ = sorted([*_HOMES, "__version__"])  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'isthmus' has no attribute {name!r}")
    value = imported(_HOMES[name])
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})

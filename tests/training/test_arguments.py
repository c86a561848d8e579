import inspect
from collections.abc import Sequence
from dataclasses import fields, replace
from typing import get_args, get_origin, get_type_hints

import pytest

from isthmus.dar.decoder import FlowDecoder
from isthmus.dar.prior import llama_config
from isthmus.dar.runs import DiffusionTokenizerModel, FlowDecoderModel, FlowSettings, LlamaModel
from isthmus.dar.scheduler import FlowMatchingScheduler
from isthmus.dar.tokenizer import DiffusionTokenizer
from isthmus.errors import UserError
from isthmus.next_scale.runs import PriorModel, PriorRun, TokenizerModel, prior_preset
from isthmus.next_scale.tokenizer import MultiScaleVQVAE
from isthmus.next_scale.transformer import NextScaleTransformer
from isthmus.training.arguments import arguments_of
from isthmus.training.config import run_from_json, run_to_json

# of the decoder, a run says whether there are positions and a canvas; their sizes are the tokenizer's
NOT_READ = {"position_table", "canvas"}


SETTINGS = {
    TokenizerModel: MultiScaleVQVAE,
    PriorModel: NextScaleTransformer,
    DiffusionTokenizerModel: DiffusionTokenizer,
    FlowDecoderModel: FlowDecoder,
    FlowSettings: FlowMatchingScheduler,
    LlamaModel: llama_config,
}


def test_what_a_run_sets_is_what_the_constructor_takes():
    for settings, constructor in SETTINGS.items():
        function = constructor.__init__ if isinstance(constructor, type) else constructor
        taken, hints = inspect.signature(function).parameters, get_type_hints(settings, include_extras=True)
        for name in {field.name for field in fields(settings)} - NOT_READ:
            hint, about = hints[name].__origin__, hints[name].__metadata__[0].documentation
            wanted = taken[name].annotation
            if get_origin(wanted) is Sequence:
                wanted = tuple[get_args(wanted)[0], ...]
            assert hint == wanted | None
            assert about.endswith(".") and not about[0].islower(), f"{name} has no help"
        assert all(value is None for value in vars(settings()).values())


def test_an_argument_or_a_place_that_is_not_there_is_refused():
    for place in ("isthmus.next_scale.transformer:Nothing", "isthmus.errors:UserError"):
        with pytest.raises(ValueError, match="must be a function, or a class with a constructor"):
            arguments_of(place, ["width"])
    with pytest.raises(ValueError, match="has no argument widht, it has scale_sizes"):
        arguments_of("isthmus.next_scale.transformer:NextScaleTransformer", ["widht"])
    with pytest.raises(TypeError, match="widht"):
        PriorModel(widht=3)
    with pytest.raises(UserError, match=r"no field model.widht. Did you mean width\?"):
        run_from_json(PriorRun, {"model": {"widht": 3}})


def test_settings_that_came_later_are_in_a_record_only_where_they_are_set():
    run = prior_preset("srdd-small")
    turned = replace(run, model=replace(run.model, position="rope2d"))
    assert "position" not in run_to_json(run)["model"] and run_to_json(turned)["model"]["position"] == "rope2d"
    assert all(run_from_json(type(one), run_to_json(one)) == one for one in (run, turned))

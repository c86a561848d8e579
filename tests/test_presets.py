"""Every preset builds, has the size it names, and is checked by the run it makes."""

from dataclasses import asdict

import pytest
import torch

from isthmus.errors import UserError
from isthmus.next_scale.runs import (
    PRIOR_PRESETS,
    SCALES_256,
    SCALES_512,
    TOKENIZER_PRESETS,
    default_tokenizer_preset,
    prior_preset,
    tokenizer_preset,
)
from isthmus.next_scale.tokenizer import MultiScaleVQVAE
from isthmus.next_scale.transformer import NextScaleTransformer
from isthmus.training.config import run_from_json, run_to_json


def arguments(model: object) -> dict[str, object]:
    return {name: value for name, value in asdict(model).items() if value is not None}


@pytest.mark.parametrize("name", [n for n in TOKENIZER_PRESETS if not n.startswith("finetune")])
def test_tokenizer_presets_have_the_size_they_name(name):
    preset = TOKENIZER_PRESETS[name]
    with torch.device("meta"):
        model = MultiScaleVQVAE(**arguments(preset.run.model))
    count = sum(p.numel() for p in model.parameters()) / 1e6
    assert count == pytest.approx(preset.expected_params_millions, abs=0.01)
    assert model.image_size == int(name.split("-")[1])


@pytest.mark.parametrize("name", [n for n, p in PRIOR_PRESETS.items() if p.expected_params_millions])
def test_published_priors_have_the_published_size(name):
    preset = PRIOR_PRESETS[name]
    with torch.device("meta"):
        model = NextScaleTransformer(
            scale_sizes=SCALES_512 if name.endswith("512") else SCALES_256,
            codebook_size=4096,
            codebook_dim=32,
            num_classes=1000,
            **arguments(preset.run.model),
        )
    count = sum(p.numel() for p in model.parameters()) / 1e6
    assert count == pytest.approx(preset.expected_params_millions, abs=0.01)


@pytest.mark.parametrize("name", [*TOKENIZER_PRESETS, *PRIOR_PRESETS])
def test_presets_survive_json(name):
    run = tokenizer_preset(name) if name in TOKENIZER_PRESETS else prior_preset(name)
    assert run_from_json(type(run), run_to_json(run)) == run and run.preset == name


def test_unknown_presets_and_sizes_are_refused_in_words():
    with pytest.raises(UserError, match="small-32"):
        tokenizer_preset("smal-32")
    with pytest.raises(UserError, match="48"):
        default_tokenizer_preset(image_size=48, from_model=False)

"""Every preset builds, has the size it names, and is checked by the run it makes."""

from dataclasses import asdict

import pytest
import torch

from isthmus.dar.prior import TokenLayout
from isthmus.dar.runs import (
    DIFFUSION_TOKENIZER_PRESETS,
    NEXT_TOKEN_PRIOR_PRESETS,
    diffusion_tokenizer_preset,
    next_token_prior_preset,
)
from isthmus.dar.train_prior import build_llama
from isthmus.dar.train_tokenizer import new_parts
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


# published parameters (spec of D-AR, 2.1) for 16,384 codes and 1,000 classes
PUBLISHED_PRIORS = {
    "dar-b": (768, 110_888_448),
    "dar-l": (1024, 342_910_976),
    "dar-xl": (1280, 774_699_520),
    "dar-xxl": (1536, 1_410_972_672),
}
# of the published tokenizer, 307,444,672 in all, less the head of the alignment loss, which only training needs
PUBLISHED_TOKENIZER = 307_444_672 - (768 * 2048 + 2048 + 2048 * 2048 + 2048 + 2048 * 768 + 768)


def count(*models):
    return sum(p.numel() for model in models for p in model.parameters())


@pytest.mark.parametrize("name", [n for n in DIFFUSION_TOKENIZER_PRESETS if not n.startswith("finetune")])
def test_dar_tokenizer_presets_have_the_size_they_name(name):
    preset = DIFFUSION_TOKENIZER_PRESETS[name]
    with torch.device("meta"):
        parts = new_parts(preset.run)
    assert count(parts.image_tokenizer, parts.decoder) / 1e6 == pytest.approx(preset.expected_params_millions, abs=0.01)
    assert parts.scheduler.config["num_tokens"] == preset.run.model.num_tokens


def test_the_published_tokenizer_has_the_published_number_of_weights():
    with torch.device("meta"):
        parts = new_parts(diffusion_tokenizer_preset("dar-tokenizer-v1"))
    assert count(parts.image_tokenizer, parts.decoder) == PUBLISHED_TOKENIZER
    assert parts.scheduler.windows() == tuple((start, start + 32) for start in range(0, 256, 32))


@pytest.mark.parametrize("name", PUBLISHED_PRIORS)
def test_published_priors_have_the_published_number_of_weights_and_head_rows_of_classes(name):
    width, published = PUBLISHED_PRIORS[name]
    with torch.device("meta"):
        llama = build_llama(next_token_prior_preset(name), TokenLayout(16384, 1000, 256))
    assert count(llama) == published + 1001 * width
    assert count(llama) / 1e6 == pytest.approx(NEXT_TOKEN_PRIOR_PRESETS[name].expected_params_millions, abs=0.01)


@pytest.mark.parametrize("name", [*DIFFUSION_TOKENIZER_PRESETS, *NEXT_TOKEN_PRIOR_PRESETS])
def test_dar_presets_survive_json(name):
    known = name in DIFFUSION_TOKENIZER_PRESETS
    run = diffusion_tokenizer_preset(name) if known else next_token_prior_preset(name)
    assert run_from_json(type(run), run_to_json(run)) == run and run.preset == name


def test_the_published_tokenizer_has_no_option_that_the_published_recipe_lacks():
    preset = diffusion_tokenizer_preset("dar-tokenizer-v1")
    loss = asdict(preset.loss)
    assert (loss["flow"], loss["codebook"], loss["commitment"]) == (1.0, 1.0, 0.25)
    assert (loss["perceptual"], loss["alignment"], loss["jump"], loss["readout"]) == (0.5, 0.5, 0.0, 0.0)
    assert (loss["noise_levels"], loss["times"], loss["latest_time"]) == (1, "uniform", 1.0)
    assert preset.decoder.prediction == "velocity" and not preset.model.latent_norm
    assert preset.continuous_steps == preset.revive_every == 0


def test_unknown_presets_are_refused_in_words():
    with pytest.raises(UserError, match="dar-small-32"):
        diffusion_tokenizer_preset("dar-smal-32")
    with pytest.raises(UserError, match="dar-xl"):
        next_token_prior_preset("dar-xll")

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
from isthmus.dar.train_prior import build_prior
from isthmus.dar.train_tokenizer import build_parts
from isthmus.errors import UserError
from isthmus.next_scale.runs import (
    DISTILL_PRESETS,
    PRIOR_PRESETS,
    SCALES_256,
    TOKENIZER_PRESETS,
    default_tokenizer_preset,
    distill_preset,
    prior_preset,
    tokenizer_preset,
)
from isthmus.next_scale.tokenizer import MultiScaleVQVAE
from isthmus.next_scale.transformer import NextScaleTransformer
from isthmus.training.arguments import given
from isthmus.training.config import run_from_json, run_to_json

SCALES_512 = (1, 2, 3, 4, 6, 9, 13, 18, 24, 32)
# published parameters of D-AR (its spec, 2.1) for 16,384 codes and 1,000 classes
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


def has_its_size(preset, *models):
    return count(*models) / 1e6 == pytest.approx(preset.expected_params_millions, abs=0.01)


def test_tokenizer_presets_have_the_size_they_name():
    for name, preset in TOKENIZER_PRESETS.items():
        if not name.startswith("finetune"):
            with torch.device("meta"):
                model = MultiScaleVQVAE(**given(preset.run.model))
            assert has_its_size(preset, model) and model.image_size == int(name.split("-")[1]), name


def test_published_priors_have_the_published_size():
    for name, preset in PRIOR_PRESETS.items():
        if preset.expected_params_millions:
            scales = SCALES_512 if name.endswith("512") else SCALES_256
            sizes = {"scale_sizes": scales, "codebook_size": 4096, "codebook_dim": 32, "num_classes": 1000}
            with torch.device("meta"):
                model = NextScaleTransformer(**sizes, **given(preset.run.model))
            assert has_its_size(preset, model), name


def test_dar_tokenizer_presets_have_the_size_they_name_and_the_published_one_its_weights():
    for name, preset in DIFFUSION_TOKENIZER_PRESETS.items():
        if not name.startswith("finetune"):
            with torch.device("meta"):
                parts = build_parts(preset.run)
            assert has_its_size(preset, parts.image_tokenizer, parts.decoder), name
            assert parts.scheduler.config["num_tokens"] == preset.run.model.num_tokens
            if name == "dar-tokenizer-v1":
                assert count(parts.image_tokenizer, parts.decoder) == PUBLISHED_TOKENIZER
                assert parts.scheduler.windows() == tuple((start, start + 32) for start in range(0, 256, 32))


def test_published_llamas_have_the_published_number_of_weights_and_head_rows_of_classes():
    classes = tuple(map(str, range(1000)))
    with torch.device("meta"):
        for name, (width, published) in PUBLISHED_PRIORS.items():
            layout = TokenLayout(16384, 1000, 256)
            llama = build_prior(next_token_prior_preset(name), layout, None, classes)
            assert llama.config.vocab_size == layout.vocab_size
            assert count(llama) == published + 1001 * width, name
            assert has_its_size(NEXT_TOKEN_PRIOR_PRESETS[name], llama), name


def test_presets_survive_json():
    for presets, named in (
        (TOKENIZER_PRESETS, tokenizer_preset),
        (PRIOR_PRESETS, prior_preset),
        (DISTILL_PRESETS, distill_preset),
        (DIFFUSION_TOKENIZER_PRESETS, diffusion_tokenizer_preset),
        (NEXT_TOKEN_PRIOR_PRESETS, next_token_prior_preset),
    ):
        for name in presets:
            run = named(name)
            assert run_from_json(type(run), run_to_json(run)) == run and run.preset == name


def test_the_published_tokenizer_has_no_option_that_the_published_recipe_lacks():
    preset = diffusion_tokenizer_preset("dar-tokenizer-v1")
    loss = asdict(preset.loss)
    assert (loss["flow"], loss["codebook"], loss["commitment"]) == (1.0, 1.0, 0.25)
    assert (loss["perceptual"], loss["alignment"], loss["jump"], loss["readout"]) == (0.5, 0.5, 0.0, 0.0)
    assert (loss["noise_levels"], loss["times"], loss["latest_time"]) == (1, "uniform", 1.0)
    assert preset.decoder.prediction == "velocity" and not preset.model.latent_norm
    assert preset.continuous_steps == preset.revive_every == 0


def test_unknown_presets_and_sizes_are_refused_in_words():
    with pytest.raises(UserError, match="small-32"):
        tokenizer_preset("smal-32")
    with pytest.raises(UserError, match="48"):
        default_tokenizer_preset(48)

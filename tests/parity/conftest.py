"""The published networks at small size, as our converter builds them."""

import pytest

from isthmus.dar.conversion import PublishedSettings, build_tokenizer_parts, convert_diffusion_tokenizer_state
from isthmus.next_scale.conversion import build_prior, build_tokenizer, convert_prior_state, convert_tokenizer_state
from isthmus.published import read_weights


@pytest.fixture(scope="session")
def published_tokenizer(golden):
    """scale_sizes -> tokenizer with the weights of vqvae_state, built once for each schedule; do not modify it."""
    built = {}

    def build(scale_sizes):
        if scale_sizes not in built:
            raw = read_weights(golden.path("var/vqvae_state.safetensors"))
            built[scale_sizes] = build_tokenizer(convert_tokenizer_state(raw, scale_sizes))
        return built[scale_sizes]

    return build


@pytest.fixture(scope="session")
def tokenizer(published_tokenizer):
    """The tokenizer that all priors of the fixtures use."""
    return published_tokenizer((1, 2, 3, 4))


@pytest.fixture(scope="session")
def published_prior(golden):
    """(variant, mask) -> (prior, published state); variants are base, saln (shared AdaLN) and nol2; do not modify."""
    built = {}

    def build(variant, scale_attention="causal"):
        if (variant, scale_attention) not in built:
            stored = "base" if variant == "nol2" else variant
            raw = read_weights(golden.path(f"var/var_{stored}_state.safetensors"))
            if variant == "nol2":
                raw = {key: value for key, value in raw.items() if "scale_mul" not in key}
            converted = convert_prior_state(raw, scale_attention)
            if variant == "nol2":
                # heads leave no trace in a file without the learned scales; the fixture has 2 heads of 32
                converted.arguments["num_heads"] = 2
            built[variant, scale_attention] = build_prior(converted), raw
        return built[variant, scale_attention]

    return build


@pytest.fixture(scope="session")
def published_dar(golden):
    """Variant ("a" or "b") -> (tokenizer, decoder, scheduler) of the D-AR fixtures, built once; do not modify."""
    built = {}

    def build(variant):
        if variant not in built:
            raw = read_weights(golden.path(f"dar/tok_{variant}_weights.safetensors"))
            settings = PublishedSettings.of(golden.json("dar/config.json")[f"tokenizer_{variant}"])
            built[variant] = build_tokenizer_parts(convert_diffusion_tokenizer_state(raw, settings))
        return built[variant]

    return build

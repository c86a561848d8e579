"""Pipelines of tiny real networks."""

from pathlib import Path

import pytest

from isthmus.next_scale.pipeline import NextScalePipeline
from tests.pipelines.tiny import tiny_pipeline


def labelled(scale_attention: str) -> NextScalePipeline:
    return tiny_pipeline(scale_attention=scale_attention, sampling_defaults={"guidance_scale": 2.0, "top_k": 8})


@pytest.fixture
def pipe() -> NextScalePipeline:
    """A labelled pipeline."""
    return labelled("markov")


@pytest.fixture(params=["markov", "causal"])
def either(request) -> NextScalePipeline:
    """A labelled pipeline of both kinds of attention."""
    return labelled(request.param)


@pytest.fixture(scope="session")
def saved(tmp_path_factory) -> Path:
    """A saved pipeline folder; tests that change it copy it first."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    data = {"name": "drawings", "attribution": "CC0"}
    tiny_pipeline(sampling_defaults={"guidance_scale": 2.0}, data=data).save_pretrained(folder)
    return folder

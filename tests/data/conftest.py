from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from isthmus.next_scale.tokenizer import MultiScaleVQVAE


def picture(number: int, *, width: int = 24, height: int = 16) -> Image.Image:
    """A picture that no other number has."""
    pixels = np.random.default_rng(number).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.NEAREST)


def save(number: int, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture(number).save(path)
    return path


@pytest.fixture
def cats_and_dogs(tmp_path: Path) -> Path:
    """Ten cats and six dogs."""
    root = tmp_path / "pets"
    for i in range(16):
        save(i, root / ("cat" if i < 10 else "dog") / f"{i}.png")
    return root


@pytest.fixture
def cache_dir(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture(scope="session")
def drawings_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where OpenMoji is drawn once for all tests."""
    return tmp_path_factory.mktemp("drawings")


def tiny_tokenizer(*, bias: float = 0.0) -> MultiScaleVQVAE:
    """Images of 8 pixels to 1 + 4 + 16 tokens; another `bias` is another tokenizer."""
    import torch

    with torch.random.fork_rng():
        torch.manual_seed(0)
        tokenizer = MultiScaleVQVAE(
            codebook_size=16,
            codebook_dim=4,
            scale_sizes=(1, 2, 4),
            base_channels=32,
            channel_multipliers=(1, 1),
            num_res_blocks=1,
        )
        with torch.no_grad():
            tokenizer.codebook.weight.add_(bias)
    return tokenizer.eval()

"""Held-out measures of tokenizers: which images, whose codes are the wrong ones, and what there is without codes."""

import pytest
import torch

from isthmus.dar.train_tokenizer import diffusion_tokenizer_scores
from isthmus.data.batches import EvaluationImages
from isthmus.next_scale.train_tokenizer import tokenizer_scores
from isthmus.nn.perceptual import psnr
from tests.pipelines.tiny import tiny_pipeline
from tests.pipelines.tiny_dar import tiny_dar


class Sorted(EvaluationImages):
    """Images of two classes, black then white, as a folder of classes gives them."""

    def __init__(self, count: int):
        self.count = count

    def __len__(self) -> int:
        return self.count

    def batch(self, indices):
        greys = torch.tensor([-1.0 if index < self.count // 2 else 1.0 for index in indices])
        return {"image": greys.view(-1, 1, 1, 1).expand(-1, 3, 8, 8)}


def test_the_wrong_codes_are_those_of_another_class_also_in_a_sorted_set():
    """A decoder that knows classes alone, and all of them: every right image is exact, every wrong one is not."""
    tokenizer = tiny_dar().image_tokenizer
    black, white = (tokenizer.encode(Sorted(2).batch([i])["image"]).quantized for i in range(2))
    assert not torch.equal(black, white)

    def decode(codes, numbers):
        is_white = (codes - white).square().sum(dim=(1, 2)) < (codes - black).square().sum(dim=(1, 2))
        return torch.where(is_white.view(-1, 1, 1, 1), 1.0, -1.0).expand(-1, 3, 8, 8)

    for limit in (6, 33, 40):  # a part, a rest of one in the last batch, all
        scores = diffusion_tokenizer_scores(tokenizer, decode, Sorted(40), limit=limit)
        inverse = psnr(torch.ones(1, 3, 8, 8), -torch.ones(1, 3, 8, 8)).item()
        exact = psnr(torch.ones(1, 3, 8, 8), torch.ones(1, 3, 8, 8)).item()
        assert scores["val/psnr"] == pytest.approx(exact)
        # an odd number leaves one image whose partner is of its own class
        wrong = (limit - limit % 2) / limit * inverse + (limit % 2) / limit * exact
        assert scores["val/psnr_shuffled"] == pytest.approx(wrong, abs=1e-3)


def test_a_single_image_has_no_gap():
    pipe = tiny_dar()
    scores = diffusion_tokenizer_scores(
        pipe.image_tokenizer, lambda codes, numbers: torch.zeros(len(codes), 3, 8, 8), Sorted(1), limit=8
    )
    assert scores["val/gap"] == 0


def test_without_a_codebook_what_the_latents_give_is_measured():
    tokenizer, views = tiny_pipeline().image_tokenizer, Sorted(4)
    images = views.batch(range(4))["image"]
    plain = tokenizer_scores(tokenizer, views, quantize=False)
    decoded = tokenizer.decode_features(tokenizer.latents(images))
    assert plain == {"val/psnr": pytest.approx(psnr(decoded, images).mean().item())}
    quantized = tokenizer_scores(tokenizer, views)
    assert quantized["val/psnr"] == quantized["val/psnr_scale2"] != plain["val/psnr"]

    pipe = tiny_dar()
    scores = diffusion_tokenizer_scores(
        pipe.image_tokenizer, lambda codes, numbers: torch.zeros(len(codes), 3, 8, 8), views, limit=8, quantize=False
    )
    assert set(scores) == {"val/psnr", "val/psnr_shuffled", "val/gap"}

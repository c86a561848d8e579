import math

import numpy as np
import PIL.Image
import pytest
import torch
from torch.testing import assert_close

from isthmus.errors import UserError
from isthmus.next_scale.pipeline import NextScalePipeline
from tests.pipelines.tiny import tiny_pipeline
from tests.testers import NETWORK


@pytest.fixture
def images():
    return torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_tokens_there_and_back(pipe, images):
    tokens = pipe.encode(images)
    assert [tuple(ids.shape) for ids in tokens] == [(3, 1), (3, 4), (3, 16)]
    assert_close(pipe.decode(tokens, output_type="pt"), pipe.reconstruct(images, output_type="pt"), **NETWORK)
    expected = pipe.image_tokenizer.decode(tokens).detach().add(1).div(2)
    assert_close(pipe.decode(tokens, output_type="pt"), expected, **NETWORK)
    coarse = pipe.reconstruct(images, 2, output_type="pt")
    assert_close(coarse, pipe.decode(tokens[:2], output_type="pt"), **NETWORK)
    assert not torch.equal(coarse, expected)
    assert_close(pipe.decode(tokens, output_type="latent"), pipe.image_tokenizer.features_up_to(tokens, 2).detach())


def test_what_is_drawn_decodes_to_what_was_shown(pipe):
    drawn = pipe([0, 1], seed=3, output_type="pt")
    assert_close(pipe.decode(drawn.token_ids, output_type="pt"), drawn.images, atol=1e-4, rtol=0)


def test_pictures_and_tensors_are_the_same_images(pipe):
    picture = PIL.Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8))
    tensor = torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1).float().div(127.5).sub(1)
    for one, other in zip(pipe.encode(picture), pipe.encode(tensor), strict=True):
        assert torch.equal(one, other)


def test_likelihoods_of_images_and_of_their_tokens(either, images):
    labels = ["face", 2, None]
    log_p, tokens = either.log_prob(images, labels), either.encode(images)
    assert log_p.shape == (3,)
    assert_close(either.log_prob(token_ids=tokens, class_labels=labels), log_p)
    assert_close(either.elbo(images, labels), log_p)
    bits = either.bits_per_token(images, labels)
    assert bits.shape == (3, 21)
    assert_close(bits.sum(dim=1), -log_p / math.log(2))
    assert_close(either.bits_per_pixel(images, labels), bits.sum(dim=1) / 64)
    for i, label in enumerate(labels):
        assert_close(either.log_prob(images[i], label)[0], log_p[i])
    assert_close(either.log_prob(images), either.log_prob(images, [None] * 3))


def test_more_images_than_go_through_at_once(pipe):
    images = torch.rand(35, 3, 8, 8, generator=torch.Generator().manual_seed(1)) * 2 - 1
    assert_close(pipe.log_prob(images, 0)[[0, 33]], pipe.log_prob(images[[0, 33]], 0))
    assert pipe.signal_to_noise(images).shape == (3,)


class Hungry(NextScalePipeline):
    """A pipeline of which no machine holds two images at once."""

    def bytes_per_image(self, *, guided: bool) -> int:
        return 2**62


def test_results_do_not_depend_on_how_many_images_fit(either, images):
    hungry = Hungry(either.image_tokenizer, either.transformer, class_names=either.class_names)
    rows = []
    hook = either.transformer.register_forward_pre_hook(lambda module, inputs: rows.append(len(inputs[0])))
    alone = hungry.log_prob(images, ["face", 2, None])
    together = either.log_prob(images, ["face", 2, None])
    hook.remove()
    assert rows == [1, 1, 1, 3]
    assert_close(alone, together)
    for one, other in zip(hungry.encode(images), either.encode(images), strict=True):
        assert torch.equal(one, other)
    decoded = hungry.decode(either.encode(images), output_type="pt")
    assert_close(decoded, either.reconstruct(images, output_type="pt"), **NETWORK)
    assert_close(hungry.elbo(images, 1), either.elbo(images, 1), **NETWORK)
    assert_close(hungry.evidence(images, 1), either.evidence(images, 1), **NETWORK)
    assert_close(hungry.signal_to_noise(images), either.signal_to_noise(images))
    options = {"num_views": 2, "seed": 3}
    one, other = (each.classify(images, **options) for each in (hungry, either))
    assert torch.equal(one.class_labels, other.class_labels)
    assert_close(one.scores.nats, other.scores.nats, atol=1e-4, rtol=0)


def test_an_unlabelled_model_needs_no_labels(images):
    assert tiny_pipeline(num_classes=0).log_prob(images).shape == (3,)


def test_what_cannot_be_used_is_refused_in_words(pipe, images):
    token_ids, small = pipe.encode(images), PIL.Image.new("RGB", (8, 1))
    for call, said in [
        (lambda: pipe.log_prob(), "both or neither"),
        (lambda: pipe.log_prob(images, token_ids=token_ids), "both or neither"),
        (lambda: pipe.log_prob(images, [0, 1]), r"one per image \(3\)"),
        (lambda: pipe.log_prob(images, "fcae"), "Did you mean face"),
        (lambda: pipe.elbo(token_ids=[]), "one tensor"),
        (lambda: pipe.log_prob(token_ids=token_ids[:2]), "one tensor"),
        (lambda: pipe.log_prob(token_ids=[ids[:, :3] for ids in token_ids]), "one tensor"),
        (lambda: pipe.log_prob(token_ids=[ids + 16 for ids in token_ids]), r"0\.\.15"),
        (lambda: pipe.log_prob(token_ids=[ids - 16 for ids in token_ids]), r"0\.\.15"),
        (lambda: pipe.decode([]), "one tensor"),
        (lambda: pipe.decode([torch.full((1, 1), 16)]), r"0\.\.15"),
        (lambda: pipe.decode(token_ids * 2), "one tensor"),
        (lambda: pipe.reconstruct(images, 0), r"1\.\.3"),
        (lambda: pipe.reconstruct(images, 4), r"1\.\.3"),
        (lambda: pipe.encode(torch.zeros(1, 3, 16, 16)), "8 x 8"),
        (lambda: pipe.encode([]), "at least one image"),
        (lambda: pipe.encode(small), "at least 2 x 2"),
        (lambda: pipe.log_prob([small], 0), "at least 2 x 2"),
        (lambda: pipe.classify(small), "at least 2 x 2"),
        (lambda: pipe.signal_to_noise(images * 3), r"\[-1, 1\]"),
    ]:
        with pytest.raises(UserError, match=said):
            call()

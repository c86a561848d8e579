import numpy as np
import pytest
import torch
from torch.testing import assert_close

from isthmus.dar.decoder import FlowDecoder
from isthmus.dar.decoding import image_noise
from isthmus.dar.pipeline import DARPipeline
from isthmus.dar.scheduler import FlowMatchingScheduler
from isthmus.dar.tokenizer import DiffusionTokenizer
from isthmus.errors import UserError
from isthmus.nn.guidance import GuidanceSchedule
from isthmus.pipelines.options import SamplingOptions
from tests.pipelines.tiny_dar import tiny_dar
from tests.testers import NETWORK


@pytest.fixture(scope="module")
def pipe() -> DARPipeline:
    """A labelled pipeline; do not modify it."""
    return tiny_dar(sampling_defaults={"guidance_scale": 2.0, "top_k": 8})


@pytest.fixture
def image() -> torch.Tensor:
    return torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_labels_images_and_tokens(pipe):
    result = pipe(["flag", 0, None], seed=1)
    assert result.token_ids.shape == (3, 16) and 0 <= result.token_ids.min() and result.token_ids.max() < 16
    assert pipe("face", num_images=2, seed=1, height=4, width=12).images[0].size == (12, 4)


@pytest.mark.slow
@pytest.mark.parametrize(("num_steps", "preview"), [(None, "solver"), (1, "jump"), (3, "solver"), (16, "jump")])
def test_stream_shows_every_step_and_ends_with_the_image(pipe, num_steps, preview):
    called = pipe([0, 1], seed=3, output_type="pt", num_inference_steps=num_steps)
    steps = list(pipe.stream([0, 1], seed=3, output_type="pt", num_inference_steps=num_steps, preview=preview))
    total = num_steps or 4
    assert [(s.index, s.total) for s in steps] == [(i, total) for i in range(total)]
    assert len(pipe.step_names(total)) == total
    assert torch.equal(torch.cat([s.token_ids for s in steps], dim=1), called.token_ids)
    assert torch.equal(steps[-1].preview, called.images)
    again = pipe.decode(called.token_ids, seed=3, output_type="pt", num_inference_steps=num_steps)
    assert_close(again, called.images, atol=1e-4, rtol=0)


def test_later_tokens_cannot_change_an_earlier_preview(pipe):
    one = pipe("face", seed=3).token_ids
    other = one.clone()
    other[:, 8:] = (other[:, 8:] + 1) % 16
    first, second = (list(pipe.stream("face", seed=3, prefix_token_ids=ids, output_type="pt")) for ids in (one, other))
    assert all(torch.equal(a.preview, b.preview) for a, b in zip(first[:2], second[:2], strict=True))
    assert not torch.equal(first[2].preview, second[2].preview)


@pytest.mark.slow
def test_weights_laid_out_once_draw_the_same_images(pipe):
    decoder = pipe.llama_decoder(num_images=2)
    for seed in (1, 2):
        again = pipe([0, 1], seed=seed, llama_decoder=decoder)
        assert torch.equal(again.token_ids, pipe([0, 1], seed=seed).token_ids)
    steps = list(pipe.stream([0, 1], seed=2, llama_decoder=decoder))
    assert torch.equal(torch.cat([s.token_ids for s in steps], dim=1), again.token_ids)
    other = tiny_dar(num_classes=1).llama_decoder()
    with pytest.raises(UserError, match="those of another prior"):
        pipe([0], llama_decoder=other)
    # a prior of the same sizes is another one, and one that was moved or cast is not what was laid out
    moved = tiny_dar()
    with pytest.raises(UserError, match="those of another prior"):
        moved([0], llama_decoder=decoder)
    before = moved.llama_decoder()
    moved.to(torch.bfloat16)
    with pytest.raises(UserError, match="before it was moved or cast"):
        moved([0], llama_decoder=before)


@pytest.mark.slow
def test_8_bit_weights_keep_the_seed_law(pipe):
    """Also beyond the rows that the kernel takes at once, and where prefixes make many rows of few images."""
    decoder = pipe.llama_decoder(int8=True)
    labels, prefix = [0, 1, 2] * 6, torch.arange(18 * 13).view(18, 13) % 16
    for kept in (0, 13):
        steered = {"prefix_token_ids": prefix[:, :kept]} if kept else {}
        together = pipe(labels, seed=1, llama_decoder=decoder, **steered)
        for i in (1, 17):
            steered = {"prefix_token_ids": prefix[i, :kept]} if kept else {}
            alone = pipe(labels[i], seed=1, image_index=i, llama_decoder=decoder, **steered)
            assert torch.equal(together.token_ids[i : i + 1], alone.token_ids)


def test_tokens_may_be_lists_as_servers_return_them(pipe):
    drawn = pipe([0, 1], seed=1).token_ids
    images = pipe.decode(drawn, output_type="pt")
    assert torch.equal(pipe.decode(drawn.tolist(), output_type="pt"), images)
    assert torch.equal(pipe.decode(drawn[0].tolist(), output_type="pt"), images[:1])
    assert_close(
        pipe.log_prob(token_ids=drawn.tolist(), class_labels=[0, 1]),
        pipe.log_prob(token_ids=drawn, class_labels=[0, 1]),
    )
    prefixed = pipe([0, 1], seed=2, prefix_token_ids=drawn[:, :5].tolist()).token_ids
    assert torch.equal(prefixed[:, :5], drawn[:, :5])
    for given, said in (
        ([[1, 2], [3]], "equally many"),
        (torch.rand(1, 16), "must be integers"),
        ([[[1, 2], [3, 4]]], "shape"),
        (torch.zeros(1, 17, dtype=torch.long), "an image has 16 tokens"),
        ([16] * 16, "0..15"),
    ):
        with pytest.raises(UserError, match=said):
            pipe.decode(given)
        with pytest.raises(UserError, match=said):
            pipe.restart(images[:1] * 2 - 1, 0.5, token_ids=given)
    with pytest.raises(UserError, match=r"0\.\.15"):
        pipe.image_tokenizer.condition(torch.full((1, 16), 16))


def test_options_may_differ_from_image_to_image(pipe):
    schedule = GuidanceSchedule("linear", 1.0, 4.0, last_guided_step=9)
    each = [SamplingOptions(guidance_scale=schedule), SamplingOptions(top_k=2, temperature=0.7), SamplingOptions()]
    together = pipe(["face", "flag", None], seed=5, image_options=each)
    for i, (label, options) in enumerate(zip(["face", "flag", None], each, strict=True)):
        alone = pipe(label, seed=5, image_index=i, image_options=[options])
        assert torch.equal(alone.token_ids, together.token_ids[i : i + 1])
    narrowed = pipe(["face", "flag", None], seed=5, image_options=each, top_k=1)
    assert torch.equal(
        narrowed.token_ids[1:2], pipe("flag", seed=5, image_index=1, guidance_scale=1, top_k=1).token_ids
    )


def test_a_prefix_is_kept_and_the_rest_drawn_anew(pipe, image):
    token_ids, labels, found = pipe.encode(image), ["face", "flag"], {}
    for kept in (0, 1, 5, 16):
        found[kept] = pipe(labels, seed=2, prefix_image=image, prefix_tokens=kept).token_ids
        assert torch.equal(found[kept][:, :kept], token_ids[:, :kept].expand(2, -1))
        again = pipe(labels, seed=2, prefix_token_ids=token_ids[0, :kept]).token_ids
        assert torch.equal(again, found[kept])
    assert torch.equal(found[0], pipe(labels, seed=2).token_ids)
    decoded = pipe.decode(token_ids, seed=2, output_type="latent")
    drawn = pipe("face", seed=2, prefix_token_ids=token_ids, output_type="latent")
    assert_close(drawn.images, decoded, atol=1e-4, rtol=0)


def test_prefixes_may_differ_from_image_to_image(pipe, image):
    others = torch.cat([image, -image])
    token_ids = pipe.encode(others)
    together = pipe(["face", "flag"], seed=2, prefix_image=others, prefix_tokens=[3, 9]).token_ids
    for i, (label, kept) in enumerate([("face", 3), ("flag", 9)]):
        assert torch.equal(together[i, :kept], token_ids[i, :kept])
        alone = pipe(label, seed=2, image_index=i, prefix_token_ids=token_ids[i], prefix_tokens=kept)
        assert torch.equal(alone.token_ids[0], together[i])


def test_variations_keep_whole_groups(pipe, image):
    token_ids = pipe.encode(image)
    varied = pipe.variations(image, 2, "flag", num_images=3, seed=1)
    assert torch.equal(varied.token_ids[:, :8], token_ids[:, :8].expand(3, -1))
    assert len({tuple(row.tolist()) for row in varied.token_ids}) == 3
    with pytest.raises(UserError, match=r"0\.\.4 .*got 5"):
        pipe.variations(image, 5)


def test_a_restart_runs_the_last_steps_from_the_image(pipe, image):
    token_ids = pipe.encode(image)
    whole = pipe.restart(image, 1.0, seed=4, output_type="latent")
    assert_close(whole, pipe.reconstruct(image, seed=4, output_type="latent"), **NETWORK)
    # by hand: two steps of Euler from the third time on
    t, noise = pipe.scheduler.times(), image_noise([(4, 0)], 8, 8)
    x = t[2] * 0.6 * image + (1 - t[2]) * noise
    with torch.no_grad():
        condition = pipe.image_tokenizer.condition(token_ids)
        for step in (2, 3):
            window = condition[:, 4 * step : 4 * step + 4]
            x = x + (t[step + 1] - t[step]) * pipe.decoder(x, t[step : step + 1], window)
    half = pipe.restart(image, 0.5, seed=4, solver="euler", output_type="latent")
    assert_close(half, x / 0.6, **NETWORK)
    other = pipe("flag", seed=1).token_ids
    assert pipe.restart(image, 0.25, token_ids=other.expand(2, -1), seed=4, output_type="pt").shape == (2, 3, 8, 8)
    for bad in (0.0, 1.5, -1):
        with pytest.raises(UserError, match=r"\(0, 1\]"):
            pipe.restart(image, bad)


def test_reconstructions_keep_the_size_of_tensors(pipe, image):
    wide = torch.cat([image, image], dim=3)
    assert pipe.reconstruct(wide, output_type="pt").shape == (1, 3, 8, 16)
    (picture,) = pipe.reconstruct(image)
    assert picture.size == (8, 8)
    assert_close(
        pipe.reconstruct(image, output_type="pt"), pipe.decode(pipe.encode(image), output_type="pt"), atol=1e-6, rtol=0
    )


def test_likelihoods_add_up(pipe):
    token_ids = pipe(["face", "flag"], seed=1).token_ids
    nats = pipe.log_prob(token_ids=token_ids, class_labels=["face", "flag"])
    bits = pipe.bits_per_token(token_ids=token_ids, class_labels=["face", "flag"])
    assert bits.shape == (2, 16)
    assert_close(bits.sum(dim=1) * np.log(2), -nats, atol=1e-4, rtol=1e-5)
    # by the chain rule, one token after the other
    with torch.no_grad():
        total = 0.0
        for position in range(16):
            ids = torch.cat([torch.tensor([[16]]), token_ids[:1, :position]], dim=1)
            logits = pipe.transformer(input_ids=ids).logits[0, -1, :16]
            total += logits.log_softmax(dim=-1)[token_ids[0, position]].item()
    assert nats[0].item() == pytest.approx(total, abs=1e-3)
    assert not torch.allclose(nats, pipe.log_prob(token_ids=token_ids))


def test_likelihoods_of_images_are_those_of_their_tokens(pipe, image):
    assert_close(pipe.log_prob(image, "face"), pipe.log_prob(token_ids=pipe.encode(image), class_labels=[0]))
    with pytest.raises(UserError, match="both or neither"):
        pipe.log_prob()
    with pytest.raises(UserError, match="both or neither"):
        pipe.log_prob(image, token_ids=pipe.encode(image))
    for token_ids, labels, said in (
        (pipe.encode(image), ["face", "flag"], "a class label per image"),
        (torch.zeros(2, 16, dtype=torch.long), ["face"] * 3, "a class label per image"),
        (torch.zeros(1, 0, dtype=torch.long), "face", r"1\.\.16 tokens"),
        (torch.zeros(1, 17, dtype=torch.long), "face", "16 tokens"),
        (torch.full((1, 16), 16), "face", r"0\.\.15"),
        (torch.full((1, 16), -1), "face", r"0\.\.15"),
    ):
        with pytest.raises(UserError, match=said):
            pipe.log_prob(token_ids=token_ids, class_labels=labels)


def test_options_of_this_family_are_refused_in_words(pipe):
    for arguments, said in [
        ({"image_options": []}, "per image, got 0"),
        ({"image_options": [SamplingOptions(smooth=True)]}, "smooth"),
        ({"temperature": (1.0, 0.5)}, "one temperature"),
        ({"image_options": [SamplingOptions(top_k=17)]}, r"1\.\.16"),
        ({"num_inference_steps": 0}, "at least 1"),
        ({"height": 7}, "multiples of 2"),
        ({"height": 0}, "multiples of 2"),
        ({"width": 3}, "multiples of 2"),
        ({"prefix_tokens": 3}, "prefix_image"),
        ({"prefix_image": torch.zeros(3, 8, 8)}, "prefix_tokens"),
        ({"prefix_image": torch.zeros(3, 8, 8), "prefix_tokens": 17}, r"0\.\.16"),
        ({"prefix_image": torch.zeros(3, 8, 8), "prefix_tokens": -1}, r"0\.\.16"),
        ({"prefix_image": torch.zeros(3, 8, 8), "prefix_tokens": [1, 2]}, r"one per image \(1\)"),
        ({"prefix_image": torch.zeros(2, 3, 8, 8), "prefix_tokens": 1}, "one for each"),
        ({"prefix_image": torch.full((3, 8, 8), float("nan")), "prefix_tokens": 1}, "finite"),
        ({"prefix_image": torch.zeros(3, 8, 7), "prefix_tokens": 1}, "multiples of 4"),
        ({"prefix_image": torch.zeros(3, 8, 8), "prefix_token_ids": torch.tensor([1])}, "got both"),
        ({"prefix_token_ids": torch.zeros(17, dtype=torch.long)}, "an image has 16 tokens"),
        ({"prefix_token_ids": torch.tensor([16])}, r"0\.\.15"),
        ({"prefix_token_ids": torch.tensor([-1])}, r"0\.\.15"),
        ({"prefix_token_ids": torch.zeros(2, 3, dtype=torch.long)}, "one for each"),
        ({"prefix_token_ids": torch.zeros(4, dtype=torch.long), "prefix_tokens": [5]}, r"0\.\.4"),
    ]:
        for function in (pipe, pipe.stream):
            with pytest.raises(UserError, match=said):
                function(**arguments)  # at once, not at the first step


def test_tokens_that_cannot_be_decoded(pipe, image):
    with pytest.raises(UserError, match="need 16 tokens, got 15"):
        pipe.decode(torch.zeros(1, 15, dtype=torch.long))
    with pytest.raises(UserError, match=r"0\.\.15"):
        pipe.decode(torch.full((1, 16), 16))
    with pytest.raises(UserError, match="multiples of 4"):
        pipe.encode(image[..., :7])
    with pytest.raises(UserError, match="whole groups"):
        pipe.image_tokenizer.condition(torch.zeros(1, 3, dtype=torch.long))


def test_components_that_do_not_belong_together():
    good = tiny_dar()
    parts = dict(good.components)
    tokenizer = {k: v for k, v in good.image_tokenizer.config.items() if not k.startswith("_")}
    decoder = {k: v for k, v in good.decoder.config.items() if not k.startswith("_")}
    for changes, said in [
        ({"image_tokenizer": DiffusionTokenizer(**tokenizer | {"codebook_size": 8})}, "codebook_size"),
        ({"image_tokenizer": DiffusionTokenizer(**tokenizer | {"num_tokens": 32})}, "num_tokens"),
        ({"image_tokenizer": DiffusionTokenizer(**tokenizer | {"quantized": False})}, "continuous"),
        ({"decoder": FlowDecoder(**decoder | {"condition_width": 8})}, "condition_width"),
        ({"decoder": FlowDecoder(**decoder | {"patch_size": 3})}, "patch_size"),
        ({"decoder": FlowDecoder(**decoder | {"canvas_tokens": 8})}, "canvas_tokens"),
        ({"scheduler": FlowMatchingScheduler(num_groups=2, num_tokens=16)}, "num_groups"),
        ({"scheduler": FlowMatchingScheduler(num_groups=4, num_tokens=16, tokens_per_step=8)}, "tokens_per_step"),
    ]:
        with pytest.raises(UserError, match=said):
            DARPipeline(**parts | changes)
    with pytest.raises(UserError, match="positions"):
        longer = DiffusionTokenizer(**tokenizer | {"num_tokens": 32})
        DARPipeline(**parts | {
            "image_tokenizer": longer, "scheduler": FlowMatchingScheduler(num_groups=4, num_tokens=32)
        })  # fmt: skip


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_images_on_a_gpu_follow_the_same_law():
    pipe = tiny_dar(sampling_defaults={"guidance_scale": 2.0}).to("cuda")
    together = pipe(["face", "flag", None], seed=7, output_type="pt")
    for i, label in enumerate(["face", "flag", None]):
        alone = pipe(label, seed=7, image_index=i, output_type="pt")
        assert torch.equal(alone.token_ids, together.token_ids[i : i + 1])
        assert_close(alone.images[0], together.images[i], atol=1e-4, rtol=0)


def test_a_compiled_llama_is_refused_from_the_start():
    parts = tiny_dar().components
    parts["transformer"] = torch.compile(parts["transformer"], backend="eager")
    with pytest.raises(UserError, match="compiled.*--compile"):
        DARPipeline(**parts)

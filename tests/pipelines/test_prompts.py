"""Prompts in the next-scale pipeline: what is drawn, edited, measured and saved."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from isthmus.cli.info import describe_model, upload_contents
from isthmus.errors import UserError
from isthmus.next_scale.pipeline import NextScalePipeline
from isthmus.next_scale.transformer import NextScaleTransformer
from isthmus.pipelines.loading import load_pipeline
from isthmus.text.encoders import SmallTextEncoder, TextFeatures
from isthmus.text.pretrained import PretrainedTextEncoder
from tests.pipelines.tiny import SIZED, tiny_pipeline, tiny_text_pipeline
from tests.testers import token_hashes
from tests.text.test_pretrained import write_network

PROMPTS = ["a critter, dome body", "", "a planet with a banded surface and a dark teal background"]


def half(image):
    mask = torch.zeros_like(image[:, :1])
    mask[..., 4:] = 1
    return mask


@pytest.fixture(scope="module", params=["markov", "causal"])
def pipe(request):
    return tiny_text_pipeline(scale_attention=request.param, sampling_defaults={"guidance_scale": 2.0})


@pytest.fixture(scope="module")
def one():
    return tiny_text_pipeline(sampling_defaults={"guidance_scale": 2.0})


def test_a_batch_of_prompts_equals_single_ones(pipe):
    together = pipe(prompt=PROMPTS, seed=1)
    alone = [pipe(prompt=prompt, seed=1, image_index=i) for i, prompt in enumerate(PROMPTS)]
    assert token_hashes(together.token_ids) == [token_hashes(each.token_ids)[0] for each in alone]
    assert together.prompts == PROMPTS and len(set(token_hashes(pipe(prompt=PROMPTS, seed=[1] * 3).token_ids))) == 3


def test_no_prompt_is_the_empty_one(pipe):
    drawn = token_hashes(pipe(prompt="", seed=3).token_ids)
    assert drawn == token_hashes(pipe(seed=3).token_ids)
    with torch.no_grad():
        made = pipe.text_encoder.encode([""])
    assert torch.equal(made.hidden, pipe.null_text.hidden) and torch.equal(made.pooled, pipe.null_text.pooled)
    assert drawn == token_hashes(pipe(text=made, seed=3).token_ids)


def test_padding_and_where_a_text_was_read_change_nothing(pipe):
    text = pipe.text_encoder.encode(PROMPTS)
    wide = text.padded(40)
    wide.hidden[~wide.mask] = 9.0
    drawn = token_hashes(pipe(prompt=PROMPTS, seed=2).token_ids)
    for given in (text, wide):
        result = pipe(text=given, seed=2)
        assert token_hashes(result.token_ids) == drawn and result.prompts is None


def test_another_encoder_brings_its_own_null_text():
    pipe = tiny_text_pipeline(sampling_defaults={"guidance_scale": 3.0})
    with torch.random.fork_rng():
        torch.manual_seed(7)
        other = SmallTextEncoder(width=12, num_layers=1).eval()
    new = NextScalePipeline(
        pipe.image_tokenizer, pipe.transformer, text_encoder=other, sampling_defaults={"guidance_scale": 3.0}
    )
    reader = pipe.text_reader()
    pipe.text_encoder = other
    assert torch.equal(pipe.null_text.pooled, new.null_text.pooled) and pipe.fingerprint == new.fingerprint
    assert token_hashes(pipe(prompt=PROMPTS, seed=1).token_ids) == token_hashes(new(prompt=PROMPTS, seed=1).token_ids)
    with pytest.raises(UserError, match="another text encoder"):
        pipe(prompt="a cat", text_reader=reader)
    with pytest.raises(UserError, match="must have the text_width"):
        pipe.text_encoder = SmallTextEncoder(width=24)
    assert pipe.text_encoder is other
    pipe.text_encoder = None
    assert torch.equal(pipe.null_text.pooled, new.null_text.pooled)
    with pytest.raises(UserError, match="reads no text"):
        tiny_pipeline().text_encoder = other


def test_words_are_read_once_and_their_keys_made_once(one, monkeypatch):
    read, made = [], []
    words = one.transformer.shared_text
    encode, keys_values = one.text_encoder.encode, words.forward
    monkeypatch.setattr(one.text_encoder, "encode", lambda prompts: read.extend(prompts) or encode(prompts))
    monkeypatch.setattr(words, "forward", lambda words, mask: made.append(len(words)) or keys_values(words, mask))
    one(prompt=["a cat", "a dog", "a cat", ""], num_images_per_class=2, seed=0)
    assert read == ["a cat", "a dog"] and made == [3]
    one(prompt="a cat", negative_prompt="a dog", seed=0)
    assert read[2:] == ["a dog", "a cat"] and made[1:] == [2]


def test_a_negative_prompt_stands_for_the_empty_one(one):
    drawn = [
        token_hashes(one(prompt="a cat", seed=range(9), num_images=9, negative_prompt=words).token_ids)
        for words in (None, "", "a dog")
    ]
    assert drawn[0] == drawn[1] != drawn[2]
    # nothing to lead away from
    unguided = one(prompt="a cat", seed=4, guidance_scale=1).token_ids
    assert token_hashes(one(prompt="a cat", seed=4, negative_prompt="a cat").token_ids) == token_hashes(unguided)
    # the empty prompt is a prompt like any other
    one(prompt=["", "a cat"], seed=0, negative_prompt="a dog")


def test_the_last_picture_of_a_stream_is_that_of_a_call(one):
    *_, last = one.stream(prompt=PROMPTS, seed=1, output_type="pt")
    assert torch.equal(last.preview, one(prompt=PROMPTS, seed=1, output_type="pt").images)


@pytest.mark.parametrize("attention", ["markov", "causal"])
def test_images_are_drawn_as_if_they_had_a_size(attention):
    one = tiny_text_pipeline(scale_attention=attention, design=SIZED, sampling_defaults={"guidance_scale": 2.0})
    asked = {"prompt": "a cat", "num_images": 9, "seed": 1}
    draw = lambda sizes, **more: one(**asked, image_size_condition=sizes, **more)  # noqa: E731
    plain, wide = token_hashes(one(**asked).token_ids), token_hashes(draw((64, 640)).token_ids)
    assert plain == token_hashes(draw((512, 512)).token_ids) != wide
    mixed = token_hashes(draw(torch.tensor([[64, 640], [512, 512]] * 4 + [[64, 640]])).token_ids)
    assert mixed == [(wide, plain)[i % 2][i] for i in range(9)]
    *_, last = one.stream(**asked, image_size_condition=[64, 640], output_type="pt")
    image = draw((64, 640), output_type="pt").images
    assert torch.equal(last.preview, image)
    edit = lambda sizes: one.variations(image[:1] * 2 - 1, 1, **asked, image_size_condition=sizes).token_ids  # noqa: E731
    assert token_hashes(edit((64, 640))) != token_hashes(edit(None))
    for sizes, said in (
        ((512,), "a height and a width"), ([[1, 2]] * 2, "a pair for each of 9"), ((0, 512), "got 0"),
        ((1.5, 2), "must be a whole number"), ("512", "a height and a width"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=said):
            one.stream(**asked, image_size_condition=sizes)
    with pytest.raises(UserError, match="no size condition"):
        tiny_pipeline().stream(0, image_size_condition=(512, 768))


def test_a_class_model_with_a_branch_for_text_equals_itself():
    plain = tiny_pipeline(sampling_defaults={"guidance_scale": 2.0})
    config = plain.transformer.config | {"text_width": 12, "text_pooled_width": 12}
    grown = NextScaleTransformer(**config)
    missing, unexpected = grown.load_state_dict(plain.transformer.state_dict(), strict=False)
    assert not unexpected and all("text" in name for name in missing)
    more = NextScalePipeline(plain.image_tokenizer, grown.eval(), text_encoder=SmallTextEncoder(width=12).eval())
    asked = {"class_labels": [0, 2], "seed": 5, "output_type": "pt"}
    assert torch.equal(more(prompt=["a cat", ""], **asked, guidance_scale=2.0).images, plain(**asked).images)
    nats = plain.log_prob(plain(**asked).images * 2 - 1, [0, 2])
    assert torch.equal(more.log_prob(plain(**asked).images * 2 - 1, [0, 2], prompt="a cat"), nats)


@pytest.mark.parametrize("method", ["inpaint", "edit_class", "outpaint", "super_resolve", "variations"])
def test_edits_follow_prompts(one, method):
    image = one(prompt="a cat", seed=0, output_type="pt").images * 2 - 1
    mask = half(image)
    given = {"outpaint": {"left": 8}, "super_resolve": {}, "variations": {"from_scale": 0}}.get(method, {"mask": mask})
    image = image[..., :4, :4] if method == "super_resolve" else image
    edit = lambda **more: getattr(one, method)(image, **given, seed=range(9), num_images=9, **more)  # noqa: E731
    told = edit(prompt="a dog")
    assert told.prompts == ["a dog"] * 9
    assert token_hashes(told.token_ids) != token_hashes(edit(prompt="two striped zebras").token_ids)
    with pytest.raises(UserError, match="takes one prompt or 9, got 2"):
        edit(prompt=["a", "b"])


def test_a_picture_of_words_is_likelier_under_them(pipe):
    drawn = pipe(prompt=PROMPTS, seed=1, guidance_scale=1)
    under = {"token_ids": drawn.token_ids, "prompt": PROMPTS}
    nats = pipe.log_prob(**under)
    torch.testing.assert_close(pipe.elbo(**under), nats)
    torch.testing.assert_close(pipe.bits_per_token(**under).sum(dim=1) * -0.6931471805599453, nats)
    each = [pipe.log_prob(token_ids=[ids[i : i + 1] for ids in drawn.token_ids], prompt=PROMPTS[i]) for i in range(3)]
    torch.testing.assert_close(torch.cat(each), nats)
    torch.testing.assert_close(pipe.log_prob(token_ids=drawn.token_ids, text=pipe.text_encoder.encode(PROMPTS)), nats)
    maps = pipe.evidence(token_ids=drawn.token_ids, prompt="a cat")
    null = pipe.log_prob(token_ids=drawn.token_ids)
    torch.testing.assert_close(
        maps.sum(dim=(1, 2)), pipe.log_prob(token_ids=drawn.token_ids, prompt="a cat") - null, rtol=1e-4, atol=1e-4
    )


def test_bayes_over_captions(pipe):
    images = pipe(prompt=PROMPTS, seed=7, guidance_scale=1, output_type="pt").images * 2 - 1
    found = pipe.classify(images, prompts=PROMPTS, top_k=3, prune_nats=None)
    nats = torch.stack([pipe.log_prob(images, prompt=prompt) for prompt in PROMPTS], dim=1)
    torch.testing.assert_close(found.scores.nats, nats)
    assert found.names == [[PROMPTS[i] for i in row] for row in found.class_labels.tolist()]
    torch.testing.assert_close(found.probabilities, nats.softmax(dim=1).sort(descending=True).values)


def test_saved_with_and_without_its_encoder(one, tmp_path):
    one.save_pretrained(tmp_path / "whole")
    one.save_pretrained(tmp_path / "less", text_encoder=False)
    whole, less = load_pipeline(tmp_path / "whole"), load_pipeline(tmp_path / "less")
    drawn = token_hashes(one(prompt=PROMPTS, seed=1).token_ids)
    assert whole.fingerprint == one.fingerprint and less.text_encoder is None
    assert drawn == token_hashes(whole(prompt=PROMPTS, seed=1).token_ids)
    assert drawn == token_hashes(less(text=one.text_encoder.encode(PROMPTS), seed=1).token_ids)
    assert token_hashes(less(seed=1).token_ids) == token_hashes(one(seed=1).token_ids)
    with pytest.raises(UserError, match="without its text encoder"):
        less(prompt="a cat")
    named = tiny_text_pipeline(data={"prompt": "a cat"}).card()
    assert '--prompt "a cat" --num 16' in named and "pipeline_tag: text-to-image" in named
    tiny_pipeline().save_pretrained(tmp_path / "classes")
    index = json.loads((tmp_path / "classes" / "model_index.json").read_text())
    assert "text_encoder" not in index and not (tmp_path / "classes" / "null_text.safetensors").exists()


def test_frozen_encoders_side_by_side_are_a_component_too(tmp_path):
    networks = [write_network(kind, tmp_path / kind) for kind in ("t5", "clip_with_projection")]
    made = tiny_text_pipeline(text_encoder=PretrainedTextEncoder.from_folders(*networks))
    made.save_pretrained(tmp_path / "m")
    loaded = load_pipeline(tmp_path / "m")
    assert isinstance(loaded.text_encoder, PretrainedTextEncoder) and loaded.fingerprint == made.fingerprint
    asked = {"prompt": ["a red cat", "", "the dog on a blue house"], "seed": 1, "guidance_scale": 2.0}
    assert token_hashes(loaded(**asked).token_ids) == token_hashes(made(**asked).token_ids)
    told = describe_model(tmp_path / "m")
    count = sum(weight.numel() for weight in made.text_encoder.parameters()) / 1e6
    assert f"{count:.2f}M parameters, PretrainedTextEncoder (T5EncoderModel, CLIPTextModelWithProjection)" in told
    assert "text_encoder/network_2/tokenizer.json" in upload_contents(tmp_path / "m")


def test_a_null_text_is_read_strictly(one, tmp_path):
    one.save_pretrained(tmp_path / "m")
    file = tmp_path / "m" / "null_text.safetensors"
    stored = load_file(file)
    more = stored | {"more": torch.zeros(1)}
    for wrong in ({"hidden": stored["hidden"]}, more, stored | {"mask": torch.ones(1, 9)}):
        save_file(wrong, file)
        with pytest.raises(UserError, match=r"null_text\.safetensors must hold one text"):
            load_pipeline(tmp_path / "m")
    file.write_bytes(b"no weights")
    with pytest.raises(UserError, match=r"null_text\.safetensors is truncated"):
        load_pipeline(tmp_path / "m")


def test_parts_that_do_not_belong_together(one):
    parts = {"image_tokenizer": one.image_tokenizer, "transformer": one.transformer}
    with pytest.raises(UserError, match="got neither"):
        NextScalePipeline(**parts)
    with pytest.raises(UserError, match="text_width of the transformer, 12, got 10"):
        NextScalePipeline(**parts, text_encoder=SmallTextEncoder(width=10))
    with pytest.raises(UserError, match="reads no text"):
        NextScalePipeline(one.image_tokenizer, tiny_pipeline().transformer, text_encoder=one.text_encoder)


def test_a_prompt_for_a_class_model_and_a_class_for_a_text_model(one):
    classes = tiny_pipeline()
    image = torch.zeros(1, 3, 8, 8)
    for asked in (
        lambda: classes(prompt="a cat"),
        lambda: classes.stream(negative_prompt="a cat"),
        lambda: classes.log_prob(image, prompt="a cat"),
        lambda: classes.classify(image, prompts=["a cat"]),
        lambda: classes.variations(image, 1, prompt="a cat"),
    ):
        with pytest.raises(UserError, match="reads no text, got the (negative_)?prompt.* Pass class_labels"):
            asked()
    for asked in (lambda: one("face"), lambda: one.log_prob(image, 0), lambda: one.inpaint(image, half(image), 1)):
        with pytest.raises(UserError, match="draws prompts and has no classes"):
            asked()


def test_odd_prompts_are_refused_at_once(one):
    text, image = one.text_encoder.encode(["a", "b"]), torch.zeros(3, 3, 8, 8)
    both = tiny_text_pipeline(num_classes=3)
    narrow = TextFeatures(text.hidden[..., :5], text.mask, text.pooled[..., :5])
    blank = TextFeatures(text.hidden, torch.zeros_like(text.mask), text.pooled)
    for said, ask in (
        ("as many prompts", lambda: both([0, 1], prompt=["a", "b", "c"])),
        ("got both", lambda: one(prompt="a", text=text)),
        ("a prompt is a text", lambda: one(prompt=3)),
        ("a prompt is a text", lambda: one(prompt=["a", None])),
        ("empty list", lambda: one(prompt=[])),
        ("of the transformer, 12, got 5", lambda: one(text=narrow)),
        ("at least one word", lambda: one(text=blank)),
        ("guidance_scale is 1", lambda: one(prompt="a", negative_prompt="b", guidance_scale=1)),
        ("one text for all", lambda: one(prompt="a", negative_prompt=["b"])),
        ("one class label or prompt, or one per image", lambda: one.log_prob(image, prompt=["a", "b"])),
        ("got both", lambda: both.classify(image, 0, prompts=["a", "b"])),
        ("named once", lambda: one.classify(image, prompts=["a", "a"])),
        ("Pass prompts", lambda: one.classify(image)),
        ("edit_class needs a prompt", lambda: one.edit_class(image, image[:, :1])),
        ("evidence for a prompt", lambda: one.evidence(image)),
    ):
        with pytest.raises(UserError, match=said):
            ask()


def test_classes_and_prompts_together():
    both = tiny_text_pipeline(num_classes=3, sampling_defaults={"guidance_scale": 2.0})
    together = both(["flag", None], prompt=["a cat", "a dog"], seed=1)
    assert together.class_labels == [1, 3] and together.prompts == ["a cat", "a dog"]
    assert token_hashes(together.token_ids)[:1] == token_hashes(both("flag", prompt="a cat", seed=1).token_ids)
    image = torch.zeros(1, 3, 8, 8)
    assert both.classify(image, top_k=3, prune_nats=None).scores.nats.shape == (1, 3)
    both.edit_class(image, half(image), prompt="a cat", seed=0)

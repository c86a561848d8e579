"""Prompts in the D-AR pipeline: words before the class, of which padding shows nothing."""

import json

import pytest
import torch
from torch.testing import assert_close

from isthmus.cli.info import describe_model, upload_contents
from isthmus.dar.llama_decoding import LlamaDecoder
from isthmus.dar.pipeline import DARPipeline
from isthmus.dar.prior import PaddedWords, next_token_inputs, next_token_logits
from isthmus.dar.train_prior import with_vocabulary
from isthmus.errors import UserError
from isthmus.nn.guidance import GuidanceSchedule
from isthmus.pipelines.loading import load_pipeline
from isthmus.pipelines.options import SamplingOptions
from isthmus.text.tokenizer import TextTokenizer
from tests.pipelines.tiny_dar import WORDS, tiny_dar
from tests.testers import NETWORK, needs_compiler, run_compiled

PROMPTS = ["a critter with a dome body", "", "a body with a dome", "critter"]


@pytest.fixture(scope="module")
def one() -> DARPipeline:
    """Prompts alone, guided; do not modify it."""
    return tiny_dar(num_classes=0, names=False, words=WORDS, sampling_defaults={"guidance_scale": 2.0})


@pytest.fixture(scope="module")
def both() -> DARPipeline:
    """Classes and prompts; do not modify it."""
    return tiny_dar(words=WORDS, sampling_defaults={"guidance_scale": 2.0})


def padded_to(words: PaddedWords, longest: int) -> PaddedWords:
    """The same with rows of that length, filled up with a code."""
    more = words.ids.new_full((len(words.ids), longest - words.ids.shape[1]), 3)
    return PaddedWords(torch.cat([more, words.ids], dim=1), words.lengths)


def test_padding_changes_nothing(both):
    layout, llama = both.token_layout, both.transformer
    words = layout.padded(WORDS.words(PROMPTS))
    labels, ids = torch.tensor([0, 3, 3, 1]), torch.randint(16, (4, 16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = next_token_logits(llama, layout, labels, ids, words)
        wider = next_token_logits(llama, layout, labels, ids, padded_to(words, 12))
        assert_close(wider, logits, **NETWORK)
        for row in range(4):
            own = next_token_inputs(layout, labels[row : row + 1], ids[row : row + 1], words=None)
            said = torch.tensor(WORDS.words(PROMPTS)[row], dtype=torch.long)[None] + layout.first_word
            # no mask at all: what the stock network reads of a prompt alone
            alone = llama(input_ids=torch.cat([said, own], dim=1)).logits[:, -17:, :16]
            assert_close(alone[0], logits[row], **NETWORK)


@pytest.mark.parametrize("fixed", [False, True])
def test_the_decode_loop_reads_padded_prompts_as_the_stock_network(both, fixed):
    layout = both.token_layout
    words = padded_to(layout.padded(WORDS.words(PROMPTS)), 11)
    labels, ids = torch.tensor([0, 3, 3, 1]), torch.randint(16, (4, 16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = next_token_logits(both.transformer, layout, labels, ids, words)
    decoder = LlamaDecoder(both.llama, layout)
    if fixed:  # what would be compiled, without the compiler
        decoder._fixed_step = decoder._at_position
    for rows in (None, torch.tensor([1, 0, 3, 2])):
        order = slice(None) if rows is None else rows
        inputs, cache = next_token_inputs(layout, labels, ids, words), decoder.new_cache(4)
        logits = [decoder.prefill(inputs[:, :14], cache, words.padding, rows)]
        # the last rows are left behind, as null rows are
        logits += [decoder.step(inputs[order][:3, p], cache) for p in range(14, 28)]
        for p, found in enumerate(logits, start=2):
            assert_close(found, expected[order][: len(found), p], **NETWORK)


def test_a_batch_of_prompts_equals_single_ones(both):
    labels = [0, None, None, 2]
    together = both(labels, prompt=PROMPTS, seed=1)
    assert together.prompts == PROMPTS and together.class_labels == [0, 3, 3, 2]
    for i, prompt in enumerate(PROMPTS):
        alone = both(labels[i], prompt=prompt, seed=1, image_index=i)
        assert torch.equal(alone.token_ids[0], together.token_ids[i])
    decoder = both.llama_decoder(int8=True)
    eight = both(labels, prompt=PROMPTS, seed=1, llama_decoder=decoder).token_ids
    for i, prompt in enumerate(PROMPTS):
        alone = both(labels[i], prompt=prompt, seed=1, image_index=i, llama_decoder=decoder)
        assert torch.equal(alone.token_ids[0], eight[i])


def test_no_prompt_is_the_empty_one_and_the_null_class_alone(one, both):
    drawn = one(prompt=["", ""], seed=3).token_ids
    assert torch.equal(drawn, one(num_images=2, seed=3).token_ids)
    # nothing to be guided away from
    assert torch.equal(drawn, one(num_images=2, seed=3, guidance_scale=1).token_ids)
    ids = one.encode(torch.zeros(1, 3, 8, 8))
    inputs = next_token_inputs(one.token_layout, torch.tensor([0]), ids[:, :-1])
    with torch.no_grad():
        logits = one.transformer(input_ids=inputs).logits[..., :16]
    nats = logits.log_softmax(dim=-1).gather(-1, ids[..., None]).sum()
    assert_close(one.log_prob(token_ids=ids)[0], nats)
    assert_close(both.log_prob(token_ids=ids, prompt=""), both.log_prob(token_ids=ids))


def test_guidance_leads_from_the_negative_prompt(one):
    draw = lambda **more: one(prompt=PROMPTS[0], seed=range(9), num_images=9, **more).token_ids  # noqa: E731
    plain = draw()
    assert torch.equal(plain, draw(negative_prompt="")) and not torch.equal(plain, draw(negative_prompt="a body"))
    assert torch.equal(draw(negative_prompt=PROMPTS[0]), draw(guidance_scale=1))
    assert not torch.equal(plain, draw(guidance_scale=1))
    # an image without words is led away from it too
    assert not torch.equal(
        one(num_images=9, seed=1, negative_prompt="a body").token_ids, one(num_images=9, seed=1).token_ids
    )
    stops = GuidanceSchedule("linear", 1.0, 4.0, last_guided_step=9)
    each = [SamplingOptions(guidance_scale=stops), SamplingOptions()]
    mixed = one(prompt=PROMPTS[:2], seed=5, image_options=each, negative_prompt="dome").token_ids
    alone = one(prompt=PROMPTS[0], seed=5, guidance_scale=stops, negative_prompt="dome").token_ids
    assert torch.equal(mixed[:1], alone)


def test_a_class_model_grown_by_words_draws_as_before():
    plain = tiny_dar(sampling_defaults={"guidance_scale": 2.0})
    layout = tiny_dar(words=WORDS).token_layout
    grown = with_vocabulary(plain.transformer, layout, kept={0: 0, 1: 1, 2: 2}).eval()
    assert grown.config.vocab_size == plain.transformer.config.vocab_size + WORDS.num_words
    embedding, before = grown.get_input_embeddings().weight, plain.transformer.get_input_embeddings().weight
    assert torch.equal(embedding[: len(before)], before) and not grown.lm_head.weight[16:].any()
    parts = plain.components | {"transformer": grown, "text_tokenizer": WORDS}
    more = DARPipeline(**parts, **plain.config)
    asked = {"class_labels": [0, 2, None], "seed": 5, "output_type": "pt"}
    assert torch.equal(more(**asked).token_ids, plain(**asked).token_ids)
    assert torch.equal(more(**asked).images, plain(**asked).images)
    ids = plain(**asked).token_ids
    assert_close(
        more.log_prob(token_ids=ids, class_labels=[0, 2, None]), plain.log_prob(None, [0, 2, None], token_ids=ids)
    )


def test_streams_prefixes_and_variations_follow_prompts(one):
    drawn = one(prompt=PROMPTS, seed=1, output_type="pt")
    *_, last = one.stream(prompt=PROMPTS, seed=1, output_type="pt")
    assert torch.equal(last.preview, drawn.images)
    image = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    kept = one(prompt=PROMPTS, seed=2, prefix_image=image, prefix_tokens=[5, 0, 16, 3])
    for i, length in enumerate([5, 0, 16, 3]):
        assert torch.equal(kept.token_ids[i, :length], one.encode(image)[0, :length])
        given = {"prefix_image": image, "prefix_tokens": length}
        alone = one(prompt=PROMPTS[i], seed=2, image_index=i, **given)
        assert torch.equal(alone.token_ids[0], kept.token_ids[i])
    draw = lambda prompt: one.variations(image, 1, prompt=prompt, num_images=9, seed=1).token_ids  # noqa: E731
    assert torch.equal(draw("a body")[:, :4], draw("dome")[:, :4]) and not torch.equal(draw("a body"), draw("dome"))


def test_nats_of_a_batch_are_those_of_single_images(one):
    ids = one(prompt=PROMPTS, seed=1, guidance_scale=1).token_ids
    nats = one.log_prob(token_ids=ids, prompt=PROMPTS)
    each = [one.log_prob(token_ids=ids[i : i + 1], prompt=prompt) for i, prompt in enumerate(PROMPTS)]
    assert_close(torch.cat(each), nats)
    bits = one.bits_per_token(token_ids=ids, prompt=PROMPTS)
    assert_close(bits.sum(dim=1) * -0.6931471805599453, nats)
    assert not torch.equal(bits, one.bits_per_token(token_ids=ids))


def test_saved_with_its_words(one, tmp_path):
    one.save_pretrained(tmp_path / "m")
    loaded = load_pipeline(tmp_path / "m", device="cpu")
    assert isinstance(loaded, DARPipeline) and loaded.fingerprint == one.fingerprint and loaded.reads_text
    assert torch.equal(loaded(prompt=PROMPTS, seed=1).token_ids, one(prompt=PROMPTS, seed=1).token_ids)
    told = describe_model(tmp_path / "m")
    assert f"up to 12 words, of {WORDS.num_words}" in told and "none (unlabelled)" in told
    assert "text_tokenizer/config.json" in upload_contents(tmp_path / "m")
    assert "pipeline_tag: text-to-image" in loaded.card()
    plain = tiny_dar()
    plain.save_pretrained(tmp_path / "classes")
    index = json.loads((tmp_path / "classes" / "model_index.json").read_text())
    config = json.loads((tmp_path / "classes" / "transformer" / "config.json").read_text())
    assert "text_tokenizer" not in index and not {"num_words", "prompt_length"} & config.keys()


def test_a_long_prompt_is_cut_and_it_is_said_where(one, caplog):
    long = " ".join(["dome"] * 20)
    drawn = one(prompt=[long, long], seed=1).token_ids
    assert caplog.text.count("20 words and only 12 are read: it is cut before 'dome'") == 1
    assert torch.equal(drawn, one(prompt=[" ".join(["dome"] * 12)] * 2, seed=1).token_ids)


def test_what_cannot_be_asked_is_refused_at_once(one, both):
    classes, parts = tiny_dar(), one.components
    ids = torch.zeros(3, 16, dtype=torch.long)
    for said, ask in (
        ("reads no text, got the prompt 'a body'. Pass class_labels", lambda: classes.stream(prompt="a body")),
        ("reads no text, got the negative_prompt", lambda: classes(0, negative_prompt="a body")),
        ("reads no text", lambda: classes.log_prob(token_ids=ids, prompt="a body")),
        ("draws prompts and has no classes", lambda: one("face")),
        ("draws prompts and has no classes", lambda: one.log_prob(None, 0, token_ids=ids)),
        ("as many prompts", lambda: both([0, 1], prompt=["a", "b", "c"])),
        ("a prompt is a text", lambda: one(prompt=3)),
        ("guidance_scale is 1", lambda: one(prompt="a", negative_prompt="b", guidance_scale=1)),
        ("a class label or prompt per image", lambda: one.log_prob(token_ids=ids, prompt=["a", "b"])),
        ("got a text tokenizer with 0 out of 0", lambda: DARPipeline(**parts | {"text_tokenizer": None})),
        ("with 48 out of 256", lambda: DARPipeline(**parts | {"text_tokenizer": TextTokenizer()})),
        ("reads prompts of 0 words", lambda: DARPipeline(**classes.components | {"text_tokenizer": WORDS})),
    ):
        with pytest.raises(UserError, match=said):
            ask()


COMPILED = """
from tests.pipelines.tiny_dar import WORDS, tiny_dar

pipe = tiny_dar(num_classes=0, names=False, words=WORDS)
for decoder in (None, pipe.llama_decoder(compiled=True)):
    asked = {"prompt": ["a critter with a dome body", ""], "seed": 1, "guidance_scale": 2.0}
    print(pipe(**asked, llama_decoder=decoder).token_ids.tolist())
"""


@pytest.mark.slow
@needs_compiler
def test_the_compiled_step_reads_prompts_too(tmp_path):
    eager, compiled = run_compiled(COMPILED, tmp_path).splitlines()
    assert eager == compiled

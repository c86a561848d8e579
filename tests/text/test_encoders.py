import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from isthmus.errors import UserError
from isthmus.text.encoders import SmallTextEncoder, TextFeatures
from isthmus.text.tokenizer import TextTokenizer, learned_merges

CAPTIONS = [
    "a critter, dome body, sleepy eyes",
    "a planet, banded surface, dark teal background",
    "a critter, teal body",
]


@pytest.fixture(scope="module", params=["start", "sum"])
def encoder(request):
    torch.manual_seed(0)
    words = {"merges": learned_merges(CAPTIONS * 20, num_words=300), "max_length": 12}
    return SmallTextEncoder(**words, width=12, sum_words=request.param == "sum").eval()


def test_common_words_become_one(encoder):
    ids, mask = encoder.word_ids(["a critter, dome body"])
    assert mask.sum() == 1 + 5  # the start word; a, critter, comma, dome, body
    assert torch.equal(ids, encoder.word_ids(["A CRITTER, dome body"])[0])
    assert learned_merges(CAPTIONS * 20, num_words=300) == encoder.config["merges"]


@given(st.text(max_size=30))
@settings(max_examples=30, deadline=None)
def test_no_prompt_fails(encoder, prompt):
    features = encoder.encode([prompt])
    assert features.mask[0, 0] and features.hidden.isfinite().all()


def test_a_prompt_alone_is_the_prompt_among_others(encoder):
    prompts = ["a critter", "", CAPTIONS[1]]
    together = encoder.encode(prompts)
    for row, prompt in enumerate(prompts):
        alone = encoder.encode([prompt])
        own = together.rows(torch.tensor([row]))
        assert torch.equal(own.mask, alone.padded(own.mask.shape[1]).mask)
        torch.testing.assert_close(own.hidden[own.mask], alone.hidden[alone.mask], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(own.pooled, alone.pooled, rtol=1e-5, atol=1e-6)


def test_training_leaves_padding_out_and_learns_the_same(encoder):
    ids, mask = encoder.word_ids(["a critter", "", CAPTIONS[1]])
    gradients = []
    for rows in ([slice(0, 3)], [slice(0, 1), slice(1, 2), slice(2, 3)]):  # a single prompt is read as it lies
        features = [encoder(ids[row], mask[row]) for row in rows]
        total = sum((f.hidden * f.mask[..., None]).square().sum() + f.pooled.square().sum() for f in features)
        gradients.append(torch.autograd.grad(total, list(encoder.parameters())))
    torch.testing.assert_close(*gradients)


def test_without_blocks_a_prompt_is_a_bag_of_its_words():
    bag = SmallTextEncoder(merges=learned_merges(CAPTIONS * 20, num_words=300), width=12, num_layers=0).eval()
    assert bag.position is None
    one, turned, other = (bag.encode([words]).pooled for words in ("teal body", "body teal", "teal planet"))
    torch.testing.assert_close(one, turned)
    assert not torch.allclose(one, other)
    words = bag.encode(["teal body"])
    torch.testing.assert_close(words.pooled, words.hidden.mean(dim=1))
    torch.testing.assert_close(bag.encode(["teal body", CAPTIONS[0]]).pooled[:1], one)


def test_the_vector_of_a_prompt_may_hold_the_sum_of_its_words():
    kept = {"merges": learned_merges(CAPTIONS * 20, num_words=300), "width": 12}
    for layers in (0, 2):
        summed = SmallTextEncoder(**kept, num_layers=layers, sum_words=True).eval()
        plain = SmallTextEncoder(**kept, num_layers=layers).eval()
        plain.load_state_dict(summed.state_dict())
        ids, _ = summed.word_ids(["teal body"])
        words = summed.word_embedding(ids).sum(dim=1)
        told, untold = summed.encode(["teal body", CAPTIONS[0]]), plain.encode(["teal body", CAPTIONS[0]])
        assert torch.equal(told.hidden, untold.hidden)
        torch.testing.assert_close(told.pooled[:1], words + (untold.pooled[:1] if layers else 0))


def test_long_prompts_are_cut_and_it_is_said_where(encoder, caplog):
    long = " ".join(["teal"] * 20)
    features = encoder.encode([long])
    assert features.mask.shape == (1, 13) and "20 words and only 12 are read: it is cut before 'teal'" in caplog.text
    torch.testing.assert_close(features.pooled, encoder.encode([" ".join(["teal"] * 12)]).pooled)


def test_what_was_saved_reads_prompts_the_same_way(encoder, tmp_path):
    encoder.tokenizer.save_pretrained(tmp_path / "words")
    words = TextTokenizer.from_pretrained(tmp_path / "words")
    assert words.config == encoder.tokenizer.config and words.words(CAPTIONS) == encoder.tokenizer.words(CAPTIONS)
    assert words.num_words == 256 + len(encoder.config["merges"]) and words.num_cut(["teal " * 13, "teal"]) == 1
    encoder.save_pretrained(tmp_path)
    again = SmallTextEncoder.from_pretrained(tmp_path)
    assert torch.equal(again.encode(CAPTIONS).hidden, encoder.encode(CAPTIONS).hidden)


def test_prompts_are_put_together_and_replaced(encoder):
    some, null = encoder.encode(CAPTIONS[:2]), encoder.encode([""])
    joined = TextFeatures.joined([some, null])
    assert len(joined) == 3 and torch.equal(joined.pooled[2], null.pooled[0])
    mixed = some.where(torch.tensor([True, False]), null)
    assert torch.equal(mixed.pooled[0], some.pooled[0]) and torch.equal(mixed.pooled[1], null.pooled[0])
    assert mixed.mask[1].sum() == 1


@pytest.mark.parametrize(("arguments", "said"), [({"width": 9}, "multiple"), ({"max_length": 0}, "at least 1")])
def test_encoders_that_cannot_be_built(arguments, said):
    with pytest.raises(UserError, match=said):
        SmallTextEncoder(**arguments)

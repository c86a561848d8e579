import math

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close
from transformers import LlamaConfig, LlamaForCausalLM

from isthmus.dar.prior import (
    TokenLayout,
    llama_config,
    new_prior,
    next_token_inputs,
    next_token_logits,
    next_token_loss,
)
from isthmus.errors import UserError
from tests.dar.tiny_prior import LAYOUT, tiny_prior

PUBLISHED = TokenLayout(codebook_size=16384, num_classes=1000, num_tokens=256)
LABELS, TOKENS = torch.tensor([0, 2, 3]), torch.randint(24, (3, 12), generator=torch.Generator().manual_seed(0))


def test_published_sizes():
    for width, num_layers, num_heads, published in (
        (768, 12, 12, 110_888_448),
        (1024, 24, 16, 342_910_976),
        (1280, 36, 20, 774_699_520),
        (1536, 48, 24, 1_410_972_672),
    ):
        with torch.device("meta"):
            prior = new_prior(PUBLISHED, width=width, num_layers=num_layers, num_heads=num_heads)
        # beside the published ones: the rows of the head that classes have in a vocabulary of both
        assert sum(p.numel() for p in prior.parameters()) == published + 1001 * width


def test_the_module_is_the_stock_one_and_its_config_reads_back():
    prior = tiny_prior()
    assert type(prior) is LlamaForCausalLM
    again = LlamaConfig.from_dict(prior.config.to_dict())
    assert TokenLayout.of(again, codebook_size=24, num_tokens=12) == LAYOUT
    assert (again.bos_token_id, again.eos_token_id, again.pad_token_id) == (None, None, None)


def test_an_untrained_prior_finds_every_code_equally_likely():
    torch.manual_seed(0)
    prior = new_prior(LAYOUT, width=64, num_layers=1, num_heads=2)
    logits = next_token_logits(prior, LAYOUT, LABELS, TOKENS[:, :-1])
    assert_close(next_token_loss(logits, TOKENS), torch.full((3, 12), math.log(24)))
    for name, parameter in prior.named_parameters():
        if "norm" in name:
            assert bool((parameter == 1).all()), name
        elif "lm_head" not in name:
            # the estimate of a standard deviation from n values is off by about 1 in sqrt(2 n)
            assert float(parameter.detach().std()) == pytest.approx(0.02, rel=4 / math.sqrt(2 * parameter.numel())), (
                name
            )


def test_each_position_predicts_the_token_at_it():
    """Entry p depends on the class and on tokens before p, not on token p or later ones."""
    prior = tiny_prior()
    inputs = next_token_inputs(LAYOUT, LABELS, TOKENS)
    assert inputs[:, 0].tolist() == [24, 26, 27] and torch.equal(inputs[:, 1:], TOKENS)
    before = next_token_logits(prior, LAYOUT, LABELS, TOKENS)
    assert next_token_logits(tiny_prior().to(torch.bfloat16), LAYOUT, LABELS, TOKENS).dtype == torch.float32
    assert before.shape == (3, 13, 24)
    changed = TOKENS.clone()
    changed[:, 5] = (changed[:, 5] + 1) % 24
    after = next_token_logits(prior, LAYOUT, LABELS, changed)
    assert_close(after[:, :6], before[:, :6])
    assert bool(((after - before)[:, 6:].abs().amax(dim=-1) > 1e-3).all())
    other_class = next_token_logits(prior, LAYOUT, (LABELS + 1) % 4, TOKENS)
    assert bool(((other_class - before).abs().amax(dim=-1) > 1e-3).all())


def test_classes_are_never_predicted():
    """The loss is a softmax over the codes alone, and rows of classes in the head get no gradient."""
    prior = tiny_prior()
    loss = next_token_loss(next_token_logits(prior, LAYOUT, LABELS, TOKENS[:, :-1]), TOKENS)
    whole = prior(input_ids=next_token_inputs(LAYOUT, LABELS, TOKENS[:, :-1])).logits[..., :24]
    assert_close(loss, -F.log_softmax(whole, dim=-1).gather(-1, TOKENS[..., None]).squeeze(-1))
    loss.mean().backward()
    rows = prior.lm_head.weight.grad.abs().sum(dim=1)
    assert bool((rows[:24] > 0).all()) and bool((rows[24:] == 0).all())


def test_unlabelled_models_have_one_null_class():
    layout = TokenLayout(codebook_size=8, num_classes=0, num_tokens=4)
    assert (layout.vocab_size, layout.null_class_id) == (9, 0)
    assert layout.class_token(torch.tensor([0])).tolist() == [8]
    assert TokenLayout.of(llama_config(layout, width=8, num_layers=1, num_heads=2), 8) == layout


def test_words_lie_behind_classes_and_begin_a_sequence():
    layout = TokenLayout(codebook_size=24, num_classes=3, num_tokens=12, num_words=300, prompt_length=5)
    assert (layout.first_word, layout.vocab_size, layout.num_positions) == (28, 328, 18)
    config = llama_config(layout, width=32, num_layers=1, num_heads=2)
    assert TokenLayout.of(LlamaConfig.from_dict(config.to_dict()), codebook_size=24, num_tokens=12) == layout
    # what a model without words writes knows nothing of them
    assert (
        not {"num_words", "prompt_length"} & llama_config(LAYOUT, width=32, num_layers=1, num_heads=2).to_dict().keys()
    )
    words = layout.padded([[0, 7], [], [299]])
    inputs = next_token_inputs(layout, LABELS, TOKENS[:, :1], words)
    assert inputs[:, :3].tolist() == [[28, 35, 24], [27, 27, 26], [27, 327, 27]]
    places = words.places(2)
    assert places["attention_mask"].tolist() == [[1, 1, 1, 1], [0, 0, 1, 1], [0, 1, 1, 1]]
    assert places["position_ids"].tolist() == [[0, 1, 2, 3], [0, 0, 0, 1], [0, 0, 1, 2]]


def test_strangers_are_refused():
    for changed, sizes, said in [
        ({}, (16, None), "same codebook_size"),
        ({}, (24, 16), "positions for 16 token"),
        ({"codebook_size": 64}, (64, None), "vocabulary"),
        ({"codebook_size": 28}, (28, None), "vocabulary"),
        ({"max_position_embeddings": 1}, (24, None), "positions"),
        ({"num_words": 256, "prompt_length": 4}, (24, None), "256 words of prompts"),
        ({"num_words": 3, "prompt_length": 12}, (24, None), "one position for each of 12 words, for the class"),
        ({"num_words": 3}, (24, 12), "num_words 3 and prompt_length 0"),
        ({"attention_bias": True}, (24, None), "attention_bias"),
        ({"tie_word_embeddings": True}, (24, None), "tie_word_embeddings"),
        ({"hidden_act": "gelu"}, (24, None), "hidden_act"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}, (24, None), "rope_type"),
    ]:
        settings = llama_config(LAYOUT, width=32, num_layers=1, num_heads=2).to_dict() | changed
        with pytest.raises(UserError, match=said):
            TokenLayout.of(LlamaConfig.from_dict(settings), *sizes)


def test_a_llama_of_others_is_taken_by_its_sizes():
    settings = llama_config(LAYOUT, width=32, num_layers=1, num_heads=2).to_dict()
    del settings["codebook_size"]
    assert TokenLayout.of(LlamaConfig.from_dict(settings), codebook_size=24) == LAYOUT


def test_sizes_out_of_range_are_refused():
    for sizes in ((0, 3, 12), (24, -1, 12), (24, 3, 0), (24, 3, 12, 256, 0), (24, 3, 12, 0, 5), (24, 3, 12, -1, -1)):
        with pytest.raises(UserError):
            TokenLayout(*sizes)
    with pytest.raises(UserError, match="twice the heads"):
        llama_config(LAYOUT, width=30, num_layers=1, num_heads=2)

"""The prior against the published one: embedding, blocks, logits, loss, gradients, greedy generation, both masks."""

import pytest
import torch
import torch.nn.functional as F

from isthmus.next_scale.conversion import build_prior, convert_prior_state
from tests.parity.published_loop import assert_turns, generate
from tests.testers import assert_gradient_summary, assert_parity, published_names

VARIANTS = ["base", "saln", "nol2"]


@pytest.fixture(params=VARIANTS)
def case(request, golden, published_prior):
    """(variant, prior, fixture tensors)."""
    io = golden.tensors(f"var/var_{request.param}_io.safetensors")
    return request.param, published_prior(request.param)[0], io


def settings(golden, variant):
    files = golden.json("var/config.json")["files"]
    stored = "" if variant == "nol2" else f"var_{variant}_state.safetensors + "
    return files[f"{stored}var_{variant}_io.safetensors"]


@torch.no_grad()
def test_tokenizer_makes_the_training_pair(case, tokenizer):
    _, _, io = case
    token_ids = tokenizer.encode(io["tf.in.image"]).token_ids
    assert_parity(torch.cat(token_ids, dim=1), io["tf.in.gt_BL"])
    assert_parity(tokenizer.scale_inputs(token_ids), io["tf.in.x_wo_first_l"])


@torch.no_grad()
def test_embedding_blocks_logits_and_loss(case):
    _, prior, io = case
    labels, scale_inputs = io["tf.in.label"], io["tf.in.x_wo_first_l"]
    assert_parity(prior.embed(prior.condition(labels).start, scale_inputs, range(4)), io["tf.out.x_embedded"])
    seen = []
    hooks = [block.register_forward_hook(lambda *call: seen.append(call[-1])) for block in prior.blocks]
    logits = prior(labels, scale_inputs).logits
    for hook in hooks:
        hook.remove()
    for i, x in enumerate(seen):
        assert_parity(x, io[f"tf.out.block.{i}"])
    assert_parity(logits, io["tf.out.logits"])
    for last_scale in range(3):
        leading = scale_inputs[:, : prior.schedule.offsets[last_scale + 1] - 1]
        truncated = prior(labels, leading, scales=range(last_scale + 1)).logits
        assert_parity(truncated, io[f"tf.out.logits_prog{last_scale}"])
    for smoothing in (0.0, 0.1):
        loss = F.cross_entropy(logits.flatten(0, 1), io["tf.in.gt_BL"].flatten(), label_smoothing=smoothing)
        assert_parity(loss.reshape(1), io[f"tf.out.loss_ls{smoothing}"])


def test_gradients_of_the_loss(case, golden, published_prior):
    variant, reference, io = case
    _, raw = published_prior(variant)
    converted = convert_prior_state(raw)
    converted.arguments["num_heads"] = reference.config.num_heads
    prior = build_prior(converted)
    names = published_names(raw, converted.state)
    logits = prior(io["tf.in.label"], io["tf.in.x_wo_first_l"]).logits
    F.cross_entropy(logits.flatten(0, 1), io["tf.in.gt_BL"].flatten()).backward()
    summaries = settings(golden, variant)["grad_norm_and_sum_of_loss_ls0"]
    gradients = {names[key]: parameter.grad for key, parameter in prior.named_parameters()}
    assert set(gradients) == set(summaries)
    assert sum(p.numel() for p in prior.parameters()) == settings(golden, variant)["params"]
    for key, (norm, total) in summaries.items():
        assert_gradient_summary(key, gradients[key], norm, total)


@torch.no_grad()
def test_greedy_generation(case, tokenizer):
    _, prior, io = case

    def draw(scale, logits):
        token_ids = logits.argmax(dim=-1)
        return token_ids, tokenizer.lookup(token_ids)

    for cfg in ("0", "1.5", "4"):
        turns = generate(tokenizer, prior, io["gen.in.label"], float(cfg), draw)
        assert_turns(io, f"gen.greedy_cfg{cfg}", turns, tokenizer, float(cfg))
    # what is drawn without guidance is what teacher forcing predicts
    token_ids = [io[f"gen.greedy_cfg0.scale{k}.idx"] for k in range(4)]
    logits = prior(io["gen.in.label"], tokenizer.scale_inputs(token_ids)).logits
    assert_parity(logits, torch.cat([io[f"gen.greedy_cfg0.scale{k}.cfg_logits"] for k in range(4)], dim=1))


@torch.no_grad()
def test_markov_logits(golden, published_prior):
    for variant in ("base", "saln"):
        io = golden.tensors(f"var/var_{variant}_io.safetensors")
        logits = published_prior(variant, "markov")[0](io["tf.in.label"], io["tf.in.x_wo_first_l"]).logits
        assert_parity(logits, golden.tensors("var/var_markov_io.safetensors")[f"{variant}.tf.out.logits_markov"])

"""Switti's blocks against the published ones: branches, modulation, tables, size features, logits, gradients."""

import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from isthmus.next_scale.text_block import (
    SandwichBlock,
    SizeCondition,
    SwiGLU,
    TextCrossAttention,
    crop_values,
    fourier_features,
    scale_rotary_table,
)
from isthmus.next_scale.transformer import modulated_norm
from isthmus.nn.attention import FeedForward, causal_attention, markov_attention
from isthmus.nn.rotary import rotated
from tests.testers import assert_gradient, assert_gradient_summary, assert_parity

ATOL = 2e-5
LENGTHS = [1, 4, 9, 16]
# published name of a part of a block -> ours
PARTS = {
    "attn.to_qkv": "attention.qkv",
    "attn.proj": "attention.proj",
    "cross_attn.to_q": "cross_attention.q",
    "cross_attn.to_kv": "cross_attention.kv",
    "cross_attn.proj": "cross_attention.proj",
    "attention_y_norm": "text_norm",
    "self_attention_norm1": "attention_norm_in",
    "self_attention_norm2": "attention_norm_out",
    "cross_attention_norm1": "cross_attention_norm_in",
    "cross_attention_norm2": "cross_attention_norm_out",
    "ffn_norm1": "feed_forward_norm_in",
    "ffn_norm2": "feed_forward_norm_out",
    "ffn.up_proj": "feed_forward.up",
    "ffn.gate_proj": "feed_forward.gate",
    "ffn.down_proj": "feed_forward.down",
    "ffn.fc1": "feed_forward.up",
    "ffn.fc2": "feed_forward.down",
    "ada_lin.1": "modulation",
}
ENDS = {
    "word_embed": "word_embedding",
    "text_pooler": "text_start",
    "head_nm.ada_lin.1": "head_modulation",
    "head": "head",
    "crop_proj": "size.projection",
}
TABLES = {"pos_start": "start_position", "pos_1LC": "position", "lvl_embed.weight": "scale_embedding"}


class Switti(nn.Module):
    """The published network around our blocks, as one pass over all scales; parameters have names of ours."""

    def __init__(self, settings: dict):
        super().__init__()
        width, heads, codes = settings["width"], settings["num_heads"], settings["codebook_dim"]
        self.settings = settings
        self.word_embedding = nn.Linear(codes, width)
        self.text_start = nn.Linear(settings["text_pooled_width"], width)
        self.scale_embedding = nn.Parameter(torch.zeros(4, width))
        self.start_position = nn.Parameter(torch.zeros(1, 1, width))
        self.position = None if settings["rope"] else nn.Parameter(torch.zeros(1, 30, width))
        self.size = SizeCondition(width) if settings["use_crop_cond"] else None
        swiglu = settings["use_swiglu_ffn"]
        self.blocks = nn.ModuleList(
            SandwichBlock(
                width,
                heads,
                SwiGLU(width, int(width * 8 / 3)) if swiglu else FeedForward(width, 4 * width),
                text_width=settings["text_width"],
                size_condition=settings["use_crop_cond"],
            )
            for _ in range(settings["depth"])
        )
        self.head_modulation = nn.Linear(width, 2 * width)
        self.head = nn.Linear(width, settings["codebook_size"])

    @property
    def rotary(self):
        if not self.settings["rope"]:
            return None
        base, extent = self.settings["rope_theta"], self.settings["rope_size"]
        width = self.settings["width"] // self.settings["num_heads"]
        sides = self.settings["scale_sizes"]
        return torch.cat([scale_rotary_table(side, width, base=base, extent=extent) for side in sides])

    def embed(self, start, scale_inputs):
        x = torch.cat([start.unsqueeze(1) + self.start_position, self.word_embedding(scale_inputs)], dim=1)
        x = x + self.scale_embedding.repeat_interleave(torch.tensor(LENGTHS), dim=0)
        return x if self.position is None else x + self.position

    def start_and_size(self, io):
        start = self.text_start(io["in.text_pooled"][:2])
        return start, None if self.size is None else self.size(io["in.image_sizes"])

    def forward(self, io, attend):
        """Logits, and the stream behind every block."""
        start, size = self.start_and_size(io)
        x, behind = self.embed(start, io["in.x_wo_first_l"]), []
        attend = attend if self.rotary is None else rotated(attend, self.rotary)
        for block in self.blocks:
            text = block.keys_values(io["in.text_hidden"][:2], io["in.text_mask"][:2])
            x = block(x, block.modulate(start, size), attend, None, text)
            behind.append(x)
        scale, shift = self.head_modulation(F.silu(start)).unflatten(-1, (2, 1, -1)).unbind(1)
        return self.head(modulated_norm(x, scale, shift, 1e-6)), behind


def ours(key):
    """Our name of a published weight; None for what follows from the arguments."""
    if key in TABLES:
        return TABLES[key]
    if block := re.fullmatch(r"blocks\.(\d+)\.(?:crop_cond_scales|(.*)\.(weight|bias))", key):
        number, part, kind = block.groups()
        return f"blocks.{number}.{f'{PARTS[part]}.{kind}' if part else 'size_scale'}"
    part, _, kind = key.rpartition(".")
    return f"{ENDS[part]}.{kind}" if part in ENDS else None


@pytest.fixture(params=["main", "small", "plain"])
def case(request, golden):
    """(name, network with the published weights, fixture tensors)."""
    name = request.param
    raw = {key: value.float() for key, value in golden.tensors(f"switti/{name}_state.safetensors").items()}
    network = Switti(golden.json("switti/config.json")["networks"][name])
    state = {new: value for key, value in raw.items() if (new := ours(key)) is not None}
    if "crop_embed.weight" in raw:
        state["size.frequency_bits"] = raw["crop_embed.weight"].view(torch.int32)
    network.load_state_dict(state)
    dropped = set(raw) - {key for key in raw if ours(key)} - {"crop_embed.weight"}
    assert dropped == {"lvl_1L", "attn_bias_for_masking"}
    return name, network, golden.tensors(f"switti/{name}_io.safetensors")


@torch.no_grad()
def test_blocks_and_logits(case):
    _, network, io = case
    logits, behind = network(io, markov_attention(LENGTHS))
    for i, x in enumerate(behind):
        assert_parity(x, io[f"out.block{i}"], ATOL)
    assert_parity(logits, io["out.logits"], ATOL)


@pytest.mark.parametrize("case", ["main", "plain"], indirect=True)
@torch.no_grad()
def test_blocks_and_logits_of_causal_models(case, golden):
    name, network, io = case
    expected = golden.tensors(f"switti/{name}_causal_io.safetensors")
    logits, behind = network(io, causal_attention(LENGTHS))
    for i, x in enumerate(behind):
        assert_parity(x, expected[f"out.block{i}"], ATOL)
    assert_parity(logits, expected["out.logits"], ATOL)


@pytest.mark.parametrize("case", ["main"], indirect=True)
@torch.no_grad()
def test_branches_of_the_first_block(case):
    _, network, io = case
    start, size = network.start_and_size(io)
    assert_parity(start, io["out.condition"], ATOL)
    assert_parity(size, io["out.crop_vector"], ATOL)
    block = network.blocks[0]
    modulation = block.modulate(start, size)
    assert_parity(modulation.flatten(1), io["out.block0.modulation"], ATOL)
    hidden, mask = io["in.text_hidden"][:2], io["in.text_mask"][:2]
    assert_parity(block.text_norm(hidden), io["out.block0.context_normed"], ATOL)
    seen = {}
    names = {"self_attention": "attention", "cross_attention": "cross_attention", "feed_forward": "feed_forward"}
    for published, name in names.items():
        block.get_submodule(name).register_forward_hook(
            lambda *call, published=published: seen.update({published: call[-1]})
        )
    x = network.embed(start, io["in.x_wo_first_l"])
    assert_parity(x, io["out.embedded"], ATOL)
    attend = rotated(markov_attention(LENGTHS), network.rotary)
    block(x, modulation, attend, None, block.keys_values(hidden, mask))
    for published in names:
        assert_parity(seen[published], io[f"out.block0.{published}"], ATOL)


@pytest.mark.parametrize("case", ["main", "small"], indirect=True)
def test_rotary_table_of_all_scales(case):
    _, network, io = case
    assert_parity(network.rotary, io["out.rope"], ATOL)


def test_rotary_tables_and_size_features(golden):
    tables = golden.tensors("switti/tables.safetensors")
    for side in (1, 2, 3, 9):
        assert_parity(scale_rotary_table(side, 64), tables[f"rope.c64_side{side}"], ATOL)
    for side in (32, 64):
        grid = scale_rotary_table(side, 64).unflatten(0, (side, side))
        expected = torch.cat([grid[0, ::8], grid[::8, 0]])
        assert_parity(expected, tables[f"rope.c64_side{side}_first_row_and_column"], ATOL)
    values = crop_values(tables["crop.sizes"])
    assert_parity(values, tables["crop.values"])
    assert_parity(fourier_features(values, tables["crop.frequencies"]), tables["crop.features"], 0.0)


@pytest.mark.parametrize("case", ["main"], indirect=True)
def test_size_features_of_images(case):
    _, network, io = case
    values = crop_values(io["in.image_sizes"])
    assert_parity(values, io["out.crop_values"])
    frequencies = network.size.frequency_bits.view(torch.float32)
    assert_parity(fourier_features(values, frequencies), io["out.crop_features"], 0.0)


def test_loss_and_gradients(case, golden):
    name, network, io = case
    for text in ("text_hidden", "text_pooled"):
        io[f"in.{text}"].requires_grad_()
    targets = torch.cat([io[f"in.idx.{k}"] for k in range(4)], dim=1).long().flatten()
    logits = network(io, markov_attention(LENGTHS))[0].flatten(0, 1)
    for smoothing in (0, 0.1):
        loss = F.cross_entropy(logits, targets, label_smoothing=smoothing)
        assert_parity(loss, io[f"out.loss_smoothing{smoothing}"], ATOL)
    F.cross_entropy(logits, targets).backward()
    gradients = {key: parameter.grad for key, parameter in network.named_parameters()}
    summaries = golden.json("switti/config.json")["networks"][name]["grad_norm_and_sum"]
    learned = {key: summary for key, summary in summaries.items() if summary is not None}
    assert {ours(key) for key in learned} == set(gradients)
    for key, (norm, total) in learned.items():
        assert_gradient_summary(key, gradients[ours(key)], norm, total)
    # the last row of the fixture is the null text
    gradients |= {f"in.{name}": io[f"in.{name}"].grad[:2] for name in ("text_hidden", "text_pooled")}
    for key, expected in io.items():
        if key.startswith("grad."):
            published = key.removeprefix("grad.")
            assert_gradient(gradients[ours(published) or f"in.{published}"], expected)


def test_parameter_counts_of_published_networks(golden):
    for name, sizes in golden.json("switti/manifests/sizes.json").items():
        width, heads = sizes["width"], sizes["heads"]
        swiglu = "gelu" not in name
        with torch.device("meta"):
            block = SandwichBlock(
                width,
                heads,
                SwiGLU(width, int(width * 8 / 3)) if swiglu else FeedForward(width, 4 * width),
                text_width=2048,
                size_condition="no crop" not in name,
            )
        assert sum(p.numel() for p in block.parameters()) == sizes["block_params"], name


def test_keys_come_before_values():
    # laid out as the fused matrix of the published files
    attention = TextCrossAttention(4, 1, 4)
    with torch.no_grad():
        attention.kv.weight.copy_(torch.cat([torch.zeros(4, 4), torch.eye(4)]))
        attention.kv.bias.zero_()
    words = torch.randn(1, 3, 4)
    text = attention.keys_values(words, torch.ones(1, 3, dtype=torch.bool))
    assert not text.keys.any() and torch.equal(text.values[:, 0], words)

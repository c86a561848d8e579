"""What a straightforward implementation does, to compare with: written from the papers, without any thought of speed.

Dense additive masks, modulations evaluated again at every scale, a cache grown by concatenation, filters by a full
sort, default AdamW, explicit attention over pixels. Parameters carry the names of `NextScaleTransformer`, so both
networks hold the same weights and a benchmark can check that they compute the same.
"""

import copy
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from isthmus.next_scale.tokenizer import MultiScaleVQVAE, SpatialAttention
from isthmus.next_scale.transformer import NextScaleTransformer


class PlainAttention(nn.Module):
    """Multi-head attention with unit queries and keys, a mask, and a cache that grows by concatenation."""

    def __init__(self, width: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(width))
        self.v_bias = nn.Parameter(torch.zeros(width))
        self.log_scale = nn.Parameter(torch.full((1, num_heads, 1, 1), math.log(4)))
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, mask: Tensor | None, cache: dict | None) -> Tensor:
        batch, length, width = x.shape
        bias = torch.cat((self.q_bias, torch.zeros_like(self.q_bias), self.v_bias))
        qkv = F.linear(x, self.qkv.weight, bias).view(batch, length, 3, self.num_heads, width // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        q = F.normalize(q, dim=-1) * self.log_scale.clamp(max=math.log(100)).exp()
        k = F.normalize(k, dim=-1)
        if cache is not None:
            if self in cache:
                k = torch.cat((cache[self][0], k), dim=2)
                v = torch.cat((cache[self][1], v), dim=2)
            cache[self] = (k, v)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=1.0)
        return self.proj(mixed.transpose(1, 2).reshape(batch, length, width))


class PlainBlock(nn.Module):
    """Attention and feed-forward; the modulation is computed from the class vector on every call."""

    def __init__(self, width: int, num_heads: int):
        super().__init__()
        self.attention = PlainAttention(width, num_heads)
        self.feed_forward = nn.ModuleDict({"up": nn.Linear(width, 4 * width), "down": nn.Linear(4 * width, width)})
        self.modulation = nn.ModuleDict({"linear": nn.Linear(width, 6 * width)})

    def forward(self, x: Tensor, cond: Tensor, mask: Tensor | None, cache: dict | None) -> Tensor:
        six = self.modulation["linear"](F.silu(cond)).view(len(x), 1, 6, -1)
        gate1, gate2, scale1, scale2, shift1, shift2 = six.unbind(2)
        h = F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale1) + shift1
        x = x + gate1 * self.attention(h, mask, cache)
        h = F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale2) + shift2
        h = self.feed_forward["down"](F.gelu(self.feed_forward["up"](h), approximate="tanh"))
        return x + gate2 * h


class PlainTransformer(nn.Module):
    """The prior with a mask, holding the weights of `model`."""

    def __init__(self, model: NextScaleTransformer):
        super().__init__()
        config = model.config
        width, codebook_size = config["width"], config["codebook_size"]
        self.lengths = model.schedule.lengths
        self.is_markov = model.is_markov
        self.word_embedding = nn.Linear(config["codebook_dim"], width)
        self.class_embedding = nn.Embedding(config["num_classes"] + 1, width)
        self.scale_embedding = nn.Embedding(len(self.lengths), width)
        self.start_position = nn.Parameter(torch.zeros(1, self.lengths[0], width))
        self.position = nn.Parameter(torch.zeros(1, sum(self.lengths), width))
        self.blocks = nn.ModuleList(PlainBlock(width, config["num_heads"]) for _ in range(config["num_layers"]))
        self.head_modulation = nn.Linear(width, 2 * width)
        self.head = nn.Linear(width, codebook_size)
        scale = torch.cat([torch.full((n,), k) for k, n in enumerate(self.lengths)])
        self.register_buffer("scale", scale, persistent=False)
        visible = scale[:, None] == scale[None] if self.is_markov else scale[:, None] >= scale[None]
        mask = torch.zeros(visible.shape).masked_fill(~visible, float("-inf"))
        self.register_buffer("mask", mask[None, None], persistent=False)
        self.load_state_dict(model.state_dict())

    def logits(self, x: Tensor, cond: Tensor) -> Tensor:
        scale, shift = self.head_modulation(F.silu(cond)).view(len(x), 1, 2, -1).unbind(2)
        return self.head(F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift)

    def forward(self, labels: Tensor, scale_inputs: Tensor) -> Tensor:
        cond = self.class_embedding(labels)
        start = cond.unsqueeze(1) + self.start_position
        x = torch.cat((start, self.word_embedding(scale_inputs)), dim=1)
        x = x + self.scale_embedding(self.scale) + self.position
        for block in self.blocks:
            x = block(x, cond, self.mask, None)
        return self.logits(x, cond)

    @torch.inference_mode()
    def generate(
        self,
        tokenizer: MultiScaleVQVAE,
        labels: Tensor,
        *,
        guidance: float,
        top_k: int,
        top_p: float,
        generator: torch.Generator | None = None,
    ) -> list[Tensor]:
        """Token ids of every scale, the batch doubled throughout for guidance."""
        batch, schedule = len(labels), tokenizer.schedule
        null = torch.full_like(labels, self.class_embedding.num_embeddings - 1)
        cond = self.class_embedding(torch.cat((labels, null)))
        places = self.scale_embedding(self.scale) + self.position
        features = torch.zeros(batch, tokenizer.codebook.embedding_dim, schedule.grid, schedule.grid)
        cache: dict | None = None if self.is_markov else {}
        x, seen, token_ids = cond.unsqueeze(1) + self.start_position, 0, []
        for k, size in enumerate(schedule.sizes):
            x = x + places[:, seen : seen + size * size]
            seen += size * size
            for block in self.blocks:
                x = block(x, cond, None, cache)
            logits = self.logits(x, cond)
            logits = logits[batch:] + guidance * (logits[:batch] - logits[batch:])
            probabilities = filtered(logits, top_k, top_p).softmax(dim=-1)
            drawn = torch.multinomial(probabilities.flatten(0, 1), 1, generator=generator).view(batch, -1)
            token_ids.append(drawn)
            codes = tokenizer.codebook(drawn).transpose(1, 2).reshape(batch, -1, size, size)
            codes = F.interpolate(codes, size=schedule.grid, mode="bicubic")
            features = features + tokenizer.phi[schedule.phi_indices[k]](codes)
            if k + 1 < schedule.num_scales:
                smaller = F.interpolate(features, size=schedule.sizes[k + 1], mode="area")
                x = self.word_embedding(smaller.flatten(2).transpose(1, 2)).repeat(2, 1, 1)
        return token_ids


def filtered(logits: Tensor, top_k: int, top_p: float) -> Tensor:
    """Top-k, then top-p by sorting every logit."""
    logits = logits.masked_fill(logits < logits.topk(top_k, dim=-1).values[..., -1:], float("-inf"))
    values, order = logits.sort(dim=-1)
    dropped = values.softmax(dim=-1).cumsum(dim=-1) <= 1 - top_p
    dropped[..., -1] = False
    return logits.masked_fill(dropped.scatter(-1, order, dropped), float("-inf"))


def default_adamw(model: nn.Module) -> torch.optim.AdamW:
    """One loop over the parameters in Python, a kernel per arithmetic operation."""
    return torch.optim.AdamW(model.parameters(), lr=1e-5, betas=(0.9, 0.95), foreach=False, fused=False)


class PlainSpatialAttention(nn.Module):
    """Attention over pixels with the matrix of scores written out, in NCHW."""

    def __init__(self, attention: SpatialAttention):
        super().__init__()
        self.norm, self.qkv, self.proj_out = attention.norm, attention.qkv, attention.proj_out

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        q, k, v = self.qkv(self.norm(x)).view(batch, 3, channels, height * width).unbind(1)
        weights = (torch.bmm(q.transpose(1, 2), k) * channels**-0.5).softmax(dim=-1)
        return x + self.proj_out(torch.bmm(v, weights.transpose(1, 2)).view(batch, channels, height, width))


def plain_tokenizer(tokenizer: MultiScaleVQVAE) -> MultiScaleVQVAE:
    """A copy that decodes in NCHW with explicit attention."""
    plain = copy.deepcopy(tokenizer).to(memory_format=torch.contiguous_format)
    for module in list(plain.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, SpatialAttention):
                setattr(module, name, PlainSpatialAttention(child))
    return plain

"""Decoding with the weights of a stock Llama: the same network, written for one new token at a time.

Queries, keys and values become one matrix, gate and up another, and the head is cut to the image tokens. Keys and
values lie in buffers that are allocated once and read up to where they are filled.

A token's product with a matrix reads every weight once and does little with it, so the layout and the number of bytes
decide the speed. MKL, which torch uses on CPUs, reads them at half its rate as soon as there are two rows, as guidance
has them (benchmarks/dar_prior.py, docs/benchmarks.md).
"""

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from isthmus.dar.attention import llama_angles
from isthmus.dar.prior import TokenLayout
from isthmus.errors import UserError
from isthmus.nn.precision import check_compiler
from isthmus.nn.stored_llama import StoredLlama

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM


class WholeProduct:
    """The matrix as it is.

    On a CPU, one with more outputs than inputs is stored (in, out), which MKL reads 1.2 to 1.6 times as fast.
    """

    def __init__(self, weight: Float[Tensor, "out in"]):
        wide = weight.shape[0] > weight.shape[1] and weight.device.type == "cpu"
        self.weight = weight.t().contiguous() if wide else weight.t()

    def __call__(self, x: Float[Tensor, "rows in"], added_to: Tensor | None = None) -> Float[Tensor, "rows out"]:
        """X times the matrix; see `Product`."""
        return torch.mm(x, self.weight) if added_to is None else torch.addmm(added_to, x, self.weight)


class PackedProduct:
    """The matrix in the order in which oneDNN's own kernel reads it, for large fp32 matrices on a CPU.

    From 2 to 8 rows it takes 1.3 to 2.9 times less time than the module's layout, for one row more.
    """

    def __init__(self, weight: Float[Tensor, "out in"]):
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), 2)

    def __call__(self, x: Float[Tensor, "rows in"], added_to: Tensor | None = None) -> Float[Tensor, "rows out"]:
        """X times the matrix; see `Product`."""
        product = torch.ops.mkldnn._linear_pointwise(x, self.weight, None, "none", [], "")
        return product if added_to is None else added_to + product


class Int8Product:
    """The matrix in 8 bits, symmetric, with one scale per output; a quarter of the bytes of fp32.

    Rows are multiplied in bf16 by torch's own kernel for 8-bit weights, however many they are: a row's result depends
    on no other, so neither batch size nor the length of a prefix changes an image.
    """

    def __init__(self, weight: Float[Tensor, "out in"]):
        scale = weight.float().abs().amax(dim=1).clamp(min=1e-12) / 127
        # the kernel takes scales in bf16: rounded before the weights are divided by them, they cost no precision
        self.scale = scale.bfloat16()
        steps = weight.float() / self.scale.float().unsqueeze(1)
        self.weight = steps.round_().clamp_(-127, 127).to(torch.int8)

    def __call__(self, x: Float[Tensor, "rows in"], added_to: Tensor | None = None) -> Float[Tensor, "rows out"]:
        """X times the matrix; see `Product`."""
        product = torch._weight_int8pack_mm(x.bfloat16(), self.weight, self.scale).to(x.dtype)
        return product if added_to is None else added_to + product


Product = WholeProduct | PackedProduct | Int8Product
"""A matrix, called with rows, and with what their products are added to where that is given."""


def fastest_product(weight: Float[Tensor, "out in"], num_rows: int) -> Product:
    """The matrix as it is, in the layout that is fastest for about this many rows."""
    # with fewer than 2^18 weights `WholeProduct` is as fast; Inductor uses the same two operators
    fits = weight.device.type == "cpu" and weight.dtype == torch.float32 and weight.numel() >= 2**18
    operators = ("_reorder_linear_weight", "_linear_pointwise")
    present = torch.backends.mkldnn.is_available() and all(hasattr(torch.ops.mkldnn, name) for name in operators)
    return PackedProduct(weight) if num_rows > 1 and fits and present else WholeProduct(weight)


# new tokens one below the other, whatever sequence they are of, and any width
Rows = Float[Tensor, "rows _"]


@dataclass
class LlamaCache:
    """Keys, then values, of a request, of which `length` places are filled; two requests may take turns.

    `padding` is how many places at the start of each row fill it up and are never seen; None is none.
    """

    layers: list[Float[Tensor, "b 2 heads l c"]]
    length: int = 0
    padding: Int[Tensor, " b"] | None = None


@dataclass(frozen=True)
class _Layer:
    attention_norm: Tensor
    qkv: Product
    out: Product
    feed_forward_norm: Tensor
    gate_up: Product
    down: Product


class LlamaDecoder:
    """A prior's weights, laid out for decoding. It holds no state of a request: that is in the cache passed in.

    The weights must not change while it is in use. `num_rows` sequences will run at once (two per guided image); any
    other number works, if slower. `int8` leaves the head whole, `compiled` is one CUDA graph per token on a GPU; see
    `DARPipeline.llama_decoder`.
    """

    def __init__(
        self,
        transformer: "LlamaForCausalLM | StoredLlama",
        layout: TokenLayout,
        *,
        num_rows: int = 2,
        int8: bool = False,
        compiled: bool = False,
    ):
        llama = StoredLlama.of(transformer)
        config = llama.config
        self.device, self.dtype = llama.device, llama.dtype
        if int8 and self.device.type != "cpu":
            raise UserError(f"8-bit weights are for CPUs, the prior is on {self.device}. Use bfloat16 there.")
        if compiled:
            check_compiler(self.device)
        self.layout, self._source = layout, weakref.ref(transformer)
        self.num_positions = layout.num_positions
        self.num_heads, self.num_key_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_width, self.norm_eps = config.head_dim, config.rms_norm_eps
        self._embedding, self._norm = llama["model.embed_tokens.weight"], llama["model.norm.weight"]
        # the compiler does not look into packed weights: it gets those that are fastest for one row
        whole = partial(fastest_product, num_rows=1 if compiled else num_rows)
        product = Int8Product if int8 else whole
        self._layers = [_packed(llama, layer, self.head_width, product) for layer in range(config.num_hidden_layers)]
        self._head = whole(llama["lm_head.weight"][: layout.codebook_size])
        self._positions = torch.arange(self.num_positions, device=self.device)
        angles = llama_angles(self._positions, self.head_width, config.rope_parameters["rope_theta"])
        self._rotation = torch.complex(angles.cos(), angles.sin())
        self._fixed_step = None
        if compiled:
            mode = "reduce-overhead" if self.device.type == "cuda" else "default"
            self._fixed_step = torch.compile(self._at_position, dynamic=False, fullgraph=True, mode=mode)

    def check_belongs(self, transformer: StoredLlama, layout: TokenLayout) -> None:
        """Raise UserError unless these are the weights of this prior, laid out where it is now and in its type."""
        source, here = self._source(), (self.layout, self.device, self.dtype)
        there = (layout, transformer.device, transformer.dtype)
        if here != there or source is None or not StoredLlama.of(source).is_same(transformer):
            raise UserError(
                "the laid-out weights are those of another prior, or of this one before it was moved or cast: got "
                f"{here}, and the prior is {there}. Lay out its own: pipe.llama_decoder()."
            )

    @torch.inference_mode()
    def new_cache(self, num_sequences: int) -> LlamaCache:
        """An empty cache."""
        shape = (num_sequences, 2, self.num_key_heads, self.num_positions, self.head_width)
        # zeros, not whatever lies there: the compiled step reads positions that are masked out but not yet filled
        layers = [torch.zeros(shape, device=self.device, dtype=self.dtype) for _ in self._layers]
        if self._fixed_step is not None:
            for layer in layers:
                torch._dynamo.mark_static_address(layer)
        return LlamaCache(layers)

    @torch.inference_mode()
    def prefill(
        self,
        ids: Int[Tensor, "n l"],
        cache: LlamaCache,
        padding: Int[Tensor, " n"] | None = None,
        rows: Int[Tensor, " b"] | None = None,
    ) -> Float[Tensor, "b v"]:
        """Logits of the codes after a whole sequence, which fills the empty cache.

        Args:
            ids: of the vocabulary: words, class, tokens.
            padding: how many ids at the start of each row only fill it up.
            rows: which of these sequences each row of the cache is, for equal ones to be computed once; None is a row
                each, in their order.
        """
        assert cache.length == 0, "prefill starts a sequence"
        if rows is None:
            cache.padding = padding
            return self._after(ids, cache)
        length, size = ids.shape[1], (len(ids), *cache.layers[0].shape[1:3], ids.shape[1], self.head_width)
        once = LlamaCache([layer.new_zeros(size) for layer in cache.layers], padding=padding)
        logits = self._after(ids, once)
        for layer, own in zip(cache.layers, once.layers, strict=True):
            layer[:, :, :, :length] = own[rows]
        cache.length, cache.padding = length, None if padding is None else padding[rows]
        return logits[rows]

    @torch.inference_mode()
    def step(self, ids: Int[Tensor, " b"], cache: LlamaCache) -> Float[Tensor, "b v"]:
        """Logits of the codes after one more token for each of the leading sequences of the cache."""
        if self._fixed_step is None:
            return self._after(ids.unsqueeze(1), cache)
        position = self._positions[cache.length : cache.length + 1]
        cache.length += 1
        padding = None if cache.padding is None else cache.padding[: len(ids)]
        return self._fixed_step(ids, position, cache.layers, padding)

    def _after(self, ids: Int[Tensor, "b l"], cache: LlamaCache) -> Float[Tensor, "b v"]:
        """The places are known to the host, so the filled part alone is read."""
        b, length = ids.shape
        start, end = cache.length, cache.length + length
        grouped = self.num_heads != self.num_key_heads
        if cache.padding is None:
            rotation, visible = self._rotation[start:end].view(1, length, 1, -1), None
        else:
            padding, here = cache.padding[:b, None], self._positions[start:end]
            # positions count from the first id that is seen
            rotation = self._rotation[(here - padding).clamp(min=0)].unsqueeze(2)
            there = self._positions[:end]
            visible = (there >= padding).unsqueeze(1) & (there <= here.unsqueeze(1))
            # what only fills a row up sees itself, or its attention would be over nothing
            visible = (visible | (there == here.unsqueeze(1))).unsqueeze(1)

        def attend(qkv: Rows, layer: Tensor) -> Rows:
            heads = qkv.view(b, length, -1, self.head_width)
            turned = torch.view_as_complex(heads[:, :, : -self.num_key_heads].unflatten(-1, (-1, 2)).float())
            # in place: where the weights are fp32, `turned` is a view of qkv
            turned.mul_(rotation)
            if qkv.dtype != torch.float32:
                heads[:, :, : -self.num_key_heads] = torch.view_as_real(turned).flatten(-2)
            new = heads[:, :, self.num_heads :].unflatten(2, (2, -1)).permute(0, 2, 3, 1, 4)
            layer[:b, :, :, start:end] = new
            q = heads[:, :, : self.num_heads].transpose(1, 2)
            k, v = layer[:b, 0, :, :end], layer[:b, 1, :, :end]
            causal = visible is None and length > 1
            mixed = F.scaled_dot_product_attention(q, k, v, visible, is_causal=causal, enable_gqa=grouped)
            return mixed.transpose(1, 2).reshape(b * length, -1)

        x = self._through(ids.flatten(), cache.layers, attend)
        cache.length = end
        return self._head(self._normed(x.view(b, length, -1)[:, -1], self._norm)).float()

    def _at_position(
        self,
        ids: Int[Tensor, " b"],
        position: Int[Tensor, " 1"],
        stored: list[Tensor],
        padding: Int[Tensor, " b"] | None,
    ) -> Float[Tensor, "b v"]:
        """One new token, its place a tensor: the same kernels for every token, so that they can be recorded."""
        b = len(ids)
        visible = self._positions <= position
        if padding is None:
            rotation = torch.view_as_real(self._rotation)[position]
            visible = visible.view(1, 1, 1, -1)
        else:
            rotation = torch.view_as_real(self._rotation)[position - padding].unsqueeze(1)
            visible = (visible & (self._positions >= padding.unsqueeze(1))).view(b, 1, 1, -1)
        grouped = self.num_heads != self.num_key_heads

        def attend(qkv: Rows, layer: Tensor) -> Rows:
            heads = qkv.view(b, -1, self.head_width)
            # no complex numbers: the compiler makes no code for them
            qk, v = heads.split([self.num_heads + self.num_key_heads, self.num_key_heads], dim=1)
            re, im = qk.float().unflatten(-1, (-1, 2)).unbind(-1)
            cos, sin = rotation.unbind(-1)
            qk = torch.stack([re * cos - im * sin, im * cos + re * sin], dim=-1).flatten(-2).to(v.dtype)
            q, k = qk.split([self.num_heads, self.num_key_heads], dim=1)
            layer[:b].index_copy_(3, position, torch.stack([k, v], dim=1).unsqueeze(3))
            mixed = F.scaled_dot_product_attention(
                q.unsqueeze(2), layer[:b, 0], layer[:b, 1], attn_mask=visible, enable_gqa=grouped
            )
            return mixed.reshape(b, -1)

        return self._head(self._normed(self._through(ids, stored, attend), self._norm)).float()

    def _through(self, ids: Int[Tensor, " rows"], stored: list[Tensor], attend: Callable[[Rows, Tensor], Rows]) -> Rows:
        x = F.embedding(ids, self._embedding)
        for layer, buffers in zip(self._layers, stored, strict=True):
            x = layer.out(attend(layer.qkv(self._normed(x, layer.attention_norm)), buffers), x)
            gate, up = layer.gate_up(self._normed(x, layer.feed_forward_norm)).chunk(2, dim=-1)
            x = layer.down(F.silu(gate).mul_(up), x)
        return x

    def _normed(self, x: Rows, weight: Tensor) -> Rows:
        return F.rms_norm(x, weight.shape, weight, self.norm_eps)


def _packed(llama: StoredLlama, layer: int, head_width: int, product: Callable[[Tensor], Product]) -> _Layer:
    def weight(name: str) -> Tensor:
        return llama[f"model.layers.{layer}.{name}.weight"]

    # rotary positions turn channel j with channel j + half: side by side, the pair is one complex number
    halves = (weight(f"self_attn.{name}").unflatten(0, (-1, 2, head_width // 2)) for name in ("q_proj", "k_proj"))
    q, k = (half.transpose(1, 2).flatten(0, 2) for half in halves)
    return _Layer(
        attention_norm=weight("input_layernorm"),
        qkv=product(torch.cat([q, k, weight("self_attn.v_proj")])),
        out=product(weight("self_attn.o_proj")),
        feed_forward_norm=weight("post_attention_layernorm"),
        gate_up=product(torch.cat([weight("mlp.gate_proj"), weight("mlp.up_proj")])),
        down=product(weight("mlp.down_proj")),
    )

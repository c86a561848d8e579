"""The prior of the next-scale family: VAR (causal over scales), SRDD (Markov over scales) and Switti (text).

Sources: Tian et al., "Visual Autoregressive Modeling", section 3.3; Kumar et al., "Scale-Wise VAR is Secretly Discrete
Diffusion" (the Markovian mask); Voronov et al., "Switti: Designing Scale-Wise Transformers for Text-to-Image Synthesis"
(text, rotary positions, the block between two norms).
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, cast, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from isthmus.errors import UserError
from isthmus.next_scale.pyramid import ScaleSchedule
from isthmus.next_scale.text_block import (
    SandwichBlock,
    SharedTextAttention,
    SizeCondition,
    SwiGLU,
    scale_rotary_table,
)
from isthmus.nn.attention import (
    Attend,
    FeedForward,
    KeyValueCache,
    MultiHeadAttention,
    TextKeysValues,
    causal_attention,
    markov_attention,
    seeing_words,
    trains_on_cpu,
)
from isthmus.nn.precision import check_compiler
from isthmus.nn.rotary import RotaryTable, rotated
from isthmus.nn.saved_model import SavedModel, records_arguments
from isthmus.text.encoders import TextFeatures


def modulated_norm(
    x: Float[Tensor, "b l width"], scale: Float[Tensor, "b 1 width"], shift: Float[Tensor, "b 1 width"], eps: float
) -> Float[Tensor, "b l width"]:
    """LayerNorm(x) * (1 + scale) + shift, the norm without parameters of its own."""
    # a loop over images pays from some kilobytes of tokens on; compilers join the two steps themselves
    if trains_on_cpu(x) and x[0].numel() >= 2**12 and not torch.compiler.is_compiling():
        return _ModulatedNorm.apply(x, scale, shift, eps)
    return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=eps), 1 + scale)


class _ModulatedNorm(torch.autograd.Function):
    """One layer norm per image, whose gain and bias are the image's modulation (and its type): one pass each way."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, shift: Tensor, eps: float) -> Tensor:
        gain, bias = (1 + scale.float()).squeeze(1), shift.float().squeeze(1)
        result, statistics = torch.empty_like(x, dtype=scale.dtype), []
        for i in range(len(x)):
            result[i], *own = torch.native_layer_norm(x[i], x.shape[-1:], gain[i], bias[i], eps)
            statistics += own
        ctx.save_for_backward(x, gain, bias, *statistics)
        ctx.dtype = scale.dtype
        return result

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, gain, bias, *statistics = ctx.saved_tensors
        of_x, of_gain, of_bias = (torch.empty_like(t) for t in (x, gain, bias))
        for i in range(len(x)):
            mean, reciprocal = statistics[2 * i : 2 * i + 2]
            of_x[i], of_gain[i], of_bias[i] = torch.ops.aten.native_layer_norm_backward(
                gradient[i].to(x.dtype), x[i], x.shape[-1:], mean, reciprocal, gain[i], bias[i], [True, True, True]
            )
        return of_x, of_gain.unsqueeze(1).to(ctx.dtype), of_bias.unsqueeze(1).to(ctx.dtype), None


class BlockModulation(nn.Module):
    """Six vectors of one block from silu(class vector), by a linear layer of the block's own."""

    def __init__(self, width: int):
        super().__init__()
        self.linear = nn.Linear(width, 6 * width)

    def forward(self, activated: Float[Tensor, "b width"]) -> Float[Tensor, "b 6 width"]:
        """Gates of attention and feed-forward, their scales, their shifts: in this order."""
        return self.linear(activated).unflatten(-1, (6, -1))


class SharedModulationOffset(nn.Module):
    """Six vectors of one block as an offset to vectors that all blocks share (`shared_adaln`)."""

    def __init__(self, width: int):
        super().__init__()
        self.offset = nn.Parameter(torch.empty(1, 6, width))
        nn.init.normal_(self.offset, std=1 / math.sqrt(width))

    def forward(self, shared: Float[Tensor, "b 6 width"]) -> Float[Tensor, "b 6 width"]:
        """Gates of attention and feed-forward, their scales, their shifts: in this order."""
        return shared + self.offset


Stream = Float[Tensor, "b l width"]


@dataclass
class NextScaleTransformerOutput:
    """Logits, whose row of token j of scale k predicts token j of scale k."""

    logits: Float[Tensor, "b l v"]


@dataclass
class Conditioning:
    """Everything that depends on the class label and the text alone: computed once per image, not once per scale.

    `start` is the vector of class and text, which is also the token of scale 0; `blocks` holds gates, scales and shifts
    of each block, `head` scale and shift before the logits, `text` what each block sees of the words.
    """

    start: Float[Tensor, "b width"]
    blocks: tuple[Float[Tensor, "b 6 width"], ...]
    head: Float[Tensor, "b 2 width"]
    text: tuple[TextKeysValues | None, ...]

    def rows(self, chosen: slice | Int[Tensor, " rows"]) -> "Conditioning":
        """Some of the images, or one several times."""
        return Conditioning(
            self.start[chosen],
            tuple(block[chosen] for block in self.blocks),
            self.head[chosen],
            tuple(None if text is None else text.rows(chosen) for text in self.text),
        )


class NextScaleBlock(nn.Module):
    """Attention and feed-forward, each behind a modulated norm and a gate (spec of VAR, 2.3).

    Where it is given words, its first heads look at them beside the tokens (`SharedTextAttention`).
    """

    def __init__(
        self,
        width: int,
        num_heads: int,
        mlp_ratio: float,
        *,
        l2_attention: bool,
        shared_adaln: bool,
        norm_eps: float,
    ):
        super().__init__()
        self.norm_eps = norm_eps
        self.attention = MultiHeadAttention(width, num_heads, l2_attention=l2_attention)
        self.feed_forward = FeedForward(width, round(width * mlp_ratio))
        self.modulation = SharedModulationOffset(width) if shared_adaln else BlockModulation(width)

    def forward(
        self,
        x: Stream,
        modulation: Float[Tensor, "b 6 width"],
        attend: Attend,
        keep: Float[Tensor, "b 2"] | None = None,
        text: TextKeysValues | None = None,
    ) -> Stream:
        """The stream behind the block.

        `keep` multiplies the two branches per image (stochastic depth: 0 or 1 / keep rate); None keeps both. `text` is
        this block's part of what `SharedTextAttention` returned.
        """
        attend = attend if text is None else seeing_words(attend, text)
        gates = modulation[:, :2] if keep is None else modulation[:, :2] * keep.unsqueeze(-1)
        gate1, gate2 = (g.unsqueeze(1) for g in gates.unbind(1))
        scale1, scale2, shift1, shift2 = (m.unsqueeze(1) for m in modulation[:, 2:].unbind(1))
        x = torch.addcmul(x, gate1, self.attention(modulated_norm(x, scale1, shift1, self.norm_eps), attend))
        return torch.addcmul(x, gate2, self.feed_forward(modulated_norm(x, scale2, shift2, self.norm_eps)))


_Norm = Literal["layer", "rms_sandwich"]
_Position = Literal["learned", "rope2d"]
_FeedForward = Literal["gelu", "swiglu"]


class NextScaleTransformer(SavedModel):
    """Predict all tokens of a scale at once, from the features that the coarser scales have built.

    Args:
        width: width of the residual stream.
        num_layers: blocks.
        num_heads: attention heads.
        num_classes: classes; row `null_class_id` = num_classes of the table stands for "no class". A model of texts
            without classes (0) has no table.
        scale_attention: "causal" (VAR: own and earlier scales) or "markov" (SRDD: own scale only, no cache).
        shared_adaln: one modulation for all blocks plus an offset per block, instead of one linear layer per block.
        l2_attention: unit queries and keys with a learned temperature per head.
        mlp_ratio: hidden width of the feed-forward over `width`; that of "swiglu" is cut off to a whole number.
        drop_path: stochastic depth rate of the last block; it rises linearly from 0 at the first.
        init_gate: factor on the initial weights that make the gates ("alng"): small values start near identity.
        init_modulation: factor on the initial weights that make scales and shifts.
        has_mask_embedding: learn a vector, zero at the start, that marks hidden tokens: for models trained for
            refinement (spec of SRDD, 3.2). Without it hidden tokens are not marked.
        text_pooled_width: width of the vector of a whole prompt. Its linear image is the vector that a class would
            give, and is added to that where there are classes too. None reads no text.
        text_width: width of the vectors of a prompt's words, at which every block looks: VAR's with a third of the
            heads of its attention, Switti's with a cross-attention of its own. None reads the whole alone.
        norm: "layer" is VAR's block; "rms_sandwich" is Switti's, with an RMS norm before and behind every branch, and
            queries and keys normalised over the whole width.
        position: "learned" is a vector per token; "rope2d" turns queries and keys by row and column instead, on grids
            whose corners coincide at all scales.
        rope_base: base of the angles of "rope2d": pair j turns by position * rope_base^(-4j / head width).
        rope_extent: coordinate of the last row and column of every scale; the first ones lie at 0.
        feed_forward: "gelu", or in "rms_sandwich" also "swiglu" (without biases).
        size_condition: modulations of "rms_sandwich" know the size that an image had originally.

    Raises UserError where `width` is not a multiple of `num_heads`, the scales do not increase, or arguments are of
    different designs.
    """

    later_arguments: ClassVar[Mapping[str, Any]] = {
        "text_pooled_width": None,
        "text_width": None,
        "norm": "layer",
        "position": "learned",
        "rope_base": 10_000.0,
        "rope_extent": 128.0,
        "feed_forward": "gelu",
        "size_condition": False,
    }

    @records_arguments
    def __init__(
        self,
        *,
        scale_sizes: Sequence[int] = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16),
        codebook_size: int = 4096,
        codebook_dim: int = 32,
        width: int = 1024,
        num_layers: int = 16,
        num_heads: int = 16,
        num_classes: int = 1000,
        scale_attention: Literal["causal", "markov"] = "causal",
        shared_adaln: bool = False,
        l2_attention: bool = True,
        mlp_ratio: float = 4.0,
        norm_eps: float = 1e-6,
        drop_path: float = 0.0,
        init_gate: float = 1e-3,
        init_modulation: float = 0.5,
        has_mask_embedding: bool = False,
        text_pooled_width: int | None = None,
        text_width: int | None = None,
        norm: _Norm = "layer",
        position: _Position = "learned",
        rope_base: float = 10_000.0,
        rope_extent: float = 128.0,
        feed_forward: _FeedForward = "gelu",
        size_condition: bool = False,
    ):
        super().__init__()
        self._check_design()
        if width % num_heads:
            raise UserError(f"width must be a multiple of num_heads, got width {width} and {num_heads} heads.")
        if scale_attention not in ("causal", "markov"):
            raise UserError(f"scale_attention must be causal or markov, got {scale_attention!r}. Pick one of the two.")
        # phi belongs to the tokenizer: the transformer only needs the sides
        self.schedule = ScaleSchedule(tuple(scale_sizes), (0,) * len(scale_sizes))
        self.null_class_id = num_classes
        first = self.schedule.lengths[0]
        self.word_embedding = nn.Linear(codebook_dim, width)
        # a model of texts alone has no class vector, not even of no class
        has_classes = num_classes > 0 or text_pooled_width is None
        self.class_embedding = nn.Embedding(num_classes + 1, width) if has_classes else None
        self.text_start = None if text_pooled_width is None else nn.Linear(text_pooled_width, width)
        self.size_condition = SizeCondition(width) if size_condition else None
        self.scale_embedding = nn.Embedding(self.schedule.num_scales, width)
        self.start_position = nn.Parameter(torch.empty(1, first, width))
        learned = position == "learned"
        self.position = nn.Parameter(torch.empty(1, self.schedule.num_tokens, width)) if learned else None
        self.shared_modulation = BlockModulation(width) if shared_adaln else None

        def block() -> NextScaleBlock | SandwichBlock:
            if norm == "layer":
                return NextScaleBlock(
                    width, num_heads, mlp_ratio, l2_attention=l2_attention, shared_adaln=shared_adaln,
                    norm_eps=norm_eps,
                )  # fmt: skip
            swiglu = feed_forward == "swiglu"
            feed = SwiGLU(width, int(width * mlp_ratio)) if swiglu else FeedForward(width, round(width * mlp_ratio))
            return SandwichBlock(width, num_heads, feed, text_width=text_width, size_condition=size_condition)

        self.blocks = nn.ModuleList(block() for _ in range(num_layers))
        self.shared_text = None
        if norm == "layer" and text_width is not None:
            heads, head_width = text_heads(num_heads), width // num_heads
            self.shared_text = SharedTextAttention(num_layers, heads, head_width, text_width, unit_keys=l2_attention)
        self.head_modulation = nn.Linear(width, 2 * width)
        self.head = nn.Linear(width, codebook_size)
        self.mask_embedding = nn.Parameter(torch.zeros(width)) if has_mask_embedding else None
        if self.device.type != "meta":
            self._init_weights(init_gate, init_modulation)

    def _check_design(self) -> None:
        """Refuse arguments that no block has together."""
        config = self.config
        for name, known in (("norm", _Norm), ("position", _Position), ("feed_forward", _FeedForward)):
            if config[name] not in get_args(known):
                raise UserError(f"{name} must be {' or '.join(get_args(known))}, got {config[name]!r}. Pick one.")
        own = ("l2_attention", "shared_adaln") if config["norm"] == "rms_sandwich" else ("size_condition",)
        if given := [name for name in own if config[name]]:
            raise UserError(f"a block with norm {config['norm']} has no {given[0]}, got True. Pass {given[0]}=False.")
        if config["norm"] == "layer" and config["feed_forward"] == "swiglu":
            raise UserError("a block with norm layer has feed_forward gelu, got swiglu. Pass norm='rms_sandwich'.")
        if config["norm"] == "rms_sandwich" and config["norm_eps"] != 1e-6:
            raise UserError(f"norm rms_sandwich has norm_eps 1e-6, got {config['norm_eps']}. Leave it out.")
        for name in ("rope_base", "rope_extent"):
            if config["position"] == "learned" and config[name] != self.later_arguments[name]:
                raise UserError(f"{name} belongs to position rope2d, got {config[name]} with learned. Leave it out.")
            if not (config[name] > 0 and math.isfinite(config[name])):
                raise UserError(f"{name} must be positive and finite, got {config[name]}. Usual are 10000 and 128.")
        if config["position"] == "rope2d" and config["width"] // config["num_heads"] % 4:
            raise UserError(
                f"position rope2d needs heads a multiple of 4 wide (pairs of channels for two axes), got width "
                f"{config['width']} and {config['num_heads']} heads. Change one of them."
            )
        if config["text_width"] is not None and config["text_pooled_width"] is None:
            raise UserError(
                f"a text is read as words and as a whole, got text_width {config['text_width']} alone. Pass "
                "text_pooled_width too."
            )

    @property
    def is_markov(self) -> bool:
        """Whether a scale sees nothing but itself."""
        return self.config["scale_attention"] == "markov"

    @property
    def drop_path_rates(self) -> tuple[float, ...]:
        """Stochastic depth rate of every block: 0 at the first, `drop_path` at the last."""
        last = max(self.config["num_layers"] - 1, 1)
        return tuple(self.config["drop_path"] * i / last for i in range(self.config["num_layers"]))

    def condition(
        self,
        class_labels: Int[Tensor, " b"],
        text: TextFeatures | None = None,
        image_sizes: Int[Tensor, "b 2"] | None = None,
    ) -> Conditioning:
        """Class vector, all modulations, and keys and values of the words.

        Args:
            class_labels: 0..num_classes, the last being the null label; all 0 for a model of texts without classes.
            text: one prompt for each of them, for models of texts alone; how it is padded makes no difference.
            image_sizes: original height and width, for models with a size condition; None is 512 x 512.

        Raises UserError where the text is missing, of other widths, or not asked for.
        """
        self._check_asked(len(class_labels), text, image_sizes)
        start = None if self.class_embedding is None else self.class_embedding(class_labels)
        if text is not None and self.text_start is not None:
            pooled = self.text_start(text.pooled.to(self.dtype))
            start = pooled if start is None else start + pooled
        assert start is not None, "a model has classes or a text"
        activated = F.silu(start)
        source = activated if self.shared_modulation is None else self.shared_modulation(activated)
        size = None
        if self.size_condition is not None:
            image_sizes = start.new_full((len(start), 2), 512).int() if image_sizes is None else image_sizes
            size = self.size_condition(image_sizes)
        blocks = [
            block.modulate(start, size) if isinstance(block, SandwichBlock) else block.modulation(source)
            for block in self._blocks()
        ]
        head = self.head_modulation(activated).unflatten(-1, (2, -1))
        return Conditioning(start, tuple(blocks), head, self._seen(text))

    def _blocks(self) -> Iterator[NextScaleBlock | SandwichBlock]:
        yield from cast("Iterable[NextScaleBlock | SandwichBlock]", self.blocks)

    def _seen(self, text: TextFeatures | None) -> tuple[TextKeysValues | None, ...]:
        """Keys and values of the words for each block; None where it sees none."""
        if text is None or self.config["text_width"] is None:
            return (None,) * len(self.blocks)
        words = text.hidden.to(self.dtype)
        if self.shared_text is not None:
            return self.shared_text(words, text.mask)
        return tuple(cast(SandwichBlock, block).keys_values(words, text.mask) for block in self.blocks)

    def _check_asked(self, rows: int, text: TextFeatures | None, image_sizes: Int[Tensor, "b 2"] | None) -> None:
        if image_sizes is not None and self.size_condition is None:
            raise UserError("this model has no size condition, got image_sizes. Leave them out.")
        if text is None or self.text_start is None:
            if text is not None:
                raise UserError("this model knows classes alone, got a text. Leave it out.")
            if self.text_start is not None:
                raise UserError("this model draws from texts, got none. Pass a prompt's; the empty one is no text.")
            return
        if len(text) != rows:
            raise UserError(f"there must be a text for every label, got {len(text)} for {rows}. Pass as many.")
        for name, found in (("text_pooled_width", text.pooled.shape[-1]), ("text_width", text.hidden.shape[-1])):
            if self.config[name] not in (None, found):
                raise UserError(
                    f"this model was made for texts of {name} {self.config[name]}, got {found}. Pass the text encoder "
                    "that it was trained with."
                )

    def _rotary(self, scales: Sequence[int]) -> RotaryTable | None:
        """Table of the tokens of these scales, on the model's device; None where positions are learned."""
        if self.position is not None:
            return None
        head_width = self.config["width"] // self.config["num_heads"]
        settings = {"base": self.config["rope_base"], "extent": self.config["rope_extent"]}
        tables = [scale_rotary_table(self.schedule.sizes[k], head_width, **settings) for k in scales]
        return torch.cat(tables).to(self.device)

    def embed(
        self,
        start: Float[Tensor, "b width"],
        scale_inputs: Float[Tensor, "b inputs d"],
        scales: Sequence[int],
        hidden: Bool[Tensor, "b inputs"] | None = None,
    ) -> Stream:
        """Tokens of `scales`: class vector (scale 0) or word embedding, plus position and scale embeddings."""
        words = self.word_embedding(scale_inputs)
        if hidden is not None and self.mask_embedding is not None:
            words = words + hidden.unsqueeze(-1) * self.mask_embedding
        if scales[0] == 0:
            words = torch.cat([start.unsqueeze(1) + self.start_position, words], dim=1)
        # one split and one concatenation: a slice per scale would pad its gradient to the whole table
        levels = self.scale_embedding.weight
        if self.position is None:
            return words + torch.cat([levels[k].expand(1, self.schedule.lengths[k], -1) for k in scales], dim=1)
        positions = self.position.split(list(self.schedule.lengths), dim=1)
        return words + torch.cat([positions[k] + levels[k] for k in scales], dim=1)

    def forward(
        self,
        class_labels: Int[Tensor, " b"],
        scale_inputs: Float[Tensor, "b inputs d"],
        text: TextFeatures | None = None,
        *,
        image_sizes: Int[Tensor, "b 2"] | None = None,
        scales: Sequence[int] | None = None,
        keep: Float[Tensor, "b layers 2"] | None = None,
        hidden: Bool[Tensor, "b inputs"] | None = None,
    ) -> NextScaleTransformerOutput:
        """Teacher forcing: logits of every token in one pass.

        Args:
            class_labels: 0..num_classes; num_classes is the null label.
            text: as for `condition`, as are `image_sizes`.
            scale_inputs: `MultiScaleVQVAE.scale_inputs`, restricted to `scales` where those are given.
            scales: the scales to run, increasing; None runs all. Causal models take a prefix 0..k, Markov models any.
            keep: stochastic depth factors per image, block and branch; None keeps everything.
            hidden: True at inputs whose own token is hidden (`partial_scale_input`); None where none shows any.
        """
        known = tuple(range(self.schedule.num_scales))
        scales = known if scales is None else tuple(scales)
        if not scales or scales != tuple(sorted(set(scales) & set(known))):
            raise UserError(
                f"scales must be some of 0..{known[-1]} in increasing order, each once, got {scales}. "
                "Leave it out to run them all."
            )
        lengths = [self.schedule.lengths[k] for k in scales]
        expected = sum(lengths) - (lengths[0] if scales[0] == 0 else 0)
        if scale_inputs.shape[1] != expected:
            raise UserError(
                f"scale_inputs must hold {expected} tokens for scales {scales}, got {scale_inputs.shape[1]}. "
                "Leave out those of other scales; scale 0 has none."
            )
        if not self.is_markov and scales != tuple(range(len(scales))):
            raise UserError(f"a causal model needs every earlier scale: scales must be 0..k, got {scales}. Fill it up.")
        conditioning = self.condition(class_labels, text, image_sizes)
        attend = markov_attention(lengths) if self.is_markov else causal_attention(lengths)
        rotary = self._rotary(scales)
        attend = attend if rotary is None else rotated(attend, rotary)
        x = self.embed(conditioning.start, scale_inputs, scales, hidden)
        for i, block in enumerate(self.blocks):
            own = None if keep is None else keep[:, i]
            x = self.run_block(block, x, conditioning.blocks[i], attend, own, conditioning.text[i])
        return NextScaleTransformerOutput(self._logits(x, conditioning.head))

    def forward_scale(
        self,
        scale: int,
        scale_input: Float[Tensor, "b inputs d"],
        conditioning: Conditioning,
        cache: KeyValueCache | None = None,
        *,
        hidden: Bool[Tensor, "b inputs"] | None = None,
    ) -> Float[Tensor, "b l v"]:
        """Logits of one scale (from 0) during generation; causal models go through the scales in order.

        `scale_input` is `next_scale_input` of the features so far, (b, 0, codebook_dim) at scale 0. `cache` is from
        `new_cache`. `hidden` is as for `forward`.
        """
        if (cache is None) != self.is_markov:
            raise UserError(
                "a causal model needs a cache and a Markov model takes none, got the opposite. Pass model.new_cache(b)."
            )
        x = self.embed(conditioning.start, scale_input, (scale,), hidden)
        own, rotary = markov_attention([x.shape[1]]), self._rotary((scale,))
        for i, block in enumerate(self.blocks):
            attend = own if cache is None else cache.attention(i)
            attend = attend if rotary is None else rotated(attend, rotary)
            x = block(x, conditioning.blocks[i], attend, None, conditioning.text[i])
        if cache is not None:
            cache.advance(x.shape[1])
        return self._logits(x, conditioning.head)

    def new_cache(self, batch: int, *, num_scales: int | None = None) -> KeyValueCache | None:
        """An empty cache for `batch` rows and the first `num_scales` scales (None: all); None for a Markov model."""
        if self.is_markov:
            return None
        heads = self.config["num_heads"]
        tokens = self.schedule.offsets[-1 if num_scales is None else num_scales]
        return KeyValueCache(
            len(self.blocks), batch, heads, tokens, self.config["width"] // heads, device=self.device, dtype=self.dtype
        )

    def compile_blocks(self) -> None:
        """Run the blocks through `torch.compile` from now on, one compiled block for all of them and for each length.

        Results equal those of before within rounding, so tokens near a tie may differ. UserError as `check_compiler`.
        """
        check_compiler(self.device)
        # one entry per length and number of rows; the default of 8 would leave later scales uncompiled
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 8 * self.schedule.num_scales)
        for block in self.blocks:
            block.compile(dynamic=False)

    def _logits(self, x: Stream, modulation: Float[Tensor, "b 2 width"]) -> Float[Tensor, "b l v"]:
        scale, shift = (m.unsqueeze(1) for m in modulation.to(x.dtype).unbind(1))
        return self.head(modulated_norm(x, scale, shift, self.config["norm_eps"]))

    def _init_weights(self, init_gate: float, init_modulation: float) -> None:
        """Spec of VAR, 2.5, and of Switti, 4.5: all weights N(0, 1 / (3 width)), branches and head scaled down."""
        width, depth = self.config["width"], self.config["num_layers"]
        std = math.sqrt(1 / width / 3)
        with torch.no_grad():
            for module in self.modules():
                if isinstance(module, (nn.Linear, nn.Embedding)):
                    nn.init.trunc_normal_(module.weight, std=std)
                if isinstance(module, nn.Linear) and module.bias is not None:
                    nn.init.zeros_(module.bias)
            nn.init.trunc_normal_(self.start_position, std=std)
            if self.position is not None:
                nn.init.trunc_normal_(self.position, std=std)
            if self.text_start is not None and self.class_embedding is not None:
                # beside classes a text starts as nothing, as the gates of its words do
                nn.init.zeros_(self.text_start.weight)
            self.head.weight.mul_(0.02)
            self.head_modulation.weight.mul_(init_modulation)
            for block in self._blocks():
                if isinstance(block, SandwichBlock):
                    block.scale_initial_weights(depth, init_gate, init_modulation)
                    continue
                block.attention.proj.weight.div_(math.sqrt(2 * depth))
                block.feed_forward.down.weight.div_(math.sqrt(2 * depth))
                if isinstance(block.modulation, SharedModulationOffset):
                    gates, others = block.modulation.offset.split((2, 4), dim=1)
                else:
                    gates, others = block.modulation.linear.weight.split((2 * width, 4 * width))
                gates.mul_(init_gate)
                others.mul_(init_modulation)


def text_heads(num_heads: int) -> int:
    """How many heads of a block of VAR look at words: a third, rounded up."""
    return -(-num_heads // 3)


def visible_pairs(scale_sizes: Sequence[int], *, markov: bool) -> int:
    """Pairs (token, token it sees): its own scale, and for a causal model all earlier ones.

    >>> visible_pairs((1, 2), markov=True), visible_pairs((1, 2), markov=False)
    (17, 21)
    """
    lengths = [s * s for s in scale_sizes]
    seen = lengths if markov else [sum(lengths[: k + 1]) for k in range(len(lengths))]
    return sum(n * m for n, m in zip(lengths, seen, strict=True))


def sampling_flops(config: Mapping[str, Any], *, num_words: int = 77) -> int:
    """Multiplications and additions of all forwards of one image, without guidance and without pixels.

    2 (L (n (4 w + f h) w + d w + w V) + 2 n w P + (6 m + 2) w^2), with L tokens, n layers, width w, a feed-forward of f
    matrices (2, or 3 with "swiglu") and hidden width h, d the width of a code, V codes, P visible pairs, and m
    modulations (n, or 1 where they are shared). A text adds 2 p w, p being the width of a prompt's vector, and where
    blocks look at T words of width t 4 n T (L + t) u with the heads of their own attention, u wide in all, or 2 n (L (2
    w^2 + 2 w T) + 2 T t w) in Switti's; a size condition adds 2 w^2. Guidance adds the same again for the scales that
    it is on at.

    Args:
        config: arguments of the transformer; those that came later may be missing.
        num_words: T; a model of classes alone does not read any.
    """
    config = {**NextScaleTransformer.later_arguments, **config}
    sizes, width, num_layers = config["scale_sizes"], config["width"], config["num_layers"]
    tokens, hidden = sum(s * s for s in sizes), width * config["mlp_ratio"]
    feed_forward = 3 * int(hidden) if config["feed_forward"] == "swiglu" else 2 * hidden
    per_token = num_layers * (4 * width + feed_forward) * width
    per_token += width * (config["codebook_dim"] + config["codebook_size"])
    attention = 2 * num_layers * width * visible_pairs(sizes, markov=config["scale_attention"] == "markov")
    once = (6 * (1 if config["shared_adaln"] else num_layers) + 2) * width**2
    once += (config["text_pooled_width"] or 0) * width + (width**2 if config["size_condition"] else 0)
    if config["text_width"] is not None and config["norm"] == "layer":
        seen_width = text_heads(config["num_heads"]) * width // config["num_heads"]
        per_token += num_layers * 2 * seen_width * num_words
        once += num_layers * 2 * num_words * config["text_width"] * seen_width
    elif config["text_width"] is not None:
        per_token += num_layers * 2 * width * (width + num_words)
        once += num_layers * 2 * num_words * config["text_width"] * width
    return round(2 * (tokens * per_token + attention + once))

"""A published D-AR prior (LlamaGen's transformer with 1-D rotary positions) to a stock `LlamaForCausalLM`.

Two things differ in the layout. Published rotary positions turn channels (2j, 2j + 1) of a head together, Llama's turn
(j, j + half): the rows of queries and keys are put in the other order. And the classes have a table of their own, which
becomes the last rows of the vocabulary; they are never predicted, so the head gets rows of zeros for them.
"""

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import LlamaForCausalLM

from isthmus.conversion.renaming import Converted, StateDict, indexed, load_strict, rename, require
from isthmus.errors import UserError
from isthmus.models.next_token_prior import TokenLayout, llama_config

PUBLISHED_NUM_TOKENS = 256
PUBLISHED_HEAD_WIDTH = 64

# (published key, Llama's key); those in angle brackets are taken apart or put together below
_KEYS = [
    (r"tok_embeddings\.weight", r"<codes>"),
    (r"cls_embedding\.embedding_table\.weight", r"<classes>"),
    (r"output\.weight", r"<head>"),
    (r"norm\.weight", r"model.norm.weight"),
    (r"layers\.(\d+)\.attention\.wqkv\.weight", r"<qkv>.\1"),
    (r"layers\.(\d+)\.attention\.wo\.weight", r"model.layers.\1.self_attn.o_proj.weight"),
    (r"layers\.(\d+)\.feed_forward\.w1\.weight", r"model.layers.\1.mlp.gate_proj.weight"),
    (r"layers\.(\d+)\.feed_forward\.w3\.weight", r"model.layers.\1.mlp.up_proj.weight"),
    (r"layers\.(\d+)\.feed_forward\.w2\.weight", r"model.layers.\1.mlp.down_proj.weight"),
    (r"layers\.(\d+)\.attention_norm\.weight", r"model.layers.\1.input_layernorm.weight"),
    (r"layers\.(\d+)\.ffn_norm\.weight", r"model.layers.\1.post_attention_layernorm.weight"),
]
_DROPPED = {
    r"layers\.\d+\.attention\.kv_cache\.[kv]_cache": "keys and values of the last image the model drew before saving"
}
_WHAT = "D-AR prior"


def convert_next_token_prior_state(
    raw: Mapping[str, Tensor], *, num_tokens: int = PUBLISHED_NUM_TOKENS, num_heads: int | None = None
) -> Converted:
    """Published prior weights to arguments of `TokenLayout` and `llama_config`, and Llama's weights.

    Args:
        raw: weights by their published keys.
        num_tokens: tokens of an image, which the file does not tell.
        num_heads: the file does not tell them either; None takes heads that are 64 wide, as in every published size up
            to XXXL.

    Raises:
        UserError: a key is unknown or missing, or a shape is none of this network's.
    """
    state, dropped = rename(raw, _KEYS, _DROPPED, _WHAT, "cls_embedding.embedding_table.weight")
    first = ("<codes>", "<classes>", "<head>", "<qkv>.0", "model.layers.0.mlp.gate_proj.weight")
    require(state, first, _WHAT)
    codebook_size, width = state["<codes>"].shape
    num_heads = num_heads or _published_heads(width)
    codes, classes, head = (state.pop(name) for name in ("<codes>", "<classes>", "<head>"))
    if head.shape != codes.shape or classes.shape[1] != width or len(classes) < 1:
        raise UserError(
            f"a {_WHAT} has one embedding and one output row per code, and classes as wide, got {tuple(codes.shape)}, "
            f"{tuple(head.shape)} and {tuple(classes.shape)}. Pass a published file."
        )
    if num_heads < 1 or width % (2 * num_heads):
        raise UserError(
            f"num_heads must cut the width of the {_WHAT} ({width}) into heads of an even width, got {num_heads}. Pass "
            "the number it was trained with."
        )
    num_layers = len(indexed(state, r"<qkv>\.(\d+)"))
    for index in range(num_layers):
        state |= _split_qkv(state.pop(f"<qkv>.{index}", None), index, width, num_heads)
    state["model.embed_tokens.weight"] = torch.cat([codes, classes])
    state["lm_head.weight"] = torch.cat([head, torch.zeros_like(classes)])
    arguments = {
        "codebook_size": codebook_size,
        "num_classes": len(classes) - 1,
        "num_tokens": num_tokens,
        "width": width,
        "num_layers": num_layers,
        "num_heads": num_heads,
        "feed_forward_width": state["model.layers.0.mlp.gate_proj.weight"].shape[0],
    }
    return Converted(arguments, state, dropped)


def build_next_token_prior(converted: Converted) -> LlamaForCausalLM:
    """A prior with the converted weights, in eval mode."""
    shape = dict(converted.arguments)
    layout = TokenLayout(**{name: shape.pop(name) for name in ("codebook_size", "num_classes", "num_tokens")})
    prior = LlamaForCausalLM(llama_config(layout, **shape))
    load_strict(prior, converted.state, "the prior file")
    return prior.eval()


def halves_apart(weight: Float[Tensor, "heads_c width"], num_heads: int) -> Float[Tensor, "heads_c width"]:
    """Rows of every head in the order 0, 2, 4, ..., 1, 3, 5, ...: rotated pairs of neighbours become pairs of halves.

    >>> halves_apart(torch.arange(8.0).unsqueeze(1), num_heads=2).flatten().tolist()
    [0.0, 2.0, 1.0, 3.0, 4.0, 6.0, 5.0, 7.0]
    """
    pairs = weight.unflatten(0, (num_heads, -1, 2))
    return pairs.transpose(1, 2).flatten(0, 2)


def _split_qkv(weight: Tensor | None, index: int, width: int, num_heads: int) -> StateDict:
    if weight is None or tuple(weight.shape) != (3 * width, width):
        found = "nothing" if weight is None else str(tuple(weight.shape))
        raise UserError(
            f"a {_WHAT} has as many key as query heads, so layers.{index}.attention.wqkv is {(3 * width, width)}, got "
            f"{found}. Pass a published file."
        )
    q, k, v = weight.split(width)
    prefix = f"model.layers.{index}.self_attn"
    return {
        f"{prefix}.q_proj.weight": halves_apart(q, num_heads),
        f"{prefix}.k_proj.weight": halves_apart(k, num_heads),
        f"{prefix}.v_proj.weight": v,
    }


def _published_heads(width: int) -> int:
    if width % PUBLISHED_HEAD_WIDTH:
        raise UserError(
            f"the heads of a {_WHAT} are {PUBLISHED_HEAD_WIDTH} wide unless num_heads says otherwise, got width "
            f"{width}. Pass num_heads."
        )
    return width // PUBLISHED_HEAD_WIDTH

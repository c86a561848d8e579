"""The sequential image tokenizer of D-AR: pixels to a sequence of tokens, and tokens to what drives the diffusion.

Source: Gao and Shou, "D-AR: Diffusion via Autoregressive Models", section 3.1 (published encoder, quantiser and causal
stack: 115.8M parameters; the pixel decoder is `FlowDecoder`).
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from isthmus.dar.attention import (
    NORM_EPS,
    RotarySelfAttention,
    SharedBatchNorm,
    check_sides,
    context_causal_attention,
    grid_rotary_table,
    init_linear_layers,
    plain_norm,
    token_causal_attention,
    with_unrotated,
)
from isthmus.dar.scheduler import tokens_of_step
from isthmus.errors import UserError
from isthmus.nn.attention import Attend, FeedForward, KeyValueCache
from isthmus.nn.precision import whole_fp32
from isthmus.nn.quantization import nearest_code
from isthmus.nn.rotary import RotaryTable
from isthmus.nn.saved_model import SavedModel, records_arguments
from isthmus.nn.shapes import Images

Rows = Float[Tensor, "b l width"]
TokenIds = Int[Tensor, "b n"]
Codes = Float[Tensor, "b n d"]
Condition = Float[Tensor, "b n condition_width"]


class LinearQueries(nn.Module):
    """One vector per token: `rank` numbers read off the image, averaged to `side` pixels, by a linear map, widened.

    Attention from queries that start alike takes long to tell places apart.
    """

    def __init__(self, num_tokens: int, width: int, *, side: int, rank: int):
        super().__init__()
        self.side, self.num_tokens = side, num_tokens
        self.read = nn.Linear(3 * side**2, num_tokens * rank)
        self.widen = nn.Linear(rank, width)

    def forward(self, images: Images) -> Float[Tensor, "b n width"]:
        """Images in [-1, 1] of any sides."""
        small = F.adaptive_avg_pool2d(images, self.side).flatten(1).to(self.read.weight.dtype)
        return self.widen(self.read(small).unflatten(1, (self.num_tokens, -1)))


@dataclass
class DiffusionTokenizerEncoding:
    """Tokens coarse to fine; `latents` and `quantized` (the codes that were found) are unit vectors in fp32."""

    token_ids: TokenIds
    latents: Codes
    quantized: Codes


@dataclass
class DiffusionTokenizerOutput:
    """What training reads."""

    condition: Condition
    token_ids: TokenIds | None
    """None where quantisation was left out."""
    latents: Codes
    """Unit vectors, fp32."""
    quantized: Codes
    """The codes with the straight-through gradient; the latents where quantisation was left out."""
    codebook_errors: Float[Tensor, "b n"]
    """Mean over channels of (code - sg(latent))^2."""
    commitment_errors: Float[Tensor, "b n"]
    """Mean over channels of (sg(code) - latent)^2, not weighted."""


class GatedBlock(nn.Module):
    """x += gate1 * attention(norm1(x)); x += gate2 * feed_forward(norm2(x)), with a learned gate per channel."""

    def __init__(self, width: int, head_width: int, init_gate: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=NORM_EPS)
        self.norm2 = nn.LayerNorm(width, eps=NORM_EPS)
        self.attention = RotarySelfAttention(width, head_width)
        self.feed_forward = FeedForward(width, 4 * width, activation=F.silu)
        self.gate1 = nn.Parameter(torch.full((width,), float(init_gate)))
        self.gate2 = nn.Parameter(torch.full((width,), float(init_gate)))

    def forward(self, x: Rows, rotary: RotaryTable | None, attend: Attend) -> Rows:
        """Rows of the same shape."""
        x = torch.addcmul(x, self.gate1, self.attention(self.norm1(x), rotary, attend))
        return torch.addcmul(x, self.gate2, self.feed_forward(self.norm2(x)))


class DiffusionTokenizer(SavedModel):
    """Patch transformer with causal queries, codebook of unit vectors, causal stack over the codes.

    Query i sees all patches and the queries before it, so the first tokens carry what matters most; the condition of
    token i depends on tokens 0..i alone, so a group of tokens can be decoded before the next one exists.

    Args:
        image_size: side of the images that the tokenizer was trained on, in pixels; others are encoded as well.
        patch_size: side of an encoder patch in pixels.
        width: width of the encoder.
        num_layers: blocks of the encoder.
        condition_width: width of the causal stack, which is what the decoder attends to.
        num_condition_layers: blocks of the causal stack; 0 leaves position and norm.
        num_tokens: tokens of an image.
        num_groups: groups that the tokens fall into; a solver step is driven by one of them.
        tokens_per_step: tokens that drive a solver step; None is one group, more are overlapping windows.
        codebook_size: number of codes.
        codebook_dim: width of a code.
        table_rows: rows of the tables of queries and positions, of which the first `num_tokens` are used; None is
            `num_tokens`.
        low_rank_queries: queries are a table of `query_rank` columns and a linear layer, not a whole table.
        query_rank: columns of that table.
        rotary_base: base of the rotary angles of the patches.
        head_width: width of an attention head; divides both widths.
        query_std: standard deviation of the initial query table.
        init_gate: initial gates of all blocks; 0 starts every block as the identity.
        position_table: add a learned vector per patch, which ties the tokenizer to `image_size`.
        linear_query_rank: add to each query as many numbers read off the shrunk image by a linear map, widened; None
            starts every image from the same queries.
        linear_query_side: side of the shrunk image in pixels.
        latent_norm: batch normalisation (without parameters) of the latents before they are made unit vectors.
        quantized: False keeps the tokens continuous: no codebook, no token ids.

    Raises UserError for sizes that do not fit each other.

    >>> tokenizer = DiffusionTokenizer(
    ...     image_size=8, patch_size=4, width=8, num_layers=1, condition_width=8, num_condition_layers=1, num_tokens=4,
    ...     num_groups=2, codebook_size=16, codebook_dim=4, head_width=4)
    >>> token_ids = tokenizer.encode(torch.zeros(3, 3, 8, 8)).token_ids
    >>> token_ids.shape, tokenizer.condition(token_ids[:, :2]).shape
    (torch.Size([3, 4]), torch.Size([3, 2, 8]))
    """

    @records_arguments
    def __init__(
        self,
        *,
        image_size: int = 256,
        patch_size: int = 16,
        width: int = 768,
        num_layers: int = 8,
        condition_width: int = 768,
        num_condition_layers: int = 8,
        num_tokens: int = 256,
        num_groups: int = 8,
        tokens_per_step: int | None = None,
        codebook_size: int = 16384,
        codebook_dim: int = 8,
        table_rows: int | None = 1024,
        low_rank_queries: bool = True,
        query_rank: int = 8,
        rotary_base: float = 10_000.0,
        head_width: int = 64,
        query_std: float = 1.0,
        init_gate: float = 0.0,
        position_table: bool = False,
        linear_query_rank: int | None = None,
        linear_query_side: int = 16,
        latent_norm: bool = False,
        quantized: bool = True,
    ):
        super().__init__()
        if image_size % patch_size:
            raise UserError(f"image_size must be a multiple of patch_size, got {image_size} and {patch_size}.")
        self.tokens_per_step = tokens_of_step(num_tokens, num_groups, tokens_per_step)
        self.tokens_per_group = num_tokens // num_groups
        if table_rows is not None and table_rows < num_tokens:
            raise UserError(
                f"table_rows must be at least num_tokens ({num_tokens}), got {table_rows}. None takes num_tokens."
            )
        rows, patches = num_tokens if table_rows is None else table_rows, (image_size // patch_size) ** 2
        self.patch_embedding = nn.Conv2d(3, width, patch_size, stride=patch_size)
        self.patch_position = nn.Parameter(torch.empty(patches, width)) if position_table else None
        self.query_table = nn.Parameter(torch.empty(rows, query_rank if low_rank_queries else width))
        self.query_linear = nn.Linear(query_rank, width) if low_rank_queries else nn.Identity()
        self.linear_queries = (
            None
            if linear_query_rank is None
            else LinearQueries(num_tokens, width, side=linear_query_side, rank=linear_query_rank)
        )
        self.encoder = nn.ModuleList(GatedBlock(width, head_width, init_gate) for _ in range(num_layers))
        self.to_code = nn.Linear(width, codebook_dim, bias=False)
        self.latent_batch_norm = SharedBatchNorm(codebook_dim) if latent_norm else None
        self.codebook = nn.Embedding(codebook_size, codebook_dim) if quantized else None
        self.from_code = nn.Linear(codebook_dim, condition_width, bias=False)
        self.token_position = nn.Parameter(torch.empty(rows, condition_width))
        self.condition_layers = nn.ModuleList(
            GatedBlock(condition_width, head_width, init_gate) for _ in range(num_condition_layers)
        )
        if self.device.type != "meta":
            self._init_weights(query_std)

    def latents(self, images: Images) -> Codes:
        """Images in [-1, 1], of any sides that the patch divides, to unit vectors, in fp32.

        Raises UserError for other sides, which are `image_size` where patches have learned positions.
        """
        patches = self._embed_patches(images)
        queries = self.query_linear(self.query_table[: self.config.num_tokens])
        queries = queries.to(patches.dtype).expand(len(images), -1, -1)
        if self.linear_queries is not None:
            queries = queries + self.linear_queries(images)
        rows, columns = (side // self.config.patch_size for side in images.shape[2:])
        head_width, base, context = self.config.head_width, self.config.rotary_base, patches.shape[1]
        rotary = grid_rotary_table(rows, columns, head_width, base, device=patches.device)
        rotary = with_unrotated(rotary, self.config.num_tokens)
        x = torch.cat([patches, queries], dim=1)
        x = plain_norm(self._run(self.encoder, x, rotary, context_causal_attention(context))[:, context:])
        # fp32 under any autocast: rounding here is another code
        with torch.autocast(x.device.type, enabled=False):
            z = self.to_code(x.to(self.to_code.weight.dtype))
            if self.latent_batch_norm is not None:
                z = self.latent_batch_norm(z.flatten(0, 1)).view_as(z)
            return F.normalize(z.float(), dim=-1)

    @whole_fp32()
    def encode(self, images: Images) -> DiffusionTokenizerEncoding:
        """Images in [-1, 1] to tokens. Raises UserError as `latents`, and where the tokenizer has no codebook."""
        self._codebook()
        latents = self.latents(images)
        token_ids = self.requantize(latents)
        return DiffusionTokenizerEncoding(token_ids, latents, self.lookup(token_ids))

    def requantize(self, latents: Codes) -> TokenIds:
        """Latents, which need not be unit vectors, to ids of the nearest codes. UserError without a codebook."""
        found = nearest_code(latents.flatten(0, 1), self._codebook().weight, normalize=True)
        return found.view(latents.shape[:2])

    def lookup(self, token_ids: TokenIds) -> Codes:
        """Unit codes, in fp32 whatever the precision of the weights."""
        return F.normalize(self._codebook()(token_ids).float(), dim=-1)

    def check_token_ids(self, token_ids: TokenIds) -> None:
        """Raise UserError unless every id names a code; waits for the device."""
        size = self.config.codebook_size
        if token_ids.numel() and not 0 <= int(token_ids.min()) <= int(token_ids.max()) < size:
            raise UserError(
                f"token_ids must lie in 0..{size - 1} (codebook_size = {size}), got {int(token_ids.min())}.."
                f"{int(token_ids.max())}. Pass token ids of this tokenizer."
            )

    def condition(self, token_ids: TokenIds, cache: KeyValueCache | None = None) -> Condition:
        """What the decoder attends to, for a prefix of whole groups; see `condition_vectors`.

        An id that names no code raises UserError on a CPU alone: on a GPU looking would wait for the device.
        """
        if token_ids.device.type == "cpu":
            self.check_token_ids(token_ids)
        return self.condition_vectors(self.lookup(token_ids), cache)

    def condition_vectors(self, quantized: Codes, cache: KeyValueCache | None = None) -> Condition:
        """The same for unit vectors instead of ids (training, continuous tokens), from the first token on.

        With a `cache` (from `new_cache`) they are the tokens after those in it, and are stored, so that a new group
        costs only itself. Raises UserError where the tokens are no whole groups, or more than `num_tokens`.
        """
        start, new = 0 if cache is None else cache.length, quantized.shape[1]
        end, group, most = start + new, self.tokens_per_group, self.config.num_tokens
        if new == 0 or new % group or end > most:
            raise UserError(
                f"tokens must come in whole groups of {group} and be at most {most} in all, got {new} after {start}. "
                "Pass the tokens of complete groups."
            )
        x = self.from_code(quantized.to(self.from_code.weight.dtype)) + self.token_position[start:end]
        if cache is None:
            return plain_norm(self._run(self.condition_layers, x, None, token_causal_attention))
        for i, block in enumerate(self.condition_layers):
            x = block(x, None, cache.attention(i, causal=True))
        cache.advance(new)
        return plain_norm(x)

    def new_cache(self, batch: int) -> KeyValueCache:
        """An empty cache of the causal stack for `batch` images."""
        layers, head_width = len(self.condition_layers), self.config.head_width
        num_heads, num_tokens = self.config.condition_width // head_width, self.config.num_tokens
        return KeyValueCache(layers, batch, num_heads, num_tokens, head_width, device=self.device, dtype=self.dtype)

    def forward(self, images: Images, *, quantize: bool = True) -> DiffusionTokenizerOutput:
        """Encode for training; without `quantize`, or a codebook, latents are passed on and both errors are 0."""
        latents = self.latents(images)
        if not quantize or self.codebook is None:
            zero = torch.zeros_like(latents[..., 0])
            return DiffusionTokenizerOutput(self.condition_vectors(latents), None, latents, latents, zero, zero)
        token_ids = self.requantize(latents)
        codes = self.lookup(token_ids)
        straight_through = latents + (codes - latents).detach()
        return DiffusionTokenizerOutput(
            self.condition_vectors(straight_through),
            token_ids,
            latents,
            straight_through,
            (codes - latents.detach()).square().mean(dim=-1),
            (codes.detach() - latents).square().mean(dim=-1),
        )

    def _embed_patches(self, images: Images) -> Rows:
        patch = self.config.patch_size
        table = None if self.patch_position is None else self.config.image_size // patch
        check_sides(*images.shape[2:], patch=patch, table=table)
        x = plain_norm(self.patch_embedding(images.to(self.patch_embedding.weight.dtype)).flatten(2).transpose(1, 2))
        return x if self.patch_position is None else x + self.patch_position

    def _codebook(self) -> nn.Embedding:
        if self.codebook is None:
            raise UserError(
                "token ids need a codebook, and this tokenizer keeps its tokens continuous (quantized=False). "
                "Use latents(images) and condition_vectors(latents)."
            )
        return self.codebook

    def _run(self, blocks: nn.ModuleList, x: Rows, rotary: RotaryTable | None, attend: Attend) -> Rows:
        for block in blocks:
            x = self.run_block(block, x, rotary, attend)
        return x

    def _init_weights(self, query_std: float) -> None:
        """Spec of D-AR, 1.3 to 1.5: linear layers of blocks and tables from truncated normals, codes on the sphere."""
        nn.init.trunc_normal_(self.query_table, std=query_std, a=-2 * query_std, b=2 * query_std)
        nn.init.trunc_normal_(self.token_position, std=0.02)
        if self.patch_position is not None:
            nn.init.trunc_normal_(self.patch_position, std=0.02)
        for block in (*self.encoder, *self.condition_layers):
            init_linear_layers(block)
        if self.codebook is not None:
            nn.init.uniform_(self.codebook.weight, -1, 1)
            with torch.no_grad():
                self.codebook.weight.copy_(F.normalize(self.codebook.weight, dim=-1))

"""Generation of next-token models, token by token and group by group, and the exact likelihood of a sequence.

Source: Gao and Shou, "D-AR: Diffusion via Autoregressive Models" (arXiv 2505.23660), section 3.3; spec of D-AR, 2.3 and
2.5. The chain rule is exact: log p(tokens | class) is the sum of log p(token p | class, tokens before p).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor

from isthmus.dar.llama_decoding import LlamaDecoder
from isthmus.dar.prior import TokenLayout, next_token_inputs, next_token_logits, next_token_loss
from isthmus.errors import UserError
from isthmus.nn.draws import token_uniforms
from isthmus.nn.guidance import guidance_values
from isthmus.nn.sampling import check_filters, draw_tokens, filter_logits
from isthmus.nn.stored_llama import StoredLlama
from isthmus.pipelines.options import SamplingOptions

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM


def generate_tokens(
    transformer: "LlamaForCausalLM | StoredLlama",
    layout: TokenLayout,
    class_labels: Int[Tensor, " b"],
    image_seeds: Sequence[tuple[int, int]],
    options: SamplingOptions | Sequence[SamplingOptions],
    *,
    stops: Sequence[int],
    prefix_token_ids: Int[Tensor, "rows p"] | None = None,
    prefix_lengths: Sequence[int] | None = None,
    decoder: LlamaDecoder | None = None,
) -> Iterator[Int[Tensor, "b _"]]:
    """Draw tokens and yield them, (b, n), up to each stop as soon as they exist.

    Args:
        class_labels: 0..num_classes; num_classes is the null label, for which guidance is off.
        image_seeds: one (seed, image index) per image. Every random number of an image follows from its own pair.
        options: guidance, filters, temperature: for all images, or one per image. Guidance given as a sequence or a
            schedule runs over the tokens. All sampling arithmetic is fp32, whatever the type of the weights.
        stops: token counts, not decreasing; item i of the result holds tokens stops[i - 1]..stops[i] - 1. After the
            last one nothing more is computed.
        prefix_token_ids: known first tokens, which are read and not drawn (layout control).
        prefix_lengths: how many of them hold, per image; None takes all.
        decoder: laid-out weights to use again; None lays them out for this call.

    Raises UserError at once, before the first tokens are asked for, where an argument is not usable.
    """
    each = _one_per_image(options, class_labels, image_seeds)
    for one in each:
        check_next_token_options(one, layout)
    _check_stops(stops, layout)
    labels = class_labels.tolist()
    if not all(0 <= label <= layout.num_classes for label in labels):
        raise UserError(f"class labels must be 0..{layout.num_classes} (the null label), got {labels}.")
    lengths = _checked_prefix(prefix_token_ids, prefix_lengths, layout, len(labels))
    plan = _Plan.of(layout, labels, image_seeds, each, transformer.device)
    if decoder is not None:
        decoder.check_belongs(StoredLlama.of(transformer), layout)
    tokens = torch.zeros(len(labels), layout.num_tokens, dtype=torch.long, device=transformer.device)
    if prefix_token_ids is not None:
        tokens[:, : prefix_token_ids.shape[1]] = prefix_token_ids.to(transformer.device)
    if all(stop <= min(lengths) for stop in stops):
        return (tokens[:, start:stop].clone() for start, stop in pairwise((0, *stops)))
    if decoder is None:
        rows = len(labels) * (2 if min(lengths) < plan.num_with_null_rows else 1)
        decoder = LlamaDecoder(transformer, layout, num_rows=rows)
    return _outside_inference_mode(_turns(decoder, layout, plan, tokens, lengths, stops))


@dataclass(frozen=True)
class _Plan:
    """Everything about the draws that is known before the first token.

    Attributes:
        guidance: (b, tokens), 1 = off.
        guided: per token, whether any image is guided there.
        temperature: None where it is 1 for all.
        filters: (top_k, top_p, rows that use them); rows None stands for all.
        uniforms: one number in [0, 1) per token.
    """

    class_labels: Int[Tensor, " b"]
    guidance: Float[Tensor, "b n"]
    guided: tuple[bool, ...]
    temperature: Float[Tensor, "b 1"] | None
    filters: tuple[tuple[int | None, float | None, Int[Tensor, " _"] | None], ...]
    uniforms: Float[Tensor, "b n"]

    @classmethod
    def of(
        cls,
        layout: TokenLayout,
        labels: Sequence[int],
        image_seeds: Sequence[tuple[int, int]],
        options: Sequence[SamplingOptions],
        device: torch.device,
    ) -> "_Plan":
        # an image without a class has nothing to be guided away from
        guidance = [
            guidance_values(one.guidance_scale if label != layout.null_class_id else 1.0, layout.num_tokens)
            for one, label in zip(options, labels, strict=True)
        ]
        temperatures = [float(one.temperature) for one in options]
        by_filter: dict[tuple[int | None, float | None], list[int]] = {}
        for row, one in enumerate(options):
            by_filter.setdefault((one.top_k, one.top_p), []).append(row)
        return cls(
            class_labels=torch.tensor(labels, device=device),
            guidance=torch.tensor(guidance, device=device, dtype=torch.float32),
            guided=tuple(any(value != 1 for value in column) for column in zip(*guidance, strict=True)),
            temperature=None
            if set(temperatures) == {1.0}
            else torch.tensor(temperatures, device=device, dtype=torch.float32).unsqueeze(1),
            filters=tuple(
                (top_k, top_p, torch.tensor(rows, device=device) if len(by_filter) > 1 else None)
                for (top_k, top_p), rows in by_filter.items()
            ),
            uniforms=token_uniforms(image_seeds, 0, layout.num_tokens).to(device),
        )

    @property
    def num_with_null_rows(self) -> int:
        """Tokens for which null rows run: up to the last guided one, whose attention reads the keys of all before."""
        return max((position + 1 for position, guided in enumerate(self.guided) if guided), default=0)

    def draw(self, logits: Float[Tensor, "rows v"], position: int) -> Int[Tensor, " b"]:
        """Guide, temper, filter and draw one token per image; null rows lie behind the others."""
        batch = len(self.class_labels)
        cond, uncond = logits[:batch], logits[batch:]
        if self.guided[position]:
            cond = torch.lerp(uncond, cond, self.guidance[:, position : position + 1])
        if self.temperature is not None:
            cond = cond / self.temperature
        for top_k, top_p, rows in self.filters:
            if rows is None:
                cond = filter_logits(cond, top_k=top_k, top_p=top_p)
            elif (top_k, top_p) != (None, None):
                cond = cond.index_copy(0, rows, filter_logits(cond[rows], top_k=top_k, top_p=top_p))
        return draw_tokens(cond.unsqueeze(1), self.uniforms[:, position : position + 1]).squeeze(1)


def _turns(
    decoder: LlamaDecoder,
    layout: TokenLayout,
    plan: _Plan,
    tokens: Int[Tensor, "b n"],
    prefix_lengths: Sequence[int],
    stops: Sequence[int],
) -> Iterator[Int[Tensor, "b _"]]:
    """Fill `tokens` from left to right, which holds the prefixes already."""
    batch, known = len(tokens), min(prefix_lengths)
    forced = torch.arange(tokens.shape[1], device="cpu") < torch.tensor(prefix_lengths, device="cpu").unsqueeze(1)
    forced = forced.to(tokens.device)
    with_null = plan.num_with_null_rows
    cache = decoder.new_cache(2 * batch if known < with_null else batch)

    def predict(position: int) -> Float[Tensor, "rows v"]:
        """Logits of the token at `position`; the first call also reads the class and what all images know."""
        halves = 2 if position < with_null else 1
        if position > known:
            return decoder.step(tokens[:, position - 1].repeat(halves), cache)
        labels = [plan.class_labels, torch.full_like(plan.class_labels, layout.null_class_id)][:halves]
        return decoder.prefill(next_token_inputs(layout, torch.cat(labels), tokens[:, :known].repeat(halves, 1)), cache)

    start = 0
    for stop in stops:
        for position in range(max(start, known), stop):
            drawn = plan.draw(predict(position), position)
            if position < max(prefix_lengths):
                drawn = torch.where(forced[:, position], tokens[:, position], drawn)
            tokens[:, position] = drawn
        yield tokens[:, start:stop]
        start = stop


def _outside_inference_mode(turns: Iterator[Int[Tensor, "b _"]]) -> Iterator[Int[Tensor, "b _"]]:
    while True:
        # entered for each turn: around the yield it would also hold for whoever reads the tokens
        with torch.inference_mode():
            tokens = next(turns, None)
        if tokens is None:
            return
        # copied out of inference mode: a caller may go on computing with them
        yield tokens.clone()


def check_next_token_options(options: SamplingOptions, layout: TokenLayout) -> None:
    """Raise UserError for options that a next-token prior cannot draw with: a filter or guidance out of range, guidance
    of another number of values than the image has tokens, or `smooth`.
    """
    check_filters(
        top_k=options.top_k, top_p=options.top_p, temperature=options.temperature, codebook_size=layout.codebook_size
    )
    guidance_values(options.guidance_scale, layout.num_tokens)
    if options.smooth:
        raise UserError(
            "smooth mixes the codes of a whole scale, and a next-token prior draws one token at a time. Leave it out; "
            "a lower temperature gives calmer images."
        )


def _one_per_image(
    options: SamplingOptions | Sequence[SamplingOptions],
    class_labels: Int[Tensor, " b"],
    image_seeds: Sequence[tuple[int, int]],
) -> Sequence[SamplingOptions]:
    batch = len(class_labels)
    each = [options] * batch if isinstance(options, SamplingOptions) else list(options)
    for name, count in (("sampling options", len(each)), ("(seed, image index) pairs", len(image_seeds))):
        if count != batch:
            raise UserError(f"one of the {name} is needed per image, got {count} for {batch} class labels.")
    return each


def _check_stops(stops: Sequence[int], layout: TokenLayout) -> None:
    if list(stops) != sorted(stops) or not all(0 <= stop <= layout.num_tokens for stop in stops):
        raise UserError(
            f"stops are token counts in 0..{layout.num_tokens} that do not decrease, got {list(stops)}. "
            f"Pass [{layout.num_tokens}] for all tokens at once."
        )


def _checked_prefix(
    token_ids: Int[Tensor, "rows p"] | None, lengths: Sequence[int] | None, layout: TokenLayout, batch: int
) -> list[int]:
    """How many tokens of every image are known."""
    if token_ids is None:
        if lengths is not None and any(lengths):
            raise UserError("prefix lengths were given without prefix tokens. Pass both, or neither.")
        return [0] * batch
    rows, given = token_ids.shape
    if rows != batch or given > layout.num_tokens:
        raise UserError(
            f"a prefix has one row per image ({batch}) and at most {layout.num_tokens} tokens, got {rows} row(s) of "
            f"{given}. Shorten it."
        )
    lengths = [given] * batch if lengths is None else list(lengths)
    if len(lengths) != batch or not all(0 <= length <= given for length in lengths):
        raise UserError(
            f"prefix lengths must be one number in 0..{given} (the prefix tokens given) per image, got {lengths}."
        )
    known = token_ids[torch.arange(given, device="cpu") < torch.tensor(lengths, device="cpu").unsqueeze(1)]
    if known.numel() and not (0 <= int(known.min()) and int(known.max()) < layout.codebook_size):
        raise UserError(
            f"prefix tokens must be 0..{layout.codebook_size - 1} (the codebook), got {int(known.min())}.."
            f"{int(known.max())}. Encode the prefix with the image tokenizer of this model."
        )
    return lengths


@torch.no_grad()
def log_likelihood(
    transformer: "LlamaForCausalLM",
    layout: TokenLayout,
    token_ids: Int[Tensor, "b l"],
    class_labels: Int[Tensor, " labels"],
) -> Float[Tensor, "b l"]:
    """Nats of every token, log p(token | class, tokens before it); a row's sum is log p of its tokens together.

    Tokens count from the first of the image on, and may be fewer than all; labels are 0..num_classes, the last being
    the null label. Raises UserError where they are out of range or do not match in number.
    """
    _check(layout, token_ids, class_labels)
    token_ids, class_labels = token_ids.to(transformer.device), class_labels.to(transformer.device)
    logits = next_token_logits(transformer, layout, class_labels, token_ids[:, :-1])
    return -next_token_loss(logits, token_ids)


def _check(layout: TokenLayout, token_ids: Int[Tensor, "b l"], class_labels: Int[Tensor, " labels"]) -> None:
    rows, length = token_ids.shape
    if not 1 <= length <= layout.num_tokens or len(class_labels) != rows or not rows:
        raise UserError(
            f"a likelihood needs 1..{layout.num_tokens} tokens and a class label per image, got {rows} row(s) of "
            f"{length} token(s) and {len(class_labels)} label(s). Pass the tokens of whole images."
        )
    for name, values, largest in (
        ("token ids", token_ids, layout.codebook_size - 1),
        ("class labels", class_labels, layout.num_classes),
    ):
        low, high = int(values.min()), int(values.max())
        if low < 0 or high > largest:
            raise UserError(f"{name} must be 0..{largest}, got {low}..{high}. Pass those of this model.")

"""Generation of next-scale models: draw all tokens of a scale at once, add them to the features, go on.

Source: Tian et al., "Visual Autoregressive Modeling", section 3.2; spec of VAR, 2.7.
"""

from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from isthmus.errors import UserError
from isthmus.functional.draws import token_gumbels, token_uniforms
from isthmus.functional.pyramid import ScaleSchedule
from isthmus.functional.quantization import Scale, next_scale_input, tokens_to_map
from isthmus.functional.sampling import check_filters, draw_tokens, filter_logits, guided_logits, smooth_weights
from isthmus.functional.shapes import LatentMap, ScaleTokens
from isthmus.generation.options import SamplingOptions, guidance_on
from isthmus.models.multiscale_vqvae import MultiScaleVQVAE
from isthmus.models.next_scale_transformer import Conditioning, NextScaleTransformer


def shared_schedule(image_tokenizer: MultiScaleVQVAE, transformer: NextScaleTransformer) -> ScaleSchedule:
    """The scales of the transformer with the phi of the tokenizer: the tokenizer's schedule, or one derived from it.

    Raises:
        UserError: the two do not belong together (codebook size, code width or scales differ).
    """
    for name in ("codebook_size", "codebook_dim"):
        ours, theirs = image_tokenizer.config[name], transformer.config[name]
        if ours != theirs:
            raise UserError(
                f"image tokenizer and transformer must have the same {name}, got {ours} and {theirs}. "
                "Pass the tokenizer that the transformer was trained on."
            )
    sizes, parent = transformer.schedule.sizes, image_tokenizer.schedule
    if sizes == parent.sizes:
        return parent
    if sizes[-1] != parent.grid or not set(sizes) <= set(parent.sizes):
        raise UserError(
            f"the transformer's scale_sizes must be those of the image tokenizer, {parent.sizes}, or some of them "
            f"ending at {parent.grid}, got {sizes}. Pass the tokenizer that the transformer was trained on."
        )
    return parent.derive(sizes)


def null_row_scales(guidance: Sequence[float], *, markov: bool) -> tuple[bool, ...]:
    """Scales at which rows with the null label have to run beside the labelled ones.

    markov: where guidance is on (s != 1). With a cache: at every scale up to the last guided one, whose attention
    reads the keys of all earlier scales.

    >>> null_row_scales((1.0, 2.0, 1.0), markov=True), null_row_scales((1.0, 2.0, 1.0), markov=False)
    ((False, True, False), (True, True, False))
    """
    guided = [s != 1 for s in guidance]
    return tuple(guided) if markov else tuple(any(guided[k:]) for k in range(len(guided)))


def generate_scales(
    image_tokenizer: MultiScaleVQVAE,
    transformer: NextScaleTransformer,
    class_labels: Int[Tensor, " b"],
    image_seeds: Sequence[tuple[int, int]],
    options: SamplingOptions,
) -> Iterator[Scale]:
    """Draw the tokens of every scale, coarse to fine.

    Args:
        image_tokenizer: its codebook and phi build the features.
        transformer: predicts the tokens of a scale from the features so far.
        class_labels: (b,), 0..num_classes; num_classes is the null label.
        image_seeds: one (seed, image index) per image. Every random number of an image follows from its own pair.
        options: guidance, filters, temperature. All sampling arithmetic is fp32, whatever the type of the weights.

    Yields:
        One `Scale` (index, token ids, features so far) per scale.

    Raises:
        UserError: a filter or guidance value is out of range, or the two models do not belong together.
    """
    scales = _scales(image_tokenizer, transformer, class_labels, image_seeds, options)
    while True:
        # entered for each turn: around the yield it would also hold for whoever reads the scales
        with torch.inference_mode():
            scale = next(scales, None)
        if scale is None:
            return
        # copied out of inference mode: a caller may go on computing with them
        yield Scale(scale.index, scale.token_ids.clone(), scale.features.clone())


def _scales(
    image_tokenizer: MultiScaleVQVAE,
    transformer: NextScaleTransformer,
    class_labels: Int[Tensor, " b"],
    image_seeds: Sequence[tuple[int, int]],
    options: SamplingOptions,
) -> Iterator[Scale]:
    schedule = shared_schedule(image_tokenizer, transformer)
    codebook = image_tokenizer.codebook.weight
    check_filters(
        top_k=options.top_k, top_p=options.top_p, temperature=options.temperature, codebook_size=codebook.shape[0]
    )
    guidance = guidance_on(options.guidance_scale, schedule.sizes, image_tokenizer.schedule.sizes)
    if bool((class_labels == transformer.null_class_id).all()):
        guidance = (1.0,) * schedule.num_scales  # nothing to guide away from
    with_null = null_row_scales(guidance, markov=transformer.is_markov)

    batch, device = len(class_labels), transformer.device
    class_labels = class_labels.to(device)
    conditioning = _condition_once(transformer, class_labels, with_null_rows=any(with_null))
    cache = transformer.new_cache(2 * batch if any(with_null) else batch)
    uniforms = [token_uniforms(image_seeds, k, n).to(device) for k, n in enumerate(schedule.lengths)]

    def predict(scale: int, features: LatentMap) -> Float[Tensor, "b l v"]:
        """Guided logits of one scale, in fp32; the null rows lie behind the others in one doubled batch."""
        if scale == 0:
            inputs = codebook.new_zeros(batch, 0, codebook.shape[1])
        else:
            inputs = next_scale_input(features, schedule, scale)
        rows = 2 * batch if with_null[scale] else batch
        inputs = inputs.to(transformer.dtype).repeat(rows // batch, 1, 1)
        logits = transformer.forward_scale(scale, inputs, conditioning.leading(rows), cache).float()
        return guided_logits(logits[:batch], logits[batch:], guidance[scale]) if with_null[scale] else logits

    def choose(scale: int, features: LatentMap) -> tuple[ScaleTokens, Float[Tensor, "b d s s"]]:
        logits = predict(scale, features)
        if options.temperature != 1:
            logits = logits / options.temperature
        logits = filter_logits(logits, top_k=options.top_k, top_p=options.top_p)
        token_ids = draw_tokens(logits, uniforms[scale])
        if not options.smooth:
            return token_ids, image_tokenizer.lookup(token_ids)
        ratio = scale / (schedule.num_scales - 1) if schedule.num_scales > 1 else 1.0
        gumbels = token_gumbels(image_seeds, scale, schedule.lengths[scale], codebook.shape[0])
        mixed = smooth_weights(logits, gumbels, ratio) @ codebook.float()
        return token_ids, tokens_to_map(mixed.to(codebook.dtype))

    yield from image_tokenizer.residual_scales(choose, class_labels, schedule)


def _condition_once(
    transformer: NextScaleTransformer, class_labels: Int[Tensor, " b"], *, with_null_rows: bool
) -> Conditioning:
    """Modulations of the labels, then (where asked) as many null rows; every label is computed once."""
    if with_null_rows:
        class_labels = torch.cat([class_labels, torch.full_like(class_labels, transformer.null_class_id)])
    labels, row = class_labels.unique(return_inverse=True)
    once = transformer.condition(labels)
    return Conditioning(once.start[row], tuple(block[row] for block in once.blocks), once.head[row])

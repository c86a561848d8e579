"""The networks of a diffusion tokenizer's run: new from its arguments, or from a saved model."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch

from isthmus.errors import UserError
from isthmus.models.diffusion_tokenizer import DiffusionTokenizer
from isthmus.models.flow_decoder import FlowDecoder
from isthmus.models.saved_model import without_values
from isthmus.schedulers.flow_matching import FlowMatchingScheduler
from isthmus.training.cost import num_parameters, report, training_cost
from isthmus.training.dar_config import DiffusionTokenizerRun, FlowDecoderModel
from isthmus.training.dar_export import TokenizerParts, load_parts
from isthmus.training.flow_draws import group_spans
from isthmus.training.frozen_features import feature_shape, frozen_features
from isthmus.training.saved_networks import refuse_contradictions
from isthmus.training.tokenizer_with_decoder import AlignmentHead, PrefixReadout, TokenizerWithDecoder

# what FlowDecoder takes where nothing is said
_DECODER_PATCH = 8


def build_networks(run: DiffusionTokenizerRun) -> TokenizerWithDecoder:
    """Tokenizer, decoder, scheduler and heads of a run.

    Raises:
        UserError: sizes do not fit each other, or an argument contradicts the saved model.
    """
    parts = build_parts(run)
    tokenizer, decoder = parts.image_tokenizer, parts.decoder
    size = tokenizer.config["image_size"]
    if run.loss.times == "balanced":
        group_spans(tokenizer.config["num_groups"], run.loss.latest_time)
    if run.freeze_encoder:
        for name, parameter in tokenizer.named_parameters():
            parameter.requires_grad_(name.startswith(("from_code.", "token_position", "condition_layers.")))
    if run.checkpoint_activations:
        tokenizer.enable_gradient_checkpointing()
        decoder.enable_gradient_checkpointing()
    return TokenizerWithDecoder(
        tokenizer,
        decoder,
        parts.scheduler,
        alignment=alignment_head(run, decoder, size) if run.loss.alignment else None,
        alignment_layer=run.loss.alignment_layer,
        readout=readout_head(run, tokenizer) if run.loss.readout else None,
        reads_condition=run.loss.readout_from == "condition",
    )


def describe_diffusion_tokenizer_run(run: DiffusionTokenizerRun) -> str:
    """What the run would be: its settings as JSON, then size, cost and memory. No weight is allocated.

    Heads and frozen networks of optional losses are left out.
    """
    with without_values():
        parts = build_parts(run)
        network = TokenizerWithDecoder(parts.image_tokenizer, parts.decoder, parts.scheduler)
    config = parts.image_tokenizer.config
    side, levels = config["image_size"], run.loss.noise_levels
    tokenizer, decoder = (f"{num_parameters(part) / 1e6:.2f}M" for part in (parts.image_tokenizer, parts.decoder))

    def forward(network: TokenizerWithDecoder) -> object:
        return network(torch.zeros(1, 3, side, side), torch.zeros(1, levels), torch.zeros(1, levels, 3, side, side))

    about = (
        f"{config['num_tokens']} tokens in {config['num_groups']} groups, {config['codebook_size']} codes; images of "
        f"{side} px, {levels} noise level{'s' if levels > 1 else ''} each; tokenizer {tokenizer}, decoder {decoder}"
    )
    return report(run, about, training_cost(network, forward))


def build_parts(run: DiffusionTokenizerRun) -> TokenizerParts:
    """Tokenizer, decoder and scheduler of a run: new, or from a saved model.

    Raises:
        UserError: sizes do not fit each other, or an argument contradicts the saved model.
    """
    parts = saved_parts(run) if run.from_model else new_parts(run)
    check_fit(run, parts.image_tokenizer.config["image_size"], parts.decoder)
    return parts


def new_parts(run: DiffusionTokenizerRun) -> TokenizerParts:
    """Untrained networks."""
    tokenizer = DiffusionTokenizer(**named(run.model))
    arguments = decoder_arguments(run.decoder, tokenizer)
    decoder = FlowDecoder(condition_width=tokenizer.config["condition_width"], **arguments)
    return TokenizerParts(tokenizer, decoder, scheduler_for(tokenizer, named(run.flow)))


def saved_parts(run: DiffusionTokenizerRun) -> TokenizerParts:
    """The networks of `from_model`; what the run says of the diffusion takes the place of what is saved."""
    parts = load_parts(run.from_model)
    refuse_contradictions(parts.image_tokenizer, named(run.model), run.from_model)
    wanted = decoder_arguments(run.decoder, parts.image_tokenizer, parts.decoder)
    refuse_contradictions(parts.decoder, wanted, run.from_model, options="decoder")
    saved = {name: parts.scheduler.config[name] for name in ("num_inference_steps", "time_shift", "data_std", "solver")}
    return TokenizerParts(
        parts.image_tokenizer, parts.decoder, scheduler_for(parts.image_tokenizer, saved | named(run.flow))
    )


def scheduler_for(tokenizer: DiffusionTokenizer, settings: Mapping[str, Any]) -> FlowMatchingScheduler:
    """The scheduler of a tokenizer's tokens: as many steps as groups where nothing else is said."""
    config = tokenizer.config
    return FlowMatchingScheduler(
        **{
            "num_inference_steps": config["num_groups"],
            "num_groups": config["num_groups"],
            "num_tokens": config["num_tokens"],
            "tokens_per_step": tokenizer.tokens_per_step,
            **settings,
        }
    )


def decoder_arguments(
    settings: FlowDecoderModel, tokenizer: DiffusionTokenizer, saved: FlowDecoder | None = None
) -> dict[str, Any]:
    """Named arguments of `FlowDecoder`; positions and canvas are those of the tokenizer's patches and tokens."""
    arguments, image_size = named(settings), tokenizer.config["image_size"]
    if "canvas" in arguments:
        arguments["canvas_tokens"] = tokenizer.config["num_tokens"] if arguments.pop("canvas") else None
    if "position_table" in arguments:
        patch = saved.config["patch_size"] if saved else arguments.get("patch_size", _DECODER_PATCH)
        arguments["position_table"] = image_size // patch if arguments["position_table"] else None
    return arguments


def named(settings: object) -> dict[str, Any]:
    """The fields of a dataclass that say something."""
    return {name: value for name, value in asdict(settings).items() if value is not None}  # pyright: ignore


def check_fit(run: DiffusionTokenizerRun, image_size: int, decoder: FlowDecoder) -> None:
    """Raise UserError where the decoder does not fit the images or the losses."""
    patch = decoder.config["patch_size"]
    if image_size % patch:
        raise UserError(
            f"model.image_size must be a multiple of decoder.patch_size, got {image_size} and {patch}. Change one."
        )
    if run.loss.canvas and decoder.canvas is None:
        raise UserError(
            f"loss.canvas needs a decoder with a canvas, got {run.loss.canvas} without one. Set --loss.canvas 0 or "
            "--decoder.canvas True."
        )
    layers = decoder.config["num_layers"]
    if run.loss.alignment and run.loss.alignment_layer > layers:
        raise UserError(
            f"loss.alignment_layer must be one of the decoder's {layers} blocks, got {run.loss.alignment_layer}."
        )


def alignment_head(run: DiffusionTokenizerRun, decoder: FlowDecoder, image_size: int) -> AlignmentHead:
    """Head to the features of the frozen network, on the coarser of the two grids."""
    width, side = feature_shape(frozen_features(run.loss), image_size)
    return AlignmentHead(decoder.config["width"], width, min(side, image_size // decoder.config["patch_size"]))


def readout_head(run: DiffusionTokenizerRun, tokenizer: DiffusionTokenizer) -> PrefixReadout:
    """Head that reads small images off codes or conditions."""
    from_codes = run.loss.readout_from == "codes"
    width = tokenizer.config["codebook_dim" if from_codes else "condition_width"]
    return PrefixReadout(
        tokenizer.config["num_groups"],
        tokenizer.tokens_per_group * width,
        run.loss.readout_size,
        cumulative=from_codes,
    )

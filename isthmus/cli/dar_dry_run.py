"""What a run of the D-AR family would be: its settings, its networks, its cost. No weight is allocated."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import nn

# the meta device knows no autocast, which both networks turn off around what must stay fp32; fake CPU tensors do
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import LlamaConfig, LlamaForCausalLM

from isthmus.cli.cost import Cost, report, saved_settings, training_cost, training_source
from isthmus.errors import UserError
from isthmus.models.diffusion_tokenizer import DiffusionTokenizer
from isthmus.models.flow_decoder import FlowDecoder
from isthmus.models.next_token_prior import TokenLayout, next_token_inputs
from isthmus.models.saved_model import without_values
from isthmus.training.dar_config import DiffusionTokenizerRun, NextTokenPriorRun
from isthmus.training.dar_networks import (
    TokenizerParts,
    check_fit,
    check_saved_networks,
    named,
    new_parts,
    scheduler_for,
)
from isthmus.training.next_token_prior import build_llama, config_with_classes
from isthmus.training.tokenizer_with_decoder import TokenizerWithDecoder

Network = TypeVar("Network", bound=nn.Module)


def describe_diffusion_tokenizer_run(run: DiffusionTokenizerRun) -> str:
    """The run as JSON, then size, cost and memory; heads and frozen networks of optional losses are left out."""
    with without_values():
        parts = _saved_parts(run) if run.from_model else new_parts(run)
        network = TokenizerWithDecoder(parts.image_tokenizer, parts.decoder, parts.scheduler)
    config = parts.image_tokenizer.config
    side, levels = config["image_size"], run.loss.noise_levels
    check_fit(run, side, parts.decoder)

    def forward(network: nn.Module) -> Any:
        return network(torch.zeros(1, 3, side, side), torch.zeros(1, levels), torch.zeros(1, levels, 3, side, side))

    about = (
        f"{config['num_tokens']} tokens in {config['num_groups']} groups, {config['codebook_size']} codes; images of "
        f"{side} px, {levels} noise level{'s' if levels > 1 else ''} each; tokenizer "
        f"{_millions(parts.image_tokenizer)}, decoder {_millions(parts.decoder)}"
    )
    return report(run, about, _cost(network, forward))


def describe_next_token_prior_run(run: NextTokenPriorRun) -> str:
    """The run as JSON, then size, cost and memory."""
    model = run.from_model or run.tokenizer
    if not model:
        raise UserError(
            "a prior needs a tokenizer, got none. Pass --tokenizer FOLDER (of a tokenizer run) or --from MODEL."
        )
    tokenizer = saved_settings(model, "image_tokenizer")
    source = training_source(run, tokenizer["image_size"])
    layout = TokenLayout(tokenizer["codebook_size"], len(source.class_names), tokenizer["num_tokens"])
    with without_values():
        if run.from_model:
            config = LlamaConfig(**saved_settings(run.from_model, "transformer"))
            llama = LlamaForCausalLM(config_with_classes(config, layout, run.model, run.from_model))
        else:
            llama = build_llama(run, layout)

    def forward(network: nn.Module) -> Any:
        known = torch.zeros(1, layout.num_tokens - 1, dtype=torch.long)
        return network(input_ids=next_token_inputs(layout, known[:, 0], known), use_cache=False)

    about = (
        f"Llama, {llama.config.num_hidden_layers} layers of width {llama.config.hidden_size}, {layout.num_tokens} "
        f"tokens of {layout.codebook_size} codes; {len(source)} images, {len(source.class_names) or 'no'} classes"
    )
    return report(run, about, _cost(llama, forward))


def _saved_parts(run: DiffusionTokenizerRun) -> TokenizerParts:
    tokenizer = DiffusionTokenizer(**saved_settings(run.from_model, "image_tokenizer"))
    decoder = FlowDecoder(**saved_settings(run.from_model, "decoder"))
    check_saved_networks(run, tokenizer, decoder)
    return TokenizerParts(tokenizer, decoder, scheduler_for(tokenizer, named(run.flow)))


def _cost(network: Network, forward: Callable[[Network], Any]) -> Cost:
    with FakeTensorMode(allow_non_fake_inputs=True):
        fake = network.to_empty(device="cpu")
        return training_cost(fake, lambda: forward(fake))


def _millions(model: nn.Module) -> str:
    return f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f}M"

"""What is particular about training a next-token prior: the Llama of D-AR."""

import copy
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from isthmus.data.source import ImageSource
from isthmus.data.streaming import ImageStream
from isthmus.data.views import Batch
from isthmus.errors import UserError
from isthmus.functional.pyramid import nats_to_bits
from isthmus.models.next_token_prior import TokenLayout, new_prior, next_token_inputs
from isthmus.models.saved_model import without_values
from isthmus.training.cost import report, training_cost, training_source
from isthmus.training.dar_config import LlamaModel, NextTokenPriorRun
from isthmus.training.dar_export import TokenizerParts, load_parts
from isthmus.training.dar_prior_export import averaged_llama, export_dar_pipeline, load_dar_model
from isthmus.training.dar_prior_previews import save_token_samples
from isthmus.training.dropout import ResidualDropout, embedding_seeds, residual_seeds
from isthmus.training.ema import ExponentialMovingAverage
from isthmus.training.images import open_splits
from isthmus.training.next_token_objective import NextTokenLosses, NextTokenObjective, nats_by_group
from isthmus.training.objectives import dropped_labels
from isthmus.training.saved_networks import kept_classes, sampling_options

_SIZES = {
    "width": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "feed_forward_width": "intermediate_size",
}


class NextTokenPrior:
    """The next-token family, as the training loop asks for it.

    Attributes:
        sharded: what FSDP2 gathers one by one.
        parts: tokenizer, decoder and scheduler, all frozen.
        train, held_out: images.
        network: the Llama with its objective.
        options: how previews are drawn, and the defaults of the saved pipeline.
    """

    sharded = ("LlamaDecoderLayer",)

    def __init__(self, run: NextTokenPriorRun):
        self.run = run
        self.parts, self.train, self.held_out, llama = prepare(run)
        self.tokenizer = self.encoder = self.parts.image_tokenizer
        self.facts: dict[str, object] = {}
        self.image_size: int = self.tokenizer.config["image_size"]
        self._groups: int = self.tokenizer.config["num_groups"]
        self.layout = layout_of(self.tokenizer.config, len(self.train.class_names))
        self.network = NextTokenObjective(llama, self.layout, embedding_dropout=run.embedding_dropout)
        self._dropout = ResidualDropout(llama, run.residual_dropout)
        if run.sampling.smooth:
            raise UserError("sampling.smooth mixes the codes of a whole scale, and this model has none. Leave it out.")
        self.options = sampling_options(
            run.sampling,
            codebook_size=self.layout.codebook_size,
            num_classes=self.layout.num_classes,
            num_guided_steps=self.layout.num_tokens,
        )

    @staticmethod
    def has_unused_parameters(run: NextTokenPriorRun) -> bool:
        """Every step reaches every weight."""
        return False

    @staticmethod
    def is_compiled(run: NextTokenPriorRun) -> bool:
        """The hooks that drop residuals would break a graph at every layer."""
        return False

    def place(self, device: torch.device) -> None:
        """Move tokenizer and decoder, which previews need too, to the device of the training."""
        for part in (self.parts.image_tokenizer, self.parts.decoder):
            part.to(device)

    def regularisation(self) -> AbstractContextManager[object]:
        """The residual dropouts, attached for as long as the loop runs."""
        return self._dropout.attached()

    def losses(self, model: nn.Module, batch: Batch, step: int) -> NextTokenLosses:
        """Losses of one part of a batch, on the device of the model."""
        run, positions, device = self.run, batch["position"], self.tokenizer.device
        labels = dropped_labels(
            batch["class_label"].to(device),
            positions,
            rate=run.label_dropout,
            null_class_id=self.layout.null_class_id,
            seed=run.seed,
        )
        if run.residual_dropout:
            num_layers = self.network.transformer.config.num_hidden_layers
            self._dropout.seeds = residual_seeds(positions, num_layers, seed=run.seed)
        seeds = embedding_seeds(positions, seed=run.seed) if run.embedding_dropout else None
        return model(labels, batch["token_ids"].to(device), seeds)

    def part_values(self, losses: NextTokenLosses, batch: Batch) -> dict[str, Tensor]:
        """What is logged of one part of a batch: loss, token accuracy, and nats per token of every group."""
        return {
            "loss": losses.total,
            "token_accuracy": losses.hits.float().mean(),
            "nats": nats_by_group(losses.nats, self._groups),
        }

    def step_values(self, means: dict[str, Tensor], step: int) -> dict[str, float]:
        """One log line of training: the loss, token accuracy, bits per token in all and of every group."""
        values = {f"train/{name}": means[name].item() for name in ("loss", "token_accuracy")}
        return values | bits_by_group("train", means["nats"])

    def averaged(self, ema: ExponentialMovingAverage) -> LlamaForCausalLM:
        """A copy that holds the averages; every process must call it where weights are sharded."""
        return averaged_llama(self.network, ema)

    def token_ids(self, images: Tensor) -> Tensor:
        """All tokens (b, num_tokens) of images."""
        return self.tokenizer.encode(images).token_ids

    @torch.no_grad()
    def held_out_bits(self, model: LlamaForCausalLM, token_ids: Tensor, labels: Tensor) -> dict[str, float]:
        """Bits per token of held-out images, in all and per group."""
        objective = NextTokenObjective(model, self.layout).eval()
        nats = [objective(label, ids).nats for ids, label in zip(token_ids.split(32), labels.split(32), strict=True)]
        return bits_by_group("val", nats_by_group(torch.cat(nats), self._groups))

    def save_samples(self, model: LlamaForCausalLM, folder: Path, step: int) -> None:
        """A picture of samples at fixed seeds."""
        save_token_samples(self.parts, model, self.layout, self.train.class_names, self.options, folder, step)

    def export(self, accelerator: Accelerator, model: LlamaForCausalLM) -> Path:
        """Write the pipeline."""
        return export_dar_pipeline(accelerator, self.parts, model, self.options, self.run, self.train)


def prepare(
    run: NextTokenPriorRun,
) -> tuple[TokenizerParts, ImageSource | ImageStream, ImageSource, LlamaForCausalLM]:
    """Tokenizer, training images, held-out images and the Llama to train.

    Raises:
        UserError: something is missing or contradicts the saved model.
    """
    start = starting_point(run)
    train, held_out = open_splits(run, start.image_size)
    return start.parts, train, held_out, build_prior(run, start, train.class_names)


def describe_next_token_prior_run(run: NextTokenPriorRun) -> str:
    """What the run would be: its settings as JSON, then size, cost and memory. No weight is allocated."""
    with without_values():
        start = starting_point(run)
    source = training_source(run, start.image_size)
    with without_values():
        llama = build_prior(run, start, source.class_names)
    layout = layout_of(start.parts.image_tokenizer.config, len(source.class_names))

    def forward(network: LlamaForCausalLM) -> object:
        known = torch.zeros(1, layout.num_tokens - 1, dtype=torch.long)
        return network(input_ids=next_token_inputs(layout, known[:, 0], known), use_cache=False)

    about = (
        f"Llama, {llama.config.num_hidden_layers} layers of width {llama.config.hidden_size}, {layout.num_tokens} "
        f"tokens of {layout.codebook_size} codes; {len(source)} images, {len(source.class_names) or 'no'} classes"
    )
    return report(run, about, training_cost(llama, forward))


@dataclass(frozen=True)
class StartingPoint:
    """What a run finds saved.

    Attributes:
        parts: tokenizer, decoder and scheduler.
        llama: the prior to go on from; None for a new one.
        class_names: of that prior; empty where classes have no names.
    """

    parts: TokenizerParts
    llama: LlamaForCausalLM | None = None
    class_names: tuple[str, ...] = ()

    @property
    def image_size(self) -> int:
        """Side of the images in pixels."""
        return self.parts.image_tokenizer.config["image_size"]


def starting_point(run: NextTokenPriorRun) -> StartingPoint:
    """The tokenizer that a run names, and the prior where it names a whole model.

    Raises:
        UserError: the run names neither, or the tokenizer has no codes.
    """
    if run.from_model:
        start = StartingPoint(*load_dar_model(run.from_model))
    elif run.tokenizer:
        start = StartingPoint(load_parts(run.tokenizer))
    else:
        raise UserError(
            "a prior needs a tokenizer, got none. Pass --tokenizer FOLDER (of a tokenizer run) or --from MODEL."
        )
    if not start.parts.image_tokenizer.config["quantized"]:
        raise UserError("a prior predicts codes, and this tokenizer keeps its tokens continuous. Train one with codes.")
    return start


def build_prior(run: NextTokenPriorRun, start: StartingPoint, class_names: Sequence[str]) -> LlamaForCausalLM:
    """The Llama to train on images of these classes: new, or from a saved model.

    Raises:
        UserError: a size is missing, does not fit, or contradicts the saved model.
    """
    layout = layout_of(start.parts.image_tokenizer.config, len(class_names))
    if start.llama is None:
        return build_llama(run, layout)
    kept = kept_classes(class_names, start.class_names)
    return with_new_classes(start.llama, layout, run.model, run.from_model, kept=kept)


def layout_of(tokenizer: Mapping[str, Any], num_classes: int) -> TokenLayout:
    """The layout of a prior's vocabulary, from the settings of its tokenizer."""
    return TokenLayout(tokenizer["codebook_size"], num_classes, tokenizer["num_tokens"])


def build_llama(run: NextTokenPriorRun, layout: TokenLayout) -> LlamaForCausalLM:
    """An untrained Llama of the run's sizes.

    Raises:
        UserError: a size is missing or does not fit.
    """
    wanted = {name: value for name, value in asdict(run.model).items() if value is not None}
    missing = [name for name in ("width", "num_layers", "num_heads") if name not in wanted]
    if missing:
        raise UserError(f"a new prior needs model.{missing[0]}, got none. Name it, or start from a --preset.")
    return new_prior(layout, **wanted)


def with_new_classes(
    source: LlamaForCausalLM,
    layout: TokenLayout,
    wanted: LlamaModel,
    name: str,
    *,
    kept: Mapping[int, int] | None = None,
) -> LlamaForCausalLM:
    """The saved Llama with new classes: each starts at the null class, which is kept; all else is as it was.

    `kept` maps labels to labels of the saved prior that they take over (see `kept_classes`).

    Raises:
        UserError: an argument contradicts the saved model.
    """
    model = LlamaForCausalLM(config_with_classes(source.config, layout, wanted, name))
    state, codes = source.state_dict(), layout.codebook_size
    embedding = state["model.embed_tokens.weight"]
    null = len(embedding) - codes - 1
    rows = [codes + (kept or {}).get(label, null) for label in range(layout.num_classes + 1)]
    state["model.embed_tokens.weight"] = torch.cat([embedding[:codes], embedding[rows]])
    head = state["lm_head.weight"]
    state["lm_head.weight"] = torch.cat([head[:codes], head.new_zeros(layout.num_classes + 1, head.shape[1])])
    model.load_state_dict(state)
    return model


def config_with_classes(source: LlamaConfig, layout: TokenLayout, wanted: LlamaModel, name: str) -> LlamaConfig:
    """The settings of a saved Llama with the vocabulary of other classes; all else is kept.

    Raises:
        UserError: an argument contradicts them, or they are no prior's of these tokens.
    """
    for option, value in asdict(wanted).items():
        present = getattr(source, _SIZES[option])
        if value is not None and value != present:
            raise UserError(
                f"model.{option} is {present} in {name}, got {value}. Leave it out: a model that is fine-tuned keeps "
                "its network."
            )
    TokenLayout.of(source, layout.codebook_size, layout.num_tokens)
    config = copy.deepcopy(source)
    config.vocab_size = layout.vocab_size
    return config


def bits_by_group(prefix: str, nats: Tensor) -> dict[str, float]:
    """Bits per token of each group, and of all: groups hold equally many tokens."""
    bits = [nats_to_bits(value) for value in nats.tolist()]
    values = {f"{prefix}/bits_per_token": sum(bits) / len(bits)}
    return values | {f"{prefix}/bits_group{k}": value for k, value in enumerate(bits)}

"""What is particular about training a next-scale prior: VAR and SRDD."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from isthmus.data.source import ImageSource
from isthmus.data.streaming import ImageStream
from isthmus.data.views import Batch
from isthmus.errors import UserError
from isthmus.functional.pyramid import ScaleSchedule, nats_to_bits
from isthmus.functional.shapes import TokenPyramid
from isthmus.models.multiscale_vqvae import MultiScaleVQVAE
from isthmus.models.next_scale_transformer import NextScaleTransformer
from isthmus.models.saved_model import without_values
from isthmus.training.config import PriorRun
from isthmus.training.cost import Cost, report, training_cost, training_source
from isthmus.training.export import Teacher, load_teacher, load_tokenizer
from isthmus.training.images import open_splits
from isthmus.training.next_scale_family import NextScaleFamily
from isthmus.training.objectives import (
    PriorLosses,
    dropped_labels,
    next_scale_loss,
    path_factors,
    scale_subset,
    scale_weights,
    select_scales,
)
from isthmus.training.partial_inputs import partial_inputs, partly_shown
from isthmus.training.saved_networks import kept_classes, refuse_contradictions


class NextScalePrior(NextScaleFamily):
    """VAR and SRDD, as the training loop asks for them; the loss is the cross-entropy of every token."""

    def __init__(self, run: PriorRun):
        super().__init__(run, *prepare(run))
        self.run: PriorRun = run
        self._weights = scale_weights(run.scale_loss, self.schedule.sizes)

    @staticmethod
    def has_unused_parameters(run: PriorRun) -> bool:
        """Whether a step may leave weights without a gradient."""
        # scale 0 has a table of its own, and only the others embed words
        return run.scales_per_step is not None

    @staticmethod
    def is_compiled(run: PriorRun) -> bool:
        """Whether the blocks are compiled."""
        return run.compile

    def losses(self, model: nn.Module, batch: Batch, step: int) -> PriorLosses:
        """Losses of one part of a batch, on the device of the model."""
        run, schedule, config = self.run, self.schedule, self.network.config
        device = self.tokenizer.device
        scales = scale_subset(schedule.num_scales, run.scales_per_step, seed=run.seed, step=step)
        token_ids, positions = batch["token_ids"].to(device), batch["position"]
        labels = dropped_labels(
            batch["class_label"].to(device),
            positions,
            rate=run.label_dropout,
            null_class_id=config["num_classes"],
            seed=run.seed,
        )
        inputs, marked, counted = self._inputs(list(token_ids.split(list(schedule.lengths), dim=1)), positions)
        keep = path_factors(positions, self.network.drop_path_rates, seed=run.seed)
        output = model(
            labels,
            select_scales(inputs, schedule, scales, first=1),
            scales=scales,
            keep=None if keep is None else keep.to(device),
            hidden=None if marked is None else select_scales(marked, schedule, scales, first=1),
        )
        targets = select_scales(token_ids, schedule, scales)
        return next_scale_loss(
            output.logits,
            targets,
            schedule,
            self._weights,
            scales=scales,
            label_smoothing=run.label_smoothing,
            counted=None if counted is None else select_scales(counted, schedule, scales),
        )

    def _inputs(
        self, token_ids: TokenPyramid, positions: Tensor
    ) -> tuple[Float[Tensor, "b l d"], Bool[Tensor, "b inputs"] | None, Bool[Tensor, "b tokens"] | None]:
        """Inputs of scales 1..K-1, which of these hide their own token, and which of all tokens are predicted."""
        schedule, probability = self.schedule, self.run.refinement_probability
        if self.network.mask_embedding is None:
            with torch.no_grad():
                return self.tokenizer.scale_inputs(token_ids, schedule), None, None
        # also where the probability is 0: every weight of the network takes part in every step
        one_scale = not self.network.is_markov
        shown = partly_shown(
            positions, schedule.lengths, probability=probability, seed=self.run.seed, one_scale=one_scale
        )
        device, first = token_ids[0].device, schedule.lengths[0]
        inputs = partial_inputs(self.tokenizer, token_ids, shown, schedule)
        return inputs, shown.marked[:, first:].to(device), shown.counted.to(device)

    def part_values(self, losses: PriorLosses, batch: Batch) -> dict[str, Tensor]:
        """What is logged of one part of a batch: loss, token accuracy, and nats per token of every scale run."""
        targets = select_scales(batch["token_ids"].to(losses.logits.device), self.schedule, losses.scales)
        hits = losses.logits.argmax(dim=-1) == targets
        if losses.counted is not None:
            hits = hits[losses.counted]
        return {"loss": losses.total, "token_accuracy": hits.float().mean(), "nats": losses.by_scale}

    def step_values(self, means: dict[str, Tensor], step: int) -> dict[str, float]:
        """One log line of training."""
        scales = scale_subset(self.schedule.num_scales, self.run.scales_per_step, seed=self.run.seed, step=step)
        return step_values(means, self.schedule, scales)


def prepare(run: PriorRun) -> tuple[MultiScaleVQVAE, ImageSource | ImageStream, ImageSource, NextScaleTransformer]:
    """Tokenizer, training images, held-out images and the prior to train.

    Raises:
        UserError: something is missing or contradicts the saved model.
    """
    tokenizer, saved = starting_point(run)
    train, held_out = open_splits(run, tokenizer.image_size)
    return tokenizer, train, held_out, build_prior(run, tokenizer, saved, train.class_names)


def describe_prior_run(run: PriorRun) -> str:
    """What the run would be: its settings as JSON, then size, cost and memory. No weight is allocated."""
    with without_values():
        tokenizer, saved = starting_point(run)
    source = training_source(run, tokenizer.image_size)
    with without_values():
        model = build_prior(run, tokenizer, saved, source.class_names)
    about = (
        f"{model.config['scale_attention']}, scales {', '.join(map(str, model.schedule.sizes))}, "
        f"{model.schedule.num_tokens} tokens; {len(source)} images, {len(source.class_names) or 'no'} classes"
    )
    return report(run, about, prior_cost(model))


def prior_cost(model: NextScaleTransformer) -> Cost:
    """What an image costs in training a transformer that was made without values."""
    num_inputs = model.schedule.num_tokens - model.schedule.lengths[0]

    def forward(network: NextScaleTransformer) -> object:
        return network(torch.zeros(1, dtype=torch.long), torch.zeros(1, num_inputs, model.config["codebook_dim"]))

    return training_cost(model, forward)


def starting_point(run: PriorRun) -> tuple[MultiScaleVQVAE, Teacher | None]:
    """The frozen tokenizer of a run, and the saved model that it goes on from, where there is one.

    Raises:
        UserError: the run names neither.
    """
    if run.from_model:
        saved = load_teacher(run.from_model)
        return saved.tokenizer, saved
    if run.tokenizer:
        return load_tokenizer(run.tokenizer), None
    raise UserError(
        "a prior needs a tokenizer, got none. Pass --tokenizer FOLDER (of a tokenizer run) or --from MODEL."
    )


def build_prior(
    run: PriorRun, tokenizer: MultiScaleVQVAE, saved: Teacher | None, class_names: Sequence[str]
) -> NextScaleTransformer:
    """The prior to train on images of these classes: new, or from a saved model.

    Raises:
        UserError: an argument contradicts the saved model, or another one.
    """
    wanted = {name: value for name, value in asdict(run.model).items() if value is not None}
    num_classes, refined = len(class_names), run.refinement_probability > 0
    if saved is not None:
        kept = kept_classes(class_names, saved.class_names)
        return with_new_classes(
            saved.transformer, num_classes, wanted, run.from_model, kept=kept, mask_embedding=refined
        )
    model = NextScaleTransformer(
        scale_sizes=tokenizer.schedule.sizes,
        codebook_size=tokenizer.config["codebook_size"],
        codebook_dim=tokenizer.config["codebook_dim"],
        num_classes=num_classes,
        has_mask_embedding=refined,
        **wanted,
    )
    if run.scales_per_step is not None and not model.is_markov:
        raise UserError(
            f"scales_per_step needs the Markov mask, where scales are independent, got {run.scales_per_step} with "
            "causal. Use --model.scale-attention markov."
        )
    return model


def with_new_classes(
    source: NextScaleTransformer,
    num_classes: int,
    wanted: dict[str, object],
    name: str,
    *,
    kept: Mapping[int, int] | None = None,
    mask_embedding: bool = False,
) -> NextScaleTransformer:
    """The saved prior with a new class table: rows start at the null row, which is kept; all else is as it was.

    `kept` maps labels to labels of the saved prior whose rows they take over (see `kept_classes`).
    `mask_embedding` adds the mark of hidden tokens where there is none; it starts at zero and changes nothing.

    Raises:
        UserError: an argument contradicts the saved model.
    """
    refuse_contradictions(source, wanted, name)
    arguments: dict[str, Any] = {k: v for k, v in source.config.items() if not k.startswith("_")}
    arguments["num_classes"] = num_classes
    arguments["has_mask_embedding"] = mask_embedding or source.mask_embedding is not None
    model = NextScaleTransformer(**arguments)
    state = source.state_dict()
    if model.mask_embedding is not None:
        state.setdefault("mask_embedding", torch.zeros_like(model.mask_embedding))
    rows = [(kept or {}).get(label, source.null_class_id) for label in range(num_classes + 1)]
    state["class_embedding.weight"] = state["class_embedding.weight"][rows].clone()
    model.load_state_dict(state)
    return model


def step_values(means: dict[str, Tensor], schedule: ScaleSchedule, scales: Sequence[int]) -> dict[str, float]:
    """One log line of training: the loss, bits per token of every scale and of all, token accuracy."""
    values = {f"train/{name}": means[name].item() for name in ("loss", "token_accuracy")}
    lengths = [schedule.lengths[k] for k in scales]
    bits = [nats_to_bits(nats) for nats in means["nats"].tolist()]
    values["train/bits_per_token"] = sum(b * n for b, n in zip(bits, lengths, strict=True)) / sum(lengths)
    return values | {f"train/bits_scale{k}": b for k, b in zip(scales, bits, strict=True)}

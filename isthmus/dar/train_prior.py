"""Training the Llama of D-AR: cross-entropy of every image token, given the class and the tokens before it.

Dropout masks belong to training positions: they are drawn again from their seeds wherever they are needed, so
recomputed activations get the same ones.
"""

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from jaxtyping import Bool, Float, Int
from PIL import Image
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from isthmus.dar.decoding import SolverPlan, flow_steps, image_noise
from isthmus.dar.pipeline import DARPipeline
from isthmus.dar.prior import TokenLayout, new_prior, next_token_inputs, next_token_loss
from isthmus.dar.runs import LlamaModel, NextTokenPriorRun
from isthmus.dar.sampling import generate_tokens
from isthmus.dar.train_tokenizer import TokenizerParts, load_parts
from isthmus.data.huggingface import ImageStream
from isthmus.data.source import ImageSource
from isthmus.data.views import Batch
from isthmus.errors import UserError
from isthmus.nn.draws import EMBEDDING_DROPOUT, RESIDUAL_DROPOUT, stream
from isthmus.nn.sampling import nats_to_bits
from isthmus.nn.saved_model import without_values
from isthmus.pictures import to_pil
from isthmus.pipelines.labels import names_in_order
from isthmus.pipelines.loading import load_pipeline
from isthmus.training.arguments import given
from isthmus.training.checkpoints import gathered
from isthmus.training.cost import report, training_cost, training_source
from isthmus.training.images import dropped_labels, open_splits
from isthmus.training.optim import ExponentialMovingAverage
from isthmus.training.previews import save_samples
from isthmus.training.saved_networks import export_pipeline, kept_classes, sampling_options
from isthmus.training.train_prior import PriorTask

_SEEDS = 2**63


def sample_dropout(x: Float[Tensor, "b l width"], rate: float, seeds: Sequence[int]) -> Float[Tensor, "b l width"]:
    """Zero a share `rate` of the entries and scale up the others; the mask of each sample follows from its seed.

    >>> sample_dropout(torch.ones(1, 1, 64), 0.5, [3]).unique().tolist()
    [0.0, 2.0]
    """
    generator = torch.Generator(x.device)
    rows = [torch.rand(x.shape[1:], generator=generator.manual_seed(seed), device=x.device) >= rate for seed in seeds]
    return x * torch.stack(rows).to(x.dtype) / (1 - rate)


def embedding_seeds(positions: Int[Tensor, " b"], *, seed: int) -> list[int]:
    """One seed per training position."""
    return [int(stream(seed, EMBEDDING_DROPOUT, int(p)).integers(_SEEDS)) for p in positions]


def residual_seeds(positions: Int[Tensor, " b"], num_layers: int, *, seed: int) -> Int[Tensor, "b layers 2"]:
    """One seed per training position, layer and branch (attention, feed-forward)."""
    rows = [stream(seed, RESIDUAL_DROPOUT, int(p)).integers(_SEEDS, size=(num_layers, 2)) for p in positions]
    return torch.from_numpy(np.stack(rows))


class ResidualDropout:
    """Dropout of what attention and feed-forward add to the residual stream, as hooks on a stock Llama.

    Args:
        transformer: the Llama; it is not changed but for the hooks, while they are attached.
        rate: share that is zeroed, in [0, 1); 0 attaches nothing.

    Attributes:
        seeds: (b, layers, 2) of the batch that goes through next.
    """

    def __init__(self, transformer: LlamaForCausalLM, rate: float):
        self.transformer, self.rate = transformer, rate
        self.seeds: Int[Tensor, "b layers 2"] | None = None

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Hooks on every `self_attn.o_proj` and `mlp`; they are gone afterwards, whatever happens."""
        handles = []
        try:
            if self.rate:
                for index, layer in enumerate(cast(Iterable[LlamaDecoderLayer], self.transformer.model.layers)):
                    branches: tuple[nn.Module, ...] = (layer.self_attn.o_proj, layer.mlp)
                    handles += [m.register_forward_hook(self._hook(index, k)) for k, m in enumerate(branches)]
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, layer: int, branch: int) -> Any:
        def drop(module: nn.Module, arguments: object, output: Tensor) -> Tensor:
            assert self.seeds is not None, "the loop sets the seeds of a batch before it goes through"
            return sample_dropout(output, self.rate, self.seeds[:, layer, branch].tolist())

        return drop


@dataclass
class NextTokenLosses:
    """What one batch gave.

    Attributes:
        total: mean cross-entropy, nats per token: what is minimised.
        nats: (b, l), cross-entropy of every token.
        hits: (b, l), whether the likeliest code was the right one.
    """

    total: Float[Tensor, ""]
    nats: Float[Tensor, "b l"]
    hits: Bool[Tensor, "b l"]


class NextTokenObjective(nn.Module):
    """A Llama and its loss as one network for the optimizer, the averages and the processes.

    The head is applied to its first `codebook_size` rows only: the rows of class ids, which are zero, are never
    predicted, never get a gradient and stay zero.

    Args:
        transformer: the Llama.
        layout: of its vocabulary.
        embedding_dropout: share of the entries of embedded words that is zeroed in training mode.
    """

    def __init__(self, transformer: LlamaForCausalLM, layout: TokenLayout, *, embedding_dropout: float = 0.0):
        super().__init__()
        self.transformer, self.layout = transformer, layout
        self.embedding_dropout = embedding_dropout

    def enable_gradient_checkpointing(self) -> None:
        """Recompute the activations of each block in the backward pass."""
        # the newer of transformers' two names for it, where there is one
        newer = getattr(self.transformer, "activation_checkpointing_enable", None)
        (newer or self.transformer.gradient_checkpointing_enable)({"use_reentrant": False})

    def forward(
        self,
        class_labels: Int[Tensor, " b"],
        token_ids: Int[Tensor, "b l"],
        embedding_seeds: Sequence[int] | None = None,
    ) -> NextTokenLosses:
        """Losses of all tokens at once (teacher forcing).

        Args:
            class_labels: 0..num_classes, where num_classes is the null label.
            token_ids: all tokens of the images.
            embedding_seeds: one per image, for the dropout of the embeddings; None drops nothing.
        """
        inputs = next_token_inputs(self.layout, class_labels, token_ids[:, :-1])
        embedded = self.transformer.get_input_embeddings()(inputs)
        if embedding_seeds is not None and self.embedding_dropout and self.training:
            embedded = sample_dropout(embedded, self.embedding_dropout, embedding_seeds)
        hidden = self.transformer.model(inputs_embeds=embedded, use_cache=False).last_hidden_state
        logits = F.linear(hidden, self.transformer.lm_head.weight[: self.layout.codebook_size]).float()
        nats = next_token_loss(logits, token_ids)
        return NextTokenLosses(nats.mean(), nats.detach(), logits.detach().argmax(dim=-1) == token_ids)


def nats_by_group(nats: Float[Tensor, "b l"], num_groups: int) -> Float[Tensor, " groups"]:
    """Mean over images and over the tokens of each group.

    >>> import torch
    >>> nats_by_group(torch.tensor([[1.0, 3.0, 5.0, 5.0]]), 2)
    tensor([2., 5.])
    """
    return nats.mean(dim=0).unflatten(0, (num_groups, -1)).mean(dim=1)


def load_dar_model(path: str) -> tuple[TokenizerParts, LlamaForCausalLM, tuple[str, ...]]:
    """Everything of a saved pipeline, to go on training: tokenizer parts, prior, class names (none without names).

    Raises:
        UserError: there is none, or it is of another family.
    """
    pipeline = load_pipeline(path, device="cpu")
    if not isinstance(pipeline, DARPipeline):
        raise UserError(f"{path} holds a {type(pipeline).__name__}, no model of the D-AR family. Pass another model.")
    names = names_in_order(pipeline.class_names)
    parts = TokenizerParts(pipeline.image_tokenizer, pipeline.decoder, pipeline.scheduler)
    return parts, pipeline.transformer, names


def averaged_llama(model: NextTokenObjective, ema: ExponentialMovingAverage) -> LlamaForCausalLM:
    """A whole copy of the Llama that holds the averages, in eval mode, without the hooks of the loop.

    Every process must call it where weights are sharded.
    """
    source = model.transformer
    state = gathered(ema.averages_under("transformer."))
    with without_values():
        averaged = LlamaForCausalLM(source.config)
    averaged.load_state_dict({name: value.to(source.device, copy=True) for name, value in state.items()}, assign=True)
    # its table of angles is no weight, so it is still on the meta device
    averaged.model.rotary_emb = copy.deepcopy(source.model.rotary_emb)
    return averaged.eval().requires_grad_(False)


_SIZES = {
    "width": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "feed_forward_width": "intermediate_size",
}


class NextTokenPriorTask(PriorTask):
    """A Llama on the tokens of a D-AR tokenizer, as the training loop asks for it.

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
    def describe(run: NextTokenPriorRun) -> str:
        """Settings, size, cost and memory of a run. No weight is allocated."""
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

    @torch.no_grad()
    def save_samples(self, model: LlamaForCausalLM, folder: Path, step: int) -> None:
        """A picture of samples at fixed seeds."""
        parts, plan = self.parts, SolverPlan.of(self.parts.scheduler)

        def draw(labels: Int[Tensor, " b"], seeds: list[tuple[int, int]]) -> list[Image.Image]:
            labels, noise = labels.to(parts.decoder.device), image_noise(seeds, self.image_size, self.image_size)
            tokens = generate_tokens(model, self.layout, labels, seeds, self.options, stops=plan.stops)
            *_, last = flow_steps(parts.image_tokenizer, parts.decoder, parts.scheduler, plan, tokens, noise)
            return to_pil(last.preview.clamp(-1, 1))

        save_samples(draw, self.train.class_names, self.layout.null_class_id, folder, step)

    def export(self, accelerator: Accelerator, model: LlamaForCausalLM) -> Path:
        """Write the pipeline."""
        networks = {**vars(self.parts), "transformer": model}
        return export_pipeline(accelerator, self.run, self.train, self.options, DARPipeline, **networks)


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
    wanted = given(run.model)
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
    for option, value in given(wanted).items():
        present = getattr(source, _SIZES[option])
        if value != present:
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

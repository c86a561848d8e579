"""Training the Llama of D-AR: cross-entropy of every image token, given the class and the tokens before it."""

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from jaxtyping import Bool, Float, Int
from PIL import Image
from torch import Tensor, nn
from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from isthmus.dar.decoding import SolverPlan, flow_steps, image_noise
from isthmus.dar.pipeline import DARPipeline
from isthmus.dar.prior import TokenLayout, new_prior, next_token_inputs, next_token_loss
from isthmus.dar.runs import NextTokenPriorRun
from isthmus.dar.sampling import generate_tokens
from isthmus.dar.train_tokenizer import TokenizerParts, load_parts
from isthmus.data.views import Batch
from isthmus.errors import UserError
from isthmus.nn.draws import EMBEDDING_DROPOUT, RESIDUAL_DROPOUT, stream
from isthmus.nn.saved_model import without_values
from isthmus.pictures import to_pil
from isthmus.pipelines.labels import names_in_order
from isthmus.training.arguments import given
from isthmus.training.checkpoints import gathered
from isthmus.training.cost import report, training_cost
from isthmus.training.images import dropped_labels, open_split, open_splits
from isthmus.training.optim import ExponentialMovingAverage
from isthmus.training.previews import save_samples
from isthmus.training.saved_networks import (
    export_pipeline,
    kept_classes,
    load_model,
    refuse_contradictions,
    sampling_options,
)
from isthmus.training.train_prior import PriorTask, bits_by_level

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

    `rate` is the share that is zeroed, in [0, 1); 0 attaches nothing.
    """

    def __init__(self, transformer: LlamaForCausalLM, rate: float):
        self.transformer, self.rate = transformer, rate
        # of the batch that goes through next
        self.seeds: Int[Tensor, "b layers 2"] | None = None

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Hooks on every `self_attn.o_proj` and `mlp`; they are gone afterwards, whatever happens."""
        with ExitStack() as hooks:
            layers = cast(Iterable[LlamaDecoderLayer], self.transformer.model.layers)
            for index, layer in enumerate(layers if self.rate else ()):
                for branch, module in enumerate((layer.self_attn.o_proj, layer.mlp)):
                    hooks.enter_context(module.register_forward_hook(partial(self._drop, index, branch)))
            yield

    def _drop(self, layer: int, branch: int, module: nn.Module, arguments: object, output: Tensor) -> Tensor:
        assert self.seeds is not None, "the loop sets the seeds of a batch before it goes through"
        return sample_dropout(output, self.rate, self.seeds[:, layer, branch].tolist())


@dataclass
class NextTokenLosses:
    """What one batch gave."""

    total: Float[Tensor, ""]
    """What is minimised: the mean of `nats`."""
    nats: Float[Tensor, "b l"]
    """Cross-entropy of every token."""
    hits: Bool[Tensor, "b l"]
    """Whether the likeliest code was the right one."""

    def logged(self) -> dict[str, Tensor]:
        """Loss, token accuracy, and nats of every place in the sequence."""
        return {"loss": self.total.detach(), "token_accuracy": self.hits.float().mean(), "nats": self.nats.mean(dim=0)}


class NextTokenObjective(nn.Module):
    """A Llama and its loss as one network for the optimizer, the averages and the processes.

    The head is applied to its first `codebook_size` rows only: the rows of class ids, which are zero, are never
    predicted, never get a gradient and stay zero. `embedding_dropout` is the share of the entries of embedded words
    that is zeroed in training mode.
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
        """Losses of all tokens at once (teacher forcing), of labels 0..num_classes, the last being the null label.

        Without `embedding_seeds`, one per image, no embeddings are dropped.
        """
        inputs = next_token_inputs(self.layout, class_labels, token_ids[:, :-1])
        embedded = self.transformer.get_input_embeddings()(inputs)
        if embedding_seeds is not None and self.embedding_dropout and self.training:
            embedded = sample_dropout(embedded, self.embedding_dropout, embedding_seeds)
        hidden = self.transformer.model(inputs_embeds=embedded, use_cache=False).last_hidden_state
        logits = F.linear(hidden, self.transformer.lm_head.weight[: self.layout.codebook_size]).float()
        nats = next_token_loss(logits, token_ids)
        return NextTokenLosses(nats.mean(), nats.detach(), logits.detach().argmax(dim=-1) == token_ids)


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


def nats_by_group(nats: Float[Tensor, " l"], num_groups: int) -> Float[Tensor, " groups"]:
    """Mean over the tokens of each group, which lie next to each other.

    >>> nats_by_group(torch.tensor([1.0, 3.0, 5.0, 5.0]), 2)
    tensor([2., 5.])
    """
    return nats.unflatten(0, (num_groups, -1)).mean(dim=1)


class NextTokenPriorTask(PriorTask):
    """A Llama on the tokens of a D-AR tokenizer, as the training loop asks for it."""

    sharded = ("LlamaDecoderLayer",)
    level = "group"

    def __init__(self, run: NextTokenPriorRun):
        self.run = run
        self.parts, saved = starting_point(run)
        self.tokenizer = self.encoder = self.parts.image_tokenizer
        self.image_size: int = self.tokenizer.config["image_size"]
        self.train, self.held_out = open_splits(run, self.image_size)
        llama = build_prior(run, self.parts, saved, self.train.class_names)
        self._groups: int = self.tokenizer.config["num_groups"]
        self.layout = layout_of(self.tokenizer.config, len(self.train.class_names))
        self.network = NextTokenObjective(llama, self.layout, embedding_dropout=run.embedding_dropout)
        self._dropout = ResidualDropout(llama, run.residual_dropout)
        if run.sampling.smooth:
            raise UserError("sampling.smooth mixes the codes of a whole scale, and this model has none. Leave it out.")
        if not isinstance(run.sampling.temperature, (int, float)):
            raise UserError(
                f"sampling.temperature is one number for a next-token prior, got {run.sampling.temperature}."
            )
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
            parts, saved = starting_point(run)
        config = parts.image_tokenizer.config
        source = open_split(run, config["image_size"], "train")
        with without_values():
            llama = build_prior(run, parts, saved, source.class_names)
        layout = layout_of(config, len(source.class_names))

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
        labels, null = batch["class_label"].to(device), self.layout.null_class_id
        labels = dropped_labels(labels, positions, rate=run.label_dropout, null_class_id=null, seed=run.seed)
        if run.residual_dropout:
            num_layers = self.network.transformer.config.num_hidden_layers
            self._dropout.seeds = residual_seeds(positions, num_layers, seed=run.seed)
        seeds = embedding_seeds(positions, seed=run.seed) if run.embedding_dropout else None
        return model(labels, batch["token_ids"].to(device), seeds)

    def lengths(self, step: int) -> dict[int, int]:
        """Tokens of every group."""
        return dict.fromkeys(range(self._groups), self.layout.num_tokens // self._groups)

    def step_values(self, means: dict[str, Tensor], step: int) -> dict[str, float]:
        """The line of all tasks, from the means of groups."""
        return super().step_values(means | {"nats": nats_by_group(means["nats"], self._groups)}, step)

    def averaged(self, ema: ExponentialMovingAverage) -> LlamaForCausalLM:
        """A copy that holds the averages."""
        return averaged_llama(self.network, ema)

    def token_ids(self, images: Tensor) -> Tensor:
        """All tokens (b, num_tokens) of images."""
        return self.tokenizer.encode(images).token_ids

    @torch.no_grad()
    def held_out_bits(self, model: LlamaForCausalLM, token_ids: Tensor, labels: Tensor) -> dict[str, float]:
        """Bits per token of held-out images, in all and per group."""
        objective = NextTokenObjective(model, self.layout).eval()
        nats = [objective(label, ids).nats for ids, label in zip(token_ids.split(32), labels.split(32), strict=True)]
        return bits_by_level("val", "group", nats_by_group(torch.cat(nats).mean(dim=0), self._groups), self.lengths(0))

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


def starting_point(run: NextTokenPriorRun) -> tuple[TokenizerParts, DARPipeline | None]:
    """The tokenizer of a run, and the saved model that it goes on from; UserError for none, or one without codes."""
    saved = load_model(run.from_model, DARPipeline) if run.from_model else None
    if saved is not None:
        parts = TokenizerParts(saved.image_tokenizer, saved.decoder, saved.scheduler)
    elif run.tokenizer:
        parts = load_parts(run.tokenizer)
    else:
        raise UserError(
            "a prior needs a tokenizer, got none. Pass --tokenizer FOLDER (of a tokenizer run) or --from MODEL."
        )
    if not parts.image_tokenizer.config["quantized"]:
        raise UserError("a prior predicts codes, and this tokenizer keeps its tokens continuous. Train one with codes.")
    return parts, saved


def build_prior(
    run: NextTokenPriorRun, parts: TokenizerParts, saved: DARPipeline | None, class_names: Sequence[str]
) -> LlamaForCausalLM:
    """The Llama to train on images of these classes: new, or a saved one.

    Raises UserError where a size is missing, does not fit, or contradicts the saved model.
    """
    layout, wanted = layout_of(parts.image_tokenizer.config, len(class_names)), given(run.model)
    if saved is not None:
        config = saved.transformer.config
        sizes = {"width": config.hidden_size, "num_layers": config.num_hidden_layers}
        sizes |= {"num_heads": config.num_attention_heads, "feed_forward_width": config.intermediate_size}
        refuse_contradictions(sizes, wanted, run.from_model)
        kept = kept_classes(class_names, names_in_order(saved.class_names))
        return with_new_classes(saved.transformer, layout, kept=kept)
    missing = [name for name in ("width", "num_layers", "num_heads") if name not in wanted]
    if missing:
        raise UserError(f"a new prior needs model.{missing[0]}, got none. Name it, or start from a --preset.")
    return new_prior(layout, **wanted)


def layout_of(tokenizer: Mapping[str, Any], num_classes: int) -> TokenLayout:
    """The layout of a prior's vocabulary, from the settings of its tokenizer."""
    return TokenLayout(tokenizer["codebook_size"], num_classes, tokenizer["num_tokens"])


def with_new_classes(
    source: LlamaForCausalLM, layout: TokenLayout, *, kept: Mapping[int, int] | None = None
) -> LlamaForCausalLM:
    """The saved Llama with new classes: each starts at the null class, which is kept; all else is as it was.

    `kept` maps labels to labels of the saved prior that they take over (see `kept_classes`). Raises UserError where
    the Llama is no prior of these tokens.
    """
    TokenLayout.of(source.config, layout.codebook_size, layout.num_tokens)
    config = copy.deepcopy(source.config)
    config.vocab_size = layout.vocab_size
    model = LlamaForCausalLM(config)
    state, codes = source.state_dict(), layout.codebook_size
    embedding = state["model.embed_tokens.weight"]
    null = len(embedding) - codes - 1
    rows = [codes + (kept or {}).get(label, null) for label in range(layout.num_classes + 1)]
    state["model.embed_tokens.weight"] = torch.cat([embedding[:codes], embedding[rows]])
    head = state["lm_head.weight"]
    state["lm_head.weight"] = torch.cat([head[:codes], head.new_zeros(layout.num_classes + 1, head.shape[1])])
    model.load_state_dict(state)
    return model

"""Training the Llama of D-AR: cross-entropy of every image token, given words, the class and the tokens before it."""

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
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
from isthmus.dar.prior import INIT_STD, PaddedWords, TokenLayout, new_prior, next_token_inputs, next_token_loss
from isthmus.dar.runs import NextTokenPriorRun
from isthmus.dar.sampling import AskedWords, generate_tokens
from isthmus.dar.train_tokenizer import TokenizerParts, load_parts
from isthmus.data.token_cache import TokenCache
from isthmus.data.views import Batch
from isthmus.errors import UserError
from isthmus.nn.draws import EMBEDDING_DROPOUT, RESIDUAL_DROPOUT, stream
from isthmus.nn.saved_model import without_values
from isthmus.pictures import to_pil
from isthmus.pipelines.labels import names_in_order
from isthmus.text.tokenizer import TextTokenizer
from isthmus.training.arguments import given
from isthmus.training.captions import Captions, check_captions, shown_captions, warn_of_cut_captions, with_words
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


def sample_dropout(
    x: Float[Tensor, "b l width"], rate: float, seeds: Sequence[int], *, longest: int | None = None
) -> Float[Tensor, "b l width"]:
    """Zero a share `rate` of the entries and scale up the others; the mask of each sample follows from its seed.

    Rows that may be `longest` take the last places of a mask of that length, so that filling them up at their left end
    changes nothing; None is their own length.

    >>> sample_dropout(torch.ones(1, 1, 64), 0.5, [3]).unique().tolist()
    [0.0, 2.0]
    """
    generator, length = torch.Generator(x.device), x.shape[1]
    shape = (length if longest is None else longest, x.shape[2])
    rows = [torch.rand(shape, generator=generator.manual_seed(seed), device=x.device)[-length:] for seed in seeds]
    return x * (torch.stack(rows) >= rate).to(x.dtype) / (1 - rate)


def embedding_seeds(positions: Int[Tensor, " b"], *, seed: int) -> list[int]:
    """One seed per training position."""
    return [int(stream(seed, EMBEDDING_DROPOUT, int(p)).integers(_SEEDS)) for p in positions]


def residual_seeds(positions: Int[Tensor, " b"], num_layers: int, *, seed: int) -> Int[Tensor, "b layers 2"]:
    """One seed per training position, layer and branch (attention, feed-forward)."""
    rows = [stream(seed, RESIDUAL_DROPOUT, int(p)).integers(_SEEDS, size=(num_layers, 2)) for p in positions]
    return torch.from_numpy(np.stack(rows))


class ResidualDropout:
    """Dropout of what attention and feed-forward add to the residual stream, as hooks on a stock Llama.

    `rate` is the share that is zeroed, in [0, 1); 0 attaches nothing. `longest` is that of `sample_dropout`.
    """

    def __init__(self, transformer: LlamaForCausalLM, rate: float, *, longest: int | None = None):
        self.transformer, self.rate, self.longest = transformer, rate, longest
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
        return sample_dropout(output, self.rate, self.seeds[:, layer, branch].tolist(), longest=self.longest)


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

    The head is applied to its first `codebook_size` rows only: the rows of classes and words, which are zero, are never
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
        words: PaddedWords | None = None,
    ) -> NextTokenLosses:
        """Losses of all tokens at once (teacher forcing), of labels 0..num_classes, the last being the null label.

        Without `embedding_seeds`, one per image, no embeddings are dropped; without `words` there are none.
        """
        length = token_ids.shape[1]
        inputs = next_token_inputs(self.layout, class_labels, token_ids[:, :-1], words)
        embedded = self.transformer.get_input_embeddings()(inputs)
        if embedding_seeds is not None and self.embedding_dropout and self.training:
            longest = self.layout.prompt_length + length
            embedded = sample_dropout(embedded, self.embedding_dropout, embedding_seeds, longest=longest)
        places = {} if words is None else words.places(length)
        hidden = self.transformer.model(inputs_embeds=embedded, use_cache=False, **places).last_hidden_state
        logits = F.linear(hidden[:, -length:], self.transformer.lm_head.weight[: self.layout.codebook_size]).float()
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
        self.parts, self._saved = starting_point(run)
        self.tokenizer = self.encoder = self.parts.image_tokenizer
        self.image_size: int = self.tokenizer.config["image_size"]
        self.train, self.held_out = open_splits(run, self.image_size)
        self.words, self._captions = words_of(run, self._saved), None
        if self.words is not None:
            check_captions(self.train, self.held_out)
        self._groups: int = self.tokenizer.config["num_groups"]
        self._learns_words = self.words is not None and is_planned(self.words, self._saved)
        # sizes are checked now; a new Llama gets its weights when its words are known
        with without_values() if self._learns_words and self._saved is None else nullcontext():
            self._make_network()
        if run.sampling.smooth:
            raise UserError("sampling.smooth mixes the codes of a whole scale, and this model has none. Leave it out.")
        if not isinstance(run.sampling.temperature, (int, float)):
            raise UserError(
                f"sampling.temperature is one number for a next-token prior, got {run.sampling.temperature}."
            )
        self.options = sampling_options(
            run.sampling,
            codebook_size=self.layout.codebook_size,
            # a prompt, too, is something to guide towards
            num_classes=self.layout.num_classes or self.layout.num_words,
            num_guided_steps=self.layout.num_tokens,
        )

    def _make_network(self) -> None:
        """The Llama and what trains it; where its words are learned, it is made once more with these."""
        names, config = self.train.class_names, self.tokenizer.config
        self.layout = layout_of(config, classes_of(self._saved, self.words, names), self.words)
        llama = build_prior(self.run, self.layout, self._saved, names)
        self.network = NextTokenObjective(llama, self.layout, embedding_dropout=self.run.embedding_dropout)
        longest = self.layout.num_positions - 1
        self._dropout = ResidualDropout(llama, self.run.residual_dropout, longest=longest)

    @staticmethod
    def describe(run: NextTokenPriorRun) -> str:
        """Settings, size, cost and memory of a run. No weight is allocated."""
        with without_values():
            parts, saved = starting_point(run)
        config = parts.image_tokenizer.config
        source = open_split(run, config["image_size"], "train")
        words = words_of(run, saved)
        if words is not None:
            check_captions(source)
            if is_planned(words, saved):
                words = with_words(words, source.captions or (), run.text.num_words)
        layout = layout_of(config, classes_of(saved, words, source.class_names), words)
        with without_values():
            llama = build_prior(run, layout, saved, source.class_names)

        def forward(network: LlamaForCausalLM) -> object:
            return network(input_ids=torch.zeros(1, layout.num_positions - 1, dtype=torch.long), use_cache=False)

        about = (
            f"Llama, {llama.config.num_hidden_layers} layers of width {llama.config.hidden_size}, {layout.num_tokens} "
            f"tokens of {layout.codebook_size} codes; {len(source)} images, {len(source.class_names) or 'no'} classes"
        )
        if words is not None:
            kinds = len(set(source.captions or ()))
            about += f"; captions of {kinds} kinds, up to {layout.prompt_length} words of {layout.num_words}"
        return report(run, about, training_cost(llama, forward))

    def with_cache(self, cache: TokenCache) -> None:
        """Take over the captions; words that are not known yet are learned from them."""
        if self.words is None:
            return
        assert cache.captions is not None, "the images have some"
        self._captions = Captions(self.train, cache.captions, drop=self.run.text.drop, seed=self.run.seed)
        if self._learns_words:
            self.words = with_words(self.words, cache.captions, self.run.text.num_words)
            self._make_network()
        warn_of_cut_captions(self.words, cache.captions)

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
        labels, null = self._known_labels(batch["class_label"].to(device)), self.layout.null_class_id
        labels = dropped_labels(labels, positions, rate=run.label_dropout, null_class_id=null, seed=run.seed)
        if run.residual_dropout:
            num_layers = self.network.transformer.config.num_hidden_layers
            self._dropout.seeds = residual_seeds(positions, num_layers, seed=run.seed)
        seeds = embedding_seeds(positions, seed=run.seed) if run.embedding_dropout else None
        words = None if self._captions is None else self._padded(self._captions.told(batch["index"], positions))
        return model(labels, batch["token_ids"].to(device), seeds, words)

    def _known_labels(self, labels: Int[Tensor, " b"]) -> Int[Tensor, " b"]:
        """Labels that the Llama knows: a model of texts alone is told of no class."""
        return labels if self.layout.num_classes else torch.zeros_like(labels)

    def _padded(self, captions: Sequence[str]) -> PaddedWords:
        assert self.words is not None, "asked for where there are captions"
        return self.layout.padded(self.words.words(captions, warn=False)).to(self.tokenizer.device)

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
        objective, nats = NextTokenObjective(model, self.layout).eval(), []
        for first in range(0, len(token_ids), 32):
            rows = slice(first, first + 32)
            words = None if self.words is None else self._padded(self.held_out_captions(rows))
            nats.append(objective(self._known_labels(labels[rows]), token_ids[rows], words=words).nats)
        return bits_by_level("val", "group", nats_by_group(torch.cat(nats).mean(dim=0), self._groups), self.lengths(0))

    @torch.no_grad()
    def save_samples(self, model: LlamaForCausalLM, folder: Path, step: int) -> None:
        """A picture of samples at fixed seeds: a row for each class, or for each of some held-out captions."""
        parts, plan = self.parts, SolverPlan.of(self.parts.scheduler)

        def pictures(
            labels: Int[Tensor, " b"], seeds: list[tuple[int, int]], texts: AskedWords | None
        ) -> list[Image.Image]:
            labels, noise = labels.to(parts.decoder.device), image_noise(seeds, self.image_size, self.image_size)
            tokens = generate_tokens(model, self.layout, labels, seeds, self.options, stops=plan.stops, texts=texts)
            *_, last = flow_steps(parts.image_tokenizer, parts.decoder, parts.scheduler, plan, tokens, noise)
            return to_pil(last.preview.clamp(-1, 1))

        if self.words is None:
            draw, names = partial(pictures, texts=None), self.train.class_names
            save_samples(draw, names, self.layout.null_class_id, folder, step)
            return
        shown, names = shown_captions(self.held_out)
        assert self.held_out.captions is not None, "checked at the start"
        words = self.words.words([self.held_out.captions[i] for i in shown], warn=False)
        classes = self._known_labels(torch.from_numpy(self.held_out.labels[shown]))

        def told(rows: Int[Tensor, " b"], seeds: list[tuple[int, int]]) -> list[Image.Image]:
            return pictures(classes[rows], seeds, AskedWords([words[row] for row in rows.tolist()]))

        save_samples(told, names, len(shown), folder, step)

    def export(self, accelerator: Accelerator, model: LlamaForCausalLM) -> Path:
        """Write the pipeline, with the words of a model of texts."""
        networks: dict[str, Any] = {**vars(self.parts), "transformer": model}
        if self.words is not None:
            # the example of the card is a caption
            networks |= {"text_tokenizer": self.words, "prompt": (self.held_out.captions or ("",))[0]}
            networks |= {"class_names": self.train.class_names if self.layout.num_classes else ()}
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


def words_of(run: NextTokenPriorRun, saved: DARPipeline | None) -> TextTokenizer | None:
    """What makes words of the captions of a run, planned where they are to be learned; None for a prior of classes.

    Raises UserError for settings that contradict the saved model.
    """
    wanted = {} if run.text.max_length is None else {"max_length": run.text.max_length}
    if saved is not None and saved.text_tokenizer is not None:
        refuse_contradictions(saved.text_tokenizer.config, wanted, run.from_model, options="text")
        if run.text.num_words is not None:
            raise UserError(f"{run.from_model} keeps its words, got text.num_words {run.text.num_words}. Leave it out.")
        return saved.text_tokenizer
    if run.text.encoder:
        return TextTokenizer(**wanted)
    if run.text != type(run.text)():
        raise UserError(f"{run.from_model} reads no texts, got settings of text. Pass --text small, or leave them out.")
    return None


def is_planned(words: TextTokenizer, saved: DARPipeline | None) -> bool:
    """Whether it is a new one, whose words are still to be learned."""
    return saved is None or words is not saved.text_tokenizer


def classes_of(saved: DARPipeline | None, words: TextTokenizer | None, class_names: Sequence[str]) -> int:
    """How many classes a prior on images of these knows: captions take their place, or stand beside in a prior that
    had classes.
    """
    alone = saved is None or (saved.reads_text and not saved.num_classes)
    return 0 if words is not None and alone else len(class_names)


def build_prior(
    run: NextTokenPriorRun, layout: TokenLayout, saved: DARPipeline | None, class_names: Sequence[str]
) -> LlamaForCausalLM:
    """The Llama to train on images of these classes: new, or a saved one.

    Raises UserError where a size is missing, does not fit, or contradicts the saved model.
    """
    wanted = given(run.model)
    if saved is not None:
        config = saved.transformer.config
        sizes = {"width": config.hidden_size, "num_layers": config.num_hidden_layers}
        sizes |= {"num_heads": config.num_attention_heads, "feed_forward_width": config.intermediate_size}
        refuse_contradictions(sizes, wanted, run.from_model)
        kept = kept_classes(class_names, names_in_order(saved.class_names)) if layout.num_classes else {}
        return with_vocabulary(saved.transformer, layout, kept=kept)
    missing = [name for name in ("width", "num_layers", "num_heads") if name not in wanted]
    if missing:
        raise UserError(f"a new prior needs model.{missing[0]}, got none. Name it, or start from a --preset.")
    return new_prior(layout, **wanted)


def layout_of(tokenizer: Mapping[str, Any], num_classes: int, words: TextTokenizer | None = None) -> TokenLayout:
    """The layout of a prior's vocabulary, from the settings of its tokenizer and the words that it reads."""
    text = (0, 0) if words is None else (words.num_words, words.config["max_length"])
    return TokenLayout(tokenizer["codebook_size"], num_classes, tokenizer["num_tokens"], *text)


def with_vocabulary(
    source: LlamaForCausalLM, layout: TokenLayout, *, kept: Mapping[int, int] | None = None
) -> LlamaForCausalLM:
    """The saved Llama with new classes: each starts at the null class, which is kept; all else is as it was.

    `kept` maps labels to labels of the saved prior that they take over (see `kept_classes`). Words are those of the
    saved prior; one that had none gets new rows for them, which images that are asked for without words never meet.
    Raises UserError where the Llama is no prior of these tokens.
    """
    before = TokenLayout.of(source.config, layout.codebook_size, layout.num_tokens)
    config = copy.deepcopy(source.config)
    config.vocab_size, config.max_position_embeddings = layout.vocab_size, layout.num_positions
    if layout.num_words:
        config.num_words, config.prompt_length = layout.num_words, layout.prompt_length
    model = LlamaForCausalLM(config)
    state, codes = source.state_dict(), layout.codebook_size
    embedding = state["model.embed_tokens.weight"]
    rows = [codes + (kept or {}).get(label, before.null_class_id) for label in range(layout.num_classes + 1)]
    words = embedding[before.first_word :]
    if not before.num_words:
        words = embedding.new_empty(layout.num_words, embedding.shape[1]).normal_(std=INIT_STD)
    state["model.embed_tokens.weight"] = torch.cat([embedding[:codes], embedding[rows], words])
    head = state["lm_head.weight"]
    state["lm_head.weight"] = torch.cat([head[:codes], head.new_zeros(layout.vocab_size - codes, head.shape[1])])
    model.load_state_dict(state)
    return model

"""The pipeline of the D-AR family: a Llama's next tokens are the steps of a pixel diffusion.

Source: Gao and Shou, "D-AR: Diffusion via Autoregressive Models". The first tokens of a picture hold its layout: what a
picture keeps of another one is a prefix of tokens.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, SupportsIndex, Unpack, get_args

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from isthmus.dar.decoder import FlowDecoder
from isthmus.dar.decoding import FlowStep, Preview, SolverPlan, decode_tokens, flow_steps, image_noise
from isthmus.dar.likelihood import log_likelihood, score_classes
from isthmus.dar.llama_decoding import LlamaDecoder
from isthmus.dar.options import DAROptions, Solver
from isthmus.dar.prior import PaddedWords, TokenLayout
from isthmus.dar.sampling import AskedWords, Prefix, generate_tokens
from isthmus.dar.scheduler import FlowMatchingScheduler
from isthmus.dar.tokenizer import DiffusionTokenizer
from isthmus.errors import UserError
from isthmus.nn.shapes import Images
from isthmus.nn.stored_llama import StoredLlama, no_progress_bars
from isthmus.pipelines.base import SavedPipeline
from isthmus.pipelines.classification import CandidateScores
from isthmus.pipelines.images import ImageInput, to_images
from isthmus.pipelines.memory import images_that_fit, tokens_that_fit
from isthmus.pipelines.options import OutputType, SamplingOptions, saved_options
from isthmus.pipelines.prompts import Asked
from isthmus.pipelines.request import (
    GenerationStep,
    Labels,
    Pictures,
    Request,
    Whole,
    as_output,
    check_output_type,
    image_seeds,
    takes,
)
from isthmus.text.tokenizer import TextTokenizer

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM


TokenInput = Shaped[Tensor, "*dims"] | Sequence[Any]
"""Tokens (b, n) of several images or (n,) of one: a tensor of integers, or lists as LLM servers return them."""
PrefixLengths = int | Sequence[int] | None


@dataclass
class DARPipelineOutput:
    """What a call returns, one of each per image."""

    images: Pictures
    """As `output_type` says; "latent" gives images in [-1, 1] that are not clamped."""
    token_ids: Int[Tensor, "b n"]
    """On the CPU, what the solver steps read, prefixes included: all tokens, where there are steps for all groups."""
    class_labels: list[int]
    """Class ids; `num_classes` where no class was asked for."""
    seeds: list[tuple[int, int]]
    """(seed, image index): `pipe(label, seed=seed, image_index=index)` draws the image again."""
    prompts: list[str] | None = None
    """The prompt of every image; None for models that read no text."""


class DARPipeline(SavedPipeline):
    """An image tokenizer, a pixel decoder and a Llama that draw images together.

    Args:
        transformer: a stock Llama, whose vocabulary holds codes, classes and words (`TokenLayout`).
        class_names: one name per class, or index -> name; nothing for models without names.
        sampling_defaults: options of a call that names none, stored in the folder.
        preprocessing: how training images were made; None describes the usual way.
        data: `name` and `attribution` (licence line) of the training data, and a `prompt` as an example, for the card.
        protocol: how the model was trained and measured, for the card.
        text_tokenizer: optional component: makes words of prompts, for a transformer that reads them.

    Raises UserError where the components do not belong together, or names or defaults do not fit them; and every method
    does for what it cannot use, before anything is drawn.
    """

    has_solver = True
    parts = {
        "image_tokenizer": DiffusionTokenizer,
        "decoder": FlowDecoder,
        "transformer": StoredLlama,
        "scheduler": FlowMatchingScheduler,
    }
    optional_parts = {"text_tokenizer": TextTokenizer}

    def __init__(
        self,
        image_tokenizer: DiffusionTokenizer,
        decoder: FlowDecoder,
        transformer: "LlamaForCausalLM | StoredLlama",
        scheduler: FlowMatchingScheduler,
        class_names: Sequence[str] | Mapping[str, str] | None = None,
        sampling_defaults: SamplingOptions | Mapping[str, Any] | None = None,
        preprocessing: Mapping[str, Any] | None = None,
        data: Mapping[str, Any] | None = None,
        protocol: str = "",
        text_tokenizer: TextTokenizer | None = None,
    ):
        self.image_tokenizer, self.decoder, self.scheduler = image_tokenizer, decoder, scheduler
        self.llama, self.text_tokenizer = StoredLlama.of(transformer), text_tokenizer
        self.token_layout: TokenLayout = shared_layout(image_tokenizer, decoder, self.llama.config, scheduler)
        check_words(self.token_layout, text_tokenizer)
        self.num_classes: int = self.token_layout.num_classes
        self._describe(class_names, sampling_defaults, preprocessing, data, protocol)

    @takes(DAROptions)
    def __call__(
        self,
        class_labels: Labels = None,
        num_images: SupportsIndex | None = None,
        *,
        num_images_per_class: SupportsIndex = 1,
        callback_on_step_end: Callable[[GenerationStep], object] | None = None,
        **options: Unpack[DAROptions],
    ) -> DARPipelineOutput:
        """Draw images; guidance, filters (None turns one off) and temperature default to those saved with the model.

        Args:
            class_labels: names, indices or None (no class), one per image; a single one may stand alone.
            num_images: how many images in all, labels and prompts taken in turn; None draws one of each.
            num_images_per_class: images per label and prompt, next to each other, where `num_images` is not given.
            callback_on_step_end: called with a `GenerationStep` (without preview) after every solver step.
            options: see `DAROptions`.
        """
        request = self._request(class_labels, num_images, num_images_per_class, options)
        token_ids, step = [], None
        for step in self._steps(request, options, "jump"):
            token_ids.append(step.token_ids.cpu())
            if callback_on_step_end is not None:
                callback_on_step_end(GenerationStep(step.index, step.total, token_ids[-1]))
        assert step is not None, "a plan has at least one step"
        images = as_output(step.preview, request.output_type)
        token_ids, prompts = torch.cat(token_ids, dim=1), request.asked.prompts
        return DARPipelineOutput(images, token_ids, request.class_labels, request.seeds, prompts)

    @takes(DAROptions)
    def stream(
        self,
        class_labels: Labels = None,
        num_images: SupportsIndex | None = None,
        *,
        num_images_per_class: SupportsIndex = 1,
        preview: Preview = "jump",
        **options: Unpack[DAROptions],
    ) -> Iterator[GenerationStep]:
        """Draw images and show them while they grow: one `GenerationStep` with a preview per solver step.

        A step is yielded as soon as its tokens are drawn, before later tokens exist. The arguments, the tokens and the
        last preview are those of a call. Earlier previews are the jump x_t + (1 - t) velocity, or with
        `preview="solver"` the published rule, the solver's own step to the end. `token_ids` of a step are those that it
        waited for, on the CPU.
        """
        request = self._request(class_labels, num_images, num_images_per_class, options)
        if preview not in get_args(Preview):
            raise UserError(f"preview must be one of {', '.join(get_args(Preview))}, got {preview!r}.")
        return (
            GenerationStep(step.index, step.total, step.token_ids.cpu(), as_output(step.preview, request.output_type))
            for step in self._steps(request, options, preview)
        )

    def variations(
        self,
        image: ImageInput,
        num_groups_kept: int,
        class_labels: Labels = None,
        num_images: SupportsIndex | None = None,
        **options: Unpack[DAROptions],
    ) -> DARPipelineOutput:
        """Images that share the first groups of tokens with `image`; `options` are those of a call."""
        groups = self.image_tokenizer.config["num_groups"]
        if not 0 <= num_groups_kept <= groups:
            raise UserError(f"num_groups_kept must lie in 0..{groups} (the groups of an image), got {num_groups_kept}.")
        kept = num_groups_kept * self.image_tokenizer.tokens_per_group
        others: Any = options  # without a prefix of their own, which Python refuses
        return self(class_labels, num_images, prefix_image=image, prefix_tokens=kept, **others)

    def encode(self, images: ImageInput) -> Int[Tensor, "b n"]:
        """All tokens of images, coarse to fine, on the CPU."""
        pixels = to_images(images, self.image_size).to(self.image_tokenizer.device)
        with torch.no_grad():
            return self.image_tokenizer.encode(pixels).token_ids.cpu()

    def decode(
        self,
        token_ids: TokenInput,
        *,
        num_inference_steps: int | None = None,
        solver: Solver | None = None,
        height: int | None = None,
        width: int | None = None,
        seed: Whole | None = 0,
        image_index: Whole = 0,
        output_type: OutputType = "pil",
    ) -> Pictures:
        """Images from tokens that all exist: the diffusion alone. Arguments as for a call."""
        check_output_type(output_type)
        token_ids = self._token_ids(token_ids)
        plan = SolverPlan.of(self.scheduler, num_inference_steps=num_inference_steps, solver=solver)
        seeds = image_seeds(len(token_ids), seed=seed, image_index=image_index)
        noise = image_noise(seeds, *self._sides(height, width))
        return self._decoded(token_ids, noise, plan, output_type)

    def reconstruct(self, images: ImageInput, **options: Any) -> Pictures:
        """Images through their own tokens and back; `options` are those of `decode`. Tensors keep their size."""
        pixels = to_images(images, self.image_size)
        options = {"height": pixels.shape[2], "width": pixels.shape[3], **options}
        return self.decode(self.encode(pixels), **options)

    def evidence(
        self,
        images: ImageInput | None = None,
        class_labels: Labels = None,
        *,
        token_ids: TokenInput | None = None,
        prompt: str | Sequence[str] | None = None,
    ) -> Float[Tensor, "b n"]:
        """Which tokens of an image speak for its class or prompt: nats of pointwise mutual information per token.

        log p(token | class) - log p(token | no class); a row's sum is log p(image's tokens | class) - log p(image's
        tokens). Tokens have a place in time and none in the image: the first drive the steps that lay it out, the last
        those of its details, so there is no map of it. Arguments as for `log_prob`, every label a class or every prompt
        some words.
        """
        self._check_evidence(class_labels, prompt)
        token_ids = self._tokens_of(images, token_ids)
        return self._token_nats(None, class_labels, token_ids, prompt) - self._token_nats(None, None, token_ids)

    def restart(
        self,
        image: ImageInput,
        strength: float | int,
        *,
        token_ids: TokenInput | None = None,
        num_inference_steps: int | None = None,
        solver: Solver | None = None,
        seed: Whole | None = 0,
        image_index: Whole = 0,
        output_type: OutputType = "pil",
    ) -> Pictures:
        """Run the last solver steps again, from `image` with the noise of the first of them.

        Args:
            strength: share of the steps that run, in (0, 1]: small changes little, 1 starts from noise alone.
            token_ids: what drives the steps: tokens of the images, or of others drawn with their layout; None takes
                those of `image`.
            num_inference_steps: steps of the whole way; the first that runs is one of Euler.
            solver: as for a call, and so are the others.
        """
        check_output_type(output_type)
        pixels = to_images(image, self.image_size)
        token_ids = self.encode(pixels) if token_ids is None else self._token_ids(token_ids)
        rows = len(token_ids)
        if len(pixels) not in (1, rows):
            raise UserError(f"a restart needs one image, or one per row of tokens ({rows}), got {len(pixels)}.")
        times = self.scheduler.times(num_inference_steps)
        if not 0 < strength <= 1:
            raise UserError(f"strength is the share of the solver steps that run, in (0, 1], got {strength}.")
        first = min(round((1 - strength) * (len(times) - 1)), len(times) - 2)
        plan = SolverPlan.of(self.scheduler, num_inference_steps=num_inference_steps, solver=solver, first=first)
        seeds = image_seeds(rows, seed=seed, image_index=image_index)
        self.decoder.check_sides(*pixels.shape[2:])
        noise, images = image_noise(seeds, *pixels.shape[2:]), pixels.expand(rows, -1, -1, -1)
        x = self.scheduler.add_noise(images, noise, times[first].expand(rows))
        return self._decoded(token_ids, x, plan, output_type)

    @property
    def transformer(self) -> "LlamaForCausalLM":
        """The prior as a stock module, made when it is first asked for: drawing reads its weights alone."""
        return self.llama.module

    @transformer.setter
    def transformer(self, transformer: "LlamaForCausalLM | StoredLlama") -> None:
        self.llama = StoredLlama.of(transformer)

    def stored(self, name: str) -> Any:
        """A component as it is kept, for reading alone."""
        return self.llama if name == "transformer" else super().stored(name)

    def llama_decoder(self, num_images: int = 1, *, int8: bool = False, compiled: bool = False) -> LlamaDecoder:
        """The prior's weights laid out for decoding, for many calls: a call lays them out anew where it is given none.

        Args:
            num_images: images that will be drawn at once; any other number works, if slower.
            int8: 8-bit weights, for CPUs: a large prior decodes faster, and now and then draws another token.
            compiled: run through `torch.compile`, which pays on GPUs; the first token waits for the compiler.
        """
        # an image that is guided has a row with and one without its class
        return LlamaDecoder(self.llama, self.token_layout, num_rows=2 * num_images, int8=int8, compiled=compiled)

    @property
    def reads_text(self) -> bool:
        """Whether images follow prompts."""
        return self.token_layout.num_words > 0

    def prepared(self, num_images: int, *, int8: bool = False, compiled: bool = False) -> dict[str, Any]:
        """Arguments for many calls of `num_images` images each: the laid-out weights of the prior."""
        return {"llama_decoder": self.llama_decoder(num_images, int8=int8, compiled=compiled)}

    @property
    def image_size(self) -> int:
        """Side of the images trained on, in pixels."""
        return self.image_tokenizer.config["image_size"]

    def check_options(self, options: SamplingOptions) -> None:
        """Raise UserError where this model cannot draw with these options."""
        if options.smooth:
            raise UserError(
                "smooth mixes the codes of a whole scale, and a next-token prior draws one token at a time. Leave it "
                "out; a lower temperature gives calmer images."
            )
        if not isinstance(options.temperature, (int, float)):
            raise UserError(
                f"a next-token prior draws at one temperature, got {len(options.temperature)} of them. Pass one number."
            )
        super().check_options(options)

    @property
    def codebook_size(self) -> int:
        """Number of codes a token is drawn from."""
        return self.token_layout.codebook_size

    @property
    def num_guided_steps(self) -> int:
        """Number of tokens."""
        return self.token_layout.num_tokens

    @property
    def kind(self) -> str:
        """What the model is, in a few words."""
        return "D-AR (next-token Llama that drives a pixel diffusion)"

    @property
    def layout(self) -> str:
        """Tokens and steps, in a sentence for the card."""
        config, groups = self.scheduler.config, self.image_tokenizer.config["num_groups"]
        return (
            f"Tokens: {self.token_layout.num_tokens} in {groups} groups, which drive {config['num_inference_steps']} "
            f"solver steps ({config['solver']})."
        )

    def step_names(self, num_steps: int) -> list[str]:
        """How many tokens each step waits for."""
        return [f"{needed} tokens" for needed in SolverPlan.of(self.scheduler, num_inference_steps=num_steps).needed]

    @property
    def stage_lengths(self) -> dict[str, int]:
        """Tokens of every group, by their places."""
        size = self.image_tokenizer.tokens_per_group
        return {f"tokens {start + 1} to {start + size}": size for start in range(0, self.token_layout.num_tokens, size)}

    def reconstruct_by_stage(self, images: Images, *, first_index: int = 0) -> dict[str, Images]:
        """The preview after every solver step; where several steps wait for the same tokens, after the last of them."""
        # every token is given, so the prior draws none: the steps are those of the reconstruction
        steps = self.stream(
            [None] * len(images),
            prefix_token_ids=self.encode(images),
            height=images.shape[2],
            width=images.shape[3],
            seed=0,
            image_index=first_index,
            guidance_scale=1.0,
            output_type="latent",
        )
        return {self.step_names(step.total)[step.index]: torch.as_tensor(step.preview) for step in steps}

    def bytes_per_image(self, *, guided: bool) -> int:
        """Peak bytes that one more image in a batch takes, roughly; see `isthmus.pipelines.memory`."""
        llama, pixels = self.llama.config, self.decoder.config
        size = 2 if self.llama.dtype == torch.bfloat16 else 4
        cache = 2 * llama.num_hidden_layers * llama.max_position_embeddings * llama.hidden_size * size
        # words are read all at once: stream, queries, keys, values, feed-forward
        cache += self.token_layout.prompt_length * (6 * llama.hidden_size + 3 * llama.intermediate_size) * size
        # the logits of one token with their sorted and cumulated copies
        draw = llama.vocab_size * (5 * 4 + 2 * 8)
        # rows inside a block of the pixel decoder: stream, modulation, feed-forward, attention
        rows = (self.image_size // pixels["patch_size"]) ** 2
        flow = rows * pixels["width"] * (2 + 6 + 2 * 4 + 6) * (2 if self.decoder.dtype == torch.bfloat16 else 4)
        return (2 if guided else 1) * cache + draw + flow + 8 * 3 * self.image_size**2 * 4

    def _write(self, folder: Path, max_shard_size: int | str | None) -> None:
        with no_progress_bars():
            super()._write(folder, max_shard_size)

    def _steps(self, request: Request, options: Mapping[str, Any], preview: Preview) -> Iterator[FlowStep]:
        """Solver steps of a request; what is not usable is refused at once."""
        given = (options[name] for name in ("prefix_image", "prefix_token_ids", "prefix_tokens"))
        prefix = self._prefix(len(request.seeds), *given)
        each = [request.options] * len(request.seeds)
        if options["image_options"] is not None:
            each = [own.override(**saved_options(options)) for own in options["image_options"]]
            for own in each:
                self.check_options(own)
        plan = SolverPlan.of(
            self.scheduler, num_inference_steps=options["num_inference_steps"], solver=options["solver"]
        )
        sides = self._sides(options["height"], options["width"])
        token_ids = generate_tokens(
            self.llama,
            self.token_layout,
            torch.tensor(request.class_labels, device=self.device),
            request.seeds,
            each,
            stops=plan.stops,
            prefix=prefix,
            decoder=options["llama_decoder"],
            texts=self._words(request.asked),
        )
        noise = image_noise(request.seeds, *sides)
        return flow_steps(self.image_tokenizer, self.decoder, self.scheduler, plan, token_ids, noise, preview=preview)

    def _words(self, asked: Asked) -> AskedWords | None:
        """The prompts in words, each read once; None where the model reads none. Long ones are cut with a warning."""
        if self.text_tokenizer is None:
            return None
        prompts = asked.prompts or []
        known = list(dict.fromkeys([*prompts, asked.negative_prompt]))
        words = dict(zip(known, self.text_tokenizer.words(known), strict=True))
        return AskedWords([words[prompt] for prompt in prompts], words[asked.negative_prompt])

    def _token_ids(self, token_ids: TokenInput) -> Int[Tensor, "b n"]:
        """One row per image; UserError where these are no tokens of this model."""
        try:
            token_ids = torch.as_tensor(token_ids)
        except (TypeError, ValueError) as error:
            raise UserError(
                f"token_ids must be integers, equally many per image, got {type(token_ids).__name__} ({error}). "
                "Pass a tensor (b, n) or lists of equal lengths."
            ) from error
        rows = token_ids.unsqueeze(0) if token_ids.ndim == 1 else token_ids
        if rows.ndim != 2 or rows.is_floating_point() or rows.is_complex() or rows.dtype == torch.bool:
            raise UserError(
                f"token_ids must be integers of shape (n,) or (b, n), got {token_ids.dtype} of shape "
                f"{tuple(token_ids.shape)}. Pass what encode returned."
            )
        most = self.image_tokenizer.config["num_tokens"]
        if rows.shape[1] > most:
            raise UserError(f"an image has {most} tokens, got {rows.shape[1]}. Leave out the class, and what follows.")
        self.image_tokenizer.check_token_ids(rows)
        return rows

    def _prefix(
        self, num_images: int, image: ImageInput | None, token_ids: TokenInput | None, lengths: PrefixLengths
    ) -> Prefix | None:
        """The prefix of every image of a request, or None; `lengths` None keeps all of `token_ids`."""
        if image is None and token_ids is None:
            if lengths is not None:
                raise UserError("prefix_tokens is how much of a prefix is kept, and there is none. Pass prefix_image.")
            return None
        if image is not None and token_ids is not None:
            raise UserError("a prefix comes from an image or is given as tokens, got both. Pass one of them.")
        if image is not None:
            if lengths is None:
                raise UserError("prefix_image needs prefix_tokens: how many tokens of the image are kept.")
            token_ids = self.encode(image)
        assert token_ids is not None
        rows = self._token_ids(token_ids)
        if len(rows) not in (1, num_images):
            raise UserError(f"a prefix is one for all images or one for each ({num_images}), got {len(rows)}.")
        rows = rows.expand(num_images, -1)
        given = rows.shape[1]
        kept = given if lengths is None else lengths
        each = [kept] * num_images if isinstance(kept, int) else list(kept)
        if len(each) != num_images:
            raise UserError(f"prefix_tokens is one number, or one per image ({num_images}), got {len(each)}.")
        if not all(0 <= length <= given for length in each):
            raise UserError(f"prefix_tokens must lie in 0..{given} (the tokens there are), got {each}.")
        return Prefix(rows, each)

    def _sides(self, height: int | None, width: int | None) -> tuple[int, int]:
        """None is `image_size`; UserError where the decoder cannot make them."""
        sides = (self.image_size if height is None else height, self.image_size if width is None else width)
        self.decoder.check_sides(*sides)
        return sides

    def _decoded(self, token_ids: Int[Tensor, "b n"], x: Images, plan: SolverPlan, output_type: OutputType) -> Pictures:
        images = decode_tokens(self.image_tokenizer, self.decoder, self.scheduler, token_ids, x, plan=plan)
        return as_output(images, output_type)

    def _token_nats(
        self, images: ImageInput | None, class_labels: Labels, token_ids: TokenInput | None, prompt: object = None
    ) -> Float[Tensor, "_ n"]:
        asked = self.asked(class_labels, prompt)
        token_ids = self._token_ids(self._tokens_of(images, token_ids))
        rows, length = token_ids.shape
        asked = asked.images([0] * rows) if len(asked) == 1 else asked
        if not length or not rows or len(asked) != rows:
            what = "class label or prompt" if self.reads_text else "class label"
            raise UserError(
                f"a likelihood needs 1..{self.token_layout.num_tokens} tokens and a {what} per image, got {rows} "
                f"row(s) of {length} token(s) and {len(asked)} such. Pass the tokens of whole images."
            )
        labels = torch.tensor(asked.class_labels)
        return log_likelihood(self.transformer, self.token_layout, token_ids, labels, self._padded_words(asked))

    def _padded_words(self, asked: Asked) -> PaddedWords | None:
        texts = self._words(asked)
        return None if texts is None else self.token_layout.padded(texts.words)

    def _latents(self, images: ImageInput) -> Iterator[Float[Tensor, "b n d"]]:
        at_once = images_that_fit(self.device, self.bytes_per_image(guided=False))
        for pixels in to_images(images, self.image_size).split(at_once):
            with torch.no_grad():
                yield self.image_tokenizer.encode(pixels.to(self.image_tokenizer.device)).latents

    def _scores(
        self,
        latents: Iterable[Float[Tensor, "rows n d"]],
        asked: Asked,
        *,
        num_views: int,
        keep: int,
        margin_nats: float | None,
    ) -> Iterator[CandidateScores]:
        words, token_bytes = self._padded_words(asked), self._token_bytes()
        for part in latents:
            yield score_classes(
                self.transformer, self.token_layout, self.image_tokenizer.requantize(part), asked.class_labels,
                tokens_per_group=self.image_tokenizer.tokens_per_group, words=words,
                keep=keep, margin_nats=margin_nats, num_views=num_views,
                tokens_at_once=tokens_that_fit(self.device, token_bytes),
            )  # fmt: skip

    def _token_bytes(self) -> int:
        """Of a token that is read: activations, the keys and values of all layers, and logits."""
        config, size = self.llama.config, self.llama.dtype.itemsize
        # keys and values twice: dropping rows copies those that stay
        kept = 4 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
        read = 10 * config.hidden_size + 3 * config.intermediate_size
        # logits in the type of the weights, in fp32, and what the cross-entropy makes of them
        return (kept + read) * size + 4 * config.vocab_size * 4


def check_words(layout: TokenLayout, text_tokenizer: TextTokenizer | None) -> None:
    """Raise UserError unless a prior and a text tokenizer, where there is one, know the same words."""
    ours = (layout.num_words, layout.prompt_length)
    theirs = (0, 0) if text_tokenizer is None else (text_tokenizer.num_words, text_tokenizer.config["max_length"])
    if ours != theirs:
        raise UserError(
            f"the transformer reads prompts of {ours[1]} words out of {ours[0]}, got a text tokenizer with {theirs[1]} "
            f"out of {theirs[0]}. Pass the text_tokenizer that was saved with it, or none for a model that reads none."
        )


def shared_layout(
    image_tokenizer: DiffusionTokenizer, decoder: FlowDecoder, llama: Any, scheduler: FlowMatchingScheduler
) -> TokenLayout:
    """The vocabulary and sequence that tokenizer and prior (its configuration) share; UserError where they do not."""
    tokenizer, pixels = image_tokenizer.config, decoder.config
    if not tokenizer.quantized:
        raise UserError(
            "a prior draws token ids, and this image tokenizer keeps its tokens continuous (quantized=False). "
            "Pass a tokenizer with a codebook."
        )
    size, patch = tokenizer.image_size, pixels.patch_size
    if size % patch:
        raise UserError(
            f"the decoder's patch_size ({patch}) must divide image_size ({size}). Pass the decoder that was saved with "
            "this tokenizer."
        )
    painting = tokenizer.num_tokens if pixels.canvas_tokens is None else pixels.canvas_tokens
    for part, name, ours, theirs in (
        ("decoder", "condition_width", tokenizer.condition_width, pixels.condition_width),
        ("decoder", "num_tokens (the decoder's canvas_tokens)", tokenizer.num_tokens, painting),
        ("scheduler", "num_tokens", tokenizer.num_tokens, scheduler.config.num_tokens),
        ("scheduler", "num_groups", tokenizer.num_groups, scheduler.config.num_groups),
        # an attribute: None in a configuration is one group
        ("scheduler", "tokens_per_step", image_tokenizer.tokens_per_step, scheduler.tokens_per_step),
    ):
        if ours != theirs:
            raise UserError(
                f"image tokenizer and {part} must have the same {name}, got {ours} and {theirs}. Pass the {part} that "
                "was saved with this tokenizer."
            )
    return TokenLayout.of(llama, tokenizer.codebook_size, tokenizer.num_tokens)

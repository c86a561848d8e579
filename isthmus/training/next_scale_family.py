"""What every training of a next-scale transformer shares, whatever its loss is."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor

from isthmus.data.source import ImageSource
from isthmus.data.streaming import ImageStream
from isthmus.functional.pyramid import nats_to_bits
from isthmus.functional.scale_distillation import guidance_at
from isthmus.models.multiscale_vqvae import MultiScaleVQVAE
from isthmus.models.next_scale_transformer import NextScaleTransformer
from isthmus.training.config import TokensRun
from isthmus.training.ema import ExponentialMovingAverage
from isthmus.training.export import export_pipeline
from isthmus.training.objectives import next_scale_loss, scale_weights
from isthmus.training.previews import save_samples
from isthmus.training.saved_networks import averaged_model, sampling_options
from isthmus.training.schedule_encoder import encoder_for


class NextScaleFamily:
    """A base to derive from: the networks, what is measured while training, and what is left behind.

    Args:
        run: the run.
        tokenizer: frozen.
        train: images to train on.
        held_out: images to measure on.
        network: the transformer in training; its scales are the tokenizer's, or some of them.
        guided_sizes: sides that a list of guidance values in the run counts on; None is those of the network.

    Attributes:
        sharded: what FSDP2 gathers one by one: not whole blocks, since all modulations are computed ahead of them.
        encoder: fills the token cache with the tokens of the transformer's scales.
        facts: what run.json keeps beside the run, and a continued run must share.
        options: how previews are drawn, and the defaults of the saved pipeline.
    """

    sharded = ("BlockModulation", "MultiHeadAttention", "FeedForward")

    def __init__(
        self,
        run: TokensRun,
        tokenizer: MultiScaleVQVAE,
        train: ImageSource | ImageStream,
        held_out: ImageSource,
        network: NextScaleTransformer,
        *,
        guided_sizes: Sequence[int] | None = None,
    ):
        self.run = run
        self.tokenizer, self.train, self.held_out, self.network = tokenizer, train, held_out, network
        self.image_size = tokenizer.image_size
        # the phi of every side is the tokenizer's, also where the transformer leaves scales out
        self.schedule = tokenizer.schedule.derive(network.schedule.sizes)
        self.encoder = encoder_for(tokenizer, self.schedule)
        self.facts: dict[str, object] = {}
        guided = self.schedule.sizes if guided_sizes is None else tuple(guided_sizes)
        options = sampling_options(
            run.sampling,
            codebook_size=network.config["codebook_size"],
            num_classes=network.null_class_id,
            num_guided_steps=len(guided),
        )
        self.options = replace(options, guidance_scale=guidance_at(options.guidance_scale, guided, self.schedule.sizes))

    def place(self, device: torch.device) -> None:
        """Move the tokenizer to the device of the training."""
        self.tokenizer.to(device)

    def regularisation(self) -> AbstractContextManager[object]:
        """Nothing is attached to the network: stochastic depth goes in with the batch."""
        return nullcontext()

    def averaged(self, ema: ExponentialMovingAverage) -> NextScaleTransformer:
        """A copy that holds the averages; every process must call it where weights are sharded."""
        return averaged_model(self.network, ema)

    def token_ids(self, images: Tensor) -> Tensor:
        """All tokens (b, L) of images."""
        return torch.cat(self.tokenizer.requantize(self.tokenizer.latents(images), self.schedule), dim=1)

    @torch.no_grad()
    def held_out_bits(self, model: NextScaleTransformer, token_ids: Tensor, labels: Tensor) -> dict[str, float]:
        """Bits per token of held-out images, in all and per scale, from their token ids (n, L) and labels (n,)."""
        tokenizer, schedule = self.tokenizer, self.schedule
        lengths = list(schedule.lengths)
        uniform = scale_weights("token-uniform", schedule.sizes)
        sums = torch.zeros(schedule.num_scales, device=token_ids.device)
        for ids, label in zip(token_ids.split(32), labels.split(32), strict=True):
            logits = model(label, tokenizer.scale_inputs(list(ids.split(lengths, dim=1)), schedule)).logits
            loss = next_scale_loss(logits, ids, schedule, uniform, scales=range(schedule.num_scales))
            sums += loss.by_scale * len(ids)
        by_scale = [nats_to_bits(value) for value in (sums / len(token_ids)).tolist()]
        mean = sum(bits * length for bits, length in zip(by_scale, lengths, strict=True)) / schedule.num_tokens
        return {"val/bits_per_token": mean, **{f"val/bits_scale{k}": bits for k, bits in enumerate(by_scale)}}

    def save_samples(self, model: NextScaleTransformer, folder: Path, step: int) -> None:
        """A picture of samples at fixed seeds."""
        save_samples(self.tokenizer, model, self.train.class_names, self.options, folder, step)

    def export(self, accelerator: Accelerator, model: NextScaleTransformer) -> Path:
        """Write the pipeline."""
        return export_pipeline(accelerator, self.tokenizer, model, self.run, self.train, self.options)

"""The losses of the tokenizer: pixels, features, codebook, and the optional discriminator with its own optimizer."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn

from isthmus.functional.shapes import Images
from isthmus.models.multiscale_vqvae import MultiScaleVQVAE, MultiScaleVQVAEOutput
from isthmus.training.adversarial import (
    PatchDiscriminator,
    adaptive_weight,
    discriminator_hinge_loss,
    generator_hinge_loss,
    warm_up_factor,
)
from isthmus.training.config import OptimConfig, TokenizerLoss, TokenizerRun
from isthmus.training.optim import adamw, set_rates


def reconstruction_losses(
    output: MultiScaleVQVAEOutput,
    images: Images,
    distance: nn.Module | None,
    config: TokenizerLoss,
    *,
    commitment_weight: float,
) -> dict[str, Tensor]:
    """Losses of the autoencoder; those under `weighted/` add up to what is minimised."""
    pixels = output.images.float()
    l1, mse = F.l1_loss(pixels, images), F.mse_loss(pixels, images)
    losses = {
        "l1": l1,
        "mse": mse,
        "codebook": output.codebook_loss,
        "commitment": output.commitment_loss,
        "weighted/pixels": config.l1 * l1 + config.mse * mse,
    }
    if distance is not None:
        losses["perceptual"] = distance(pixels, images).mean()
        losses["weighted/pixels"] = losses["weighted/pixels"] + config.perceptual * losses["perceptual"]
    if output.token_ids:
        codebook = output.codebook_loss + commitment_weight * output.commitment_loss
        losses["weighted/codebook"] = config.codebook * codebook
    return losses


@dataclass
class Critic:
    """The patch discriminator with its optimizer."""

    discriminator: nn.Module
    optimizer: torch.optim.Optimizer
    optim: OptimConfig
    start: int
    warm_up_steps: int

    @classmethod
    def of(cls, run: TokenizerRun) -> "Critic":
        """A new discriminator, which starts late: a decoder that cannot draw yet learns nothing from it."""
        discriminator = PatchDiscriminator(base_channels=run.loss.discriminator_channels)
        start = round(run.loss.adversarial_start * run.num_steps)
        optim = OptimConfig(
            learning_rate=run.loss.discriminator_learning_rate, beta1=0.5, beta2=0.9, weight_decay=5e-4, warmup_steps=0
        )
        return cls(
            discriminator, adamw(discriminator, optim), optim, start, round(run.loss.adversarial_warmup * run.num_steps)
        )

    def prepare(self, accelerator: Accelerator) -> None:
        """Hand both to accelerate."""
        self.discriminator, self.optimizer = accelerator.prepare(self.discriminator, self.optimizer)

    def generator_losses(
        self,
        accelerator: Accelerator,
        model: MultiScaleVQVAE,
        losses: dict[str, Tensor],
        fake: Images,
        run: TokenizerRun,
        step: int,
    ) -> dict[str, Tensor]:
        """What the discriminator asks of the decoder, weighted against the pixel losses; nothing before `start`."""
        factor = warm_up_factor(step, start=self.start, warm_up_steps=self.warm_up_steps)
        if factor == 0:
            return {}
        judge = accelerator.unwrap_model(self.discriminator)
        judge.requires_grad_(False)
        loss = generator_hinge_loss(judge(fake.float()))
        judge.requires_grad_(True)
        weight = adaptive_weight(
            losses["weighted/pixels"],
            loss,
            model.decoder.conv_out.weight,
            average=lambda gradient: accelerator.reduce(gradient, "mean"),  # pyright: ignore[reportArgumentType]
        )
        return {
            "generator": loss,
            "adversarial_weight": weight,
            "weighted/generator": run.loss.adversarial * factor * weight * loss,
        }

    def step(
        self, accelerator: Accelerator, real: Images, fake: Images, run: TokenizerRun, step: int
    ) -> dict[str, Tensor]:
        """One step of the discriminator; nothing before `start`."""
        if step < self.start:
            return {}
        set_rates(self.optimizer, step - self.start, self.optim, max(run.num_steps - self.start, 1))
        with accelerator.accumulate(self.discriminator):
            logits = self.discriminator(torch.cat([real, fake.float()]))
            loss = discriminator_hinge_loss(*logits.chunk(2))
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(self.discriminator.parameters(), run.optim.max_grad_norm)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        return {"discriminator": loss.detach()}

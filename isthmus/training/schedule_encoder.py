"""A frozen tokenizer under other schedules than its own, as the token cache asks for one."""

from collections.abc import Sequence

from torch import nn

from isthmus.functional.pyramid import ScaleSchedule
from isthmus.functional.shapes import Images
from isthmus.models.multiscale_vqvae import EncoderOutput, MultiScaleVQVAE
from isthmus.models.saved_model import Config


class ScheduleEncoder(nn.Module):
    """Images to the tokens of one or several schedules, one behind the other.

    `config` names the schedules, so that a cache made under others is told apart by its fingerprint.

    Args:
        tokenizer: frozen.
        schedules: derived from the tokenizer's.
    """

    def __init__(self, tokenizer: MultiScaleVQVAE, schedules: Sequence[ScaleSchedule]):
        super().__init__()
        self.tokenizer, self.schedules = tokenizer, tuple(schedules)
        layout = [[list(schedule.sizes), list(schedule.phi_indices)] for schedule in schedules]
        self.config = Config({**tokenizer.config, "schedules": layout})

    def encode(self, images: Images) -> EncoderOutput:
        """`token_ids` holds the scales of the first schedule, then those of the next; the latents are searched once."""
        latents = self.tokenizer.latents(images)
        pyramids = [self.tokenizer.requantize(latents, schedule) for schedule in self.schedules]
        return EncoderOutput([ids for pyramid in pyramids for ids in pyramid], latents)


def encoder_for(tokenizer: MultiScaleVQVAE, *schedules: ScaleSchedule) -> MultiScaleVQVAE | ScheduleEncoder:
    """The tokenizer itself where its own schedule is all that is asked for, so that token caches stay what they are."""
    return tokenizer if schedules == (tokenizer.schedule,) else ScheduleEncoder(tokenizer, schedules)

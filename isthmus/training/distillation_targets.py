"""What a teacher says about scales that its student reaches in one step and it in several (spec of SRDD, 3.3)."""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from isthmus.functional.draws import ROLLOUT, stream
from isthmus.functional.pyramid import ScaleSchedule
from isthmus.functional.quantization import next_scale_input
from isthmus.functional.sampling import draw_tokens
from isthmus.functional.shapes import LatentMap, ScaleTokens, TokenPyramid
from isthmus.models.multiscale_vqvae import MultiScaleVQVAE
from isthmus.models.next_scale_transformer import NextScaleTransformer


def scale_divergence(
    teacher_logits: Float[Tensor, "b l v"], student_logits: Float[Tensor, "b l v"]
) -> Float[Tensor, ""]:
    """KL(teacher || student), mean over tokens, in nats.

    It is the mean over rollouts of their cross-entropy, less the teacher's own entropy: where the teacher can be asked
    about the student's input, no token has to be drawn.
    """
    theirs, ours = teacher_logits.float().log_softmax(dim=-1), student_logits.float().log_softmax(dim=-1)
    return F.kl_div(ours, theirs, reduction="none", log_target=True).sum(dim=-1).mean()


def rollout_uniforms(
    positions: Int[Tensor, " b"], schedule: ScaleSchedule, scale: int, *, seed: int
) -> Float[Tensor, "b l"]:
    """One number in [0, 1) per token of a scale that a teacher draws; decided per training position."""
    rows = [stream(seed, ROLLOUT, int(position), scale).random(schedule.lengths[scale]) for position in positions]
    return torch.from_numpy(np.stack(rows)).float().clamp_(max=1 - 2**-24)


class TeacherRollouts:
    """The teacher draws what lies between two scales of the student, from the image's own coarser scales.

    With a < b two sides that follow each other in the student's schedule: the teacher takes the image's tokens of its
    own schedule up to a and draws its scales in (a, b]. The step from the student's features after a to the teacher's
    after b is then quantised at b: a target for the student, whose input at b are its own features after a.

    Args:
        tokenizer: frozen.
        teacher: frozen; draws without guidance and filters.
        schedule: the student's.
        scales: the student's scales to make targets for, increasing, none of them the first.
    """

    def __init__(
        self,
        tokenizer: MultiScaleVQVAE,
        teacher: NextScaleTransformer,
        schedule: ScaleSchedule,
        scales: Sequence[int],
    ):
        self.tokenizer, self.teacher, self.schedule, self.scales = tokenizer, teacher, schedule, tuple(scales)
        self.teacher_schedule = tokenizer.schedule.derive(teacher.schedule.sizes)

    @torch.no_grad()
    def targets(
        self,
        labels: Int[Tensor, " b"],
        token_ids: TokenPyramid,
        teacher_ids: TokenPyramid,
        positions: Int[Tensor, " b"],
        *,
        seed: int,
    ) -> list[ScaleTokens]:
        """Token ids for each of `scales`.

        Args:
            labels: class ids; the teacher gets the label that the student gets.
            token_ids: the images under the student's schedule.
            teacher_ids: the images under the teacher's.
            positions: training positions, which the draws depend on.
            seed: of the run.
        """
        tokenizer, theirs = self.tokenizer, self.teacher_schedule
        ours = [scale.features for scale in tokenizer.token_scales(token_ids, self.schedule)]
        known = [scale.features for scale in tokenizer.token_scales(teacher_ids, theirs)]
        context = _TeacherContext(self.teacher, theirs, labels, known)
        found = []
        for scale in self.scales:
            a, b = (theirs.sizes.index(self.schedule.sizes[k]) for k in (scale - 1, scale))
            context.rewind(a + 1)
            features = known[a]
            for k in range(a + 1, b + 1):
                uniforms = rollout_uniforms(positions, theirs, k, seed=seed)
                drawn = draw_tokens(context.predict(k, features).float(), uniforms)
                features = tokenizer.add_codes(features, tokenizer.lookup(drawn), k, theirs)
            found.append(tokenizer.nearest_tokens(features - ours[scale - 1], self.schedule.sizes[scale]))
        return found


class _TeacherContext:
    """The teacher behind the image's own tokens of its first scales, to be asked for the next one.

    `known` holds the features after each of the image's own scales.
    """

    def __init__(
        self,
        teacher: NextScaleTransformer,
        schedule: ScaleSchedule,
        labels: Int[Tensor, " b"],
        known: Sequence[LatentMap],
    ):
        self.teacher, self.schedule, self.known = teacher, schedule, known
        self.conditioning = teacher.condition(labels)
        self.cache = teacher.new_cache(len(labels))
        self.read = 0  # of the image's own scales, how many the cache holds

    def rewind(self, scales: int) -> None:
        """Behind the image's own first `scales` scales, no fewer than before; draws are forgotten."""
        if self.cache is None:
            return
        self.cache.truncate(self.schedule.offsets[self.read])
        for k in range(self.read, scales):
            self.predict(k, self.known[max(k - 1, 0)])
        self.read = scales

    def predict(self, scale: int, features: LatentMap) -> Float[Tensor, "b l v"]:
        """Logits of `scale`, from the features of the scales before it; scale 0 reads none, whatever is passed."""
        inputs = next_scale_input(features, self.schedule, scale)[:, : None if scale else 0]
        return self.teacher.forward_scale(scale, inputs, self.conditioning, self.cache)

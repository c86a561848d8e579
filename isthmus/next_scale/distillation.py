"""What is particular about training a student on fewer scales, or under another mask, from a teacher.

Source: Kumar et al., "Scale-Wise VAR is Secretly Discrete Diffusion", scale distillation; spec of SRDD, 3.3.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from isthmus.data.source import ImageSource
from isthmus.data.streaming import ImageStream
from isthmus.data.views import Batch
from isthmus.errors import UserError
from isthmus.functional.scale_distillation import check_student_sizes, removal_stages, shared_steps
from isthmus.functional.shapes import ScaleTokens, TokenPyramid
from isthmus.models.fingerprint import fingerprint
from isthmus.models.multiscale_vqvae import MultiScaleVQVAE
from isthmus.models.next_scale_transformer import NextScaleTransformer
from isthmus.training.distill_config import DistillRun
from isthmus.training.distillation_targets import TeacherRollouts, scale_divergence
from isthmus.training.distilled_weights import student_of
from isthmus.training.export import load_teacher
from isthmus.training.images import open_splits
from isthmus.training.next_scale_family import NextScaleFamily
from isthmus.training.next_scale_prior import step_values
from isthmus.training.objectives import PriorLosses, dropped_labels, next_scale_loss, path_factors, scale_weights
from isthmus.training.run import STAGES
from isthmus.training.schedule_encoder import encoder_for


@dataclass(kw_only=True)
class DistillationLosses(PriorLosses):
    """What one batch gave; `by_scale` is the cross-entropy on data tokens.

    Attributes:
        teacher_by_scale: nats per token beside it: the divergence from the teacher where it can be asked about the
            student's input, the cross-entropy on its rollouts elsewhere; zeros without a teacher.
    """

    teacher_by_scale: Float[Tensor, " scales"]


class ScaleDistillation(NextScaleFamily):
    """Scale distillation, as the training loop asks for it.

    Attributes:
        teacher: frozen.
        asked: scales of the student at which the teacher is asked about the student's own input.
        rolled: the others, whose targets are drawn by the teacher on its own scales.
    """

    def __init__(self, run: DistillRun):
        tokenizer, train, held_out, self.teacher, student, named_sizes = prepare(run)
        super().__init__(run, tokenizer, train, held_out, student, guided_sizes=named_sizes)
        self.run: DistillRun = run
        self.facts = {"teacher_fingerprint": fingerprint(self.teacher)}
        self._weights = scale_weights(run.scale_loss, self.schedule.sizes)
        sizes, markov = self.teacher.schedule.sizes, self.teacher.is_markov
        self.asked = shared_steps(sizes, self.schedule.sizes, markov=markov) if run.distillation_weight else ()
        self.rolled = tuple(k for k in range(self.schedule.num_scales) if k not in self.asked)
        self.rolled = self.rolled if run.distillation_weight else ()
        self._rollouts = TeacherRollouts(tokenizer, self.teacher, self.schedule, self.rolled)
        if self.rolled:
            self.encoder = encoder_for(tokenizer, self.schedule, self._rollouts.teacher_schedule)

    @staticmethod
    def has_unused_parameters(run: DistillRun) -> bool:
        """Every step reaches every weight."""
        return False

    @staticmethod
    def is_compiled(run: DistillRun) -> bool:
        """The student is not compiled."""
        return False

    def losses(self, model: nn.Module, batch: Batch, step: int) -> DistillationLosses:
        """Losses of one part of a batch, on the device of the model."""
        run, schedule, device, positions = self.run, self.schedule, self.tokenizer.device, batch["position"]
        token_ids, teacher_ids = self._pyramids(batch["token_ids"].to(device))
        null, seed = self.network.null_class_id, run.seed
        labels = batch["class_label"].to(device)
        labels = dropped_labels(labels, positions, rate=run.label_dropout, null_class_id=null, seed=seed)
        keep = path_factors(positions, self.network.drop_path_rates, seed=seed)
        with torch.no_grad():
            inputs = self.tokenizer.scale_inputs(token_ids, schedule)
        logits = model(labels, inputs, keep=None if keep is None else keep.to(device)).logits

        scales = range(schedule.num_scales)
        data = next_scale_loss(logits, torch.cat(token_ids, dim=1), schedule, self._weights, scales=scales)
        said = [logits.new_zeros(()).float()] * schedule.num_scales
        if run.distillation_weight:
            self.teacher.to(device)
            parts = logits.split(list(schedule.lengths), dim=1)
            for k, theirs in zip(self.asked, self._teacher_logits(labels, inputs), strict=True):
                said[k] = scale_divergence(theirs, parts[k])
            rollouts = (
                self._rollouts.targets(labels, token_ids, teacher_ids, positions, seed=seed) if self.rolled else []
            )
            for k, targets in zip(self.rolled, rollouts, strict=True):
                said[k] = F.cross_entropy(parts[k].float().transpose(1, 2), targets)
        by_scale = torch.stack(said)
        total = data.total + run.distillation_weight * (by_scale.new_tensor(self._weights) * by_scale).sum()
        return DistillationLosses(total, data.by_scale, data.scales, data.logits, teacher_by_scale=by_scale.detach())

    def part_values(self, losses: DistillationLosses, batch: Batch) -> dict[str, Tensor]:
        """What is logged of one part: loss, token accuracy, and nats per token of every scale, data and teacher."""
        targets = batch["token_ids"][:, : self.schedule.num_tokens].to(losses.logits.device)
        hits = losses.logits.argmax(dim=-1) == targets
        return {
            "loss": losses.total,
            "token_accuracy": hits.float().mean(),
            "nats": losses.by_scale,
            "teacher": losses.teacher_by_scale,
        }

    def step_values(self, means: dict[str, Tensor], step: int) -> dict[str, float]:
        """One log line of training; where the teacher is asked its part is a divergence, elsewhere a cross-entropy."""
        values = step_values(means, self.schedule, range(self.schedule.num_scales))
        nats = means["teacher"].tolist()
        asked = {f"train/teacher_divergence_scale{k}": nats[k] for k in self.asked}
        return values | asked | {f"train/teacher_rollout_scale{k}": nats[k] for k in self.rolled}

    def _pyramids(self, token_ids: Tensor) -> tuple[list[ScaleTokens], TokenPyramid]:
        """Tokens of the student's scales, and (where there are rollouts) of the teacher's, out of rows of the cache."""
        lengths, theirs = self.schedule.lengths, self._rollouts.teacher_schedule.lengths if self.rolled else ()
        parts = list(token_ids.split([*lengths, *theirs], dim=1))
        return parts[: len(lengths)], parts[len(lengths) :]

    @torch.no_grad()
    def _teacher_logits(self, labels: Tensor, inputs: Float[Tensor, "b l d"]) -> list[Float[Tensor, "b _ v"]]:
        """Logits of the teacher at the scales in `asked`, from the student's inputs."""
        if not self.asked:
            return []
        lengths = self.schedule.lengths
        parts = inputs.split(list(lengths[1:]), dim=1)
        chosen = torch.cat([parts[k - 1] for k in self.asked if k] or [inputs[:, :0]], dim=1)
        known = [self.teacher.schedule.sizes.index(self.schedule.sizes[k]) for k in self.asked]
        logits = self.teacher(labels, chosen, scales=known).logits
        return list(logits.split([lengths[k] for k in self.asked], dim=1))


def prepare(
    run: DistillRun,
) -> tuple[
    MultiScaleVQVAE, ImageSource | ImageStream, ImageSource, NextScaleTransformer, NextScaleTransformer, tuple[int, ...]
]:
    """Tokenizer, training images, held-out images, teacher, student (which starts as the teacher), and some sides.

    The sides are those of the model that the run names: at the end of a progressive distillation the teacher has fewer.

    Raises:
        UserError: there is no teacher, it cannot teach this student, or it was trained on other classes.
    """
    if not run.from_model:
        raise UserError("a distillation needs a teacher, got none. Name it: isthmus distill MODEL --scale-sizes ...")
    source = load_teacher(run.from_model)
    sizes, mask = student_shape(run, source.transformer.schedule.sizes, source.transformer.config["scale_attention"])
    teacher = source
    stages = removal_stages(source.transformer.schedule.sizes, sizes)
    if run.progressive and len(stages) > 1:
        teacher = load_teacher(str(stage_folder(run, stages[-2])))
    train, held_out = open_splits(run, source.tokenizer.image_size)
    check_classes(train.class_names, source.class_names, source.transformer.null_class_id)
    student = student_of(teacher.transformer, sizes, mask)
    for name, parameter in student.named_parameters():
        # the mark of hidden tokens stays the teacher's: nothing here is trained on partly hidden scales
        parameter.requires_grad_(name != "mask_embedding")
    frozen = teacher.transformer.eval().requires_grad_(False)
    return source.tokenizer, train, held_out, frozen, student, source.transformer.schedule.sizes


def student_shape(
    run: DistillRun, teacher_sizes: tuple[int, ...], teacher_attention: str
) -> tuple[tuple[int, ...], str]:
    """Sides of the student's scales and its mask.

    Raises:
        UserError: the sides are not some of the teacher's, or nothing would change.
    """
    sizes = check_student_sizes(teacher_sizes, run.scale_sizes or teacher_sizes)
    mask = run.scale_attention or teacher_attention
    if (sizes, mask) == (tuple(teacher_sizes), teacher_attention):
        raise UserError(
            f"a student needs fewer scales or another mask than its teacher ({','.join(map(str, sizes))}, {mask}), got "
            "the same. Pass --scale-sizes with some of them, or --scale-attention."
        )
    return sizes, mask


def check_classes(found: Sequence[str], teacher_names: Sequence[str], num_classes: int) -> None:
    """Refuse images of other classes than the teacher's; a teacher may have `num_classes` without names.

    Raises:
        UserError: names, order or number differ.
    """
    if len(found) != num_classes or (teacher_names and tuple(found) != tuple(teacher_names)):
        known = ", ".join(teacher_names) or f"{num_classes} without names"
        raise UserError(
            f"a student is trained on the classes of its teacher ({known}), got {', '.join(found) or 'none'}. Pass the "
            "teacher's --data and --classes, or fine-tune the teacher first: isthmus train prior --from MODEL."
        )


def stage_folder(run: DistillRun, sizes: tuple[int, ...]) -> Path:
    """Where a progressive distillation keeps the student of a schedule on its way."""
    return run.out / STAGES / "-".join(map(str, sizes))

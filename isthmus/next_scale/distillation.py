"""Scale distillation: a student on fewer scales, or under another mask, that starts as its teacher.

Source: Kumar et al., "Scale-Wise VAR is Secretly Discrete Diffusion", scale distillation (no details are published);
spec of SRDD, 3.3.
"""

import logging
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import PartialState
from jaxtyping import Float, Int
from torch import Tensor, nn

from isthmus.data.source import ImageSource, ImageStream
from isthmus.data.views import Batch
from isthmus.errors import UserError
from isthmus.files import alone_in
from isthmus.next_scale.pipeline import NextScalePipeline
from isthmus.next_scale.pyramid import ScaleSchedule, next_scale_input
from isthmus.next_scale.runs import DistillRun
from isthmus.next_scale.tokenizer import MultiScaleVQVAE
from isthmus.next_scale.train_prior import (
    NextScaleLosses,
    NextScaleTask,
    captions_read,
    encoder_for,
    next_scale_loss,
    prior_cost,
    scale_weights,
)
from isthmus.next_scale.transformer import NextScaleTransformer, sampling_flops
from isthmus.nn.component_files import read_config
from isthmus.nn.draws import ROLLOUT, stream
from isthmus.nn.guidance import at_sides, guidance_at, listed
from isthmus.nn.sampling import draw_tokens
from isthmus.nn.saved_model import without_values
from isthmus.nn.shapes import LatentMap, ScaleTokens, TokenPyramid
from isthmus.nn.stored_llama import fingerprint
from isthmus.pipelines.folder import model_folder
from isthmus.pipelines.labels import names_in_order
from isthmus.pipelines.options import guidance_text, parse_guidance
from isthmus.text.encoders import TextFeatures
from isthmus.training.captions import check_captions
from isthmus.training.cost import Cost, report, work
from isthmus.training.images import open_split, open_splits
from isthmus.training.run import STAGES, check_folder
from isthmus.training.saved_networks import load_model
from isthmus.training.train_prior import train_prior

logger = logging.getLogger("isthmus")

BASELINE, SCORES = "without_teacher", "scores"


def check_student_sizes(teacher_sizes: Sequence[int], sizes: Sequence[int]) -> tuple[int, ...]:
    """The sides of a student's scales; UserError unless they are some of the teacher's, its first and last among them.

    The first scale is drawn from the class alone, from a table that belongs to that side; the last is the latent grid;
    and the tokenizer quantises a side with the phi that the parent schedule gives it.

    >>> check_student_sizes((1, 2, 3, 4, 6, 8), [1, 3, 8])
    (1, 3, 8)
    """
    sizes, teacher_sizes = tuple(sizes), tuple(teacher_sizes)
    allowed = set(sizes) <= set(teacher_sizes) and sizes == tuple(sorted(set(sizes)))
    if not allowed or not sizes or (sizes[0], sizes[-1]) != (teacher_sizes[0], teacher_sizes[-1]):
        raise UserError(
            f"a student's scale_sizes must be some of the teacher's, {listed(teacher_sizes)}, increasing, with the "
            f"first and the last: the tokenizer has no phi for other sides and the teacher no rows. Got "
            f"{listed(sizes) or 'none'}. Nearest: {listed(nearest_sizes(teacher_sizes, sizes))}."
        )
    return sizes


def nearest_sizes(teacher_sizes: Sequence[int], sizes: Sequence[int]) -> tuple[int, ...]:
    """The student schedule nearest to what was asked for: every side replaced by the teacher's nearest.

    >>> nearest_sizes((1, 2, 3, 4, 6, 8), (2, 3, 7, 16))
    (1, 2, 3, 6, 8)
    """
    found = {min(teacher_sizes, key=lambda side, asked=asked: abs(side - asked)) for asked in sizes}
    return tuple(sorted(found | {teacher_sizes[0], teacher_sizes[-1]}))


def removal_stages(teacher_sizes: Sequence[int], sizes: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    """Schedules on the way from the teacher's to `sizes`, one scale removed at a time, the finest first.

    The last is `sizes`, which is also the only one where nothing is removed.

    >>> removal_stages((1, 2, 3, 4), (1, 4))
    ((1, 2, 4), (1, 4))
    """
    stages, current = [], tuple(teacher_sizes)
    for side in sorted(set(teacher_sizes) - set(sizes), reverse=True):
        current = tuple(s for s in current if s != side)
        stages.append(current)
    return tuple(stages) or (tuple(sizes),)


def shared_steps(teacher_sizes: Sequence[int], sizes: Sequence[int], *, markov: bool) -> tuple[int, ...]:
    """The student's scales at which its own input is one that the teacher knows.

    markov (the teacher): those whose predecessor is the same in both schedules; the input is all that it reads.
    Causal: the leading scales that both have, since it also reads the keys of every earlier scale.

    >>> shared_steps((1, 2, 3, 4, 6), (1, 3, 4, 6), markov=True), shared_steps((1, 2, 3, 4), (1, 2, 4), markov=False)
    ((0, 2, 3), (0, 1))
    """
    before = {side: previous for previous, side in pairwise((None, *teacher_sizes))}
    same = [before[side] == previous for previous, side in pairwise((None, *sizes))]
    if markov:
        return tuple(k for k, shared in enumerate(same) if shared)
    return tuple(k for k in range(len(same)) if all(same[: k + 1]))


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
    own schedule up to a and draws its scales in (a, b], without guidance and filters. The step from the student's
    features after a to the teacher's after b is then quantised at b: a target for the student, whose input at b are its
    own features after a.

    `schedule` is the student's, `scales` those of its scales to make targets for, increasing, none of them the first.
    """

    def __init__(
        self, tokenizer: MultiScaleVQVAE, teacher: NextScaleTransformer, schedule: ScaleSchedule, scales: Sequence[int]
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
        text: TextFeatures | None = None,
    ) -> list[ScaleTokens]:
        """Token ids for each of `scales`, from the images under the student's schedule and under the teacher's.

        The teacher gets the label and the text that the student gets. Draws follow from the run's seed and the training
        positions.
        """
        tokenizer, theirs = self.tokenizer, self.teacher_schedule
        ours = [scale.features for scale in tokenizer.token_scales(token_ids, self.schedule)]
        known = [scale.features for scale in tokenizer.token_scales(teacher_ids, theirs)]
        conditioning, cache = self.teacher.condition(labels, text), self.teacher.new_cache(len(labels))
        read, found = 0, []  # of the image's own scales, how many the cache holds

        def predict(k: int, features: LatentMap) -> Float[Tensor, "b l v"]:
            # scale 0 reads no features, whatever is passed
            inputs = next_scale_input(features, theirs, k)[:, : None if k else 0]
            return self.teacher.forward_scale(k, inputs, conditioning, cache)

        for scale in self.scales:
            a, b = (theirs.sizes.index(self.schedule.sizes[k]) for k in (scale - 1, scale))
            if cache is not None:
                cache.truncate(theirs.offsets[read])  # what was drawn is forgotten
                for k in range(read, a + 1):
                    predict(k, known[max(k - 1, 0)])
                read = a + 1
            features = known[a]
            for k in range(a + 1, b + 1):
                uniforms = rollout_uniforms(positions, theirs, k, seed=seed)
                drawn = draw_tokens(predict(k, features).float(), uniforms)
                features = tokenizer.add_codes(features, tokenizer.lookup(drawn), k, theirs)
            found.append(tokenizer.nearest_tokens(features - ours[scale - 1], self.schedule.sizes[scale]))
        return found


def student_of(teacher: NextScaleTransformer, scale_sizes: Sequence[int], scale_attention: str) -> NextScaleTransformer:
    """A transformer on `scale_sizes` with the teacher's weights; UserError as `check_student_sizes`."""
    sizes = check_student_sizes(teacher.schedule.sizes, scale_sizes)
    student = NextScaleTransformer(**(teacher.config | {"scale_sizes": sizes, "scale_attention": scale_attention}))
    # of the tables of scales and positions the rows of these sides, all else as it is
    weights, kept = teacher.state_dict(), [teacher.schedule.sizes.index(side) for side in sizes]
    if teacher.position is not None:  # rotary ones have no table
        positions = weights["position"].split(list(teacher.schedule.lengths), dim=1)
        weights["position"] = torch.cat([positions[k] for k in kept], dim=1)
    weights["scale_embedding.weight"] = weights["scale_embedding.weight"][kept]
    student.load_state_dict(weights)
    return student


@dataclass(kw_only=True)
class DistillationLosses(NextScaleLosses):
    """What one batch gave; `by_scale` is the cross-entropy on data tokens."""

    teacher_by_scale: Float[Tensor, " scales"]
    """Nats per token: the divergence from the teacher where it can be asked about the student's input, the
    cross-entropy on its rollouts elsewhere; zeros without a teacher."""

    def logged(self) -> dict[str, Tensor]:
        """Also what the teacher says."""
        return super().logged() | {"teacher": self.teacher_by_scale}


class ScaleDistillationTask(NextScaleTask):
    """Scale distillation, as the training loop asks for it.

    The frozen teacher is asked about the student's own input at the scales in `asked`; at the others, `rolled`, it
    draws targets on its own scales.

    Of a teacher that reads texts the student keeps the encoder as it is, whichever kind that is. Both are told what it
    makes of the same captions, some of them dropped: an encoder that moved with the student would tell the teacher, in
    whose targets the words have their meaning, what it never learned, or each would need one of its own. So captions
    are read once for the two, and the student without a teacher, which has the same encoder, differs by the teacher
    alone.
    """

    def __init__(self, run: DistillRun):
        # a progressive distillation ends with a teacher that has fewer scales than the model that the run names
        named = teacher = load_model(teacher_named_in(run), NextScalePipeline)
        tokenizer, named_sizes = named.image_tokenizer, named.transformer.schedule.sizes
        sizes, mask = student_shape(run, named_sizes, named.transformer.config["scale_attention"])
        stages = removal_stages(named_sizes, sizes)
        if run.progressive and len(stages) > 1:
            teacher = load_model(str(stage_folder(run, stages[-2])), NextScalePipeline)
        splits = open_splits(run, tokenizer.image_size)
        check_images(run.from_model, named, *splits)
        student = student_of(teacher.transformer, sizes, mask)
        for name, parameter in student.named_parameters():
            # the mark of hidden tokens stays the teacher's: nothing here is trained on partly hidden scales
            parameter.requires_grad_(name != "mask_embedding")
        super().__init__(
            run,
            tokenizer,
            splits,
            student,
            guided_sizes=named_sizes,
            text_encoder=named.text_encoder,
            caption_dropout=run.label_dropout,
        )
        self.teacher = teacher.transformer.eval().requires_grad_(False)
        self.run: DistillRun = run
        self.facts = {"teacher_fingerprint": fingerprint(self.teacher)}
        if self.text_encoder is not None:
            self.text_encoder.eval().requires_grad_(False)
            self.facts["text_encoder_fingerprint"] = fingerprint(self.text_encoder)
            self.note = "the text encoder is the teacher's, frozen"
        self._weights = scale_weights(run.scale_loss, self.schedule.sizes)
        sizes, markov = self.teacher.schedule.sizes, self.teacher.is_markov
        self.asked = shared_steps(sizes, self.schedule.sizes, markov=markov) if run.distillation_weight else ()
        taught = range(self.schedule.num_scales if run.distillation_weight else 0)
        self.rolled = tuple(k for k in taught if k not in self.asked)
        self._rollouts = TeacherRollouts(tokenizer, self.teacher, self.schedule, self.rolled)
        if self.rolled:
            self.encoder = encoder_for(tokenizer, self.schedule, self._rollouts.teacher_schedule)

    @staticmethod
    def describe(run: DistillRun) -> str:
        """Settings, models, who is asked what in every training, cost and memory. No weight is allocated."""
        stages = stage_runs(run)
        with without_values():
            saved = load_model(run.from_model, NextScalePipeline)
        source = open_split(run, saved.image_size, "train")
        check_images(run.from_model, saved, source)

        sizes, mask = student_shape(run, saved.transformer.schedule.sizes, saved.transformer.config["scale_attention"])
        models = [saved.transformer]
        with without_values():
            for stage in stages:
                models.append(student_of(models[-1], stage.scale_sizes or sizes, mask))
        costs = [prior_cost(student) for student in models[1:]]
        configs = [model.config for model in models]
        network = (
            f"{_described(configs[-1])} per image; teacher {_described(configs[0])}; {len(source)} images, "
            f"{len(source.class_names) or 'no'} classes"
        )
        if saved.text_encoder is not None:
            network += f"; {captions_read(models[-1], source, frozen=saved.text_encoder)}"
        # the memory is that of the first stage, which has the most scales
        largest = replace(costs[-1], activation_bytes=max(cost.activation_bytes for cost in costs))
        return report(run, network, largest, trainings=_trainings(run, configs, costs))

    def place(self, device: torch.device) -> None:
        """Also the text encoder, which is no part of the network in training."""
        super().place(device)
        if self.text_encoder is not None:
            self.text_encoder.to(device)

    def losses(self, model: nn.Module, batch: Batch, step: int) -> DistillationLosses:
        """Losses of one part of a batch, on the device of the model."""
        run, schedule, device = self.run, self.schedule, self.tokenizer.device
        token_ids, teacher_ids = self._pyramids(batch["token_ids"].to(device))
        labels, keep = self._dropouts(batch)
        told = self._told(batch)
        with torch.no_grad():
            inputs = self.tokenizer.scale_inputs(token_ids, schedule)
        logits = model(labels, inputs, **told, keep=keep).logits

        scales = range(schedule.num_scales)
        data = next_scale_loss(logits, torch.cat(token_ids, dim=1), schedule, self._weights, scales=scales)
        said = [logits.new_zeros(()).float()] * schedule.num_scales
        if run.distillation_weight:
            self.teacher.to(device)
            parts = logits.split(list(schedule.lengths), dim=1)
            for k, theirs in zip(self.asked, self._teacher_logits(labels, inputs, told), strict=True):
                said[k] = scale_divergence(theirs, parts[k])
            drawn = []
            if self.rolled:
                positions = batch["position"]
                drawn = self._rollouts.targets(labels, token_ids, teacher_ids, positions, seed=run.seed, **told)
            for k, targets in zip(self.rolled, drawn, strict=True):
                said[k] = F.cross_entropy(parts[k].float().transpose(1, 2), targets)
        by_scale = torch.stack(said)
        total = data.total + run.distillation_weight * (by_scale.new_tensor(self._weights) * by_scale).sum()
        return DistillationLosses(**(vars(data) | {"total": total}), teacher_by_scale=by_scale.detach())

    def step_values(self, means: dict[str, Tensor], step: int) -> dict[str, float]:
        """One log line of training; where the teacher is asked its part is a divergence, elsewhere a cross-entropy."""
        values, nats = super().step_values(means, step), means["teacher"].tolist()
        asked = {f"train/teacher_divergence_scale{k}": nats[k] for k in self.asked}
        return values | asked | {f"train/teacher_rollout_scale{k}": nats[k] for k in self.rolled}

    def _pyramids(self, token_ids: Tensor) -> tuple[list[ScaleTokens], TokenPyramid]:
        """Tokens of the student's scales, and (where there are rollouts) of the teacher's, out of rows of the cache."""
        lengths, theirs = self.schedule.lengths, self._rollouts.teacher_schedule.lengths if self.rolled else ()
        parts = list(token_ids.split([*lengths, *theirs], dim=1))
        return parts[: len(lengths)], parts[len(lengths) :]

    @torch.no_grad()
    def _teacher_logits(
        self, labels: Tensor, inputs: Float[Tensor, "b l d"], told: Mapping[str, TextFeatures]
    ) -> list[Float[Tensor, "b _ v"]]:
        """Logits of the teacher at the scales in `asked`, from the student's inputs and what it is told."""
        if not self.asked:
            return []
        lengths = self.schedule.lengths
        parts = inputs.split(list(lengths[1:]), dim=1)
        chosen = torch.cat([parts[k - 1] for k in self.asked if k] or [inputs[:, :0]], dim=1)
        known = [self.teacher.schedule.sizes.index(self.schedule.sizes[k]) for k in self.asked]
        logits = self.teacher(labels, chosen, **told, scales=known).logits
        return list(logits.split([lengths[k] for k in self.asked], dim=1))


def teacher_named_in(run: DistillRun) -> str:
    """The model that a run distils; UserError where it names none."""
    if not run.from_model:
        raise UserError("a distillation needs a teacher, got none. Name it: isthmus distill MODEL --scale-sizes ...")
    return run.from_model


def student_shape(
    run: DistillRun, teacher_sizes: tuple[int, ...], teacher_attention: str
) -> tuple[tuple[int, ...], str]:
    """Sides of the student's scales and its mask; UserError where they are no student's, or the teacher's own."""
    sizes = check_student_sizes(teacher_sizes, run.scale_sizes or teacher_sizes)
    mask = run.scale_attention or teacher_attention
    if (sizes, mask) == (tuple(teacher_sizes), teacher_attention):
        raise UserError(
            f"a student needs fewer scales or another mask than its teacher ({listed(sizes)}, {mask}), got "
            "the same. Pass --scale-sizes with some of them, or --scale-attention."
        )
    return sizes, mask


def check_images(name: str, teacher: NextScalePipeline, *splits: ImageSource | ImageStream) -> None:
    """Raise UserError unless these are images for a student of the teacher in `name`.

    They have its classes, which may have no names, and captions where it reads texts; a teacher of texts alone is told
    of no class.
    """
    if teacher.reads_text:
        if teacher.text_encoder is None:
            raise UserError(
                f"{name} reads texts and was saved without its encoder, so there is nothing to read captions with. "
                "Distil the folder that has the encoder."
            )
        check_captions(*splits)
        if not teacher.num_classes:
            return
    found = splits[0].class_names
    names = names_in_order(teacher.class_names)
    if len(found) != teacher.num_classes or (names and tuple(found) != names):
        known = ", ".join(names) or f"{teacher.num_classes} without names"
        raise UserError(
            f"a student is trained on the classes of its teacher ({known}), got {', '.join(found) or 'none'}. Pass the "
            "teacher's --data and --classes, or fine-tune the teacher first: isthmus train prior --from MODEL."
        )


def stage_folder(run: DistillRun, sizes: tuple[int, ...]) -> Path:
    """Where a progressive distillation keeps the student of a schedule on its way."""
    return run.out / STAGES / "-".join(map(str, sizes))


@alone_in("run.out")
def distill(run: DistillRun) -> Path:
    """Train the student, continuing where an earlier call stopped; returns its pipeline folder.

    With `progressive` the students on the way lie in `out`/stages, with `baseline` the one without a teacher in
    `out`/without_teacher. At the end the log has the commands that measure them beside each other.

    Raises:
        UserError: teacher, schedule, images and folder do not fit each other (before anything is trained).
        KeyboardInterrupt: Ctrl-C, after a last checkpoint.
    """
    stages = stage_runs(run)
    check_folder(run)
    for number, stage in enumerate(stages, 1):
        if len(stages) > 1:
            logger.info("stage %d/%d: scales %s", number, len(stages), _listed(stage.scale_sizes or ()))
        train_prior(stage)
    without_teacher = baseline_run(run, len(stages))
    if without_teacher is not None:
        logger.info("the same student without the teacher")
        train_prior(without_teacher)
    if PartialState().is_main_process:
        commands = measuring_commands(run, with_baseline=without_teacher is not None)
        logger.info("to measure teacher and student:\n%s", "\n".join(f"  {command}" for command in commands))
    return run.out


def measuring_commands(run: DistillRun, *, with_baseline: bool) -> list[str]:
    """The commands that evaluate the models of a finished distillation, and then the one that compares them."""
    models = {"teacher": run.from_model, "student": str(run.out)}
    if with_baseline:
        models[BASELINE] = str(run.out / BASELINE)
    data = ["--data", run.data]
    if run.classes:
        # on the command line a comma would part a name in two
        data += ["--classes", *(name.replace(",", "\\,") for name in run.classes)]
    for option, column in (
        ("--image-column", run.image_column),
        ("--label-column", run.label_column),
        ("--caption-column", run.caption_column),
    ):
        data += [] if column is None else [option, column]
    if run.max_images is not None and run.data.partition(":")[0] == "avatars":
        data += ["--max-images", str(run.max_images)]
    scores = {name: str(run.out / SCORES / name) for name in models}
    commands = [["evaluate", model, *data, "--out", scores[name]] for name, model in models.items()]
    return [shlex.join(["isthmus", *command]) for command in (*commands, ["compare", *scores.values()])]


def stage_runs(run: DistillRun) -> list[DistillRun]:
    """The runs of a distillation in order; the last is `run` itself.

    Raises UserError where there is no teacher, or its scales do not allow this student, guidance or temperature.
    """
    saved = read_config(model_folder(teacher_named_in(run)) / "transformer")
    if "scale_sizes" not in saved:
        raise UserError(
            f"only next-scale models (VAR, SRDD) have scales to leave out, {run.from_model} is of another family."
        )
    teacher_sizes = tuple(saved["scale_sizes"])
    sizes, _ = student_shape(run, teacher_sizes, saved["scale_attention"])
    stages = removal_stages(teacher_sizes, sizes)
    guidance = parse_guidance(run.sampling.guidance)
    # for what they refuse: this costs nothing yet
    guidance_at(guidance, teacher_sizes, sizes)
    at_sides("temperature", run.sampling.temperature, teacher_sizes, sizes)
    if not run.progressive:
        return [run]
    runs, teacher, taught = [], run.from_model, teacher_sizes
    for stage in stages[:-1]:
        folder = stage_folder(run, stage)
        # a list of guidance values counts on the scales of the teacher that a run names
        text = guidance_text(guidance_at(guidance, teacher_sizes, taught))
        temperature = at_sides("temperature", run.sampling.temperature, teacher_sizes, taught)
        sampling = replace(run.sampling, guidance=text, temperature=temperature)
        alone = replace(run, out=folder, progressive=False, baseline=False, sampling=sampling)
        runs.append(replace(alone, scale_sizes=stage, from_model=teacher))
        teacher, taught = str(folder), stage
    return [*runs, run]


def baseline_run(run: DistillRun, num_stages: int) -> DistillRun | None:
    """The same student from the same weights, as many steps, on data tokens alone; None where it is left out.

    Without a teacher, and with all scales removed at once, it would be the student itself.
    """
    if not run.baseline or (run.distillation_weight == 0 and num_stages == 1):
        return None
    alone = replace(run, out=run.out / BASELINE, progressive=False, baseline=False)
    return replace(alone, num_steps=run.num_steps * num_stages, distillation_weight=0.0)


def _trainings(run: DistillRun, models: Sequence[Mapping[str, Any]], costs: Sequence[Cost]) -> dict[str, str]:
    """One row for every training in order; each of `models` teaches the next one."""
    rows = {}
    for number, ((teacher, student), cost) in enumerate(zip(pairwise(models), costs, strict=True), 1):
        name = "run" if len(costs) == 1 else f"stage {number}/{len(costs)}"
        scales = "" if len(costs) == 1 else f"scales {_listed(student['scale_sizes'])}; "
        asked = teaching(teacher, student, weight=run.distillation_weight)
        rows[name] = f"{work(cost, run.num_steps, run.batch_size)}; {scales}{asked}"
    without_teacher = baseline_run(run, len(costs))
    if without_teacher is not None:
        own = work(costs[-1], without_teacher.num_steps, run.batch_size)
        rows["baseline"] = f"{own}; the same student without the teacher (--no-baseline leaves it out)"
    return rows


def teaching(teacher: Mapping[str, Any], student: Mapping[str, Any], *, weight: float) -> str:
    """What a student learns from its teacher, in words, from the settings of both transformers."""
    if weight == 0:
        return "no teacher is asked (distillation weight 0)"
    sizes = student["scale_sizes"]
    asked = len(shared_steps(teacher["scale_sizes"], sizes, markov=teacher["scale_attention"] == "markov"))
    where = f"at {asked} of {len(sizes)} scales, rollouts at the others" if asked < len(sizes) else "at all scales"
    return f"teacher asked {where} (its forwards are not counted)"


def _described(settings: Mapping[str, Any]) -> str:
    """A model in words: mask, scales, and what a draw costs."""
    sizes, mask = settings["scale_sizes"], settings["scale_attention"]
    flops = sampling_flops(settings)
    return (
        f"{mask}, scales {_listed(sizes)}, {sum(n * n for n in sizes)} tokens, {len(sizes)} forwards, "
        f"{flops / 1e9:.4g} GFLOP"
    )


def _listed(sizes: Sequence[int]) -> str:
    return ", ".join(map(str, sizes))

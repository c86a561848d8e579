"""A student starts as its teacher, and what the teacher says about it fits both their schedules."""

import pytest
import torch
from torch.testing import assert_close

from isthmus.next_scale.distillation import TeacherRollouts, rollout_uniforms, scale_divergence, student_of
from isthmus.nn.sampling import draw_tokens
from tests.testers import NO_DIVERGENCE
from tests.training.tiny_teacher import CODES, SIZES, tiny_teacher

pytestmark = pytest.mark.slow

LABELS = torch.tensor([0, 1, 2])
POSITIONS = torch.tensor([5, 6, 70])


def pyramid(schedule, seed: int = 0) -> list[torch.Tensor]:
    """Random tokens of three images."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(CODES, (3, n), generator=generator) for n in schedule.lengths]


def separated(pipeline):
    """Codes so far apart that, from a side to its double and back, averaging mistakes none for another."""
    with torch.no_grad():
        pipeline.image_tokenizer.codebook.weight.copy_(10 * torch.eye(CODES))
    return pipeline


MASKS = ("markov", "causal")


def test_on_the_teachers_schedule_a_student_is_the_teacher():
    for mask in MASKS:
        pipeline = tiny_teacher(mask)
        teacher, tokenizer = pipeline.transformer, pipeline.image_tokenizer
        student = student_of(teacher, SIZES, mask).eval()
        inputs = tokenizer.scale_inputs(pyramid(tokenizer.schedule))
        with torch.no_grad():
            assert torch.equal(student(LABELS, inputs).logits, teacher(LABELS, inputs).logits)


def test_rows_of_scales_and_positions_are_those_of_the_same_side():
    teacher = tiny_teacher().transformer
    student = student_of(teacher, (1, 3, 4), "causal")
    for k, side in enumerate(student.schedule.sizes):
        j = teacher.schedule.sizes.index(side)
        assert torch.equal(student.scale_embedding.weight[k], teacher.scale_embedding.weight[j])
        ours, theirs = (m.position.split(list(m.schedule.lengths), dim=1) for m in (student, teacher))
        assert torch.equal(ours[k], theirs[j])
    own = {"scale_embedding.weight", "position"}
    state, kept = teacher.state_dict(), student.state_dict()
    assert set(state) == set(kept)
    assert all(torch.equal(state[name], kept[name]) for name in set(state) - own)
    assert not student.is_markov


def test_a_student_that_is_its_teacher_diverges_by_nothing():
    # 4 follows 3 in both schedules, and a Markov teacher reads its input alone
    pipeline = tiny_teacher()
    teacher, schedule = pipeline.transformer, pipeline.schedule.derive((1, 3, 4))
    student = student_of(teacher, schedule.sizes, "markov").eval()
    inputs = pipeline.image_tokenizer.scale_inputs(pyramid(schedule), schedule)
    with torch.no_grad():
        ours = student(LABELS, inputs).logits[:, -16:]
        theirs = teacher(LABELS, inputs[:, -16:], scales=[3]).logits
        assert scale_divergence(theirs, ours).abs() < NO_DIVERGENCE
        assert scale_divergence(theirs, ours + torch.randn_like(ours)) > 0.01


def test_divergence_is_the_mean_over_draws_less_the_entropy():
    # two codes at (3/4, 1/4) against (1/2, 1/2): ln 2 - (2 ln 2 - 3/4 ln 3) = 3/4 ln 3 - ln 2
    theirs, ours = torch.log(torch.tensor([[[0.75, 0.25]]])), torch.zeros(1, 1, 2)
    known = 0.75 * torch.tensor(3.0).log() - torch.tensor(2.0).log()
    assert_close(scale_divergence(theirs, ours), known)


@pytest.mark.parametrize("mask", MASKS)
def test_rollouts_on_equal_schedules_add_up_to_the_teachers_features(mask):
    pipeline = separated(tiny_teacher(mask, phi_ratio=0.0, sizes=(1, 2, 4)))
    tokenizer, teacher, schedule = pipeline.image_tokenizer, pipeline.transformer, pipeline.schedule
    token_ids, scales = pyramid(schedule), (1, 2)
    rollouts = TeacherRollouts(tokenizer, teacher, schedule, scales)
    targets = rollouts.targets(LABELS, token_ids, token_ids, POSITIONS, seed=3)
    with torch.no_grad():
        logits = teacher(LABELS, tokenizer.scale_inputs(token_ids)).logits.split(list(schedule.lengths), dim=1)
    for k, found in zip(scales, targets, strict=True):
        # one teacher-forced pass says what the teacher draws at k behind the image's own scales
        drawn = draw_tokens(logits[k], rollout_uniforms(POSITIONS, schedule, k, seed=3))
        assert torch.equal(found, drawn)


def test_rollouts_of_an_image_depend_on_itself_alone():
    for mask in MASKS:
        pipeline = tiny_teacher(mask)
        short = pipeline.schedule.derive((1, 4))
        rollouts = TeacherRollouts(pipeline.image_tokenizer, pipeline.transformer, short, (1,))
        ours, theirs = pyramid(short), pyramid(pipeline.schedule, seed=1)
        (together,) = rollouts.targets(LABELS, ours, theirs, POSITIONS, seed=0)
        for i in range(3):
            row = slice(i, i + 1)
            own, known = ([ids[row] for ids in pyramids] for pyramids in (ours, theirs))
            (alone,) = rollouts.targets(LABELS[row], own, known, POSITIONS[row], seed=0)
            assert torch.equal(alone, together[row])
        (other,) = rollouts.targets(LABELS, ours, theirs, POSITIONS + 100, seed=0)
        assert not torch.equal(other, together)


def test_a_rollout_leads_from_the_students_features_to_the_teachers():
    # without phi and with codes far apart the last scale can take any step between two maps of codes: where the
    # student's features are the teacher's own, what is left is what the teacher drew in its last scale
    pipeline = separated(tiny_teacher(phi_ratio=0.0))
    tokenizer, schedule = pipeline.image_tokenizer, pipeline.schedule
    token_ids = pyramid(schedule)
    short = schedule.derive((1, 2, 4))
    (target,) = TeacherRollouts(tokenizer, pipeline.transformer, short, (2,)).targets(
        LABELS, token_ids[:2] + token_ids[3:], token_ids, POSITIONS, seed=0
    )
    state = tokenizer.features_up_to(token_ids, 1)
    drawn = state
    with torch.no_grad():
        for k in (2, 3):
            inputs = torch.nn.functional.interpolate(drawn, size=SIZES[k], mode="area").flatten(2).transpose(1, 2)
            logits = pipeline.transformer.forward_scale(k, inputs, pipeline.transformer.condition(LABELS))
            ids = draw_tokens(logits, rollout_uniforms(POSITIONS, schedule, k, seed=0))
            drawn = tokenizer.add_codes(drawn, tokenizer.lookup(ids), k)
    distances = torch.cdist((drawn - state).flatten(2).transpose(1, 2), tokenizer.codebook.weight[None])
    assert torch.equal(target, distances.argmin(dim=-1))

import pytest
import torch

from isthmus.errors import UserError
from isthmus.generation.step import token_hashes
from isthmus.models.fingerprint import pair_fingerprint
from isthmus.models.token_critic import TokenCritic
from isthmus.pipelines.loading import load_pipeline
from isthmus.schedulers.scale_refinement import ScaleRefinementScheduler
from tests.pipelines.tiny import tiny_pipeline


def critic_for(pipe, fingerprint=None):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return TokenCritic(
            scale_sizes=(1, 2, 4), codebook_size=16, codebook_dim=4, width=8, num_blocks=1,
            model_fingerprint=fingerprint or pair_fingerprint(pipe.image_tokenizer, pipe.transformer),
        ).eval()  # fmt: skip


@pytest.mark.parametrize("attention", ["markov", "causal"])
@pytest.mark.parametrize(
    "scheduler",
    [
        ScaleRefinementScheduler(mode="masked", rounds=(0, 2, 1)),
        ScaleRefinementScheduler(mode="simple", rounds=(0, 1, 1), jump_scales=1),
        ScaleRefinementScheduler(mode="simple", rounds=(0, 0, 2), jump_scales=2),
    ],
    ids=["masked", "near", "far"],
)
def test_tokens_are_those_of_the_images(attention, scheduler):
    pipe = tiny_pipeline(scale_attention=attention, scheduler=scheduler)
    drawn = pipe([0, 1, 2], seed=5, output_type="pt")
    assert torch.allclose(pipe.decode(drawn.token_ids, output_type="pt"), drawn.images, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["markov", "causal"])
def test_a_scheduler_is_part_of_the_saved_model(attention, tmp_path):
    pipe = tiny_pipeline(scale_attention=attention)
    plain, before = pipe([0, 1], seed=3), pipe.fingerprint
    assert plain.num_forwards == 3
    pipe.scheduler = ScaleRefinementScheduler(mode="masked", rounds=(0, 1, 1))
    refined = pipe([0, 1], seed=3)
    assert refined.num_forwards == 5 and pipe.fingerprint != before
    assert token_hashes(refined.token_ids) != token_hashes(plain.token_ids)
    pipe.save_pretrained(tmp_path / "model")
    loaded = load_pipeline(tmp_path / "model", device="cpu")
    assert loaded.scheduler.mode == "masked" and loaded.critic is None
    assert loaded.fingerprint == pipe.fingerprint
    assert token_hashes(loaded([0, 1], seed=3).token_ids) == token_hashes(refined.token_ids)
    loaded.scheduler = None
    assert token_hashes(loaded([0, 1], seed=3).token_ids) == token_hashes(plain.token_ids)
    assert loaded.fingerprint == before


def test_without_refinement_a_model_is_the_one_it_was(tmp_path):
    """Equal images, equal fingerprint: also behind a mode that was set and taken back, and saved."""
    pipe = tiny_pipeline()
    before = pipe.fingerprint
    pipe.refine_with("masked")
    assert pipe.scheduler.mode == "masked" and pipe.fingerprint != before
    pipe.refine_with("none")
    assert pipe.scheduler is None and pipe.fingerprint == before
    pipe.save_pretrained(tmp_path / "model")
    assert load_pipeline(tmp_path / "model", device="cpu").fingerprint == before


@pytest.mark.parametrize("attention", ["markov", "causal"])
@pytest.mark.parametrize("smooth", [False, True])
@pytest.mark.parametrize(
    "scheduler",
    [
        ScaleRefinementScheduler(),
        ScaleRefinementScheduler(mode="masked", rounds=(0, 2, 1)),
        ScaleRefinementScheduler(mode="masked", rounds=(0, 2, 1), p_min=0.05),
        ScaleRefinementScheduler(mode="masked", p_min=1e-30),
        ScaleRefinementScheduler(mode="critic", rounds=(0, 1)),
        ScaleRefinementScheduler(mode="simple", rounds=(0, 1, 2), jump_scales=1),
        ScaleRefinementScheduler(mode="simple", rounds=(0, 0, 2), jump_scales=2),
    ],
    ids=["none", "masked", "p_min", "p_min-never", "critic", "near", "far"],
)
def test_a_draw_costs_what_its_scheduler_says(attention, smooth, scheduler):
    pipe = tiny_pipeline(scale_attention=attention)
    pipe.critic, pipe.scheduler = critic_for(pipe), scheduler
    said = scheduler.forwards_of(3, has_cache=attention == "causal", smooth=smooth)
    for labels in ([0], [0, 1, 2, None]):
        count = pipe(labels, seed=5, smooth=smooth, guidance_scale=2.0, output_type="latent").num_forwards
        assert said.least <= count <= said.most
    # only these two depend on what is drawn
    by_draw = scheduler.config["p_min"] is not None
    by_draw |= attention == "causal" and not smooth and scheduler.config["jump_scales"] == 1
    assert (said.least < said.most) == by_draw


def test_a_critic_is_part_of_the_saved_model(tmp_path):
    pipe = tiny_pipeline()
    pipe.critic = critic_for(pipe)
    pipe.scheduler = ScaleRefinementScheduler(mode="critic", rounds=(0, 2))
    drawn = pipe([0, 1, None], seed=3)
    assert drawn.num_forwards == 5
    pipe.save_pretrained(tmp_path / "model")
    loaded = load_pipeline(tmp_path / "model", device="cpu")
    assert token_hashes(loaded([0, 1, None], seed=3).token_ids) == token_hashes(drawn.token_ids)


def test_streams_show_a_jump_and_end_with_the_call():
    pipe = tiny_pipeline()
    pipe.scheduler = ScaleRefinementScheduler(mode="simple", rounds=(0, 1), jump_scales=1)
    called = pipe([0, 1], seed=3, output_type="pt")
    steps = list(pipe.stream([0, 1], seed=3, output_type="pt"))
    assert [step.index for step in steps] in ([0, 1, 1, 2], [0, 1, 0, 1, 2]) and called.num_forwards == 4
    last = {step.index: step.token_ids for step in steps}
    assert all(torch.equal(last[k], called.token_ids[k]) for k in range(3))
    assert torch.allclose(steps[-1].preview, called.images)


def test_a_critic_of_another_model_is_refused(tmp_path):
    pipe, other = tiny_pipeline(), tiny_pipeline(scale_attention="causal")
    with pytest.raises(UserError, match="judges the model it was trained for"):
        tiny_pipeline(critic=critic_for(other))
    with pytest.raises(UserError, match="judges the model it was trained for"):
        tiny_pipeline(critic=critic_for(pipe, "0" * 64))
    pipe.critic = critic_for(other)
    with pytest.raises(UserError, match="judges the model it was trained for"):
        pipe(0, seed=1)


def test_rounds_and_modes_must_fit_the_model():
    far = ScaleRefinementScheduler(mode="masked", rounds=(0, 0, 0, 1))
    with pytest.raises(UserError, match="does not exist"):
        tiny_pipeline(scheduler=far)
    pipe = tiny_pipeline()
    pipe.scheduler = far
    with pytest.raises(UserError, match="does not exist"):
        pipe(0, seed=1)
    pipe.scheduler = ScaleRefinementScheduler(mode="critic")
    with pytest.raises(UserError, match="needs a critic"):
        pipe.stream(0, seed=1)

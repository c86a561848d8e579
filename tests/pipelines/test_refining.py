import itertools
import json

import pytest
import torch

from isthmus.cli.info import describe_model, upload_contents
from isthmus.errors import UserError
from isthmus.next_scale.refinement import ScaleRefinementScheduler
from isthmus.pipelines.loading import load_pipeline
from tests.pipelines.tiny import tiny_pipeline
from tests.testers import token_hashes

SCHEDULERS = {
    "none": ScaleRefinementScheduler(),
    "masked": ScaleRefinementScheduler(mode="masked", rounds=(0, 2, 1)),
    "p_min": ScaleRefinementScheduler(mode="masked", rounds=(0, 2, 1), p_min=0.05),
    "p_min-never": ScaleRefinementScheduler(mode="masked", p_min=1e-30),
    "near": ScaleRefinementScheduler(mode="simple", rounds=(0, 1, 2), jump_scales=1),
    "far": ScaleRefinementScheduler(mode="simple", rounds=(0, 0, 2), jump_scales=2),
}


@pytest.mark.parametrize("attention", ["markov", "causal"])
def test_tokens_are_those_of_the_images(attention):
    pipe = tiny_pipeline(scale_attention=attention)
    for name in ("masked", "near", "far"):
        pipe.scheduler = SCHEDULERS[name]
        drawn = pipe([0, 1, 2], seed=5, output_type="pt")
        assert torch.allclose(pipe.decode(drawn.token_ids, output_type="pt"), drawn.images, atol=1e-4)


@pytest.mark.slow
def test_a_scheduler_is_part_of_the_saved_model(tmp_path):
    pipe = tiny_pipeline()
    plain, before = pipe([0, 1], seed=3), pipe.fingerprint
    assert plain.num_forwards == 3
    pipe.scheduler = ScaleRefinementScheduler(mode="masked", rounds=(0, 1, 1))
    refined = pipe([0, 1], seed=3)
    assert refined.num_forwards == 5 and pipe.fingerprint != before
    assert token_hashes(refined.token_ids) != token_hashes(plain.token_ids)
    pipe.save_pretrained(tmp_path / "model")
    loaded = load_pipeline(tmp_path / "model", device="cpu")
    assert loaded.scheduler.mode == "masked"
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
def test_a_draw_costs_what_its_scheduler_says(attention):
    pipe = tiny_pipeline(scale_attention=attention)
    for (name, scheduler), smooth in itertools.product(SCHEDULERS.items(), (False, True)):
        pipe.scheduler = scheduler
        said = scheduler.forwards_of(3, has_cache=attention == "causal", smooth=smooth)
        for labels in ([0], [0, 1, 2, None]):
            count = pipe(labels, seed=5, smooth=smooth, guidance_scale=2.0, output_type="latent").num_forwards
            assert said.least <= count <= said.most, name
        # only these two depend on what is drawn
        by_draw = name.startswith("p_min") or (name == "near" and attention == "causal" and not smooth)
        assert (said.least < said.most) == by_draw


JUMPS = {"mode": "simple", "rounds": [0, 1], "jump_scales": 1}


@pytest.mark.parametrize(
    ("saved", "becomes"),
    [
        ({"mode": "critic", "rounds": [0, 2], "share": 0.5}, {"mode": "masked", "rounds": [0, 2], "share": 0.5}),
        (JUMPS, JUMPS),
    ],
    ids=["its rounds", "jumps"],
)
def test_a_folder_of_a_model_with_a_critic_loads_without_it(saved, becomes, tmp_path, caplog):
    """As earlier versions wrote it; every setting of the scheduler is in its file, None where it is left out."""
    pipe, old = tiny_pipeline(scheduler=ScaleRefinementScheduler(**becomes)), tmp_path / "old"
    pipe.save_pretrained(old)
    for file, changes in (
        ("model_index.json", {"critic": ["isthmus.models.token_critic", "TokenCritic"]}),
        ("scheduler/scheduler_config.json", saved),
    ):
        (old / file).write_text(json.dumps(json.loads((old / file).read_text()) | changes))
    (old / "critic").mkdir()
    (old / "critic" / "config.json").write_text(json.dumps({"_class_name": "TokenCritic", "width": 8}))

    loaded = load_pipeline(old, device="cpu")
    assert [record.getMessage() for record in caplog.records] == [
        f"{old} was saved with a critic, which is ignored: rounds in which it chose tokens choose them by the model's "
        "own probability (mode 'masked')."
    ]
    assert loaded.fingerprint == pipe.fingerprint
    assert token_hashes(loaded([0, 1], seed=3).token_ids) == token_hashes(pipe([0, 1], seed=3).token_ids)
    for said in (describe_model(old), upload_contents(old)):
        assert "transformer" in said and "critic" not in said

    caplog.clear()
    loaded.save_pretrained(tmp_path / "again")
    assert load_pipeline(tmp_path / "again", device="cpu").fingerprint == pipe.fingerprint and not caplog.records
    assert not (tmp_path / "again" / "critic").exists()


def test_a_folder_that_names_no_critic_where_one_could_be_loads_without_a_word(tmp_path, caplog):
    """Every folder that earlier versions wrote."""
    tiny_pipeline().save_pretrained(tmp_path)
    index = tmp_path / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"critic": [None, None]}))
    assert load_pipeline(tmp_path, device="cpu").fingerprint == tiny_pipeline().fingerprint and not caplog.records


def test_streams_show_a_jump_and_end_with_the_call():
    pipe = tiny_pipeline()
    pipe.scheduler = ScaleRefinementScheduler(mode="simple", rounds=(0, 1), jump_scales=1)
    called = pipe([0, 1], seed=3, output_type="pt")
    steps = list(pipe.stream([0, 1], seed=3, output_type="pt"))
    assert [step.index for step in steps] in ([0, 1, 1, 2], [0, 1, 0, 1, 2]) and called.num_forwards == 4
    last = {step.index: step.token_ids for step in steps}
    assert all(torch.equal(last[k], called.token_ids[k]) for k in range(3))
    assert torch.allclose(steps[-1].preview, called.images)


def test_rounds_and_modes_must_fit_the_model():
    far = ScaleRefinementScheduler(mode="masked", rounds=(0, 0, 0, 1))
    with pytest.raises(UserError, match="does not exist"):
        tiny_pipeline(scheduler=far)
    pipe = tiny_pipeline()
    pipe.scheduler = far
    with pytest.raises(UserError, match="does not exist"):
        pipe(0, seed=1)
    with pytest.raises(UserError, match="does not exist"):
        pipe.stream(0, seed=1)

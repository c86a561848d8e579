import json
from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from isthmus.errors import UserError
from isthmus.functional.quantization import next_scale_input
from isthmus.functional.sampling import draw_tokens
from isthmus.pipelines.loading import load_pipeline
from isthmus.training.critic_config import CriticRun
from isthmus.training.critic_examples import _redrawn, critic_examples
from isthmus.training.distilled_weights import student_of
from isthmus.training.train_critic import check_folder, train_critic, with_images
from tests.pipelines.tiny import tiny_pipeline
from tests.training.tiny_runs import write_images
from tests.training.tiny_teacher import tiny_teacher

pytestmark = pytest.mark.slow

LENGTHS = (1, 4, 16)


def run_for(model, images, out):
    return CriticRun(
        model=str(model), data=images, out=out, num_steps=3, batch_size=4, width=8, num_blocks=1, num_views=1,
        device="cpu",
    )  # fmt: skip


def examples_of(pipe, rows, seed=0):
    tokens = [torch.randint(16, (3, n), generator=torch.Generator().manual_seed(n))[rows] for n in LENGTHS]
    labels = torch.tensor([0, 1, 3])[rows]
    found = critic_examples(
        pipe.image_tokenizer, pipe.transformer, tokens, labels, [10 + i for i in rows], seed=seed,
        schedule=pipe.schedule,
    )  # fmt: skip
    return tokens, found


def test_true_tokens_stay_and_redrawn_ones_are_the_models():
    pipe = tiny_pipeline()
    tokens, found = examples_of(pipe, [0, 1, 2])
    assert [one.scale for one in found] == [1, 2]
    for one in found:
        true_codes = pipe.image_tokenizer.lookup(tokens[one.scale]).detach().flatten(2).transpose(1, 2)
        assert torch.equal(one.codes.flatten(2).transpose(1, 2)[one.true], true_codes[one.true])
        assert_close(one.features, pipe.image_tokenizer.features_up_to(tokens, one.scale - 1).detach())
        assert not bool(one.true.all())


def test_an_example_depends_on_its_own_position():
    pipe = tiny_pipeline()
    _, together = examples_of(pipe, [0, 1, 2])
    _, alone = examples_of(pipe, [2])
    for ours, theirs in zip(alone, together, strict=True):
        assert torch.equal(ours.true[0], theirs.true[2]) and torch.equal(ours.codes[0], theirs.codes[2])
        assert_close(ours.measures[0], theirs.measures[2])


def test_a_critic_is_trained_saved_and_used(trained_prior, images, tmp_path):
    folder = train_critic(run_for(trained_prior, images, tmp_path / "critic"))
    report = json.loads((folder / "critic.json").read_text())
    assert set(report["critic"]["by_scale"]) == {"1", "2"} and 0 <= report["probability"]["all"] <= 1
    pipe, plain = load_pipeline(folder, device="cpu"), load_pipeline(trained_prior, device="cpu")
    assert pipe.scheduler.mode == "critic"
    drawn = pipe([0, 1], seed=1)
    assert drawn.num_forwards == 3 + 2  # a round at the second and third scale
    pipe.scheduler = None
    for ours, theirs in zip(pipe([0, 1], seed=1).token_ids, plain([0, 1], seed=1).token_ids, strict=True):
        assert torch.equal(ours, theirs)
    halved = load_pipeline(folder, device="cpu", dtype="bfloat16")
    assert halved([0], seed=1).num_forwards == 5  # the same model, loaded as bfloat16
    again = train_critic(run_for(trained_prior, images, tmp_path / "again"))
    assert json.loads((again / "critic.json").read_text()) == report


@torch.no_grad()
@pytest.mark.parametrize("attention", ["markov", "causal"])
def test_a_model_trained_for_refinement_redraws_beside_the_tokens_that_stay(attention):
    """By hand: earlier scales as they are, this one's input shows what stays, as in a masked round."""
    plain = tiny_pipeline(scale_attention=attention)
    arguments = {k: v for k, v in plain.transformer.config.items() if not k.startswith("_")}
    model = type(plain.transformer)(**(arguments | {"has_mask_embedding": True})).eval()
    model.load_state_dict(plain.transformer.state_dict() | {"mask_embedding": torch.linspace(-2, 2, 16)})
    pipe = type(plain)(plain.image_tokenizer, model)
    tokens, found = examples_of(pipe, [0, 1, 2])
    tokenizer, schedule = pipe.image_tokenizer, pipe.schedule
    conditioning, differs = model.condition(torch.tensor([0, 1, 3])), False
    for one in found:
        cache, features = model.new_cache(3), torch.zeros(3, 4, 4, 4)
        for scale in range(one.scale):
            inputs = next_scale_input(features, schedule, scale) if scale else features.new_zeros(3, 0, 4)
            model.forward_scale(scale, inputs, conditioning, cache)
            features = tokenizer.add_codes(features, tokenizer.lookup(tokens[scale]), scale)
        again, uniforms = _redrawn([10, 11, 12], one.scale, LENGTHS[one.scale], 0)
        partial = tokenizer.partial_scale_input(features, tokenizer.lookup(tokens[one.scale]), again, one.scale)
        drawn = draw_tokens(model.forward_scale(one.scale, partial, conditioning, cache, hidden=again), uniforms)
        mixed = torch.where(again, drawn, tokens[one.scale])
        assert torch.equal(one.true, ~again) and torch.equal(one.codes, tokenizer.lookup(mixed))
        differs |= not torch.equal(one.codes, examples_of(plain, [0, 1, 2])[1][one.scale - 1].codes)
    assert differs  # from a model that is never shown a part of its own scale


def no_data(model, out):
    return replace(run_for(model, "", out), data=None)


def test_a_critic_learns_on_the_images_of_its_model(trained_prior, images, tmp_path, caplog):
    named = train_critic(run_for(trained_prior, images, tmp_path / "named"))
    with caplog.at_level("INFO", logger="isthmus"):
        found = train_critic(no_data(trained_prior, tmp_path / "found"))
    assert f"images of the model: {images}" in caplog.text
    assert (found / "critic.json").read_text() == (named / "critic.json").read_text()


def test_an_unlabelled_model_gets_its_own_images_or_none(tmp_path):
    """Nothing else would tell them from others: there are no classes to compare."""
    model = tmp_path / "model"
    tiny_pipeline(num_classes=0).save_pretrained(model)
    with pytest.raises(UserError, match=r"does not say which.*Pass --data"):
        train_critic(no_data(model, tmp_path / "critic"))
    data = write_images(tmp_path / "squares.npz", num_classes=0)
    for settings, said in (({"data": "hf:some/stream", "stream": True}, "trained on a stream"), ({}, "does not say")):
        (model / "run.json").write_text(json.dumps({"run": settings}))
        with pytest.raises(UserError, match=said):
            train_critic(no_data(model, tmp_path / "critic"))
    assert not (tmp_path / "critic").exists()
    (model / "run.json").write_text(json.dumps({"run": {"data": data, "classes": None}}))
    assert with_images(no_data(model, tmp_path / "critic")).data == data
    assert json.loads((train_critic(no_data(model, tmp_path / "critic")) / "critic.json").read_text())["num_images"]


def test_options_go_before_the_record(tmp_path):
    (tmp_path / "run.json").write_text(json.dumps({"run": {"data": "openmoji", "classes": ["face", "flag"]}}))
    assert with_images(no_data(tmp_path, tmp_path / "o")).classes == ("face", "flag")
    assert with_images(replace(no_data(tmp_path, tmp_path / "o"), classes=("flag",))).classes == ("flag",)
    named = run_for(tmp_path, "photos", tmp_path / "o")
    assert with_images(named) == named  # all of its classes: those of the record are of other images


def test_a_student_on_fewer_scales_gets_a_critic(images, tmp_path):
    teacher = tiny_teacher("causal")
    student = student_of(teacher.transformer, (1, 3, 4), "causal")
    type(teacher)(teacher.image_tokenizer, student, class_names=["0", "1"]).save_pretrained(tmp_path / "student")
    run = run_for(tmp_path / "student", images, tmp_path / "critic")
    pipe = load_pipeline(train_critic(run), device="cpu")
    assert pipe.critic.config["scale_sizes"] == [1, 3, 4] and pipe(["0", "1"], seed=1).num_forwards == 3 + 2


def test_a_model_of_one_scale_has_nothing_to_judge(images, tmp_path):
    tiny_teacher(sizes=(4,)).save_pretrained(tmp_path / "model")
    with pytest.raises(UserError, match="model of one scale"):
        train_critic(run_for(tmp_path / "model", images, tmp_path / "critic"))
    assert not (tmp_path / "critic").exists()


def test_no_other_model_is_overwritten(trained_prior, images, tmp_path):
    (tmp_path / "file").touch()
    for out in (trained_prior, tmp_path / "file"):
        with pytest.raises(UserError, match="--out must be a"):
            train_critic(run_for(trained_prior, images, out))
    check_folder(tmp_path / "new")
    # what an unfinished one leaves behind is taken up again
    (tmp_path / "unfinished" / "tokens").mkdir(parents=True)
    check_folder(tmp_path / "unfinished")
    (tmp_path / "unfinished" / "model_index.json").touch()
    with pytest.raises(UserError, match="holds model_index.json"):
        check_folder(tmp_path / "unfinished")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_steps": 0}, "num_steps"),
        ({"seed": -1}, "seed"),
        ({"model": ""}, "trained for a model"),
    ],
)
def test_bad_settings_are_refused(trained_prior, images, tmp_path, changes, said):
    with pytest.raises(UserError, match=said):
        replace(run_for(trained_prior, images, tmp_path / "critic"), **changes)


def test_other_classes_are_refused_and_nothing_is_written(trained_prior, tmp_path):
    data = write_images(tmp_path / "three.npz", num_classes=3)
    with pytest.raises(UserError, match="classes of the model"):
        train_critic(run_for(trained_prior, data, tmp_path / "critic"))
    assert not (tmp_path / "critic").exists()

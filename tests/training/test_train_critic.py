import json
from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from isthmus.errors import UserError
from isthmus.pipelines.loading import load_pipeline
from isthmus.training.critic_config import CriticRun
from isthmus.training.critic_examples import critic_examples
from isthmus.training.train_critic import train_critic
from tests.pipelines.tiny import tiny_pipeline

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
    from tests.training.tiny_runs import write_images

    data = write_images(tmp_path / "three.npz", num_classes=3)
    with pytest.raises(UserError, match="classes of the model"):
        train_critic(run_for(trained_prior, data, tmp_path / "critic"))
    assert not (tmp_path / "critic").exists()

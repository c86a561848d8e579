import pytest
import torch

from isthmus.errors import UserError
from isthmus.next_scale.pipeline import NextScalePipeline
from isthmus.nn.guidance import GuidanceSchedule
from isthmus.pipelines.options import SamplingOptions
from tests.pipelines.tiny import tiny_pipeline
from tests.testers import token_hashes


def test_a_row_of_a_batch_is_that_of_its_label(pipe):
    drawn = token_hashes(pipe(["flag", 0, None], seed=1).token_ids)
    assert drawn[:2] == token_hashes(pipe(torch.tensor([1, 0]), seed=1).token_ids)
    assert drawn[2:] == token_hashes(pipe(None, seed=1, image_index=2).token_ids)


def test_seeds_lists_and_generators(pipe):
    one = pipe([0, 0], seed=[5, 5])
    assert one.seeds == [(5, 0), (5, 0)] and len(set(token_hashes(one.token_ids))) == 1
    made = pipe([0, 1], generator=torch.Generator().manual_seed(3))
    assert all(0 <= seed < 2**63 and index == 0 for seed, index in made.seeds)
    assert made.seeds == pipe([0, 1], generator=torch.Generator().manual_seed(3)).seeds
    again = pipe([0, 1], seed=[seed for seed, _ in made.seeds])
    assert token_hashes(again.token_ids) == token_hashes(made.token_ids)
    many = pipe([0, 1], generator=[torch.Generator().manual_seed(3), torch.Generator().manual_seed(4)])
    assert many.seeds[0] == made.seeds[0] and many.seeds[1] != made.seeds[1]


def test_without_a_seed_the_result_says_which_was_taken(pipe):
    first, second = pipe(0), pipe(0)
    assert first.seeds != second.seeds
    ((seed, index),) = first.seeds
    assert token_hashes(pipe(0, seed=seed, image_index=index).token_ids) == token_hashes(first.token_ids)


def test_one_class_is_a_number_like_any_other():
    assert tiny_pipeline(num_classes=1)(["face", None], seed=0).class_labels == [0, 1]


def test_names_must_fit_the_classes():
    with pytest.raises(UserError, match="one name per class"):
        NextScalePipeline(tiny_pipeline().image_tokenizer, tiny_pipeline().transformer, class_names=["face"])
    with pytest.raises(UserError, match="no names"):
        tiny_pipeline(names=False)("face")
    double = tiny_pipeline(names=False)
    double.class_names = {"0": "crane", "1": "crane", "2": "tree"}
    with pytest.raises(UserError, match=r"\[0, 1\]"):
        double("crane")


def test_guidance_schedules_are_one_of_the_defaults():
    schedule = GuidanceSchedule("linear", 1.0, 3.0)
    pipe = tiny_pipeline(sampling_defaults=SamplingOptions(guidance_scale=schedule))
    assert token_hashes(pipe(1, seed=2).token_ids) == token_hashes(pipe(1, seed=2, guidance_scale=(1, 2, 3)).token_ids)

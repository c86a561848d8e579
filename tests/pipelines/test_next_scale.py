import inspect

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from isthmus.errors import UserError
from isthmus.next_scale.pipeline import NextScalePipeline
from isthmus.nn.guidance import GuidanceSchedule
from isthmus.pipelines.options import SamplingOptions
from isthmus.pipelines.request import token_hashes
from tests.pipelines.tiny import tiny_pipeline
from tests.testers import NETWORK


def test_labels_by_name_index_or_null(pipe):
    result = pipe(["flag", 0, None], seed=1)
    assert result.class_labels == [1, 0, 3]
    assert [image.size for image in result.images] == [(8, 8)] * 3
    assert token_hashes(result.token_ids) == token_hashes(pipe(torch.tensor([1, 0, 3 - 3]), seed=1).token_ids)[:2] + [
        token_hashes(pipe(None, seed=1, image_index=2).token_ids)[0]
    ]


def test_one_label_may_stand_alone_and_labels_spread(pipe):
    assert pipe("hand", seed=0).class_labels == [2]
    assert pipe(["face", "flag"], num_images=5, seed=0).class_labels == [0, 1, 0, 1, 0]
    assert pipe(["face", "flag"], num_images_per_class=2, seed=0).class_labels == [0, 0, 1, 1]
    assert pipe(num_images=2, seed=0).class_labels == [3, 3]


def test_an_image_is_the_same_in_any_batch(pipe):
    labels = ["face", 1, None, 2, 0]
    together = pipe(labels, seed=7, image_index=10, output_type="pt")
    assert together.seeds == [(7, 10 + i) for i in range(5)]
    hashes = token_hashes(together.token_ids)
    for i, label in enumerate(labels):
        alone = pipe(label, seed=7, image_index=10 + i, output_type="pt")
        assert token_hashes(alone.token_ids) == [hashes[i]]
        assert_close(alone.images[0], together.images[i], atol=1e-4, rtol=0)
    order = [3, 0, 4]
    shuffled = pipe([labels[i] for i in order], seed=7, image_index=[10 + i for i in order])
    assert token_hashes(shuffled.token_ids) == [hashes[i] for i in order]


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


def test_stream_shows_every_scale_and_ends_with_the_image(pipe):
    called = pipe([0, 1], seed=3, output_type="pt")
    steps = list(pipe.stream([0, 1], seed=3, output_type="pt"))
    assert [(s.index, s.total) for s in steps] == [(0, 3), (1, 3), (2, 3)]
    assert token_hashes([s.token_ids for s in steps]) == token_hashes(called.token_ids)
    assert_close(steps[-1].preview, called.images, **NETWORK)
    assert not torch.equal(steps[0].preview, steps[-1].preview)


def test_the_callback_sees_every_step(pipe):
    seen = []
    result = pipe(0, seed=3, callback_on_step_end=seen.append)
    assert [s.index for s in seen] == [0, 1, 2] and all(s.preview is None for s in seen)
    assert token_hashes([s.token_ids for s in seen]) == token_hashes(result.token_ids)


def test_output_types_agree(pipe):
    pt, array, pil, features = (pipe([0, 1], seed=1, output_type=kind).images for kind in ("pt", "np", "pil", "latent"))
    assert pt.shape == (2, 3, 8, 8) and 0 <= pt.min() and pt.max() <= 1
    assert np.array_equal(array, pt.permute(0, 2, 3, 1).numpy())
    assert np.abs(np.asarray(pil[0]) / 255 - array[0]).max() <= 0.5 / 255 + 1e-6
    assert_close(pipe.image_tokenizer.decode_features(features).add(1).div(2), pt, **NETWORK)
    features.requires_grad_()
    pipe.image_tokenizer.decode_features(features).sum().backward()  # the caller may go on computing with it


def test_defaults_come_from_the_model_and_none_turns_them_off(pipe):
    saved = {"guidance_scale": 2.0, "top_k": 8}
    assert token_hashes(pipe(0, seed=1, **saved).token_ids) == token_hashes(pipe(0, seed=1).token_ids)
    plain = tiny_pipeline(scale_attention=pipe.transformer.config.scale_attention)
    off = pipe([0, 1, 2], seed=1, guidance_scale=1, top_k=None)
    assert token_hashes(off.token_ids) == token_hashes(plain([0, 1, 2], seed=1).token_ids)


def test_call_and_stream_take_the_same_options():
    call, stream = (inspect.signature(f).parameters for f in (NextScalePipeline.__call__, NextScalePipeline.stream))
    shared = [(p.name, p.default, p.kind) for p in call.values() if p.name != "callback_on_step_end"]
    assert shared == [(p.name, p.default, p.kind) for p in stream.values()]


def test_unlabelled_models_need_no_labels():
    pipe = tiny_pipeline(num_classes=0)
    assert pipe(num_images=2, seed=0).class_labels == [0, 0]
    with pytest.raises(UserError, match="nothing to guide towards"):
        pipe(num_images=2, guidance_scale=2.0)
    with pytest.raises(UserError, match="no classes"):
        pipe("face")
    with pytest.raises(UserError, match="nothing to guide towards"):
        tiny_pipeline(num_classes=0, sampling_defaults=SamplingOptions(guidance_scale=2.0))


def test_one_class_is_a_number_like_any_other():
    assert tiny_pipeline(num_classes=1)(["face", None], seed=0).class_labels == [0, 1]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"class_labels": "fcae"}, "Did you mean face"),
        ({"class_labels": 3}, r"0\.\.2, got 3"),
        ({"class_labels": -1}, r"0\.\.2"),
        ({"class_labels": True}, r"0\.\.2"),
        ({"class_labels": []}, "at least one"),
        ({"num_images": 0}, "at least one"),
        ({"num_images": 2, "num_images_per_class": 2}, "one of them"),
        ({"top_k": 0}, "top_k"),
        ({"top_k": 17}, r"1\.\.16"),
        ({"top_p": 0.0}, "top_p"),
        ({"temperature": float("inf")}, "temperature"),
        ({"guidance_scale": float("nan")}, "finite"),
        ({"guidance_scale": [1.0, 2.0]}, r"one value per step \(3\)"),
        ({"seed": 1, "generator": torch.Generator()}, "got both"),
        ({"seed": [1, 2]}, r"one number per image \(1\)"),
        ({"seed": -1}, "negative"),
        ({"seed": [1], "image_index": 3}, "image_index"),
        ({"generator": [torch.Generator()] * 2}, "one per image"),
    ],
)
def test_what_cannot_be_used_is_refused_in_words(arguments, said):
    pipe = tiny_pipeline()
    with pytest.raises(UserError, match=said):
        pipe(**arguments)
    if "callback_on_step_end" not in arguments:
        with pytest.raises(UserError, match=said):
            pipe.stream(**arguments)  # at once, not at the first step


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

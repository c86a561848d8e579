import pickle
from itertools import islice
from multiprocessing import active_children

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from isthmus.data.batches import EvaluationImages, TrainingImages, training_batches
from isthmus.data.images import Augmentation
from isthmus.data.opening import open_source
from isthmus.data.views import worker_batches
from isthmus.errors import UserError


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    path = tmp_path_factory.mktemp("arrays") / "a.npz"
    images = np.random.default_rng(0).integers(0, 256, (20, 10, 12, 3), dtype=np.uint8)
    np.savez(path, images, np.arange(20) % 3)
    return open_source(f"npz:{path}", image_size=8, val_fraction=0.2)


def views(source):
    return TrainingImages(source, image_size=8, seed=5)


def joined(batches) -> dict[str, torch.Tensor]:
    batches = list(batches)
    return {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def test_a_sample_has_its_shape_range_and_label(source):
    sample = views(source)[3]
    assert sample["image"].shape == (3, 8, 8) and sample["image"].dtype == torch.float32
    assert -1 <= sample["image"].min() < sample["image"].max() <= 1
    assert int(sample["position"]) == 3
    assert int(sample["class_label"]) == source.labels[int(sample["index"])]


def test_black_is_minus_one_and_white_is_one(tmp_path):
    np.savez(tmp_path / "a.npz", np.stack([np.full((8, 8, 3), shade, dtype=np.uint8) for shade in (0, 255)]))
    ends = EvaluationImages(open_source(f"npz:{tmp_path / 'a.npz'}", image_size=8, val_fraction=0.0), 8)
    assert (ends[0]["image"] == -1).all() and (ends[1]["image"] == 1).all()


@given(start=st.integers(0, 100), world=st.sampled_from([1, 2, 3, 4, 6]), share=st.integers(1, 4))
def test_the_union_over_processes_is_the_same_for_any_number_of_them(source, start, world, share):
    size = world * share
    alone = next(training_batches(views(source), batch_size=size, start_position=start))
    parts = [
        next(training_batches(views(source), batch_size=size, start_position=start, rank=rank, world_size=world))
        for rank in range(world)
    ]
    assert_same(joined(parts), alone)


@given(position=st.integers(0, 12))
def test_resuming_at_a_position_gives_the_tail(source, position):
    whole = joined(islice(training_batches(views(source), batch_size=4), 6))
    tail = joined(islice(training_batches(views(source), batch_size=4, start_position=position), 3))
    assert_same(tail, {name: rows[position : position + 12] for name, rows in whole.items()})


def test_neither_batch_size_nor_single_access_changes_a_sample(source):
    by_three = joined(islice(training_batches(views(source), batch_size=3), 4))
    by_two = joined(islice(training_batches(views(source), batch_size=2), 6))
    assert_same(by_three, by_two)
    assert torch.equal(views(source)[11]["image"], by_two["image"][11])


@pytest.mark.slow
def test_workers_change_nothing_and_no_global_state_is_touched(source):
    before = torch.get_rng_state(), pickle.dumps(np.random.get_state())
    alone = joined(islice(training_batches(views(source), batch_size=4), 5))
    batches = training_batches(views(source), batch_size=4, num_workers=2)
    made = list(islice(batches, 5))
    assert_same(joined(made), alone)
    # containers have little shared memory, and a batch that does not fit there never arrives
    assert not any(tensor.is_shared() for batch in made for tensor in batch.values())
    del batches
    assert torch.equal(torch.get_rng_state(), before[0]) and pickle.dumps(np.random.get_state()) == before[1]


@pytest.mark.slow
def test_a_worker_that_ends_is_an_error_in_words(source, cats_and_dogs, cache_dir):
    folder = open_source(f"folder:{cats_and_dogs}", image_size=8, cache_dir=cache_dir, val_fraction=0.0)
    (cats_and_dogs / folder.files[8]).unlink()
    batches = worker_batches(EvaluationImages(folder, 8), iter([[0, 1], [2, 3], [8], [9]]), 2)
    assert [next(batches)["position"].tolist() for _ in range(2)] == [[0, 1], [2, 3]]
    with pytest.raises(UserError, match="could be read at the start"):
        next(batches)
    before = set(active_children())
    batches = training_batches(views(source), batch_size=4, num_workers=2)
    next(batches)
    for process in set(active_children()) - before:
        process.kill()
    with pytest.raises(UserError, match="ended with code -9.*--num-workers"):
        list(islice(batches, 9))


def test_the_source_says_which_classes_may_be_mirrored(source):
    still = pickle.loads(pickle.dumps(source))
    still.flip = np.zeros(3, dtype=bool)
    plain = Augmentation(resize_ratio=1.0)
    drawn = TrainingImages(still, image_size=8, seed=0, augment=plain)
    unflipped = TrainingImages(still, image_size=8, seed=0, augment=Augmentation(resize_ratio=1.0, flip=False))
    assert all(torch.equal(drawn[p]["image"], unflipped[p]["image"]) for p in range(20))
    mirrored = TrainingImages(source, image_size=8, seed=0, augment=plain)
    assert any(not torch.equal(mirrored[p]["image"], unflipped[p]["image"]) for p in range(20))


def test_evaluation_is_by_index_without_chance(source):
    images = EvaluationImages(source, 8)
    assert len(images) == len(source) == len(list(images))
    assert torch.equal(images[2]["image"], EvaluationImages(source, 8)[2]["image"])
    assert torch.equal(images[-1]["image"], images[len(images) - 1]["image"])
    assert int(images[2]["class_label"]) == source.labels[2] and int(images[2]["index"]) == 2
    with pytest.raises(IndexError):
        images[len(images)]


def test_refusals_come_before_the_first_batch(source):
    for options, said in [
        ({"batch_size": 3, "world_size": 2}, "multiple of the number of processes 2, got 3"),
        ({"batch_size": 0}, "positive"),
        ({"batch_size": 2, "start_position": -1}, "position -1"),
        ({"batch_size": 2, "world_size": 2, "rank": 2}, "rank 2 of 2"),
    ]:
        with pytest.raises(UserError, match=said):
            training_batches(views(source), **options)

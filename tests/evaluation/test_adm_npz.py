"""ADM files: what is written is read, whatever the number of images, and a broken file is refused in words."""

import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from isthmus.errors import UserError
from isthmus.evaluation import adm_npz
from isthmus.evaluation.adm_npz import (
    StatisticsOrigin,
    kind_of_npz,
    read_adm_images,
    read_statistics,
    write_adm_images,
    write_statistics,
)


def pictures(count, height=4, width=5):
    return np.random.default_rng(count).integers(0, 256, (count, height, width, 3), dtype=np.uint8)


@given(count=st.integers(1, 40), labelled=st.booleans(), at_once=st.sampled_from([1, 64, 10**6]))
def test_round_trip(tmp_path_factory, count, labelled, at_once):
    path, images = tmp_path_factory.mktemp("npz") / "a.npz", pictures(count)
    labels = np.arange(count) % 3 if labelled else None
    write_adm_images(path, iter(images), count, labels)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(adm_npz, "_VALUES_AT_ONCE", at_once)
        found = read_adm_images(path)
        assert np.array_equal(np.stack(list(found)), images) and len(found) == count
        assert np.array_equal(np.stack(list(found)), images), "a second reading starts again"
    assert kind_of_npz(path) == "images"
    with np.load(path) as arrays:  # numpy reads the same
        assert np.array_equal(arrays["arr_0"], images) and ("arr_1" in arrays) == labelled
    if labels is None or found.labels is None:
        assert labels is None and found.labels is None
    else:
        assert np.array_equal(found.labels, labels)


def test_files_that_numpy_wrote(tmp_path):
    images = pictures(7)
    for save in (np.savez, np.savez_compressed):
        save(tmp_path / "a.npz", images, np.arange(7))
        assert np.array_equal(np.stack(list(read_adm_images(tmp_path / "a.npz"))), images)


def test_images_are_never_all_in_memory(tmp_path):
    count, side = 400, 64
    one = np.zeros((side, side, 3), dtype=np.uint8)
    tracemalloc.start()
    write_adm_images(tmp_path / "a.npz", (one for _ in range(count)), count)
    for _ in read_adm_images(tmp_path / "a.npz"):
        pass
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < count * one.nbytes and (tmp_path / "a.npz").stat().st_size > count * one.nbytes


def test_statistics_round_trip(tmp_path):
    path, mean, covariance = tmp_path / "s.npz", np.random.default_rng(0).normal(size=3), np.eye(3)
    for origin in (None, StatisticsOrigin("lite0-192", "a" * 64, "native size", 12)):
        write_statistics(path, mean, covariance, origin)
        found = read_statistics(path)
        assert np.array_equal(found[0], mean) and np.array_equal(found[1], covariance) and found[2] == origin
        assert kind_of_npz(path) == "statistics"
    np.savez(path, mu=mean, sigma=covariance, isthmus_space="lite0-192")
    with pytest.raises(UserError, match="cannot be read"):
        read_statistics(path)


def test_a_reference_batch_holds_images_and_statistics(tmp_path):
    images, mean = pictures(4), np.arange(3.0)
    np.savez(tmp_path / "a.npz", arr_0=images, mu=mean, sigma=np.eye(3), mu_s=mean, sigma_s=np.eye(3))
    assert kind_of_npz(tmp_path / "a.npz") == "both"
    assert np.array_equal(np.stack(list(read_adm_images(tmp_path / "a.npz"))), images)
    assert np.array_equal(read_statistics(tmp_path / "a.npz")[0], mean)


def test_names_of_classes_are_kept_and_must_fit(tmp_path):
    labels = np.array([2, 0, 2])
    write_adm_images(tmp_path / "a.npz", pictures(3), 3, labels, ("face", "flag", "hand"))
    assert read_adm_images(tmp_path / "a.npz").class_names == ("face", "flag", "hand")
    write_adm_images(tmp_path / "b.npz", pictures(3), 3, labels, ("face", "flag"))
    with pytest.raises(UserError, match="2 class_names"):
        read_adm_images(tmp_path / "b.npz")


def test_too_few_images_leave_no_file(tmp_path):
    for count in (2, 4):
        with pytest.raises(UserError, match="3"):
            write_adm_images(tmp_path / "a.npz", pictures(3), count)
    with pytest.raises(UserError, match="one size"):
        write_adm_images(tmp_path / "a.npz", [pictures(1)[0], pictures(1, 6)[0]], 2)
    assert list(tmp_path.iterdir()) == []


def test_other_images_are_refused(tmp_path):
    for arrays, said in (
        ({"arr_0": pictures(2).astype(np.float32)}, "uint8"),
        ({"arr_0": pictures(2).transpose(0, 3, 1, 2)}, "channels last"),
        ({"arr_0": np.asfortranarray(pictures(2))}, "uint8"),
        ({"arr_0": pictures(2), "arr_1": np.arange(3)}, "arr_1"),
        ({"arr_0": pictures(2), "arr_1": np.array([0.5, 1])}, "integers"),
        ({"images": pictures(2)}, "arr_0"),
        ({"mu": np.zeros(3), "sigma": np.eye(3)}, "statistics"),
    ):
        np.savez(tmp_path / "a.npz", **arrays)
        with pytest.raises(UserError, match=said):
            read_adm_images(tmp_path / "a.npz")


def test_broken_files_are_refused(tmp_path):
    path = tmp_path / "a.npz"
    write_adm_images(path, pictures(3), 3)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(UserError, match="cannot be read"):
        read_adm_images(path)
    with pytest.raises(UserError, match="which is no file"):
        read_adm_images(tmp_path / "b.npz")
    np.savez(path, mu=np.zeros(3), sigma=np.eye(2))
    with pytest.raises(UserError, match="sigma must be"):
        read_statistics(path)

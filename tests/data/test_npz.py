import numpy as np
import pytest

from isthmus.data.opening import open_source
from isthmus.errors import UserError

IMAGES = np.random.default_rng(0).integers(0, 256, (12, 6, 8, 3), dtype=np.uint8)


def opened(path, **options):
    return open_source(f"npz:{path}", image_size=8, **options)


def saved(tmp_path, *arrays, **named):
    np.savez(tmp_path / "a.npz", *arrays, **named)
    return tmp_path / "a.npz"


def test_the_splits_hold_every_image_once(tmp_path):
    path = saved(tmp_path, IMAGES, np.arange(12) % 3)
    train, val = (opened(path, split=split, val_fraction=0.3) for split in ("train", "val"))
    found = {train.load(i).tobytes(): train.labels[i] for i in range(len(train))}
    found |= {val.load(i).tobytes(): val.labels[i] for i in range(len(val))}
    assert found == {image.tobytes(): i % 3 for i, image in enumerate(IMAGES)}
    assert len(train) + len(val) == 12 and train.class_names == ("0", "1", "2") and train.fingerprint != val.fingerprint


def test_unlabelled_and_texts_as_labels(tmp_path):
    assert opened(saved(tmp_path, IMAGES)).class_names == ()
    source = opened(saved(tmp_path, IMAGES, np.array(["dog", "cat"] * 6)), val_fraction=0.0)
    assert source.class_names == ("cat", "dog") and source.labels[:2].tolist() == [1, 0]
    only = opened(saved(tmp_path, IMAGES, np.array(["dog", "cat"] * 6)), val_fraction=0.0, classes=("dog",))
    assert len(only) == 6 and set(only.labels) == {0}


def test_grey_and_rgba(tmp_path):
    for grey in (IMAGES[..., 0], IMAGES[..., :1]):
        source = opened(saved(tmp_path, grey), val_fraction=0.0)
        np.testing.assert_array_equal(source.load(0), IMAGES[0, ..., :1].repeat(3, axis=-1))
    clear = np.concatenate([IMAGES, np.zeros_like(IMAGES[..., :1])], axis=-1)
    assert (opened(saved(tmp_path, clear)).load(0) == 255).all()
    solid = np.concatenate([IMAGES, np.full_like(IMAGES[..., :1], 255)], axis=-1)
    np.testing.assert_array_equal(opened(saved(tmp_path, solid), val_fraction=0.0).load(0), IMAGES[0])


def test_images_of_a_group_are_held_out_together(tmp_path):
    groups = np.array([f"concept {i // 3}" for i in range(12)])
    path = saved(tmp_path, IMAGES, np.arange(12) % 3, groups=groups, attribution=np.array("Drawn by us."))
    train, val = (opened(path, split=split, val_fraction=0.5) for split in ("train", "val"))
    place = {image.tobytes(): i for i, image in enumerate(IMAGES)}
    held, kept = ({groups[place[one.load(i).tobytes()]] for i in range(len(one))} for one in (val, train))
    assert held and kept and not held & kept and len(held | kept) == 4
    assert train.attribution == "Drawn by us."


def test_refusals(tmp_path):
    for arrays, said in [
        ((IMAGES.astype(np.float32),), "float32"),
        ((IMAGES.transpose(0, 3, 1, 2),), "channels last"),
        ((IMAGES[:0],), "uint8"),
        ((IMAGES, np.arange(5)), "12 integers"),
        ((IMAGES, np.full(12, -1)), "got -1"),
        ((IMAGES, np.full(12, 2)), "no image of class 0"),
        ((np.array([{}], dtype=object),), "cannot be read"),
    ]:
        with pytest.raises(UserError, match=said):
            opened(saved(tmp_path, *arrays))
    with pytest.raises(UserError, match="needs the name arr_0"):
        opened(saved(tmp_path, images=IMAGES))
    for named, said in [
        ({"groups": np.arange(5)}, "groups must hold 12 texts or integers, got int64 \\(5,\\)"),
        ({"attribution": np.array(["a", "b"])}, "attribution must be one text"),
    ]:
        with pytest.raises(UserError, match=said):
            opened(saved(tmp_path, IMAGES, **named))
    np.save(tmp_path / "a.npy", IMAGES)
    (tmp_path / "half.npz").write_bytes(saved(tmp_path, IMAGES).read_bytes()[:1000])
    for place, word in (("a.npy", "single array"), ("half.npz", "cannot be read"), ("none.npz", "existing file")):
        with pytest.raises(UserError, match=word):
            opened(tmp_path / place)

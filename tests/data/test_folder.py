import logging
import os
import sys

import numpy as np
import pytest

from isthmus.data.opening import open_source
from isthmus.errors import UserError
from tests.data.conftest import picture, save


def opened(root, cache_dir, **options):
    return open_source(f"folder:{root}", image_size=8, cache_dir=cache_dir, **options)


def both(root, cache_dir, **options):
    return [opened(root, cache_dir, split=split, **options) for split in ("train", "val")]


def contents(source):
    return {(source.labels[i], source.load(i).tobytes()) for i in range(len(source))}


def test_sub_folders_are_classes(cats_and_dogs, cache_dir):
    train, val = both(cats_and_dogs, cache_dir, val_fraction=0.3)
    assert train.class_names == val.class_names == ("cat", "dog")
    everything = {(int(i >= 10), np.asarray(picture(i)).tobytes()) for i in range(16)}
    assert contents(train) | contents(val) == everything
    assert not contents(train) & contents(val)
    assert train.flip.tolist() == [True, True] and train.name == "folder:pets"


def test_the_split_depends_on_contents_not_on_names(cats_and_dogs, cache_dir, tmp_path):
    before = contents(opened(cats_and_dogs, cache_dir, split="val", val_fraction=0.3))
    for i, file in enumerate(sorted((cats_and_dogs / "cat").iterdir())):
        file.rename(file.with_name(f"renamed{i}.png"))
    cats_and_dogs.rename(tmp_path / "moved")
    assert contents(opened(tmp_path / "moved", cache_dir, split="val", val_fraction=0.3)) == before


def test_flat_folder_is_unlabelled(tmp_path, cache_dir):
    for i in range(3):
        save(i, tmp_path / "flat" / f"{i}.png")
    train, val = both(tmp_path / "flat", cache_dir)
    assert train.class_names == () and train.num_classes == 0 and train.flip.shape == (1,)
    assert len(train) == 2 and len(val) == 1 and set(train.labels) == {0}


def test_one_image_is_used_on_both_sides(tmp_path, cache_dir, caplog):
    save(0, tmp_path / "one" / "a.png")
    train, val = both(tmp_path / "one", cache_dir)
    assert len(train) == len(val) == 1 and "too few images" in caplog.text


def test_nested_files_count_and_hidden_ones_do_not(tmp_path, cache_dir):
    root = tmp_path / "nested"
    save(0, root / "cat" / "2023" / "may" / "a.png")
    save(1, root / "cat" / "b.PNG")
    save(2, root / "cat" / ".hidden.png")
    save(3, root / ".cache" / "c.png")
    (root / "cat" / "notes.txt").write_text("not an image")
    train, val = both(root, cache_dir)
    assert len(train) + len(val) == 2 and train.class_names == ("cat",)


def test_split_folders_are_splits_not_classes(tmp_path, cache_dir, caplog):
    caplog.set_level(logging.INFO)
    for val_name in ("val", "validation", "test"):
        root = tmp_path / f"with {val_name}"
        for i in range(4):
            save(i, root / ("train" if i < 3 else val_name) / ("cat" if i % 2 else "dog") / f"{i}.png")
        (root / val_name / "dog").mkdir()  # a held-out part may lack classes
        train, val = both(root, cache_dir)
        assert train.class_names == val.class_names == ("cat", "dog")
        assert len(train) == 3 and len(val) == 1 and val.labels.tolist() == [0]
        assert f"train/ is used for training and {val_name}/" in caplog.text


def test_train_folder_alone_is_split_by_content(tmp_path, cache_dir):
    for i in range(6):
        save(i, tmp_path / "alone" / "train" / "cat" / f"{i}.png")
    train, val = both(tmp_path / "alone", cache_dir)
    assert train.class_names == ("cat",) and len(train) + len(val) == 6 and len(val) >= 1


def test_classes_choose_and_order(cats_and_dogs, cache_dir):
    turned = opened(cats_and_dogs, cache_dir, classes=("dog", "cat"))
    assert turned.class_names == ("dog", "cat")
    dogs = opened(cats_and_dogs, cache_dir, classes=("dog",))
    assert dogs.class_names == ("dog",) and set(dogs.labels) == {0} and len(dogs) <= 6


def test_broken_files_are_skipped_with_a_count_and_names(cats_and_dogs, cache_dir, caplog):
    whole = (cats_and_dogs / "cat" / "0.png").read_bytes()
    (cats_and_dogs / "cat" / "half.png").write_bytes(whole[: len(whole) // 2])
    (cats_and_dogs / "dog" / "none.jpg").write_bytes(b"")
    (cats_and_dogs / "dog" / "phone.heic").write_bytes(b"something else")
    train, val = both(cats_and_dogs, cache_dir)
    assert len(train) + len(val) == 16
    warnings = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert len(warnings) == 1 and "skipped 3 images" in warnings[0]
    assert "half.png" in warnings[0] and "none.jpg" in warnings[0] and "phone.heic" in warnings[0]
    with pytest.raises(UserError, match="3 cannot be used"):
        opened(cats_and_dogs, cache_dir, strict=True)


def test_a_reason_is_said_once_however_many_files_it_holds_for(cats_and_dogs, cache_dir, caplog):
    for i in range(7):
        (cats_and_dogs / "dog" / f"{i}.heic").write_bytes(b"\0\0\0\x18ftypheic" + bytes(99))
    opened(cats_and_dogs, cache_dir)
    (said,) = [record.message for record in caplog.records if "cannot be used" in record.message]
    assert said.count("convert it to PNG or JPEG") == 1 and "skipped 7 images" in said and "and 4 more (HEIC" in said


def test_names_that_are_no_text_are_skipped(cats_and_dogs, cache_dir, caplog):
    if sys.platform != "linux":
        pytest.skip("other systems refuse such names themselves")
    save(99, cats_and_dogs / "cat" / "99.png").rename(os.fsdecode(os.fsencode(cats_and_dogs / "cat") + b"/\xff.png"))
    train, val = both(cats_and_dogs, cache_dir)
    assert len(train) + len(val) == 16 and "not valid text" in caplog.text
    caplog.text.encode("utf-8")


def test_a_file_that_breaks_or_heals_is_noticed_at_the_next_start(cats_and_dogs, cache_dir):
    before = opened(cats_and_dogs, cache_dir, val_fraction=0.0)
    victim = cats_and_dogs / "cat" / "3.png"
    good = victim.read_bytes()
    victim.write_bytes(good[:40])
    assert len(opened(cats_and_dogs, cache_dir, val_fraction=0.0)) == len(before) - 1
    with pytest.raises(UserError, match="3.png could be read at the start"):
        before.load(next(i for i, name in enumerate(before.files) if name.endswith("cat/3.png")))
    victim.write_bytes(good)
    assert opened(cats_and_dogs, cache_dir, val_fraction=0.0).fingerprint == before.fingerprint


def test_fingerprint_follows_contents(cats_and_dogs, cache_dir, tmp_path):
    train, val = both(cats_and_dogs, cache_dir)
    assert train.fingerprint == opened(cats_and_dogs, tmp_path / "other cache").fingerprint != val.fingerprint
    save(100, cats_and_dogs / "cat" / "1.png")
    assert opened(cats_and_dogs, cache_dir).fingerprint != train.fingerprint


def test_links_in_a_circle_end(cats_and_dogs, cache_dir):
    (cats_and_dogs / "cat" / "again").symlink_to(cats_and_dogs / "cat", target_is_directory=True)
    (cats_and_dogs / "cat" / "nowhere.png").symlink_to(cats_and_dogs / "missing.png")
    train, val = both(cats_and_dogs, cache_dir)
    assert len(train) + len(val) == 16


def refusal(root, cache_dir, **options) -> str:
    with pytest.raises(UserError) as error:
        opened(root, cache_dir, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_refusals(cats_and_dogs, cache_dir, tmp_path):
    assert "existing folder" in refusal(tmp_path / "missing", cache_dir)
    assert "got the file" in refusal(cats_and_dogs / "cat" / "0.png", cache_dir)
    assert "has none" not in refusal(tmp_path, cache_dir, classes=("cta",))
    (tmp_path / "empty").mkdir()
    assert "holds no images" in refusal(tmp_path / "empty", cache_dir)
    save(0, tmp_path / "flat" / "a.png")
    assert "unlabelled" in refusal(tmp_path / "flat", cache_dir, classes=("cat",))
    assert "Did you mean cat" in refusal(cats_and_dogs, cache_dir, classes=("cta",))
    assert "named once" in refusal(cats_and_dogs, cache_dir, classes=("cat", "cat"))
    (cats_and_dogs / "fish").mkdir()
    assert "fish" in refusal(cats_and_dogs, cache_dir)
    (cats_and_dogs / "fish" / "a.png").write_bytes(b"broken")
    assert "class fish needs an image that can be read" in refusal(cats_and_dogs, cache_dir)


def test_ambiguous_trees_are_refused(tmp_path, cache_dir):
    root = tmp_path / "mixed"
    save(0, root / "cat" / "a.png")
    save(1, root / "b.png")
    assert "not both" in refusal(root, cache_dir)
    (root / "b.png").unlink()
    save(2, root / "train" / "cat" / "c.png")
    assert "split folder train/" in refusal(root, cache_dir)
    only_test = tmp_path / "only"
    save(3, only_test / "test" / "d.png")
    assert "no train folder" in refusal(only_test, cache_dir)
    strange = tmp_path / "strange"
    save(4, strange / "train" / "cat" / "e.png")
    save(5, strange / "val" / "dog" / "f.png")
    assert "dog" in refusal(strange, cache_dir)


def test_broken_files_of_a_held_out_folder_are_said_too(tmp_path, cache_dir, caplog):
    root = tmp_path / "split"
    for i in range(3):
        save(i, root / ("train" if i < 2 else "val") / f"{i}.png")
    (root / "val" / "broken.png").write_bytes(b"broken")
    train, val = both(root, cache_dir)
    assert len(train) == 2 and len(val) == 1 and "broken.png" in caplog.text

import io
import json

import numpy as np
import pytest
import torch
from PIL import Image

from isthmus.data.huggingface import StreamedBatches, hold_out, name_and_split, open_stream
from isthmus.data.opening import open_source
from isthmus.data.source import NO_LABELS, WantedColumns
from isthmus.data.token_cache import TokenCache
from isthmus.errors import UserError
from tests.data.conftest import picture, save, tiny_tokenizer

datasets = pytest.importorskip("datasets", reason="extra `data`")


def png(number: int) -> bytes:
    buffer = io.BytesIO()
    picture(number).save(buffer, format="PNG")
    return buffer.getvalue()


def table(numbers, labels=None) -> "datasets.Dataset":
    features = {"image": datasets.Image()}
    columns = {"image": [{"bytes": png(i), "path": None} for i in numbers]}
    if labels is not None:
        features["label"] = datasets.ClassLabel(names=["cat", "dog"])
        columns["label"] = labels
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))


@pytest.fixture
def saved(tmp_path):
    table(range(16), [i % 2 for i in range(16)]).save_to_disk(str(tmp_path / "table"))
    return tmp_path / "table"


def opened(path, cache_dir, **options):
    return open_source(f"hf:{path}", image_size=8, cache_dir=cache_dir, **options)


def test_names_paths_and_splits(tmp_path):
    (tmp_path / "a:b").mkdir()
    for text, name, split in [
        ("owner/name", "owner/name", None),
        ("owner/name:test", "owner/name", "test"),
        ("owner/name:train[:100]", "owner/name", "train[:100]"),
        ("C:\\data\\pets", "C:\\data\\pets", None),
        ("C:\\data\\pets:train", "C:\\data\\pets", "train"),
        ("/a/path:with/colon", "/a/path:with/colon", None),
        # an existing path wins over a split
        (f"{tmp_path}/a:b", f"{tmp_path}/a:b", None),
    ]:
        assert name_and_split(text) == (name, split)


def test_a_table_is_split_by_content(saved, cache_dir):
    train, val = (opened(saved, cache_dir, split=split, val_fraction=0.3) for split in ("train", "val"))
    found = {s.load(i).tobytes(): s.labels[i] for s in (train, val) for i in range(len(s))}
    assert found == {np.asarray(picture(i)).tobytes(): i % 2 for i in range(16)}
    assert train.class_names == ("cat", "dog") and len(train) + len(val) == 16
    assert train.fingerprint != val.fingerprint
    only = opened(saved, cache_dir, classes=("dog",), val_fraction=0.0)
    assert len(only) == 8 and set(only.labels) == {0}


def test_own_splits_and_named_splits(tmp_path, cache_dir):
    parts = {"train": table(range(4), [0, 1] * 2), "validation": table(range(4, 7), [0, 1, 1])}
    datasets.DatasetDict(parts).save_to_disk(str(tmp_path / "parts"))
    train, val = (opened(tmp_path / "parts", cache_dir, split=split) for split in ("train", "val"))
    assert len(train) == 4 and val.labels.tolist() == [0, 1, 1]
    named = opened(f"{tmp_path / 'parts'}:validation", cache_dir, val_fraction=0.0)
    assert len(named) == 3
    with pytest.raises(UserError, match="no split 'validate'.*Did you mean validation"):
        opened(f"{tmp_path / 'parts'}:validate", cache_dir)


def test_a_folder_through_datasets(tmp_path, cache_dir):
    for i in range(6):
        save(i, tmp_path / "pets" / ("cat" if i % 2 else "dog") / f"{i}.png")
    source = opened(tmp_path / "pets", cache_dir, val_fraction=0.0)
    assert source.class_names == ("cat", "dog") and len(source) == 6
    ours = open_source(f"folder:{tmp_path / 'pets'}", image_size=8, cache_dir=cache_dir, val_fraction=0.0)
    assert {source.load(i).tobytes() for i in range(6)} == {ours.load(i).tobytes() for i in range(6)}


def test_unlabelled_odd_and_broken_rows(tmp_path, cache_dir, caplog):
    grey = io.BytesIO()
    Image.fromarray(np.full((8, 8), 257 * 77, dtype=np.uint16)).save(grey, format="PNG")
    rows = [png(0), grey.getvalue(), png(1)[:30]]
    columns = {"picture": [{"bytes": row, "path": None} for row in rows]}
    features = datasets.Features({"picture": datasets.Image()})
    datasets.Dataset.from_dict(columns, features=features).save_to_disk(str(tmp_path / "odd"))
    source = opened(tmp_path / "odd", cache_dir, val_fraction=0.0)
    assert source.class_names == () and len(source) == 2
    assert (source.load(1) == 77).all()
    assert "skipped 1 images" in caplog.text and "row 2" in caplog.text
    with pytest.raises(UserError, match="1 cannot be used"):
        opened(tmp_path / "odd", cache_dir, strict=True)


def test_refusals(tmp_path, cache_dir):
    datasets.Dataset.from_dict({"text": ["a"]}).save_to_disk(str(tmp_path / "text"))
    with pytest.raises(UserError, match="column of images, got text"):
        opened(tmp_path / "text", cache_dir)
    with pytest.raises(UserError, match="could not be loaded"):
        opened(tmp_path / "text" / "dataset_info.json", cache_dir)
    with pytest.raises(UserError, match="can be streamed"):
        open_stream("folder:here")


def plain_table(images=range(16), **columns) -> "datasets.Dataset":
    """A table whose columns of labels are plain values."""
    features = {"image": datasets.Image()}
    values = {"image": [{"bytes": png(i), "path": None} for i in images]}
    return datasets.Dataset.from_dict(values, features=datasets.Features(features)).map(
        lambda row, i: {name: column[i] for name, column in columns.items()}, with_indices=True
    )


@pytest.mark.parametrize(
    ("values", "names", "column"),
    [
        (["dog", "cat"], ("cat", "dog"), "label"),
        ([10, 9], ("9", "10"), "kind"),
        ([True, False], ("False", "True"), "label"),
    ],
)
def test_texts_and_whole_numbers_are_classes(values, names, column, tmp_path, cache_dir):
    plain_table(**{column: [values[i % 2] for i in range(16)]}).save_to_disk(str(tmp_path / "t"))
    wanted = WantedColumns() if column == "label" else WantedColumns(label=column)
    train, val = (
        opened(tmp_path / "t", cache_dir, split=s, val_fraction=0.3, columns=wanted) for s in ("train", "val")
    )
    found = {s.load(i).tobytes(): s.class_names[s.labels[i]] for s in (train, val) for i in range(len(s))}
    assert found == {np.asarray(picture(i)).tobytes(): str(values[i % 2]) for i in range(16)}
    assert train.class_names == val.class_names == names
    only = opened(tmp_path / "t", cache_dir, classes=names[1:], columns=wanted)
    assert only.class_names == names[1:] and set(only.labels.tolist()) == {0}
    without = opened(tmp_path / "t", cache_dir, val_fraction=0.0, columns=WantedColumns(label=NO_LABELS))
    assert without.class_names == () and len(without) == 16


def test_the_classes_are_those_of_the_training_split(tmp_path, cache_dir):
    parts = {
        "train": plain_table(range(4), label=[30, 5, 30, 5]),
        "validation": plain_table(range(4, 6), label=[30, 30]),
    }
    datasets.DatasetDict(parts).save_to_disk(str(tmp_path / "parts"))
    val = opened(tmp_path / "parts", cache_dir, split="val")
    assert val.class_names == ("5", "30") and val.labels.tolist() == [1, 1]
    parts["validation"] = plain_table(range(4, 6), label=[30, 7])
    datasets.DatasetDict(parts).save_to_disk(str(tmp_path / "other"))
    with pytest.raises(UserError, match="7, which the split train has not"):
        opened(tmp_path / "other", cache_dir, split="val")


def test_columns_of_images_are_chosen(tmp_path, cache_dir, caplog):
    caplog.set_level("INFO", logger="isthmus")
    two = plain_table(range(4)).add_column("other", [{"bytes": png(i), "path": None} for i in range(4, 8)])
    two = two.cast_column("other", datasets.Image()).add_column("file", [png(i) for i in range(8, 12)])
    two.save_to_disk(str(tmp_path / "two"))
    for column, first in (None, 0), ("other", 4), ("file", 8):
        source = opened(tmp_path / "two", cache_dir, val_fraction=0.0, columns=WantedColumns(image=column))
        assert (source.load(0) == np.asarray(picture(first))).all()
        batch = StreamedBatches(
            open_stream(f"hf:{tmp_path / 'two'}", columns=WantedColumns(image=column)),
            image_size=8,
            seed=0,
            batch_size=2,
        )
        assert next(batch)["image"].shape[0] == 2
    assert "--image-column: other" in caplog.text


def test_columns_that_cannot_be_used_are_named(tmp_path, cache_dir, caplog):
    values = {"label": [0.5] * 16, "caption": [f"text {i}" for i in range(16)], "kind": ["a", "b"] * 8}
    plain_table(**values).save_to_disk(str(tmp_path / "t"))
    assert opened(tmp_path / "t", cache_dir).class_names == ()
    assert "label is float" in caplog.text and "--label-column: caption, kind" in caplog.text
    for columns, said in [
        (WantedColumns(label="label"), "classes, texts or whole numbers, got label, which is float"),
        (WantedColumns(label="knd"), "got knd. Did you mean kind"),
        (WantedColumns(image="kind"), "got kind, which is string"),
        (WantedColumns(image="pictures"), "--image-column must be a column"),
    ]:
        with pytest.raises(UserError, match=said):
            opened(tmp_path / "t", cache_dir, columns=columns)
    opened(tmp_path / "t", cache_dir, columns=WantedColumns(label="caption"))
    assert "16 different values in 16 images" in caplog.text
    with pytest.raises(UserError, match="--label-column name columns of hf: data, got kind"):
        open_source(f"folder:{tmp_path}", image_size=8, columns=WantedColumns(label="kind"))
    plain_table(label=["a", None] * 8).save_to_disk(str(tmp_path / "gaps"))
    with pytest.raises(UserError, match="needs a label, but label holds None"):
        opened(tmp_path / "gaps", cache_dir)


def test_a_stream_needs_its_classes_beforehand(tmp_path):
    plain_table(label=["a", "b"] * 8).save_to_disk(str(tmp_path / "t"))
    with pytest.raises(UserError, match="classes of a stream.*label.*--label-column none"):
        open_stream(f"hf:{tmp_path / 't'}")
    assert open_stream(f"hf:{tmp_path / 't'}", columns=WantedColumns(label=NO_LABELS)).class_names == ()


def rows_of(batches, count):
    taken = [next(batches) for _ in range(count)]
    return {name: torch.cat([batch[name] for batch in taken]) for name in taken[0]}


def streamed(saved, **options):
    return StreamedBatches(open_stream(f"hf:{saved}"), image_size=8, seed=0, **options)


def test_a_stream_continues_where_it_stopped(saved):
    whole = rows_of(streamed(saved, batch_size=3), 12)
    for stop in (1, 5, 9):  # within an epoch, at its end and in the next
        first = streamed(saved, batch_size=3)
        rows_of(first, stop)
        state = json.loads(json.dumps(first.state_dict()))
        rest = rows_of(streamed(saved, batch_size=3, state=state), 12 - stop)
        for name, rows in rest.items():
            assert torch.equal(rows, whole[name][3 * stop :]), name


def test_an_epoch_of_a_stream_is_shared_out_once_among_processes(saved):
    parts = [streamed(saved, batch_size=16, rank=rank, world_size=2) for rank in range(2)]
    batches = [next(part) for part in parts]
    positions = torch.cat([batch["position"] for batch in batches])
    assert sorted(positions.tolist()) == list(range(16))
    assert torch.cat([batch["class_label"] for batch in batches]).sum() == 8


def test_a_shuffled_stream_shows_other_orders_by_epoch(saved):
    batches = streamed(saved, batch_size=16, shuffle_buffer=8)
    assert not torch.equal(next(batches)["class_label"], next(batches)["class_label"])


def test_broken_images_in_a_stream(tmp_path, caplog):
    columns = {"image": [{"bytes": data, "path": None} for data in (png(0), b"broken", png(1))]}
    features = datasets.Features({"image": datasets.Image()})
    datasets.Dataset.from_dict(columns, features=features).save_to_disk(str(tmp_path / "odd"))
    batch = next(StreamedBatches(open_stream(f"hf:{tmp_path / 'odd'}"), image_size=8, seed=0, batch_size=4))
    assert batch["image"].shape == (4, 3, 8, 8) and "cannot be used" in caplog.text
    with pytest.raises(UserError, match="not an image"):
        next(StreamedBatches(open_stream(f"hf:{tmp_path / 'odd'}", strict=True), image_size=8, seed=0, batch_size=4))
    none = datasets.Dataset.from_dict({"image": [{"bytes": b"broken", "path": None}]}, features=features)
    none.save_to_disk(str(tmp_path / "none"))
    barren = open_stream(f"hf:{tmp_path / 'none'}")
    for read in (
        lambda: next(StreamedBatches(barren, image_size=8, seed=0, batch_size=1)),
        lambda: hold_out(barren, 1),
    ):
        with pytest.raises(UserError, match="no image of the stream"):
            read()


def test_what_is_held_out_of_a_stream_is_not_trained_on(saved):
    rest, kept = hold_out(open_stream(f"hf:{saved}"), 3)
    pictures = [image for image, *_ in rest.images()]
    assert [(kept.load(i) == np.asarray(picture(i))).all() for i in range(3)] == [True] * 3
    assert len(pictures) == 13 and (pictures[0] == np.asarray(picture(3))).all()
    assert kept.labels.tolist() == [0, 1, 0] and kept.class_names == ("cat", "dog")


def test_a_stream_fills_a_cache(saved, tmp_path):
    tokenizer = tiny_tokenizer()
    stream = open_stream(f"hf:{saved}")
    options = {"image_size": 8, "seed": 0, "num_views": 2, "batch_size": 5}
    with pytest.raises(UserError, match="how many images"):
        TokenCache.build(tmp_path / "tokens", tokenizer, stream, **options)
    cache = TokenCache.build(tmp_path / "tokens", tokenizer, stream, max_images=7, **options)
    assert len(cache.labels) == 7 and cache.labels.tolist() == [i % 2 for i in range(7)]
    # the stream keeps the order of the table: the same tokens come out by index
    by_index = open_source(f"hf:{saved}", image_size=8, val_fraction=0.0, cache_dir=tmp_path / "cache")
    again = TokenCache.build(tmp_path / "again", tokenizer, by_index, max_images=7, **options)
    assert (again.token_ids == cache.token_ids).all()
    everything = TokenCache.build(tmp_path / "all", tokenizer, stream, max_images=100, **options)
    assert len(everything.labels) == 16

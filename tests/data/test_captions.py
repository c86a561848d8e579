"""A caption belongs to its image, wherever it is read from and however the images are split and ordered."""

import json

import numpy as np
import pytest

from isthmus.data.captions import LONGEST_CAPTION, clean_caption
from isthmus.data.opening import open_source
from isthmus.data.source import WantedColumns
from isthmus.errors import UserError
from tests.data.conftest import picture, save

PIXELS = {np.asarray(picture(i)).tobytes(): f"picture {i}" for i in range(16)}


def opened(spec, cache_dir, **options):
    return open_source(str(spec), image_size=8, cache_dir=cache_dir, **{"val_fraction": 0.3} | options)


def told(spec, cache_dir, **options):
    """Captions by pixels of both splits, and their fingerprints."""
    sources = [opened(spec, cache_dir, split=split, **options) for split in ("train", "val")]
    pairs = [(one.load(i).tobytes(), one.captions[i]) for one in sources for i in range(len(one))]
    return dict(pairs), [one.fingerprint for one in sources]


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def test_text_files_and_metadata_belong_to_their_images(cats_and_dogs, cache_dir):
    without = [opened(f"folder:{cats_and_dogs}", cache_dir, split=split).fingerprint for split in ("train", "val")]
    assert opened(f"folder:{cats_and_dogs}", cache_dir).captions is None
    files = sorted(cats_and_dogs.rglob("*.png"), key=lambda file: int(file.stem))
    rows = [{"file_name": str(file.relative_to(cats_and_dogs)), "text": f"picture {i}"} for i, file in enumerate(files)]
    write_lines(cats_and_dogs / "metadata.jsonl", rows)
    found, described = told(f"folder:{cats_and_dogs}", cache_dir)
    assert found == PIXELS and not set(described) & set(without)
    # the nearest wins: a file of the class folder, and a text beside the image
    write_lines(cats_and_dogs / "dog" / "metadata.jsonl", [{"file_name": "12.png", "text": "nearer"}])
    files[3].with_suffix(".txt").write_text("beside\n", encoding="utf-8")
    found, other = told(f"folder:{cats_and_dogs}", cache_dir)
    pixels = list(PIXELS)
    assert found == PIXELS | {pixels[12]: "nearer", pixels[3]: "beside"} and other != described
    for file in cats_and_dogs.rglob("metadata.jsonl"):
        file.unlink()
    files[3].with_suffix(".txt").unlink()
    assert opened(f"folder:{cats_and_dogs}", cache_dir).fingerprint == without[0]


def test_arrays_and_tables(tmp_path, cache_dir):
    images = np.stack([np.asarray(picture(i)) for i in range(16)])
    np.savez(tmp_path / "a.npz", images, captions=np.array(list(PIXELS.values())))
    assert told(f"npz:{tmp_path / 'a.npz'}", cache_dir)[0] == PIXELS
    np.savez(tmp_path / "b.npz", images, captions=np.arange(16))
    with pytest.raises(UserError, match="captions must hold 16 texts, got int64"):
        opened(f"npz:{tmp_path / 'b.npz'}", cache_dir)

    datasets = pytest.importorskip("datasets", reason="extra `data`")
    files = [{"bytes": save(i, tmp_path / f"{i}.png").read_bytes(), "path": None} for i in range(16)]
    columns = {"image": files, "words": list(PIXELS.values()), "number": list(range(16))}
    datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image()).save_to_disk(str(tmp_path / "t"))
    spec = f"hf:{tmp_path / 't'}"
    found, prints = told(spec, cache_dir, columns=WantedColumns(caption="words"))
    assert found == PIXELS
    plain = opened(spec, cache_dir)
    assert plain.captions is None and plain.fingerprint not in prints
    with pytest.raises(UserError, match="texts, got number, which is int64. Others are chosen.*words"):
        opened(spec, cache_dir, columns=WantedColumns(caption="number"))


def test_odd_captions_are_mended_and_counted(cats_and_dogs, cache_dir, caplog):
    words = "long " * 2000
    odd = {
        "0": b"", "1": words.encode(), "2": "Ein Bär, 熊, دب".encode(), "3": b"a\x00\x07b\r\nc",
        "4": b"caf\xe9", "5": "\ufeffmarked".encode(), "6": "wide".encode("utf-16"), "7": b"x" * 100_000,
    }  # fmt: skip
    for name, data in odd.items():
        (cats_and_dogs / "cat" / f"{name}.txt").write_bytes(data)
    found, _ = told(f"folder:{cats_and_dogs}", cache_dir)
    captions = [found[pixels] for pixels in PIXELS]
    assert captions[0] == "" and captions[8:] == [""] * 8
    assert captions[1] == words[: LONGEST_CAPTION - 1] and len(captions[7]) == LONGEST_CAPTION
    assert captions[2:7] == ["Ein Bär, 熊, دب", "a b c", "caf\N{REPLACEMENT CHARACTER}", "marked", "wide"]
    (said,) = [record.message for record in caplog.records if record.levelname == "WARNING"]
    for part in ("8 without one", "1 empty", "2 cut to", "1 with control", "1 with letters that cannot be read"):
        assert part in said


def test_clean_captions_stay_as_they_are():
    for text in ("", "\ud800", "a \u200d b", "x " * 5000, "\x85\u2028"):
        once = clean_caption(text)
        assert clean_caption(once) == once and once.encode("utf-8") is not None and len(once) <= LONGEST_CAPTION


def test_captions_that_say_nothing_are_refused(cats_and_dogs, cache_dir):
    metadata = cats_and_dogs / "metadata.jsonl"
    for rows, said in [
        ([{"file_name": "cat/0.png", "text": " "}], "empty for all 16 images"),
        ([{"file_name": "0.png", "text": "a"}], "none of the 16 images is a file_name"),
        ([{"text": "a"}], "in line 1"),
        ([{"file_name": "cat/0.png", "text": ["a"]}], "in line 1"),
    ]:
        write_lines(metadata, rows)
        with pytest.raises(UserError, match=said):
            opened(f"folder:{cats_and_dogs}", cache_dir)
    metadata.write_text("no json\n")
    with pytest.raises(UserError, match="line 1. Mend it"):
        opened(f"folder:{cats_and_dogs}", cache_dir)
    # without any text it says other things
    write_lines(metadata, [{"file_name": "cat/0.png", "label": 3}])
    assert opened(f"folder:{cats_and_dogs}", cache_dir).captions is None


def test_a_held_out_part_of_its_own_may_be_without(tmp_path, cache_dir):
    for i in range(4):
        save(i, tmp_path / "own" / ("train" if i < 3 else "val") / f"{i}.png")
    (tmp_path / "own" / "train" / "1.txt").write_text("one")
    found, _ = told(f"folder:{tmp_path / 'own'}", cache_dir)
    assert list(found.values()) == ["", "one", "", ""]
    write_lines(tmp_path / "own" / "metadata.jsonl", [{"file_name": "train/2.png", "text": "two"}])
    found, _ = told(f"folder:{tmp_path / 'own'}", cache_dir)
    assert list(found.values()) == ["", "one", "two", ""]

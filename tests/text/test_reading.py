"""Prompts that are read once: what is remembered, in memory and on disk, is what the encoder makes of them."""

from typing import ClassVar

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close

from isthmus.text.encoders import SmallTextEncoder
from isthmus.text.pretrained import PretrainedTextEncoder
from isthmus.text.reading import FEATURES, TextReader, text_bytes
from tests.text.test_pretrained import write_network

PROMPTS = ["a red cat on the house", "", "the dog", "a blue bird in a tree", "the dog"]


class Counting(PretrainedTextEncoder):
    """Says what it read."""

    read: ClassVar[list[str]] = []

    def encode(self, prompts):
        self.read.extend(prompts)
        return super().encode(prompts)


@pytest.fixture
def encoder(tmp_path):
    Counting.read.clear()
    return Counting.from_folders(write_network("clip", tmp_path / "clip"))


def kept(encoder, folder, prompts=PROMPTS, **bounds):
    reader = TextReader(encoder, **bounds)
    reader.keep_in(folder, prompts)
    return reader


def files(folder):
    return sorted(folder.glob(f"texts-*/{FEATURES}"))


def same(one, other):
    return all(torch.equal(vars(one)[name], vars(other)[name]) for name in vars(one))


def test_an_encoder_reads_a_prompt_once(encoder):
    reader = TextReader(encoder)
    reader(["a red cat", "", "a red cat"])
    text = reader(PROMPTS)
    assert encoder.read == ["a red cat", "", "a red cat on the house", "the dog", "a blue bird in a tree"]
    at_once = encoder.encode(PROMPTS)
    assert torch.equal(text.mask, at_once.mask)
    assert_close(text.pooled, at_once.pooled)
    assert_close(text.hidden[text.mask], at_once.hidden[text.mask])
    few = TextReader(encoder, kept_bytes=1)
    assert_close(few(["the dog", ""]).pooled, encoder.encode(["the dog", ""]).pooled)


def test_what_was_kept_on_disk_is_read_by_nobody_again(encoder, tmp_path):
    first = kept(encoder, tmp_path / "c")(PROMPTS)
    assert encoder.read == list(dict.fromkeys(PROMPTS)) and len(files(tmp_path / "c")) == 1
    again = kept(encoder, tmp_path / "c")
    assert same(again(PROMPTS), first) and len(encoder.read) == 4
    # another prompt is read when it is asked for
    assert_close(again(["a tree", ""]).pooled, encoder.encode(["a tree", ""]).pooled)
    assert encoder.read[4:] == ["a tree", "a tree", ""]
    # other prompts and other weights have files of their own
    kept(encoder, tmp_path / "c", PROMPTS[:2])
    kept(SmallTextEncoder(width=12, num_layers=1), tmp_path / "c")
    assert len(files(tmp_path / "c")) == 3 and same(kept(encoder, tmp_path / "c")(PROMPTS), first)


def test_a_bound_holds_on_disk_too(encoder, tmp_path):
    prompts = [f"the {'red ' * (i % 7)}cat {i}" for i in range(100)]
    reader = kept(encoder, tmp_path / "c", prompts, kept_bytes=1)
    stored = load_file(files(tmp_path / "c")[0])
    assert len(stored["lengths"]) == 32
    assert_close(reader(prompts).pooled, encoder.encode(prompts).pooled)
    one = reader([prompts[0]])
    assert text_bytes(one) < sum(part.numel() * part.element_size() for part in stored.values()) / 8


def test_a_damaged_file_is_made_again(encoder, tmp_path, caplog):
    first = kept(encoder, tmp_path / "c")(PROMPTS)
    [path] = files(tmp_path / "c")
    whole, flipped = path.read_bytes(), bytearray(path.read_bytes())
    flipped[-3] ^= 1
    for damaged in (whole[:-20], bytes(flipped), b""):
        path.write_bytes(damaged)
        (path.parent / f".{FEATURES}.1.partial").write_bytes(b"of a process that was killed")
        caplog.clear()
        assert same(kept(encoder, tmp_path / "c")(PROMPTS), first)
        assert "are damaged" in caplog.text and path.read_bytes() == whole
        assert [one.name for one in path.parent.iterdir()] == [FEATURES]


def test_where_nothing_can_be_written_prompts_are_read_all_the_same(encoder, tmp_path, caplog):
    (tmp_path / "c").write_text("a file")
    reader = kept(encoder, tmp_path / "c")
    assert "not kept on disk" in caplog.text and not encoder.read
    assert_close(reader(PROMPTS).pooled, encoder.encode(PROMPTS).pooled)

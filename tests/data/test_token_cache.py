import json
import logging
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from isthmus.data.batches import CachedTokens, training_batches
from isthmus.data.images import Augmentation
from isthmus.data.opening import open_source
from isthmus.data.token_cache import CacheViews, TokenCache
from isthmus.errors import UserError
from tests.data.conftest import tiny_tokenizer

AUGMENT = Augmentation(resize_ratio=1.25)


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    path = tmp_path_factory.mktemp("arrays") / "a.npz"
    np.savez(path, np.random.default_rng(0).integers(0, 256, (9, 8, 10, 3), dtype=np.uint8), np.arange(9) % 2)
    return open_source(f"npz:{path}", image_size=8, val_fraction=0.0)


def built(path, tokenizer, source, **options):
    options = {"num_views": 3, "image_size": 8, "augment": AUGMENT, "seed": 4, "batch_size": 5} | options
    return TokenCache.build(path, tokenizer, source, **options)


@pytest.fixture(scope="module")
def cache(tmp_path_factory, tokenizer, source):
    return built(tmp_path_factory.mktemp("caches") / "tokens", tokenizer, source)


def test_round_trip(cache, tokenizer, source):
    views = CacheViews(source, 8, AUGMENT, seed=4, num_views=3)
    for row in range(27):
        with torch.no_grad():
            wanted = torch.cat(tokenizer.encode(views[row]["image"][None]).token_ids, dim=1)[0]
        assert cache.token_ids[row].tolist() == wanted.tolist()
    assert cache.labels.tolist() == source.labels.tolist() and cache.class_names == ("0", "1")
    assert cache.token_ids.shape == (27, 21) and cache.token_ids.dtype == np.uint16 and cache.num_views == 3


def test_views_of_an_image_differ_and_batch_size_does_not_matter(cache, tokenizer, source, tmp_path):
    images = CacheViews(source, 8, AUGMENT, seed=4, num_views=3)
    assert not torch.equal(images[0]["image"], images[1]["image"])
    again = built(tmp_path / "tokens", tokenizer, source, batch_size=27)
    assert (again.token_ids == cache.token_ids).all() and again.fingerprint == cache.fingerprint


def test_tokens_lie_in_a_memory_map_that_survives_pickling(cache):
    assert isinstance(cache.token_ids.base, np.memmap)
    data = pickle.dumps(cache)
    assert len(data) < 5000
    assert (pickle.loads(data).token_ids == cache.token_ids).all()
    assert (np.load(cache.path / "tokens.npy") == cache.token_ids).all()


def test_every_visit_takes_the_next_view(cache, source):
    tokens = CachedTokens(cache, seed=0, balanced=False)
    for position in range(36):
        sample, image_visits = tokens[position], position // 9
        row = 3 * int(sample["index"]) + image_visits % 3
        assert sample["token_ids"].tolist() == cache.token_ids[row].tolist()
        assert int(sample["class_label"]) == source.labels[int(sample["index"])] and int(sample["position"]) == position


@given(start=st.integers(0, 60), balanced=st.booleans(), world=st.sampled_from([1, 2, 4]))
def test_batches_of_tokens_obey_the_same_laws(cache, start, balanced, world):
    tokens = CachedTokens(cache, seed=1, balanced=balanced)
    alone = next(training_batches(tokens, batch_size=8, start_position=start))
    parts = [
        next(training_batches(tokens, batch_size=8, start_position=start, rank=rank, world_size=world))
        for rank in range(world)
    ]
    for name, rows in alone.items():
        assert torch.equal(torch.cat([part[name] for part in parts]), rows)
        assert torch.equal(torch.stack([tokens[start + i][name] for i in range(8)]), rows)
    assert alone["token_ids"].dtype == torch.int64


def test_size_and_time_are_said_and_a_second_build_reads(tokenizer, source, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    first = built(tmp_path / "deep" / "tokens", tokenizer, source)
    assert "9 images x 3 views x 21 tokens" in caplog.text and "MB" in caplog.text
    before = (first.path / "tokens.npy").stat().st_mtime_ns
    second = built(tmp_path / "deep" / "tokens", tokenizer, source)
    assert (second.path / "tokens.npy").stat().st_mtime_ns == before and "using" in caplog.text
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["tokens"]
    assert TokenCache.open(first.path, tokenizer).fingerprint == first.fingerprint


def test_a_cache_of_another_tokenizer_is_refused(cache, source):
    other = tiny_tokenizer(bias=0.5)
    for attempt in (lambda: TokenCache.open(cache.path, other), lambda: built(cache.path, other, source)):
        with pytest.raises(UserError, match="another tokenizer.*Delete it"):
            attempt()


def test_other_images_and_other_settings_are_refused(cache, tokenizer, source):
    with pytest.raises(UserError, match="num_views: 3, now 2"):
        built(cache.path, tokenizer, source, num_views=2)
    other = pickle.loads(pickle.dumps(source))
    other.fingerprint = "0"
    with pytest.raises(UserError, match="other images"):
        built(cache.path, tokenizer, other)


def test_an_unfinished_build_leaves_nothing(tokenizer, source, tmp_path):
    broken = pickle.loads(pickle.dumps(source))
    broken._images = broken._images[:4]
    with pytest.raises(IndexError):
        built(tmp_path / "tokens", tokenizer, broken)
    assert not list(tmp_path.iterdir())


def test_a_place_that_cannot_be_written_is_one_line(tokenizer, source, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="the token cache must be a folder"):
        built(tmp_path / "file" / "tokens", tokenizer, source)


def test_damaged_caches_are_refused(tokenizer, source, tmp_path):
    path = built(tmp_path / "tokens", tokenizer, source).path
    whole = (path / "tokens.npy").read_bytes()
    (path / "tokens.npy").write_bytes(whole[:-10])
    with pytest.raises(UserError, match="no token cache that is whole"):
        TokenCache.open(path, tokenizer)
    (path / "tokens.npy").write_bytes(whole)
    record = json.loads((path / "cache.json").read_text())
    (path / "cache.json").write_text(json.dumps(record | {"format": 99}))
    with pytest.raises(UserError, match="newer Isthmus"):
        TokenCache.open(path, tokenizer)
    (path / "cache.json").unlink()
    with pytest.raises(UserError, match="no token cache"):
        TokenCache.open(path, tokenizer)
    with pytest.raises(UserError, match="Build it first"):
        TokenCache.open(tmp_path / "none", tokenizer)


def test_max_images_ends_early(tokenizer, source, tmp_path, cache):
    few = built(tmp_path / "few", tokenizer, source, max_images=4)
    assert len(few.labels) == 4 and (few.token_ids == cache.token_ids[:12]).all()
    with pytest.raises(UserError, match="at least one"):
        built(tmp_path / "none", tokenizer, source, num_views=0)

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from isthmus.errors import UserError
from isthmus.pipelines.folder import model_folder
from isthmus.pipelines.loading import load_pipeline

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub_cache(saved, tmp_path) -> Path:
    """The hub's cache as it looks after downloading `someone/tiny` once."""
    repository = tmp_path / "hub" / "models--someone--tiny"
    shutil.copytree(saved, repository / "snapshots" / COMMIT)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    return tmp_path / "hub"


def test_a_cached_hub_model_loads_without_network(hub_cache):
    loaded = load_pipeline("someone/tiny", cache_dir=hub_cache, local_files_only=True)
    assert loaded.class_names["0"] == "face"
    with pytest.raises(UserError, match="not in the hub's cache"):
        load_pipeline("someone/else", cache_dir=hub_cache, local_files_only=True)
    with pytest.raises(UserError, match="not in the hub's cache"):
        load_pipeline("someone/tiny", revision="v2", cache_dir=hub_cache, local_files_only=True)


def test_offline_the_cache_is_enough_and_the_rest_is_one_error(hub_cache):
    # a process of its own: the variables are read when the hub's client is imported
    code = (
        "from isthmus.errors import UserError\nfrom isthmus.pipelines.folder import model_folder\n"
        "print((model_folder('someone/tiny') / 'model_index.json').is_file())\n"
        "try:\n    model_folder('someone/else')\nexcept UserError as error:\n    print(error)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(hub_cache)},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[0] == "True"
    assert "not in the hub's cache" in result.stdout.splitlines()[1] and len(result.stdout.splitlines()) == 2


def test_an_existing_path_wins_over_a_hub_id(hub_cache, saved, tmp_path, monkeypatch):
    # a name such as someone/tiny is a path only relative to where one stands
    monkeypatch.chdir(tmp_path)
    shutil.copytree(saved, tmp_path / "someone" / "tiny")
    assert model_folder("someone/tiny", cache_dir=hub_cache) == Path("someone/tiny")


def test_what_is_neither_a_path_nor_a_hub_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("nowhere", "a/b/c", "../absent", "/no/such/folder"):
        with pytest.raises(UserError, match="does not exist"):
            model_folder(name)

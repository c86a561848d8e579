import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from isthmus.errors import UserError
from isthmus.files import cache_directory, check_writable, claimed, contents, waited_for, write_whole
from isthmus.pipelines.folder import written_whole
from tests.pipelines.tiny import tiny_pipeline
from tests.pipelines.tiny_dar import tiny_dar

HOLD = """
import sys
from pathlib import Path
from isthmus.files import claimed
with claimed(Path(sys.argv[1])):
    print("mine", flush=True)
    sys.stdin.read()
"""


def test_a_claim_ends_with_its_process_however_that_ends(tmp_path):
    folder = tmp_path / "run"
    words = [sys.executable, "-c", HOLD, str(folder)]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "mine\n"
        with pytest.raises(UserError, match=f"process {holder.pid} on .* is at work in {folder}"), claimed(folder):
            pass
        holder.kill()
        holder.wait()
        # what it left is no claim
        assert (folder / ".lock").exists()
        with claimed(folder), claimed(folder):
            (folder / "work").touch()
    assert [path.name for path in folder.iterdir()] == ["work"]


def test_an_unused_claim_leaves_nothing(tmp_path):
    with pytest.raises(ValueError), claimed(tmp_path / "a" / "b"):
        raise ValueError
    assert not list(tmp_path.iterdir())


def test_those_who_wait_go_on_one_after_the_other(tmp_path):
    made = []

    def make() -> None:
        with waited_for(tmp_path / "cache", "the cache"):
            made.append(len(list(tmp_path.glob(".cache.lock"))))

    threads = [threading.Thread(target=make) for _ in range(3)]
    with waited_for(tmp_path / "cache", "the cache"):
        for thread in threads:
            thread.start()
        assert not made
    for thread in threads:
        thread.join()
    assert made == [1, 1, 1] and not list(tmp_path.iterdir())


@pytest.mark.parametrize("make", [tiny_dar, tiny_pipeline])
def test_a_pipeline_is_saved_where_no_folder_can_be_replaced(tmp_path, make, monkeypatch):
    pipeline = make()
    pipeline.save_pretrained(tmp_path / "new")
    names = {path.name for path in (tmp_path / "new").iterdir()}
    (tmp_path / "disk" / "lost+found").mkdir(parents=True)
    (tmp_path / "here").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    (tmp_path / "early").symlink_to(tmp_path / "later")
    monkeypatch.chdir(tmp_path / "here")
    for folder in (Path("."), tmp_path / "link", tmp_path / "early"):
        before = folder.stat().st_ino if folder.exists() else None
        pipeline.save_pretrained(folder)
        assert {path.name for path in contents(folder)} == names
        assert before in (None, folder.stat().st_ino), "the same folder as before"


def test_what_a_killed_writer_leaves_of_a_folder_does_not_make_it_full(tmp_path):
    with written_whole(tmp_path) as temporary:
        left = temporary.name
        (temporary / "a").write_text("a")
    (tmp_path / "a").unlink()
    (tmp_path / left).mkdir()
    with written_whole(tmp_path) as temporary:
        (temporary / "b").write_text("b")
    assert (tmp_path / "b").read_text() == "b"


def test_what_is_written_whole_into_an_empty_folder_is_all_or_nothing(tmp_path):
    with pytest.raises(ValueError), written_whole(tmp_path) as temporary:
        (temporary / "half").touch()
        raise ValueError
    assert not list(tmp_path.iterdir())


def test_where_nothing_can_be_written_is_said_before_the_work(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file is a file"):
        check_writable(tmp_path / "file" / "below")
    if Path("/proc").is_dir():
        with pytest.raises(UserError, match="can be written, got /proc"):
            check_writable(Path("/proc/isthmus"))
    check_writable(tmp_path / "a" / "b")
    assert os.listdir(tmp_path) == ["file"]


def test_what_a_killed_writer_leaves_is_no_contents(tmp_path):
    (tmp_path / ".samples.json.0a1b2c3d.partial").write_text("{")
    (tmp_path / ".partial").mkdir()
    assert contents(tmp_path) == []
    (tmp_path / "mine.txt").touch()
    assert [path.name for path in contents(tmp_path)] == ["mine.txt"]


def test_the_cache_folder_is_the_callers_then_the_environments(tmp_path):
    assert cache_directory(tmp_path / "mine") == tmp_path / "mine"
    program = "from isthmus.files import cache_directory; print(cache_directory())"
    environment = os.environ | {"ISTHMUS_CACHE": str(tmp_path / "theirs")}
    run = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == str(tmp_path / "theirs")
    # a user whose home nobody knows: the folder belongs to this user alone
    program = f"import pwd; pwd.getpwuid = {{}}.__getitem__; {program}"
    environment |= {"HOME": "nowhere", "XDG_CACHE_HOME": "", "ISTHMUS_CACHE": "", "TMPDIR": str(tmp_path)}
    run = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    found = Path(run.stdout.strip())
    assert found.parent == tmp_path and found.stat().st_mode & 0o777 == 0o700
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="ISTHMUS_CACHE"):
        cache_directory(tmp_path / "file" / "below")


def test_a_failed_write_leaves_the_old_file(tmp_path):
    def fail(file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    write_whole(tmp_path / "a", lambda file: file.write(b"old"))
    with pytest.raises(UserError, match="No space left"):
        write_whole(tmp_path / "a", fail)
    assert (tmp_path / "a").read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1

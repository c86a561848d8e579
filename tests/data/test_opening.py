import os
import subprocess
import sys
from pathlib import Path

import pytest

from isthmus.data.opening import open_source, parse_spec
from isthmus.errors import UserError
from isthmus.files import cache_directory, write_whole


def test_unknown_data_are_refused_with_the_nearest(tmp_path):
    assert parse_spec("folder:/a:b/c") == ("folder", "/a:b/c")
    for spec, said in [
        ("openmojis", "Did you mean openmoji"),
        ("foto", "Did you mean photos"),
        ("foldr:here", "Did you mean folder:"),
        ("folder:", "needs a place"),
        ("", "must be one of"),
        (str(tmp_path), f"Write folder:{tmp_path}"),
    ]:
        with pytest.raises(UserError, match=said):
            parse_spec(spec)
    for options, said in [({"split": "test"}, "train, val, got 'test'"), ({"val_fraction": 1.0}, "val_fraction")]:
        with pytest.raises(UserError, match=said):
            open_source("photos", image_size=8, **options)


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

"""Started by test_interruptions.py: commands whose files may not grow beyond a limit, as on a disk that is full."""

import contextlib
import io
import json
import resource
import sys
from pathlib import Path

from isthmus.cli import main


def attempt(words: list[str], limit: int | None, out: Path) -> dict[str, object]:
    """Exit code of a command, what it said, and the files that it left."""
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (unlimited if limit is None else limit, unlimited))
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        code = main(words)
    files = sorted(str(path.relative_to(out)) for path in out.rglob("*") if path.is_file())
    return {"code": code, "said": said.getvalue(), "files": files}


if __name__ == "__main__":
    plan = json.loads(Path(sys.argv[1]).read_text())
    print(json.dumps([attempt(step["words"], step["limit"], Path(step["out"])) for step in plan]))

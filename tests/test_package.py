"""The package as a whole: every module loads, names are where they are promised, start-up is light."""

import importlib
import pkgutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import isthmus

REPOSITORY = Path(__file__).resolve().parent.parent
# tests/test_diffusers.py imports it, which takes longer than the rest of these tests
SLOW_MODULES = {"isthmus.diffusers"}
MODULES = sorted(module.name for module in pkgutil.walk_packages(isthmus.__path__, "isthmus."))
HEAVY = (
    *("torch", "diffusers", "transformers", "accelerate", "datasets", "matplotlib", "skimage", "sklearn", "scipy"),
    "resvg_py",
)


def heavy_after(statements: str) -> list[str]:
    """Heavy libraries that a fresh interpreter has loaded after the statements."""
    report = f"import sys; print('heavy:', *[name for name in {HEAVY!r} if name in sys.modules])"
    command = [sys.executable, "-c", f"{statements}\n{report}"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1].split()[1:]


def test_every_module_loads_and_says_what_it_is():
    names = [name for name in MODULES if name not in SLOW_MODULES and not name.endswith("__main__")]
    assert [name for name in names if not (importlib.import_module(name).__doc__ or "").strip()] == []


def test_every_public_name_is_there():
    for name in isthmus.__all__:
        assert getattr(isthmus, name) is not None
        assert name in dir(isthmus)
    with pytest.raises(AttributeError, match="no attribute 'Isthmian'"):
        isthmus.Isthmian  # noqa: B018


def test_what_parses_the_command_line_loads_nothing_heavy():
    names = ("isthmus", "isthmus.errors", "isthmus.next_scale.runs", "isthmus.training.config", "isthmus.cli.train")
    assert heavy_after(f"import {', '.join(names)}") == []


def test_help_does_without_numpy():
    words = "from isthmus.cli import main; import contextlib, io, sys\nwith contextlib.redirect_stdout(io.StringIO()):"
    for asked in (["--help"], ["sample", "--help"]):
        statements = (
            f"{words}\n    try: main({asked!r})\n    except SystemExit: pass\nassert 'numpy' not in sys.modules"
        )
        assert heavy_after(statements) == []


def test_intervals_load_scipy_when_they_are_computed():
    assert "scipy" not in heavy_after("import isthmus.studies.tables as tables")
    assert "scipy" in heavy_after("import isthmus.studies.tables as tables; tables.half_width_of_mean([1.0, 2.0])")


def test_torchvision_is_required_nowhere_but_in_its_own_extra():
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    needing = [name for name, needs in extras.items() if any(need.startswith("torchvision") for need in needs)]
    assert needing == ["inception"]
    assert not any("inception" in need for needs in extras.values() for need in needs)
    assert not any(need.startswith("torchvision") for need in project["dependencies"])
    assert "torchvision" not in (REPOSITORY / "constraints.txt").read_text()


def test_constraints_pin_every_direct_dependency_that_the_suite_installs():
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = [
        *project["dependencies"],
        *(need for extra in ("demo", "data", "eval", "diffusers", "dev") for need in extras[extra]),
    ]
    names = {_bare(need) for need in wanted} - {"isthmus"}
    lines = (REPOSITORY / "constraints.txt").read_text().splitlines()
    pinned = {_bare(line) for line in lines if line and not line.startswith("#")}
    assert names <= pinned


def _bare(requirement: str) -> str:
    name = requirement
    for separator in "[<>=,":
        name = name.split(separator)[0]
    return name.strip().lower().replace("_", "-")

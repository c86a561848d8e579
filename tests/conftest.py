"""Shapes are checked at run time in every test; golden numbers are found wherever they lie."""

import json
import os
from pathlib import Path
from typing import Any

# One thread here and in every process that a test starts, whatever the caller asked for: runs are compared bit for bit
# with those of other processes, networks are tiny, and threads that wait for each other on cores that others use cost
# many times the work. Ahead of the imports: numpy and torch read these once, when they are loaded.
_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "TORCHINDUCTOR_COMPILE_THREADS")
os.environ |= dict.fromkeys(_THREADS, "1")

import hypothesis  # noqa: E402
import pytest  # noqa: E402
from jaxtyping import install_import_hook  # noqa: E402

import tests.typechecker  # noqa: E402, F401  (the hook below finds it by name)

# Before the first import of a module of ours: it rewrites them as they are loaded, which takes a while even where
# nothing is checked (`make test-quick`).
if os.environ.get("JAXTYPING_DISABLE") != "1":
    install_import_hook("isthmus", "tests.typechecker.check")

import torch  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

REPOSITORY = Path(__file__).resolve().parent.parent

# Compiling and the first call of a kernel take as long as they take: a deadline would only fail slow machines.
hypothesis.settings.register_profile("isthmus", deadline=None, max_examples=25, derandomize=True)
hypothesis.settings.load_profile("isthmus")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """What is drawn without a seed is the same whichever tests the process ran before."""
    torch.manual_seed(0)


class Golden:
    """Numbers made by the published networks: the full set where it lies beside the repository, else the part in it."""

    def __init__(self, *folders: Path):
        self.folders = folders

    def path(self, name: str) -> Path:
        """Path of a file such as ``var/vqvae_io.safetensors``; skips the test where it is absent."""
        for folder in self.folders:
            if (folder / name).is_file():
                return folder / name
        # the large fixtures are not part of the repository (tests/golden has those that fit)
        pytest.skip(f"golden file {name} is not here; set ISTHMUS_GOLDEN to the folder that has it")

    def tensors(self, name: str) -> dict[str, torch.Tensor]:
        """Contents of a safetensors file."""
        return load_file(self.path(name))

    def json(self, name: str) -> Any:
        """Contents of a JSON file."""
        return json.loads(self.path(name).read_text())


@pytest.fixture(scope="session")
def golden() -> Golden:
    """The golden numbers (`Golden`); a test that needs an absent file is skipped."""
    full = os.environ.get("ISTHMUS_GOLDEN", str(REPOSITORY.parent / "shared" / "golden"))
    return Golden(Path(full), REPOSITORY / "tests" / "golden")

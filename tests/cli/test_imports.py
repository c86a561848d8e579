"""What a command loads: the law behind commands that answer at once."""

import json
import os
import subprocess
import sys
from pathlib import Path

import PIL.Image
import PIL.ImageDraw
import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
# no command needs these, whatever the model; torch._dynamo is torch's compiler, which --compile asks for
NEVER = (
    *("diffusers", "scipy.stats", "sklearn", "sympy", "torch._dynamo", "transformers", "accelerate", "matplotlib"),
    "datasets",
)
# one process that has torch, and a copy of it for each command: importing torch takes longest
RUN_EACH = """
import json, os, sys
first, commands, watched = json.loads(sys.argv[1])
if first:
    import torch
for name, words in commands.items():
    if not (child := os.fork()):
        from isthmus.cli import main
        code = main(words)
        print("loaded:", json.dumps([name, code, [m for m in watched if m in sys.modules]]), flush=True)
        os._exit(0)
    os.waitpid(child, 0)
"""


def loaded_by(commands: dict[str, list[str]], watched: tuple[str, ...], *, first: str = "") -> dict[str, list[str]]:
    """Command -> which of the watched modules are there after it; `first` is imported before all of them."""
    given = json.dumps([first, commands, watched])
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(
        [sys.executable, "-c", RUN_EACH, given], capture_output=True, text=True, env=environment, check=True
    )
    lines = [line.removeprefix("loaded:") for line in done.stdout.splitlines() if line.startswith("loaded:")]
    rows = [json.loads(line) for line in lines]
    assert {name: code for name, code, _ in rows} == dict.fromkeys(commands, 0), done.stderr
    return {name: modules for name, _, modules in rows}


@pytest.fixture
def files(tmp_path) -> Path:
    mask = PIL.Image.new("L", (8, 8), 255)
    PIL.ImageDraw.Draw(mask).rectangle((0, 0, 3, 7), fill=0)
    mask.save(tmp_path / "mask.png")
    PIL.Image.new("RGB", (8, 8), "red").save(tmp_path / "image.png")
    PIL.Image.new("RGB", (4, 4), "red").save(tmp_path / "small.png")
    return tmp_path


def test_drawing_loads_torch_and_nothing_else_that_is_heavy(model, dar_model, files):
    image, mask, out = f"{files}/image.png", f"{files}/mask.png", str(files / "out")
    commands = {
        "sample": ["sample", str(model), "--num", "2", "--grid", "--strip", "--out", f"{out}-1"],
        "sample dar": ["sample", str(dar_model), "--num", "2", "--grid", "--strip", "--out", f"{out}-2"],
        "sample dar with a layout": [
            *("sample", str(dar_model), "--num", "1", "--out", f"{out}-3"),
            *("--prefix-image", image, "--prefix-tokens", "4"),
        ],
        "inpaint": ["edit", "inpaint", str(model), "--image", image, "--mask", mask, "--out", f"{out}-4"],
        "outpaint": ["edit", "outpaint", str(model), "--image", image, "--right", "4", "--out", f"{out}-5"],
        "super-resolve": ["edit", "super-resolve", str(model), "--image", f"{files}/small.png", "--out", f"{out}-6"],
        "variations": ["edit", "variations", str(model), "--image", image, "--from-scale", "1", "--out", f"{out}-7"],
    }
    assert loaded_by(commands, NEVER, first="torch") == dict.fromkeys(commands, [])


def test_describing_loads_no_torch(model, dar_model):
    commands = {
        "info": ["info", str(model)],
        "info dar": ["info", str(dar_model)],
        "card": ["info", str(model), "--card"],
        "data": ["info", "data"],
        "presets": ["info", "presets"],
        "help": ["sample", "--help"],
        "help of a training": ["train", "prior", "--help"],
    }
    assert loaded_by(commands, ("torch", *NEVER)) == dict.fromkeys(commands, [])

"""Every command of README.md and the guides, run in its order on a folder of tiny pictures; their links."""

import json
import os
import re
import shlex
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from dino_sparo.__main__ import command_and_rest, main
from dino_sparo.data.shapes import SHAPES_SIZES
from dino_sparo.models import build_encoder
from dino_sparo.study import training as studies
from tests.running import finished
from tests.slurm import ROOT, slurm_environment
from tests.tiny import TINY, write_pictures

pytestmark = pytest.mark.long
PAGES = (
    "README.md",
    "configs/README.md",
    "eval/README.md",
    "dino_sparo/slots/README.md",
    "dino_sparo/interop/README.md",
    "dino_sparo/data/README.md",
    "scripts/README.md",
)
PROGRAMS = ("dino-sparo ", "slots ", "scripts/", "torchrun ", "sbatch ", "tensorboard ", "python ")
NOT_HERE = {
    "scripts/test.sh": "this test is a part of it",
    "scripts/gpu_acceptance.sh DATA": "needs a GPU",
}
ARCH = {"width": 64, "depth": 3, "num_heads": 1}  # a head has 64 numbers in official files
SMALL = {key: value for key, value in TINY.items() if not key.startswith("model.arch")} | {
    "model.arch": json.dumps(ARCH),
    "model.readout.slot_dim": "8",  # the variants of a study have eight heads
    "optim.epochs": "1",
    "optim.warmup_epochs": "0",
    "data.max_images": "16",
}
# What makes each command small enough; it is not added where the command says otherwise.
LESS = {
    **dict.fromkeys(("pretrain", "check", "demo"), SMALL),
    "study": SMALL | {"monitor.knn_every_epochs": "1", "train_fractions": "[1.0]"},
    "linear": {"epochs": "1", "batch_size": "4", "num_workers": "0"},
    "knn": {"num_workers": "0"},
    "bench": {
        **{"rounds": "1", "batch_size": "2", "num_images": "2", "seconds": "0.1", "num_workers": "0"},
        "num_tokens": "5",
    },
    "slots mask": {"epochs": "1"},
    "slots factors": {"num_images": "200"},
}
PLACES = {"/data/imagenet": "data", "DIR2": "data", "DIR": "data", "RUN": "runs/sparo", "NAME": "other"}
FEWER = {
    **{"--nproc 8": "--nproc 2", "--nproc-per-node 8": "--nproc-per-node 2"},
    "bench --config imagenet_vits16_sparo": "bench --config demo",
    "--vary seed=0,1": "--vary seed=0",  # two seeds of three, one of two
}


def commands(page: str) -> list[str]:
    """What a page tells to type: the lines of its bash blocks, and commands within its text."""
    text = (ROOT / page).read_text()
    blocks = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    lines = [line.partition("  #")[0].strip() for block in blocks for line in block.splitlines()]
    spans = re.findall(r"`([^`]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    spans = [" ".join(span.split()) for span in spans]
    whole = [span for span in spans if span.startswith(PROGRAMS) and re.search(r" (--|[A-Z]{3}|runs/)", span)]
    return [f"dino-sparo {line}" if line.startswith("slots ") else line for line in [*lines, *whole] if line]


def as_run_here(command: str) -> list[str]:
    """The command on tiny pictures, small enough for two cores."""
    for large, small in FEWER.items():
        command = command.replace(large, small)
    words = [re.sub("|".join(PLACES), lambda found: PLACES[found[0]], word) for word in shlex.split(command)]
    words = [str(ROOT / word) if word.startswith(("scripts/", "eval/")) else word for word in words]
    program, *rest = words
    if program == "tensorboard":
        return [*words, "--inspect"]  # reads what it would show, and ends
    if program == "dino-sparo":
        name, given = command_and_rest(rest)
        return [program, *name.split(), *given, *less(name, given)]
    if program == "python":
        return [sys.executable, *words[1:], *less(Path(words[1]).stem, words)]
    return [*words, *less("pretrain", words)]  # a launcher


def less(name: str, given: list[str]) -> list[str]:
    keys = {word.partition("=")[0].removeprefix("--").replace("-", "_") for word in given}
    cls = {"imagenet_vits16_dino", "continue_vits16"} & {*given}
    without = "model.readout." if cls else None  # cls takes none of these
    return [
        f"--{key}={value}"
        for key, value in LESS.get(name, {}).items()
        if key not in keys and not (without and key.startswith(without))
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Where a reader of the pages may be: a folder with images and an official file."""
    folder = tmp_path_factory.mktemp("reader")
    write_pictures(folder / "data", 60, classes=2)
    for number, name in enumerate(("one.jpg", "another.jpg")):
        Image.new("RGB", (64, 48), (99 * number, 50, 200)).save(folder / name)
    encoder = build_encoder(ARCH, 8, 16, "cls")
    torch.save(encoder.backbone.state_dict(), folder / "dino_deitsmall16_pretrain.pth")
    linear = {"module.linear.weight": torch.randn(2, 3 * 64), "module.linear.bias": torch.zeros(2)}
    torch.save({"state_dict": linear, "epoch": 100}, folder / "dino_deitsmall16_linearweights.pth")
    return folder


@pytest.fixture(scope="module")
def environment(tmp_path_factory) -> dict[str, str]:
    slurm = slurm_environment(tmp_path_factory.mktemp("slurm"))
    return {**slurm, "PATH": f"{Path(sys.executable).parent}:{slurm['PATH']}"} | {
        "NPROC": "2",
        "OMP_NUM_THREADS": "1",
    }


@pytest.fixture(autouse=True)
def less_of_all(monkeypatch) -> None:
    for split in SHAPES_SIZES:
        monkeypatch.setitem(SHAPES_SIZES, split, 60)
    monkeypatch.setattr(studies, "EPOCHS", 1)


@pytest.mark.parametrize(
    ("number", "command"), [*enumerate(dict.fromkeys(c for page in PAGES for c in commands(page)))]
)
def test_command(number, command, folder, environment, monkeypatch):
    """In this process, unless it starts others."""
    if command in NOT_HERE:
        pytest.skip(NOT_HERE[command])
    words = [word.replace("OUT", f"out{number}") for word in as_run_here(command)]
    if words[0] == "dino-sparo" and "--nproc" not in words:
        monkeypatch.chdir(folder)
        assert main(words[1:]) == 0, shlex.join(words)
        return
    done = finished(words, cwd=folder, env=os.environ | environment)
    assert done.returncode == 0, f"{shlex.join(words)}\n{done.stderr[-3000:]}"


@pytest.mark.parametrize(
    "example",
    [e for page in PAGES for e in re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)],
)
def test_python_example(example, folder, monkeypatch):
    monkeypatch.chdir(folder)
    exec(example, {"__name__": "__main__"})

"""Images of colored noise, a tiny encoder, and the linear probe on them."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from dino_sparo.cli import evaluating
from dino_sparo.cli.pretraining import pretrain
from dino_sparo.evaluation.classifiers import load_classifier
from dino_sparo.evaluation.results import read_results
from tests.tiny import parse_options, tiny_options, write_pictures

CLASSES = ("blue", "green", "red")
NUM_TRAIN, NUM_VAL, BATCH_SIZE = 22, 7, 8  # two steps an epoch, six images dropped
OFFICIAL = "3 blocks both lr 0.001"


def write_colors(folder: Path, count: int, classes: tuple[str, ...] = CLASSES) -> None:
    """Class folders of images of noise, each class of one color."""
    rng = np.random.default_rng(count)
    for number in range(count):
        name = classes[number % len(classes)]
        pixels = rng.integers(0, 120, (20, 28, 3), dtype=np.uint8)
        pixels[..., ("red", "green", "blue").index(name)] += 130
        path = folder / name / f"{number:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)


def write_data(folder: Path) -> Path:
    write_colors(folder / "train", NUM_TRAIN)
    write_colors(folder / "val", NUM_VAL)
    return folder


def pretrained_run(folder: Path) -> Path:
    """A complete tiny run and its pictures."""
    write_pictures(folder / "data", 8)
    changes = {"optim__epochs": 1, "optim__warmup_epochs": 0}
    pretrain(tiny_options(folder / "data", folder / "run", **changes))
    return folder / "run"


def arguments(run: Path, data: Path, out: Path, **changes) -> list[str]:
    given = {"epochs": 3, "batch_size": BATCH_SIZE, "num_workers": 0, "device": "cpu", "out": out}
    given |= {"run": run, "data.path": data, "cache": out.parent / "cache"} | changes
    return [f"--{key}={value}" for key, value in given.items()]


def options(run: Path, data: Path, out: Path, **changes) -> evaluating.LinearOptions:
    return parse_options(evaluating.LinearOptions, arguments(run, data, out, **changes), usage="")


def linear(run: Path, data: Path, out: Path, **changes) -> list:
    """Run the command; returns its results."""
    evaluating.linear(options(run, data, out, **changes))
    return read_results(out)


def weights(folder: Path, name: str = OFFICIAL) -> tuple[torch.Tensor, torch.Tensor]:
    saved = load_classifier(folder / "classifiers" / f"{name.replace(' ', '_')}.safetensors")
    return saved.weight, saved.bias

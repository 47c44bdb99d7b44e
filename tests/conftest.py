"""Golden arrays and small models shared by the tests."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

# Only fixtures import what imports torch, which the process that distributes the tests does not need.

GOLDEN = Path(__file__).parent / "golden"


def load_golden_arrays(name: str) -> dict[str, np.ndarray]:
    """The arrays of tests/golden/<name>.npz by name."""
    with np.load(GOLDEN / f"{name}.npz", allow_pickle=False) as arrays:
        return dict(arrays)


@pytest.fixture
def golden() -> Callable[[str], dict[str, np.ndarray]]:
    return load_golden_arrays


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory) -> None:
    os.environ["DINO_SPARO_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    os.environ["HF_DATASETS_CACHE"] = str(tmp_path_factory.mktemp("datasets"))


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory) -> Path:
    """A tiny run that has ended, beside its images in `data`."""
    from dino_sparo.cli.pretraining import pretrain
    from tests.tiny import tiny_options, write_pictures

    folder = tmp_path_factory.mktemp("run")
    write_pictures(folder / "data", 4)
    pretrain(tiny_options(folder / "data", folder / "run"))
    return folder / "run"


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """Pictures of one class, three steps an epoch of a tiny run."""
    from tests.tiny import write_pictures

    write_pictures(folder := tmp_path_factory.mktemp("pictures"), 12)
    return folder


@pytest.fixture
def data(tmp_path) -> Path:
    """Pictures of two classes with val, which is the same as train."""
    from tests.tiny import write_pictures

    write_pictures(tmp_path / "data", 24, classes=2)
    shutil.copytree(tmp_path / "data" / "train", tmp_path / "data" / "val")
    return tmp_path / "data"


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    import torch

    torch.manual_seed(0)


@pytest.fixture
def horizontal_first(monkeypatch):
    """Image.resize as it was up to Pillow 12."""
    resize = Image.Image.resize

    def in_order(self, size, resample=None):
        return resize(resize(self, (size[0], self.height), resample), size, resample)

    monkeypatch.setattr(Image.Image, "resize", in_order)


@pytest.fixture(scope="session")
def slot_runs(tmp_path_factory) -> dict[str, Path]:
    """Pictures of three classes, others of two, a run with three slots, and one without, 16 numbers wide."""
    from dino_sparo.__main__ import main
    from tests.tiny import CLS, tiny_arguments, write_pictures

    folder = tmp_path_factory.mktemp("slot_runs")
    write_pictures(folder / "data", 60, classes=3)
    write_pictures(folder / "other", 40, classes=2)
    for name, changes in {"sparo": {"model__readout__num_slots": 3}, "cls": CLS}.items():
        settings = {"optim__epochs": 1, "optim__global_batch_size": 24} | changes
        assert main(["pretrain", *tiny_arguments(folder / "data", folder / name, **settings)]) == 0
    return {name: folder / name for name in ("data", "other", "sparo", "cls")}

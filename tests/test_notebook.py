"""The package as a notebook uses it."""

import multiprocessing
import signal
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image

import dino_sparo
from dino_sparo.errors import StoppedError
from dino_sparo.parallel.processes import STOP_SIGNALS
from dino_sparo.training import pretrain as room
from tests.tiny import TINY, write_pictures


def handlers() -> list[object]:
    return [signal.getsignal(number) for number in STOP_SIGNALS]


def test_pretraining_twice_in_one_process_also_in_a_thread(tmp_path):
    write_pictures(tmp_path / "data", 4)
    before = handlers()

    def train(name: str, epochs: int) -> dino_sparo.Encoder:
        return dino_sparo.pretrain(
            "demo", tmp_path / "data", tmp_path / name, TINY | {"optim.epochs": epochs}
        )

    first = train("one", 1)
    again = train("one", 1)  # is complete
    with ThreadPoolExecutor(1) as threads:
        other = threads.submit(train, "other", 1).result()
    assert handlers() == before
    for one in (again, other):
        assert all(map(torch.equal, first.state_dict().values(), one.state_dict().values()))


def test_an_interrupted_notebook_can_be_interrupted_again(tmp_path, monkeypatch):
    write_pictures(tmp_path / "data", 4)
    before, prepare = handlers(), room.on_device

    def interrupted(*arguments):
        signal.raise_signal(signal.SIGINT)
        return prepare(*arguments)

    monkeypatch.setattr(room, "on_device", interrupted)
    children = set(multiprocessing.active_children())
    with pytest.raises(StoppedError, match="stopped by SIGINT after step 0 of 3") as kept:
        dino_sparo.pretrain("demo", tmp_path / "data", tmp_path / "run", TINY | {"machine.num_workers": 1})
    assert handlers() == before
    assert kept and set(multiprocessing.active_children()) <= children  # a notebook keeps the exception


@torch.no_grad()
def test_a_loaded_encoder_takes_images_by_its_transform_or_a_folder(run_dir):
    encoder = dino_sparo.load_encoder(run_dir)
    files = sorted((run_dir.parent / "data").rglob("*.png"))
    images = torch.stack([encoder.transform(file) for file in files])
    assert images.shape == (4, 3, encoder.image_size, encoder.image_size) and images.dtype == torch.float32
    assert torch.equal(images[0], encoder.transform(Image.open(files[0])))
    features = dino_sparo.embed(encoder, run_dir.parent / "data")
    np.testing.assert_allclose(features, encoder(images), atol=1e-5)

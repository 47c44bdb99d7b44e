"""Unreadable files and the order of batches."""

import os
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dino_sparo.data.loader import BatchOrder, Crops, CropsDataset, UnreadableImage, crop_batches
from dino_sparo.data.sources import FolderSource, open_images
from dino_sparo.data.views import crop_recipes
from dino_sparo.errors import UserError

VIEWS = {
    "global_size": 16,
    "global_scale": (0.4, 1.0),
    "local_size": 8,
    "local_scale": (0.05, 0.4),
    "num_local_crops": 2,
    "flip_probability": 0.5,
    "jitter_probability": 0.8,
    "jitter_strength": (0.4, 0.4, 0.2, 0.1),
    "grayscale_probability": 0.2,
    "blur_probability": (1.0, 0.1, 0.5),
    "blur_radius": (0.1, 1.0),
    "solarize_probability": (0.0, 0.2, 0.0),
}


def source_of(root: Path, *files: str) -> FolderSource:
    return FolderSource(root, files, None, ())


# --- Unreadable files


def write_unreadable(path: Path, kind: str) -> None:
    if kind == "truncated":
        noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(noise).save(path)
        path.write_bytes(path.read_bytes()[:-2000])
    else:
        path.write_bytes({"empty": b"", "html": b"<!DOCTYPE html><title>404</title>"}[kind])


def crops_of(source: FolderSource) -> CropsDataset:
    return CropsDataset(source, crop_recipes(**VIEWS), seed=3)


@pytest.mark.parametrize("kind", ["empty", "truncated", "html"])
def test_unreadable_image_is_named(tmp_path, kind):
    write_unreadable(tmp_path / "bad.jpg", kind)
    item = crops_of(source_of(tmp_path, "bad.jpg"))[0, 0]
    assert isinstance(item, UnreadableImage)
    with pytest.raises(UserError, match="repair or remove") as caught:
        item.raise_error()
    assert str(caught.value).startswith(f"{tmp_path / 'bad.jpg'}: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_batch_with_an_unreadable_image_names_it(tmp_path, pictures, num_workers):
    write_unreadable(tmp_path / "bad.jpg", "truncated")
    os.link(pictures.name(0), tmp_path / "good.png")
    batches = batches_of(source_of(tmp_path, "good.png", "bad.jpg"), batch_size=2, num_workers=num_workers)
    batch = next(iter(batches))
    assert isinstance(batch, UnreadableImage)
    with pytest.raises(UserError, match=r"bad\.jpg"):
        batch.raise_error()


# --- Batches


@pytest.fixture
def pictures(tmp_path) -> FolderSource:
    rng = np.random.default_rng(1)
    (tmp_path / "pictures").mkdir()
    for number in range(7):
        pixels = rng.integers(0, 256, (20 + number, 30, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "pictures" / f"{number}.png")
    return open_images(str(tmp_path / "pictures"))


def batches_of(source: FolderSource, *, batch_size: int, num_workers: int):
    order = BatchOrder(num_samples=len(source), batch_size=batch_size, epochs=1, seed=3)
    return crop_batches(
        crops_of(source), order, num_workers=num_workers, prefetch_batches=2, pin_memory=False
    )


def test_number_of_workers_changes_nothing(pictures):
    alone, shared = ([*batches_of(pictures, batch_size=3, num_workers=n)] for n in (0, 2))
    assert len(alone) == len(shared) == 2
    for one, other in zip(alone, shared, strict=True):
        assert isinstance(one, Crops)
        assert one.global_crops.shape == (2, 3, 3, 16, 16) and one.local_crops.shape == (2, 3, 3, 8, 8)
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    assert not torch.equal(alone[0].global_crops, alone[1].global_crops)


def order_of(first_step: int = 0, seed: int = 0) -> BatchOrder:
    return BatchOrder(num_samples=11, batch_size=3, epochs=4, seed=seed, first_step=first_step)


def test_order_drops_the_last_partial_batch_and_differs_between_epochs():
    batches = list(order_of())
    assert len(batches) == len(order_of()) == 4 * 3
    assert {len(batch) for batch in batches} == {3}
    epochs = [[*chain(*batches[e * 3 : e * 3 + 3])] for e in range(4)]
    for number, epoch in enumerate(epochs):
        assert {e for e, _ in epoch} == {number}
        samples = [sample for _, sample in epoch]
        assert len(set(samples)) == 9 and set(samples) <= set(range(11))
    assert len({tuple(sample for _, sample in epoch) for epoch in epochs}) == 4
    assert batches != list(order_of(seed=1))


@pytest.mark.parametrize("first_step", range(13))
def test_order_goes_on_from_any_step(first_step):
    assert list(order_of(first_step)) == list(order_of())[first_step:]
    assert len(order_of(first_step)) == 12 - first_step

"""Unreadable files and the order of batches."""

import os
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dino_sparo.data.decode import UnreadableImageError
from dino_sparo.data.loader import BatchOrder, Crops, CropsDataset, crop_batches
from dino_sparo.data.sources import ImageSource, open_images
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


# --- Unreadable files


def write_unreadable(path: Path, kind: str) -> None:
    if kind == "truncated":
        noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(noise).save(path)
        path.write_bytes(path.read_bytes()[:-2000])
    else:
        path.write_bytes({"empty": b"", "html": b"<!DOCTYPE html><title>404</title>"}[kind])


def crops_of(source: ImageSource, *, substitute: bool = False) -> CropsDataset:
    return CropsDataset(source, crop_recipes(**VIEWS), seed=3, substitute=substitute)


@pytest.mark.parametrize("kind", ["empty", "truncated", "html"])
def test_unreadable_image_is_named(tmp_path, kind):
    write_unreadable(tmp_path / "bad.jpg", kind)
    with pytest.raises(UserError, match="repair or remove") as caught:
        crops_of(open_images(str(tmp_path)))[0, 0]
    assert str(caught.value).startswith(f"{tmp_path / 'bad.jpg'}: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_batch_with_an_unreadable_image_names_it(tmp_path, pictures, num_workers):
    (tmp_path / "two").mkdir()
    write_unreadable(tmp_path / "two" / "bad.jpg", "truncated")
    os.link(pictures.name(0), tmp_path / "two" / "good.png")
    batches = batches_of(open_images(str(tmp_path / "two")), batch_size=2, num_workers=num_workers)
    with pytest.raises(
        UnreadableImageError, match=r"bad\.jpg: the image cannot be read \(.*truncated"
    ) as caught:
        next(iter(batches))
    assert "\n" not in str(caught.value) and caught.value.name == str(tmp_path / "two" / "bad.jpg")


# --- Batches


@pytest.fixture
def pictures(tmp_path) -> ImageSource:
    rng = np.random.default_rng(1)
    (tmp_path / "pictures").mkdir()
    for number in range(7):
        pixels = rng.integers(0, 256, (20 + number, 30, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "pictures" / f"{number}.png")
    return open_images(str(tmp_path / "pictures"))


def batches_of(source: ImageSource, *, batch_size: int, num_workers: int, substitute: bool = False):
    order = BatchOrder(num_samples=len(source), global_batch_size=batch_size, epochs=1, seed=3)
    return crop_batches(
        crops_of(source, substitute=substitute),
        order,
        num_workers=num_workers,
        prefetch_batches=2,
        pin_memory=False,
        timeout_seconds=60,
    )


def test_number_of_workers_changes_nothing(pictures):
    alone, shared = ([*batches_of(pictures, batch_size=3, num_workers=n)] for n in (0, 2))
    assert len(alone) == len(shared) == 2
    for one, other in zip(alone, shared, strict=True):
        assert isinstance(one, Crops)
        assert one.global_crops.shape == (2, 3, 3, 16, 16) and one.local_crops.shape == (2, 3, 3, 8, 8)
        assert all(torch.equal(a, b) for a, b in zip(one[:2], other[:2], strict=True))
    assert not torch.equal(alone[0].global_crops, alone[1].global_crops)


def order_of(first_step: int = 0, seed: int = 0) -> BatchOrder:
    return BatchOrder(num_samples=11, global_batch_size=3, epochs=4, seed=seed, first_step=first_step)


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


@pytest.mark.parametrize(("processes", "accumulation"), [(1, 2), (2, 1), (2, 3), (4, 1), (3, 2)])
def test_processes_and_micro_batches_make_the_same_global_batches(processes, accumulation):
    common = {"num_samples": 31, "global_batch_size": 12, "epochs": 2, "seed": 5, "first_step": 1}
    reference = list(BatchOrder(**common))
    assert len(reference) == 3
    parts = [
        list(BatchOrder(**common, rank=r, world_size=processes, accumulation=accumulation))
        for r in range(processes)
    ]
    for step, batch in enumerate(reference):
        mine = [part[step * accumulation : (step + 1) * accumulation] for part in parts]
        assert {len(micro) for micros in mine for micro in micros} == {12 // (processes * accumulation)}
        assert [*chain(*chain(*mine))] == batch


# --- Images that stand in


def folder_with_bad_ones(folder: Path, good: ImageSource, bad: int) -> ImageSource:
    folder.mkdir()
    for number in range(len(good)):
        os.link(good.name(number), folder / f"good{number}.png")
    for number in range(bad):
        write_unreadable(folder / f"bad{number}.jpg", "html")
    return open_images(str(folder))


def test_another_image_stands_in_whatever_the_number_of_workers(tmp_path, pictures):
    source = folder_with_bad_ones(tmp_path / "some", pictures, bad=2)
    alone, shared = ([*batches_of(source, batch_size=3, num_workers=n, substitute=True)] for n in (0, 2))
    for one, other in zip(alone, shared, strict=True):
        assert torch.equal(one.global_crops, other.global_crops) and one.replaced == other.replaced
    names = {name for batch in alone for name, _ in batch.replaced}
    assert names == {str(tmp_path / "some" / f"bad{n}.jpg") for n in range(2)}


def test_what_stands_in_changes_with_the_epoch(tmp_path, pictures):
    dataset = crops_of(folder_with_bad_ones(tmp_path / "some", pictures, bad=1), substitute=True)
    assert dataset.source.name(0).endswith("bad0.jpg")
    drawn = [dataset[epoch, 0] for epoch in (0, 0, 1, 2, 3)]
    assert torch.equal(drawn[0].made[0], drawn[1].made[0])
    sizes = [crops_of(dataset.source)[0, n].made[0].float().mean() for n in range(1, 8)]
    assert len(set(sizes)) == 7  # the pictures differ, so do the stand-ins of four epochs:
    assert len({item.made[0].float().mean().item() for item in drawn}) > 1


def test_stand_ins_are_bounded(tmp_path):
    (tmp_path / "all").mkdir()
    for number in range(3):
        write_unreadable(tmp_path / "all" / f"bad{number}.jpg", "html")
    with pytest.raises(UnreadableImageError, match=r"bad1\.jpg"):
        crops_of(open_images(str(tmp_path / "all")), substitute=True)[0, 1]

"""The order of batches, and files that cannot be read."""

from itertools import chain
from pathlib import Path

import pytest
import torch

from dino_sparo.data.decode import UnreadableImageError
from dino_sparo.data.loader import BatchOrder, Crops, CropsDataset, crop_batches
from dino_sparo.data.sources import ImageSource, open_images
from tests.pictures import photo, recipes


def write(folder: Path, good: int, bad: int = 0) -> ImageSource:
    """So many different pictures, after so many files that are none."""
    folder.mkdir()
    for number in range(bad):
        (folder / f"bad{number}.jpg").write_bytes(b"<!DOCTYPE html><title>404</title>")
    for number in range(good):
        photo(20 + number, 30, seed=number).save(folder / f"good{number}.png")
    return open_images(str(folder))


def dataset_of(source: ImageSource, *, substitute: bool = False) -> CropsDataset:
    return CropsDataset(source, recipes(16, 8), seed=3, substitute=substitute)


def batches_of(source: ImageSource, *, num_workers: int, substitute: bool = False) -> list[Crops]:
    loader = crop_batches(
        dataset_of(source, substitute=substitute),
        BatchOrder(num_samples=len(source), global_batch_size=3, epochs=1, seed=3),
        num_workers=num_workers,
        prefetch_batches=2,
        pin_memory=False,
        timeout_seconds=60,
    )
    with loader.failures_explained():
        return list(loader)


# --- The order of batches


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
        assert [sample for _, sample in batch] == BatchOrder(**common).global_batch(step + 2)


# --- Batches


@pytest.mark.parametrize("bad", [0, 2])
def test_number_of_workers_changes_nothing(tmp_path, bad):
    source = write(tmp_path / "data", 7, bad)
    alone, shared = (batches_of(source, num_workers=n, substitute=bad > 0) for n in (0, 2))
    for one, other in zip(alone, shared, strict=True):
        assert one.global_crops.shape == (2, 3, 3, 16, 16) and one.local_crops.shape == (2, 3, 3, 8, 8)
        assert all(torch.equal(a, b) for a, b in zip(one[:2], other[:2], strict=True))
        assert one.replaced == other.replaced
    assert not torch.equal(alone[0].global_crops, alone[1].global_crops)
    names = {name for batch in alone for name, _ in batch.replaced}
    assert names == {str(tmp_path / "data" / f"bad{n}.jpg") for n in range(bad)}


@pytest.mark.parametrize("num_workers", [0, 2])
def test_batch_with_an_unreadable_image_names_it(tmp_path, num_workers):
    source = write(tmp_path / "data", 8, bad=1)
    with pytest.raises(
        UnreadableImageError, match=r"bad0\.jpg: the image cannot be read \(not a known"
    ) as caught:
        batches_of(source, num_workers=num_workers)
    assert "\n" not in str(caught.value) and caught.value.name == str(tmp_path / "data" / "bad0.jpg")


def test_what_stands_in_changes_with_the_epoch(tmp_path):
    dataset = dataset_of(write(tmp_path / "data", 7, bad=1), substitute=True)
    drawn = [dataset[epoch, 0] for epoch in (0, 0, 1, 2, 3)]
    assert torch.equal(drawn[0].made[0], drawn[1].made[0])
    assert len({item.made[0].float().mean().item() for item in drawn}) > 1


def test_stand_ins_are_bounded(tmp_path):
    with pytest.raises(UnreadableImageError, match=r"bad1\.jpg"):
        dataset_of(write(tmp_path / "data", 0, bad=3), substitute=True)[0, 1]

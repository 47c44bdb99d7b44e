"""Folder, shards and parquet files of the same images give the same results."""

import numpy as np
import pytest
import torch

from dino_sparo.cli.pretraining import pretrain
from dino_sparo.data.loader import BatchOrder, CropsDataset, crop_batches
from dino_sparo.data.sources import ImageSource, open_images, open_labeled, open_val
from dino_sparo.runs.checkpoint import load_latest
from dino_sparo.shard import shard
from tests.containers import parquet_of, write_parquet
from tests.pictures import recipes
from tests.shard_files import picture, shards_of, write
from tests.tiny import state_hash, tiny_options

NAMES = ("a/1.jpg", "a/10.PNG", "a/2.Jpeg", "b b/ü.png", "b b/x.bmp", "c/1.webp", "c/2.png")


@pytest.fixture(scope="module")
def containers(tmp_path_factory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("containers")
    write(root / "folder" / "train", *NAMES)
    write(root / "folder" / "val", "a/v.png", "b b/v.png", "c/v.png", size=(21, 33))
    parquet_of(root / "folder", root / "parquet")
    shards_of(root / "folder", root / "shards")
    shards_of(root / "parquet", root / "shards_of_parquet")
    kinds = ("folder", "shards", "parquet", "shards_of_parquet")
    return {kind: str(root / kind) for kind in kinds}


OTHERS = pytest.mark.parametrize("kind", ["shards", "parquet", "shards_of_parquet"])


def batches(source: ImageSource, num_workers: int = 0) -> list[torch.Tensor]:
    order = BatchOrder(num_samples=len(source), global_batch_size=3, epochs=2, seed=7)
    loader = crop_batches(
        CropsDataset(source, recipes(), seed=7),
        order,
        num_workers=num_workers,
        prefetch_batches=1,
        pin_memory=False,
        timeout_seconds=60.0,
    )
    return [part for batch in loader for part in (batch.global_crops, batch.local_crops)]


@OTHERS
@pytest.mark.parametrize("num_workers", [0, 2])
def test_equal_batches_of_crops_for_the_same_seed(containers, kind, num_workers):
    ours = batches(open_images(containers[kind]), num_workers)
    theirs = batches(open_images(containers["folder"]))
    assert len(ours) == len(theirs) == 8
    assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))


@OTHERS
def test_equal_order_labels_classes_bytes_and_fingerprint(containers, kind):
    for ours, theirs in zip(open_labeled(containers[kind]), open_labeled(containers["folder"]), strict=True):
        assert ours.labels.tolist() == theirs.labels.tolist() and ours.classes == theirs.classes
        assert [ours.read(i) for i in range(len(ours))] == [theirs.read(i) for i in range(len(theirs))]
        assert ours.fingerprint() == theirs.fingerprint()
        some = np.array([2, 0])
        assert ours.subset(some).fingerprint() == theirs.subset(some).fingerprint()
    assert open_val(containers[kind]).fingerprint() == open_val(containers["folder"]).fingerprint()


@pytest.mark.parametrize("kind", ["shards", pytest.param("parquet", marks=pytest.mark.long)])
def test_a_run_on_a_folder_goes_on_as_if_nothing_had_happened(containers, tmp_path, kind):
    changes = {"optim__global_batch_size": 3, "optim__epochs": 2, "machine__num_workers": 2}
    pretrain(tiny_options(containers["folder"], tmp_path / "whole", **changes))
    pretrain(tiny_options(containers["folder"], tmp_path / "run", **changes))
    for file in (tmp_path / "run" / "checkpoints").glob("*4*"):  # the last step
        file.unlink()
    assert load_latest(tmp_path / "run")["step"] == 2
    pretrain(tiny_options(containers[kind], tmp_path / "run", **changes))
    assert state_hash(load_latest(tmp_path / "run")) == state_hash(load_latest(tmp_path / "whole"))


def test_shards_keep_the_order_of_the_classes_of_parquet(tmp_path):
    classes = ["zebra", "ant", "crane", "mole", "crane"]
    images = [{"bytes": picture(i), "path": f"{i}.png"} for i in range(5)]
    write_parquet(tmp_path / "data" / "train.parquet", images, [0, 1, 2, 3, 4], classes)
    shard(str(tmp_path / "data"), str(tmp_path / "out"), num_workers=0)
    ours, theirs = open_images(str(tmp_path / "out")), open_images(str(tmp_path / "data"))
    assert ours.classes == theirs.classes == ("zebra", "ant", "crane (2)", "mole", "crane (4)")
    assert ours.labels.tolist() == theirs.labels.tolist() == [0, 1, 2, 3, 4]

"""One pass of a frozen encoder: each image once, features on disk, and resuming an interrupted pass."""

import json
import os
import shutil
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch

from dino_sparo.data.sources import open_images
from dino_sparo.errors import UserError
from dino_sparo.evaluation import features as module
from dino_sparo.evaluation.features import Wanted, cached_features, embed
from dino_sparo.models import build_encoder
from dino_sparo.parallel import distributed
from dino_sparo.parallel.distributed import process_group
from tests.running import spawn
from tests.tiny import write_pictures

NAMES = ["encoding", "cls", "patch_mean", "probe"]
NUM_IMAGES = 11
SIZE = {"image_size": 16, "batch_size": 4}
SMALL = {"width": 16, "depth": 3, "num_heads": 2}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    write_pictures(folder, NUM_IMAGES)
    return open_images(str(folder))


def small_encoder(seed: int = 0, arch: dict = SMALL, readout: str = "sparo"):
    torch.manual_seed(seed)
    slots = {"num_slots": 3, "slot_dim": 4, "key_dim": 4} if readout == "sparo" else {}
    return build_encoder(arch, 8, 16, readout=readout, **slots).eval()


@pytest.fixture
def one_thread():
    """One thread, as in the processes of these tests: rounding depends on the number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def features_of(encoder, source, names, cache, *, precision="float16", **settings):
    """Features of one set of images."""
    wanted = [Wanted(source, precision=precision)]
    return cached_features(encoder, wanted, names, cache=cache, **(SIZE | settings))[0]


class Counted:
    """An encoder that counts its images, and fails after a number of them."""

    def __init__(self, encoder, breaks_after: int = 10**9) -> None:
        self.encoder, self.seen, self.breaks_after = encoder, 0, breaks_after

    def __getattr__(self, name):
        return getattr(self.encoder, name)

    def features(self, images, names):
        if images.abs().sum() > 0:  # not the look at the widths
            if self.seen >= self.breaks_after:
                raise KeyboardInterrupt
            self.seen += len(images)
        return self.encoder.features(images, names)


@torch.no_grad()
def test_every_feature_of_every_image(source, tmp_path):
    encoder = small_encoder()
    found = features_of(encoder, source, NAMES, tmp_path, precision="float32")
    pixels = module.CenterCrops(source, 16)
    images = module.normalize(torch.stack([pixels[i] for i in range(NUM_IMAGES)]))
    for name, expected in encoder.features(images, NAMES).items():
        assert isinstance(found[name], np.memmap)
        np.testing.assert_allclose(found[name], expected, atol=1e-6, err_msg=name)
    half = features_of(encoder, source, NAMES, tmp_path)
    assert half["probe"].dtype == np.float16
    np.testing.assert_array_equal(half["probe"], found["probe"].astype(np.float16))
    np.testing.assert_allclose(embed(encoder, source, **SIZE), found["encoding"], atol=1e-6)


def test_what_is_there_is_not_computed_again(source, tmp_path):
    encoder = Counted(small_encoder())
    first = features_of(encoder, source, ["encoding"], tmp_path)
    assert encoder.seen == NUM_IMAGES
    again = features_of(encoder, source, ["encoding"], tmp_path, batch_size=3)
    assert encoder.seen == NUM_IMAGES and np.array_equal(first["encoding"], again["encoding"])
    features_of(encoder, source, ["encoding", "cls"], tmp_path)
    assert encoder.seen == 2 * NUM_IMAGES
    described = json.loads(next(tmp_path.glob("*/features.json")).read_text())
    assert described["num_images"] == NUM_IMAGES and described["precision"] == "float16"


def test_an_interrupted_pass_goes_on_where_it_stopped(source, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "FLUSH_SECONDS", 0)
    whole = features_of(small_encoder(), source, NAMES, tmp_path / "whole")
    broken = Counted(small_encoder(), breaks_after=8)
    with pytest.raises(KeyboardInterrupt):
        features_of(broken, source, NAMES, tmp_path / "parts")
    rest = Counted(small_encoder())
    found = features_of(rest, source, NAMES, tmp_path / "parts")
    assert broken.seen == 8 and rest.seen == 3
    for name in NAMES:
        np.testing.assert_array_equal(found[name], whole[name])


@pytest.mark.parametrize(
    "change",
    [
        {"encoder": {"seed": 1}},
        {"encoder": {"arch": SMALL | {"num_heads": 4}}},
        {"precision": "float32"},
        {"image_size": 24},
        {"images": 10},
    ],
    ids=str,
)
def test_features_of_something_else_are_never_taken(source, tmp_path, change):
    features_of(small_encoder(), source, ["cls"], tmp_path)
    other = Counted(small_encoder(**change.get("encoder", {})))
    images = source.subset(np.arange(change["images"])) if "images" in change else source
    settings = {k: v for k, v in change.items() if k not in ("encoder", "images")}
    features_of(other, images, ["cls"], tmp_path, **settings)
    assert other.seen == len(images)


@pytest.mark.parametrize("where", ["another folder", "in place"])
def test_other_pixels_under_the_same_names_are_other_images(tmp_path, where):
    write_pictures(tmp_path / "a", 6)
    folder = tmp_path / "a" if where == "in place" else tmp_path / "b"
    first = features_of(small_encoder(), open_images(str(tmp_path / "a")), ["cls"], tmp_path)
    first = np.array(first["cls"])
    write_pictures(folder, 6, side=20)
    source = open_images(str(folder))
    assert source.fingerprint() == open_images(str(tmp_path / "a")).fingerprint()
    second = features_of(small_encoder(), source, ["cls"], tmp_path)["cls"]
    expected = embed(small_encoder(), source, **SIZE)
    assert not np.allclose(second, first, atol=1e-3)
    rows = features_of(small_encoder(), source, ["encoding"], tmp_path)["encoding"]
    np.testing.assert_allclose(rows, expected, atol=1e-3)


def in_processes(number: int, folder: str, pictures: str) -> None:
    os.environ |= {"RANK": str(number), "WORLD_SIZE": "3", "LOCAL_RANK": str(number)}
    torch.set_num_threads(1)
    with process_group(torch.device("cpu")):
        found = features_of(
            small_encoder(), open_images(pictures), NAMES, Path(folder), num_workers=number % 2
        )
        assert found["cls"].shape == (NUM_IMAGES, 16)


@pytest.mark.long
def test_processes_share_the_images(source, tmp_path, one_thread):
    alone = features_of(small_encoder(), source, NAMES, tmp_path / "1")
    spawn(in_processes, str(tmp_path / "n"), str(source.root), processes=3)
    later = Counted(small_encoder())
    shared = features_of(later, source, NAMES, tmp_path / "n")
    assert later.seen == 0
    for name in NAMES:
        np.testing.assert_array_equal(shared[name], alone[name])


def meddled_with(number: int, folder: str, pictures: str) -> None:
    """Another program fills the cache before the second process starts."""
    os.environ |= {"RANK": str(number), "WORLD_SIZE": "2", "LOCAL_RANK": str(number)}
    encoder, distributed.PATIENCE = small_encoder(), timedelta(seconds=20)
    with process_group(torch.device("cpu")):
        original, looks = module.FeatureFile.done, []

        def late(file):
            if number == 1 and not looks:
                looks.append(1)
                with pytest.MonkeyPatch.context() as patch:
                    for name, alone in (("rank", 0), ("world_size", 1)):
                        patch.setattr(module, name, lambda alone=alone: alone)
                    patch.setattr(module, "gather_objects", lambda value: [value])
                    features_of(encoder, open_images(pictures), ["cls"], Path(folder))
            return original(file)

        module.FeatureFile.done = late
        features_of(encoder, open_images(pictures), ["cls"], Path(folder))
        features_of(encoder, open_images(pictures), ["encoding"], Path(folder))


@pytest.mark.long
def test_two_programs_may_fill_one_cache(source, tmp_path):
    spawn(meddled_with, str(tmp_path / "n"), str(source.root), processes=2)
    alone = features_of(small_encoder(), source, ["encoding"], tmp_path / "1")
    shared = features_of(small_encoder(), source, ["encoding"], tmp_path / "n")
    np.testing.assert_allclose(shared["encoding"], alone["encoding"], atol=1e-3)


def test_processes_with_different_weights_do_not_mix_their_features(source, tmp_path, monkeypatch):
    """As when a run saves a checkpoint while they start."""
    monkeypatch.setattr(module, "gather_objects", lambda value: [value, "of other weights"])
    with pytest.raises(UserError, match="the processes have read different weights"):
        features_of(small_encoder(), source, NAMES, tmp_path)
    assert not any(tmp_path.iterdir())


def test_numbers_that_are_not_finite_are_named(source, tmp_path):
    encoder = small_encoder()
    with torch.no_grad():
        encoder.backbone.norm.weight.fill_(1e5)
    with pytest.raises(UserError, match=r"feature 'cls' of .*000\.png is not finite in float16: .* float32"):
        features_of(encoder, source, ["cls"], tmp_path)
    features_of(encoder, source, ["cls"], tmp_path, precision="float32")
    with torch.no_grad():
        encoder.backbone.norm.weight.fill_(torch.nan)
    with pytest.raises(
        UserError, match=r"feature 'cls' of .*000\.png is not finite in float32: .* another che"
    ):
        features_of(encoder, source, ["cls"], tmp_path, precision="float32")


@pytest.mark.parametrize("lost", ["cls.float16", "cls.done", "a shorter cls.done"])
def test_a_file_that_is_lost_is_made_again(source, tmp_path, lost, monkeypatch):
    whole = np.array(features_of(small_encoder(), source, ["cls"], tmp_path)["cls"])
    path = next(tmp_path.glob(f"*/{lost.split()[-1]}"))
    path.unlink()
    if "shorter" in lost:
        path.write_bytes(b"\1" * (NUM_IMAGES - 1))

    def killed(*_):
        raise KeyboardInterrupt

    for kill in ((Path, "write_bytes"), (module, "open")):  # while the files are made
        with monkeypatch.context() as patch:
            patch.setattr(*kill, killed, raising=False)
            with pytest.raises(KeyboardInterrupt):
                features_of(small_encoder(), source, ["cls"], tmp_path)
    encoder = Counted(small_encoder())
    again = features_of(encoder, source, ["cls"], tmp_path)["cls"]
    assert encoder.seen == NUM_IMAGES and np.array_equal(again, whole)


def test_room_for_all_that_is_not_there_yet_is_told_before_the_first(source, tmp_path, monkeypatch):
    features_of(small_encoder(), source, ["cls"], tmp_path)  # 352 bytes
    monkeypatch.setattr(shutil, "disk_usage", lambda _: type("Usage", (), {"free": 300}))
    features_of(small_encoder(), source, ["cls", "encoding"], tmp_path)  # 264 more
    encoder = Counted(small_encoder(1))
    wanted = [Wanted(source), Wanted(source, precision="float32")]  # 352 and 704 bytes
    with pytest.raises(UserError, match=r"new.: features need 1056 bytes \(0.00 GiB\), but only 300"):
        cached_features(encoder, wanted, ["cls"], cache=tmp_path / "new", **SIZE)
    assert encoder.seen == 0 and not (tmp_path / "new").exists()


def test_a_full_disk_is_told_and_loses_nothing(source, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "FLUSH_SECONDS", 0)
    original, calls = os.pwrite, []

    def pwrite(descriptor, data, offset):
        calls.append(1)
        if len(calls) == 3:  # rows and marks of the first block, then rows of the second, in part
            return original(descriptor, data[: len(data) // 2], offset)
        if len(calls) == 4:
            raise OSError(28, "No space left on device")
        return original(descriptor, data, offset)

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", pwrite)
        with pytest.raises(OSError, match=f"No space left on device: '{tmp_path}/"):
            features_of(small_encoder(), source, ["cls"], tmp_path)
    rest = Counted(small_encoder())
    found = features_of(rest, source, ["cls"], tmp_path)["cls"]
    assert rest.seen == NUM_IMAGES - 4
    whole = features_of(small_encoder(), source, ["cls"], tmp_path / "whole")["cls"]
    np.testing.assert_array_equal(found, whole)

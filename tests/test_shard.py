"""Tar shards written from folders: the same bytes, also after interruptions."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from dino_sparo.__main__ import main
from dino_sparo.data import shards as headers
from dino_sparo.data.shards import INDEX_FILE, pack_shards
from dino_sparo.data.sources import open_images, open_labeled, open_val
from dino_sparo.data.splits import Choice
from dino_sparo.errors import UserError
from dino_sparo.shard import shard
from tests.running import family, is_gone
from tests.shard_files import shards_of, write, write_folder


@pytest.fixture
def folder(tmp_path) -> Path:
    return write_folder(tmp_path / "data")


@pytest.fixture
def out(folder, tmp_path) -> Path:
    return shards_of(folder, tmp_path / "out")


def test_only_long_images_are_reduced(tmp_path):
    root = tmp_path / "data"
    for name, size in {"a/1": (90, 60), "a/2": (30, 40), "b/3": (61, 300), "b/4": (60, 30)}.items():
        write(root, f"{name}.JPEG", size=size, kind="JPEG")
    write(root, "b/5.png", size=(64, 64))
    shard(str(root), str(tmp_path / "out"), short_side=30, num_workers=0)
    ours, theirs = open_images(str(tmp_path / "out")), open_images(str(root))
    assert [ours.load(i).size for i in range(5)] == [(45, 30), (30, 40), (30, 148), (60, 30), (30, 30)]
    assert [ours.read(i) == theirs.read(i) for i in range(5)] == [False, True, False, True, False]
    names = [ours.name(i).split(": ")[1] for i in range(5)]
    assert names == ["a/1.JPEG", "a/2.JPEG", "b/3.JPEG", "b/4.JPEG", "b/5.jpg"]
    assert ours.labels.tolist() == theirs.labels.tolist() and ours.classes == theirs.classes
    reduced = theirs.load(0).resize((45, 30), Image.Resampling.BICUBIC)
    assert np.abs(np.asarray(ours.load(0), float) - np.asarray(reduced, float)).mean() < 12  # noise, JPEG


def test_every_nth_image_of_every_class_is_held_out(tmp_path):
    root, out = tmp_path / "data", tmp_path / "out"
    write(root, "val/a/unused.png", *[f"train/{kind}/{number}.png" for kind in "ab" for number in range(6)])
    shard(str(root), str(out), num_workers=0, every=3)
    train, val = open_images(str(out)), open_val(str(out))
    assert [val.name(i).split(": ")[1] for i in range(4)] == ["a/2.png", "a/5.png", "b/2.png", "b/5.png"]
    assert (len(train), train.labels.tolist(), val.labels.tolist()) == (8, [0] * 4 + [1] * 4, [0, 0, 1, 1])
    assert val.read(1) == (root / "train/a/5.png").read_bytes()
    assert train.read(4) == (root / "train/b/0.png").read_bytes()
    with pytest.raises(UserError, match=r"--hold_out is 13; expected a number from 2 to 12, the number of"):
        shard(str(root), str(tmp_path / "other"), num_workers=0, every=13)


def test_a_test_set_without_classes_is_no_val_in_shards_either(tmp_path):
    """As Kaggle's test/unknown/<image>."""
    root, out = tmp_path / "data", tmp_path / "out"
    write(root, "test/unknown/0.png", *[f"train/{kind}/{number}.png" for kind in "ab" for number in range(5)])
    shard(str(root), str(out), num_workers=0)
    sizes = [[len(images) for images in open_labeled(str(folder))] for folder in (root, out)]
    assert sizes == [[8, 2], [8, 2]]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_the_largest_image_that_is_reduced_can_be_given(tmp_path, num_workers):
    write(tmp_path / "data", "a/1.png", size=(900, 600))
    out = str(tmp_path / "out")
    with pytest.raises(UserError, match=r"900 x 600 pixels are too many for data\.max_pixels 539,999"):
        shard(str(tmp_path / "data"), out, 30, num_workers, choice=Choice(max_pixels=539_999))
    shard(str(tmp_path / "data"), out, 30, num_workers, choice=Choice(max_pixels=540_000))
    assert open_images(out).load(0).size == (45, 30)


def test_images_of_more_than_8_bits_are_reduced_by_the_values_that_are_given(tmp_path):
    (tmp_path / "data/a").mkdir(parents=True)
    twelve_bits = np.linspace(0, 4095, 80 * 60).astype(np.uint16).reshape(60, 80)
    Image.fromarray(twelve_bits).save(tmp_path / "data/a/1.png")
    data, out = str(tmp_path / "data"), tmp_path / "out"
    with pytest.raises(UserError, match=r"a/1\.png: .*more than 8 bits, .*--value_range"):
        shard(data, str(tmp_path / "refused"), 30, 0)
    assert main(["shard", data, f"--out={out}", "--short-side=30", "--value-range=[0, 4095]"]) == 0
    reduced = np.asarray(open_images(str(out)).load(0))
    assert reduced.shape == (30, 40, 3) and reduced.min() < 9 and reduced.max() > 246
    with pytest.raises(UserError, match="was made with other images, or"):
        shard(data, str(out), 30, 0, choice=Choice(value_range=(0, 9)))
    shard(data, str(tmp_path / "copied"), num_workers=0)
    assert open_images(str(tmp_path / "copied")).read(0) == (tmp_path / "data/a/1.png").read_bytes()


def test_unreadable_image_ends_a_reduction_by_its_name_and_copies_pass(folder, tmp_path):
    (folder / "train" / "c" / "x.webp").write_bytes(b"no image")
    for num_workers in (0, 1):
        with pytest.raises(UserError, match=r"train/c/x\.webp: the image cannot be read .*; repair"):
            shard(str(folder), str(tmp_path / f"o{num_workers}"), short_side=9, num_workers=num_workers)
    shard(str(folder), str(tmp_path / "out"), num_workers=1)
    assert open_images(str(tmp_path / "out")).read(6) == b"no image"


class KilledError(BaseException):
    pass


def test_resumes_after_a_kill_and_half_is_never_taken_for_whole(folder, out, tmp_path, monkeypatch):
    """The process is killed before each rename: two records, four shards, two indexes."""
    for moment in range(8):
        again, left, replace = tmp_path / f"again{moment}", [None] * moment, os.replace

        def die(before, after, left=left, replace=replace):
            if not left:
                raise KilledError
            left.pop()
            replace(before, after)

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", die)
            with pytest.raises(KilledError):
                shards_of(folder, again)
        with pytest.raises(UserError):
            open_images(str(again))
        before = {path: path.stat().st_mtime_ns for path in again.rglob("0*.tar")}
        shards_of(folder, again)
        assert all(path.stat().st_mtime_ns == time_ns for path, time_ns in before.items())
        for path in sorted(out.rglob("*.tar")):
            assert path.read_bytes() == (again / path.relative_to(out)).read_bytes()
        assert open_images(str(again)).fingerprint() == open_images(str(folder)).fingerprint()
        assert not [*again.rglob("*.part")]


def test_the_index_is_what_the_headers_say_and_only_those_of_an_earlier_start_are_read(
    folder, out, tmp_path, monkeypatch
):
    read, original = [], headers.read_shard
    monkeypatch.setattr(headers, "read_shard", lambda root, name: read.append(name) or original(root, name))
    for number, options in enumerate(({"num_workers": 0, "short_side": 9}, {"num_workers": 2})):
        again = tmp_path / f"again{number}"
        shard(str(folder), str(again), images_per_shard=3, **options)
        assert read == []
        for split in ("train", "val"):
            assert (again / split / INDEX_FILE).read_bytes() == b"".join(pack_shards(again / split))
        read.clear()
    for path in out.rglob("*.tar"):  # any number of processes writes the same
        assert path.read_bytes() == (again / path.relative_to(out)).read_bytes()
    (out / "train" / "000001.tar").unlink()
    (out / "train" / INDEX_FILE).unlink()
    shards_of(folder, out)
    assert sorted(read) == ["000000.tar", "000002.tar"]


def test_a_killed_command_leaves_no_process_and_goes_on(folder, tmp_path):
    write(folder / "train", *(f"a/more{i}.png" for i in range(40)), size=(400, 400))
    arguments = ["shard", str(folder), f"--out={tmp_path / 'out'}", "--short-side=20", "--num-workers=1"]
    code = (
        "import dino_sparo.shard as s, sys; s.shard.__defaults__ = (None, None, 1)\n"
        "from dino_sparo.__main__ import main; sys.exit(main())"
    )
    process = subprocess.Popen([sys.executable, "-c", code, *arguments])
    while not (tmp_path / "out" / "train" / "000003.tar").exists():
        assert process.poll() is None
        time.sleep(0.005)
    family_of = family(process.pid)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert all(map(is_gone, family_of)) and not (tmp_path / "out" / "train" / INDEX_FILE).exists()
    shard(str(folder), str(tmp_path / "out"), short_side=20, num_workers=0, images_per_shard=1)
    assert len(open_images(str(tmp_path / "out"))) == 47


def test_command_writes_once_and_says_what_is_there(folder, tmp_path, capsys):
    index, written = tmp_path / "out" / "train" / INDEX_FILE, []
    for _ in range(2):
        assert main(["shard", str(folder), "--out", str(tmp_path / "out"), "--num-workers", "0"]) == 0
        said = capsys.readouterr().out
        assert f"{tmp_path}/out/train: 7 images in 1 shards" in said and "3 classes" in said
        written.append(index.stat().st_ino)
    assert written[0] == written[1]


@pytest.mark.parametrize(
    ("change", "options", "said"),
    [
        (lambda data, out: write(out, "notes.txt"), {}, r"holds other files \(.*notes\.txt\); choose"),
        (lambda data, out: write(out, "train/0.tar"), {}, r"train' holds other files \(0\.tar\)"),
        (lambda data, out: out.touch(), {}, r"is a file; give a folder"),
        (lambda data, out: shard(str(data), str(out), 9, 0), {}, r"was made with --short-side 9"),
        (
            lambda data, out: (
                shard(str(data), str(out), None, 0),
                os.utime(data / "val/c/y.png", ns=(1, 1)),
            ),
            {},
            r"with other images, or .*/data/val has changed",
        ),
        (
            lambda data, out: write(data, "train/a/1.seg.png"),
            {},
            r"a/1\.jpg and 'a/1\.seg\.png' have the same key",
        ),
        (lambda data, out: write(data, "train/a/1.png"), {"short_side": 9}, r"have the same key"),
        (  # both would be x.2.jpg
            lambda data, out: [write(data, f"train/a/x.{name}") for name in ("1.jpg", "2.jpg", "2.png")],
            {"short_side": 9},
            r"a/x\.2\.jpg and 'a/x\.2\.png' have the same key or name",
        ),
        (lambda data, out: None, {"short_side": 0}, r"--short-side is 0; expected"),
        (lambda data, out: shutil.rmtree(data), {}, r"DIR '.*data' does not exist"),
    ],
)
def test_mistakes(folder, tmp_path, change, options, said):
    change(folder, tmp_path / "out")
    with pytest.raises(UserError, match=said):
        shard(str(folder), str(tmp_path / "out"), num_workers=0, **options)


def test_other_mistakes(folder, out, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="generated pictures, or a dataset by name; give a folder"):
        shard(str(out), str(tmp_path / "x"))
    with pytest.raises(UserError, match="is in the folder of images"):
        shard(str(folder), str(folder / "train" / "shards"))
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=0))
    with pytest.raises(
        UserError, match=r"shards need about \d+ bytes \(.*\), but only 0 .* are free there; free"
    ):
        shard(str(folder), str(tmp_path / "x"))
    shards_of(folder, out)  # nothing is left to write

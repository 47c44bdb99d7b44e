"""Tar shards read like folders, also those of other people."""

import gzip
import os
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest

from dino_sparo.data import shards
from dino_sparo.data.decode import UnreadableImageError
from dino_sparo.data.scan import scan_images
from dino_sparo.data.shards import INDEX_FILE, RECORD, ShardSource
from dino_sparo.data.sources import open_images, open_labeled, open_val
from dino_sparo.errors import UserError, UserFileNotFoundError
from dino_sparo.shard import shard
from tests.shard_files import picture, shards_of, write, write_folder, write_tar


@pytest.fixture
def folder(tmp_path) -> Path:
    return write_folder(tmp_path / "data")


@pytest.fixture
def out(folder, tmp_path) -> Path:
    return shards_of(folder, tmp_path / "out")


# --- Shards of a folder


def test_a_shard_source_is_that_of_its_folder_under_other_names(folder, out):
    """That order, bytes and labels are the same, see test_containers."""
    assert sorted(os.listdir(out / "train")) == [RECORD, "000000.tar", "000001.tar", "000002.tar", INDEX_FILE]
    ours, theirs = open_images(str(out)), open_images(str(folder))
    assert isinstance(ours, ShardSource) and len(open_val(str(out))) == 2
    for i in range(7):
        assert ours.name(i).endswith(f".tar: {Path(theirs.name(i)).relative_to(theirs.root)}")
    some = np.array([6, 0, 3])
    for one, other in ((ours, theirs), (s.subset(some).subset(np.array([2, 0])) for s in (ours, theirs))):
        assert one.fingerprint() == other.fingerprint() and one.labels.tolist() == other.labels.tolist()
        assert [one.read(i) for i in range(len(one))] == [other.read(i) for i in range(len(other))]
        assert one.stats()[:, 0].tolist() == other.stats()[:, 0].tolist()


def test_flat_folder_is_unlabeled(tmp_path):
    source = write(tmp_path / "data", "b.png", "a.png", "more/c.png")
    shard(str(source), str(tmp_path / "out"), num_workers=0)
    ours, theirs = open_images(str(tmp_path / "out")), open_images(str(source))
    assert ours.labels is None and ours.classes == () and ours.fingerprint() == theirs.fingerprint()
    with tarfile.open(tmp_path / "out" / "000000.tar") as archive:
        assert archive.getnames() == ["a.png", "b.png", "more/c.png"]
    with pytest.raises(UserError, match=r"not every image of these shards has a class; expected KEY\.cls"):
        open_labeled(str(tmp_path / "out"))


def test_members_are_those_that_webdataset_expects(out):
    with tarfile.open(out / "train" / "000000.tar") as archive:
        names = archive.getnames()
        classes = [archive.extractfile(name).read() for name in names if name.endswith(".cls")]
    assert names == ["a/1.jpg", "a/1.cls", "a/10.PNG", "a/10.cls", "a/2.Jpeg", "a/2.cls"]
    assert classes == [b"0"] * 3


def test_a_pickle_holds_no_names(out):
    source = open_images(str(out))
    data = pickle.dumps(source)
    assert b"12.30" not in data and len(data) < 2000
    assert pickle.loads(data).read(5) == source.read(5)


def test_a_bounded_number_of_shards_is_open_at_once(tmp_path):
    for number in range(shards.OPEN_SHARDS + 2):
        write_tar(tmp_path / f"w/{number:03d}.tar", a__jpg=picture(number % 9))
    source, before = open_images(str(tmp_path / "w")), len(os.listdir("/proc/self/fd"))
    for number in range(len(source)):
        assert source.read(number) == picture(number % 9)
    assert len(os.listdir("/proc/self/fd")) <= before + shards.OPEN_SHARDS


def test_scan_finds_the_bad_image_in_a_shard(folder, tmp_path):
    (folder / "train" / "b b" / "ü.png").write_bytes(b"no image")
    for num_workers in (0, 1):
        source = open_images(str(shards_of(folder, tmp_path / "out")))
        report = scan_images(source, num_workers=num_workers, description="").report
        assert (report.images, report.readable) == (7, 6)
        (bad,) = report.problems["not_an_image"].first
        assert bad.startswith(f"{tmp_path}/out/train/000001.tar: b b/ü.png: ")


# --- Shards of other people


def test_classes_by_number_in_any_order(tmp_path):
    first = {"07__jpg": picture(0), "07__cls": b"10\n", "07__json": b"{}", "07__seg__png": picture(9)}
    second = {"08__cls": b"9", "08__png": picture(1), "08__txt": b"x"}
    hidden = {".trash/1__jpg": picture(9), "./._09__jpg": b"of a Mac"}
    third = {"./09__JPEG": picture(2), "./09__cls": b"10"}
    write_tar(tmp_path / "w" / "train" / "b.tar", **hidden, **third)
    root = write_tar(tmp_path / "w" / "train" / "a-000.tar", **first, **second)
    write_tar(tmp_path / "w" / "val" / "0.tar", **second, **third)
    (root / "notes.json").write_text("{}")
    source = open_images(str(root))
    assert source.classes == ("9", "10") and source.labels.tolist() == [1, 0, 1]
    assert [source.read(i) for i in range(3)] == [picture(0), picture(1), picture(2)]
    assert [source.name(i).split(": ")[1] for i in range(3)] == ["07.jpg", "08.png", "09.JPEG"]
    assert not (root / INDEX_FILE).exists()
    train, val = open_labeled(str(tmp_path / "w"))
    assert train.classes == val.classes == ("9", "10")
    assert train.labels.tolist() == [1, 0, 1] and val.labels.tolist() == [0, 1]


@pytest.mark.parametrize(
    ("names", "texts", "expected"),
    [
        (["train/1.jpg", "train/2.jpg"], ["0", "1"], ["0", "1"]),
        (["dog/1.jpg", "cat/2.jpg"], ["1", "0"], ["dog", "cat"]),
        (["dog/1.jpg", "cat/2.jpg"], [None, None], ["dog", "cat"]),
        (["dog/1.jpg", "cat/2.jpg"], ["0", "0"], ["0", "0"]),
        (["1.jpg", "2.jpg"], ["dog", "cat"], ["dog", "cat"]),
        (["1.jpg", "2.jpg"], ["0", None], None),
        (["12.30.jpg", "12.31.jpg"], ["1", "0"], ["1", "0"]),
    ],
)
def test_classes_are_those_of_folders_or_cls(tmp_path, names, texts, expected):
    members = {}
    for name, text in zip(names, texts, strict=True):
        members[name] = picture(0)
        if text is not None:
            members[f"{name.removesuffix('.jpg')}.cls"] = text.encode()
    source = open_images(str(write_tar(tmp_path / "w" / "0.tar", **members)))
    assert [source.name(i).split(": ")[1] for i in range(2)] == names
    labels = source.labels
    assert (None if labels is None else [source.classes[label] for label in labels]) == expected


def test_index_is_kept_and_made_anew_when_a_shard_changes(tmp_path, monkeypatch):
    read, original = [], shards.read_shard
    monkeypatch.setattr(shards, "read_shard", lambda root, name: read.append(name) or original(root, name))
    root = write_tar(tmp_path / "w" / "0.tar", a__jpg=picture(0))
    old = open_images(str(root))
    assert len(old) == len(open_images(str(root))) == 1 and read == ["0.tar"]
    write_tar(root / "1.tar", b__jpg=picture(1))
    assert len(open_images(str(root))) == 2 and read == ["0.tar", "0.tar", "1.tar"]
    write_tar(root / "0.tar", a__jpg=picture(2))
    os.utime(root / "0.tar", ns=(1, 1))
    assert open_images(str(root)).read(0) == picture(2) and len(read) == 5
    with pytest.raises(OSError, match=r"0\.tar has changed since it was indexed"):
        old.read(0)
    os.remove(root / "1.tar")
    assert len(open_images(str(root))) == 1


def test_a_cut_image_and_a_lost_shard_are_errors_of_the_image(out):
    source = open_images(str(out))
    os.remove(out / "train" / "000000.tar")
    with pytest.raises(UnreadableImageError, match=r"000000\.tar: a/1\.jpg: .*No such file"):
        source.load(0)
    source.read(6)
    os.truncate(out / "train" / "000002.tar", 600)  # while it is open
    with pytest.raises(OSError, match="the shard ends within the image"):
        source.read(6)
    source.load(4)


def test_a_damaged_shard_is_named(tmp_path):
    root = write_tar(tmp_path / "w" / "0.tar", a__jpg=picture(0), b__jpg=picture(1))
    data = (root / "0.tar").read_bytes()
    (root / "0.tar").write_bytes(data[:700])
    with pytest.raises(UserError, match=r"0\.tar: the shard is damaged or incomplete \(.*; write or"):
        open_images(str(root))


def test_a_compressed_shard_is_explained(tmp_path):
    root = write_tar(tmp_path / "w" / "0.tar", a__jpg=picture(0))
    packed = gzip.compress((root / "0.tar").read_bytes())
    (root / "0.tar").write_bytes(packed)
    with pytest.raises(UserError, match=r"0\.tar is compressed, so .* to a \.tar"):
        open_images(str(root))
    (root / "0.tar").rename(root / "0.tar.gz")
    with pytest.raises(UserError, match=r"0\.tar\.gz is compressed"):
        open_images(str(root))


def test_shards_without_an_image(tmp_path):
    root = write_tar(tmp_path / "w" / "0.tar", a__txt=b"x")
    with pytest.raises(UserFileNotFoundError, match=r"w: no images found in 1 shards; expected members"):
        open_images(str(root))


def test_class_tars_and_folders_with_a_tar_beside_are_no_shards(tmp_path):
    class_tars = write_tar(tmp_path / "c" / "n01440764.tar", a__jpg=picture(0))
    with pytest.raises(UserError, match="dino-sparo prepare"):
        open_images(str(class_tars))
    write(tmp_path / "d", "a/1.png", "b/2.png")
    write_tar(tmp_path / "d" / "0.tar", a__jpg=picture(0))
    assert len(open_images(str(tmp_path / "d"))) == 2

"""Tar shards: written from folders, read like folders, also those of other people."""

import gzip
import io
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dino_sparo import check
from dino_sparo.__main__ import main
from dino_sparo.data import shard_headers as headers
from dino_sparo.data import shards
from dino_sparo.data.loader import BatchOrder, CropsDataset, crop_batches
from dino_sparo.data.scan import scan_images
from dino_sparo.data.shard_headers import pack_shards
from dino_sparo.data.shards import INDEX_FILE, RECORD, ShardSource
from dino_sparo.data.sources import open_images, open_labelled, open_val
from dino_sparo.data.views import crop_recipes
from dino_sparo.errors import UserError, UserFileNotFoundError
from dino_sparo.evaluation.features import extract_features
from dino_sparo.evaluation.knn import knn_classify
from dino_sparo.shard import shard
from dino_sparo.training.checkpoint import load_latest
from dino_sparo.training.pretrain import pretrain
from tests.running import family, is_gone
from tests.test_features import small_encoder
from tests.test_loader import VIEWS
from tests.test_resume import pretrain_until
from tests.tiny import TINY, state_hash, tiny_options

LONG = "b b/" + "long" * 40 + ".bmp"
NAMES = ("a/1.jpg", "a/10.PNG", "a/2.Jpeg", "b b/ü.png", LONG, "b b/in/12.30.jpg", "c/x.webp")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("DINO_SPARO_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def picture(number: int, size: tuple[int, int] = (26, 22), kind: str = "PNG") -> bytes:
    pixels = np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def write(root: Path, *names: str, **how) -> Path:
    """A picture of its own in each file."""
    for number, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(picture(number, **how))
    return root


def write_tar(path: Path, **members: bytes) -> Path:
    """A tar as other people make them; `a__jpg` for a.jpg."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, data in members.items():
            member = tarfile.TarInfo(name.replace("__", "."))
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path.parent


@pytest.fixture
def folder(tmp_path) -> Path:
    """Train and val in class folders."""
    write(tmp_path / "data" / "train", *NAMES)
    write(tmp_path / "data" / "val", "c/y.png", "a/z.jpg")
    return tmp_path / "data"


@pytest.fixture
def out(folder, tmp_path) -> Path:
    """Its shards, several of them."""
    shard(str(folder), str(tmp_path / "out"), num_workers=0, images_per_shard=3)
    return tmp_path / "out"


def crops_of(source) -> CropsDataset:
    return CropsDataset(source, crop_recipes(**VIEWS), seed=3)


# --- Shards of a folder


def test_same_images_labels_classes_and_fingerprint_as_the_folder(folder, out):
    assert sorted(os.listdir(out / "train")) == [RECORD, "000000.tar", "000001.tar", "000002.tar", INDEX_FILE]
    pairs = [
        (open_images(str(folder)), open_images(str(out))),
        (open_val(str(folder)), open_val(str(out))),
        *zip(open_labelled(str(folder)), open_labelled(str(out)), strict=True),
    ]
    assert [len(ours) for _, ours in pairs] == [7, 2, 7, 2]
    for theirs, ours in pairs:
        assert isinstance(ours, ShardSource) and ours.classes == theirs.classes
        assert ours.labels.tolist() == theirs.labels.tolist()
        assert ours.fingerprint() == theirs.fingerprint()
        assert ours.stats()[:, 0].tolist() == theirs.stats()[:, 0].tolist()
        for i in range(len(theirs)):
            assert ours.read(i) == theirs.read(i)
            assert ours.name(i).endswith(f".tar: {Path(theirs.name(i)).relative_to(theirs.root)}")
    some = np.array([6, 0, 3])
    theirs, ours = (source.subset(some).subset(np.array([2, 0])) for source in pairs[0])
    assert ours.fingerprint() == theirs.fingerprint() and ours.labels.tolist() == theirs.labels.tolist()
    assert [ours.read(i) for i in range(2)] == [theirs.read(i) for i in range(2)]
    assert ours.stats()[:, 0].tolist() == theirs.stats()[:, 0].tolist()


@pytest.mark.parametrize("num_workers", [0, 2])
def test_same_crops_as_the_folder(folder, out, num_workers):
    made = []
    for path in (folder, out):
        source = open_images(str(path))
        source.read(0)  # a shard that is open before there are workers
        order = BatchOrder(num_samples=7, global_batch_size=3, epochs=2, seed=3)
        batches = crop_batches(
            crops_of(source),
            order,
            num_workers=num_workers,
            prefetch_batches=1,
            pin_memory=False,
            timeout_seconds=60,
        )
        made.append([(batch.global_crops, batch.local_crops) for batch in batches])
    assert len(made[0]) == len(made[1]) == 4
    for theirs, ours in zip(*made, strict=True):
        assert torch.equal(theirs[0], ours[0]) and torch.equal(theirs[1], ours[1])


def test_flat_folder_is_unlabelled(tmp_path):
    source = write(tmp_path / "data", "b.png", "a.png", "more/c.png")
    shard(str(source), str(tmp_path / "out"), num_workers=0)
    ours, theirs = open_images(str(tmp_path / "out")), open_images(str(source))
    assert ours.labels is None and ours.classes == () and ours.fingerprint() == theirs.fingerprint()
    with tarfile.open(tmp_path / "out" / "000000.tar") as archive:
        assert archive.getnames() == ["a.png", "b.png", "more/c.png"]
    with pytest.raises(UserError, match=r"not every image of these shards has a class; expected KEY\.cls"):
        open_labelled(str(tmp_path / "out"))


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


def test_few_shards_are_open_at_once(out, monkeypatch):
    monkeypatch.setattr(shards, "_opened", shards.lru_cache(1)(shards._OpenShard))
    source, before = open_images(str(out)), len(os.listdir("/proc/self/fd"))
    for i in (0, 6, 3, 1, 5):
        source.read(i)
        assert len(os.listdir("/proc/self/fd")) == before + 1
    shards._opened.cache_clear()
    assert len(os.listdir("/proc/self/fd")) == before


def test_scan_finds_the_bad_image_in_a_shard(folder, tmp_path):
    (folder / "train" / "b b" / "ü.png").write_bytes(b"no image")
    shard(str(folder), str(tmp_path / "out"), num_workers=0, images_per_shard=3)
    for num_workers in (0, 1):
        result = scan_images(open_images(str(tmp_path / "out")), num_workers=num_workers, description="")
        assert (result.report.images, result.report.readable) == (7, 6)
        (bad,) = result.report.problems["not_an_image"].first
        assert bad.startswith(f"{tmp_path}/out/train/000001.tar: b b/ü.png: ")


def test_a_run_ends_in_the_same_state_also_if_it_goes_on_from_shards(tmp_path, monkeypatch):
    data = write(tmp_path / "data", *(f"train/{i % 2}/{i}.png" for i in range(9)))
    shard(str(data), str(tmp_path / "out"), num_workers=0, images_per_shard=4)
    changes = {"machine__num_workers": 2, "log__checkpoint_every_minutes": 1e-9}
    pretrain(tiny_options(data, tmp_path / "folder", **changes))
    pretrain(tiny_options(tmp_path / "out", tmp_path / "shards", **changes))
    pretrain_until(3, tiny_options(data, tmp_path / "both", **changes), monkeypatch)
    pretrain(tiny_options(tmp_path / "out", tmp_path / "both", **changes))
    states = [load_latest(tmp_path / name) for name in ("folder", "shards", "both")]
    assert [state["step"] for state in states] == [6, 6, 6]
    assert len({state_hash(state) for state in states}) == 1


def test_check_reads_shards_from_end_to_end(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(check, "LOADING_SECONDS", 0.05)
    (folder / "train" / "b b" / "ü.png").write_bytes(b"no image")
    shard(str(folder), str(tmp_path / "out"), num_workers=0, images_per_shard=3)
    arguments = [f"--{key}={value}" for key, value in TINY.items()]
    reports = []
    capsys.readouterr()
    for path in (folder, tmp_path / "out"):
        assert main(["check", "--config", "demo", f"--data.path={path}", *arguments, "--json"]) == 1
        reports.append(json.loads(capsys.readouterr().out))
    theirs, ours = reports
    assert ours["run"]["images"] == 7 and ours["data"]["val_in_train"]["images"] == 2
    (bad,) = ours["data"]["train"]["problems"]["not_an_image"]["first"]
    assert bad.startswith(f"{tmp_path}/out/train/000001.tar: b b/ü.png: ")
    assert ours["data"]["train"]["readable"] == theirs["data"]["train"]["readable"] == 6
    assert len(ours["problems"]) == len(theirs["problems"]) >= 1


def test_knn_sees_the_same_features_and_classes(folder, out):
    encoder, answers = small_encoder(), []
    for path in (folder, out):
        train, val = open_labelled(str(path))
        features = [extract_features(encoder, source, image_size=16) for source in (train, val)]
        labels = [torch.from_numpy(source.labels) for source in (train, val)]
        found = knn_classify(features[0], labels[0], features[1], labels[1], k=1, num_classes=3)
        answers.append((features[1], found))
    assert torch.equal(answers[0][0], answers[1][0]) and answers[0][1] == answers[1][1]


# --- Shards of other people


def test_classes_by_number_in_any_order(tmp_path):
    first = {"07__jpg": picture(0), "07__cls": b"10\n", "07__json": b"{}", "07__seg__png": picture(9)}
    second = {"08__cls": b"9", "08__png": picture(1), "08__txt": b"x"}
    hidden = {".trash/1__jpg": picture(9), "./._09__jpg": b"of a Mac"}
    third = {"./09__JPEG": picture(2), "./09__cls": b"10"}
    write_tar(tmp_path / "w" / "b.tar", **hidden, **third)
    root = write_tar(tmp_path / "w" / "a-000.tar", **first, **second)
    (root / "notes.json").write_text("{}")
    source = open_images(str(root))
    assert source.classes == ("9", "10") and source.labels.tolist() == [1, 0, 1]
    assert [source.read(i) for i in range(3)] == [picture(0), picture(1), picture(2)]
    assert [source.name(i).split(": ")[1] for i in range(3)] == ["07.jpg", "08.png", "09.JPEG"]
    assert not (root / INDEX_FILE).exists()


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


def test_labelled_folders_of_other_peoples_shards(tmp_path):
    for split, numbers in (("train", "0120"), ("val", "20")):
        members = {}
        for i, number in enumerate(numbers):
            members |= {f"{i}__jpg": picture(i), f"{i}__cls": number.encode()}
        write_tar(tmp_path / "w" / split / "0.tar", **members)
    train, val = open_labelled(str(tmp_path / "w"))
    assert train.classes == val.classes == ("0", "1", "2")
    assert train.labels.tolist() == [0, 1, 2, 0] and val.labels.tolist() == [2, 0]


def test_index_is_kept_and_made_anew_when_a_shard_changes(tmp_path, monkeypatch):
    read = []
    original = headers._read_shard

    def noted(root, name):
        read.append(name)
        return original(root, name)

    monkeypatch.setattr(headers, "_read_shard", noted)
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
    with pytest.raises(FileNotFoundError):
        source.load(0)
    source.read(6)
    os.truncate(out / "train" / "000002.tar", 600)  # while it is open
    with pytest.raises(OSError, match="the shard ends before the image does"):
        source.read(6)
    assert crops_of(source)[0, 0].name.endswith("000000.tar: a/1.jpg")
    source.load(4)


@pytest.mark.parametrize("cut", [1, 700, 1024 + 100, -1024, -600])
def test_a_damaged_shard_is_named(tmp_path, cut):
    root = write_tar(tmp_path / "w" / "0.tar", a__jpg=picture(0), b__jpg=picture(1))
    with tarfile.open(root / "0.tar") as archive:
        end = archive.getmembers()[-1]
        size = end.offset_data + -(-end.size // 512) * 512
    data = (root / "0.tar").read_bytes()
    (root / "0.tar").write_bytes(data[: cut if cut > 0 else size + 1024 + cut])
    with pytest.raises(UserError, match=r"0\.tar: the shard is damaged or incomplete \(.*; write or"):
        open_images(str(root))


def test_a_compressed_shard_is_explained(tmp_path):
    root = write_tar(tmp_path / "w" / "0.tar", a__jpg=picture(0))
    packed = gzip.compress((root / "0.tar").read_bytes())
    (root / "0.tar").write_bytes(packed)
    with pytest.raises(UserError, match=r"0\.tar is compressed, so that .* keep the \.tar"):
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


# --- Writing


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


def test_unreadable_image_ends_a_reduction_by_its_name_and_copies_pass(folder, tmp_path):
    (folder / "train" / "c" / "x.webp").write_bytes(b"no image")
    for num_workers in (0, 1):
        with pytest.raises(UserError, match=r"train/c/x\.webp: the image cannot be read .*; repair"):
            shard(str(folder), str(tmp_path / f"o{num_workers}"), short_side=9, num_workers=num_workers)
    shard(str(folder), str(tmp_path / "out"), num_workers=1)
    assert open_images(str(tmp_path / "out")).read(6) == b"no image"


def test_any_number_of_processes_writes_the_same(folder, out, tmp_path):
    shard(str(folder), str(tmp_path / "two"), num_workers=2, images_per_shard=3)
    for path in sorted((out / "train").glob("*.tar")):
        assert path.read_bytes() == (tmp_path / "two" / "train" / path.name).read_bytes()


class KilledError(BaseException):
    pass


def killed_before(rename: int, folder: Path, target: Path, monkeypatch) -> bool:
    """Write shards and die before a rename, by its number; False if there are not so many."""
    done, original = [], os.replace

    def replace(before, after):
        if len(done) == rename:
            raise KilledError
        done.append(after)
        original(before, after)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replace)
        try:
            shard(str(folder), str(target), num_workers=0, images_per_shard=3)
        except KilledError:
            return True
    return False


def test_goes_on_after_a_kill_and_half_is_never_taken_for_whole(folder, out, tmp_path, monkeypatch):
    moments = 0
    while killed_before(moments, folder, again := tmp_path / f"again{moments}", monkeypatch):
        with pytest.raises(UserError):
            open_images(str(again))
        before = {path: path.stat().st_mtime_ns for path in again.rglob("0*.tar")}
        shard(str(folder), str(again), num_workers=0, images_per_shard=3)
        assert all(path.stat().st_mtime_ns == time_ns for path, time_ns in before.items())
        for path in sorted(out.rglob("*.tar")):
            assert path.read_bytes() == (again / path.relative_to(out)).read_bytes()
        assert open_images(str(again)).fingerprint() == open_images(str(folder)).fingerprint()
        assert not [*again.rglob("*.part")]
        moments += 1
    assert moments >= 8  # two records, four shards, two indexes


def test_the_index_is_what_the_headers_say_and_only_those_of_an_earlier_start_are_read(
    folder, out, tmp_path, monkeypatch
):
    read, original = [], headers._read_shard
    monkeypatch.setattr(headers, "_read_shard", lambda root, name: read.append(name) or original(root, name))
    for number, options in enumerate(({}, {"short_side": 9}, {"num_workers": 2})):
        again = tmp_path / f"again{number}"
        shard(str(folder), str(again), images_per_shard=3, **{"num_workers": 0} | options)
        assert read == []
        for split in ("train", "val"):
            written = again / split / INDEX_FILE
            assert written.read_bytes() == b"".join(pack_shards(again / split))
        read.clear()
    (out / "train" / "000001.tar").unlink()
    (out / "train" / INDEX_FILE).unlink()
    shard(str(folder), str(out), num_workers=0, images_per_shard=3)
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


def shard_and_change(data: Path, out: Path) -> None:
    shard(str(data), str(out), num_workers=0)
    os.utime(data / "val" / "c" / "y.png", ns=(1, 1))


@pytest.mark.parametrize(
    ("change", "options", "said"),
    [
        (lambda data, out: write(out, "notes.txt"), {}, r"holds other things \(.*notes\.txt\); choose"),
        (lambda data, out: write(out, "train/0.tar"), {}, r"holds other things \(.*train/0\.tar\)"),
        (lambda data, out: out.touch(), {}, r"is a file; give a folder"),
        (lambda data, out: shard(str(data), str(out), 9, 0), {}, r"was made with --short-side 9"),
        (shard_and_change, {}, r"with other images, or .*/data/val has changed"),
        (lambda data, out: write(data, "train/a/1.seg.png"), {}, r"a/1\.jpg and 'a/1\.seg\.png' would"),
        (lambda data, out: write(data, "train/a/1.png"), {"short_side": 9}, r"would be one sample"),
        (lambda data, out: None, {"short_side": 0}, r"--short-side is 0; expected"),
        (lambda data, out: shutil.rmtree(data), {}, r"DIR '.*data' does not exist"),
    ],
)
def test_mistakes(folder, tmp_path, change, options, said):
    change(folder, tmp_path / "out")
    with pytest.raises(UserError, match=said):
        shard(str(folder), str(tmp_path / "out"), num_workers=0, **options)


def test_other_mistakes(folder, out, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="is no folder of images, but shards or generated pictures"):
        shard(str(out), str(tmp_path / "x"))
    with pytest.raises(UserError, match="lies among the images of"):
        shard(str(folder), str(folder / "train" / "shards"))
    monkeypatch.setattr("shutil.disk_usage", lambda path: shutil._ntuple_diskusage(9, 9, 0))
    with pytest.raises(UserError, match=r"shards need about 0\.0 GB more, and 0\.0 GB are free; make"):
        shard(str(folder), str(tmp_path / "x"))
    shard(str(folder), str(out), num_workers=0, images_per_shard=3)  # nothing is left to write

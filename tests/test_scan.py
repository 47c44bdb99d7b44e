"""The scan of a dataset: bad files, copies, classes, its words, and workers that fail."""

import hashlib
import json
import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pytest

from dino_sparo.data import scan
from dino_sparo.data.scan import Copies, compare_splits, data_report, describe, find_copies, scan_images
from dino_sparo.data.shapes import shapes_source
from dino_sparo.data.sources import open_images
from dino_sparo.errors import UserError
from tests.pictures import encoded

PIXELS = np.random.default_rng(0).integers(0, 256, (40, 56, 3), dtype=np.uint8)


@dataclass
class Files:
    """A source of exactly these files."""

    paths: list[Path]
    labels: np.ndarray | None = None
    classes: tuple[str, ...] = ()

    def __len__(self):
        return len(self.paths)

    def name(self, index):
        return str(self.paths[index])

    def read(self, index):
        return self.paths[index].read_bytes()


def write(folder: Path, **contents: bytes) -> Files:
    """Files named by the keywords, `a__png` for a.png."""
    paths = [folder / name.replace("__", ".") for name in contents]
    folder.mkdir(parents=True, exist_ok=True)
    for path, content in zip(paths, contents.values(), strict=True):
        path.write_bytes(content)
    return Files(paths)


def scanned(source, num_workers: int = 0):
    return scan_images(source, num_workers=num_workers, description="train")


# --- Bad files (test_bad_images.py has more kinds)

JPEG, PNG, TIFF = (encoded(PIXELS, kind) for kind in ("JPEG", "PNG", "TIFF"))
GOOD = {
    "jpeg__jpg": JPEG,
    "jpeg__png": JPEG,
    "grey__jpg": encoded(PIXELS[..., 0], "JPEG"),
    "deep__png": encoded(PIXELS[..., 0].astype(np.uint16) * 256, "PNG"),
    "webp__webp": encoded(PIXELS, "WEBP"),
}
WHOLE = {
    "half__jpg": JPEG,
    "progressive__jpg": encoded(PIXELS, "JPEG", progressive=True),
    "half__png": PNG,
    "half__bmp": encoded(PIXELS, "BMP"),
    "half__ppm": encoded(PIXELS, "PPM"),
    "half__tif": TIFF,
    "lzw__tif": encoded(PIXELS, "TIFF", compression="tiff_lzw"),
    "half__webp": encoded(PIXELS, "WEBP"),
}
CUT = {name: content[: len(content) // 2] for name, content in WHOLE.items()}
CUT |= {"header__jpg": JPEG[:170], "start__jpg": JPEG[:25], "start__tif": TIFF[:99]}


def test_good_files_are_read_with_sizes_and_hashes(tmp_path):
    source = write(tmp_path, **GOOD, high__png=encoded(PIXELS[:, :10], "PNG"))
    result = scanned(source)
    report = result.report
    assert report.images == report.readable == 6 and report.unreadable == 0
    assert (report.short_side, report.long_side) == (scan.Spread(10, 40, 40), scan.Spread(40, 56, 56))
    assert report.total_bytes == sum(path.stat().st_size for path in source.paths)
    hashes = [hashlib.blake2b(path.read_bytes(), digest_size=16).digest() for path in source.paths]
    assert [row.tobytes() for row in result.hashes] == hashes


def test_a_file_that_is_cut_is_truncated(tmp_path):
    source = write(tmp_path, **CUT)
    report = scanned(source).report
    names = [Path(file.split(": ")[0]) for file in report.problems["truncated"].first]
    assert names == source.paths and report.unreadable == len(CUT)


def test_readable_is_what_can_be_loaded(tmp_path):
    write(tmp_path / "train" / "a", **GOOD, **CUT)
    write(tmp_path / "train" / "b", empty__jpg=b"", text__jpg=b"404 not found")
    source = open_images(str(tmp_path))

    def loads(number: int) -> bool:
        with suppress(OSError, ValueError, SyntaxError), warnings.catch_warnings(action="ignore"):
            return bool(source.load(number))
        return False

    assert scanned(source).readable.tolist() == [loads(number) for number in range(len(source))]


def test_lists_are_bounded_and_names_printable(tmp_path):
    source = Files([tmp_path / f"{number}-\udcff.jpg" for number in range(30)])
    missing = scanned(source).report.problems["unreadable"]
    assert missing.count == 30
    assert missing.first == tuple(f"{tmp_path}/{n}-\\udcff.jpg: No such file or directory" for n in range(20))


# --- Workers


def test_workers_find_what_one_process_finds(tmp_path):
    numbers = range(3 * scan.BATCH_FILES + 5)
    files = {f"{n:03d}__png": encoded(np.full((9, 8 + n % 3), n, dtype=np.uint8), "PNG") for n in numbers}
    source = write(tmp_path, **(files | {f"{n:03d}__png": b"no image" for n in numbers[1::3]}))
    alone, together = scanned(source), scanned(source, num_workers=2)
    assert alone.report.problems["not_an_image"].count == 34
    assert asdict(together.report) == asdict(alone.report) | {"seconds": together.report.seconds}
    np.testing.assert_array_equal(together.hashes, alone.hashes)
    np.testing.assert_array_equal(together.readable, alone.readable)
    assert not multiprocessing.active_children()


def wait_for_reader(fifo: Path) -> int:
    """Opens a named pipe for writing, which works once a worker reads it; nothing is ever written."""
    while True:
        try:
            return os.open(fifo, os.O_WRONLY | os.O_NONBLOCK)
        except OSError:
            time.sleep(0.01)


@pytest.fixture
def with_hanging_file(tmp_path) -> Files:
    """An image, then a named pipe: reading it waits for ever."""
    source = write(tmp_path, a__jpg=JPEG)
    os.mkfifo(tmp_path / "b.jpg")
    source.paths.append(tmp_path / "b.jpg")
    return source


@pytest.mark.parametrize(
    ("number", "timeout_seconds", "says"),
    # Ctrl-C reaches workers too, and must not make them print a traceback.
    [
        (signal.SIGINT, 1.5, r"came within .* 1\.5 "),
        (signal.SIGKILL, 60, r"died \(DataLoader worker .*\) "),
    ],
)
def test_a_worker_that_hangs_or_dies_ends_the_scan(with_hanging_file, number, timeout_seconds, says):
    def send_when_reading() -> None:
        wait_for_reader(with_hanging_file.paths[1])
        os.kill(multiprocessing.active_children()[0].pid, number)

    threading.Thread(target=send_when_reading).start()
    with pytest.raises(UserError, match=rf"{says}while loading .*/b\.jpg; repair"):
        scan_images(with_hanging_file, num_workers=1, description="train", timeout_seconds=timeout_seconds)
    assert not multiprocessing.active_children()


INTERRUPTED = """
import multiprocessing, os, signal, sys, threading
from pathlib import Path
from dino_sparo.data.scan import scan_images
from tests.test_scan import Files, wait_for_reader

def interrupt(fifo, at_start):
    while not multiprocessing.active_children() or signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        pass
    if not at_start:
        wait_for_reader(fifo)
    os.killpg(0, signal.SIGINT)

fifo = Path(sys.argv[1])
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a background job does not have
threading.Thread(target=interrupt, args=(fifo, sys.argv[2] == "True"), daemon=True).start()
try:
    scan_images(Files([fifo] * 200), num_workers=2, description="train")
except KeyboardInterrupt:
    sys.exit(130)
"""


@pytest.mark.long
@pytest.mark.parametrize("at_start", [True, False])
def test_ctrl_c_ends_the_scan_and_its_workers(with_hanging_file, at_start):
    command = [sys.executable, "-c", INTERRUPTED, str(with_hanging_file.paths[1]), str(at_start)]
    run = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        _, errors = run.communicate(timeout=60)  # until the last worker that holds stderr has ended
    finally:
        with suppress(ProcessLookupError):
            os.killpg(run.pid, signal.SIGKILL)
    assert (run.returncode, errors) == (130, "")


def test_progress_is_logged_without_a_terminal(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(scan, "LOG_EVERY_SECONDS", 0.0)
    source = write(tmp_path, a__jpg=JPEG)
    with caplog.at_level(logging.INFO, "dino_sparo"):
        scanned(Files(source.paths * (scan.BATCH_FILES + 1)))
    first, last = (record.getMessage() for record in caplog.records)
    assert first.startswith("train: 32 of 33 images, ")
    assert last.startswith("train: 33 of 33 images, ") and last.endswith("0:00:00 left")


# --- Copies, classes, and the report


@pytest.fixture
def copied(tmp_path) -> tuple[Files, Files]:
    """Train: a three times, b twice, c, and two equal bad files; val: c twice, b, d and the bad file."""
    a, b, c, d = (encoded(PIXELS[:, 4 * i :], "PNG") for i in range(4))
    train = write(
        tmp_path / "train", **{"1": b, "2": a, "3": c, "4": a, "5": b, "6": a, "7": b"bad", "8": b"bad"}
    )
    val = write(tmp_path / "val", **{"1": c, "2": b"bad", "3": d, "4": c, "5": b})
    return train, val


def test_many_groups_are_bounded_and_bad_files_are_no_copies(tmp_path):
    files = {f"{n:02d}": encoded(np.full((8, 8), n // 2, dtype=np.uint8), "PNG") for n in range(60)}
    copies = find_copies(scanned(write(tmp_path, **files)))
    assert (copies.groups, copies.images, len(copies.largest)) == (30, 60, 20)
    assert [Path(group.first[0]).name for group in copies.largest] == [f"{2 * n:02d}" for n in range(20)]
    nothing = scanned(write(tmp_path, a__jpg=b"", b__jpg=b""))
    assert find_copies(nothing) == find_copies(nothing, nothing) == Copies(0, 0, ())


def test_classes_are_compared():
    train = Files([Path()] * 6, np.array([0, 0, 0, 1, 2, 2]), ("cat", "dog", "eel"))
    val = Files([Path()] * 3, np.array([1, 3, 3]), ("cat", "dog", "eel", "fox"))
    comparison = compare_splits(train, val)
    assert comparison.train == scan.ClassCounts(True, 3, scan.Spread(1, 2, 3), scan.Listing(1, ("dog",)))
    assert comparison.val.classes == 2
    assert comparison.only_in_train == scan.Listing(2, ("cat", "eel"))
    assert comparison.only_in_val == scan.Listing(1, ("fox",))
    composed, decomposed = (Files([Path()], np.array([0]), (name,)) for name in ("caf\u00e9", "cafe\u0301"))
    alike = compare_splits(composed, decomposed)
    assert alike.only_in_train.count == alike.only_in_val.count == 0
    unlabeled = compare_splits(Files([Path()]), train)
    assert unlabeled.train == scan.ClassCounts(False, 0, None, scan.Listing(0, ()))
    assert unlabeled.only_in_val.count == 0


def test_report_in_words_and_as_json(copied):
    train, val = copied
    train.labels, train.classes = np.array([0, 0, 0, 0, 0, 0, 1, 1]), ("cat", "dog")
    val.labels, val.classes = np.zeros(5, dtype=np.int64), ("cow",)
    report = data_report(scanned(train), scanned(val))
    lines = describe(report)
    assert lines[0].startswith("train: 8 images, 2 of them bad, ")
    assert [line for line in lines if "images/s" not in line] == [
        "  short side 40, long side 48 to 56 (median 54) pixels",
        "  not_an_image: 2",
        f"    {train.name(6)}: not a known image format",
        f"    {train.name(7)}: not a known image format",
        "  short side 40, long side 44 to 52 (median 48) pixels",
        "  not_an_image: 1",
        f"    {val.name(1)}: not a known image format",
        "copies within train: 5 images, groups of equal content: 2",
        f"    {train.name(1)} = {train.name(3)} = {train.name(5)}",
        f"    {train.name(0)} = {train.name(4)}",
        "copies within val: 2 images, groups of equal content: 1",
        f"    {val.name(0)} = {val.name(3)}",
        "val images that are also in train: 3 images, groups of equal content: 2",
        f"    {train.name(0)} = {val.name(4)} and 1 more",
        f"    {train.name(2)} = {val.name(3)} and 1 more",
        "classes in train: 2 with 2 to 6 (median 4) images each, fewest in dog",
        "classes in val: 1 with 5 images each",
        "classes only in train: 2 (cat, dog)",
        "classes only in val: 1 (cow)",
    ]
    plain = json.loads(json.dumps(asdict(report)))
    assert plain["train"]["problems"]["not_an_image"]["count"] == 2
    assert plain["val_in_train"]["images"] == 3


def test_report_without_val_and_of_generated_pictures(copied):
    report = data_report(scanned(copied[0]), None)
    assert report.val is None and report.copies_in_val is None and report.val_in_train is None
    assert describe(report)[-1] == "classes in train: unknown, since the images are not in class folders"
    report = data_report(scanned(shapes_source("val")), None)
    assert report.train.readable == 0 and report.copies_in_train is None
    assert describe(report)[0] == "train: 1,000 images, not scanned: generated pictures are not files"

"""The scan of a data set: each kind of bad file, and workers that fail."""

import hashlib
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
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dino_sparo.data import scan
from dino_sparo.data.scan import scan_images
from dino_sparo.data.sources import open_images
from dino_sparo.errors import UserError

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
        if self.paths[index].name == "locked.jpg":  # permissions do not bind the superuser, who may run this
            raise PermissionError(13, "Permission denied")
        return self.paths[index].read_bytes()


def encoded(kind: str, pixels: np.ndarray = PIXELS, **options) -> bytes:
    buffer = BytesIO()
    Image.fromarray(pixels).save(buffer, kind, **options)
    return buffer.getvalue()


def write(folder: Path, **contents: bytes) -> Files:
    """Files named by the keywords, `a__png` for a.png."""
    paths = [folder / name.replace("__", ".") for name in contents]
    folder.mkdir(parents=True, exist_ok=True)
    for path, content in zip(paths, contents.values(), strict=True):
        path.write_bytes(content)
    return Files(paths)


def scanned(source, num_workers: int = 0):
    return scan_images(source, num_workers=num_workers, description="train")


def problems(source) -> dict[str, list[str]]:
    """Kind -> names of files."""
    found = scanned(source).report.problems
    return {kind: [Path(file.split(": ")[0]).name for file in files.first] for kind, files in found.items()}


# --- Kinds of bad files

GOOD = {
    "jpeg__jpg": encoded("JPEG"),
    "jpeg__png": encoded("JPEG"),
    "grey__jpg": encoded("JPEG", PIXELS[..., 0]),
    "deep__png": encoded("PNG", PIXELS[..., 0].astype(np.uint16) * 256),
    "webp__webp": encoded("WEBP"),
}
HALVES = {
    "half__jpg": encoded("JPEG"),
    "progressive__jpg": encoded("JPEG", progressive=True),
    "half__png": encoded("PNG"),
    "half__bmp": encoded("BMP"),
    "half__ppm": encoded("PPM"),
    "half__tif": encoded("TIFF"),
    "lzw__tif": encoded("TIFF", compression="tiff_lzw"),
    "half__webp": encoded("WEBP"),
}


def test_good_files_are_read_with_sizes_and_hashes(tmp_path):
    source = write(tmp_path, **GOOD, high__png=encoded("PNG", PIXELS[:, :10]))
    result = scanned(source)
    report = result.report
    assert report.images == report.readable == 6
    assert all(files.count == 0 for files in report.problems.values())
    assert (report.short_side, report.long_side) == (scan.Spread(10, 40, 40), scan.Spread(40, 56, 56))
    assert report.total_bytes == sum(path.stat().st_size for path in source.paths)
    hashes = [hashlib.blake2b(path.read_bytes(), digest_size=16).digest() for path in source.paths]
    assert [row.tobytes() for row in result.hashes] == hashes


@pytest.mark.parametrize("name", HALVES)
def test_half_a_file_is_truncated(tmp_path, name):
    source = write(tmp_path, whole=HALVES[name], **{name: HALVES[name][: len(HALVES[name]) // 2]})
    assert problems(source)["truncated"] == [source.paths[1].name]


def test_a_file_cut_in_its_header_is_truncated(tmp_path):
    source = write(
        tmp_path, a__jpg=encoded("JPEG")[:170], b__jpg=encoded("JPEG")[:25], c__tif=encoded("TIFF")[:99]
    )
    assert problems(source)["truncated"] == ["a.jpg", "b.jpg", "c.tif"]


def test_empty_foreign_and_unreadable_files(tmp_path, monkeypatch):
    damaged = bytearray(encoded("PNG"))
    damaged[len(damaged) // 2] ^= 255
    huge = encoded("PNG", np.zeros((300, 300), dtype=np.uint8))
    source = write(
        tmp_path, empty__jpg=b"", text__jpg=b"404 not found", damaged__png=bytes(damaged), huge__png=huge
    )
    (tmp_path / "link.jpg").symlink_to("nowhere.jpg")
    (tmp_path / "folder.jpg").mkdir()
    source.paths += [tmp_path / "link.jpg", tmp_path / "folder.jpg", tmp_path / "locked.jpg"]
    (tmp_path / "locked.jpg").write_bytes(GOOD["jpeg__jpg"])

    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10_000)
    report = scanned(source).report
    assert report.readable == 0
    assert {kind: files.count for kind, files in report.problems.items()} == {
        "zero_byte": 1,
        "not_an_image": 1,
        "truncated": 0,
        "unreadable": 5,
    }
    assert report.problems["zero_byte"].first == (f"{tmp_path}/empty.jpg: the file is empty",)
    assert report.problems["not_an_image"].first == (f"{tmp_path}/text.jpg: no known kind of image",)
    reasons = ["broken", "exceeds limit", "No such file", "Is a directory", "Permission denied"]
    assert all(
        reason in file for reason, file in zip(reasons, report.problems["unreadable"].first, strict=True)
    )


def test_readable_is_what_can_be_loaded(tmp_path):
    halves = {name: content[: len(content) // 2] for name, content in HALVES.items()}
    write(tmp_path / "train" / "a", **GOOD, **halves)
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
    files = {f"{n:03d}__png": encoded("PNG", np.full((9, 8 + n % 3), n, dtype=np.uint8)) for n in numbers}
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
    source = write(tmp_path, a__jpg=GOOD["jpeg__jpg"])
    os.mkfifo(tmp_path / "b.jpg")
    source.paths.append(tmp_path / "b.jpg")
    return source


def send_when_reading(fifo: Path, number: signal.Signals) -> None:
    """Sends a signal to the only worker as soon as it is at this file."""
    wait_for_reader(fifo)
    os.kill(multiprocessing.active_children()[0].pid, number)


def test_a_worker_that_hangs_ends_the_scan(with_hanging_file):
    # Ctrl-C reaches workers too, and must not make them print a traceback.
    threading.Thread(target=send_when_reading, args=(with_hanging_file.paths[1], signal.SIGINT)).start()
    with pytest.raises(UserError, match=r"no batch of images came within .* 1\.5 while at .*/b\.jpg; repair"):
        scan_images(with_hanging_file, num_workers=1, description="train", timeout_seconds=1.5)
    assert not multiprocessing.active_children()


def test_a_worker_that_dies_ends_the_scan(with_hanging_file):
    threading.Thread(target=send_when_reading, args=(with_hanging_file.paths[1], signal.SIGKILL)).start()
    with pytest.raises(UserError, match=r"has died \(DataLoader worker .*\) while at .*/b\.jpg; repair"):
        scan_images(with_hanging_file, num_workers=1, description="train")
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
threading.Thread(target=interrupt, args=(fifo, sys.argv[2] == "True"), daemon=True).start()
try:
    scan_images(Files([fifo] * 200), num_workers=2, description="train")
except KeyboardInterrupt:
    sys.exit(130)
"""


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
    source = write(tmp_path, a__jpg=GOOD["jpeg__jpg"])
    with caplog.at_level(logging.INFO, "dino_sparo"):
        scanned(Files(source.paths * (scan.BATCH_FILES + 1)))
    first, last = (record.getMessage() for record in caplog.records)
    assert first.startswith("train: 32 of 33 images, ")
    assert last.startswith("train: 33 of 33 images, ") and last.endswith("left 0:00:00")

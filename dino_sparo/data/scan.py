"""Read, hash, and decode every image once, in parallel, to find damaged files, copies, sizes, and classes.

27 bytes per image are stored. Axis letters: N images.
"""

import hashlib
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile
from PIL.TiffImagePlugin import TiffImageFile
from torch.utils.data import Dataset
from tqdm import tqdm

from dino_sparo.data.decode import AS_IS, PROBLEMS, open_image, orientation, problem_of, to_rgb
from dino_sparo.data.shapes import NumberedImages
from dino_sparo.data.sources import ImageSource
from dino_sparo.data.split_names import same_name
from dino_sparo.data.workers import PATIENCE_SECONDS, WatchedLoader
from dino_sparo.terminal import log, shows_bars

MAX_LISTED, MAX_SHOWN = 20, 5  # in a report, and in its text
BATCH_FILES = 32
FLAT_LEVELS, BLACK_LEVEL = 8, 32  # of 255
GRAY, GRAY_ROWS = 128, 4  # what decoders fill in for missing parts of a JPEG, and the last rows that show it
MARKS = {  # what may be wrong with an image that can be read
    "flat": "nearly constant or nearly black",
    "turned": "stored rotated, with an EXIF orientation that is ignored",
    "cut": "gray at the end, as a truncated JPEG is",
    "several": "the first of several images in their file; the others are not read",
}
HASH_BYTES = 16
LOG_EVERY_SECONDS = 30.0


@dataclass(frozen=True)
class Spread:
    """Smallest, median and largest of some numbers."""

    smallest: int
    median: int
    largest: int


@dataclass(frozen=True)
class Listing:
    """How many there are, and the first 20 of them."""

    count: int
    first: tuple[str, ...]


@dataclass(frozen=True)
class ScanReport:
    """What a scan found, in plain values."""

    images: int
    readable: int
    problems: dict[str, Listing]  # each of PROBLEMS -> the files that have it, with the reason
    marks: dict[str, Listing]  # each of MARKS -> the images that have it
    short_side: Spread | None  # in pixels, of readable images; None without any
    long_side: Spread | None
    total_bytes: int
    seconds: float
    skipped: str  # why nothing was scanned; empty after a scan

    @property
    def unreadable(self) -> int:
        """Images with any problem."""
        return sum(listing.count for listing in self.problems.values())


@dataclass(frozen=True, eq=False)
class ScanResult:
    """A scan's report, and what is needed to find copies."""

    report: ScanReport
    source: ImageSource
    readable: NDArray[np.bool_]  # (N,)
    hashes: NDArray[np.uint8]  # (N, 16), BLAKE2b of each file; zeros if it cannot be read


class Finding(NamedTuple):
    """The result for one file; zeros for what cannot be read."""

    num_bytes: int
    digest: bytes
    sides: tuple[int, int] = (0, 0)  # short and long
    problem: str = ""  # one of PROBLEMS
    reason: str = ""
    marks: tuple[str, ...] = ()  # of MARKS


class _Files(Dataset):
    """Item -> `Finding` of one file of a source."""

    def __init__(self, source: ImageSource) -> None:
        self.source = source

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Finding:
        data, digest = b"", bytes(HASH_BYTES)
        reading = getattr(self.source, "reading", AS_IS)
        try:
            data = self.source.read(index)
            digest = hashlib.blake2b(data, digest_size=HASH_BYTES).digest()
            with open_image(data, reading) as image:
                turned = isinstance(image, TiffImageFile) and orientation(image) != 1  # loading turns it
                rgb = to_rgb(image, reading.value_range)
                turned = turned or orientation(image) != 1
                is_jpeg = isinstance(image, JpegImageFile)
                found = {
                    "flat": is_flat(rgb),
                    "turned": turned,
                    "cut": is_jpeg and ends_gray(rgb),
                    "several": not is_jpeg and is_first_of_several(image),  # those of a JPEG are previews
                }
            short, long = sorted(rgb.size)
            return Finding(len(data), digest, (short, long), marks=tuple(filter(found.get, found)))
        except Exception as error:  # a damaged file makes PIL raise anything, and must not end the scan
            problem, reason = problem_of(data, error)
            return Finding(len(data), digest, problem=problem, reason=reason)


def is_flat(image: Image.Image) -> bool:
    """Whether an RGB image is nearly constant or nearly black, without its darkest and brightest 1 %."""
    counts = np.cumsum(image.convert("L").histogram())
    low, high = np.searchsorted(counts, [0.01 * counts[-1], 0.99 * counts[-1]])
    return bool(high - low < FLAT_LEVELS or high < BLACK_LEVEL)


def ends_gray(image: Image.Image) -> bool:
    """Whether the last rows of an RGB image are of the gray that a decoder fills in for missing parts."""
    end = image.crop((0, max(0, image.height - GRAY_ROWS), image.width, image.height))
    return end.getextrema() == ((GRAY, GRAY),) * 3


def is_first_of_several(image: Image.Image) -> bool:
    """Whether there are further pictures in an image's file; False if they are damaged."""
    try:
        return bool(getattr(image, "is_animated", False))
    except Exception:  # damaged files make Pillow raise anything
        return False


def scan_images(
    source: ImageSource, *, num_workers: int, description: str, timeout_seconds: float = PATIENCE_SECONDS
) -> ScanResult:
    """Read, hash, and decode every file of a source as in training.

    Args:
        source: images; a source without files is skipped.
        num_workers: processes to start, from the main thread; 0: scan in this process, without a timeout.
        description: text of the progress bar, or of the log without a terminal.
        timeout_seconds: timeout for the next 32 files.

    Raises:
        StuckError: a worker has died or hangs; the message names its file.
    """

    def name(index: int) -> str:
        return printable(source.name(index))

    skipped = source.no_files if isinstance(source, NumberedImages) else ""
    sides = np.zeros((len(source), 2), dtype=np.int32)
    hashes = np.zeros((len(source), HASH_BYTES), dtype=np.uint8)
    total_bytes = done = 0
    found: dict[str, list[str]] = {kind: [] for kind in (*PROBLEMS, *MARKS)}  # the first names of each
    counts: Counter[str] = Counter()
    started = time.monotonic()
    if not skipped:
        batches = WatchedLoader(
            _Files(source),
            image_of=int,
            name=name,
            num_workers=min(num_workers, -(-len(source) // BATCH_FILES)),
            timeout_seconds=timeout_seconds,
            collate=list,
            batch_size=BATCH_FILES,
        )
        with batches.failures_explained(), _progress(description, len(source)) as advance:
            for findings in batches:
                for finding in findings:
                    sides[done] = finding.sides
                    hashes[done] = np.frombuffer(finding.digest, np.uint8)
                    total_bytes += finding.num_bytes
                    for kind in (*finding.marks, *filter(None, [finding.problem])):
                        counts[kind] += 1
                        if len(found[kind]) < MAX_LISTED:
                            reason = finding.reason and f": {finding.reason}"
                            found[kind].append(f"{name(done)}{reason}")
                    done += 1
                advance(len(findings))
    readable = sides[:, 0] > 0
    report = ScanReport(
        images=len(source),
        readable=int(readable.sum()),
        problems={kind: Listing(counts[kind], tuple(found[kind])) for kind in PROBLEMS},
        marks={mark: Listing(counts[mark], tuple(found[mark])) for mark in MARKS},
        short_side=_spread(sides[readable, 0]),
        long_side=_spread(sides[readable, 1]),
        total_bytes=total_bytes,
        seconds=time.monotonic() - started,
        skipped=skipped,
    )
    return ScanResult(report, source, readable, hashes)


@contextmanager
def _progress(description: str, total: int) -> Iterator[Callable[[int], None]]:
    """A function to call with the number of images done: it moves a bar, or logs if there is no terminal."""
    started = logged = time.monotonic()
    done = 0

    def advance(count: int) -> None:
        nonlocal done, logged
        done += count
        bar.update(count)
        now = time.monotonic()
        if bar.disable and now - logged >= LOG_EVERY_SECONDS:
            logged, speed = now, done / (now - started)
            left = timedelta(seconds=round((total - done) / speed))
            log.info(f"{description}: {done:,} of {total:,} images, {speed:.0f} images/s, {left} left")

    with tqdm(total=total, desc=description, unit="img", leave=False, disable=not shows_bars()) as bar:
        yield advance


def _listing(names: list[str]) -> Listing:
    return Listing(len(names), tuple(names[:MAX_LISTED]))


def _spread(numbers: NDArray[np.integer]) -> Spread | None:
    """Of numbers (n,); None without any."""
    if len(numbers) == 0:
        return None
    return Spread(int(numbers.min()), round(float(np.median(numbers))), int(numbers.max()))


def printable(name: str) -> str:
    """A file name as text, even if it is not valid in the file system's encoding."""
    return name.encode("utf-8", "backslashreplace").decode("utf-8")


# --- Copies and classes


@dataclass(frozen=True)
class Copies:
    """Images with equal content, within one split or in both train and val."""

    groups: int
    images: int  # in these groups; if in both splits, those of val
    largest: tuple[Listing, ...]  # groups; if in both splits, one image of each


@dataclass(frozen=True)
class ClassCounts:
    """The classes that have images, and those with the fewest; without labels there are none."""

    labeled: bool
    classes: int
    images_per_class: Spread | None
    fewest: Listing


@dataclass(frozen=True)
class SplitComparison:
    """The classes of train and val; the last two are empty unless both are labeled."""

    train: ClassCounts
    val: ClassCounts | None
    only_in_train: Listing
    only_in_val: Listing


@dataclass(frozen=True)
class DataReport:
    """What a scan found out about a dataset; None for a missing split, and for copies without a scan."""

    train: ScanReport
    val: ScanReport | None
    copies_in_train: Copies | None
    copies_in_val: Copies | None
    val_in_train: Copies | None
    classes: SplitComparison


def data_report(train: ScanResult, val: ScanResult | None, gallery: ImageSource | None = None) -> DataReport:
    """Combine scans, copies, and classes; `dataclasses.asdict` converts the result to plain values.

    gallery: a source with the classes of val, if train has others.
    """

    def copies(one: ScanResult | None, *others: ScanResult | None) -> Copies | None:
        scanned = [scan for scan in (one, *others) if scan is not None and not scan.report.skipped]
        return find_copies(*scanned) if len(scanned) == 1 + len(others) else None

    return DataReport(
        train=train.report,
        val=val.report if val else None,
        copies_in_train=copies(train),
        copies_in_val=copies(val),
        val_in_train=copies(train, val),
        classes=replace(
            compare_splits(gallery or train.source, val.source if val else None),
            train=_count_classes(_images_per_class(train.source)),
        ),
    )


def find_copies(train: ScanResult, val: ScanResult | None = None) -> Copies:
    """Readable images with equal content in one scan; with `val`, images of val whose content is also in
    train."""
    scans = [train, val] if val else [train]
    numbers = np.concatenate([np.flatnonzero(scan.readable) for scan in scans])
    num_train = train.report.readable
    halves = np.concatenate([scan.hashes[scan.readable] for scan in scans]).view(np.uint64)
    order = np.lexsort(halves.T)  # equal rows are adjacent, train first
    differ = (halves[order][1:] != halves[order][:-1]).any(axis=1)
    starts = np.concatenate([[0], np.flatnonzero(differ) + 1, [len(order)]])
    sizes = counted = np.diff(starts)
    is_group = sizes > 1
    if val:
        from_val = np.concatenate([[0], np.cumsum(order >= num_train)])
        counted = np.diff(from_val[starts])
        is_group = (counted > 0) & (counted < sizes)

    def name(row: int) -> str:
        return printable(scans[int(row >= num_train)].source.name(int(numbers[row])))

    def members(group: int) -> Listing:
        rows = order[starts[group] : starts[group + 1]]
        return Listing(len(rows), tuple(map(name, rows[[0, -1]] if val else rows[:MAX_LISTED])))

    groups = np.flatnonzero(is_group)
    largest = groups[np.lexsort([order[starts[groups]], -sizes[groups]])][:MAX_LISTED]
    return Copies(len(groups), int(counted[groups].sum()), tuple(map(members, largest)))


def compare_splits(train: ImageSource, val: ImageSource | None) -> SplitComparison:
    """Classes with images in either split, their numbers of images, and classes in only one of the splits."""
    of_train, of_val = _images_per_class(train), _images_per_class(val)
    both = bool(of_train and of_val)
    in_train, in_val = (set(map(same_name, names)) for names in (of_train, of_val))
    return SplitComparison(
        train=_count_classes(of_train),
        val=None if val is None else _count_classes(of_val),
        only_in_train=_listing([name for name in of_train if both and same_name(name) not in in_val]),
        only_in_val=_listing([name for name in of_val if both and same_name(name) not in in_train]),
    )


def _images_per_class(source: ImageSource | None) -> dict[str, int]:
    """Number of images of each class that has any; empty without labels."""
    if source is None or source.labels is None:
        return {}
    counts = np.bincount(source.labels, minlength=len(source.classes)).tolist()
    return {printable(name): count for name, count in zip(source.classes, counts, strict=True) if count}


def _count_classes(images: dict[str, int]) -> ClassCounts:
    smallest = min(images.values(), default=0)
    return ClassCounts(
        labeled=bool(images),
        classes=len(images),
        images_per_class=_spread(np.array([*images.values()], dtype=np.int64)),
        fewest=_listing([name for name, count in images.items() if count == smallest]),
    )


# --- The report in words


def describe(report: DataReport) -> list[str]:
    """The report as lines of text, with the first five entries of long lists."""
    lines = []
    for split, scan in (("train", report.train), ("val", report.val)):
        lines += _describe_scan(split, scan) if scan else []
    for what, copies in (
        ("copies within train", report.copies_in_train),
        ("copies within val", report.copies_in_val),
        ("val images that are also in train", report.val_in_train),
    ):
        if copies is not None:
            lines.append(f"{what}: {copies.images:,} images, groups of equal content: {copies.groups:,}")
            lines += [f"    {_few(group, ' = ')}" for group in copies.largest[:MAX_SHOWN]]
    for split, counts in (("train", report.classes.train), ("val", report.classes.val)):
        if counts and counts.images_per_class:
            images = _range(counts.images_per_class)
            fewest = "" if counts.fewest.count == counts.classes else f", fewest in {_few(counts.fewest)}"
            lines.append(f"classes in {split}: {counts.classes:,} with {images} images each{fewest}")
        elif counts:
            lines.append(f"classes in {split}: unknown, since the images are not in class folders")
    for split, only in (("train", report.classes.only_in_train), ("val", report.classes.only_in_val)):
        if only.count:
            lines.append(f"classes only in {split}: {only.count:,} ({_few(only)})")
    return lines


def _describe_scan(split: str, report: ScanReport) -> list[str]:
    if report.skipped:
        return [f"{split}: {report.images:,} images, not scanned: {report.skipped}"]
    bad = f"{report.unreadable:,} of them bad" if report.unreadable else "all readable"
    lines = [
        f"{split}: {report.images:,} images, {bad}, {report.total_bytes / 1e6:,.1f} MB, "
        f"read at {report.images / report.seconds:,.0f} images/s"
    ]
    if report.short_side and report.long_side:
        lines.append(f"  short side {_range(report.short_side)}, long side {_range(report.long_side)} pixels")
    for kind, files in report.problems.items():
        if files.count:
            lines += [f"  {kind}: {files.count:,}", *(f"    {file}" for file in files.first[:MAX_SHOWN])]
    for mark, files in report.marks.items():
        if files.count:
            lines.append(f"  {MARKS[mark]}: {files.count:,} ({_few(files)})")
    return lines


def _range(spread: Spread) -> str:
    if spread.smallest == spread.largest:
        return f"{spread.smallest:,}"
    return f"{spread.smallest:,} to {spread.largest:,} (median {spread.median:,})"


def _few(listing: Listing, separator: str = ", ") -> str:
    shown = listing.first[:MAX_SHOWN]
    more = listing.count - len(shown)
    return separator.join(shown) + (f" and {more:,} more" if more else "")

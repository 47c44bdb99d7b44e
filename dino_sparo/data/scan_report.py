"""What scans say of a data set: bad files, copies by content, and how train and val differ.

N: images.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dino_sparo.data.scan import (
    MAX_LISTED,
    Listing,
    ScanReport,
    ScanResult,
    Spread,
    listing,
    printable,
    spread,
)
from dino_sparo.data.sources import ImageSource

MAX_SHOWN = 5


@dataclass(frozen=True)
class Copies:
    """Images of equal content."""

    groups: int
    """Contents that occur more than once, or in both splits."""
    images: int
    """Images in these groups; of val against train those of val."""
    largest: tuple[Listing, ...]
    """The 20 largest groups; of val against train one image of train and one of val each."""


@dataclass(frozen=True)
class ClassCounts:
    """The classes that have images; without labels there are none."""

    labelled: bool
    classes: int
    images_per_class: Spread | None
    fewest: Listing
    """The classes with the smallest number of images."""


@dataclass(frozen=True)
class SplitComparison:
    """The classes of train and val; the last two are empty unless both are labelled."""

    train: ClassCounts
    val: ClassCounts | None
    only_in_train: Listing
    only_in_val: Listing


@dataclass(frozen=True)
class DataReport:
    """What there is to know of a data set before training on it; None is what concerns a split that is not
    there, and copies where nothing was scanned."""

    train: ScanReport
    val: ScanReport | None
    copies_in_train: Copies | None
    copies_in_val: Copies | None
    val_in_train: Copies | None
    classes: SplitComparison


def data_report(train: ScanResult, val: ScanResult | None) -> DataReport:
    """Scans, copies and classes together; `dataclasses.asdict` makes plain values of it."""
    files_of_train = None if train.report.skipped else train
    files_of_val = None if val is None or val.report.skipped else val
    return DataReport(
        train=train.report,
        val=val.report if val else None,
        copies_in_train=copies_inside(files_of_train) if files_of_train else None,
        copies_in_val=copies_inside(files_of_val) if files_of_val else None,
        val_in_train=copies_across(files_of_train, files_of_val) if files_of_train and files_of_val else None,
        classes=compare_splits(train.source, val.source if val else None),
    )


def copies_inside(scan: ScanResult) -> Copies:
    """Groups of readable images of equal content in one scan."""
    images = np.flatnonzero(scan.readable)
    order, starts = _equal_rows(scan.hashes[images])
    sizes = np.diff(starts)

    def members(group: int) -> Listing:
        first = order[starts[group] : starts[group + 1]][:MAX_LISTED]
        return Listing(int(sizes[group]), tuple(_name(scan, number) for number in images[first]))

    groups = np.flatnonzero(sizes > 1)
    largest = groups[np.lexsort([order[starts[groups]], -sizes[groups]])][:MAX_LISTED]
    return Copies(len(groups), int(sizes[groups].sum()), tuple(members(group) for group in largest))


def copies_across(train: ScanResult, val: ScanResult) -> Copies:
    """Readable images of val whose content is in train as well, so that an evaluation has seen them."""
    of_train, of_val = np.flatnonzero(train.readable), np.flatnonzero(val.readable)
    order, starts = _equal_rows(np.concatenate([train.hashes[of_train], val.hashes[of_val]]))
    from_val = np.concatenate([[0], np.cumsum(order >= len(of_train))])
    sizes, sizes_in_val = np.diff(starts), np.diff(from_val[starts])

    def pair(group: int) -> Listing:
        first, last = order[starts[group]], order[starts[group + 1] - 1]  # equal rows keep their order
        names = _name(train, of_train[first]), _name(val, of_val[last - len(of_train)])
        return Listing(int(sizes[group]), names)

    groups = np.flatnonzero((sizes_in_val > 0) & (sizes_in_val < sizes))
    largest = groups[np.lexsort([order[starts[groups]], -sizes[groups]])][:MAX_LISTED]
    return Copies(len(groups), int(sizes_in_val[groups].sum()), tuple(pair(group) for group in largest))


def _equal_rows(hashes: NDArray[np.uint8]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(N, 16) -> row numbers with equal rows side by side, and where each group starts, with N at the end."""
    halves = np.ascontiguousarray(hashes).view(np.uint64)
    order = np.lexsort(halves.T)
    differ = (halves[order][1:] != halves[order][:-1]).any(axis=1)
    return order, np.concatenate([[0], np.flatnonzero(differ) + 1, [len(order)]])


def _name(scan: ScanResult, number: np.integer) -> str:
    return printable(scan.source.name(int(number)))


def compare_splits(train: ImageSource, val: ImageSource | None) -> SplitComparison:
    """Classes that have images in either split, how many images they have, and where they are missing."""
    only_in_train, only_in_val = [], []
    if val is not None and train.labels is not None and val.labels is not None:
        of_train, of_val = _images_per_class(train), _images_per_class(val)
        only_in_train = [name for name in of_train if name not in of_val]
        only_in_val = [name for name in of_val if name not in of_train]
    return SplitComparison(
        train=_count_classes(train),
        val=None if val is None else _count_classes(val),
        only_in_train=listing(only_in_train),
        only_in_val=listing(only_in_val),
    )


def _images_per_class(source: ImageSource) -> dict[str, int]:
    """Images of each class that has any; nothing without labels."""
    labels = source.labels
    if labels is None:
        return {}
    counts = np.bincount(labels, minlength=len(source.classes)).tolist()
    return {printable(name): count for name, count in zip(source.classes, counts, strict=True) if count}


def _count_classes(source: ImageSource) -> ClassCounts:
    counts = _images_per_class(source)
    smallest = min(counts.values(), default=0)
    return ClassCounts(
        labelled=source.labels is not None,
        classes=len(counts),
        images_per_class=spread(np.array([*counts.values()], dtype=np.int64)),
        fewest=listing([name for name, count in counts.items() if count == smallest]),
    )


# --- The report in words


def describe(report: DataReport) -> list[str]:
    """The report as lines of text; of long lists the first five."""
    lines = _describe_scan("train", report.train)
    if report.val is not None:
        lines += _describe_scan("val", report.val)
    lines += _describe_copies("copies within train", report.copies_in_train)
    lines += _describe_copies("copies within val", report.copies_in_val)
    lines += _describe_copies("val images that are in train too", report.val_in_train)
    lines += _describe_classes("train", report.classes.train)
    if report.classes.val is not None:
        lines += _describe_classes("val", report.classes.val)
    for split, only in (("train", report.classes.only_in_train), ("val", report.classes.only_in_val)):
        if only.count:
            lines.append(f"classes only in {split}: {only.count:,} ({_few(only)})")
    return lines


def _describe_scan(split: str, report: ScanReport) -> list[str]:
    if report.skipped:
        return [f"{split}: {report.images:,} images, not scanned: {report.skipped}"]
    bad = report.images - report.readable
    lines = [
        f"{split}: {report.images:,} images, {f'{bad:,} of them bad' if bad else 'all readable'}, "
        f"{report.total_bytes / 1e6:,.1f} MB, read at {report.images / report.seconds:,.0f} images/s"
    ]
    if report.short_side and report.long_side:
        lines.append(f"  short side {_range(report.short_side)}, long side {_range(report.long_side)} pixels")
    for kind, files in report.problems.items():
        if files.count:
            lines.append(f"  {kind}: {files.count:,}")
            lines += [f"    {file}" for file in files.first[:MAX_SHOWN]]
    return lines


def _describe_copies(what: str, copies: Copies | None) -> list[str]:
    if copies is None:
        return []
    if copies.groups == 0:
        return [f"{what}: none"]
    groups = "1 group" if copies.groups == 1 else f"{copies.groups:,} groups"
    return [
        f"{what}: {copies.images:,} images in {groups} of equal content",
        *(f"    {_few(group, ' = ')}" for group in copies.largest[:MAX_SHOWN]),
    ]


def _describe_classes(split: str, counts: ClassCounts) -> list[str]:
    if counts.images_per_class is None:
        return [f"classes in {split}: unknown, as the images do not lie in class folders"]
    fewest = "" if counts.fewest.count == counts.classes else f", fewest in {_few(counts.fewest)}"
    return [
        f"classes in {split}: {counts.classes:,} with {_range(counts.images_per_class)} images each{fewest}"
    ]


def _range(spread: Spread) -> str:
    if spread.smallest == spread.largest:
        return f"{spread.smallest:,}"
    return f"{spread.smallest:,} to {spread.largest:,} (median {spread.median:,})"


def _few(listing: Listing, separator: str = ", ") -> str:
    shown = listing.first[:MAX_SHOWN]
    more = listing.count - len(shown)
    return separator.join(shown) + (f" and {more:,} more" if more else "")

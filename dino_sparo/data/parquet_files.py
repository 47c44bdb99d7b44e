"""What is in parquet files as the Hugging Face hub ships image sets, and the parts of an index file of it.

One column holds the images as struct{bytes, path}, one of integers their classes, and the names of the
classes are in the schema's metadata. Files are named by their split: `train-00000-of-00294.parquet`.
"""

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from dino_sparo.data.imagenet import is_image
from dino_sparo.data.index import index_parts
from dino_sparo.data.shard_headers import states_of
from dino_sparo.data.walk import THREADS
from dino_sparo.errors import UserError, UserFileNotFoundError

Split = Literal["train", "val"]
WORDS: dict[Split, tuple[str, ...]] = {"train": ("train",), "val": ("validation", "valid", "val", "test")}
NAMED = re.compile(r"(train|validation|valid|val|test)([-_.].*)?\.parquet")
OF_TOTAL = re.compile(r"-of-(\d+)\b")  # how many files of a split there are
FOLDERS = ("", "data/")  # where the hub keeps them
PROBED_ENTRIES = 64  # a folder of a million images is not listed to see that it has no parquet files
HUB_KEY = b"huggingface"
EXPECTED = "expected one column of type struct{bytes, path}, as the Hugging Face hub ships images"


def holds_parquet(root: Path) -> bool:
    """Whether a folder is one of parquet files, by a look at some entries: named by split, or nothing but."""
    for folder in FOLDERS:
        names, below = _entries(root / folder, PROBED_ENTRIES)
        if any(map(NAMED.fullmatch, names)):
            return True
        if any(map(_is_parquet, names)) and not below and not any(map(is_image, names)):
            return True
    return False


def list_parquet(root: Path, split: Split) -> list[str]:
    """Parquet files of a split, relative to the folder and in order; files without a split in
    their names or that of their folder are train's."""
    for folder in FOLDERS:
        names = [name for name in _entries(root / folder, None)[0] if _is_parquet(name)]
        named = {name: match[1] for name in names if (match := NAMED.fullmatch(name))}
        for word in WORDS[split] if named else ():
            if found := sorted(name for name in named if named[name] == word):
                return [folder + name for name in found]
        if names:
            return sorted(folder + name for name in names) if split == "train" and not named else []
    for word in WORDS[split]:  # as the hub converts sets itself: train/0000.parquet
        if names := [name for name in _entries(root / word, None)[0] if _is_parquet(name)]:
            return sorted(f"{word}/{name}" for name in names)
    return []


def _entries(folder: Path, limit: int | None) -> tuple[list[str], list[str]]:
    """Names of files and of folders in a folder, hidden ones left out; none if it cannot be listed."""
    files: list[str] = []
    folders: list[str] = []
    try:
        with os.scandir(folder) as scan:
            for entry in islice(scan, limit):
                if not entry.name.startswith("."):
                    (folders if entry.is_dir() else files).append(entry.name)
    except OSError:  # who opens the folder will say so
        pass
    return files, folders


def _is_parquet(name: str) -> bool:
    return name.endswith(".parquet") and not name.startswith(".")


class Columns(NamedTuple):
    """What a file's schema says."""

    image: str
    has_path: bool
    label: str | None
    classes: list[str] | None
    """Names of the classes by number; None if there are none."""


class _File(NamedTuple):
    """The images of one file."""

    columns: Columns
    paths: list[str | None]
    labels: NDArray[np.int64] | None
    """None if one is missing or negative, as in test sets."""
    groups: list[tuple[int, int]]
    """Images and bytes of them in each row group."""


def import_parquet() -> Any:
    """The module pyarrow.parquet. Raises UserError: it is not installed."""
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise UserError(
            "parquet files need a package that is not installed here; pip install pyarrow"
        ) from error
    return parquet


def pack_parquet(root: Path, split: Split) -> list[bytes]:
    """The parts of an index file of the parquet files of a split.

    Raises:
        UserFileNotFoundError: there is no image.
        UserError: a file is damaged, has no images, or other columns or classes than the first.
    """
    files = list_parquet(root, split)
    _check_complete(root, files)
    states = states_of(root, files)  # before they are read: a change after that is seen the next time
    import_parquet()
    with ThreadPoolExecutor(THREADS) as pool:
        read = pool.map(lambda name: _read_file(root / name), files)
        found = list(tqdm(read, f"indexing {root}", len(files), unit="file", leave=False, disable=None))
    columns = found[0].columns
    for name, file in zip(files, found, strict=True):
        if file.columns != columns:
            raise UserError(
                f"{root / name} has {_differences(file.columns, columns)} than {files[0]}; all files of a "
                f"set need the same columns and classes; keep those of another set in a folder of their own"
            )
    counts = [len(file.paths) for file in found]
    if not sum(counts):
        raise UserFileNotFoundError(
            f"{root}: no images found in {len(files)} parquet files; download them again"
        )
    labels = [file.labels for file in found if file.labels is not None]
    numbers = np.concatenate(labels) if len(labels) == len(found) else None
    classes, numbers = _classes(root, columns.classes, numbers)
    packed = b"\0".join(_names(files, found, classes, numbers))
    ends = np.flatnonzero(np.frombuffer(packed, np.uint8) == 0)
    groups = [(number, *group) for number, file in enumerate(found) for group in enumerate(file.groups)]
    images = np.array([size for _, _, (size, _) in groups], np.int64)
    return index_parts(
        {
            "root": os.path.realpath(root),  # for people
            "num_loose": 0,
            "fingerprint": hashlib.sha256(packed).hexdigest(),
            "classes": classes,
            "files": files,
            "split": split,
            "column": columns.image,
        },
        {
            "names": np.frombuffer(packed, np.uint8),
            "starts": np.concatenate([[0], ends + 1, [len(packed) + 1]]),
            "class_starts": np.zeros(1, np.int64),
            "folders": np.empty(0, np.uint8),
            "states": np.array([(*state, 0) for state in states], np.uint64).ravel(),
            "labels": np.empty(0, np.int32) if numbers is None else numbers.astype(np.int32),
            "firsts": np.cumsum([0, *counts[:-1]]),
            "group_firsts": np.cumsum(images) - images,
            "group_files": np.array([file for file, _, _ in groups], np.int64),
            "group_numbers": np.array([number for _, number, _ in groups], np.int64),
            "group_bytes": np.array([num_bytes for _, _, (_, num_bytes) in groups], np.int64),
        },
    )


def _check_complete(root: Path, files: Sequence[str]) -> None:
    """Raises UserError: names say that there are more files (`-of-00294`) than there are."""
    totals = {int(match[1]) for name in files if (match := OF_TOTAL.search(name))}
    if len(totals) > 1 or len(files) < max(totals, default=0):
        raise UserError(
            f"{root} holds {len(files)} of {' or '.join(map(str, sorted(totals)))} parquet files, such as "
            f"{files[0]}; download the others, or remove -of- and what follows from the names to take these"
        )


def _differences(columns: Columns, first: Columns) -> str:
    """What differs between two files, for a message."""
    if columns.image != first.image or columns.label != first.label:
        return f"columns {columns.image!r} and {columns.label!r}, others"
    return "other names of the classes" if columns.classes != first.classes else "images with other fields"


def _classes(
    root: Path, names: list[str] | None, numbers: NDArray[np.int64] | None
) -> tuple[list[str], NDArray[np.int64] | None]:
    """Class names, and the class number of every image; none if they are unknown of an image.

    Without names the numbers are names. Names that are there twice (ImageNet's crane) get their number.
    """
    if numbers is None:
        return [], None
    if names is None:
        present, numbers = np.unique(numbers, return_inverse=True)
        return [str(number) for number in present], numbers
    if numbers.max() >= len(names):
        raise UserError(
            f"{root}: an image has class number {numbers.max()}, but the files name only {len(names)} "
            f"classes; download them again"
        )
    times = Counter(names)
    return [f"{name} ({i})" if times[name] > 1 else name for i, name in enumerate(names)], numbers


def _names(
    files: list[str], found: list[_File], classes: list[str], numbers: NDArray[np.int64] | None
) -> Iterator[bytes]:
    """For each image its path in the class folders that the files may have been made of: `<class>/<file>`.

    A row without a path is named by file and row. The ending marks it as an image for who reads shards of it;
    decoding looks at the content.
    """
    folders = [name.replace("/", "_") for name in classes]
    labels = None if numbers is None else iter(numbers.tolist())
    for parquet, file in zip(files, found, strict=True):
        stem = Path(parquet).stem
        for row, path in enumerate(file.paths):
            name = (path or "").rpartition("/")[2].lstrip(".").replace("\0", "") or f"{stem}-{row:06d}"
            name = name if is_image(name) else f"{name}.png"
            name = name if labels is None else f"{folders[next(labels)]}/{name}"
            yield name.encode("utf-8", "surrogateescape")


def _read_file(path: Path) -> _File:
    """All but the images' bytes. Raises UserError: it is damaged or has no images."""
    import pyarrow as pa

    try:
        file = import_parquet().ParquetFile(path, pre_buffer=False)
        columns = _columns(path, file.schema_arrow)
        wanted = [f"{columns.image}.path"] if columns.has_path else []
        wanted += [columns.label] if columns.label else []
        table = file.read(columns=wanted, use_threads=False)
        rows = file.metadata.num_rows
        paths: list[str | None] = [None] * rows
        if columns.has_path:
            paths = [image and image["path"] for image in table.column(columns.image).to_pylist()]
        labels = table.column(columns.label) if columns.label else None
        known = labels is not None and labels.null_count == 0
        numbers = labels.to_numpy().astype(np.int64) if labels is not None and known else None
        return _File(
            columns,
            paths,
            None if numbers is None or (numbers < 0).any() else numbers,
            list(_groups(file.metadata, f"{columns.image}.bytes")),
        )
    except pa.ArrowException as error:
        reason = str(error).partition("\n")[0].rstrip(".")
        raise UserError(
            f"{path} is no whole parquet file ({reason}); download it again (of a git clone: git lfs pull)"
        ) from error
    except OSError as error:
        reason = error.strerror or str(error).partition("\n")[0].rstrip(".")
        raise UserError(f"{path}: the file cannot be read ({reason}); repair or download it again") from error


def _groups(metadata: Any, column: str) -> Iterator[tuple[int, int]]:
    """Images and bytes of them in each row group of a file that holds some."""
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        sizes = [
            chunk.total_uncompressed_size
            for chunk in map(group.column, range(group.num_columns))
            if chunk.path_in_schema == column
        ]
        yield group.num_rows, sum(sizes)


def _columns(path: Path, schema: Any) -> Columns:
    """The columns of images and classes. Raises UserError: there is not exactly one of images."""
    from pyarrow import types

    images = [field for field in schema if _is_image_column(field.type)]
    if len(images) != 1:
        what = "no column" if not images else f"the columns {_listed([field.name for field in images])}"
        raise UserError(f"{path} has {what} of images among {_listed(schema.names)}; {EXPECTED}")
    features = _features(schema.metadata or {})
    integers = [field.name for field in schema if types.is_integer(field.type)]
    classes = [name for name in integers if features.get(name, {}).get("_type") == "ClassLabel"]
    named = [name for name in ("label", "labels") if name in integers]
    label = named[0] if named else classes[0] if len(classes) == 1 else None
    names = features.get(label or "", {}).get("names")
    fields = [images[0].type.field(i).name for i in range(images[0].type.num_fields)]
    return Columns(images[0].name, "path" in fields, label, list(map(str, names)) if names else None)


def _is_image_column(kind: Any) -> bool:
    from pyarrow import types

    if not types.is_struct(kind):
        return False
    fields = {kind.field(i).name: kind.field(i).type for i in range(kind.num_fields)}
    return "bytes" in fields and (types.is_binary(fields["bytes"]) or types.is_large_binary(fields["bytes"]))


def _features(metadata: dict[bytes, bytes]) -> dict[str, dict[str, Any]]:
    """What the hub's library has written about each column; nothing if another one has written the file."""
    try:
        features = json.loads(metadata[HUB_KEY])["info"]["features"]
        return {name: feature for name, feature in features.items() if isinstance(feature, dict)}
    except (KeyError, ValueError, TypeError, AttributeError):
        return {}


def _listed(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names))

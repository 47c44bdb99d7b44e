"""Images in tables: parquet files, folders of `datasets.save_to_disk`, sets of the Hugging Face hub.

One column holds the images as struct{bytes, path}, one of integers their classes, and the names of the
classes are in the schema's metadata. Parquet files are named by their split: `train-00000-of-00294.parquet`.
Hugging Face's library `datasets` keeps an Arrow copy of them, in which the bytes of an image lie one after
the other, so that they are read by offset as those in shards: as quick in a random order as in sequence.
"""

import hashlib
import json
import logging
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from dino_sparo.data.arrow import (
    Columns,
    Rows,
    check_readable,
    image_places,
    import_arrow,
    import_datasets,
    read_arrow,
    read_parquet,
)
from dino_sparo.data.imagenet import is_image
from dino_sparo.data.index import cached_index, index_parts
from dino_sparo.data.shards import ShardIndex, ShardSource, states_of
from dino_sparo.data.walk import THREADS
from dino_sparo.errors import UserError, UserFileNotFoundError
from dino_sparo.terminal import shows_bars

log = logging.getLogger("dino_sparo")

Split = Literal["train", "val"]
HUB = "hub:"
HUB_NAME = re.compile(r"hub:(?P<repository>[^:@]+)(:(?P<config>[^@]+))?(@(?P<revision>.+))?")
HUB_WORDS: dict[Split, tuple[str, ...]] = {"train": ("train",), "val": ("validation", "valid", "val")}
WORDS: dict[Split, tuple[str, ...]] = HUB_WORDS | {"val": (*HUB_WORDS["val"], "test")}
NAMED = re.compile(r"(train|validation|valid|val|test)([-_.].*)?\.parquet")
OF_TOTAL = re.compile(r"-of-(\d+)\b")  # how many files of a split there are
FOLDERS = ("", "data/")  # where the hub keeps them
SAVED, SAVED_INFO, SAVED_SPLITS = (
    "state.json",
    "dataset_info.json",
    "dataset_dict.json",
)  # what save_to_disk writes
PROBED_ENTRIES = 64  # a folder of a million images is not listed to see that it has no parquet files


class TableIndex(ShardIndex):
    """Names, classes and places of the images of a split; the Arrow files of the copy are its shards."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        """Map `file`, an intact index of tables that lies at `path`."""
        super().__init__(path, file)
        self.files: list[str] = self.header["files"]
        self.commit: str = self.header["commit"]
        """Of the hub's repository; empty for what is on disk."""

    def place_name(self, root: Path, position: int) -> str:
        firsts = self.arrays["file_firsts"]
        number = int(np.searchsorted(firsts, position, side="right")) - 1
        return f"{os.path.join(root, self.files[number]).rstrip('/')}, row {position - int(firsts[number])}"

    def is_current(self, root: Path) -> bool:
        """Whether files and copy are those that were indexed, by name, size and time."""
        files, split = self.header["files"], self.header["split"]
        if self.header["kind"] == "parquet":
            states = self.arrays["file_states"].reshape(-1, 2).tolist()
            if list_parquet(root, split) != files or list(map(list, states_of(root, files))) != states:
                return False
        elif self.header["kind"] == "saved" and _saved_files(root, split) != self.shards:
            return False
        return list(map(list, states_of(root, self.shards))) == self.states[:, :2].tolist()


@dataclass(frozen=True, eq=False)
class TableSource(ShardSource):
    """Images in the tables of a split, in their order."""

    index: TableIndex


def holds_tables(root: Path) -> bool:
    """Whether a folder is one of tables, by a look at some entries: saved, or parquet files named by split,
    or nothing but parquet files."""
    if (root / SAVED_SPLITS).is_file() or all((root / name).is_file() for name in (SAVED, SAVED_INFO)):
        return True
    for folder in FOLDERS:
        names, below = _entries(root / folder, PROBED_ENTRIES)
        if any(map(NAMED.fullmatch, names)):
            return True
        if any(map(_is_parquet, names)) and not below and not any(map(is_image, names)):
            return True
    return False


def open_tables(root: Path, split: Split) -> TableSource | None:
    """The images of a split in the tables of a folder; None if there are none of this split.

    The first time `datasets` makes an Arrow copy of parquet files, where it keeps all of them ($HF_HOME).

    Raises:
        UserFileNotFoundError: there is no image in them.
        UserError: `datasets` is missing, a file is damaged or has no images, or copy or index cannot be kept.
    """
    if _saved_files(root, split):
        make = partial(_pack_saved, root, split)
    elif list_parquet(root, split):
        make = partial(_pack_parquet, root, split)
    else:
        return None
    import_arrow()
    return TableSource.of_all(root, cached_index(TableIndex, root, f".{split}.arrow", make))


def open_hub(path: str, split: Split) -> TableSource | None:
    """The images of a split of `hub:OWNER/NAME[:CONFIG][@REVISION]`; None if it has no such split.

    Neither a test split nor code of the repository is ever fetched. What was fetched once is used without a
    look at the hub, so that a run goes on from the same commit; another commit is named as @REVISION.

    Raises:
        UserError: as `open_tables`, or the hub cannot be reached.
    """
    match = HUB_NAME.fullmatch(path)
    if match is None:
        raise UserError(
            f"data.path {path!r} is no set of the hub; expected hub:OWNER/NAME[:CONFIG][@REVISION]"
        )
    datasets = import_datasets()
    key = Path(datasets.config.HF_DATASETS_CACHE).absolute() / path
    try:
        make = partial(_pack_hub, path, split, **match.groupdict())
        index = cached_index(TableIndex, key, f".{split}.arrow", make)
    except _NoSplitError:
        return None
    log.info("%s, %s: commit %s", path, split, index.commit)
    return TableSource.of_all(Path(path), index)


def commit_of(source: object) -> dict[str, str]:
    """The commit of the hub's repository that images are from, for the list of a run's starts."""
    commit = source.index.commit if isinstance(source, TableSource) else ""
    return {"data_commit": commit} if commit else {}


# --- Which files


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


def _saved_files(root: Path, split: Split) -> list[str]:
    """Arrow files of a split that `save_to_disk` has written, relative to the folder and in order."""
    places = ["", *WORDS["train"]] if split == "train" else WORDS["val"]
    for place in places:
        try:
            state = json.loads((root / place / SAVED).read_text())
            return [os.path.join(place, file["filename"]) for file in state["_data_files"]]
        except OSError:
            continue
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{root / place / SAVED} is not as save_to_disk writes it; save the set again"
            ) from error
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


# --- What the index of a split is made of


class _NoSplitError(Exception):
    """A set of the hub has no such split."""


def _pack_parquet(root: Path, split: Split) -> list[bytes]:
    """The parts of an index file of the parquet files of a split, once their copy is made."""
    files = list_parquet(root, split)
    _check_complete(root, files)
    states = states_of(root, files)  # before they are read: a change after that is seen the next time
    with ThreadPoolExecutor(THREADS) as pool:
        read = pool.map(lambda name: read_parquet(root / name), files)
        bar = tqdm(read, f"indexing {root}", len(files), unit="file", leave=False, disable=not shows_bars())
        tables = list(bar)
    columns = tables[0].columns
    for name, table in zip(files, tables, strict=True):
        if table.columns != columns:
            raise UserError(
                f"{root / name} has {_differences(table.columns, columns)} than {files[0]}; all files of a "
                f"set need the same columns and classes; keep those of another set in a folder of their own"
            )
    if not sum(len(table.paths) for table in tables):
        raise UserFileNotFoundError(
            f"{root}: no images found in {len(files)} parquet files; download them again"
        )
    datasets = import_datasets()
    builder = datasets.load_dataset_builder(
        "parquet",
        data_files={split: [str((root / name).absolute()) for name in files]},
        columns=[columns.image],
        features=datasets.Features({columns.image: datasets.Image(decode=False)}),
    )
    try:
        arrow = _prepared(builder, split, str(root), sum(table.num_bytes for table in tables))
    except UserError as error:
        for name in files:
            check_readable(root / name, columns.image, error)
        raise
    return _parts(root, split, "parquet", tables, files, arrow, states)


def _pack_saved(root: Path, split: Split) -> list[bytes]:
    """The parts of an index file of what `save_to_disk` has written; no copy is made."""
    files = _saved_files(root, split)
    where = os.path.dirname(files[0])
    return _parts(root, split, "saved", [read_arrow(root, files)], [where], files)


def _pack_hub(
    path: str, split: Split, repository: str, config: str | None, revision: str | None
) -> list[bytes]:
    """The parts of an index file of a split of the hub, of which only this split is fetched.

    Raises:
        _NoSplitError: it has none of this name.
    """
    datasets = import_datasets()
    try:
        whole = datasets.load_dataset_builder(repository, config, revision=revision)
        found = whole.config.data_files or {}
        word = next((word for word in HUB_WORDS[split] if word in found), None)
        if word is None:
            raise _NoSplitError
        urls = [str(url) for url in found[word]]
        if not all(_is_parquet(os.path.basename(url)) for url in urls):
            raise UserError(
                f"{path}: the repository does not hold parquet files; the hub's own conversion may be there: "
                f"{HUB}{repository}@refs/convert/parquet"
            )
        commit = next((found[1] for url in urls if (found := re.search(r"@([^/]+)/", url))), revision or "")
        builder = datasets.load_dataset_builder("parquet", data_files={word: urls})
        size = whole.info.splits[word].num_bytes if word in (whole.info.splits or {}) else None
        arrow = _prepared(builder, word, path, size)
    except (UserError, _NoSplitError):
        raise
    except Exception as error:  # of several libraries for the network
        reason = str(error).strip().partition("\n")[0].rstrip(".") or type(error).__name__
        raise UserError(
            f"{path} cannot be had from the hub ({reason}); check the name, or fetch it where there is a "
            f"network and copy the folders HF_HOME and DINO_SPARO_CACHE"
        ) from error
    return _parts(Path(path), split, "hub", [read_arrow(Path(), arrow)], [split], arrow, commit=commit)


def _prepared(builder: Any, split: str, what: str, num_bytes: int | None) -> list[str]:
    """The Arrow files that `datasets` keeps of a split; other processes wait until they are made.

    Raises:
        UserError: they cannot be made.
    """
    datasets = import_datasets()
    if not Path(builder.cache_dir).exists():
        size = f"about {num_bytes / 1e9:.2f} GB" if num_bytes is not None else "as much as the download"
        log.info(
            "%s: an Arrow copy of the split %s is made, which takes %s in %s; HF_DATASETS_CACHE can name "
            "another folder",
            *(what, split, size, builder.cache_dir),
        )
    if not shows_bars():
        datasets.disable_progress_bars()
    try:
        builder.download_and_prepare()
        return [file["filename"] for file in builder.as_dataset(split=split).cache_files]
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        cause = error.__cause__ or error  # a DatasetGenerationError says nothing itself
        reason = getattr(cause, "strerror", None) or str(cause).partition("\n")[0].rstrip(".")
        raise UserError(
            f"{what}: the copy in {builder.cache_dir} cannot be made ({reason}); make room, or let "
            f"HF_DATASETS_CACHE name a folder that can be written"
        ) from error


def _parts(
    root: Path,
    split: Split,
    kind: Literal["parquet", "saved", "hub"],
    tables: list[Rows],
    files: list[str],
    arrow: list[str],
    file_states: Sequence[tuple[int, int]] = (),
    commit: str = "",
) -> list[bytes]:
    """The parts of an index file: images named by the rows of `files`, which lie in the files of `arrow`."""
    columns = tables[0].columns
    counts = [len(table.paths) for table in tables]
    if not sum(counts):
        raise UserFileNotFoundError(f"{root}: no images found in its tables; download them again")
    labels = [table.labels for table in tables if table.labels is not None]
    numbers = np.concatenate(labels) if len(labels) == len(tables) else None
    classes, numbers = _classes(root, columns.classes, numbers)
    packed = b"\0".join(_names(files, tables, classes, numbers))
    ends = np.flatnonzero(np.frombuffer(packed, np.uint8) == 0)
    states = states_of(root, arrow)
    places = [image_places(root / name, columns.image) for name in arrow]
    if sum(len(sizes) for _, sizes in places) != len(ends) + 1:
        raise UserError(f"{root} has changed while it was indexed; start again")
    return index_parts(
        {
            "root": os.path.realpath(root),  # for people
            "num_loose": 0,
            "fingerprint": hashlib.sha256(packed).hexdigest(),
            "classes": classes,
            "shards": arrow,
            "files": files,
            "split": split,
            "kind": kind,
            "commit": commit,
        },
        {
            "names": np.frombuffer(packed, np.uint8),
            "starts": np.concatenate([[0], ends + 1, [len(packed) + 1]]),
            "class_starts": np.zeros(1, np.int64),
            "folders": np.empty(0, np.uint8),
            "states": np.array([(*state, 0) for state in states], np.uint64).ravel(),
            "labels": np.empty(0, np.int32) if numbers is None else numbers.astype(np.int32),
            "firsts": np.cumsum([0, *(len(sizes) for _, sizes in places[:-1])]),
            "offsets": np.concatenate([offsets for offsets, _ in places]),
            "sizes": np.concatenate([sizes for _, sizes in places]),
            "file_firsts": np.cumsum([0, *counts[:-1]]),
            "file_states": np.array(file_states, np.uint64).ravel(),
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
    files: list[str], tables: list[Rows], classes: list[str], numbers: NDArray[np.int64] | None
) -> Iterator[bytes]:
    """For each image its path in the class folders that the files may have been made of: `<class>/<file>`.

    A row without a path is named by file and row. The ending marks it as an image for who reads shards of it;
    decoding looks at the content.
    """
    folders = [name.replace("/", "_") for name in classes]
    labels = None if numbers is None else iter(numbers.tolist())
    for file, table in zip(files, tables, strict=True):
        stem = Path(file).stem or "row"
        for row, path in enumerate(table.paths):
            name = (path or "").rpartition("/")[2].lstrip(".").replace("\0", "") or f"{stem}-{row:06d}"
            name = name if is_image(name) else f"{name}.png"
            name = name if labels is None else f"{folders[next(labels)]}/{name}"
            yield name.encode("utf-8", "surrogateescape")

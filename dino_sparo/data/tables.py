"""Images in tables: parquet files, folders of `datasets.save_to_disk`, datasets of the Hugging Face hub.

One column contains the images as struct{bytes, path}, one of integers their classes, and the class names are
in the schema's metadata. Parquet files are named by split: `train-00000-of-00294.parquet`. Hugging Face's
library `datasets` stores an Arrow copy of them, in which the bytes of an image are contiguous, so images are
read by offset as from shards: as fast in random order as in sequence.
"""

import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from dino_sparo.data.arrow import Columns, Rows, first_line, import_datasets, read_arrow, read_footer
from dino_sparo.data.index import Index, cached_index, index_parts, key_of_names
from dino_sparo.data.shards import ShardSource, has_states, states_of
from dino_sparo.data.split_names import splits_of_files, splits_of_folders
from dino_sparo.data.walk import PROBED_ENTRIES, THREADS, holds, is_image, list_folder
from dino_sparo.errors import UserError, UserFileNotFoundError
from dino_sparo.files import parsed_json, read_as
from dino_sparo.terminal import log, shows_bars

Split = Literal["train", "val"]
HUB = "hub:"
HUB_NAME = re.compile(r"hub:(?P<repository>[^:@]+)(:(?P<config>[^@]+))?(@(?P<revision>.+))?")
OF_TOTAL = re.compile(r"-of-(\d+)\b")  # number of files of a split
SAVED, SAVED_INFO = "state.json", "dataset_info.json"  # written by save_to_disk


@dataclass(frozen=True, eq=False)
class TableSource(ShardSource):
    """Images in the tables of a split, in order; the Arrow files of the copy are the shards."""

    @property
    def commit(self) -> str:
        """Commit of the hub's repository; empty for tables on disk."""
        return self.index.header["commit"]

    def name(self, index: int) -> str:
        position = self.position(index)
        number = self._rank(position, "file_firsts")
        row = position - int(self.index.arrays["file_firsts"][number])
        return f"{os.path.join(self.root, self.index.header['files'][number]).rstrip('/')}, row {row}"


def _tables_are_current(index: Index, root: Path) -> bool:
    """Whether files and copy are those that were indexed, by name, size and time."""
    kind, files, shards = (index.header[key] for key in ("kind", "files", "shards"))
    if kind == "parquet":  # the index is named by these files
        if not has_states(root, files, index.arrays["file_states"].reshape(-1, 2)):
            return False
    elif kind == "saved" and _saved_files(root) != shards:
        return False
    return has_states(root, shards, index.states[:, :2])


def holds_tables(root: Path) -> bool:
    """Whether a folder contains tables, from some of its entries: written by `save_to_disk`, or parquet files
    that are named by split, or beside which there are no images. A parquet file beside a tar of the same name
    describes that tar."""
    if is_saved(root):
        return True
    found = list(filter(is_parquet, list_folder(root, PROBED_ENTRIES)[1]))
    if not found or splits_of_files(found):
        return bool(found)
    return not (holds(root) or (root / found[0]).with_suffix(".tar").is_file())


def is_saved(root: Path) -> bool:
    """Whether a folder was written by `save_to_disk`."""
    return all((root / name).is_file() for name in (SAVED, SAVED_INFO))


def open_tables(
    root: Path, split: Split, names: Sequence[str] = (), label_column: str | None = None
) -> TableSource:
    """The images of a split in the tables of a folder, or in these parquet files of it.

    The first time, `datasets` makes an Arrow copy of parquet files in its cache ($HF_HOME).

    Args:
        label_column: column of the classes; None: `label` or `labels` of integers, or the only ClassLabel.

    Raises:
        UserFileNotFoundError: there is no image in them.
        UserError: `datasets` is missing, a file is damaged or has no images, there is no such column, or copy
            or index cannot be stored.
    """
    key = key_of_names([label_column] if label_column else ())
    if is_saved(root):
        make = partial(_pack_saved, root, split, label_column)
    else:
        names = names or list_parquet(root)
        key += key_of_names(names)
        make = partial(_pack_parquet, root, split, names, label_column)
    return TableSource.of_all(root, cached_index(root, f"{key}.{split}.arrow", _tables_are_current, make))


def open_hub(
    path: str, split: Split, name: str | None = None, label_column: str | None = None
) -> TableSource | None:
    """The images of a split of `hub:OWNER/NAME[:CONFIG][@REVISION]`; None if it has no such split.

    If there is no val, it is test. Code of the repository is never downloaded. A dataset that was downloaded
    before is used without asking the hub, so a run resumes with the same commit; @REVISION gives another one.
    `name` is the name of the split on the hub; None: it is inferred.

    Raises:
        UserError: as `open_tables`, or the hub cannot be reached.
    """
    match = HUB_NAME.fullmatch(path)
    if match is None:
        raise UserError(
            f"data.path {path!r} is not a dataset of the hub; expected hub:OWNER/NAME[:CONFIG][@REVISION]"
        )
    key = Path(import_datasets().config.HF_DATASETS_CACHE).absolute() / path
    try:
        make = partial(_pack_hub, path, split, name, label_column, **match.groupdict())
        names = [text for text in (name, label_column) if text]
        index = cached_index(key, f"{key_of_names(names)}.{split}.arrow", _tables_are_current, make)
    except _NoSplitError:
        return None
    images = TableSource.of_all(Path(path), index)
    log.info("%s, %s: commit %s", path, split, images.commit)
    return images


def commit_of(source: object) -> dict[str, str]:
    """The commit of the hub's repository of a source, for the list of a run's starts."""
    commit = source.commit if isinstance(source, TableSource) else ""
    return {"data_commit": commit} if commit else {}


# --- Which files


def list_parquet(root: Path) -> list[str]:
    """Names of a folder's parquet files in order."""
    return sorted(filter(is_parquet, list_folder(root)[1]))


def _saved_files(root: Path) -> list[str]:
    """Arrow files that `save_to_disk` has written to a folder, in order."""
    what = f"{root / SAVED} is damaged, or not written by save_to_disk"
    with read_as(what, "save the dataset again"):
        names = [file["filename"] for file in parsed_json(root / SAVED)["_data_files"]]
        if not names or any(os.path.basename(name) != name or b"\0" in name.encode() for name in names):
            raise ValueError("no files of this folder")
    return names


def is_parquet(name: str) -> bool:
    return name.endswith(".parquet")


# --- Parts of the index of a split


class _NoSplitError(Exception):
    """A dataset of the hub has no such split."""


def _pack_parquet(root: Path, split: Split, files: Sequence[str], label_column: str | None) -> list[bytes]:
    """Make the copy of the parquet files of a split; returns the parts of its index file."""
    paths = [root / name for name in files]
    _check_complete(root, files)
    datasets = import_datasets()
    states = states_of(root, files)  # before reading, so that a later change is detected next time
    with ThreadPoolExecutor(THREADS) as pool:
        read = partial(read_footer, label_column=label_column)
        found, counts, sizes = zip(*pool.map(read, paths), strict=True)
    columns = found[0]
    for name, other in zip(files, found, strict=True):
        if other[:4] != columns[:4]:
            raise UserError(
                f"{root / name} (columns {other.image!r} and {other.label!r}) has other columns or class "
                f"names than {files[0]} (columns {columns.image!r} and {columns.label!r}); move the files of "
                f"another dataset to a folder of their own"
            )
    if not sum(counts):
        raise _nothing_in(root)
    features = {columns.image: datasets.Image(decode=False)}
    if columns.label:
        features[columns.label] = datasets.Value("string" if columns.is_text else "int64")
    with_rows = [str(path.absolute()) for path, count in zip(paths, counts, strict=True) if count]
    builder = datasets.load_dataset_builder(
        "parquet",
        data_files={split: with_rows},  # a file without rows is an error of the library
        columns=list(features),
        features=datasets.Features(features),
    )
    try:
        arrow = _prepared(builder, split, str(root), sum(sizes))
    except UserError:
        for path in paths:  # raises an error that names a damaged one
            read_footer(path, all_of=list(features))
        raise
    return _parts(root, split, "parquet", list(files), arrow, columns, counts, states)


def _pack_saved(root: Path, split: Split, label_column: str | None) -> list[bytes]:
    """The parts of an index file of a folder that `save_to_disk` has written; no copy is made."""
    return _parts(root, split, "saved", [""], _saved_files(root), label_column=label_column)


def _pack_hub(
    path: str,
    split: Split,
    name: str | None,
    label_column: str | None,
    repository: str,
    config: str | None,
    revision: str | None,
) -> list[bytes]:
    """Download only this split from the hub; returns the parts of its index file.

    Raises:
        _NoSplitError: there is no such split.
    """
    datasets = import_datasets()
    try:
        whole = datasets.load_dataset_builder(repository, config, revision=revision)
        found = whole.config.data_files or {}
        by_split = splits_of_folders(found)
        words = by_split.get(split) or (by_split.get("test", []) if split == "val" else [])
        words = words if name is None else [one for one in found if one == name]
        if not words:
            raise _NoSplitError
        word = words[0]
        urls = [str(url) for word in words for url in found[word]]
        if not all(map(is_parquet, urls)):
            raise UserError(
                f"{path}: the repository does not contain parquet files; the hub may have converted it: "
                f"{HUB}{repository}@refs/convert/parquet"
            )
        commit = next((found[1] for url in urls if (found := re.search(r"@([^/]+)/", url))), revision or "")
        builder = datasets.load_dataset_builder("parquet", data_files={word: urls})
        size = whole.info.splits[word].num_bytes if word in (whole.info.splits or {}) else None
        arrow = _prepared(builder, word, path, size)
    except (UserError, _NoSplitError):
        raise
    except Exception as error:  # libraries for the network raise many types
        raise UserError(
            f"{path} cannot be downloaded from the hub ({first_line(error)}); check the name, or download it "
            f"on a machine with a network and copy the folders HF_HOME and DINO_SPARO_CACHE"
        ) from error
    rows = {one: info.num_examples for one, info in (whole.info.splits or {}).items()}
    splits = {str(one): rows.get(one) for one in whole.config.data_files}
    return _parts(
        Path(path), split, "hub", [word], arrow, commit=commit, label_column=label_column, splits=splits
    )


def _prepared(builder: Any, split: str, what: str, num_bytes: int | None) -> list[str]:
    """The Arrow files of a split in the cache of `datasets`; other processes wait until they are written.

    Raises:
        UserError: they cannot be written.
    """
    datasets = import_datasets()
    if not Path(builder.cache_dir).exists():
        size = f"about {num_bytes / 1e9:.2f} GB" if num_bytes is not None else "as much as the download"
        log.info(
            "%s: making an Arrow copy of the split %s, which takes %s in %s; set HF_DATASETS_CACHE to use "
            "another folder",
            *(what, split, size, builder.cache_dir),
        )
    if not shows_bars():
        datasets.disable_progress_bars()
    try:
        builder.download_and_prepare()
        return [file["filename"] for file in builder.as_dataset(split=split).cache_files]
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        cause = error.__cause__ or error  # a DatasetGenerationError gives no reason
        reason = getattr(cause, "strerror", None) or first_line(cause)
        remedy = "free some space, or set HF_DATASETS_CACHE to a writable folder"
        if not isinstance(cause, OSError):
            remedy = "repair the files, or convert them to folders of images"
        raise UserError(
            f"{what}: the copy in {builder.cache_dir} cannot be made ({reason}); {remedy}"
        ) from error


def _parts(
    root: Path,
    split: Split,
    kind: Literal["parquet", "saved", "hub"],
    files: list[str],
    arrow: list[str],
    columns: Columns | None = None,
    counts: Sequence[int] = (),
    file_states: Sequence[tuple[int, int]] = (),
    commit: str = "",
    label_column: str | None = None,
    splits: Mapping[str, int | None] | None = None,
) -> list[bytes]:
    """The parts of an index file of the images in the files of `arrow`, below `root` unless absolute.

    Messages name images by the rows of `files`; `counts` are the rows of each, empty for a single file.
    """
    states = states_of(root, arrow)
    tables: list[Rows] = []
    for name in arrow:
        known = columns or (tables[0].columns if tables else None)
        tables.append(read_arrow(root / name, known, label_column))
    columns = columns or tables[0].columns
    counts = counts or [sum(len(table.paths) for table in tables)]
    paths = [path for table in tables for path in table.paths]
    if not paths:
        raise _nothing_in(root)
    if len(paths) != sum(counts):
        raise UserError(f"{root} changed while it was indexed; run again")
    labels = [table.labels for table in tables if table.labels is not None]
    numbers = np.concatenate(labels) if len(labels) == len(tables) else None
    classes, numbers = _classes(root, columns.classes, numbers)
    header: dict[str, Any] = {"classes": classes, "shards": arrow, "files": files, "split": split}
    header |= {"kind": kind, "label_columns": columns.label_columns}
    return index_parts(
        root,
        b"\0".join(_names(files, counts, paths, classes, numbers)),
        [(*state, 0) for state in states],
        header=header | {"commit": commit, "splits": splits or {}},
        arrays={
            "labels": np.empty(0, np.int32) if numbers is None else numbers.astype(np.int32),
            "firsts": np.cumsum([0, *(len(table.sizes) for table in tables[:-1])]),
            "offsets": np.concatenate([table.offsets for table in tables]),
            "sizes": np.concatenate([table.sizes for table in tables]),
            "file_firsts": np.cumsum([0, *counts[:-1]]),
            "file_states": np.array(file_states, np.uint64).ravel(),
        },
    )


def _nothing_in(root: Path) -> UserFileNotFoundError:
    return UserFileNotFoundError(f"{root}: no images found in its files; download them again")


def _check_complete(root: Path, files: Sequence[str]) -> None:
    """Raises UserError: by their names (`-of-00294`) there are more files."""
    totals = {int(match[1]) for name in files if (match := OF_TOTAL.search(name))}
    if len(totals) > 1 or len(files) < max(totals, default=0):
        raise UserError(
            f"{root} contains {len(files)} of {' or '.join(map(str, sorted(totals)))} parquet files, such as "
            f"{files[0]}; download the others, or remove -of- and the number after it from the names"
        )


def _classes(
    root: Path, names: list[str] | None, numbers: NDArray[np.int64] | None
) -> tuple[list[str], NDArray[np.int64] | None]:
    """Class names, and the class number of every image; [] and None if the class of an image is unknown.

    Without names, the numbers are the names. A number is appended to equal names (ImageNet's crane).
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
    files: list[str],
    counts: Sequence[int],
    paths: list[str | None],
    classes: list[str],
    numbers: NDArray[np.int64] | None,
) -> Iterator[bytes]:
    """For each image a path as in class folders: `<class>/<file>`.

    A row without a path is named by file and row. Every name gets the ending of an image, which readers of
    shards expect; decoding depends on the content only.
    """
    folders = [name.replace("/", "_").replace("\0", "") for name in classes]
    rows = (
        (Path(file).stem or "row", row)
        for file, count in zip(files, counts, strict=True)
        for row in range(count)
    )
    for image, (path, (stem, row)) in enumerate(zip(paths, rows, strict=True)):
        name = (path or "").rpartition("/")[2].lstrip(".").replace("\0", "") or f"{stem}-{row:06d}"
        name = name if is_image(name) else f"{name}.png"
        name = name if numbers is None else f"{folders[numbers[image]]}/{name}"
        yield name.encode("utf-8", "surrogateescape")

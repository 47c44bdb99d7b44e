"""Tables of images: which columns are what, paths and labels of their rows, where the bytes of images lie."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dino_sparo.errors import UserError

HUB_KEY = b"huggingface"
NO_IMAGE = -1  # in place of a size
EXPECTED = "expected one column of type struct{bytes, path}, as the Hugging Face hub ships images"


class Columns(NamedTuple):
    """What a file's schema says."""

    image: str
    has_path: bool
    label: str | None
    classes: list[str] | None
    """Names of the classes by number; None if there are none."""


class Rows(NamedTuple):
    """The rows of one file."""

    columns: Columns
    paths: list[str | None]
    labels: NDArray[np.int64] | None
    """None if one is missing or negative, as in test sets."""
    num_bytes: int
    """Of the images, about."""


def import_arrow() -> Any:
    """The module pyarrow. Raises UserError: it is not installed."""
    try:
        import pyarrow
        import pyarrow.parquet  # which `pyarrow` alone does not have
    except ImportError as error:
        raise UserError("tables need a package that is not installed here; pip install datasets") from error
    return pyarrow


def import_datasets() -> Any:
    """The module datasets, which never runs code of a repository. Raises UserError: it is not installed."""
    try:
        import datasets
    except ImportError as error:
        raise UserError(
            "parquet files and the hub need a package that is not installed here; pip install datasets"
        ) from error
    datasets.config.HF_DATASETS_TRUST_REMOTE_CODE = False  # of versions before 4, which would ask
    return datasets


def read_parquet(path: Path) -> Rows:
    """All but the images' bytes. Raises UserError: the file is damaged or has no images."""
    pa = import_arrow()
    try:
        file = pa.parquet.ParquetFile(path, pre_buffer=False)
        columns = _columns(str(path), file.schema_arrow)
        wanted = [f"{columns.image}.path"] if columns.has_path else []
        wanted += [columns.label] if columns.label else []
        table = file.read(columns=wanted, use_threads=False)
        groups = map(file.metadata.row_group, range(file.metadata.num_row_groups))
        num_bytes = sum(group.total_byte_size for group in groups)
        return _rows(columns, table, file.metadata.num_rows, num_bytes)
    except pa.ArrowException as error:
        raise _damaged(path, error) from error
    except OSError as error:
        reason = error.strerror or str(error).partition("\n")[0].rstrip(".")
        raise UserError(f"{path}: the file cannot be read ({reason}); repair or download it again") from error


def _damaged(path: Path, error: Exception) -> UserError:
    reason = str(error).partition("\n")[0].rstrip(".")
    return UserError(
        f"{path} is no whole parquet file ({reason}); download it again (of a git clone: git lfs pull)"
    )


def check_readable(path: Path, column: str, cause: Exception) -> None:
    """Raises UserError: the images of a parquet file cannot be read, for which no copy could be made."""
    pa = import_arrow()
    try:
        for _ in pa.parquet.ParquetFile(path).iter_batches(columns=[f"{column}.bytes"]):
            pass
    except (pa.ArrowException, OSError) as error:
        raise _damaged(path, error) from cause


def read_arrow(root: Path, files: list[str]) -> Rows:
    """All but the images' bytes of Arrow files. Raises UserError: one is damaged or has no images."""
    pa = import_arrow()
    tables = [_mapped(root / name)[0] for name in files]
    found = [_columns(str(root / name), table.schema) for name, table in zip(files, tables, strict=True)]
    columns = found[0]
    if any(other != columns for other in found):
        raise UserError(f"{root}: its files have different columns; save the set again")
    wanted = [columns.image, *filter(None, [columns.label])]
    table = pa.concat_tables([table.select(wanted) for table in tables])
    return _rows(columns, table, len(table), 0)


def _rows(columns: Columns, table: Any, num_rows: int, num_bytes: int) -> Rows:
    """Paths and labels of a table."""
    from pyarrow import compute

    paths: list[str | None] = [None] * num_rows
    if columns.has_path:
        paths = compute.struct_field(table.column(columns.image), "path").to_pylist()
    labels = table.column(columns.label) if columns.label else None
    known = labels is not None and labels.null_count == 0
    numbers = labels.to_numpy().astype(np.int64) if labels is not None and known else None
    return Rows(columns, paths, None if numbers is None or (numbers < 0).any() else numbers, num_bytes)


def _mapped(path: Path) -> tuple[Any, int]:
    """A pyarrow.Table that lies in a mapped Arrow file, and the address of the file's first byte.

    Raises:
        UserError: it is damaged.
    """
    pa = import_arrow()
    try:
        content = pa.memory_map(str(path)).read_buffer()
        return pa.ipc.open_stream(content).read_all(), content.address
    except (pa.ArrowException, OSError) as error:
        reason = str(error).partition("\n")[0].rstrip(".")
        raise UserError(
            f"{path} is no whole Arrow file ({reason}); remove its folder, then start again"
        ) from error


def image_places(path: Path, column: str) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Where the bytes of each image of an Arrow file begin, and how many there are; -1 of a row without.

    Raises:
        UserError: the file is damaged or compressed.
    """
    table, base = _mapped(path)
    offsets, sizes = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    for images in table.column(column).chunks:
        of_bytes = images.field("bytes")
        _, ends, data = of_bytes.buffers()
        width = np.int64 if "large" in str(of_bytes.type) else np.int32
        rows = slice(of_bytes.offset, of_bytes.offset + len(of_bytes) + 1)
        bounds = np.frombuffer(ends, width)[rows].astype(np.int64)
        offset = data.address - base if bounds[-1] > 0 else 0  # without a byte there need be no buffer
        if not 0 <= offset <= path.stat().st_size:
            raise UserError(f"{path} is compressed, so that images in it cannot be read by themselves")
        there = images.is_valid().to_numpy(False) & of_bytes.is_valid().to_numpy(False)
        offsets.append(bounds[:-1] + offset)
        sizes.append(np.where(there, np.diff(bounds), NO_IMAGE))
    return np.concatenate(offsets), np.concatenate(sizes)


def _columns(where: str, schema: Any) -> Columns:
    """The columns of images and classes. Raises UserError: there is not exactly one of images."""
    from pyarrow import types

    images = [field for field in schema if _is_image_column(field.type)]
    if len(images) != 1:
        what = "no column" if not images else f"the columns {_listed([field.name for field in images])}"
        raise UserError(f"{where} has {what} of images among {_listed(schema.names)}; {EXPECTED}")
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

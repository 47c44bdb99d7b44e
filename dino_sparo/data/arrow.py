"""Tables of images: their columns, paths and labels of the rows, and offsets of the images."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dino_sparo.errors import UserError
from dino_sparo.files import open_regular, parsed_json, read_as

NO_IMAGE = -1  # size of a row without an image
EXPECTED = "expected one column of type struct{bytes, path}, as in datasets of the Hugging Face hub"


class Columns(NamedTuple):
    """The columns that a file's schema describes."""

    image: str
    label: str | None
    classes: list[str] | None
    """Class names by number, or None."""
    is_text: bool
    """Whether labels are class names."""
    label_columns: tuple[str, ...]
    """All columns that can be the label."""


class Rows(NamedTuple):
    """The rows of an Arrow file, images by offset and size."""

    columns: Columns
    paths: list[str | None]
    labels: NDArray[Any] | None
    """Class numbers or names; None if one is missing or negative, as in test sets."""
    offsets: NDArray[np.int64]
    sizes: NDArray[np.int64]
    """In bytes; -1 for a row without an image."""


def import_datasets() -> Any:
    """Import `datasets`; it never runs code from a repository. Raises UserError: it is not installed."""
    try:
        import datasets
        import pyarrow.parquet  # noqa: F401  (datasets needs it)
    except ImportError as error:
        raise UserError(
            "parquet files and the hub need the package datasets, which is not installed; run "
            "pip install datasets"
        ) from error
    datasets.config.HF_DATASETS_TRUST_REMOTE_CODE = False  # versions before 4 would ask
    return datasets


def read_footer(
    path: Path, all_of: Sequence[str] = (), label_column: str | None = None
) -> tuple[Columns, int, int]:
    """Columns, number of rows, and size in bytes of a parquet file; the columns `all_of` are read to the end.

    Raises:
        UserError: the file is damaged or has no images.
    """
    from pyarrow.parquet import ParquetFile

    remedy = "download it again (in a git clone: git lfs pull)"
    with read_as(f"{path} cannot be read as a parquet file", remedy):
        open_regular(path).close()
        file = ParquetFile(path, pre_buffer=False)
        for _ in file.iter_batches(columns=list(all_of)) if all_of else ():
            pass
        groups = map(file.metadata.row_group, range(file.metadata.num_row_groups))
        num_bytes = sum(group.total_byte_size for group in groups)
        return _columns(path, file.schema_arrow, label_column), file.metadata.num_rows, num_bytes


def read_arrow(path: Path, columns: Columns | None = None, label_column: str | None = None) -> Rows:
    """The rows of a memory-mapped Arrow file; without `columns`, those that its schema describes.

    Raises:
        UserError: the file is damaged or compressed, has no images, or columns other than `columns`.
    """
    with read_as(f"{path} cannot be read as an Arrow file", "remove its folder, then run again"):
        open_regular(path).close()
        return _read_arrow(path, columns, label_column)


def _read_arrow(path: Path, columns: Columns | None, label_column: str | None) -> Rows:
    import pyarrow as pa
    from pyarrow.compute import struct_field

    content = pa.memory_map(str(path)).read_buffer()
    table = pa.ipc.open_stream(content).read_all()
    own = _columns(path, table.schema, columns.label if columns else label_column)
    columns = columns or own
    if (own.image, own.label, own.is_text) != (columns.image, columns.label, columns.is_text):
        raise UserError(
            f"{path} (columns {own.image!r} and {own.label!r}) has other columns than the files before it "
            f"(columns {columns.image!r} and {columns.label!r}); remove its folder, then run again"
        )
    table = table.select([columns.image, *([columns.label] if columns.label else [])])
    table.validate(full=True)  # an offset outside its buffer would crash the process
    images = table.column(columns.image)
    places = [(np.empty(0, np.int64), np.empty(0, np.int64))]
    places += [_places(path, chunk, content.address) for chunk in images.chunks if len(chunk)]
    has_path = images.type.get_field_index("path") >= 0
    paths = struct_field(images, "path").to_pylist() if has_path else [None] * len(images)
    labels = None
    if columns.label and not table.column(columns.label).null_count:
        column = table.column(columns.label)
        if pa.types.is_dictionary(column.type):
            column = column.cast(column.type.value_type)
        labels = np.array(column.to_pylist()) if columns.is_text else column.to_numpy().astype(np.int64)
    labels = None if labels is None or (not columns.is_text and (labels < 0).any()) else labels
    return Rows(columns, paths, labels, *map(np.concatenate, zip(*places, strict=True)))


def _places(path: Path, images: Any, start: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Offset in the file, which is mapped at `start`, and size in bytes of each image of a chunk."""
    of_bytes = images.field("bytes")
    _, ends, data = of_bytes.buffers()
    width = np.int64 if "large" in str(of_bytes.type) else np.int32
    rows = slice(of_bytes.offset, of_bytes.offset + len(of_bytes) + 1)
    bounds = np.frombuffer(ends, width)[rows].astype(np.int64)
    offset = data.address - start if bounds[-1] > 0 else 0  # without bytes there may be no buffer
    if not 0 <= offset <= path.stat().st_size:
        raise UserError(
            f"{path} is compressed, so single images cannot be read from it; save it without compression"
        )
    there = images.is_valid().to_numpy(False) & of_bytes.is_valid().to_numpy(False)
    return bounds[:-1] + offset, np.where(there, np.diff(bounds), NO_IMAGE)


def _columns(path: Path, schema: Any, label_column: str | None) -> Columns:
    """The columns of images and classes.

    The label is `label_column`, else `label` or `labels` of integers, else the only ClassLabel.
    Raises UserError: there is not exactly one column of images, or no column `label_column`.
    """
    from pyarrow import types

    if len(set(schema.names)) < len(schema.names):
        raise UserError(
            f"{path} has several columns with the same name among {_listed(schema.names)}; rename them"
        )
    images = [field.name for field in schema if _is_image_column(field.type)]
    if len(images) != 1:
        what = f"the columns {_listed(images)}" if images else "no column"
        raise UserError(f"{path} has {what} of images among {_listed(schema.names)}; {EXPECTED}")
    features = _features(schema.metadata or {})
    integers = [field.name for field in schema if types.is_integer(field.type)]
    class_labels = [name for name in integers if features.get(name, {}).get("_type") == "ClassLabel"]
    named = [name for name in ("label", "labels") if name in integers]
    text = [field.name for field in schema if _is_text(field.type)]
    possible = tuple(name for name in schema.names if name in (*integers, *text))
    if label_column is not None and label_column not in possible:
        raise UserError(
            f"data.label_column {label_column!r}: {path} has no such column of integers or text; its columns "
            f"are {_listed(schema.names)}"
        )
    label = label_column or (named[0] if named else class_labels[0] if len(class_labels) == 1 else None)
    names = features.get(label or "", {}).get("names")
    if names and not (isinstance(names, list) and all(isinstance(name, str | int) for name in names)):
        raise UserError(f"{path}: the class names of {label!r} are not a list of strings; save it again")
    classes = list(map(str, names or []))
    "".join(classes).encode()  # raises UnicodeEncodeError for lone surrogates, which JSON can contain
    return Columns(images[0], label, classes or None, label in text, possible)


def _is_text(kind: Any) -> bool:
    from pyarrow import types

    kind = kind.value_type if types.is_dictionary(kind) else kind
    return types.is_string(kind) or types.is_large_string(kind)


def _is_image_column(kind: Any) -> bool:
    from pyarrow import types

    if not types.is_struct(kind) or kind.get_field_index("bytes") < 0:
        return False
    of_bytes = kind.field("bytes").type
    of_path = kind.field("path").type if kind.get_field_index("path") >= 0 else None
    return (types.is_binary(of_bytes) or types.is_large_binary(of_bytes)) and (
        of_path is None or types.is_null(of_path) or _is_text(of_path)
    )


def _features(metadata: dict[bytes, bytes]) -> dict[str, dict[str, Any]]:
    """Features that `datasets` has written, by column; empty if another program wrote the file."""
    try:
        features = parsed_json(metadata[b"huggingface"])["info"]["features"]
        return {name: feature for name, feature in features.items() if isinstance(feature, dict)}
    except (KeyError, ValueError, TypeError, AttributeError):
        return {}


def _listed(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names))


def first_line(error: BaseException) -> str:
    """The first line of another library's error message."""
    return str(error).strip().partition("\n")[0].rstrip(".") or type(error).__name__

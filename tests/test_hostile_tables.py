"""Tables, shards and indexes of strangers: what is damaged or made up is refused, never read astray."""

import io
import json
import os
import subprocess
import sys
import tarfile
import zlib

import datasets
import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from dino_sparo.data.arrow import read_arrow, read_footer
from dino_sparo.data.index import MAGIC, index_parts
from dino_sparo.data.shards import INDEX_FILE
from dino_sparo.data.sources import open_images
from dino_sparo.data.tars import tar_files, tar_members
from dino_sparo.errors import UserError
from tests.containers import IMAGE, write_parquet
from tests.shard_files import picture, shards_of, write

ROWS = [{"bytes": b"one", "path": "1.png"}, {"bytes": b"three", "path": "22.png"}]
IMAGES = pa.array(ROWS, IMAGE)


def class_label(names) -> dict[str, str]:
    feature = {"_type": "ClassLabel", "names": names}
    return {"huggingface": json.dumps({"info": {"features": {"label": feature}}})}


READ_ALL = """
import sys
from pathlib import Path
from dino_sparo.data.arrow import read_arrow
for path in sys.argv[1:]:
    try:
        read_arrow(Path(path))
    except ValueError as error:
        print(error)
"""


def arrow_file(path, table: pa.Table):
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)
    return path


def text_of(content: bytes) -> pa.Array:
    """One text of these bytes, whether or not they are UTF-8, and one that is."""
    ends = pa.array([0, len(content), len(content) + 1], pa.int32()).buffers()[1]
    return pa.StringArray.from_buffers(2, ends, pa.py_buffer(content + b"a"))


def images_of(paths: pa.Array) -> pa.Array:
    return pa.StructArray.from_arrays([IMAGES.field("bytes"), paths], ["bytes", "path"])


OUT_OF_RANGE = pa.DictionaryArray.from_arrays(pa.array([0, 9], pa.int32()), ["a", "b"], safe=False)


@pytest.mark.parametrize(
    ("table", "reason"),
    [
        (pa.table({"image": images_of(text_of(b"\xff\xfe"))}), "cannot be read as an Arrow file"),
        (pa.table({"image": IMAGES, "label": text_of(b"\xff\xfe")}), "cannot be read as an Arrow file"),
        (pa.table({"image": IMAGES, "label": OUT_OF_RANGE}), "cannot be read as an Arrow file"),
        (pa.table([IMAGES, [0, 1], [0, 1]], ["image", "label", "label"]), "columns with the same name"),
        (pa.table({"image": images_of(pa.array([1, 2]))}), "no column of images"),
        (pa.table({"image": IMAGES, "label": [0, 1]}, metadata=class_label(5)), "are not a list of strings"),
        (pa.table({"image": IMAGES, "label": [0, 1]}, metadata=class_label(["\ud800"])), "cannot be read as"),
    ],
)
def test_a_damaged_arrow_file_is_named(tmp_path, table, reason):
    path = arrow_file(tmp_path / "data.arrow", table)
    label = "label" if "label" in table.column_names else None
    with pytest.raises(UserError, match=rf"data\.arrow.*{reason}"):
        read_arrow(path, label_column=label)


def test_offsets_that_lead_out_of_the_file_are_refused(tmp_path):
    """In a process of its own, which a read out of the file would end by a signal."""
    path = arrow_file(tmp_path / "data.arrow", pa.table({"image": IMAGES}))
    content, paths = path.read_bytes(), []
    for field in ("bytes", "path"):
        offsets = IMAGES.field(field).buffers()[1].to_pybytes()[:12]
        assert content.count(offsets) == 1
        for end in (2**30, -5):
            patched = offsets[:8] + end.to_bytes(4, "little", signed=True)
            paths.append(tmp_path / f"{len(paths)}.arrow")
            paths[-1].write_bytes(content.replace(offsets, patched))
    command = [sys.executable, "-c", READ_ALL, *map(str, paths)]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    assert len(said) == 4 and all("cannot be read as an Arrow file" in line for line in said)


def test_rows_of_empty_batches_and_paths_that_are_all_missing(tmp_path):
    empty = images_of(pa.nulls(2, pa.null()))
    table = pa.table({"image": pa.chunked_array([empty[:0], empty])})
    path = arrow_file(tmp_path / "data.arrow", table)
    rows, content = read_arrow(path), path.read_bytes()
    assert rows.paths == [None, None]
    found = [content[o : o + n] for o, n in zip(rows.offsets, rows.sizes, strict=True)]
    assert found == [b"one", b"three"]


def test_a_later_file_of_other_columns_is_named(tmp_path):
    first = arrow_file(tmp_path / "0.arrow", pa.table({"image": IMAGES, "label": [0, 1]}))
    columns = read_arrow(first).columns
    for column in ("other", "label"):
        path = arrow_file(tmp_path / "1.arrow", pa.table({"image": IMAGES, column: ["a", "b"]}))
        with pytest.raises(UserError, match=r"1\.arrow"):
            read_arrow(path, columns)


def test_names_of_classes_in_parquet_that_are_no_list_are_refused(tmp_path):
    table = pa.table({"image": IMAGES, "label": [0, 1]})
    for names in (5, {"a": 1}, ["\ud800"], [["a"]]):
        parquet.write_table(table.replace_schema_metadata(class_label(names)), tmp_path / "a.parquet")
        with pytest.raises(UserError, match=r"a\.parquet"):
            read_footer(tmp_path / "a.parquet")


@pytest.mark.parametrize("names", [[], ["a\0b"], ["../data.arrow"], [None], 5])
def test_files_of_a_saved_set_are_named_and_lie_in_its_folder(tmp_path, names):
    saved = datasets.Dataset.from_dict({"label": [1]})
    saved.save_to_disk(tmp_path / "set")
    state = json.loads((tmp_path / "set/state.json").read_text())
    state["_data_files"] = [{"filename": name} for name in names] if isinstance(names, list) else names
    (tmp_path / "set/state.json").write_text(json.dumps(state))
    with pytest.raises(UserError, match=r"state\.json is damaged, or not written by save_to_disk"):
        open_images(str(tmp_path / "set"))


# --- Indexes beside shards


def index_of(header: bytes, data: bytes = b"") -> bytes:
    """An index with the right checksum."""
    rest = len(header).to_bytes(4, "little") + header + data
    return MAGIC + zlib.crc32(rest).to_bytes(4, "little") + rest


def with_arrays(kind: str) -> bytes:
    header = {"arrays": {"states": [kind, 1, 0]}, "fingerprint": "", "num_loose": 0}
    return index_of(json.dumps(header).encode(), bytes(1000))


HEADERS = [b"[]", b"{}", b"5", b"[" * 100_000, b"\xff", b'{"arrays": []}', b'{"arrays": {"states": 5}}']


@pytest.mark.parametrize(
    "content", [*map(index_of, HEADERS), *map(with_arrays, ["O", "i8", "no"]), MAGIC, MAGIC + b"\0\0\0\0"]
)
def test_a_made_up_index_beside_shards_is_not_taken(tmp_path, content):
    out = shards_of(write(tmp_path / "data", "a/1.png", "b/2.png"), tmp_path / "out")
    (out / INDEX_FILE).write_bytes(content)
    assert open_images(str(out)).read(1) == picture(1)


@pytest.mark.parametrize(
    ("header", "arrays"),
    [
        ({"classes": 5}, {}),
        ({"classes": [5, None]}, {}),
        ({"shards": [["000000.tar"]]}, {}),
        ({"shards": []}, {}),
        ({"about": 5}, {}),
        ({"about": {"a": 1}}, {}),
        ({"fingerprint": 5}, {}),
        ({"num_loose": "0"}, {}),
        ({"classes": ["a"]}, {}),
        ({}, {"labels": [0, 7]}),
        ({}, {"labels": [0, -1]}),
        ({}, {"labels": [0]}),
        ({}, {"sizes": [1.5, 2.0]}),
        ({}, {"offsets": [-5, 512]}),
        ({}, {"firsts": [9]}),
        ({}, {"firsts": []}),
        ({}, {"starts": [0, 999, 1000]}),
        ({}, {"starts": [0, 8, 3]}),
    ],
)
def test_an_index_beside_shards_whose_parts_do_not_fit_together_is_not_taken(tmp_path, header, arrays):
    out = shards_of(write(tmp_path / "data", "a/1.png", "b/2.png"), tmp_path / "out")
    index = open_images(str(out)).index
    all_arrays = index.arrays | {name: np.array(values) for name, values in arrays.items()}
    layout, data = {}, b""
    for name, array in all_arrays.items():
        layout[name] = (array.dtype.str, len(array), len(data))
        data += array.tobytes().ljust(-(-array.nbytes // 64) * 64, b"\0")
    text = json.dumps(index.header | header | {"arrays": layout}).encode()
    (out / INDEX_FILE).write_bytes(index_of(text.ljust(-(-(len(text) + 27) // 64) * 64 - 27), data))
    source = open_images(str(out))
    assert source.index.path.name != INDEX_FILE and source.classes == ("a", "b")
    assert [source.read(i) for i in range(2)] == [picture(0), picture(1)]


def test_a_pipe_in_place_of_the_index_beside_shards_does_not_wait(tmp_path):
    out = shards_of(write(tmp_path / "data", "a/1.png", "b/2.png"), tmp_path / "out")
    (out / INDEX_FILE).unlink()
    os.mkfifo(out / INDEX_FILE)
    assert open_images(str(out)).read(1) == picture(1)


def test_an_index_beside_shards_leads_to_no_other_file(tmp_path):
    out = shards_of(write(tmp_path / "data", "a/1.png", "b/2.png"), tmp_path / "out")
    index, secret = open_images(str(out)).index, tmp_path / "secret"
    secret.write_bytes(b"secret")
    stat = secret.stat()
    parts = index_parts(
        out,
        b"a/1.png\0b/2.png",
        [(stat.st_size, stat.st_mtime_ns, 0)],
        header=index.header | {"shards": [str(secret)], "chosen": True},
        arrays={name: index.arrays[name] for name in ("offsets", "sizes", "labels", "firsts")},
    )
    (out / INDEX_FILE).write_bytes(b"".join(parts))
    assert [open_images(str(out)).read(i) for i in range(2)] == [picture(0), picture(1)]


# --- NUL, which ends a name in an index


def pax_with_nul(name: str) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as archive:
        member = tarfile.TarInfo("b.png")
        member.pax_headers = {"path": name}
        archive.addfile(member)
    return file.getvalue()


def test_a_name_with_nul_in_a_tar_is_refused(tmp_path):
    (tmp_path / "0.tar").write_bytes(pax_with_nul("b/2\0c/3.png"))
    with open(tmp_path / "0.tar", "rb") as file, pytest.raises(tarfile.ReadError, match="is not a file name"):
        list(tar_members(file))
    with pytest.raises(UserError, match=r"0\.tar: the shard is damaged"):
        open_images(str(tmp_path))
    with open(tmp_path / "0.tar", "rb") as file, pytest.raises(UserError, match="is not a regular file"):
        list(tar_files(file, tmp_path / "0.tar"))


def test_nul_in_the_name_of_a_class_shifts_no_image(tmp_path):
    images = [{"bytes": picture(i), "path": f"{i}.png"} for i in range(3)]
    write_parquet(tmp_path / "set/train-0.parquet", images, [0, 1, 2], ["a\0x", "b", "c"])
    source = open_images(str(tmp_path / "set"))
    assert len(source) == 3 and source.labels.tolist() == [0, 1, 2]
    assert [source.index.name(i) for i in range(3)] == ["ax/0.png", "b/1.png", "c/2.png"]

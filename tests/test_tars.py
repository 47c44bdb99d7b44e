"""Tars are read to their end mark, found by offset or unpacked file by file; a damaged one is refused."""

import io
import tarfile
import tracemalloc
from pathlib import Path

import pytest
from tqdm import tqdm

from dino_sparo.data.tars import Member, tar_files, tar_members
from dino_sparo.errors import UserError
from dino_sparo.prepare import unpack
from tests import imagenet_layouts as mini

WHERE = Path("images.tar")
FILES = {"a.JPEG": b"a" * 700, "b.JPEG": b"b" * 20, "c.JPEG": b"c" * 512}
LONG = "long" * 20
FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}
NAMES = (
    *("a/1.jpg", "a/ü.png", "./b/2.jpg", "./._b.jpg", ".hidden/1.jpg", "none.txt"),
    f"{LONG}/{LONG}.jpg",  # in the prefix of ustar
    "7.cls",
)


def add(archive: tarfile.TarFile, name: str, data: bytes = b"", **changes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    for attribute, value in changes.items():
        setattr(member, attribute, value)
    archive.addfile(member, io.BytesIO(data))


def tar_of(kind: str, names: tuple[str, ...] = NAMES, **changes) -> bytes:
    """A tar of folders and files of 0, 300, 600 ... bytes, the second of them of more than is read ahead."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=FORMATS[kind]) as archive:
        add(archive, "a/", type=tarfile.DIRTYPE)
        for number, name in enumerate(names):
            data = name.encode() * 2000 if number == 1 else bytes([number]) * 300 * number
            add(archive, name, data, mtime=10.25 if kind == "pax" else 10, **changes)
    return file.getvalue()


def members_of(tar: bytes) -> list[Member]:
    return list(tar_members(io.BytesIO(tar)))


def contents(tar: bytes) -> dict[str, bytes]:
    found = {}
    for name, size, stream in tar_files(io.BytesIO(tar), WHERE):
        found[name] = stream.read()
        assert len(found[name]) == size
    return found


def unpacked(tar: bytes, folder: Path) -> int:
    with tqdm(file=io.StringIO()) as bar:
        count = unpack(io.BytesIO(tar), WHERE, folder, folder / ".part", bar)
        assert bar.n == sum(map(len, FILES.values()))
        return count


# --- Where files are


@pytest.mark.parametrize("kind", FORMATS)
def test_files_are_found_where_their_bytes_are(kind):
    tar = tar_of(kind)
    members = members_of(tar)
    assert [member.name for member in members] == [
        *("a/1.jpg", "a/ü.png", "b/2.jpg", "none.txt", f"{LONG}/{LONG}.jpg", "7.cls")
    ]
    assert [tar[member.offset :][: member.size][:1] for member in members] == [
        *(b"", b"a", b"\x02", b"\x05", b"\x06", b"\x07")
    ]


def test_names_of_any_length_and_in_no_encoding():
    names = (f"{LONG * 5}/1.jpg", "b.jpg", b"caf\xe9.jpg".decode("utf-8", "surrogateescape"))
    assert [member.name for member in members_of(tar_of("gnu", names))] == [*names]
    assert [member.name for member in members_of(tar_of("pax", names[:2]))] == [*names[:2]]


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE])
def test_what_is_no_file_is_passed_over_but_for_an_image(kind):
    assert members_of(tar_of("pax", ("a.txt",), type=kind, linkname="b.txt")) == []
    with pytest.raises(tarfile.ReadError, match=r"1\.jpg' is not a regular file"):
        members_of(tar_of("gnu", type=kind))


@pytest.mark.parametrize("kind", FORMATS)
def test_a_broken_header_is_refused(kind):
    """Alone, tarfile takes it for the end of the tar."""
    whole = tar_of(kind)
    headers = [start for start in range(0, len(whole), 512) if whole[start + 257 : start + 262] == b"ustar"]
    assert len(headers) >= len(NAMES)
    for header in headers:
        data = bytearray(whole)
        data[header + 153] ^= 1  # the last digit of its checksum
        with pytest.raises(tarfile.TarError):
            members_of(bytes(data))


@pytest.mark.parametrize("kept", [0, 100, 700, -1, -1024])
def test_a_cut_tar_is_refused(kept):
    tar = tar_of("gnu")
    last = members_of(tar)[-1]
    tar = tar[: last.offset + -(-last.size // 512) * 512 + 1024]
    with pytest.raises(tarfile.TarError):
        members_of(tar[:kept] if kept >= 0 else tar[: kept - 1024])


# --- Files as streams


def test_files_in_order_without_their_folders():
    tar = mini.tar_of({"./val/b.JPEG": b"1", "val/a.JPEG": b"2"})
    assert list(contents(tar).items()) == [("b.JPEG", b"1"), ("a.JPEG", b"2")]


def test_unpack_writes_what_is_missing_or_of_another_size(tmp_path):
    mini.write(tmp_path, {"a.JPEG": b"A" * 700, "b.JPEG": b"b"})
    assert unpacked(mini.tar_of(FILES | {"notes.txt": b"x", "._a.JPEG": b"x"}), tmp_path) == 3
    there = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert there == FILES | {"a.JPEG": b"A" * 700}  # in full size: left as it is


# The blocks: header, 2 of a; header, 1 of b; header, 1 of c; end mark.
@pytest.mark.parametrize("length", [0, 100, 512, 1000, 1536, 1600, 3584])
def test_a_tar_that_ends_early(tmp_path, length):
    tar = mini.tar_of(FILES)[:length]
    with pytest.raises(UserError, match=r"images\.tar: the tar is damaged or incomplete \(.*\); download"):
        unpacked(tar, tmp_path)
    whole = {path.name: path.read_bytes() for path in tmp_path.glob("*.JPEG")}
    assert whole.items() <= FILES.items()


def test_a_header_that_is_broken_or_no_header_at_all():
    tar = bytearray(mini.tar_of(FILES))
    tar[1536 + 150] ^= 1  # the checksum in the header of b
    with pytest.raises(UserError, match="neither a file nor the end at byte 1536"):
        contents(bytes(tar))
    with pytest.raises(UserError, match="damaged or incomplete"):
        contents(b"<html>not found</html>" * 100)


def test_a_hole_of_zeros_is_no_end_mark():
    tar = mini.tar_of(FILES)[:3584]
    assert contents(tar + bytes(2**20 - 512)) == FILES
    with pytest.raises(UserError, match="neither a file nor the end at byte 3584"):
        contents(tar + bytes(2**21))


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("../a.JPEG", {}),
        ("val/../../a.JPEG", {}),
        ("/tmp/a.JPEG", {}),
        *(
            ("a.JPEG", {"type": kind, "linkname": "/etc/passwd"})
            for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE)
        ),
    ],
)
def test_members_that_lead_outside_or_are_no_files(tmp_path, name, changes):
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match=r"a\.JPEG' is not a regular file within"):
        unpacked(tar_of("gnu", (name,), **changes), tmp_path / "out")
    assert not list(tmp_path.rglob("*.JPEG"))


def test_contents_are_never_in_memory_as_a_whole(tmp_path):
    member = tarfile.TarInfo("big.JPEG")
    member.size = 2**26
    with open(tmp_path / "big.tar", "w+b") as file, tqdm(disable=True) as bar:
        file.write(member.tobuf())
        file.truncate(512 + member.size + 1024)
        file.seek(0)
        tracemalloc.start()
        unpack(file, WHERE, tmp_path, tmp_path / ".part", bar)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert (tmp_path / "big.JPEG").stat().st_size == member.size and peak < 2**22


@pytest.mark.parametrize(
    "header",
    [
        {"size": "9" * 5000},
        {"size": "-" + "9" * 50},
        {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": "9" * 50},
        {"GNU.sparse.size": "x", "GNU.sparse.numblocks": "1", "GNU.sparse.map": "0,x"},
    ],
    ids=range(4),
)
def test_headers_that_are_none(header):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as archive:
        add(archive, "a.jpg", b"a" * 700, pax_headers=header)
        add(archive, "b.jpg", b"b" * 700)
    with pytest.raises(tarfile.TarError):
        members_of(file.getvalue())
    with pytest.raises(UserError, match=r"images\.tar: "):
        contents(file.getvalue())


def test_headers_upon_headers():
    block = tarfile.TarInfo("x")
    block.type, block.size = tarfile.GNUTYPE_LONGNAME, 512
    tar = (block.tobuf(tarfile.GNU_FORMAT) + bytes(512)) * 5000
    with pytest.raises(tarfile.TarError):
        members_of(tar)

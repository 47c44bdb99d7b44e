"""The files of a tar are found where their bytes are; a damaged tar is refused, not read as a shorter one."""

import io
import tarfile
from pathlib import Path

import pytest

from dino_sparo.data.tars import Member, tar_members

LONG = "long" * 20
FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}
NAMES = (
    "a/1.jpg",
    "a/ü.png",
    "./b/2.jpg",
    "./._b.jpg",
    ".hidden/1.jpg",
    "none.txt",
    f"{LONG}/{LONG}.jpg",  # in the prefix of ustar
    "7.cls",
)


def add(archive: tarfile.TarFile, name: str, data: bytes = b"", **changes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    for attribute, value in changes.items():
        setattr(member, attribute, value)
    archive.addfile(member, io.BytesIO(data))


def write(path: Path, kind: str, names: tuple[str, ...] = NAMES, **changes) -> Path:
    """A tar of folders and files of 0, 300, 600 ... bytes, the second of them of more than is read ahead."""
    with tarfile.open(path, "w", format=FORMATS[kind]) as archive:
        add(archive, "a/", type=tarfile.DIRTYPE)
        for number, name in enumerate(names):
            data = name.encode() * 2000 if number == 1 else bytes([number]) * 300 * number
            add(archive, name, data, mtime=10.25 if kind == "pax" else 10, **changes)
    return path


def members_of(path: Path) -> list[Member]:
    with open(path, "rb") as file:
        return list(tar_members(file))


@pytest.mark.parametrize("kind", FORMATS)
def test_files_are_found_where_their_bytes_are(tmp_path, kind):
    path = write(tmp_path / "0.tar", kind)
    members = members_of(path)
    assert [member.name for member in members] == [
        *("a/1.jpg", "a/ü.png", "b/2.jpg", "none.txt", f"{LONG}/{LONG}.jpg", "7.cls")
    ]
    data = path.read_bytes()
    assert [data[member.offset :][: member.size][:1] for member in members] == [
        *(b"", b"a", b"\x02", b"\x05", b"\x06", b"\x07")
    ]


def test_names_of_any_length_and_in_no_encoding(tmp_path):
    names = (f"{LONG * 5}/1.jpg", "b.jpg", b"caf\xe9.jpg".decode("utf-8", "surrogateescape"))
    assert [member.name for member in members_of(write(tmp_path / "0.tar", "gnu", names))] == [*names]
    assert [member.name for member in members_of(write(tmp_path / "1.tar", "pax", names[:2]))] == [*names[:2]]


def test_sizes_in_pax_headers_are_taken(tmp_path):
    path = tmp_path / "0.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as archive:
        add(archive, "a.jpg", bytes(700), pax_headers={"size": "700", "comment": "a\nb"})
        add(archive, "b.jpg", bytes(20))
    data = bytearray(path.read_bytes())
    header = data.index(b"a.jpg")
    data[header + 124 : header + 135] = b"0" * 11  # which the pax header overrides
    path.write_bytes(with_checksum(data, header))
    assert [member.size for member in members_of(path)] == [700, 20]


def with_checksum(data: bytearray, header: int) -> bytes:
    """The tar with the right checksum in a header, given by its offset."""
    data[header + 148 : header + 156] = b" " * 8
    data[header + 148 : header + 156] = b"%06o\0 " % sum(data[header : header + 512])
    return bytes(data)


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE])
def test_what_is_no_image_and_no_file_is_passed_over(tmp_path, kind):
    path = write(tmp_path / "0.tar", "pax")
    before = members_of(path)
    with tarfile.open(path, "a", format=tarfile.PAX_FORMAT) as archive:
        add(archive, "a.txt", type=kind, linkname="none.txt")
    assert members_of(path) == before


def test_an_image_that_is_a_link_is_refused(tmp_path):
    path = write(tmp_path / "0.tar", "gnu", type=tarfile.SYMTYPE)
    with pytest.raises(tarfile.ReadError, match=r"1\.jpg' is no plain file"):
        members_of(path)


@pytest.mark.parametrize("kind", FORMATS)
def test_a_broken_header_is_refused(tmp_path, kind):
    """Alone, tarfile takes it for the end of the tar."""
    whole = write(tmp_path / "0.tar", kind).read_bytes()
    headers = [start for start in range(0, len(whole), 512) if whole[start + 257 : start + 262] == b"ustar"]
    path = tmp_path / "changed.tar"
    for header in headers:
        data = bytearray(whole)
        data[header + 153] ^= 1  # the last digit of its checksum
        path.write_bytes(data)
        with pytest.raises(tarfile.TarError):
            members_of(path)


@pytest.mark.parametrize("kept", [0, 100, 512, 700, 1024, -1, -1024])
def test_a_cut_tar_is_refused(tmp_path, kept):
    path = write(tmp_path / "0.tar", "gnu")
    last = members_of(path)[-1]
    data = path.read_bytes()[: last.offset + -(-last.size // 512) * 512 + 1024]
    path.write_bytes(data[:kept] if kept >= 0 else data[: kept - 1024])
    with pytest.raises(tarfile.TarError):
        members_of(path)

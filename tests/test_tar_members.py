"""The quick reader of tars finds what tarfile finds, and leaves to it what is unusual."""

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest

from dino_sparo.data import tar_members as module
from dino_sparo.data.tar_members import Member, tar_members

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


def quick(path: Path) -> list[Member] | None:
    """What the quick reader finds; None if it leaves the tar to tarfile."""
    with open(path, "rb") as file:
        try:
            return list(module._by_headers(file.fileno()))
        except module._UnusualError:
            return None


def slow(path: Path) -> list[Member] | None:
    """What tarfile finds; None if it refuses the tar."""
    with open(path, "rb") as file:
        try:
            return list(module._by_tarfile(file))
        except tarfile.TarError:
            return None


@pytest.mark.parametrize("kind", FORMATS)
def test_finds_what_tarfile_finds(tmp_path, kind):
    path = write(tmp_path / "0.tar", kind)
    members = quick(path)
    assert members == slow(path) and len(members) == 6
    assert [member.name for member in members] == [
        *("a/1.jpg", "a/ü.png", "b/2.jpg", "none.txt", f"{LONG}/{LONG}.jpg", "7.cls")
    ]
    data = path.read_bytes()
    assert [data[member.offset :][: member.size][:1] for member in members] == [
        *(b"", b"a", b"\x02", b"\x05", b"\x06", b"\x07")
    ]


def test_names_of_any_length_and_in_no_encoding(tmp_path):
    names = (f"{LONG * 5}/1.jpg", "b.jpg", b"caf\xe9.jpg".decode("utf-8", "surrogateescape"))
    assert [member.name for member in quick(write(tmp_path / "0.tar", "gnu", names))] == [*names]
    assert [member.name for member in quick(write(tmp_path / "1.tar", "pax", names[:2]))] == [*names[:2]]


def test_sizes_in_pax_headers_are_taken(tmp_path):
    path = tmp_path / "0.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as archive:
        add(archive, "a.jpg", bytes(700), pax_headers={"size": "700", "comment": "a\nb"})
        add(archive, "b.jpg", bytes(20))
    data = bytearray(path.read_bytes())
    header = data.index(b"a.jpg")
    data[header + 124 : header + 135] = b"0" * 11  # which the pax header overrides
    path.write_bytes(with_checksum(data, header))
    assert [member.size for member in quick(path)] == [700, 20] and quick(path) == slow(path)


def with_checksum(data: bytearray, header: int) -> bytes:
    """The tar with the right checksum in a header, given by its offset."""
    data[header + 148 : header + 156] = b" " * 8
    data[header + 148 : header + 156] = b"%06o\0 " % sum(data[header : header + 512])
    return bytes(data)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("a.txt", {"type": tarfile.SYMTYPE, "linkname": "b"}),
        ("a.txt", {"type": tarfile.LNKTYPE, "linkname": "none.txt"}),
        ("a.txt", {"type": tarfile.FIFOTYPE}),
        ("a.txt", {"pax_headers": {"hdrcharset": "BINARY"}}),
        ("a.txt", {"pax_headers": {"GNU.sparse.name": "b.jpg"}}),
    ],
)
def test_the_unusual_is_left_to_tarfile(tmp_path, name, changes):
    path = write(tmp_path / "0.tar", "pax")
    with tarfile.open(path, "a", format=tarfile.PAX_FORMAT) as archive:
        add(archive, name, **changes)
    assert quick(path) is None
    with open(path, "rb") as file:
        assert tar_members(file) == slow(path) and len(slow(path)) >= 6


def test_an_image_that_is_a_link_is_refused(tmp_path):
    path = write(tmp_path / "0.tar", "gnu", type=tarfile.SYMTYPE)
    with open(path, "rb") as file, pytest.raises(tarfile.ReadError, match=r"1\.jpg' is no plain file"):
        tar_members(file)


@pytest.mark.parametrize("kind", FORMATS)
def test_no_changed_header_gives_other_members_than_tarfile_finds(tmp_path, kind):
    """Some bytes of any header replaced by what means something there, the checksum right or wrong."""
    whole = write(tmp_path / "0.tar", kind, ("a/1.jpg", f"{LONG}/{LONG}.jpg", "2.cls")).read_bytes()
    headers = [start for start in range(0, len(whole), 512) if whole[start + 257 : start + 262] == b"ustar"]
    rng = np.random.default_rng(0)
    places = [0, 99, 124, 134, 135, 148, 156, 157, 257, 263, 345, 346, 499, 500, *range(512, 560)]
    path, found = tmp_path / "changed.tar", 0
    for _ in range(500):
        data, header = bytearray(whole), int(rng.choice(headers))
        for _ in range(rng.integers(1, 3)):
            data[header + int(rng.choice(places))] = int(rng.choice([*b"\0 /.0157LxKgS-+_a\n=\x80\xff"]))
        if rng.random() < 0.8:
            data = with_checksum(data, header)
        path.write_bytes(data[: rng.integers(header, len(data)) if rng.random() < 0.1 else None])
        members = quick(path)
        found += members is not None
        assert members is None or members == slow(path)
    assert found > 100


@pytest.mark.parametrize("kept", [0, 100, 512, 700, 1024, -1, -1024])
def test_a_cut_tar_is_left_to_tarfile(tmp_path, kept):
    path = write(tmp_path / "0.tar", "gnu")
    last = quick(path)[-1]
    data = path.read_bytes()[: last.offset + -(-last.size // 512) * 512 + 1024]
    path.write_bytes(data[:kept] if kept >= 0 else data[: kept - 1024])
    assert quick(path) is None

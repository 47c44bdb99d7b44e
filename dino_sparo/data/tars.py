"""The files of an uncompressed tar, by offset and as streams; errors name a damaged tar."""

import os
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import IO, BinaryIO, NamedTuple

from dino_sparo.data.walk import is_image
from dino_sparo.errors import UserError
from dino_sparo.files import named

BLOCK = 512  # bytes; a tar ends with blocks of zeros
LARGEST_PADDING = 2**20  # bytes of those blocks; more are a gap in an incomplete download

TarFile = tuple[str, int, IO[bytes]]  # name without folders, size in bytes, contents


class Member(NamedTuple):
    """A file in a tar: its name, offset, and size in bytes."""

    name: str
    offset: int
    size: int


def tar_members(file: BinaryIO) -> Iterator[Member]:
    """The files of a tar in order, without hidden ones.

    Raises:
        tarfile.TarError: the tar is damaged or incomplete, or an image in it is not a regular file.
        OSError: it cannot be read.
    """
    end = file.seek(0, os.SEEK_END)
    file.seek(0)
    with (
        _odd_headers(),
        tarfile.open(fileobj=file, mode="r:", encoding="utf-8", errors="surrogateescape") as archive,
    ):
        while member := archive.next():
            archive.members.clear()  # type: ignore[attr-defined]  # tarfile would store all of them
            _check_size(member, end)
            name = _visible(member.name)
            if "\0" in name:  # separates names in an index
                raise tarfile.ReadError(f"{name!r} is not a file name")
            if name and is_image(name) and (not member.isreg() or member.issparse()):
                raise tarfile.ReadError(f"{name!r} is not a regular file")
            if name and member.isreg():
                yield Member(name, member.offset_data, member.size)
        _check_end(file, archive)


@contextmanager
def _odd_headers() -> Iterator[None]:
    """Turn other errors that tarfile raises for invalid headers into a tarfile.ReadError."""
    try:
        yield
    except UserError:
        raise
    except (ArithmeticError, LookupError, RecursionError, TypeError, ValueError) as error:
        raise tarfile.ReadError("invalid header") from error


def _check_size(member: tarfile.TarInfo, end: int) -> None:
    """Raises tarfile.ReadError: a file claims more bytes than the tar has."""
    if not 0 <= member.size <= end:
        raise tarfile.ReadError(f"{member.name!r} claims {member.size} bytes, but the tar has {end}")


def _check_end(file: IO[bytes], archive: tarfile.TarFile) -> None:
    """Raises tarfile.ReadError: what tarfile considers the end is a damaged or missing header."""
    file.seek(archive.offset)
    if file.read(BLOCK) != bytes(BLOCK) or file.seek(0, os.SEEK_END) > archive.offset + LARGEST_PADDING:
        raise tarfile.ReadError(f"neither a file nor the end at byte {archive.offset}")


def _visible(name: str) -> str:
    """The name within the tar's folder; empty for a hidden file."""
    name = name.removeprefix("./")
    return "" if name.startswith(".") or "/." in name else name


def tar_files(tar: IO[bytes], where: Path) -> Iterator[TarFile]:
    """The files of an uncompressed, seekable tar in order, as streams.

    Raises:
        UserError: the tar is damaged or ends early, or a member is neither file nor folder, or outside of it.
    """
    start, end = tar.tell(), tar.seek(0, os.SEEK_END)
    tar.seek(start)
    with damage_named(where), _odd_headers(), tarfile.open(fileobj=tar, mode="r:") as archive:
        for member in archive:
            _check_size(member, end)
            path = PurePosixPath(member.name)
            if member.isdir():
                continue
            if not member.isfile() or path.is_absolute() or ".." in path.parts or "\0" in member.name:
                raise UserError(
                    f"{where}: {member.name!r} is not a regular file within the tar's folder; "
                    f"use the official tar"
                )
            stream = archive.extractfile(member)
            assert stream is not None
            yield path.name, member.size, stream
        _check_end(tar, archive)


@contextmanager
def damage_named(where: Path) -> Iterator[None]:
    """Name the tar in errors while it is read. Raises UserError: it is damaged."""
    try:
        with named(where):
            yield
    except tarfile.TarError as error:
        raise UserError(f"{where}: the tar is damaged or incomplete ({error}); download it again") from error

"""The files of an uncompressed tar, read as streams; a damaged tar is told by its name."""

import os
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import IO

from dino_sparo.errors import UserError
from dino_sparo.files import named

BLOCK = 512  # a tar's unit; it ends with blocks of zeros
LARGEST_PADDING = 2**20  # of those blocks; more are a hole in an incomplete download

TarFile = tuple[str, int, IO[bytes]]  # name without folders, size in bytes, contents


def tar_files(tar: IO[bytes], where: Path) -> Iterator[TarFile]:
    """The files of an uncompressed, seekable tar, in its order; contents are read when the caller does.

    Raises:
        UserError: the tar is damaged or ends early, or a member is neither file nor folder or leads outside.
    """
    with damage_named(where), tarfile.open(fileobj=tar, mode="r:") as archive:
        for member in archive:
            path = PurePosixPath(member.name)
            if member.isdir():
                continue
            if not member.isfile() or path.is_absolute() or ".." in path.parts:
                raise UserError(
                    f"{where}: {member.name!r} is no plain file inside the tar's own folder; "
                    f"use the official tar"
                )
            stream = archive.extractfile(member)
            assert stream is not None
            yield path.name, member.size, stream
        tar.seek(archive.offset)  # tarfile takes a broken or missing header for the end
        if tar.read(BLOCK) != bytes(BLOCK) or tar.seek(0, os.SEEK_END) > archive.offset + LARGEST_PADDING:
            raise tarfile.ReadError(f"neither a file nor the end at byte {archive.offset}")


@contextmanager
def damage_named(where: Path) -> Iterator[None]:
    """Name the tar in errors of reading it. Raises UserError: it is damaged."""
    try:
        with named(where):
            yield
    except tarfile.TarError as error:
        raise UserError(f"{where}: the tar is damaged or incomplete ({error}); download it again") from error

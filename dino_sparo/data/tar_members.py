"""The files in a tar and where their bytes are."""

import os
import tarfile
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

from dino_sparo.data.imagenet import is_image
from dino_sparo.data.tars import BLOCK, LARGEST_PADDING


class Member(NamedTuple):
    """A file in a tar, and where its bytes are."""

    name: str
    offset: int
    size: int


def tar_members(file: BinaryIO) -> Iterator[Member]:
    """The files of a tar in its order, hidden ones left out.

    Raises:
        tarfile.TarError: the tar is damaged or incomplete, or an image in it is no plain file.
        OSError: it cannot be read.
    """
    file.seek(0)
    with tarfile.open(fileobj=file, mode="r:", encoding="utf-8", errors="surrogateescape") as archive:
        while member := archive.next():
            archive.members.clear()  # type: ignore[attr-defined]  # which would hold all of them
            name = _visible(member.name)
            if name and is_image(name) and (not member.isreg() or member.issparse()):
                raise tarfile.ReadError(f"{name!r} is no plain file in it")
            if name and member.isreg():
                yield Member(name, member.offset_data, member.size)
        file.seek(archive.offset)  # tarfile takes a broken or missing header for the end
        if file.read(BLOCK) != bytes(BLOCK) or file.seek(0, os.SEEK_END) > archive.offset + LARGEST_PADDING:
            raise tarfile.ReadError(f"neither a file nor the end at byte {archive.offset}")


def _visible(name: str) -> str:
    """The name from the tar's own folder on; empty for a hidden file."""
    name = name.removeprefix("./")
    return "" if name.startswith(".") or "/." in name else name

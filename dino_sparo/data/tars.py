"""Tars of images: where their files lie, for shards; ImageNet's, read as streams and unpacked resumably."""

import os
import shutil
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import IO, BinaryIO, NamedTuple

from tqdm import tqdm

from dino_sparo.data.imagenet import WNID_TAR, Images, is_image
from dino_sparo.errors import UserError
from dino_sparo.files import atomic_write

BLOCK = 512  # a tar's unit; it ends with blocks of zeros
LARGEST_PADDING = 2**20  # of those blocks; more are a hole in an incomplete download

TarFile = tuple[str, int, IO[bytes]]  # name without folders, size in bytes, contents


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
        _check_end(file, archive)


def _check_end(file: IO[bytes], archive: tarfile.TarFile) -> None:
    """Raises tarfile.ReadError: what tarfile takes for the end is a broken or missing header."""
    file.seek(archive.offset)
    if file.read(BLOCK) != bytes(BLOCK) or file.seek(0, os.SEEK_END) > archive.offset + LARGEST_PADDING:
        raise tarfile.ReadError(f"neither a file nor the end at byte {archive.offset}")


def _visible(name: str) -> str:
    """The name from the tar's own folder on; empty for a hidden file."""
    name = name.removeprefix("./")
    return "" if name.startswith(".") or "/." in name else name


def class_tars(images: Images) -> Iterator[TarFile]:
    """Every class with its tar, from a folder of them or from the tar of them all.

    Raises:
        UserError: see `tar_files`.
    """
    if images.form == "class tars":
        for name in sorted(os.listdir(images.path)):
            if match := WNID_TAR.fullmatch(name):
                with open(images.path / name, "rb") as file:
                    yield match[1], os.fstat(file.fileno()).st_size, file
    else:
        with open(images.path, "rb") as file:
            for name, size, stream in tar_files(file, images.path):
                if match := WNID_TAR.fullmatch(name):
                    yield match[1], size, stream


def tar_files(tar: IO[bytes], where: Path) -> Iterator[TarFile]:
    """The files of an uncompressed, seekable tar, in its order; contents are read when the caller does.

    Raises:
        UserError: the tar is damaged or ends early, or a member is neither file nor folder or leads outside.
    """
    with _damage_named(where), tarfile.open(fileobj=tar, mode="r:") as archive:
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
        _check_end(tar, archive)


def unpack(
    tar: IO[bytes], where: Path, folder: Path, classes: dict[str, str] | None, unfinished: Path, bar: tqdm
) -> int:
    """Unpack the images of a tar that are not there in full size yet; returns how many images it holds.

    Args:
        tar: the open tar.
        where: what to call it in a message.
        folder: where the images go, into existing class folders if `classes` says them.
        classes: class of every image by file name, or None.
        unfinished: where an image is written before it gets its name; on the same file system.
        bar: progress in bytes.

    Raises:
        UserError: see `tar_files`.
    """
    count = 0
    with _damage_named(where):
        for name, size, stream in tar_files(tar, where):
            if not is_image(name):
                continue
            target = folder / (classes[name] if classes else "") / name
            if not (target.is_file() and target.stat().st_size == size):
                with atomic_write(target, unfinished, durable=False) as file:
                    shutil.copyfileobj(stream, file)
            bar.update(size)
            count += 1
    return count


@contextmanager
def _damage_named(where: Path) -> Iterator[None]:
    try:
        yield
    except tarfile.TarError as error:
        raise UserError(f"{where}: the tar is damaged or incomplete ({error}); download it again") from error
    except OSError as error:
        error.filename = error.filename or str(where)
        raise

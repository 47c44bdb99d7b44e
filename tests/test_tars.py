"""Tars are read to their end mark, never lead outside, and are unpacked image by image."""

import io
import tarfile
from pathlib import Path

import pytest
from tqdm import tqdm

from dino_sparo.data.tars import tar_files
from dino_sparo.errors import UserError
from dino_sparo.prepare import unpack
from tests import imagenet_layouts as mini

WHERE = Path("images.tar")
FILES = {"a.JPEG": b"a" * 700, "b.JPEG": b"b" * 20, "c.JPEG": b"c" * 512}


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


def test_files_in_order_without_their_folders():
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        folder = tarfile.TarInfo("./val")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        for name in ("./val/b.JPEG", "val/a.JPEG"):
            member = tarfile.TarInfo(name)
            member.size = 3
            tar.addfile(member, io.BytesIO(name.encode()))
    assert list(contents(file.getvalue()).items()) == [("b.JPEG", b"./v"), ("a.JPEG", b"val")]


def test_unpack_writes_what_is_missing_or_of_another_size(tmp_path):
    mini.write(tmp_path, {"a.JPEG": b"A" * 700, "b.JPEG": b"b"})
    assert unpacked(mini.tar_of(FILES | {"notes.txt": b"x", "._a.JPEG": b"x"}), tmp_path) == 3
    there = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert there == FILES | {"a.JPEG": b"A" * 700}  # in full size: left as it is


# The blocks: header, 2 of a; header, 1 of b; header, 1 of c; end mark.
@pytest.mark.parametrize("length", [0, 100, 512, 1000, 1536, 1600, 2048, 2500, 3000, 3400, 3584, 3600])
def test_a_tar_that_ends_early(tmp_path, length):
    tar = mini.tar_of(FILES)[:length]
    with pytest.raises(
        UserError, match=r"images\.tar: the tar is damaged or incomplete \(.*\); download it again"
    ):
        list(tar_files(io.BytesIO(tar), WHERE))
    with pytest.raises(UserError, match="damaged or incomplete"):
        unpacked(tar, tmp_path)
    whole = {path.name: path.read_bytes() for path in tmp_path.glob("*.JPEG")}
    assert whole.items() <= FILES.items()


def test_a_header_that_is_broken():
    tar = bytearray(mini.tar_of(FILES))
    tar[1536 + 150] ^= 1  # the checksum in the header of b
    with pytest.raises(UserError, match="neither a file nor the end at byte 1536"):
        contents(bytes(tar))


@pytest.mark.parametrize(("zeros", "is_hole"), [(10_240, False), (2**20 - 512, False), (2**21, True)])
def test_a_hole_of_zeros_is_no_end_mark(zeros, is_hole):
    tar = mini.tar_of(FILES)[:3584] + bytes(zeros)
    if not is_hole:
        assert contents(tar) == FILES
        return
    with pytest.raises(UserError, match="neither a file nor the end at byte 3584"):
        contents(tar)


def test_no_tar_at_all():
    with pytest.raises(UserError, match="damaged or incomplete"):
        contents(b"<html>not found</html>" * 100)


@pytest.mark.parametrize("name", ["../evil.JPEG", "val/../../evil.JPEG", "/tmp/evil.JPEG"])
def test_members_that_lead_outside(tmp_path, name):
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match=r"evil\.JPEG' is no plain file inside"):
        unpacked(mini.tar_of({name: b"x"}), tmp_path / "out")
    assert not list(tmp_path.rglob("*.JPEG"))


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE])
def test_members_that_are_no_files(tmp_path, kind):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        member = tarfile.TarInfo("a.JPEG")
        member.type, member.linkname = kind, "/etc/passwd"
        tar.addfile(member)
    with pytest.raises(UserError, match=r"'a\.JPEG' is no plain file"):
        unpacked(file.getvalue(), tmp_path)
    assert not list(tmp_path.iterdir())


def test_contents_are_never_in_memory_as_a_whole(tmp_path):
    """A tar of one sparse image of 1 GB is listed and copied by pieces."""

    class Zeros(io.RawIOBase):
        read_at_once = 0

        def __init__(self, size: int) -> None:
            member = tarfile.TarInfo("big.JPEG")
            member.size = size
            self.head, self.size, self.position = member.tobuf(), size + 512 + 1024, 0

        def readable(self) -> bool:
            return True

        def seekable(self) -> bool:
            return True

        def seek(self, position: int, whence: int = 0) -> int:
            self.position = self.size if whence == io.SEEK_END else position
            return self.position

        def tell(self) -> int:
            return self.position

        def read(self, count: int = -1) -> bytes:
            Zeros.read_at_once = max(Zeros.read_at_once, count)
            assert count >= 0
            begin = self.head[self.position : self.position + count]
            count = min(count, self.size - self.position)
            self.position += count
            return begin + bytes(count - len(begin))

    assert [(name, size) for name, size, _ in tar_files(Zeros(10**9), WHERE)] == [("big.JPEG", 10**9)]
    with tqdm(disable=True) as bar:
        unpack(Zeros(10**7), WHERE, tmp_path, tmp_path / ".part", bar)
    assert (tmp_path / "big.JPEG").stat().st_size == 10**7
    assert Zeros.read_at_once <= 2**20

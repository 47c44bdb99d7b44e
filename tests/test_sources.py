"""Folders of images, and image files of every mode."""

import hashlib
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torchvision.datasets import ImageFolder

from dino_sparo.data.index import FolderSource
from dino_sparo.data.sources import open_images, open_labeled, per_class
from dino_sparo.errors import UserError, UserFileNotFoundError
from tests.shard_files import touch

RGB = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)


def source_of(root: Path, *names: str) -> FolderSource:
    """Empty files: what is in them does not matter for the list."""
    return open_images(str(touch(root, *names)))


def files(source: FolderSource) -> tuple[str, ...]:
    """Names of all images, from the root."""
    return tuple(str(Path(source.name(i)).relative_to(source.root)) for i in range(len(source)))


# --- Layouts


@pytest.mark.parametrize("prefix", ["train/", ""])
def test_same_files_order_labels_and_classes_as_torchvision(tmp_path, prefix):
    names = ["b/1.jpg", "b/10.JPG", "b/2.Png", "b/sub/0.jpg", "b/sub-1/0.jpg", "b/sub/deep/z.webp"]
    names += ["Z/x.tif", "Z/X.TIFF", "Z/a.bmp", "Z/y.ppm", "Z/z.pgm", "Z/notes.txt", "Z/x.jpg.md5", "ä/1.png"]
    source = source_of(tmp_path, *(prefix + name for name in [*names, "a b/ü.jpeg"]))
    expected = ImageFolder(str(tmp_path / prefix))
    assert [(source.name(i), label) for i, label in enumerate(source.labels)] == expected.samples
    assert list(source.classes) == expected.classes


@pytest.mark.parametrize("prefix", ["train/", ""])
def test_flat_folder_is_unlabeled(tmp_path, prefix):
    source = source_of(tmp_path, f"{prefix}b.jpg", f"{prefix}a.png", f"{prefix}more/c.jpg")
    assert files(source) == ("a.png", "b.jpg", "more/c.jpg")
    assert source.labels is None
    with pytest.raises(UserError, match=r"not in class folders.*dino-sparo prepare"):
        open_labeled(str(tmp_path))


def test_links_are_followed_but_no_loops_and_nothing_hidden(tmp_path):
    touch(tmp_path / "store", "x/1.jpg", "2.jpg")
    touch(
        tmp_path / "root", "a/.ipynb_checkpoints/1.jpg", "a/._1.jpg", ".hidden/1.jpg", ".DS_Store", "._2.jpg"
    )
    root = touch(tmp_path / "root", "a/1.jpg", "b/3.jpg")
    links = {"c": tmp_path / "store/x", "b/link.jpg": tmp_path / "store/2.jpg", "a/loop": "loop"}
    for link, target in (links | {"a/up": root, "a/self": ".", "b/broken": "nowhere"}).items():
        (root / link).symlink_to(target)
    source = open_images(str(root))
    assert files(source) == ("a/1.jpg", "b/3.jpg", "b/link.jpg", "c/1.jpg")
    assert source.classes == ("a", "b", "c")


def test_loose_images_beside_class_folders_are_said_aloud_once(tmp_path, caplog):
    source = source_of(tmp_path, "train/a/1.jpg", "train/thumb.png")
    assert files(source) == ("thumb.png", "a/1.jpg")
    assert source.labels is None and source.classes == ()
    assert "thumb.png" in caplog.text
    assert len(open_images(str(tmp_path))) == 2 and len(caplog.records) == 1
    source_of(tmp_path / "flat", "1.jpg", "2.jpg")
    assert len(caplog.records) == 1


@pytest.mark.parametrize(
    ("max_images", "expected"),
    [(1, [0]), (3, [0, 4, 9]), (10, [*range(10)]), (99, [*range(10)]), (None, [*range(10)])],
)
def test_max_images_are_evenly_spread(tmp_path, max_images, expected):
    touch(tmp_path, *(f"{i // 5}/{i}.jpg" for i in range(10)))
    source = open_images(str(tmp_path), max_images)
    assert files(source) == tuple(f"{i // 5}/{i}.jpg" for i in expected)
    assert source.labels.tolist() == [i // 5 for i in expected]


def test_fingerprint_knows_names_and_order_but_not_the_root(tmp_path):
    names = ("a/1.jpg", "b/2.jpg")
    here, there = source_of(tmp_path / "x", *names), source_of(tmp_path / "y/z", *names)
    assert here.fingerprint() == there.fingerprint()
    others = [here.subset(np.array(some)) for some in ([1, 0], [0], [])]
    others += [source_of(tmp_path / "w", "a/1.jpg", "b/3.jpg"), source_of(tmp_path / "one", "a/1.jpgb/2.jpg")]
    assert len({source.fingerprint() for source in (here, *others)}) == 6


def test_subset_of_a_subset(tmp_path):
    source = source_of(tmp_path, *(f"{i // 5}/{i}.jpg" for i in range(10)))
    some = source.subset(np.array([9, 2, 4, 6])).subset(np.array([2, 0]))
    assert files(some) == ("0/4.jpg", "1/9.jpg") and some.labels.tolist() == [0, 1]
    assert some.fingerprint() == hashlib.sha256(b"0/4.jpg\x001/9.jpg").hexdigest()
    assert some.index is source.index


def test_names_in_another_encoding(tmp_path):
    (tmp_path / "a").mkdir()
    name = os.fsencode(tmp_path) + b"/a/caf\xe9.png"
    Image.fromarray(RGB).save(tmp_path / "x.png")
    os.rename(tmp_path / "x.png", name)
    source = open_images(str(tmp_path))
    assert os.fsencode(source.name(0)) == name
    assert source.load(0).size == (8, 6)
    assert source.fingerprint() == hashlib.sha256(b"a/caf\xe9.png").hexdigest()


# --- Labeled folders


def test_without_val_every_fifth_image_is_held_out(tmp_path):
    train, test = open_labeled(str(touch(tmp_path, *(f"{i // 6}/{i:02}.jpg" for i in range(12)))))
    assert files(test) == ("0/04.jpg", "1/09.jpg")
    assert len(train) == 10 and not set(files(train)) & set(files(test))
    assert train.classes == test.classes == ("0", "1")
    assert train.labels.tolist() == [0] * 5 + [1] * 5 and test.labels.tolist() == [0, 1]


def test_val_classes_are_mapped_by_name(tmp_path):
    touch(tmp_path, "train/a/1.jpg", "train/b/2.jpg", "train/c/3.jpg", "val/c/4.jpg", "val/b/5.jpg")
    train, test = open_labeled(str(tmp_path))
    assert files(train) == ("a/1.jpg", "b/2.jpg", "c/3.jpg") and train.labels.tolist() == [0, 1, 2]
    assert files(test) == ("b/5.jpg", "c/4.jpg") and test.labels.tolist() == [1, 2]
    assert test.classes == train.classes == ("a", "b", "c")
    later = test.subset(np.array([1]))
    assert files(later) == ("c/4.jpg",) and later.labels.tolist() == [2]


def test_class_folders_that_do_not_match(tmp_path, caplog):
    touch(tmp_path, *(f"train/{c}/{i}.jpg" for c in "ab" for i in range(3)))
    touch(tmp_path, "train/empty/notes.txt", "train/.hidden/x")
    open_labeled(str(tmp_path))
    assert f"{tmp_path / 'train'}: 1 class folders have no image (empty ...)" in caplog.text
    touch(tmp_path, "val/empty/3.jpg")
    with pytest.raises(UserError, match=r"class folder 'empty' has no image in .*train; both need the same"):
        open_labeled(str(tmp_path))
    touch(tmp_path, "val/another/4.jpg")
    with pytest.raises(UserError, match=r"'another' does not exist in .*train"):
        open_labeled(str(tmp_path))


@pytest.mark.parametrize("open_any", [open_images, open_labeled])
def test_val_without_train_is_never_learnt_from(tmp_path, open_any):
    touch(tmp_path, "a/1.jpg", "b/2.jpg", "val/a/3.jpg", "val/b/4.jpg")
    with pytest.raises(UserError, match="a val folder, but no train folder"):
        open_any(str(tmp_path))


def test_per_class_takes_evenly_from_every_class_in_any_order(tmp_path):
    names = [f"a/{i:02}.jpg" for i in range(60)] + ["b/0.jpg"] + [f"c/{i}.jpg" for i in range(5)]
    source = source_of(tmp_path, *names)
    assert files(per_class(source, 3)) == (
        *("a/00.jpg", "a/30.jpg", "a/59.jpg"),
        *("b/0.jpg", "c/0.jpg", "c/2.jpg", "c/4.jpg"),
    )
    shuffled = source.subset(np.random.default_rng(0).permutation(66))
    members = [name for name in files(shuffled) if name.startswith("a")]
    chosen = per_class(shuffled, 4)
    assert [name for name in files(chosen) if name.startswith("a")] == [members[i] for i in (0, 20, 39, 59)]
    assert np.bincount(chosen.labels).tolist() == [4, 1, 4]


@pytest.mark.parametrize("open_any", [open_images, open_labeled])
@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("missing", "does not exist; give an existing folder"),
        ("file.jpg", "is a file; give the folder"),
        ("text", r"no images found; expected files ending in \.jpg"),
    ],
)
def test_nothing_to_open(tmp_path, open_any, name, remedy):
    touch(tmp_path, "file.jpg", "text/a/readme.txt")
    with pytest.raises(UserFileNotFoundError, match=remedy) as caught:
        open_any(str(tmp_path / name))
    assert str(tmp_path / name) in str(caught.value)


# --- Image modes


def load(path: Path) -> np.ndarray:
    image = open_images(str(path.parent)).load(0)
    assert image.mode == "RGB"
    return np.asarray(image).astype(int)


@pytest.mark.parametrize(
    ("mode", "name", "options"),
    [
        ("RGB", "x.png", {}),
        ("RGBA", "x.png", {}),
        ("RGBA", "x.tif", {}),
        ("P", "x.png", {}),
        ("P", "x.png", {"transparency": bytes(range(0, 256, 4))}),
        ("L", "x.png", {}),
        ("LA", "x.png", {}),
        ("1", "x.png", {}),
    ],
)
def test_modes_of_8_bits(tmp_path, mode, name, options):
    image = Image.fromarray(RGB)
    image = image.quantize(64) if mode == "P" else image.convert(mode)
    expected = image.convert("RGB")
    if "A" in mode:
        image.putalpha(77)  # dropped, not blended
    image.save(tmp_path / name, **options)
    np.testing.assert_array_equal(load(tmp_path / name), np.asarray(expected))


@pytest.mark.parametrize(
    ("kind", "name", "highest", "white"),
    [
        *((np.uint16, name, highest, 65535) for name in ("x.png", "x.tif") for highest in (255, 4000, 65535)),
        *((np.int32, "x.tif", highest, highest) for highest in (255, 65535, 10**6)),
        *((np.float32, "x.tiff", highest, highest) for highest in (1.0, 255.0, 65535.0)),
        *((np.float32, "x.tiff", highest, white) for highest, white in ((1.04, 1.0), (260.0, 255.0))),
    ],
)
def test_more_than_8_bits_become_8_and_never_turn_white(tmp_path, kind, name, highest, white):
    """Floats a little over their range are clipped."""
    values = np.linspace(0, highest, 48).astype(kind).reshape(6, 8)
    Image.fromarray(values).save(tmp_path / name)
    expected = (values * (255.0 / white)).clip(0, 255)  # half a level is lost in rounding
    np.testing.assert_allclose(load(tmp_path / name), np.stack([expected] * 3, axis=-1), atol=0.5)


@pytest.mark.parametrize("color", [(0, 200, 30), (255, 255, 255), (0, 0, 0)])
def test_cmyk_jpeg(tmp_path, color):
    Image.new("RGB", (16, 16), color).convert("CMYK").save(tmp_path / "x.jpg", quality=95)
    with Image.open(tmp_path / "x.jpg") as image:
        assert image.mode == "CMYK"
    # JPEG's quantisation of a flat color moves each channel by at most 2 or 3 levels.
    np.testing.assert_allclose(load(tmp_path / "x.jpg"), np.broadcast_to(color, (16, 16, 3)), atol=4)

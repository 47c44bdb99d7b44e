"""Folders of images, and image files of every mode."""

import hashlib
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torchvision.datasets import ImageFolder

from dino_sparo.data.index import FolderSource
from dino_sparo.data.sources import open_images, open_labelled, per_class
from dino_sparo.errors import UserError, UserFileNotFoundError
from tests.tiny import write_pictures

RGB = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)


def touch(root: Path, *files: str) -> str:
    """Empty files: what is in them does not matter for the list."""
    for file in files:
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).touch()
    return str(root)


def files(source: FolderSource) -> tuple[str, ...]:
    """Names of all images, from the root."""
    return tuple(str(Path(source.name(i)).relative_to(source.root)) for i in range(len(source)))


# --- Layouts


@pytest.mark.parametrize("prefix", ["train/", ""])
def test_same_files_order_labels_and_classes_as_torchvision(tmp_path, prefix):
    names = [
        "b/1.jpg",
        "b/10.JPG",
        "b/2.Png",
        "b/sub/0.jpg",
        "b/sub-1/0.jpg",
        "b/sub/deep/z.webp",
        "a b/ü.jpeg",
    ]
    names += ["Z/x.tif", "Z/X.TIFF", "Z/a.bmp", "Z/y.ppm", "Z/z.pgm", "Z/notes.txt", "Z/x.jpg.md5", "ä/1.png"]
    root = touch(tmp_path, *(prefix + name for name in names))
    source, expected = open_images(root), ImageFolder(str(tmp_path / prefix))
    assert [(source.name(i), label) for i, label in enumerate(source.labels)] == expected.samples
    assert list(source.classes) == expected.classes


def test_nested_folders_take_the_top_class(tmp_path):
    source = open_images(touch(tmp_path, "cat/x/dog/1.jpg", "cat/2.jpg", "dog/y/3.jpg"))
    assert source.classes == ("cat", "dog")
    assert dict(zip(files(source), source.labels.tolist(), strict=True)) == {
        "cat/2.jpg": 0,
        "cat/x/dog/1.jpg": 0,
        "dog/y/3.jpg": 1,
    }


@pytest.mark.parametrize("prefix", ["train/", ""])
def test_flat_folder_is_unlabelled(tmp_path, prefix):
    root = touch(tmp_path, f"{prefix}b.jpg", f"{prefix}a.png", f"{prefix}more/c.jpg")
    source = open_images(root)
    assert sorted(files(source)) == ["a.png", "b.jpg", "more/c.jpg"]
    assert source.labels is None
    with pytest.raises(UserError, match=r"not in class folders.*dino-sparo prepare"):
        open_labelled(root)


def test_hidden_files_and_folders_are_ignored(tmp_path):
    hidden = ("a/.ipynb_checkpoints/1.jpg", "a/._1.jpg", ".hidden/1.jpg", ".DS_Store", "._2.jpg")
    source = open_images(touch(tmp_path, "a/1.jpg", "b/2.jpg", *hidden))
    assert files(source) == ("a/1.jpg", "b/2.jpg")
    assert source.classes == ("a", "b")


def test_link_to_itself_is_ignored(tmp_path):
    root = touch(tmp_path, "a/1.jpg")
    (tmp_path / "a" / "loop").symlink_to("loop")
    assert files(open_images(root)) == ("a/1.jpg",)


def test_loose_images_beside_class_folders_are_said_aloud_once(tmp_path, caplog):
    root = touch(tmp_path, "train/a/1.jpg", "train/thumb.png")
    source = open_images(root)
    assert files(source) == ("thumb.png", "a/1.jpg")
    assert source.labels is None and source.classes == ()
    assert "thumb.png" in caplog.text
    assert len(open_images(root)) == 2 and len(caplog.records) == 1
    open_images(touch(tmp_path / "flat", "1.jpg", "2.jpg"))
    assert len(caplog.records) == 1


@pytest.mark.parametrize(
    ("mode", "highest"), [("F", 1.0), ("F", 255.0), ("F", 65535.0), ("I", 65535), ("I", 10**6)]
)
def test_more_than_8_bits_never_turn_white(tmp_path, mode, highest):
    values = np.linspace(0, highest, 16).reshape(4, 4).astype(np.float32 if mode == "F" else np.int32)
    Image.fromarray(values).save(tmp_path / "x.tif")
    pixels = np.asarray(open_images(str(tmp_path)).load(0))
    np.testing.assert_allclose(pixels[..., 0], np.linspace(0, 255, 16).reshape(4, 4), atol=1)


@pytest.mark.parametrize(("highest", "white"), [(1.04, 1.0), (260.0, 255.0)])
def test_floats_a_little_over_their_range_are_clipped(tmp_path, highest, white):
    values = np.linspace(0, highest, 16).reshape(4, 4).astype(np.float32)
    Image.fromarray(values).save(tmp_path / "x.tif")
    pixels = np.asarray(open_images(str(tmp_path)).load(0))
    np.testing.assert_allclose(pixels[..., 0], (values * 255 / white).clip(0, 255), atol=1)


def test_looping_links_are_not_followed(tmp_path):
    root = touch(tmp_path, "a/1.jpg", "b/2.jpg")
    (tmp_path / "a" / "up").symlink_to(tmp_path)
    (tmp_path / "a" / "self").symlink_to(".")
    (tmp_path / "b" / "broken").symlink_to("nowhere")
    assert files(open_images(root)) == ("a/1.jpg", "b/2.jpg")


def test_links_to_folders_and_files_are_followed(tmp_path):
    touch(tmp_path / "store", "x/1.jpg", "2.jpg")
    root = Path(touch(tmp_path / "root", "b/3.jpg"))
    (root / "a").symlink_to(tmp_path / "store" / "x")
    (root / "b" / "link.jpg").symlink_to(tmp_path / "store" / "2.jpg")
    assert files(open_images(str(root))) == ("a/1.jpg", "b/3.jpg", "b/link.jpg")


@pytest.mark.parametrize(
    ("max_images", "expected"),
    [(1, [0]), (3, [0, 4, 9]), (10, [*range(10)]), (99, [*range(10)]), (None, [*range(10)])],
)
def test_max_images_are_evenly_spread(tmp_path, max_images, expected):
    root = touch(tmp_path, *(f"{i // 5}/{i}.jpg" for i in range(10)))
    source = open_images(root, max_images)
    assert files(source) == tuple(f"{i // 5}/{i}.jpg" for i in expected)
    assert source.labels.tolist() == [i // 5 for i in expected]


def test_fingerprint_knows_names_and_order_but_not_the_root(tmp_path):
    names = ("a/1.jpg", "b/2.jpg")
    here, there = open_images(touch(tmp_path / "x", *names)), open_images(touch(tmp_path / "y/z", *names))
    assert here.fingerprint() == there.fingerprint()
    assert here.fingerprint() != here.subset(np.array([1, 0])).fingerprint()
    assert here.fingerprint() != here.subset(np.array([0])).fingerprint()
    assert here.fingerprint() != open_images(touch(tmp_path / "w", "a/1.jpg", "b/3.jpg")).fingerprint()
    two, one = touch(tmp_path / "two", "a.jpg", "b.jpg"), touch(tmp_path / "one", "a.jpgb.jpg")
    assert open_images(two).fingerprint() != open_images(one).fingerprint()


def test_subset_of_a_subset(tmp_path):
    source = open_images(touch(tmp_path, *(f"{i // 5}/{i}.jpg" for i in range(10))))
    some = source.subset(np.array([9, 2, 4, 6])).subset(np.array([2, 0]))
    assert files(some) == ("0/4.jpg", "1/9.jpg") and some.labels.tolist() == [0, 1]
    assert some.fingerprint() == hashlib.sha256(b"0/4.jpg\x001/9.jpg").hexdigest()
    assert some.index is source.index
    assert len(source.subset(np.array([], dtype=np.int64))) == 0


def test_names_in_another_encoding(tmp_path):
    (tmp_path / "a").mkdir()
    name = os.fsencode(tmp_path) + b"/a/caf\xe9.png"
    Image.fromarray(RGB).save(tmp_path / "x.png")
    os.rename(tmp_path / "x.png", name)
    source = open_images(str(tmp_path))
    assert os.fsencode(source.name(0)) == name
    assert source.load(0).size == (8, 6)
    assert source.fingerprint() == hashlib.sha256(b"a/caf\xe9.png").hexdigest()


# --- Labelled folders


def test_without_val_every_fifth_image_is_held_out(tmp_path):
    train, test = open_labelled(touch(tmp_path, *(f"{i // 6}/{i:02}.jpg" for i in range(12))))
    assert files(test) == ("0/04.jpg", "1/09.jpg")
    assert len(train) == 10 and not set(files(train)) & set(files(test))
    assert train.classes == test.classes == ("0", "1")
    assert train.labels.tolist() == [0] * 5 + [1] * 5 and test.labels.tolist() == [0, 1]


def test_val_classes_are_mapped_by_name(tmp_path):
    root = touch(tmp_path, "train/a/1.jpg", "train/b/2.jpg", "train/c/3.jpg", "val/c/4.jpg", "val/b/5.jpg")
    train, test = open_labelled(root)
    assert files(train) == ("a/1.jpg", "b/2.jpg", "c/3.jpg") and train.labels.tolist() == [0, 1, 2]
    assert files(test) == ("b/5.jpg", "c/4.jpg") and test.labels.tolist() == [1, 2]
    assert test.classes == train.classes == ("a", "b", "c")
    later = test.subset(np.array([1]))
    assert files(later) == ("c/4.jpg",) and later.labels.tolist() == [2]


def test_unknown_val_class_is_named(tmp_path):
    root = touch(tmp_path, "train/a/1.jpg", "train/b/2.jpg", "val/a/3.jpg", "val/new/4.jpg")
    with pytest.raises(UserError, match=r"'new' does not exist in .*train"):
        open_labelled(root)


def test_val_without_train_is_refused(tmp_path):
    root = touch(tmp_path, "a/1.jpg", "b/2.jpg", "val/a/3.jpg", "val/b/4.jpg")
    with pytest.raises(UserError, match="a val folder, but no train folder"):
        open_labelled(root)


def test_per_class_takes_evenly_from_every_class(tmp_path):
    names = [f"a/{i}.jpg" for i in range(9)] + ["b/0.jpg"] + [f"c/{i}.jpg" for i in range(4)]
    source = per_class(open_images(touch(tmp_path, *names)), 3)
    assert files(source) == ("a/0.jpg", "a/4.jpg", "a/8.jpg", "b/0.jpg", "c/0.jpg", "c/2.jpg", "c/3.jpg")
    assert source.labels.tolist() == [0, 0, 0, 1, 2, 2, 2]


def test_per_class_of_many_in_any_order(tmp_path):
    source = open_images(touch(tmp_path, *(f"{label}/{i:02}.jpg" for label in "abc" for i in range(60))))
    shuffled = source.subset(np.random.default_rng(0).permutation(180))
    chosen = files(per_class(shuffled, 4))
    for label in "abc":
        members = [name for name in files(shuffled) if name.startswith(label)]
        assert [name for name in chosen if name.startswith(label)] == [members[i] for i in (0, 20, 39, 59)]


@pytest.mark.parametrize("open_any", [open_images, open_labelled])
@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("missing", "does not exist; give an existing folder"),
        ("file.jpg", "is a file; give the folder"),
        ("empty", r"no images found; expected files ending in \.jpg"),
        ("text", "no images found"),
    ],
)
def test_nothing_to_open(tmp_path, open_any, name, remedy):
    touch(tmp_path, "file.jpg", "text/a/readme.txt")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserFileNotFoundError, match=remedy) as caught:
        open_any(str(tmp_path / name))
    assert str(tmp_path / name) in str(caught.value)


# --- Image modes


def load(path: Path) -> np.ndarray:
    image = open_images(str(path.parent)).load(0)
    assert image.mode == "RGB"
    return np.asarray(image).astype(int)


def palette_image() -> Image.Image:
    return Image.fromarray(RGB).convert("P", palette=Image.Palette.ADAPTIVE, colors=64)


@pytest.mark.parametrize(
    ("mode", "name"),
    [
        ("RGB", "x.png"),
        ("RGB", "x.bmp"),
        ("RGB", "x.ppm"),
        ("RGBA", "x.png"),
        ("RGBA", "x.tif"),
        ("P", "x.png"),
    ],
)
def test_colour_modes(tmp_path, mode, name):
    image = palette_image() if mode == "P" else Image.fromarray(RGB).convert(mode)
    if mode == "RGBA":
        image.putalpha(77)  # dropped, not blended
    image.save(tmp_path / name)
    np.testing.assert_array_equal(load(tmp_path / name), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("transparency", [0, bytes(range(0, 256, 4))])
def test_palette_with_transparency(tmp_path, transparency):
    image = palette_image()
    image.save(tmp_path / "x.png", transparency=transparency)
    np.testing.assert_array_equal(load(tmp_path / "x.png"), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("mode", ["L", "LA", "1"])
def test_grey_modes(tmp_path, mode):
    grey = RGB[..., 0] // 128 * 255 if mode == "1" else RGB[..., 0]
    image = Image.fromarray(grey).convert(mode)
    if mode == "LA":
        image.putalpha(33)
    image.save(tmp_path / "x.png")
    np.testing.assert_array_equal(load(tmp_path / "x.png"), np.stack([grey] * 3, axis=-1))


@pytest.mark.parametrize("highest", [255, 4000, 65535])
@pytest.mark.parametrize("name", ["x.png", "x.tif"])
def test_sixteen_bits_become_eight_whatever_the_range(tmp_path, name, highest):
    values = np.linspace(0, highest, 48).astype(np.uint16).reshape(6, 8)
    Image.fromarray(values).save(tmp_path / name)
    # 65535 / 255 = 257; half a level is lost in rounding.
    np.testing.assert_allclose(load(tmp_path / name), np.stack([values / 257] * 3, axis=-1), atol=0.5)


@pytest.mark.parametrize(("highest", "divisor"), [(255, 1), (65535, 257)])
def test_32_bit_integers(tmp_path, highest, divisor):
    values = np.linspace(0, highest, 48).astype(np.int32).reshape(6, 8)
    Image.fromarray(values).save(tmp_path / "x.tif")
    np.testing.assert_allclose(load(tmp_path / "x.tif")[..., 1], values / divisor, atol=0.5)


@pytest.mark.parametrize("highest", [1, 255])
def test_floats(tmp_path, highest):
    values = np.linspace(0, highest, 48, dtype=np.float32).reshape(6, 8)
    Image.fromarray(values).save(tmp_path / "x.tiff")
    np.testing.assert_allclose(load(tmp_path / "x.tiff")[..., 2], values * 255 / highest, atol=0.5)


@pytest.mark.parametrize("colour", [(255, 0, 0), (0, 200, 30), (10, 20, 240), (255, 255, 255), (0, 0, 0)])
def test_cmyk_jpeg(tmp_path, colour):
    Image.new("RGB", (16, 16), colour).convert("CMYK").save(tmp_path / "x.jpg", quality=95)
    with Image.open(tmp_path / "x.jpg") as image:
        assert image.mode == "CMYK"
    # JPEG's quantisation of a flat colour moves each channel by at most 2 or 3 levels.
    np.testing.assert_allclose(load(tmp_path / "x.jpg"), np.broadcast_to(colour, (16, 16, 3)), atol=4)


def test_a_val_folder_beside_class_folders_is_never_learnt_from(tmp_path):
    write_pictures(tmp_path / "made", 4, classes=2)
    (tmp_path / "made" / "train").rename(tmp_path / "data")
    (tmp_path / "data" / "class0").rename(tmp_path / "data" / "val")
    with pytest.raises(UserError, match=r"has a val folder, but no train folder; .* into .*data/train"):
        open_images(str(tmp_path / "data"))


def test_class_folders_without_an_image_are_told(tmp_path, caplog):
    write_pictures(tmp_path, 12, classes=2)
    (tmp_path / "train" / "aaa").mkdir()
    (tmp_path / "train" / ".hidden").mkdir()
    open_labelled(str(tmp_path))
    assert f"{tmp_path / 'train'}: 1 class folders have no image (aaa ...)" in caplog.text
    (tmp_path / "val").mkdir()
    (tmp_path / "train" / "class1").rename(tmp_path / "val" / "class1")
    (tmp_path / "train" / "class1").mkdir()
    with pytest.raises(UserError, match=r"class folder 'class1' has no image in .*train; both need the same"):
        open_labelled(str(tmp_path))

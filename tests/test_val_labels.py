"""Classes of flat folders: Kaggle's solution file, the devkit, lists; and how each can be wrong."""

import sys
import tarfile
from pathlib import Path

import pytest

from dino_sparo.data.imagenet import DEVKIT, GROUND_TRUTH, META, image_classes, recognize
from dino_sparo.errors import UserError, UserFileNotFoundError
from tests import imagenet_layouts as mini

VAL = Path("val")


def classes_from(path: Path, content: str | bytes, *images: str) -> dict[str, str]:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return image_classes(images or list(mini.VAL), VAL, path)


# --- Kinds of labels


def test_kaggle_solution_takes_the_first_box(tmp_path):
    mini.solution(tmp_path)
    assert image_classes(list(mini.VAL), VAL, tmp_path / "LOC_val_solution.csv") == mini.VAL_CLASSES
    boxes = "ImageId,PredictionString\na,n00000001 1 2 3 4 n00000002 5 6 7 8\n"
    assert classes_from(tmp_path / "two.csv", boxes, "a.JPEG") == {"a.JPEG": "n00000001"}


@pytest.mark.parametrize(("make", "name"), [(mini.devkit, DEVKIT), (mini.devkit_archive, f"{DEVKIT}.tar.gz")])
def test_devkit(tmp_path, make, name):
    make(tmp_path)
    assert image_classes(list(mini.VAL), VAL, tmp_path / name) == mini.VAL_CLASSES


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        *((mini.labels_list(sign), mini.VAL_CLASSES) for sign in (" ", "\t", ",", ", ", "   ")),
        ("my photo.jpg cat", {"my photo.jpg": "cat"}),
        ("my photo.jpg\tgolden retriever", {"my photo.jpg": "golden retriever"}),
        ("1.jpg,golden retriever\r", {"1.jpg": "golden retriever"}),
        ("./val/1.jpg cat", {"1.jpg": "cat"}),
        ("1 cat", {"1.png": "cat"}),
        ("\ufeff1.jpg cat", {"1.jpg": "cat"}),
        ("\n1.jpg cat\n\n", {"1.jpg": "cat"}),
        ("1.jpg cat\n1 dog\n", {"1.jpg": "cat", "1.png": "dog"}),  # the full name wins
        (b"b\xe4r.jpg bear\n", {"b\udce4r.jpg": "bear"}),
    ],
)
def test_lists_of_any_images(tmp_path, lines, expected):
    assert classes_from(tmp_path / "labels.txt", lines, *expected) == expected


# --- Where they lie


def test_labels_nearby_that_need_no_scipy_go_first(tmp_path):
    folder = tmp_path / "ILSVRC/Data/CLS-LOC/val"
    mini.write(folder, mini.VAL)
    assert recognize(folder).labels is None
    mini.devkit_archive(tmp_path)
    (folder / DEVKIT).mkdir()  # empty: not unpacked
    assert recognize(folder).labels == tmp_path / f"{DEVKIT}.tar.gz"
    mini.devkit(tmp_path)
    assert recognize(folder).labels == tmp_path / DEVKIT
    mini.solution(tmp_path)
    assert recognize(folder).labels == tmp_path / "LOC_val_solution.csv"


# --- Mistakes


def test_labels_and_images_that_do_not_fit(tmp_path):
    lines = mini.labels_list().splitlines()
    message = r"l\.txt: no label for ILSVRC2012_val_00000002\.JPEG of val \(2 of 5 images have none\)"
    with pytest.raises(UserError, match=message):
        classes_from(tmp_path / "l.txt", b"\n".join([lines[0], *lines[3:]]))
    message = r"l\.txt line 2: val has no image 'ILSVRC2012_val_00000004\.JPEG' \(5 labels, 3 images\)"
    some = [name for name in mini.VAL if "4" not in name and "3" not in name]
    with pytest.raises(UserError, match=message):
        classes_from(tmp_path / "l.txt", b"\n".join(reversed(lines)), *some)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("1.jpg cat\n2.jpg", r"line 2: '2\.jpg' is not a label; expected `file_name class`"),
        ("1.jpg .cat", "is not a label"),
        ("1.jpg c/at", "is not a label"),
        ("1.jpg,c\0at", "is not a label"),
        (",cat", "is not a label"),
        ("1.jpg cat\n\n1.jpg dog", r"line 3: '1\.jpg' already has a label \(line 1\)"),
        ("ImageId,PredictionString\n1,", "line 2: '1,' is not a label; expected `ImageId,class and box"),
        ("", r"no label for 1\.jpg"),
    ],
)
def test_malformed_lines(tmp_path, lines, message):
    with pytest.raises(UserError, match=message):
        classes_from(tmp_path / "labels.txt", lines, "1.jpg")


def test_no_such_file(tmp_path):
    with pytest.raises(UserFileNotFoundError, match=r"labels.*does not exist"):
        image_classes(["1.jpg"], VAL, tmp_path / "missing.csv")


def test_devkit_without_scipy(tmp_path, monkeypatch):
    mini.devkit(tmp_path)
    monkeypatch.setitem(sys.modules, "scipy.io", None)
    with pytest.raises(
        UserError, match=r"meta\.mat can only be read with scipy; run `pip install scipy`, or give"
    ):
        image_classes(list(mini.VAL), VAL, tmp_path / DEVKIT)


@pytest.mark.parametrize("number", ["4", "n01440764"])  # 4 is a synset, but no class
def test_ground_truth_that_is_no_class(tmp_path, number):
    mini.devkit(tmp_path)
    (tmp_path / DEVKIT / GROUND_TRUTH).write_text(f"2\n1\n{number}\n2\n1\n")
    with pytest.raises(UserError, match=r"ground_truth\.txt line 3: .* is not a class; expected .* 1 to 3"):
        image_classes(list(mini.VAL), VAL, tmp_path / DEVKIT)


@pytest.mark.parametrize("kept", [0, -40])
def test_damaged_meta(tmp_path, kept):
    mini.devkit(tmp_path)
    meta = tmp_path / DEVKIT / META
    meta.write_bytes(meta.read_bytes()[:kept])
    with pytest.raises(UserError, match=r"meta\.mat is not the devkit's meta\.mat"):
        image_classes(list(mini.VAL), VAL, tmp_path / DEVKIT)


@pytest.mark.parametrize("names", [("../evil", ".hidden", "/"), ()])
def test_meta_without_classes(tmp_path, monkeypatch, names):
    monkeypatch.setattr(mini, "WNIDS", names)
    mini.devkit(tmp_path)
    with pytest.raises(UserError, match=r"is not the devkit's meta\.mat \(it names no classes\)"):
        image_classes(list(mini.VAL), VAL, tmp_path / DEVKIT)


def test_devkit_archive_that_is_damaged(tmp_path):
    """Cut short, or with one byte changed behind the header of the archive."""
    mini.devkit_archive(tmp_path)
    archive = tmp_path / f"{DEVKIT}.tar.gz"
    content = archive.read_bytes()
    damaged = [content[:keep] for keep in (0, 20, 200)]
    for position in range(10 + len(f"{DEVKIT}.tar\0"), len(content), 7):
        damaged.append(content[:position] + bytes([content[position] ^ 255]) + content[position + 1 :])
    for bad in damaged:
        archive.write_bytes(bad)
        with pytest.raises(UserError, match=r"tar\.gz cannot be read as a devkit"):
            image_classes(list(mini.VAL), VAL, archive)


@pytest.mark.parametrize("kind", [None, tarfile.DIRTYPE])
def test_devkit_that_lacks_a_file(tmp_path, kind):
    archive = tmp_path / f"{DEVKIT}.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        for name in (GROUND_TRUTH, META) if kind else (GROUND_TRUTH,):
            member = tarfile.TarInfo(f"{DEVKIT}/{name}")
            member.type = kind if kind and name == META else tarfile.REGTYPE
            tar.addfile(member)
    mini.devkit(tmp_path)
    (tmp_path / DEVKIT / META).unlink()
    for devkit in (archive, tmp_path / DEVKIT):
        with pytest.raises(UserError, match=r"cannot be read as a devkit .*meta\.mat"):
            image_classes(list(mini.VAL), VAL, devkit)


def test_devkit_line_without_image(tmp_path):
    mini.devkit(tmp_path)
    (tmp_path / DEVKIT / GROUND_TRUTH).write_bytes(b" 2 \r\n1\r\n3\r\n")
    with pytest.raises(UserError, match=rf"{DEVKIT} line 3: val has no image 'ILSVRC2012_val_00000003'"):
        image_classes(list(mini.VAL)[:2], VAL, tmp_path / DEVKIT)

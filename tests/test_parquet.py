"""Parquet files: which are taken, what their columns mean, how rows are read, mistakes in one sentence."""

import logging
import os
import pickle
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from dino_sparo.data import parquet as reading
from dino_sparo.data.decode import UnreadableImageError
from dino_sparo.data.parquet import warn_of_random_order
from dino_sparo.data.scan import scan_images
from dino_sparo.data.sources import open_images, open_labelled, open_val
from dino_sparo.errors import UserError, UserFileNotFoundError
from dino_sparo.evaluation.transfer import open_test_sets
from dino_sparo.shard import shard
from dino_sparo.training.pretrain import pretrain
from tests.containers import IMAGE, write_parquet
from tests.shard_files import picture, write
from tests.tiny import tiny_options

FILE = "train-00000-of-00001.parquet"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("DINO_SPARO_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def root(tmp_path) -> Path:
    return tmp_path / "data"


def images(count: int, first: int = 0) -> list[dict]:
    return [{"bytes": picture(first + i), "path": f"{first + i}.png"} for i in range(count)]


# --- Which files


@pytest.mark.parametrize(
    ("files", "train", "val"),
    [
        (["train-00000-of-00002", "train-00001-of-00002", "validation-00000-of-00001"], 2, 1),
        (["data/train-0", "data/val-0", "data/test-0"], 1, 1),
        (["train", "test"], 1, 1),
        (["train-0", "train_extra"], 2, None),
        (["0000", "0001"], 2, None),
        (["train/0000", "train/0001", "val/0000"], 2, 1),
        (["train/0000", "validation/0000", "test/0000"], 1, 1),
        (["train-0", "others"], 1, None),
    ],
)
def test_splits_are_in_the_names_of_files(root, files, train, val):
    for number, name in enumerate(files):
        write_parquet(root / f"{name}.parquet", images(3, 3 * number), [0, 1, 0], ["a", "b"])
    (root / "README.md").touch()
    assert len(open_images(str(root))) == 3 * train
    found = open_val(str(root))
    assert found is None if val is None else len(found) == 3 * val
    gallery, test = open_labelled(str(root))
    expected = (3 * train, 3 * val) if val else (3 * train - 3 * train // 5, 3 * train // 5)
    assert (len(gallery), len(test)) == expected


@pytest.mark.parametrize(
    "present", [["train-00001-of-00002"], ["train-00000-of-00002", "train-00000-of-00001"]]
)
def test_files_that_are_not_all_there(root, present):
    for name in present:
        write_parquet(root / f"{name}.parquet", images(3), [0, 1, 0], ["a", "b"])
    with pytest.raises(UserError, match=rf"holds {len(present)} of .*2 parquet files, .*download the others"):
        open_images(str(root))


def test_a_test_split_without_labels_is_no_val(root):
    write_parquet(root / "train-0.parquet", images(5), [0, 1, 0, 1, 0], ["a", "b"])
    write_parquet(root / "test-0.parquet", images(5, 5), [-1] * 5, ["a", "b"])
    train, test = open_labelled(str(root))
    assert (len(train), len(test)) == (4, 1) and open_val(str(root)).labels is None


def test_image_folders_with_a_list_in_parquet_stay_image_folders(root):
    write(root, "a/1.png", "b/2.png")
    parquet.write_table(pa.table({"file": ["a/1.png"]}), root / "metadata.parquet")
    assert open_images(str(root)).classes == ("a", "b")


# --- Columns


def test_columns_of_any_name_and_the_only_class_label(root):
    write_parquet(root / FILE, images(3), [2, 0, 2], ["x", "y", "z"], image="img", label="fine")
    source = open_images(str(root))
    assert source.labels.tolist() == [2, 0, 2] and source.classes == ("x", "y", "z")
    assert source.read(1) == picture(1)


def test_without_names_numbers_are_names_and_without_a_column_it_is_unlabelled(root, tmp_path):
    write_parquet(root / FILE, images(3), [7, 30, 7])
    source = open_images(str(root))
    assert source.classes == ("7", "30") and source.labels.tolist() == [0, 1, 0]
    write_parquet(tmp_path / "other" / FILE, images(3), [7, 30, 7], label="number")
    assert open_images(str(tmp_path / "other")).labels is None
    with pytest.raises(UserError, match=r"do not tell the class of every image; expected a column label"):
        open_labelled(str(tmp_path / "other"))


def test_rows_without_a_path_have_names_of_their_own(root):
    write_parquet(
        root / FILE, [{"bytes": picture(i), "path": None} for i in range(3)], [1, 0, 0], ["a", "b/c"]
    )
    source = open_images(str(root))
    names = [source.index.name(i) for i in range(3)]
    assert names == [
        f"{folder}/train-00000-of-00001-00000{i}.png" for i, folder in enumerate(("b_c", "a", "a"))
    ]
    assert source.name(2) == f"{root}/{FILE}, row 2"


def test_classes_of_a_further_test_set_and_numbered_ones(root, tmp_path):
    write_parquet(root / FILE, images(3), [0, 1, 2], ["z", "y", "x"])
    write_parquet(tmp_path / "few" / "test-0.parquet", images(2), [1, 0], ["x", "z"])
    write(tmp_path / "numbered", "0/1.png", "2/2.png")
    classes = open_images(str(root)).classes
    few, numbered = open_test_sets([f"few={tmp_path / 'few'}", f"n={tmp_path / 'numbered'}"], classes)
    assert few.labels.tolist() == [0, 2] and numbered.labels.tolist() == [0, 2]


# --- Reading


@pytest.mark.parametrize("kept_bytes", [0, 3 * len(picture(0)), 2**26])
def test_rows_in_any_order_whatever_is_kept(root, monkeypatch, kept_bytes):
    monkeypatch.setattr(reading, "KEPT_BYTES", kept_bytes)
    monkeypatch.setattr(reading, "_row_groups", reading._RowGroups())
    for number, count in enumerate((5, 1, 4)):
        write_parquet(root / f"train-{number}.parquet", images(count, 5 * number), group=2)
    source = open_images(str(root))
    expected = [picture(i) for i in (0, 1, 2, 3, 4, 5, 10, 11, 12, 13)]
    for i in np.random.default_rng(0).permutation(np.repeat(np.arange(10), 3)).tolist():
        assert source.read(i) == expected[i]
    kept = reading._row_groups
    assert kept.num_bytes == sum(group.nbytes for group in kept.kept.values())
    assert len(kept.kept) == 1 or kept.num_bytes <= kept_bytes
    assert source.name(9) == f"{root}/train-2.parquet, row 3"
    assert pickle.loads(pickle.dumps(source)).read(9) == expected[9]


def test_the_index_is_kept_until_a_file_changes(root, monkeypatch):
    write_parquet(root / FILE, images(3), [0, 1, 1], ["a", "b"])
    before = open_images(str(root)).fingerprint()
    with monkeypatch.context() as patch:
        patch.setattr(reading, "pack_parquet", lambda *_: pytest.fail("made anew"))
        assert open_images(str(root)).fingerprint() == before
    source = open_images(str(root))
    write_parquet(root / FILE, images(4), [0, 1, 1, 0], ["a", "b"])
    with pytest.raises(UnreadableImageError, match="has changed since it was indexed"):
        source.load(0)
    assert len(open_images(str(root))) == 4
    write_parquet(root / "train-1.parquet", images(1), [0], ["a", "b"])
    assert len(open_images(str(root))) == 5


def test_scan_reads_every_row_and_names_the_bad_ones(root):
    rows = [*images(3), {"bytes": picture(0)[:60], "path": "cut.png"}, {"bytes": None, "path": "x.png"}, None]
    write_parquet(root / FILE, rows)
    for num_workers in (0, 1):
        report = scan_images(open_images(str(root)), num_workers=num_workers, description="x").report
        assert (report.images, report.readable) == (6, 3)
        found = sorted(text for listing in report.problems.values() for text in listing.first)
        assert [text.split(": ")[0] for text in found] == [f"{root}/{FILE}, row {row}" for row in (3, 4, 5)]
        assert "the row holds no image, or only its path" in found[1]


def test_a_bad_row_ends_training_by_its_name_or_another_stands_in(root, tmp_path):
    write_parquet(root / FILE, [*images(4), {"bytes": b"no image", "path": "x.png"}])
    with pytest.raises(
        UserError, match=rf"{FILE}, row 4: the image cannot be read \(no known kind of image\)"
    ):
        pretrain(tiny_options(root, tmp_path / "run", optim__global_batch_size=5))


@pytest.mark.parametrize("short_side", [None, 9])
def test_shards_of_rows_without_paths(root, tmp_path, short_side):
    rows = [{"bytes": picture(i), "path": None} for i in range(5)]
    write_parquet(root / FILE, rows, [0, 1, 0, 1, 1], ["b", "a"])
    shard(str(root), str(tmp_path / "out"), short_side=short_side, num_workers=1, images_per_shard=2)
    source = open_images(str(tmp_path / "out"))
    assert len(source) == 5 and source.labels.tolist() == [0, 1, 0, 1, 1] and source.classes == ("b", "a")
    assert short_side or [source.read(i) for i in range(5)] == [row["bytes"] for row in rows]


def test_odd_paths_stay_names_of_files_in_shards(root, tmp_path):
    paths = ["/abs/x.jpg", "../up.png", "dir/", ".hidden.png", "no_ending"]
    write_parquet(root / FILE, [image | {"path": path} for image, path in zip(images(5), paths, strict=True)])
    source = open_images(str(root))
    names = [source.index.name(i) for i in range(5)]
    assert names == ["x.jpg", "up.png", "train-00000-of-00001-000002.png", "hidden.png", "no_ending.png"]
    shard(str(root), str(tmp_path / "out"), num_workers=0)
    assert open_images(str(tmp_path / "out")).fingerprint() == source.fingerprint()


def test_random_order_from_large_row_groups_is_told_once_with_the_remedy(root, monkeypatch, caplog):
    monkeypatch.setattr(reading, "KEPT_BYTES", 0)
    write_parquet(root / FILE, [{"bytes": bytes([i]) * 2**19, "path": None} for i in range(5)], group=5)
    with caplog.at_level(logging.WARNING, "dino_sparo"):
        for _ in range(2):
            warn_of_random_order(open_images(str(root)))
    assert len(caplog.records) == 1
    assert f"row group (2.6 MB); dino-sparo shard {root} --out OUT makes shards" in caplog.text
    write_parquet(root / FILE, [{"bytes": bytes([i]) * 2**19, "path": None} for i in range(5)], group=1)
    assert open_images(str(root)).index.bytes_in_random_order() < 2**20


def test_pretraining_in_a_random_order_warns(root, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(reading, "KEPT_BYTES", 0)
    monkeypatch.setattr(reading, "SLOW_BYTES", 0)
    write_parquet(root / FILE, images(4))
    pretrain(tiny_options(root, tmp_path / "run", optim__epochs=1, optim__warmup_epochs=0))
    assert f"dino-sparo shard {root} --out OUT" in caplog.text


# --- Mistakes


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


def other(path: Path, **columns) -> None:
    parquet.write_table(pa.table(columns), path)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (cut, r"train-1\.parquet is no whole parquet file \(.*\); download it again"),
        (lambda path: path.write_bytes(b""), r"train-1\.parquet is no whole parquet file"),
        (lambda path: path.write_text("version https://git-lfs"), r"git lfs pull"),
        (
            lambda path: other(path, text=["x"]),
            r"train-1\.parquet has no column of images among 'text'; expec",
        ),
        (
            lambda path: other(path, a=pa.array([None], IMAGE), b=pa.array([None], IMAGE)),
            r"columns 'a', 'b' of",
        ),
        (
            lambda path: write_parquet(path, images(1), [0], ["x"]),
            r"has other names of the classes than train-0",
        ),
        (
            lambda path: write_parquet(path, images(1), image="y"),
            r"has columns 'y' and None, others than train-0",
        ),
        (
            lambda path: write_parquet(path, images(1), [2], ["a", "b"]),
            r"class number 2, .* name only 2 classes",
        ),
    ],
)
def test_mistakes_are_one_sentence(root, damage, said):
    for number in range(2):
        write_parquet(root / f"train-{number}.parquet", images(3), [0, 1, 1], ["a", "b"])
    damage(root / "train-1.parquet")
    with pytest.raises(UserError, match=said) as caught:
        open_images(str(root))
    assert "\n" not in str(caught.value)


def test_nothing_in_them(root):
    write_parquet(root / "validation.parquet", images(1))
    with pytest.raises(UserFileNotFoundError, match="but none of train; expected train-"):
        open_images(str(root))
    write_parquet(root / FILE, [])
    with pytest.raises(UserFileNotFoundError, match="no images found in 1 parquet files"):
        open_images(str(root))


def test_without_pyarrow_the_extra_is_named(root, monkeypatch):
    write_parquet(root / FILE, images(1))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.delitem(sys.modules, "pyarrow.parquet")
    with pytest.raises(UserError, match=r"need a package .* pip install pyarrow"):
        open_images(str(root))


def test_a_damaged_row_group_is_a_bad_image(root):
    write_parquet(root / FILE, images(4))
    source, stat = open_images(str(root)), (root / FILE).stat()
    with open(root / FILE, "r+b") as file:  # the header of the first page
        file.seek(4)
        file.write(b"\xff" * 40)
    os.utime(root / FILE, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    with pytest.raises(UnreadableImageError, match=f"^{root}/{FILE}, row 0: ") as caught:
        source.load(0)
    assert "the parquet file is damaged: " in str(caught.value) and "\n" not in str(caught.value)
    assert source.read(2) == picture(2)

"""Parquet files: which are taken, what their columns mean, how rows are read, mistakes in one sentence."""

import json
import logging
import pickle
import sys
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from dino_sparo.cli.pretraining import pretrain
from dino_sparo.data import tables
from dino_sparo.data.decode import UnreadableImageError
from dino_sparo.data.scan import scan_images
from dino_sparo.data.sources import open_images, open_labeled, open_val
from dino_sparo.errors import UserError, UserFileNotFoundError
from dino_sparo.evaluation.transfer import balanced_fraction, open_test_sets
from dino_sparo.shard import shard
from tests.containers import IMAGE, write_parquet
from tests.running import at_once
from tests.shard_files import picture, write
from tests.tiny import tiny_options

FILE = "train-00000-of-00001.parquet"


@pytest.fixture
def root(tmp_path) -> Path:
    return tmp_path / "data"


def set_of(path: Path, count: int, classes: str | None = None, first: int = 0, **how) -> Path:
    """A file of pictures from the first on, of classes by turns; its folder."""
    labels = [i % len(classes) for i in range(count)] if classes else None
    return write_parquet(path, images(count, first), labels, classes, **how)


def images(count: int, first: int = 0) -> list[dict]:
    return [{"bytes": picture(first + i), "path": f"{first + i}.png"} for i in range(count)]


# --- Which files


@pytest.mark.parametrize(
    ("files", "train", "val"),
    [
        (["train-00000-of-00002", "train-00001-of-00002", "validation-00000-of-00001"], 2, 1),
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
        set_of(root / f"{name}.parquet", 5, "ab", first=5 * number)
    (root / "README.md").touch()
    assert len(open_images(str(root))) == 5 * train
    found = open_val(str(root))
    assert found is None if val is None else len(found) == 5 * val
    gallery, test = open_labeled(str(root))
    expected = (5 * train, 5 * val) if val else (4 * train, train)
    assert (len(gallery), len(test)) == expected


def test_files_that_are_not_all_there(root):
    set_of(root / "train-00000-of-00002.parquet", 3)
    with pytest.raises(UserError, match=r"contains 1 of 2 parquet files, .*download the others"):
        open_images(str(root))
    set_of(root / "train-00000-of-00001.parquet", 3)
    with pytest.raises(UserError, match="contains 2 of 1 or 2 parquet files"):
        open_images(str(root))


def test_a_test_split_without_labels_is_no_val(root):
    set_of(root / "train-0.parquet", 5, "ab")
    write_parquet(root / "test-0.parquet", images(5, 5), [-1] * 5, ["a", "b"])
    train, test = open_labeled(str(root))
    assert (len(train), len(test)) == (4, 1) and open_val(str(root)) is None


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


def test_without_names_numbers_are_names_and_without_a_column_it_is_unlabeled(root, tmp_path):
    write_parquet(root / FILE, images(3), [7, 30, 7])
    source = open_images(str(root))
    assert source.classes == ("7", "30") and source.labels.tolist() == [0, 1, 0]
    write_parquet(tmp_path / "other" / FILE, images(3), [7, 30, 7], label="number")
    assert open_images(str(tmp_path / "other")).labels is None
    with pytest.raises(UserError, match=r"do not contain the class of every image; expected a column label"):
        open_labeled(str(tmp_path / "other"))


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


def test_names_of_classes_without_images_are_no_classes(root):
    write_parquet(root / "test-0.parquet", images(8), [0, 1] * 4, ["z", "y", "x", "unknown"])
    (test,) = open_test_sets([f"new={root}"], ["x", "y", "z"])
    assert test.classes.tolist() == [1, 2] and test.missing == ("x",) and test.unknown == ()
    write_parquet(root / "test-0.parquet", images(8), [0, 1] * 4, ["0", "1", "2", "3", "background"])
    (numbered,) = open_test_sets([f"new={root}"], ["x", "y", "z"])
    assert numbered.labels.tolist() == [0, 1] * 4 and numbered.unknown == ()
    assert balanced_fraction(test.source, 0.5, seed=0).labels.tolist().count(1) == 2


# --- Reading


def test_rows_in_any_order(root):
    for number, count in enumerate((5, 1, 4)):
        write_parquet(root / f"train-{number}.parquet", images(count, 5 * number), group=2)
    source = open_images(str(root))
    expected = [picture(i) for i in (0, 1, 2, 3, 4, 5, 10, 11, 12, 13)]
    for i in np.random.default_rng(0).permutation(np.repeat(np.arange(10), 3)).tolist():
        assert source.read(i) == expected[i]
    assert source.name(9) == f"{root}/train-2.parquet, row 3"
    assert pickle.loads(pickle.dumps(source)).read(9) == expected[9]
    assert source.stats()[:, 0].tolist() == [len(data) for data in expected]


def test_a_file_without_rows_is_no_obstacle(root):
    for number, count in enumerate((0, 4, 0, 2)):
        write_parquet(root / f"train-{number}.parquet", images(count, 5 * number))
    source = open_images(str(root))
    assert [source.read(i) for i in range(6)] == [picture(i) for i in (5, 6, 7, 8, 15, 16)]
    assert source.name(4) == f"{root}/train-3.parquet, row 0"


def test_the_index_is_kept_until_a_file_changes(root, monkeypatch):
    set_of(root / FILE, 3, "ab")
    source = open_images(str(root))
    with monkeypatch.context() as patch:
        patch.setattr(tables, "index_parts", lambda *_: pytest.fail("made anew"))
        assert open_images(str(root)).fingerprint() == source.fingerprint()
    set_of(root / FILE, 4, "ab")
    (copy,) = map(Path, source.index.header["shards"])
    copy.write_bytes(copy.read_bytes()[:-1])
    with pytest.raises(UnreadableImageError, match=r"train-.*row 0: .*has changed since it was indexed"):
        source.load(0)
    assert len(open_images(str(root))) == 4
    set_of(root / "train-1.parquet", 2, "ab")
    assert len(open_images(str(root))) == 6


def test_scan_reads_every_row_and_names_the_bad_ones(root):
    rows = [*images(3), {"bytes": picture(0)[:60], "path": "cut.png"}, {"bytes": None, "path": "x.png"}, None]
    write_parquet(root / FILE, rows)
    for num_workers in (0, 1):
        report = scan_images(open_images(str(root)), num_workers=num_workers, description="x").report
        assert (report.images, report.readable) == (6, 3)
        found = sorted(text for listing in report.problems.values() for text in listing.first)
        assert [text.split(": ")[0] for text in found] == [f"{root}/{FILE}, row {row}" for row in (3, 4, 5)]
        assert "the row contains no image, or only its path" in found[1]
    with pytest.raises(
        UnreadableImageError, match=rf"{FILE}, row 4: the image cannot be read \(the row contains"
    ):
        open_images(str(root)).load(4)


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


# --- Mistakes


def spoil(path: Path) -> None:
    """Break the header of the first page; the footer is whole."""
    data = path.read_bytes()
    path.write_bytes(data[:4] + b"\xff" * 40 + data[44:])


def other(path: Path, **columns) -> None:
    parquet.write_table(pa.table(columns), path)


DAMAGES = {
    r"train-1\.parquet cannot be read as a parquet .*\); download": lambda path: path.write_bytes(b"PAR1"),
    r"train-1\.parquet cannot be read as a parquet file \(.*git lfs pull": lambda path: path.write_text(
        "version h"
    ),
    r"train-1\.parquet cannot be read as a parquet file": spoil,
    r"train-1\.parquet has no column of images among 'text'; expec": lambda path: other(path, text=["x"]),
    r"train-1\.parquet has the columns 'a', 'b' of": lambda path: other(
        path, a=pa.array([None], IMAGE), b=pa.array([None], IMAGE)
    ),
    r"train-1\.parquet .* has other columns or class names than": lambda path: set_of(path, 1, "x"),
    r"train-1\.parquet \(columns 'y' and None\) has other": lambda path: set_of(path, 1, image="y"),
    r"data: an image has class number 2, .* name only 2 classes": lambda path: path.unlink(),
}


@pytest.mark.parametrize("said", DAMAGES)
def test_mistakes_are_one_sentence(root, said):
    write_parquet(root / "train-0.parquet", images(3), [0, 1, 2], ["a", "b"])
    set_of(root / "train-1.parquet", 3, "ab")
    DAMAGES[said](root / "train-1.parquet")
    with pytest.raises(UserError, match=said) as caught:
        open_images(str(root))
    assert "\n" not in str(caught.value)


def test_nothing_in_them(root):
    set_of(root / "validation.parquet", 1)
    with pytest.raises(UserFileNotFoundError, match="but none of train; expected train-"):
        open_images(str(root))
    write_parquet(root / FILE, [])
    with pytest.raises(UserFileNotFoundError, match="no images found in its files"):
        open_images(str(root))


@pytest.mark.parametrize("missing", ["pyarrow", "datasets"])
def test_without_the_library_its_name_is_told(root, monkeypatch, missing):
    set_of(root / FILE, 1)
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(UserError, match=r"need the package datasets.* pip install datasets"):
        open_images(str(root))


def test_starts_at_once_make_one_copy(root, caplog):
    set_of(root / FILE, 4)
    at_once(open_images, str(root))
    with caplog.at_level(logging.INFO, "dino_sparo"):
        assert open_images(str(root)).read(3) == picture(3)
    assert "copy" not in caplog.text


# --- What `datasets` has saved, and sets of the hub


@pytest.fixture
def saved(tmp_path):
    """A set with train, validation and test, its files in the layout of the hub."""
    for number, split in enumerate(("train", "validation", "test")):
        set_of(tmp_path / f"hub/data/{split}-00000-of-00001.parquet", 4, "ab", first=4 * number)
    return tmp_path / "hub"


def test_a_set_that_was_saved_is_read_where_it_lies(saved, tmp_path, caplog):
    splits = {name: str(saved / f"data/{name}-00000-of-00001.parquet") for name in ("train", "validation")}
    whole = datasets.load_dataset("parquet", data_files=splits)
    whole.save_to_disk(tmp_path / "both")
    whole["train"].save_to_disk(tmp_path / "one", num_shards=2)
    with caplog.at_level(logging.INFO, "dino_sparo"):
        train, val = open_labeled(str(tmp_path / "both"))
        one = open_images(str(tmp_path / "one"))
    assert "copy" not in caplog.text and train.root == tmp_path / "both" / "train"
    assert [s.read(i) for s in (train, one) for i in range(4)] == 2 * list(map(picture, range(4)))
    assert [val.read(i) for i in range(4)] == list(map(picture, range(4, 8)))
    assert train.labels.tolist() == [0, 1, 0, 1] and train.classes == val.classes == ("a", "b")
    assert train.fingerprint() == one.fingerprint() == open_images(str(saved)).fingerprint()
    assert train.name(1) == f"{tmp_path / 'both'}/train, row 1"
    (tmp_path / "one" / "data-00001-of-00002.arrow").write_bytes(b"no table")
    with pytest.raises(UserError, match=r"data-00001-of-00002\.arrow cannot be read as an Arrow file"):
        open_images(str(tmp_path / "one"))


@pytest.fixture
def hub(saved, monkeypatch, tmp_path):
    """A stand-in for the hub that holds the set at commit 0123abc; the arguments of each call to it."""
    real, calls = datasets.load_dataset_builder, []
    commit = tmp_path / "commit@0123abc"
    commit.symlink_to(saved)

    def load(path, name=None, *, revision=None, **options):
        if path == "parquet":
            return real(path, **options)
        calls.append((path, name, revision))
        if path != "owner/set":
            raise FileNotFoundError(f"Couldn't find any data file at {path}.\nMore lines")
        found = {split: [f"{commit}/data/{split}-00000-of-00001.parquet"] for split in ("train", "test")}
        if name != "without_val":
            found["validation"] = [f"{commit}/data/validation-00000-of-00001.parquet"]
        rows = {"test": SimpleNamespace(num_examples=100_000, num_bytes=1)}  # of the others it does not say
        return SimpleNamespace(config=SimpleNamespace(data_files=found), info=SimpleNamespace(splits=rows))

    monkeypatch.setattr(datasets, "load_dataset_builder", load)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    return calls


def test_a_set_of_the_hub_without_its_test_split(hub, saved, caplog):
    (saved / "data/test-00000-of-00001.parquet").unlink()  # nobody may want it
    with caplog.at_level(logging.INFO, "dino_sparo"):
        train, val = open_labeled("hub:owner/set:plain@main")
    assert hub == [("owner/set", "plain", "main")] * 2
    assert [train.read(i) for i in range(4)] == list(map(picture, range(4)))
    assert [val.read(i) for i in range(4)] == list(map(picture, range(4, 8)))
    assert train.labels.tolist() == [0, 1, 0, 1] and train.classes == ("a", "b")
    assert train.name(3) == "hub:owner/set:plain@main/train, row 3" and train.commit == "0123abc"
    assert "hub:owner/set:plain@main, train: commit 0123abc" in caplog.text and "copy" in caplog.text
    places = ("hub:owner/set:plain@main, train", "hub:owner/set:plain@main, validation")
    said = "train: 4 images in 2 classes ({}); val: 4 ({}); not used: test (100,000 rows)"
    assert said.format(*places) in caplog.text
    again = pickle.loads(pickle.dumps(open_images("hub:owner/set:plain@main")))
    assert len(hub) == 2 and again.read(2) == picture(2)  # nobody has asked the hub again
    assert open_val("hub:owner/set:plain@main").read(0) == picture(4)


def test_a_set_of_the_hub_without_validation_is_tested_on_its_labeled_test_split(hub, saved):
    _, test = open_labeled("hub:owner/set:without_val")
    assert [test.read(i) for i in range(4)] == list(map(picture, range(8, 12)))
    write_parquet(saved / "data/test-00000-of-00001.parquet", images(5, 5), [-1] * 5, ["a", "b"])
    with pytest.raises(UserError, match="has 4 images, too few to hold out every fifth as val"):
        open_labeled("hub:owner/set:without_val@other")
    assert open_val("hub:owner/set:without_val@other") is None


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("hub:owner/other", r"^hub:owner/other cannot be downloaded from the hub \(Couldn't find [^\n]*$"),
        ("hub:", r"expected hub:OWNER/NAME\[:CONFIG\]\[@REVISION\]"),
    ],
)
def test_a_hub_that_does_not_answer_is_one_sentence(hub, path, said):
    with pytest.raises(UserError, match=said):
        open_images(path)


def test_pretrain_takes_a_set_of_the_hub(hub, tmp_path):
    pretrain(tiny_options(Path("hub:owner/set"), tmp_path / "run", optim__epochs=1, optim__warmup_epochs=0))
    assert json.loads((tmp_path / "run" / "starts.jsonl").read_text())["data_commit"] == "0123abc"

"""Other test sets: classes matched by name or number, and messages about unmatched classes."""

from pathlib import Path

import numpy as np
import pytest
import torch

from dino_sparo.data.shards import ShardSource
from dino_sparo.data.sources import open_labeled
from dino_sparo.errors import UserError, UserFileNotFoundError
from dino_sparo.evaluation.transfer import TestSet, as_test_set, open_test_sets, restrict
from dino_sparo.shard import shard

WNIDS = tuple(f"n{number:08d}" for number in (1440764, 1443537, 2102040, 3000684, 15075141))


def touch(root: Path, *files: str) -> Path:
    """Image files without content, since only labels are tested."""
    for file in files:
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).touch()
    return root


def only(root: Path, train_classes: tuple[str, ...] = WNIDS) -> TestSet:
    (test,) = open_test_sets([f"new={root}"], train_classes)
    return test


def by_file(test: TestSet) -> dict[str, int]:
    names = [Path(test.source.name(i)) for i in range(len(test.source))]
    return {f"{p.parent.name}/{p.name}": n for p, n in zip(names, test.labels.tolist(), strict=True)}


TWELVE = tuple(f"n{number:08d}" for number in range(100, 112))


@pytest.mark.parametrize(
    ("classes", "numbers", "unknown"),
    [
        (WNIDS, {WNIDS[1]: 1, WNIDS[4]: 4}, ()),  # as ImageNet-A and -R: some of the classes
        (("c", "a", "b"), {"a": 1, "b": 2, "c": 0}, ()),  # in any order
        (TWELVE, {str(number): number for number in range(12)}, ()),  # as ImageNet-V2: numbers
        (("c", "a", "b"), {"0": 0, "2": 2}, ()),  # in the order of training
        (("10", "2", "5"), {"10": 0, "2": 1}, ("7",)),  # names, where training has numbers
        (("a", "b"), {"b": 1}, ("1",)),  # names, since one is
    ],
)
def test_classes_are_matched_by_name_or_by_number(tmp_path, classes, numbers, unknown):
    files = [f"{name}/{i}.jpg" for name in (*numbers, *unknown) for i in (0, 1)]
    test = only(touch(tmp_path, *files), classes)
    expected = {f"{name}/{i}.jpg": number for name, number in numbers.items() for i in (0, 1)}
    assert by_file(test) == expected and test.labels.dtype == np.int64
    assert test.classes.tolist() == sorted(numbers.values()) and test.unknown == unknown
    assert test.missing == tuple(classes[n] for n in range(len(classes)) if n not in numbers.values())


def test_images_of_unknown_classes_are_left_out(tmp_path):
    files = ["b/1.jpg", "x/1.jpg", "a/1.jpg", "c/1.jpg", "y/1.jpg", "c/2.jpg"]
    test = only(touch(tmp_path, *files), ("a", "b", "c"))
    assert by_file(test) == {"a/1.jpg": 0, "b/1.jpg": 1, "c/1.jpg": 2, "c/2.jpg": 2}
    assert test.source.labels.tolist() == test.labels.tolist()  # its own labels speak of training too
    assert test.source.classes == ("a", "b", "c")
    whole = only(touch(tmp_path / "whole", *(file for file in files if file[0] in "abc")), ("a", "b", "c"))
    assert whole.source.fingerprint() == test.source.fingerprint()


def test_missing_and_unknown_are_said_in_one_sentence(tmp_path):
    classes = ("a", "b", "c", "d", "e", "f")
    test = only(touch(tmp_path / "some", "b/1.jpg", "x/1.jpg"), classes)
    assert only(touch(tmp_path / "all", *(f"{name}/1.jpg" for name in classes)), classes).describe() == ""
    assert test.describe() == (
        "new: 5 of the 6 train classes have no image here (a, c, d, ...); "
        "class folders left out, since they are not train classes: 1 (x); classes in the accuracy: 1"
    )


def test_val_keeps_every_class_possible(tmp_path):
    """A class without val images does not change the official accuracy, but is reported."""
    touch(tmp_path, "train/a/1.jpg", "train/b/1.jpg", "train/c/1.jpg", "val/c/1.jpg", "val/b/1.jpg")
    train, val = open_labeled(str(tmp_path))
    test = as_test_set("val", val, train.classes)
    assert by_file(test) == {"b/1.jpg": 1, "c/1.jpg": 2}
    assert test.classes.tolist() == [0, 1, 2] and test.missing == ("a",) and test.source is val
    assert "val: 1 of the 3 train classes has no image here (a)" in test.describe()


def test_several_in_their_order(tmp_path):
    touch(tmp_path, "A/a/1.jpg", "B/b/1.jpg", "B/b/2.jpg")
    tests = open_test_sets([f"second={tmp_path}/B", f"first={tmp_path}/A"], ("a", "b"))
    assert [(test.name, len(test.source)) for test in tests] == [("second", 2), ("first", 1)]
    assert open_test_sets([], ("a", "b")) == []


@pytest.mark.parametrize(
    ("given", "kind", "expected"),
    [
        (["ROOT/good"], UserError, "has no name or no folder; expected NAME=DIR"),
        (["=ROOT/good"], UserError, "has no name or no folder"),
        (["val=ROOT/good"], UserError, "'val' is the name of the val images of data.path"),
        (["new=ROOT/good", "new=ROOT/other"], UserError, "the name 'new' is given twice"),
        (["new=ROOT/nowhere"], UserFileNotFoundError, "nowhere' does not exist"),
        (["new=ROOT/good/a/1.jpg"], UserFileNotFoundError, "1.jpg' is a file"),
        (["new=ROOT/empty"], UserFileNotFoundError, "no images found"),
        (["new=ROOT/flat"], UserError, "images are not in class folders; expected .*flat/<class>/<image>"),
        (["new=ROOT/above"], UserError, r"none of the 2 class folders \(one, two\) is a train class"),
        (["new=ROOT/numbers"], UserError, "numbered up to 2, but there are 2 train classes"),
        (["new=ROOT/twice"], UserError, "numbered up to 1, but there are 2 train classes"),
    ],
)
def test_mistakes(tmp_path, given, kind, expected):
    touch(tmp_path, "good/a/1.jpg", "other/a/1.jpg", "flat/1.jpg", "flat/a/1.jpg", "numbers/2/1.jpg")
    touch(tmp_path, "above/one/a/1.jpg", "above/two/a/1.jpg", "twice/01/1.jpg", "twice/1/1.jpg")
    (tmp_path / "empty").mkdir()
    with pytest.raises(kind, match=expected) as caught:
        open_test_sets([text.replace("ROOT", str(tmp_path)) for text in given], ("a", "b"))
    assert "\n" not in str(caught.value)


def test_shards_are_a_test_set_as_their_folder_is(tmp_path):
    images = touch(tmp_path / "images", "c/2.jpg", "c/1.jpg", "a/1.jpg", "x/1.jpg")
    shard(str(images), str(tmp_path / "shards"), num_workers=0)
    theirs, ours = only(images, ("c", "a", "b")), only(tmp_path / "shards", ("c", "a", "b"))
    assert isinstance(ours.source, ShardSource) and ours.source.classes == ("c", "a", "b")
    assert ours.labels.tolist() == theirs.labels.tolist() == [1, 0, 0]
    assert ours.source.fingerprint() == theirs.source.fingerprint()
    assert ours.describe() == theirs.describe() and ours.unknown == ("x",) and ours.missing == ("b",)
    flat = touch(tmp_path / "flat", "1.jpg")
    shard(str(flat), str(tmp_path / "unlabeled"), num_workers=0)
    with pytest.raises(UserError, match=r"test 'new=.*unlabeled': .* has a class; expected KEY\.cls"):
        only(tmp_path / "unlabeled")


def test_restricted_scores_predict_only_these_classes():
    scores = torch.tensor([[5.0, 1.0, 3.0, 2.0], [0.0, -4.0, 9.0, -3.0]])
    before = scores.clone()
    found = restrict(scores, np.array([1, 3]))
    assert found.argmax(1).tolist() == [3, 3]
    assert found.tolist() == [[-torch.inf, 1.0, -torch.inf, 2.0], [-torch.inf, -4.0, -torch.inf, -3.0]]
    assert torch.equal(scores, before)
    assert torch.equal(restrict(scores, np.arange(4)), scores)

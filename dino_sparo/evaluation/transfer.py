"""Further test sets for the same gallery or probe: folders whose classes are some of those of training.

Classes are matched by the name of their folder, in whatever order and however few: ImageNet-A and -R have
200 of ImageNet's, ImageNet-Sketch all. Folders named by whole numbers, as in ImageNet-V2, are numbers of the
classes of training in its order, unless training's own are numbers too.

A further test set is scored over its own classes: a prediction can be one of them only, as in the
evaluations of ImageNet-A and -R by their authors. The val folder is not: there every class of training
stays possible, also one without a val image, which is the official figure.

Axis letters: B test images, S classes of training.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dino_sparo.data.sources import AS_FOUND, ImageSource, open_labeled, open_part, unlabeled
from dino_sparo.data.split_names import same_name
from dino_sparo.data.splits import Choice, Part, find_test
from dino_sparo.errors import UserError, UserFileNotFoundError
from dino_sparo.parallel.distributed import first_rank_first

log = logging.getLogger("dino_sparo")

VAL = "val"
SHOWN_NAMES = 3
EXPECTED = (
    "expected NAME=DIR, DIR holding one folder of images for each class, or shards or parquet files of such"
)
EXPECTED_BOTH = "expected NAME=DIR, DIR holding train/<class>/... and val/<class>/..."


@dataclass(frozen=True)
class TestSet:
    """Test images whose classes training knows."""

    __test__ = False  # not a test, whatever pytest thinks of the name

    name: str
    """`val`, or the name that its results go by."""
    source: ImageSource
    """The images, those of unknown classes left out; its labels are numbers of training too."""
    labels: NDArray[np.int64]
    """Class number of training by image, (len(source),)."""
    classes: NDArray[np.int64]
    """Class numbers of training that a prediction can be, sorted: those here; for `val` all."""
    missing: tuple[str, ...]
    """Classes of training without an image here."""
    unknown: tuple[str, ...]
    """Class folders here that training has no class for; their images are left out."""

    def describe(self) -> str:
        """One sentence about missing and unknown classes; empty if there are none."""
        parts = []
        if self.missing:
            of_known = f"{len(self.missing)} of the {len(self.source.classes)} classes of training"
            verb = "has" if len(self.missing) == 1 else "have"
            parts.append(f"{of_known} {verb} no image here ({_some(self.missing)})")
        if self.unknown:
            told = f"{len(self.unknown)} ({_some(self.unknown)})"
            parts.append(f"class folders left out, unknown to training: {told}")
        parts += [f"classes in the accuracy: {len(self.classes)}"] if parts else []
        return f"{self.name}: {'; '.join(parts)}" if parts else ""


def open_train_and_tests(
    path: str, further: Sequence[str] = (), choice: Choice = AS_FOUND
) -> tuple[ImageSource, list[TestSet]]:
    """The train images of a labeled folder, and its test images with the `further` test sets, each NAME=DIR.

    Every process calls it. Raises UserError as `open_labeled` and `open_test_sets` do.
    """
    train, val = first_rank_first(lambda: open_labeled(path, choice=choice))
    others = first_rank_first(lambda: open_test_sets(further, train.classes, choice))
    return train, [*as_test_sets(val, train.classes), *others]


def as_test_sets(test: ImageSource | Sequence[TestSet], train_classes: Sequence[str]) -> Sequence[TestSet]:
    """Test sets as they are, or labeled images, whose classes are those of training, as `val`."""
    return test if isinstance(test, Sequence) else [as_test_set(VAL, test, train_classes)]


def open_test_sets(
    given: Sequence[str], train_classes: Sequence[str], choice: Choice = AS_FOUND
) -> list[TestSet]:
    """The test sets given as `NAME=DIR`, their labels as class numbers of training; of a choice what is about
    pixels.

    Raises:
        UserFileNotFoundError: no such folder, or no image in it.
        UserError: no name or `val`, a name given twice, images without class folders, or no class in common.
    """
    test_sets: dict[str, TestSet] = {}
    for text in given:
        name, folder = named_folder(text, "test", EXPECTED)
        if name in test_sets:
            raise UserError(f"test {text!r}: the name {name!r} is given twice; give each test set its own")
        test_sets[name] = _open_test_set(name, text, Path(folder).expanduser(), tuple(train_classes), choice)
    return list(test_sets.values())


def named_folder(text: str, key: str, expected: str) -> tuple[str, str]:
    """Name and folder of `NAME=DIR`, which was given as the option `key`.

    Raises:
        UserError: no name, no folder, or the name `val`.
    """
    name, equals, folder = text.partition("=")
    if not (name and equals and folder) or "/" in name or name in (".", ".."):
        raise UserError(f"{key} {text!r} has no name or no folder; {expected}")
    if name == VAL:
        raise UserError(
            f"{key} {text!r}: {VAL!r} is the name of data.path's own test images; give another name"
        )
    return name, folder


def as_test_set(name: str, source: ImageSource, train_classes: Sequence[str]) -> TestSet:
    """Images that are labeled by numbers of training already: the val folder. All classes stay possible."""
    labels = source.labels
    assert labels is not None and tuple(source.classes) == tuple(train_classes)
    here = np.bincount(labels, minlength=len(train_classes)) > 0
    missing = tuple(train_classes[number] for number in np.flatnonzero(~here).tolist())
    return TestSet(name, source, labels, np.arange(len(train_classes)), missing, unknown=())


def restrict(scores: Tensor, classes: NDArray[np.int64]) -> Tensor:
    """The scores (B, S) with -inf for every class but `classes`, which so can be no prediction."""
    possible = torch.from_numpy(classes).to(scores.device)
    return torch.full_like(scores, -torch.inf).index_copy(1, possible, scores[:, possible])


def _open_test_set(
    name: str, text: str, root: Path, train_classes: tuple[str, ...], choice: Choice
) -> TestSet:
    if not root.is_dir():
        problem = "is a file" if root.exists() else "does not exist"
        raise UserFileNotFoundError(f"test {text!r}: {str(root)!r} {problem}; {EXPECTED}")
    part = find_test(root, "test")
    source = open_part(part, "val", choice)
    if part != Part(root):
        log.info("test %s: %s images in %s classes (%s)", name, len(source), len(source.classes), part)
    labels, folders = source.labels, source.classes
    if labels is None:
        raise UserError(f"test {text!r}: {unlabeled(source)}")
    if all(map(_is_number, folders)) and not all(map(_is_number, train_classes)):
        to_train = np.array([int(folder) for folder in folders])
        if max(to_train) >= len(train_classes) or len(set(to_train)) < len(to_train):
            raise UserError(
                f"test {text!r}: class folders are numbered up to {max(to_train)}, but training has "
                f"{len(train_classes)} classes, so that numbers do not tell which is which; name the folders "
                f"as in training"
            )
    else:
        numbers = {same_name(one): number for number, one in enumerate(train_classes)}
        to_train = np.array([numbers.get(same_name(folder), -1) for folder in folders])
    if (to_train < 0).all():
        raise UserError(
            f"test {text!r}: none of the {len(folders)} class folders ({_some(folders)}) is a class of "
            f"training ({_some(train_classes)}); {EXPECTED}, named as in training"
        )
    kept = np.flatnonzero(to_train[labels] >= 0)
    source = replace(source, classes=train_classes, class_numbers=to_train[source.class_numbers])
    if len(kept) < len(source):
        source = source.subset(kept)
    unknown = tuple(folders[number] for number in np.flatnonzero(to_train < 0).tolist())
    here = np.unique(to_train[to_train >= 0])
    return replace(as_test_set(name, source, train_classes), classes=here, unknown=unknown)


def _is_number(name: str) -> bool:
    return name.isascii() and name.isdecimal()


def _some(names: Sequence[str]) -> str:
    """The first few names."""
    return ", ".join(names[:SHOWN_NAMES]) + (", ..." if len(names) > SHOWN_NAMES else "")


def balanced_fraction(source: ImageSource, fraction: float, seed: int) -> ImageSource:
    """A share of the images with the same number of every class, at least one, drawn by the seed.

    A class with fewer images gives all it has. A smaller fraction's images are among those of a larger one.
    """
    assert source.labels is not None
    each = max(1, round(fraction * len(source) / len(source.classes)))
    return source.subset(draw_by_class(source.labels, np.full(len(source.classes), each), seed))


def draw_by_class(labels: NDArray[np.int64], counts: NDArray[Any], seed: int) -> NDArray[np.int64]:
    """Numbers of images, sorted: of every class as many as `counts` (S,) has, or all, drawn by the seed."""
    drawn = np.random.Generator(np.random.Philox(key=[seed, 0])).permutation(len(labels))
    by_class = drawn[np.argsort(labels[drawn], kind="stable")]
    position = np.arange(len(labels)) - np.searchsorted(labels[by_class], labels[by_class])
    return np.sort(by_class[position < counts[labels[by_class]]])

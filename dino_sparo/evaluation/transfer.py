"""Other test sets for the same gallery or probe: folders whose classes are among the train classes.

Classes are matched by folder name, so a test set can have some of the classes, in any order: ImageNet-A and
-R have 200 of ImageNet's classes, ImageNet-Sketch has all. Folders named by integers, as in ImageNet-V2, are
numbers of train classes, unless the train classes are named by integers too.

Only the classes of the test set can be predicted, as in the evaluations of ImageNet-A and -R by their
authors. On val all train classes can be predicted, as in the official evaluation.

Axis letters: B test images, S train classes.
"""

import os
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
from dino_sparo.terminal import few, log

VAL = "val"
EXPECTED = "expected NAME=DIR, where DIR holds a folder of images for each class, or shards or parquet files"
EXPECTED_BOTH = "expected NAME=DIR, where DIR holds train/<class>/... and val/<class>/..."


@dataclass(frozen=True)
class TestSet:
    """Test images whose classes are train classes."""

    __test__ = False  # pytest would collect the class because of its name

    name: str
    """Its name in results; `val` for the val images of the dataset."""
    source: ImageSource
    """The images without those of unknown classes; its labels are numbers of train classes."""
    labels: NDArray[np.int64]
    """Train class number of each image, (len(source),)."""
    classes: NDArray[np.int64]
    """Sorted train class numbers that can be predicted: those with images here, for `val` all."""
    missing: tuple[str, ...]
    """Train classes without an image here."""
    unknown: tuple[str, ...]
    """Class folders that are not train classes; their images are left out."""

    def describe(self) -> str:
        """One sentence about missing and unknown classes; empty if there are none."""
        parts = []
        if self.missing:
            of_known = f"{len(self.missing)} of the {len(self.source.classes)} train classes"
            verb = "has" if len(self.missing) == 1 else "have"
            parts.append(f"{of_known} {verb} no image here ({few(self.missing)})")
        if self.unknown:
            found = f"{len(self.unknown)} ({few(self.unknown)})"
            parts.append(f"class folders left out, since they are not train classes: {found}")
        parts += [f"classes in the accuracy: {len(self.classes)}"] if parts else []
        return f"{self.name}: {'; '.join(parts)}" if parts else ""


def open_train_and_tests(
    path: str, further: Sequence[str] = (), choice: Choice = AS_FOUND
) -> tuple[ImageSource, list[TestSet]]:
    """The train images of a labeled dataset, and its test sets: `val` and `further`, each NAME=DIR.

    Every process calls it. Raises UserError as `open_labeled` and `open_test_sets` do.
    """
    train, val = first_rank_first(lambda: open_labeled(path, choice=choice))
    others = first_rank_first(lambda: open_test_sets(further, train.classes, choice))
    return train, [*as_test_sets(val, train.classes), *others]


def as_test_sets(test: ImageSource | Sequence[TestSet], train_classes: Sequence[str]) -> Sequence[TestSet]:
    """Test sets unchanged; labeled images, whose classes are the train classes, as the test set `val`."""
    return test if isinstance(test, Sequence) else [as_test_set(VAL, test, train_classes)]


def open_test_sets(
    given: Sequence[str], train_classes: Sequence[str], choice: Choice = AS_FOUND
) -> list[TestSet]:
    """Open test sets given as `NAME=DIR`; of `choice` only the settings about pixels apply.

    Raises:
        UserFileNotFoundError: a folder does not exist or has no images.
        UserError: a name is missing, `val`, or given twice, images have no class folders, or no class is a
            train class.
    """
    test_sets: dict[str, TestSet] = {}
    for text in given:
        name, folder = named_folder(text, "test", EXPECTED)
        if name in test_sets:
            raise UserError(f"test {text!r}: the name {name!r} is given twice; use a different one")
        test_sets[name] = _open_test_set(
            name, text, Path(os.path.expanduser(folder)), tuple(train_classes), choice
        )
    return list(test_sets.values())


def named_folder(text: str, key: str, expected: str) -> tuple[str, str]:
    """Name and folder of `NAME=DIR`, the value of the option `key`.

    Raises:
        UserError: the name or the folder is missing, or the name is `val`.
    """
    name, equals, folder = text.partition("=")
    if not (name and equals and folder) or "/" in name or name in (".", ".."):
        raise UserError(f"{key} {text!r} has no name or no folder; {expected}")
    if name == VAL:
        raise UserError(
            f"{key} {text!r}: {VAL!r} is the name of the val images of data.path; use another name"
        )
    return name, folder


def as_test_set(name: str, source: ImageSource, train_classes: Sequence[str]) -> TestSet:
    """Images labeled by train class number as a test set on which all train classes can be predicted."""
    labels = source.labels
    assert labels is not None and tuple(source.classes) == tuple(train_classes)
    here = np.bincount(labels, minlength=len(train_classes)) > 0
    missing = tuple(train_classes[number] for number in np.flatnonzero(~here).tolist())
    return TestSet(name, source, labels, np.arange(len(train_classes)), missing, unknown=())


def restrict(scores: Tensor, classes: NDArray[np.int64]) -> Tensor:
    """The scores (B, S) with -inf for every class that is not in `classes`."""
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
        log.info("test %s: %d images in %d classes (%s)", name, len(source), len(source.classes), part)
    labels, folders = source.labels, source.classes
    if labels is None:
        raise UserError(f"test {text!r}: {unlabeled(source)}")
    used = np.unique(labels).tolist()  # tables also name classes without images
    if all(_is_number(folders[one]) for one in used) and not all(map(_is_number, train_classes)):
        to_train, numbered = np.full(len(folders), -1), [int(folders[one]) for one in used]
        to_train[used] = numbered
        if max(numbered) >= len(train_classes) or len(set(numbered)) < len(numbered):
            raise UserError(
                f"test {text!r}: class folders are numbered up to {max(numbered)}, but there are "
                f"{len(train_classes)} train classes, so the numbers are not those of train classes; name "
                f"the folders as the train classes"
            )
    else:
        numbers = {same_name(one): number for number, one in enumerate(train_classes)}
        to_train = np.array([numbers.get(same_name(folder), -1) for folder in folders])
    if (to_train[used] < 0).all():
        raise UserError(
            f"test {text!r}: none of the {len(folders)} class folders ({few(folders)}) is a train class "
            f"({few(train_classes)}); {EXPECTED}, named as the train classes"
        )
    kept = np.flatnonzero(to_train[labels] >= 0)
    source = replace(source, classes=train_classes, class_numbers=to_train[source.class_numbers])
    if len(kept) < len(source):
        source = source.subset(kept)
    unknown = tuple(folders[number] for number in used if to_train[number] < 0)
    here = np.unique(to_train[labels[kept]])
    return replace(as_test_set(name, source, train_classes), classes=here, unknown=unknown)


def _is_number(name: str) -> bool:
    return name.isascii() and name.isdecimal()


def balanced_fraction(source: ImageSource, fraction: float, seed: int) -> ImageSource:
    """A random fraction of the images with the same number of each class, at least one.

    All images of a class are used if it has fewer. The images of a smaller fraction are a subset of those of
    a larger one with the same seed.
    """
    assert source.labels is not None
    each = max(1, round(fraction * len(source) / len(np.unique(source.labels))))
    return source.subset(draw_by_class(source.labels, np.full(len(source.classes), each), seed))


def draw_by_class(labels: NDArray[np.int64], counts: NDArray[Any], seed: int) -> NDArray[np.int64]:
    """Sorted numbers of images drawn at random: `counts` (S,) of each class, or all if it has fewer."""
    drawn = np.random.Generator(np.random.Philox(key=[seed, 0])).permutation(len(labels))
    by_class = drawn[np.argsort(labels[drawn], kind="stable")]
    position = np.arange(len(labels)) - np.searchsorted(labels[by_class], labels[by_class])
    return np.sort(by_class[position < counts[labels[by_class]]])

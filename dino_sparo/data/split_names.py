"""What the names of folders, shards, tables, and splits of the hub say: train, val, test, or nothing."""

import re
import unicodedata
from collections.abc import Iterable, Sequence
from typing import NamedTuple

# In any case. Of several words for one split the first that occurs counts.
WORDS = {
    "train": ("train", "training", "trainset", "trainval"),
    "val": ("val", "validation", "valid", "valset", "dev", "eval", "evaluation", "holdout"),
    "test": ("test", "testing", "testset"),
}
LISTED = {  # names that hold no word, or only one of a pair
    "data_256": "train", "data_large": "train",  # Places365
    "ilsvrc2012_img_train": "train", "ilsvrc2012_img_val": "val",
}  # fmt: skip
# Beside images: what is about them, not of them.
ABOUT_IMAGES = frozenset({
    "mask", "masks", "segmentation", "segmentations", "segmentationclass", "segmentationobject", "trimap",
    "trimaps", "annotation", "annotations", "label", "labels", "gt", "groundtruth", "meta", "metadata",
    "thumbnail", "thumbnails", "thumbs", "macosx",
})  # fmt: skip
WRAPPERS = frozenset(
    {"images", "image", "imgs", "img", "jpegimages", "data", "dataset", "photos", "pictures"}
)
NUMBERED = re.compile(r"[-_.]?\d")


class Meaning(NamedTuple):
    """What a name says."""

    split: str
    word: str
    rest: tuple[str, ...]
    """The other words of the name, without digits."""


def words(name: str) -> tuple[str, ...]:
    """The words of a name in lower case, without digits: `imagenet1k-trainA` gives imagenet, k, train, a."""
    found = re.findall(r"[^\W\d_]+", re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name))
    return tuple(re.sub(r"\btrain val\b", "trainval", " ".join(found).lower()).split())


def meaning(name: str) -> Meaning | None:
    """The one split that a name holds a word of; None if there is no such word, or several."""
    if name.lower() in LISTED:
        return Meaning(LISTED[name.lower()], name.lower(), ())
    split_of = {word: split for split, known in WORDS.items() for word in known}
    all_words = words(name)
    found = [word for word in all_words if word in split_of]
    if len(found) != 1:
        return None
    return Meaning(split_of[found[0]], found[0], tuple(word for word in all_words if word != found[0]))


def splits_of_folders(names: Iterable[str]) -> dict[str, list[str]]:
    """Sibling folders, or splits of a set, by split.

    A name counts if nothing but digits stands beside the word, or if that of another split has the same rest
    (`train.X1`, `train.X2`, `val.X`); `bullet_train` beside `test_tube` does not.
    """
    known = {name: found for name in sorted(names) if (found := meaning(name))}
    splits_by_rest: dict[tuple[str, ...], set[str]] = {}
    for one in known.values():
        splits_by_rest.setdefault(one.rest, set()).add(one.split)
    rests = [rest for rest, splits in splits_by_rest.items() if len(splits) > 1 and not is_about_images(rest)]
    plain = [rest for rest in rests if not rest or WRAPPERS.issuperset(rest)]
    counted = {(), *(plain or rests)} if "train" not in splits_by_rest.get((), ()) else {()}
    return _by_split({name: one for name, one in known.items() if one.rest in counted})


def splits_of_files(names: Sequence[str]) -> dict[str, list[str]]:
    """Shards or tables of one folder by split.

    Words count if each name holds one, else where a name begins with one and a number: `train-00000`.
    """
    known = {name: found for name in names if (found := meaning(name.rpartition(".")[0].rpartition("/")[2]))}
    if len(known) < len(names):
        known = {
            name: one
            for name, one in known.items()
            if name.lower().startswith(one.word) and NUMBERED.match(name[len(one.word) :])
        }
    return _by_split(known)


def _by_split(known: dict[str, Meaning]) -> dict[str, list[str]]:
    """Names of each split, by the first of its words that occurs."""
    found = {}
    for split, ordered in WORDS.items():
        here = {name: one.word for name, one in known.items() if one.split == split}
        if here:
            first = next((word for word in ordered if word in here.values()), min(here.values()))
            found[split] = [name for name, word in here.items() if word == first]
    return found


def is_about_images(name_words: Iterable[str]) -> bool:
    """Whether words of a name say that a folder holds masks, annotations, and the like."""
    return not ABOUT_IMAGES.isdisjoint(name_words)


def same_name(name: str) -> str:
    """The form of a class name in which names that print alike are equal."""
    return unicodedata.normalize("NFC", name)

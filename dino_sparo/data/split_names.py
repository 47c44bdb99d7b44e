"""Infer train, val, and test from the names of folders, shards, tables, and hub splits."""

import re
import unicodedata
from collections.abc import Collection, Iterable, Sequence
from functools import lru_cache
from itertools import chain
from typing import NamedTuple

# Upper and lower case are the same. If several words for a split occur, the first one in this list counts.
WORDS = {
    "train": ("train", "training", "trainset", "trainval", "trn"),
    "val": ("val", "validation", "valid", "valset", "dev", "eval", "evaluation", "holdout"),
    "test": ("test", "testing", "testset", "tst"),
}
SPLIT_OF = {word: split for split, known in WORDS.items() for word in known}
LISTED = {  # names without a word of `WORDS`, or whose other split has another form
    "data_256": "train", "data_large": "train", "val_large": "val", "test_large": "test",  # Places365
    "ilsvrc2012_img_train": "train", "ilsvrc2012_img_val": "val",
}  # fmt: skip
# Names of folders that describe the images beside them, such as masks and annotations.
ABOUT_IMAGES = frozenset({
    "mask", "masks", "segmentation", "segmentations", "segmentationclass", "segmentationobject", "trimap",
    "trimaps", "annotation", "annotations", "label", "labels", "gt", "groundtruth", "meta", "metadata",
    "thumbnail", "thumbnails", "thumbs", "macosx",
})  # fmt: skip
MASK = re.compile(rb"_(?:masks?|seg|segmentation|gt|label|thumb)\.", re.IGNORECASE)  # in the name of an image
FIRST_NAMES = 12  # images of a folder that are checked for masks
WRAPPERS = frozenset(
    {"images", "image", "imgs", "img", "jpegimages", "data", "dataset", "photos", "pictures"}
)
MORE_IMAGES = frozenset(
    {"extra", "unlabeled", "unlabelled", "unsupervised"}
)  # beside splits, these are no classes
JOINED = re.compile(rf"\b({'|'.join(SPLIT_OF)})({'|'.join(sorted(WRAPPERS))}|dir|folder)\b")


class Meaning(NamedTuple):
    """The split that a word of a name stands for."""

    split: str
    word: str
    rest: tuple[str, ...]
    """The other words of the name, without digits."""


@lru_cache(2**13)  # each command asks several times for each class folder
def words(name: str) -> tuple[str, ...]:
    """The words of a name in lower case, without digits: `imagenet1k-trainA` gives imagenet, k, train, a;
    `trainimages` gives train, images."""
    found = re.findall(r"[^\W\d_]+", re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name))
    text = JOINED.sub(r"\1 \2", " ".join(found).lower())
    return tuple(re.sub(r"\btrain val\b", "trainval", text).split())


def meanings(name: str, ignored: Collection[str] = ()) -> list[Meaning]:
    """The meaning of each word for a split in a name, except ignored words."""
    if name.lower() in LISTED:
        return [Meaning(LISTED[name.lower()], name.lower(), ())]
    said = [word for word in words(name) if word not in ignored]
    return [
        Meaning(SPLIT_OF[word], word, (*said[:place], *said[place + 1 :]))
        for place, word in enumerate(said)
        if word in SPLIT_OF
    ]


def splits_of_folders(names: Iterable[str]) -> dict[str, list[str]]:
    """Group sibling folders, or the splits of a dataset, by split.

    A name counts if it has only digits besides the word, or if a name of another split has the same other
    words (`train.X1`, `train.X2`, `val.X`; `dev_train`, `dev_val`). `bullet_train` beside `test_tube` does
    not count.
    """
    known = {name: found for name in sorted(names) if (found := meanings(name))}
    splits_by_rest: dict[tuple[str, ...], set[str]] = {}
    for one in chain.from_iterable(known.values()):
        splits_by_rest.setdefault(one.rest, set()).add(one.split)
    rests = [rest for rest, splits in splits_by_rest.items() if len(splits) > 1 and not is_about_images(rest)]
    plain = [rest for rest in rests if not rest or WRAPPERS.issuperset(rest)]
    counted = {(), *(plain or rests)} if "train" not in splits_by_rest.get((), ()) else {()}
    taken = {name: [one for one in found if one.rest in counted] for name, found in known.items()}
    return _by_split({name: found[0] for name, found in taken.items() if len(found) == 1})


def splits_of_files(names: Sequence[str]) -> dict[str, list[str]]:
    """Group the shards or tables of one folder by split.

    Words that all names contain are ignored. If every name contains exactly one other word, these words
    count. Otherwise a name counts only if it begins with a word and a number: `train-00000`.
    """
    stems = [name.rpartition(".")[0].rpartition("/")[2] for name in names]
    of_all = set(words(stems[0])).intersection(*map(words, stems)) if len(stems) > 1 else set()
    for ignored in (of_all, ()):
        found = [meanings(stem, ignored) for stem in stems]
        if all(len(one) == 1 for one in found):
            return _by_split({name: one for name, (one,) in zip(names, found, strict=True)})
    return _by_split(
        {
            name: one[0]
            for name, stem, one in zip(names, stems, found, strict=True)
            if len(one) == 1 and re.match(rf"{one[0].word}[-_.]?\d", stem, re.IGNORECASE)
        }
    )


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
    """Whether a name with these words belongs to masks, annotations, thumbnails, or the like."""
    return not ABOUT_IMAGES.isdisjoint(name_words)


def about_images(folder: str, names: bytes = b"") -> str:
    """A folder whose name belongs to masks, thumbnails, or the like, or its first image with such a name.

    Args:
        folder: path of the folder.
        names: paths of its images, joined by NUL.

    Returns:
        The path of the folder or the image; empty if no name is of this kind.
    """
    if is_about_images(word for part in folder.split("/") for word in words(part)):
        return folder
    first = names.split(b"\0", FIRST_NAMES)[:FIRST_NAMES]
    mask = next(filter(MASK.search, first), None)
    if mask is None:
        return ""
    name = mask.rpartition(b"/")[2].decode("utf-8", "surrogateescape")
    return f"{folder}/{name}" if folder else name


def same_name(name: str) -> str:
    """A class name in Unicode normalization form C, in which names that print alike are equal."""
    return unicodedata.normalize("NFC", name)

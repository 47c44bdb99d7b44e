"""Decide by names which images of a folder are train, which are val, and which are left out."""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from fnmatch import fnmatch
from itertools import filterfalse, islice
from pathlib import Path
from typing import Any, NamedTuple

from dino_sparo.data.shards import PACKED, holds_shards, is_shard, list_shards
from dino_sparo.data.split_names import (
    MORE_IMAGES,
    SPLIT_OF,
    WRAPPERS,
    is_about_images,
    meanings,
    splits_of_files,
    splits_of_folders,
    words,
)
from dino_sparo.data.tables import holds_tables, is_parquet, list_parquet
from dino_sparo.data.walk import PROBED_ENTRIES, found_below, holds, is_image, list_folder
from dino_sparo.errors import UserError, UserFileNotFoundError
from dino_sparo.terminal import counted, sentence, shown

TOP_ENTRIES = 4096  # of a folder that are listed; datasets have fewer folders beside their splits
WRAPPED = 4  # levels of folders above the splits, as in ILSVRC/Data/CLS-LOC/train
COUNTED = 10_000  # entries that are counted in a folder that is left out
SHOWN = 3
IMAGES_PER_FILE, SEEN = 100, 400  # least images in a tar or table; most images that are searched for
PACKED_ENDINGS = (".tar", ".parquet", ".arrow")  # of files that contain images
ARCHIVES = (*PACKED, ".tar", ".zip", ".rar", ".7z", ".parquet")
KINDS: dict[Callable[[str], bool], str] = {is_image: "image", is_shard: "tar", is_parquet: "parquet file"}


class Part(NamedTuple):
    """Images of a split: all of a folder, or those of some folders, shards, or tables in it."""

    folder: Path
    names: tuple[str, ...] = ()

    def __str__(self) -> str:
        if len(self.names) > 1:
            return f"{sentence(self.folder)}: {shown(self.names[0])} … {shown(self.names[-1])}"
        return sentence(self.folder.joinpath(*self.names))


class Splits(NamedTuple):
    """The splits of a folder."""

    train: Part
    val: Part | None = None
    test: Part | None = None
    """Used as val if there is no val and the classes of this split are known."""
    notes: tuple[str, ...] = ()
    """Messages about splits that are not used, and about what is left out."""


class Choice(NamedTuple):
    """Options of the user about images; they override what is inferred."""

    train: str | None = None
    val: str | None = None
    label_column: str | None = None
    max_pixels: int | None = None
    value_range: tuple[float, float] | None = None

    @classmethod
    def of(cls, section: Any) -> "Choice":
        """Take these fields from a section of options that has some of them."""
        return cls(*(getattr(section, name, None) for name in cls._fields))

    @property
    def of_pixels(self) -> "Choice":
        """The part that also applies to images of other folders."""
        return Choice(max_pixels=self.max_pixels, value_range=self.value_range)


def find_splits(root: Path, key: str = "data.path", choice: Choice = Choice()) -> Splits:  # noqa: B008
    """The splits of an existing folder, inferred from some of its entries.

    Args:
        key: the option that an error names.
        choice: folders or patterns that override the inferred train and val.

    Raises:
        UserError: there is val, but no train; shards or tables are beside few images; a folder is unreadable.
        UserFileNotFoundError: nothing matches the choice.
    """
    if choice.train is not None:
        train = _chosen(root, choice.train, "data.train")
        found = Splits(train)
    else:
        found = _found(root, key)
    if choice.val is not None:
        return found._replace(val=_chosen(root, choice.val, "data.val"), test=None)
    return found


def find_test(root: Path, key: str) -> Part:
    """The test images of an existing folder: its val, else its test, else its train, else all images.

    Raises:
        UserError: as `find_splits`, but for a folder without train.
    """
    found = _found(root, key, needs_train=False)
    return found.val or found.test or found.train


def most_beside(packed: int) -> int:
    """The largest number of images beside tars or tables for which it is unclear which of them are meant."""
    return packed if packed < 2 else IMAGES_PER_FILE * packed


def side_by_side(root: Path, packed: int, one: str, image: str, key: str = "data.train") -> UserError:
    """The error about tars or tables beside so few images that it is unclear which are meant."""
    return UserError(
        f"{root} contains {counted(packed, 'file')} of images ({one}) beside images ({image}); choose one of "
        f"the two kinds with {key} ('*.tar', a folder, or '.' for the images), or move the others away"
    )


def probably_meant(root: Path, levels: int = WRAPPED) -> str:
    """Text that names a folder with several classes below a folder with one class; empty if there is none."""
    for name in sorted(list_folder(root, TOP_ENTRIES)[0])[:PROBED_ENTRIES] if levels else ():
        if len(_full(root / name, sorted(list_folder(root / name, TOP_ENTRIES)[0]), 2)) > 1:
            return f", as {root / name} has"
        if found := probably_meant(root / name, levels - 1):
            return found
    return ""


def _chosen(root: Path, text: str, key: str) -> Part:
    """The images of a path, which may be relative to `root`, or of a pattern of names in `root`."""
    for folder in (root / text, Path(os.path.expanduser(text))):
        if folder.is_dir():
            return Part(Path(os.path.normpath(folder)))
    folders, files = list_folder(root)
    kinds = (folders, filter(is_shard, files), filter(is_parquet, files))
    fitting = [names for kind in kinds if (names := sorted(name for name in kind if fnmatch(name, text)))]
    if not fitting:
        raise UserFileNotFoundError(
            f"{key} {text!r} is not a folder, and no folder, shard, or parquet file in {root} matches it; "
            f"expected a folder, or a pattern of their names such as 'train-*.tar'"
        )
    if len(fitting) > 1:
        raise UserError(
            f"{key} {text!r} matches {fitting[0][0]} and {fitting[1][0]} in {root}; expected only folders, "
            f"only shards, or only parquet files"
        )
    return _part(root, fitting[0])


def _found(root: Path, key: str, *, needs_train: bool = True) -> Splits:
    notes: list[str] = []
    for _ in range(WRAPPED):
        folders, files = list_folder(root, TOP_ENTRIES)
        # In a flat folder with more images than are listed, splits are found by their plain names.
        folders = sorted({*folders, *(name for name in ("train", "val", "test") if (root / name).is_dir())})
        by_file = _by_file(root, folders, files, needs_train) if any(map(_is_data, files)) else None
        if by_file is None:
            _refuse_few_beside(root, files)
        by_name = by_file or _by_folder(root, folders, files, key, needs_train)
        splits = by_name or _by_file(root, folders, files, needs_train)
        inner, beside = (None, []) if splits or any(map(is_image, files)) else _wrapped(root, folders)
        if splits or inner is None:
            notes += splits.notes if splits else _taken(root, folders)
            tables = [] if splits else [name for name in _full(root, folders, 2) if holds_tables(root / name)]
            if len(tables) > 1:
                raise UserError(
                    f"{root}: {tables[0]} and {tables[1]} both contain parquet files, like "
                    f"configurations of a dataset; give one of them as {key}"
                )
            return (splits or Splits(Part(root)))._replace(notes=tuple(notes))
        notes += _left_out(root, beside)
        root = root / inner
    return Splits(Part(root), notes=tuple(notes))


def _refuse_few_beside(root: Path, files: Sequence[str]) -> None:
    """Raises UserError: shards or tables are in a folder that has few images in or below it."""
    if packed := sorted(filter(_is_packed, files)):
        most = min(SEEN, most_beside(len(packed)))
        some = list(islice(found_below(root, levels=WRAPPED), most + 1))
        if 0 < len(some) <= most:
            raise side_by_side(root, len(packed), packed[0], some[0])


def _by_file(root: Path, folders: Sequence[str], files: Sequence[str], needs_train: bool) -> Splits | None:
    """Splits of a folder of shards or parquet files; None for another folder."""
    beside: tuple[str, ...] = ()
    if holds_tables(root):
        names = list_parquet(root)
        looks = list(filter(meanings, folders))
        beside = (
            *listed("looks like a split, not used", _full(root, looks)),
            *_left_out(root, [name for name in folders if name not in looks]),
            *(_loose(root, files, is_image, is_shard) if names else ()),
        )
    elif holds_shards(root):
        names = list_shards(root)
    else:
        return None
    found = splits_of_files(names)
    if "train" not in found:
        if needs_train and found and is_parquet(names[0]):
            raise UserFileNotFoundError(
                f"{root} contains parquet files, but none of train; expected train-*.parquet; download these "
                f"too, or choose the training files with data.train"
            )
        return Splits(Part(root), notes=(*listed("taken as train", list(filter(meanings, names))), *beside))
    used = _used(found)
    rest = [name for name in names if name not in used]
    notes = listed("looks like a split, not used", list(filter(meanings, rest)))
    notes += listed("left out", [name for name in rest if not meanings(name)])
    return Splits(**{split: _part(root, here) for split, here in found.items()}, notes=notes + beside)


def _by_folder(
    root: Path, folders: Sequence[str], files: Sequence[str], key: str, needs_train: bool
) -> Splits | None:
    """Splits that are subfolders; None if there are none."""
    named = splits_of_folders(folders)
    full = {split: here for split, names in named.items() if (here := _full(root, names))}
    of_splits = {name for names in named.values() for name in names}
    others = [name for name in folders if name not in of_splits]
    train, held_out = full.get("train"), full.get("val") or full.get("test")
    of_plain_names = "val" not in full and all(name.lower() in SPLIT_OF for name in train or ())
    if (of_plain_names or not held_out) and (train or (named.get("train") and not held_out)):
        # A class may be named train: it contains images directly, and there are other classes beside it.
        has_classes = any(_holds_classes(root / name) for name in train or ())
        if not has_classes and _full(root, filterfalse(_is_beside, others), 1):
            return None
        train = train or named["train"]
    if train:
        used = _used({"train": train} | full)
        looks = [name for name in folders if name not in used and meanings(name)]
        packed_up = [name for name in sorted(files) if name.lower().endswith(ARCHIVES) and meanings(name)]
        notes = listed("looks like a split, not used", [*_full(root, looks), *packed_up])
        notes += _left_out(root, [name for name in others if not meanings(name)])
        others = [name for name in files if name not in packed_up]
        notes += _loose(root, others, is_image, is_shard, is_parquet)
        parts = {split: _part(root, here) for split, here in (full | {"train": train}).items()}
        return Splits(**parts, notes=notes)
    has_classes = any(_holds_classes(root / name) for name in held_out or ())
    if held_out and has_classes and not needs_train:
        return Splits(_part(root, held_out))
    if held_out and needs_train and ("val" in named or (has_classes and _full(root, others, 1))):
        raise UserError(
            f"{key} {str(root)!r} has a {held_out[0]} folder, but no train folder; expected "
            f"train/<class>/<image>; move the training images to {root / 'train'}, or choose them by "
            f"data.train"
        )
    return None


def _used(splits: dict[str, list[str]]) -> set[str]:
    """The names of train and of val, or of test if there is no val."""
    return {*splits.get("train", []), *(splits.get("val") or splits.get("test", []))}


def _part(root: Path, names: Sequence[str]) -> Part:
    """The folders, shards, or tables of a split. Folders of shards or tables are replaced by their files."""
    if len(names) == 1 and (root / names[0]).is_dir():
        folder = root / names[0]  # archives give train/train/<class> and train/images/<class>
        inner = _wrapped(folder, list_folder(folder, PROBED_ENTRIES)[0])[0]
        is_wrapper = inner and (inner == names[0] or WRAPPERS.issuperset(words(inner)))
        return Part(folder / inner if inner and is_wrapper else folder)
    folders = () if is_shard(names[0]) or is_parquet(names[0]) else names
    for holds_such, listed in ((holds_shards, list_shards), (holds_tables, list_parquet)):
        below = [f"{one}/{file}" for one in folders if holds_such(root / one) for file in listed(root / one)]
        if below:
            return Part(root, tuple(below))
    return Part(root, tuple(names))


def _wrapped(root: Path, folders: Sequence[str], levels: int = WRAPPED) -> tuple[str | None, list[str]]:
    """The subfolder that contains all classes or splits, if there is one, and the folders beside it."""
    about = [name for name in folders if is_about_images(words(name))]
    full = _full(root, [name for name in folders if name not in about], 2)
    if not full:
        return None, []
    inner = root / full[0]
    if len(full) > 1:
        if all(_holds_splits(root / name) for name in full):
            raise UserError(
                f"{root}: {full[0]} and {full[1]} both contain folders of train and val; give one of them as "
                f"data.path, or use all with data.train '.'"
            )
        return None, []
    if about := _full(root, about):
        is_wrapper = WRAPPERS.issuperset(words(full[0])) or _holds_splits(inner)
        return (full[0] if is_wrapper else None), about
    return (full[0] if _holds_several(inner, levels) else None), []


def _holds_several(folder: Path, levels: int) -> bool:
    """Whether a folder contains shards, tables, splits, or several classes, possibly one level deeper."""
    below, files = list_folder(folder, PROBED_ENTRIES)
    if any(map(is_image, files)):
        return False
    if holds_tables(folder) or holds_shards(folder):
        return True
    full = _full(folder, sorted(below), 2)
    is_wrapper = len(full) > 1 or bool(splits_of_folders(full))
    return is_wrapper or (levels > 0 and _wrapped(folder, sorted(below), levels - 1)[0] is not None)


def _holds_splits(folder: Path) -> bool:
    """Whether a folder contains a folder of train and one of val or test."""
    found = splits_of_folders(list_folder(folder, TOP_ENTRIES)[0])
    return "train" in found and len(found) > 1


# --- Content of folders, and what is left out


def _is_packed(name: str) -> bool:
    return is_shard(name) or is_parquet(name)


def _is_data(name: str) -> bool:
    return is_image(name) or name.endswith(PACKED_ENDINGS)


def _is_beside(name: str) -> bool:
    """Whether a folder with this name is no class, but contains masks, unlabeled images, or the like."""
    return is_about_images(words(name)) or not MORE_IMAGES.isdisjoint(words(name))


def _may_be_class(name: str) -> bool:
    return not (meanings(name) or _is_beside(name))


def _full(root: Path, names: Iterable[str], limit: int | None = None) -> list[str]:
    """Those of the first folders that contain images, tars, or tables; at most `limit`."""
    probed = islice(names, PROBED_ENTRIES)
    return list(islice((name for name in probed if holds(root / name, _is_data, WRAPPED)), limit))


def _holds_classes(folder: Path) -> bool:
    """Whether a folder contains folders of images, except wrappers such as `images`."""
    below = [name for name in list_folder(folder, TOP_ENTRIES)[0] if not WRAPPERS.issuperset(words(name))]
    return bool(_full(folder, sorted(below), 1))


def _taken(root: Path, folders: Sequence[str]) -> tuple[str, ...]:
    """Messages about folders that are used as classes, but may have another meaning."""
    looks = [name for name in folders if not (_may_be_class(name) or is_about_images(words(name)))]
    notes = listed("taken as classes", _full(root, looks))
    if len(first := list(filter(_may_be_class, folders))[:2]) > 1:
        one, other = (list_folder(root / name, TOP_ENTRIES)[0] for name in first)
        same = sorted(set(filter(_may_be_class, one)).intersection(other) - WRAPPERS)
        what = " and ".join(map(shown, first)) + ", taken as classes, contain folders of the same names"
        if len(same) > 1 and holds(root / first[0] / same[0], _is_data):
            notes += listed(what, same)
    return notes


def _left_out(root: Path, folders: Sequence[str]) -> tuple[str, ...]:
    """A message about folders beside the images that are left out, with numbers of images."""
    full = _full(root, folders)
    return listed("left out", [f"{name} ({_count(root / name)})" for name in full[:SHOWN]] + full[SHOWN:])


def _loose(root: Path, files: Sequence[str], *kinds: Callable[[str], bool]) -> tuple[str, ...]:
    """A message about files of these kinds in a folder itself, which are left out."""
    numbers = {KINDS[kind]: sum(map(kind, files)) for kind in kinds}
    found = ", ".join(counted(number, what) for what, number in numbers.items() if number)
    return (f"left out: {found} in {root} itself",) if found else ()


def listed(what: str, names: Sequence[str]) -> tuple[str, ...]:
    """A message with the first of some names; nothing if there are none."""
    more = f", and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return (f"{what}: {', '.join(map(shown, names[:SHOWN]))}{more}",) if names else ()


def _count(folder: Path) -> str:
    """The number of images in a folder and below, up to a limit, as text."""

    def files(folder: Path) -> Iterator[str]:
        below, names = list_folder(folder, COUNTED)
        yield from names
        for name in below:
            yield from files(folder / name)

    some = list(islice(files(folder), COUNTED))
    images, packed = (sum(map(kind, some)) for kind in (is_image, _is_data))
    found = counted(images, "image") if images else counted(packed, "file") + " of images"
    return f"{found}{' or more' * (len(some) == COUNTED)}"

"""`dino-sparo prepare`: train/<class> and val/<class> from the usual layouts of ImageNet."""

import hashlib
import json
import os
import shlex
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from tqdm import tqdm

from dino_sparo.data.imagenet import (
    DEVKIT,
    LAYOUTS,
    SOLUTION,
    WNID_TAR,
    Images,
    Layout,
    explain,
    image_classes,
    recognize,
)
from dino_sparo.data.tars import TarFile, damage_named, tar_files
from dino_sparo.data.walk import is_image, walk
from dino_sparo.errors import UserError, UserFileNotFoundError
from dino_sparo.files import alone_in, atomic_write, parsed_json
from dino_sparo.terminal import few, log, shows_bars

SPLITS = ("train", "val")
RECORD = ".prepared.json"  # hidden, like unfinished folders and files, so that loaders ignore it
UNFINISHED_FILE = ".part"


@dataclass(frozen=True)
class Split:
    """How to make a split: by a link to its folder, or as class folders from entries."""

    name: str
    images: Images
    made_of: str = ""
    """Target of the links, or modification times of the tars: a tar that was damaged and then replaced can
    have left wrong images of the right size."""
    entries: dict[str, int] = field(default_factory=dict)
    """Sizes in bytes by `class/file_name`, or by class for class tars; empty if the split is one link."""

    @property
    def by_label(self) -> bool:
        """Whether labels give the class of each image."""
        return any("/" in entry for entry in self.entries)

    @property
    def class_names(self) -> set[str]:
        return {entry.partition("/")[0] for entry in self.entries}

    @property
    def digest(self) -> str:
        """SHA-256 that identifies the content of the split."""
        lines = [self.made_of, *(f"{entry} {size}" for entry, size in self.entries.items())]
        return hashlib.sha256("\n".join(lines).encode("utf-8", "surrogateescape")).hexdigest()


def prepare(source: str, out: str, labels: str | None = None) -> str:
    """Make out/train/<class> and out/val/<class> from any recognized layout.

    Image files are linked, tars are unpacked. A split gets its final name when it is complete; the same call
    resumes an interrupted one, and does nothing if everything is done. `source` is not changed.

    Args:
        source: folder of the images or tars, see `dino_sparo.data.imagenet.recognize`.
        out: folder for the two splits; created if it does not exist.
        labels: file with the classes of images without class folders, see
            `dino_sparo.data.imagenet.image_classes`. None: a file near the validation images.

    Returns:
        Text about the splits, the differences of their classes, and the next command.

    Raises:
        UserError: no layout is recognized, labels and images do not fit, `out` holds something else, or a tar
            is damaged.
        OSError: `out` cannot be written.
    """
    folder = Path(out)
    layout = recognize(Path(source))
    if layout is None:
        raise UserFileNotFoundError(
            f"{source}: no images recognized; expected a folder with one of: {LAYOUTS}"
        )
    log.info("%s: %s%s", source, layout.name, "" if explain(layout) else "; usable without `prepare`")
    check_out(folder, [one.path for one in (layout.train, layout.val) if one], SPLITS.__contains__)
    splits = _plan(layout, folder, labels)
    folder.mkdir(parents=True, exist_ok=True)
    in_place = folder.samefile(source)  # nothing is written then
    with nullcontext() if in_place else alone_in(folder, wait=False):
        counts = {split.name: _make(split, folder) for split in splits}
    others = [name for name in SPLITS if name not in counts and (folder / name).is_dir()]
    return _summary(folder, counts | {name: _count(folder / name) for name in others})


def check_out(out: Path, images: Iterable[Path], is_ours: Callable[[str], bool]) -> None:
    """Raises UserError if `out` is a file, is in a folder of images, or holds names that are not `is_ours`.

    Hidden names are ignored.
    """
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {str(out)!r} is a file; give a folder")
    for folder in images:
        if out.resolve().is_relative_to(folder.resolve()):
            raise UserError(f"--out {str(out)!r} is in the folder of images {folder}; choose another --out")
    there = sorted(os.listdir(out)) if out.is_dir() else []
    foreign = [name for name in there if not name.startswith(".") and not is_ours(name)]
    if foreign:
        raise UserError(f"--out {str(out)!r} holds other files ({foreign[0]}); choose another --out")


def _summary(out: Path, counts: dict[str, Counter[str]]) -> str:
    lines = [
        f"{out / split}: {images.total()} images, {len(images.keys() - {''})} classes"
        for split, images in counts.items()
    ]
    for here, other in (SPLITS, SPLITS[::-1]) if len(counts) == len(SPLITS) else ():
        if missing := sorted(counts[here].keys() - counts[other].keys()):
            listed = few(missing)
            lines.append(f"classes of {here} that are not in {other}: {len(missing)} ({listed})")
    path = shlex.quote(str(out))
    if "train" not in counts:
        next_step = f"prepare DIR --out {path}, where DIR holds the train images"
    else:
        next_step = f"pretrain --config imagenet_vits16_sparo --data.path {path} --run_dir runs/sparo"
    return "\n".join([*lines, f"next: dino-sparo {next_step}"])


# --- Planning


def _plan(layout: Layout, out: Path, labels: str | None) -> list[Split]:
    """The splits to make, val first, since it is fast. Checks everything that can be checked beforehand."""
    labeled = "val" if layout.val else "train"  # the split that the labels belong to
    found = layout.labels if labels is None else Path(labels)
    splits = [
        _plan_split(name, images, out, found if name == labeled else None)
        for name, images in (("val", layout.val), ("train", layout.train))
        if images
    ]
    if labels is not None and not any(split.by_label for split in splits):
        raise UserError(f"--labels {labels!r} is not used: {layout.root} has {layout.name}; leave it out")
    if layout.train and layout.val and splits[0].by_label:
        named = splits[0].class_names
        form, path = layout.train.form, layout.train.path
        known = set(os.listdir(path)) if form == "class folders" else splits[1].class_names
        if known and not named & known:
            raise UserError(
                f"labels {found}: its classes ({min(named)}, ...) are not those of {path} ({min(known)}, "
                f"...); give --labels a file with the same class names"
            )
    return splits


def _plan_split(name: str, images: Images, out: Path, labels: Path | None) -> Split:
    """List what a split will hold."""
    path = images.path
    if images.form == "class tars" or (images.form == "the official tar" and name == "train"):
        entries = {wnid: size for wnid, size, _ in class_tars(images)}
        if not entries:
            raise UserError(f"{path} holds no class tars (n01440764.tar ...); download it again")
        return Split(name, images, _last_changes(images), entries)
    if images.form == "class folders" or (labels is None and name == "train"):
        return Split(name, images)
    if labels is None:
        raise UserError(
            f"{path}: the classes of these validation images are unknown; set --labels to Kaggle's "
            f"{SOLUTION}, the devkit {DEVKIT}.tar.gz, or a file with lines `file_name class`"
        )
    if images.form == "the official tar":
        with open(path, "rb") as file:
            sizes = {image: size for image, size, _ in tar_files(file, path) if is_image(image)}
        made_of = _last_changes(images)
    else:
        sizes = dict.fromkeys(sorted(filter(is_image, os.listdir(path))), 0)
        made_of = _link_target(path, out, below=2)
    if not sizes:
        raise UserError(f"{path} holds no images; download it again")
    classes = image_classes(sizes, path, labels)
    entries = {f"{classes[image]}/{image}": size for image, size in sizes.items()}
    return Split(name, images, made_of, entries)


def _last_changes(images: Images) -> str:
    tars = [images.path] if images.form == "the official tar" else sorted(images.path.glob("*.tar"))
    return " ".join(str(tar.stat().st_mtime_ns) for tar in tars)


def _link_target(path: Path, out: Path, below: int) -> str:
    """The target for a link to `path` that is `below` folders below `out`: relative if they are neighbors."""
    path, out = path.resolve(), out.resolve()
    near = [folder for folder in (out.parent, out.parent.parent) if folder != folder.parent]
    if not any(path.is_relative_to(folder) for folder in near):
        return str(path)
    return os.path.relpath(path, out / "/".join(["folder"] * below))


# --- Writing


def _make(split: Split, out: Path) -> Counter[str]:
    """Make a split unless it exists, under a temporary name until it is complete; counts images by class."""
    final, partial, source = out / split.name, out / f".{split.name}.partial", split.images.path
    if not split.entries:
        if not os.path.lexists(final):
            final.symlink_to(_link_target(source, out, below=0), target_is_directory=True)
        elif final.resolve() != source.resolve():
            raise UserError(f"{final} exists and is not a link to {source}; choose another --out")
        return _count(final)
    if os.path.lexists(final):
        return _counted(split, final, _recorded(split, final))
    partial.mkdir(exist_ok=True)
    if (partial / RECORD).exists():
        _recorded(split, partial)
    else:
        _record(split, partial, None)
    expected = _fill(split, partial, out)
    images = _counted(split, partial, expected)
    _record(split, partial, expected)
    if not split.images.is_readable:
        os.sync()  # a power failure must not leave empty images under the final name
    os.rename(partial, final)
    return images


def _fill(split: Split, partial: Path, out: Path) -> int:
    """Make the missing links or images of a split; returns the number that there should be."""
    path, unfinished, hidden = split.images.path, partial / UNFINISHED_FILE, not shows_bars()
    for name in split.class_names:
        (partial / name).mkdir(exist_ok=True)
    if split.images.is_readable:
        target = _link_target(path, out, below=2)
        for entry in tqdm(split.entries, f"link {split.name}", unit="img", disable=hidden):
            if not os.path.lexists(partial / entry):
                os.symlink(f"{target}/{entry.partition('/')[2]}", partial / entry)
        return len(split.entries)
    size = sum(split.entries.values())
    with tqdm(total=size, desc=f"unpack {split.name}", unit="B", unit_scale=True, disable=hidden) as bar:
        if split.by_label:
            targets = {entry.partition("/")[2]: partial / entry for entry in split.entries}
            with open(path, "rb") as file:
                return unpack(file, path, targets, unfinished, bar)
        return sum(
            unpack(tar, path / f"{wnid}.tar", partial / wnid, unfinished, bar)
            for wnid, _, tar in class_tars(split.images)
        )


def class_tars(images: Images) -> Iterator[TarFile]:
    """Each class with its tar, from a folder of class tars or the tar of them. Raises as `tar_files`."""
    if images.form == "class tars":
        for name in sorted(os.listdir(images.path)):
            if match := WNID_TAR.fullmatch(name):
                with open(images.path / name, "rb") as file:
                    yield match[1], os.fstat(file.fileno()).st_size, file
    else:
        with open(images.path, "rb") as file:
            for name, size, stream in tar_files(file, images.path):
                if match := WNID_TAR.fullmatch(name):
                    yield match[1], size, stream


def unpack(tar: IO[bytes], where: Path, targets: Path | dict[str, Path], unfinished: Path, bar: tqdm) -> int:
    """Unpack the images of a tar that do not exist in full size yet; returns the number of images in it.

    Args:
        where: path of the tar for messages.
        targets: folder of the images, or the path of each image by its file name.
        unfinished: temporary name of the image that is written; on the same file system.
        bar: progress in bytes.

    Raises:
        UserError: as `tar_files`.
    """
    count = 0
    with damage_named(where):
        for name, size, stream in tar_files(tar, where):
            if not is_image(name):
                continue
            target = targets / name if isinstance(targets, Path) else targets[name]
            if not (target.is_file() and target.stat().st_size == size):
                with atomic_write(target, unfinished, durable=False) as file:
                    shutil.copyfileobj(stream, file)
            bar.update(size)
            count += 1
    return count


def _record(split: Split, folder: Path, count: int | None) -> None:
    record = {"source": str(split.images.path.resolve()), "contents": split.digest, "images": count}
    with atomic_write(folder / RECORD, folder / UNFINISHED_FILE) as file:
        file.write(json.dumps(record).encode())


def _recorded(split: Split, folder: Path) -> int | None:
    """The number of images in the record of a folder, None while unfinished.

    Raises UserError if `prepare` did not make the folder, or made it from something else.
    """
    try:
        record = parsed_json("" if folder.is_symlink() else folder / RECORD)
        source, contents, count = record["source"], record["contents"], record["images"]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{folder} exists and was not made by `prepare`; choose another --out") from error
    if contents != split.digest:
        raise UserError(
            f"{folder} was made from other images or labels, or {source} has changed since; "
            f"choose another --out or remove {folder}"
        )
    return count


def _counted(split: Split, folder: Path, expected: int | None) -> Counter[str]:
    """The number of images in a folder by class. Raises UserError if their total is not as expected."""
    images = _count(folder)
    if images.total() != expected:
        raise UserError(
            f"{folder} holds {images.total()} images, expected the {expected} of {split.images.path}; remove "
            f"it and prepare again"
        )
    return images


def _count(split: Path) -> Counter[str]:
    """The number of images in each class folder; the key of images outside of class folders is empty."""
    counts: Counter[str] = Counter()
    for folder in walk(split):
        counts[folder.top] += folder.num_images
    return counts

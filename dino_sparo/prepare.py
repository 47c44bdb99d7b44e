"""`dino-sparo prepare`: train/<class> and val/<class> of ImageNet as people have it, linked or unpacked."""

import hashlib
import json
import logging
import os
import shlex
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from dino_sparo.data.imagenet import Images, Layout, explain, is_image, recognise
from dino_sparo.data.tars import class_tars, tar_files, unpack
from dino_sparo.data.val_labels import image_classes
from dino_sparo.data.walk import walk
from dino_sparo.errors import UserError
from dino_sparo.files import atomic_write
from dino_sparo.parallel.processes import only_writer
from dino_sparo.terminal import shows_bars

log = logging.getLogger("dino_sparo")

SPLITS = ("train", "val")
RECORD = ".prepared.json"  # hidden, as the unfinished folder and file are: no loader takes them for images
UNFINISHED_FILE = ".part"
SHOWN_CLASSES = 3


@dataclass(frozen=True)
class Job:
    """How to make one split."""

    split: str
    images: Images
    class_names: frozenset[str]
    contents: list[str]
    """Lines by which what was made is known again: its source, then each thing; empty if one link does."""
    classes: dict[str, str] | None = None
    """The class of every image by file name, where the images lie flat."""

    @property
    def digest(self) -> str:
        """SHA-256 of the contents."""
        return hashlib.sha256("\n".join(self.contents).encode("utf-8", "surrogateescape")).hexdigest()


def prepare(source: str, out: str, labels: str | None = None) -> str:
    """Make out/train/<class> and out/val/<class> of any recognised layout, and print what there is.

    Files that lie in folders are linked, tars are unpacked. A split gets its name when it is whole; the same
    command goes on where it was killed, and does nothing if all is done. Nothing else is changed.

    Args:
        source: folder of the images or tars, see `dino_sparo.data.imagenet.recognise`.
        out: folder for the two splits; created if it does not exist.
        labels: classes of a flat folder's images, see `dino_sparo.data.val_labels.image_classes`; None takes
            those that lie near ImageNet's validation images.

    Raises:
        UserError: nothing is recognised, labels and images do not fit, `out` holds something else, a tar is
            damaged.
        OSError: the file system refuses.
    """
    folder = Path(out)
    layout = recognise(Path(source))
    log.info("%s: %s%s", source, layout.name, "" if explain(layout) else "; usable as it is")
    _check_out(folder, layout)
    jobs = _plan(layout, folder, labels)
    folder.mkdir(parents=True, exist_ok=True)
    with only_writer(folder):
        made = {job.split: _make(job, folder) for job in jobs}
    others = [split for split in SPLITS if split not in made and (folder / split).is_dir()]
    return _summary(folder, made | {split: _count(folder / split) for split in others})


def _check_out(out: Path, layout: Layout) -> None:
    """Refuse a folder that holds something else or lies among the images."""
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {str(out)!r} is a file; give a folder")
    for images in (layout.train, layout.val):
        if images and out.resolve().is_relative_to(images.path.resolve()):
            raise UserError(
                f"--out {str(out)!r} lies among the images of {images.path}; choose a folder outside"
            )
    there = [name for name in os.listdir(out) if not name.startswith(".")] if out.is_dir() else []
    if foreign := sorted(set(there) - set(SPLITS)):
        raise UserError(
            f"--out {str(out)!r} holds other things ({foreign[0]}); choose another or a new folder"
        )


# --- What is to be made


def _plan(layout: Layout, out: Path, labels: str | None) -> list[Job]:
    """The splits to make, val first: it is quick. All is checked here that can be before anything is made."""
    labelled = "val" if layout.val else "train"  # the split that labels are for
    found = layout.labels if labels is None else Path(labels)
    jobs = [
        _plan_split(split, images, out, found if split == labelled else None)
        for split, images in (("val", layout.val), ("train", layout.train))
        if images
    ]
    if labels is not None and not any(job.classes for job in jobs):
        raise UserError(f"--labels {labels!r} is of no use: {layout.root} has {layout.name}; leave it out")
    if len(jobs) == len(SPLITS) and jobs[0].classes and jobs[1].class_names:
        val, train = jobs
        if not val.class_names & train.class_names:
            raise UserError(
                f"{found}: its classes ({min(val.class_names)}, ...) are none of {train.images.path}'s "
                f"({min(train.class_names)}, ...); give labels with the same class names by --labels"
            )
    return jobs


def _plan_split(split: str, images: Images, out: Path, labels: Path | None) -> Job:
    """List what a split will hold."""
    path = images.path
    if images.form == "class tars" or (images.form == "tar" and split == "train"):
        sizes = {wnid: size for wnid, size, _ in class_tars(images)}
        if not sizes:
            raise UserError(f"{path} holds no class tars (n01440764.tar ...); download it again")
        contents = [_last_changes(images), *(f"{wnid} {size}" for wnid, size in sizes.items())]
        return Job(split, images, frozenset(sizes), contents)
    if images.form == "class folders":
        return Job(split, images, frozenset(os.listdir(path)), [])
    if labels is None and split == "train":
        return Job(split, images, frozenset(), [])
    if labels is None:
        raise UserError(
            f"{path}: nothing says the classes of these validation images; give by --labels Kaggle's "
            f"LOC_val_solution.csv, the devkit ILSVRC2012_devkit_t12.tar.gz, or lines of `file_name class`"
        )
    if images.form == "tar":
        with open(path, "rb") as file:
            sizes = {name: size for name, size, _ in tar_files(file, path) if is_image(name)}
        made_of = _last_changes(images)
    else:
        sizes = dict.fromkeys(sorted(filter(is_image, os.listdir(path))), 0)
        made_of = _link_target(path, out, below=2)
    classes = image_classes(sizes, path, labels)
    contents = [made_of, *(f"{classes[name]}/{name} {size}" for name, size in sizes.items())]
    return Job(split, images, frozenset(classes.values()), contents, classes)


def _last_changes(images: Images) -> str:
    """Times of the tars: a damaged one that was replaced can have left wrong images of the right size."""
    tars = [images.path] if images.form == "tar" else sorted(images.path.glob("*.tar"))
    return " ".join(str(tar.stat().st_mtime_ns) for tar in tars)


def _link_target(path: Path, out: Path, below: int) -> str:
    """What a link so many folders below out's top says for `path`: relative if the two are neighbours."""
    path, out = path.resolve(), out.resolve()
    near = [folder for folder in (out.parent, out.parent.parent) if folder != folder.parent]
    if not any(path.is_relative_to(folder) for folder in near):
        return str(path)
    return os.path.relpath(path, out / "/".join(["folder"] * below))


# --- Making it


def _make(job: Job, out: Path) -> Counter[str]:
    """Make a split unless it is there, under another name until it is whole; its images by class."""
    final, partial = out / job.split, out / f".{job.split}.partial"
    if not job.contents:
        _link_folder(job.images.path, final, out)
        return _count(final)
    if os.path.lexists(final):
        return _check_made(job, final)
    partial.mkdir(exist_ok=True)
    if (partial / RECORD).exists():
        _check_record(job, partial)
    else:
        _write_record(job, partial, None)
    expected = _fill(job, partial, out)
    images = _count(partial)
    if images.total() != expected:
        raise UserError(
            f"{partial} holds {images.total()} images instead of the {expected} of {job.images.path}; "
            f"remove it and prepare again"
        )
    _write_record(job, partial, expected)
    if not job.images.is_readable:
        os.sync()  # a power cut must not leave empty images under the final name
    os.rename(partial, final)
    return images


def _link_folder(folder: Path, link: Path, out: Path) -> None:
    if not os.path.lexists(link):
        link.symlink_to(_link_target(folder, out, below=0), target_is_directory=True)
    elif link.resolve() != folder.resolve():
        raise UserError(f"{link} exists and is not {folder}; choose another --out")


def _fill(job: Job, partial: Path, out: Path) -> int:
    """Make what is not there yet of the links or images of a split; the number that there should be."""
    path, unfinished = job.images.path, partial / UNFINISHED_FILE
    for name in job.class_names:
        (partial / name).mkdir(exist_ok=True)
    if job.images.form == "flat" and job.classes:
        target = _link_target(path, out, below=2)
        images = tqdm(job.classes.items(), f"link {job.split}", unit="img", disable=not shows_bars())
        for image, name in images:
            if not os.path.lexists(partial / name / image):
                os.symlink(f"{target}/{image}", partial / name / image)
        return len(job.classes)
    if job.classes:
        with open(path, "rb") as whole, _bytes_bar(job, path.stat().st_size) as bar:
            return unpack(whole, path, partial, job.classes, unfinished, bar)
    count = 0
    with _bytes_bar(job, sum(int(line.split()[1]) for line in job.contents[1:])) as bar:
        for wnid, _, tar in class_tars(job.images):
            count += unpack(tar, path / f"{wnid}.tar", partial / wnid, None, unfinished, bar)
    return count


def _bytes_bar(job: Job, total: int) -> tqdm:
    return tqdm(total=total, desc=f"unpack {job.split}", unit="B", unit_scale=True, disable=not shows_bars())


# --- What is there


def _write_record(job: Job, folder: Path, count: int | None) -> None:
    record = {"source": str(job.images.path.resolve()), "contents": job.digest, "images": count}
    with atomic_write(folder / RECORD, folder / UNFINISHED_FILE) as file:
        file.write(json.dumps(record).encode())


def _check_record(job: Job, folder: Path) -> int | None:
    """Refuse a folder that this job did not begin; its number of images, None while it is unfinished."""
    try:
        record = json.loads((folder / RECORD).read_text())
        source, contents, count = record["source"], record["contents"], record["images"]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{folder} exists and was not made by `prepare`; choose another --out") from error
    if contents != job.digest:
        raise UserError(
            f"{folder} was made of other images or labels, or {source} has changed since; "
            f"choose another --out or remove it"
        )
    return count


def _check_made(job: Job, final: Path) -> Counter[str]:
    """Refuse a split that is something else or no longer whole; its images by class."""
    if final.is_symlink():
        raise UserError(f"{final} exists and was not made by `prepare`; choose another --out")
    expected, images = _check_record(job, final), _count(final)
    if images.total() != expected:
        raise UserError(
            f"{final} holds {images.total()} images, not the {expected} that were made; "
            f"remove it and prepare again"
        )
    return images


def _count(split: Path) -> Counter[str]:
    """Number of images of every class folder; of those outside of class folders under an empty name."""
    counts: Counter[str] = Counter()
    for folder in walk(split):
        counts[folder.below.partition("/")[0]] += folder.num_images
    return counts


def _summary(out: Path, counts: dict[str, Counter[str]]) -> str:
    """What train and val hold, how their classes differ, and what to run next."""
    lines = [
        f"{out / split}: {images.total()} images, {len(images.keys() - {''})} classes"
        for split, images in counts.items()
    ]
    for here, other in (SPLITS, SPLITS[::-1]) if len(counts) == len(SPLITS) else ():
        if missing := sorted(counts[here].keys() - counts[other].keys()):
            shown = ", ".join([*missing[:SHOWN_CLASSES], *(["..."] if len(missing) > SHOWN_CLASSES else [])])
            lines.append(f"classes of {here} that {other} does not have: {len(missing)} ({shown})")
    path = shlex.quote(str(out))
    if "train" in counts:
        command = (
            f"dino-sparo pretrain --config imagenet_vits16_sparo --data.path {path} --run_dir runs/sparo"
        )
        return "\n".join([*lines, f"next: {command}"])
    command = f"dino-sparo prepare DIR --out {path}"
    return "\n".join([*lines, f"no training images yet; next: {command}, DIR being where they are"])

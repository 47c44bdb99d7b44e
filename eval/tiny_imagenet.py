"""Split half of Tiny ImageNet for comparisons of encoders: python eval/tiny_imagenet.py DIR OUT

DIR holds train and val of Tiny ImageNet (200 classes of 64 x 64 pixels), as class folders or as shards. Used
are every second class, and of the 500 train images of a class every second one, in the order of names. The
first 180 of these 250 are OUT/train; the other 70 and the 50 of val are OUT/val: 18,000 and 12,000 images.
OUT/dev splits OUT/train again, for choosing settings: every tenth image is its val.
"""

import re
import sys
from pathlib import Path

import numpy as np

from dino_sparo.data.sources import ImageSource, open_labeled
from dino_sparo.errors import UserError

NUM_CLASSES, PER_CLASS, TRAIN, VAL, DEV_EVERY = 200, 250, 180, 50, 10
WNID = re.compile(r"n\d{8}")


def split(path: str, out: Path) -> dict[str, int]:
    """Write the images; returns the number of images by folder.

    Raises:
        UserError: `out` exists, `path` is not Tiny ImageNet, or two of its images have the same name.
    """
    if out.exists():
        raise UserError(f"OUT {str(out)!r} exists; give a new folder")
    train, val = open_labeled(path)
    known = len(train.classes) == NUM_CLASSES and all(map(WNID.fullmatch, train.classes))
    sizes = len(train) // NUM_CLASSES, len(val) // NUM_CLASSES
    if not known or train.classes != val.classes or sizes not in ((PER_CLASS, VAL), (2 * PER_CLASS, VAL)):
        raise UserError(
            f"DIR {path!r} is not Tiny ImageNet; expected the same {NUM_CLASSES} classes in train and val, "
            f"with {PER_CLASS} or {2 * PER_CLASS} and {VAL} images each"
        )
    counts: dict[str, int] = {}
    for label in range(0, NUM_CLASSES, 2):
        found = _of_class(train, label)
        found = found[::2] if len(found) > PER_CLASS else found
        seen, unseen = found[:TRAIN], found[TRAIN:]
        of_dev = seen[DEV_EVERY - 1 :: DEV_EVERY]
        for folder, source, images in (
            ("train", train, seen),
            ("dev/train", train, [image for image in seen if image not in of_dev]),
            ("dev/val", train, of_dev),
            ("val", train, unseen),
            ("val", val, _of_class(val, label)),
        ):
            target = out / folder / train.classes[label]
            target.mkdir(parents=True, exist_ok=True)
            for image in images:
                file = target / Path(source.name(image)).name
                if file.exists():
                    raise UserError(f"DIR {path!r} has two images of the name {file.name} in {target.name}")
                file.write_bytes(source.read(image))
            counts[folder] = counts.get(folder, 0) + len(images)
    return counts


def _of_class(source: ImageSource, label: int) -> list[int]:
    """The images of a class, in the order of their names."""
    assert source.labels is not None
    images = np.flatnonzero(source.labels == label).tolist()
    return sorted(images, key=lambda image: Path(source.name(image)).name)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    try:
        written = split(sys.argv[1], Path(sys.argv[2]))
    except UserError as error:
        sys.exit(f"error: {error}")
    print("\n".join(f"{folder}: {count:,} images" for folder, count in written.items()))

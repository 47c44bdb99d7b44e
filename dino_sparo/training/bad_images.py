"""Images that cannot be read and are substituted: listed in the run folder, at most 1 % of all."""

import json
from pathlib import Path

from dino_sparo.data.loader import Replaced
from dino_sparo.errors import UserError
from dino_sparo.files import read_lines, write_file
from dino_sparo.parallel.distributed import gather_objects, rank
from dino_sparo.runs.rundir import BAD_IMAGES_FILE, is_bad_image

MAX_SHARE = 0.01


def too_many(bad: int, num_images: int) -> bool:
    """Whether this number of bad images ends a run: more than 1 %, and more than one image."""
    return bad > max(1, MAX_SHARE * num_images)


class BadImages:
    """The list `run_dir/bad_images.jsonl`: one line per image, with its name and the reason.

    Args:
        run_dir: folder of the run; images that an earlier start listed are kept.
        num_images: size of the dataset.
    """

    def __init__(self, run_dir: Path, num_images: int) -> None:
        self.path, self.num_images = run_dir / BAD_IMAGES_FILE, num_images
        self._pending: list[Replaced] = []
        self._met: set[str] = set()  # of this start: those listed before may have been fixed
        self._reasons = {each["name"]: each["reason"] for each in read_lines(self.path, is_bad_image)}

    def __len__(self) -> int:
        return len(self._reasons)

    def add(self, replaced: tuple[Replaced, ...]) -> None:
        """Add images that this process has substituted, to be listed by `share`."""
        self._pending += replaced

    def share(self) -> None:
        """List the images added in all processes since the last call. A collective."""
        new = {name: reason for pending in gather_objects(self._pending) for name, reason in pending}
        self._pending = []
        self._met |= new.keys()
        self.list(new, len(self._met), self.num_images)

    def list(self, new: dict[str, str], bad: int, num_images: int) -> None:
        """List new images (name -> reason, equal in all processes).

        Raises:
            UserError: `bad` of `num_images` images are too many.
        """
        if new.keys() - self._reasons.keys():
            self._reasons = dict(sorted((new | self._reasons).items()))
            if rank() == 0:
                lines = (json.dumps({"name": name, "reason": why}) for name, why in self._reasons.items())
                write_file(self.path, "".join(f"{line}\n" for line in lines))
        if too_many(bad, num_images):
            raise UserError(
                f"{bad} of {num_images} images cannot be read, more than 1 %; repair those listed in "
                f"{self.path}, then run again"
            )

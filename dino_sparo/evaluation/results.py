"""Results of evaluations in `results.json` of a run folder: written by evaluations, read by `compare`.

A result is one line of the file. It includes one bit per test image, whether the image was classified
correctly, so that two runs can be compared image by image without weights or images.
"""

import base64
import json
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from dino_sparo.errors import UserError, UserFileNotFoundError
from dino_sparo.files import alone_in, is_writable, parsed_json, read_as, set_aside, write_file
from dino_sparo.terminal import counted, log, sentence, shown

if TYPE_CHECKING:
    from dino_sparo.evaluation.transfer import TestSet  # imports torch, which `compare` does not need

RESULTS_FILE = "results.json"
FORMAT = 1
MOST_IMAGES = 2**31


@dataclass(frozen=True, kw_only=True)
class Result:
    """The accuracy of an encoder by one setting of a protocol on one test set."""

    protocol: str
    """`knn`, `linear` or `linear-cached`."""
    name: str
    """The setting, unique within a protocol: `20-NN`, `4 blocks both lr 0.001`."""
    headline: bool
    """Whether it is the official setting of the protocol, which `compare` shows."""
    test_set: str
    """`val`, or the name of another test set."""
    weights: str
    """`teacher`, `student`, or `untrained`."""
    top1: float
    """Top-1 accuracy in percent."""
    top5: float
    """Top-5 accuracy in percent."""
    num_images: int
    """Number of test images."""
    num_classes: int
    """Number of classes that can be predicted."""
    details: dict[str, Any]
    """Other values as in JSON: k, epochs, learning rate, train_fraction, accuracy by class, a hash of the
    encoder, ..."""
    correct: NDArray[np.bool_]
    """Whether top-1 is right for each test image, (num_images,), in the order of the test images."""
    images: str
    """A hash of the test images and their order."""

    @property
    def train_fraction(self) -> float:
        """Fraction of the train images that was used for training; 1 if the details do not have it."""
        fraction = self.details.get("train_fraction")
        return 1.0 if fraction is None else float(fraction)


def result_on(
    test_set: "TestSet", correct: NDArray[np.bool_], *, details: dict[str, Any], **values: Any
) -> Result:
    """A result on a test set: `values`, and what follows from `correct`, such as accuracy by class."""
    labels = test_set.labels
    by_class = {
        test_set.source.classes[number]: 100 * float(correct[labels == number].mean())
        for number in np.unique(labels).tolist()
    }
    return Result(
        test_set=test_set.name,
        num_images=len(labels),
        num_classes=len(test_set.classes),
        details=details | {"top1_by_class": by_class, "remark": test_set.describe()},
        correct=correct,
        **values,
    )


def accuracies(
    results: Sequence[Result],
    heading: Callable[[Result], str],
    remark: Callable[[Result], str] = lambda _: "",
) -> list[str]:
    """Lines of text: for each test set a heading and its results, with standard errors and remarks."""
    lines: list[str] = []
    width = max(len(shown(result.name)) for result in results)
    for _, group in groupby(results, key=lambda result: result.test_set):
        of_set = list(group)
        lines += filter(None, [sentence(heading(of_set[0])), shown(of_set[0].details["remark"])])
        lines += [
            f"{shown(result.name):<{width}}   top-1 {result.top1:6.2f} % "
            f"± {standard_error(result.top1, result.num_images):.2f}   top-5 {result.top5:6.2f} %"
            f"{remark(result)}{'   <- headline' if result.headline else ''}"
            for result in of_set
        ]
    return lines


def standard_error(accuracy: float, num_images: int) -> float:
    """Standard error, in percentage points, of an accuracy in percent over `num_images` images."""
    return (accuracy * (100 - accuracy) / num_images) ** 0.5


def results_folder(run: str) -> Path:
    """The folder of RUN's results: a run folder itself; `<stem>_evaluation` beside a weights file;
    `timm_NAME_evaluation` in the working directory for `timm:NAME`."""
    if run.startswith("timm:"):
        return Path(f"{run.replace(':', '_')}_evaluation")
    path = Path(run)
    return path if path.is_dir() else path.with_name(f"{path.stem}_evaluation")


def features_folder(run: str, out: Path) -> Path:
    """Where the features of RUN are stored: beside its results, or in `out` if that cannot be written."""
    folder = results_folder(run)
    return (folder if is_writable(folder) else out) / "features"


def save_results(folder: Path, results: Sequence[Result]) -> None:
    """Add results to `folder/results.json`; the folder is created if it does not exist. One process calls it.

    A result replaces an earlier one of the same protocol, name, test set, test images, weights, and train
    fraction. The folder is locked against other programs. A damaged file is renamed with a warning, so that
    new results are never lost.

    Raises:
        OSError: the folder cannot be created or written.
    """
    path = folder / RESULTS_FILE
    folder.mkdir(parents=True, exist_ok=True)
    with alone_in(folder):
        try:
            before = read_results(folder) if path.exists() else []
        except UserError as error:
            before = []
            set_aside(path, str(error))
        new = {_key(result): result for result in results}
        replaced = [
            old
            for old in before
            if _key(old) in new
            and old.details.get("encoder") not in (None, new[_key(old)].details.get("encoder"))
        ]
        if replaced:
            log.info(
                "%s: replaced %s of other weights, such as %s, top-1 %.2f; another --out keeps both",
                *(path, counted(len(replaced), "result"), replaced[-1].name, replaced[-1].top1),
            )
        kept = [result for result in before if _key(result) not in new]
        lines = ",\n".join(json.dumps(_to_json(result)) for result in [*kept, *new.values()])
        write_file(path, f'{{"format": {FORMAT}, "results": [\n{lines}\n]}}\n')


def read_results(folder: Path) -> list[Result]:
    """All results in `folder/results.json`, the newest last.

    Raises:
        UserFileNotFoundError: there is no such file.
        UserError: it is damaged or has another format.
    """
    path = folder / RESULTS_FILE
    if not path.exists():
        raise UserFileNotFoundError(
            f"{path} does not exist; evaluate the run first with `dino-sparo knn` or `dino-sparo linear`"
        )
    with read_as(f"{path} is damaged", "restore it from a backup, or remove it and evaluate again"):
        content = parsed_json(path)
        if content["format"] != FORMAT:
            raise UserError(
                f"{path} has format {content['format']!r}, expected {FORMAT}; read it with the version of "
                f"dino_sparo that wrote it, or remove it and evaluate again"
            )
        return [_from_json(entry) for entry in content["results"]]


def _key(result: Result) -> tuple[object, ...]:
    """What identifies a result in the file; a new result replaces an earlier one with the same key."""
    setting = result.protocol, result.name, result.test_set, result.weights, result.train_fraction
    return *setting, result.images


def _to_json(result: Result) -> dict[str, Any]:
    assert result.correct.shape == (result.num_images,), f"{result.name}: one bit per image"
    entry = {field.name: getattr(result, field.name) for field in fields(result)}
    bits = zlib.compress(np.packbits(result.correct).tobytes())
    return entry | {"correct": base64.b64encode(bits).decode()}


def _from_json(entry: dict[str, Any]) -> Result:
    """Raises ValueError, KeyError, TypeError, or zlib.error if the entry does not hold a result."""
    values = {field.name: entry[field.name] for field in fields(Result)}
    details = values["details"]
    kinds = {
        "text": (str, ("protocol", "name", "test_set", "weights", "images")),
        "a whole number": (int, ("num_images", "num_classes")),
        "a number": (int | float, ("top1", "top5")),
        "true or false": (bool, ("headline",)),
        "a section": (dict, ("details",)),
    }
    for expected, (kind, names) in kinds.items():
        for name in names:
            if not isinstance(values[name], kind):
                raise ValueError(f"{name} is {values[name]!r}; expected {expected}")
    fraction = 1.0 if details.get("train_fraction") is None else float(details["train_fraction"])
    if not (0 <= values["top1"] <= 100 and 0 <= values["top5"] <= 100 and 0 < fraction <= 1):
        raise ValueError("top1, top5, or train_fraction is out of range")
    count = values["num_images"]
    if not 0 < count < MOST_IMAGES:
        raise ValueError(f"num_images is {count}")
    unpacker = zlib.decompressobj()
    packed = unpacker.decompress(base64.b64decode(values["correct"], validate=True), 2 + count // 8)
    if len(packed) != -(-count // 8) or not unpacker.eof:
        raise ValueError(f"correct has {len(packed)} bytes for {count} images")
    values["correct"] = np.unpackbits(np.frombuffer(packed, np.uint8), count=count).astype(bool)
    return Result(**values | {"top1": float(values["top1"]), "top5": float(values["top5"])})

"""Monitoring of a run: statistics of the teacher's outputs, an alarm on collapse, and k-NN.

Axis letters: B images, K prototypes, E encoding.
"""

import math
import resource
import sys
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dino_sparo.data.sources import AS_FOUND, ImageSource, open_labeled, per_class
from dino_sparo.data.splits import Choice, Splits
from dino_sparo.errors import UserError
from dino_sparo.evaluation.knn import HEADLINE_K, KNN, KNN_IMAGES, KNN_TOP5, NoDirectionError, evaluate_knn
from dino_sparo.models import Encoder
from dino_sparo.parallel.distributed import sum_over_ranks, world_size
from dino_sparo.slots.curves import ALARM_SHARE
from dino_sparo.terminal import log

ALARM_STEPS, ALARM_ENTRIES = 30, 3
SHARPER = (
    "a lower loss.teacher_temp, a lower optim.lr_per_256, a larger optim.global_batch_size, or fewer "
    "head.num_prototypes for a small dataset"
)
SOFTER = (
    "a higher loss.teacher_temp with a warm-up, head.norm_last_layer true, a longer "
    "optim.freeze_last_layer_epochs, a lower optim.lr_per_256, or a larger optim.global_batch_size"
)


class KnnImages(NamedTuple):
    """Labeled images for 20-NN during training."""

    train: ImageSource
    test: ImageSource


class TeacherStatistics:
    """Statistics of the teacher's outputs over the global batch of one step, accumulated on the device."""

    def __init__(self) -> None:
        self._sums: list[Tensor] = []  # of probabilities, their entropies, encodings, and their squares
        self._num_rows = 0

    @torch.no_grad()
    def add(self, probabilities: Tensor, encodings: Tensor) -> None:
        """Add the teacher probabilities (2*B, K) and encodings (2*B, E) of a micro-batch."""
        directions = F.normalize(encodings.double(), dim=-1)
        sums = [
            probabilities.sum(dim=0),
            _entropy(probabilities).sum(),
            directions.sum(dim=0),
            (directions**2).sum(dim=0),
        ]
        self._sums = [a + b for a, b in zip(self._sums, sums, strict=True)] if self._sums else sums
        self._num_rows += len(probabilities)

    @torch.no_grad()
    def metrics(self) -> dict[str, Tensor]:
        """Scalars on the device. A collective; call it once.

        - entropy_teacher: mean entropy of the teacher's outputs in nats; ln K: uniform, 0: one-hot.
        - entropy_mean: entropy of the mean output; equal to entropy_teacher if all outputs are equal.
        - feature_std: standard deviation of l2-normalized encodings over the batch, times sqrt(E): near 1
          if they spread over the sphere, 0 if all are equal.
        """
        rows, entropy, encodings, squares = map(sum_over_ranks, self._sums)
        number = self._num_rows * world_size()
        variance = ((squares - encodings**2 / number) / (number - 1)).clamp(min=0)
        return {
            "entropy_teacher": entropy / number,
            "entropy_mean": _entropy(rows / number),
            "feature_std": (variance.sqrt().mean() * math.sqrt(len(encodings))).float(),
        }


class CollapseAlarm:
    """Warns once if the teacher's outputs have collapsed and stay so; the run continues.

    Collapsed means that all log entries of 30 steps, at least three, show a sign of collapse. The sign may
    change: the center absorbs a constant output, which makes one-hot outputs uniform. If at least every
    twelfth step is logged, the warning comes within 50 steps, otherwise at the third or fourth entry.

    Args:
        num_prototypes: K.
        armed_from_step: no warning up to this step (warm-up and frozen last layer).
    """

    def __init__(self, num_prototypes: int, armed_from_step: int) -> None:
        self.log_k, self.armed_from_step = math.log(num_prototypes), armed_from_step
        self._first_step, self._entries, self._warned = 0, 0, False  # since the last entry without a sign

    def check(self, step: int, entropy_teacher: float, entropy_mean: float) -> str | None:
        """Check the log entry of a step; returns the text of the warning if it is due."""
        small = ALARM_SHARE * self.log_k
        sign, remedy = "", SOFTER
        if entropy_teacher > self.log_k - small:
            sign, remedy = "the teacher's outputs are uniform over all prototypes", SHARPER
        elif entropy_teacher < small:
            sign = "the teacher's outputs are one-hot"
        elif entropy_mean - entropy_teacher < small:
            sign = "the teacher's outputs are equal for all images"
        if not sign or step <= self.armed_from_step:
            self._entries, self._warned = 0, False
            return None
        self._first_step = self._first_step if self._entries else step
        self._entries += 1
        steps = step - self._first_step
        if self._warned or self._entries < ALARM_ENTRIES or steps < ALARM_STEPS:
            return None
        self._warned = True
        return (
            f"collapse: {sign}, and all log entries of the last {steps} steps show a collapse "
            f"(entropy_teacher {entropy_teacher:.3f}, entropy_mean {entropy_mean:.3f}, ln K "
            f"{self.log_k:.3f}); training continues, but in a new run try {remedy}"
        )


def _entropy(probabilities: Tensor) -> Tensor:
    return -torch.xlogy(probabilities, probabilities).sum(dim=-1)


def peak_memory_gib(device: torch.device) -> float:
    """Peak memory in GiB, of the GPU or of this process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def evaluate_teacher(encoder: Encoder, images: KnnImages, **loading: Any) -> dict[str, float]:
    """20-NN top-1 and top-5 accuracy in percent, and the number of test images.

    Args:
        loading: arguments of `evaluate_knn` for loading images.

    Raises:
        UserError: an image cannot be read, or its encoding is zero.
    """
    try:
        result = evaluate_knn(encoder, images.train, images.test, k=HEADLINE_K, **loading)[HEADLINE_K]
    except NoDirectionError as error:
        raise UserError(
            f"k-NN during training: {error}; the run has collapsed, start in a new run_dir with a lower "
            f"optim.lr_per_256"
        ) from error
    return {KNN: result.top1, KNN_TOP5: result.top5, KNN_IMAGES: result.num_images}


def open_knn_images(
    path: str | None,
    data_path: str,
    images_per_class: int | None,
    choice: Choice = AS_FOUND,
    splits: Splits | None = None,
) -> KnnImages | None:
    """Labeled images for k-NN from `path`, or if it is None from `data_path`; None if that has no labels.

    Args:
        choice: options for reading `data_path`; those about pixels also apply to `path`.
        splits: splits of `data_path`.

    Raises:
        UserError: `path` is given, but is not a labeled folder with at least 20 train images.
    """
    try:
        if path is None:
            train, test = open_labeled(data_path, choice=choice, splits=splits)
        else:
            train, test = open_labeled(path, "monitor.knn_path", choice.of_pixels)
        if images_per_class is not None:
            train, test = per_class(train, images_per_class), per_class(test, images_per_class)
        if len(train) < HEADLINE_K or not len(test):
            raise UserError(
                f"{'data.path' if path is None else 'monitor.knn_path'} {path or data_path!r} gives "
                f"{len(train)} train and {len(test)} test images; {HEADLINE_K}-NN needs {HEADLINE_K} and 1"
            )
    except UserError as error:
        if path is not None:
            raise
        log.info("no k-NN during training (monitor.knn_path can name a labeled folder): %s", error)
        return None
    return KnnImages(train, test)

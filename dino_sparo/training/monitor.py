"""What to watch: the teacher's answers in one step, computed on the device; an alarm; k-NN.

Axis letters: B images, K prototypes, E encoding.
"""

import logging
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
from dino_sparo.evaluation.knn import HEADLINE_K, KNN, KNN_IMAGES, NoDirectionError, evaluate_knn
from dino_sparo.models import Encoder
from dino_sparo.parallel.distributed import sum_over_ranks, world_size

log = logging.getLogger("dino_sparo")

ALARM_SHARE = 0.01  # of ln K
ALARM_STEPS, ALARM_ENTRIES = 30, 3
SHARPER = (
    "a lower loss.teacher_temp, a lower optim.lr_per_256, a larger optim.global_batch_size, or fewer "
    "head.num_prototypes for small data"
)
SOFTER = (
    "a higher loss.teacher_temp with a warm-up, head.norm_last_layer true, a longer "
    "optim.freeze_last_layer_epochs, a lower optim.lr_per_256, or a larger optim.global_batch_size"
)


class KnnImages(NamedTuple):
    """Labeled images by which an encoder is measured while it trains: of them 20-NN takes, and classifies."""

    train: ImageSource
    test: ImageSource


class TeacherStatistics:
    """What the teacher says about one step's images: sums over micro-batches and processes, no logits kept.

    So the numbers are those of the global batch, however it is split.
    """

    def __init__(self) -> None:
        self._sums: list[Tensor] = []  # of the rows, of their entropies, of encodings and of their squares
        self._num_rows = 0

    @torch.no_grad()
    def add(self, probabilities: Tensor, encodings: Tensor) -> None:
        """A micro-batch's teacher probabilities (2*B, K) and encodings (2*B, E)."""
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
        """Scalars on the device; every process calls it, once.

        - entropy_teacher: mean entropy of the teacher's rows, in nats; ln K is uniform, 0 one-hot.
        - entropy_mean: entropy of the mean row; if it falls to entropy_teacher, all images get one answer.
        - feature_std: standard deviation of l2-normalized encodings over the batch, times sqrt(E): near 1
          when they spread over the sphere, 0 when all are equal.
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
    """Says once when the teacher's answers have collapsed and stayed so; the run goes on.

    They have when every log entry of 30 steps, three at least, shows one of the signs. Which one may change:
    the center takes up a constant answer, which makes one-hot rows uniform. So a collapse is told within 50
    steps if every twelfth step is logged or more often; else by the third or fourth entry that shows it.

    Args:
        num_prototypes: K.
        armed_from_step: steps before which nothing is said: last-layer freeze and warm-up.
    """

    def __init__(self, num_prototypes: int, armed_from_step: int) -> None:
        self.log_k, self.armed_from_step = math.log(num_prototypes), armed_from_step
        self._first_step, self._entries, self._told = 0, 0, False  # of the signs seen in a row

    def check(self, step: int, entropy_teacher: float, entropy_mean: float) -> str | None:
        """Look at the log entry of a step; the alarm's words if it is time for them."""
        small = ALARM_SHARE * self.log_k
        sign, remedy = "", SOFTER
        if entropy_teacher > self.log_k - small:
            sign, remedy = "the teacher answers all prototypes alike", SHARPER
        elif entropy_teacher < small:
            sign = "the teacher answers with one prototype for certain"
        elif entropy_mean - entropy_teacher < small:
            sign = "every image gets the same answer"
        if not sign or step <= self.armed_from_step:
            self._entries, self._told = 0, False
            return None
        self._first_step = self._first_step if self._entries else step
        self._entries += 1
        steps = step - self._first_step
        if self._told or self._entries < ALARM_ENTRIES or steps < ALARM_STEPS:
            return None
        self._told = True
        return (
            f"collapse: {sign}, and no log entry of the last {steps} steps was healthy (H(p) "
            f"{entropy_teacher:.3f}, H(mean p) {entropy_mean:.3f}, ln K {self.log_k:.3f}); training goes on, "
            f"but in a new run try {remedy}"
        )


def _entropy(probabilities: Tensor) -> Tensor:
    return -torch.xlogy(probabilities, probabilities).sum(dim=-1)


def peak_memory_gib(device: torch.device) -> float:
    """Peak memory in GiB: of the GPU, or of this process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def evaluate_teacher(encoder: Encoder, images: KnnImages, **loading: Any) -> dict[str, float]:
    """20-NN top-1 and top-5 in per cent, and of how many images, which are loaded as for `evaluate_knn`.

    Raises:
        UserError: an image cannot be read, or the teacher answers one with zeros.
    """
    try:
        result = evaluate_knn(encoder, images.train, images.test, k=HEADLINE_K, **loading)[HEADLINE_K]
    except NoDirectionError as error:
        raise UserError(
            f"k-NN while training: {error}; the run has collapsed, start in a new run_dir with a lower "
            f"optim.lr_per_256"
        ) from error
    return {KNN: result.top1, f"knn{HEADLINE_K}_top5": result.top5, KNN_IMAGES: result.num_images}


def open_knn_images(
    path: str | None,
    data_path: str,
    images_per_class: int | None,
    choice: Choice = AS_FOUND,
    splits: Splits | None = None,
) -> KnnImages | None:
    """Those of `path`, or of `data_path` if that is labeled; None if there is nothing to measure on.
    `choice` and `splits` are about `data_path`; what the choice says of pixels holds for both.

    Raises:
        UserError: `path` is given, but is no labeled folder with at least 20 gallery images.
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
                f"{len(train)} gallery and {len(test)} test images; {HEADLINE_K}-NN needs {HEADLINE_K} and 1"
            )
    except UserError as error:
        if path is not None:
            raise
        log.info("no k-NN while training (monitor.knn_path can name a labeled folder): %s", error)
        return None
    return KnnImages(train, test)

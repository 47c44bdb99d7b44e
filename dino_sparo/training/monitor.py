"""What to watch for collapse: numbers of one step, computed on the device, read when the log is due.

Axis letters: B images, K prototypes, E encoding.
"""

import logging
import math
import resource
import sys
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dino_sparo.data.sources import ImageSource, open_labelled, per_class
from dino_sparo.errors import UserError
from dino_sparo.evaluation.knn import HEADLINE_K, evaluate_knn
from dino_sparo.models import Encoder
from dino_sparo.training.loss import teacher_probabilities

log = logging.getLogger("dino_sparo")


@torch.no_grad()
def step_metrics(
    *,
    loss: Tensor,
    teacher_logits: Tensor,
    center: Tensor,
    teacher_temp: float,
    teacher_encodings: Tensor,
    gradient_norms: Tensor,
) -> dict[str, Tensor]:
    """Scalars on the device, from the tensors of one step and the centre that its loss used.

    - entropy_teacher: mean entropy of the teacher's rows, in nats; ln K is uniform, 0 one-hot.
    - entropy_mean: entropy of the mean row; if it falls to entropy_teacher, all images get one answer.
    - kl: mean KL divergence from teacher to student over all pairs, loss - entropy_teacher.
    - feature_std: standard deviation of l2-normalised encodings over the batch, times sqrt(E): near 1
      when they spread over the sphere, 0 when all are equal.
    - gradient_norm: norm of all gradients before clipping; gradient_norm_max: of the largest tensor.
    """
    probabilities = teacher_probabilities(teacher_logits, center, teacher_temp)
    entropy_teacher = _entropy(probabilities).mean()
    directions = F.normalize(teacher_encodings.float(), dim=-1)
    return {
        "loss": loss,
        "entropy_teacher": entropy_teacher,
        "entropy_mean": _entropy(probabilities.mean(dim=0)),
        "kl": loss - entropy_teacher,
        "center_norm": center.norm(),
        "feature_std": directions.std(dim=0).mean() * math.sqrt(directions.shape[-1]),
        "gradient_norm": torch.linalg.vector_norm(gradient_norms),
        "gradient_norm_max": gradient_norms.max(),
    }


def _entropy(probabilities: Tensor) -> Tensor:
    return torch.special.entr(probabilities).sum(dim=-1)


def peak_memory_gib(device: torch.device) -> float:
    """Peak memory in GiB: of the GPU, or of this process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


@dataclass(frozen=True)
class KnnMonitor:
    """20-NN accuracy of an encoder on a labelled folder while it trains."""

    train: ImageSource
    test: ImageSource
    image_size: int
    num_workers: int

    def evaluate(self, encoder: Encoder) -> dict[str, float]:
        """Top-1 and top-5 in per cent."""
        result = evaluate_knn(
            encoder,
            self.train,
            self.test,
            image_size=self.image_size,
            k=[HEADLINE_K],
            num_workers=self.num_workers,
        )[HEADLINE_K]
        return {f"knn{HEADLINE_K}_top1": result.top1, f"knn{HEADLINE_K}_top5": result.top5}


def open_knn_monitor(
    *, path: str | None, data_path: str, images_per_class: int | None, image_size: int, num_workers: int
) -> KnnMonitor | None:
    """The monitor on `path`, or on `data_path` if that is labelled; None if there is nothing to measure on.

    Raises:
        UserError: `path` is given, but is no labelled folder with at least 20 gallery images.
    """
    try:
        train, test = open_labelled(path or data_path, "data.path" if path is None else "monitor.knn_path")
    except UserError as error:
        if path is not None:
            raise
        log.info("no k-NN while training (monitor.knn_path can name a labelled folder): %s", error)
        return None
    if path is None and len(train.classes) == 1:
        log.info("no k-NN while training: %s has one class only", data_path)
        return None
    if images_per_class is not None:
        train, test = per_class(train, images_per_class), per_class(test, images_per_class)
    if len(train) < HEADLINE_K or not len(test):
        message = (
            f"{path or data_path} gives {len(train)} gallery and {len(test)} test images; {HEADLINE_K}-NN "
            f"needs {HEADLINE_K} and 1"
        )
        if path is not None:
            raise UserError(f"monitor.knn_path: {message}")
        log.info("no k-NN while training: %s", message)
        return None
    return KnnMonitor(train, test, image_size, num_workers)

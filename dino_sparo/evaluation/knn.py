"""Weighted k-nearest-neighbour classification. Source: official `eval_knn.py`.

Axis letters: T train images, B test images, S classes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from dino_sparo.data.sources import ImageSource
from dino_sparo.distributed import gather_rows, rank, sum_over_ranks, world_size
from dino_sparo.evaluation.features import extract_features
from dino_sparo.models import Encoder

if TYPE_CHECKING:
    from dino_sparo.options import KnnOptions

HEADLINE_K = 20
PROTOCOL_K = (10, 20, 100, 200)
TEMPERATURE = 0.07
CHUNK_SIZE = 256  # test images at a time; it changes memory, not the result


@dataclass(frozen=True)
class KnnResult:
    """Accuracy in per cent, and the number of test images it is over."""

    top1: float
    top5: float
    num_images: int


@torch.no_grad()
def knn_classify(
    train_features: Tensor | NDArray,
    train_labels: Tensor | NDArray,
    test_features: Tensor | NDArray,
    test_labels: Tensor | NDArray,
    k: int | Integral | Sequence[int],
    temperature: float = TEMPERATURE,
    num_classes: int | None = None,
) -> dict[int, KnnResult]:
    """Accuracy of a vote of the k nearest train images, each weighted by exp(cosine / temperature).

    Exact search, on the device of the features. Top-5 looks at the first min(5, k) ranked classes, as the
    official code does; classes with equal votes, also those with none, rank by lower index.

    Args:
        train_features: (T, D) floating point, any scale: l2-normalised inside.
        train_labels: (T,) integers from 0.
        test_features: (number of test images, D).
        test_labels: likewise.
        k: one or several numbers of neighbours.
        num_classes: None takes the largest label + 1.

    Raises:
        ValueError: k is below 1 or larger than the train set, or there are no test images.
    """
    train_features, train_labels = torch.as_tensor(train_features), torch.as_tensor(train_labels).long()
    test_features, test_labels = torch.as_tensor(test_features), torch.as_tensor(test_labels).long()
    ks = [int(k)] if isinstance(k, int | Integral) else [int(number) for number in k]
    for number in ks:
        if not 1 <= number <= len(train_features):
            raise ValueError(f"k is {number}, expected 1 to the {len(train_features)} train images")
    if not len(test_features):
        raise ValueError("there are no test images to classify")
    if num_classes is None:
        num_classes = int(max(train_labels.max(), test_labels.max())) + 1
    correct = _count_correct(
        train_features, train_labels, test_features, test_labels, ks, temperature, num_classes
    )
    return _results(ks, correct, len(test_features))


def _count_correct(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    test_labels: Tensor,
    ks: Sequence[int],
    temperature: float,
    num_classes: int,
) -> Tensor:
    """How many test images are right: int64 (len(ks), 2), top-1 and top-5, on the CPU."""
    train = F.normalize(train_features.float(), dim=1)
    train_labels, test_labels = train_labels.to(train.device), test_labels.to(train.device)
    correct = torch.zeros(len(ks), 2, dtype=torch.int64)
    for chunk, labels in zip(test_features.split(CHUNK_SIZE), test_labels.split(CHUNK_SIZE), strict=True):
        cosine_BT = F.normalize(chunk.to(train.device).float(), dim=1) @ train.T
        cosine_Bk, nearest_Bk = cosine_BT.topk(max(ks), dim=1)
        weight_Bk = (cosine_Bk / temperature).exp()
        labels_Bk = train_labels[nearest_Bk]
        for row, number in enumerate(ks):
            votes_BS = torch.zeros(len(chunk), num_classes, device=train.device)
            votes_BS.scatter_add_(1, labels_Bk[:, :number], weight_Bk[:, :number])
            ranked_BS = votes_BS.sort(dim=1, descending=True, stable=True).indices
            hits_BS = ranked_BS == labels[:, None]
            correct[row, 0] += hits_BS[:, :1].sum().cpu()
            correct[row, 1] += hits_BS[:, : min(5, number)].sum().cpu()
    return correct


def _results(ks: Sequence[int], correct: Tensor, total: int) -> dict[int, KnnResult]:
    return {
        number: KnnResult(100 * top1 / total, 100 * top5 / total, total)
        for number, (top1, top5) in zip(ks, correct.tolist(), strict=True)
    }


def evaluate_knn(
    encoder: Encoder,
    train: ImageSource,
    test: ImageSource,
    *,
    image_size: int,
    k: Sequence[int],
    batch_size: int = 64,
    num_workers: int = 0,
    timeout_seconds: float = 600.0,
) -> dict[int, KnnResult]:
    """k-NN accuracy of an encoder: features of both sources, then the vote.

    All processes share the work: each extracts its share of both sources, takes all train features, and
    classifies its share of the test images; every one counts once, and all processes get the result.
    """
    assert train.labels is not None and test.labels is not None
    gallery, share = (
        extract_features(
            encoder,
            source,
            image_size=image_size,
            batch_size=batch_size,
            num_workers=num_workers,
            timeout_seconds=timeout_seconds,
            description=f"k-NN {name} features",
        )
        for name, source in (("train", train), ("val", test))
    )
    correct = _count_correct(
        _near_the_encoder(gather_rows(gallery, len(train)), encoder),
        torch.from_numpy(train.labels),
        share,
        torch.from_numpy(test.labels)[rank() :: world_size()],
        k,
        TEMPERATURE,
        len(train.classes),
    )
    return _results(k, sum_over_ranks(correct), len(test))


def _near_the_encoder(features: Tensor, encoder: Encoder) -> Tensor:
    """The features on the encoder's GPU, if normalised copies of them fit into half of what is free."""
    device = encoder.backbone.cls_token.device
    if device.type == "cuda" and 2 * features.nbytes < torch.cuda.mem_get_info(device)[0] / 2:
        return features.to(device)
    return features


def run(options: "KnnOptions") -> None:
    """`dino-sparo knn`: print the accuracy of a trained encoder on a labelled folder."""
    from dino_sparo.data.sources import open_labelled
    from dino_sparo.data.workers import default_workers
    from dino_sparo.device import choose_device
    from dino_sparo.errors import UserError
    from dino_sparo.training.checkpoint import load_encoder

    device = choose_device(options.device)
    train, test = open_labelled(options.data.path)
    chosen = [options.k] if isinstance(options.k, int) else options.k
    ks = chosen or [k for k in PROTOCOL_K if k <= len(train)]
    for number in ks:
        if not 1 <= number <= len(train):
            raise UserError(
                f"k is {number}, expected 1 to the {len(train)} train images of {options.data.path}"
            )
    encoder = load_encoder(options.run, options.which, untrained=options.untrained).to(device)
    workers = default_workers() if options.num_workers is None else options.num_workers
    image_size = encoder.backbone.native_grid * encoder.backbone.patch_size
    results = evaluate_knn(
        encoder,
        train,
        test,
        image_size=image_size,
        k=ks,
        batch_size=options.batch_size,
        num_workers=workers,
    )
    weights = "untrained" if options.untrained else options.which
    print(
        f"{options.run} ({weights}): {len(train)} train and {len(test)} test images, "
        f"{len(train.classes)} classes"
    )
    for number, result in results.items():
        headline = "   <- headline" if number == HEADLINE_K else ""
        print(f"{number:>4}-NN   top-1 {result.top1:6.2f} %   top-5 {result.top5:6.2f} %{headline}")

"""Accuracy of parts of an encoding, and of sets of parts.

A part is a slot, or the same number of adjacent dimensions of an encoding without slots. All functions read
the features once for all sets of columns, in chunks, so memory does not grow with the number of images.

The linear probe is a ridge regression of one-hot classes on standardized dimensions, in closed form. The sums
over images that it needs (`Moments`) contain those of every set of parts, so one pass is enough for all
probes, and there are no hyperparameters of training that could favor some widths. It is not the protocol of
`dino-sparo linear`.

Axis letters: n images, T train images, B test images, E encoding dimensions, X dimensions of some parts,
S classes.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from dino_sparo.data.sources import ImageSource
from dino_sparo.evaluation.features import Wanted, cached_features
from dino_sparo.evaluation.knn import TEMPERATURE, rank_classes
from dino_sparo.evaluation.search import (
    CHUNK_BYTES,
    QUERY_BYTES,
    NoDirectionError,
    Rows,
    k_best,
    nearest,
)
from dino_sparo.models import Encoder

RIDGE = 0.01  # added to the variance of a dimension, which is standardized to 1


@dataclass(frozen=True)
class CutEncoder:
    """An encoder in evaluation mode on its device, the number of parts, and settings for its features."""

    name: str
    """Its read-out; `control (<read-out>)` for a control."""
    run: str
    """Run folder or weights file."""
    encoder: Encoder
    num_parts: int
    """Slots, or equal parts of an encoding without slots."""
    cache: Path
    cache_precision: str = "float16"
    batch_size: int = 64
    num_workers: int | None = 0

    @property
    def device(self) -> torch.device:
        return self.encoder.device

    def features(self, *sources: ImageSource) -> list[NDArray[Any]]:
        """Encodings (n, E) for each source, from the cache or one pass, memory-mapped.

        Raises:
            UserError: an image cannot be read, or the disk cannot hold the features.
        """
        found = cached_features(
            self.encoder,
            [Wanted(source, f"{self.name} features", self.cache_precision) for source in sources],
            ["encoding"],
            cache=self.cache,
            batch_size=self.batch_size,
            num_workers=self.num_workers,
        )
        return [features["encoding"] for features in found]


def most_parts(width: int, num_slots: int) -> int:
    """The largest number of equal parts of `width` dimensions that is at most `num_slots`."""
    return next(parts for parts in range(min(width, num_slots), 0, -1) if width % parts == 0)


def remarks_on_parts(encoders: Sequence[CutEncoder]) -> list[str]:
    """A sentence for each encoding that has fewer parts than the first encoder has slots."""
    num_slots = encoders[0].num_parts
    return [
        f"{one.name}: {one.encoder.embed_dim} dimensions cannot be split into {num_slots} equal parts; it "
        f"has {one.num_parts}, the largest possible number"
        for one in encoders
        if one.num_parts != num_slots
    ]


def labels_of(source: ImageSource) -> NDArray[np.int64]:
    """Class numbers of labeled images, (n,)."""
    assert source.labels is not None
    return source.labels


@dataclass(frozen=True)
class Picked:
    """Some rows of features (n, E), by sorted numbers, read on access."""

    features: NDArray[Any]
    numbers: NDArray[np.int64]

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.numbers), self.features.shape[1]

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, rows: slice) -> NDArray[Any]:
        return self.features[self.numbers[rows]]


def chunks(rows: Rows, device: torch.device, size: int | None = None) -> Iterator[tuple[int, Tensor]]:
    """Yields the number of the first row of each chunk, and the chunk in float32 on the device."""
    size = size or max(1, CHUNK_BYTES // (4 * rows.shape[1]))
    for start in range(0, len(rows), size):
        yield start, torch.as_tensor(rows[start : start + size]).to(device).float()


def columns_of(width: int, num_parts: int, subset: Sequence[int]) -> Tensor:
    """The columns of the parts `subset`, when `width` dimensions are split into `num_parts` equal parts."""
    return torch.arange(width).view(num_parts, -1)[list(subset)].flatten()


@torch.no_grad()
def knn_accuracies(
    train: Rows,
    train_labels: NDArray[np.int64],
    test: Rows,
    test_labels: NDArray[np.int64],
    *,
    columns: Sequence[Tensor],
    k: int,
    num_classes: int,
    device: torch.device,
    train_chunk: int | None = None,
    test_chunk: int | None = None,
) -> list[float]:
    """k-NN on each set of columns: top-1 in percent, equal to `knn_classify` on these columns.

    Args:
        train: (T, E) floating point, with labels (T,) from 0.
        test: (B, E), with labels (B,).
        columns: sets of columns.
        k: number of neighbors, 1 to T.
        train_chunk, test_chunk: images at a time; they change memory, not the result.

    Raises:
        NoDirectionError: the columns of an image in one of the sets are zero or not finite.
    """
    test_chunk = test_chunk or max(1, QUERY_BYTES // (4 * train.shape[1]))
    labels, right = torch.from_numpy(train_labels), [0] * len(columns)
    for first, queries in chunks(test, device, test_chunk):
        truth = torch.from_numpy(test_labels[first : first + len(queries)])
        nothing = torch.empty(len(queries), 0), torch.empty(len(queries), 0, dtype=torch.int64)
        best = [nothing] * len(columns)
        for start, gallery in chunks(train, device, train_chunk):
            for number, some in enumerate(columns):
                try:
                    cosine_Bk, number_Bk = nearest(gallery[:, some], queries[:, some], k, device=device)
                except NoDirectionError as error:
                    offset = start if error.side == "train" else first
                    raise NoDirectionError(error.side, offset + error.number, error.kind) from error
                best[number] = k_best(best[number], (cosine_Bk, number_Bk + start), k)
        for number, (cosine_Bk, number_Bk) in enumerate(best):
            ranked = rank_classes(cosine_Bk, labels[number_Bk], [k], TEMPERATURE, num_classes)[k]
            right[number] += int((ranked[:, 0] == truth).sum())
    return [100 * count / len(test) for count in right]


class Moments(NamedTuple):
    """Sums over images in float64 that determine the probe of every set of parts.

    Attributes:
        sums: of the features, (E,).
        products: of all products of two dimensions, (E, E).
        by_class: of the features by class, (E, S).
        counts: images by class, (S,).
    """

    sums: Tensor
    products: Tensor
    by_class: Tensor
    counts: Tensor

    def with_others(self, others: "Moments") -> "Moments":
        """The sums over both sets of images."""
        return Moments(*(one + other for one, other in zip(self, others, strict=True)))


@torch.no_grad()
def moments(
    features: Rows,
    labels: NDArray[np.int64],
    *,
    num_classes: int,
    device: torch.device,
    chunk: int | None = None,
) -> Moments:
    """The sums for linear probes, in one pass over features (n, E) with labels (n,)."""
    width = features.shape[1]
    sums = torch.zeros(width, dtype=torch.float64, device=device)
    products = sums.new_zeros(width, width)
    by_class, counts = sums.new_zeros(width, num_classes), sums.new_zeros(num_classes)
    for start, rows in chunks(
        features, device, chunk or max(1, CHUNK_BYTES // (8 * max(width, num_classes)))
    ):
        exact, classes = rows.double(), torch.from_numpy(labels[start : start + len(rows)]).to(device)
        one_hot = F.one_hot(classes, num_classes).double()
        sums += exact.sum(dim=0)
        products.addmm_(exact.T, exact)
        by_class.addmm_(exact.T, one_hot)
        counts += one_hot.sum(dim=0)
    return Moments(sums, products, by_class, counts)


class LinearProbe(NamedTuple):
    """A linear classifier on some columns (X,): weight (X, S) and bias (S,)."""

    columns: Tensor
    weight: Tensor
    bias: Tensor


def fit_probe(moments: Moments, columns: Tensor) -> LinearProbe:
    """Ridge regression of one-hot classes on the standardized columns.

    The weight of a constant column is 0; the bias is not regularized.
    """
    share_S, mean_X, covariance_XX = _centered(moments, columns)
    with_class = moments.by_class[columns] / moments.counts.sum() - mean_X[:, None] * share_S
    weight = _regress(covariance_XX, with_class, mean_X, covariance_XX, RIDGE)
    return LinearProbe(columns, weight.float(), (share_S - mean_X @ weight).float())


def fit_discriminant(moments: Moments, columns: Tensor, ridge: float) -> LinearProbe:
    """Linear discriminant of the classes on some columns: class means, and one covariance within classes.

    Columns are standardized within classes, and `ridge` is added to their variance, which is 1. The weight of
    a column that is constant within classes is 0. A class without images is never predicted.
    """
    share_S, mean_X, covariance_XX = _centered(moments, columns)
    apart_XS = moments.by_class[columns] / moments.counts.clamp(min=1) - mean_X[:, None]
    within_XX = covariance_XX - (apart_XS * share_S) @ apart_XS.T
    weight = _regress(within_XX, apart_XS, mean_X, covariance_XX, ridge)
    bias = share_S.log() - (apart_XS * weight).sum(dim=0) / 2 - mean_X @ weight
    return LinearProbe(columns, weight.float(), bias.float())


def _centered(moments: Moments, columns: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Fraction of images by class (S,), and mean (X,) and covariance (X, X) of the columns."""
    total = moments.counts.sum()
    mean_X = moments.sums[columns] / total
    covariance_XX = moments.products[columns][:, columns] / total - mean_X[:, None] * mean_X
    return moments.counts / total, mean_X, covariance_XX


def _regress(within_XX: Tensor, targets_XS: Tensor, mean_X: Tensor, total_XX: Tensor, ridge: float) -> Tensor:
    """Weights (X, S) of (within + ridge) w = targets, solved with columns standardized by `within`."""
    variance_X = within_XX.diagonal()
    # The variance of a constant column is not exactly 0, because of rounding.
    constant = variance_X <= 1e-12 * (mean_X.square() + total_XX.diagonal())
    scale_X = variance_X.clamp(min=0).sqrt().masked_fill(constant, torch.inf)
    correlation = within_XX / (scale_X[:, None] * scale_X)
    correlation.diagonal().add_(ridge)
    factor = torch.linalg.cholesky(correlation)
    return torch.cholesky_solve(targets_XS / scale_X[:, None], factor) / scale_X[:, None]


@torch.no_grad()
def probe_accuracies(
    probes: Sequence[LinearProbe], features: Rows, labels: NDArray[np.int64], *, chunk: int | None = None
) -> list[float]:
    """Top-1 of each probe in percent, in one pass over features (n, E) with labels (n,)."""
    right = [0] * len(probes)
    for start, rows in chunks(features, probes[0].weight.device, chunk):
        truth = torch.from_numpy(labels[start : start + len(rows)]).to(rows.device)
        for number, (columns, weight, bias) in enumerate(probes):
            found = (rows[:, columns] @ weight + bias).argmax(dim=1)
            right[number] += int((found == truth).sum())
    return [100 * count / len(features) for count in right]

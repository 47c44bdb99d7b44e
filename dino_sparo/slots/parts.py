"""An encoding cut into equal parts: what each part, and each set of parts, tells about labels.

A part is a slot, or as many neighboring numbers of an encoding without slots. All functions read their
images once for all sets of columns, in chunks, so that memory does not grow with the number of images.

The linear probe is a ridge regression of classes as one-hot vectors on standardized numbers, in closed form:
its sums over images (`Moments`) hold the sums of every set of parts, so that one pass serves all probes, and
there is no learning rate or length of training that would suit some widths better than others. It is not the
protocol of `dino-sparo linear`.

Axis letters: n images, T train images, B test images, E numbers of an encoding, X numbers of some parts,
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
from dino_sparo.evaluation.knn import TEMPERATURE
from dino_sparo.evaluation.search import (
    CHUNK_BYTES,
    QUERY_BYTES,
    NoDirectionError,
    Rows,
    k_best,
    nearest,
)
from dino_sparo.models import Encoder

RIDGE = 0.01  # in units of the variance of a standardized number, which is 1


@dataclass(frozen=True)
class CutEncoder:
    """An encoder in evaluation mode on its device, how its encoding is cut, and where features are kept."""

    name: str
    """Its read-out; for a control `control (<read-out>)`."""
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
        """Encodings of images (n, E) by source, from the cache or by one pass, mapped from files.

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
    """The largest number of equal parts of an encoding (width,) that is at most the number of slots."""
    return next(parts for parts in range(min(width, num_slots), 0, -1) if width % parts == 0)


def remarks_on_parts(encoders: Sequence[CutEncoder]) -> list[str]:
    """A sentence for each encoding that cannot be cut into as many parts as the first has slots."""
    num_slots = encoders[0].num_parts
    return [
        f"{one.name}: {one.encoder.embed_dim} numbers cannot be cut into {num_slots} equal parts, so it has "
        f"{one.num_parts}, the most that are possible"
        for one in encoders
        if one.num_parts != num_slots
    ]


def labels_of(source: ImageSource) -> NDArray[np.int64]:
    """Class numbers of labeled images, (n,)."""
    assert source.labels is not None
    return source.labels


@dataclass(frozen=True)
class Picked:
    """Rows of features (n, E), by their sorted numbers, read when they are asked for."""

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
    """Some rows at a time in float32 on the device, and the number of the first of them."""
    size = size or max(1, CHUNK_BYTES // (4 * rows.shape[1]))
    for start in range(0, len(rows), size):
        yield start, torch.as_tensor(rows[start : start + size]).to(device).float()


def columns_of(width: int, num_parts: int, subset: Sequence[int]) -> Tensor:
    """The numbers of an encoding (width,) that belong to some of its equal parts."""
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
    """Weighted k-NN by the cosine over some columns only: top-1 in per cent for each set of columns.

    Equal to `knn_classify` of these columns.

    Args:
        train: (T, E), any scale and precision, with labels (T,) from 0.
        test: (B, E), with labels (B,).
        k: 1 to T neighbors.
        train_chunk: train images at a time; memory, not the result, depends on it, as on test_chunk.

    Raises:
        NoDirectionError: the numbers of an image in one of the sets are all zero, or one is not finite.
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
            voted = vote(cosine_Bk, labels[number_Bk], num_classes)
            right[number] += int((voted == truth).sum())
    return [100 * count / len(test) for count in right]


def vote(cosine_Bk: Tensor, labels_Bk: Tensor, num_classes: int) -> Tensor:
    """The class (B,) with most votes of exp(cosine / 0.07); of equal ones the lower number, as in k-NN."""
    votes_BS = cosine_Bk.new_zeros(len(cosine_Bk), num_classes)
    return votes_BS.scatter_add_(1, labels_Bk, (cosine_Bk / TEMPERATURE).exp()).argmax(dim=1)


class Moments(NamedTuple):
    """Sums over images in float64, from which the probe of every set of parts follows.

    Of the numbers (E,), of all pairs (E, E), of the numbers by class (E, S), and the images by class (S,).
    """

    sums: Tensor
    products: Tensor
    by_class: Tensor
    counts: Tensor

    def with_others(self, others: "Moments") -> "Moments":
        """Of these images and others."""
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
    """The sums that linear probes need, in one pass over features (n, E) with labels (n,)."""
    width = features.shape[1]
    sums = torch.zeros(width, dtype=torch.float64, device=device)
    products = sums.new_zeros(width, width)
    by_class, counts = sums.new_zeros(width, num_classes), sums.new_zeros(num_classes)
    for start, rows in chunks(features, device, chunk or max(1, CHUNK_BYTES // (8 * width))):
        exact, classes = rows.double(), torch.from_numpy(labels[start : start + len(rows)]).to(device)
        one_hot = F.one_hot(classes, num_classes).double()
        sums += exact.sum(dim=0)
        products.addmm_(exact.T, exact)
        by_class.addmm_(exact.T, one_hot)
        counts += one_hot.sum(dim=0)
    return Moments(sums, products, by_class, counts)


class LinearProbe(NamedTuple):
    """Scores of classes from some columns (X,): weight (X, S) and bias (S,)."""

    columns: Tensor
    weight: Tensor
    bias: Tensor


def fit_probe(moments: Moments, columns: Tensor) -> LinearProbe:
    """The ridge regression of one-hot classes on the standardized numbers of some columns, with a bias.

    A number that is constant over the images gets no weight; the bias is not shrunk.
    """
    share_S, mean_X, covariance_XX = _centered(moments, columns)
    with_class = moments.by_class[columns] / moments.counts.sum() - mean_X[:, None] * share_S
    weight = _regress(covariance_XX, with_class, mean_X, covariance_XX, RIDGE)
    return LinearProbe(columns, weight.float(), (share_S - mean_X @ weight).float())


def fit_discriminant(moments: Moments, columns: Tensor, ridge: float) -> LinearProbe:
    """Linear discriminant of classes from some columns: their means, and one covariance within all classes.

    Numbers are standardized within classes and `ridge` is added to their variance, 1. A number that is
    constant within classes gets no weight, nor does a class without images ever win.
    """
    share_S, mean_X, covariance_XX = _centered(moments, columns)
    apart_XS = moments.by_class[columns] / moments.counts.clamp(min=1) - mean_X[:, None]
    within_XX = covariance_XX - (apart_XS * share_S) @ apart_XS.T
    weight = _regress(within_XX, apart_XS, mean_X, covariance_XX, ridge)
    bias = share_S.log() - (apart_XS * weight).sum(dim=0) / 2 - mean_X @ weight
    return LinearProbe(columns, weight.float(), bias.float())


def _centered(moments: Moments, columns: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Share of images by class, mean and covariance of the numbers."""
    total = moments.counts.sum()
    mean_X = moments.sums[columns] / total
    covariance_XX = moments.products[columns][:, columns] / total - mean_X[:, None] * mean_X
    return moments.counts / total, mean_X, covariance_XX


def _regress(within_XX: Tensor, targets_XS: Tensor, mean_X: Tensor, total_XX: Tensor, ridge: float) -> Tensor:
    """Weights (X, S) that solve `within` w = targets on standardized numbers, the ridge on their variance."""
    variance_X = within_XX.diagonal()
    # Below this the variance is what rounding leaves of equal numbers.
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
    """Top-1 of each probe in per cent, in one pass over features (n, E) with labels (n,)."""
    right = [0] * len(probes)
    for start, rows in chunks(features, probes[0].weight.device, chunk):
        truth = torch.from_numpy(labels[start : start + len(rows)]).to(rows.device)
        for number, (columns, weight, bias) in enumerate(probes):
            found = (rows[:, columns] @ weight + bias).argmax(dim=1)
            right[number] += int((found == truth).sum())
    return [100 * count / len(features) for count in right]

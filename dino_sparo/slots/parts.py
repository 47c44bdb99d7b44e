"""An encoding cut into equal parts: what each part, and each set of parts, tells about labels.

A part is a slot, or as many neighboring numbers of an encoding without slots. All functions read their
images once for all sets of parts, in chunks, so that memory does not grow with the number of images.

The linear probe is a ridge regression of classes as one-hot vectors on standardized numbers, in closed form:
its sums over images (`Moments`) hold the sums of every set of parts, so that one pass serves all probes, and
there is no learning rate or length of training that would suit some widths better than others. It is not the
protocol of `dino-sparo linear`.

Axis letters: n images, T train images, B test images, P parts, V numbers of a part, E = P V numbers of an
encoding, S classes.
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
from dino_sparo.evaluation.knn import (
    CHUNK_BYTES,
    QUERY_BYTES,
    TEMPERATURE,
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
    num_workers: int = 0

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
    """Class numbers of labelled images, (n,)."""
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


def parts_of(features: Tensor, num_parts: int, subset: Sequence[int] | None = None) -> Tensor:
    """Features (n, E) cut into parts (n, P, V): all, or those of these numbers.

    Raises:
        ValueError: num_parts does not divide E.
    """
    if num_parts < 1 or features.shape[1] % num_parts:
        raise ValueError(
            f"num_parts is {num_parts}, expected a divisor of the {features.shape[1]} numbers of an encoding"
        )
    parts_nPV = features.unflatten(1, (num_parts, -1))
    return parts_nPV if subset is None else parts_nPV[:, list(subset)]


@torch.no_grad()
def knn_accuracies(
    train: Rows,
    train_labels: NDArray[np.int64],
    test: Rows,
    test_labels: NDArray[np.int64],
    *,
    num_parts: int,
    subsets: Sequence[Sequence[int]],
    k: int,
    num_classes: int,
    device: torch.device,
    train_chunk: int | None = None,
    test_chunk: int | None = None,
) -> list[float]:
    """Weighted k-NN by the cosine over some parts only: top-1 in per cent for each set of parts.

    Equal to `knn_classify` of these columns.

    Args:
        train: (T, E), any scale and precision.
        train_labels: (T,) from 0.
        test: (B, E).
        test_labels: (B,).
        subsets: numbers of parts, below num_parts.
        k: 1 to T neighbors.
        train_chunk: train images at a time; memory, not the result, depends on it, as on test_chunk.

    Raises:
        NoDirectionError: the numbers of an image in one of the sets are all zero, or one is not finite.
    """
    test_chunk = test_chunk or max(1, QUERY_BYTES // (4 * train.shape[1]))
    labels, right = torch.from_numpy(train_labels), [0] * len(subsets)
    for first, queries in chunks(test, device, test_chunk):
        truth = torch.from_numpy(test_labels[first : first + len(queries)])
        nothing = torch.empty(len(queries), 0), torch.empty(len(queries), 0, dtype=torch.int64)
        best = [nothing] * len(subsets)
        for start, gallery in chunks(train, device, train_chunk):
            for number, subset in enumerate(subsets):
                some, many = (parts_of(x, num_parts, subset).flatten(1) for x in (queries, gallery))
                try:
                    cosine_Bk, number_Bk = nearest(many, some, min(k, len(many)), device=device)
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
    """Sums over images in float64, from which the probe of every set of parts follows."""

    sums: Tensor
    """Of the numbers, (E,)."""
    products: Tensor
    """Of all pairs of numbers, (E, E)."""
    by_class: Tensor
    """Sums of the numbers by class, (E, S)."""
    counts: Tensor
    """Images by class, (S,)."""

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
    """Scores of classes from some parts: their numbers, weight (V times their count, S), bias (S,)."""

    subset: Sequence[int]
    weight: Tensor
    bias: Tensor


def fit_probe(moments: Moments, num_parts: int, subset: Sequence[int]) -> LinearProbe:
    """The ridge regression of one-hot classes on the standardized numbers of some parts, with a bias.

    A number that is constant over the images gets no weight; the bias is not shrunk.
    """
    counts_S, mean_E, covariance_EE, by_class_ES = _centered(moments, num_parts, subset)
    share_S = counts_S / counts_S.sum()
    with_class = by_class_ES / counts_S.sum() - mean_E[:, None] * share_S
    weight = _regress(covariance_EE, with_class, mean_E, covariance_EE, RIDGE)
    return LinearProbe(subset, weight.float(), (share_S - mean_E @ weight).float())


def fit_discriminant(moments: Moments, num_parts: int, subset: Sequence[int], ridge: float) -> LinearProbe:
    """Linear discriminant of classes from some parts: their means, and one covariance within all classes.

    Numbers are standardized within classes and `ridge` is added to their variance, 1. A number that is
    constant within classes gets no weight, nor does a class without images ever win.
    """
    counts_S, mean_E, covariance_EE, by_class_ES = _centered(moments, num_parts, subset)
    share_S = counts_S / counts_S.sum()
    apart_ES = by_class_ES / counts_S.clamp(min=1) - mean_E[:, None]
    within_EE = covariance_EE - (apart_ES * share_S) @ apart_ES.T
    weight = _regress(within_EE, apart_ES, mean_E, covariance_EE, ridge)
    bias = share_S.log() - (apart_ES * weight).sum(dim=0) / 2 - mean_E @ weight
    return LinearProbe(subset, weight.float(), bias.float())


def _centered(
    moments: Moments, num_parts: int, subset: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of some parts: images by class, mean and covariance of the numbers, and their sums by class."""
    numbers = torch.arange(len(moments.sums), device=moments.sums.device)
    columns = parts_of(numbers[None], num_parts, subset).flatten()
    total = moments.counts.sum()
    mean_E = moments.sums[columns] / total
    covariance_EE = moments.products[columns][:, columns] / total - mean_E[:, None] * mean_E
    return moments.counts, mean_E, covariance_EE, moments.by_class[columns]


def _regress(within_EE: Tensor, targets_ES: Tensor, mean_E: Tensor, total_EE: Tensor, ridge: float) -> Tensor:
    """Weights (E, S) that solve `within` w = targets on standardized numbers, the ridge on their variance."""
    variance_E = within_EE.diagonal()
    # Below this the variance is what rounding leaves of equal numbers.
    constant = variance_E <= 1e-12 * (mean_E.square() + total_EE.diagonal())
    scale_E = variance_E.clamp(min=0).sqrt().masked_fill(constant, torch.inf)
    correlation = within_EE / (scale_E[:, None] * scale_E)
    correlation.diagonal().add_(ridge)
    factor = torch.linalg.cholesky(correlation)
    return torch.cholesky_solve(targets_ES / scale_E[:, None], factor) / scale_E[:, None]


@torch.no_grad()
def probe_accuracies(
    probes: Sequence[LinearProbe],
    features: Rows,
    labels: NDArray[np.int64],
    *,
    num_parts: int,
    device: torch.device,
    chunk: int | None = None,
) -> list[float]:
    """Top-1 of each probe in per cent, in one pass over features (n, E) with labels (n,)."""
    right = [0] * len(probes)
    for start, rows in chunks(features, device, chunk):
        truth = torch.from_numpy(labels[start : start + len(rows)]).to(device)
        for number, probe in enumerate(probes):
            seen = parts_of(rows, num_parts, probe.subset).flatten(1)
            right[number] += int(((seen @ probe.weight + probe.bias).argmax(dim=1) == truth).sum())
    return [100 * count / len(features) for count in right]

"""Exact search of nearest neighbours by cosine, in chunks of both sides.

Source: official `knn_classifier`, whose similarities are one matrix product. Axis letters: T train, B test
images, D numbers of a feature.
"""

import logging
from typing import Any, Protocol

import torch
from torch import Tensor

CHUNK_BYTES = 2**27  # of float32 train features at a time: it changes memory, not the result
QUERY_BYTES = 2**28  # of float32 test features at a time; all train features are read once for each
SCORES = 2**24  # similarities at a time


class NoDirectionError(ValueError):
    """A feature is zero or not finite: it is near to nothing.

    Attributes:
        side: `train` or `test`.
        number: of the image on this side.
        kind: `zero` or `not finite`.
    """

    def __init__(self, side: str, number: int, kind: str) -> None:
        super().__init__(f"the feature of {side} image {number} is {kind}; it has no direction to compare")
        self.side, self.number, self.kind = side, number, kind


class Rows(Protocol):
    """Features by row: an array, in memory or mapped from a file, or a tensor."""

    @property
    def shape(self) -> Any: ...

    def __len__(self) -> int: ...

    def __getitem__(self, rows: slice, /) -> Any: ...


def nearest(
    train: Rows,
    test: Rows,
    k: int,
    *,
    device: torch.device | None = None,
    by_faiss: bool = False,
    train_chunk: int | None = None,
    test_chunk: int | None = None,
) -> tuple[Tensor, Tensor]:
    """The k most similar train images of every test image.

    Args:
        train: (T, D) floating point of any scale, l2-normalised inside; float16 stays float16 where it lies.
        test: (B, D).
        k: 1 to T.
        device: where to compute; None is the CPU.
        by_faiss: search by faiss, on the CPU, instead of by products of matrices: an independent check.
        train_chunk: train images at a time.
        test_chunk: test images at a time.

    Returns:
        cosines float32 and train image numbers int64, both (B, k) on the CPU, the most similar first, of
        equally similar ones the lower number.

    Raises:
        NoDirectionError: a feature is zero or not finite.
    """
    device = torch.device("cpu") if device is None or by_faiss else device
    width = train.shape[1]
    train_chunk = train_chunk or max(1, CHUNK_BYTES // (4 * width))
    test_chunk = test_chunk or max(1, QUERY_BYTES // (4 * width))
    search = _by_faiss if by_faiss else _by_products
    if not len(test):
        return torch.empty(0, min(k, len(train))), torch.empty(0, min(k, len(train)), dtype=torch.int64)
    cosines, numbers = [], []
    for start in range(0, len(test), test_chunk):
        queries = _directions(test, start, start + test_chunk, device, "test")
        best = (
            queries.new_empty(len(queries), 0),
            torch.empty(len(queries), 0, dtype=torch.int64, device=device),
        )
        for first in range(0, len(train), train_chunk):
            gallery = _directions(train, first, first + train_chunk, device, "train")
            cosine_Bk, number_Bk = search(queries, gallery, min(k, len(gallery)))
            best = _merge(best, (cosine_Bk, number_Bk + first), k)
        by_number = best[1].argsort(dim=1)
        order = best[0].gather(1, by_number).sort(dim=1, descending=True, stable=True).indices
        order = by_number.gather(1, order)
        cosines.append(best[0].gather(1, order).cpu())
        numbers.append(best[1].gather(1, order).cpu())
    return torch.cat(cosines), torch.cat(numbers)


def _directions(rows: Rows, start: int, stop: int, device: torch.device, side: str) -> Tensor:
    """Rows as float32 of length one."""
    chunk = torch.as_tensor(rows[start:stop]).to(device).to(torch.float32, copy=True)  # ours to change
    length_B = torch.linalg.vector_norm(chunk, dim=1)
    bad = (~(length_B.isfinite() & (length_B > 0))).nonzero()
    if len(bad):
        kind = "zero" if length_B[int(bad[0])] == 0 else "not finite"
        raise NoDirectionError(side, start + int(bad[0]), kind)
    return chunk.div_(length_B[:, None])


def _by_products(queries: Tensor, gallery: Tensor, k: int) -> tuple[Tensor, Tensor]:
    found = [
        (some @ gallery.T).topk(k, dim=1) for some in queries.split(max(1, SCORES // max(1, len(gallery))))
    ]
    return torch.cat([values for values, _ in found]), torch.cat([numbers for _, numbers in found])


def _by_faiss(queries: Tensor, gallery: Tensor, k: int) -> tuple[Tensor, Tensor]:
    logging.getLogger("faiss.loader").setLevel(logging.WARNING)  # it tells which build it tries
    import faiss

    values, numbers = faiss.knn(queries.numpy(), gallery.numpy(), k, metric=faiss.METRIC_INNER_PRODUCT)
    return torch.from_numpy(values), torch.from_numpy(numbers)


def _merge(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor], k: int) -> tuple[Tensor, Tensor]:
    """The k best of both, in no order."""
    values, numbers = (torch.cat(pair, dim=1) for pair in zip(one, other, strict=True))
    if values.shape[1] <= k:
        return values, numbers
    best = values.topk(k, dim=1, sorted=False)
    return best.values, numbers.gather(1, best.indices)

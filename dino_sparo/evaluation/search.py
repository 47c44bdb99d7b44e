"""Exact search of nearest neighbors among features.

Axis letters: T train images, B test images, D feature dimensions.
"""

import logging
import warnings
from collections.abc import Iterable, Iterator
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from dino_sparo.parallel.precision import multiplies_bfloat16

CHUNK_BYTES = 2**27  # float32 train features at a time, in bytes
CHUNK_ROWS = 2**15  # train features at a time, at most
QUERY_BYTES = 2**27  # float32 test features at a time; all train features are read once for each such chunk
SCORES = 2**23  # similarities at a time
GROUP = 8  # similarities per group; groups whose maximum is too small are skipped
COSTLY = 16  # cost of computing one cosine alone, relative to one within a float32 matrix product
MANY = 100  # train images per neighbor in a chunk, from which bfloat16 was measured to be faster


class NoDirectionError(ValueError):
    """A feature is zero or not finite, so its cosine is undefined.

    Attributes:
        side: `train` or `test`.
        number: of the image.
        kind: `zero` or `not finite`.
    """

    def __init__(self, side: str, number: int, kind: str) -> None:
        super().__init__(f"the feature of {side} image {number} is {kind}, so its cosine is undefined")
        self.side, self.number, self.kind = side, number, kind


class Rows(Protocol):
    """Features by row: a tensor or an array, also memory-mapped."""

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
    bfloat16: bool | None = None,
    train_chunk: int | None = None,
    test_chunk: int | None = None,
) -> tuple[Tensor, Tensor]:
    """The k most similar train images of every test image.

    Args:
        train: (T, D) floating point, l2-normalized inside, chunk by chunk.
        test: (B, D).
        k: 1 to T.
        device: of the computation. None: the CPU.
        by_faiss: search with faiss on the CPU instead of by matrix products, as an independent check.
        bfloat16: find candidates by products in bfloat16, as many as its rounding error requires, and compare
            their cosines in float32; the neighbors are the same. None: where it is faster, which is on a CPU
            that multiplies bfloat16, for few neighbors.
        train_chunk: train images at a time.
        test_chunk: test images at a time.

    Returns:
        cosines (float32) and train image numbers (int64), both (B, k) on the CPU, largest cosine first; ties
        are ordered by number.

    Raises:
        NoDirectionError: a feature is zero or not finite.
    """
    device = torch.device("cpu") if device is None or by_faiss else device
    width, k = train.shape[1], min(k, len(train))
    train_chunk = train_chunk or min(CHUNK_ROWS, max(1, CHUNK_BYTES // (4 * width)))
    test_chunk = test_chunk or max(1, QUERY_BYTES // (4 * width))
    if bfloat16 is None:
        few = min(train_chunk, len(train)) >= MANY * k
        bfloat16 = few and device.type == "cpu" and not by_faiss and multiplies_bfloat16()
    cosines, numbers = torch.empty(len(test), k), torch.empty(len(test), k, dtype=torch.int64)
    for start in range(0, len(test), test_chunk):
        queries = _directions(test, start, start + test_chunk, device, "test")
        nothing = queries.new_full((len(queries), k), -torch.inf)
        best_Bk = _keys(nothing, torch.zeros_like(nothing, dtype=torch.int64))
        for first in range(0, len(train), train_chunk):
            gallery = _directions(train, first, first + train_chunk, device, "train")
            rounded, lost = _rounded(gallery) if bfloat16 else (gallery, 0.0)
            at_once = len(queries) if by_faiss else max(1, SCORES // len(gallery))
            for query in range(0, len(queries), at_once):
                some, best = queries[query : query + at_once], best_Bk[query : query + at_once]
                found: Iterable[tuple[Any, Tensor, Tensor]]
                if by_faiss:
                    found = [(slice(None), *_by_faiss(some, gallery, min(k, len(gallery))))]
                else:
                    found = _found(some, gallery, rounded, lost, best)
                for rows, cosine_BC, number_BC in found:
                    every = torch.cat([best[rows], _keys(cosine_BC, number_BC + first)], dim=1)
                    best[rows] = every.topk(k, dim=1).values
        cosines[start : start + test_chunk], numbers[start : start + test_chunk] = _of_keys(best_Bk)
    return cosines, numbers


def _found(
    queries_BD: Tensor, gallery_TD: Tensor, rounded_TD: Tensor, lost: float, best_Bk: Tensor
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yields rows of queries, and cosines and gallery numbers of their candidates, padded with -inf.

    Candidates are all train images that may be among the k best. The error of the product of two rounded
    vectors is at most the sum of the lengths of their rounding errors (Cauchy-Schwarz; the vectors have
    length 1), plus the errors of two float32 sums of D products. Rounding to bfloat16 is monotonic, so the
    threshold is rounded in the same way as the products.
    """
    k, total, dtype = best_Bk.shape[1], len(gallery_TD), rounded_TD.dtype
    small_BD = queries_BD.to(dtype)
    scores_BT = small_BD @ rounded_TD.T
    if total % GROUP:
        scores_BT = F.pad(scores_BT, (0, -total % GROUP), value=-torch.inf)
    highest_BG = scores_BT.unflatten(1, (GROUP, -1)).amax(dim=1)
    error_B: Tensor | float = 0.0
    if dtype != torch.float32:
        lost_B = torch.linalg.vector_norm(queries_BD - small_BD, dim=1)
        error_B = 1.001 * (lost_B + lost) + (queries_BD.shape[1] + 8) * 2.0**-23
    least_B = (_of_keys(best_Bk[:, -1])[0] - error_B).clamp(min=-2)  # above -inf, the padding
    if highest_BG.shape[1] >= k:  # the k groups of highest maxima have k cosines that are not much lower
        kth_B = highest_BG.topk(k, dim=1, sorted=False).values.amin(dim=1).float()
        rounding = 0.0 if dtype == torch.float32 else torch.finfo(dtype).eps / 2
        least_B = least_B.maximum(kth_B - rounding * kth_B.abs() - 2 * error_B)
    least_B = least_B.to(dtype)
    reached_BG = highest_BG >= least_B[:, None]
    crowded_B = reached_BG.sum(dim=1) > k + total // (2 * COSTLY)
    for rows in crowded_B.nonzero()[:, 0].split(max(1, SCORES // (8 * total))):
        cosine_XT = queries_BD[rows] @ gallery_TD.T if dtype != torch.float32 else scores_BT[rows, :total]
        yield rows, cosine_XT, torch.arange(total, device=rows.device).expand_as(cosine_XT)
    reached_BG &= ~crowded_B[:, None]

    row_X, group_X = reached_BG.nonzero(as_tuple=True)
    steps = torch.arange(GROUP, device=row_X.device) * highest_BG.shape[1]
    column_XG = group_X[:, None] + steps
    score_XG = scores_BT.take(row_X[:, None] * scores_BT.shape[1] + column_XG)
    reached_XG = score_XG >= least_B[row_X, None]
    row_X, column_X = row_X[reached_XG.nonzero()[:, 0]], column_XG[reached_XG]
    count_B = torch.bincount(row_X, minlength=len(queries_BD))
    start_B = F.pad(count_B.cumsum(dim=0), (1, 0))
    if dtype == torch.float32:
        cosine_X = score_XG[reached_XG]
    else:
        cosine_X = _products(start_B, column_X, queries_BD, gallery_TD)
    cosine_BC = cosine_X.new_full((len(queries_BD), int(count_B.max())), -torch.inf)
    number_BC = torch.zeros_like(cosine_BC, dtype=torch.int64)
    place_X = row_X, torch.arange(len(row_X), device=row_X.device) - start_B[row_X]
    cosine_BC[place_X], number_BC[place_X] = cosine_X, column_X
    yield torch.arange(len(queries_BD), device=row_X.device), cosine_BC, number_BC


def _products(start_B: Tensor, column_X: Tensor, left_BD: Tensor, right_TD: Tensor) -> Tensor:
    """Dot products (X,) of each left row i with the right rows column_X[start_B[i] : start_B[i + 1]]."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns that sparse CSR is in beta
        shape = (len(left_BD), len(right_TD))
        pairs = torch.sparse_csr_tensor(start_B, column_X, left_BD.new_zeros(len(column_X)), shape)
        return torch.sparse.sampled_addmm(pairs, left_BD, right_TD.T, beta=0.0).values()


def _rounded(rows: Tensor) -> tuple[Tensor, float]:
    """Rows in bfloat16, and the largest length of a rounding error."""
    small = rows.bfloat16()
    parts = zip(rows.split(64), small.split(64), strict=True)
    return small, max(float(torch.linalg.vector_norm(a - b, dim=1).max()) for a, b in parts)


def _keys(cosines: Tensor, numbers: Tensor) -> Tensor:
    """Integer sort keys: larger for a larger float32 cosine, and for a lower number among equal cosines."""
    bits = (cosines + 0.0).view(torch.int32).long()  # + 0.0 turns -0.0 into 0.0
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)) << 32 | (0xFFFFFFFF - numbers)


def _of_keys(keys: Tensor) -> tuple[Tensor, Tensor]:
    bits = keys >> 32
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).int().view(torch.float32), 0xFFFFFFFF - (keys & 0xFFFFFFFF)


def k_best(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor], k: int) -> tuple[Tensor, Tensor]:
    """The k largest of two sets of (values, numbers), each (B, .), in descending order.

    Equal values stay in the order in which they are given, `one` first.
    """
    values, numbers = (torch.cat(pair, dim=1) for pair in zip(one, other, strict=True))
    order = values.sort(dim=1, descending=True, stable=True).indices[:, :k]
    return values.gather(1, order), numbers.gather(1, order)


def _directions(rows: Rows, start: int, stop: int, device: torch.device, side: str) -> Tensor:
    """Rows in float32, l2-normalized."""
    chunk = torch.as_tensor(rows[start:stop]).to(device).to(torch.float32, copy=True)
    length_B = torch.linalg.vector_norm(chunk, dim=1)
    bad = (~(length_B.isfinite() & (length_B > 0))).nonzero()
    if len(bad):
        kind = "zero" if length_B[int(bad[0])] == 0 else "not finite"
        raise NoDirectionError(side, start + int(bad[0]), kind)
    return chunk.div_(length_B[:, None])


def _by_faiss(queries: Tensor, gallery: Tensor, k: int) -> tuple[Tensor, Tensor]:
    logging.getLogger("faiss.loader").setLevel(logging.WARNING)  # it logs which build it loads
    import faiss

    values, numbers = faiss.knn(queries.numpy(), gallery.numpy(), k, metric=faiss.METRIC_INNER_PRODUCT)
    return torch.from_numpy(values), torch.from_numpy(numbers)

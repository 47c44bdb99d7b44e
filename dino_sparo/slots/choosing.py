"""Choosing parts of an encoding on labelled images: each part alone, one-shot orders and greedy selection.

Nothing here sees the images that accuracy is reported on. The train images are split into a fit part, which
is the gallery and which probes learn from, and a selection part, on which parts are scored.

Axis letters: T fit images, B selection images, P parts, V numbers of a part.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dino_sparo.evaluation.transfer import draw_by_class
from dino_sparo.slots.parts import (
    Moments,
    Picked,
    fit_probe,
    knn_accuracies,
    parts_of,
    probe_accuracies,
    single,
    vote,
)

# Greedy selection tries P (P + 1) / 2 sets of parts, so it looks at no more images than this, drawn by class.
GREEDY_FIT = 5000
GREEDY_SELECT = 1000


@dataclass(frozen=True)
class Split:
    """Numbers of train images, sorted: those to fit on and those to choose on."""

    fit: NDArray[np.int64]
    select: NDArray[np.int64]


@dataclass(frozen=True)
class Chosen:
    """What the selection part says about the parts of an encoding.

    Attributes:
        alone: top-1 of each part alone in per cent, by `knn` and `linear`.
        orders: the parts, best first, by `knn` and `linear` alone and by `greedy` selection.
    """

    alone: dict[str, list[float]]
    orders: dict[str, list[int]]


def draw_share(labels: NDArray[np.int64], fraction: float, seed: int) -> NDArray[np.int64]:
    """Numbers of images, sorted: this share of every class, at least one, but one less than there are.

    A class with a single image gives none.
    """
    count = np.bincount(labels)
    wanted = np.minimum(np.maximum(1, np.rint(fraction * count)), count - 1)
    return draw_by_class(labels, wanted, seed)


def split_by_class(labels: NDArray[np.int64], select_fraction: float, seed: int) -> Split:
    """Train images with labels (n,) as fit and selection part, the share of every class drawn by the seed."""
    select = draw_share(labels, select_fraction, seed)
    return Split(np.setdiff1d(np.arange(len(labels)), select), select)


def choose(
    features: NDArray[Any],
    labels: NDArray[np.int64],
    split: Split,
    fit_moments: Moments,
    *,
    num_parts: int,
    k: int,
    num_classes: int,
    seed: int,
    device: torch.device,
) -> Chosen:
    """Score and order the parts of train features (n, E) with labels (n,).

    Args:
        fit_moments: those of the fit part.
        k: 1 to the number of fit images; greedy selection takes at most the images it looks at.
        seed: of the images that greedy selection looks at, if these are fewer than there are.
    """
    fit, select = Picked(features, split.fit), Picked(features, split.select)
    alone = {
        "knn": knn_accuracies(
            *(fit, labels[split.fit], select, labels[split.select]),
            num_parts=num_parts,
            subsets=single(num_parts),
            k=k,
            num_classes=num_classes,
            device=device,
        ),
        "linear": probe_accuracies(
            [fit_probe(fit_moments, num_parts, [part]) for part in range(num_parts)],
            *(select, labels[split.select]),
            num_parts=num_parts,
            device=device,
        ),
    }
    orders = {way: best_first(scores) for way, scores in alone.items()}
    looked_at = greedy_images(labels, split, seed)
    gallery, queries = (
        parts_of(torch.from_numpy(features[rows]).to(device).float(), num_parts)
        for rows in (looked_at.fit, looked_at.select)
    )
    orders["greedy"] = greedy_order(
        *(gallery, torch.from_numpy(labels[looked_at.fit]).to(device)),
        *(queries, torch.from_numpy(labels[looked_at.select]).to(device)),
        k=min(k, len(looked_at.fit)),
        num_classes=num_classes,
        preferred=orders["knn"],
    )
    return Chosen(alone, orders)


def best_first(scores: Sequence[float]) -> list[int]:
    """Numbers of parts by falling score, of equal ones the lower number first."""
    return sorted(range(len(scores)), key=lambda part: -scores[part])


def greedy_images(labels: NDArray[np.int64], split: Split, seed: int) -> Split:
    """The fit and selection images that greedy selection looks at: all, or a share of every class."""

    def at_most(most: int, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        return rows if len(rows) <= most else rows[draw_share(labels[rows], most / len(rows), seed)]

    return Split(at_most(GREEDY_FIT, split.fit), at_most(GREEDY_SELECT, split.select))


@torch.no_grad()
def greedy_order(
    gallery_TPV: Tensor,
    gallery_labels: Tensor,
    queries_BPV: Tensor,
    query_labels: Tensor,
    *,
    k: int,
    num_classes: int,
    preferred: Sequence[int],
) -> list[int]:
    """Forward selection: the part that is best alone, then always the one that helps the k-NN most.

    Products and squared lengths add up over parts, so a set of parts costs one product of its newest part,
    and only the sums (B, T) of the parts chosen so far are kept.

    Args:
        preferred: all parts; of equally good ones the earlier here is taken.
    """
    left, order = list(preferred), list[int]()
    products_BT = queries_BPV.new_zeros(len(queries_BPV), len(gallery_TPV))
    squares_T, squares_B = products_BT.new_zeros(len(gallery_TPV)), products_BT.new_zeros(len(queries_BPV))

    def with_part(part: int) -> tuple[Tensor, Tensor, Tensor]:
        gallery_TV, queries_BV = gallery_TPV[:, part], queries_BPV[:, part]
        return (
            torch.addmm(products_BT, queries_BV, gallery_TV.T),
            squares_T + gallery_TV.square().sum(dim=1),
            squares_B + queries_BV.square().sum(dim=1),
        )

    while left:
        right = []
        for part in left:
            with_BT, with_T, with_B = with_part(part)
            # The length of a query changes the weight of its votes, not who is near.
            found = with_BT.div_(with_T.sqrt()).topk(k, dim=1)
            voted = vote(found.values / with_B.sqrt()[:, None], gallery_labels[found.indices], num_classes)
            right.append(int((voted == query_labels).sum()))
        best = left.pop(int(np.argmax(right)))
        products_BT, squares_T, squares_B = with_part(best)
        order.append(best)
    return order


def sizes(num_parts: int) -> list[int]:
    """How many parts to keep on a curve: 1, 2, 4, ..., half of them, and all."""
    powers = [2**power for power in range(num_parts.bit_length()) if 2**power < num_parts]
    return sorted({*powers, max(1, num_parts // 2), num_parts})

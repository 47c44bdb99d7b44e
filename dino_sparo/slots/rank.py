"""Each slot alone, and accuracy against the number of slots kept.

Source: SPARO, section 5.1, which keeps the best 32 of 64 slots. The train images are split into a fit part,
which is the gallery and which probes learn from, and a selection part, on which slots are scored and chosen.
Accuracy is reported on val, by k-NN with all train images as the gallery and by a probe that learns from all
of them; nothing is chosen there. The control is an encoding without slots, cut into as many equal parts.

Axis letters: T fit images, B selection images, P parts, V numbers of a part, E = P V numbers of an encoding.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor

from dino_sparo.data.sources import ImageSource
from dino_sparo.errors import UserError
from dino_sparo.evaluation.knn import NoDirectionError
from dino_sparo.evaluation.transfer import draw_by_class
from dino_sparo.files import atomic_write
from dino_sparo.slots.curves import COLORS
from dino_sparo.slots.parts import (
    CutEncoder,
    Picked,
    columns_of,
    fit_probe,
    knn_accuracies,
    labels_of,
    moments,
    probe_accuracies,
    remarks_on_parts,
    vote,
)
from dino_sparo.terminal import aligned_table

WAYS = {"knn": "best alone by k-NN", "linear": "best alone by probe", "greedy": "greedy by k-NN"}
MEASURES = {"knn": "k-NN", "linear": "linear probe"}
SHOWN_PARTS = 8
# Greedy selection tries P (P + 1) / 2 sets of parts, so it looks at no more images than this, drawn by class.
GREEDY_FIT = 5000
GREEDY_SELECT = 1000


class Split(NamedTuple):
    """Numbers of train images, sorted: those to fit on and those to choose on."""

    fit: NDArray[np.int64]
    select: NDArray[np.int64]


def rank_slots(
    encoders: Sequence[CutEncoder],
    train: ImageSource,
    val: ImageSource,
    folder: Path,
    *,
    k: int = 20,
    select_fraction: float = 0.2,
    seed: int = 0,
) -> dict[str, Any]:
    """Rank the slots of the first encoder and the parts of others, and write `curve.png` into the folder.

    Args:
        encoders: one with slots, and controls.
        train, val: labeled by the same classes.
        k: neighbors.
        select_fraction: share of the train images on which parts are scored and chosen.
        seed: of that share.

    Returns:
        plain values: the settings, numbers of images, and `encoders` as `rank_parts` has them.

    Raises:
        UserError: a number does not suit the images, or features are damaged.
    """
    if not 0 < select_fraction < 1:
        raise UserError(
            f"select_fraction is {select_fraction}, expected above 0 and below 1, such as 0.2; both parts of "
            f"the train images need some"
        )
    split = split_by_class(labels_of(train), select_fraction, seed)
    if not len(split.select):
        raise UserError(
            "no class has two train images, so that none is left to choose slots on; give more images"
        )
    if not 1 <= k <= len(split.fit):
        raise UserError(
            f"k is {k}, expected 1 to the {len(split.fit)} train images that are left to fit on; give "
            f"another --k or a smaller --select-fraction"
        )
    folder.mkdir(parents=True, exist_ok=True)
    greedy = greedy_images(labels_of(train), split, seed)
    ranked = []
    for one in encoders:
        of_train, of_val = one.features(train, val)
        try:
            found = rank_parts(
                *(of_train, labels_of(train), of_val, labels_of(val), split, greedy),
                num_parts=one.num_parts,
                k=k,
                num_classes=len(train.classes),
                device=one.device,
            )
        except NoDirectionError as error:
            raise UserError(
                f"{one.run}: a part of the encoding of a {error.side} image is {error.kind}; the weights are "
                f"damaged or have collapsed, or the numbers are too small for float16: give "
                f"--cache-precision float32 or another checkpoint"
            ) from error
        ranked.append({"name": one.name, "run": one.run} | found)
    draw_curve(ranked, folder / "curve.png")
    return {
        "k": k,
        "num_select": len(split.select),
        "num_fit": len(split.fit),
        "num_test": len(val),
        "num_greedy_select": len(greedy.select),
        "num_greedy_fit": len(greedy.fit),
        "remarks": remarks_on_parts(encoders),
        "encoders": ranked,
    }


def split_by_class(labels: NDArray[np.int64], select_fraction: float, seed: int) -> Split:
    """Train images with labels (n,) as fit and selection part, the share of every class drawn by the seed."""
    select = _share_by_class(labels, select_fraction, seed)
    return Split(np.setdiff1d(np.arange(len(labels)), select), select)


def greedy_images(labels: NDArray[np.int64], split: Split, seed: int) -> Split:
    """The fit and selection images that greedy selection looks at: all, or a share of every class."""

    def at_most(most: int, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        return rows if len(rows) <= most else rows[_share_by_class(labels[rows], most / len(rows), seed)]

    return Split(at_most(GREEDY_FIT, split.fit), at_most(GREEDY_SELECT, split.select))


def _share_by_class(labels: NDArray[np.int64], fraction: float, seed: int) -> NDArray[np.int64]:
    """Numbers of images, sorted: this share of every class, at least one, but one less than there are."""
    counts = np.bincount(labels)
    return draw_by_class(labels, np.minimum(np.maximum(1, np.rint(fraction * counts)), counts - 1), seed)


def rank_parts(
    train: NDArray[Any],
    train_labels: NDArray[np.int64],
    test: NDArray[Any],
    test_labels: NDArray[np.int64],
    split: Split,
    greedy: Split,
    *,
    num_parts: int,
    k: int,
    num_classes: int,
    device: torch.device,
) -> dict[str, Any]:
    """Choose parts on the train features (n, E) and report on the test features (B, E), which choose nothing.

    Args:
        split, greedy: of the train images, the latter for greedy selection.
        k: 1 to the number of fit images; greedy selection takes at most the images it looks at.

    Returns:
        plain values: num_parts, part_dim; alone (top-1 on the selection part), orders (best part first), and
        by way of choosing the curve over parts kept and its point at half of them; all. Accuracies are in per
        cent.
    """
    by_knn = partial(knn_accuracies, k=k, num_classes=num_classes, device=device)
    fit, select = (Picked(train, rows) for rows in split)
    fit_labels, select_labels = (train_labels[rows] for rows in split)
    of_fit, of_select = (
        moments(rows, labels, num_classes=num_classes, device=device)
        for rows, labels in ((fit, fit_labels), (select, select_labels))
    )
    width = train.shape[1]
    each = [columns_of(width, num_parts, [part]) for part in range(num_parts)]
    alone = {
        "knn": by_knn(fit, fit_labels, select, select_labels, columns=each),
        "linear": probe_accuracies([fit_probe(of_fit, part) for part in each], select, select_labels),
    }
    # Best first, of equal ones the lower number.
    orders = {way: sorted(range(num_parts), key=lambda part: -scores[part]) for way, scores in alone.items()}
    of_greedy = []
    for rows in greedy:
        features = torch.from_numpy(train[rows]).to(device).float()
        of_greedy += [features.unflatten(1, (num_parts, -1)), torch.from_numpy(train_labels[rows]).to(device)]
    orders["greedy"] = greedy_order(
        *of_greedy, k=min(k, len(greedy.fit)), num_classes=num_classes, preferred=orders["knn"]
    )
    kept = {way: [tuple(sorted(o[:size])) for size in sizes(num_parts)] for way, o in orders.items()}
    subsets = sorted({subset for several in kept.values() for subset in several})
    columns = [columns_of(width, num_parts, subset) for subset in subsets]
    of_train = of_fit.with_others(of_select)
    knn = by_knn(train, train_labels, test, test_labels, columns=columns)
    linear = probe_accuracies([fit_probe(of_train, some) for some in columns], test, test_labels)
    found = {
        subset: {"kept": len(subset), "knn": by_neighbors, "linear": by_regression}
        for subset, by_neighbors, by_regression in zip(subsets, knn, linear, strict=True)
    }
    curve = {way: [found[subset] for subset in several] for way, several in kept.items()}
    half = max(1, num_parts // 2)
    return {
        "num_parts": num_parts,
        "part_dim": width // num_parts,
        "alone": alone,
        "orders": orders,
        "curve": curve,
        "half": {way: next(at for at in points if at["kept"] == half) for way, points in curve.items()},
        "all": {name: curve["knn"][-1][name] for name in MEASURES},
    }


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


def table(result: dict[str, Any]) -> str:
    """What `rank_slots` returns as lines of text, a Markdown table for each encoder."""
    lines = [
        f"{result['num_fit']} train images to fit on, {result['num_select']} to choose slots on, "
        f"{result['num_test']} val images to report on; {result['k']}-NN and a ridge probe, top-1 in per cent"
    ]
    if (result["num_greedy_fit"], result["num_greedy_select"]) != (result["num_fit"], result["num_select"]):
        lines.append(
            f"greedy selection looked at {result['num_greedy_fit']} and {result['num_greedy_select']} of them"
        )
    lines += result["remarks"]
    for one in result["encoders"]:
        lines += ["", f"{one['name']}, {one['num_parts']} parts of {one['part_dim']}: {one['run']}"]
        for way, order in one["orders"].items():
            more = ", ..." if len(order) > SHOWN_PARTS else ""
            lines.append(f"{WAYS[way]}: {', '.join(map(str, order[:SHOWN_PARTS]))}{more}")
        header = ["kept", *(f"{measure}, {WAYS[way]}" for measure in MEASURES.values() for way in WAYS)]
        rows = [
            [str(points[0]["kept"]), *(f"{at[name]:.2f}" for name in MEASURES for at in points)]
            for points in zip(*(one["curve"][way] for way in WAYS), strict=True)
        ]
        lines += ["", aligned_table(header, rows)]
    return "\n".join(lines)


def draw_curve(encoders: Sequence[dict[str, Any]], path: Path) -> None:
    """Write a PNG: accuracy on val against the number of parts kept, k-NN left and linear right."""
    figure = Figure(figsize=(10, 4.6), layout="constrained")
    axes = figure.subplots(1, 2)
    styles = dict(zip(WAYS, ("o-", "s--", "^:"), strict=True))
    for axis, (name, title) in zip(axes, MEASURES.items(), strict=True):
        for number, one in enumerate(encoders):
            for way, points in one["curve"].items():
                axis.plot(
                    [at["kept"] for at in points],
                    [at[name] for at in points],
                    styles[way],
                    color=COLORS[number % len(COLORS)],
                    markersize=4,
                    label=f"{one['name']}, {WAYS[way]}",
                )
        kept = sorted({at["kept"] for one in encoders for at in one["curve"]["knn"]})
        axis.set_xscale("log", base=2)
        axis.set_xticks(kept, [str(size) for size in kept])
        axis.minorticks_off()
        axis.set(title=title, xlabel="parts kept", ylabel="top-1 on val, per cent")
        axis.grid(alpha=0.3)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8)
    with atomic_write(path, durable=False) as file:
        figure.savefig(file, dpi=110, format="png")

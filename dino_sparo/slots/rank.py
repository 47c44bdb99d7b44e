"""Accuracy of each slot alone, and of all slots against the number of slots kept.

Source: SPARO, section 5.1, which keeps the best 32 of 64 slots. The train images are split into a fit part
(the k-NN gallery, and the train images of probes) and a selection part, on which slots are ranked. Accuracy
is reported on val, by k-NN and a probe on all train images; val is not used for selection. The control is an
encoding without slots, split into the same number of equal parts.

Axis letters: n train images, T fit images, B selection or val images, P parts, V dimensions of a part,
E = P V encoding dimensions.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray

from dino_sparo.data.sources import ImageSource
from dino_sparo.errors import TooFewImagesError, UserError
from dino_sparo.evaluation.knn import NoDirectionError
from dino_sparo.evaluation.transfer import draw_by_class
from dino_sparo.files import write_figure
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
)
from dino_sparo.terminal import aligned_table, few

WAYS = {"knn": "best alone by k-NN", "linear": "best alone by probe"}
MEASURES = {"knn": "k-NN", "linear": "linear probe"}
SHOWN_PARTS = 8


class Split(NamedTuple):
    """Sorted numbers of train images: the fit part and the selection part."""

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
    """Rank the slots of the first encoder and the parts of the others, and write `curve.png`.

    Args:
        encoders: one with slots, and controls.
        train, val: labeled images with the same classes.
        folder: of `curve.png`; created if it does not exist.
        k: number of neighbors.
        select_fraction: fraction of the train images in the selection part.
        seed: of the split.

    Returns:
        JSON values: the settings, numbers of images, and the results of `rank_parts` in `encoders`.

    Raises:
        UserError: select_fraction or k does not fit the number of images, or features are damaged.
    """
    if not 0 < select_fraction < 1:
        raise UserError(f"select_fraction is {select_fraction}; expected a number above 0 and below 1")
    split = split_by_class(labels_of(train), select_fraction, seed)
    if not len(split.select):
        raise TooFewImagesError(
            "no class has two train images, so there are no images to select slots on; use more images"
        )
    if not 1 <= k <= len(split.fit):
        raise TooFewImagesError(
            f"k is {k}; expected 1 to {len(split.fit)}, the number of train images in the fit part; use "
            f"another --k or a smaller --select-fraction"
        )
    folder.mkdir(parents=True, exist_ok=True)
    ranked = []
    for one in encoders:
        of_train, of_val = one.features(train, val)
        try:
            found = rank_parts(
                *(of_train, labels_of(train), of_val, labels_of(val), split),
                num_parts=one.num_parts,
                k=k,
                num_classes=len(train.classes),
                device=one.device,
            )
        except NoDirectionError as error:
            raise UserError(
                f"{one.run}: a part of the encoding of a {error.side} image is {error.kind}: the weights are "
                f"damaged, the encoder has collapsed, or the values are too small for float16; set "
                f"--cache-precision to float32, or use another checkpoint"
            ) from error
        ranked.append({"name": one.name, "run": one.run} | found)
    draw_curve(ranked, folder / "curve.png")
    return {
        "k": k,
        "num_select": len(split.select),
        "num_fit": len(split.fit),
        "num_test": len(val),
        "remarks": remarks_on_parts(encoders),
        "encoders": ranked,
    }


def split_by_class(labels: NDArray[np.int64], select_fraction: float, seed: int) -> Split:
    """Split train images with labels (n,) at random, with the same fraction of each class."""
    counts = np.bincount(labels)  # of each class at least one image, and at most all but one
    share = np.minimum(np.maximum(1, np.rint(select_fraction * counts)), counts - 1)
    select = draw_by_class(labels, share, seed)
    return Split(np.setdiff1d(np.arange(len(labels)), select), select)


def rank_parts(
    train: NDArray[Any],
    train_labels: NDArray[np.int64],
    test: NDArray[Any],
    test_labels: NDArray[np.int64],
    split: Split,
    *,
    num_parts: int,
    k: int,
    num_classes: int,
    device: torch.device,
) -> dict[str, Any]:
    """Select parts on the train features (n, E), and report accuracy on the test features (B, E).

    Args:
        split: of the train images.
        k: number of neighbors, at most the number of fit images.

    Returns:
        JSON values, accuracies in percent: num_parts; part_dim; alone, accuracy of each part on the selection
        part; orders, best part first, by method of selection; curve, accuracy by number of parts kept; half,
        the point of the curve with half of the parts; all, accuracy of all parts.
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
    orders = {way: sorted(range(num_parts), key=lambda part: -scores[part]) for way, scores in alone.items()}
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


def sizes(num_parts: int) -> list[int]:
    """Numbers of parts on the curve: powers of two, half of the parts, and all parts."""
    powers = [2**power for power in range(num_parts.bit_length()) if 2**power < num_parts]
    return sorted({*powers, max(1, num_parts // 2), num_parts})


def table(result: dict[str, Any]) -> str:
    """The result of `rank_slots` as text with a Markdown table for each encoder."""
    lines = [
        f"{result['num_fit']} train images to fit, {result['num_select']} to select slots, "
        f"{result['num_test']} val images to evaluate; {result['k']}-NN and a ridge probe, top-1 in %"
    ]
    lines += result["remarks"]
    for one in result["encoders"]:
        lines += ["", f"{one['name']}, {one['num_parts']} parts of {one['part_dim']}: {one['run']}"]
        for way, order in one["orders"].items():
            lines.append(f"{WAYS[way]}: {few(order, SHOWN_PARTS)}")
        header = ["kept", *(f"{measure}, {WAYS[way]}" for measure in MEASURES.values() for way in WAYS)]
        rows = [
            [str(points[0]["kept"]), *(f"{at[name]:.2f}" for name in MEASURES for at in points)]
            for points in zip(*(one["curve"][way] for way in WAYS), strict=True)
        ]
        lines += ["", aligned_table(header, rows)]
    return "\n".join(lines)


def draw_curve(encoders: Sequence[dict[str, Any]], path: Path) -> None:
    """Write a PNG: accuracy on val against the number of parts kept, by k-NN (left) and probe (right)."""
    figure = Figure(figsize=(10, 4.6), layout="constrained")
    axes = figure.subplots(1, 2)
    styles = dict(zip(WAYS, ("o-", "s--"), strict=True))
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
        axis.set(title=title, xlabel="parts kept", ylabel="top-1 on val, %")
        axis.grid(alpha=0.3)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8)
    write_figure(path, figure)

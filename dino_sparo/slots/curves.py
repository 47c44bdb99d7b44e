"""Curves over epochs from metrics.jsonl, and the colors and markers of plots."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, BinaryIO

import numpy as np

from dino_sparo.evaluation.knn import HEADLINE_K, KNN, KNN_IMAGES
from dino_sparo.evaluation.results import standard_error
from dino_sparo.slots.statistics import DEAD_RELATIVE_STD, DUPLICATE_OVERLAP

# Okabe and Ito's palette, suitable for color blindness; the run is always first, its control second.
COLORS = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"
MARKERS = "o", "s", "^", "D", "v", "P", "X"
LEAST_SPAN = 20  # smallest range of the accuracy axis in points, so that noise does not look like a gain
FEW_POINTS = 40  # of a curve, which are marked
ALARM_SHARE = 0.01  # of ln K: the distance of entropies from those of a collapse at which training warns
HEALTHY = {  # log key -> title, and description of healthy values
    "loss": ("DINO loss", "may rise at first, then falls slowly"),
    KNN: (f"{HEADLINE_K}-NN top-1, %", "rises"),
    f"knn{HEADLINE_K}_top5": (f"{HEADLINE_K}-NN top-5, %", "rises"),
    "entropy_teacher": ("entropy of teacher outputs, nats", "above {alarm:.2g}, well below the next"),
    "entropy_mean": ("entropy of their mean, nats", "more than {alarm:.2g} above the previous one"),
    "feature_std": ("standard deviation of encodings", "0.3 to 1; 0: all encodings are equal"),
    "slot_entropy": ("entropy of slot attention, nats", "below {uniform:.2f}, that of uniform attention"),
    "slot_effective_patches": (
        "effective patches of a slot",
        "above 1, well below all {num_patches} patches",
    ),
    "slot_cls_share": ("share of attention on CLS", "small; near 1: slots copy CLS"),
    "slots_dead": ("dead slots", f"0 (dead: spread below {DEAD_RELATIVE_STD} of the median)"),
    "slots_duplicate": ("duplicate slots", f"0 (duplicate: overlap above {DUPLICATE_OVERLAP})"),
    "slot_agreement": ("agreement of student and teacher", "near 1 at the end"),
}


def draw_curve(metrics: Sequence[Mapping[str, Any]], file: BinaryIO) -> None:
    """Write a PNG: loss, and if measured 20-NN accuracy with its standard error, over epochs."""
    from matplotlib.figure import Figure  # slow to import, and training does not need it

    num_test = num_knn_images(metrics)
    curves = {key: points for key in ("loss", KNN) if len(points := points_of(metrics, key))}
    figure = Figure(figsize=(3.6 * len(curves), 3), layout="constrained")
    axes: Any = figure.subplots(1, len(curves), squeeze=False)[0]
    for axis, (key, points) in zip(axes, curves.items(), strict=True):
        title, (epochs, values) = HEALTHY[key][0], points.T
        if key == KNN:
            errors = [standard_error(value, num_test) for value in values] if num_test else None
            axis.errorbar(epochs, values, errors, color=COLORS[0], marker="o", markersize=4, capsize=3)
            low, high = axis.get_ylim()
            wider = max(0.0, LEAST_SPAN - (high - low)) / 2
            axis.set_ylim(low - wider, high + wider)
            title += f" of {num_test} images" if num_test else ""
        else:
            axis.plot(epochs, values, _style(points), color=COLORS[0])
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("epoch")
        axis.grid(alpha=0.3)
    figure.savefig(file, dpi=110, format="png")


def draw_all(
    metrics: Sequence[Mapping[str, Any]], file: BinaryIO, *, num_patches: int, num_prototypes: int | None
) -> None:
    """Write a PNG: the values of `HEALTHY` over epochs, with the last value and healthy ones in the title.

    Args:
        num_patches: of a training image.
        num_prototypes: K. None: not known.
    """
    from matplotlib.figure import Figure  # slow to import, and training does not need it
    from matplotlib.ticker import MaxNLocator

    curves = {key: points for key in HEALTHY if len(points := points_of(metrics, key))}
    rows = -(-len(curves) // 3)
    figure = Figure(figsize=(10, 2.4 * rows), layout="constrained")
    axes = figure.subplots(rows, 3, squeeze=False).flat
    for (key, points), axis in zip(curves.items(), axes, strict=False):
        name, text = HEALTHY[key]
        healthy = text.format(
            alarm=ALARM_SHARE * math.log(num_prototypes or 1),
            uniform=math.log(num_patches + 1),  # with CLS
            num_patches=num_patches,
        )
        axis.plot(*points.T, _style(points), color=COLORS[0])
        one_batch = " (one batch)" if key.startswith("slot") else ""
        axis.set_title(f"{name}: {points[-1, 1]:.4g}{one_batch}\nhealthy: {healthy}", fontsize=8)
        axis.set_xlabel("epoch", fontsize=8)
        if key.startswith("slots_"):  # numbers of slots
            axis.yaxis.set_major_locator(MaxNLocator(integer=True))
            axis.set_ylim(bottom=-0.1, top=max(1.1, axis.get_ylim()[1]))
        axis.grid(alpha=0.3)
    for axis in axes:  # the unused ones
        axis.set_axis_off()
    figure.savefig(file, dpi=110, format="png")


def _style(points: Any) -> str:
    """The line of a curve, with a mark at each of few points."""
    return ".-" if len(points) <= FEW_POINTS else "-"


def num_knn_images(metrics: Sequence[Mapping[str, Any]]) -> int | None:
    """Number of test images of the last k-NN during training; None if it is not in the log."""
    return next((one[KNN_IMAGES] for one in reversed(metrics) if KNN_IMAGES in one), None)


def points_of(metrics: Sequence[Mapping[str, Any]], key: str) -> Any:
    """Epochs and values of a log key, (n, 2)."""
    return np.array([(one["epoch"], one[key]) for one in metrics if key in one])

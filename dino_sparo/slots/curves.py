"""Curves over epochs, from metrics.jsonl, and the colors and marks of series in all plots about a run."""

from collections.abc import Mapping, Sequence
from typing import Any, BinaryIO

import numpy as np
from matplotlib.figure import Figure

from dino_sparo.evaluation.knn import HEADLINE_K, KNN, KNN_IMAGES
from dino_sparo.evaluation.results import standard_error

# Of Okabe and Ito, which everybody can tell apart; the run is always the first, its control the second.
COLORS = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"
MARKERS = "o", "s", "^", "D", "v", "P", "X"
LEAST_SPAN = 20  # points of accuracy on the axis of a curve, so that noise does not look like a rise
HEALTHY = {  # what a number is called, and what is healthy
    "loss": ("DINO loss", "it may rise at first, then falls slowly"),
    KNN: (f"{HEADLINE_K}-NN top-1, %", "rises"),
    f"knn{HEADLINE_K}_top5": (f"{HEADLINE_K}-NN top-5, %", "rises"),
    "entropy_teacher": ("entropy of the teacher's answers, nats", "neither 0 nor as the next"),
    "entropy_mean": ("entropy of their mean, nats", "well above the one before"),
    "feature_std": ("spread of encodings", "near 1; at 0 all images are one"),
    "slot_entropy": ("entropy of a slot's attention, nats", "below that of uniform attention"),
    "slot_effective_patches": ("patches a slot looks at", "more than 1, well below all"),
    "slot_cls_share": ("attention on CLS, share", "a part; near 1 CLS is copied"),
    "slots_dead": ("dead slots", "0"),
    "slots_duplicate": ("slots that look as another", "0"),
    "slot_agreement": ("student and teacher look alike, share", "near 1 at the end"),
}


def draw_curve(metrics: Sequence[Mapping[str, Any]], file: BinaryIO) -> None:
    """Write a PNG: loss, and where it was measured 20-NN accuracy with its standard error, over epochs."""
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
            axis.plot(epochs, values, color=COLORS[0])
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("epoch")
        axis.grid(alpha=0.3)
    figure.savefig(file, dpi=110, format="png")


def draw_all(metrics: Sequence[Mapping[str, Any]], file: BinaryIO) -> None:
    """Write a PNG: every number of health over epochs, with its last value and what is healthy."""
    curves = {key: points for key in HEALTHY if len(points := points_of(metrics, key))}
    rows = -(-len(curves) // 3)
    figure = Figure(figsize=(10, 2.4 * rows), layout="constrained")
    axes = figure.subplots(rows, 3, squeeze=False).flat
    for (key, points), axis in zip(curves.items(), axes, strict=False):
        name, healthy = HEALTHY[key]
        axis.plot(*points.T, ".-" if len(points) <= 40 else "-", color=COLORS[0])
        axis.set_title(f"{name}: {points[-1, 1]:.4g}\nhealthy: {healthy}", fontsize=8.5)
        axis.grid(alpha=0.3)
    for axis in axes:  # those that are left
        axis.set_axis_off()
    figure.savefig(file, dpi=110, format="png")


def num_knn_images(metrics: Sequence[Mapping[str, Any]]) -> int | None:
    """Test images of the last k-NN while training; None without one, or from an older version."""
    return next((one[KNN_IMAGES] for one in reversed(metrics) if KNN_IMAGES in one), None)


def points_of(metrics: Sequence[Mapping[str, Any]], key: str) -> Any:
    """Epochs and values of a number, (n, 2)."""
    return np.array([(one["epoch"], one[key]) for one in metrics if key in one])

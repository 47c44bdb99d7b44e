"""Which slot contains which known factor of generated pictures.

A factor is predicted from a slot by a linear discriminant in closed form. The ridge regression of one-hot
classes that ranks slots is not used here, since it never predicts a class that lies between others, such as
the medium of three sizes or the center of nine positions.

Axis letters: n pictures, E encoding dimensions, S values of a factor.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray

from dino_sparo.data.shapes import FACTORS, MAX_OBJECTS, ShapesSource, draw_factors
from dino_sparo.errors import UserError
from dino_sparo.files import write_figure
from dino_sparo.slots.parts import (
    CutEncoder,
    columns_of,
    fit_discriminant,
    moments,
    probe_accuracies,
)
from dino_sparo.terminal import aligned_table

# Number of values of each factor; the number of objects is one more factor.
NUM_VALUES = {name: len(values) for name, values in FACTORS.items()} | {"count": MAX_OBJECTS}
PICTURES_SEED = 1  # training and its k-NN use only pictures of seed 0
MIN_PICTURES = 200
RIDGES = (0.001, 0.01, 0.1, 1.0)  # added to the variance within classes, which is standardized to 1
HELD_OUT_EVERY = 5  # every fifth train picture is held out to select the ridge


def slot_factors(encoders: Sequence[CutEncoder], folder: Path, *, num_images: int = 2000) -> dict[str, Any]:
    """Evaluate how well each slot predicts each factor of generated pictures, and write `factors.png`.

    Args:
        encoders: one with slots, and controls, of which only the whole encoding is evaluated.
        folder: of `factors.png`; created if it does not exist.
        num_images: number of train pictures, at least 200; there are half as many test pictures.

    Returns:
        JSON values: `factors` (number of values) and `chance` by factor, `num_train`, `num_test`, and for
        each of `encoders` accuracies in percent: `alone`, a row for each slot with all factors, and `whole`
        by factor.

    Raises:
        UserError: there are too few pictures, or the disk cannot hold the features.
    """
    if num_images < MIN_PICTURES:
        raise UserError(
            f"num_images is {num_images}; expected at least {MIN_PICTURES}, which is about 20 for each value "
            f"of a factor"
        )
    folder.mkdir(parents=True, exist_ok=True)
    train, train_values = factor_pictures(0, num_images)
    test, test_values = factor_pictures(num_images, num_images // 2)
    scores = []
    for number, one in enumerate(encoders):
        of_train, of_test = one.features(train, test)
        alone, whole = score_factors(
            *(of_train, train_values, of_test, test_values),
            num_values=NUM_VALUES,
            num_parts=1 if number else one.num_parts,
            device=one.device,
        )
        scores.append({"name": one.name, "run": one.run, "alone": [] if number else alone, "whole": whole})
    draw_factors_matrix(scores, folder / "factors.png")
    return {
        "factors": NUM_VALUES,
        "chance": chance(),
        "encoders": scores,
        "num_train": len(train),
        "num_test": len(test),
    }


def factor_pictures(first: int, count: int) -> tuple[ShapesSource, dict[str, NDArray[np.int64]]]:
    """`count` pictures that are not used in training, and for each factor its values as numbers (n,)."""
    indices = np.arange(first, first + count)
    drawn = [asdict(draw_factors(PICTURES_SEED, int(index))) for index in indices]
    values = {name: np.array([factors[name] for factors in drawn], np.int64) for name in FACTORS}
    values["count"] = np.array([factors["num_objects"] - 1 for factors in drawn], np.int64)
    return ShapesSource.of(PICTURES_SEED, indices, values["color"]), values


def score_factors(
    train: NDArray[Any],
    train_values: Mapping[str, NDArray[np.int64]],
    test: NDArray[Any],
    test_values: Mapping[str, NDArray[np.int64]],
    *,
    num_values: Mapping[str, int],
    num_parts: int,
    device: torch.device,
) -> tuple[list[list[float]], dict[str, float]]:
    """Accuracy in percent of predicting each factor from each part of an encoding, and from the whole.

    Args:
        train, test: encodings (n, E), any precision.
        train_values, test_values: values as numbers (n,) by factor.
        num_values: S by factor.
        num_parts: number of slots, or 1 to evaluate only the whole encoding.

    Returns:
        for each part a row with one accuracy per factor; and the accuracies of the whole encoding by factor.
    """
    subsets = [*([part] for part in range(num_parts)), range(num_parts)]
    columns = [columns_of(train.shape[1], num_parts, subset) for subset in subsets]
    held_out = np.arange(len(train)) % HELD_OUT_EVERY == HELD_OUT_EVERY - 1
    shares = [np.asarray(train[rows]) for rows in (~held_out, held_out)]
    accuracies = []
    for name, number in num_values.items():
        values = [train_values[name][rows] for rows in (~held_out, held_out)]
        fitted_on, chosen_on = (
            moments(rows, of_rows, num_classes=number, device=device)
            for rows, of_rows in zip(shares, values, strict=True)
        )
        by_ridge = []
        for ridge in RIDGES:
            probes = [fit_discriminant(fitted_on, some, ridge) for some in columns]
            by_ridge.append(probe_accuracies(probes, shares[1], values[1]))
        together = fitted_on.with_others(chosen_on)
        probes = [
            fit_discriminant(together, some, RIDGES[best])
            for some, best in zip(columns, np.argmax(by_ridge, axis=0), strict=True)
        ]
        accuracies.append(probe_accuracies(probes, test, test_values[name]))
    *alone, whole = zip(*accuracies, strict=True)
    return [list(row) for row in alone], dict(zip(num_values, whole, strict=True))


def chance() -> dict[str, float]:
    """Accuracy of guessing in percent by factor; all values are equally likely."""
    return {name: 100 / number for name, number in NUM_VALUES.items()}


def draw_factors_matrix(encoders: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Write a PNG: accuracy of each slot (row) for each factor (column), whole encodings below.

    The color is the position between chance and 100 %, so that factors with few and many values compare.
    """
    slots = np.array(encoders[0]["alone"])
    whole = np.array([list(one["whole"].values()) for one in encoders])
    names = ["all slots", *(one["name"] for one in encoders[1:])]
    heights = [len(slots), len(whole)]
    figure = Figure(figsize=(7, 1.4 + 0.26 * sum(heights)), layout="constrained")
    axes = figure.subplots(2, 1, height_ratios=heights)
    guess = np.array(list(chance().values()))
    for axis, accuracies, labels in (
        (axes[0], slots, [f"slot {number}" for number in range(len(slots))]),
        (axes[1], whole, names),
    ):
        above = np.clip((accuracies - guess) / (100 - guess), 0, 1)
        shown = axis.imshow(above, cmap="viridis", vmin=0, vmax=1, aspect="auto")
        for (row, column), value in np.ndenumerate(accuracies):
            color = "black" if above[row, column] > 0.6 else "white"
            axis.text(column, row, f"{value:.0f}", ha="center", va="center", color=color, fontsize=8)
        axis.set_yticks(range(len(labels)), labels, fontsize=8)
        axis.set_xticks([])
        axis.tick_params(length=0)
    axes[0].xaxis.tick_top()
    headings = [f"{name}\n({value:.0f})" for name, value in chance().items()]
    axes[0].set_xticks(range(len(headings)), headings, fontsize=8)
    figure.suptitle("accuracy of each slot alone, % (in parentheses: chance)", fontsize=9)
    bar = figure.colorbar(shown, ax=axes, shrink=0.6)
    bar.set_label("0: chance, 1: accuracy of 100 %", fontsize=8)
    bar.ax.tick_params(labelsize=8)
    write_figure(path, figure)


def table(encoders: Sequence[Mapping[str, Any]]) -> str:
    """A table: for each factor chance, the best slot on the test pictures, and whole encodings."""
    slots = np.array(encoders[0]["alone"])
    rows = []
    for column, (name, guess) in enumerate(chance().items()):
        best = int(slots[:, column].argmax())
        whole = [f"{one['whole'][name]:.1f}" for one in encoders]
        rows.append([name, f"{guess:.1f}", f"{slots[best, column]:.1f} (slot {best})", *whole])
    names = ["all slots", *(one["name"] for one in encoders[1:])]
    return aligned_table(["factor", "chance", "highest of a slot", *names], rows)

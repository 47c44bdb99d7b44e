"""`dino-sparo slots rank`: each slot alone, and accuracy against the number of slots kept.

Source: SPARO, section 5.1, which keeps the best 32 of 64 slots. Slots are scored and chosen on a part of the
train images only. Accuracy is reported on val, by k-NN with all train images as the gallery and by a probe
that learns from all of them. The control is an encoding without slots, cut into as many equal parts.
"""

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray

from dino_sparo.data.sources import open_labelled
from dino_sparo.errors import UserError
from dino_sparo.evaluation.knn import NoDirectionError
from dino_sparo.slots.choosing import Chosen, Split, choose, greedy_images, sizes, split_by_class
from dino_sparo.slots.compared import Compared, encodings, open_compared, remark_on_parts
from dino_sparo.slots.parts import Moments, Picked, fit_probe, knn_accuracies, moments, probe_accuracies
from dino_sparo.slots.program import output_folder, write_json

if TYPE_CHECKING:
    from dino_sparo.options.slots import SlotRankOptions

log = logging.getLogger("dino_sparo")

WAYS = {"knn": "best alone by k-NN", "linear": "best alone by probe", "greedy": "greedy by k-NN"}
MEASURES = {"knn": "k-NN", "linear": "linear probe"}
SHOWN_PARTS = 8


def run(options: "SlotRankOptions") -> None:
    """Rank the slots, write `rank/rank.json` and `rank/curve.png`, and print a table.

    Raises:
        UserError: for a mistake in options or data.
    """
    train, val = open_labelled(options.data.path)
    assert train.labels is not None and val.labels is not None
    if not 0 < options.select_fraction < 1:
        raise UserError(
            f"select_fraction is {options.select_fraction}, expected above 0 and below 1, such as 0.2; "
            f"both parts of the train images need some"
        )
    split = split_by_class(train.labels, options.select_fraction, options.seed)
    if not len(split.select):
        raise UserError(
            f"{options.data.path}: no class has two train images, so that none is left to choose slots on; "
            f"give more images"
        )
    if not 1 <= options.k <= len(split.fit):
        raise UserError(
            f"k is {options.k}, expected 1 to the {len(split.fit)} train images that are left to fit on; "
            f"give another --k or a smaller --select-fraction"
        )
    compared, device = open_compared(options)
    folder = output_folder(options, "rank")
    looked_at = greedy_images(train.labels, split, options.seed)
    result: dict[str, Any] = {
        "which": options.which,
        "data": options.data.path,
        "control": options.control,
        "k": options.k,
        "num_select": len(split.select),
        "num_fit": len(split.fit),
        "num_test": len(val),
        "num_greedy_select": len(looked_at.select),
        "num_greedy_fit": len(looked_at.fit),
        "remarks": list(filter(None, (remark_on_parts(one, compared[0].num_parts) for one in compared))),
        "encoders": [],
    }
    for one in compared:
        of_train, of_val = encodings(one, [train, val], options)
        try:
            result["encoders"].append(
                rank_parts(
                    *(of_train, train.labels, of_val, val.labels, split),
                    num_parts=one.num_parts,
                    k=options.k,
                    num_classes=len(train.classes),
                    seed=options.seed,
                    device=device,
                )
            )
        except NoDirectionError as error:
            raise _without_direction(one, error) from error
        result["encoders"][-1] = {"name": one.name, "run": one.run} | result["encoders"][-1]
    write_json(folder / "rank.json", result)
    draw_curve(result, folder / "curve.png")
    print(table(result))
    log.info("written to %s", folder)


def _without_direction(one: Compared, error: NoDirectionError) -> UserError:
    return UserError(
        f"{one.run}: a part of the encoding of a {error.side} image is {error.kind}; the weights are damaged "
        f"or have collapsed, or the numbers are too small for float16: give --cache-precision float32 or "
        f"another checkpoint"
    )


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
    seed: int,
    device: torch.device,
) -> dict[str, Any]:
    """Choose parts on the train features (n, E) and report on the test features (B, E), which choose nothing.

    Returns:
        plain values: num_parts, part_dim, alone, orders, curve, half and all; accuracies in per cent.
    """
    fit_moments, select_moments = (
        moments(Picked(train, rows), train_labels[rows], num_classes=num_classes, device=device)
        for rows in (split.fit, split.select)
    )
    chosen = choose(
        *(train, train_labels, split, fit_moments),
        num_parts=num_parts,
        k=k,
        num_classes=num_classes,
        seed=seed,
        device=device,
    )
    curve = _curve(
        *(chosen, train, train_labels, test, test_labels, fit_moments + select_moments),
        num_parts=num_parts,
        k=k,
        num_classes=num_classes,
        device=device,
    )
    half = max(1, num_parts // 2)
    return {
        "num_parts": num_parts,
        "part_dim": train.shape[1] // num_parts,
        "alone": chosen.alone,
        "orders": chosen.orders,
        "curve": curve,
        "half": {way: next(at for at in points if at["kept"] == half) for way, points in curve.items()},
        "all": {name: curve["knn"][-1][name] for name in MEASURES},
    }


def _curve(
    chosen: Chosen,
    train: NDArray[Any],
    train_labels: NDArray[np.int64],
    test: NDArray[Any],
    test_labels: NDArray[np.int64],
    train_moments: Moments,
    *,
    num_parts: int,
    k: int,
    num_classes: int,
    device: torch.device,
) -> dict[str, list[dict[str, Any]]]:
    """Accuracy on the test images by way of choosing and number of parts kept, of both measures."""
    kept = {way: [tuple(sorted(o[:size])) for size in sizes(num_parts)] for way, o in chosen.orders.items()}
    subsets = sorted({subset for several in kept.values() for subset in several})
    by_knn = knn_accuracies(
        *(train, train_labels, test, test_labels),
        num_parts=num_parts,
        subsets=subsets,
        k=k,
        num_classes=num_classes,
        device=device,
    )
    by_probe = probe_accuracies(
        [fit_probe(train_moments, num_parts, subset) for subset in subsets],
        *(test, test_labels),
        num_parts=num_parts,
        device=device,
    )
    found = {subset: pair for subset, *pair in zip(subsets, by_knn, by_probe, strict=True)}
    return {
        way: [{"kept": len(s), "knn": found[s][0], "linear": found[s][1]} for s in several]
        for way, several in kept.items()
    }


def table(result: dict[str, Any]) -> str:
    """What `rank.json` holds as lines of text, a Markdown table for each encoder."""
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
        shown = [f"{measure}, {WAYS[way]}" for measure in MEASURES.values() for way in WAYS]
        lines += ["", f"| kept | {' | '.join(shown)} |", "|---" * (1 + len(shown)) + "|"]
        for number, at in enumerate(one["curve"]["knn"]):
            cells = [f"{one['curve'][way][number][name]:.2f}" for name in MEASURES for way in WAYS]
            lines.append(f"| {at['kept']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def draw_curve(result: dict[str, Any], path: Path) -> None:
    """Write a PNG: accuracy on val against the number of parts kept, k-NN left and linear right."""
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    axes = figure.subplots(1, 2)
    styles = dict(zip(WAYS, ("o-", "s--", "^:"), strict=True))
    for axis, (name, title) in zip(axes, MEASURES.items(), strict=True):
        for number, one in enumerate(result["encoders"]):
            for way, points in one["curve"].items():
                axis.plot(
                    [at["kept"] for at in points],
                    [at[name] for at in points],
                    styles[way],
                    color=f"C{number}",
                    markersize=4,
                    label=f"{one['name']}, {WAYS[way]}",
                )
        kept = sorted({at["kept"] for one in result["encoders"] for at in one["curve"]["knn"]})
        axis.set_xscale("log", base=2)
        axis.set_xticks(kept, [str(size) for size in kept])
        axis.minorticks_off()
        axis.set(title=title, xlabel="parts kept", ylabel="top-1 on val, per cent")
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=110)

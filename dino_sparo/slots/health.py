"""Statistics of the slots on a folder of images: attention, dead slots, and duplicate slots."""

from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from dino_sparo.data.images import CenterCrops, normalize
from dino_sparo.data.sources import ImageSource
from dino_sparo.errors import UserError
from dino_sparo.files import write_figure
from dino_sparo.models import Encoder
from dino_sparo.slots.curves import COLORS
from dino_sparo.slots.drawing import load_images
from dino_sparo.slots.statistics import (
    DEAD_RELATIVE_STD,
    DUPLICATE_OVERLAP,
    SlotHealth,
    SlotStatistics,
    look_at_slots,
)
from dino_sparo.terminal import aligned_table, few

WORDS = {  # for the statistics of a slot
    "effective_patches": "effective patches",
    "entropy": "entropy of attention, nats",
    "cls_share": "share of attention on CLS",
    "response_std": "standard deviation over images",
    "overlap": "overlap with the nearest slot",
    "agreement": "agreement of student and teacher",
}
SHOWN_SLOTS = 12  # dead or duplicate slots that are listed in the table
NUM_BINS = 20
HEADER = ("measure", "value", "healthy")


@torch.no_grad()
def measure_health(
    encoder: Encoder,
    source: ImageSource,
    *,
    other: Encoder | None = None,
    batch_size: int = 64,
    num_workers: int | None = 0,
) -> SlotHealth:
    """Statistics of each slot over all images, resized and cropped as in evaluation.

    Args:
        encoder: with slots, in evaluation mode; used on its device.
        other: an encoder of the same kind to compare attention with.
        batch_size: images per forward pass.
        num_workers: processes that load images. None: one per core, at most 16.

    Raises:
        UserError: there is only one image, an image cannot be read, or a loading worker failed.
    """
    if len(source) < 2:
        raise UserError("num_images is 1; expected at least 2, to measure how slots vary over images")
    crops = CenterCrops(source, encoder.image_size)
    pixels = load_images(crops, source, range(len(source)), num_workers)
    statistics = SlotStatistics()
    while batch := list(islice(pixels, batch_size)):
        images = normalize(torch.stack(batch).to(encoder.device))
        other_BLN = None if other is None else look_at_slots(other, images)[0]
        statistics.add(*look_at_slots(encoder, images), other_BLN)
    return statistics.health()


def as_entries(health: SlotHealth) -> list[dict[str, Any]]:
    """A dictionary of JSON values per slot."""
    entries: list[dict[str, Any]] = [{"slot": slot} for slot in range(len(health.entropy))]
    for name, values in vars(health).items():
        for slot, entry in enumerate(entries):
            entry[name] = None if values is None else values[slot].item()
    return entries


def summarize(slots: Sequence[Mapping[str, Any]], num_patches: int) -> dict[str, float | None]:
    """Means over slots, and the numbers of slots, patches, dead slots, and duplicate slots."""
    summary: dict[str, float | None] = {
        "num_slots": len(slots),
        "num_patches": num_patches,
        "num_dead": sum(slot["dead"] for slot in slots),
        "num_duplicate": sum(slot["duplicate"] for slot in slots),
    }
    for name in WORDS:
        values = [slot[name] for slot in slots]
        summary[f"mean_{name}"] = None if None in values else sum(values) / len(values)
    return summary


def table(slots: Sequence[Mapping[str, Any]], summary: Mapping[str, Any]) -> str:
    """The summary as a table with a description of healthy values."""
    return aligned_table(HEADER, summary_rows(slots, summary))


def summary_rows(
    slots: Sequence[Mapping[str, Any]], summary: Mapping[str, Any]
) -> list[tuple[str, str, str]]:
    """The rows of the summary's table: a measure, its value, and a description of healthy values."""

    def listed(name: str) -> str:
        found = [slot["slot"] for slot in slots if slot[name]]
        return f"{len(found)}" + (f" ({few(found, SHOWN_SLOTS)})" if found else "")

    patches = f"{summary['mean_effective_patches']:.1f} of {summary['num_patches']}"
    rows = [
        (WORDS["effective_patches"], patches, "above 1, well below all patches"),
        (
            WORDS["cls_share"],
            f"{100 * summary['mean_cls_share']:.1f} %",
            "small; near 100 %: slots copy CLS",
        ),
        (
            "dead slots",
            listed("dead"),
            f"0 (dead: standard deviation below {DEAD_RELATIVE_STD} of the median)",
        ),
        ("duplicate slots", listed("duplicate"), f"0 (duplicate: overlap above {DUPLICATE_OVERLAP})"),
        (WORDS["overlap"], f"{summary['mean_overlap']:.2f}", "well below 1"),
    ]
    if summary["mean_agreement"] is not None:
        agreement = f"{summary['mean_agreement']:.2f}"
        rows.append((WORDS["agreement"], agreement, "near 1 at the end"))
    return rows


def draw_health(slots: Sequence[Mapping[str, Any]], summary: Mapping[str, Any], path: Path) -> None:
    """Write a PNG: a histogram over slots of each statistic, with thresholds of dead and duplicate slots."""
    figure = Figure(figsize=(10, 5.2), layout="constrained")
    axes = figure.subplots(2, 3)
    patches = summary["num_patches"]
    ranges = {"effective_patches": (1, patches), "entropy": None, "response_std": None}
    for axis, (name, title) in zip(axes.flat, WORDS.items(), strict=True):
        axis.set_title(title + (f", of {patches}" if name == "effective_patches" else ""), fontsize=9)
        axis.tick_params(labelsize=8)
        axis.yaxis.set_major_locator(MaxNLocator(integer=True))
        numbers = [slot[name] for slot in slots if slot[name] is not None]
        if not numbers:
            axis.text(0.5, 0.5, "only one network", ha="center", transform=axis.transAxes, fontsize=8)
            axis.set_axis_off()
            continue
        low, high = ranges.get(name, (0, 1)) or (0.0, 1.1 * max(numbers) or 1.0)
        axis.hist(numbers, bins=NUM_BINS, range=(low, high), color=COLORS[0], edgecolor="white")
        axis.set_xlim(low, high)
    dead_below = DEAD_RELATIVE_STD * median(slot["response_std"] for slot in slots)
    for axis, at, label in (
        (axes[1][0], dead_below, "dead below"),
        (axes[1][1], DUPLICATE_OVERLAP, "duplicate above"),
    ):
        axis.axvline(at, color=COLORS[1], linestyle="--")
        axis.set_xlabel(f"dashed: {label}", fontsize=8)
    figure.supylabel("number of slots", fontsize=9)
    write_figure(path, figure)

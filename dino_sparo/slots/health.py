"""`dino-sparo slots health`: where slots look, and which are dead or duplicates, on a folder of images."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from dino_sparo.data.images import CenterCrops, normalize
from dino_sparo.data.sources import ImageSource, open_images
from dino_sparo.data.workers import WatchedLoader, default_workers
from dino_sparo.errors import UserError
from dino_sparo.interop.export import CONFIG_FILE
from dino_sparo.interop.load import load_encoder
from dino_sparo.models import Encoder
from dino_sparo.parallel.distributed import local_world_size
from dino_sparo.slots.program import open_slots, output_folder, write_json
from dino_sparo.slots.statistics import (
    DEAD_RELATIVE_STD,
    DUPLICATE_OVERLAP,
    SlotHealth,
    SlotStatistics,
    look_at_slots,
)

if TYPE_CHECKING:
    from dino_sparo.options.slots import SlotHealthOptions

SHOWN_SLOTS = 12  # numbers of dead or duplicate slots in the printed table
NUM_BINS = 20


@torch.no_grad()
def measure_health(
    encoder: Encoder,
    source: ImageSource,
    *,
    image_size: int,
    other: Encoder | None = None,
    batch_size: int = 64,
    num_workers: int = 0,
    timeout_seconds: float = 600.0,
) -> SlotHealth:
    """Numbers of every slot over all images of a source, each resized and cropped as in evaluation.

    Args:
        encoder: with slots, in evaluation mode, used on its device.
        other: likewise, an encoder whose attention is compared with it.

    Raises:
        UserError: an image cannot be read, or the workers that load images failed.
    """
    device = encoder.backbone.cls_token.device
    batches = WatchedLoader(
        CenterCrops(source, image_size),
        image_of=int,
        name=source.name,
        num_workers=num_workers,
        timeout_seconds=timeout_seconds,
        batch_sampler=[range(i, min(i + batch_size, len(source))) for i in range(0, len(source), batch_size)],
        pin_memory=device.type == "cuda",
    )
    statistics = SlotStatistics()
    with batches.failures_explained():
        for batch in batches:
            images = normalize(batch.to(device, non_blocking=True))
            other_BLN = None if other is None else look_at_slots(other, images)[0]
            statistics.add(*look_at_slots(encoder, images), other_BLN)
    return statistics.health()


def as_entries(health: SlotHealth) -> list[dict[str, Any]]:
    """One dictionary of plain values a slot."""
    columns = {name: value.tolist() for name, value in vars(health).items() if value is not None}
    if health.agreement is None:
        columns["agreement"] = [None] * len(columns["entropy"])
    return [
        {"slot": number, **dict(zip(columns, values, strict=True))}
        for number, values in enumerate(zip(*columns.values(), strict=True))
    ]


def summarise(slots: Sequence[Mapping[str, Any]], num_patches: int) -> dict[str, float | None]:
    """Means over slots, how many are dead and how many duplicates, and what to compare them with."""

    def mean(name: str) -> float | None:
        values = [slot[name] for slot in slots]
        return None if None in values else sum(values) / len(values)

    names = ("entropy", "effective_patches", "cls_share", "response_std", "overlap", "agreement")
    return {
        "num_slots": len(slots),
        "num_patches": num_patches,
        "num_dead": sum(slot["dead"] for slot in slots),
        "num_duplicate": sum(slot["duplicate"] for slot in slots),
        **{f"mean_{name}": mean(name) for name in names},
    }


def table(slots: Sequence[Mapping[str, Any]], summary: Mapping[str, Any]) -> str:
    """The summary as lines of text, each with what is healthy."""

    def listed(name: str) -> str:
        found = [str(slot["slot"]) for slot in slots if slot[name]]
        more = ", ..." if len(found) > SHOWN_SLOTS else ""
        return f"{len(found)}" + (f" ({', '.join(found[:SHOWN_SLOTS])}{more})" if found else "")

    patches = summary["num_patches"]
    rows = [
        (
            "effective patches",
            f"{summary['mean_effective_patches']:.1f} of {patches}",
            "well below all, above one",
        ),
        ("attention on CLS", f"{100 * summary['mean_cls_share']:.1f} %", "a part; near 100 %: CLS is copied"),
        (
            "dead slots",
            listed("dead"),
            f"0; below {DEAD_RELATIVE_STD} of the middle slot's variation",
        ),
        ("duplicate slots", listed("duplicate"), f"0; above {DUPLICATE_OVERLAP} overlap with another slot"),
        ("overlap with nearest", f"{summary['mean_overlap']:.2f}", "well below 1"),
    ]
    if summary["mean_agreement"] is not None:
        rows.append(("student and teacher", f"{summary['mean_agreement']:.2f} overlap", "near 1 at the end"))
    width = max(len(value) for _, value, _ in rows)
    return "\n".join(f"{name:<22}{value:<{width}}   healthy: {healthy}" for name, value, healthy in rows)


def draw_health(slots: Sequence[Mapping[str, Any]], summary: Mapping[str, Any], path: Path) -> None:
    """Write a PNG: a histogram over slots of each number, with the bounds of dead and duplicate slots."""
    figure = Figure(figsize=(10, 5.2), layout="constrained")
    axes = figure.subplots(2, 3)
    patches = summary["num_patches"]
    panels = (
        ("effective_patches", f"effective patches, of {patches}", (1, patches)),
        ("entropy", "entropy of attention, nats", None),
        ("cls_share", "share of attention on CLS", (0, 1)),
        ("response_std", "variation of the output over images", None),
        ("overlap", "overlap with the nearest other slot", (0, 1)),
        ("agreement", "overlap of student and teacher", (0, 1)),
    )
    for axis, (name, title, bounds) in zip(axes.flat, panels, strict=True):
        _histogram(axis, [slot[name] for slot in slots], title, bounds)
    dead_below = DEAD_RELATIVE_STD * median(slot["response_std"] for slot in slots)
    for axis, at, label in (
        (axes[1][0], dead_below, "dead below"),
        (axes[1][1], DUPLICATE_OVERLAP, "duplicate above"),
    ):
        axis.axvline(at, color="tab:red", linestyle="--", label=label)
        axis.legend(fontsize=8, loc="upper left" if at > 0.5 else "upper right")
    figure.supylabel("slots", fontsize=9)
    figure.savefig(path, dpi=110)


def _histogram(
    axis: Axes, values: Sequence[float | None], title: str, bounds: tuple[float, float] | None
) -> None:
    axis.set_title(title, fontsize=9)
    axis.tick_params(labelsize=8)
    axis.yaxis.set_major_locator(MaxNLocator(integer=True))
    numbers = [value for value in values if value is not None]
    if not numbers:
        axis.text(0.5, 0.5, "one set of weights only", ha="center", transform=axis.transAxes, fontsize=8)
        axis.set_axis_off()
        return
    low, high = bounds or (0.0, 1.1 * max(numbers) or 1.0)
    axis.hist(numbers, bins=NUM_BINS, range=(low, high), color="tab:blue", edgecolor="white")
    axis.set_xlim(low, high)


def _other_weights(run: str, which: str) -> Encoder | None:
    """The student for the teacher and the other way round; None where only one set of weights is stored."""
    path = Path(run)
    if path.suffix == ".safetensors" or (path / CONFIG_FILE).is_file():
        return None
    return load_encoder(run, "student" if which == "teacher" else "teacher")


def run(options: "SlotHealthOptions") -> None:
    """`dino-sparo slots health`: health.json, health.png and a short table.

    Raises:
        UserError: the encoder has no slots, or images are missing or cannot be read.
    """
    if options.num_images < 2:
        raise UserError(
            f"num_images is {options.num_images}, expected at least 2, since slots are dead that do not vary "
            f"over images; give more, such as 1000"
        )
    workers = default_workers(local_world_size()) if options.num_workers is None else options.num_workers
    encoder, device = open_slots(options)
    other = _other_weights(options.run, options.which)
    source = open_images(options.data.path, options.num_images)
    grid = encoder.backbone.native_grid
    health = measure_health(
        encoder,
        source,
        image_size=grid * encoder.backbone.patch_size,
        other=None if other is None else other.to(device),
        batch_size=options.batch_size,
        num_workers=workers,
    )
    slots = as_entries(health)
    summary = summarise(slots, grid**2)
    folder = output_folder(options, "health")
    draw_health(slots, summary, folder / "health.png")
    content = {"data": options.data.path, "run": options.run, "which": options.which}
    write_json(
        folder / "health.json", content | {"num_images": len(source), "slots": slots, "summary": summary}
    )
    print(f"{options.run} ({options.which}), {len(source)} images, {len(slots)} slots")
    print(table(slots, summary))
    print(f"{folder / 'health.json'}, {folder / 'health.png'}")

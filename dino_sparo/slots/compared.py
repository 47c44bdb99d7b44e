"""The encoders that a command about slots compares: the run, and a control whose encoding is cut alike."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from numpy.typing import NDArray

from dino_sparo.data.sources import ImageSource
from dino_sparo.data.workers import default_workers
from dino_sparo.errors import UserError
from dino_sparo.evaluation.features import Wanted, cached_features
from dino_sparo.evaluation.results import results_folder
from dino_sparo.interop.load import load_encoder
from dino_sparo.models import Encoder
from dino_sparo.slots.program import open_slots

if TYPE_CHECKING:
    from dino_sparo.options.slots import SlotFactorsOptions, SlotMaskOptions, SlotRankOptions

    ComparingOptions = SlotFactorsOptions | SlotMaskOptions | SlotRankOptions

CONTROL = "control"


@dataclass(frozen=True)
class Compared:
    """An encoder, in evaluation mode on the device, and how its encoding is cut."""

    name: str
    """Its read-out; for the control `control (<read-out>)`."""
    run: str
    """Run folder or weights file."""
    encoder: Encoder
    num_parts: int
    """Slots, or equal parts of an encoding without slots."""

    @property
    def part_dim(self) -> int:
        """Numbers of a part."""
        return self.encoder.embed_dim // self.num_parts


def open_compared(options: "ComparingOptions") -> tuple[list[Compared], torch.device]:
    """The run, then the control if one is given, and the device.

    Raises:
        UserError: the run has no slots, or weights or device cannot be had.
    """
    encoder, device = open_slots(options)
    assert encoder.readout is not None
    num_slots = encoder.readout.num_slots
    compared = [Compared(encoder.readout_name, options.run, encoder, num_slots)]
    if options.control:
        control = open_control(options.control, options.which).to(device)
        num_parts = most_parts(control.embed_dim, num_slots)
        compared.append(Compared(f"{CONTROL} ({control.readout_name})", options.control, control, num_parts))
    return compared, device


def open_control(run: str, which: str) -> Encoder:
    """The encoder of a run without slots, in evaluation mode, on the CPU.

    Raises:
        UserError: it has slots, or the weights cannot be had.
    """
    control = load_encoder(run, which)
    if control.num_slots:
        raise UserError(
            f"control {run!r} has slots (read-out {control.readout_name}), expected a run without; give one "
            f"whose model.readout.name is cls or gap"
        )
    return control


def most_parts(width: int, num_slots: int) -> int:
    """The largest number of equal parts of an encoding (width,) that is at most the number of slots."""
    return next(parts for parts in range(min(width, num_slots), 0, -1) if width % parts == 0)


def remark_on_parts(one: Compared, num_slots: int) -> str:
    """A sentence for an encoding that cannot be cut into as many parts as there are slots; else empty."""
    if one.num_parts == num_slots:
        return ""
    return (
        f"{one.name}: {one.encoder.embed_dim} numbers cannot be cut into {num_slots} equal parts, so it has "
        f"{one.num_parts}, the most that are possible"
    )


def encodings(
    one: Compared, sources: Sequence[ImageSource], options: "ComparingOptions"
) -> list[NDArray[Any]]:
    """Encodings of images (n, E) by source, from the cache or by one pass, mapped from files.

    Raises:
        UserError: an image cannot be read, or the disk cannot hold the features.
    """
    backbone = one.encoder.backbone
    workers = default_workers(1) if options.num_workers is None else options.num_workers
    found = cached_features(
        one.encoder,
        [Wanted(source, f"{one.name} features", options.cache_precision) for source in sources],
        ["encoding"],
        image_size=backbone.native_grid * backbone.patch_size,
        cache=Path(options.cache or results_folder(one.run) / "features"),
        batch_size=options.batch_size,
        num_workers=workers,
    )
    return [features["encoding"] for features in found]

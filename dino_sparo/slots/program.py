"""What programs about slots share: the encoder, chosen images, the folder for results, the JSON."""

import json
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from dino_sparo.data.images import normalize
from dino_sparo.data.sources import ImageSource
from dino_sparo.data.workers import WatchedLoader, default_workers
from dino_sparo.errors import UserError
from dino_sparo.evaluation.results import results_folder
from dino_sparo.files import write_file
from dino_sparo.interop.load import load_encoder
from dino_sparo.models import Encoder
from dino_sparo.parallel.device import choose_device
from dino_sparo.parallel.distributed import local_rank

if TYPE_CHECKING:
    from dino_sparo.options.slots import SlotsOptions

TIMEOUT_SECONDS = 600.0  # for one image to come


def open_slots(options: "SlotsOptions") -> tuple[Encoder, torch.device]:
    """The encoder of `options.run` in evaluation mode, on the device, and the device.

    Raises:
        UserError: its read-out has no slots, or the weights or the device cannot be had.
    """
    device = choose_device(options.device, local_rank())
    encoder = load_encoder(options.run, options.which)
    if not encoder.num_slots:
        raise UserError(
            f"{options.run} has no slots (read-out {encoder.readout_name}), expected one with slots; "
            f"give a run whose recipe has model.readout.name sparo"
        )
    return encoder.to(device), device


def slots_folder(options: "SlotsOptions") -> Path:
    """Where all commands about slots write: `out`, or `slots` among the results of the run."""
    return Path(options.out) if options.out else results_folder(options.run) / "slots"


def output_folder(options: "SlotsOptions", name: str) -> Path:
    """The folder for what the command `name` writes, made if need be. Raises OSError."""
    folder = slots_folder(options) / name
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def check_slots(numbers: Sequence[int], num_slots: int) -> None:
    """Raises UserError unless these are different slots of an encoder that has `num_slots`."""
    check_numbers(numbers, num_slots, "slots", "the encoder's slots")


def check_numbers(numbers: Sequence[int], count: int, key: str, what: str) -> None:
    """Raises UserError unless these are different numbers below `count`; `key` is the option, of `what`."""
    for number in numbers:
        if not 0 <= number < count:
            raise UserError(
                f"{key} has {number}, expected numbers from 0 to {count - 1}, {what}; leave {number} out"
            )
        if list(numbers).count(number) > 1:
            raise UserError(f"{key} has {number} more than once, expected different numbers; give it once")


def load_images(
    dataset: Dataset, source: ImageSource, numbers: Sequence[int], num_workers: int | None
) -> Iterator[Tensor]:
    """The pixels, uint8 (3, height, width), that a dataset over `source` gives for these images, in order.

    Raises:
        UserError: an image cannot be read, or is none that the dataset takes.
    """
    workers = default_workers() if num_workers is None else num_workers
    loader = WatchedLoader(
        dataset,
        image_of=int,
        name=source.name,
        num_workers=min(workers, len(numbers)),
        timeout_seconds=TIMEOUT_SECONDS,
        batch_size=None,
        sampler=numbers,
    )
    with loader.failures_explained():
        yield from loader


def attention_of_each(
    attention: Callable[[Tensor], Tensor], images: Sequence[Tensor], batch_size: int, device: torch.device
) -> list[Tensor]:
    """Attention over each of some images, (x, rows, columns) on the CPU; neighbours of one size share a pass.

    attention: normalised images (B, 3, height, width) on the device -> (B, x, rows, columns).
    images: uint8 (3, height, width).
    """
    maps: list[Tensor] = []
    for _, alike in groupby(images, key=lambda image: image.shape):
        for pixels in torch.stack(list(alike)).split(batch_size):
            maps += attention(normalize(pixels.to(device))).cpu()
    return maps


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a whole file of JSON. Raises OSError."""
    write_file(path, json.dumps(content, indent=1, allow_nan=False) + "\n")

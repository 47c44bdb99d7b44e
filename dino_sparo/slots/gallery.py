"""`dino-sparo slots gallery`: the images that each slot responds to most, and their neighbours within it.

Axis letters: n images at a time, E numbers of an encoding, L slots, V slot width, T images shown of a slot.
"""

from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dino_sparo.data.images import CenterCrops
from dino_sparo.data.sources import ImageSource, open_images
from dino_sparo.data.workers import default_workers
from dino_sparo.evaluation.features import Wanted, cached_features
from dino_sparo.evaluation.knn import Rows
from dino_sparo.evaluation.results import results_folder
from dino_sparo.slots.attention import slot_attention
from dino_sparo.slots.drawing import draw_grid, overlay, peaks_of, remove_other_pictures, share
from dino_sparo.slots.program import (
    attention_of_each,
    check_slots,
    load_images,
    open_slots,
    output_folder,
    write_json,
)

if TYPE_CHECKING:
    from dino_sparo.options import SlotGalleryOptions

CHUNK_BYTES = 2**27  # of float32 features at a time: it changes memory, not the result
TITLE_LETTERS = 18  # of a class name above a picture


class Responses(NamedTuple):
    """What each slot responds to most."""

    means: Tensor
    """Mean vector of each slot over all images, (L, V)."""
    images: Tensor
    """Numbers of the images with the largest responses, (L, T), largest first."""
    responses: Tensor
    """Their responses, (L, T)."""


def strongest(
    features: Rows, num_slots: int, count: int, *, device: torch.device, chunk: int | None = None
) -> Responses:
    """The `count` images to which each slot responds most, of encodings (num_images, E).

    A slot's response to an image is the length of its vector less the mean over all images, divided by the
    root mean square of these lengths: 1 is usual. The mean is taken off since it is often the longest part
    and says nothing about the image; one divisor for the slot, rather than one for each number, keeps the
    slot's own geometry, in which neighbours are compared too, and numbers that hardly vary stay small. A
    slot that is the same for all images responds with 0. Reads the features twice, in chunks of rows.
    """
    chunk = chunk or max(1, CHUNK_BYTES // (4 * features.shape[1]))
    width = features.shape[1] // num_slots
    means_LV = torch.zeros(num_slots, width, dtype=torch.float64, device=device)
    for _, x_nLV in _chunks(features, num_slots, chunk, device):
        means_LV += x_nLV.double().sum(dim=0) / len(features)
    squares_L = torch.zeros(num_slots, dtype=torch.float64, device=device)
    best = (
        torch.empty(num_slots, 0, dtype=torch.float64, device=device),
        torch.empty(num_slots, 0, dtype=torch.int64, device=device),
    )
    for start, x_nLV in _chunks(features, num_slots, chunk, device):
        lengths_Ln = (x_nLV - means_LV).norm(dim=2).T
        squares_L += lengths_Ln.square().sum(dim=1)
        best = _merge(best, lengths_Ln, start, count)
    rms_L1 = (squares_L / len(features)).sqrt()[:, None]
    # Below the rounding of a mean of equal vectors there is no response.
    alive_L1 = rms_L1 > 1e-9 * means_LV.norm(dim=1, keepdim=True)
    responses_LT = torch.where(alive_L1, best[0] / rms_L1.clamp_min(1e-300), 0.0)
    return Responses(means_LV, best[1], responses_LT)


def neighbours(
    features: Rows, found: Responses, count: int, *, device: torch.device, chunk: int | None = None
) -> tuple[Tensor, Tensor]:
    """The `count` other images nearest to each of the strongest, by the cosine of slot vectors less the mean.

    Reads the features once for all slots, in chunks of rows. A vector equal to the mean has cosine 0.

    Returns:
        cosines and image numbers, both (L, T, count), nearest first.
    """
    num_slots, shown = found.images.shape
    chunk = chunk or max(1, CHUNK_BYTES // (4 * features.shape[1]))
    width = found.means.shape[1]
    queries_LTV = torch.empty(num_slots, shown, width, dtype=torch.float64, device=device)
    for slot in range(num_slots):
        for place, image in enumerate(found.images[slot].tolist()):
            row = torch.as_tensor(features[image : image + 1][0]).to(device).double().view(num_slots, width)
            queries_LTV[slot, place] = row[slot] - found.means[slot]
    queries_LTV = F.normalize(queries_LTV, dim=2).float()
    own_X1 = found.images.reshape(-1, 1)  # X = L * T
    best = queries_LTV.new_empty(len(own_X1), 0), own_X1.new_empty(len(own_X1), 0)
    for start, x_nLV in _chunks(features, num_slots, chunk, device):
        gallery_nLV = F.normalize(x_nLV - found.means, dim=2).float()
        cosine_Xn = torch.einsum("ltv,nlv->ltn", queries_LTV, gallery_nLV).flatten(0, 1)
        numbers_n = torch.arange(start, start + len(x_nLV), device=device)
        best = _merge(best, cosine_Xn.masked_fill(numbers_n == own_X1, -torch.inf), start, count)
    return best[0].unflatten(0, (num_slots, shown)), best[1].unflatten(0, (num_slots, shown))


def _chunks(features: Rows, num_slots: int, chunk: int, device: torch.device) -> Iterator[tuple[int, Tensor]]:
    """Where each chunk of rows begins, and its float32 slots (n, L, V)."""
    for start in range(0, len(features), chunk):
        rows = torch.as_tensor(features[start : start + chunk]).to(device).float()
        yield start, rows.unflatten(1, (num_slots, -1))


def _merge(best: tuple[Tensor, Tensor], values_xn: Tensor, start: int, count: int) -> tuple[Tensor, Tensor]:
    """The `count` largest of those so far and of new ones numbered from `start`, of equal ones the first."""
    numbers_xn = torch.arange(start, start + values_xn.shape[1], device=values_xn.device).expand_as(values_xn)
    values = torch.cat((best[0], values_xn), dim=1)
    order = values.sort(dim=1, descending=True, stable=True).indices[:, :count]
    return values.gather(1, order), torch.cat((best[1], numbers_xn), dim=1).gather(1, order)


def run(options: "SlotGalleryOptions") -> None:
    """Write gallery.json and for each slot a picture into `<out>/gallery`."""
    encoder, device = open_slots(options)
    num_slots = encoder.num_slots
    if options.slots is not None:
        check_slots(options.slots, num_slots)
    slots = options.slots or list(range(num_slots))
    source = open_images(options.data.path)
    image_size = encoder.backbone.native_grid * encoder.backbone.patch_size
    wanted = Wanted(source, "features", options.cache_precision)
    cache = Path(options.cache or results_folder(options.run) / "features")
    workers = default_workers() if options.num_workers is None else options.num_workers
    features = cached_features(
        *(encoder, [wanted], ["encoding"]),
        image_size=image_size,
        cache=cache,
        batch_size=options.batch_size,
        num_workers=workers,
    )[0]["encoding"]
    found = strongest(features, num_slots, min(options.num_images, len(source)), device=device)
    count = min(options.num_neighbours, len(source) - 1)
    cosines, near = neighbours(features, found, count, device=device)
    folder = output_folder(options, "gallery")
    shown = torch.cat((found.images[:, :, None], near), dim=2).cpu()  # (L, T, 1 + neighbours)
    crops = CenterCrops(source, image_size)
    pixels = load_images(crops, source, shown[slots].flatten().tolist(), options.num_workers)
    entries: list[dict[str, Any]] = []
    for slot in slots:
        images = list(islice(pixels, shown[slot].numel()))
        maps = attention_of_each(
            lambda x, slot=slot: slot_attention(encoder, x)[0][:, slot : slot + 1],  # type: ignore[misc]
            *(images, options.batch_size, device),
        )
        picture = f"slot{slot:02d}.png"
        strength, cosine = found.responses[slot].tolist(), cosines[slot].tolist()
        numbers = shown[slot].tolist()
        _draw(folder / picture, slot, images, maps, source, numbers, strength, cosine)
        entries.append({"slot": slot, "picture": picture, "top": _top(source, numbers, strength, cosine)})
    content = {"run": options.run, "which": options.which, "data": options.data.path, "slots": entries}
    write_json(folder / "gallery.json", content)
    remove_other_pictures(folder, "slot*.png", {entry["picture"] for entry in entries})
    print(f"{len(slots)} slots over {len(source)} images: {folder}")


def _top(
    source: ImageSource, numbers: list[list[int]], strength: list[float], cosine: list[list[float]]
) -> list[dict[str, Any]]:
    """The entries of gallery.json about one slot's strongest images."""
    return [
        {
            "image": source.name(of_row[0]),
            "response": response,
            "neighbours": [
                {"image": source.name(number), "cosine": near}
                for number, near in zip(of_row[1:], cosines, strict=True)
            ],
        }
        for of_row, response, cosines in zip(numbers, strength, cosine, strict=True)
    ]


def _draw(
    path: Path,
    slot: int,
    images: Sequence[Tensor],
    maps: Sequence[Tensor],
    source: ImageSource,
    numbers: list[list[int]],
    strength: list[float],
    cosine: list[list[float]],
) -> None:
    """One column for each of the strongest images: it on top, its neighbours below, the map on each."""
    peak = peaks_of(maps)[0]
    drawn = iter([overlay(image, one[0], peak) for image, one in zip(images, maps, strict=True)])
    columns = [list(islice(drawn, len(of_column))) for of_column in numbers]
    titles = [
        [
            f"{what}\n{_class_of(source, number)}".rstrip()
            for what, number in zip(
                (f"response {first:.2f}", *(f"cosine {near:.3f}" for near in others)), of_column, strict=True
            )
        ]
        for first, others, of_column in zip(strength, cosine, numbers, strict=True)
    ]
    heading = (
        f"slot {slot}\n"
        "top: the images it responds to most (1 is usual)\n"
        "below each: its nearest neighbours within the slot\n"
        f"colour: where the slot looks, brightest at {share(peak)} of its attention on one patch"
    )
    draw_grid(list(zip(*columns, strict=True)), list(zip(*titles, strict=True)), path, heading)


def _class_of(source: ImageSource, number: int) -> str:
    if source.labels is None:
        return ""
    return source.classes[source.labels[number]][:TITLE_LETTERS]

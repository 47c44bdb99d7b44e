"""The images that each slot responds to most, and their neighbors within it.

Axis letters: n images at a time, E numbers of an encoding, L slots, V slot width, T images shown of a slot.
"""

from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from dino_sparo.data.sources import ImageSource
from dino_sparo.evaluation.search import Rows, k_best
from dino_sparo.slots.attention import slot_attention
from dino_sparo.slots.drawing import (
    Picture,
    SeenImages,
    as_picture,
    attention_of_each,
    beside,
    check_numbers,
    draw_attention,
    draw_grid,
    file_name,
    load_images,
    remove_other_pictures,
)
from dino_sparo.slots.parts import CutEncoder, chunks

TITLE_LETTERS = 14  # of a class name above a picture
PAIR_INCHES = 2.6  # width of an image and the map on it


def slot_gallery(
    one: CutEncoder,
    source: ImageSource,
    folder: Path,
    *,
    slots: Sequence[int] | None = None,
    num_images: int = 6,
    num_neighbors: int = 4,
) -> list[dict[str, Any]]:
    """Write a picture for each slot into the folder, `slot<number>.png`; others of this name go.

    Args:
        one: an encoder with slots.
        slots: numbers of slots; None takes all.

    Returns:
        plain values for each slot: its number, its picture's file, and the images on it.

    Raises:
        UserError: a number is not that of a slot, or an image cannot be read.
    """
    encoder, device, num_slots = one.encoder, one.device, one.num_parts
    chosen = list(range(num_slots)) if slots is None else list(slots)
    check_numbers("slots", chosen, num_slots)
    features = one.features(source)[0]
    found = strongest(features, num_slots, min(num_images, len(source)), device=device)
    cosines, near = neighbors(features, found, min(num_neighbors, len(source) - 1), device=device)
    shown = torch.cat((found.images[:, :, None], near), dim=2).cpu()  # (L, T, 1 + neighbors)
    crops = SeenImages(source, encoder.backbone.patch_size, encoder.image_size)
    loaded = load_images(crops, source, shown[chosen].flatten().tolist(), one.num_workers)
    folder.mkdir(parents=True, exist_ok=True)
    entries: list[dict[str, Any]] = []
    for slot in chosen:
        images = list(islice(loaded, shown[slot].numel()))
        maps = attention_of_each(
            lambda x, slot=slot: slot_attention(encoder, x)[0][:, slot : slot + 1],  # type: ignore[misc]
            *([image.pixels for image in images], one.batch_size, device),
        )
        top = [
            {
                "image": source.name(number),
                "response": response,
                "neighbours": [
                    {"image": source.name(other), "cosine": cosine}
                    for other, cosine in zip(others, similar, strict=True)
                ],
            }
            for (number, *others), response, similar in zip(
                shown[slot].tolist(), found.responses[slot].tolist(), cosines[slot].tolist(), strict=True
            )
        ]
        entries.append({"slot": slot, "picture": f"slot{slot:02d}.png", "top": top})
        pairs = [
            beside(as_picture(image.picture), draw_attention(image.picture, of_image[0]))
            for image, of_image in zip(images, maps, strict=True)
        ]
        classes = [[_class_of(source, number) for number in row] for row in shown[slot].tolist()]
        _draw(folder, entries[-1], pairs, classes)
    remove_other_pictures(folder, "slot*.png", {entry["picture"] for entry in entries})
    return entries


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
    slot's own geometry, in which neighbors are compared too, and numbers that hardly vary stay small. A
    slot that is the same for all images responds with 0.
    """
    means_LV = torch.zeros(num_slots, features.shape[1] // num_slots, dtype=torch.float64, device=device)
    for _, rows in chunks(features, device, chunk):
        means_LV += rows.unflatten(1, (num_slots, -1)).double().sum(dim=0) / len(features)
    squares_L = torch.zeros(num_slots, dtype=torch.float64, device=device)
    best = squares_L.new_empty(num_slots, 0), squares_L.new_empty(num_slots, 0, dtype=torch.int64)
    for start, rows in chunks(features, device, chunk):
        lengths_Ln = (rows.unflatten(1, (num_slots, -1)) - means_LV).norm(dim=2).T
        squares_L += lengths_Ln.square().sum(dim=1)
        numbers_n = torch.arange(start, start + len(rows), device=device)
        best = k_best(best, (lengths_Ln, numbers_n.expand_as(lengths_Ln)), count)
    rms_L1 = (squares_L / len(features)).sqrt()[:, None]
    # Below the rounding of a mean of equal vectors there is no response.
    alive_L1 = rms_L1 > 1e-9 * means_LV.norm(dim=1, keepdim=True)
    responses_LT = torch.where(alive_L1, best[0] / rms_L1.clamp_min(1e-300), 0.0)
    return Responses(means_LV, best[1], responses_LT)


def neighbors(
    features: NDArray[Any], found: Responses, count: int, *, device: torch.device, chunk: int | None = None
) -> tuple[Tensor, Tensor]:
    """The `count` other images nearest to each of the strongest, by the cosine of slot vectors less the mean.

    A vector equal to the mean has cosine 0.

    Returns:
        cosines and image numbers, both (L, T, count), nearest first.
    """
    num_slots, shown = found.images.shape
    width = found.means.shape[1]
    slots = torch.arange(num_slots)
    rows = torch.as_tensor(features[found.images.flatten().cpu().numpy()]).to(device).double()
    queries_LTV = rows.view(num_slots, shown, num_slots, width)[slots, :, slots] - found.means[:, None]
    queries_LTV = F.normalize(queries_LTV, dim=2).float()
    own_X1 = found.images.reshape(-1, 1)  # X = L * T
    best = queries_LTV.new_empty(len(own_X1), 0), own_X1.new_empty(len(own_X1), 0)
    for start, rows in chunks(features, device, chunk):
        gallery_nLV = F.normalize(rows.unflatten(1, (num_slots, -1)) - found.means, dim=2).float()
        cosine_Xn = torch.einsum("ltv,nlv->ltn", queries_LTV, gallery_nLV).flatten(0, 1)
        numbers_n = torch.arange(start, start + len(rows), device=device)
        cosine_Xn = cosine_Xn.masked_fill(numbers_n == own_X1, -torch.inf)
        best = k_best(best, (cosine_Xn, numbers_n.expand_as(cosine_Xn)), count)
    return best[0].unflatten(0, (num_slots, shown)), best[1].unflatten(0, (num_slots, shown))


def _draw(folder: Path, entry: dict[str, Any], pairs: list[Picture], classes: list[list[str]]) -> None:
    """One row for each of the strongest images: it first, then its neighbors, each beside the map on it."""
    titles = []
    for top, row in zip(entry["top"], classes, strict=True):
        names = [file_name(one["image"], PAIR_INCHES) for one in (top, *top["neighbours"])]
        values = [f"response {top['response']:.2f}"]
        values += [f"cosine {near['cosine']:.3f}" for near in top["neighbours"]]
        told = [", ".join(filter(None, pair)) for pair in zip(values, row, strict=True)]
        titles.append([f"{name}\n{text}" for name, text in zip(names, told, strict=True)])
    columns = len(titles[0])
    heading = (
        f"Slot {entry['slot']}: each row is one of the images to which it responds most (1 is usual), "
        "and its nearest neighbors within the slot"
    )
    rows = [pairs[start : start + columns] for start in range(0, len(pairs), columns)]
    draw_grid(rows, titles, folder / entry["picture"], heading, inches=PAIR_INCHES)


def _class_of(source: ImageSource, number: int) -> str:
    return "" if source.labels is None else source.classes[source.labels[number]][:TITLE_LETTERS]

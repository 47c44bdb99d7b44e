"""The images to which each slot responds most, and their nearest neighbors in this slot.

Axis letters: n images of a chunk, E encoding dimensions, L slots, V slot width, T images shown per slot.
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
    as_picture,
    attention_of_each,
    beside,
    check_numbers,
    draw_attention,
    draw_grid,
    file_name,
    load_seen,
    remove_other_pictures,
)
from dino_sparo.slots.parts import CutEncoder, chunks

TITLE_LETTERS = 14  # shown characters of a class name
PAIR_INCHES = 2.6  # width of an image together with its attention map


def slot_gallery(
    one: CutEncoder,
    source: ImageSource,
    folder: Path,
    *,
    slots: Sequence[int] | None = None,
    num_images: int = 6,
    num_neighbors: int = 4,
) -> list[dict[str, Any]]:
    """Write a picture for each slot, `slot<number>.png`; pictures of an earlier call are removed.

    Args:
        one: an encoder with slots.
        folder: of the pictures; created if it does not exist.
        slots: numbers of slots. None: all.
        num_images: images per slot, the ones with the largest responses.
        num_neighbors: nearest neighbors per image.

    Returns:
        JSON values for each slot: its number, the file name of its picture, and the images on it.

    Raises:
        UserError: a slot number is out of range, or an image cannot be read.
    """
    encoder, device, num_slots = one.encoder, one.device, one.num_parts
    chosen = list(range(num_slots)) if slots is None else list(slots)
    check_numbers("slots", chosen, num_slots)
    features = one.features(source)[0]
    found = strongest(features, num_slots, min(num_images, len(source)), device=device)
    cosines, near = neighbors(features, found, min(num_neighbors, len(source) - 1), device=device)
    shown = torch.cat((found.images[:, :, None], near), dim=2).cpu()  # (L, T, 1 + neighbors)
    loaded = load_seen(encoder, source, shown[chosen].flatten().tolist(), one.num_workers)
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
                "neighbors": [
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
        classes = [[class_of(source, number) for number in row] for row in shown[slot].tolist()]
        _draw(folder, entries[-1], pairs, classes)
    remove_other_pictures(folder, "slot*.png", {entry["picture"] for entry in entries})
    return entries


class Responses(NamedTuple):
    """The images with the largest responses of each slot.

    Attributes:
        means: mean vector of each slot over all images, (L, V).
        images: numbers of the images, largest response first, (L, T).
        responses: their responses, (L, T).
    """

    means: Tensor
    images: Tensor
    responses: Tensor


def strongest(
    features: Rows, num_slots: int, count: int, *, device: torch.device, chunk: int | None = None
) -> Responses:
    """The `count` images to which each slot responds most, from encodings (num_images, E).

    The response of a slot to an image is the norm of its centered vector (the mean over all images is
    subtracted), divided by the root mean square of these norms, so 1 is typical. Dividing by one value per
    slot instead of one per dimension keeps the geometry of the slot, in which neighbors are compared too, and
    does not amplify dimensions that hardly vary. The response of a constant slot is 0.
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
    # The norms of a constant slot are not exactly 0, because its mean is rounded.
    alive_L1 = rms_L1 > 1e-9 * means_LV.norm(dim=1, keepdim=True)
    responses_LT = torch.where(alive_L1, best[0] / rms_L1.clamp_min(1e-300), 0.0)
    return Responses(means_LV, best[1], responses_LT)


def neighbors(
    features: NDArray[Any], found: Responses, count: int, *, device: torch.device, chunk: int | None = None
) -> tuple[Tensor, Tensor]:
    """The `count` nearest neighbors of each image in `found`, by the cosine of centered slot vectors.

    The cosine of a vector that equals the mean is 0.

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
    """Draw a row for each image, followed by its neighbors, each with its attention map."""
    titles = []
    for top, row in zip(entry["top"], classes, strict=True):
        names = [file_name(one["image"], PAIR_INCHES) for one in (top, *top["neighbors"])]
        values = [f"response {top['response']:.2f}"]
        values += [f"cosine {near['cosine']:.3f}" for near in top["neighbors"]]
        texts = [", ".join(filter(None, pair)) for pair in zip(values, row, strict=True)]
        titles.append([f"{name}\n{text}" for name, text in zip(names, texts, strict=True)])
    columns = len(titles[0])
    heading = (
        f"Slot {entry['slot']}: each row is an image to which the slot responds most (1 is typical), "
        "and its nearest neighbors in this slot"
    )
    rows = [pairs[start : start + columns] for start in range(0, len(pairs), columns)]
    draw_grid(rows, titles, folder / entry["picture"], heading, inches=PAIR_INCHES)


def class_of(source: ImageSource, number: int) -> str:
    """The class of an image for a title; empty without labels."""
    return "" if source.labels is None else source.classes[source.labels[number]][:TITLE_LETTERS]

"""Nearest neighbors of some images by their whole encodings.

Axis letters: Q images whose neighbors are searched.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dino_sparo.data.sources import ImageSource, spread_evenly
from dino_sparo.models import Encoder
from dino_sparo.slots.drawing import Picture, as_picture, draw_grid, file_name, load_seen
from dino_sparo.slots.gallery import Responses, class_of, neighbors
from dino_sparo.slots.parts import CutEncoder


def slot_neighbors(
    one: CutEncoder, source: ImageSource, folder: Path, *, num_images: int = 5, num_neighbors: int = 6
) -> dict[str, Any]:
    """Write neighbors.png, some images and their nearest neighbors.

    Args:
        one: an encoder with or without slots; the whole encoding is used.
        source: images to search, with or without labels.
        folder: of the picture; created if it does not exist.
        num_images: images whose neighbors are drawn, spread evenly.
        num_neighbors: nearest neighbors per image.

    Returns:
        JSON values: the images with their neighbors.

    Raises:
        UserError: an image cannot be read.
    """
    features = one.features(source)[0]
    queries = spread_evenly(source, num_images)
    found = nearest_neighbors(features, queries, num_neighbors, device=one.device)
    cosines, numbers = found
    folder.mkdir(parents=True, exist_ok=True)
    draw_neighbors({"": found}, queries, source, one.encoder, folder / "neighbors.png", one.num_workers)
    return {
        "num_images": len(source),
        "images": [
            {
                "image": source.name(query),
                "neighbors": [
                    {"image": source.name(number), "cosine": cosine}
                    for number, cosine in zip(*of_query, strict=True)
                ],
            }
            for query, *of_query in zip(queries, numbers.tolist(), cosines.tolist(), strict=True)
        ],
    }


def nearest_neighbors(
    features: NDArray[Any], queries: Sequence[int], count: int, *, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Cosines and numbers, (Q, count) each, of the images most similar to images of the same features."""
    images = torch.tensor([queries], device=device)
    origin = torch.zeros(1, features.shape[1], dtype=torch.float64, device=device)
    whole = Responses(origin, images, torch.ones_like(images))
    cosines, numbers = neighbors(features, whole, min(count, len(features) - 1), device=device)
    return cosines[0].cpu(), numbers[0].cpu()


def draw_neighbors(
    found: Mapping[str, tuple[Tensor, Tensor]],
    queries: Sequence[int],
    source: ImageSource,
    encoder: Encoder,
    path: Path,
    num_workers: int | None = 0,
) -> None:
    """Write a PNG: for each image and each encoder, a row of the image and its nearest neighbors.

    Args:
        found: cosines and numbers of the neighbors, (Q, count) each, by the name of an encoder, which may be
            empty.
        queries: numbers of the images.
        encoder: one of the encoders, for its input size.
    """
    of_rows, titles = [], []
    for row, query in enumerate(queries):
        for name, (cosines, numbers) in found.items():
            of_rows.append([query, *numbers[row].tolist()])
            lines = [(name, ""), *(("", f"cosine {cosine:.2f}") for cosine in cosines[row].tolist())]
            titles.append(
                [
                    "\n".join(
                        filter(None, (first, file_name(source.name(number)), class_of(source, number), last))
                    )
                    for number, (first, last) in zip(of_rows[-1], lines, strict=True)
                ]
            )
    seen = load_seen(encoder, source, [number for row in of_rows for number in row], num_workers)
    rows = [[as_picture(next(seen).picture) for _ in row] for row in of_rows]
    rows = [[_framed(image), *others] for image, *others in rows]
    heading = f"Each row: an image in a frame, then its nearest neighbors among {len(source):,} images"
    draw_grid(rows, titles, path, heading, scale=False)


def _framed(picture: Picture) -> Picture:
    """A picture whose edge is black."""
    edge = max(1, len(picture) // 50)
    return np.pad(picture[edge:-edge, edge:-edge], ((edge, edge), (edge, edge), (0, 0)))

"""Nearest neighbors of some images by their whole encodings, and a map of the encodings.

Axis letters: Q images whose neighbors are searched, P points of a map.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from dino_sparo.data.sources import ImageSource, spread_evenly
from dino_sparo.files import write_figure
from dino_sparo.models import Encoder
from dino_sparo.slots.curves import COLORS, MARKERS
from dino_sparo.slots.drawing import Picture, as_picture, draw_grid, file_name, load_seen
from dino_sparo.slots.gallery import Responses, class_of, neighbors
from dino_sparo.slots.parts import CutEncoder
from dino_sparo.terminal import counted, shown

NUM_POINTS = 2000  # of a map
NAMED_CLASSES = 10  # the largest ones; their colors and markers differ
GRAY = "#9a9a9a"  # points of other classes, and of images without labels
ACROSS = 11  # pictures that fit side by side into a map
MAP_INCHES, LEGEND_COLUMNS = 5.6, 5


def slot_neighbors(
    one: CutEncoder, source: ImageSource, folder: Path, *, num_images: int = 5, num_neighbors: int = 6
) -> dict[str, Any]:
    """Write neighbors.png, some images and their nearest neighbors, and map.png, a map of the encodings.

    Args:
        one: an encoder with or without slots; the whole encoding is used.
        source: images to search, with or without labels.
        folder: of the pictures; created if it does not exist.
        num_images: images whose neighbors are drawn, spread evenly.
        num_neighbors: nearest neighbors per image.

    Returns:
        JSON values: the images with their neighbors, and the fraction of variance of each axis of the map.

    Raises:
        UserError: an image cannot be read.
    """
    features = one.features(source)[0]
    queries = spread_evenly(source, num_images)
    found = nearest_neighbors(features, queries, num_neighbors, device=one.device)
    cosines, numbers = found
    folder.mkdir(parents=True, exist_ok=True)
    draw_neighbors({"": found}, queries, source, one.encoder, folder / "neighbors.png", one.num_workers)
    points = spread_evenly(source, NUM_POINTS)
    places, fractions = principal_components(features[points])
    draw_map(
        *(places, fractions, source.subset(np.array(points)), one.encoder, folder / "map.png"),
        num_workers=one.num_workers,
    )
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
        "width": features.shape[1],
        "num_points": len(points),
        "fractions_of_variance": fractions,
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


def principal_components(features: NDArray[Any]) -> tuple[NDArray[Any], list[float]]:
    """Places of images on the first two principal components of their l2-normalized features.

    Returns:
        places (P, 2), and the fraction of the variance on each component.
    """
    rows = F.normalize(torch.as_tensor(features).double(), dim=1)
    rows -= rows.mean(dim=0)
    variances, vectors = torch.linalg.eigh(
        rows @ rows.T
    )  # of the P images: exact, and without random numbers
    variances, vectors = variances.flip(0)[:2].clamp(min=0), vectors.flip(1)[:, :2]
    farthest = vectors.abs().argmax(dim=0, keepdim=True)
    vectors = vectors * vectors.gather(0, farthest).sign()  # which the decomposition leaves open
    places = F.pad(vectors * variances.sqrt(), (0, 2 - len(variances)))
    total = rows.square().sum().clamp(min=torch.finfo(rows.dtype).tiny)
    return places.numpy(), (variances / total).tolist()


def draw_map(
    places: NDArray[Any],
    fractions: Sequence[float],
    source: ImageSource,
    encoder: Encoder,
    path: Path,
    *,
    num_workers: int | None = 0,
) -> None:
    """Write a PNG: if there are labels, points by class; then some of the images, at their places.

    Args:
        places: of the images of `source`, (P, 2).
        fractions: of the variance on each axis.
        encoder: for its input size.
    """
    from matplotlib.figure import Figure  # slow to import

    labels = source.labels
    panels = 1 if labels is None else 2
    center = (places.max(axis=0) + places.min(axis=0)) / 2
    half = np.abs(places - center).max(axis=0)
    most = half.max() or 1.0
    side = 2 * most / (ACROSS - 1.2)
    half = np.maximum(half + 0.6 * side, [most + 0.6 * side, ACROSS / 4 * side])
    high = MAP_INCHES * half[1] / half[0] + 0.5 * panels
    figure = Figure(figsize=(panels * MAP_INCHES, high), layout="constrained")
    *of_classes, of_images = figure.subplots(1, panels, squeeze=False)[0]
    frames = [GRAY] * len(places)
    title = f"Encodings on their first two principal components, {counted(len(places), 'image')}"
    figure.suptitle(title, fontsize=11)
    of_images.set_title("some of the images, the others as points", fontsize=10)
    if labels is not None:
        frames = _draw_classes(of_classes[0], places, labels, source.classes)
        of_classes[0].set_title("all images by class", fontsize=10)
    of_images.scatter(*places.T, s=6, color=GRAY, linewidths=0)
    chosen = far_apart(places, 1.1 * side)
    for number, seen in zip(chosen, load_seen(encoder, source, chosen, num_workers), strict=True):
        (left, bottom), (right, top) = places[number] - side / 2, places[number] + side / 2
        of_images.imshow(
            as_picture(seen.picture), extent=(left, right, bottom, top), interpolation="antialiased", zorder=2
        )
        corners = (left, right, right, left, left), (bottom, bottom, top, top, bottom)
        of_images.plot(*corners, color=frames[number], linewidth=2)
    (left, bottom), (right, top) = center - half, center + half
    for axis in (*of_classes, of_images):
        axis.set_aspect("equal")
        axis.set(xlim=(left, right), ylim=(bottom, top), xticks=[], yticks=[])
        axis.set_xlabel(f"first principal component ({100 * fractions[0]:.0f} % of the variance)")
    figure.axes[0].set_ylabel(f"second ({100 * sum(fractions[1:]):.0f} %)")
    write_figure(path, figure)


def far_apart(places: NDArray[Any], distance: float) -> list[int]:
    """Numbers of places (P, 2) of which no two are closer than `distance` along both axes."""
    nearest = np.full(len(places), np.inf)
    number, chosen = int(np.abs(places).max(axis=1).argmax()), []
    while nearest[number] >= distance:
        chosen.append(number)
        nearest = np.minimum(nearest, np.abs(places - places[number]).max(axis=1))
        number = int(nearest.argmax())
    return chosen


def _draw_classes(
    axis: Any, places: NDArray[Any], labels: NDArray[np.int64], classes: Sequence[str]
) -> list[str]:
    """Draw a point for each image, with a legend of the largest classes; returns the colors of the images."""
    counts = np.bincount(labels, minlength=len(classes))
    largest = np.argsort(-counts, kind="stable")[:NAMED_CLASSES]
    named = np.sort(largest[counts[largest] > 0]).tolist()
    colors, names = [GRAY] * len(places), []
    if others := np.count_nonzero(counts) - len(named):
        axis.scatter(*places[~np.isin(labels, named)].T, s=6, color=GRAY, linewidths=0)
        names.append(f"{others} other classes")
    for number, label in enumerate(named):
        of_class = np.flatnonzero(labels == label)
        color, marker = COLORS[number % len(COLORS)], MARKERS[(number + number // len(COLORS)) % len(MARKERS)]
        axis.scatter(*places[of_class].T, s=16, color=color, marker=marker, linewidths=0, alpha=0.8)
        names.append(file_name(classes[label]))
        for image in of_class:
            colors[image] = color
    legend = axis.figure.legend(
        axis.collections, [""] * len(names), loc="outside lower center", ncols=LEGEND_COLUMNS, frameon=False
    )
    for text, name in zip(legend.get_texts(), names, strict=True):
        text.set(text=shown(name), parse_math=False)
    return colors

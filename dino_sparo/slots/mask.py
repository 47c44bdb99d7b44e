"""A mask learned over slots or numbers of a frozen encoding, and its transfer.

Source: SPARO, section 5.2, appendix C.1, table 5. The mask is m = sigmoid(s/4 theta), s = max(100, e^alpha).
The paper learns it by CLIP's objective; here, for labeled images, by cross-entropy over
s cos(m * y, m * class mean), y the encoding and the class means those of the train images. Where the paper is
silent: theta begins at 0, where the mask is even and so changes no cosine, and e^alpha at 100; both are
learned, at a constant rate; the last batch of an epoch may be smaller.

A scale of 100 and more is made for cosines that lie close together, as those of encodings with a large
common mean do. Where they are spread (a mean of zero, say) the loss begins far above ln S, and the mask may
drop parts that tell the class: look at the learning in mask.json.

Axis letters: B images, S classes, E numbers of an encoding, M numbers of a mask.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor

from dino_sparo.data.sources import ImageSource
from dino_sparo.files import atomic_write
from dino_sparo.slots.curves import COLORS
from dino_sparo.slots.parts import CutEncoder, chunks, labels_of, remarks_on_parts
from dino_sparo.terminal import aligned_table

LEAST_SCALE = 100.0
MOMENTUM = 0.9
KEPT = 0.5  # a number of the mask above this counts as kept
CHUNK = 1024  # images at a time where order does not matter


class Learned(NamedTuple):
    """A mask (M,) from 0 to 1, the scale of cosines, and the mean loss of the first and the last epoch."""

    mask: Tensor
    scale: float
    first_loss: float
    last_loss: float


def mask_slots(
    encoders: Sequence[CutEncoder],
    data: Mapping[str, tuple[ImageSource, ImageSource]],
    folder: Path,
    *,
    epochs: int = 100,
    lr: float = 0.02,
    batch_size: int = 1024,
    seed: int = 0,
) -> dict[str, Any]:
    """Learn a mask over parts and one over numbers for each encoder, and write `mask.png` into the folder.

    Args:
        encoders: one with slots, and controls.
        data: labeled train and test images by name. Masks are learned on the first train images, and tried
            on all test images, with the class means of the train images beside them.
        seed: of the order of images.

    Returns:
        plain values: the settings; `rows`, one for each encoder, kind of mask and test images; and by encoder
        and kind `masks` and `learning`; `parts` by encoder.

    Raises:
        UserError: an image cannot be read, or the disk cannot hold the features.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rows, masks, learning = [], {}, {}
    for one in encoders:
        width = one.encoder.embed_dim
        features = iter(one.features(*(source for pair in data.values() for source in pair)))
        tests = {}
        for name, (train, test) in data.items():
            of_train, of_test = next(features), next(features)
            means_SE = class_means(of_train, labels_of(train), len(train.classes), one.device)
            tests[name] = of_test, labels_of(test), means_SE
            if len(tests) == 1:
                to_learn = of_train, labels_of(train), means_SE
        even = torch.ones(width, device=one.device)
        initial = {name: accuracy(*test, even) for name, test in tests.items()}
        for over, size in (("slots", one.num_parts), ("dimensions", width)):
            learned = learn_mask(
                *to_learn, num_masked=size, epochs=epochs, lr=lr, batch_size=batch_size, seed=seed
            )
            masks[f"{one.name} {over}"] = learned.mask.tolist()
            learning[f"{one.name} {over}"] = {
                name: value for name, value in learned._asdict().items() if name != "mask"
            }
            for name, tested in tests.items():
                before, masked = initial[name], accuracy(*tested, spread(learned.mask, width))
                row = {
                    "encoder": one.name,
                    "run": one.run,
                    "over": over,
                    "test_set": name,
                    "initial": before,
                    "masked": masked,
                    "relative_change": 100 * (masked - before) / before if before else None,
                    "kept": float((learned.mask > KEPT).float().mean()),
                }
                rows.append(row)
    parts = {one.name: one.num_parts for one in encoders}
    draw_masks(masks, parts, folder / "mask.png")
    return {
        "epochs": epochs,
        "lr": lr,
        "batch_size": batch_size,
        "remarks": remarks_on_parts(encoders),
        "rows": rows,
        "masks": masks,
        "learning": learning,
        "parts": parts,
    }


@torch.no_grad()
def class_means(
    features: NDArray[Any], labels: NDArray[np.int64], num_classes: int, device: torch.device
) -> Tensor:
    """The mean encoding of every class, float32 (S, E), of features (n, E) with labels (n,)."""
    sums_SE = torch.zeros(num_classes, features.shape[1], dtype=torch.float64, device=device)
    for start, rows_BE in chunks(features, device, CHUNK):
        classes = torch.from_numpy(labels[start : start + CHUNK]).to(device)
        sums_SE += F.one_hot(classes, num_classes).double().T @ rows_BE.double()
    counts_S = torch.from_numpy(np.bincount(labels, minlength=num_classes)).to(device)
    return (sums_SE / counts_S.clamp(min=1)[:, None]).float()


def masked_cosines(features_BE: Tensor, means_SE: Tensor, mask_E: Tensor) -> Tensor:
    """cos(m * y, m * class mean) of every image with every class, (B, S)."""
    return F.normalize(features_BE * mask_E, dim=1) @ F.normalize(means_SE * mask_E, dim=1).T


def spread(mask: Tensor, width: int) -> Tensor:
    """A mask (M,) over equal parts as one over all numbers of an encoding, (E,)."""
    return mask.repeat_interleave(width // len(mask))


@torch.no_grad()
def accuracy(features: NDArray[Any], labels: NDArray[np.int64], means_SE: Tensor, mask_E: Tensor) -> float:
    """Per cent of features (n, E) whose nearest class mean, by the masked cosine, is that of their label."""
    right = 0
    for start, rows_BE in chunks(features, means_SE.device, CHUNK):
        nearest = masked_cosines(rows_BE, means_SE, mask_E).argmax(dim=1).cpu()
        right += int((nearest == torch.from_numpy(labels[start : start + CHUNK])).sum())
    return 100 * right / len(features)


def learn_mask(
    features: NDArray[Any],
    labels: NDArray[np.int64],
    means_SE: Tensor,
    *,
    num_masked: int,
    epochs: int,
    lr: float,
    batch_size: int,
    seed: int,
) -> Learned:
    """Learn theta (M,) and alpha by SGD with momentum 0.9, on the device of the class means.

    Args:
        features, labels: (n, E) and (n,) of train images, read batch by batch.
        num_masked: M, a divisor of E.
        seed: of the order of images.
    """
    device, width = means_SE.device, features.shape[1]
    theta = torch.zeros(num_masked, device=device, requires_grad=True)
    # alpha less ln 100; kept from falling below 0, where the maximum would leave it no gradient to return by
    excess = torch.zeros((), device=device, requires_grad=True)
    optimizer = torch.optim.SGD([theta, excess], lr=lr, momentum=MOMENTUM)
    losses = []
    for epoch in range(epochs):
        order = np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(len(features))
        sum_of_losses = torch.zeros((), device=device)
        for start in range(0, len(order), batch_size):
            rows = np.sort(order[start : start + batch_size])  # read in the order of the file
            batch_BE = torch.from_numpy(features[rows]).to(device).float()
            scale = LEAST_SCALE * excess.exp()
            mask_E = spread(torch.sigmoid(scale / 4 * theta), width)
            logits_BS = scale * masked_cosines(batch_BE, means_SE, mask_E)
            loss = F.cross_entropy(logits_BS, torch.from_numpy(labels[rows]).to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            with torch.no_grad():
                excess.clamp_(min=0)
            sum_of_losses += loss.detach() * len(rows)
        losses.append(float(sum_of_losses) / len(order))
    with torch.no_grad():
        scale = LEAST_SCALE * excess.exp()
        mask = torch.sigmoid(scale / 4 * theta)
    return Learned(mask, float(scale), losses[0], losses[-1])


def table(result: dict[str, Any]) -> str:
    """What `mask_slots` returns as lines of text, a Markdown table in the layout of SPARO's table 5."""
    header = ("encoder", "mask over", "test set", "initial", "masked", "relative change", "above one half")
    rows = [
        [
            *(row["encoder"], row["over"], row["test_set"], f"{row['initial']:.2f}", f"{row['masked']:.2f}"),
            "-" if row["relative_change"] is None else f"{row['relative_change']:+.2f} %",
            f"{100 * row['kept']:.0f} %",
        ]
        for row in result["rows"]
    ]
    about = f"a mask learned in {result['epochs']} epochs; top-1 in per cent by the nearest masked class mean"
    return "\n".join([about, *result["remarks"], "", aligned_table(header, rows)])


def draw_masks(masks: Mapping[str, list[float]], parts: Mapping[str, int], path: Path) -> None:
    """Write a PNG: one row an encoder, its mask over slots as bars and that over dimensions as an image."""
    figure = Figure(figsize=(10, 3.2 * len(parts)), layout="constrained")
    axes = figure.subplots(len(parts), 2, squeeze=False)
    for (bars, picture), (name, num_parts), color in zip(axes, parts.items(), COLORS, strict=False):
        bars.bar(range(num_parts), masks[f"{name} slots"], color=color)
        bars.set(title=f"{name}: over slots", xlabel="slot", ylabel="mask", ylim=(0, 1))
        of_dimensions = np.array(masks[f"{name} dimensions"]).reshape(num_parts, -1)
        shown = picture.imshow(of_dimensions, vmin=0, vmax=1, cmap="viridis", aspect="auto")
        picture.set(title=f"{name}: over dimensions", xlabel="number within the slot", ylabel="slot")
        figure.colorbar(shown, ax=picture)
    with atomic_write(path, durable=False) as file:
        figure.savefig(file, dpi=110, format="png")

"""A mask learned over slots or dimensions of a frozen encoding, and its transfer.

Source: SPARO, section 5.2, appendix C.1, table 5. The mask is m = sigmoid(s/4 theta), s = max(100, e^alpha).
The paper trains it with CLIP's objective; here it is trained on labeled images with cross-entropy over
s cos(m * y, m * class mean), where y is the encoding and class means are those of the train images. Not
specified in the paper: theta starts at 0 (a uniform mask, which changes no cosine) and e^alpha at 100; both
are learned with a constant learning rate; the last batch of an epoch may be smaller.

A scale of 100 or more suits cosines that are close together, as those of encodings with a large common mean.
Otherwise (for centered encodings, say) the loss starts far above ln S, and the mask may drop parts that
contain the class: check `learning` in mask.json.

Axis letters: B images, n images of a set, S classes, E encoding dimensions, M mask dimensions.
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
from dino_sparo.files import write_figure
from dino_sparo.slots.curves import COLORS
from dino_sparo.slots.parts import CutEncoder, chunks, labels_of, remarks_on_parts
from dino_sparo.terminal import aligned_table, counted

LEAST_SCALE = 100.0
MOMENTUM = 0.9
KEPT = 0.5  # mask values above this count as kept
CHUNK = 1024  # images at a time, except in training


class Learned(NamedTuple):
    """A mask (M,) with values from 0 to 1, the scale s, and the mean losses of the first and last epoch."""

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
    """Learn a mask over parts and one over dimensions for each encoder, and write `mask.png`.

    Args:
        encoders: one with slots, and controls.
        data: labeled train and test images by name. Masks are learned on the first train images, and
            evaluated on all test images with the class means of their own train images.
        folder: of `mask.png`; created if it does not exist.
        lr: learning rate.
        seed: of the order of images.

    Returns:
        JSON values: the settings; `rows`, one for each encoder, kind of mask, and test set; `masks` and
        `learning` by encoder and kind; `parts` (their number) by encoder.

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
    """The mean encoding of each class, float32 (S, E), from features (n, E) with labels (n,)."""
    sums_SE = torch.zeros(num_classes, features.shape[1], dtype=torch.float64, device=device)
    for start, rows_BE in chunks(features, device, CHUNK):
        classes = torch.from_numpy(labels[start : start + CHUNK]).to(device)
        sums_SE += F.one_hot(classes, num_classes).double().T @ rows_BE.double()
    counts_S = torch.from_numpy(np.bincount(labels, minlength=num_classes)).to(device)
    return (sums_SE / counts_S.clamp(min=1)[:, None]).float()


def masked_cosines(features_BE: Tensor, means_SE: Tensor, mask_E: Tensor) -> Tensor:
    """cos(m * y, m * class mean) of each image and class, (B, S)."""
    return F.normalize(features_BE * mask_E, dim=1) @ F.normalize(means_SE * mask_E, dim=1).T


def spread(mask: Tensor, width: int) -> Tensor:
    """A mask (M,) over equal parts as a mask over all dimensions, (width,)."""
    return mask.repeat_interleave(width // len(mask))


@torch.no_grad()
def accuracy(features: NDArray[Any], labels: NDArray[np.int64], means_SE: Tensor, mask_E: Tensor) -> float:
    """Accuracy in percent of the nearest class mean by masked cosine, for features (n, E), labels (n,)."""
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
        features: (n, E) of train images.
        labels: (n,).
        num_masked: M, a divisor of E.
        seed: of the order of images.
    """
    device, width = means_SE.device, features.shape[1]
    theta = torch.zeros(num_masked, device=device, requires_grad=True)
    # alpha - ln 100, clamped at 0: below, the maximum in s would have no gradient.
    excess = torch.zeros((), device=device, requires_grad=True)
    optimizer = torch.optim.SGD([theta, excess], lr=lr, momentum=MOMENTUM)
    losses = []
    for epoch in range(epochs):
        order = np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(len(features))
        sum_of_losses = torch.zeros((), device=device)
        for start in range(0, len(order), batch_size):
            rows = np.sort(order[start : start + batch_size])  # sequential reads are faster
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
    """The result of `mask_slots` as text with a Markdown table in the layout of SPARO's table 5."""
    header = ("encoder", "mask over", "test set", "initial", "masked", "relative change", "kept (above 0.5)")
    rows = [
        [
            *(row["encoder"], row["over"], row["test_set"], f"{row['initial']:.2f}", f"{row['masked']:.2f}"),
            "-" if row["relative_change"] is None else f"{row['relative_change']:+.2f} %",
            f"{100 * row['kept']:.0f} %",
        ]
        for row in result["rows"]
    ]
    about = (
        f"mask trained for {counted(result['epochs'], 'epoch')}; top-1 in % by the nearest masked class mean"
    )
    return "\n".join([about, *result["remarks"], "", aligned_table(header, rows)])


def draw_masks(masks: Mapping[str, list[float]], parts: Mapping[str, int], path: Path) -> None:
    """Write a PNG with one row per encoder: the mask over slots as bars, that over dimensions as an image."""
    figure = Figure(figsize=(10, 3.2 * len(parts)), layout="constrained")
    axes = figure.subplots(len(parts), 2, squeeze=False)
    for (bars, picture), (name, num_parts), color in zip(axes, parts.items(), COLORS, strict=False):
        bars.bar(range(num_parts), masks[f"{name} slots"], color=color)
        bars.set(title=f"{name}: over slots", xlabel="slot", ylabel="mask", ylim=(0, 1))
        of_dimensions = np.array(masks[f"{name} dimensions"]).reshape(num_parts, -1)
        shown = picture.imshow(of_dimensions, vmin=0, vmax=1, cmap="viridis", aspect="auto")
        picture.set(title=f"{name}: over dimensions", xlabel="dimension of the slot", ylabel="slot")
        figure.colorbar(shown, ax=picture)
    write_figure(path, figure)

"""`dino-sparo slots mask`: a mask learned over slots or numbers of a frozen encoding, and its transfer.

Source: SPARO, section 5.2, appendix C.1, table 5. The mask is m = sigmoid(s/4 theta), s = max(100, e^alpha).
The paper learns it by CLIP's objective; here, for labelled images, by cross-entropy over
s cos(m * y, m * class mean), y the encoding and the class means those of the train images. Where the paper is
silent: theta begins at 0, where the mask is even and so changes no cosine, and e^alpha at 100; both are
learned, at a constant rate; the last batch of an epoch may be smaller.

A scale of 100 and more is made for cosines that lie close together, as those of encodings with a large
common mean do. Where they are spread (a mean of zero, say) the loss begins far above ln S, and the mask may
drop parts that tell the class: look at the learning in mask.json.

Axis letters: B images, S classes, E numbers of an encoding, M numbers of a mask.
"""

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from dino_sparo.data.sources import ImageSource, open_labelled
from dino_sparo.evaluation.transfer import EXPECTED_BOTH, VAL, named_folder
from dino_sparo.slots.compared import Compared, encodings, open_compared, remark_on_parts
from dino_sparo.slots.mask_report import draw_masks, table
from dino_sparo.slots.program import output_folder, write_json

if TYPE_CHECKING:
    from dino_sparo.options.slots import SlotMaskOptions

log = logging.getLogger("dino_sparo")

LEAST_SCALE = 100.0
MOMENTUM = 0.9
KEPT = 0.5  # a number of the mask above this counts as kept
CHUNK = 1024  # images at a time where order does not matter


@dataclass(frozen=True)
class Learned:
    """A mask (M,) from 0 to 1, the scale of cosines, and the mean loss of the first and the last epoch."""

    mask: Tensor
    scale: float
    first_loss: float
    last_loss: float


@dataclass(frozen=True)
class Exam:
    """Images that a mask is tried on: class means are those of `train`, accuracy is that on `test`."""

    name: str
    train: ImageSource
    test: ImageSource


def run(options: "SlotMaskOptions") -> None:
    """Learn the masks, write `mask/mask.json` and `mask/mask.png`, and print a table.

    Raises:
        UserError: for a mistake in options or data.
    """
    exams = [Exam(VAL, *open_labelled(options.data.path))]
    exams += [open_transfer(options.transfer)] if options.transfer else []
    compared, device = open_compared(options)
    folder = output_folder(options, "mask")
    result: dict[str, Any] = {
        "which": options.which,
        "data": options.data.path,
        "transfer": options.transfer,
        "control": options.control,
        "epochs": options.epochs,
        "lr": options.lr,
        "batch_size": options.learning_batch_size,
        "remarks": list(filter(None, (remark_on_parts(one, compared[0].num_parts) for one in compared))),
        "rows": [],
        "masks": {},
        "learning": {},
        "parts": {one.name: one.num_parts for one in compared},
    }
    for one in compared:
        _mask_encoder(one, exams, options, device, result)
    write_json(folder / "mask.json", result)
    draw_masks(result, folder / "mask.png")
    print(table(result))
    log.info("written to %s", folder)


def open_transfer(text: str) -> Exam:
    """The second labelled folder, given as NAME=DIR.

    Raises:
        UserError: no name, no folder, the name `val`, or images without class folders.
    """
    name, folder = named_folder(text, "transfer", EXPECTED_BOTH)
    return Exam(name, *open_labelled(folder, key="transfer"))


def _mask_encoder(
    one: Compared,
    exams: list[Exam],
    options: "SlotMaskOptions",
    device: torch.device,
    result: dict[str, Any],
) -> None:
    """Learn both masks on the first exam's train images, try them on all, and add to the result."""
    sources = [source for exam in exams for source in (exam.train, exam.test)]
    features = encodings(one, sources, options)
    train, train_labels = features[0], labels_of(exams[0].train)
    means, tests = [], []
    for exam, of_train, of_test in zip(exams, features[::2], features[1::2], strict=True):
        means.append(class_means(of_train, labels_of(exam.train), len(exam.train.classes), device))
        tests.append((of_test, labels_of(exam.test)))
    even = torch.ones(one.encoder.embed_dim, device=device)
    initial = [accuracy(*test, mean, even) for test, mean in zip(tests, means, strict=True)]
    for over, size in (("slots", one.num_parts), ("dimensions", one.encoder.embed_dim)):
        learned = learn_mask(
            *(train, train_labels, means[0]),
            num_masked=size,
            epochs=options.epochs,
            lr=options.lr,
            batch_size=options.learning_batch_size,
            seed=options.seed,
        )
        name = f"{one.name} {over}"
        result["masks"][name] = learned.mask.tolist()
        result["learning"][name] = {
            "scale": learned.scale,
            "first_loss": learned.first_loss,
            "last_loss": learned.last_loss,
        }
        mask_E = spread(learned.mask, one.encoder.embed_dim)
        for exam, before, test, mean in zip(exams, initial, tests, means, strict=True):
            masked = accuracy(*test, mean, mask_E)
            row = {
                "encoder": one.name,
                "run": one.run,
                "over": over,
                "test_set": exam.name,
                "initial": before,
                "masked": masked,
                "relative_change": 100 * (masked - before) / before if before else None,
                "kept": float((learned.mask > KEPT).float().mean()),
            }
            result["rows"].append(row)


def labels_of(source: ImageSource) -> NDArray[np.int64]:
    """Class numbers of labelled images."""
    assert source.labels is not None
    return source.labels


@torch.no_grad()
def class_means(
    features: NDArray[Any], labels: NDArray[np.int64], num_classes: int, device: torch.device
) -> Tensor:
    """The mean encoding of every class, float32 (S, E), of features (n, E) with labels (n,)."""
    sums_SE = torch.zeros(num_classes, features.shape[1], dtype=torch.float64, device=device)
    for start in range(0, len(features), CHUNK):
        rows = torch.from_numpy(features[start : start + CHUNK]).to(device).double()
        classes = torch.from_numpy(labels[start : start + CHUNK]).to(device)
        sums_SE += F.one_hot(classes, num_classes).double().T @ rows
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
    for start in range(0, len(features), CHUNK):
        rows = torch.from_numpy(features[start : start + CHUNK]).to(means_SE.device).float()
        nearest = masked_cosines(rows, means_SE, mask_E).argmax(dim=1).cpu()
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
        features: (n, E) of train images, read batch by batch.
        labels: (n,).
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

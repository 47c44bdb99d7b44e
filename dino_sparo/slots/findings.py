"""Findings about a run in sentences, from the files of its analyses."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from dino_sparo.evaluation.knn import KNN
from dino_sparo.evaluation.results import standard_error
from dino_sparo.models import Encoder
from dino_sparo.slots.curves import num_knn_images, points_of
from dino_sparo.slots.rank import WAYS
from dino_sparo.terminal import counted

HARDLY = 250  # steps of a run that has hardly trained; the demo learns in 496

Content = Mapping[str, Any]


class Finding(NamedTuple):
    """A sentence, and the section of the page with its figure."""

    sentence: str
    section: str


def training(encoder: Encoder, config: Content, metrics: Sequence[Content]) -> list[str]:
    """The encoder, its training, and its 20-NN accuracy before and after training."""
    slots = encoder.num_slots
    sentence = (
        f"A ViT of {counted(len(encoder.backbone.blocks), 'block')} and {encoder.width} dimensions, "
        + (f"with {slots} slots of {encoder.embed_dim // slots} dimensions" if slots else "without slots")
    )
    if metrics and config:
        last = metrics[-1]
        sentence += (
            f", pretrained for {counted(last['epoch'], 'epoch')} ({counted(last['step'], 'step')} of "
            f"{config['optim']['global_batch_size']} images) on {config['data']['path']}"
        )
    accuracies = points_of(metrics, KNN)
    if not len(accuracies):
        reason = "it needs class folders, with at least 20 train images"
        if not config.get("monitor", {}).get("knn_every_epochs", 1):
            reason = "monitor.knn_every_epochs is 0"
        missing = [f"20-NN accuracy was not measured during training: {reason}."] if metrics else []
        return [f"{sentence}.", *missing]
    (_, first), (_, last) = accuracies[0], accuracies[-1]
    at_start = "with the initial weights" if config.get("init") else "untrained"
    begun = at_start if accuracies[0][0] == 0 else f"after epoch {accuracies[0][0]:g}"
    text = f"20-NN accuracy of the teacher: {first:.1f} % {begun}, {last:.1f} % trained"
    if num_test := num_knn_images(metrics):
        text += f" (± {standard_error(last, num_test):.1f}, one standard error), on {num_test:,} test images"
        if abs(last - first) < 2 * np.hypot(standard_error(first, num_test), standard_error(last, num_test)):
            text += "; the difference is not significant (less than two standard errors)"
    if per_class := config.get("monitor", {}).get("knn_images_per_class"):
        text += f", with at most {per_class} images per class"
    return [f"{sentence}.", f"{text}."]


def of_curves(metrics: Sequence[Content]) -> list[str]:
    """Whether there were so few steps that the encoder has hardly trained. The loss does not tell: it may
    rise while the encoder learns."""
    steps = metrics[-1]["step"]
    return [f"Only {counted(steps, 'step')}: the encoder is hardly trained."] if steps < HARDLY else []


def of_rank(found: Content) -> list[str]:
    """The accuracy of half of the slots, and of the best and the worst slot alone."""
    one = found["encoders"][0]
    half = one["half"][
        "knn"
    ]  # of the ways to choose slots not the better one, which test images would choose
    whole, alone, order = one["all"]["knn"], one["alone"]["knn"], one["orders"]["knn"]
    best, worst = order[0], order[-1]
    share = f" ({100 * half['knn'] / whole:.0f} % of it)" if whole else ""
    return [
        f"{half['kept']} of {one['num_parts']} slots ({WAYS['knn']}) have a {found['k']}-NN accuracy "
        f"of {half['knn']:.1f} %, all slots {whole:.1f} %{share}, on {found['num_test']:,} test images (± "
        f"{standard_error(whole, found['num_test']):.1f}, one standard error).",
        f"Slot {best} has the highest {found['k']}-NN accuracy alone ({alone[best]:.1f} %), slot {worst} the "
        f"lowest ({alone[worst]:.1f} %), on {found['num_select']:,} images for choosing slots.",
    ]


def of_health(found: Content) -> list[str]:
    """Dead and duplicate slots, and the spread of attention."""
    slots, summary = found["slots"], found["summary"]
    dead = [slot["slot"] for slot in slots if slot["dead"]]
    same = sorted({tuple(sorted((slot["slot"], slot["nearest"]))) for slot in slots if slot["duplicate"]})
    pairs = ", ".join(f"{one} and {other}" for one, other in same)
    images = f"{found['num_images']:,} images"
    told = (
        f"Dead slots (nearly constant over images): {', '.join(map(str, dead))}"
        if dead
        else "No slot is dead",
        f"Duplicate slots (same attention): {pairs}" if same else "No slots are duplicates",
    )
    return [
        *(f"{sentence} (on {images})." for sentence in told),
        f"On average over {images}, a slot attends to {summary['mean_effective_patches']:.1f} of "
        f"{summary['num_patches']} patches (effective number), with "
        f"{100 * summary['mean_cls_share']:.0f} % of its attention on CLS.",
    ]


def of_mask(found: Content) -> list[str]:
    """The change of accuracy with a learned mask."""
    row = [row for row in found["rows"] if row["over"] == "slots"][0]  # noqa: RUF015 else an IndexError
    return [
        f"A learned mask over slots changes the accuracy of nearest class means from {row['initial']:.1f} to "
        f"{row['masked']:.1f} % ({row['test_set']})."
    ]


def of_factors(found: Content) -> list[str]:
    """The factor that all slots together predict best, and its accuracy by one slot and by all."""
    one, names = found["encoders"][0], list(found["factors"])
    alone = np.array(one["alone"])
    above = [(one["whole"][name] - found["chance"][name]) / (100 - found["chance"][name]) for name in names]
    place = int(np.argmax(above))
    name, slot = names[place], int(alone[:, place].argmax())
    return [
        f"Of the known factors, {name} is predicted best: {one['whole'][name]:.0f} % by all slots, "
        f"{alone[slot, place]:.0f} % by slot {slot}, the best one on these pictures (chance "
        f"{found['chance'][name]:.0f} %)."
    ]


FINDINGS = {"rank": of_rank, "health": of_health, "mask": of_mask, "factors": of_factors}

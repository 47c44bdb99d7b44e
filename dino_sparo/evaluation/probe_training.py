"""Training probes on a frozen encoder, an epoch at a time, and scoring them.

Axis letters: B images, F numbers of a feature, P probes, S classes, N images of a test set.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dino_sparo.errors import UserError
from dino_sparo.evaluation.probe_data import Batch, Feed, feature_rows
from dino_sparo.evaluation.probes import Probes, hits, losses
from dino_sparo.evaluation.transfer import TestSet, restrict
from dino_sparo.parallel.distributed import (
    average_gradients,
    gather_objects,
    gather_rows,
    mean_over_ranks,
    rank,
    sum_over_ranks,
    world_size,
)
from dino_sparo.runs.checkpoint import load_latest, save_checkpoint, set_damaged_aside
from dino_sparo.runs.runlog import RunLog

ROWS_AT_ONCE = 1024  # features scored at a time
LOG_EVERY_STEPS = 20


@dataclass(frozen=True)
class Exam:
    """A test set and the features of its images, each (N, F), by name."""

    test_set: TestSet
    features: Mapping[str, NDArray[Any]]


@torch.no_grad()
def score(probes: Probes, exam: Exam, device: torch.device) -> NDArray[np.bool_]:
    """Whether top-1 and top-5 of each image are right by each probe: (N, P, 2), in every process.

    The processes share the images; each counts exactly once.
    """
    total = len(exam.test_set.labels)
    found = [torch.empty(0, len(probes.probes), 2, dtype=torch.uint8)]
    share = np.arange(rank(), total, world_size())
    for start in range(0, len(share), ROWS_AT_ONCE):
        rows = share[start : start + ROWS_AT_ONCE]
        logits_PBS = probes(feature_rows(exam.features, rows, device))
        allowed = restrict(logits_PBS.flatten(0, 1), exam.test_set.classes).view_as(logits_PBS)
        labels = torch.from_numpy(exam.test_set.labels[rows]).to(device)
        found.append(hits(allowed, labels).to("cpu", torch.uint8))
    return gather_rows(torch.cat(found), total).numpy().astype(bool)


class Learning:
    """All that changes while probes learn, and that a checkpoint keeps.

    Attributes:
        best: by probe, its highest top-1 on val in per cent, and the number of epochs after which it was.
    """

    def __init__(self, probes: Probes, *, global_batch_size: int, epochs: int) -> None:
        self.probes = probes
        self.optimizer = probes.optimizer(global_batch_size)
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, epochs)
        self.epochs, self.epochs_done = epochs, 0
        self.best: list[tuple[float, int]] = [(-1.0, 0)] * len(probes.probes)

    def state(self) -> dict[str, Any]:
        """Tensors and plain values."""
        return {
            "epochs_done": self.epochs_done,
            "probes": self.probes.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "best": self.best,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on where the state was taken."""
        self.epochs_done = state["epochs_done"]
        self.probes.load_state_dict(state["probes"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.best = [tuple(pair) for pair in state["best"]]


def restore(
    learning: Learning,
    folder: Path,
    settings: dict[str, Any],
    steps_per_epoch: int,
    *,
    unverified: bool = False,
) -> None:
    """Go on from the folder's newest checkpoint, if there is one.

    Raises:
        UserError: it is of other settings, or processes find different ones; or it is not `unverified`, but
            its SHA-256 is missing.
    """
    checkpoint = load_latest(folder, unverified=unverified)
    step = 0
    if checkpoint is not None:
        before, step = checkpoint["config"], checkpoint["step"]
        changed = [
            f"{key} was {before[key]!r}, now {now!r}" for key, now in settings.items() if before[key] != now
        ]
        if changed:
            raise UserError(
                f"{folder} holds other probes ({'; '.join(changed)}); set this back to go on with them, or "
                f"give another --out"
            )
        learning.restore(checkpoint)
    steps = sorted(set(gather_objects(step)))
    if len(steps) > 1:
        raise UserError(
            f"{folder}: processes find different checkpoints (steps {steps}); it must be one folder on a "
            f"file system that all machines share"
        )
    assert step == learning.epochs_done * steps_per_epoch
    if rank() == 0 and folder.exists():
        set_damaged_aside(folder, step)


def train(
    learning: Learning,
    feed: Feed,
    val: Exam,
    *,
    folder: Path,
    settings: Mapping[str, Any],
    steps_per_epoch: int,
    global_batch_size: int,
    device: torch.device,
) -> None:
    """All epochs that are left: train, score on val, log, and write checkpoints with the settings.

    Raises:
        UserError: features are not finite, an image cannot be read, or the workers that load images failed.
    """
    with (
        RunLog(
            folder,
            first_step=learning.epochs_done * steps_per_epoch,
            steps_per_epoch=steps_per_epoch,
            total_steps=learning.epochs * steps_per_epoch,
            silent=rank() > 0,
        ) as run_log,
        feed.watch(),
    ):
        batches = feed.batches(run_log.waiting_for_data)
        while learning.epochs_done < learning.epochs:
            _train_epoch(learning, batches, run_log, steps_per_epoch, global_batch_size)
            learning.schedule.step()
            learning.epochs_done += 1
            done = learning.epochs_done * steps_per_epoch
            with run_log.not_training():
                top1, top5 = 100 * score(learning.probes, val, device).mean(axis=0).T
            best = int(np.argmax(top1))
            run_log.evaluation(
                done,
                _named("top1", learning, top1) | _named("top5", learning, top5),
                shown=f"{learning.probes.probes[best].name} top1 {top1[best]:.2f} % top5 {top5[best]:.2f} %"
                + (f", the best of {len(top1)} probes" if len(top1) > 1 else ""),
            )
            for number, accuracy in enumerate(top1.tolist()):
                if accuracy > learning.best[number][0]:
                    learning.best[number] = (accuracy, learning.epochs_done)
            if learning.epochs_done % feed.checkpoint_every_epochs and learning.epochs_done < learning.epochs:
                continue
            run_log.flush()
            if rank() == 0:
                save_checkpoint({"step": done, "config": settings, **learning.state()}, folder, step=done)


def _train_epoch(
    learning: Learning,
    batches: Iterator[Batch],
    run_log: RunLog,
    steps: int,
    global_batch_size: int,
) -> None:
    """One epoch; the losses that it logs are means since its begin."""
    total_P: Tensor | None = None
    bad: Tensor | None = None  # features that are not finite; the host looks at them with the log
    for step in range(1, steps + 1):
        features, labels = next(batches)
        learning.optimizer.zero_grad(set_to_none=True)
        loss_P = losses(learning.probes(features), labels)
        loss_P.sum().backward()
        average_gradients(learning.probes.parameters())
        learning.optimizer.step()
        bad_now = torch.stack([(~feature.isfinite()).any() for feature in features.values()]).any().float()
        total_P = loss_P.detach() if total_P is None else total_P + loss_P.detach()
        bad = bad_now if bad is None else bad + bad_now
        done = learning.epochs_done * steps + step
        run_log.step_done(done)
        if step % LOG_EVERY_STEPS == 0 or step == steps:
            if sum_over_ranks(bad.clone()).item():
                raise UserError(
                    f"features of training images are not finite in epoch {learning.epochs_done + 1}; the "
                    f"weights of the encoder are damaged, give another checkpoint"
                )
            mean_P = (mean_over_ranks(total_P.clone()) / step).tolist()
            values = {"loss": float(np.mean(mean_P)), "lr": learning.optimizer.param_groups[0]["lr"]}
            values |= _named("loss", learning, mean_P) if len(mean_P) > 1 else {}
            run_log.scalars(done, values, batch_size=global_batch_size)


def _named(what: str, learning: Learning, values: Any) -> dict[str, float]:
    """A number of each probe under its name."""
    return {f"{probe.name} {what}": float(v) for probe, v in zip(learning.probes.probes, values, strict=True)}

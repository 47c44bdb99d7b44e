"""Training linear probes on a frozen encoder, an epoch at a time, resumable bit for bit, and scoring them.

Axis letters: B images, F numbers of a feature, P probes, S classes, N images of a test set.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dino_sparo.data.loader import BatchOrder
from dino_sparo.data.sources import ImageSource
from dino_sparo.errors import UserError
from dino_sparo.evaluation.classifiers import SavedClassifier, save_classifier
from dino_sparo.evaluation.features import Wanted, hash_of, hash_of_images
from dino_sparo.evaluation.probes import INPUTS, Probe, Probes, hits, losses, official_probe
from dino_sparo.evaluation.results import Result, result_on
from dino_sparo.evaluation.transfer import TestSet, as_test_sets, balanced_fraction, restrict
from dino_sparo.models import Encoder
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

log = logging.getLogger("dino_sparo")

CLASSIFIERS = "classifiers"
ROWS_AT_ONCE = 1024  # features scored at a time
LOG_EVERY_STEPS = 20

Features = Mapping[str, NDArray[Any]]  # of the images of a set, each (N, F), by name
Batch = tuple[dict[str, Tensor], Tensor]  # features (B, F) by name, float32, and labels (B,)
Waiting = Callable[[], AbstractContextManager[None]]
OpenBatches = Callable[[BatchOrder, Waiting], AbstractContextManager[Iterator[Batch]]]


class ProbeTraining:
    """Linear probes of an encoder, their optimizer and schedule, and how far they are.

    Args:
        encoder: in evaluation mode; it is not changed.
        train: labeled images, of which `train_fraction` is drawn by the seed, the same number of each class.
        test: labeled images, scored after every epoch, or several test sets, of which the first one is.
        folder: for log, checkpoints and classifiers.
        protocol: what the results go by.
        probes: None takes the official one.
        batch_size: images per step, of all processes together.
        seed: of initial weights, order, crops and the drawn images.
        weights: what the results call the encoder: teacher, student or untrained.

    Attributes:
        train, test_sets: the images to learn from, and those to score.
        best: by probe, its highest top-1 on the first test set in per cent, and after how many epochs.

    Raises:
        UserError: the batch size or the fraction does not fit.
    """

    def __init__(
        self,
        encoder: Encoder,
        train: ImageSource,
        test: ImageSource | Sequence[TestSet],
        folder: Path,
        *,
        protocol: str,
        probes: Sequence[Probe] | None = None,
        epochs: int = 100,
        batch_size: int = 1024,
        train_fraction: float = 1.0,
        seed: int = 0,
        weights: str = "teacher",
    ) -> None:
        if not 0 < train_fraction <= 1:
            raise UserError(
                f"train_fraction is {train_fraction}; expected above 0 and at most 1, such as 0.1"
            )
        self.encoder, self.folder, self.weights = encoder, Path(folder), weights
        self.train = train if train_fraction == 1 else balanced_fraction(train, train_fraction, seed)
        self.test_sets = as_test_sets(test, train.classes)
        check_batch_size(batch_size, len(self.train), world_size())
        self.probes = Probes(
            [official_probe(encoder)] if probes is None else probes,
            width=encoder.width,
            embed_dim=encoder.embed_dim,
            num_classes=len(train.classes),
            seed=seed,
        ).to(encoder.device)
        self.optimizer = self.probes.optimizer(batch_size)
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, epochs)
        self.epochs, self.epochs_done, self.steps_per_epoch = epochs, 0, len(self.train) // batch_size
        self.best: list[tuple[float, int]] = [(-1.0, 0)] * len(self.probes.probes)
        self.batch_size, self.seed = batch_size, seed
        self.given: dict[str, Any] = {
            "epochs": epochs,
            "batch_size": batch_size,
            "seed": seed,
            "train_fraction": train_fraction,
        }
        self.settings: dict[str, Any] = {
            "probes": [probe.name for probe in self.probes.probes],
            **self.given,
            "classes": len(train.classes),
            "train images": self.train.fingerprint(),
            "val images": self.test_sets[0].source.fingerprint(),
            "encoder": hash_of(encoder),
        }
        self.protocol = protocol

    @property
    def steps_done(self) -> int:
        """Optimizer steps."""
        return self.epochs_done * self.steps_per_epoch

    def wanted(self) -> list[Wanted]:
        """The features that scoring needs."""
        return [Wanted(one.source, f"{one.name} features", "float32") for one in self.test_sets]

    def state(self) -> dict[str, Any]:
        """All that changes, in tensors and plain values."""
        return {
            "epochs_done": self.epochs_done,
            "probes": self.probes.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "best": self.best,
        }

    def resume(self, *, unverified: bool = False, **more_settings: Any) -> None:
        """Resume from the folder's newest checkpoint, if there is one.

        Args:
            unverified: also where its SHA-256 is missing, although it may be damaged.
            more_settings: what else makes these probes others than those of other settings.

        Raises:
            UserError: it is of other settings, or processes find different ones, or its SHA-256 is missing.
        """
        self.settings |= more_settings
        checkpoint = load_latest(self.folder, unverified=unverified)
        step = 0
        if checkpoint is not None:
            before, step = checkpoint["config"], checkpoint["step"]
            changed = [
                f"{key} was {before[key]!r}, now {now!r}"
                for key, now in self.settings.items()
                if before[key] != now
            ]
            if changed:
                raise UserError(
                    f"{self.folder} holds other probes ({'; '.join(changed)}); set this back to resume them, "
                    f"or give another --out"
                )
            self.epochs_done = checkpoint["epochs_done"]
            self.probes.load_state_dict(checkpoint["probes"])
            self.optimizer.load_state_dict(checkpoint["optimizer"])
            self.schedule.load_state_dict(checkpoint["schedule"])
            self.best = [tuple(pair) for pair in checkpoint["best"]]
        steps = sorted(set(gather_objects(step)))
        if len(steps) > 1:
            raise UserError(
                f"{self.folder}: processes find different checkpoints (steps {steps}); it must be one folder "
                f"on a file system that all machines share"
            )
        assert step == self.steps_done
        if rank() == 0 and self.folder.exists():
            set_damaged_aside(self.folder, step)

    def fit(self, open_batches: OpenBatches, val: Features, *, checkpoint_every_epochs: int) -> None:
        """All epochs that are left: train, score on the first test set, log, and write checkpoints.

        Args:
            open_batches: from the order of images and a context to wait for them in, this process's share of
                each global batch, within a context that explains why a process that loads images has died.
            val: features of the first test set.
            checkpoint_every_epochs: what a stop costs at most.

        Raises:
            UserError: features are not finite, an image cannot be read, or the workers that load images
                failed.
        """
        if self.epochs_done == self.epochs:
            return
        log.info(
            "%s: epoch %d of %d, %d probes, %d train images",
            *(self.folder, self.epochs_done + 1, self.epochs, len(self.probes.probes), len(self.train)),
        )
        if rank() == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
        order = BatchOrder(
            num_samples=len(self.train),
            global_batch_size=self.batch_size,
            epochs=self.epochs,
            seed=self.seed,
            first_step=self.steps_done,
            rank=rank(),
            world_size=world_size(),
        )
        run_log = RunLog(
            self.folder,
            first_step=self.steps_done,
            steps_per_epoch=self.steps_per_epoch,
            total_steps=self.epochs * self.steps_per_epoch,
            silent=rank() > 0,
        )
        with run_log, open_batches(order, run_log.waiting_for_data) as batches:
            while self.epochs_done < self.epochs:
                self._train_epoch(batches, run_log)
                self.schedule.step()
                self.epochs_done += 1
                with run_log.not_training():
                    top1, top5 = 100 * score(self.probes, self.test_sets[0], val).mean(axis=0).T
                self._log_accuracy(run_log, top1, top5)
                if self.epochs_done % checkpoint_every_epochs == 0 or self.epochs_done == self.epochs:
                    run_log.flush()
                    if rank() == 0:
                        state = {"step": self.steps_done, "config": self.settings, **self.state()}
                        save_checkpoint(state, self.folder, step=self.steps_done)

    def _train_epoch(self, batches: Iterator[Batch], run_log: RunLog) -> None:
        """One epoch; the losses that it logs are means since its begin."""
        total_P = torch.zeros(len(self.probes.probes), device=self.encoder.device)
        bad = torch.zeros((), device=self.encoder.device)  # features not finite; the host looks with the log
        for step in range(1, self.steps_per_epoch + 1):
            features, labels = next(batches)
            self.optimizer.zero_grad(set_to_none=True)
            loss_P = losses(self.probes(features), labels)
            loss_P.sum().backward()
            average_gradients(self.probes.parameters())
            self.optimizer.step()
            total_P += loss_P.detach()
            bad += torch.stack([(~feature.isfinite()).any() for feature in features.values()]).any()
            done = self.steps_done + step
            run_log.step_done(done)
            if step % LOG_EVERY_STEPS == 0 or step == self.steps_per_epoch:
                if sum_over_ranks(bad.clone()).item():
                    raise UserError(
                        f"features of training images are not finite in epoch {self.epochs_done + 1}; the "
                        f"weights of the encoder are damaged, give another checkpoint"
                    )
                mean_P = (mean_over_ranks(total_P.clone()) / step).tolist()
                values = {"loss": float(np.mean(mean_P)), "lr": self.optimizer.param_groups[0]["lr"]}
                values |= self._by_probe("loss", mean_P) if len(mean_P) > 1 else {}
                run_log.scalars(done, values, batch_size=self.batch_size)

    def _log_accuracy(self, run_log: RunLog, top1: NDArray[Any], top5: NDArray[Any]) -> None:
        best = int(np.argmax(top1))
        run_log.evaluation(
            self.steps_done,
            self._by_probe("top1", top1) | self._by_probe("top5", top5),
            shown=f"{self.probes.probes[best].name} top1 {top1[best]:.2f} % top5 {top5[best]:.2f} %"
            + (f", the best of {len(top1)} probes" if len(top1) > 1 else ""),
        )
        for number, accuracy in enumerate(top1.tolist()):
            if accuracy > self.best[number][0]:
                self.best[number] = (accuracy, self.epochs_done)

    def _by_probe(self, what: str, values: Any) -> dict[str, float]:
        """A number of each probe under its name."""
        return {f"{probe.name} {what}": float(v) for probe, v in zip(self.probes.probes, values, strict=True)}

    def finish(self, features: Sequence[Features]) -> list[Result]:
        """Save the classifiers, and score every probe on every test set by the features of its images."""
        weights = self.probes.state_dict()
        classifiers = [
            SavedClassifier(
                probe=probe,
                weight=weights[f"classifiers.{number}.weight"],
                bias=weights[f"classifiers.{number}.bias"],
                classes=self.train.classes,
                encoder=self.settings["encoder"],
                details={
                    "protocol": self.protocol,
                    "feature": probe.feature,
                    "num_blocks": probe.num_blocks,
                    "learning_rate": probe.learning_rate,
                    **self.given,
                    "num_train": len(self.train),
                    "best_val_top1": best,
                    "best_val_epoch": epoch,
                },
            )
            for number, (probe, (best, epoch)) in enumerate(zip(self.probes.probes, self.best, strict=True))
        ]
        if rank() == 0:
            (self.folder / CLASSIFIERS).mkdir(parents=True, exist_ok=True)
            for one in classifiers:
                name = one.probe.name.replace(" ", "_")
                save_classifier(self.folder / CLASSIFIERS / f"{name}.safetensors", one)
            log.info("classifiers are in %s", self.folder / CLASSIFIERS)
        return results_of(self.encoder, classifiers, self.probes, self.test_sets, features, self.weights)


def check_batch_size(batch_size: int, num_images: int, processes: int) -> None:
    """The global batch must be there, and be divisible among the processes.

    Raises:
        UserError: it is not; it proposes one.
    """
    if batch_size > num_images:
        raise UserError(
            f"batch_size is {batch_size}, but there are only {num_images} train images; give --batch_size "
            f"{max(1, num_images // processes) * processes} or less"
        )
    if batch_size % processes:
        raise UserError(
            f"batch_size is {batch_size}, not divisible by {processes} processes; give a multiple, such as "
            f"{max(1, batch_size // processes) * processes}"
        )


@torch.no_grad()
def score(probes: Probes, test_set: TestSet, features: Features) -> NDArray[np.bool_]:
    """Whether top-1 and top-5 of each image are right by each probe: (N, P, 2), in every process.

    The processes share the images; each counts exactly once.
    """
    device = next(probes.parameters()).device
    total = len(test_set.labels)
    found = [torch.empty(0, len(probes.probes), 2, dtype=torch.uint8)]
    share = np.arange(rank(), total, world_size())
    for start in range(0, len(share), ROWS_AT_ONCE):
        rows = share[start : start + ROWS_AT_ONCE]
        logits_PBS = probes(feature_rows(features, rows, device))
        allowed = restrict(logits_PBS.flatten(0, 1), test_set.classes).view_as(logits_PBS)
        labels = torch.from_numpy(test_set.labels[rows]).to(device)
        found.append(hits(allowed, labels).to("cpu", torch.uint8))
    return gather_rows(torch.cat(found), total).numpy().astype(bool)


def feature_rows(features: Features, rows: NDArray[np.int64], device: torch.device) -> dict[str, Tensor]:
    """Some rows of features, float32 on the device, by name."""
    return {name: torch.from_numpy(features[name][rows]).to(device).float() for name in INPUTS}


def results_of(
    encoder: Encoder,
    classifiers: Sequence[SavedClassifier],
    probes: Probes,
    test_sets: Sequence[TestSet],
    features: Sequence[Features],
    weights: str,
) -> list[Result]:
    """Every probe on every test set; the classifiers say how the probes came to be."""
    results = []
    for test_set, found in zip(test_sets, features, strict=True):
        right = score(probes, test_set, found)
        images = hash_of_images(test_set.source)  # once: it looks at every file
        for number, classifier in enumerate(classifiers):
            name = classifier.probe.name
            if "weights_file" in classifier.details:  # which do not tell the learning rate
                name = name.partition(" lr ")[0]
            top1, top5 = 100 * right[:, number].mean(axis=0)
            result = result_on(
                test_set,
                right[:, number, 0],
                protocol=classifier.details["protocol"],
                name=name,
                headline=classifier.probe == official_probe(encoder),
                weights=weights,
                top1=float(top1),
                top5=float(top5),
                details=classifier.details,
                images=images,
            )
            results.append(result)
    return results

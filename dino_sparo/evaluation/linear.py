"""Accuracy of linear classifiers on a frozen encoder. Source: official `eval_linear.py`.

Differences from the official protocol are listed in eval/README.md.

Axis letters: P probes.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from dino_sparo.data.decode import AS_IS
from dino_sparo.data.loader import BatchOrder, choose_executor
from dino_sparo.data.sources import ImageSource
from dino_sparo.data.workers import default_workers
from dino_sparo.errors import UserError
from dino_sparo.evaluation.classifiers import (
    SavedClassifier,
    results_of,
    save_classifier,
    score,
    wanted_of,
)
from dino_sparo.evaluation.features import Wanted, cached_features, hash_of, hash_of_some
from dino_sparo.evaluation.probe_batches import (
    MAX_SIDE,
    Features,
    ProbeBatch,
    features_of_crops,
    features_of_rows,
)
from dino_sparo.evaluation.probes import INPUTS, Feature, Probes, choose_probes
from dino_sparo.evaluation.results import Result, accuracies
from dino_sparo.evaluation.transfer import VAL, TestSet, as_test_sets, balanced_fraction
from dino_sparo.files import read_as
from dino_sparo.models import Encoder
from dino_sparo.parallel.distributed import (
    gather_objects,
    local_world_size,
    mean_over_ranks,
    rank,
    sum_over_ranks,
    world_size,
)
from dino_sparo.parallel.precision import choose_precision
from dino_sparo.runs.checkpoint import load_latest, save_checkpoint, set_damaged_aside
from dino_sparo.runs.runlog import RunLog
from dino_sparo.terminal import counted, log

OFFICIAL, CACHED = "linear", "linear-cached"  # protocols
CLASSIFIERS = "classifiers"
LOG_EVERY_STEPS = 20
FILES = ("train files", "val files")  # settings that may change, and that earlier versions did not store


def linear_probe(
    encoder: Encoder,
    train: ImageSource,
    test: ImageSource | Sequence[TestSet],
    folder: Path,
    *,
    learning_rates: Sequence[float] | None = None,
    num_blocks: Sequence[int] | None = None,
    features: Sequence[Feature] | None = None,
    sweep: bool = False,
    epochs: int = 100,
    batch_size: int = 1024,
    train_fraction: float = 1.0,
    seed: int = 0,
    cached: bool = False,
    weights: str = "teacher",
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto",
    views: Literal["auto", "pil", "device"] = "auto",
    cache: Path | None = None,
    cache_precision: Literal["float16", "float32"] = "float16",
    num_workers: int | None = 0,
    resume_unverified: bool = False,
    tensorboard: Path | None = None,
) -> list[Result]:
    """Train linear probes by the official protocol, or resume, and score them; all processes share the work.

    Args:
        encoder: in evaluation mode; it is not changed.
        train: labeled images.
        test: labeled images, or several test sets; the first one is scored after every epoch.
        folder: log, checkpoints, and classifiers go to a subfolder of it, named by protocol, `weights`,
            `train_fraction`, and `sweep`.
        learning_rates, num_blocks, features, sweep: as in `choose_probes`.
        batch_size: images per step, over all processes.
        train_fraction: fraction of the train images to train on, the same number of each class.
        seed: of initial weights, order, crops, and the choice of `train_fraction`.
        cached: train on cached features of center crops, which takes seconds instead of hours. This is not
            the official protocol: the protocol of the results is `linear-cached`.
        weights: name of the encoder in the results: teacher, student, or untrained.
        precision: of the encoder on training crops.
        views: executor of the training crops, as in `choose_executor`.
        cache: folder for features, as in `cached_features`.
        cache_precision: dtype of the train features on disk with `cached`; test features are float32.
        num_workers: processes that load images. None: one per core, at most 16 in total.
        resume_unverified: resume from a checkpoint whose SHA-256 is missing.
        tensorboard: folder for the curves in TensorBoard. None: they are only in metrics.jsonl.

    Raises:
        UserError: a setting does not fit, an image cannot be read, or a feature is not finite. Checkpoints of
            earlier epochs are kept.
    """
    if not 0 < train_fraction <= 1:
        raise UserError(f"train_fraction is {train_fraction}; expected a number above 0 and at most 1")
    train = train if train_fraction == 1 else balanced_fraction(train, train_fraction, seed)
    test_sets = as_test_sets(test, train.classes)
    batch_size = fitting_batch_size(batch_size, len(train), world_size())
    probes = Probes(
        choose_probes(
            encoder, learning_rates=learning_rates, num_blocks=num_blocks, features=features, sweep=sweep
        ),
        width=encoder.width,
        embed_dim=encoder.embed_dim,
        num_classes=len(train.classes),
        seed=seed,
    ).to(encoder.device)
    protocol = CACHED if cached else OFFICIAL
    share = f"fraction-{train_fraction:g}" if train_fraction < 1 else ""
    kind = (protocol, "" if weights == "teacher" else weights, share, "sweep" if sweep else "")
    given = {"epochs": epochs, "batch_size": batch_size, "seed": seed, "train_fraction": train_fraction}
    settings = {
        "probes": [probe.name for probe in probes.probes],
        **given,
        "classes": len(train.classes),
        "train images": train.fingerprint(),
        "val images": test_sets[0].source.fingerprint(),
        "train files": _files(train),
        "val files": _files(test_sets[0].source),
        "encoder": hash_of(encoder),
        "cached": cached,
        "cache_precision": cache_precision if cached else None,
    }
    steps_per_epoch = len(train) // batch_size
    training = ProbeTraining(probes, Path(folder) / "-".join(filter(None, kind)), steps_per_epoch, settings)
    training.resume(unverified=resume_unverified)
    wanted = wanted_of(test_sets)
    wanted += [Wanted(train, "train features", cache_precision)] if cached else []
    found = cached_features(encoder, wanted, INPUTS, cache=cache, num_workers=num_workers)

    if training.epochs_done < epochs:
        log.info(
            "%s: epoch %d of %d, %s, %s",
            *(training.folder, training.epochs_done + 1, epochs),
            *(counted(len(training.names), "probe"), counted(len(train), "train image")),
        )
        if rank() == 0:
            training.folder.mkdir(parents=True, exist_ok=True)
        order = BatchOrder(
            num_samples=len(train),
            global_batch_size=batch_size,
            epochs=epochs,
            seed=seed,
            first_step=training.steps_done,
            rank=rank(),
            world_size=world_size(),
        )
        run_log = RunLog(
            training.folder,
            first_step=training.steps_done,
            steps_per_epoch=steps_per_epoch,
            total_steps=epochs * steps_per_epoch,
            silent=rank() > 0,
            group="probe",
            events=tensorboard,
        )
        opened: AbstractContextManager[Iterator[ProbeBatch]]
        if cached:
            opened = nullcontext(features_of_rows(found[-1], train, order, run_log, encoder.device, probes))
        else:
            workers = default_workers(local_world_size()) if num_workers is None else num_workers
            opened = features_of_crops(
                *(encoder, train, order, run_log, probes),
                precision=choose_precision(precision, encoder.device),
                executor=choose_executor(views, encoder.device, max_side=MAX_SIDE, num_workers=workers),
                num_workers=workers,
            )
        every_epochs = 10 if cached else 1  # an epoch on cached features is faster than writing a checkpoint
        with run_log, opened as batches:
            training.fit(batches, run_log, test_sets[0], found[0], checkpoint_every_epochs=every_epochs)
    details = {"protocol": protocol, **given, "num_train": len(train)}
    classifiers = training.classifiers(train.classes, details)
    return results_of(encoder, classifiers, probes, test_sets, found[: len(test_sets)], weights)


def _files(source: ImageSource) -> str:
    """What tells whether files of the same names are the same images, read in the same way."""
    return f"{hash_of_some(source)} {getattr(source, 'reading', AS_IS).value_range}"


class ProbeTraining:
    """Linear probes with their optimizer, schedule, and progress.

    Args:
        folder: for log, checkpoints, and classifiers.
        settings: everything that the result depends on, by the name used in messages; includes probes,
            epochs, and batch_size.

    Attributes:
        best: for each probe its highest top-1 on the first test set in percent, and the epoch of it.
    """

    def __init__(self, probes: Probes, folder: Path, steps_per_epoch: int, settings: dict[str, Any]) -> None:
        self.probes, self.folder, self.settings = probes, folder, settings
        self.names: list[str] = settings["probes"]
        self.epochs, self.batch_size = settings["epochs"], settings["batch_size"]
        optimizer = probes.optimizer(self.batch_size)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.epochs)
        self.optimizer, self.schedule = optimizer, schedule
        self.learning: dict[str, Any] = {"probes": probes, "optimizer": optimizer, "schedule": schedule}
        self.epochs_done, self.steps_per_epoch = 0, steps_per_epoch
        self.best: list[tuple[float, int]] = [(-1.0, 0)] * len(self.names)

    @property
    def steps_done(self) -> int:
        """Optimizer steps that are done."""
        return self.epochs_done * self.steps_per_epoch

    def resume(self, *, unverified: bool) -> None:
        """Resume from the newest checkpoint of the folder, if there is one.

        Raises:
            UserError: its settings differ, its SHA-256 is missing, or processes find different checkpoints.
        """
        checkpoint = load_latest(self.folder, unverified=unverified)
        if checkpoint is not None:
            with read_as(
                f"{self.folder} has a checkpoint that holds no probes with these settings",
                "remove the folder, or give another --out",
            ):
                self._restore(checkpoint)
        steps = sorted(set(gather_objects(self.steps_done)))
        if len(steps) > 1:
            raise UserError(
                f"{self.folder}: processes find different checkpoints (steps {steps}); use a folder that all "
                f"machines share"
            )
        if rank() == 0 and self.folder.exists():
            set_damaged_aside(self.folder, self.steps_done)

    def _restore(self, checkpoint: dict[str, Any]) -> None:
        """Raises UserError: it is of other settings; any error: it is damaged."""
        before = checkpoint["config"]
        changed = [
            f"{key} was {before[key]!r}, now {now!r}"
            for key, now in self.settings.items()
            if key not in FILES and before[key] != now
        ]
        if changed:
            raise UserError(
                f"{self.folder} holds probes with other settings ({'; '.join(changed)}); use the same "
                f"settings to resume them, or another --out"
            )
        if others := [key for key in FILES if before.get(key, self.settings[key]) != self.settings[key]]:
            log.warning(
                "WARNING: %s was trained, or begun, before these changed: %s, of the same names; if that is "
                "more than a repaired image, give another --out",
                *(self.folder, " and ".join(others)),
            )
        self.epochs_done = range(self.epochs + 1)[checkpoint["epochs_done"]]
        complete = self.epochs_done == self.epochs  # in older versions the optimizer had a group per probe
        for name in ["probes"] if complete else self.learning:
            self.learning[name].load_state_dict(checkpoint[name])
        self.best = [(float(top1), int(epoch)) for top1, epoch in checkpoint["best"]]
        if len(self.best) != len(self.names):
            raise ValueError(f"{len(self.best)} results of {len(self.names)} probes")

    def fit(
        self,
        batches: Iterator[ProbeBatch],
        run_log: RunLog,
        val: TestSet,
        val_features: Features,
        *,
        checkpoint_every_epochs: int,
    ) -> None:
        """Train the remaining epochs; after each, score the probes on `val`, log, and save if due.

        Args:
            batches: this process's part of each global batch.
        """
        while self.epochs_done < self.epochs:
            self._train_epoch(batches, run_log)
            self.schedule.step()
            self.epochs_done += 1
            with run_log.not_training():
                top1, top5 = 100 * score(self.probes, val, val_features).mean(axis=0).T
            highest = int(np.argmax(top1))
            shown = f"{self.names[highest]} top1 {top1[highest]:.2f} % top5 {top5[highest]:.2f} %"
            shown += f", the best of {len(top1)} probes" if len(top1) > 1 else ""
            values = self._by_probe("top1", top1) | self._by_probe("top5", top5)
            run_log.evaluation(self.steps_done, values, shown)
            for number, accuracy in enumerate(top1.tolist()):
                if accuracy > self.best[number][0]:
                    self.best[number] = (accuracy, self.epochs_done)
            if self.epochs_done % checkpoint_every_epochs == 0 or self.epochs_done == self.epochs:
                run_log.flush()
                if rank() == 0:
                    state = {name: part.state_dict() for name, part in self.learning.items()}
                    state |= {"step": self.steps_done, "epochs_done": self.epochs_done}
                    state |= {"config": self.settings, "best": self.best}
                    save_checkpoint(state, self.folder, step=self.steps_done)

    def _train_epoch(self, batches: Iterator[ProbeBatch], run_log: RunLog) -> None:
        """Train one epoch; logged losses are means since the start of the epoch."""
        device = next(self.probes.parameters()).device
        total_P = torch.zeros(len(self.names), device=device)
        bad = torch.zeros((), device=device)  # batches with features that are not finite; read when logging
        for step in range(1, self.steps_per_epoch + 1):
            inputs, labels, finite = next(batches)
            total_P += self.probes.step(inputs, labels, self.optimizer)
            bad += ~finite
            done = self.steps_done + step
            run_log.step_done(done)
            if step % LOG_EVERY_STEPS == 0 or step == self.steps_per_epoch:
                if sum_over_ranks(bad.clone()).item():
                    raise UserError(
                        f"features of train images are not finite in epoch {self.epochs_done + 1}: the "
                        f"weights are damaged; use another checkpoint"
                    )
                mean_P = (mean_over_ranks(total_P.clone()) / step).tolist()
                values = {"loss": float(np.mean(mean_P)), "lr": self.optimizer.param_groups[0]["lr"]}
                values |= self._by_probe("loss", mean_P) if len(mean_P) > 1 else {}
                run_log.scalars(done, values | run_log.speed(done, batch_size=self.batch_size))

    def _by_probe(self, what: str, values: Any) -> dict[str, float]:
        """A value for each probe by log key."""
        return {f"{name} {what}": float(value) for name, value in zip(self.names, values, strict=True)}

    def classifiers(self, classes: tuple[str, ...], details: dict[str, Any]) -> list[SavedClassifier]:
        """The trained probes with their details, also saved below the folder."""
        weights, classifiers = self.probes.state_dict(), []
        for number, (probe, (best, epoch)) in enumerate(zip(self.probes.probes, self.best, strict=True)):
            weight, bias = (weights[f"classifiers.{number}.{name}"] for name in ("weight", "bias"))
            of_probe = {
                "feature": probe.feature,
                "num_blocks": probe.num_blocks,
                "learning_rate": probe.learning_rate,
                **details,
                "best_val_top1": best,
                "best_val_epoch": epoch,
            }
            encoder = self.settings["encoder"]
            classifiers.append(SavedClassifier(probe, weight, bias, classes, encoder, of_probe))
        if rank() == 0:
            folder = self.folder / CLASSIFIERS
            folder.mkdir(parents=True, exist_ok=True)
            for one in classifiers:
                save_classifier(folder / f"{one.probe.name.replace(' ', '_')}.safetensors", one)
            log.info("classifiers are in %s", folder)
        return classifiers


def fitting_batch_size(batch_size: int, num_images: int, processes: int) -> int:
    """The global batch size, reduced with a warning if there are fewer train images.

    Raises:
        UserError: it is not divisible by the processes, or there are fewer images than processes.
    """
    most = num_images // processes * processes
    if batch_size > num_images and most:
        log.warning(
            "WARNING: batch_size is %d, but there are only %d train images; using %d, which also scales the "
            "learning rate",
            *(batch_size, num_images, most),
        )
        return most
    if not most:
        raise UserError(
            f"{counted(num_images, 'train image')} for {processes} processes; use fewer processes"
        )
    if batch_size % processes:
        raise UserError(
            f"batch_size is {batch_size} for {num_images} train images, not divisible by {processes} "
            f"processes; use a multiple, such as {max(1, batch_size // processes) * processes}"
        )
    return batch_size


def table(run: str, results: Sequence[Result]) -> str:
    """The results of one evaluation as lines of text; `best` is the highest top-1 on val of all epochs."""

    def heading(result: Result) -> str:
        details = result.details
        what, trained = "linear probe", ""
        counts = f"{result.num_images} test images, {result.num_classes} classes"
        if details["protocol"] == CACHED:
            what += " on cached center crops (not the official protocol)"
        if "weights_file" in details:
            what += f" of {details['weights_file']}"
        else:
            counts = f"{details['num_train']} train and {counts}"
            trained = f", {counted(details['epochs'], 'epoch')}, batch {details['batch_size']}"
        return f"{run} ({result.weights}), {what}, {result.test_set}: {counts}{trained}"

    def best(result: Result) -> str:
        details = result.details
        if result.test_set != VAL or "best_val_top1" not in details:
            return ""
        return f"   best {details['best_val_top1']:6.2f} % (epoch {details['best_val_epoch']})"

    return "\n".join(accuracies(results, heading, best))

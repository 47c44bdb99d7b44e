"""Pretraining: DINO with any read-out. `train_step` is the algorithm, `pretrain` everything around it.

Axis letters: B images, C crops, K prototypes.
"""

import logging
import math
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dino_sparo.data.loader import (
    BatchOrder,
    Crops,
    CropsDataset,
    UnreadableImage,
    crop_batches,
    crops_picture,
    default_workers,
    normalize,
)
from dino_sparo.data.sources import ImageSource, open_images
from dino_sparo.data.views import crop_recipes
from dino_sparo.device import choose_device
from dino_sparo.distributed import rank
from dino_sparo.errors import UserError
from dino_sparo.options import PretrainOptions
from dino_sparo.training.checkpoint import load_latest, save_checkpoint, set_damaged_aside
from dino_sparo.training.monitor import KnnMonitor, open_knn_monitor, peak_memory_gib, step_metrics
from dino_sparo.training.optim import clip_gradients_per_parameter, set_hyperparameters
from dino_sparo.training.rundir import check_same_experiment, check_same_images, config_of, start_run_dir
from dino_sparo.training.runlog import RunLog
from dino_sparo.training.schedules import Hyperparameters, Schedules, cosine_schedule, teacher_temp_schedule
from dino_sparo.training.state import TrainState, build_state, capture_state, restore_state
from dino_sparo.training.teacher import update_teacher

log = logging.getLogger("dino_sparo")


@dataclass(frozen=True)
class StepOutput:
    """Tensors of one step, left on the device; the centre is the one that the loss used."""

    loss: Tensor
    teacher_logits: Tensor
    center: Tensor
    teacher_encodings: Tensor
    gradient_norms: Tensor


def train_step(
    state: TrainState,
    crop_groups: list[Tensor],
    hyper: Hyperparameters,
    *,
    clip_norm: float,
    autocast: AbstractContextManager[Any],
) -> StepOutput:
    """One optimiser step on groups of crops (C_i, B, 3, side, side), the two global crops first."""
    set_hyperparameters(state.optimizer, lr=hyper.lr, weight_decay=hyper.weight_decay)

    with torch.no_grad(), autocast:
        teacher_logits, teacher_encodings = state.teacher(crop_groups[:1])  # (2*B, K)
    with autocast:
        student_logits, _ = state.student(crop_groups)  # (C*B, K)
    loss = state.loss_fn(student_logits, teacher_logits, hyper.teacher_temp)

    state.optimizer.zero_grad(set_to_none=True)
    loss.backward()
    gradient_norms = clip_gradients_per_parameter(state.student.parameters(), clip_norm)
    if hyper.freeze_last_layer:
        for parameter in state.student.head.last_layer.parameters():
            parameter.grad = None  # AdamW then neither decays it nor counts a step

    state.optimizer.step()
    update_teacher(state.teacher, state.student, hyper.momentum)
    center = state.loss_fn.center.clone()
    state.loss_fn.update_center(teacher_logits)
    return StepOutput(loss.detach(), teacher_logits, center, teacher_encodings, gradient_norms)


@dataclass(frozen=True, kw_only=True)
class Run:
    """A prepared run: everything that stays the same while it trains, and the state that learns."""

    options: PretrainOptions
    config: dict[str, Any]
    run_dir: Path
    images: dict[str, Any]
    device: torch.device
    num_workers: int
    state: TrainState
    schedules: Schedules
    steps_per_epoch: int
    total_steps: int
    knn_monitor: KnnMonitor | None


def pretrain(options: PretrainOptions) -> None:
    """`dino-sparo pretrain`: start a run, or go on where it stopped.

    Raises:
        UserError: for a mistake in options or data; nothing has been written then.
    """
    device = choose_device(options.machine.device)
    num_workers = default_workers() if options.machine.num_workers is None else options.machine.num_workers
    config, run_dir = config_of(options), Path(options.run_dir)
    check_same_experiment(run_dir, config)
    source = open_training_images(options)
    images = {"num_images": len(source), "fingerprint": source.fingerprint()}
    knn_monitor = None
    if options.monitor.knn_every_epochs:
        knn_monitor = open_knn_monitor(
            path=options.monitor.knn_path,
            data_path=options.data.path,
            images_per_class=options.monitor.knn_images_per_class,
            image_size=options.views.global_size,
            num_workers=num_workers,
        )

    state = build_state(config, device)
    done = 0
    checkpoint = load_latest(run_dir)
    if checkpoint is not None:
        check_same_images(run_dir, checkpoint["images"], images)
        restore_state(state, checkpoint)
        done = checkpoint["step"]
        del checkpoint

    order = BatchOrder(
        num_samples=len(source),
        batch_size=options.optim.global_batch_size,
        epochs=options.optim.epochs,
        seed=options.seed,
        first_step=done,
    )
    run = Run(
        options=options,
        config=config,
        run_dir=run_dir,
        images=images,
        device=device,
        num_workers=num_workers,
        state=state,
        schedules=build_schedules(options, order.steps_per_epoch),
        steps_per_epoch=order.steps_per_epoch,
        total_steps=order.steps_per_epoch * options.optim.epochs,
        knn_monitor=knn_monitor,
    )
    if done == run.total_steps:
        log.info("%s is complete: all %d epochs are done", run_dir, options.optim.epochs)
        return
    start_run_dir(run_dir, config)
    set_damaged_aside(run_dir, done)
    batches = crop_batches(
        CropsDataset(source, crop_recipes(**asdict(options.views)), options.seed),
        order,
        num_workers=num_workers,
        prefetch_batches=options.machine.prefetch_batches,
        pin_memory=device.type == "cuda",
    )
    train(run, iter(batches), done)


def train(run: Run, batches: Iterator[Crops | UnreadableImage], done: int) -> None:
    """The loop: from `done` finished steps to the end of the run. Source: DINO, algorithm 1."""
    options, state = run.options, run.state
    bfloat16 = use_bfloat16(options.machine.precision, run.device)
    autocast = torch.autocast(run.device.type, torch.bfloat16, enabled=bfloat16)
    log.info(
        f"{run.run_dir}: {'going on' if done else 'starting'} at step {done} of {run.total_steps}, "
        f"{run.images['num_images']} images, {run.num_workers} workers, {run.device}, "
        f"{'bf16' if bfloat16 else 'fp32'}"
    )
    last_save = time.monotonic()
    with RunLog(
        run.run_dir, first_step=done, steps_per_epoch=run.steps_per_epoch, total_steps=run.total_steps
    ) as run_log:
        if done == 0:
            evaluate(run, run_log, done)
        while done < run.total_steps:
            with run_log.waiting_for_data():
                crops = next(batches)
            if isinstance(crops, UnreadableImage):
                crops.raise_error()
            if done == 0:
                run_log.picture(0, "first_crops", crops_picture(crops))
            crop_groups = [normalize(x.to(run.device, non_blocking=True)) for x in crops if x.numel()]

            hyper = run.schedules.at(done)
            torch.manual_seed(step_seed(options.seed, done, rank()))  # for stochastic depth
            output = train_step(
                state, crop_groups, hyper, clip_norm=options.optim.clip_norm, autocast=autocast
            )
            done += 1

            run_log.step_done(done)
            if done % options.log.log_every_steps == 0 or done == run.total_steps:
                log_step(run, run_log, done, hyper, output)
            epoch, rest = divmod(done, run.steps_per_epoch)
            at_end = done == run.total_steps
            if rest == 0 and (at_end or is_due(epoch, options.monitor.knn_every_epochs)):
                evaluate(run, run_log, done)
            minutes = (time.monotonic() - last_save) / 60
            if (
                at_end
                or (rest == 0 and is_due(epoch, options.log.checkpoint_every_epochs))
                or (rest == 0 and is_due(epoch, options.log.keep_every_epochs))
                or 0 < options.log.checkpoint_every_minutes <= minutes
            ):
                run_log.flush()
                save(run, done)
                last_save = time.monotonic()


def evaluate(run: Run, run_log: RunLog, done: int) -> None:
    """k-NN of the teacher into the log, if there is a labelled folder."""
    if run.knn_monitor is not None:
        with run_log.not_training():
            run_log.evaluation(done, run.knn_monitor.evaluate(run.state.teacher.encoder))


def log_step(run: Run, run_log: RunLog, done: int, hyper: Hyperparameters, output: StepOutput) -> None:
    """One entry of the training curve; here, in `evaluate` and in `save` the host waits for the device."""
    on_device = step_metrics(teacher_temp=hyper.teacher_temp, **vars(output))
    metrics = dict(zip(on_device, torch.stack(list(on_device.values())).tolist(), strict=True))
    if not math.isfinite(metrics["loss"]):
        raise diverged(run, done, f"the loss is {metrics['loss']}")
    schedules = {
        "lr": hyper.lr,
        "weight_decay": hyper.weight_decay,
        "momentum": hyper.momentum,
        "teacher_temp": hyper.teacher_temp,
        "student_temp": run.options.loss.student_temp,
        "memory_gib": peak_memory_gib(run.device),
    }
    run_log.scalars(done, metrics | schedules, batch_size=run.options.optim.global_batch_size)


def diverged(run: Run, done: int, what: str) -> UserError:
    """The error that ends a run whose numbers went wrong; no such state is ever saved."""
    return UserError(
        f"{what} at step {done}: the run has diverged, and no such state was saved; go on with "
        f"machine.precision fp32, or start in a new run_dir with a lower optim.lr_per_256"
    )


def save(run: Run, done: int) -> None:
    """Write the whole state as a checkpoint, unless it has diverged."""
    norms = torch.stack(torch._foreach_norm(list(run.state.student.parameters())))
    if not norms.isfinite().all():
        raise diverged(run, done, "a parameter is no longer finite")
    state = {"step": done, "config": run.config, "images": run.images, **capture_state(run.state)}
    keep_every_steps = run.options.log.keep_every_epochs * run.steps_per_epoch
    save_checkpoint(state, run.run_dir, step=done, keep_every_steps=keep_every_steps)


def open_training_images(options: PretrainOptions) -> ImageSource:
    """The images to learn from, at least one batch of them."""
    source = open_images(options.data.path, options.data.max_images)
    if len(source) < options.optim.global_batch_size:
        raise UserError(
            f"data.path {options.data.path!r} gives {len(source)} images, fewer than one batch: "
            f"optim.global_batch_size is {options.optim.global_batch_size}; use more images or "
            f"a smaller batch"
        )
    return source


def build_schedules(options: PretrainOptions, steps_per_epoch: int) -> Schedules:
    """All schedules of the run."""
    optim, loss = options.optim, options.loss
    total = optim.epochs * steps_per_epoch
    peak_lr = optim.lr_per_256 * optim.global_batch_size / 256
    return Schedules(
        lr=cosine_schedule(peak_lr, optim.final_lr, total, optim.warmup_epochs * steps_per_epoch),
        weight_decay=cosine_schedule(optim.weight_decay, optim.final_weight_decay, total),
        momentum=cosine_schedule(optim.teacher_momentum, 1.0, total),
        teacher_temp=teacher_temp_schedule(
            loss.warmup_teacher_temp, loss.teacher_temp, loss.warmup_teacher_temp_epochs, optim.epochs
        ),
        freeze_last_layer_epochs=optim.freeze_last_layer_epochs,
        steps_per_epoch=steps_per_epoch,
    )


def use_bfloat16(precision: str, device: torch.device) -> bool:
    """Whether networks compute in bfloat16: `auto` does on a GPU that has it."""
    if precision == "auto":
        return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return precision == "bf16"


def is_due(epoch: int, every_epochs: int) -> bool:
    """Whether something that happens every so many epochs (0: never) happens after this one."""
    return every_epochs > 0 and epoch % every_epochs == 0


def step_seed(seed: int, step: int, rank: int) -> int:
    """A seed of its own for each step and process, so that no random state needs saving."""
    return ((seed * 1_000_003 + step) * 1_009 + rank) % 2**63

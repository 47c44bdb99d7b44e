"""Pretraining: DINO with any read-out. `train_step` is the algorithm, `pretrain` everything around it.

Axis letters: B images, C crops, K prototypes.
"""

import logging
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dino_sparo.checks import smaller_batch
from dino_sparo.data.loader import Crops, UnreadableImage, crops_picture, normalize
from dino_sparo.device import choose_device, wait_for
from dino_sparo.distributed import (
    first_rank_decides,
    local_rank,
    mean_over_ranks,
    process_group,
    rank,
    unsynchronized,
    world_size,
)
from dino_sparo.errors import UserError
from dino_sparo.options import PretrainOptions
from dino_sparo.training.checkpoint import save_checkpoint, set_damaged_aside
from dino_sparo.training.loss import teacher_probabilities
from dino_sparo.training.monitor import TeacherStatistics, peak_memory_gib, slot_health
from dino_sparo.training.optim import clip_gradients_per_parameter, set_hyperparameters, step_if_finite
from dino_sparo.training.precision import autocast
from dino_sparo.training.rundir import start_run_dir
from dino_sparo.training.runlog import RunLog
from dino_sparo.training.schedules import Hyperparameters
from dino_sparo.training.setup import Run, prepare, training_batches
from dino_sparo.training.state import TrainState, capture_state
from dino_sparo.training.teacher import update_teacher

log = logging.getLogger("dino_sparo")

MAX_SKIPPED = 30  # steps in a row; a loss scale that begins too high needs fewer
HEALTH_IMAGES = 8


@dataclass(frozen=True)
class StepOutput:
    """Tensors of one step, left on the device.

    The loss is the mean over all micro-batches of this process, images are the first global crops of the
    last one, and the centre is the one that the loss used.
    """

    loss: Tensor
    images: Tensor
    center: Tensor
    gradient_norms: Tensor


def train_step(
    state: TrainState,
    micro_batches: Iterator[list[Tensor]],
    accumulation: int,
    hyper: Hyperparameters,
    *,
    clip_norm: float,
    autocast: AbstractContextManager[Any],
    statistics: TeacherStatistics | None = None,
) -> StepOutput:
    """One optimiser step on `accumulation` micro-batches.

    A micro-batch is groups of crops (C_i, B, 3, side, side), the two global crops first. A step whose
    gradients are not finite changes neither student nor teacher nor centre; only the device knows. The
    statistics, if they are wanted of this step, are added to.
    """
    set_hyperparameters(state.optimizer, lr=hyper.lr, weight_decay=hyper.weight_decay)
    state.optimizer.zero_grad(set_to_none=True)
    loss_of_step = torch.zeros((), device=state.loss_fn.center.device)

    for number in range(accumulation):
        crop_groups = next(micro_batches)
        with torch.no_grad(), autocast:
            teacher_logits, teacher_encodings = state.teacher(crop_groups[:1])  # (2*B, K)
        with unsynchronized(state.parallel_student, unless=number == accumulation - 1):
            with autocast:
                student_logits, _ = state.parallel_student(crop_groups)  # (C*B, K)
            loss = state.loss_fn(student_logits, teacher_logits, hyper.teacher_temp) / accumulation
            state.loss_scale.scaled(loss).backward()
        if statistics is not None:
            answers = teacher_probabilities(teacher_logits, state.loss_fn.center, hyper.teacher_temp)
            statistics.add(answers, teacher_encodings)
        state.loss_fn.add_to_center(teacher_logits)
        loss_of_step += loss.detach()

    state.loss_scale.unscale([p.grad for p in state.student.parameters() if p.grad is not None])
    gradient_norms = clip_gradients_per_parameter(state.student.parameters(), clip_norm)
    finite = gradient_norms.isfinite().all()  # on all processes alike: they share the gradients
    if hyper.freeze_last_layer:
        for parameter in state.student.head.last_layer.parameters():
            parameter.grad = None  # AdamW then neither decays it nor counts a step

    step_if_finite(state.optimizer, finite)
    state.loss_scale.update(finite)
    state.count_skipped(finite)
    update_teacher(state.teacher, state.student, hyper.momentum, finite)
    center = state.loss_fn.center.clone()
    state.loss_fn.commit_center(finite)
    return StepOutput(loss_of_step, crop_groups[0][0], center, gradient_norms)


def pretrain(options: PretrainOptions) -> None:
    """`dino-sparo pretrain`: start a run, or go on where it stopped; in every process that torchrun started.

    Raises:
        UserError: for a mistake in options or data; nothing has been written then.
    """
    device = choose_device(options.machine.device, local_rank())
    with process_group(device):
        run = prepare(options, device)
        if run.first_step == run.total_steps:
            log.info("%s is complete: all %d epochs are done", run.run_dir, options.optim.epochs)
            return
        if rank() == 0:
            start_run_dir(run.run_dir, run.config, machine_of(run))
            set_damaged_aside(run.run_dir, run.first_step)
        batches = training_batches(run)
        try:
            with batches.failures_explained():
                train(run, iter(batches))
        except torch.OutOfMemoryError as error:
            size = run.order.micro_batch_size
            smaller = smaller_batch(size * run.order.accumulation, size)
            raise UserError(
                f"the GPU's memory does not hold {size} images at once ({str(error).split('.')[0]}); give "
                f"machine.batch_size_per_gpu {smaller} (the experiment stays the same) or "
                f"machine.activation_checkpointing true"
            ) from error


def train(run: Run, batches: Iterator[Crops | UnreadableImage]) -> None:
    """The loop: from the run's first step to its end. Source: DINO, algorithm 1."""
    options, state, done = run.options, run.state, run.first_step
    steps_per_epoch = run.order.steps_per_epoch
    log.info(describe(run))
    if run.device.type == "cuda" and world_size() == 1 < torch.cuda.device_count():
        log.info("this machine has %d GPUs; --nproc uses more than one", torch.cuda.device_count())
    last_save = time.monotonic()
    with RunLog(
        run.run_dir,
        first_step=done,
        steps_per_epoch=steps_per_epoch,
        total_steps=run.total_steps,
        silent=rank() > 0,
    ) as run_log:
        if done == 0:
            evaluate(run, run_log, done)
        micro_batches = on_device(run, batches, run_log)
        while done < run.total_steps:
            hyper = run.schedules.at(done)
            torch.manual_seed(step_seed(options.seed, done, rank()))  # for stochastic depth
            done += 1
            at_end = done == run.total_steps
            log_now = at_end or done % options.log.log_every_steps == 0
            statistics = TeacherStatistics() if log_now else None
            output = train_step(
                state,
                micro_batches,
                run.order.accumulation,
                hyper,
                clip_norm=options.optim.clip_norm,
                autocast=autocast(run.precision, run.device),
                statistics=statistics,
            )

            run_log.step_done(done)
            epoch, rest = divmod(done, steps_per_epoch)
            save_now = at_end or (
                rest == 0
                and (
                    is_due(epoch, options.log.checkpoint_every_epochs)
                    or is_due(epoch, options.log.keep_every_epochs)
                )
            )
            if statistics is not None:
                wait_for(run.device)  # for the steps themselves: what follows is the cost of logging
                with run_log.logging():
                    log_step(run, run_log, done, hyper, output, statistics)
                minutes = (time.monotonic() - last_save) / 60
                save_now |= first_rank_decides(0 < options.log.checkpoint_every_minutes <= minutes)
            if rest == 0 and (at_end or is_due(epoch, options.monitor.knn_every_epochs)):
                evaluate(run, run_log, done)
            if save_now:
                run_log.flush()
                save(run, done)
                last_save = time.monotonic()


def on_device(
    run: Run, batches: Iterator[Crops | UnreadableImage], run_log: RunLog
) -> Iterator[list[Tensor]]:
    """Micro-batches as groups of normalised crops on the training device."""
    for number in range(len(run.order)):
        with run_log.waiting_for_data():
            crops = next(batches)
        if isinstance(crops, UnreadableImage):
            remedy = "repair the file, or let another image stand in by data.on_bad_image substitute"
            crops.raise_error(remedy)
        run.bad_images.add(crops.replaced)
        if number == 0 and run.first_step == 0:
            run_log.picture(0, "first_crops", crops_picture(crops))
        groups = (crops.global_crops, crops.local_crops)
        yield [normalize(x.to(run.device, non_blocking=True)) for x in groups if x.numel()]


def evaluate(run: Run, run_log: RunLog, done: int) -> None:
    """k-NN of the teacher into the log, if there is a labelled folder; all processes share the work."""
    if run.knn_monitor is not None:
        with run_log.not_training():
            run_log.evaluation(done, run.knn_monitor.evaluate(run.state.teacher.encoder))


def log_step(
    run: Run,
    run_log: RunLog,
    done: int,
    hyper: Hyperparameters,
    output: StepOutput,
    statistics: TeacherStatistics,
) -> None:
    """One entry of the training curve; before it, in `evaluate` and in `save` the host waits for the device.

    kl is the mean KL divergence from teacher to student over all pairs; gradient_norm is of all gradients
    before clipping, gradient_norm_max of the largest tensor.
    """
    loss, of_teacher = mean_over_ranks(output.loss), statistics.metrics()
    on_device = {"loss": loss, "kl": loss - of_teacher["entropy_teacher"], **of_teacher}
    on_device |= {"center_norm": output.center.norm()}
    on_device |= {"gradient_norm": torch.linalg.vector_norm(output.gradient_norms)}
    on_device |= {"gradient_norm_max": output.gradient_norms.max()}
    with autocast(run.precision, run.device):
        on_device |= slot_health(run.state.teacher.encoder, output.images[:HEALTH_IMAGES])
    on_device |= {"loss_scale": run.state.loss_scale.scale}
    on_device |= {"skipped_steps": run.state.skipped[0].float(), "in_a_row": run.state.skipped[1].float()}
    metrics = dict(zip(on_device, torch.stack(list(on_device.values())).tolist(), strict=True))
    in_a_row = metrics.pop("in_a_row")
    schedules = {
        "lr": hyper.lr,
        "weight_decay": hyper.weight_decay,
        "momentum": hyper.momentum,
        "teacher_temp": hyper.teacher_temp,
        "student_temp": run.options.loss.student_temp,
        "memory_gib": peak_memory_gib(run.device),
    }
    run.bad_images.share()
    counts = {"bad_images": len(run.bad_images)}
    run_log.scalars(done, metrics | schedules | counts, batch_size=run.options.optim.global_batch_size)
    alarm = run.alarm.check(done, metrics["entropy_teacher"], metrics["entropy_mean"])
    if alarm:
        run_log.alarm(done, alarm)
    if in_a_row >= MAX_SKIPPED:
        raise diverged(run, done, f"no finite gradient in {MAX_SKIPPED} steps (loss {metrics['loss']})")


def diverged(run: Run, done: int, what: str) -> UserError:
    """The error that ends a run whose numbers went wrong; no such state is ever saved."""
    go_on = "" if run.precision == "fp32" else "go on with machine.precision fp32, or "
    return UserError(
        f"{what} at step {done}: the run has diverged, and no such state was saved; {go_on}start in a new "
        f"run_dir with a lower optim.lr_per_256"
    )


def save(run: Run, done: int) -> None:
    """Write the whole state as a checkpoint, unless it has diverged; all processes call it, one writes."""
    run.bad_images.share()
    norms = torch.stack(torch._foreach_norm(list(run.state.student.parameters())))
    if not norms.isfinite().all():
        raise diverged(run, done, "a parameter is no longer finite")
    if rank() == 0:
        state = {"step": done, "config": run.config, "images": run.images, **capture_state(run.state)}
        keep_every_steps = run.options.log.keep_every_epochs * run.order.steps_per_epoch
        save_checkpoint(state, run.run_dir, step=done, keep_every_steps=keep_every_steps)


def machine_of(run: Run) -> dict[str, Any]:
    """What the run is computed on and how, for the list of starts."""
    gpu = torch.cuda.get_device_name(run.device) if run.device.type == "cuda" else None
    return {
        "processes": world_size(),
        "device": gpu or "cpu",
        "precision": run.precision,
        "batch_size_per_gpu": run.order.micro_batch_size,
        "accumulation": run.order.accumulation,
    }


def describe(run: Run) -> str:
    """One line about what starts."""
    accumulation = f" x {run.order.accumulation} micro-batches" if run.order.accumulation > 1 else ""
    return (
        f"{run.run_dir}: {'going on' if run.first_step else 'starting'} at step {run.first_step} of "
        f"{run.total_steps}, {run.images['num_images']} images, {world_size()} x {run.device.type}, "
        f"{run.order.micro_batch_size} images each{accumulation}, {run.precision}, "
        f"{run.num_workers} workers each"
    )


def is_due(epoch: int, every_epochs: int) -> bool:
    """Whether something that happens every so many epochs (0: never) happens after this one."""
    return every_epochs > 0 and epoch % every_epochs == 0


def step_seed(seed: int, step: int, rank: int) -> int:
    """A seed of its own for each step and process, so that no random state needs saving."""
    return ((seed * 1_000_003 + step) * 1_009 + rank) % 2**63

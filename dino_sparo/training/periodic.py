"""What is done every so many steps: log entry, evaluation, checkpoint; and what ends the run early."""

import logging
from typing import Any, NoReturn

import torch

from dino_sparo.data.tables import commit_of
from dino_sparo.errors import StoppedError, UserError
from dino_sparo.files import append_line
from dino_sparo.parallel.distributed import (
    first_rank_decides,
    gather_objects,
    mean_over_ranks,
    rank,
    world_size,
)
from dino_sparo.parallel.precision import autocast
from dino_sparo.runs.rundir import mark_stopped
from dino_sparo.runs.runlog import RunLog, read_metrics
from dino_sparo.runs.saver import Saver
from dino_sparo.slots.statistics import slot_health
from dino_sparo.training.monitor import TeacherStatistics, peak_memory_gib
from dino_sparo.training.optim import set_hyperparameters
from dino_sparo.training.schedules import Hyperparameters
from dino_sparo.training.setup import Run
from dino_sparo.training.state import StepOutput, capture_state
from dino_sparo.training.stopping import BAD_STEPS_FILE

log = logging.getLogger("dino_sparo")

MAX_OVERFLOWS = 30  # in a row; a loss scale that begins too high needs fewer
HEALTH_IMAGES = 8


def evaluate(run: Run, run_log: RunLog, step: int) -> None:
    """k-NN of the teacher into the log, if there is a labelled folder; all processes share the work."""
    if run.knn_monitor is not None:
        with run_log.not_training():
            run_log.evaluation(step, run.knn_monitor.evaluate(run.state.teacher.encoder))


def evaluation_is_missing(run: Run) -> bool:
    """Whether an evaluation belongs to the step that the run goes on from, but is not in the log."""
    every_steps = run.recipe.monitor.knn_every_epochs * run.order.steps_per_epoch
    if run.knn_monitor is None or not due(run.first_step, every_steps, run.total_steps):
        return False
    logged = read_metrics(run.run_dir) if run.first_step and rank() == 0 else []
    found = any(entry["step"] == run.first_step and "knn20_top1" in entry for entry in logged)
    return first_rank_decides(not found)


def due(step: int, every_steps: int, last_step: int) -> bool:
    """Whether something done every so many steps (0: never), and after the last one, is done after this."""
    return step == last_step or (every_steps > 0 and step % every_steps == 0)


def log_step(
    run: Run,
    run_log: RunLog,
    step: int,
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
        encoders = run.state.teacher.encoder, run.state.student.encoder
        on_device |= slot_health(*encoders, output.images[:HEALTH_IMAGES])
    on_device |= {"loss_scale": run.state.loss_scale.scale}
    counts = [*run.state.overflows, run.state.bad_steps.total]
    on_device |= zip(("overflows", "in_a_row", "bad_steps"), (count.float() for count in counts), strict=True)
    metrics = dict(zip(on_device, torch.stack(list(on_device.values())).tolist(), strict=True))
    in_a_row = metrics.pop("in_a_row")
    schedules = {
        "lr": hyper.lr,
        "weight_decay": hyper.weight_decay,
        "momentum": hyper.momentum,
        "teacher_temp": hyper.teacher_temp,
        "student_temp": run.recipe.loss.student_temp,
        "memory_gib": peak_memory_gib(run.device),
    }
    run.bad_images.share()
    metrics |= {**schedules, "bad_images": len(run.bad_images)}
    run_log.scalars(step, metrics, batch_size=run.recipe.optim.global_batch_size)
    alarm = run.alarm.check(step, metrics["entropy_teacher"], metrics["entropy_mean"])
    if alarm:
        run_log.alarm(step, alarm)
    if in_a_row >= MAX_OVERFLOWS:
        raise diverged(run, step, f"fp16 has overflowed in {MAX_OVERFLOWS} steps in a row")


def diverged(run: Run, step: int, what: str) -> UserError:
    """The error that ends a run whose numbers went wrong; no such state is ever saved."""
    go_on = "" if run.precision == "fp32" else "go on with machine.precision fp32, or "
    return UserError(
        f"{what} at step {step}: the run has diverged, and no such state was saved; {go_on}start in a new "
        f"run_dir with a lower optim.lr_per_256"
    )


def report_bad_steps(run: Run, saver: Saver, run_log: RunLog) -> None:
    """Report steps whose numbers went wrong, with their images; end the run if they are too many.

    Raises:
        UserError: they are; what was before the last of them is saved.
    """
    for number, step, what in run.state.bad_steps.new(run.first_step):
        samples = run.order.global_batch(step)
        if rank() == 0:
            images = [run.source.name(sample) for sample in samples]
            entry = {"step": step, "cause": what, "samples": samples, "images": images}
            append_line(run.run_dir / BAD_STEPS_FILE, entry)
        listed = f"step {step}: {what} not finite; its images are in {run.run_dir / BAD_STEPS_FILE}"
        if number > run.state.bad_steps.allowed:  # since then nothing has changed on the device
            write_checkpoint(run, saver, run_log, step - 1)
            saver.wait()
            gather_objects(None)  # none ends while the first one writes
            remedy = "" if run.precision == "fp32" else "machine.precision fp32, "
            raise UserError(
                f"{listed}, and the state before it is saved; look at them, then go on with {remedy}"
                f"optim.max_bad_steps {number} to skip such steps, or start in a new run_dir with "
                f"a lower optim.lr_per_256"
            )
        log.warning("WARNING: %s; it is skipped", listed)


def save(run: Run, saver: Saver, run_log: RunLog, step: int) -> None:
    """Save the state after a step, unless numbers have gone wrong; all processes call it, one writes."""
    report_bad_steps(run, saver, run_log)
    with run_log.not_training():
        write_checkpoint(run, saver, run_log, step)


def write_checkpoint(run: Run, saver: Saver, run_log: RunLog, step: int) -> None:
    """Begin to write the state as that after `step`; steps since then have changed nothing that learns."""
    run_log.flush()
    run.bad_images.share()
    state = run.state
    learned = [*state.student.parameters(), *state.teacher.parameters(), state.loss_fn.center]
    if not torch.stack(torch._foreach_norm(learned)).isfinite().all():
        raise diverged(run, step, "a parameter is no longer finite")
    if step:  # a later step, which changed nothing else, has set its own
        hyper = run.schedules.at(step - 1)
        set_hyperparameters(state.optimizer, lr=hyper.lr, weight_decay=hyper.weight_decay)
    if rank() == 0:
        saver.save(
            {"step": step, "config": run.recipe.as_dict(), "images": run.images, **capture_state(state)}, step
        )


def stop(run: Run, saver: Saver, run_log: RunLog, step: int, received: str) -> NoReturn:
    """End a run that was told to stop after `step`, when it is saved.

    Raises:
        StoppedError: always.
    """
    save(run, saver, run_log, step)
    saver.wait()
    received = next(filter(None, gather_objects(received)))
    if rank() == 0:
        mark_stopped(run.run_dir, step, received)
    gather_objects(None)  # none ends while the first one writes
    raise StoppedError(f"stopped by {received} after step {step} of {run.total_steps}, which is saved")


def machine_of(run: Run) -> dict[str, Any]:
    """What the run is computed on and how, for the list of starts."""
    gpu = torch.cuda.get_device_name(run.device) if run.device.type == "cuda" else None
    return {
        "processes": world_size(),
        "device": gpu or "cpu",
        "precision": run.precision,
        "batch_size_per_gpu": run.order.micro_batch_size,
        "accumulation": run.order.accumulation,
        "views": run.dataset.executor,
    } | commit_of(run.dataset.source)


def describe(run: Run) -> str:
    """One line about what starts."""
    accumulation = f" x {run.order.accumulation} micro-batches" if run.order.accumulation > 1 else ""
    return (
        f"{run.run_dir}: {'going on' if run.first_step else 'starting'} at step {run.first_step} of "
        f"{run.total_steps}, {run.images['num_images']} images, {world_size()} x {run.device.type}, "
        f"{run.order.micro_batch_size} images each{accumulation}, {run.precision}, "
        f"{run.num_workers} workers each"
    )

"""Periodic work of a run: log entries, evaluations, checkpoints; and errors that end it."""

import json
from typing import NoReturn

import torch

from dino_sparo.data.sources import spread_evenly
from dino_sparo.errors import StoppedError, UserError
from dino_sparo.evaluation.knn import HEADLINE_K, KNN, KNN_IMAGES, KNN_TOP5
from dino_sparo.evaluation.results import standard_error
from dino_sparo.files import append_line, write_file
from dino_sparo.parallel.device import end_of_work, wait_for
from dino_sparo.parallel.distributed import first_rank_decides, gather_objects, mean_over_ranks, rank
from dino_sparo.parallel.precision import autocast
from dino_sparo.runs.checkpoint import Saver
from dino_sparo.runs.rundir import BAD_STEPS_FILE, MARKER_FILE
from dino_sparo.runs.runlog import RunLog, each_metric
from dino_sparo.slots.maps import look
from dino_sparo.slots.statistics import HEALTH_IMAGES, slot_health
from dino_sparo.terminal import counted, log
from dino_sparo.training.monitor import evaluate_teacher, peak_memory_gib
from dino_sparo.training.optim import set_hyperparameters
from dino_sparo.training.schedules import Hyperparameters
from dino_sparo.training.setup import Run
from dino_sparo.training.state import StepOutput, capture_state

MAX_OVERFLOWS = 30  # in a row; lowering the initial loss scale takes fewer
MAP_IMAGES, MAP_SLOTS = 4, 8
GENTLER = (
    "a lower optim.lr_per_256, optim.teacher_momentum closer to 1, a longer optim.freeze_backbone_epochs, or "
    "fewer head.num_prototypes for a small dataset"
)


def due(step: int, every_steps: int, last_step: int) -> bool:
    """Whether periodic work is due after `step`: every `every_steps` steps (0: never), and after the last."""
    return step == last_step or (every_steps > 0 and step % every_steps == 0)


def evaluate(run: Run, run_log: RunLog, step: int) -> None:
    """Log slot maps, and the k-NN accuracy of the teacher if there are labeled images. A collective."""
    wait_for(run.device)
    left_out: dict[str, str] | None = {} if run.dataset.substitute else None
    with run_log.not_training():
        if rank() == 0:
            draw_slots(run, run_log, step)
        if run.knn_images is None:
            return
        accuracies = evaluate_teacher(
            run.state.teacher.encoder,
            run.knn_images,
            num_workers=run.num_workers,
            timeout_seconds=run.recipe.machine.data_timeout_seconds,
            left_out=left_out,
        )
        of_class = run.recipe.monitor.knn_images_per_class
        number = int(accuracies[KNN_IMAGES])
        shown = (
            f"{HEADLINE_K}-NN top-1 {accuracies[KNN]:.2f} % ± {standard_error(accuracies[KNN], number):.1f}, "
            f"top-5 {accuracies[KNN_TOP5]:.2f} %, {counted(number, 'test image')}"
            f"{f' (at most {of_class} per class, of test and of train)' if of_class else ''}"
        )
        run_log.evaluation(step, accuracies, shown)
    if left_out:  # equal in all processes
        log.warning("WARNING: k-NN has skipped %d images that cannot be read", len(left_out))
        run.bad_images.list(left_out, len(left_out), sum(map(len, run.knn_images)))
    if step and run.recipe.init is not None and rank() == 0:
        warn_if_worse_than_start(run, run_log, step, accuracies[KNN])


def warn_if_worse_than_start(run: Run, run_log: RunLog, step: int, top1: float) -> None:
    """Warn if the 20-NN accuracy is below that of the initial weights."""
    entries = each_metric(run.run_dir)
    start = next((entry[KNN] for entry in entries if entry["step"] == 0 and KNN in entry), top1)
    if top1 < start:
        run_log.alarm(
            step,
            f"20-NN is {top1:.2f} %, below the {start:.2f} % of the initial weights; if this persists, start "
            f"in a new run_dir with {GENTLER}",
        )


def draw_slots(run: Run, run_log: RunLog, step: int) -> None:
    """Log attention maps of the first slots on some images, unless one of them cannot be read."""
    encoder = run.state.teacher.encoder
    slots = range(min(MAP_SLOTS, encoder.num_slots))
    if not slots:
        return
    try:
        rows = look(encoder, run.source, spread_evenly(run.source, MAP_IMAGES), slots=slots)
    except UserError as error:
        log.info("no slot maps in TensorBoard: %s", error)
    else:
        run_log.picture(step, "slots/maps", torch.from_numpy(rows.as_one()).permute(2, 0, 1))


def evaluation_is_missing(run: Run) -> bool:
    """Whether an evaluation is due at the step from which the run starts or resumes, but not in the log."""
    every_steps = run.recipe.monitor.knn_every_epochs * run.order.steps_per_epoch
    if run.knn_images is None or not due(run.first_step, every_steps, run.total_steps):
        return False
    logged = each_metric(run.run_dir) if run.first_step and rank() == 0 else []
    found = any(entry["step"] == run.first_step and KNN in entry for entry in logged)
    return first_rank_decides(not found)


def log_step(
    run: Run,
    run_log: RunLog,
    step: int,
    hyper: Hyperparameters,
    output: StepOutput,
) -> None:
    """Log the metrics of a step; on a GPU the entry is written later, once they are computed.

    The last entry of an epoch includes statistics of slots. kl is the mean KL divergence from teacher to
    student over all pairs of crops. gradient_norm is the norm of all gradients before clipping,
    gradient_norm_max the largest norm of one parameter's gradient.
    """
    state, epoch_of_next = run.state, (step - 1 + run.recipe.log.log_every_steps) // run.order.steps_per_epoch
    slots = {}
    if epoch_of_next > (step - 1) // run.order.steps_per_epoch or step == run.total_steps:
        with autocast(run.precision, run.device):
            encoders = state.teacher.encoder, state.student.encoder
            slots = slot_health(*encoders, output.images[:HEALTH_IMAGES])
    assert output.statistics is not None
    loss, of_teacher = mean_over_ranks(output.loss), output.statistics.metrics()
    overflows, overflows_in_a_row = state.overflows.float()
    on_device = {
        "loss": loss,
        "kl": loss - of_teacher["entropy_teacher"],
        **of_teacher,
        "center_norm": output.center.norm(),
        "gradient_norm": torch.linalg.vector_norm(output.gradient_norms),
        "gradient_norm_max": output.gradient_norms.max(),
        **slots,
        "loss_scale": state.loss_scale.scale,
        "overflows": overflows,
        "bad_steps": state.bad_steps.total.float(),
        "in_a_row": overflows_in_a_row,
    }
    values = torch.stack(list(on_device.values())).to("cpu", non_blocking=True)
    run.bad_images.share()
    of_host = {
        "lr": hyper.lr,
        "weight_decay": hyper.weight_decay,
        "momentum": hyper.momentum,
        "teacher_temp": hyper.teacher_temp,
        "student_temp": run.recipe.loss.student_temp,
        "memory_gib": peak_memory_gib(run.device),
        "bad_images": len(run.bad_images),
        **run_log.speed(step, batch_size=run.recipe.optim.global_batch_size),
    }

    def write() -> None:
        metrics = dict(zip(on_device, values.tolist(), strict=True))
        in_a_row = metrics.pop("in_a_row")
        state.bad_steps.known = int(metrics["bad_steps"])
        run_log.scalars(step, metrics | of_host)
        alarm = run.alarm.check(step, metrics["entropy_teacher"], metrics["entropy_mean"])
        if alarm:
            run_log.alarm(step, alarm)
        if in_a_row >= MAX_OVERFLOWS:
            raise diverged(run, step, f"fp16 has overflowed in {MAX_OVERFLOWS} steps in a row")

    run_log.postpone(write, end_of_work(run.device))


def diverged(run: Run, step: int, what: str) -> UserError:
    """The error that ends a diverged run, whose state is not saved."""
    remedy = "" if run.precision == "fp32" else "resume with machine.precision fp32, or "
    return UserError(
        f"{what} at step {step}: the run has diverged, and this state is not saved; {remedy}start in a new "
        f"run_dir with a lower optim.lr_per_256"
    )


def report_bad_steps(run: Run, saver: Saver, run_log: RunLog) -> None:
    """Report bad steps (loss or gradients not finite) and list their images.

    Raises:
        UserError: there are more than `max_bad_steps`; the state before the last of them is saved.
    """
    wait_for(run.device)
    for number, step, what in run.state.bad_steps.new(run.first_step):
        samples = run.order.global_batch(step)
        if rank() == 0:
            images = [run.source.name(sample) for sample in samples]
            entry = {"step": step, "cause": what, "samples": samples, "images": images}
            append_line(run.run_dir / BAD_STEPS_FILE, entry)
        listed = f"step {step}: {what} not finite; its images are listed in {run.run_dir / BAD_STEPS_FILE}"
        if number > run.state.bad_steps.allowed:  # the state has not changed since
            write_checkpoint(run, saver, run_log, step - 1)
            saver.wait()
            gather_objects(None)  # no process ends before the first one has written
            remedy = "" if run.precision == "fp32" else "machine.precision fp32, "
            raise UserError(
                f"{listed}, and the state before this step is saved; check these images, then resume with "
                f"{remedy}optim.max_bad_steps {number} to skip such steps, or start in a new run_dir with a "
                f"lower optim.lr_per_256"
            )
        log.warning("WARNING: %s; it is skipped", listed)


def save(run: Run, saver: Saver, run_log: RunLog, step: int) -> None:
    """Report bad steps and save the state after a step. A collective; the first process writes."""
    report_bad_steps(run, saver, run_log)
    with run_log.not_training():
        write_checkpoint(run, saver, run_log, step)


def write_checkpoint(run: Run, saver: Saver, run_log: RunLog, step: int) -> None:
    """Start writing the state after `step`. Raises UserError if parameters are not finite."""
    run_log.flush()
    run.bad_images.share()
    state = run.state
    learned = [*state.student.parameters(), *state.teacher.parameters(), state.loss_fn.center]
    if not torch.stack(torch._foreach_norm(learned)).isfinite().all():
        raise diverged(run, step, "a parameter is no longer finite")
    if step:  # skipped steps after it have changed these two in the optimizer
        hyper = run.schedules.at(step - 1)
        set_hyperparameters(state.optimizer, lr=hyper.lr, weight_decay=hyper.weight_decay)
    if rank() == 0:
        saver.save(
            {"step": step, "config": run.recipe.as_dict(), "images": run.images, **capture_state(state)}, step
        )


def stop(run: Run, saver: Saver, run_log: RunLog, step: int, received: str) -> NoReturn:
    """Save the state after `step`, write a marker file for job schedulers, and end the run.

    Raises:
        StoppedError: always.
    """
    save(run, saver, run_log, step)
    saver.wait()
    received = next(filter(None, gather_objects(received)))
    if rank() == 0:
        write_file(run.run_dir / MARKER_FILE, json.dumps({"step": step, "signal": received}) + "\n")
    gather_objects(None)  # no process ends before the first one has written
    raise StoppedError(f"stopped by {received} after step {step} of {run.total_steps}, which is saved")

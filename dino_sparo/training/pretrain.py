"""Pretraining: DINO with any read-out. `train_step` is the algorithm, `train` the loop.

Axis letters: B images, C crops, K prototypes.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor
from torch.profiler import record_function

from dino_sparo.data.decode import UnreadableImageError
from dino_sparo.data.loader import (
    Batch,
    BatchOrder,
    crop_batches,
    crops_on_device,
    crops_picture,
    normalized,
    prepare_device,
)
from dino_sparo.data.sources import ImageSource
from dino_sparo.data.workers import check_shared_memory
from dino_sparo.errors import StoppedError, UserError
from dino_sparo.models.cost import describe_cost, encoder_cost
from dino_sparo.parallel.device import choose_device
from dino_sparo.parallel.distributed import (
    Agreement,
    Group,
    average_gradients,
    first_rank_decides,
    first_rank_first,
    local_rank,
    local_world_size,
    process_group,
    rank,
    sum_over_ranks,
    world_size,
)
from dino_sparo.parallel.precision import autocast, plain_attention
from dino_sparo.recipe.files import CONFIG_FILE
from dino_sparo.recipe.sections import Recipe, less_memory, split_batch
from dino_sparo.runs.checkpoint import check_room, saving, set_damaged_aside
from dino_sparo.runs.rundir import check_same_experiment, lock_run_dir, repair_run_dir, start_run_dir
from dino_sparo.runs.runlog import RunLog
from dino_sparo.terminal import counted, log
from dino_sparo.training.loss import teacher_probabilities
from dino_sparo.training.monitor import CollapseAlarm, TeacherStatistics
from dino_sparo.training.optim import clip_gradients_per_parameter, step_if_finite, update_teacher
from dino_sparo.training.periodic import (
    due,
    evaluate,
    evaluation_is_missing,
    log_step,
    report_bad_steps,
    save,
    stop,
)
from dino_sparo.training.schedules import Hyperparameters
from dino_sparo.training.setup import (
    Run,
    absolute_paths,
    build_schedules,
    bytes_of_image,
    check_all_agree,
    dataset_of,
    initialize_state,
    machine_of,
    open_data,
    restored_step,
    say_start,
    use_machine,
)
from dino_sparo.training.state import StepOutput, TrainState, build_state, checkpoint_bytes
from dino_sparo.training.steps import Steps
from dino_sparo.training.stopping import BadImages, StopSignals


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
    """One optimizer step on `accumulation` micro-batches.

    A step whose loss or gradients are not finite in any process does not change student, teacher, or center;
    this is decided on the device. `dino-sparo bench` reads the named ranges of `torch.profiler`.

    Args:
        micro_batches: each a list of groups of crops (C_i, B, 3, side, side), the two global crops first.
        statistics: receives the teacher's outputs, if given.
    """
    state.optimizer.zero_grad(set_to_none=True)
    loss_of_step = torch.zeros((), device=state.loss_fn.center.device)

    for _ in range(accumulation):
        crop_groups = next(micro_batches)
        with record_function("teacher forward"), torch.inference_mode(), autocast:
            teacher_logits, teacher_encodings = state.teacher(crop_groups[:1])  # (2*B, K)
        with record_function("student forward"), autocast:
            student_logits, _ = state.student(crop_groups)  # (C*B, K)
        with record_function("loss"):
            loss = state.loss_fn(student_logits, teacher_logits, hyper.teacher_temp) / accumulation
        with record_function("backward"):
            state.loss_scale.scaled(loss).backward()
        if statistics is not None:
            answers = teacher_probabilities(teacher_logits, state.loss_fn.center, hyper.teacher_temp)
            statistics.add(answers, teacher_encodings)
        state.loss_fn.add_to_center(teacher_logits)
        loss_of_step += loss.detach()

    with record_function("gradient averaging"):
        average_gradients(state.student.parameters())
    with record_function("gradient clipping"):
        state.loss_scale.unscale([p.grad for p in state.student.parameters() if p.grad is not None])
        gradient_norms = clip_gradients_per_parameter(state.student.parameters(), clip_norm)
    finite = state.count_step(
        sum_over_ranks((~loss_of_step.isfinite()).int()) == 0,
        gradient_norms.isfinite().all(),  # equal in all processes, as the gradients are
    )
    frozen = [state.student.head.last_layer] * hyper.freeze_last_layer
    frozen += [state.student.encoder.backbone] * hyper.freeze_backbone
    for parameter in (parameter for module in frozen for parameter in module.parameters()):
        parameter.grad = None  # AdamW then skips it, including weight decay

    with record_function("optimizer"):
        step_if_finite(state.optimizer, finite, lr=hyper.lr, weight_decay=hyper.weight_decay)
    with record_function("teacher update"):
        update_teacher(state.teacher, state.student, hyper.momentum, finite)
    center = state.loss_fn.center.clone()
    state.loss_fn.commit_center(accumulation * len(teacher_logits), finite)
    return StepOutput(loss_of_step, crop_groups[0][0], center, gradient_norms, statistics)


def pretrain(recipe: Recipe, run_dir: Path, *, resume_unverified: bool = False) -> ImageSource:
    """`dino-sparo pretrain`: start or resume a run; returns its images. Every process of the run calls it.

    Raises:
        UserError: a mistake in options or data, or a failure during training.
        StoppedError: a signal has stopped the run, and it is saved.
    """
    recipe = replace(recipe, **absolute_paths(recipe.data, recipe.monitor))
    device = choose_device(recipe.machine.device, local_rank())
    with StopSignals() as signals, process_group(device) as group, ExitStack() as held:
        signals.listen()  # not earlier: a signal must end a process that waits for others to join
        is_run = (run_dir / CONFIG_FILE).exists()
        if rank() == 0 and is_run:  # before `prepare` reads the folder
            held.enter_context(lock_run_dir(run_dir))
            repair_run_dir(run_dir)
        run = prepare(recipe, run_dir, device, unverified=resume_unverified)
        evaluate_first = evaluation_is_missing(run)
        if run.first_step == run.total_steps and not evaluate_first:
            log.info("%s is complete, after %s", run_dir, counted(recipe.optim.epochs, "epoch"))
            return run.source
        if rank() == 0:
            if not is_run:
                held.enter_context(lock_run_dir(run_dir))
                if (run_dir / CONFIG_FILE).exists():
                    raise UserError(f"run_dir {str(run_dir)!r}: another run has started there; run again")
            check_room(run_dir, checkpoint_bytes(run.state))
            start_run_dir(run_dir, recipe, machine_of(run))
            set_damaged_aside(run_dir, run.first_step)
        batches = crop_batches(
            run.dataset,
            run.order,
            num_workers=run.num_workers,
            prefetch_batches=recipe.machine.prefetch_batches,
            pin_memory=device.type == "cuda",
            timeout_seconds=recipe.machine.data_timeout_seconds,
        )
        try:
            prepare_device(run.dataset.crop_kinds, run.dataset.executor, run.order.micro_batch_size, device)
            with batches.failures_explained():
                train(run, iter(batches), signals, group, evaluate_first=evaluate_first)
        except torch.OutOfMemoryError as error:
            size = run.order.micro_batch_size
            raise UserError(
                f"the GPU is out of memory with {counted(size, 'image')} per forward pass "
                f"({str(error).split('.')[0]}); use "
                + less_memory(size * run.order.accumulation, size, recipe.machine.activation_checkpointing)
            ) from error
        except RuntimeError as error:
            while_compiling = type(error).__name__ == "InductorError"  # of torch.compile
            started = group.at not in ("", f"step {run.first_step + 1}")
            if not signals.received or not while_compiling or started:
                raise
            # Ctrl-C and job schedulers send signals to the compiler too.
            raise StoppedError(
                f"stopped by {signals.received} while compiling, before the first step of this start"
            ) from error
    return run.source


def prepare(recipe: Recipe, run_dir: Path, device: torch.device, *, unverified: bool = False) -> Run:
    """Check and build everything, and restore the newest checkpoint. Writes nothing.

    Raises:
        UserError: a mistake in the recipe, the data, or the run folder.
    """
    machine, optim = recipe.machine, recipe.optim
    num_workers, precision, executor = use_machine(
        machine,
        device,
        arch=recipe.encoder_arguments()["arch"],
        max_side=recipe.data.max_side,
        processes_here=local_world_size(),
        run_dir=run_dir,
    )
    batch_size, accumulation = split_batch(optim.global_batch_size, machine.batch_size_per_gpu, world_size())
    check_same_experiment(run_dir, recipe)
    source, knn_images = first_rank_first(
        lambda: open_data(recipe.data, recipe.monitor, optim.global_batch_size)
    )
    images = {"num_images": len(source), "fingerprint": source.fingerprint()}
    image_bytes = bytes_of_image(recipe.views, recipe.data.max_side, source, executor)
    check_shared_memory(
        local_world_size() * num_workers * machine.prefetch_batches * batch_size * image_bytes
    )

    state = build_state(**recipe.state_arguments(precision), device=device)
    cost = encoder_cost(state.teacher.encoder, recipe.views.global_size)
    log.info("encoder with read-out %s: %s", recipe.model.readout.name, describe_cost(cost))

    resumed = restored_step(state, run_dir, images, executor, unverified=unverified)
    first_step = resumed or 0
    check_all_agree(run_dir, first_step, images, executor, precision)
    if resumed is None and recipe.init is not None:
        log.info(
            initialize_state(
                *(state, recipe.init, recipe.encoder_arguments()),
                norm_last_layer=recipe.head.norm_last_layer,
                frozen=optim.freeze_backbone,
            )
        )

    order = BatchOrder(
        num_samples=len(source),
        global_batch_size=optim.global_batch_size,
        epochs=optim.epochs,
        seed=recipe.seed,
        first_step=first_step,
        rank=rank(),
        world_size=world_size(),
        accumulation=accumulation,
    )
    quiet_epochs = max(optim.warmup_epochs, optim.freeze_last_layer_epochs, optim.freeze_backbone_epochs or 0)
    return Run(
        recipe=recipe,
        run_dir=run_dir,
        source=source,
        images=images,
        device=device,
        precision=precision,
        num_workers=num_workers,
        dataset=dataset_of(recipe.data, recipe.views, recipe.seed, source, executor),
        state=state,
        first_step=first_step,
        order=order,
        schedules=build_schedules(optim, recipe.loss, order.steps_per_epoch),
        total_steps=order.steps_per_epoch * optim.epochs,
        knn_images=knn_images,
        alarm=CollapseAlarm(recipe.head.num_prototypes, quiet_epochs * order.steps_per_epoch),
        bad_images=BadImages(run_dir, len(source)),
    )


def train(
    run: Run, batches: Iterator[Batch], signals: StopSignals, group: Group, *, evaluate_first: bool
) -> None:
    """The training loop. Source: DINO, algorithm 1.

    Args:
        evaluate_first: evaluate before the first step.

    Raises:
        StoppedError: a process has received a signal, and the run is saved.
    """
    recipe, order, last_step = run.recipe, run.order, run.total_steps
    steps_per_epoch = order.steps_per_epoch
    checkpoint_every_steps = recipe.log.checkpoint_every_epochs * steps_per_epoch
    keep_every_steps = recipe.log.keep_every_epochs * steps_per_epoch
    knn_every_steps = recipe.monitor.knn_every_epochs * steps_per_epoch
    signals.interruptible = False
    say_start(run)
    last_save = time.monotonic()
    to_stop = Agreement()
    one_step = step_of(run.state, clip_norm=recipe.optim.clip_norm, precision=run.precision)
    with (
        saving(run.run_dir, keep_every_steps=keep_every_steps, saved=run.first_step) as saver,
        RunLog(
            run.run_dir,
            first_step=run.first_step,
            steps_per_epoch=steps_per_epoch,
            total_steps=last_step,
            silent=rank() > 0,
        ) as run_log,
        closing(Steps(one_step, run.device, order.accumulation, capture=recipe.machine.capture)) as steps,
    ):
        run_log.recipe(yaml.safe_dump(recipe.as_dict(), sort_keys=False))
        if evaluate_first:
            evaluate(run, run_log, run.first_step)
        micro_batches = on_device(run, batches, run_log)
        for step in range(run.first_step + 1, last_step + 1):  # from 1; schedules and seeds count from 0
            if to_stop.ask(bool(signals.received)):
                stop(run, saver, run_log, step - 1, signals.received)
            group.at = f"step {step}"
            hyper = run.schedules.at(step - 1)
            log_now = due(step, recipe.log.log_every_steps, last_step)
            torch.manual_seed(step_seed(recipe.seed, step - 1, rank()))  # for stochastic depth
            output = steps.take(micro_batches, hyper, logged=log_now)
            run_log.step_done(step)
            saver.raise_if_failed()

            save_now = due(step, checkpoint_every_steps, last_step) or due(step, keep_every_steps, last_step)
            if log_now:
                with run_log.logging():
                    log_step(run, run_log, step, hyper, output)
                if run.state.bad_steps.some_are_new():
                    report_bad_steps(run, saver, run_log)
                minutes = (time.monotonic() - last_save) / 60
                save_now |= first_rank_decides(0 < recipe.log.checkpoint_every_minutes <= minutes)
            if save_now:
                save(run, saver, run_log, step)
                last_save = time.monotonic()
            if due(step, knn_every_steps, last_step):
                evaluate(run, run_log, step)


def step_of(state: TrainState, *, clip_norm: float, precision: str) -> Callable[..., StepOutput]:
    """`train_step` in a precision, with the arguments that are the same for all steps."""
    device = state.loss_fn.center.device
    mixed = autocast(precision, device)

    def step(*args: Any, **options: Any) -> StepOutput:
        with plain_attention(precision, device):
            return train_step(state, *args, clip_norm=clip_norm, autocast=mixed, **options)

    return step


def on_device(run: Run, batches: Iterator[Batch], run_log: RunLog) -> Iterator[list[Tensor]]:
    """Batches from workers -> groups of normalized crops on the device, as `train_step` reads them."""
    all_crops = crops_on_device(readable(run, batches, run_log), run.dataset.crop_kinds, run.device)
    for number, crops in enumerate(all_crops):
        run.bad_images.add(crops.replaced)
        if number == 0 and run.first_step == 0:
            run_log.picture(0, "views/first_crops", crops_picture(crops))
        yield normalized(crops)


def readable(run: Run, batches: Iterator[Batch], run_log: RunLog) -> Iterator[Batch]:
    """Batches from workers, with waiting time logged. Raises UnreadableImageError, with a remedy."""
    for _ in range(len(run.order)):
        try:
            with run_log.waiting_for_data():
                batch = next(batches)
        except UnreadableImageError as error:
            remedy = "repair the file, or use data.on_bad_image substitute"
            raise UnreadableImageError(error.name, error.reason, f"{remedy}, then run again") from error
        yield batch


def step_seed(seed: int, step: int, rank: int) -> int:
    """The seed for a step and process, so that checkpoints need no random state."""
    return ((seed * 1_000_003 + step) * 1_009 + rank) % 2**63

"""`--dry-run`: what a run would be, told in seconds: nothing is trained, written, or started.

`check` measures what is only estimated here.
"""

import shutil
from functools import partial
from pathlib import Path
from typing import Any

import torch

from dino_sparo.check.measure import (
    bytes_of_training,
    count_flops,
    existing_folder,
    measured_peak,
    memory_free,
)
from dino_sparo.check.report import duration, size
from dino_sparo.checks import split_batch
from dino_sparo.config import flattened, parse_options
from dino_sparo.data.sources import ImageSource
from dino_sparo.data.views import NUM_GLOBAL_CROPS
from dino_sparo.data.workers import check_shared_memory, default_workers
from dino_sparo.errors import EXIT_PROBLEM, UserError
from dino_sparo.models.cost import count_parameters, describe_cost, encoder_cost
from dino_sparo.options import PretrainOptions
from dino_sparo.parallel.device import choose_device
from dino_sparo.parallel.precision import choose_precision, set_numerics
from dino_sparo.runs.checkpoint import latest_step, most_kept
from dino_sparo.runs.rundir import check_same_experiment, config_of
from dino_sparo.terminal import table
from dino_sparo.training.monitor import KnnMonitor
from dino_sparo.training.schedules import Schedules
from dino_sparo.training.setup import (
    build_schedules,
    bytes_of_image,
    executor_of,
    open_data,
    prefetched_bytes,
    start_state,
)
from dino_sparo.training.state import TrainState, build_state, checkpoint_bytes

# Of the speed of one large matrix product whole training reaches a share between these. On a CPU it did,
# from the demo to ViT-S/16; for a GPU it is a guess.
SHARES_OF_PEAK = {"cpu": (0.3, 0.9), "cuda": (0.2, 0.5)}


def plan(options: PretrainOptions, recipe: str) -> int:
    """Print what the run would be; 0 if nothing is in its way, else 1.

    Raises:
        UserError: for a mistake in options or data, as at the start of the run.
    """
    device = choose_device(options.machine.device)
    set_numerics(tf32=options.machine.tf32, deterministic=False)
    config = config_of(options)
    workers = options.machine.num_workers
    workers = default_workers(options.nproc) if workers is None else workers
    batch_size, accumulation = split_batch(
        options.optim.global_batch_size, options.machine.batch_size_per_gpu, options.nproc
    )
    source, monitor = open_data(options, workers)
    steps_per_epoch = len(source) // options.optim.global_batch_size
    state = build_state(
        config, torch.device("cpu"), activation_checkpointing=options.machine.activation_checkpointing
    )
    problems = refused(options, config, device, source, workers, batch_size, checkpoint_bytes(state))
    weights = describe_weights(options, state, problems)
    per_step = f"{options.nproc} x {batch_size}"
    per_step += f" x {accumulation} micro-batches" if accumulation > 1 else ""
    rows: list[tuple[str, str]] = [
        ("run", describe_start(options, steps_per_epoch, problems)),
        ("recipe", describe_recipe(options, config, recipe)),
        ("weights", weights),
        ("images", describe_images(options, source, monitor)),
        ("views", describe_views(options, device, workers)),
        ("batch", f"{options.optim.global_batch_size} images: {per_step}"),
        (
            "steps",
            f"{steps_per_epoch:,} an epoch, {steps_per_epoch * options.optim.epochs:,} in all "
            f"({options.optim.epochs} epochs)",
        ),
        *cost_rows(options, state, device, batch_size, steps_per_epoch),
    ]
    print(table(dict(rows), 12, indent=""))
    print("\n" + "\n".join(schedule_table(build_schedules(options, steps_per_epoch), options)))
    told = [f"PROBLEM: {problem}" for problem in problems] or ["nothing is in the way"]
    print("\n" + "\n".join(told))
    return EXIT_PROBLEM if problems else 0


def refused(
    options: PretrainOptions,
    config: dict[str, Any],
    device: torch.device,
    source: ImageSource,
    workers: int,
    batch_size: int,
    size_of_checkpoint: int,
) -> list[str]:
    """What of folder and machine would end the run at its start, or before its end."""
    problems, run_dir = [], Path(options.run_dir)
    executor = executor_of(options, device)
    prefetched = prefetched_bytes(
        options, workers, batch_size, options.nproc, bytes_of_image(options, source, executor)
    )
    for look in (
        partial(check_same_experiment, run_dir, config),
        partial(check_shared_memory, prefetched if workers else 0),
    ):
        try:
            look()
        except UserError as error:
            problems.append(str(error))
    if device.type == "cuda" and options.nproc > torch.cuda.device_count():
        problems.append(f"nproc is {options.nproc}, but this machine has {torch.cuda.device_count()} GPUs")
    kept = most_kept(options.optim.epochs, options.log.keep_every_epochs)
    free = shutil.disk_usage(existing_folder(run_dir)).free
    if kept * size_of_checkpoint > free and not latest_step(run_dir):
        problems.append(
            f"run_dir {options.run_dir!r}: {kept} checkpoints need {size(kept * size_of_checkpoint)}, "
            f"{size(free)} are free: use another disk or a larger log.keep_every_epochs"
        )
    return problems


def describe_start(options: PretrainOptions, steps_per_epoch: int, problems: list[str]) -> str:
    """Whether the run would start, go on or be complete, by the names of its checkpoints."""
    done, total = latest_step(Path(options.run_dir)), steps_per_epoch * options.optim.epochs
    if not done:
        return f"{options.run_dir}: would start"
    if problems:
        return f"{options.run_dir}: holds a run of {done:,} steps"
    if done >= total:
        return f"{options.run_dir}: is complete, {done:,} steps are done"
    return f"{options.run_dir}: would go on after step {done:,} of {total:,}, if that checkpoint is whole"


def describe_weights(options: PretrainOptions, state: TrainState, problems: list[str]) -> str:
    """What the run begins with; adds to the problems what is wrong with a file of starting weights."""
    if options.init is None:
        return "random at the start"
    if latest_step(Path(options.run_dir)):
        return f"of {options.init} at the start"
    try:
        return start_state(state, options)
    except UserError as error:
        problems.append(str(error))
        return f"{options.init}: refused"


def describe_recipe(options: PretrainOptions, config: dict[str, Any], recipe: str) -> str:
    """The recipe, and what the command line changes in it."""
    places = ["--data.path", options.data.path, "--run_dir", options.run_dir]
    try:
        alone = config_of(parse_options(PretrainOptions, ["--config", recipe, *places], usage=""))
    except UserError:  # it leaves something open
        return f"{recipe}, completed by the command line"
    before, now = flattened(alone), flattened(config)
    changed = [
        f"{key} {before.get(key)} -> {now.get(key)}"
        for key in (before | now)
        if before.get(key) != now.get(key)
    ]
    return f"{recipe}, changed: {', '.join(changed)}" if changed else f"{recipe} as it is"


def describe_images(options: PretrainOptions, source: ImageSource, monitor: KnnMonitor | None) -> str:
    """How many images of how many classes, and what is measured on them while training."""
    classes = f", {len(source.classes):,} classes" if source.labels is not None else ", without labels"
    knn = "no k-NN while training"
    if monitor is not None:
        knn = (
            f"k-NN every {options.monitor.knn_every_epochs} epochs: {len(monitor.test):,} images among "
            f"{len(monitor.train):,}"
        )
    return f"{len(source):,} of {options.data.path}{classes}; {knn}"


def describe_views(options: PretrainOptions, device: torch.device, workers: int) -> str:
    """Who makes which crops."""
    views = options.views
    who = {"device": "the training device", "pil": "PIL"}
    return (
        f"{NUM_GLOBAL_CROPS} of {views.global_size} and {views.num_local_crops} of {views.local_size} pixels "
        f"by {who[executor_of(options, device)]}; {workers} workers a process"
    )


def cost_rows(
    options: PretrainOptions, state: TrainState, device: torch.device, batch_size: int, steps_per_epoch: int
) -> list[tuple[str, str]]:
    """Parameters, operations, and estimates of memory, disk and time."""
    views, optim = options.views, options.optim
    precision = choose_precision(options.machine.precision, device)
    sizes = [(NUM_GLOBAL_CROPS, views.global_size), (views.num_local_crops, views.local_size)]
    cost = encoder_cost(state.teacher.encoder, views.global_size)
    flops = count_flops(state.student, sizes)["training"]
    memory = bytes_of_training(state, sizes, batch_size, mixed=precision != "fp32")
    one = checkpoint_bytes(state)
    kept = most_kept(optim.epochs, options.log.keep_every_epochs)
    free = shutil.disk_usage(existing_folder(Path(options.run_dir))).free
    devices = options.nproc if device.type == "cuda" else 1  # processes on a CPU share its cores
    peak = measured_peak(device, precision, rounds=3)
    left = steps_per_epoch * optim.epochs - latest_step(Path(options.run_dir))
    hours = max(0, left) * optim.global_batch_size * flops / (devices * peak) / 3600
    low, high = SHARES_OF_PEAK[device.type]
    return [
        ("encoder", f"read-out {options.model.readout.name}, {describe_cost(cost)}"),
        (
            "head",
            f"{count_parameters(state.student.head) / 1e6:.1f} M parameters, "
            f"{options.head.num_prototypes:,} prototypes",
        ),
        ("training", f"{flops / 1e9:.3g} GFLOPs an image (a multiply-add is two)"),
        (
            "memory",
            f"about {size(memory)} for the networks of each process, {precision} (estimate, without workers; "
            f"{size(memory_free())} of this machine's are free)",
        ),
        ("checkpoint", f"{size(one)} each, {size(kept * one)} at most, {size(free)} free"),
        (
            "time",
            f"{duration(hours / high)} to {duration(hours / low)} (estimate: {high:.0%} to {low:.0%} of the "
            f"{peak / 1e9:,.0f} GFLOP/s of a matrix product on one {device.type} here, if loading keeps up "
            f"and without k-NN; `check` measures)",
        ),
    ]


def schedule_table(schedules: Schedules, options: PretrainOptions) -> list[str]:
    """What the schedules say at some steps, a line each."""
    total = len(schedules.lr)
    after_warmup = options.optim.warmup_epochs * schedules.steps_per_epoch
    points = {"start": 0, "warm-up's end": after_warmup}
    points |= {name: total * part // 4 for part, name in enumerate(("1/4", "1/2", "3/4"), start=1)}
    points["end"] = total - 1
    lines = [
        f"{'':<14}{'step':>8}{'lr':>11}{'decay':>9}{'momentum':>10}{'teacher temp.':>15}{'last layer':>12}"
    ]
    for name, step in sorted(points.items(), key=lambda point: point[1]):
        if name == "warm-up's end" and not 0 < step < total:
            continue
        at = schedules.at(step)
        lines.append(
            f"{name:<14}{step:>8,}{at.lr:>11.4g}{at.weight_decay:>9.4g}{at.momentum:>10.6g}"
            f"{at.teacher_temp:>15.4g}{'fixed' if at.freeze_last_layer else 'learns':>12}"
        )
    return lines

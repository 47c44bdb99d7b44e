"""The plan of a run, in seconds: nothing is trained or written, and no process is started."""

import shutil
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from dino_sparo.check.measure import count_flops, measured_peak
from dino_sparo.data.loader import Executor
from dino_sparo.data.sources import ImageSource
from dino_sparo.data.views import NUM_GLOBAL_CROPS, crop_kinds, crop_sizes
from dino_sparo.data.workers import check_shared_memory, shared_memory_free
from dino_sparo.errors import UserError
from dino_sparo.files import existing_part
from dino_sparo.models.cost import count_parameters, describe_cost, encoder_cost
from dino_sparo.parallel.device import choose_device
from dino_sparo.recipe.files import named_recipe
from dino_sparo.recipe.sections import Recipe, split_batch
from dino_sparo.recipe.typed import flattened
from dino_sparo.runs.checkpoint import latest_step, most_kept
from dino_sparo.runs.rundir import check_same_experiment
from dino_sparo.terminal import aligned_table, counted, table
from dino_sparo.training.monitor import KnnImages
from dino_sparo.training.setup import (
    build_schedules,
    bytes_of_image,
    initialize_state,
    open_data,
    use_machine,
)
from dino_sparo.training.state import TrainState, build_state, checkpoint_bytes

# Speed of training as a fraction of the speed of one large matrix product, lowest and highest: measured on a
# CPU, from the demo to ViT-S/16; assumed for a GPU.
SHARES_OF_PEAK = {"cpu": (0.3, 0.9), "cuda": (0.2, 0.5)}
GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Everything that is known about a run before its first step."""

    recipe: Recipe
    run_dir: Path
    num_processes: int
    num_workers: int  # per process
    batch_size: int  # images per micro-batch of a process
    accumulation: int  # micro-batches per step
    device: torch.device
    precision: str
    executor: Executor
    source: ImageSource
    monitor: KnnImages | None
    state: TrainState  # initial state, on the CPU
    prefetched_bytes: int  # of the images that all workers prefetch, at most
    disk_bytes: int  # of all checkpoints that are kept, at most
    disk_free_bytes: int  # on the file system of the run folder
    steps_done: int  # by the name of the newest checkpoint
    weights: str  # initial weights, in words
    problems: list[str]  # what would end the run early

    @property
    def steps_per_epoch(self) -> int:
        """Steps per epoch; the last incomplete batch is dropped."""
        return len(self.source) // self.recipe.optim.global_batch_size

    @property
    def total_steps(self) -> int:
        """Steps of the whole run."""
        return self.steps_per_epoch * self.recipe.optim.epochs

    @property
    def steps_left(self) -> int:
        """Steps that remain."""
        return max(0, self.total_steps - self.steps_done)

    @cached_property
    def cost(self) -> dict[str, int]:
        """Parameters and FLOPs of the encoder."""
        return encoder_cost(self.state.teacher.encoder, self.recipe.views.global_size)

    @cached_property
    def flops_per_image(self) -> float:
        """FLOPs per image of a training step."""
        return count_flops(self.state.student, crop_sizes(crop_kinds(**asdict(self.recipe.views))))

    def as_dict(self) -> dict[str, Any]:
        """The plan as JSON values."""
        return {
            "problems": self.problems,
            "remarks": [],
            "run": {
                "images": len(self.source),
                "steps_per_epoch": self.steps_per_epoch,
                "steps": self.total_steps,
                "processes": self.num_processes,
                "batch_size_per_gpu": self.batch_size,
                "accumulation": self.accumulation,
                "disk_bytes": self.disk_bytes,
                "disk_free_bytes": self.disk_free_bytes,
                "prefetched_bytes": self.prefetched_bytes,
                "shared_memory_free_bytes": shared_memory_free(),
            },
            "parameters": {
                "encoder": self.cost["parameters"],
                "readout": self.cost["readout_parameters"],
                "head": count_parameters(self.state.student.head),
            },
            "flops_per_image": {
                "encoder": float(self.cost["flops"]),
                "training": self.flops_per_image,
                "readout": float(self.cost["readout_flops"]),
            },
            "checkpoint_bytes": checkpoint_bytes(self.state),
        }


def make_plan(recipe: Recipe, run_dir: Path, num_processes: int) -> Plan:
    """Open the images, build the networks on the CPU, and collect the problems that would end the run.

    Raises:
        UserError: a mistake in recipe or data, as at the start of the run.
    """
    machine, optim = recipe.machine, recipe.optim
    device = choose_device(machine.device)
    num_workers, precision, executor = use_machine(
        machine,
        device,
        arch=recipe.encoder_arguments()["arch"],
        max_side=recipe.data.max_side,
        processes_here=num_processes,
        run_dir=run_dir,
    )
    batch_size, accumulation = split_batch(optim.global_batch_size, machine.batch_size_per_gpu, num_processes)
    source, monitor = open_data(recipe.data, recipe.monitor, optim.global_batch_size)
    state = build_state(**recipe.state_arguments(), device=torch.device("cpu"))
    image_bytes = bytes_of_image(recipe.views, recipe.data.max_side, source, executor)
    prefetched_bytes = num_processes * num_workers * machine.prefetch_batches * batch_size * image_bytes
    disk_bytes = most_kept(optim.epochs, recipe.log.keep_every_epochs) * checkpoint_bytes(state)
    disk_free_bytes = shutil.disk_usage(existing_part(run_dir)).free
    steps_done = latest_step(run_dir)

    problems, weights = [], "random at the start"
    try:
        check_same_experiment(run_dir, recipe)
    except UserError as error:
        problems.append(str(error))
    try:
        check_shared_memory(prefetched_bytes)
    except UserError as error:
        problems.append(str(error))
    if device.type == "cuda" and num_processes > torch.cuda.device_count():
        gpus = torch.cuda.device_count()
        problems.append(
            f"nproc is {num_processes}, but this machine has {counted(gpus, 'GPU')}; use {gpus} or fewer"
        )
    if disk_bytes > disk_free_bytes and not steps_done:
        problems.append(
            f"run_dir {str(run_dir)!r}: checkpoints need {size(disk_bytes)}, but only "
            f"{size(disk_free_bytes)} are free; use another disk or a larger log.keep_every_epochs"
        )
    if recipe.init is not None and steps_done:
        weights = f"of {recipe.init} at the start"
    elif recipe.init is not None:
        try:
            weights = initialize_state(
                *(state, recipe.init, recipe.encoder_arguments()),
                norm_last_layer=recipe.head.norm_last_layer,
                frozen=optim.freeze_backbone,
            )
        except UserError as error:
            problems.append(str(error))
            weights = f"{recipe.init}: refused"
    return Plan(
        recipe=recipe,
        run_dir=run_dir,
        num_processes=num_processes,
        num_workers=num_workers,
        batch_size=batch_size,
        accumulation=accumulation,
        device=device,
        precision=precision,
        executor=executor,
        source=source,
        monitor=monitor,
        state=state,
        prefetched_bytes=prefetched_bytes,
        disk_bytes=disk_bytes,
        disk_free_bytes=disk_free_bytes,
        steps_done=steps_done,
        weights=weights,
        problems=problems,
    )


def plan_text(plan: Plan, recipe_name: str | None, *, with_time: bool = True) -> str:
    """The plan as a table, and the values of the schedules at some steps.

    Args:
        with_time: include an estimate of the time on this machine.
    """
    recipe, views = plan.recipe, plan.recipe.views
    micro_batches = f" x {plan.accumulation} micro-batches" if plan.accumulation > 1 else ""
    who = {"device": "the training device", "pil": "PIL"}[plan.executor]
    rows = {
        "run": f"{plan.run_dir}: {_start(plan)}",
        "recipe": _recipe(recipe, recipe_name),
        "weights": plan.weights,
        "images": _images(plan),
        "views": f"{NUM_GLOBAL_CROPS} of {views.global_size} and {views.num_local_crops} of "
        f"{views.local_size} pixels by {who}; {counted(plan.num_workers, 'worker')} per process",
        "batch": f"{recipe.optim.global_batch_size} images: {plan.num_processes} x {plan.batch_size}"
        f"{micro_batches}",
        "precision": f"{plan.precision} on the {plan.device.type}",
        "steps": f"{plan.steps_per_epoch:,} per epoch, {plan.total_steps:,} in total "
        f"({counted(recipe.optim.epochs, 'epoch')})",
        "encoder": f"read-out {recipe.model.readout.name}, {describe_cost(plan.cost)}",
        "head": f"{count_parameters(plan.state.student.head) / 1e6:.1f} M parameters, "
        f"{recipe.head.num_prototypes:,} prototypes",
        "training": f"{plan.flops_per_image / 1e9:.3g} GFLOPs per image (a multiply-add is two)",
        "checkpoint": f"{size(checkpoint_bytes(plan.state))} each, {size(plan.disk_bytes)} at most, "
        f"{size(plan.disk_free_bytes)} free",
    }
    if with_time:
        rows["time"] = _time(plan)
    return f"{table(rows, 12, indent='')}\n\n{_schedule_table(plan)}"


def _start(plan: Plan) -> str:
    """Whether the run would start or resume, or is complete."""
    done = plan.steps_done
    if not done:
        return "would start"
    if plan.problems:
        return f"holds a run of {counted(done, 'step')}"
    if done >= plan.total_steps:
        return f"is complete, after {counted(done, 'step')}"
    return f"would resume after step {done:,} of {plan.total_steps:,}, if that checkpoint is not damaged"


def _recipe(recipe: Recipe, name: str | None) -> str:
    """The recipe, and the fields that the command line changes."""
    if name is None:
        return "given by the command line"
    try:
        alone = named_recipe(name, {"data.path": recipe.data.path})
    except UserError:  # it lacks a field
        return f"{name}, completed by the command line"
    before, now = flattened(alone.as_dict()), flattened(recipe.as_dict())
    changed = [
        f"{key} {before.get(key)} -> {now.get(key)}"
        for key in before | now
        if before.get(key) != now.get(key)
    ]
    return f"{name}, changed: {', '.join(changed)}" if changed else f"{name}, unchanged"


def _images(plan: Plan) -> str:
    """The numbers of images and classes, and the k-NN evaluation during training."""
    source, monitor = plan.source, plan.monitor
    classes = counted(len(source.classes), "class", "es") if source.labels is not None else "without labels"
    knn = "no k-NN during training"
    if monitor is not None:
        every = counted(plan.recipe.monitor.knn_every_epochs, "epoch")
        knn = f"k-NN every {every}: {len(monitor.test):,} test and {len(monitor.train):,} train images"
    return f"{len(source):,} of {plan.recipe.data.path}, {classes}; {knn}"


def _time(plan: Plan) -> str:
    """An estimate of the time from the speed of a matrix product."""
    devices = plan.num_processes if plan.device.type == "cuda" else 1  # processes on a CPU share its cores
    peak = measured_peak(plan.device, plan.precision, rounds=3)
    images = plan.steps_left * plan.recipe.optim.global_batch_size
    hours = images * plan.flops_per_image / (devices * peak) / 3600
    low, high = SHARES_OF_PEAK[plan.device.type]
    return (
        f"{duration(hours / high)} to {duration(hours / low)} (estimate: {high:.0%} to {low:.0%} of the "
        f"{peak / 1e9:,.0f} GFLOP/s of a matrix product on one {plan.device.type} here, without k-NN, if "
        f"loading keeps up)"
    )


def _schedule_table(plan: Plan) -> str:
    """A table of the schedules' values at some steps."""
    optim, total = plan.recipe.optim, plan.total_steps
    schedules = build_schedules(optim, plan.recipe.loss, plan.steps_per_epoch)
    points = {"start": 0, "1/4": total // 4, "1/2": total // 2, "3/4": 3 * total // 4, "end": total - 1}
    if 0 < optim.warmup_epochs * plan.steps_per_epoch < total:
        points["warm-up's end"] = optim.warmup_epochs * plan.steps_per_epoch
    rows = []
    for name, step in sorted(points.items(), key=lambda point: point[1]):
        at = schedules.at(step)
        values = f"{at.lr:.4g}", f"{at.weight_decay:.4g}", f"{at.momentum:.6g}", f"{at.teacher_temp:.4g}"
        rows.append([name, f"{step:,}", *values, "fixed" if at.freeze_last_layer else "learns"])
    return aligned_table(["", "step", "lr", "decay", "momentum", "teacher temp.", "last layer"], rows)


def size(num_bytes: float) -> str:
    """Bytes as text in MiB or GiB."""
    return f"{num_bytes / GIB:.1f} GiB" if num_bytes >= GIB else f"{num_bytes / 2**20:.1f} MiB"


def duration(hours: float) -> str:
    """Hours as text in minutes, hours, or days."""
    if hours < 1:
        return f"{60 * hours:.1f} minutes"
    return f"{hours:,.1f} hours" if hours < 48 else f"{hours:,.0f} hours ({hours / 24:.1f} days)"

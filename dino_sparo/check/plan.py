"""What a run would be, told in seconds: nothing is trained, written, or started."""

import shutil
from dataclasses import dataclass, field
from functools import cached_property
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
from dino_sparo.data.loader import Executor, choose_executor
from dino_sparo.data.sources import ImageSource
from dino_sparo.data.views import NUM_GLOBAL_CROPS
from dino_sparo.data.workers import check_shared_memory, default_workers, shared_memory_free
from dino_sparo.errors import UserError
from dino_sparo.models.cost import count_parameters, describe_cost, encoder_cost
from dino_sparo.parallel.device import choose_device
from dino_sparo.parallel.precision import choose_precision, set_numerics
from dino_sparo.recipe.files import named_recipe
from dino_sparo.recipe.sections import Recipe, split_batch
from dino_sparo.recipe.typed import flattened
from dino_sparo.runs.checkpoint import latest_step, most_kept
from dino_sparo.runs.rundir import check_same_experiment
from dino_sparo.terminal import table
from dino_sparo.training.monitor import KnnImages
from dino_sparo.training.schedules import Schedules
from dino_sparo.training.setup import build_schedules, bytes_of_image, open_data, start_state
from dino_sparo.training.state import TrainState, build_state, checkpoint_bytes

# Of the speed of one large matrix product whole training reaches a share between these. On a CPU it did,
# from the demo to ViT-S/16; for a GPU it is a guess.
SHARES_OF_PEAK = {"cpu": (0.3, 0.9), "cuda": (0.2, 0.5)}
GIB = 2**30


@dataclass(frozen=True)
class Plan:
    """A run that could start: all that is known of it without training a step.

    Attributes:
        num_workers: of each process.
        batch_size, accumulation: images that a process takes at once, and micro-batches per step.
        state: the networks, on the CPU.
        image_bytes: what a worker hands over for one image.
        problems: what would end the run at its start, or before its end.
    """

    recipe: Recipe
    run_dir: Path
    num_processes: int
    num_workers: int
    batch_size: int
    accumulation: int
    device: torch.device
    precision: str
    executor: Executor
    source: ImageSource
    monitor: KnnImages | None
    state: TrainState
    image_bytes: int
    problems: list[str] = field(default_factory=list)

    @property
    def steps_per_epoch(self) -> int:
        """Whole batches of the images."""
        return len(self.source) // self.recipe.optim.global_batch_size

    @property
    def total_steps(self) -> int:
        """Steps of the whole run."""
        return self.steps_per_epoch * self.recipe.optim.epochs

    @property
    def crop_sizes(self) -> list[tuple[int, int]]:
        """Number and side in pixels of the global and of the local crops."""
        views = self.recipe.views
        return [(NUM_GLOBAL_CROPS, views.global_size), (views.num_local_crops, views.local_size)]

    @property
    def prefetched_bytes(self) -> int:
        """What the images that all workers prepare ahead take, at most."""
        batches = self.num_processes * self.num_workers * self.recipe.machine.prefetch_batches
        return batches * self.batch_size * self.image_bytes

    @property
    def disk_bytes(self) -> int:
        """What all checkpoints that are kept take, at most."""
        recipe = self.recipe
        return most_kept(recipe.optim.epochs, recipe.log.keep_every_epochs) * checkpoint_bytes(self.state)

    @cached_property
    def disk_free_bytes(self) -> int:
        """Free where the run folder is or would be."""
        return shutil.disk_usage(existing_folder(self.run_dir)).free

    @cached_property
    def cost(self) -> dict[str, Any]:
        """Parameters and operations of the encoder."""
        return encoder_cost(self.state.teacher.encoder, self.recipe.views.global_size)

    @cached_property
    def flops_per_image(self) -> dict[str, float]:
        """Operations of one pass of the encoder, and of a training step per image."""
        return count_flops(self.state.student, self.crop_sizes)

    @cached_property
    def start(self) -> str:
        """What the run begins with; adds to the problems what is wrong with a file of starting weights."""
        init = self.recipe.init
        if init is None:
            return "random at the start"
        if latest_step(self.run_dir):
            return f"of {init} at the start"
        try:
            return start_state(
                *(self.state, init, self.recipe.encoder_arguments()),
                norm_last_layer=self.recipe.head.norm_last_layer,
                frozen=self.recipe.optim.freeze_backbone,
            )
        except UserError as error:
            self.problems.append(str(error))
            return f"{init}: refused"

    def as_dict(self) -> dict[str, Any]:
        """The numbers, as JSON holds them."""
        return {
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
        }


def make_plan(recipe: Recipe, run_dir: Path, num_processes: int) -> Plan:
    """Open the images, build the networks on the CPU, and look for what would end the run.

    Raises:
        UserError: for a mistake in recipe or data, as at the start of the run.
    """
    machine, optim = recipe.machine, recipe.optim
    device = choose_device(machine.device)
    set_numerics(tf32=machine.tf32, deterministic=machine.deterministic)
    workers = default_workers(num_processes) if machine.num_workers is None else machine.num_workers
    batch_size, accumulation = split_batch(optim.global_batch_size, machine.batch_size_per_gpu, num_processes)
    source, monitor = open_data(recipe.data, recipe.monitor, optim.global_batch_size)
    executor = choose_executor(machine.views, device, max_side=recipe.data.max_side)
    plan = Plan(
        recipe=recipe,
        run_dir=run_dir,
        num_processes=num_processes,
        num_workers=workers,
        batch_size=batch_size,
        accumulation=accumulation,
        device=device,
        precision=choose_precision(machine.precision, device),
        executor=executor,
        source=source,
        monitor=monitor,
        state=build_state(
            **recipe.state_arguments(),
            device=torch.device("cpu"),
            activation_checkpointing=machine.activation_checkpointing,
        ),
        image_bytes=bytes_of_image(recipe.views, recipe.data.max_side, source, executor),
    )
    plan.problems.extend(_problems(plan))
    assert plan.start
    return plan


def _problems(plan: Plan) -> list[str]:
    """What of folder and machine would end the run at its start, or before its end."""
    problems = []
    try:
        check_same_experiment(plan.run_dir, plan.recipe)
    except UserError as error:
        problems.append(str(error))
    try:
        check_shared_memory(plan.prefetched_bytes)
    except UserError as error:
        problems.append(str(error))
    if plan.device.type == "cuda" and plan.num_processes > torch.cuda.device_count():
        gpus = torch.cuda.device_count()
        problems.append(f"nproc is {plan.num_processes}, but this machine has {gpus} GPUs")
    if plan.disk_bytes > plan.disk_free_bytes and not latest_step(plan.run_dir):
        problems.append(
            f"run_dir {str(plan.run_dir)!r}: checkpoints need {size(plan.disk_bytes)}, "
            f"{size(plan.disk_free_bytes)} are free; use another disk or a larger log.keep_every_epochs"
        )
    return problems


def plan_text(plan: Plan, recipe_name: str | None) -> str:
    """The plan as a table, and what the schedules say at some steps."""
    recipe, views = plan.recipe, plan.recipe.views
    per_step = f"{plan.num_processes} x {plan.batch_size}"
    per_step += f" x {plan.accumulation} micro-batches" if plan.accumulation > 1 else ""
    who = {"device": "the training device", "pil": "PIL"}[plan.executor]
    memory = bytes_of_training(plan.state, plan.crop_sizes, plan.batch_size, mixed=plan.precision != "fp32")
    rows = {
        "run": _start(plan),
        "recipe": _recipe(recipe, recipe_name),
        "weights": plan.start,
        "images": _images(plan),
        "views": f"{NUM_GLOBAL_CROPS} of {views.global_size} and {views.num_local_crops} of "
        f"{views.local_size} pixels by {who}; {plan.num_workers} workers per process",
        "batch": f"{recipe.optim.global_batch_size} images: {per_step}",
        "steps": f"{plan.steps_per_epoch:,} per epoch, {plan.total_steps:,} in all "
        f"({recipe.optim.epochs} epochs)",
        "encoder": f"read-out {recipe.model.readout.name}, {describe_cost(plan.cost)}",
        "head": f"{count_parameters(plan.state.student.head) / 1e6:.1f} M parameters, "
        f"{recipe.head.num_prototypes:,} prototypes",
        "training": f"{plan.flops_per_image['training'] / 1e9:.3g} GFLOPs per image (a multiply-add is two)",
        "memory": f"about {size(memory)} for the networks of each process, {plan.precision} (estimate, "
        f"without workers; {size(memory_free())} of this machine's are free)",
        "checkpoint": f"{size(checkpoint_bytes(plan.state))} each, {size(plan.disk_bytes)} at most, "
        f"{size(plan.disk_free_bytes)} free",
        "time": _time(plan),
    }
    schedules = build_schedules(recipe.optim, recipe.loss, plan.steps_per_epoch)
    lines = schedule_table(schedules, recipe.optim.warmup_epochs * plan.steps_per_epoch)
    return "\n".join([table(rows, 12, indent=""), "", *lines])


def _start(plan: Plan) -> str:
    """Whether the run would start, resume or be complete, by the names of its checkpoints."""
    done = latest_step(plan.run_dir)
    if not done:
        return f"{plan.run_dir}: would start"
    if plan.problems:
        return f"{plan.run_dir}: holds a run of {done:,} steps"
    if done >= plan.total_steps:
        return f"{plan.run_dir}: is complete, {done:,} steps are done"
    of_all = f"{done:,} of {plan.total_steps:,}"
    return f"{plan.run_dir}: would resume after step {of_all}, if that checkpoint is whole"


def _recipe(recipe: Recipe, name: str | None) -> str:
    """The recipe, and what the command line changes in it."""
    if name is None:
        return "given by the command line"
    try:
        alone = named_recipe(name, {"data.path": recipe.data.path})
    except UserError:  # it leaves something open
        return f"{name}, completed by the command line"
    before, now = flattened(alone.as_dict()), flattened(recipe.as_dict())
    changed = [
        f"{key} {before.get(key)} -> {now.get(key)}"
        for key in before | now
        if before.get(key) != now.get(key)
    ]
    return f"{name}, changed: {', '.join(changed)}" if changed else f"{name} as it is"


def _images(plan: Plan) -> str:
    """How many images of how many classes, and what is measured on them while training."""
    source, monitor = plan.source, plan.monitor
    classes = f", {len(source.classes):,} classes" if source.labels is not None else ", without labels"
    knn = "no k-NN while training"
    if monitor is not None:
        knn = (
            f"k-NN every {plan.recipe.monitor.knn_every_epochs} epochs: {len(monitor.test):,} images among "
            f"{len(monitor.train):,}"
        )
    return f"{len(source):,} of {plan.recipe.data.path}{classes}; {knn}"


def _time(plan: Plan) -> str:
    """An estimate from the speed of a matrix product."""
    devices = plan.num_processes if plan.device.type == "cuda" else 1  # processes on a CPU share its cores
    peak = measured_peak(plan.device, plan.precision, rounds=3)
    images = max(0, plan.total_steps - latest_step(plan.run_dir)) * plan.recipe.optim.global_batch_size
    hours = images * plan.flops_per_image["training"] / (devices * peak) / 3600
    low, high = SHARES_OF_PEAK[plan.device.type]
    return (
        f"{duration(hours / high)} to {duration(hours / low)} (estimate: {high:.0%} to {low:.0%} of the "
        f"{peak / 1e9:,.0f} GFLOP/s of a matrix product on one {plan.device.type} here, if loading keeps up "
        f"and without k-NN)"
    )


def schedule_table(schedules: Schedules, warmup_steps: int) -> list[str]:
    """What the schedules say at some steps, a line each."""
    total = len(schedules.lr)
    points = {"start": 0, "warm-up's end": warmup_steps}
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


def size(num_bytes: float) -> str:
    """In MiB or GiB, as fits."""
    return f"{num_bytes / GIB:.1f} GiB" if num_bytes >= GIB else f"{num_bytes / 2**20:.1f} MiB"


def duration(hours: float) -> str:
    """In minutes, hours or days, as fits."""
    if hours < 1:
        return f"{60 * hours:.1f} minutes"
    return f"{hours:,.1f} hours" if hours < 48 else f"{hours:,.0f} hours ({hours / 24:.1f} days)"

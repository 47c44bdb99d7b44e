"""Preparation of a run: images, views, schedules, initial weights, and restored state."""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dino_sparo.data.decode import size_of
from dino_sparo.data.loader import BatchOrder, CropsDataset, Executor, choose_executor
from dino_sparo.data.shapes import SHAPES
from dino_sparo.data.sources import ImageSource, absolute_path, decide, open_images, say_splits
from dino_sparo.data.splits import Choice
from dino_sparo.data.tables import commit_of
from dino_sparo.data.views import NUM_GLOBAL_CROPS, crop_kinds
from dino_sparo.data.workers import default_workers
from dino_sparo.errors import UserError
from dino_sparo.files import read_as
from dino_sparo.interop.initial_weights import initialize_networks, read_networks
from dino_sparo.models.encoder import architecture
from dino_sparo.parallel.distributed import first_rank_first, gather_objects, world_size
from dino_sparo.parallel.precision import DTYPES, choose_precision, set_numerics
from dino_sparo.recipe.sections import (
    DataOptions,
    LossOptions,
    MachineOptions,
    MonitorOptions,
    OptimOptions,
    Recipe,
    ViewOptions,
)
from dino_sparo.runs.checkpoint import load_latest
from dino_sparo.runs.rundir import read_starts
from dino_sparo.terminal import counted, log
from dino_sparo.training.monitor import CollapseAlarm, KnnImages, open_knn_images
from dino_sparo.training.schedules import Cosine, Hyperparameters, Linear, Schedules
from dino_sparo.training.state import TrainState, restore_state
from dino_sparo.training.stopping import BadImages

FEW_STEPS = 2000
FEW_PROTOTYPES = 256
SIZED_IMAGES = 32  # images whose mean size is the estimate for all


@dataclass(frozen=True, kw_only=True)
class Run:
    """A prepared run: its constants, and the training state."""

    recipe: Recipe
    run_dir: Path
    source: ImageSource
    images: dict[str, Any]
    """Number and fingerprint of the images, as in checkpoints."""
    device: torch.device
    precision: str
    num_workers: int
    dataset: CropsDataset
    state: TrainState
    first_step: int
    """Steps done by earlier starts."""
    order: BatchOrder
    schedules: Schedules
    total_steps: int
    knn_images: KnnImages | None
    alarm: CollapseAlarm
    bad_images: BadImages


def machine_of(run: Run) -> dict[str, Any]:
    """Hardware and its settings, for the list of starts."""
    return {
        "processes": world_size(),
        "device": torch.cuda.get_device_name(run.device) if run.device.type == "cuda" else "cpu",
        "precision": run.precision,
        "batch_size_per_gpu": run.order.micro_batch_size,
        "accumulation": run.order.accumulation,
        "views": run.dataset.executor,
    } | commit_of(run.source)


def say_start(run: Run) -> None:
    """Log the first step, images, processes, precision and workers of the run."""
    order = run.order
    log.info(
        f"{run.run_dir}: {'resuming' if run.first_step else 'starting'} at step {run.first_step} of "
        f"{run.total_steps}, {counted(len(run.source), 'image')}, {world_size()} x {run.device.type}, "
        f"{counted(order.micro_batch_size, 'image')} each"
        f"{f' x {order.accumulation} micro-batches' if order.accumulation > 1 else ''}, {run.precision}, "
        f"{counted(run.num_workers, 'worker')} each"
    )
    if not run.first_step and run.recipe.data.path != SHAPES:
        remarks = advice(
            *(run.recipe.optim, run.recipe.head.num_prototypes, len(run.source)),
            max_images=run.recipe.data.max_images,
            knn_images=run.knn_images,
        )
        for one in remarks:
            log.info("REMARK: %s", one)
    if run.device.type == "cuda" and world_size() == 1 < torch.cuda.device_count():
        log.info("this machine has %d GPUs; use --nproc to train on more than one", torch.cuda.device_count())


def advice(
    optim: OptimOptions,
    num_prototypes: int,
    num_images: int,
    *,
    max_images: int | None,
    knn_images: KnnImages | None,
) -> list[str]:
    """What to change in a recipe of large data for a small folder."""
    found, steps = [], num_images // optim.global_batch_size * optim.epochs
    if steps < FEW_STEPS:
        epochs = -(-FEW_STEPS * optim.epochs // max(1, steps))
        few = f"only {counted(steps, 'step')}; thousands are usual"
        found.append(f"{few}; --optim.epochs {epochs} gives {FEW_STEPS:,}")
    if num_prototypes > max(num_images, FEW_PROTOTYPES):
        fewer = max(FEW_PROTOTYPES, 2 ** (num_images // 4).bit_length() // 2)
        found.append(
            f"{num_prototypes:,} prototypes are more than the {num_images:,} images; --head.num_prototypes "
            f"{fewer} fits them better"
        )
    if max_images is not None and knn_images is not None and max(map(len, knn_images)) > max_images:
        found.append(
            f"k-NN during training uses {len(knn_images.test):,} test and {len(knn_images.train):,} train "
            f"images; data.max_images does not limit them, monitor.knn_images_per_class does"
        )
    return found


def restored_step(
    state: TrainState,
    run_dir: Path,
    images: dict[str, Any],
    executor: Executor,
    *,
    unverified: bool,
) -> int | None:
    """Restore the newest checkpoint of a run; returns its step, or None if there is no checkpoint.

    Raises:
        UserError: it is damaged, or belongs to other images or another recipe.
    """
    checkpoint = load_latest(run_dir, unverified=unverified)
    if checkpoint is None:
        return None
    with read_as(
        f"run_dir {str(run_dir)!r} has a checkpoint that does not fit its recipe",
        "restore the folder, or choose another run_dir",
    ):
        if checkpoint["images"] != images:
            raise UserError(
                f"data.path: run_dir {str(run_dir)!r} was trained on {checkpoint['images']['num_images']} "
                f"images, which are not the same as these {images['num_images']} (file names differ); "
                f"give the same folder (an earlier version may have chosen other images of it: --data.train "
                f"'.' takes all, --data.train train those of train), or choose another run_dir"
            )
        restore_state(state, checkpoint)
        step = int(checkpoint["step"])
    before = [start["views"] for start in read_starts(run_dir) if "views" in start][-1:]
    if before and before != [executor]:
        log.warning(
            "WARNING: %s: views were made by %s before and are made by %s now, which rounds pixels "
            "differently, so the run is no longer bit-identical to an uninterrupted one",
            *(run_dir, before[0], executor),
        )
    return step


def initialize_state(
    state: TrainState, init: str, encoder: dict[str, Any], *, norm_last_layer: bool, frozen: bool
) -> str:
    """Load initial weights into a new state; returns a description of what was loaded.

    Args:
        init: source of the weights, as in the recipe.
        encoder: arguments of `build_encoder` for the state.

    Raises:
        UserError: the weights cannot be read or do not fit.
    """
    stored = first_rank_first(lambda: read_networks(init, encoder))  # timm may download them
    return initialize_networks(
        *(state.student, state.teacher, stored, encoder), norm_last_layer=norm_last_layer, frozen=frozen
    )


def open_data(
    data: DataOptions, monitor: MonitorOptions, batch_size: int
) -> tuple[ImageSource, KnnImages | None]:
    """The training images, at least one batch, and the images for k-NN during training.

    Raises:
        UserError: there are no or too few images.
    """
    choice = Choice.of(data)
    splits = decide(data.path, choice)
    source = open_images(data.path, data.max_images, choice=choice, splits=splits)
    if len(source) < batch_size:
        largest = len(source) // world_size() * world_size()
        raise UserError(
            f"data.path {data.path!r} gives {counted(len(source), 'image')}, fewer than one batch: "
            f"optim.global_batch_size is {batch_size}; use more images"
            + (f" or a smaller batch, at most --optim.global_batch_size {largest}" if largest else "")
        )
    images = None
    if monitor.knn_every_epochs:
        images = open_knn_images(monitor.knn_path, data.path, monitor.knn_images_per_class, choice, splits)
    if images is None or monitor.knn_path is not None:  # else `open_knn_images` has logged the splits
        say_splits(data.path, source, None, splits, held_out=False)
    return source, images


def absolute_paths(data: DataOptions, monitor: MonitorOptions) -> dict[str, Any]:
    """Both sections with absolute paths of folders of images."""
    return {
        "data": replace(data, path=absolute_path(data.path)),
        "monitor": replace(monitor, knn_path=monitor.knn_path and absolute_path(monitor.knn_path)),
    }


def use_machine(
    machine: MachineOptions,
    device: torch.device,
    *,
    arch: str | Mapping[str, int],
    max_side: int | None,
    processes_here: int = 1,
    run_dir: Path | None = None,
) -> tuple[int, str, Executor]:
    """Set how this process computes; returns workers per process, precision, and executor of the views.

    Args:
        arch: of the networks, as in `build_encoder`.
        max_side: as in `choose_executor`, whose errors it raises.
        processes_here: training processes on this machine.
        run_dir: of the run, which keeps its precision on a CPU.
    """
    starts = read_starts(run_dir) if run_dir is not None else []
    on_cpu = [start["precision"] for start in starts if start["device"] == "cpu"]
    used = on_cpu[-1] if on_cpu and on_cpu[-1] in ("fp32", *DTYPES) else None
    set_numerics(tf32=machine.tf32, deterministic=machine.deterministic)
    num_workers = default_workers(processes_here) if machine.num_workers is None else machine.num_workers
    executor = choose_executor(machine.views, device, max_side=max_side, num_workers=num_workers)
    width = architecture(arch)["width"]
    return num_workers, choose_precision(machine.precision, device, width=width, used=used), executor


def dataset_of(
    data: DataOptions, views: ViewOptions, seed: int, source: ImageSource, executor: Executor
) -> CropsDataset:
    """The dataset of random views."""
    return CropsDataset(
        source,
        crop_kinds(**asdict(views)),
        seed,
        substitute=data.on_bad_image == "substitute",
        executor=executor,
        max_side=data.max_side,
    )


def bytes_of_image(views: ViewOptions, max_side: int | None, source: ImageSource, executor: Executor) -> int:
    """Bytes per image from a worker: its crops, or the decoded image (an estimate from some images)."""
    if executor != "device":
        return 3 * (NUM_GLOBAL_CROPS * views.global_size**2 + views.num_local_crops * views.local_size**2)
    chosen = np.linspace(0, len(source) - 1, min(SIZED_IMAGES, len(source))).round().astype(int)
    known = []
    for number in chosen:
        with suppress(OSError):  # the loader reports images that cannot be read
            size = size_of(source.read(int(number)), max_side)
            known += [3 * size[0] * size[1]] if size else []
    return sum(known) // len(known) if known else 3 * views.global_size**2


def check_all_agree(
    run_dir: Path, first_step: int, images: dict[str, Any], executor: str, precision: str
) -> None:
    """Check that all processes have the same step, images, executor of views, and precision. Also a barrier.

    Raises:
        UserError: they differ between processes.
    """
    everyone = gather_objects((first_step, images, executor, precision))
    steps = sorted({step for step, *_ in everyone})
    if len(steps) > 1:
        raise UserError(
            f"run_dir {str(run_dir)!r}: processes find different checkpoints (steps {steps}); use one folder "
            f"on a file system that all machines share"
        )
    if any(other != images for _, other, *_ in everyone):
        numbers = sorted({other["num_images"] for _, other, *_ in everyone})
        raise UserError(
            f"data.path: processes find different images ({numbers}, or other file names); use the same "
            f"images on every machine"
        )
    if any(other != executor for *_, other, _ in everyone):
        raise UserError(
            "machine.views is auto, but some processes would make views on the GPU and others by PIL, since "
            "machines differ in workers or in a C compiler; set machine.views to device or pil"
        )
    precisions = sorted({other for *_, other in everyone})
    if len(precisions) > 1:
        raise UserError(
            f"machine.precision is auto, which is {' and '.join(precisions)} on different machines; set it, "
            f"for example to fp32"
        )


def build_schedules(optim: OptimOptions, loss: LossOptions, steps_per_epoch: int) -> Schedules:
    """All schedules of the run."""
    total = optim.epochs * steps_per_epoch
    peak_lr = optim.lr_per_256 * optim.global_batch_size / 256
    return Schedules(
        lr=Cosine(peak_lr, optim.final_lr, total, optim.warmup_epochs * steps_per_epoch),
        weight_decay=Cosine(optim.weight_decay, optim.final_weight_decay, total),
        momentum=Cosine(optim.teacher_momentum, 1.0, total),
        teacher_temp=Linear(loss.warmup_teacher_temp, loss.teacher_temp, loss.warmup_teacher_temp_epochs),
        freeze_last_layer_epochs=optim.freeze_last_layer_epochs,
        freeze_backbone_epochs=optim.freeze_backbone_epochs or 0,
        steps_per_epoch=steps_per_epoch,
    )


def unfrozen_step(optim: OptimOptions, loss: LossOptions) -> Hyperparameters:
    """Hyperparameters of the first step, but with nothing frozen: what measurements of a step use."""
    return replace(
        build_schedules(optim, loss, steps_per_epoch=1).at(0), freeze_last_layer=False, freeze_backbone=False
    )

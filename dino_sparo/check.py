"""`dino-sparo check`: what a run would do, before it does it: data, cost, hours, disk, and what limits it."""

import json
import math
import shutil
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from dino_sparo.checks import split_batch
from dino_sparo.data.loader import BatchOrder, CropsDataset, crop_batches
from dino_sparo.data.scan import scan_images
from dino_sparo.data.scan_report import DataReport, data_report, describe
from dino_sparo.data.sources import ImageSource, open_val
from dino_sparo.data.views import NUM_GLOBAL_CROPS, crop_recipes
from dino_sparo.data.workers import default_workers
from dino_sparo.device import choose_device
from dino_sparo.errors import UserError
from dino_sparo.measure import (
    Loading,
    Stepping,
    checkpoint_bytes,
    count_flops,
    count_parameters,
    measure_loading,
    measure_steps,
)
from dino_sparo.options import CheckOptions
from dino_sparo.training.checkpoint import KEEP_LAST
from dino_sparo.training.precision import choose_precision, set_numerics
from dino_sparo.training.rundir import config_of
from dino_sparo.training.setup import build_schedules, open_data
from dino_sparo.training.state import build_state

LOADING_SECONDS = 10.0
LOADING_BATCH = 8  # images; the speed is that of any batch, and it comes sooner
STEPS = 3
CPU_BATCH = 4  # images; a CPU is timed on a few, its speed is that of any batch
GIB = 2**30


def check(options: CheckOptions) -> int:
    """Print what the run would be, as text or JSON; 0 if nothing stands in its way, else 1."""
    say = (lambda text: print(text, file=sys.stderr)) if options.json else print
    device = choose_device(options.machine.device)
    machine, optim = options.machine, options.optim
    set_numerics(tf32=machine.tf32, deterministic=machine.deterministic)
    batch_size, accumulation = split_batch(optim.global_batch_size, machine.batch_size_per_gpu, options.nproc)
    workers = default_workers(options.nproc) if machine.num_workers is None else machine.num_workers
    source, _ = open_data(options, workers)

    report: dict[str, Any] = {"problems": [], "remarks": []}
    if options.scan:
        data = scan(options, source, max(1, workers) * options.nproc)
        report["data"] = asdict(data)
        report["problems"] += data_problems(data, options.data.on_bad_image)
        report["remarks"] += data_remarks(data)
        say("\n".join(describe(data)))
    loading = load(options, source, workers * options.nproc, say)
    report |= {"loader": {"images_per_second": loading.images_per_second, "workers": loading.workers}}
    report |= cost(options, loading, batch_size, device, say)
    report |= projection(options, report, device, len(source), batch_size, accumulation, workers)
    report["problems"] += machine_problems(options, report)
    say("\n".join(summary(options, report, device)))
    if options.json:
        print(json.dumps(report, indent=1))
    return 1 if report["problems"] else 0


def scan(options: CheckOptions, source: ImageSource, num_workers: int) -> DataReport:
    """Every file of train and, if there is one, of val."""
    timeout, val = options.machine.data_timeout_seconds, open_val(options.data.path)
    scans = [
        scan_images(images, num_workers=num_workers, description=f"scanning {name}", timeout_seconds=timeout)
        for name, images in (("train", source), ("val", val))
        if images is not None
    ]
    return data_report(scans[0], scans[1] if val is not None else None)


def load(options: CheckOptions, source: ImageSource, num_workers: int, say: Any) -> Loading:
    """The speed of all workers of this machine together."""
    say(f"\nmeasuring the loader for {LOADING_SECONDS:.0f} seconds, and {STEPS} steps ...")
    dataset = CropsDataset(source, crop_recipes(**asdict(options.views)), options.seed, substitute=True)
    order = BatchOrder(
        num_samples=len(source),
        global_batch_size=min(LOADING_BATCH, len(source)),
        epochs=10**6,
        seed=options.seed,
    )
    timeout = options.machine.data_timeout_seconds
    batches, watched = crop_batches(
        dataset,
        order,
        num_workers=num_workers,
        prefetch_batches=options.machine.prefetch_batches,
        pin_memory=False,
        timeout_seconds=timeout,
    )
    return measure_loading(batches, watched, seconds=LOADING_SECONDS, timeout=timeout)


def cost(
    options: CheckOptions, loading: Loading, batch_size: int, device: torch.device, say: Any
) -> dict[str, Any]:
    """Parameters, FLOPs, speed of a step on one device, and the size of a checkpoint."""
    views = options.views
    config = config_of(options)
    precision = choose_precision(options.machine.precision, device)
    sizes = [(NUM_GLOBAL_CROPS, views.global_size), (views.num_local_crops, views.local_size)]
    on_cpu = build_state(config, torch.device("cpu"))
    flops = count_flops(on_cpu.student, sizes)
    del on_cpu
    state = build_state(
        config,
        device,
        loss_scaling=precision == "fp16",
        activation_checkpointing=options.machine.activation_checkpointing,
    )
    hyper = replace(build_schedules(options, steps_per_epoch=1).at(0), freeze_last_layer=False)
    tried = batch_size if device.type == "cuda" else min(batch_size, CPU_BATCH)
    stepping: Stepping | None = None
    while stepping is None:
        try:
            stepping = measure_steps(
                state,
                loading.crops,
                tried,
                hyper,
                steps=STEPS,
                clip_norm=options.optim.clip_norm,
                precision=precision,
                device=device,
            )
        except torch.OutOfMemoryError:
            if tried == 1:
                raise UserError("the GPU's memory does not hold a step on one image") from None
            tried //= 2
            say(f"{2 * tried} images at once do not fit into the GPU's memory; trying {tried}")
    return {
        "parameters": {
            "encoder": count_parameters(state.student.encoder),
            "head": count_parameters(state.student.head),
        },
        "flops_per_image": flops,
        "step": asdict(stepping) | {"precision": precision},
        "checkpoint_bytes": checkpoint_bytes(state),
    }


def projection(
    options: CheckOptions,
    report: dict[str, Any],
    device: torch.device,
    num_images: int,
    batch_size: int,
    accumulation: int,
    workers: int,
) -> dict[str, Any]:
    """What follows from the measurements for the whole run, k-NN left out."""
    optim, log, views = options.optim, options.log, options.views
    # GPUs work side by side, processes on a CPU share its cores.
    networks = report["step"]["images_per_second"] * (options.nproc if device.type == "cuda" else 1)
    loader = report["loader"]["images_per_second"]
    speed = min(networks, loader)
    steps_per_epoch = num_images // optim.global_batch_size
    seen = optim.epochs * steps_per_epoch * optim.global_batch_size
    kept = KEEP_LAST + 1 + (optim.epochs // log.keep_every_epochs if log.keep_every_epochs else 0)
    pixels = NUM_GLOBAL_CROPS * views.global_size**2 + views.num_local_crops * views.local_size**2
    prefetched = options.nproc * workers * options.machine.prefetch_batches * batch_size * 3 * pixels
    return {
        "run": {
            "images": num_images,
            "steps_per_epoch": steps_per_epoch,
            "steps": optim.epochs * steps_per_epoch,
            "processes": options.nproc,
            "batch_size_per_gpu": batch_size,
            "accumulation": accumulation,
            "networks_images_per_second": networks,
            "images_per_second": speed,
            "limited_by": "network" if networks <= loader else "loader",
            "hours": seen / speed / 3600,
            "disk_bytes": kept * report["checkpoint_bytes"],
            "disk_free_bytes": shutil.disk_usage(_existing(Path(options.run_dir))).free,
            "prefetched_bytes": prefetched,
            "shared_memory_free_bytes": _shared_memory(),
        }
    }


def data_problems(data: DataReport, on_bad_image: str) -> list[str]:
    """What of the data would stop the run or spoil its evaluation."""
    problems = []
    for split, found in (("train", data.train), ("val", data.val)):
        bad = sum(listing.count for listing in found.problems.values()) if found else 0
        if bad and (split == "val" or on_bad_image == "stop"):
            remedy = " or set data.on_bad_image substitute" if split == "train" else ""
            problems.append(f"{bad} images of {split} cannot be read: repair or remove them{remedy}")
    if data.classes.only_in_val.count:
        problems.append(f"{data.classes.only_in_val.count} classes of val are not in train")
    return problems


def data_remarks(data: DataReport) -> list[str]:
    """What makes evaluations look better than they are."""
    if not data.val or not data.val_in_train or not data.val_in_train.images:
        return []
    leaked, images = data.val_in_train.images, data.val.images
    return [
        f"{leaked} of {images} images of val are in train too: k-NN and linear probe may come out up to "
        f"{100 * leaked / images:.2f} points too high"
    ]


def machine_problems(options: CheckOptions, report: dict[str, Any]) -> list[str]:
    """What of the machine would stop the run."""
    run, step, problems = report["run"], report["step"], []
    if run["disk_bytes"] > run["disk_free_bytes"]:
        problems.append(
            f"run_dir {options.run_dir!r}: checkpoints need {run['disk_bytes'] / GIB:.1f} GiB, "
            f"{run['disk_free_bytes'] / GIB:.1f} are free: use another disk or a larger log.keep_every_epochs"
        )
    if step["memory_gib"] is not None and step["batch_size"] < run["batch_size_per_gpu"]:
        problems.append(
            f"{run['batch_size_per_gpu']} images at once do not fit into the GPU's memory: give "
            f"machine.batch_size_per_gpu {step['batch_size']}"
        )
    free = run["shared_memory_free_bytes"]
    if free is not None and run["prefetched_bytes"] > free:
        problems.append(
            f"prefetched batches need {run['prefetched_bytes'] / GIB:.1f} GiB of shared memory, "
            f"{free / GIB:.1f} are free: enlarge /dev/shm or give fewer machine.num_workers"
        )
    return problems


def summary(options: CheckOptions, report: dict[str, Any], device: torch.device) -> list[str]:
    """The report's numbers, as lines of text."""
    run, step, loader = report["run"], report["step"], report["loader"]
    networks = run["networks_images_per_second"]
    flops, parameters = report["flops_per_image"], report["parameters"]
    hours = run["hours"]
    duration = f"{hours:,.1f} hours" if hours < 48 else f"{hours:,.0f} hours ({hours / 24:.1f} days)"
    memory = ""
    if step["memory_gib"] is not None:
        memory = f", {step['memory_gib']:.1f} of {step['gpu_memory_gib']:.0f} GiB of GPU memory"
    seconds = step["batch_size"] / step["images_per_second"]
    per_step = f"{run['processes']} x {run['batch_size_per_gpu']}"
    if run["accumulation"] > 1:
        per_step += f" x {run['accumulation']} micro-batches"
    limits = {
        "network": "the networks: the loader could feed {:.1f} times as many; another GPU shortens the run",
        "loader": "loading images: the networks could take {:.1f} times as many; more cores shorten the run",
    }
    faster = max(networks, loader["images_per_second"]) / run["images_per_second"]
    shared = run["shared_memory_free_bytes"]
    shared_memory = f" of {shared / GIB:.1f} GiB free in /dev/shm" if shared is not None else ""
    expected = math.log(options.head.num_prototypes)
    disk, disk_free = run["disk_bytes"] / GIB, run["disk_free_bytes"] / GIB
    encoder = f"{parameters['encoder'] / 1e6:.1f} M parameters, {flops['encoder'] / 1e9:.1f} GFLOPs a crop"
    lines = [
        "",
        f"encoder   {encoder} of {options.views.global_size} pixels",
        f"head      {parameters['head'] / 1e6:.1f} M parameters",
        f"training  {flops['training'] / 1e9:.0f} GFLOPs an image (a multiply-add is two)",
        f"loss      {step['loss']:.2f} at the start, ln K is {expected:.2f}",
        f"loader    {loader['images_per_second']:,.0f} images/s with {loader['workers']} workers (measured)",
        f"step      {step['images_per_second']:,.1f} images/s on one {device.type}, {step['precision']}: "
        f"{seconds:.3f} s for {step['batch_size']} images at once{memory} (measured)",
        f"batch     {options.optim.global_batch_size} images: {per_step}",
        f"run       {run['images']:,} images, {run['steps_per_epoch']:,} steps an epoch, "
        f"{run['steps']:,} in all",
        f"speed     {run['images_per_second']:,.1f} images/s: the smaller of loader and networks "
        f"({networks:,.1f})",
        f"time      {duration} for {options.optim.epochs} epochs, without k-NN",
        f"disk      {report['checkpoint_bytes'] / GIB:.2f} GiB a checkpoint, {disk:.1f} GiB at most, "
        f"{disk_free:.0f} GiB free",
        f"memory    {run['prefetched_bytes'] / GIB:.1f} GiB of prefetched views{shared_memory}",
        f"limit     {limits[run['limited_by']].format(faster)}",
        "",
        *(f"REMARK: {remark}" for remark in report["remarks"]),
    ]
    return lines + ([f"PROBLEM: {problem}" for problem in report["problems"]] or ["nothing is in the way"])


def _existing(folder: Path) -> Path:
    """The folder, or the nearest above it that exists."""
    folder = folder.absolute()
    return next(place for place in (folder, *folder.parents) if place.exists())


def _shared_memory() -> int | None:
    """Free bytes of /dev/shm, through which workers hand over views; None where there is none."""
    return shutil.disk_usage("/dev/shm").free if Path("/dev/shm").exists() else None

"""`dino-sparo check`: what a run would do, before it does it: data, cost, hours, disk, and what limits it."""

import json
import logging
import os
import shutil
import sys
import warnings
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from dino_sparo.check.measure import (
    Loading,
    Stepping,
    count_flops,
    existing_folder,
    measure_loading,
    measure_steps,
    memory_free,
    private_bytes,
)
from dino_sparo.check.report import data_findings, machine_problems, summary, verdict
from dino_sparo.checks import smaller_batch, split_batch
from dino_sparo.data.loader import BatchOrder, CropsDataset, crop_batches
from dino_sparo.data.scan import scan_images
from dino_sparo.data.scan_report import DataReport, data_report, describe
from dino_sparo.data.sources import ImageSource, open_val
from dino_sparo.data.views import NUM_GLOBAL_CROPS, crop_recipes
from dino_sparo.data.workers import check_shared_memory, default_workers, shared_memory_free
from dino_sparo.errors import UserError
from dino_sparo.models.cost import count_parameters, encoder_cost
from dino_sparo.options import CheckOptions
from dino_sparo.parallel.device import choose_device
from dino_sparo.parallel.precision import choose_precision, set_numerics
from dino_sparo.runs.checkpoint import most_kept
from dino_sparo.runs.rundir import CONFIG_FILE, check_same_experiment, config_of
from dino_sparo.training.setup import (
    build_schedules,
    bytes_of_image,
    dataset_of,
    executor_of,
    open_data,
    prefetched_bytes,
    start_state,
)
from dino_sparo.training.state import build_state, checkpoint_bytes

log = logging.getLogger("dino_sparo")

LOADING_SECONDS = 10.0
LOADING_BATCH = 8  # images; the speed is that of any batch, and it comes sooner
STEPS = 3
CPU_BATCH = 4  # images; a CPU is timed on a few, its speed is that of any batch


def check(options: CheckOptions) -> int:
    """Print what the run would be, as text or JSON; 0 if nothing stands in its way, else 1."""
    say = (lambda text: print(text, file=sys.stderr)) if options.json else print
    device = choose_device(options.machine.device)
    machine, optim = options.machine, options.optim
    set_numerics(tf32=machine.tf32, deterministic=machine.deterministic)
    batch_size, accumulation = split_batch(optim.global_batch_size, machine.batch_size_per_gpu, options.nproc)
    workers = default_workers(options.nproc) if machine.num_workers is None else machine.num_workers
    check_same_experiment(Path(options.run_dir), config_of(options))
    source, monitor = open_data(options, workers)

    report: dict[str, Any] = {"problems": [], "remarks": []}
    if monitor is None:
        report["remarks"].append("no k-NN while training: monitor.knn_path can name a labelled folder")
    if device.type == "cuda" and options.nproc > torch.cuda.device_count():
        report["problems"].append(f"{options.nproc} processes, but {torch.cuda.device_count()} GPUs here")
    if options.scan:
        data = scan(options, source, max(1, workers) * options.nproc)
        report["data"] = asdict(data)
        problems, remarks = data_findings(data, options)
        report["problems"] += problems
        report["remarks"] += remarks
        say("\n".join(describe(data)))
    try:
        dataset = dataset_of(replace_bad_ones(options), source, executor_of(options, device))
        image_bytes = bytes_of_image(options, source, dataset.executor)
        prefetched = prefetched_bytes(options, workers, batch_size, options.nproc, image_bytes)
        check_shared_memory(prefetched)
        loading = load(options, dataset, workers * options.nproc)
        report["loader"] = {key: value for key, value in vars(loading).items() if key != "batch"}
        report["loader"]["views"] = dataset.executor
        report |= cost(options, loading, batch_size, device)
        report["run"] = projection(
            options, report, device, len(source), batch_size, accumulation, workers, prefetched
        )
        report["problems"] += machine_problems(options, report)
        say("\n".join(summary(options, report, device.type)))
    except UserError as error:  # what was found so far is worth telling
        report["problems"].append(str(error))
    say("\n".join(verdict(report)))
    if options.json:
        print(json.dumps(report, indent=1))
    return 1 if report["problems"] else 0


def scan(options: CheckOptions, source: ImageSource, num_workers: int) -> DataReport:
    """Every file of train and, if there is one, of val."""
    timeout = options.machine.data_timeout_seconds
    val = open_val(options.monitor.knn_path or options.data.path)
    scans = [
        scan_images(images, num_workers=num_workers, description=f"scanning {name}", timeout_seconds=timeout)
        for name, images in (("train", source), ("val", val))
        if images is not None
    ]
    return data_report(scans[0], scans[1] if val is not None else None)


def replace_bad_ones(options: CheckOptions) -> CheckOptions:
    """The same, but for images that cannot be read: they have been told before."""
    return replace(options, data=replace(options.data, on_bad_image="substitute"))


def load(options: CheckOptions, dataset: CropsDataset, num_workers: int) -> Loading:
    """The speed of all workers of this machine together."""
    log.info("measuring the loader for %.0f seconds, and %d steps ...", LOADING_SECONDS, STEPS)
    order = BatchOrder(
        num_samples=len(dataset.source),
        global_batch_size=min(LOADING_BATCH, len(dataset.source)),
        epochs=10**6,
        seed=options.seed,
    )
    warnings.filterwarnings("ignore", message="This DataLoader will create")  # as many as were asked for
    batches = crop_batches(
        dataset,
        order,
        num_workers=num_workers,
        prefetch_batches=options.machine.prefetch_batches,
        pin_memory=False,
        timeout_seconds=options.machine.data_timeout_seconds,
    )
    return measure_loading(batches, seconds=LOADING_SECONDS)


def cost(options: CheckOptions, loading: Loading, batch_size: int, device: torch.device) -> dict[str, Any]:
    """Parameters, FLOPs, speed of a step on one device, and the size of a checkpoint."""
    views = options.views
    config = config_of(options)
    precision = choose_precision(options.machine.precision, device)
    sizes = [(NUM_GLOBAL_CROPS, views.global_size), (views.num_local_crops, views.local_size)]
    on_cpu = build_state(config, torch.device("cpu"))
    flops = count_flops(on_cpu.student, sizes)
    of_encoder = encoder_cost(on_cpu.student.encoder, views.global_size)
    del on_cpu
    state = build_state(
        config,
        device,
        loss_scaling=precision == "fp16",
        activation_checkpointing=options.machine.activation_checkpointing,
        compiled=options.machine.compile,
    )
    if options.init is not None and not (Path(options.run_dir) / CONFIG_FILE).exists():
        log.info(start_state(state, options))
    hyper = replace(build_schedules(options, steps_per_epoch=1).at(0), freeze_last_layer=False)
    share = options.optim.global_batch_size // options.nproc
    tried = batch_size if device.type == "cuda" else min(batch_size, CPU_BATCH)
    stepping: Stepping | None = None
    while stepping is None:
        try:
            stepping = measure_steps(
                state,
                loading.batch,
                crop_recipes(**asdict(views)),
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
            log.info("%d images at once do not fit into the GPU's memory; trying fewer", tried)
            tried = smaller_batch(share, tried)
    return {
        "parameters": {
            "encoder": of_encoder["parameters"],
            "readout": of_encoder["readout_parameters"],
            "head": count_parameters(state.student.head),
        },
        "flops_per_image": flops | {"readout": float(of_encoder["readout_flops"])},
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
    prefetched: int,
) -> dict[str, Any]:
    """What follows from the measurements for the whole run, k-NN left out."""
    optim, log, loader_bytes = options.optim, options.log, report["loader"]["worker_bytes"]
    # GPUs work side by side, processes on a CPU share its cores.
    networks = report["step"]["images_per_second"] * (options.nproc if device.type == "cuda" else 1)
    loader = report["loader"]["images_per_second"]
    # Without workers a process loads and computes in turns.
    speed = min(networks, loader) if workers else 1 / (1 / networks + 1 / loader)
    steps_per_epoch = num_images // optim.global_batch_size
    seen = optim.epochs * steps_per_epoch * optim.global_batch_size
    kept = most_kept(optim.epochs, log.keep_every_epochs)
    process = private_bytes(os.getpid())
    return {
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
        "disk_free_bytes": shutil.disk_usage(existing_folder(Path(options.run_dir))).free,
        "process_bytes": process,
        "memory_bytes": options.nproc * (process + workers * loader_bytes) + prefetched,
        "memory_free_bytes": memory_free(),
        "prefetched_bytes": prefetched,
        "shared_memory_free_bytes": shared_memory_free(),
    }

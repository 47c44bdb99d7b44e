"""`dino-sparo check` and `--dry-run`: what a run would be; measured and scanned too, if asked for."""

import json
import logging
import math
import os
import sys
import warnings
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from dino_sparo.check.measure import (
    Loading,
    Stepping,
    measure_loading,
    measure_steps,
    memory_free,
    private_bytes,
)
from dino_sparo.check.plan import Plan, duration, make_plan, plan_text, size
from dino_sparo.data.loader import BatchOrder, CropsDataset, crop_batches
from dino_sparo.data.scan import scan_images
from dino_sparo.data.scan_report import DataReport, data_report, describe
from dino_sparo.data.sources import ImageSource, open_val
from dino_sparo.data.views import crop_recipes
from dino_sparo.errors import EXIT_PROBLEM, UserError
from dino_sparo.models.cost import count_parameters
from dino_sparo.recipe.sections import Recipe, smaller_batch
from dino_sparo.training.bad_images import too_many
from dino_sparo.training.setup import build_schedules, dataset_of
from dino_sparo.training.state import build_state, checkpoint_bytes

log = logging.getLogger("dino_sparo")

LOADING_SECONDS = 10.0
LOADING_BATCH = 8  # images; the speed is that of any batch, and it comes sooner
STEPS = 3
CPU_BATCH = 4  # images; a CPU is timed on a few, its speed is that of any batch


def check(
    recipe: Recipe,
    run_dir: Path,
    *,
    num_processes: int = 1,
    recipe_name: str | None = None,
    measure: bool = False,
    scan: bool = False,
    as_json: bool = False,
) -> int:
    """Print the plan of a run, as text or JSON; 0 if no problem is found, else 1.

    Args:
        measure: time the loader and some steps.
        scan: read every file of the images.

    Raises:
        UserError: for a mistake in recipe or data, as at the start of the run.
    """
    say = (lambda text: print(text, file=sys.stderr)) if as_json else print
    plan = make_plan(recipe, run_dir, num_processes)
    say(plan_text(plan, recipe_name))
    report: dict[str, Any] = {
        "problems": plan.problems,
        "remarks": [],
        "run": plan.as_dict(),
        "parameters": {
            "encoder": plan.cost["parameters"],
            "readout": plan.cost["readout_parameters"],
            "head": count_parameters(plan.state.student.head),
        },
        "flops_per_image": plan.flops_per_image | {"readout": float(plan.cost["readout_flops"])},
        "checkpoint_bytes": checkpoint_bytes(plan.state),
    }
    if plan.monitor is None:
        report["remarks"].append("no k-NN while training: monitor.knn_path can name a labeled folder")
    if scan:
        data = scan_data(recipe, plan.source, max(1, plan.num_workers) * num_processes)
        report["data"] = asdict(data)
        problems, remarks = data_findings(data, recipe)
        report["problems"] += problems
        report["remarks"] += remarks
        say("\n" + "\n".join(describe(data)))
    if measure and not plan.problems:
        try:
            report |= measured(plan)
            report["run"] |= projection(plan, report)
            report["problems"] += machine_problems(plan, report)
            say("\n" + "\n".join(summary(plan, report)))
        except UserError as error:  # what was found so far is worth telling
            report["problems"].append(str(error))
    for asked, done in (("files not read: --scan", scan), ("speed not measured: --measure", measure)):
        report["remarks"] += [] if done else [asked]
    remarks = [f"REMARK: {remark}" for remark in report["remarks"]]
    problems = [f"PROBLEM: {problem}" for problem in report["problems"]]
    say("\n" + "\n".join([*remarks, *(problems or ["no problems found"])]))
    if as_json:
        print(json.dumps(report, indent=1))
    return EXIT_PROBLEM if report["problems"] else 0


def scan_data(recipe: Recipe, source: ImageSource, num_workers: int) -> DataReport:
    """Every file of train and, if there is one, of val."""
    timeout = recipe.machine.data_timeout_seconds
    val = open_val(recipe.monitor.knn_path or recipe.data.path)
    scans = [
        scan_images(images, num_workers=num_workers, description=f"scanning {name}", timeout_seconds=timeout)
        for name, images in (("train", source), ("val", val))
        if images is not None
    ]
    return data_report(scans[0], scans[1] if val is not None else None)


def data_findings(data: DataReport, recipe: Recipe) -> tuple[list[str], list[str]]:
    """Problems, which would stop the run, and remarks, of the data."""
    problems, remarks, of_val = [], [], []
    bad = _unreadable(data.train.problems)
    if bad and recipe.data.on_bad_image == "stop":
        problems.append(
            f"{_images(bad)} of train cannot be read: repair or remove them, or set data.on_bad_image "
            f"substitute"
        )
    elif too_many(bad, data.train.images):
        problems.append(
            f"{bad} of {data.train.images} images of train cannot be read, more than one in a hundred: "
            f"repair or remove them"
        )
    if data.val and (bad := _unreadable(data.val.problems)):
        of_val.append(f"{_images(bad)} of val cannot be read: repair or remove them")
    if missing := data.classes.only_in_val.count:
        of_val.append(f"{missing} {'class' if missing == 1 else 'classes'} of val not in train")
    if data.val and data.val_in_train and (leaked := data.val_in_train.images):
        remarks.append(
            f"{leaked} of {data.val.images} images of val are in train too: k-NN and linear probe may come "
            f"out up to {100 * leaked / data.val.images:.2f} points too high"
        )
    if recipe.monitor.knn_every_epochs:  # the monitor stops at them
        return problems + of_val, remarks
    return problems, of_val + remarks


def _unreadable(problems: dict[str, Any]) -> int:
    return sum(listing.count for listing in problems.values())


def _images(count: int) -> str:
    return "1 image" if count == 1 else f"{count} images"


def measured(plan: Plan) -> dict[str, Any]:
    """The speed of all workers of this machine together, and of steps on one device."""
    log.info("measuring the loader for %.0f seconds, and %d steps ...", LOADING_SECONDS, STEPS)
    recipe = plan.recipe
    data = replace(recipe.data, on_bad_image="substitute")  # bad images are told by the scan
    dataset = dataset_of(data, recipe.views, recipe.seed, plan.source, plan.executor)
    loading = load(plan, dataset)
    stepping = steps_of(plan, loading)
    loader = {key: value for key, value in vars(loading).items() if key != "batch"}
    return {
        "loader": loader | {"views": dataset.executor},
        "step": asdict(stepping) | {"precision": plan.precision},
    }


def load(plan: Plan, dataset: CropsDataset) -> Loading:
    """The speed of all workers of this machine together."""
    machine = plan.recipe.machine
    order = BatchOrder(
        num_samples=len(dataset.source),
        global_batch_size=min(LOADING_BATCH, len(dataset.source)),
        epochs=10**6,
        seed=plan.recipe.seed,
    )
    warnings.filterwarnings("ignore", message="This DataLoader will create")  # as many as were asked for
    batches = crop_batches(
        dataset,
        order,
        num_workers=plan.num_workers * plan.num_processes,
        prefetch_batches=machine.prefetch_batches,
        pin_memory=False,
        timeout_seconds=machine.data_timeout_seconds,
    )
    return measure_loading(batches, seconds=LOADING_SECONDS)


def steps_of(plan: Plan, loading: Loading) -> Stepping:
    """The speed of whole steps, on as many images at once as fit."""
    recipe, device = plan.recipe, plan.device
    state = build_state(
        **recipe.state_arguments(),
        device=device,
        loss_scaling=plan.precision == "fp16",
        activation_checkpointing=recipe.machine.activation_checkpointing,
        compiled=recipe.machine.compile,
    )
    for network in ("student", "teacher"):  # what the run starts from
        getattr(state, network).load_state_dict(getattr(plan.state, network).state_dict())
    hyper = replace(
        build_schedules(recipe.optim, recipe.loss, steps_per_epoch=1).at(0), freeze_last_layer=False
    )
    tried = plan.batch_size if device.type == "cuda" else min(plan.batch_size, CPU_BATCH)
    while True:
        try:
            return measure_steps(
                state,
                loading.batch,
                crop_recipes(**asdict(recipe.views)),
                tried,
                hyper,
                steps=STEPS,
                clip_norm=recipe.optim.clip_norm,
                precision=plan.precision,
                device=device,
            )
        except torch.OutOfMemoryError:
            if tried == 1:
                raise UserError("the GPU's memory does not hold a step on one image") from None
            log.info("%d images at once do not fit into the GPU's memory; trying fewer", tried)
            tried = smaller_batch(recipe.optim.global_batch_size // plan.num_processes, tried)


def projection(plan: Plan, report: dict[str, Any]) -> dict[str, Any]:
    """What follows from the measurements for the whole run, without k-NN."""
    # GPUs work side by side, processes on a CPU share its cores.
    devices = plan.num_processes if plan.device.type == "cuda" else 1
    networks = report["step"]["images_per_second"] * devices
    loader = report["loader"]["images_per_second"]
    # Without workers a process loads and computes in turns.
    speed = min(networks, loader) if plan.num_workers else 1 / (1 / networks + 1 / loader)
    process = private_bytes(os.getpid())
    workers = plan.num_workers * report["loader"]["worker_bytes"]
    return {
        "networks_images_per_second": networks,
        "images_per_second": speed,
        "limited_by": "network" if networks <= loader else "loader",
        "hours": plan.total_steps * plan.recipe.optim.global_batch_size / speed / 3600,
        "process_bytes": process,
        "memory_bytes": plan.num_processes * (process + workers) + plan.prefetched_bytes,
        "memory_free_bytes": memory_free(),
    }


def machine_problems(plan: Plan, report: dict[str, Any]) -> list[str]:
    """What of the machine would stop the run, by the measurements."""
    run, step, problems = report["run"], report["step"], []
    if run["memory_bytes"] > run["memory_free_bytes"]:
        problems.append(
            f"loading needs {size(run['memory_bytes'])} of memory, {size(run['memory_free_bytes'])} are "
            f"free: give fewer machine.num_workers"
        )
    if step["memory_gib"] is not None and step["batch_size"] < plan.batch_size:
        problems.append(
            f"{plan.batch_size} images at once do not fit into the GPU's memory: give "
            f"machine.batch_size_per_gpu {step['batch_size']}"
        )
    return problems


def summary(plan: Plan, report: dict[str, Any]) -> list[str]:
    """What was measured, as lines of text."""
    run, step, loader = report["run"], report["step"], report["loader"]
    networks, speed = run["networks_images_per_second"], run["images_per_second"]
    memory = ""
    if step["memory_gib"] is not None:
        memory = f", {step['memory_gib']:.1f} of {step['gpu_memory_gib']:.0f} GiB of GPU memory"
    limits = {
        "network": "the networks: the loader could feed {:.1f} times as many images",
        "loader": "loading images: the networks could take {:.1f} times as many; more cores shorten the run",
    }
    faster = max(networks, loader["images_per_second"]) / speed
    free = run["shared_memory_free_bytes"]
    shared = f" of {size(free)} free in /dev/shm" if free is not None else ""
    seconds = step["batch_size"] / step["images_per_second"]
    ln_k = math.log(plan.recipe.head.num_prototypes)
    ln_k = math.log(plan.recipe.head.num_prototypes)
    return [
        "measured:",
        f"loader      {loader['images_per_second']:,.0f} images/s with {loader['workers']} workers",
        f"step        {step['images_per_second']:,.1f} images/s on one {plan.device.type}, "
        f"{step['precision']}: {seconds:.3f} s for {step['batch_size']} images at once{memory}",
        f"loss        {step['loss']:.2f} at the start, ln K is {ln_k:.2f}",
        f"speed       {speed:,.1f} images/s: the smaller of loader and networks ({networks:,.1f})",
        f"time        {duration(run['hours'])} for {plan.recipe.optim.epochs} epochs, without k-NN and "
        f"communication between GPUs",
        f"memory      {size(run['memory_bytes'])} of {size(run['memory_free_bytes'])} free: "
        f"{plan.num_processes} x {size(run['process_bytes'])}, {loader['workers']} workers of "
        f"{size(loader['worker_bytes'])}, {size(run['prefetched_bytes'])} of prefetched views{shared}",
        f"limit       {limits[run['limited_by']].format(faster)}",
    ]

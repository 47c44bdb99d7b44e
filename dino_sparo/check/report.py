"""What `dino-sparo check` makes of its measurements: problems, remarks, and lines of text."""

import math
from typing import Any

from dino_sparo.data.scan_report import DataReport
from dino_sparo.options import CheckOptions
from dino_sparo.training.bad_images import too_many

GIB = 2**30


def data_findings(data: DataReport, options: CheckOptions) -> tuple[list[str], list[str]]:
    """Problems, which would stop the run, and remarks, of the data."""
    problems = []
    bad = _bad(data.train.problems)
    if bad and options.data.on_bad_image == "stop":
        problems.append(
            f"{_images(bad)} of train cannot be read: repair or remove them, or set "
            f"data.on_bad_image substitute"
        )
    elif too_many(bad, data.train.images):
        problems.append(
            f"{bad} of {data.train.images} images of train cannot be read, more than one in a hundred: "
            f"repair or remove them"
        )
    of_val = []
    if data.val and (bad := _bad(data.val.problems)):
        of_val.append(f"{_images(bad)} of val cannot be read: repair or remove them")
    if missing := data.classes.only_in_val.count:
        of_val.append(f"{missing} {'class' if missing == 1 else 'classes'} of val not in train")
    if options.monitor.knn_every_epochs:  # the monitor stops at them
        return problems + of_val, _leaked(data)
    return problems, of_val + _leaked(data)


def _bad(problems: dict[str, Any]) -> int:
    return sum(listing.count for listing in problems.values())


def _images(count: int) -> str:
    return "1 image" if count == 1 else f"{count} images"


def _leaked(data: DataReport) -> list[str]:
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
            f"run_dir {options.run_dir!r}: checkpoints need {size(run['disk_bytes'])}, "
            f"{size(run['disk_free_bytes'])} are free: use another disk or a larger log.keep_every_epochs"
        )
    if run["memory_bytes"] > run["memory_free_bytes"]:
        problems.append(
            f"loading needs {size(run['memory_bytes'])} of memory, {size(run['memory_free_bytes'])} are "
            f"free: give fewer machine.num_workers"
        )
    if step["memory_gib"] is not None and step["batch_size"] < run["batch_size_per_gpu"]:
        problems.append(
            f"{run['batch_size_per_gpu']} images at once do not fit into the GPU's memory: give "
            f"machine.batch_size_per_gpu {step['batch_size']}"
        )
    return problems


def summary(options: CheckOptions, report: dict[str, Any], device: str) -> list[str]:
    """The report's numbers, as lines of text."""
    run, step, loader = report["run"], report["step"], report["loader"]
    networks = run["networks_images_per_second"]
    flops, parameters = report["flops_per_image"], report["parameters"]
    memory = ""
    if step["memory_gib"] is not None:
        memory = f", {step['memory_gib']:.1f} of {step['gpu_memory_gib']:.0f} GiB of GPU memory"
    seconds = step["batch_size"] / step["images_per_second"]
    per_step = f"{run['processes']} x {run['batch_size_per_gpu']}"
    if run["accumulation"] > 1:
        per_step += f" x {run['accumulation']} micro-batches"
    limits = {
        "network": "the networks: the loader could feed {:.1f} times as many images",
        "loader": "loading images: the networks could take {:.1f} times as many; more cores shorten the run",
    }
    faster = max(networks, loader["images_per_second"]) / run["images_per_second"]
    free = run["shared_memory_free_bytes"]
    shared = f" of {size(free)} free in /dev/shm" if free is not None else ""
    expected = math.log(options.head.num_prototypes)
    encoder = f"{parameters['encoder'] / 1e6:.1f} M parameters, {flops['encoder'] / 1e9:.3g} GFLOPs a crop"
    return [
        "",
        f"encoder   {encoder} of {options.views.global_size} pixels",
        f"read-out  {parameters['readout'] / 1e6:.2f} M and {flops['readout'] / 1e9:.2g} GFLOPs of these",
        f"head      {parameters['head'] / 1e6:.1f} M parameters",
        f"training  {flops['training'] / 1e9:.3g} GFLOPs an image (a multiply-add is two)",
        f"loss      {step['loss']:.2f} at the start, ln K is {expected:.2f}",
        f"loader    {loader['images_per_second']:,.0f} images/s with {loader['workers']} workers (measured)",
        f"step      {step['images_per_second']:,.1f} images/s on one {device}, {step['precision']}: "
        f"{seconds:.3f} s for {step['batch_size']} images at once{memory} (measured)",
        f"batch     {options.optim.global_batch_size} images: {per_step}",
        f"run       {run['images']:,} images, {run['steps_per_epoch']:,} steps an epoch, "
        f"{run['steps']:,} in all",
        f"speed     {run['images_per_second']:,.1f} images/s: the smaller of loader and networks "
        f"({networks:,.1f})",
        f"time      {duration(run['hours'])} for {options.optim.epochs} epochs, without k-NN and "
        f"what GPUs say to each other",
        f"disk      {size(report['checkpoint_bytes'])} a checkpoint, {size(run['disk_bytes'])} at most, "
        f"{size(run['disk_free_bytes'])} free",
        f"memory    {size(run['memory_bytes'])} of {size(run['memory_free_bytes'])} free: "
        f"{run['processes']} x {size(run['process_bytes'])}, {loader['workers']} workers of "
        f"{size(loader['worker_bytes'])}, "
        f"{size(run['prefetched_bytes'])} of prefetched views{shared}",
        f"limit     {limits[run['limited_by']].format(faster)}",
    ]


def verdict(report: dict[str, Any]) -> list[str]:
    """Remarks and problems, as lines of text."""
    remarks = [f"REMARK: {remark}" for remark in report["remarks"]]
    problems = [f"PROBLEM: {problem}" for problem in report["problems"]]
    return ["", *remarks, *(problems or ["nothing is in the way"])]


def size(num_bytes: float) -> str:
    """In MiB or GiB, as fits."""
    return f"{num_bytes / GIB:.1f} GiB" if num_bytes >= GIB else f"{num_bytes / 2**20:.1f} MiB"


def duration(hours: float) -> str:
    if hours < 1:
        return f"{60 * hours:.1f} minutes"
    return f"{hours:,.1f} hours" if hours < 48 else f"{hours:,.0f} hours ({hours / 24:.1f} days)"

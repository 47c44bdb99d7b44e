"""`dino-sparo check` and `--dry-run`: plan and problems of a run; optionally measurements and a scan."""

import json
import math
import os
import sys
import warnings
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from dino_sparo.check.counting import GPUS, check_gpus, find_gpu
from dino_sparo.check.estimate import (
    GpuRun,
    describe_assumptions,
    describe_runs,
    estimate,
    executor_on_gpu,
    memory_problems,
)
from dino_sparo.check.measure import measure_loading, measure_steps
from dino_sparo.check.plan import Plan, duration, make_plan, plan_text, size
from dino_sparo.data.loader import Batch, BatchOrder, crop_batches
from dino_sparo.data.scan import MARKS, DataReport, ScanResult, data_report, describe, scan_images
from dino_sparo.data.sources import ImageSource, decide, notes_on, open_val
from dino_sparo.data.splits import Choice
from dino_sparo.data.views import crop_kinds
from dino_sparo.errors import EXIT_PROBLEM, UserError
from dino_sparo.parallel.processes import cores, memory_free, private_bytes
from dino_sparo.recipe.sections import Recipe, smaller_batch
from dino_sparo.terminal import counted, log, sentence, table
from dino_sparo.training.setup import advice, dataset_of, unfrozen_step
from dino_sparo.training.state import build_state
from dino_sparo.training.stopping import too_many

LOADING_SECONDS = 10.0
LOADING_BATCH = 8  # images; the speed hardly depends on it, and small batches arrive sooner
STEPS = 3
LEVELS_REMEDY = (
    "; if their pixels have more than 8 bits, set data.value_range to the values LOW HIGH that become black "
    "and white"
)
CPU_BATCH = 4  # images in a timed step on a CPU, whose speed hardly depends on it


def check(
    recipe: Recipe,
    run_dir: Path,
    *,
    num_processes: int = 1,
    recipe_name: str | None = None,
    measure: bool = False,
    scan: bool = False,
    as_json: bool = False,
    gpus: Sequence[str] = (),
) -> int:
    """Print the plan of a run; returns exit status 0 if there are no problems, else 1.

    Args:
        recipe_name: for the output.
        measure: time the loader and some steps.
        scan: read every image file.
        as_json: print JSON to standard output, and the text to standard error.
        gpus: kinds of GPUs to estimate the run for. Empty: the kind of this machine's GPU, if it is known.

    Raises:
        UserError: a mistake in recipe or data, as at the start of the run.
    """
    say = (lambda text: print(text, file=sys.stderr)) if as_json else print
    check_gpus(gpus)
    plan = make_plan(recipe, run_dir, num_processes)
    here = torch.cuda.get_device_name(plan.device) if plan.device.type == "cuda" else ""
    memory = {} if gpus else memory_of_kind(plan.device)
    gpus = gpus or list(memory)
    say(plan_text(plan, recipe_name, with_time=not gpus))
    report = plan.as_dict()
    problems, remarks = report["problems"], report["remarks"]
    test = plan.monitor.test if plan.monitor and not recipe.monitor.knn_path else None
    doubts = notes_on(plan.source, test, decide(recipe.data.path, Choice.of(recipe.data)))
    remarks += remarks_on(plan, gpus)
    if scan:
        data, bad_of_knn = scan_data(plan)
        report["data"] = asdict(data)
        of_knn, stops = sum(map(len, plan.monitor or ())), recipe.data.on_bad_image == "stop"
        look_at_data(data, problems, doubts, stops=stops, with_val=plan.monitor is not None)
        if (stops and recipe.monitor.knn_path and bad_of_knn) or (not stops and too_many(bad_of_knn, of_knn)):
            problems.append(
                f"images for k-NN during training that cannot be read: {bad_of_knn} of {of_knn}"
                f"{'' if stops else ', more than 1 %'}; repair or remove them"
            )
        say("\n" + "\n".join(map(sentence, describe(data))))
    else:
        remarks.append("image files were not read; --scan reads them")
    if not measure:
        remarks.append("speed and memory were not measured; --measure measures them")
    elif problems:
        remarks.append("speed and memory were not measured, because the run has problems")
    else:
        try:
            report |= measured(plan)
            report["run"] |= projection(plan, report)
            problems += machine_problems(plan, report)
            say("\n" + summary(plan, report))
        except UserError as error:
            problems.append(str(error))
    if gpus:
        runs = gpu_runs(plan, report, gpus, here)
        report["gpus"] = [asdict(run) for run in runs]
        problems += memory_problems(runs, recipe, num_processes, memory)
        say("\n" + describe_runs(recipe_name or "recipe", runs, num_processes))
        say(describe_assumptions(runs[0]))
    remarks += doubts
    lines = [f"REMARK: {sentence(remark)}" for remark in remarks]
    lines += [f"PROBLEM: {sentence(problem)}" for problem in problems]
    if not problems:
        found = "nothing would end the run; see the remarks" if doubts else "no problems found"
        lines.append(found + (f"; {counted(len(remarks), 'remark')}" if remarks and not doubts else ""))
    say("\n" + "\n".join(lines))
    if as_json:
        print(json.dumps(report, indent=1))
    return EXIT_PROBLEM if problems else 0


def remarks_on(plan: Plan, gpus: Sequence[str]) -> list[str]:
    """What the user may want to change; `gpus` are the kinds of GPUs to estimate the run for."""
    recipe, remarks = plan.recipe, []
    if plan.monitor is None:
        remarks.append("no k-NN during training; set monitor.knn_path to a labeled folder")
    remarks += advice(
        *(recipe.optim, recipe.head.num_prototypes, len(plan.source)),
        max_images=recipe.data.max_images,
        knn_images=plan.monitor,
    )
    if plan.num_processes > 1 and plan.device.type == "cpu" and not gpus:
        remarks.append(
            "the time is that of this machine's CPU; for GPUs that are not here: dino-sparo check --gpu h100 "
            "a100 ..."
        )
    return remarks


def scan_data(plan: Plan) -> tuple[DataReport, int]:
    """Scan the files of train, of val if there is one, and of a separate k-NN gallery.

    Also returns the number of unreadable images among those of k-NN.
    """

    def scanned(name: str, source: ImageSource) -> ScanResult:
        return scan_images(
            source,
            num_workers=max(1, plan.num_workers) * plan.num_processes,
            description=f"scanning {name}",
            timeout_seconds=plan.recipe.machine.data_timeout_seconds,
        )

    data, gallery, val = plan.recipe.data, None, None
    if plan.monitor and plan.recipe.monitor.knn_path:
        gallery, val = plan.monitor
    else:
        val = open_val(data.path, Choice.of(data), plan.source)
    train_scan, val_scan = scanned("train", plan.source), None if val is None else scanned("val", val)
    gallery_scan = None if gallery is None else scanned("the images that k-NN takes", gallery)
    bad = {
        scan.source.name(number)
        for scan in (train_scan, val_scan, gallery_scan)
        if scan and scan.report.unreadable
        for number in (~scan.readable).nonzero()[0].tolist()
    }
    knn = plan.monitor or () if bad else ()
    bad_of_knn = sum(images.name(number) in bad for images in knn for number in range(len(images)))
    return data_report(train_scan, val_scan, gallery), bad_of_knn


def look_at_data(
    data: DataReport, problems: list[str], doubts: list[str], *, stops: bool, with_val: bool
) -> None:
    """Add what would stop the run to `problems`, and other findings about the data to `doubts`.

    Args:
        stops: whether an image that cannot be read stops the run.
        with_val: whether the run reads val, for k-NN.
    """
    bad, images = data.train.unreadable, data.train.images
    of_train = f"images of train that cannot be read: {bad} of {images}; repair or remove them"
    if (bad and stops) or too_many(bad, images):
        problems.append(f"{of_train}, or, if they are at most 1 %, set data.on_bad_image to substitute")
    elif bad:
        doubts.append(of_train)
    scans = {"train": data.train} | ({"val": data.val} if data.val else {})
    doubts += [
        f"images of {split} that are {MARKS[mark]}: {files.count} of {scan.images}"
        f"{LEVELS_REMEDY * (mark == 'flat')}"
        for split, scan in scans.items()
        for mark, files in scan.marks.items()
        if files.count
    ]
    of_val = problems if stops and with_val else doubts
    if data.val and data.val.unreadable:
        of_val.append(f"images of val that cannot be read: {data.val.unreadable}; repair or remove them")
    if data.classes.only_in_val.count:
        of_val.append(f"classes of val that are not in train: {data.classes.only_in_val.count}")
    if data.val and data.val_in_train and (leaked := data.val_in_train.images):
        doubts.append(
            f"{leaked} of {data.val.images} images of val are in train too: accuracies of k-NN and linear "
            f"probe may be up to {100 * leaked / data.val.images:.2f} percentage points too high"
        )


def measured(plan: Plan) -> dict[str, Any]:
    """Measure the speed of all workers of this machine together, and of steps on one device."""
    log.info("measuring the loader for %.0f seconds, and %d steps ...", LOADING_SECONDS, STEPS)
    recipe, machine = plan.recipe, plan.recipe.machine
    data = replace(recipe.data, on_bad_image="substitute")  # reporting bad images is left to the scan
    order = BatchOrder(
        num_samples=len(plan.source),
        global_batch_size=min(LOADING_BATCH, len(plan.source)),
        epochs=10**6,
        seed=recipe.seed,
    )
    warnings.filterwarnings("ignore", message="This DataLoader will create")  # more workers than cores
    batches = crop_batches(
        dataset_of(data, recipe.views, recipe.seed, plan.source, plan.executor),
        order,
        num_workers=plan.num_workers * plan.num_processes,
        prefetch_batches=machine.prefetch_batches,
        pin_memory=False,
        timeout_seconds=machine.data_timeout_seconds,
    )
    loader, batch = measure_loading(batches, seconds=LOADING_SECONDS)
    step = steps_of(plan, batch)
    return {"loader": loader | {"views": plan.executor}, "step": step | {"precision": plan.precision}}


def steps_of(plan: Plan, batch: Batch) -> dict[str, Any]:
    """Measure the speed of training steps, with as many images as fit into memory."""
    recipe, device = plan.recipe, plan.device
    state = build_state(**recipe.state_arguments(plan.precision), device=device)
    state.student.load_state_dict(plan.state.student.state_dict())
    state.teacher.load_state_dict(plan.state.teacher.state_dict())
    tried = plan.batch_size if device.type == "cuda" else min(plan.batch_size, CPU_BATCH)
    while True:
        try:
            return measure_steps(
                state,
                batch,
                crop_kinds(**asdict(recipe.views)),
                tried,
                unfrozen_step(recipe.optim, recipe.loss),
                steps=STEPS,
                clip_norm=recipe.optim.clip_norm,
                precision=plan.precision,
                device=device,
            )
        except torch.OutOfMemoryError:
            if tried == 1:
                raise UserError(
                    "out of GPU memory with one image per step; use a smaller model or another GPU"
                ) from None
            log.info("%d images per GPU do not fit into its memory; trying fewer", tried)
            tried = smaller_batch(recipe.optim.global_batch_size // plan.num_processes, tried)


def memory_of_kind(device: torch.device) -> dict[str, int]:
    """The kind of this machine's GPU, and its real memory in bytes, as a kind may have several sizes; empty
    if it is unknown."""
    kind = find_gpu(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    return {kind: torch.cuda.get_device_properties(device).total_memory} if kind else {}


def gpu_runs(plan: Plan, report: dict[str, Any], kinds: Sequence[str], here: str) -> list[GpuRun]:
    """Estimates of the run on each kind of GPU; if steps were measured, also on the GPU named `here`."""
    step, loader, decode_ms = report.get("step"), report.get("loader"), None
    if loader and plan.executor == executor_on_gpu(plan.recipe):
        busy = min(max(1, loader["workers"]), cores())
        decode_ms = 1000 * busy / loader["images_per_second"]
    images = plan.steps_left * plan.recipe.optim.global_batch_size
    given: dict[str, Any] = {
        "num_processes": plan.num_processes,
        "num_images": images,
        "decode_ms": decode_ms,
    }
    runs = estimate(plan.recipe, plan.state, kinds, **given)
    if not step or step["memory_gib"] is None:
        return runs
    speed = step["images_per_second"]
    measured = replace(
        runs[0],
        gpu=here,
        measured=True,
        precision=step["precision"],
        batch_size=step["batch_size"],
        host_ms=None,
        step_ms=1000 * step["batch_size"] * plan.accumulation / speed,
        images_per_second=speed,
        hours=images / (speed * plan.num_processes) / 3600,
        memory_bytes=int(step["memory_gib"] * 2**30),
        cores=speed * plan.num_processes * runs[0].decode_ms / 1000,
    )
    return [*runs, measured]


def estimate_only(
    recipe: Recipe,
    gpus: Sequence[str],
    num_images: int,
    *,
    num_processes: int = 1,
    recipe_name: str | None = None,
    as_json: bool = False,
) -> int:
    """Print estimates of a run on `num_images` images; like `check`, but without images.

    Raises:
        UserError: a mistake in the recipe, an unknown kind of GPU, or none given and none here.
    """
    check_gpus(gpus)
    memory = {} if gpus or not torch.cuda.is_available() else memory_of_kind(torch.device("cuda"))
    if not gpus and not memory:
        raise UserError(
            f"gpu is not given, and this machine has no GPU of a known kind; give one or more of "
            f"{', '.join(GPUS)}, for example --gpu h100"
        )
    gpus = gpus or list(memory)
    batch_size = recipe.optim.global_batch_size
    num_images = min(num_images, recipe.data.max_images or num_images)
    if num_images < batch_size:
        raise UserError(
            f"num_images is {num_images}, fewer than optim.global_batch_size {batch_size}; give more"
        )
    state = build_state(**recipe.state_arguments(), device=torch.device("cpu"))
    images = num_images // batch_size * batch_size * recipe.optim.epochs
    runs = estimate(recipe, state, gpus, num_processes=num_processes, num_images=images)
    problems = memory_problems(runs, recipe, num_processes, memory)
    if as_json:
        print(json.dumps({"gpus": [asdict(run) for run in runs], "problems": problems}, indent=1))
    else:
        lines = [describe_runs(recipe_name or "recipe", runs, num_processes), describe_assumptions(runs[0])]
        print("\n".join([*lines, *(f"PROBLEM: {problem}" for problem in problems)]))
    return EXIT_PROBLEM if problems else 0


def projection(plan: Plan, report: dict[str, Any]) -> dict[str, Any]:
    """Speed, time, and memory of the whole run from the measurements, without k-NN."""
    devices = plan.num_processes if plan.device.type == "cuda" else 1  # processes on a CPU share its cores
    networks = report["step"]["images_per_second"] * devices
    loader = report["loader"]["images_per_second"]
    # Without workers a process alternates between loading and computing.
    speed = min(networks, loader) if plan.num_workers else 1 / (1 / networks + 1 / loader)
    process = private_bytes(os.getpid())
    workers = plan.num_workers * report["loader"]["worker_bytes"]
    return {
        "networks_images_per_second": networks,
        "images_per_second": speed,
        "limited_by": "network" if networks <= loader else "loader",
        "hours": plan.steps_left * plan.recipe.optim.global_batch_size / speed / 3600,
        "process_bytes": process,
        "memory_bytes": plan.num_processes * (process + workers) + plan.prefetched_bytes,
        "memory_free_bytes": memory_free(),
    }


def machine_problems(plan: Plan, report: dict[str, Any]) -> list[str]:
    """Problems of the machine that the measurements show."""
    run, step, problems = report["run"], report["step"], []
    if run["memory_bytes"] > run["memory_free_bytes"]:
        problems.append(
            f"loading needs {size(run['memory_bytes'])} of memory, but only {size(run['memory_free_bytes'])} "
            f"are free; use fewer machine.num_workers"
        )
    if step["memory_gib"] is not None and step["batch_size"] < plan.batch_size:
        problems.append(
            f"{plan.batch_size} images per GPU do not fit into its memory; set machine.batch_size_per_gpu to "
            f"{step['batch_size']}"
        )
    return problems


def summary(plan: Plan, report: dict[str, Any]) -> str:
    """The measurements as a table."""
    run, step, loader = report["run"], report["step"], report["loader"]
    networks, speed = run["networks_images_per_second"], run["images_per_second"]
    epochs = plan.recipe.optim.epochs * plan.steps_left / plan.total_steps
    workers, on_gpu, in_shared = counted(loader["workers"], "worker"), "", ""
    if step["memory_gib"] is not None:
        on_gpu = f", {step['memory_gib']:.1f} of {step['gpu_memory_gib']:.0f} GiB of GPU memory"
    if run["shared_memory_free_bytes"] is not None:
        in_shared = f" of {size(run['shared_memory_free_bytes'])} free in /dev/shm"
    rows = {
        "loader": f"{loader['images_per_second']:,.0f} images/s with {workers}",
        "step": f"{step['images_per_second']:,.1f} images/s on one {plan.device.type}, {step['precision']}: "
        f"{step['batch_size'] / step['images_per_second']:.3f} s for {counted(step['batch_size'], 'image')}"
        f"{on_gpu}",
        "loss": f"{step['loss']:.2f} at the start, ln K is {math.log(plan.recipe.head.num_prototypes):.2f}",
        "speed": f"{speed:,.1f} images/s, limited by the {run['limited_by']}: all networks together process "
        f"{networks:,.1f}, the loader provides {loader['images_per_second']:,.1f}",
        "time": f"{duration(run['hours'])} for {counted(epochs, 'epoch')}, without k-NN "
        f"and communication between GPUs",
        "memory": f"{size(run['memory_bytes'])} of {size(run['memory_free_bytes'])} free: "
        f"{plan.num_processes} x {size(run['process_bytes'])}, {workers} of "
        f"{size(loader['worker_bytes'])}, {size(run['prefetched_bytes'])} of prefetched views{in_shared}",
    }
    return f"measured:\n{table(rows, 12, indent='')}"

"""`dino-sparo bench`: where the time of training by a recipe goes on this machine, and against plain code.

Axis letters: B images, C crops.
"""

import json
import logging
import os
import platform
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dino_sparo.bench.clocks import interleaved, spread, spread_of_ratios
from dino_sparo.bench.contenders import (
    VIEWED_IMAGES,
    Bench,
    batch_of_crops,
    batch_of_photos,
    batches_of_plain,
    our_batches,
    our_step,
    plain_step_of,
    saved_by_ours,
    saved_by_plain,
    with_peak_memory,
)
from dino_sparo.bench.files import HEIGHT, QUALITY, WIDTH, jpeg_files
from dino_sparo.bench.plain import PlainState, plain_state
from dino_sparo.bench.report import report
from dino_sparo.bench.stages import (
    end_to_end,
    host_waits,
    image_stages,
    published_peak,
    step_in_stages,
    warm_up,
)
from dino_sparo.check.measure import count_flops, measured_peak
from dino_sparo.data.loader import crops_of
from dino_sparo.data.sources import ImageSource, open_images
from dino_sparo.data.workers import default_workers
from dino_sparo.errors import UserError
from dino_sparo.options import BenchOptions
from dino_sparo.parallel.device import choose_device
from dino_sparo.parallel.precision import choose_precision, plain_attention, set_numerics
from dino_sparo.recipe.files import named_recipe
from dino_sparo.recipe.sections import Recipe
from dino_sparo.training.state import TrainState

log = logging.getLogger("dino_sparo")

PROFILED_STEPS = 3


def bench_training(options: BenchOptions) -> None:
    """`dino-sparo bench --what training`: print a table, or with `json` one JSON object and the table beside.

    Raises:
        UserError: for a mistake in options or data.
    """
    if min(options.batch_size, options.rounds, options.num_images) < 1:
        raise UserError(
            "batch_size, rounds and num_images must be at least 1; leave them out for the defaults"
        )
    if options.profile is not None and not Path(options.profile).absolute().parent.is_dir():
        raise UserError(f"profile {options.profile!r} is in no existing folder; give a file in one")
    if options.keep_files and options.data is None:
        raise UserError("keep_files needs images of yours; give --data.path DIR, or leave keep_files out")
    recipe = read_recipe(options)
    with tempfile.TemporaryDirectory(prefix="dino_sparo_") as folder:
        bench = prepare_bench(options, recipe, image_files(options, Path(folder)))
        result = measure(bench, compare=options.compare, profile=options.profile)
    result = {"recipe": options.config, "data": _describe_data(options, len(bench.source)), **result}
    print(report(result), file=sys.stderr if options.json else sys.stdout)
    if options.json:
        print(json.dumps(result))


def read_recipe(options: BenchOptions) -> Recipe:
    """The recipe, with what the benchmark's options say of the machine."""
    given = {"device": options.device, "precision": options.precision, "num_workers": options.num_workers}
    over = {f"machine.{key}": value for key, value in given.items() if value not in (None, "auto")}
    return named_recipe(options.config, {"data.path": "x"} | over)


def image_files(options: BenchOptions, folder: Path) -> ImageSource:
    """At least a batch of images: in new files in the folder, or as they are."""
    num_images = max(options.num_images, options.batch_size)
    path = options.data.path if options.data else None
    if path is None or not options.keep_files:
        log.info("writing %d JPEG files", num_images)
        return jpeg_files(path, num_images, folder)
    source = open_images(path, num_images)
    if len(source) < options.batch_size:
        raise UserError(
            f"data.path {path!r} gives {len(source)} images, fewer than batch_size {options.batch_size}; "
            f"use more images or a smaller batch"
        )
    return source


def prepare_bench(options: BenchOptions, recipe: Recipe, source: ImageSource) -> Bench:
    """What is measured, on the device and in the numbers that the recipe asks for."""
    machine = recipe.machine
    device = choose_device(machine.device)
    set_numerics(tf32=machine.tf32, deterministic=machine.deterministic)
    return Bench(
        options=recipe,
        source=source,
        device=device,
        precision=choose_precision(machine.precision, device),
        batch_size=options.batch_size,
        num_workers=default_workers() if machine.num_workers is None else machine.num_workers,
        rounds=options.rounds,
        seconds=options.seconds,
    )


def measure(bench: Bench, *, compare: bool, profile: str | None) -> dict[str, Any]:
    """Everything about training on this machine, by the names of the JSON object."""
    device, batch_size = bench.device, bench.batch_size
    log.info("views of %d images, one core", max(bench.rounds, VIEWED_IMAGES))
    of_images = image_stages(
        bench.source, bench.crop_recipes, bench.options.seed, max(bench.rounds, VIEWED_IMAGES)
    )
    log.info("views of a batch on the device")
    photos = batch_of_photos(bench)
    make = partial(crops_of, photos, bench.crop_recipes, device)
    views = interleaved({"views": make}, bench.rounds, device)["views"]
    groups = batch_of_crops(bench)
    counted = bench.new_state(torch.device("cpu")).student
    counted.encoder.backbone.activation_checkpointing = False  # it would count twice
    flops = count_flops(counted, bench.sizes)["training"]

    log.info("steps")
    ours, our_memory = with_peak_memory(bench, groups, bench.new_state, our_step)
    contenders: dict[str, Callable[[], object]] = {"ours": partial(our_step, bench, ours, groups)}
    memory = {"ours": our_memory | {"saved_bytes": saved_by_ours(bench, ours, groups)}}
    plain = None
    if compare:
        plain, plain_memory = with_peak_memory(
            bench, groups, lambda device: plain_state(bench.new_state(device)), plain_step_of
        )
        contenders["plain"] = partial(plain_step_of, bench, plain, groups)
        memory["plain"] = plain_memory | {"saved_bytes": saved_by_plain(bench, plain, groups)}
    steps = interleaved(contenders, bench.rounds, device)
    pieces: dict[str, list[float]] = {}
    for number in range(bench.rounds + 1):
        with plain_attention(bench.precision, bench.device):
            stages = step_in_stages(ours, groups, **bench.step_arguments)
        for name, seconds in stages.items():
            pieces.setdefault(name, []).extend([seconds] if number else [])  # the first one warms up

    result: dict[str, Any] = _describe_machine(bench)
    result["stages"] = {name: spread(seconds, 1) for name, seconds in of_images.items()}
    result["stages"]["views on the device"] = spread(views, batch_size)
    result["stages"] |= {name: spread(seconds, batch_size) for name, seconds in pieces.items()}
    result["stages"]["whole step"] = spread(steps["ours"], batch_size)
    result["end_to_end"] = result["compare"] = result["profile"] = None
    if bench.seconds is not None:
        log.info("end to end")
        result["end_to_end"] = train_end_to_end(
            bench, bench.seconds, our_batches(bench), partial(our_step, bench, ours)
        )
    result["flops_per_image"] = flops
    result["peak_flops"] = {
        "published": published_peak(device, bench.precision),
        "measured": measured_peak(device, bench.precision),
    }
    result["utilisation"] = _utilisation(result)
    result["memory"] = memory
    if plain is not None:
        result["compare"] = _compared(bench, plain, steps, memory, result["end_to_end"])
    if profile is not None:
        log.info("profile")
        waits = profile_training(bench, ours, profile)
        result["profile"] = {"trace": profile, "steps": PROFILED_STEPS, "host_waits_a_step": waits}
    return result


def train_end_to_end(
    bench: Bench, seconds: float, batches: Iterator[list[Tensor]], step: Callable[[list[Tensor]], object]
) -> dict[str, float]:
    """Real batches into real steps; the workers end with it."""
    with closing(batches):  # type: ignore[type-var]  # both are generators
        warm_up(batches, step, prefetched=bench.prefetched, device=bench.device)
        return end_to_end(batches, step, batch_size=bench.batch_size, seconds=seconds, device=bench.device)


def profile_training(bench: Bench, state: TrainState, trace: str) -> dict[str, float]:
    """Trace steps with the loading of their images; how often a step lets the host wait, by the call."""
    batches, step = our_batches(bench), partial(our_step, bench, state)
    with closing(batches):  # type: ignore[type-var]  # it is a generator
        warm_up(batches, step, prefetched=bench.prefetched, device=bench.device)
        return host_waits(lambda: step(next(batches)), steps=PROFILED_STEPS, device=bench.device, trace=trace)


def _compared(
    bench: Bench,
    plain: PlainState,
    steps: dict[str, list[float]],
    memory: dict[str, dict[str, Any]],
    ours_end_to_end: dict[str, float] | None,
) -> dict[str, Any]:
    """Ratios plain / ours, above 1 where ours is better."""
    compared: dict[str, Any] = {
        "plain_step": spread(steps["plain"], bench.batch_size),
        "step": spread_of_ratios(steps["plain"], steps["ours"]),
        "memory": {
            name: plain_bytes / memory["ours"][name]
            for name, plain_bytes in memory["plain"].items()
            if plain_bytes is not None
        },
        "plain_end_to_end": None,
        "end_to_end": None,
    }
    if bench.seconds is not None and ours_end_to_end is not None:
        log.info("end to end, plain")
        theirs = train_end_to_end(
            bench, bench.seconds, batches_of_plain(bench), partial(plain_step_of, bench, plain)
        )
        compared["plain_end_to_end"] = theirs
        compared["end_to_end"] = ours_end_to_end["images_per_second"] / theirs["images_per_second"]
    return compared


def _utilisation(result: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Share of each known peak that the networks' products take, in the step alone and end to end."""
    speeds = {"step": result["stages"]["whole step"]["images_per_second"]}
    if result["end_to_end"] is not None:
        speeds["end_to_end"] = result["end_to_end"]["images_per_second"]
    peaks = {name: peak for name, peak in result["peak_flops"].items() if peak is not None}
    return {
        what: {name: speed * result["flops_per_image"] / peak for name, peak in peaks.items()}
        for what, speed in speeds.items()
    }


def _describe_machine(bench: Bench) -> dict[str, Any]:
    """What was measured on, and how."""
    on_gpu = bench.device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(bench.device) if on_gpu else _processor(),
        "device_type": bench.device.type,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "precision": bench.precision,
        "batch_size": bench.batch_size,
        "num_workers": bench.num_workers,
        "rounds": bench.rounds,
        "seconds": bench.seconds,
    }


def _describe_data(options: BenchOptions, num_images: int) -> str:
    what = "generated pictures" if options.data is None else options.data.path
    if options.keep_files:
        return f"{num_images} images of {what} as they are"
    return f"{num_images} images, {what} as JPEG of {WIDTH}x{HEIGHT} pixels, quality {QUALITY}"


def _processor() -> str:
    """The CPU's name, where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()

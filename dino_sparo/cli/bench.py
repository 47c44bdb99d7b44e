"""`dino-sparo bench`: options, and what is measured of them."""

import json
import os
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from dino_sparo.cli.images import ImagesOptions
from dino_sparo.recipe.files import named_recipe
from dino_sparo.recipe.sections import Recipe
from dino_sparo.recipe.typed import Batch, Workers
from dino_sparo.terminal import log

if TYPE_CHECKING:
    from dino_sparo.bench.training import Bench
    from dino_sparo.data.sources import ImageSource

STEPS_PER_EPOCH = 100  # of the schedules; the middle of the run is measured, where nothing is frozen


@dataclass
class BenchOptions:
    """Where the time of training by a recipe goes, and against plain code; or time and memory of the SPARO
    read-out against its direct form and the block it replaces."""

    what: Literal["training", "readout"] = "training"
    """What to measure. `training` uses the options from config to device; `readout` uses batch_size, rounds,
    device, and num_tokens."""
    config: str = "photos_sparo"
    """YAML recipe whose training is measured, a file or the name of a shipped one."""
    data: ImagesOptions | None = None
    """Images to train on, first written to a temporary folder as JPEG of 500 x 375 pixels, a usual size of
    ImageNet, because small files take less time to decode; null: generated pictures."""
    num_images: int = 256
    """Number of images to read; at least batch_size."""
    batch_size: Batch = 16
    """Images per step or forward pass."""
    rounds: int = 15
    """Number of interleaved rounds, whose medians are reported."""
    seconds: float | None = 10.0
    """Seconds of whole training, from files to step, to measure; null: none."""
    compare: bool = False
    """Also measure a plain PyTorch implementation in every round, and print the ratios."""
    json: bool = False
    """Print one JSON object; the table goes to standard error."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """As machine.precision; auto: that of the recipe."""
    num_workers: Workers | None = None
    """As machine.num_workers; null: that of the recipe."""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """As machine.device; auto: that of the recipe for `training`, else CUDA if there is a GPU."""
    num_tokens: int = 197
    """Tokens per image."""


def bench(options: BenchOptions) -> None:
    """Print what was measured as a table; of training with `json` one JSON object, and the table beside.

    Raises:
        UserError: for a mistake in options or data.
    """
    if options.what == "training":
        bench_training(options)
        return
    from dino_sparo.bench.readout import bench_readout
    from dino_sparo.parallel.device import choose_device

    bench_readout(
        batch_size=options.batch_size,
        num_tokens=options.num_tokens,
        rounds=options.rounds,
        device=choose_device(options.device),
    )


def bench_training(options: BenchOptions) -> None:
    """Measure training by the recipe on its images, and print."""
    from dino_sparo.bench.loading import HEIGHT, QUALITY, WIDTH, jpeg_files
    from dino_sparo.bench.training import measure, report
    from dino_sparo.cli.images import open_chosen
    from dino_sparo.data.sources import evenly

    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # each profile would be told at its start and end
    machine = {"device": options.device, "precision": options.precision, "num_workers": options.num_workers}
    over = {f"machine.{key}": value for key, value in machine.items() if value not in (None, "auto")}
    recipe = named_recipe(options.config, {"data.path": "x"} | over)
    num_images = max(options.num_images, options.batch_size)
    with tempfile.TemporaryDirectory(prefix="dino_sparo_") as folder:
        source = evenly(open_chosen(options.data), num_images) if options.data else None
        what = options.data.path if options.data else "generated pictures"
        log.info("writing %d JPEG files", num_images)
        source = jpeg_files(source, num_images, Path(folder))
        result = measure(
            bench_of(recipe, source, options.batch_size),
            rounds=options.rounds,
            seconds=options.seconds,
            compare=options.compare,
        )
    data = f"{num_images} images, {what} as JPEG of {WIDTH}x{HEIGHT} pixels, quality {QUALITY}"
    result = {"recipe": options.config, "data": data, **result}
    print(report(result), file=sys.stderr if options.json else sys.stdout)
    if options.json:
        print(json.dumps(result))


def bench_of(recipe: Recipe, source: "ImageSource", batch_size: int) -> "Bench":
    """What is measured, on the device and in the numbers that the recipe asks for."""
    from dino_sparo.bench.training import Bench
    from dino_sparo.parallel.device import choose_device
    from dino_sparo.training.setup import build_schedules, dataset_of, use_machine
    from dino_sparo.training.state import build_state

    machine = recipe.machine
    device = choose_device(machine.device)
    num_workers, precision, executor = use_machine(
        machine, device, arch=recipe.encoder_arguments()["arch"], max_side=recipe.data.max_side
    )
    schedules = build_schedules(recipe.optim, recipe.loss, STEPS_PER_EPOCH)
    return Bench(
        new_state=lambda on: build_state(**recipe.state_arguments(precision), device=on),
        dataset=dataset_of(recipe.data, recipe.views, recipe.seed, source, executor),
        hyper=schedules.at(STEPS_PER_EPOCH * recipe.optim.epochs // 2),
        clip_norm=recipe.optim.clip_norm,
        device=device,
        precision=precision,
        batch_size=batch_size,
        num_workers=num_workers,
        prefetch_batches=machine.prefetch_batches,
        timeout_seconds=machine.data_timeout_seconds,
    )

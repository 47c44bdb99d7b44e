"""`dino-sparo pretrain`, `demo`, `check` and `study`: their options, and what they call."""

import shlex
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dino_sparo.errors import UserError
from dino_sparo.recipe.files import named_recipe
from dino_sparo.recipe.readouts import READOUTS
from dino_sparo.recipe.sections import Recipe
from dino_sparo.recipe.typed import Processes, flattened
from dino_sparo.terminal import log

if TYPE_CHECKING:
    from dino_sparo.study.variants import Variant


NUM_KNN_IMAGES = 2000
MIN_EPOCHS = 4  # on a folder of any size; the prototypes are frozen in the first


@dataclass(kw_only=True)
class RunOptions(Recipe):
    """A recipe, and the folder of the run."""

    run_dir: str
    """Folder of the run; an existing run resumes where it stopped."""
    resume_unverified: bool = False
    """Resume from a checkpoint whose .sha256 file is missing, although it may be damaged."""


@dataclass(kw_only=True)
class PretrainOptions(RunOptions):
    """Pretrain an encoder with DINO."""

    nproc: Processes = 1
    """Processes to start on this machine, one per GPU; torchrun starts them too, also on several machines."""


@dataclass(kw_only=True)
class CheckOptions(Recipe):
    """What a run would be, before it starts: data, cost, memory, disk, time, and what would stop it."""

    run_dir: str = "runs/new"
    """Folder of the planned run; it and its disk are checked, and nothing is written."""
    nproc: Processes = 1
    """Processes of the planned run on this machine, one per GPU."""
    gpu: list[str] = field(default_factory=list)
    """GPUs to estimate speed, hours, and memory for, which need not be present: h100, h200, a100, v100, l40s,
    a100-40gb, h100-pcie, h100-nvl, b200; if none are given, the GPU of this machine if it is one of these."""
    num_images: int | None = None
    """Print only the estimate for this number of images, without any images: data.path is not needed; null:
    the whole plan."""
    measure: bool = False
    """Time the loader and some training steps."""
    scan: bool = False
    """Read every file of the dataset and list images that are damaged, duplicate, or in both train and
    val."""
    json: bool = False
    """Print one JSON object; the text goes to standard error."""


@dataclass(kw_only=True)
class StudyOptions(RunOptions):
    """Pretrain variants of a recipe, evaluate all of them alike, and write one page of tables and curves."""

    run_dir: str
    """Folder of the study: a run folder for each run, study.md, study.json, and curves.png."""
    variants: str | None = None
    """Named sets of changes to the recipe: a YAML file of `name: {section.key: value}`, or the name of a
    shipped one (`readouts`: those of the paper's Table 6); null: the recipe alone."""
    only: list[str] = field(default_factory=list)
    """Variants to train now, by name; if none are given, all. The tables include all that are trained."""
    vary: list[str] = field(default_factory=list)
    """Values to train each variant with, section.key=VALUE,VALUE,...; several of these are combined in all
    ways. Runs that differ only in seed share a row of the table."""
    evaluate: bool = True
    """Evaluate the encoders; false: only train, and print a table of sizes and of k-NN during training."""
    control: str = "cls"
    """Row of the table that the others are compared with: the name of a variant and what `vary` adds to it,
    without the seed."""
    train_fractions: list[float] = field(default_factory=lambda: [1.0, 0.1, 0.01])
    """Fractions of the train images that linear probes learn from, the same number of each class, drawn by
    the seed of the run."""
    official_probe: bool = False
    """Train the linear probe of the official protocol, the one that `linear` trains by default (its seed is
    0 in all runs); false: train probes on cached center crops, which takes seconds instead of hours."""
    transfer: list[str] = field(default_factory=list)
    """Further labeled folders, each NAME=DIR, on which the encoders are also evaluated, by k-NN and probes
    that learn from the train images of that folder."""


def pretrain(options: PretrainOptions) -> None:
    """Start a run, or resume it where it stopped; in every process that torchrun started."""
    from dino_sparo.training.pretrain import pretrain

    source = pretrain(options, Path(options.run_dir), resume_unverified=options.resume_unverified)
    run = shlex.quote(options.run_dir)
    if len(source.classes) > 1:  # also of stl10, whose unlabeled images are learned from too
        log.info("the run is in %s; to evaluate it: dino-sparo knn %s", run, run)
    else:
        log.info("the run is in %s; to use its features: dino-sparo embed %s --out features.npz", run, run)
    images = ["--data.path", options.data.path]
    for key in ("train", "val", "label_column"):
        value = getattr(options.data, key)
        images += [] if value is None else [f"--data.{key}", value]
    log.info("to see what it has learned: dino-sparo slots report %s %s", run, shlex.join(images))


def plan(options: PretrainOptions, recipe_name: str | None) -> int:
    """`pretrain --dry-run`."""
    from dino_sparo.check.program import check

    return check(options, Path(options.run_dir), num_processes=options.nproc, recipe_name=recipe_name)


def check(options: CheckOptions, recipe_name: str | None) -> int:
    """Print the plan; estimate, measure and scan if that is asked for."""
    from dino_sparo.check.program import check, estimate_only

    shown: dict[str, Any] = {
        "num_processes": options.nproc,
        "recipe_name": recipe_name,
        "as_json": options.json,
    }
    if options.num_images is not None:
        if options.measure or options.scan:
            raise UserError(
                f"num_images is {options.num_images}, which only estimates; leave it out to use "
                f"{'measure' if options.measure else 'scan'}"
            )
        return estimate_only(options, options.gpu, options.num_images, **shown)
    looks: dict[str, Any] = {"measure": options.measure, "scan": options.scan, "gpus": options.gpu}
    return check(options, Path(options.run_dir), **shown, **looks)


def study(options: StudyOptions) -> int:
    """Train what is not trained yet, evaluate what is, and write the page."""
    from dino_sparo.study.program import study

    return study(
        *(planned(options), Path(options.run_dir)),
        evaluate=options.evaluate,
        **_compared(options),
        official_probe=options.official_probe,
        unverified=options.resume_unverified,
    )


def plan_study(options: StudyOptions, recipe_name: str | None) -> int:
    """`study --dry-run`."""
    from dino_sparo.study.program import check_study, print_plan

    variants = planned(options)
    if options.evaluate:
        check_study(variants, Path(options.run_dir), **_compared(options))
    return print_plan(variants, recipe_name)


def _compared(options: StudyOptions) -> dict[str, Any]:
    """What the encoders are evaluated on and compared with."""
    return {name: getattr(options, name) for name in ("control", "train_fractions", "transfer")}


def planned(options: StudyOptions) -> "list[Variant]":
    """The runs of a study."""
    from dino_sparo.study.variants import plan_runs

    return plan_runs(
        options, Path(options.run_dir), variants=options.variants, vary=options.vary, only=options.only
    )


# --- The demo: the recipe, fitted to a folder of the user's, trained and shown


def demo(options: PretrainOptions) -> None:
    """Train by the recipe, then write `curve.png` and `slots.png` into the run folder and print a table.

    With the user's own folder the number of steps stays the recipe's, so that the demo stays as short.
    """
    from dino_sparo.data.shapes import SHAPES
    from dino_sparo.data.splits import Choice
    from dino_sparo.demo import CONTROL, show_run
    from dino_sparo.training.pretrain import pretrain

    recipe = options if options.data.path == SHAPES else fitted_to_folder(options)
    pretrain(recipe, Path(options.run_dir), resume_unverified=options.resume_unverified)
    show_run(
        Path(options.run_dir),
        recipe.data.path,
        choice=Choice.of(recipe.data),
        max_images=recipe.data.max_images,
        with_slots=READOUTS[recipe.model.readout.name].has_slots,
        control=CONTROL if recipe.data.path == SHAPES and _is_shipped(recipe) else "",
    )


def _is_shipped(recipe: Recipe) -> bool:
    """Whether the experiment is that of the recipe as it is."""
    from dino_sparo.runs.rundir import NOT_EXPERIMENT

    both = (recipe, named_recipe("demo", {}))
    given, shipped = (flattened(each.as_dict(), without=NOT_EXPERIMENT) for each in both)
    return given == shipped


def fitted_to_folder(given: Recipe) -> Recipe:
    """The recipe with other epochs and images, so that training sees as many images as it does of pictures.

    Of a large folder some images are taken, evenly spread, so that each is seen a few times. What the user
    has changed in the recipe stays.
    """
    from dino_sparo.data.shapes import SHAPES_SIZES
    from dino_sparo.data.sources import open_images
    from dino_sparo.data.splits import Choice
    from dino_sparo.evaluation.knn import HEADLINE_K
    from dino_sparo.terminal import counted

    recipe = named_recipe("demo", {})
    optim, monitor, data = replace(given.optim), replace(given.monitor), replace(given.data)
    source = open_images(data.path, data.max_images, choice=Choice.of(data))
    if monitor.knn_images_per_class == recipe.monitor.knn_images_per_class:
        monitor.knn_images_per_class = max(HEADLINE_K, NUM_KNN_IMAGES // max(1, len(source.classes)))
    if optim.epochs == recipe.optim.epochs:
        budget = optim.epochs * SHAPES_SIZES["train"]
        data.max_images = min(len(source), max(1, budget // MIN_EPOCHS))
        optim.epochs = round(budget / data.max_images)
        stretch = optim.epochs / recipe.optim.epochs
        if optim.warmup_epochs == recipe.optim.warmup_epochs:
            optim.warmup_epochs = round(stretch * optim.warmup_epochs)
        if monitor.knn_every_epochs == recipe.monitor.knn_every_epochs:
            monitor.knn_every_epochs = max(1, round(stretch * monitor.knn_every_epochs))
    number, epochs = data.max_images or len(source), counted(optim.epochs, "epoch")
    log.info("%s: %d of its images, %s", data.path, number, epochs)
    return replace(given, optim=optim, monitor=monitor, data=data)

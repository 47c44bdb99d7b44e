"""`dino-sparo pretrain`, `check`, `study` and `sweep`: their options, and what they call."""

import logging
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dino_sparo.recipe.sections import Recipe
from dino_sparo.recipe.typed import Processes

if TYPE_CHECKING:
    from dino_sparo.study.variants import Variant


log = logging.getLogger("dino_sparo")


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
    """Folder that the run would have; it and its disk are looked at, nothing is written."""
    nproc: Processes = 1
    """Processes that the run would have on this machine, one per GPU."""
    gpu: list[str] = field(default_factory=list)
    """Estimate speed, hours, and memory for these GPUs, which need not be here: h100, h200, a100, v100, l40s,
    a100-40gb, h100-pcie, h100-nvl, or b200; without any for the GPU of this machine, if it is one of them."""
    num_images: int | None = None
    """Estimate for so many images alone: nothing is looked at, also not data.path."""
    measure: bool = False
    """Time the loader and some training steps."""
    scan: bool = False
    """Read every file of the data set and list what is damaged, there twice, or in train and val."""
    json: bool = False
    """Print one JSON object; the text goes to standard error."""


@dataclass(kw_only=True)
class StudyOptions(RunOptions):
    """Pretrain variants of a recipe, evaluate all of them alike, and write one page of tables and curves."""

    run_dir: str
    """Folder of the study: a run folder for each variant, study.md, study.json and curves.png."""
    variants: str | None = None
    """Named sets of changes: a YAML file of `name: {section.key: value}`, or a shipped one (`readouts`: those
    of the paper's Table 6); null takes the recipe alone."""
    only: list[str] = field(default_factory=list)
    """Names of the variants to train now; all if none are given. The table has all."""
    vary: list[str] = field(default_factory=list)
    """section.key=VALUE,VALUE,...: each variant with each value, and several such in all combinations. Runs
    that differ in seed alone share a row of the table."""
    evaluate: bool = True
    """Evaluate the encoders; false only trains and fills the table of sizes and of k-NN while training."""
    control: str = "cls"
    """Row of the table that differences are to: the name of a variant, with what `vary` adds but seeds."""
    train_fractions: list[float] = field(default_factory=lambda: [1.0, 0.1, 0.01])
    """Shares of the train images that linear probes learn from, the same number of each class, drawn by the
    seed of the run."""
    transfer: list[str] = field(default_factory=list)
    """Further labeled folders, each NAME=DIR: the encoders are evaluated there too, by neighbors and probes
    that learn from the train images of that folder."""


def pretrain(options: PretrainOptions) -> None:
    """Start a run, or resume it where it stopped; in every process that torchrun started."""
    from dino_sparo.training.pretrain import pretrain

    pretrain(options, Path(options.run_dir), resume_unverified=options.resume_unverified)
    log.info("the run is in %s; how good it is: dino-sparo knn %s", *2 * [shlex.quote(options.run_dir)])


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
        return estimate_only(options, options.gpu, options.num_images, **shown)
    looks: dict[str, Any] = {"measure": options.measure, "scan": options.scan, "gpus": options.gpu}
    return check(options, Path(options.run_dir), **shown, **looks)


def study(options: StudyOptions) -> int:
    """Train what is not trained yet, evaluate what is, and write the page."""
    from dino_sparo.study.program import study, train_only

    variants = planned(options)
    if not options.evaluate:
        return train_only(variants, Path(options.run_dir), unverified=options.resume_unverified)
    return study(
        variants,
        Path(options.run_dir),
        control=options.control,
        train_fractions=options.train_fractions,
        transfer=options.transfer,
        unverified=options.resume_unverified,
    )


def plan_study(options: StudyOptions, recipe_name: str | None) -> int:
    """`study --dry-run`."""
    from dino_sparo.study.program import check_study, print_plan

    variants = planned(options)
    if options.evaluate:
        check_study(
            variants,
            Path(options.run_dir),
            control=options.control,
            train_fractions=options.train_fractions,
            transfer=options.transfer,
        )
    return print_plan(variants, recipe_name)


def sweep(options: StudyOptions) -> int:
    """The former name of `study --evaluate false`."""
    log.warning(
        "WARNING: sweep is now called study --evaluate false; the name sweep will go with the next release"
    )
    options.evaluate = False
    return study(options)


def plan_sweep(options: StudyOptions, recipe_name: str | None) -> int:
    """`sweep --dry-run`."""
    options.evaluate = False
    return plan_study(options, recipe_name)


def planned(options: StudyOptions) -> "list[Variant]":
    """The runs of a study."""
    from dino_sparo.study.variants import plan_runs

    return plan_runs(
        options, Path(options.run_dir), variants=options.variants, vary=options.vary, only=options.only
    )

"""The command `dino-sparo study`."""

import json
from collections.abc import Sequence
from pathlib import Path

from dino_sparo.data.sources import open_labeled
from dino_sparo.data.splits import Choice
from dino_sparo.errors import EXIT_PROBLEM, UserError, errors_for_user
from dino_sparo.evaluation.compare import EvaluatedRun, Group, Measure
from dino_sparo.evaluation.features import hash_of_images
from dino_sparo.evaluation.knn import HEADLINE_K
from dino_sparo.evaluation.results import Result
from dino_sparo.evaluation.transfer import EXPECTED_BOTH, VAL, named_folder
from dino_sparo.files import alone_in, parsed_json, read_as, write_file
from dino_sparo.recipe.files import CONFIG_FILE
from dino_sparo.recipe.typed import flattened
from dino_sparo.runs.checkpoint import latest_step
from dino_sparo.runs.rundir import check_same_experiment
from dino_sparo.study import training
from dino_sparo.study.report import PAGE, write_report
from dino_sparo.study.training import Measured, choose, measure
from dino_sparo.study.variants import Variant
from dino_sparo.terminal import counted, log, sentence, shown

IMAGES_FILE = "images.json"  # hashes of the images by dataset


def study(
    variants: Sequence[Variant],
    folder: Path,
    *,
    evaluate: bool,
    control: str,
    train_fractions: Sequence[float],
    transfer: Sequence[str],
    official_probe: bool = False,
    unverified: bool = False,
) -> int:
    """Train incomplete runs, evaluate complete ones, write the page, and print its table.

    The page includes all complete runs, also those that are not chosen. Without `evaluate`, only train, and
    print the table of sizes.

    Returns:
        exit status: 1 if a run failed, else 0.

    Raises:
        UserError: a mistake in recipe or data; raised before anything is trained.
        StoppedError: a run was stopped by a signal; it is saved, and the study resumes there.
    """
    if evaluate:
        data_sets, hashes = check_study(
            variants, folder, control=control, train_fractions=train_fractions, transfer=transfer
        )
    training.check_variants(variants)
    if evaluate:
        remember_images(folder, data_sets, hashes)
    errors = training.train(variants, folder, unverified=unverified)
    if not evaluate:
        print(training.sizes_table(training.table(variants, errors)))
        return EXIT_PROBLEM if errors else 0
    measured: dict[str, dict[str, Measured]] = {}
    complete = [
        one for one in variants if training.final_knn(one.run_dir, one.recipe.optim.epochs) is not None
    ]
    for number, variant in enumerate(complete, start=1):
        errors.pop(variant.folder, None)  # another process has completed it
        log.info("evaluating %d of %d: %s", number, len(complete), variant.folder)
        # The lock is for other processes that evaluate the same run.
        with training.failure_noted(variant, errors), errors_for_user(), alone_in(variant.run_dir):
            measured[variant.folder] = {
                name: measure(
                    *(variant, data, name),
                    fractions=train_fractions,
                    official_probe=official_probe,
                    unverified=unverified,
                )
                for name, data in data_sets.items()
            }
    if not measured:
        log.warning("WARNING: no run is complete, so no page is written")
        return EXIT_PROBLEM if errors else 0
    missing = missing_runs(folder, variants, set(measured), errors)
    found = groups(variants, measured)
    comparison = write_report(folder, control, found, training.table(variants, errors), missing)
    print(comparison.text())
    log.info("the page is %s", folder / PAGE)
    return EXIT_PROBLEM if errors else 0


def print_plan(variants: Sequence[Variant], recipe_name: str | None) -> int:
    """`--dry-run`: print cost and progress of all runs; exit status 1 if there is a problem, else 0."""
    problems = []
    for variant in variants:
        try:
            check_same_experiment(variant.run_dir, variant.recipe)
        except UserError as error:
            problems.append(str(error))
    try:
        training.check_data(variants)
    except UserError as error:
        problems.append(str(error))
    print(training.sizes_table(training.table(variants, {})))
    runs = counted(len(variants), "run")
    print(f"\n{runs} of {recipe_name}; for details of one: dino-sparo pretrain --dry-run")
    for variant in variants:
        done = latest_step(variant.run_dir)
        state = f"{counted(done, 'step')} done" if done else "would start"
        print(f"  {shown(variant.folder)}: {state if variant.chosen else 'left out by --only'}")
    print("\n".join(f"PROBLEM: {sentence(problem)}" for problem in problems) or "no problems found")
    return EXIT_PROBLEM if problems else 0


def check_study(
    variants: Sequence[Variant],
    folder: Path,
    *,
    control: str,
    train_fractions: Sequence[float],
    transfer: Sequence[str],
) -> tuple[dict[str, str], dict[str, str]]:
    """The folders of the datasets to evaluate on, and hashes of their images, both by name; `val` is first.

    Raises:
        UserError: the control is not a row, a train fraction is wrong, or a dataset has no name, a name that
            is taken, no labels, too few images, or other images than when the study was started.
    """
    rows = list(dict.fromkeys(variant.row for variant in variants))
    if len(rows) > 1 and control not in rows:
        raise UserError(f"control {control!r} is not a row of the table; expected one of {', '.join(rows)}")
    for fraction in train_fractions:
        if fraction > 1:
            raise UserError(f"train_fractions has {fraction}; expected numbers above 0 and at most 1")
    if len({f"{fraction:g}" for fraction in train_fractions}) < len(train_fractions):
        raise UserError(f"train_fractions is {train_fractions}; give each fraction once")
    data_sets = {VAL: variants[0].base.data.path}
    for text in transfer:
        name, place = named_folder(text, "transfer", EXPECTED_BOTH)
        if name in data_sets:
            raise UserError(f"transfer {text!r}: the name {name!r} is given twice; use a different one")
        data_sets[name] = place
    choice = Choice.of(variants[0].base.data)
    hashes = {
        name: _hash_of(name, place, choice if name == VAL else choice.of_pixels)
        for name, place in data_sets.items()
    }
    _with_known(folder, data_sets, hashes)
    return data_sets, hashes


def remember_images(folder: Path, data_sets: dict[str, str], hashes: dict[str, str]) -> None:
    """Add the hashes of the images to `images.json` of the study.

    Raises:
        UserError: another process has meanwhile started the study with other images.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with alone_in(folder):
        known = _with_known(folder, data_sets, hashes)
        write_file(folder / IMAGES_FILE, json.dumps(known, indent=1) + "\n")


def _with_known(folder: Path, data_sets: dict[str, str], hashes: dict[str, str]) -> dict[str, str]:
    """The hashes in `images.json` and these; raises UserError if a dataset has changed."""
    path = folder / IMAGES_FILE
    known: dict[str, str] = {}
    if path.exists():
        remedy = "restore it, or remove it if the images have not changed"
        with read_as(f"{path} cannot be read", remedy):
            known = dict(parsed_json(path).items())
    for name, now in hashes.items():
        if known.setdefault(name, now) != now:
            raise UserError(
                f"{data_sets[name]} holds other images than {name!r} when the study in {folder} was started; "
                f"use the same images, or another {'run_dir' if name == VAL else 'name'}"
            )
    return known


def _hash_of(name: str, folder: str, choice: Choice) -> str:
    """A hash of the train and test images of a dataset. Raises UserError if it has too few."""
    train, test = open_labeled(folder, key="data.path" if name == VAL else "transfer", choice=choice)
    if len(train) < HEADLINE_K:
        raise UserError(f"{folder} has {len(train)} train images; {HEADLINE_K}-NN needs {HEADLINE_K} or more")
    return f"{hash_of_images(train)} {hash_of_images(test)}"


def groups(variants: Sequence[Variant], measured: dict[str, dict[str, Measured]]) -> list[Group]:
    """The evaluated runs of each row that has any, with 20-NN and the probes selected for all its seeds."""
    rows: dict[str, list[Variant]] = {}
    for variant in variants:
        if variant.folder in measured:
            rows.setdefault(variant.row, []).append(variant)
    found = []
    for row, seeds in rows.items():
        headlines: list[dict[Measure, Result]] = [{} for _ in seeds]
        for name in measured[seeds[0].folder]:
            of_seeds = [measured[variant.folder][name] for variant in seeds]
            of_probes = [choose([one.probes[share] for one in of_seeds]) for share in of_seeds[0].probes]
            for results in ([one.knn for one in of_seeds], *of_probes):
                for headline, result in zip(headlines, results, strict=True):
                    headline[Measure.of(result, test_set=name)] = result
        runs = [
            EvaluatedRun(variant.run_dir, flattened(variant.recipe.as_dict()), variant.recipe.seed, headline)
            for variant, headline in zip(seeds, headlines, strict=True)
        ]
        found.append(Group(row, runs))
    return found


def missing_runs(
    run_dir: Path, variants: Sequence[Variant], measured: set[str], errors: dict[str, str]
) -> list[str]:
    """Lines about runs that are not on the page, planned or in the folder from other commands, and why."""
    absent = [one.folder for one in variants if one.folder not in measured]
    folders = sorted(path.parent.name for path in run_dir.glob(f"*/{CONFIG_FILE}"))
    elsewhere = [one for one in folders if one not in {variant.folder for variant in variants}]
    unfinished = [one for one in absent if one not in errors]
    lines = [f"{one} failed: {errors[one]}" for one in absent if one in errors]
    lines += [f"not complete: {', '.join(unfinished)}"] if unfinished else []
    lines += [f"not in this command: {', '.join(elsewhere)}"] if elsewhere else []
    return lines

"""`dino-sparo study`: train variants of a recipe over seeds, evaluate all of them alike, write one page."""

import json
import logging
import shlex
from pathlib import Path
from typing import Any

from dino_sparo import sweep
from dino_sparo.config import flattened
from dino_sparo.data.sources import open_labelled
from dino_sparo.device import choose_device
from dino_sparo.errors import UserError
from dino_sparo.evaluation.compare import Comparison, compare_groups
from dino_sparo.evaluation.groups import Group, Measure, Run
from dino_sparo.evaluation.knn import HEADLINE_K
from dino_sparo.evaluation.results import Result
from dino_sparo.evaluation.transfer import VAL, named_folder
from dino_sparo.options import StudyOptions
from dino_sparo.study.measuring import EPOCHS, Measured, choose, measure
from dino_sparo.study.report import CURVES, JSON_FILE, PAGE, as_json, draw_curves, page, training_of
from dino_sparo.sweep import Variant
from dino_sparo.training.rundir import STARTS_FILE, config_of

log = logging.getLogger("dino_sparo")

PROGRAM = "dino-sparo"
EXPECTED = "expected NAME=DIR, DIR holding train/<class>/... and val/<class>/..."


def run(options: StudyOptions) -> int:
    """Train what is not trained yet, evaluate what is, write the page and print its table; 1 if a run failed.

    Runs that `only` leaves out stand on the page too, if they are complete.

    Raises:
        UserError: for a mistake in options or data, before anything is trained.
        StoppedError: a signal has told a run to stop; it is saved, and the study goes on there.
    """
    variants = sweep.plan(options)
    data_sets = check(options, variants)
    errors = sweep.train(options, variants)
    device = choose_device(options.machine.device)
    measured: dict[str, dict[str, Measured]] = {}
    for variant in variants:
        place = Path(variant.options.run_dir)
        if variant.folder in errors or sweep.final_knn(place, variant.options.optim.epochs) is None:
            continue
        measured[variant.folder] = {
            name: measure(
                place,
                data,
                name,
                fractions=options.train_fractions,
                seed=variant.options.seed,
                device=device,
                num_workers=options.machine.num_workers,
            )
            for name, data in data_sets.items()
        }
        told = [f"{name} {one.knn.top1:.2f} %" for name, one in measured[variant.folder].items()]
        log.info("evaluated %s: 20-NN on %s", variant.folder, ", ".join(told))
    found = groups(variants, measured)
    if not found:
        log.warning("WARNING: no run is complete, so there is nothing to report")
        return 1 if errors else 0
    comparison = write_report(options, found, sweep.table(variants, errors))
    print(comparison.text())
    log.info("the page is %s", Path(options.run_dir) / PAGE)
    return 1 if errors else 0


def write_report(options: StudyOptions, found: list[Group], costs: list[dict[str, Any]]) -> Comparison:
    """Write `study.md`, `study.json` and `curves.png`; returns the table of means and differences."""
    control = next((group for group in found if group.label == options.control), None)
    remark = f"no differences: no run of the control {options.control!r} is complete"
    comparison = compare_groups(found, control) if control else compare_groups(found, None, remark)
    folder = Path(options.run_dir)
    trainings = {run.folder: training_of(run) for group in found for run in group.runs}
    text = page(found, trainings, comparison, costs, about(found[0].runs[0].folder))
    content = json.dumps(as_json(found, trainings), indent=1) + "\n"
    draw_curves(found, trainings, folder / CURVES)
    sweep.write_texts(folder, {PAGE: text, JSON_FILE: content})
    return comparison


def about(run_dir: Path) -> list[str]:
    """How a run was made, by its last start, in lines of Markdown."""
    start = json.loads((run_dir / STARTS_FILE).read_text().splitlines()[-1])
    versions = start["versions"]
    return [
        f"`{PROGRAM} {shlex.join(start['command'][1:])}`",
        f"Commit {start['git'] or 'unknown'}, torch {versions['torch']}, timm {versions['timm']}, "
        f"{start['processes']} x {start['device']}, {start['precision']}. Teachers are evaluated. Probes "
        f"learn from cached centre crops for {EPOCHS} epochs, which is not the official protocol; the one "
        f"that is shown was the best on train images held out.",
    ]


def check(options: StudyOptions, variants: list[Variant]) -> dict[str, str]:
    """The data sets to evaluate on, by name, the one that is learnt from first.

    Raises:
        UserError: the control is no row, a share is none, a folder has no name or one that is taken, or has
            no labelled images, or too few.
    """
    rows = list(dict.fromkeys(variant.row for variant in variants))
    if len(rows) > 1 and options.control not in rows:
        raise UserError(f"control {options.control!r} is no row of the table; it has {', '.join(rows)}")
    for fraction in options.train_fractions:
        if fraction > 1:
            raise UserError(f"train_fractions has {fraction}; expected above 0 and at most 1, such as 0.1")
    data_sets = {VAL: options.data.path}
    for text in options.transfer:
        name, folder = named_folder(text, "transfer", EXPECTED)
        if name in data_sets:
            raise UserError(f"transfer {text!r}: the name {name!r} is given twice; give each folder its own")
        data_sets[name] = folder
    for name, folder in data_sets.items():
        train, _ = open_labelled(folder, key="data.path" if name == VAL else "transfer")
        if len(train) < HEADLINE_K:
            raise UserError(f"{folder} has {len(train)} train images; {HEADLINE_K}-NN needs {HEADLINE_K}")
    return data_sets


def groups(variants: list[Variant], measured: dict[str, dict[str, Measured]]) -> list[Group]:
    """The runs of each row that are evaluated, with 20-NN and the chosen probes; no row without a run."""
    rows: dict[str, list[Variant]] = {}
    for variant in variants:
        if variant.folder in measured:
            rows.setdefault(variant.row, []).append(variant)
    return [Group(row, _runs(of_row, measured)) for row, of_row in rows.items()]


def _runs(of_row: list[Variant], measured: dict[str, dict[str, Measured]]) -> list[Run]:
    """The seeds of one recipe: a probe is chosen for all of them together."""
    headlines: list[dict[Measure, Result]] = [{} for _ in of_row]
    for name in measured[of_row[0].folder]:
        of_seeds = [measured[variant.folder][name] for variant in of_row]
        for headline, one in zip(headlines, of_seeds, strict=True):
            headline[_measure(name, one.knn)] = one.knn
        for fraction in of_seeds[0].probes:
            chosen = choose([one.probes[fraction] for one in of_seeds])
            for headline, result in zip(headlines, chosen, strict=True):
                headline[_measure(name, result)] = result
    return [
        Run(
            Path(variant.options.run_dir),
            flattened(config_of(variant.options)),
            variant.options.seed,
            headline,
        )
        for variant, headline in zip(of_row, headlines, strict=True)
    ]


def _measure(name: str, result: Result) -> Measure:
    return Measure(result.protocol, result.weights, result.train_fraction, name)

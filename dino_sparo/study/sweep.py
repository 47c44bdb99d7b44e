"""`dino-sparo sweep`: variants of one recipe as runs below one folder, and one table of them."""

import json
import logging
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from dino_sparo.errors import StuckError, UserError
from dino_sparo.files import write_file
from dino_sparo.models.cost import encoder_cost
from dino_sparo.options import PretrainOptions, SweepOptions
from dino_sparo.runs.checkpoint import encoder_of, latest_step
from dino_sparo.runs.rundir import check_same_experiment, config_of
from dino_sparo.runs.runlog import read_metrics
from dino_sparo.study.variants import Variant, plan_runs, recipe_of
from dino_sparo.training.pretrain import pretrain
from dino_sparo.training.setup import open_data

log = logging.getLogger("dino_sparo")

KNN = "knn20_top1"  # as the monitor logs it
RECIPE_FILE, JSON_FILE, TABLE_FILE = "recipe.yaml", "sweep.json", "sweep.md"


def run(options: SweepOptions) -> int:
    """`dino-sparo sweep`: train what is not trained yet, and print and write the table; 1 if a run failed.

    A run that ends by a mistake (a read-out that does not fit, a collapse) fills its row with that, and the
    next one starts.

    Raises:
        UserError: for a mistake in options or data, before anything is trained.
        StoppedError: a signal has told a run to stop; it is saved, and the sweep goes on there.
    """
    variants = plan_runs(options)
    errors = train(options, variants)
    rows = table(variants, errors)
    print("\n".join(as_markdown(rows)))
    return 1 if errors else 0


def train(options: SweepOptions, variants: Sequence[Variant]) -> dict[str, str]:
    """Train those of the planned runs that `only` names, each from where it is; what failed, by folder.

    After each run the table is written anew, with all runs.

    Raises:
        UserError, StoppedError: as `run`.
    """
    check_experiments(variants)
    check_data(variants)
    errors: dict[str, str] = {}
    chosen = [variant for variant in variants if not options.only or variant.name in options.only]
    for number, variant in enumerate(chosen, start=1):
        log.info("\n%d of %d: %s", number, len(chosen), variant.folder)
        try:
            pretrain(variant.options)
        except UserError as error:
            if isinstance(error, StuckError):  # this process must end
                raise
            errors[variant.folder] = str(error)
            log.warning("WARNING: %s failed: %s", variant.folder, error)
        write(Path(options.run_dir), options, table(variants, errors))
    return errors


def check_experiments(variants: Sequence[Variant]) -> None:
    """Refuse run folders that hold other experiments.

    Raises:
        UserError: naming the fields.
    """
    for variant in variants:
        check_same_experiment(Path(variant.options.run_dir), config_of(variant.options))


def check_data(variants: Sequence[Variant]) -> None:
    """Refuse variants without k-NN, before others are trained.

    Raises:
        UserError: naming what is missing.
    """
    different: dict[str, PretrainOptions] = {}
    for options in (variant.options for variant in variants):
        different.setdefault(json.dumps([asdict(options.data), asdict(options.monitor)]), options)
    for options in different.values():
        check_knn(options)


def check_knn(options: PretrainOptions) -> None:
    """Refuse a sweep whose table would stay empty.

    Raises:
        UserError: nothing is measured on labelled images.
    """
    if not options.monitor.knn_every_epochs:
        raise UserError(
            "monitor.knn_every_epochs is 0, but a sweep fills its table with the k-NN at the end of runs; "
            "set it to optim.epochs or less"
        )
    _, monitor = open_data(options, num_workers=0)
    if monitor is None:
        raise UserError(
            f"data.path {options.data.path!r} has no labels, but a sweep fills its table with k-NN; name a "
            f"labelled folder by monitor.knn_path"
        )


def table(variants: Sequence[Variant], errors: dict[str, str]) -> list[dict[str, Any]]:
    """One row for all runs that differ in seed alone: cost, and 20-NN of those that are complete."""
    rows: dict[str, dict[str, Any]] = {}
    for variant in variants:
        options = variant.options
        if variant.row not in rows:
            encoder = encoder_of(config_of(options))
            rows[variant.row] = {
                "variant": variant.row,
                "changes": {key: value for key, value in variant.changes.items() if key != "seed"},
                **encoder_cost(encoder, options.views.global_size),
                "runs": [],
            }
        entry: dict[str, Any] = {"run": variant.folder, "seed": options.seed}
        if variant.folder in errors:
            entry |= {KNN: None, "error": errors[variant.folder]}
        else:
            entry[KNN] = final_knn(Path(options.run_dir), options.optim.epochs)
        rows[variant.row]["runs"].append(entry)
    for row in rows.values():
        known = [entry[KNN] for entry in row["runs"] if entry[KNN] is not None]
        row[KNN] = statistics.fmean(known) if known else None
        row["sd"] = statistics.stdev(known) if len(known) > 1 else None
    return list(rows.values())


def as_markdown(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The table, a line each."""
    lines = [
        "| variant | read-out, M parameters | encoder, M parameters | GFLOPs an image | 20-NN, % | runs |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        knn = "-" if row[KNN] is None else f"{row[KNN]:.2f}"
        knn += "" if row["sd"] is None else f" ± {row['sd']:.2f}"
        done = sum(entry[KNN] is not None for entry in row["runs"])
        failed = sum("error" in entry for entry in row["runs"])
        runs = f"{done} of {len(row['runs'])}{f', {failed} failed' if failed else ''}"
        parameters = f"{row['readout_parameters'] / 1e6:.3f} | {row['parameters'] / 1e6:.3f}"
        lines.append(f"| {row['variant']} | {parameters} | {row['flops'] / 1e9:.4g} | {knn} | {runs} |")
    return lines


def write(folder: Path, options: SweepOptions, rows: Sequence[dict[str, Any]]) -> None:
    """Write the recipe, `sweep.json` and `sweep.md`, each whole or not at all.

    Raises:
        OSError: they cannot be written.
    """
    content = {"data": options.data.path, "variants": options.variants, "vary": options.vary, "rows": rows}
    legend = (
        "20-NN top-1 of the teacher at the end, as the monitor measured it; ± is the standard deviation over "
        "runs that differ in seed alone; a multiply-add is two FLOPs."
    )
    texts = {
        RECIPE_FILE: yaml.safe_dump(recipe_of(options), sort_keys=False),
        JSON_FILE: json.dumps(content, indent=1) + "\n",
        TABLE_FILE: "\n".join([*as_markdown(rows), "", legend]) + "\n",
    }
    write_files(folder, texts)


def write_files(folder: Path, contents: Mapping[str, str | bytes]) -> None:
    """Write files into a folder, made if need be, each whole or not at all, while others may write them too.

    Raises:
        OSError: they cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        write_file(folder / name, content)


def final_knn(run_dir: Path, epochs: int) -> float | None:
    """The monitor's 20-NN after the last epoch; None before there is one, and the last checkpoint."""
    found = [entry for entry in read_metrics(run_dir) if KNN in entry and entry["epoch"] >= epochs]
    return found[-1][KNN] if found and latest_step(run_dir) >= found[-1]["step"] else None

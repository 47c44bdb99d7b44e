"""The runs of a study: training one after the other, the table of their cost and k-NN, and evaluations.

Linear probes are trained on cached center crops, each twice: on four fifths of the train images, to select a
probe by its accuracy on the other fifth; and on all train images, to report its accuracy on the test images.
The selection uses no test image. A train fraction is drawn from the four fifths and from all train images.
The probe of the official protocol is trained once instead, since there is nothing to select.
"""

import json
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import yaml

from dino_sparo.data.sources import hold_out
from dino_sparo.data.splits import Choice
from dino_sparo.errors import StuckError, UserError
from dino_sparo.evaluation.knn import HEADLINE_K, KNN, knn_results
from dino_sparo.evaluation.linear import linear_probe
from dino_sparo.evaluation.results import Result, save_results
from dino_sparo.evaluation.transfer import VAL, as_test_set, balanced_fraction, open_train_and_tests
from dino_sparo.files import write_file
from dino_sparo.interop.load import load_encoder
from dino_sparo.models import build_encoder
from dino_sparo.models.cost import encoder_cost
from dino_sparo.parallel.device import choose_device
from dino_sparo.recipe.sections import Recipe
from dino_sparo.runs.checkpoint import latest_step
from dino_sparo.runs.rundir import check_same_experiment
from dino_sparo.runs.runlog import each_metric
from dino_sparo.study.variants import Variant
from dino_sparo.terminal import aligned_table, log, markdown_table, only_warnings
from dino_sparo.training.pretrain import pretrain
from dino_sparo.training.setup import open_data

SIZES = ("read-out, M parameters", "encoder, M parameters")
LEARNING_RATES = (0.001, 0.01, 0.1, 1.0)
EPOCHS = 100
MAX_BATCH = 256
FOLDER = "study"  # in a run folder
HELD_OUT = "held-out"
RECIPE_FILE, JSON_FILE, TABLE_FILE = "recipe.yaml", "runs.json", "runs.md"


def train(variants: Sequence[Variant], folder: Path, *, unverified: bool = False) -> dict[str, str]:
    """Train or resume the chosen runs; returns the errors of failed runs by folder.

    After a UserError in one run (a read-out that does not fit, a collapse) the next run starts. The table of
    all runs is written after each run.

    Raises:
        StoppedError: a run was stopped by a signal; it is saved, and the study resumes there.
    """
    errors: dict[str, str] = {}
    chosen = [variant for variant in variants if variant.chosen]
    begun, trained = time.monotonic(), 0
    for number, variant in enumerate(chosen, start=1):
        left = ""
        if trained:  # those that were complete took no time
            seconds = (time.monotonic() - begun) / trained * (len(chosen) - number + 1)
            left = (
                f"; about {timedelta(seconds=round(seconds))} for all that are left, then their evaluations"
            )
        log.info("\ntraining %d of %d: %s%s", number, len(chosen), variant.folder, left)
        trained += final_knn(variant.run_dir, variant.recipe.optim.epochs) is None
        with failure_noted(variant, errors):
            pretrain(variant.recipe, variant.run_dir, resume_unverified=unverified)
        write_table(folder, variants, table(variants, errors))
    return errors


@contextmanager
def failure_noted(variant: Variant, errors: dict[str, str]) -> Iterator[None]:
    """Record a UserError of a run in `errors` by its folder, so that the next run can start."""
    try:
        yield
    except StuckError:  # this process must end
        raise
    except UserError as error:
        errors[variant.folder] = str(error)
        log.warning("WARNING: %s failed: %s", variant.folder, error)


def check_variants(variants: Sequence[Variant]) -> None:
    """Raises UserError if a run folder holds another experiment, or a variant evaluates no k-NN."""
    for variant in variants:
        check_same_experiment(variant.run_dir, variant.recipe)
    check_data(variants)


def check_data(variants: Sequence[Variant]) -> None:
    """Raises UserError for variants without k-NN during training."""
    different: dict[str, Recipe] = {}
    for recipe in (variant.recipe for variant in variants):
        different.setdefault(str([recipe.data, recipe.monitor]), recipe)
    for recipe in different.values():
        if not recipe.monitor.knn_every_epochs:
            raise UserError(
                "monitor.knn_every_epochs is 0, but a study needs k-NN at the end of each run; set it to "
                "optim.epochs or less"
            )
        _, knn_images = open_data(recipe.data, recipe.monitor, recipe.optim.global_batch_size)
        if knn_images is None:
            raise UserError(
                f"data.path {recipe.data.path!r} has no labels or too few images for k-NN, which a study "
                f"needs; set monitor.knn_path to a labeled folder"
            )


def table(variants: Sequence[Variant], errors: dict[str, str]) -> list[dict[str, Any]]:
    """Rows of runs that differ only in the seed: cost, and 20-NN of complete runs."""
    rows: dict[str, dict[str, Any]] = {}
    for variant in variants:
        recipe = variant.recipe
        if variant.row not in rows:
            encoder = build_encoder(**recipe.encoder_arguments())
            rows[variant.row] = {
                "variant": variant.row,
                "changes": {key: value for key, value in variant.changes.items() if key != "seed"},
                **encoder_cost(encoder, recipe.views.global_size),
                "runs": [],
            }
        entry: dict[str, Any] = {"run": variant.folder, "seed": recipe.seed}
        if variant.folder in errors:
            entry |= {KNN: None, "error": errors[variant.folder]}
        else:
            entry[KNN] = final_knn(variant.run_dir, recipe.optim.epochs)
        rows[variant.row]["runs"].append(entry)
    for row in rows.values():
        known = [entry[KNN] for entry in row["runs"] if entry[KNN] is not None]
        row[KNN] = statistics.fmean(known) if known else None
        row["sd"] = statistics.stdev(known) if len(known) > 1 else None
    return list(rows.values())


def sizes_table(
    rows: Sequence[dict[str, Any]], draw: Callable[[list[str], list[list[str]]], str] = aligned_table
) -> str:
    """The table of cost and k-NN, by default for a terminal."""
    cells = []
    for row in rows:
        knn = "-" if row[KNN] is None else f"{row[KNN]:.2f}"
        knn += "" if row["sd"] is None else f" ± {row['sd']:.2f}"
        done = sum(entry[KNN] is not None for entry in row["runs"])
        failed = sum("error" in entry for entry in row["runs"])
        runs = f"{done} of {len(row['runs'])}{f', {failed} failed' if failed else ''}"
        cells.append([row["variant"], *sizes(row), f"{row['flops'] / 1e9:.4g}", knn, runs])
    return draw(["variant", *SIZES, "GFLOPs per image", "20-NN, %", "runs"], cells)


def sizes(row: dict[str, Any]) -> list[str]:
    """The cells of the columns `SIZES`."""
    return [f"{row[name] / 1e6:.3f}" for name in ("readout_parameters", "parameters")]


def write_table(folder: Path, variants: Sequence[Variant], rows: Sequence[dict[str, Any]]) -> None:
    """Write the recipe, `runs.json`, and `runs.md`."""
    base = variants[0].base
    content = {"data": base.data.path, "rows": rows}
    legend = (
        "20-NN top-1 of the teacher at the end of training, measured by the monitor; ± is the standard "
        "deviation over seeds; a multiply-add is two FLOPs."
    )
    texts = {
        RECIPE_FILE: yaml.safe_dump(base.as_dict(), sort_keys=False),
        JSON_FILE: json.dumps(content, indent=1) + "\n",
        TABLE_FILE: f"{sizes_table(rows, markdown_table)}\n\n{legend}\n",
    }
    write_files(folder, texts)


def write_files(folder: Path, contents: Mapping[str, str]) -> None:
    """Write files atomically into a folder, which is created if it does not exist."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        write_file(folder / name, content)


def final_knn(run_dir: Path, epochs: int) -> float | None:
    """The monitor's 20-NN after the last epoch; None if it or the last checkpoint does not exist yet."""
    last = None
    for entry in each_metric(run_dir):
        last = entry if KNN in entry and entry["epoch"] >= epochs else last
    return last[KNN] if last and latest_step(run_dir) >= last["step"] else None


# --- Evaluations


@dataclass(frozen=True)
class Probed:
    """Results of all probes on held-out images and on test images, in the same order.

    The probe of the official protocol has no result on held-out images.
    """

    held_out: list[Result]
    test: list[Result]


@dataclass(frozen=True)
class Measured:
    """Results of an encoder on one dataset: 20-NN, and probes by train fraction."""

    knn: Result
    probes: dict[float, Probed]


def measure(
    variant: Variant,
    data: str,
    name: str,
    *,
    fractions: Sequence[float],
    official_probe: bool = False,
    unverified: bool = False,
) -> Measured:
    """Evaluate the teacher of a complete run; results and classifiers go to `study/name` in its folder.

    All variants are evaluated on the images of the study, also if they are trained on others.

    Features are cached in the run folder, and complete probes are not trained again.

    Args:
        data: labeled train and test images.
        name: of the dataset.
        fractions: train fractions, above 0 and at most 1.
        official_probe: train the probe that `dino-sparo linear` trains by default.
        unverified: resume probes from checkpoints whose SHA-256 is missing.

    Raises:
        UserError: an image cannot be read, or a feature is not finite.
    """
    seed, machine = variant.recipe.seed, variant.recipe.machine
    folder, cache = variant.run_dir / FOLDER / name, variant.run_dir / "features"
    reading: dict[str, Any] = {"cache": cache, "num_workers": machine.num_workers}
    again: dict[str, Any] = reading | {"resume_unverified": unverified}
    with only_warnings():
        choice = Choice.of(variant.base.data)._replace(value_range=variant.recipe.data.value_range)
        train, test_sets = open_train_and_tests(data, choice=choice if name == VAL else choice.of_pixels)
        encoder = load_encoder(str(variant.run_dir)).to(choose_device(machine.device))
        knn = knn_results(encoder, train, test_sets, k=HEADLINE_K, **reading)
        save_results(folder, knn)
        probes: dict[float, Probed] = {}
        if official_probe:
            for fraction in fractions:
                results = linear_probe(encoder, train, test_sets, folder, train_fraction=fraction, **again)
                save_results(folder, results)
                probes[fraction] = Probed([], results)
            return Measured(knn[0], probes)
        rest, held_out = hold_out(train)
        for fraction in fractions:
            num_rest = len(balanced_fraction(rest, fraction, seed)) if fraction < 1 else len(rest)
            found = []
            for learned, scored, place in (
                (rest, [as_test_set(HELD_OUT, held_out, train.classes)], folder / HELD_OUT),
                (train, test_sets, folder),
            ):
                results = linear_probe(
                    *(encoder, learned, scored, place),
                    cached=True,
                    learning_rates=LEARNING_RATES,
                    sweep=True,
                    epochs=EPOCHS,
                    batch_size=min(MAX_BATCH, 2 ** (num_rest.bit_length() - 1)),
                    train_fraction=fraction,
                    seed=seed,
                    **again,
                )
                save_results(place, results)
                found.append(results)
            probes[fraction] = Probed(*found)
    return Measured(knn[0], probes)


def choose(of_seeds: Sequence[Probed]) -> list[Result]:
    """Each seed's test result of the probe with the best mean accuracy over seeds on held-out images, or of
    the only probe."""
    sums = [sum(one.held_out[i].top1 for one in of_seeds) for i in range(len(of_seeds[0].held_out))] or [0]
    best = sums.index(max(sums))
    return [replace(one.test[best], headline=True) for one in of_seeds]

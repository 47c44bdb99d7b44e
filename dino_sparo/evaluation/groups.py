"""Runs of one recipe together: what `compare` averages over seeds, and what it calls it."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from dino_sparo.errors import UserError, UserFileNotFoundError
from dino_sparo.evaluation.results import Result, read_results, results_folder
from dino_sparo.recipe.files import stored_recipe
from dino_sparo.recipe.typed import flattened

CONFIG_FILE = "config.yaml"
NOT_RECIPE = ("seed", "run_dir", "nproc", "machine", "log", "monitor", "data.path", "data.on_bad_image")
READOUT = "model.readout.name"
PROTOCOLS = ("knn", "linear", "linear-cached")
WEIGHTS = ("teacher", "student", "untrained")
SHOWN_DIFFERENCES = 3


@dataclass(frozen=True)
class Measure:
    """What is compared: a row of the table. Untrained encoders are a row of their own."""

    protocol: str
    weights: str
    train_fraction: float
    test_set: str

    def order(self) -> tuple[int, int, float, bool]:
        """Rows by protocol, weights and train fraction; `val` before further test sets."""
        protocol = PROTOCOLS.index(self.protocol) if self.protocol in PROTOCOLS else len(PROTOCOLS)
        weights = WEIGHTS.index(self.weights) if self.weights in WEIGHTS else len(WEIGHTS)
        return protocol, weights, -self.train_fraction, self.test_set != "val"


@dataclass(frozen=True)
class Run:
    """The headline results of a run folder; its recipe by dotted key, None for weights without one."""

    folder: Path
    recipe: dict[str, Any] | None
    seed: int | None
    headline: dict[Measure, Result]


@dataclass(frozen=True)
class Group:
    """Runs of one recipe, under the name of its column."""

    label: str
    runs: list[Run]

    def results(self, measure: Measure) -> list[Result]:
        """One result of each run that has it."""
        return [run.headline[measure] for run in self.runs if measure in run.headline]


def read_run(given: str) -> Run:
    """A run as it was given: its recipe, seed, and the newest headline result of each measure."""
    folder = results_folder(given)
    if not folder.is_dir():
        raise UserFileNotFoundError(
            f"run {given!r} does not exist; expected a run folder with results.json, or a weights file "
            f"whose results are in {folder}"
        )
    headline = {
        Measure(r.protocol, r.weights, r.train_fraction, r.test_set): r
        for r in read_results(folder)
        if r.headline
    }
    if not headline:
        raise UserError(
            f"{folder} has no headline result; expected that of `dino-sparo knn` with k 20 or of "
            f"`dino-sparo linear`, so evaluate it by one of them"
        )
    path = folder / CONFIG_FILE
    if not path.exists():
        return Run(folder, None, None, headline)
    try:
        config = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError):
        config = None
    if not isinstance(config, dict):
        raise UserError(f"{path} is damaged; restore the recipe of this run, or remove it to compare without")
    recipe = stored_recipe(config, str(path))
    return Run(folder, flattened(recipe.as_dict(), without=NOT_RECIPE), recipe.seed, headline)


def group_runs(runs: Sequence[Run]) -> list[Group]:
    """Runs of one recipe together, in the order of their first; one without a recipe stands alone.

    Raises:
        UserError: a run is given twice, or two runs are the same seed of one recipe.
    """
    members: dict[str, list[Run]] = {}
    for one in runs:
        key = json.dumps(one.recipe, sort_keys=True, default=str) if one.recipe else str(one.folder.resolve())
        for other in members.setdefault(key, []):
            if other.folder.resolve() == one.folder.resolve():
                raise UserError(f"run {str(one.folder)!r} is given twice; give it once")
            if other.seed is not None and other.seed == one.seed:
                raise UserError(
                    f"runs {str(other.folder)!r} and {str(one.folder)!r} have the same recipe and the same "
                    f"seed {one.seed}, and would count as two seeds; leave one of them out"
                )
        members[key].append(one)
    groups = list(members.values())
    return [
        Group(label, list(of_one))
        for label, of_one in zip(_labels([g[0] for g in groups]), groups, strict=True)
    ]


def _labels(firsts: Sequence[Run]) -> list[str]:
    """The read-out, with what tells apart recipes of the same one; the folder's name without a recipe."""
    labels = []
    for one in firsts:
        if one.recipe is None or READOUT not in one.recipe:
            labels.append(one.folder.resolve().name)
            continue
        alike = [r.recipe for r in firsts if r.recipe and r.recipe.get(READOUT) == one.recipe[READOUT]]
        keys = sorted({key for recipe in alike for key in recipe})
        telling = [key for key in keys if any(recipe.get(key) != one.recipe.get(key) for recipe in alike)]
        words = [f"{key.rpartition('.')[2]} {one.recipe.get(key)}" for key in telling[:SHOWN_DIFFERENCES]]
        labels.append(f"{one.recipe[READOUT]}{' ' if words else ''}{', '.join(words)}")
    return [
        label if labels.count(label) == 1 else f"{label}, {one.folder}"
        for label, one in zip(labels, firsts, strict=True)
    ]

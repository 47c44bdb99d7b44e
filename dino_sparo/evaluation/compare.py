"""One table of several runs: k-NN and linear accuracies side by side, grouped by recipe.

Read from the runs' `results.json` alone. Runs whose recipes differ in the seed only (or in where the images
lie, or in what belongs to machine, log and monitor) are seeds of one recipe: their mean and sample standard
deviation are shown. The difference to the control has a 95 % interval of a paired bootstrap over the test
images: it says how much the choice of the images matters, not how much other seeds would.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dino_sparo.errors import UserError, UserFileNotFoundError
from dino_sparo.evaluation.results import Result, read_results, results_folder
from dino_sparo.files import did_you_mean
from dino_sparo.recipe.files import comparable
from dino_sparo.recipe.typed import flattened, read_yaml
from dino_sparo.runs.rundir import CONFIG_FILE
from dino_sparo.terminal import aligned_table, markdown_table, sentence

NOT_RECIPE = (
    "seed",
    "run_dir",
    "nproc",
    "machine",
    "log",
    "monitor",
    "data.path",
    "data.train",
    "data.val",
    "data.label_column",
    "data.max_pixels",
    "data.on_bad_image",
)
READOUT = "model.readout.name"
SHOWN_DIFFERENCES = 3

NUM_RESAMPLES = 10_000
SETTINGS = ("epochs", "batch_size", "num_train")  # details that two accuracies should share
NOTHING = "–"
DIFFERENCES = (
    "differences in points, with a 95 % interval by a paired bootstrap over the test images "
    f"({NUM_RESAMPLES:,} resamples), which says nothing of other seeds"
)


@dataclass(frozen=True)
class Measure:
    """What is compared: a row of the table. Untrained encoders are a row of their own."""

    protocol: str
    weights: str
    train_fraction: float
    test_set: str

    @classmethod
    def of(cls, result: Result, test_set: str | None = None) -> "Measure":
        """What a result measures, on a test set that is called so."""
        return cls(result.protocol, result.weights, result.train_fraction, test_set or result.test_set)

    def order(self) -> tuple[object, ...]:
        """Rows by protocol, weights and train fraction; `val` before further test sets."""
        of_test = self.weights != "teacher", self.weights, -self.train_fraction, self.test_set != "val"
        return self.protocol, *of_test


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


@dataclass(frozen=True)
class Comparison:
    """A table of text: columns are recipes, and under each accuracy is its difference to the control."""

    header: list[str]
    rows: list[list[str]]
    notes: list[str]

    def text(self) -> str:
        """Aligned for a terminal."""
        notes = (sentence(note) for note in self.notes)
        return "\n".join([aligned_table(self.header, self.rows), "", *notes])

    def markdown(self) -> str:
        """A Markdown table, and the notes as a list."""
        rows = [[cell.strip() for cell in line] for line in self.rows]
        return "\n".join(
            [
                markdown_table(self.header, rows),
                "",
                *(f"- {sentence(note)}" for note in self.notes),
            ]
        )


def compare_runs(runs: Sequence[str], control: str | None = None) -> Comparison:
    """Headline accuracies of runs by recipe, with differences to the recipe of the run `control`.

    Without `control` it is the one recipe whose read-out is not SPARO, if there is exactly one.

    Raises:
        UserFileNotFoundError: a run or its results do not exist.
        UserError: damaged files, a run given twice, an unknown control, or nothing in common.
    """
    if not runs:
        raise UserError("compare has no runs; give their folders, as in `dino-sparo compare RUN RUN`")
    groups = group_runs([read_run(given) for given in runs])
    return compare_groups(groups, *_choose_control(groups, control))


def measures_of(groups: Sequence[Group]) -> list[Measure]:
    """What the runs have results of, in the order of rows."""
    found = {measure: None for group in groups for run in group.runs for measure in run.headline}
    return sorted(found, key=Measure.order)


def compare_groups(groups: Sequence[Group], control: Group | None, remark: str = DIFFERENCES) -> Comparison:
    """Headline accuracies of some recipes, with differences to that of `control`, about which is the remark.

    Raises:
        UserError: they have no result in common.
    """
    measures, rows, notes = measures_of(groups), [], []
    if len(groups) > 1 and not any(sum(bool(g.results(m)) for g in groups) > 1 for m in measures):
        held = (
            f"{g.label} has {', '.join(title(m, groups) for m in measures if g.results(m))}" for g in groups
        )
        raise UserError(
            f"the recipes have no result in common ({'; '.join(held)}); evaluate them by the same protocol "
            f"on the same test sets"
        )
    for measure in measures:
        name = title(measure, groups)
        rows.append([name, *(_accuracy(group.results(measure)) for group in groups)])
        notes += [f"{name}: {note}" for note in _unequal_settings(measure, groups)]
        if control is not None and len(groups) > 1:
            cells, reasons = _differences(measure, groups, control)
            rows += [[f"  difference to {control.label}", *cells]] if set(cells) - {"", NOTHING} else []
            notes += [f"{name}: {reason}" for reason in reasons]
    legend = []
    for group in groups:
        runs = (f"{one.folder}{'' if one.seed is None else f' (seed {one.seed})'}" for one in group.runs)
        legend.append(f"{group.label}: {', '.join(runs)}")
    if any(len(group.runs) > 1 for group in groups):
        legend.append("mean ± sample standard deviation over seeds")
    legend += [remark] if len(groups) > 1 else []  # of one recipe there are no differences
    if control is not None:
        theirs = _seeds(control)
        legend += [
            f"not the same seeds: {group.label} has {_seeds(group)}, {control.label} {theirs}"
            for group in groups
            if theirs and _seeds(group) and _seeds(group) != theirs
        ]
    header = ["top-1 in %", *(f"{g.label} (control)" if g is control else g.label for g in groups)]
    return Comparison(header, rows, [*legend, *notes])


def paired_bootstrap(
    ours: Sequence[NDArray[np.bool_]],
    control: Sequence[NDArray[np.bool_]],
    *,
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
) -> tuple[float, float]:
    """95 % interval of the difference in accuracy, in per cent: test images are drawn anew, both sides alike.

    Takes for each side the arrays (num_images,) of its seeds, right or wrong by image in the same order,
    and averages them. The difference of an image has few distinct values, so that a resample is a draw of
    how often each occurs (multinomial) instead of num_images draws: the same distribution, in no memory.
    """
    scale = len(ours) * len(control)  # whole numbers, so that equal differences are equal
    difference = len(control) * np.sum(ours, axis=0) - len(ours) * np.sum(control, axis=0)
    values, counts = np.unique(difference, return_counts=True)
    num_images = len(difference)
    drawn = np.random.default_rng(seed).multinomial(num_images, counts / num_images, size=num_resamples)
    low, high = np.quantile(drawn @ values, [0.025, 0.975]) * (100 / scale / num_images)
    return float(low), float(high)


def _choose_control(groups: Sequence[Group], control: str | None) -> tuple[Group | None, str]:
    """The group of the control, and a note about the differences to it, or why there are none."""
    if control is not None:
        folder = results_folder(control).resolve()
        for group in groups:
            if any(one.folder.resolve() == folder for one in group.runs):
                return group, DIFFERENCES
        given = ", ".join(str(one.folder) for group in groups for one in group.runs)
        raise UserError(f"control {control!r} is none of the runs; expected one of {given}")
    others = [g for g in groups if (g.runs[0].recipe or {}).get(READOUT, "sparo") != "sparo"]
    if len(others) == 1:
        return others[0], DIFFERENCES
    found = "no recipe has" if not others else f"{len(others)} recipes have"
    return None, f"no differences: {found} a read-out other than sparo; --control RUN names the control"


def title(measure: Measure, groups: Sequence[Group]) -> str:
    """A measure in words; k-NN by its k."""
    names = {result.name for group in groups for result in group.results(measure)}
    what = "/".join(sorted(names)) if measure.protocol == "knn" else measure.protocol
    fraction = f", {100 * measure.train_fraction:g} % of train" if measure.train_fraction != 1 else ""
    weights = f", {measure.weights}" if measure.weights != "teacher" else ""
    return f"{what}, {measure.test_set}{fraction}{weights}"


def _accuracy(results: Sequence[Result]) -> str:
    if not results:
        return NOTHING
    top1 = [result.top1 for result in results]
    spread = f" ± {np.std(top1, ddof=1):.2f}" if len(top1) > 1 else ""
    return f"{np.mean(top1):.2f}{spread} ({len(top1)} seed{'s' if len(top1) > 1 else ''})"


def _differences(measure: Measure, groups: Sequence[Group], control: Group) -> tuple[list[str], list[str]]:
    """A cell for each group, and why those without an interval have none."""
    cells, reasons = [], []
    theirs = control.results(measure)
    for group in groups:
        ours = group.results(measure)
        if group is control or not ours or not theirs:
            cells.append("" if group is control else NOTHING)
            continue
        difference = np.mean([r.top1 for r in ours]) - np.mean([r.top1 for r in theirs])
        if len({(r.images, r.num_images) for r in [*ours, *theirs]}) == 1:
            low, high = paired_bootstrap([r.correct for r in ours], [r.correct for r in theirs])
            cells.append(f"{difference:+.2f} [{low:+.2f}, {high:+.2f}]")
        else:
            cells.append(f"{difference:+.2f}")
            reasons.append(
                f"no interval for {group.label}, since its runs and those of {control.label} were not all "
                f"scored on the same test images (their lists differ)"
            )
    return cells, reasons


def _seeds(group: Group) -> str:
    """Those that are known."""
    return ", ".join(map(str, sorted(run.seed for run in group.runs if run.seed is not None)))


def _unequal_settings(measure: Measure, groups: Sequence[Group]) -> list[str]:
    """A note if accuracies of one row were measured in different ways, as far as they say."""
    results = [result for group in groups for result in group.results(measure)]
    unequal = []
    for name in ("classes", *SETTINGS):
        values = [r.num_classes if name == "classes" else r.details.get(name) for r in results]
        found = dict.fromkeys(str(value) for value in values if value is not None)
        if len(found) > 1:
            unequal.append(f"{name} {' against '.join(found)}")
    return [f"not measured alike ({', '.join(unequal)})"] if unequal else []


# --- Runs of one recipe


def read_run(given: str) -> Run:
    """A run as it was given: its recipe, seed, and the newest headline result of each measure."""
    folder = results_folder(given)
    if not folder.is_dir():
        raise UserFileNotFoundError(
            f"run {given!r} does not exist{did_you_mean(Path(given))}; expected a run folder with "
            f"results.json, or a weights file whose results are in {folder}"
        )
    headline = {Measure.of(result): result for result in read_results(folder) if result.headline}
    if not headline:
        raise UserError(
            f"{folder} has no headline result; expected that of `dino-sparo knn` with k 20 or of "
            f"`dino-sparo linear`, so evaluate it by one of them"
        )
    path = folder / CONFIG_FILE
    if not path.exists():
        return Run(folder, None, None, headline)
    remedy = "restore the recipe of this run, or remove it to compare without"
    try:
        config = read_yaml(path)
    except UserError as error:
        raise UserError(f"{error}; {remedy}") from error
    if not isinstance(config, dict):
        raise UserError(f"{path} is damaged; {remedy}")
    recipe = comparable(config)
    return Run(folder, flattened(recipe, without=NOT_RECIPE), recipe.get("seed"), headline)


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
    labels = _labels([of_one[0] for of_one in members.values()])
    return [Group(label, of_one) for label, of_one in zip(labels, members.values(), strict=True)]


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

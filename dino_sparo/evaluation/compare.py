"""A table of several runs: k-NN and linear accuracies side by side, grouped by recipe.

Reads only `config.yaml` and `results.json` of the runs. Runs whose recipes differ only in the seed, in the
place of the images, or in the sections machine, log, and monitor are seeds of one recipe: the table shows
their mean and sample standard deviation. The difference to the control has a 95 % interval by a paired
bootstrap over the test images, which covers the choice of test images, and with at least two equal seeds a
t-interval over them.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dino_sparo.errors import UserError, UserFileNotFoundError
from dino_sparo.evaluation.results import Result, read_results, results_folder, standard_error
from dino_sparo.files import did_you_mean
from dino_sparo.recipe.files import CONFIG_FILE, read_sections
from dino_sparo.recipe.typed import flattened
from dino_sparo.runs.rundir import NOT_EXPERIMENT
from dino_sparo.terminal import aligned_table, counted, markdown_table, sentence, shown

NOT_RECIPE = ("seed", "nproc", *NOT_EXPERIMENT)
READOUT = "model.readout.name"
AS_NULL = (("model.readout.after_last_block", False), ("model.readout.heads", "separate"))  # mean the same
SHOWN_DIFFERENCES = 3

NUM_RESAMPLES = 10_000
SETTINGS = ("epochs", "batch_size", "num_train")  # details that should be equal in accuracies to compare
NOTHING = "–"
DIFFERENCES = (
    "differences in percentage points, with a 95 % interval by a paired bootstrap over the test images "
    f"({NUM_RESAMPLES:,} resamples), which does not cover the choice of seeds"
)
SEEDS_ROW = "  over seeds"
OVER_SEEDS = "the interval over seeds is a 95 % t-interval of the differences between runs with equal seeds"


@dataclass(frozen=True)
class Measure:
    """A row of the table. Untrained encoders have a row of their own."""

    protocol: str
    weights: str
    train_fraction: float
    test_set: str

    @classmethod
    def of(cls, result: Result, test_set: str | None = None) -> "Measure":
        """The measure of a result; `test_set` replaces the name of its test set."""
        return cls(result.protocol, result.weights, result.train_fraction, test_set or result.test_set)

    def order(self) -> tuple[object, ...]:
        """Sort key: by protocol, weights, and train fraction; `val` before other test sets."""
        of_test = self.weights != "teacher", self.weights, -self.train_fraction, self.test_set != "val"
        return self.protocol, *of_test


@dataclass(frozen=True)
class EvaluatedRun:
    """The headline results of a run folder, and its recipe by dotted key (None for weights without one).

    `name` is that of weights without a recipe, `images` the place of the images of training.
    """

    folder: Path
    recipe: dict[str, Any] | None
    seed: int | None
    headline: dict[Measure, Result]
    name: str = ""
    images: str = ""

    def has_several_weights(self) -> bool:
        """Whether results of one of teacher, student, and untrained are of different weights."""
        known = {
            (m.weights, str(r.details["encoder"])) for m, r in self.headline.items() if "encoder" in r.details
        }
        return len(known) > len({weights for weights, _ in known})


@dataclass(frozen=True)
class Group:
    """Runs of one recipe; `label` is the header of its column."""

    label: str
    runs: list[EvaluatedRun]

    def results(self, measure: Measure) -> list[Result]:
        """The result of each run that has this measure."""
        return [run.headline[measure] for run in self.runs if measure in run.headline]

    def seeds(self, measure: Measure) -> str:
        """The known seeds of the runs that have this measure."""
        known = (run.seed for run in self.runs if measure in run.headline and run.seed is not None)
        return ", ".join(map(str, sorted(known)))


@dataclass(frozen=True)
class Comparison:
    """A table with a column for each recipe, and below each accuracy the difference to the control."""

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

    Without `control`, the control is the recipe whose read-out is not SPARO, if there is exactly one.

    Raises:
        UserFileNotFoundError: a run or its results do not exist.
        UserError: a file is damaged, a run is given twice, `control` is not one of the runs, or the recipes
            have no result in common.
    """
    if not runs:
        raise UserError("runs is empty; give run folders, as in `dino-sparo compare RUN RUN`")
    groups = group_runs([read_run(given) for given in runs])
    return compare_groups(groups, *_choose_control(groups, control))


def measures_of(groups: Sequence[Group]) -> list[Measure]:
    """The measures of all runs, in the order of the rows."""
    found = {measure: None for group in groups for run in group.runs for measure in run.headline}
    return sorted(found, key=Measure.order)


def compare_groups(groups: Sequence[Group], control: Group | None, remark: str = DIFFERENCES) -> Comparison:
    """Headline accuracies of recipes, with differences to `control`, which `remark` explains.

    Raises:
        UserError: the recipes have no result in common.
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
        numbers = {result.num_images for group in groups for result in group.results(measure)}
        *others, largest = sorted(numbers)
        images = " or ".join([*(f"{number:,}" for number in others), counted(largest, "image")])
        rows.append([f"{name}, {images}", *(_accuracy(group, measure) for group in groups)])
        notes += [f"{name}: {note}" for note in _unequal_settings(measure, groups)]
        if control is not None and len(groups) > 1:
            cells, reasons = _differences(measure, groups, control)
            rows += [[f"  difference to {control.label}", *cells]] if set(cells) - {"", NOTHING} else []
            over_seeds = [_over_seeds(measure, group, control) for group in groups]
            rows += [[SEEDS_ROW, *over_seeds]] if any(over_seeds) else []
            notes += [f"{name}: {reason}" for reason in reasons]
    legend = []
    for group in groups:
        runs = (f"{one.folder}{'' if one.seed is None else f' (seed {one.seed})'}" for one in group.runs)
        legend.append(f"{group.label}: {', '.join(runs)}")
    counts = [len(group.results(measure)) for group in groups for measure in measures]
    for group in groups:
        places = sorted({run.images for run in group.runs} - {""})
        legend += [f"{group.label}: the seeds were trained on {' and '.join(places)}"] * (len(places) > 1)
    legend += [
        f"{run.folder}: results of different weights, since it was trained on between them; evaluate it again"
        for group in groups
        for run in group.runs
        if run.has_several_weights()
    ]
    legend += ["mean ± sample standard deviation over seeds"] * (max(counts, default=0) > 1)
    legend += ["one run: ± one standard error, from its number of test images"] * (1 in counts)
    legend += [remark] if len(groups) > 1 else []
    legend += [OVER_SEEDS] if any(row[0] == SEEDS_ROW for row in rows) else []
    legend += [] if control is None else _different_seeds(measures, groups, control)
    header = ["top-1 in %", *(f"{g.label} (control)" if g is control else g.label for g in groups)]
    return Comparison(header, rows, [*legend, *notes])


def paired_bootstrap(
    ours: Sequence[NDArray[np.bool_]],
    control: Sequence[NDArray[np.bool_]],
    *,
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
) -> tuple[float, float]:
    """95 % interval of the difference in accuracy in percentage points, by resampling the test images.

    The difference of an image has few distinct values, so a resample is one multinomial draw of their counts
    instead of num_images draws; the distribution is the same.

    Args:
        ours, control: for each seed whether each image is right, bool (num_images,), in the same order;
            seeds are averaged.
    """
    scale = len(ours) * len(control)  # integers, so that equal differences compare as equal
    difference = len(control) * np.sum(ours, axis=0) - len(ours) * np.sum(control, axis=0)
    values, counts = np.unique(difference, return_counts=True)
    num_images = len(difference)
    drawn = np.random.default_rng(seed).multinomial(num_images, counts / num_images, size=num_resamples)
    low, high = np.quantile(drawn @ values, [0.025, 0.975]) * (100 / scale / num_images)
    return float(low), float(high)


def t_interval(values: Sequence[float]) -> tuple[float, float]:
    """95 % interval of the mean of at least two independent values, by Student's t distribution."""
    freedom = len(values) - 1
    constant = math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2) - math.log(freedom * math.pi) / 2
    steps = np.arange(0, 13, 1e-4)  # the quantile is 12.7 for two values
    density = np.exp(constant) * (1 + steps**2 / freedom) ** (-(freedom + 1) / 2)
    below = (np.cumsum(density) - (density + density[0]) / 2) * 1e-4  # from 0 to each step
    quantile = steps[np.searchsorted(below, 0.475)]
    half = quantile * np.std(values, ddof=1) / math.sqrt(len(values))
    return float(np.mean(values) - half), float(np.mean(values) + half)


def _choose_control(groups: Sequence[Group], control: str | None) -> tuple[Group | None, str]:
    """The group of the control, and a note that explains the differences or why there are none."""
    if control is not None:
        folder = results_folder(control).resolve()
        for group in groups:
            if any(one.folder.resolve() == folder for one in group.runs):
                return group, DIFFERENCES
        given = ", ".join(str(one.folder) for group in groups for one in group.runs)
        raise UserError(f"control {control!r} is not one of the runs; expected one of {given}")
    others = [g for g in groups if (g.runs[0].recipe or {}).get(READOUT, "sparo") != "sparo"]
    if len(others) == 1:
        return others[0], DIFFERENCES
    found = f"{len(others)} recipes have" if others else "no recipe has"
    found += " a read-out other than sparo"
    if any(not group.runs[0].recipe for group in groups):
        found += " (that of weights without a recipe is not known)"
    return None, f"no differences: {found}; choose the control with --control RUN"


def title(measure: Measure, groups: Sequence[Group]) -> str:
    """The name of a measure's row."""
    names = {result.name for group in groups for result in group.results(measure)}
    what = "/".join(sorted(names)) if measure.protocol == "knn" else measure.protocol
    fraction = f", {100 * measure.train_fraction:g} % of train" if measure.train_fraction != 1 else ""
    weights = f", {measure.weights}" if measure.weights != "teacher" else ""
    return f"{what}, {measure.test_set}{fraction}{weights}"


def _accuracy(group: Group, measure: Measure) -> str:
    results = group.results(measure)
    if not results:
        return NOTHING
    top1 = [result.top1 for result in results]
    spread = np.std(top1, ddof=1) if len(top1) > 1 else standard_error(top1[0], results[0].num_images)
    seeds = f" ({len(top1)} seed{'s' * (len(top1) > 1)})" if group.seeds(measure) else ""
    return f"{np.mean(top1):.2f} ± {spread:.2f}{seeds}"


def _differences(measure: Measure, groups: Sequence[Group], control: Group) -> tuple[list[str], list[str]]:
    """A cell for each group, and the reasons of missing intervals."""
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
                f"evaluated on the same test images"
            )
    return cells, reasons


def _over_seeds(measure: Measure, group: Group, control: Group) -> str:
    """The t-interval of the differences of runs with equal seeds; empty without two of them."""
    ours, theirs = (
        {run.seed: run.headline[measure] for run in one.runs if measure in run.headline}
        for one in (group, control)
    )
    both = [(ours[seed], theirs[seed]) for seed in ours if seed is not None and seed in theirs]
    same_images = len({(result.images, result.num_images) for pair in both for result in pair}) == 1
    if group is control or len(both) < 2 or not same_images:
        return ""
    differences = [one.top1 - other.top1 for one, other in both]
    low, high = t_interval(differences)
    return f"{np.mean(differences):+.2f} [{low:+.2f}, {high:+.2f}] ({len(both)} pairs)"


def _different_seeds(measures: Sequence[Measure], groups: Sequence[Group], control: Group) -> list[str]:
    """Notes about recipes whose accuracies are means over other seeds than those of the control."""
    rows: dict[str, list[str]] = {}
    for measure in measures:
        for group in groups:
            ours, theirs = group.seeds(measure), control.seeds(measure)
            if ours and theirs and ours != theirs:
                told = f"{group.label} has {ours}, {control.label} has {theirs}"
                rows.setdefault(told, []).append(title(measure, groups))
    return [
        f"different seeds{'' if len(names) == len(measures) else ' in ' + ', '.join(names)}: {told}"
        for told, names in rows.items()
    ]


def _unequal_settings(measure: Measure, groups: Sequence[Group]) -> list[str]:
    """A note if the accuracies of a row were measured with different settings."""
    results = [result for group in groups for result in group.results(measure)]
    unequal = []
    for name in ("classes", *SETTINGS):
        values = [r.num_classes if name == "classes" else r.details.get(name) for r in results]
        found = dict.fromkeys(str(value) for value in values if value is not None)
        if len(found) > 1:
            unequal.append(f"{name} {' and '.join(found)}")
    return [f"measured with different settings ({', '.join(unequal)})"] if unequal else []


# --- Runs of one recipe


def read_run(given: str) -> EvaluatedRun:
    """Read a run: its recipe, seed, and newest headline result of each measure."""
    folder = results_folder(given)
    if not folder.is_dir():
        raise UserFileNotFoundError(
            f"run {given!r} does not exist{did_you_mean(Path(given))}; expected a run folder with "
            f"results.json, or a weights file whose results are in {folder}"
        )
    headline = {Measure.of(result): result for result in read_results(folder) if result.headline}
    if not headline:
        raise UserError(
            f"{folder} has no headline result; run `dino-sparo knn` with k 20 or `dino-sparo linear` first"
        )
    path = folder / CONFIG_FILE
    if not path.exists():
        return EvaluatedRun(folder, None, None, headline, name=_name(given))
    remedy = "restore the recipe of this run, or remove it to compare the run without a recipe"
    try:
        config = read_sections(path)
    except UserError as error:
        raise UserError(f"{error}; {remedy}") from error
    seed, every = config.get("seed"), flattened(config)
    if seed is not None and not isinstance(seed, int):
        raise UserError(f"{path}: seed is {shown(repr(seed))}; expected a whole number; {remedy}")
    # Older versions did not write all options that are null by default, and some by their values.
    recipe = {
        key: value
        for key, value in flattened(config, without=NOT_RECIPE).items()
        if value is not None and (key, value) not in AS_NULL
    }
    images = " ".join(str(every[key]) for key in ("data.path", "data.train") if every.get(key) is not None)
    return EvaluatedRun(folder, recipe, seed, headline, images=images)


def _name(given: str) -> str:
    """The name of a run: that of its folder or of the file of its weights, or `timm:NAME`."""
    path = Path(given)
    return path.resolve().name if path.is_dir() else path.name


def group_runs(runs: Sequence[EvaluatedRun]) -> list[Group]:
    """Group runs by recipe, in the order of the first run of each; runs without a recipe are not grouped.

    Images in several places count as the same, unless a seed occurs with several of them.

    Raises:
        UserError: a run is given twice, or two runs are the same seed of one recipe on the same images.
    """
    recipes = [json.dumps(one.recipe, sort_keys=True, default=str) for one in runs]
    places: dict[tuple[str, Any], set[str]] = {}
    for recipe, one in zip(recipes, runs, strict=True):
        places.setdefault((recipe, one.seed), set()).add(one.images)
    apart = {recipe for (recipe, _), of_seed in places.items() if len(of_seed) > 1}
    members: dict[str, list[EvaluatedRun]] = {}
    for recipe, one in zip(recipes, runs, strict=True):
        key = f"{recipe} {one.images if recipe in apart else ''}" if one.recipe else str(one.folder.resolve())
        for other in members.setdefault(key, []):
            if other.folder.resolve() == one.folder.resolve():
                raise UserError(f"run {str(one.folder)!r} is given twice; give it once")
            if other.seed is not None and other.seed == one.seed:
                raise UserError(
                    f"runs {str(other.folder)!r} and {str(one.folder)!r} have the same recipe and seed "
                    f"{one.seed}; leave one of them out"
                )
        members[key].append(one)
    labels = _labels([of_one[0] for of_one in members.values()])
    return [Group(label, of_one) for label, of_one in zip(labels, members.values(), strict=True)]


def _labels(firsts: Sequence[EvaluatedRun]) -> list[str]:
    """The read-out and the fields in which recipes of the same read-out differ; else the folder's name."""
    labels = []
    for one in firsts:
        if one.recipe is None or READOUT not in one.recipe:
            labels.append(one.name or one.folder.resolve().name)
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

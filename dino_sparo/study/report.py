"""The page of a study: differences to the control, seeds, curves, and cost, as Markdown, JSON, and PNG."""

import json
import shlex
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from dino_sparo.evaluation.compare import (
    DIFFERENCES,
    NOTHING,
    Comparison,
    EvaluatedRun,
    Group,
    Measure,
    compare_groups,
    measures_of,
    title,
)
from dino_sparo.evaluation.knn import KNN
from dino_sparo.evaluation.linear import OFFICIAL
from dino_sparo.files import write_figure
from dino_sparo.runs.rundir import read_starts
from dino_sparo.runs.runlog import each_metric
from dino_sparo.slots.curves import COLORS, MARKERS
from dino_sparo.study.training import EPOCHS, SIZES, sizes, write_files
from dino_sparo.terminal import markdown_table, shown

PAGE, JSON_FILE, CURVES = "study.md", "study.json", "curves.png"
COST_REMARK = (
    "Minutes and images/s include loading, but not k-NN, checkpoints, and the start of a run. Runs that were "
    "trained at the same time shared the machine."
)


@dataclass(frozen=True)
class Training:
    """Values from the log of a run."""

    curve: dict[float, float]
    """20-NN top-1 in percent by epoch."""
    seconds: float
    """Time of all steps with loading, without k-NN and checkpoints."""
    images_per_second: float
    """Mean over these seconds."""


def training_of(run: EvaluatedRun) -> Training:
    """Read a run's log. Steps repeated after a stop count once; steps without an entry count as the mean."""
    assert run.recipe is not None
    batch_size = run.recipe["optim.global_batch_size"]
    curve, seconds, images, steps = {}, 0.0, 0.0, 0
    for entry in each_metric(run.folder):
        if KNN in entry:
            curve[float(entry["epoch"])] = entry[KNN]
        if {"seconds", "images_per_second"} <= entry.keys():
            seconds += entry["seconds"]
            images += entry["seconds"] * entry["images_per_second"]
            steps = entry["step"]
    speed = images / seconds if seconds else 0.0
    return Training(curve, batch_size * steps / speed if speed else 0.0, speed)


def write_report(
    folder: Path,
    control: str,
    groups: Sequence[Group],
    costs: Sequence[dict[str, Any]],
    missing: Sequence[str],
) -> Comparison:
    """Write `study.md`, `study.json` and `curves.png`; returns the table of means and differences.

    Args:
        control: label of the control's row.
        groups: the rows of the study with their runs.
        costs: parameters and FLOPs by row, from `training.table`.
        missing: lines about runs that are not on the page.
    """
    group = next((group for group in groups if group.label == control), None)
    remark = DIFFERENCES if group else f"no differences: no run of the control {control!r} is complete"
    comparison = compare_groups(groups, group, remark)
    trainings = {run.folder: training_of(run) for group in groups for run in group.runs}
    measures = measures_of(groups)
    official = any(measure.protocol == OFFICIAL for measure in measures)
    parts = ["# Study", *about(list(trainings), official), "## Means and differences", comparison.markdown()]
    parts += ["## Missing runs", "\n".join(f"- {line}" for line in missing)] if missing else []
    parts += ["## Every seed", seeds_table(groups, measures)]
    parts += ["## 20-NN during training", f"![20-NN over epochs]({CURVES})", curve_table(groups, trainings)]
    parts += ["## Cost", cost_table(groups, trainings, costs), COST_REMARK]
    parts += ["## Selected probes", probes_table(groups, measures)]
    data = json.dumps(as_json(groups, trainings), indent=1) + "\n"
    write_files(folder, {PAGE: "\n\n".join(parts) + "\n", JSON_FILE: data})
    write_figure(folder / CURVES, curves_picture(groups, trainings))
    return comparison


def about(run_dirs: Sequence[Path], official_probe: bool) -> list[str]:
    """How the runs and this page were made, as paragraphs of Markdown."""
    starts = [start for run_dir in run_dirs for start in read_starts(run_dir)]
    made = {
        f"commit {start.get('git') or 'unknown'}, torch {start['versions']['torch']}, timm "
        f"{start['versions']['timm']}, {start['processes']} x {start['device']}, {start['precision']}"
        for start in starts
    }
    own = shlex.join(sys.argv[1:])
    others = dict.fromkeys(shlex.join(start["command"][1:]) for start in starts)
    others.pop(own, None)
    runs = [
        "Other commands that made its runs:",
        "\n".join(f"- `dino-sparo {command}`" for command in others),
    ]
    selected = (
        f"Probes are trained on cached center crops for {EPOCHS} epochs, which is not the official protocol. "
        f"The selected probe has the best mean accuracy over seeds on a held-out fifth of the train images; "
        f"all held-out labels are used, also for a smaller train fraction. An encoder with slots has more "
        f"probes to select from: the encoding, CLS tokens of blocks, or both."
    )
    probes = "The linear probe is that of the official protocol." if official_probe else selected
    return [
        f"This page was made by `dino-sparo {own}`.",
        *(runs if others else []),
        "\n".join(f"- {one}" for one in sorted(made)),
        f"The teacher is evaluated. {probes}",
    ]


def seeds_table(groups: Sequence[Group], measures: Sequence[Measure]) -> str:
    """A table of each run's accuracies."""
    rows = []
    for group in groups:
        for run in group.runs:
            found = (run.headline.get(measure) for measure in measures)
            cells = [f"{result.top1:.2f}" if result else NOTHING for result in found]
            rows.append([group.label, str(run.seed), *cells])
    return markdown_table(["top-1 in %", "seed", *(title(measure, groups) for measure in measures)], rows)


def curve_table(groups: Sequence[Group], trainings: dict[Path, Training]) -> str:
    """A table of 20-NN by epoch, mean and standard deviation over seeds."""
    epochs = sorted({epoch for training in trainings.values() for epoch in training.curve})
    rows = []
    for group in groups:
        curves = [trainings[run.folder].curve for run in group.runs]
        known = [[curve[epoch] for curve in curves if epoch in curve] for epoch in epochs]
        rows.append([group.label, *map(mean_and_deviation, known)])
    return markdown_table(["20-NN in %, after epoch", *(f"{epoch:g}" for epoch in epochs)], rows)


def cost_table(
    groups: Sequence[Group], trainings: dict[Path, Training], costs: Sequence[dict[str, Any]]
) -> str:
    """A table of parameters, FLOPs, and training time."""
    by_row = {cost["variant"]: cost for cost in costs}
    rows = []
    for group in groups:
        cost, of_runs = by_row[group.label], [trainings[run.folder] for run in group.runs]
        minutes = mean_and_deviation([training.seconds / 60 for training in of_runs])
        speed = mean_and_deviation([training.images_per_second for training in of_runs])
        flops = f"{cost['flops'] / 1e9:.4g}"
        rows.append([group.label, str(cost["embed_dim"]), *sizes(cost), flops, minutes, speed])
    times = ("GFLOPs per image", "minutes of training", "images/s")
    return markdown_table(["", "encoding dimension", *SIZES, *times], rows)


def probes_table(groups: Sequence[Group], measures: Sequence[Measure]) -> str:
    """A table of the selected probes by row of the study."""
    linear = [measure for measure in measures if measure.protocol != "knn"]
    rows = []
    for group in groups:
        found = [group.results(measure) for measure in linear]
        rows.append([group.label, *(results[0].name if results else NOTHING for results in found)])
    return markdown_table(["", *(title(measure, groups) for measure in linear)], rows)


def curves_picture(groups: Sequence[Group], trainings: dict[Path, Training]) -> Figure:
    """20-NN over epochs: the mean over seeds of each row as a thick line, seeds as thin lines."""
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axis = figure.subplots()
    for number, group in enumerate(groups):
        color, marker = COLORS[number % len(COLORS)], MARKERS[number % len(MARKERS)]
        label = f"{shown(group.label)} ({len(group.runs)} seed{'s' if len(group.runs) > 1 else ''})"
        curves = [trainings[run.folder].curve for run in group.runs]
        shared = sorted(set.intersection(*(set(curve) for curve in curves)))
        means = [statistics.fmean(curve[epoch] for curve in curves) for epoch in shared]
        axis.plot(shared, means, marker=marker, color=color, linewidth=2, markersize=4, label=label)
        for curve in curves if len(curves) > 1 else ():
            axis.plot(list(curve), list(curve.values()), color=color, linewidth=0.7, alpha=0.5)
    axis.set(xlabel="epoch", ylabel="20-NN top-1, %", title="20-NN of the teacher during training")
    for text in figure.legend(loc="outside right upper", fontsize=8).get_texts():
        text.set_parse_math(False)  # a name with $ is no formula
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.grid(alpha=0.3)
    return figure


def as_json(groups: Sequence[Group], trainings: dict[Path, Training]) -> dict[str, Any]:
    """The data of the tables as JSON values, by row and run."""
    return {
        group.label: [
            {
                "run": str(run.folder),
                "seed": run.seed,
                **asdict(trainings[run.folder]),
                "results": [
                    {
                        "data": measure.test_set,
                        "protocol": measure.protocol,
                        "train_fraction": measure.train_fraction,
                        "setting": result.name,
                        "num_train": result.details["num_train"],
                        "num_images": result.num_images,
                        "top1": result.top1,
                        "top5": result.top5,
                    }
                    for measure, result in run.headline.items()
                ],
            }
            for run in group.runs
        ]
        for group in groups
    }


def mean_and_deviation(values: Sequence[float]) -> str:
    """`mean ± sample standard deviation`; without the latter for a single value."""
    if not values:
        return NOTHING
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.1f}{spread}"

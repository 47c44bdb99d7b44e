"""The page of a study: differences to the control, every seed, curves, cost; Markdown, JSON and a picture."""

import json
import shlex
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from dino_sparo.evaluation.compare import (
    DIFFERENCES,
    Comparison,
    Group,
    Measure,
    Run,
    compare_groups,
    measures_of,
    title,
)
from dino_sparo.evaluation.knn import KNN
from dino_sparo.runs.rundir import read_starts
from dino_sparo.runs.runlog import each_metric
from dino_sparo.slots.curves import COLORS, MARKERS
from dino_sparo.study.measuring import EPOCHS
from dino_sparo.study.training import SIZES, sizes, write_files
from dino_sparo.terminal import markdown_table

PAGE, JSON_FILE, CURVES = "study.md", "study.json", "curves.png"
NOT_THERE = "–"
PROGRAM = "dino-sparo"
COST_REMARK = (
    "Minutes and images/s are those of the steps, with loading, without k-NN, checkpoints and start. Runs "
    "that were trained side by side shared the machine."
)


@dataclass(frozen=True)
class Training:
    """What a run has logged while it learned."""

    curve: dict[float, float]
    """The monitor's 20-NN top-1 in per cent by epoch."""
    seconds: float
    """Of all steps together, with loading; without k-NN and checkpoints."""
    images_per_second: float
    """The mean over these."""


def training_of(run: Run) -> Training:
    """Read a run's log. Steps done again after a stop count once; those no entry is about, as the mean."""
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
        control: the row that differences are to.
        groups: the rows of the study, with their runs.
        costs: by row parameters and FLOPs, as in `training.table`.
        missing: lines on runs that are not here.
    """
    group = next((group for group in groups if group.label == control), None)
    remark = DIFFERENCES if group else f"no differences: no run of the control {control!r} is complete"
    comparison = compare_groups(groups, group, remark)
    trainings = {run.folder: training_of(run) for group in groups for run in group.runs}
    measures = measures_of(groups)
    parts = ["# Study", *about(list(trainings)), "## Means and differences", comparison.markdown()]
    parts += ["## Runs that are not here", "\n".join(f"- {line}" for line in missing)] if missing else []
    parts += ["## Every seed", seeds_table(groups, measures)]
    parts += ["## 20-NN while training", f"![20-NN over epochs]({CURVES})", curve_table(groups, trainings)]
    parts += ["## Cost", cost_table(groups, trainings, costs), COST_REMARK]
    parts += ["## Probes that were chosen", probes_table(groups, measures)]
    contents: dict[str, str | bytes] = {
        PAGE: "\n\n".join(parts) + "\n",
        JSON_FILE: json.dumps(as_json(groups, trainings), indent=1) + "\n",
        CURVES: curves_picture(groups, trainings),
    }
    write_files(folder, contents)
    return comparison


def about(run_dirs: Sequence[Path]) -> list[str]:
    """How the runs and this page were made, in lines of Markdown."""
    starts = [start for run_dir in run_dirs for start in read_starts(run_dir)]
    made = {
        f"commit {start.get('git') or 'unknown'}, torch {start['versions']['torch']}, timm "
        f"{start['versions']['timm']}, {start['processes']} x {start['device']}, {start['precision']}"
        for start in starts
    }
    commands = dict.fromkeys(shlex.join(start["command"][1:]) for start in starts)
    return [
        f"This page is by `{PROGRAM} {shlex.join(sys.argv[1:])}`, its runs by",
        "\n".join(f"- `{PROGRAM} {command}`" for command in commands),
        "\n".join(f"- {one}" for one in sorted(made)),
        f"Teachers are evaluated. Probes learn from cached center crops for {EPOCHS} epochs, which is not "
        f"the official protocol. The one that is shown was the best, in the mean over seeds, on a fifth of "
        f"the train images held out, with all of their labels also where it learns from a share. An encoder "
        f"with slots has more probes to choose from than one without: encoding, tokens of blocks, or both.",
    ]


def seeds_table(groups: Sequence[Group], measures: Sequence[Measure]) -> str:
    """Each run's accuracies."""
    rows = []
    for group in groups:
        for run in group.runs:
            found = (run.headline.get(measure) for measure in measures)
            cells = [f"{result.top1:.2f}" if result else NOT_THERE for result in found]
            rows.append([group.label, str(run.seed), *cells])
    return markdown_table(["top-1 in %", "seed", *(title(measure, groups) for measure in measures)], rows)


def curve_table(groups: Sequence[Group], trainings: dict[Path, Training]) -> str:
    """20-NN by epoch, the mean over seeds and their standard deviation."""
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
    """Size, operations, and how long the runs took."""
    by_row = {cost["variant"]: cost for cost in costs}
    rows = []
    for group in groups:
        cost, of_runs = by_row[group.label], [trainings[run.folder] for run in group.runs]
        minutes = mean_and_deviation([training.seconds / 60 for training in of_runs])
        speed = mean_and_deviation([training.images_per_second for training in of_runs])
        flops = f"{cost['flops'] / 1e9:.4g}"
        rows.append([group.label, str(cost["embed_dim"]), *sizes(cost), flops, minutes, speed])
    times = ("GFLOPs per image", "minutes of training", "images/s")
    return markdown_table(["", "numbers of an encoding", *SIZES, *times], rows)


def probes_table(groups: Sequence[Group], measures: Sequence[Measure]) -> str:
    """Which probe was the best on train images held out, by row of the study."""
    linear = [measure for measure in measures if measure.protocol != "knn"]
    rows = []
    for group in groups:
        found = [group.results(measure) for measure in linear]
        rows.append([group.label, *(results[0].name if results else NOT_THERE for results in found)])
    return markdown_table(["", *(title(measure, groups) for measure in linear)], rows)


def curves_picture(groups: Sequence[Group], trainings: dict[Path, Training]) -> bytes:
    """A PNG: 20-NN over epochs, thick the mean over seeds of each row, thin each seed."""
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axis = figure.subplots()
    for number, group in enumerate(groups):
        color, marker = COLORS[number % len(COLORS)], MARKERS[number % len(MARKERS)]
        label = f"{group.label} ({len(group.runs)} seed{'s' if len(group.runs) > 1 else ''})"
        curves = [trainings[run.folder].curve for run in group.runs]
        shared = sorted(set.intersection(*(set(curve) for curve in curves)))
        means = [statistics.fmean(curve[epoch] for curve in curves) for epoch in shared]
        axis.plot(shared, means, marker=marker, color=color, linewidth=2, markersize=4, label=label)
        for curve in curves if len(curves) > 1 else ():
            axis.plot(list(curve), list(curve.values()), color=color, linewidth=0.7, alpha=0.5)
    axis.set(xlabel="epoch", ylabel="20-NN top-1, per cent", title="20-NN of the teacher while training")
    figure.legend(loc="outside right upper", fontsize=8)
    axis.grid(alpha=0.3)
    picture = BytesIO()
    figure.savefig(picture, dpi=110, format="png")
    return picture.getvalue()


def as_json(groups: Sequence[Group], trainings: dict[Path, Training]) -> dict[str, Any]:
    """What the tables are made of as plain values, by row and run."""
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
    """`mean ± sample standard deviation`, the latter of two or more."""
    if not values:
        return NOT_THERE
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.1f}{spread}"

"""Evaluation of all checkpoints of a run: a table, and a curve over steps."""

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from dino_sparo.errors import UserError
from dino_sparo.evaluation.results import Result, standard_error
from dino_sparo.files import write_figure
from dino_sparo.interop.load import load_encoder
from dino_sparo.models import Encoder
from dino_sparo.runs.checkpoint import checkpoints_of, step_of
from dino_sparo.terminal import shown

log = logging.getLogger("dino_sparo")

CURVE_FILE = "knn_checkpoints.png"

Series = Mapping[int, Sequence[Result]]  # results by step, oldest first


def of_checkpoints(
    run_dir: Path, which: str, evaluate: Callable[[Encoder], Sequence[Result]]
) -> dict[int, Sequence[Result]]:
    """Evaluate each checkpoint of a run; damaged ones are skipped with a warning.

    Raises:
        UserError: no checkpoint can be loaded, or raised by `evaluate`.
    """
    found = {}
    for path in checkpoints_of(run_dir):
        try:
            encoder = load_encoder(path, which)
        except UserError as error:
            log.warning("WARNING: %s; it is skipped", error)
            continue
        log.info("evaluating %s", path)
        found[step_of(path)] = evaluate(encoder)
    if not found:
        raise UserError(
            f"checkpoints is 'all', but {run_dir} has no checkpoint that can be loaded; give a run folder "
            f"(log.keep_every_epochs says which checkpoints a run keeps)"
        )
    return found


def table(series: Series) -> str:
    """Top-1 by step, with a column for each result."""
    columns = [shown(f"{result.test_set} {result.name}") for result in next(iter(series.values()))]
    lines = [f"{'step':>10}" + "".join(f"{name:>{len(name) + 6}}" for name in columns)]
    for step, results in series.items():
        cells = zip(columns, results, strict=True)
        lines.append(
            f"{step:>10}" + "".join(f"{result.top1:>{len(name) + 4}.2f} %" for name, result in cells)
        )
    return "\n".join(lines)


def draw(series: Series, path: Path) -> None:
    """Write a PNG: top-1 over steps with its standard error; per test set the headline or first result."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axis = figure.subplots()
    some = next(iter(series.values()))
    numbers = {one.test_set: number for number, one in reversed(list(enumerate(some)))}
    numbers |= {one.test_set: number for number, one in enumerate(some) if one.headline}
    for test_set, number in numbers.items():
        of_set = [results[number] for results in series.values()]
        top1 = [one.top1 for one in of_set]
        errors = [standard_error(one.top1, one.num_images) for one in of_set]
        label = f"{of_set[0].name} on {shown(test_set)}, {of_set[0].num_images} images"
        axis.errorbar(list(series), top1, errors, marker=".", capsize=2, label=label)
    axis.set_xlabel("step")
    axis.set_ylabel("top-1, % (bars: one standard error)")
    axis.grid(alpha=0.3)
    axis.legend()
    write_figure(path, figure)

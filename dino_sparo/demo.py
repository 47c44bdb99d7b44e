"""The output of `dino-sparo demo`: a table, a curve, and slot maps; without labels, nearest neighbors."""

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dino_sparo.data.sources import ImageSource, evenly, open_images, spread_evenly
from dino_sparo.data.splits import Choice
from dino_sparo.evaluation.features import embed
from dino_sparo.evaluation.knn import HEADLINE_K, KNN
from dino_sparo.evaluation.results import standard_error
from dino_sparo.files import atomic_write
from dino_sparo.interop.load import load_encoder
from dino_sparo.runs.runlog import read_metrics
from dino_sparo.slots.curves import draw_curve, num_knn_images
from dino_sparo.slots.maps import look
from dino_sparo.slots.neighbors import draw_neighbors, nearest_neighbors
from dino_sparo.terminal import program

NUM_PICTURES, NUM_SLOTS = 6, 6
NUM_QUERIES, NUM_NEIGHBORS, NUM_SEARCHED = 4, 5, 1000
# As in eval/studies/demo.md.
CONTROL = "for comparison (measured once), without slots: 54.3 %, untrained 37.7 %"


def show_run(
    run_dir: Path,
    data_path: str,
    *,
    choice: Choice,
    max_images: int | None,
    with_slots: bool,
    control: str = "",
) -> None:
    """Print the k-NN accuracies of a complete run, and write pictures into its folder.

    Writes `curve.png`; with slots `slots.png`, attention of slots over images of `data_path`; without k-NN,
    which needs labels, `neighbors.png`.

    Args:
        max_images: number of images of `data_path` to use, at most.
        control: a sentence about the same run without slots, printed below the accuracies.
    """
    metrics = read_metrics(run_dir)
    evaluations = [entry for entry in metrics if KNN in entry]
    source = open_images(data_path, max_images, choice=choice)
    print()
    if evaluations:
        print(table(evaluations))
        if control:
            print(control)
    else:
        print(
            f"no {HEADLINE_K}-NN accuracy: it needs class folders, DIR/<class>/<image>, with at least "
            f"{HEADLINE_K} train images"
        )
    with atomic_write(run_dir / "curve.png") as file:
        draw_curve(metrics, file)
    print(f"\nlearning curve: {run_dir / 'curve.png'}")
    if not evaluations:
        draw_before_and_after(run_dir, source, run_dir / "neighbors.png")
        print(f"nearest neighbors before and after training: {run_dir / 'neighbors.png'}")
    dino_sparo = program("dino-sparo")
    if with_slots:
        numbers = spread_evenly(source, NUM_PICTURES)
        look(load_encoder(run_dir), source, numbers, num_slots=NUM_SLOTS).draw(run_dir / "slots.png")
        print(f"where slots look: {run_dir / 'slots.png'}")
        report = [dino_sparo, "slots", "report", str(run_dir), "--data.path", data_path]
        print(f"to make a page about the slots: {shlex.join(report)}")
    features = [dino_sparo, "embed", str(run_dir), "--data.path", data_path, "--out", "features.npz"]
    print(f"to write the features of all images to a file: {shlex.join(features)}")
    print(f"to see all curves: {shlex.join([program('tensorboard'), '--logdir', str(run_dir)])}")


def table(evaluations: Sequence[Mapping[str, Any]]) -> str:
    """20-NN accuracy by epoch, its gain by training, and whether the gain is significant."""
    accuracies, num_test = [entry[KNN] for entry in evaluations], num_knn_images(evaluations)
    errors = [standard_error(accuracy, num_test) for accuracy in accuracies] if num_test else []
    lines = [f"{'epoch':>6}{f'{HEADLINE_K}-NN top-1':>14}"]
    for number, (entry, accuracy) in enumerate(zip(evaluations, accuracies, strict=True)):
        error = f" ± {errors[number]:.1f}" if errors else ""
        lines.append(f"{entry['epoch']:>6.0f}{accuracy:>12.1f} %{error}")
    gain = accuracies[-1] - accuracies[0]
    lines.append(f"gain over the encoder before training: {gain:+.1f} points")
    if errors:
        lines[-1] += f", on {num_test} test images (± is one standard error)"
        chance = 2 * np.hypot(errors[0], errors[-1])
        if abs(gain) < chance:
            lines.append(f"not significant: less than two standard errors of the gain ({chance:.1f} points)")
    return "\n".join(lines)


def draw_before_and_after(run_dir: Path, source: ImageSource, path: Path) -> None:
    """Write a PNG: some images and their nearest neighbors by the untrained and the trained encoder."""
    source = evenly(source, NUM_SEARCHED)
    queries = spread_evenly(source, NUM_QUERIES)
    found = {}
    for when in ("untrained", "trained"):
        encoder = load_encoder(run_dir, untrained=when == "untrained")
        features = embed(encoder, source)
        found[when] = nearest_neighbors(features, queries, NUM_NEIGHBORS, device=encoder.device)
    draw_neighbors(found, queries, source, encoder, path)

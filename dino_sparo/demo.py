"""What `dino-sparo demo` shows of a run: a table, a curve and slot maps."""

import shlex
from pathlib import Path

from matplotlib.figure import Figure

from dino_sparo.data.sources import open_images
from dino_sparo.evaluation.knn import HEADLINE_K
from dino_sparo.interop.load import load_encoder
from dino_sparo.runs.runlog import read_metrics
from dino_sparo.slots.maps import look, spread_evenly

NUM_PICTURES, NUM_SLOTS = 6, 6
KNN = f"knn{HEADLINE_K}_top1"


def show_run(run_dir: Path, data_path: str, *, max_images: int | None, with_slots: bool) -> None:
    """Print the k-NN accuracies of a complete run, and write `curve.png` and with slots `slots.png` there.

    Attention of the slots that look at the most different places is drawn over some of at most `max_images`
    images of `data_path`.
    """
    metrics = read_metrics(run_dir)
    print_table(metrics)
    draw_curve(metrics, run_dir / "curve.png")
    print(f"\nlearning curve: {run_dir / 'curve.png'}")
    if with_slots:
        source = open_images(data_path, max_images)
        numbers = spread_evenly(source, NUM_PICTURES)
        look(load_encoder(run_dir), source, numbers, num_slots=NUM_SLOTS).draw(run_dir / "slots.png")
        print(f"where slots look: {run_dir / 'slots.png'}")
        arguments = ["slots", "report", str(run_dir), "--data.path", data_path]
        print(f"all about slots, as a page: dino-sparo {shlex.join(arguments)}")
    print(f"more: tensorboard --logdir {run_dir}")


def print_table(metrics: list[dict[str, float]]) -> None:
    """20-NN before, during and after training."""
    evaluations = [entry for entry in metrics if KNN in entry]
    if not evaluations:
        return
    print(f"\n{'epoch':>6}{f'{HEADLINE_K}-NN top-1':>14}")
    for entry in evaluations:
        print(f"{entry['epoch']:>6.0f}{entry[KNN]:>12.1f} %")
    gain = evaluations[-1][KNN] - evaluations[0][KNN]
    print(f"trained over untrained encoder: {gain:+.1f} points")


def draw_curve(metrics: list[dict[str, float]], path: Path) -> None:
    """Loss and 20-NN accuracy over epochs."""
    figure = Figure(figsize=(7, 3), layout="constrained")
    left, right = figure.subplots(1, 2)
    for axis, key, title in ((left, "loss", "DINO loss"), (right, KNN, f"{HEADLINE_K}-NN top-1, per cent")):
        entries = [entry for entry in metrics if key in entry]
        axis.plot(
            [e["epoch"] for e in entries], [e[key] for e in entries], marker="." if key == KNN else None
        )
        axis.set_title(title)
        axis.set_xlabel("epoch")
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=110)

"""`dino-sparo demo`: pretrain a small encoder, then a table, a curve and slot maps."""

import logging
import shlex
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure

from dino_sparo.data.generated import SHAPES, SHAPES_SIZES
from dino_sparo.data.images import normalize, to_tensor
from dino_sparo.data.pil_views import center_crop
from dino_sparo.data.sources import open_images
from dino_sparo.evaluation.knn import HEADLINE_K
from dino_sparo.interop.load import load_encoder
from dino_sparo.recipe.files import named_recipe
from dino_sparo.recipe.sections import Recipe
from dino_sparo.runs.runlog import read_metrics
from dino_sparo.slots.attention import distinct_slots, slot_attention
from dino_sparo.slots.drawing import draw_slot_maps
from dino_sparo.training.pretrain import pretrain

log = logging.getLogger("dino_sparo")

NUM_PICTURES, NUM_SLOTS, NUM_KNN_IMAGES = 6, 8, 2000
MIN_EPOCHS = 4  # on a folder of any size; the prototypes are frozen in the first
KNN = f"knn{HEADLINE_K}_top1"


def demo(recipe: Recipe, run_dir: Path, *, resume_unverified: bool = False) -> None:
    """Train by the recipe, then write `curve.png` and `slots.png` into the run folder and print a table.

    With the user's own folder the number of steps stays the recipe's, so that the demo stays as short.
    """
    if recipe.data.path != SHAPES:
        recipe = fit_to_folder(recipe)
    pretrain(recipe, run_dir, resume_unverified=resume_unverified)
    metrics = read_metrics(run_dir)
    print_table(metrics)
    draw_curve(metrics, run_dir / "curve.png")
    print(f"\nlearning curve: {run_dir / 'curve.png'}")
    if recipe.model.readout.name == "sparo":
        draw_maps(recipe, run_dir, run_dir / "slots.png")
        print(f"where slots look: {run_dir / 'slots.png'}")
        arguments = ["slots", "report", str(run_dir), "--data.path", recipe.data.path]
        print(f"all about slots, as a page: dino-sparo {shlex.join(arguments)}")
    print(f"more: tensorboard --logdir {run_dir}")


def fit_to_folder(given: Recipe) -> Recipe:
    """The recipe with other epochs and images, so that training sees as many images as it does of pictures.

    Of a large folder some images are taken, evenly spread, so that each is seen a few times. What the user
    has changed in the recipe stays.
    """
    recipe = named_recipe("demo", {})
    optim, monitor, data = replace(given.optim), replace(given.monitor), replace(given.data)
    source = open_images(data.path, data.max_images)
    if monitor.knn_images_per_class == recipe.monitor.knn_images_per_class:
        monitor.knn_images_per_class = max(HEADLINE_K, NUM_KNN_IMAGES // max(1, len(source.classes)))
    if optim.epochs == recipe.optim.epochs:
        budget = optim.epochs * SHAPES_SIZES["train"]
        data.max_images = min(len(source), max(1, budget // MIN_EPOCHS))
        optim.epochs = round(budget / data.max_images)
        stretch = optim.epochs / recipe.optim.epochs
        if optim.warmup_epochs == recipe.optim.warmup_epochs:
            optim.warmup_epochs = round(stretch * optim.warmup_epochs)
        if monitor.knn_every_epochs == recipe.monitor.knn_every_epochs:
            monitor.knn_every_epochs = max(1, round(stretch * monitor.knn_every_epochs))
    log.info(
        "%s: %d of its images, %d epochs",
        data.path,
        data.max_images or len(source),
        optim.epochs,
    )
    return replace(given, optim=optim, monitor=monitor, data=data)


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


def draw_maps(recipe: Recipe, run_dir: Path, path: Path) -> None:
    """Attention of some slots of the teacher over some images."""
    encoder = load_encoder(run_dir)
    source = open_images(recipe.data.path, recipe.data.max_images)
    chosen = np.linspace(0, len(source) - 1, NUM_PICTURES).round().astype(int)
    crops = [to_tensor(center_crop(source.load(int(i)), recipe.views.global_size)) for i in chosen]
    pixels = torch.stack(crops)
    maps, _ = slot_attention(encoder, normalize(pixels))
    draw_slot_maps(crops, list(maps), distinct_slots(list(maps), NUM_SLOTS), path)

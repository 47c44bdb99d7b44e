"""`dino-sparo demo`: the recipe, fitted to a folder of the user's, trained and shown."""

import logging
from dataclasses import replace
from pathlib import Path

from dino_sparo.cli.pretraining import PretrainOptions
from dino_sparo.recipe.files import named_recipe
from dino_sparo.recipe.readouts import READOUTS
from dino_sparo.recipe.sections import Recipe
from dino_sparo.recipe.typed import flattened

NUM_KNN_IMAGES = 2000
MIN_EPOCHS = 4  # on a folder of any size; the prototypes are frozen in the first

log = logging.getLogger("dino_sparo")


def demo(options: PretrainOptions) -> None:
    """Train by the recipe, then write `curve.png` and `slots.png` into the run folder and print a table.

    With the user's own folder the number of steps stays the recipe's, so that the demo stays as short.
    """
    from dino_sparo.data.generated import SHAPES
    from dino_sparo.data.splits import Choice
    from dino_sparo.demo import CONTROL, show_run
    from dino_sparo.training.pretrain import pretrain

    recipe = options if options.data.path == SHAPES else fitted_to_folder(options)
    pretrain(recipe, Path(options.run_dir), resume_unverified=options.resume_unverified)
    show_run(
        Path(options.run_dir),
        recipe.data.path,
        choice=Choice.of(recipe.data),
        max_images=recipe.data.max_images,
        with_slots=READOUTS[recipe.model.readout.name].has_slots,
        control=CONTROL if recipe.data.path == SHAPES and _is_shipped(recipe) else "",
    )


def _is_shipped(recipe: Recipe) -> bool:
    """Whether the experiment is that of the recipe as it is."""
    from dino_sparo.runs.rundir import NOT_EXPERIMENT

    both = (recipe, named_recipe("demo", {}))
    given, shipped = (flattened(each.as_dict(), without=NOT_EXPERIMENT) for each in both)
    return given == shipped


def fitted_to_folder(given: Recipe) -> Recipe:
    """The recipe with other epochs and images, so that training sees as many images as it does of pictures.

    Of a large folder some images are taken, evenly spread, so that each is seen a few times. What the user
    has changed in the recipe stays.
    """
    from dino_sparo.data.generated import SHAPES_SIZES
    from dino_sparo.data.sources import open_images
    from dino_sparo.data.splits import Choice
    from dino_sparo.evaluation.knn import HEADLINE_K

    recipe = named_recipe("demo", {})
    optim, monitor, data = replace(given.optim), replace(given.monitor), replace(given.data)
    source = open_images(data.path, data.max_images, choice=Choice.of(data))
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
    log.info("%s: %d of its images, %d epochs", data.path, data.max_images or len(source), optim.epochs)
    return replace(given, optim=optim, monitor=monitor, data=data)

"""What a study measures of an encoder: 20-NN, and linear probes, of which one is chosen.

Probes learn from cached centre crops. Each is trained twice: on four fifths of the train images and scored on
the others, which chooses a probe; and on all of them and scored on the test images, which is reported. So no
test image chooses anything. A share is drawn from those four fifths, and from all, alike.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from dino_sparo.data.sources import hold_out
from dino_sparo.evaluation import knn, linear
from dino_sparo.evaluation.linear_setup import Opened, open_all
from dino_sparo.evaluation.probe_data import balanced_fraction
from dino_sparo.evaluation.results import Result, save_results
from dino_sparo.evaluation.transfer import as_test_set
from dino_sparo.options import KnnOptions, LabelledDataOptions, LinearOptions
from dino_sparo.terminal import only_warnings

LEARNING_RATES = (0.001, 0.01, 0.1, 1.0)
EPOCHS = 100
MOST_A_BATCH = 256
FOLDER = "study"  # below a run folder
HELD_OUT = "held-out"


@dataclass(frozen=True)
class Probed:
    """Probes on one share of the train images: on those held out, and on test images, in the same order."""

    held_out: list[Result]
    test: list[Result]


@dataclass(frozen=True)
class Measured:
    """One encoder on one data set: 20-NN, and probes by share of the train images."""

    knn: Result
    probes: dict[float, Probed]


def measure(
    run_dir: Path,
    data: str,
    name: str,
    *,
    fractions: Sequence[float],
    seed: int,
    device: torch.device,
    num_workers: int | None,
    unverified: bool = False,
) -> Measured:
    """Evaluate the teacher of a run; results and classifiers go to `run_dir/study/name`.

    Features are kept in the run folder, and probes that are trained already are not trained again.

    Args:
        run_dir: a complete run.
        data: labelled images, with train and test images.
        name: of the data set.
        fractions: shares of the train images, above 0 and at most 1.
        seed: of the probes, and of which images a share has.
        device: where to compute.
        num_workers: that load images; None takes one a core.
        unverified: resume probes from checkpoints whose SHA-256 is missing.

    Raises:
        UserError: for images that cannot be read, or features that are not finite.
    """
    folder, cache = run_dir / FOLDER / name, str(run_dir / "features")
    where = LabelledDataOptions(data)
    with only_warnings():
        found = knn.evaluate(
            KnnOptions(run=str(run_dir), data=where, cache=cache, num_workers=num_workers, k=knn.HEADLINE_K),
            device,
        )
        save_results(folder, found)
        options = LinearOptions(
            run=str(run_dir),
            data=where,
            cached=True,
            sweep=True,
            learning_rates=list(LEARNING_RATES),
            epochs=EPOCHS,
            seed=seed,
            out=str(folder),
            cache=cache,
            num_workers=num_workers,
            resume_unverified=unverified,
        )
        opened = open_all(options, device)
        probes = {fraction: _probe(options, opened, fraction) for fraction in fractions}
    return Measured(found[0], probes)


def _probe(options: LinearOptions, opened: Opened, fraction: float) -> Probed:
    """The probes on a share of the train images, on those held out and on the test images."""
    classes = opened.train.classes
    rest, held_out = hold_out(opened.train)
    to_choose = replace(
        opened,
        train=balanced_fraction(rest, fraction, options.seed) if fraction < 1 else rest,
        test_sets=[as_test_set(HELD_OUT, held_out, classes)],
        folder=opened.folder / HELD_OUT,
    )
    to_report = opened
    if fraction < 1:
        to_report = replace(opened, train=balanced_fraction(opened.train, fraction, options.seed))
    batch = min(MOST_A_BATCH, 2 ** (len(to_choose.train).bit_length() - 1))
    given = replace(options, train_fraction=fraction, batch_size=batch)
    results = []
    for part in (to_choose, to_report):
        results.append(linear.train_all(given, part))
        save_results(part.folder, results[-1])
    return Probed(*results)


def choose(of_seeds: Sequence[Probed]) -> list[Result]:
    """The result on test images of that probe which is best in the mean on images held out, for each seed."""
    names = [result.name for result in of_seeds[0].held_out]
    sums = [sum(one.held_out[i].top1 for one in of_seeds) for i in range(len(names))]
    best = sums.index(max(sums))
    return [replace(one.test[best], headline=True) for one in of_seeds]

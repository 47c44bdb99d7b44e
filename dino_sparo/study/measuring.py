"""What a study measures of an encoder: 20-NN, and linear probes, of which one is chosen.

Probes learn from cached centre crops. Each is trained twice: on four fifths of the train images and scored on
the others, which chooses a probe; and on all of them and scored on the test images, which is reported. So no
test image chooses anything. A share is drawn from those four fifths, and from all, alike.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from dino_sparo.data.sources import ImageSource, hold_out
from dino_sparo.evaluation.knn import HEADLINE_K, knn_results
from dino_sparo.evaluation.linear import CACHED, cached_linear_probe, probe_folder
from dino_sparo.evaluation.probes import choose_probes
from dino_sparo.evaluation.results import Result, save_results
from dino_sparo.evaluation.transfer import TestSet, as_test_set, balanced_fraction, open_train_and_tests
from dino_sparo.interop.load import load_encoder
from dino_sparo.models import Encoder
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
    folder, cache = run_dir / FOLDER / name, run_dir / "features"
    with only_warnings():
        train, test_sets = open_train_and_tests(data)
        encoder = load_encoder(str(run_dir)).to(device)
        found = knn_results(encoder, train, test_sets, k=HEADLINE_K, cache=cache, num_workers=num_workers)
        save_results(folder, found)
        probes = {
            fraction: _probe(
                *(encoder, train, test_sets, folder, fraction),
                seed=seed,
                cache=cache,
                num_workers=num_workers,
                unverified=unverified,
            )
            for fraction in fractions
        }
    return Measured(found[0], probes)


def _probe(
    encoder: Encoder,
    train: ImageSource,
    test_sets: Sequence[TestSet],
    folder: Path,
    fraction: float,
    *,
    seed: int,
    cache: Path,
    num_workers: int | None,
    unverified: bool,
) -> Probed:
    """The probes on a share of the train images, on those held out and on the test images."""
    rest, held_out = hold_out(train)
    num_rest = len(balanced_fraction(rest, fraction, seed)) if fraction < 1 else len(rest)
    results = []
    for learned, scored, place in (
        (rest, [as_test_set(HELD_OUT, held_out, train.classes)], folder / HELD_OUT),
        (train, test_sets, folder),
    ):
        found = cached_linear_probe(
            *(encoder, learned, scored),
            place / probe_folder(CACHED, train_fraction=fraction, sweep=True),
            probes=choose_probes(encoder, learning_rates=LEARNING_RATES, sweep=True),
            epochs=EPOCHS,
            batch_size=min(MOST_A_BATCH, 2 ** (num_rest.bit_length() - 1)),
            train_fraction=fraction,
            seed=seed,
            cache=cache,
            num_workers=num_workers,
            resume_unverified=unverified,
        )
        save_results(place, found)
        results.append(found)
    return Probed(*results)


def choose(of_seeds: Sequence[Probed]) -> list[Result]:
    """The result on test images of that probe which is best in the mean on images held out, for each seed."""
    names = [result.name for result in of_seeds[0].held_out]
    sums = [sum(one.held_out[i].top1 for one in of_seeds) for i in range(len(names))]
    best = sums.index(max(sums))
    return [replace(one.test[best], headline=True) for one in of_seeds]

"""Evaluations of a study: 20-NN, and linear probes, of which one is selected.

Probes are trained on cached center crops, each twice: on four fifths of the train images, to select a probe
by its accuracy on the other fifth; and on all train images, to report its accuracy on the test images. The
selection uses no test image. A train fraction is drawn from the four fifths and from all train images.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from dino_sparo.data.sources import hold_out
from dino_sparo.data.splits import Choice
from dino_sparo.evaluation.knn import HEADLINE_K, knn_results
from dino_sparo.evaluation.linear import linear_probe
from dino_sparo.evaluation.results import Result, save_results
from dino_sparo.evaluation.transfer import VAL, as_test_set, balanced_fraction, open_train_and_tests
from dino_sparo.interop.load import load_encoder
from dino_sparo.parallel.device import choose_device
from dino_sparo.study.variants import Variant
from dino_sparo.terminal import only_warnings

LEARNING_RATES = (0.001, 0.01, 0.1, 1.0)
EPOCHS = 100
MAX_BATCH = 256
FOLDER = "study"  # in a run folder
HELD_OUT = "held-out"


@dataclass(frozen=True)
class Probed:
    """Results of all probes on held-out images and on test images, in the same order."""

    held_out: list[Result]
    test: list[Result]


@dataclass(frozen=True)
class Measured:
    """Results of an encoder on one dataset: 20-NN, and probes by train fraction."""

    knn: Result
    probes: dict[float, Probed]


def measure(
    variant: Variant, data: str, name: str, *, fractions: Sequence[float], unverified: bool = False
) -> Measured:
    """Evaluate the teacher of a complete run; results and classifiers go to `study/name` in its folder.

    Features are cached in the run folder, and complete probes are not trained again.

    Args:
        data: labeled train and test images.
        name: of the dataset.
        fractions: train fractions, above 0 and at most 1.
        unverified: resume probes from checkpoints whose SHA-256 is missing.

    Raises:
        UserError: an image cannot be read, or a feature is not finite.
    """
    seed, machine = variant.recipe.seed, variant.recipe.machine
    folder, cache = variant.run_dir / FOLDER / name, variant.run_dir / "features"
    reading: dict[str, Any] = {"cache": cache, "num_workers": machine.num_workers}
    with only_warnings():
        choice = Choice.of(variant.recipe.data)
        train, test_sets = open_train_and_tests(data, choice=choice if name == VAL else choice.of_pixels)
        rest, held_out = hold_out(train)
        encoder = load_encoder(str(variant.run_dir)).to(choose_device(machine.device))
        knn = knn_results(encoder, train, test_sets, k=HEADLINE_K, **reading)
        save_results(folder, knn)
        probes = {}
        for fraction in fractions:
            num_rest = len(balanced_fraction(rest, fraction, seed)) if fraction < 1 else len(rest)
            found = []
            for learned, scored, place in (
                (rest, [as_test_set(HELD_OUT, held_out, train.classes)], folder / HELD_OUT),
                (train, test_sets, folder),
            ):
                results = linear_probe(
                    *(encoder, learned, scored, place),
                    cached=True,
                    learning_rates=LEARNING_RATES,
                    sweep=True,
                    epochs=EPOCHS,
                    batch_size=min(MAX_BATCH, 2 ** (num_rest.bit_length() - 1)),
                    train_fraction=fraction,
                    seed=seed,
                    resume_unverified=unverified,
                    **reading,
                )
                save_results(place, results)
                found.append(results)
            probes[fraction] = Probed(*found)
    return Measured(knn[0], probes)


def choose(of_seeds: Sequence[Probed]) -> list[Result]:
    """Each seed's test result of the probe with the best mean accuracy over seeds on held-out images."""
    names = [result.name for result in of_seeds[0].held_out]
    sums = [sum(one.held_out[i].top1 for one in of_seeds) for i in range(len(names))]
    best = sums.index(max(sums))
    return [replace(one.test[best], headline=True) for one in of_seeds]

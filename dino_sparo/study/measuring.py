"""What a study measures of an encoder: 20-NN, and linear probes, of which one is chosen.

Probes learn from cached center crops. Each is trained twice: on four fifths of the train images and scored on
the others, which chooses a probe; and on all of them and scored on the test images, which is reported. So no
test image chooses anything. A share is drawn from those four fifths, and from all, alike.
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
    variant: Variant, data: str, name: str, *, fractions: Sequence[float], unverified: bool = False
) -> Measured:
    """Evaluate the teacher of a complete run; results and classifiers go to `study/name` of its folder.

    Features are kept in the run folder, and probes that are trained already are not trained again.

    Args:
        data: labeled images, with train and test images.
        name: of the data set.
        fractions: shares of the train images, above 0 and at most 1.
        unverified: resume probes from checkpoints whose SHA-256 is missing.

    Raises:
        UserError: for images that cannot be read, or features that are not finite.
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
                    batch_size=min(MOST_A_BATCH, 2 ** (num_rest.bit_length() - 1)),
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
    """The result on test images of that probe which is best in the mean on images held out, for each seed."""
    names = [result.name for result in of_seeds[0].held_out]
    sums = [sum(one.held_out[i].top1 for one in of_seeds) for i in range(len(names))]
    best = sums.index(max(sums))
    return [replace(one.test[best], headline=True) for one in of_seeds]

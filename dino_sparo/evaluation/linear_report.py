"""What probes got right, as results to keep and as a table to read."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from dino_sparo.evaluation.classifiers import SavedClassifier
from dino_sparo.evaluation.features import hash_of_images
from dino_sparo.evaluation.probes import Probe
from dino_sparo.evaluation.results import Result
from dino_sparo.evaluation.transfer import VAL, TestSet


def results_of(
    saved: Sequence[SavedClassifier],
    right: NDArray[np.bool_],
    test_set: TestSet,
    *,
    classes: Sequence[str],
    official: Probe,
    weights: str,
) -> list[Result]:
    """One result a probe.

    Args:
        saved: P probes.
        right: whether top-1 and top-5 of each image are right, (N, P, 2).
        test_set: N images.
        classes: class names of training by number.
        official: the probe that is the headline.
        weights: teacher, student or untrained.
    """
    results = []
    images = hash_of_images(test_set.source)  # once: it looks at every file
    for number, classifier in enumerate(saved):
        of_class = {
            classes[c]: 100 * float(right[test_set.labels == c, number, 0].mean())
            for c in np.unique(test_set.labels).tolist()
        }
        name = classifier.probe.name
        if "weights_file" in classifier.details:  # which do not tell how fast they were learnt
            name = name.partition(" lr ")[0]
        result = Result(
            protocol=classifier.details["protocol"],
            name=name,
            headline=classifier.probe == official,
            test_set=test_set.name,
            weights=weights,
            top1=100 * float(right[:, number, 0].mean()),
            top5=100 * float(right[:, number, 1].mean()),
            num_images=len(test_set.labels),
            num_classes=len(test_set.classes),
            details=classifier.details | {"remark": test_set.describe(), "top1_by_class": of_class},
            correct=right[:, number, 0],
            images=images,
        )
        results.append(result)
    return results


def table(run: str, results: Sequence[Result]) -> str:
    """The results of one call as lines of text; `best` is the highest top-1 on val after any epoch."""
    lines: list[str] = []
    width = max(len(result.name) for result in results)
    for before, result in zip([None, *results], results, strict=False):
        details = result.details
        if before is None or result.test_set != before.test_set:
            what, trained = "linear probe", ""
            counts = f"{result.num_images} test images, {result.num_classes} classes"
            if details["protocol"] == "linear-cached":
                what += " on cached centre crops (not the official protocol)"
            if "weights_file" in details:
                what += f" of {details['weights_file']}"
            else:
                counts = f"{details['num_train']} train and {counts}"
                trained = f", {details['epochs']} epochs, batch {details['batch_size']}"
            lines.append(f"{run} ({result.weights}), {what}, {result.test_set}: {counts}{trained}")
            lines += [details["remark"]] if details["remark"] else []
        best = ""
        if result.test_set == VAL and "best_val_top1" in details:
            best = f"   best {details['best_val_top1']:6.2f} % (epoch {details['best_val_epoch']})"
        lines.append(
            f"{result.name:<{width}}   top-1 {result.top1:6.2f} %   top-5 {result.top5:6.2f} %"
            f"{best}{'   <- headline' if result.headline else ''}"
        )
    return "\n".join(lines)

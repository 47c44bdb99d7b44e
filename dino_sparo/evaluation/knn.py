"""Weighted k-nearest-neighbor classification by exact search. Source: official `eval_knn.py`.

Axis letters: T train images, B test images, D feature dimensions, S classes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dino_sparo.data.sources import ImageSource
from dino_sparo.errors import UserError
from dino_sparo.evaluation.features import Wanted, cached_features, hash_of, hash_of_images
from dino_sparo.evaluation.results import Result, accuracies, result_on
from dino_sparo.evaluation.search import NoDirectionError, nearest
from dino_sparo.evaluation.transfer import VAL, TestSet, as_test_sets, restrict
from dino_sparo.models import Encoder
from dino_sparo.parallel.distributed import gather_rows, rank, world_size
from dino_sparo.terminal import log, shown

HEADLINE_K = 20
KNN, KNN_TOP5 = f"knn{HEADLINE_K}_top1", f"knn{HEADLINE_K}_top5"  # keys of metrics.jsonl
KNN_IMAGES = f"knn{HEADLINE_K}_images"
PROTOCOL_K = (10, 20, 100, 200)
TEMPERATURE = 0.07
TOP = 5
SHOWN_CLASSES = 3
VOTE_CHUNK = 256  # test images classified at a time; changes memory, not the result


@dataclass(frozen=True)
class KnnResult:
    """Accuracies in percent over `num_images` test images."""

    top1: float
    top5: float
    num_images: int


@torch.no_grad()
def knn_classify(
    train_features: Tensor | NDArray,
    train_labels: Tensor | NDArray,
    test_features: Tensor | NDArray,
    test_labels: Tensor | NDArray,
    k: int | Integral | Sequence[int],
    temperature: float = TEMPERATURE,
    num_classes: int | None = None,
) -> dict[int, KnnResult]:
    """Accuracy of a vote of the k nearest train images, each weighted by exp(cosine / temperature).

    The search is exact and runs on the device of the features. Top-5 uses the first min(5, k) ranked classes,
    as the official code does; classes with equal votes, including zero, are ranked by class number.

    Args:
        train_features: (T, D) floating point, l2-normalized inside; a tensor or an array, also memory-mapped.
        train_labels: (T,) integers from 0.
        test_features: (B, D).
        test_labels: (B,).
        k: one or several numbers of neighbors.
        num_classes: S. None: the largest label + 1.

    Raises:
        ValueError: k is not in 1 to T, there are no test images or too few or many labels, or a feature is
            zero or not finite.
    """
    labels, truth = (torch.as_tensor(labels).long().cpu() for labels in (train_labels, test_labels))
    ks = _checked(k, len(train_features))
    if not len(test_features):
        raise ValueError("there are no test images to classify")
    if (len(labels), len(truth)) != (len(train_features), len(test_features)):
        raise ValueError(
            f"there are {len(labels)} labels of {len(train_features)} train images and {len(truth)} of "
            f"{len(test_features)} test images; expected one per image"
        )
    if num_classes is None:
        num_classes = int(max(labels.max(), truth.max())) + 1
    device = train_features.device if isinstance(train_features, Tensor) else torch.device("cpu")
    cosine_Bk, number_Bk = nearest(train_features, test_features, max(ks), device=device)
    ranked = rank_classes(cosine_Bk, labels[number_Bk], ks, temperature, num_classes)
    return {number: _accuracy(ranked_B5, truth) for number, ranked_B5 in ranked.items()}


def evaluate_knn(
    encoder: Encoder,
    train: ImageSource,
    test: ImageSource,
    *,
    k: int | Sequence[int] = HEADLINE_K,
    left_out: dict[str, str] | None = None,
    **settings: Any,
) -> dict[int, KnnResult]:
    """k-NN accuracy of an encoder with all features in memory, for the monitor of a training run.

    All processes share the work and return the result; every test image counts once.

    Args:
        left_out: filled with the images that cannot be read, name -> reason. None: such an image is an error.
        settings: keyword arguments of `cached_features`.

    Raises:
        NoDirectionError: a feature is zero or not finite.
        UserError: k is not in 1 to the number of train images, or an image cannot be read.
    """
    ks = _checked(k, len(train))
    wanted = [
        Wanted(source, f"k-NN {name} features", left_out=None if left_out is None else {})
        for name, source in (("train", train), ("val", test))
    ]
    found = cached_features(encoder, wanted, ["encoding"], **settings)
    (train, gallery), (test, queries) = (
        _readable(one, features["encoding"], left_out) for one, features in zip(wanted, found, strict=True)
    )
    _checked(ks, len(train))
    if not len(test):
        raise UserError(f"none of the {len(wanted[1].source)} test images can be read; repair them")
    ranked = _ranked_by_all(gallery, train, queries, ks, encoder.device)
    return {number: _accuracy(ranked[number], torch.from_numpy(test.labels)) for number in ks}


def _readable(
    one: Wanted, features: NDArray[Any], left_out: dict[str, str] | None
) -> tuple[ImageSource, NDArray[Any]]:
    """The images that could be read and their features; the others are added to `left_out`."""
    if not one.left_out or left_out is None:
        return one.source, features
    left_out.update((one.source.name(number), reason) for number, reason in one.left_out.items())
    kept = np.setdiff1d(np.arange(len(one.source)), list(one.left_out))
    return one.source.subset(kept), features[kept]


def knn_results(
    encoder: Encoder,
    train: ImageSource,
    test: ImageSource | Sequence[TestSet],
    *,
    k: int | Sequence[int] | None = None,
    feature: str = "encoding",
    weights: str = "teacher",
    by_faiss: bool = False,
    cache_precision: str = "float16",
    **settings: Any,
) -> list[Result]:
    """k-NN accuracies of an encoder on test sets, as results to save; all processes share the work.

    Args:
        test: labeled images, or several test sets.
        k: numbers of neighbors. None: those of 10, 20, 100, 200 that are at most the number of train images.
        feature: a name of `Encoder.features`.
        weights: name of the encoder in the results: teacher, student, or untrained.
        by_faiss: search with faiss on the CPU, as an independent check.
        cache_precision: dtype of the features on disk.
        settings: keyword arguments of `cached_features`.

    Raises:
        UserError: k is not in 1 to the number of train images, an image cannot be read, or a feature is zero
            or not finite.
    """
    if k is None or k == []:
        k = [number for number in PROTOCOL_K if number <= len(train)] or [len(train)]
        if k != list(PROTOCOL_K):
            log.info("k is %s instead of 10, 20, 100, 200: there are %d train images", k, len(train))
    ks = _checked(k, len(train))
    test_sets = as_test_sets(test, train.classes)
    wanted = [Wanted(train, "train features", cache_precision)]
    wanted += [Wanted(one.source, f"{one.name} features", cache_precision) for one in test_sets]
    gallery, *tested = cached_features(encoder, wanted, [feature], **settings)
    results, of_encoder = [], hash_of(encoder)
    for test_set, queries in zip(test_sets, tested, strict=True):
        try:
            ranked = _ranked_by_all(
                *(gallery[feature], train, queries[feature], ks, encoder.device),
                among=None if test_set.name == VAL else test_set.classes,
                by_faiss=by_faiss,
            )
        except NoDirectionError as error:
            of_train = error.side == "train"
            number = error.number if of_train else rank() + world_size() * error.number
            name = (train if of_train else test_set.source).name(number)
            raise UserError(
                f"feature {feature!r} of {name} is {error.kind}: the weights are damaged or the encoder has "
                f"collapsed; use another checkpoint"
            ) from error
        images = hash_of_images(test_set.source)  # outside the loop, since it stats every file
        truth = torch.from_numpy(test_set.labels)
        for number in ks:
            accuracy = _accuracy(ranked[number], truth)
            result = result_on(
                test_set,
                (ranked[number][:, 0] == truth).numpy(),
                protocol="knn",
                name=f"{number}-NN" if feature == "encoding" else f"{number}-NN {feature}",
                headline=number == HEADLINE_K and feature == "encoding",
                weights=weights,
                top1=accuracy.top1,
                top5=accuracy.top5,
                details={"k": number, "feature": feature, "num_train": len(train), "encoder": of_encoder},
                images=images,
            )
            results.append(result)
    return results


def table(run: str, results: Sequence[Result]) -> str:
    """The results of one evaluation as lines of text."""
    lines = accuracies(
        results,
        lambda result: (
            f"{run} ({result.weights}), {result.test_set}: {result.details['num_train']} train and "
            f"{result.num_images} test images, {result.num_classes} classes"
        ),
    )
    shown_one = next((result for result in results if result.headline), results[0])
    worst = sorted(shown_one.details["top1_by_class"].items(), key=lambda item: item[1])[:SHOWN_CLASSES]
    hardest = ", ".join(f"{shown(name)} {accuracy:.1f} %" for name, accuracy in worst)
    return "\n".join(
        [*lines, f"hardest classes of {shown(shown_one.test_set)} by {shown(shown_one.name)}: {hardest}"]
    )


def _checked(k: int | Integral | Sequence[int], num_train: int) -> list[int]:
    """Numbers of neighbors as a list. Raises UserError if one is not in 1 to `num_train`."""
    ks = [int(k)] if isinstance(k, int | Integral) else [int(number) for number in k]
    if not ks:
        raise UserError("k is empty; give one or more numbers of neighbors")
    for number in ks:
        if not 1 <= number <= num_train:
            raise UserError(f"k is {number}; expected 1 to {num_train}, the number of train images")
    return ks


# --- The vote


def _ranked_by_all(
    gallery: NDArray[Any],
    train: ImageSource,
    queries: NDArray[Any],
    ks: Sequence[int],
    device: torch.device,
    *,
    among: NDArray[np.int64] | None = None,
    by_faiss: bool = False,
) -> dict[int, Tensor]:
    """The first min(5, k) classes (B, .) for each k, ranked among the classes `among`, in every process."""
    share = queries[rank() :: world_size()]
    cosine_Bk, number_Bk = nearest(gallery, share, max(ks), device=device, by_faiss=by_faiss)
    labels_Bk = torch.from_numpy(train.labels)[number_Bk]
    ranked = rank_classes(cosine_Bk, labels_Bk, ks, TEMPERATURE, len(train.classes), among)
    return {number: gather_rows(ranked_B5, len(queries)) for number, ranked_B5 in ranked.items()}


def rank_classes(
    cosine_Bk: Tensor,
    labels_Bk: Tensor,
    ks: Sequence[int],
    temperature: float,
    num_classes: int,
    among: NDArray[np.int64] | None = None,
) -> dict[int, Tensor]:
    """The first min(5, k) classes (B, .) by votes of the k nearest for each k; only the classes `among`."""
    ranked: dict[int, list[Tensor]] = {number: [] for number in ks}
    for cosines, labels in zip(cosine_Bk.split(VOTE_CHUNK), labels_Bk.split(VOTE_CHUNK), strict=True):
        weights = (cosines / temperature).exp()
        for number in ks:
            votes_BS = torch.zeros(len(cosines), num_classes)
            votes_BS.scatter_add_(1, labels[:, :number], weights[:, :number])
            if among is not None:
                votes_BS = restrict(votes_BS, among)
            order_BS = votes_BS.sort(dim=1, descending=True, stable=True).indices
            ranked[number].append(order_BS[:, : min(TOP, number)].clone())
    return {number: torch.cat(parts) for number, parts in ranked.items()}


def _accuracy(ranked_B5: Tensor, truth_B: Tensor) -> KnnResult:
    hits_B5 = ranked_B5 == truth_B[:, None]
    total = len(truth_B)
    return KnnResult(100 * int(hits_B5[:, 0].sum()) / total, 100 * int(hits_B5.sum()) / total, total)

"""Weighted k-nearest-neighbour classification. Source: official `eval_knn.py`.

Axis letters: T train images, B test images, S classes.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dino_sparo.data.sources import ImageSource
from dino_sparo.evaluation.features import Wanted, cached_features, extract_features, hash_of_images
from dino_sparo.evaluation.results import Result, results_folder, save_results
from dino_sparo.evaluation.search import NoDirectionError, Rows, nearest
from dino_sparo.evaluation.transfer import VAL, TestSet, as_test_set, open_test_sets, restrict
from dino_sparo.models import Encoder
from dino_sparo.parallel.distributed import gather_rows, local_rank, process_group, rank, world_size

if TYPE_CHECKING:
    from dino_sparo.options import KnnOptions

log = logging.getLogger("dino_sparo")

HEADLINE_K = 20
PROTOCOL_K = (10, 20, 100, 200)
TEMPERATURE = 0.07
TOP = 5
SHOWN_CLASSES = 3
CHUNK_SIZE = 256  # test images that vote at a time; it changes memory, not the result


@dataclass(frozen=True)
class KnnResult:
    """Accuracy in per cent, and the number of test images it is over."""

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

    Exact search, on the device of the features. Top-5 looks at the first min(5, k) ranked classes, as the
    official code does; classes with equal votes, also those with none, rank by lower index.

    Args:
        train_features: (T, D) floating point, any scale: l2-normalised inside. Also memory-mapped.
        train_labels: (T,) integers from 0.
        test_features: (number of test images, D).
        test_labels: likewise.
        k: one or several numbers of neighbours.
        num_classes: None takes the largest label + 1.

    Raises:
        ValueError: k is below 1 or larger than the train set, there are no test images, or a feature is
            zero or not finite.
    """
    labels, truth = (torch.as_tensor(labels).long().cpu() for labels in (train_labels, test_labels))
    ks = [int(k)] if isinstance(k, int | Integral) else [int(number) for number in k]
    for number in ks:
        if not 1 <= number <= len(train_features):
            raise ValueError(f"k is {number}, expected 1 to the {len(train_features)} train images")
    if not len(test_features):
        raise ValueError("there are no test images to classify")
    if num_classes is None:
        num_classes = int(max(labels.max(), truth.max())) + 1
    device = train_features.device if isinstance(train_features, Tensor) else torch.device("cpu")
    cosine_Bk, number_Bk = nearest(train_features, test_features, max(ks), device=device)
    ranked = _rank_classes(cosine_Bk, labels[number_Bk], ks, temperature, num_classes)
    return {number: _accuracy(ranked_B5, truth) for number, ranked_B5 in ranked.items()}


def _rank_classes(
    cosine_Bk: Tensor,
    labels_Bk: Tensor,
    ks: Sequence[int],
    temperature: float,
    num_classes: int,
    among: NDArray[np.int64] | None = None,
) -> dict[int, Tensor]:
    """The first min(5, k) classes (B, .) by votes of the k nearest, for each k, `among` these."""
    ranked: dict[int, list[Tensor]] = {number: [] for number in ks}
    for cosines, labels in zip(cosine_Bk.split(CHUNK_SIZE), labels_Bk.split(CHUNK_SIZE), strict=True):
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


def evaluate_knn(
    encoder: Encoder,
    train: ImageSource,
    test: ImageSource,
    *,
    image_size: int,
    k: Sequence[int],
    batch_size: int = 64,
    num_workers: int = 0,
    timeout_seconds: float = 600.0,
) -> dict[int, KnnResult]:
    """k-NN accuracy of an encoder, with all features in memory: for sets of modest size, while training.

    All processes share the work: each extracts its share of both sources, takes all train features, and
    classifies its share of the test images; every one counts once, and all processes get the result.
    """
    assert train.labels is not None and test.labels is not None
    gallery, share = (
        extract_features(
            encoder,
            source,
            image_size=image_size,
            batch_size=batch_size,
            num_workers=num_workers,
            timeout_seconds=timeout_seconds,
            description=f"k-NN {name} features",
        )
        for name, source in (("train", train), ("val", test))
    )
    ranked = _vote(
        gather_rows(gallery, len(train)),
        torch.from_numpy(train.labels),
        share,
        len(test),
        ks=k,
        num_classes=len(train.classes),
        device=encoder.backbone.cls_token.device,
    )
    return {number: _accuracy(ranked[number], torch.from_numpy(test.labels)) for number in k}


def _vote(
    gallery: Rows,
    labels: Tensor,
    share: Rows,
    total: int,
    *,
    ks: Sequence[int],
    num_classes: int,
    device: torch.device,
    among: NDArray[np.int64] | None = None,
    by_faiss: bool = False,
) -> dict[int, Tensor]:
    """The classes ranked first for each k, of all `total` test images, of which this process has a share.

    Process r of R has the features of test images r, r + R, r + 2R, ...
    """
    cosine_Bk, number_Bk = nearest(gallery, share, max(ks), device=device, by_faiss=by_faiss)
    ranked = _rank_classes(cosine_Bk, labels[number_Bk], ks, TEMPERATURE, num_classes, among)
    return {number: gather_rows(ranked_B5, total) for number, ranked_B5 in ranked.items()}


def run(options: "KnnOptions") -> None:
    """`dino-sparo knn`: accuracy of a trained encoder on labelled folders, into results.json and printed."""
    from dino_sparo.parallel.device import choose_device

    device = choose_device(options.device, local_rank())
    with process_group(device):
        results = evaluate(options, device)
        if rank() == 0:
            save_results(Path(options.out or results_folder(options.run)), results)
            print(table(options.run, results))


def evaluate(options: "KnnOptions", device: torch.device) -> list[Result]:
    """Features of the gallery and of every test set, by the cache, and the votes."""
    from dino_sparo.data.sources import open_labelled
    from dino_sparo.data.workers import default_workers
    from dino_sparo.errors import UserError
    from dino_sparo.interop.load import load_encoder
    from dino_sparo.parallel.distributed import first_rank_first, local_world_size

    train, val = first_rank_first(lambda: open_labelled(options.data.path))
    further = first_rank_first(lambda: open_test_sets(options.test, train.classes))
    test_sets = [as_test_set(VAL, val, train.classes), *further]
    chosen = [options.k] if isinstance(options.k, int) else options.k
    ks = chosen or [k for k in PROTOCOL_K if k <= len(train)] or [len(train)]
    if not chosen and ks != list(PROTOCOL_K):
        log.info("of k = 10, 20, 100, 200 only %s: there are %d train images", ks, len(train))
    for number in ks:
        if not 1 <= number <= len(train):
            raise UserError(
                f"k is {number}, expected 1 to the {len(train)} train images of {options.data.path}"
            )
    encoder = load_encoder(options.run, options.which, untrained=options.untrained, arch=options.arch)
    encoder.to(device)
    workers = default_workers(local_world_size()) if options.num_workers is None else options.num_workers
    wanted = [Wanted(train, "train features", options.cache_precision)]
    wanted += [Wanted(one.source, f"{one.name} features", options.cache_precision) for one in test_sets]
    gallery, *tested = (
        features[options.feature]
        for features in cached_features(
            encoder,
            wanted,
            [options.feature],
            image_size=encoder.backbone.native_grid * encoder.backbone.patch_size,
            cache=Path(options.cache or results_folder(options.run) / "features"),
            batch_size=options.batch_size,
            num_workers=workers,
        )
    )
    labels = torch.from_numpy(train.labels)
    results = []
    for test_set, rows in zip(test_sets, tested, strict=True):
        try:
            ranked = _vote(
                gallery,
                labels,
                rows[rank() :: world_size()],
                len(test_set.source),
                ks=ks,
                num_classes=len(train.classes),
                device=device,
                among=None if test_set.name == VAL else test_set.classes,
                by_faiss=options.search == "faiss",
            )
        except NoDirectionError as error:
            of_train = error.side == "train"
            number = error.number if of_train else rank() + world_size() * error.number
            name = (train if of_train else test_set.source).name(number)
            raise UserError(
                f"feature {options.feature!r} of {name} is {error.kind}: the weights of {options.run} are "
                f"damaged or have collapsed; give another checkpoint"
            ) from error
        images = hash_of_images(test_set.source)  # once: it looks at every file
        results += [_result(options, test_set, images, number, ranked[number], len(train)) for number in ks]
    return results


def _result(
    options: "KnnOptions", test_set: TestSet, images: str, k: int, ranked_B5: Tensor, num_train: int
) -> Result:
    truth = torch.from_numpy(test_set.labels)
    accuracy = _accuracy(ranked_B5, truth)
    right = (ranked_B5[:, 0] == truth).numpy()
    of_class = [100 * float(right[test_set.labels == number].mean()) for number in np.unique(test_set.labels)]
    names = [test_set.source.classes[number] for number in np.unique(test_set.labels)]
    return Result(
        protocol="knn",
        name=f"{k}-NN" if options.feature == "encoding" else f"{k}-NN {options.feature}",
        headline=k == HEADLINE_K and options.feature == "encoding",
        test_set=test_set.name,
        weights="untrained" if options.untrained else options.which,
        top1=accuracy.top1,
        top5=accuracy.top5,
        num_images=accuracy.num_images,
        num_classes=len(test_set.classes),
        details={
            "k": k,
            "feature": options.feature,
            "num_train": num_train,
            "top1_by_class": dict(zip(names, of_class, strict=True)),
            "remark": test_set.describe(),
        },
        correct=right,
        images=images,
    )


def table(run: str, results: Sequence[Result]) -> str:
    """The results of one evaluation as lines of text."""
    lines: list[str] = []
    for before, result in zip([None, *results], results, strict=False):
        if before is None or result.test_set != before.test_set:
            lines.append(
                f"{run} ({result.weights}), {result.test_set}: {result.details['num_train']} train and "
                f"{result.num_images} test images, {result.num_classes} classes"
            )
            lines += [result.details["remark"]] if result.details["remark"] else []
        mark = "   <- headline" if result.headline else ""
        lines.append(f"{result.name:>8}   top-1 {result.top1:6.2f} %   top-5 {result.top5:6.2f} %{mark}")
    worst = sorted(results[0].details["top1_by_class"].items(), key=lambda item: item[1])[:SHOWN_CLASSES]
    lines.append(
        f"hardest classes of {results[0].test_set}: " + ", ".join(f"{n} {a:.1f} %" for n, a in worst)
    )
    return "\n".join(lines)

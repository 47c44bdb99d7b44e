"""Accuracy of linear classifiers on a frozen encoder. Source: official `eval_linear.py`.

The official protocol, and where this one differs:

- The last partial batch of an epoch is dropped; the official code trains on it. With ImageNet's 1 281 167
  images and batches of 1024 these are 143 images, other ones in every epoch.
- Random numbers of order and crops are drawn by (seed, epoch, image), so that neither the number of
  processes or workers nor an interruption changes them; the distributions are the official ones.
- Features of test images, which no augmentation changes, are computed once, in float32, and kept on disk;
  the official code computes them anew for every evaluation.
- On a GPU the encoder sees the training crops in mixed precision (`--precision fp32` as official); probes,
  their gradients and the test features are float32.
- Test images are scored after every epoch. `best` is the highest of these, which chooses by the test images;
  the result is the last epoch's.

`cached_linear_probe` learns from features of center crops, the same in every epoch. That is not the official
protocol, and its results go under the name `linear-cached`.

Axis letters: B images, F numbers of a feature.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch.utils.data import Sampler

from dino_sparo.data.device_views import ahead
from dino_sparo.data.images import normalize
from dino_sparo.data.loader import (
    BatchOrder,
    Crops,
    CropsDataset,
    Executor,
    PhotoBatch,
    choose_executor,
    crop_batches,
    crops_of,
)
from dino_sparo.data.sources import ImageSource
from dino_sparo.data.views import CropRecipe
from dino_sparo.data.workers import default_workers
from dino_sparo.evaluation.classifiers import is_saved, load_classifier, load_official
from dino_sparo.evaluation.features import Wanted, cached_features, hash_of
from dino_sparo.evaluation.probe_training import (
    Batch,
    Features,
    ProbeTraining,
    Waiting,
    feature_rows,
    results_of,
)
from dino_sparo.evaluation.probes import INPUTS, MAX_BLOCKS, Probes
from dino_sparo.evaluation.results import Result, accuracies
from dino_sparo.evaluation.transfer import VAL, TestSet, as_test_sets
from dino_sparo.models import Encoder
from dino_sparo.parallel.distributed import local_world_size
from dino_sparo.parallel.precision import autocast, choose_precision

MAX_SIDE = 1024  # longer images are reduced to it first: no crop of a usual photograph gets larger by it
IMAGES_AT_ONCE = 64  # per forward pass of the encoder; it changes memory, not the experiment
OFFICIAL, CACHED = "linear", "linear-cached"  # protocols


def linear_probe(
    encoder: Encoder,
    train: ImageSource,
    test: ImageSource | Sequence[TestSet],
    folder: Path,
    *,
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto",
    views: Literal["auto", "pil", "tensor", "device"] = "auto",
    cache: Path | None = None,
    num_workers: int | None = 0,
    resume_unverified: bool = False,
    **settings: Any,
) -> list[Result]:
    """Train linear probes by the official protocol, or resume, and score them; all processes share the work.

    Args:
        encoder, train, test, folder: as of `ProbeTraining`.
        precision: of the encoder on training crops.
        views: who makes the training crops, as in `choose_executor`.
        cache: for features of test images, as in `cached_features`.
        num_workers: processes that load images; None takes one per core, at most 16 in all.
        resume_unverified: resume from a checkpoint whose SHA-256 is missing, although it may be damaged.
        settings: probes, epochs, batch_size, train_fraction, seed, weights, as of `ProbeTraining`.

    Raises:
        UserError: for a setting that does not fit, or for images; what earlier epochs have done is kept.
    """
    training = ProbeTraining(encoder, train, test, folder, protocol=OFFICIAL, **settings)
    training.resume(cached=False, cache_precision=None, unverified=resume_unverified)
    features = cached_features(encoder, training.wanted(), INPUTS, cache=cache, num_workers=num_workers)
    training.fit(
        lambda order, waiting: features_of_crops(
            *(encoder, training.train, order, waiting),
            precision=choose_precision(precision, encoder.device),
            executor=choose_executor(views, encoder.device, max_side=MAX_SIDE),
            num_workers=default_workers(local_world_size()) if num_workers is None else num_workers,
        ),
        features[0],
        checkpoint_every_epochs=1,
    )
    return training.finish(features)


def cached_linear_probe(
    encoder: Encoder,
    train: ImageSource,
    test: ImageSource | Sequence[TestSet],
    folder: Path,
    *,
    cache: Path | None = None,
    cache_precision: Literal["float16", "float32"] = "float16",
    num_workers: int | None = 0,
    resume_unverified: bool = False,
    **settings: Any,
) -> list[Result]:
    """As `linear_probe`, but the probes learn from features of center crops: seconds instead of hours.

    Args:
        cache_precision: of the train features on disk; those of test images are float32.
    """
    training = ProbeTraining(encoder, train, test, folder, protocol=CACHED, **settings)
    training.resume(cached=True, cache_precision=cache_precision, unverified=resume_unverified)
    wanted = [*training.wanted(), Wanted(training.train, "train features", cache_precision)]
    *features, of_train = cached_features(encoder, wanted, INPUTS, cache=cache, num_workers=num_workers)
    training.fit(
        lambda order, waiting: nullcontext(
            features_of_rows(of_train, training.train, order, waiting, encoder.device)
        ),
        features[0],
        checkpoint_every_epochs=10,  # an epoch takes less time than a checkpoint
    )
    return training.finish(features)


def score_classifier(
    path: str,
    encoder: Encoder,
    test: ImageSource | Sequence[TestSet],
    classes: Sequence[str],
    *,
    weights: str = "teacher",
    cache: Path | None = None,
    num_workers: int | None = 0,
) -> list[Result]:
    """Score a saved classifier (`.safetensors`), or linear weights of the official DINO code, on test images.

    Args:
        classes: names of the classes of training, in its order.

    Raises:
        UserError: it was trained on another encoder or other classes, or the file is damaged.
    """
    hash_now = hash_of(encoder)
    if is_saved(path):
        saved = load_classifier(Path(path))
    else:
        saved = load_official(Path(path), encoder, classes=tuple(classes), encoder_hash=hash_now)
    probes = Probes([saved.probe], width=encoder.width, embed_dim=encoder.embed_dim, num_classes=len(classes))
    fitted = saved.fitted(
        path,
        classes=classes,
        num_inputs=saved.probe.num_inputs(encoder.width, encoder.embed_dim),
        encoder_hash=hash_now,
    )
    probes.load_state_dict({f"classifiers.0.{name}": tensor for name, tensor in fitted.items()})
    probes.to(encoder.device)
    test_sets = as_test_sets(test, classes)
    wanted = [Wanted(one.source, f"{one.name} features", "float32") for one in test_sets]
    features = cached_features(encoder, wanted, INPUTS, cache=cache, num_workers=num_workers)
    return results_of(encoder, [saved], probes, test_sets, features, weights)


def probe_folder(
    protocol: str, *, weights: str = "teacher", train_fraction: float = 1.0, sweep: bool = False
) -> str:
    """The protocol, and what makes the probes others: so each kind of them has a folder of its own."""
    parts = [protocol]
    parts += [weights] if weights != "teacher" else []
    parts += [f"fraction-{train_fraction:g}"] if train_fraction < 1 else []
    parts += ["sweep"] if sweep else []
    return "-".join(parts)


def table(run: str, results: Sequence[Result]) -> str:
    """The results of one call as lines of text; `best` is the highest top-1 on val after any epoch."""

    def heading(result: Result) -> str:
        details = result.details
        what, trained = "linear probe", ""
        counts = f"{result.num_images} test images, {result.num_classes} classes"
        if details["protocol"] == CACHED:
            what += " on cached center crops (not the official protocol)"
        if "weights_file" in details:
            what += f" of {details['weights_file']}"
        else:
            counts = f"{details['num_train']} train and {counts}"
            trained = f", {details['epochs']} epochs, batch {details['batch_size']}"
        return f"{run} ({result.weights}), {what}, {result.test_set}: {counts}{trained}"

    def best(result: Result) -> str:
        details = result.details
        if result.test_set != VAL or "best_val_top1" not in details:
            return ""
        return f"   best {details['best_val_top1']:6.2f} % (epoch {details['best_val_epoch']})"

    return "\n".join(accuracies(results, heading, best))


# --- What probes learn from


def training_crop(image_size: int) -> CropRecipe:
    """torchvision's RandomResizedCrop and RandomHorizontalFlip at their defaults, but for the size."""
    return CropRecipe(
        size=image_size,
        scale=(0.08, 1.0),
        flip_probability=0.5,
        jitter_probability=0.0,
        jitter_strength=(0.0, 0.0, 0.0, 0.0),
        grayscale_probability=0.0,
        blur_probability=0.0,
        blur_radius=(0.0, 0.0),
        solarize_probability=0.0,
        interpolation="bilinear",
    )


@contextmanager
def features_of_crops(
    encoder: Encoder,
    source: ImageSource,
    order: BatchOrder,
    waiting: Waiting,
    *,
    precision: str,
    executor: Executor,
    num_workers: int,
    timeout_seconds: float = 600.0,
) -> Iterator[Iterator[Batch]]:
    """The official training crops through the frozen encoder: random resized crop (bilinear), flip."""
    assert source.labels is not None
    labels, device = torch.from_numpy(source.labels), encoder.device
    crops = CropsDataset(
        source, [training_crop(encoder.image_size)], order.seed, executor=executor, max_side=MAX_SIDE
    )
    pieces = _Pieces(order)
    loader = crop_batches(
        crops,
        pieces,
        num_workers=num_workers,
        prefetch_batches=2,
        pin_memory=device.type == "cuda",
        timeout_seconds=timeout_seconds,
    )

    def readable() -> Iterator[Crops | PhotoBatch]:
        loaded = iter(loader)
        for _ in range(len(pieces)):
            with waiting():
                piece = next(loaded)
            yield piece

    def batches() -> Iterator[Batch]:
        made = ahead(readable(), lambda piece: crops_of(piece, crops.crop_recipes, device), device)
        for batch in order:
            parts = []
            for _ in range(0, len(batch), IMAGES_AT_ONCE):
                images = normalize(next(made).global_crops[0])
                with torch.no_grad(), autocast(precision, device):
                    parts.append(encoder.features(images, INPUTS, MAX_BLOCKS))
            features = {name: torch.cat([part[name].float() for part in parts]) for name in INPUTS}
            yield features, labels[[sample for _, sample in batch]].to(device)

    with loader.failures_explained():
        yield batches()


class _Pieces(Sampler):
    """The batches of an order in pieces that the encoder takes at once."""

    def __init__(self, order: BatchOrder) -> None:
        self.order = order

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for batch in self.order:
            for start in range(0, len(batch), IMAGES_AT_ONCE):
                yield batch[start : start + IMAGES_AT_ONCE]

    def __len__(self) -> int:
        return len(self.order) * -(-self.order.micro_batch_size // IMAGES_AT_ONCE)


def features_of_rows(
    features: Features, source: ImageSource, order: BatchOrder, waiting: Waiting, device: torch.device
) -> Iterator[Batch]:
    """Features that have been computed before: the same in every epoch."""
    assert source.labels is not None
    for batch in order:
        samples = np.array([sample for _, sample in batch])
        with waiting():
            found = feature_rows(features, samples, device)
        yield found, torch.from_numpy(source.labels[samples]).to(device)

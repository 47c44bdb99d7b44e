"""`dino-sparo linear`: accuracy of linear classifiers on a frozen encoder. Source: official `eval_linear.py`.

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

With `--cached` the probes learn from features of centre crops, the same in every epoch. That is not the
official protocol, and its results go under the name `linear-cached`.
"""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from dino_sparo.data.loader import BatchOrder, choose_executor
from dino_sparo.evaluation.classifiers import SavedClassifier, is_saved, load_classifier, save_classifier
from dino_sparo.evaluation.features import Wanted, cached_features
from dino_sparo.evaluation.linear_report import results_of, table
from dino_sparo.evaluation.linear_setup import Opened, open_all
from dino_sparo.evaluation.official_weights import load_official
from dino_sparo.evaluation.probe_data import MAX_SIDE, CachedFeed, ImageFeed, check_batch_size
from dino_sparo.evaluation.probe_training import Exam, Learning, restore, score, train
from dino_sparo.evaluation.probes import INPUTS, Probes, choose_probes, official_probe
from dino_sparo.evaluation.results import Result, results_folder, save_results
from dino_sparo.parallel.device import choose_device
from dino_sparo.parallel.distributed import (
    local_rank,
    process_group,
    rank,
    world_size,
)
from dino_sparo.parallel.precision import choose_precision

if TYPE_CHECKING:
    from dino_sparo.options import LinearOptions

log = logging.getLogger("dino_sparo")

CLASSIFIERS = "classifiers"


def run(options: "LinearOptions") -> None:
    """Train probes, go on where they stopped, or score a saved one; print and keep the results.

    Raises:
        UserError: for a mistake in options or data; what earlier starts have done is kept.
    """
    device = choose_device(options.device, local_rank())
    with process_group(device):
        opened = open_all(options, device)
        results = score_saved(options, opened) if options.evaluate else train_all(options, opened)
        if rank() == 0:
            save_results(opened.folder, results)
            print(table(options.run, results))


def train_all(options: "LinearOptions", opened: Opened) -> list[Result]:
    """Train the probes, or go on, save the classifiers, and score them on every test set."""
    probes = choose_probes(
        opened.encoder,
        learning_rates=options.learning_rates,
        num_blocks=options.num_blocks,
        features=options.features,
        sweep=options.sweep,
    )
    check_batch_size(options.batch_size, len(opened.train), world_size())
    learning = Learning(
        Probes(
            probes,
            width=opened.encoder.backbone.cls_token.shape[-1],
            embed_dim=opened.encoder.embed_dim,
            num_classes=len(opened.train.classes),
            seed=options.seed,
        ).to(opened.device),
        global_batch_size=options.batch_size,
        epochs=options.epochs,
    )
    folder = opened.folder / folder_name(options)
    settings = settings_of(options, opened, [probe.name for probe in probes])
    steps_per_epoch = len(opened.train) // options.batch_size
    restore(learning, folder, settings, steps_per_epoch, unverified=options.resume_unverified)
    train_features, exams = _features(options, opened)
    if learning.epochs_done < learning.epochs:
        log.info(
            "%s: epoch %d of %d, %d probes, %d train images",
            *(folder, learning.epochs_done + 1, learning.epochs, len(probes), len(opened.train)),
        )
        order = BatchOrder(
            num_samples=len(opened.train),
            global_batch_size=options.batch_size,
            epochs=options.epochs,
            seed=options.seed,
            first_step=learning.epochs_done * steps_per_epoch,
            rank=rank(),
            world_size=world_size(),
        )
        if rank() == 0:
            folder.mkdir(parents=True, exist_ok=True)
        train(
            learning,
            _feed(options, opened, order, train_features),
            exams[0],
            folder=folder,
            settings=settings,
            steps_per_epoch=steps_per_epoch,
            global_batch_size=options.batch_size,
            device=opened.device,
        )
    saved = classifiers(options, opened, learning)
    if rank() == 0:
        (folder / CLASSIFIERS).mkdir(parents=True, exist_ok=True)
        for classifier in saved:
            name = classifier.probe.name.replace(" ", "_")
            save_classifier(folder / CLASSIFIERS / f"{name}.safetensors", classifier)
        log.info("classifiers are in %s", folder / CLASSIFIERS)
    return _results(options, opened, saved, learning.probes, exams)


def score_saved(options: "LinearOptions", opened: Opened) -> list[Result]:
    """Score a saved classifier, or that of an official file, on every test set.

    Raises:
        UserError: it was trained on another encoder or other classes.
    """
    path, classes = str(options.evaluate), opened.train.classes
    if is_saved(path):
        saved = load_classifier(Path(path))
    else:
        saved = load_official(Path(path), opened.encoder, classes=classes, encoder_hash=opened.encoder_hash)
    width, embed_dim = opened.encoder.backbone.cls_token.shape[-1], opened.encoder.embed_dim
    weights = saved.fitted(
        path,
        classes=classes,
        num_inputs=saved.probe.num_inputs(width, embed_dim),
        encoder_hash=opened.encoder_hash,
    )
    probes = Probes([saved.probe], width=width, embed_dim=embed_dim, num_classes=len(classes))
    probes.load_state_dict({f"classifiers.0.{name}": tensor for name, tensor in weights.items()})
    probes.to(opened.device)
    _, exams = _features(options, opened)
    return _results(options, opened, [saved], probes, exams)


def folder_name(options: "LinearOptions") -> str:
    """`linear`, and what makes the probes others: so each kind of them has a folder of its own."""
    parts = [protocol_of(options)]
    parts += ["untrained"] if options.untrained else [options.which] if options.which != "teacher" else []
    parts += [f"fraction-{options.train_fraction:g}"] if options.train_fraction < 1 else []
    parts += ["sweep"] if options.sweep else []
    return "-".join(parts)


def protocol_of(options: "LinearOptions") -> str:
    """`linear` is the official protocol only."""
    return "linear-cached" if options.cached else "linear"


def settings_of(options: "LinearOptions", opened: Opened, probes: Sequence[str]) -> dict[str, Any]:
    """What a run of probes is, in plain values: with others it is another run."""
    return {
        "probes": list(probes),
        "epochs": options.epochs,
        "batch_size": options.batch_size,
        "seed": options.seed,
        "train_fraction": options.train_fraction,
        "cached": options.cached,
        "cache_precision": options.cache_precision if options.cached else None,
        "classes": len(opened.train.classes),
        "train images": opened.train.fingerprint(),
        "val images": opened.test_sets[0].source.fingerprint(),
        "encoder": opened.encoder_hash,
    }


def classifiers(options: "LinearOptions", opened: Opened, learning: Learning) -> list[SavedClassifier]:
    """The probes as they are now, with how they came to be."""
    weights = learning.probes.state_dict()
    return [
        SavedClassifier(
            probe=probe,
            weight=weights[f"classifiers.{number}.weight"],
            bias=weights[f"classifiers.{number}.bias"],
            classes=opened.train.classes,
            encoder=opened.encoder_hash,
            details={
                "protocol": protocol_of(options),
                "feature": probe.feature,
                "num_blocks": probe.num_blocks,
                "learning_rate": probe.learning_rate,
                "epochs": learning.epochs_done,
                "batch_size": options.batch_size,
                "seed": options.seed,
                "train_fraction": options.train_fraction,
                "num_train": len(opened.train),
                "best_val_top1": best,
                "best_val_epoch": epoch,
            },
        )
        for number, (probe, (best, epoch)) in enumerate(
            zip(learning.probes.probes, learning.best, strict=True)
        )
    ]


def _feed(
    options: "LinearOptions", opened: Opened, order: BatchOrder, train_features: Mapping[str, NDArray] | None
) -> ImageFeed | CachedFeed:
    if train_features is None:
        return ImageFeed(
            opened.encoder,
            opened.train,
            order,
            image_size=opened.image_size,
            precision=choose_precision(options.precision, opened.device),
            num_workers=opened.num_workers,
            executor=choose_executor(options.views, opened.device, max_side=MAX_SIDE),
        )
    assert opened.train.labels is not None
    return CachedFeed(train_features, opened.train.labels, order, opened.device)


def _features(options: "LinearOptions", opened: Opened) -> tuple[Mapping[str, NDArray] | None, list[Exam]]:
    """Features on disk: of the train images, where probes learn from them, and of all test sets."""
    wanted = [Wanted(one.source, f"{one.name} features", "float32") for one in opened.test_sets]
    if options.cached:
        wanted.append(Wanted(opened.train, "train features", options.cache_precision))
    features = cached_features(
        opened.encoder,
        wanted,
        INPUTS,
        image_size=opened.image_size,
        cache=Path(options.cache or results_folder(options.run) / "features"),
        num_workers=opened.num_workers,
    )
    exams = [Exam(test_set, found) for test_set, found in zip(opened.test_sets, features, strict=False)]
    return features[-1] if options.cached else None, exams


def _results(
    options: "LinearOptions",
    opened: Opened,
    saved: Sequence[SavedClassifier],
    probes: Probes,
    exams: Sequence[Exam],
) -> list[Result]:
    """Every probe on every test set."""
    results = []
    for exam in exams:
        results += results_of(
            saved,
            score(probes, exam, opened.device),
            exam.test_set,
            classes=opened.train.classes,
            official=official_probe(opened.encoder),
            weights="untrained" if options.untrained else options.which,
        )
    return results

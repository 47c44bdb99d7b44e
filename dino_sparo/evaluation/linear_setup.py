"""What `dino-sparo linear` needs before it trains or scores: images, encoder and folder, checked."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from dino_sparo.data.sources import ImageSource, open_labelled
from dino_sparo.data.workers import default_workers
from dino_sparo.errors import UserError
from dino_sparo.evaluation.classifiers import is_saved
from dino_sparo.evaluation.features import hash_of
from dino_sparo.evaluation.probe_data import balanced_fraction
from dino_sparo.evaluation.results import results_folder
from dino_sparo.evaluation.transfer import VAL, TestSet, as_test_set, open_test_sets
from dino_sparo.interop.load import load_encoder
from dino_sparo.models import Encoder
from dino_sparo.parallel.distributed import first_rank_first, local_world_size

if TYPE_CHECKING:
    from dino_sparo.options import LinearOptions


@dataclass(frozen=True)
class Opened:
    """Everything that options name, opened and checked."""

    encoder: Encoder
    encoder_hash: str
    image_size: int
    device: torch.device
    num_workers: int
    train: ImageSource
    """All train images, or the chosen fraction."""
    test_sets: list[TestSet]
    """val, then the others."""
    folder: Path
    """Where results.json lies."""


def open_all(options: "LinearOptions", device: torch.device) -> Opened:
    """Images, encoder and folder."""
    _check_nothing_is_trained(options)
    if options.train_fraction > 1:
        raise UserError(
            f"train_fraction is {options.train_fraction}; expected above 0 and at most 1, such as 0.1"
        )
    train_images, val = first_rank_first(lambda: open_labelled(options.data.path))
    test_sets = first_rank_first(lambda: open_test_sets(options.test, train_images.classes))
    encoder = load_encoder(options.run, options.which, untrained=options.untrained, arch=options.arch)
    if options.train_fraction < 1:
        train_images = balanced_fraction(train_images, options.train_fraction, options.seed)
    workers = default_workers(local_world_size()) if options.num_workers is None else options.num_workers
    return Opened(
        encoder=encoder.to(device).requires_grad_(False),
        encoder_hash=hash_of(encoder),
        image_size=encoder.backbone.native_grid * encoder.backbone.patch_size,
        device=device,
        num_workers=workers,
        train=train_images,
        test_sets=[as_test_set(VAL, val, train_images.classes), *test_sets],
        folder=Path(options.out or results_folder(options.run)),
    )


def _check_nothing_is_trained(options: "LinearOptions") -> None:
    """Refuse options of training beside a classifier that is only to be scored."""
    given = ["sweep"] * options.sweep + ["cached"] * options.cached
    given += [
        key for key in ("learning_rates", "num_blocks", "features") if getattr(options, key) is not None
    ]
    if options.evaluate is not None and not is_saved(options.evaluate):  # which cannot tell of these
        given += ["train_fraction"] * (options.train_fraction != 1) + ["untrained"] * options.untrained
    if options.evaluate is not None and given:
        raise UserError(
            f"evaluate {options.evaluate} scores the saved classifier, and {', '.join(given)} would train "
            f"others; leave {'this' if len(given) == 1 else 'these'} out"
        )

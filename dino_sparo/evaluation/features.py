"""One pass of a frozen encoder over images, shared among all processes, its features in memory or on disk."""

import hashlib
import json
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from dino_sparo.data.images import CenterCrops, normalize
from dino_sparo.data.sources import ImageSource
from dino_sparo.data.workers import WatchedLoader
from dino_sparo.errors import UserError
from dino_sparo.evaluation.feature_files import FeatureFile, cannot_write, check_space, write_at
from dino_sparo.evaluation.results import alone_in
from dino_sparo.models import Encoder
from dino_sparo.parallel.distributed import gather_objects, rank, world_size
from dino_sparo.terminal import shows_bars

TRANSFORM = "short side to round(S * 256 / 224) bicubic, centre crop S, ImageNet mean and std"
FLUSH_SECONDS = 5.0  # work that a power cut may cost
KEY_DIGITS = 16


@torch.no_grad()
def extract_features(
    encoder: Encoder,
    source: ImageSource,
    *,
    image_size: int,
    batch_size: int = 64,
    num_workers: int = 0,
    timeout_seconds: float = 600.0,
    description: str = "features",
) -> Tensor:
    """Encodings of this process's share of the images: float32 (len(share), embed_dim) on the CPU.

    Of R processes number r takes images r, r + R, r + 2R, ...: one process takes all, in order. Every
    image is resized and cropped in the middle as in the official evaluation. The encoder is used as it is,
    on its device; put it into evaluation mode before.

    Raises:
        UserError: an image cannot be read, or the workers that load images failed.
    """
    share = source.subset(np.arange(rank(), len(source), world_size()))
    features = torch.empty(len(share), encoder.embed_dim)
    blocks = [range(i, min(i + batch_size, len(share))) for i in range(0, len(share), batch_size)]
    for block, encoded in _encoded(
        encoder, share, blocks, ["encoding"], image_size, num_workers, timeout_seconds, description
    ):
        features[block.start : block.stop] = encoded["encoding"].float().cpu()
    return features


@dataclass(frozen=True)
class Wanted:
    """Images whose features are wanted.

    Attributes:
        description: for the progress bar.
        precision: of the features on disk, float16 or float32.
    """

    source: ImageSource
    description: str = "features"
    precision: str = "float16"


@torch.no_grad()
def cached_features(
    encoder: Encoder,
    wanted: Sequence[Wanted],
    names: Sequence[str],
    *,
    image_size: int,
    cache: Path,
    batch_size: int = 64,
    num_workers: int = 0,
    timeout_seconds: float = 600.0,
) -> list[dict[str, NDArray[Any]]]:
    """Features of sets of images, one pass over each, on disk: name -> memory-mapped (num_images, F).

    All processes call it and share the work; each image counts exactly once, and all get all features. A
    folder of `cache`, named by weights, images (names, sizes, times of change), transform and precision,
    keeps them: a second call reads them, an interrupted pass goes on where it stopped.

    Args:
        names: as in `Encoder.features`.
        cache: a folder that all processes share.
        batch_size: images of a forward pass; a block of neighbours, whatever the number of processes.

    Raises:
        UserError: an image cannot be read, a feature is not finite, or the disk is read-only or, as is said
            before the first pass, too small for all of them.
    """
    widths = _widths(encoder, names, image_size)
    weights = hash_of(encoder) if rank() == 0 else ""
    keys = [_key(weights, one.source, image_size, one.precision) if rank() == 0 else {} for one in wanted]
    keys = gather_objects(keys)[0]
    opened = [_open(cache, key, widths, len(one.source)) for key, one in zip(keys, wanted, strict=True)]
    # The first process makes the files and looks, for all: another program may be filling the same ones.
    looked = gather_objects(_prepare(cache, opened, keys) if rank() == 0 else [])[0]
    for one, files, done in zip(wanted, opened, looked, strict=True):
        total = len(one.source)
        blocks = [range(i, min(i + batch_size, total)) for i in range(0, total, batch_size)]
        missing = [block for block in blocks if not done[block.start : block.stop].all()]
        if missing:
            mine = missing[rank() :: world_size()]
            encoded = _encoded(
                *(encoder, one.source, mine, names, image_size, num_workers, timeout_seconds),
                description=one.description,
            )
            _write(files, encoded, one.source)
            gather_objects(None)
        for file in files.values():
            assert file.done().all(), "every image counts once"
    return [{name: file.rows() for name, file in files.items()} for files in opened]


def _encoded(
    encoder: Encoder,
    source: ImageSource,
    blocks: Sequence[range],
    names: Sequence[str],
    image_size: int,
    num_workers: int,
    timeout_seconds: float,
    description: str,
) -> Iterator[tuple[range, dict[str, Tensor]]]:
    """Blocks of images and their features, each block one forward pass."""
    device = encoder.backbone.cls_token.device
    batches = WatchedLoader(
        CenterCrops(source, image_size),
        image_of=int,
        name=source.name,
        num_workers=num_workers,
        timeout_seconds=timeout_seconds,
        batch_sampler=blocks,
        pin_memory=device.type == "cuda",
    )
    silent = rank() > 0 or not shows_bars()
    total = sum(map(len, blocks))
    with (
        tqdm(total=total, desc=description, unit="img", leave=False, disable=silent) as bar,
        batches.failures_explained(),
    ):
        for block, batch in zip(blocks, batches, strict=True):
            yield block, encoder.features(normalize(batch.to(device, non_blocking=True)), names)
            bar.update(len(block))


def _open(cache: Path, key: dict[str, Any], widths: dict[str, int], total: int) -> dict[str, FeatureFile]:
    """The files of a set of images, by feature."""
    folder = cache / hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:KEY_DIGITS]
    return {
        name: FeatureFile(folder, name, (total, width), key["precision"]) for name, width in widths.items()
    }


def _prepare(
    cache: Path, opened: Sequence[dict[str, FeatureFile]], keys: Sequence[dict[str, Any]]
) -> list[NDArray[np.bool_]]:
    """Make the files that are not there yet, if the disk holds all that is to come; which images are done."""
    needed = sum(file.bytes_missing() for files in opened for file in files.values())
    if needed:
        check_space(cache, needed)
    for files, key in zip(opened, keys, strict=True):
        folder = next(iter(files.values())).path.parent
        if all(file.exists() for file in files.values()):
            continue
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with alone_in(folder):
                for file in files.values():
                    if not file.exists():
                        (folder / "features.json").write_text(json.dumps(key, indent=1))
                        file.make()
        except OSError as error:
            raise cannot_write(folder, error) from error
    return [np.logical_and.reduce([file.done() for file in files.values()]) for files in opened]


def _write(
    files: dict[str, FeatureFile], encoded: Iterator[tuple[range, dict[str, Tensor]]], source: ImageSource
) -> None:
    """Write blocks as they come; they count as done when they have reached the disk."""
    opened: dict[str, tuple[int, int]] = {}
    written: list[range] = []
    flushed = time.monotonic()

    def flush() -> None:
        for rows, done in opened.values():
            os.fsync(rows)
            for block in written:
                write_at(done, b"\1" * len(block), block.start)
        written.clear()

    try:
        for name, file in files.items():
            opened[name] = os.open(file.path, os.O_WRONLY), os.open(file.done_path, os.O_WRONLY)
        for block, features in encoded:
            for name, file in files.items():
                exact = features[name].float().cpu().numpy()
                _check_finite(exact, name, block, source, "the weights are damaged: give another checkpoint")
                with np.errstate(over="ignore"):
                    rows = exact.astype(file.dtype)
                _check_finite(
                    rows, name, block, source, "the number is too large: give cache_precision float32"
                )
                write_at(opened[name][0], rows.tobytes(), block.start * file.shape[1] * file.dtype.itemsize)
            written.append(block)
            if time.monotonic() - flushed > FLUSH_SECONDS:
                flush()
                flushed = time.monotonic()
        flush()
    except OSError as error:
        raise cannot_write(next(iter(files.values())).path.parent, error) from error
    finally:
        for pair in opened.values():
            for descriptor in pair:
                os.close(descriptor)


def _check_finite(rows: NDArray[Any], name: str, block: range, source: ImageSource, remedy: str) -> None:
    bad = np.flatnonzero(~np.isfinite(rows).all(axis=1))
    if len(bad):
        image = source.name(block[int(bad[0])])
        raise UserError(f"feature {name!r} of {image} is not finite in {rows.dtype}; {remedy}")


def _key(weights: str, source: ImageSource, image_size: int, precision: str) -> dict[str, Any]:
    """All that a feature depends on."""
    files = source.stats()
    return {
        "weights": weights,
        "images": hash_of_images(source, files),
        "files": hashlib.sha256(files.tobytes()).hexdigest(),
        "num_images": len(source),
        "transform": TRANSFORM,
        "image_size": image_size,
        "precision": precision,
    }


def hash_of_images(source: ImageSource, files: NDArray[np.int64] | None = None) -> str:
    """A hash of which images there are, by names and sizes of their files, wherever a copy of them lies."""
    files = source.stats() if files is None else files
    return hashlib.sha256(source.fingerprint().encode() + files[:, 0].tobytes()).hexdigest()


def hash_of(encoder: Encoder) -> str:
    """A hash of all that makes an encoder: kind, sizes and weights."""
    # The weights do not tell the numbers of heads.
    heads = [part.num_heads for part in encoder.modules() if hasattr(part, "num_heads")]
    kind = f"{encoder.readout_name} {encoder.backbone.patch_size} {heads}"
    digest = hashlib.sha256(kind.encode())
    for name, value in encoder.state_dict().items():
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        digest.update(value.cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _widths(encoder: Encoder, names: Sequence[str], image_size: int) -> dict[str, int]:
    """Numbers of each feature, by looking at one image."""
    device = encoder.backbone.cls_token.device
    features = encoder.features(torch.zeros(1, 3, image_size, image_size, device=device), names)
    return {name: feature.shape[1] for name, feature in features.items()}

"""Features of images from one pass of a frozen encoder, shared by all processes, in memory or on disk."""

import hashlib
import json
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from dino_sparo.data.decode import AS_IS
from dino_sparo.data.images import CenterCrops, ReadableCrops, normalize
from dino_sparo.data.sources import ImageSource, evenly, open_images
from dino_sparo.data.splits import Choice
from dino_sparo.data.workers import PATIENCE_SECONDS, WatchedLoader, default_workers
from dino_sparo.errors import UserError
from dino_sparo.files import alone_in, check_space, named
from dino_sparo.models import Encoder
from dino_sparo.parallel.distributed import gather_objects, gather_rows, local_world_size, rank, world_size
from dino_sparo.terminal import shows_bars

SOME_IMAGES = 1000
TRANSFORM = "short side to round(S * 256 / 224) bicubic, center crop S, ImageNet mean and std"
FLUSH_SECONDS = 5.0  # at most this much work is lost in a power failure
KEY_DIGITS = 16

Encoded = Iterator[tuple[range, dict[str, Tensor]]]  # a block of image numbers, its features (len(block), F)


@dataclass(frozen=True)
class Wanted:
    """Images to compute features of.

    Attributes:
        description: label of the progress bar.
        precision: dtype of the features on disk, float16 or float32.
        left_out: filled with the images that cannot be read, number -> reason, whose features are then
            undefined. None: such an image is an error. Only for features in memory.
    """

    source: ImageSource
    description: str = "features"
    precision: str = "float16"
    left_out: dict[int, str] | None = None


def embed(
    encoder: Encoder, source: ImageSource | str | Path, what: str = "encoding", **settings: Any
) -> NDArray[Any]:
    """Features of images, float32, in the order of the source.

    Args:
        source: the images, or their folder, as for `--data.path`.
        what: `encoding` (num_images, embed_dim), `slots` (num_images, L, V), `cls` (num_images, D), or
            `tokens` (num_images, N, D), normalized, CLS first.
        settings: keyword arguments of `cached_features`.

    Raises:
        UserError: an image cannot be read, or `what` is `slots` and the encoder has none.
    """
    if what == "slots" and not encoder.num_slots:
        raise UserError(
            f"what is slots, but the encoder has none (read-out {encoder.readout_name}); use encoding, cls, "
            f"or tokens"
        )
    if isinstance(source, str | Path):
        source = open_images(str(source), choice=Choice(value_range=encoder.value_range))
    name = "encoding" if what == "slots" else what
    rows = cached_features(encoder, [Wanted(source, precision="float32")], [name], **settings)[0][name]
    shapes = {"slots": (encoder.num_slots, -1), "tokens": (-1, encoder.width)}
    return rows.reshape(len(rows), *shapes.get(what, (-1,)))


@torch.no_grad()
def cached_features(
    encoder: Encoder,
    wanted: Sequence[Wanted],
    names: Sequence[str],
    *,
    image_size: int | None = None,
    cache: Path | None = None,
    batch_size: int = 64,
    num_workers: int | None = 0,
    timeout_seconds: float = PATIENCE_SECONDS,
) -> list[dict[str, NDArray[Any]]]:
    """Features of sets of images, one pass over each: name -> (num_images, F).

    All processes call this function and share the work; each image is encoded exactly once, and every process
    returns all features. Images are resized and center-cropped as in the official evaluation. The encoder is
    used on its device and must be in evaluation mode.

    With `cache`, features are stored in a subfolder that is identified by weights, images (names, sizes,
    modification times), transform, and precision, and are memory-mapped: a second call reads them, and an
    interrupted pass resumes where it stopped.

    Args:
        names: as in `Encoder.features`.
        image_size: side of the crops in pixels. None: the encoder's.
        cache: folder shared by all processes. None: features stay in memory, in float32.
        batch_size: images per forward pass.
        num_workers: processes that load images. None: one per core, at most 16 in total.

    Raises:
        UserError: an image cannot be read, a loading worker failed, a feature for the cache is not finite,
            or the disk is too small for all features (checked before the first pass).
        OSError: the cache cannot be written; `filename` is set.
    """
    size = encoder.image_size if image_size is None else image_size
    workers = default_workers(local_world_size()) if num_workers is None else num_workers
    one_image = encoder.features(torch.zeros(1, 3, size, size, device=encoder.device), names)
    widths = {name: feature.shape[1] for name, feature in one_image.items()}

    def encoded(
        source: ImageSource, blocks: Sequence[range], description: str, bad: dict[int, str] | None = None
    ) -> Encoded:
        batches = WatchedLoader(
            CenterCrops(source, size) if bad is None else ReadableCrops(source, size),
            image_of=int,
            name=source.name,
            num_workers=workers,
            timeout_seconds=timeout_seconds,
            batch_sampler=blocks,
            pin_memory=encoder.device.type == "cuda",
        )
        silent = rank() > 0 or not shows_bars()
        total = sum(map(len, blocks))
        with (
            tqdm(total=total, desc=description, unit="img", leave=False, disable=silent) as bar,
            batches.failures_explained(),
        ):
            for block, batch in zip(blocks, batches, strict=True):
                if bad is not None:
                    bad.update((number, why) for number, why in zip(block, batch[1], strict=True) if why)
                pixels = batch if bad is None else batch[0]
                images = normalize(pixels.to(encoder.device, non_blocking=True))
                yield block, encoder.features(images, names)
                bar.update(len(block))

    if cache is None:
        found = []
        for one in wanted:
            share = one.source.subset(np.arange(rank(), len(one.source), world_size()))
            rows = {name: torch.empty(len(share), width) for name, width in widths.items()}
            bad: dict[int, str] | None = None if one.left_out is None else {}
            blocks = _blocks(len(share), batch_size)
            for block, features in encoded(share, blocks, one.description, bad):
                for name, feature in features.items():
                    rows[name][block.start : block.stop] = feature.float().cpu()
            if one.left_out is not None:
                for process, of_process in enumerate(gather_objects(bad or {})):
                    one.left_out.update((process + world_size() * n, why) for n, why in of_process.items())
            found.append({name: gather_rows(some, len(one.source)).numpy() for name, some in rows.items()})
        return found

    weights, *others = gather_objects(hash_of(encoder))
    if set(others) - {weights}:
        raise UserError(
            "the processes have read different weights, since the run saved others meanwhile; run again"
        )
    keys = [_key(weights, one.source, size, one.precision) if rank() == 0 else {} for one in wanted]
    keys = gather_objects(keys)[0]
    opened = []
    for one, key in zip(wanted, keys, strict=True):
        folder = cache / hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:KEY_DIGITS]
        shapes = {name: (len(one.source), width) for name, width in widths.items()}
        opened.append({n: FeatureFile(folder, n, shape, one.precision) for n, shape in shapes.items()})
    # Rank 0 creates the files and decides what is missing for all ranks, since another program may be writing
    # the same files.
    looked = gather_objects(_prepare(cache, opened, keys) if rank() == 0 else [])[0]
    for one, files, done in zip(wanted, opened, looked, strict=True):
        blocks = _blocks(len(one.source), batch_size)  # independent of the number of processes
        missing = [block for block in blocks if not done[block.start : block.stop].all()]
        if missing:
            share_of_blocks = missing[rank() :: world_size()]
            _write(files, encoded(one.source, share_of_blocks, one.description), one.source)
            gather_objects(None)
        for file in files.values():
            assert file.done().all(), "every image counts once"
    return [{name: file.rows() for name, file in files.items()} for files in opened]


def _blocks(total: int, size: int) -> list[range]:
    return [range(start, min(start + size, total)) for start in range(0, total, size)]


# --- On disk


class FeatureFile:
    """One feature of a set of images; a row is marked as done only after it has reached the disk.

    Rows are written by `pwrite` instead of through the memory map, so that a full disk raises an OSError.
    """

    def __init__(self, folder: Path, name: str, shape: tuple[int, int], precision: str) -> None:
        self.path, self.done_path = folder / f"{name}.{precision}", folder / f"{name}.done"
        self.shape, self.dtype = shape, np.dtype(precision)
        self.row_size = shape[1] * self.dtype.itemsize
        self.size = shape[0] * self.row_size

    def exists(self) -> bool:
        """Whether the file has been created at its full size."""
        sizes = {self.path: self.size, self.done_path: self.shape[0]}
        return all(path.exists() and path.stat().st_size == size for path, size in sizes.items())

    def bytes_missing(self) -> int:
        """Bytes that are still to be written."""
        there = int(np.count_nonzero(self.done())) if self.exists() else 0
        return self.size - there * self.row_size

    def make(self) -> None:
        """Create the file at its full size; the done marks first, so that no mark is ahead of its row."""
        self.done_path.write_bytes(bytes(self.shape[0]))
        with open(self.path, "wb") as file:
            file.truncate(self.size)

    def done(self) -> NDArray[np.bool_]:
        """Which images have been written."""
        return np.fromfile(self.done_path, dtype=np.bool_)

    def rows(self) -> NDArray[Any]:
        """All rows, memory-mapped."""
        return np.memmap(self.path, self.dtype, mode="c", shape=self.shape)


def _prepare(
    cache: Path, opened: Sequence[dict[str, FeatureFile]], keys: Sequence[dict[str, Any]]
) -> list[NDArray[np.bool_]]:
    """Create missing files if the disk has room for all features; returns which images are done, per set."""
    needed = sum(file.bytes_missing() for files in opened for file in files.values())
    check_space(cache, needed, f"cache {str(cache)!r}: features need")
    for files, key in zip(opened, keys, strict=True):
        folder = next(iter(files.values())).path.parent
        if all(file.exists() for file in files.values()):
            continue
        folder.mkdir(parents=True, exist_ok=True)
        with named(folder), alone_in(folder):
            for file in files.values():
                if not file.exists():
                    (folder / "features.json").write_text(json.dumps(key, indent=1))
                    file.make()
    return [np.logical_and.reduce([file.done() for file in files.values()]) for files in opened]


def _write(files: dict[str, FeatureFile], encoded: Encoded, source: ImageSource) -> None:
    """Write blocks as they arrive; they are marked as done after an fsync."""
    written: list[range] = []
    flushed = time.monotonic()
    with named(next(iter(files.values())).path.parent), ExitStack() as stack:
        opened = {
            name: [stack.enter_context(open(path, "r+b")).fileno() for path in (file.path, file.done_path)]
            for name, file in files.items()
        }

        def flush() -> None:
            for rows, done in opened.values():
                os.fsync(rows)
                for block in written:
                    _write_at(done, b"\1" * len(block), block.start)
            written.clear()

        for block, features in encoded:
            for name, file in files.items():
                rows = _finite_rows(features[name], name, block, source, file.dtype)
                _write_at(opened[name][0], rows.tobytes(), block.start * file.row_size)
            written.append(block)
            if time.monotonic() - flushed > FLUSH_SECONDS:
                flush()
                flushed = time.monotonic()
        flush()


def _write_at(descriptor: int, data: bytes, offset: int) -> None:
    """Write all of `data`: on a disk that fills up, pwrite first writes a part and fails only afterwards."""
    while data:
        written = os.pwrite(descriptor, data, offset)
        data, offset = data[written:], offset + written


def _finite_rows(
    feature: Tensor, name: str, block: range, source: ImageSource, dtype: np.dtype[Any]
) -> NDArray[Any]:
    """A feature of a block of images in the dtype of the cache. Raises UserError where it is not finite."""
    exact = feature.float().cpu().numpy()
    with np.errstate(over="ignore"):
        rows = exact.astype(dtype)
    for kept, remedy in (
        (exact, "the weights are damaged; use another checkpoint"),
        (rows, "the value is too large; set cache_precision to float32"),
    ):
        bad = np.flatnonzero(~np.isfinite(kept).all(axis=1))
        if len(bad):
            image = source.name(block[int(bad[0])])
            raise UserError(f"feature {name!r} of {image} is not finite in {kept.dtype}: {remedy}")
    return rows


# --- Cache keys


def _key(weights: str, source: ImageSource, image_size: int, precision: str) -> dict[str, Any]:
    """Everything that a feature depends on."""
    files = source.stats()
    value_range = getattr(source, "reading", AS_IS).value_range
    names = source.index.arrays["names"].tobytes().lower() if hasattr(source, "index") else b""
    return {
        "weights": weights,
        "images": hash_of_images(source, files),
        "files": hashlib.sha256(files.tobytes()).hexdigest(),
        "num_images": len(source),
        "transform": TRANSFORM,
        "image_size": image_size,
        "precision": precision,
        **({"value_range": value_range} if value_range else {}),
        **({"pgm": 2} if b".pgm" in names else {}),  # earlier versions read those of 16 bits in another way
    }


def hash_of_images(source: ImageSource, files: NDArray[np.int64] | None = None) -> str:
    """A hash of a set of images by the names and sizes of their files, the same for a copy of the folder."""
    files = source.stats() if files is None else files
    return hashlib.sha256(source.fingerprint().encode() + files[:, 0].tobytes()).hexdigest()


def hash_of_some(*sources: ImageSource) -> str:
    """A hash of at most 1000 images of each source, evenly spread, by names and sizes of their files."""
    return " ".join(hash_of_images(evenly(source, SOME_IMAGES)) for source in sources)


def hash_of(encoder: Encoder) -> str:
    """A hash of an encoder: read-out, patch size, numbers of heads, and weights."""
    heads = [part.num_heads for part in encoder.modules() if hasattr(part, "num_heads")]
    kind = f"{encoder.readout_name} {encoder.backbone.patch_size} {heads}"
    digest = hashlib.sha256(kind.encode())
    for name, value in encoder.state_dict().items():
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        digest.update(value.cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()

"""One pass of a frozen encoder over images, shared by all processes; its features in memory or on disk."""

import hashlib
import json
import os
import shutil
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
from dino_sparo.data.sources import ImageSource, open_images
from dino_sparo.data.workers import WatchedLoader, default_workers
from dino_sparo.errors import UserError
from dino_sparo.evaluation.results import alone_in
from dino_sparo.files import named
from dino_sparo.models import Encoder
from dino_sparo.parallel.distributed import gather_objects, gather_rows, local_world_size, rank, world_size
from dino_sparo.terminal import shows_bars

TRANSFORM = "short side to round(S * 256 / 224) bicubic, center crop S, ImageNet mean and std"
FLUSH_SECONDS = 5.0  # work that a power cut may cost
KEY_DIGITS = 16

Encoded = Iterator[tuple[range, dict[str, Tensor]]]  # blocks of images, and their features (len(block), F)


@dataclass(frozen=True)
class Wanted:
    """Images whose features are wanted, named by the progress bar; on disk they are float16 or float32.

    With features in memory, `left_out` gets the images that cannot be read, number -> reason, and their
    features mean nothing; without it, or on disk, such an image is an error.
    """

    source: ImageSource
    description: str = "features"
    precision: str = "float16"
    left_out: dict[int, str] | None = None


def extract_features(encoder: Encoder, source: ImageSource, **settings: Any) -> Tensor:
    """Encodings of images, float32 (num_images, embed_dim) on the CPU; settings as of `cached_features`."""
    (found,) = cached_features(encoder, [Wanted(source)], ["encoding"], **settings)
    return torch.from_numpy(found["encoding"])


def embed(
    encoder: Encoder, source: ImageSource | str | Path, what: str = "encoding", **settings: Any
) -> NDArray[Any]:
    """What an encoder makes of images, float32, in their order; settings as of `cached_features`.

    Args:
        source: the images, or their folder, as `--data.path` names it.
        what: encoding (num_images, embed_dim), slots (num_images, L, V), cls (num_images, D), or tokens
            (num_images, N, D), normalized, CLS first.

    Raises:
        UserError: an image cannot be read, or slots are asked for and there are none.
    """
    if what == "slots" and not encoder.num_slots:
        raise UserError(
            f"what is slots, but the encoder has none (read-out {encoder.readout_name}); give encoding, cls "
            f"or tokens"
        )
    source = open_images(str(source)) if isinstance(source, str | Path) else source
    name = "encoding" if what == "slots" else what
    rows = cached_features(encoder, [Wanted(source)], [name], **settings)[0][name]
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
    timeout_seconds: float = 600.0,
) -> list[dict[str, NDArray[Any]]]:
    """Features of sets of images, one pass over each: name -> (num_images, F).

    All processes call it and share the work; each image counts exactly once, and all get all features. Every
    image is resized and center-cropped as in the official evaluation. The encoder is used as it is, on its
    device; put it into evaluation mode before.

    A folder of `cache`, named by weights, images (names, sizes, times of change), transform and precision,
    keeps the features, which are memory-mapped: a second call reads them, and an interrupted pass resumes
    where it stopped.

    Args:
        names: as in `Encoder.features`.
        image_size: side of the crops in pixels; None takes the encoder's.
        cache: a folder that all processes share; None keeps the features in memory, in float32.
        batch_size: images per forward pass.
        num_workers: processes that load images; None takes one per core, at most 16 in all.

    Raises:
        UserError: an image cannot be read, the workers that load images failed, a feature in the cache is
            not finite, or, before the first pass, the disk is too small for all features.
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

    weights = hash_of(encoder) if rank() == 0 else ""
    keys = [_key(weights, one.source, size, one.precision) if rank() == 0 else {} for one in wanted]
    keys = gather_objects(keys)[0]
    opened = []
    for one, key in zip(wanted, keys, strict=True):
        folder = cache / hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:KEY_DIGITS]
        shapes = {name: (len(one.source), width) for name, width in widths.items()}
        opened.append({n: FeatureFile(folder, n, shape, one.precision) for n, shape in shapes.items()})
    # The first process makes the files and looks, for all: another program may be filling the same ones.
    looked = gather_objects(_prepare(cache, opened, keys) if rank() == 0 else [])[0]
    for one, files, done in zip(wanted, opened, looked, strict=True):
        blocks = _blocks(len(one.source), batch_size)  # whatever the number of processes
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
    """One feature of a set of images; not a row of it counts before it is on disk.

    Rows are written by `pwrite`, not through the map, so that a full disk is an error that can be told.
    """

    def __init__(self, folder: Path, name: str, shape: tuple[int, int], precision: str) -> None:
        self.path, self.done_path = folder / f"{name}.{precision}", folder / f"{name}.done"
        self.shape, self.dtype = shape, np.dtype(precision)
        self.row_size = shape[1] * self.dtype.itemsize
        self.size = shape[0] * self.row_size

    def exists(self) -> bool:
        """Whether a pass has begun to fill it."""
        sizes = {self.path: self.size, self.done_path: self.shape[0]}
        return all(path.exists() and path.stat().st_size == size for path, size in sizes.items())

    def bytes_missing(self) -> int:
        """What the missing rows will take."""
        there = int(np.count_nonzero(self.done())) if self.exists() else 0
        return self.size - there * self.row_size

    def make(self) -> None:
        """Empty, of its full size; the marks first, so that none is ever ahead of its row."""
        self.done_path.write_bytes(bytes(self.shape[0]))
        with open(self.path, "wb") as file:
            file.truncate(self.size)

    def done(self) -> NDArray[np.bool_]:
        """Which images have been written."""
        return np.fromfile(self.done_path, dtype=np.bool_)

    def rows(self) -> NDArray[Any]:
        """All rows, mapped: they take no memory that the system cannot take back."""
        return np.memmap(self.path, self.dtype, mode="c", shape=self.shape)


def _prepare(
    cache: Path, opened: Sequence[dict[str, FeatureFile]], keys: Sequence[dict[str, Any]]
) -> list[NDArray[np.bool_]]:
    """Make the files that are not there yet, if the disk holds all that is to come; which images are done."""
    needed = sum(file.bytes_missing() for files in opened for file in files.values())
    existing = next(parent for parent in (cache, *cache.absolute().parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise UserError(
            f"{cache}: features need {needed} bytes ({needed / 2**30:.1f} GiB), but only {free} "
            f"({free / 2**30:.1f} GiB) are free there; make room or give another cache folder"
        )
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
    """Write blocks as they come; they count as done when they have reached the disk."""
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
    """All of it: a disk that gets full takes a part at first, and only then reports it."""
    while data:
        written = os.pwrite(descriptor, data, offset)
        data, offset = data[written:], offset + written


def _finite_rows(
    feature: Tensor, name: str, block: range, source: ImageSource, dtype: np.dtype[Any]
) -> NDArray[Any]:
    """A feature of a block of images as it is kept. Raises UserError where it is not finite."""
    exact = feature.float().cpu().numpy()
    with np.errstate(over="ignore"):
        rows = exact.astype(dtype)
    for kept, remedy in (
        (exact, "the weights are damaged: give another checkpoint"),
        (rows, "the number is too large: give cache_precision float32"),
    ):
        bad = np.flatnonzero(~np.isfinite(kept).all(axis=1))
        if len(bad):
            image = source.name(block[int(bad[0])])
            raise UserError(f"feature {name!r} of {image} is not finite in {kept.dtype}; {remedy}")
    return rows


# --- What features belong to


def _key(weights: str, source: ImageSource, image_size: int, precision: str) -> dict[str, Any]:
    """All that a feature depends on."""
    files = source.stats()
    value_range = getattr(source, "reading", AS_IS).value_range
    return {
        "weights": weights,
        "images": hash_of_images(source, files),
        "files": hashlib.sha256(files.tobytes()).hexdigest(),
        "num_images": len(source),
        "transform": TRANSFORM,
        "image_size": image_size,
        "precision": precision,
    } | ({"value_range": value_range} if value_range else {})


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

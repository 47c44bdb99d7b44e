"""Time k-NN, linear probes, and decoding beside what one would run otherwise: python eval/speed.py [ROUNDS]

All on generated data, in interleaved rounds, with the threads of OMP_NUM_THREADS. Ratios are medians over
rounds, with the 10 % and 90 % quantiles.
"""

import sys
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dino_sparo.bench.loading import jpeg_files
from dino_sparo.bench.timing import interleaved, spread_of_ratios
from dino_sparo.data.decode import decode, decode_pixels
from dino_sparo.data.device_views import to_pixels
from dino_sparo.data.loader import BatchOrder
from dino_sparo.evaluation.probe_batches import features_of_rows
from dino_sparo.evaluation.probes import Probe, Probes
from dino_sparo.evaluation.search import nearest
from dino_sparo.terminal import markdown_table

CPU = torch.device("cpu")
K, NUM_TRAIN, NUM_TEST = 20, 20_000, 2_000
NUM_IMAGES, WIDTH, NUM_BLOCKS, BATCH = 4_000, 384, 4, 64
Contenders = dict[str, Callable[[], object]]


def official_search(train: Tensor, test: Tensor) -> Tensor:
    """The K nearest as in the official `eval_knn.py`, by 500 test images at a time, as on ImageNet."""
    train, test = (F.normalize(features.float()) for features in (train, test))
    found = [torch.mm(some, train.t()).topk(K, largest=True, sorted=True) for some in test.split(500)]
    return torch.cat([numbers for _, numbers in found])


def searches(width: int, dtype: torch.dtype) -> Contenders:
    """k-NN among random features, and the matrix products that every search of this kind computes."""
    train, test = (torch.randn(number, width).to(dtype) for number in (NUM_TRAIN, NUM_TEST))
    columns, rows = train.float().t(), test.float().split(500)
    return {
        "products": lambda: [torch.mm(some, columns) for some in rows],
        "this": lambda: nearest(train, test, K),
        "official": lambda: official_search(train, test),
        "faiss": lambda: nearest(train, test, K, by_faiss=True),
    }


def probes(num_classes: int) -> Contenders:
    """One epoch on cached features of one probe and of nine, and of one as a plain loop over tensors."""
    rng = np.random.default_rng(0)
    shapes = {"blocks": (NUM_IMAGES, NUM_BLOCKS * WIDTH), "encoding": (NUM_IMAGES, WIDTH)}
    features = {name: rng.standard_normal(shape).astype(np.float16) for name, shape in shapes.items()}
    labels = rng.integers(0, num_classes, NUM_IMAGES)
    inputs, truth = torch.from_numpy(features["blocks"]).float(), torch.from_numpy(labels)
    plain = torch.nn.Linear(NUM_BLOCKS * WIDTH, num_classes)
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.001, momentum=0.9)

    def plain_epoch() -> None:
        order = torch.randperm(NUM_IMAGES)
        for start in range(0, NUM_IMAGES - BATCH + 1, BATCH):
            rows = order[start : start + BATCH]
            optimizer.zero_grad()
            F.cross_entropy(plain(inputs[rows]), truth[rows]).backward()
            optimizer.step()

    def epoch_of(number: int) -> Callable[[], object]:
        rates = np.geomspace(1e-4, 1e-2, number).tolist()
        found = [Probe("cls", NUM_BLOCKS, rate) for rate in rates]
        trained = Probes(found, width=WIDTH, embed_dim=WIDTH, num_classes=num_classes)
        settings: Any = {"global_batch_size": BATCH, "epochs": 10**6, "seed": 0}
        source: Any = SimpleNamespace(labels=labels)
        log: Any = SimpleNamespace(waiting_for_data=nullcontext)
        order = BatchOrder(num_samples=NUM_IMAGES, **settings)
        batches = features_of_rows(features, source, order, log, CPU, trained)
        stepped = trained.optimizer(BATCH)

        def epoch() -> None:
            for _ in range(NUM_IMAGES // BATCH):
                seen, classes, _ = next(batches)
                trained.step(seen, classes, stepped)

        return epoch

    return {"one": epoch_of(1), "plain": plain_epoch, "nine": epoch_of(9)}


def decoders(folder: Path) -> Contenders:
    """JPEG files of 500 x 375 pixels to tensors, by a worker for views on a GPU, and by Pillow."""
    source = jpeg_files(None, 8, folder)
    files = [source.read(number) for number in range(len(source))]
    return {
        "this": lambda: [decode_pixels(data) for data in files],
        "Pillow": lambda: [to_pixels(decode(data)) for data in files],
    }


def main(rounds: int) -> None:
    """Print the table."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        parts: list[tuple[str, Contenders, list[tuple[str, str]]]] = []
        for width, dtype in ((384, torch.float32), (4096, torch.float16)):
            name = f"k-NN, {NUM_TRAIN:,} x {NUM_TEST:,}, {width} wide, {dtype}"
            pairs = [(which, "official") for which in ("this", "faiss", "products")]
            parts.append((name, searches(width, dtype), pairs))
        for number in (10, 100, 1000):
            name = f"an epoch of linear probes, {number:,} classes"
            parts.append((name, probes(number), [("one", "plain"), ("nine", "one")]))
        parts.append(("8 JPEG files to tensors", decoders(Path(folder)), [("this", "Pillow")]))
        for name, contenders, pairs in parts:
            seconds = interleaved(contenders, rounds, CPU)
            for one, other in pairs:
                ratio = spread_of_ratios(seconds[one], seconds[other])
                cells = [f"{1000 * np.median(seconds[which]):.1f} ms" for which in (one, other)]
                found = "{median:.2f} ({p10:.2f} to {p90:.2f})".format(**ratio)
                rows.append([name, f"{one} / {other}", *cells, found])
    print(f"{torch.get_num_threads()} threads, {rounds} rounds, torch {torch.__version__}\n")
    print(markdown_table(["what", "pair", "first", "second", "ratio"], rows))


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 9)

"""`dino-sparo bench --what knn`: search of neighbours at ImageNet's width, its memory and its speed.

Features are generated, float16 and on disk as `cached_features` leaves them. The search runs in a fresh
process whose anonymous memory is watched: what is mapped from a file the system can take back. The speed is
beside that of one matrix product and top-k with all in memory, float32 and normalised, in interleaved rounds
at a size where that fits.
"""

import multiprocessing
import statistics
import tempfile
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from dino_sparo.errors import UserError
from dino_sparo.evaluation.knn import nearest
from dino_sparo.parallel.device import choose_device, wait_for

K = 200  # the largest of the protocol
IMAGENET = 1_281_167, 50_000  # train, val
SIDE_BY_SIDE = 20_000, 10_000  # train and test images of which a plain product is taken
SAMPLE_SECONDS = 0.02


def bench_knn(num_train: int, num_test: int, width: int, rounds: int, device_name: str) -> None:
    """Print memory and time of a search among generated features, and the ratio to a plain product.

    Raises:
        UserError: there are fewer features than neighbours to find.
    """
    if num_train < K:
        raise UserError(
            f"knn_train is {num_train}; expected {K} or more, as many neighbours are searched for"
        )
    with tempfile.TemporaryDirectory(prefix="dino_sparo_") as folder:
        for name, number in (("train", num_train), ("test", num_test)):
            _generate(Path(folder) / name, number, width)
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(1, context) as process:
            found = process.submit(_search, folder, num_train, num_test, width, device_name)
            seconds, before, peak, threads = found.result()
        device = choose_device(device_name)
        some_train, some_test = (min(a, b) for a, b in zip((num_train, num_test), SIDE_BY_SIDE, strict=True))
        ours, plain = _side_by_side(folder, some_train, some_test, width, rounds, device_name)
    ratio = statistics.median(b / a for a, b in zip(ours, plain, strict=True))
    hours = seconds * IMAGENET[0] * IMAGENET[1] / (num_train * num_test) / 3600
    print(
        f"{num_test} queries among {num_train} features of {width} numbers, float16 on disk, k {K}, "
        f"{device}, {threads} threads: {seconds:.1f} s\n"
        f"anonymous memory at most {peak / 2**30:.2f} GiB, of which {before / 2**30:.2f} python and torch\n"
        f"{some_test} among {some_train}: {statistics.median(ours):.2f} s, a plain product and top-k in RAM "
        f"{statistics.median(plain):.2f} s, {ratio:.2f} x ours (medians of {rounds} interleaved rounds)\n"
        f"ImageNet ({IMAGENET[1]} among {IMAGENET[0]}) at this rate: {hours:.2f} h, "
        f"features on disk {sum(IMAGENET) * width * 2 / 1e9:.1f} GB"
    )


def _generate(path: Path, number: int, width: int) -> None:
    rng = np.random.default_rng(number)
    with open(path, "wb") as file:
        for start in range(0, number, 4096):
            rows = rng.standard_normal((min(4096, number - start), width), dtype=np.float32)
            file.write(rows.astype(np.float16).tobytes())


def _rows(path: Path, number: int, width: int) -> NDArray[np.float16]:
    return np.memmap(path, np.float16, mode="c", shape=(number, width))


def _search(
    folder: str, num_train: int, num_test: int, width: int, device_name: str
) -> tuple[float, int, int, int]:
    """Seconds of a search, and anonymous memory before and at its peak; in a process of its own."""
    device = choose_device(device_name)
    before = anonymous_bytes()
    peak, over = before, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not over.wait(SAMPLE_SECONDS):
            peak = max(peak, anonymous_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    started = time.perf_counter()
    nearest(
        _rows(Path(folder) / "train", num_train, width),
        _rows(Path(folder) / "test", num_test, width),
        K,
        device=device,
    )
    seconds = time.perf_counter() - started
    over.set()
    watcher.join()
    return seconds, before, peak, torch.get_num_threads()


def _side_by_side(
    folder: str, num_train: int, num_test: int, width: int, rounds: int, device_name: str
) -> tuple[list[float], list[float]]:
    """Seconds of our search and of a plain product and top-k, round by round."""
    device = choose_device(device_name)
    train, test = (
        _rows(Path(folder) / "train", num_train, width),
        _rows(Path(folder) / "test", num_test, width),
    )
    in_memory = [
        torch.nn.functional.normalize(torch.from_numpy(x).to(device).float(), dim=1) for x in (train, test)
    ]
    times: tuple[list[float], list[float]] = [], []
    for number in range(rounds + 1):
        started = time.perf_counter()
        nearest(train, test, K, device=device)
        middle = time.perf_counter()
        (in_memory[1] @ in_memory[0].T).topk(K, dim=1)
        wait_for(device)
        if number:  # the first round warms up
            times[0].append(middle - started)
            times[1].append(time.perf_counter() - middle)
    return times


def anonymous_bytes() -> int:
    """Memory of this process that no file holds, without its swapped part."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return 1024 * int(line.split()[1])
    raise OSError("/proc/self/status has no RssAnon; this benchmark needs Linux")

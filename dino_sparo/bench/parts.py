"""Benchmarks of parts: the SPARO read-out, compared with its direct form and the ViT block that it replaces,
and the search of nearest neighbors."""

import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from timm.models.vision_transformer import Block
from torch import Tensor

from dino_sparo.bench.plain import direct_sparo, official_neighbors
from dino_sparo.bench.timing import interleaved, spread_of_ratios
from dino_sparo.errors import UserError
from dino_sparo.evaluation.search import nearest
from dino_sparo.models import Sparo
from dino_sparo.models.cost import bytes_saved_for_backward
from dino_sparo.models.encoder import ARCHITECTURES

K = 200  # neighbors, the largest number of the protocol
IMAGENET = 1_281_167, 50_000  # train, val


def bench_readout(*, batch_size: int, num_tokens: int, rounds: int, device: torch.device) -> None:
    """Print medians of interleaved forward and backward passes in float32, and bytes saved for backward.

    The input is tokens of ViT-S, (batch_size, num_tokens, 384).
    """
    vit = ARCHITECTURES["vit_small"]
    sparo = Sparo(vit["width"]).to(device)
    block = Block(vit["width"], vit["num_heads"], qkv_bias=True).to(device)
    forms: dict[str, Callable[[Tensor], Tensor]] = {
        "SPARO, folded": sparo,
        "SPARO, direct": partial(direct_sparo, sparo),
        "ViT-S block": block,
    }
    tokens = torch.randn(batch_size, num_tokens, vit["width"], device=device, requires_grad=True)

    def run(form: Callable[[Tensor], Tensor]) -> None:
        sparo.zero_grad(set_to_none=True)
        block.zero_grad(set_to_none=True)
        tokens.grad = None
        form(tokens).sum().backward()

    times = interleaved({name: partial(run, form) for name, form in forms.items()}, rounds, device)
    print(
        f"forward and backward, batch {batch_size}, {num_tokens} tokens, float32, {device}, "
        f"{torch.get_num_threads()} threads, {rounds} interleaved rounds"
    )
    print(f"{'':<16}{'median ms':>12}{'min':>9}{'max':>9}{'x folded':>11}{'saved MB':>11}")
    for name, form in forms.items():
        ratio = spread_of_ratios(times[name], times["SPARO, folded"])["median"]
        median, low, high = (1000 * f(times[name]) for f in (statistics.median, min, max))
        saved = bytes_saved_for_backward(form, tokens) / 1e6
        print(f"{name:<16}{median:>12.1f}{low:>9.1f}{high:>9.1f}{ratio:>11.1f}{saved:>11.1f}")


def bench_knn(
    *, num_train: int, num_test: int, width: int, device: torch.device, compare_rounds: int = 0
) -> None:
    """Print the time of one k-NN search among generated features, and an estimate for ImageNet.

    Features are float16 and memory-mapped, as in evaluations.

    Args:
        compare_rounds: interleaved rounds of a comparison with the official search; 0: no comparison.

    Raises:
        UserError: num_train is less than the number of neighbors.
    """
    if num_train < K:
        raise UserError(f"knn_train is {num_train}; expected {K} or more, the number of neighbors")
    with tempfile.TemporaryDirectory(prefix="dino_sparo_") as folder:
        train = _features(Path(folder) / "train", num_train, width)
        test = _features(Path(folder) / "test", num_test, width)
        started = time.perf_counter()
        nearest(train, test, K, device=device)
        seconds = time.perf_counter() - started
        contenders: dict[str, Callable[[], object]] = {
            "ours": lambda: nearest(train, test, K, device=device),
            "official": lambda: official_neighbors(
                torch.from_numpy(train).to(device), torch.from_numpy(test).to(device), K
            ),
        }
        times = interleaved(contenders, compare_rounds, device) if compare_rounds else {}
    hours = seconds * IMAGENET[0] * IMAGENET[1] / (num_train * num_test) / 3600
    print(
        f"{num_test} queries among {num_train} features of {width} dimensions, float16 on disk, k {K}, "
        f"{device}, {torch.get_num_threads()} threads: {seconds:.1f} s\n"
        f"estimate for ImageNet ({IMAGENET[1]} among {IMAGENET[0]}): {hours:.2f} h, "
        f"features on disk {sum(IMAGENET) * width * 2 / 1e9:.1f} GB"
    )
    if times:
        ratio = spread_of_ratios(times["ours"], times["official"])
        print(
            f"ours / official, {compare_rounds} interleaved rounds: median {ratio['median']:.2f} "
            f"({ratio['p10']:.2f} to {ratio['p90']:.2f}); medians {statistics.median(times['ours']):.2f} and "
            f"{statistics.median(times['official']):.2f} s"
        )


def _features(path: Path, number: int, width: int) -> NDArray[np.float16]:
    """Generated features (number, width), float16, memory-mapped."""
    features = np.memmap(path, np.float16, mode="w+", shape=(number, width))
    generator = np.random.default_rng(number)
    for start in range(0, number, 4096):
        rows = features[start : start + 4096]
        rows[:] = generator.standard_normal(rows.shape, dtype=np.float32)
    return features

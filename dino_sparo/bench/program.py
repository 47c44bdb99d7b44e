"""`dino-sparo bench`: what is measured, and one of it: the SPARO read-out against its direct form and the
ViT block that it replaces."""

import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from dino_sparo.bench.knn import bench_knn
from dino_sparo.bench.plain import direct_sparo
from dino_sparo.bench.training import bench_training
from dino_sparo.models import Sparo
from dino_sparo.models.cost import bytes_saved_for_backward
from dino_sparo.models.encoder import ARCHITECTURES
from dino_sparo.options import BenchOptions
from dino_sparo.parallel.device import choose_device, wait_for


def bench(options: BenchOptions) -> None:
    """`dino-sparo bench`: print what the options ask for."""
    if options.what == "training":
        bench_training(options)
    elif options.what == "knn":
        bench_knn(options.knn_train, options.knn_test, options.knn_width, options.rounds, options.device)
    else:
        bench_readout(options)


def bench_readout(options: BenchOptions) -> None:
    """Print medians of interleaved forward-and-backward passes, and bytes saved for backward."""
    device = choose_device(options.device)
    vit = ARCHITECTURES["vit_small"]
    sparo = Sparo(vit["width"]).to(device)
    block = Block(vit["width"], vit["num_heads"], qkv_bias=True).to(device)
    forms: dict[str, Callable[[Tensor], Tensor]] = {
        "SPARO, folded": sparo,
        "SPARO, direct": partial(direct_sparo, sparo),
        "ViT-S block": block,
    }
    modules: list[nn.Module] = [sparo, block]
    tokens = torch.randn(
        options.batch_size, options.num_tokens, vit["width"], device=device, requires_grad=True
    )

    def seconds(form: Callable[[Tensor], Tensor]) -> float:
        for module in modules:
            module.zero_grad(set_to_none=True)
        tokens.grad = None
        wait_for(device)
        started = time.perf_counter()
        form(tokens).sum().backward()
        wait_for(device)
        return time.perf_counter() - started

    times: dict[str, list[float]] = {name: [] for name in forms}
    for round_number in range(options.rounds + 2):
        for name, form in forms.items():
            elapsed = seconds(form)
            if round_number >= 2:  # the first two warm up
                times[name].append(elapsed)

    print(
        f"forward and backward, batch {options.batch_size}, {options.num_tokens} tokens, float32, {device}, "
        f"{torch.get_num_threads()} threads, {options.rounds} interleaved rounds"
    )
    ours = times["SPARO, folded"]
    print(f"{'':<16}{'median ms':>12}{'min':>9}{'max':>9}{'x folded':>11}{'saved MB':>11}")
    for name, form in forms.items():
        ratio = statistics.median(other / mine for other, mine in zip(times[name], ours, strict=True))
        median, low, high = (1000 * f(times[name]) for f in (statistics.median, min, max))
        saved = bytes_saved_for_backward(form, tokens) / 1e6
        print(f"{name:<16}{median:>12.1f}{low:>9.1f}{high:>9.1f}{ratio:>11.1f}{saved:>11.1f}")

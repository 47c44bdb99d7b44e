"""Benchmark of the SPARO read-out."""

import statistics
from collections.abc import Callable
from functools import partial

import torch
from timm.models.vision_transformer import Block
from torch import Tensor

from dino_sparo.bench.plain import direct_sparo
from dino_sparo.bench.timing import interleaved, spread_of_ratios
from dino_sparo.models import Sparo
from dino_sparo.models.cost import bytes_saved_for_backward
from dino_sparo.models.encoder import ARCHITECTURES


def bench_readout(*, batch_size: int, num_tokens: int, rounds: int, device: torch.device) -> None:
    """Print times of the SPARO read-out, its direct form, and the ViT block that it replaces: medians of
    interleaved forward and backward passes in float32; and bytes saved for backward.

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

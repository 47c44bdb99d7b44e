"""`dino-sparo bench --what probes`: a step of the sweep of linear probes beside one of the official probe.

A step is the forward pass of a frozen ViT-S/16 with SPARO on 224 px crops, the gradients of the probes and
SGD. Making the crops is left out: it costs both the same, so that the real ratio is lower.
"""

import statistics
import time

import torch
from torch import Tensor

from dino_sparo.device import choose_device, wait_for
from dino_sparo.evaluation.probes import INPUTS, Probes, choose_probes, losses
from dino_sparo.models import Encoder, build_encoder

NUM_CLASSES = 1000


def bench_probes(batch_size: int, rounds: int, device_name: str) -> None:
    """Print medians of interleaved steps with one and with all probes of the sweep, and their ratio."""
    device = choose_device(device_name)
    encoder = build_encoder().to(device).eval().requires_grad_(False)
    images = torch.randn(batch_size, 3, 224, 224, device=device)
    labels = torch.randint(NUM_CLASSES, (batch_size,), device=device)
    several = []
    for sweep in (False, True):
        probes = Probes(
            choose_probes(encoder, sweep=sweep),
            width=encoder.backbone.cls_token.shape[-1],
            embed_dim=encoder.embed_dim,
            num_classes=NUM_CLASSES,
        ).to(device)
        several.append((probes, probes.optimizer(batch_size)))
    times: tuple[list[float], list[float]] = [], []
    for number in range(rounds + 1):
        for kind in (0, 1) if number % 2 else (1, 0):
            wait_for(device)
            started = time.perf_counter()
            _step(encoder, *several[kind], images, labels)
            wait_for(device)
            if number:  # the first round warms up
                times[kind].append(time.perf_counter() - started)
    one, all_ = (statistics.median(of_kind) for of_kind in times)
    ratio = statistics.median(b / a for a, b in zip(*times, strict=True))
    print(
        f"a step on {batch_size} images, {NUM_CLASSES} classes, float32, {device}, {torch.get_num_threads()} "
        f"threads: 1 probe {one:.2f} s, {len(several[1][0].probes)} probes {all_:.2f} s, {ratio:.2f} x "
        f"(medians of {rounds} interleaved rounds)"
    )


def _step(
    encoder: Encoder, probes: Probes, optimizer: torch.optim.Optimizer, images: Tensor, labels: Tensor
) -> None:
    with torch.no_grad():
        features = encoder.features(images, INPUTS)
    optimizer.zero_grad(set_to_none=True)
    losses(probes(features), labels).sum().backward()
    optimizer.step()

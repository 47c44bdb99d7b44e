"""What tests run in a process with a simulated GPU: `inside.py FUNCTION ARGUMENTS`, JSON in and out."""

import ctypes
import json
import sys
from tempfile import NamedTemporaryFile

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from dino_sparo.check.counting import Operators
from dino_sparo.cli.pretraining import PretrainOptions
from dino_sparo.parallel.precision import autocast, set_numerics
from dino_sparo.training.pretrain import train_step
from dino_sparo.training.setup import build_schedules
from tests.tiny import build_state, parse_options

counters = ctypes.CDLL("libcuda.so.1")
for name in ("fakegpu_launches", "fakegpu_waits", "fakegpu_copies"):
    getattr(counters, name).restype = ctypes.c_long

STEPS = 3


def full_step(
    precision: str = "bf16",
    images: int = 64,
    processes: int = 1,
    activation_checkpointing: bool = False,
    deterministic: bool = False,
    wait: bool = False,
    operators: bool = False,
) -> dict:
    """Launches, waits of the host and copies of one step of the paper's experiment; its peak memory.

    Of `processes`, this is the first; the simulated NCCL needs no others. `wait` puts one into the step.
    `operators` counts bytes and FLOP of those that run.
    """
    if processes > 1:
        distributed_c10d._store_based_barrier = lambda *_, **__: None
        dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=processes)
    recipe = parse_options(
        PretrainOptions, ["--config", "imagenet_vits16_sparo", "--data.path", "x", "--run_dir", "x"]
    )
    device = torch.device("cuda", 0)
    set_numerics(tf32=False, deterministic=deterministic)
    state = build_state(
        recipe,
        device,
        loss_scaling=precision == "fp16",
        activation_checkpointing=activation_checkpointing,
    )
    hyper = build_schedules(recipe.optim, recipe.loss, 2500).at(5000)
    crops = [torch.zeros(count, images, 3, side, side, device=device) for count, side in ((2, 224), (8, 96))]

    def batches():
        while True:
            if wait:
                crops[0].sum().item()
            yield crops

    def step():
        train_step(state, batches(), 1, hyper, clip_norm=3.0, autocast=autocast(precision, device))

    for _ in range(2):  # which set things up
        step()
    torch.cuda.reset_peak_memory_stats()
    counters.fakegpu_reset()
    for _ in range(STEPS):
        step()
    found = {
        "launches": counters.fakegpu_launches() / STEPS,
        "waits": counters.fakegpu_waits() / STEPS,
        "copies": counters.fakegpu_copies() / STEPS,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30,
    }
    found["nccl_calls"] = calls("nccl") / STEPS
    if operators:
        with Operators() as counted:
            step()
        found |= {"bytes": counted.bytes, "flops": counted.flops}
    return found


def calls(kind: str) -> int:
    """How often something of this kind has been called since the last reset."""
    with NamedTemporaryFile("r") as dump:
        counters.fakegpu_dump(dump.name.encode())
        rows = [line.split("\t") for line in dump]
    return sum(int(row[2]) for row in rows if row[1] == kind)


if __name__ == "__main__":
    print(json.dumps(globals()[sys.argv[1]](**json.loads(sys.argv[2]))))

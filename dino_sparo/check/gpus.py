"""Published data of GPUs: dense peaks, without sparsity."""

from collections.abc import Sequence
from typing import NamedTuple

from dino_sparo.errors import UserError


class Gpu(NamedTuple):
    """One kind of GPU. All values are *published* by the manufacturer.

    Attributes:
        part: a part of the device name that identifies it.
        half, tf32, fp32: peak FLOP/s of matrix products in half precision, TF32, and float32.
        bandwidth: bytes/s of its memory.
        memory_gb: size of its memory.
        half_precision: bf16, or fp16 if it has no bf16.
    """

    part: str
    half: float
    tf32: float
    fp32: float
    bandwidth: float
    memory_gb: int
    half_precision: str = "bf16"


GPUS = {  # a device is of the first kind whose `part` is in its name
    "b200": Gpu("B200", 2250e12, 1125e12, 75e12, 8.0e12, 180),
    "h100-pcie": Gpu("H100 PCIe", 756e12, 378e12, 51e12, 2.0e12, 80),
    "h100-nvl": Gpu("H100 NVL", 835e12, 418e12, 60e12, 3.9e12, 94),
    "h200": Gpu("H200", 989e12, 494e12, 67e12, 4.8e12, 141),
    "h100": Gpu("H100", 989e12, 494e12, 67e12, 3.35e12, 80),
    "a100-40gb": Gpu("40GB", 312e12, 156e12, 19.5e12, 1.555e12, 40),
    "a100": Gpu("A100", 312e12, 156e12, 19.5e12, 2.039e12, 80),
    "l40s": Gpu("L40S", 362e12, 183e12, 91.6e12, 0.864e12, 48),
    "v100": Gpu("V100", 125e12, 15.7e12, 15.7e12, 0.9e12, 32, "fp16"),  # has no TF32
}


def find_gpu(name: str) -> str | None:
    """The kind of a GPU by its device name; None if it is unknown."""
    return next((kind for kind, gpu in GPUS.items() if gpu.part in name), None)


def check_gpus(kinds: Sequence[str]) -> None:
    """Raises UserError if a kind of GPU is unknown."""
    for kind in kinds:
        if kind not in GPUS:
            raise UserError(f"gpu is {kind!r}; expected one or more of {', '.join(GPUS)}")

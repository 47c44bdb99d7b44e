"""The only place that speaks to other processes. One process is world size 1, on the same code path."""

import torch.distributed as dist
from torch import Tensor


def rank() -> int:
    """Number of this process among all, 0 when there is one."""
    return dist.get_rank() if dist.is_initialized() else 0


def mean_over_ranks(values: Tensor) -> Tensor:
    """Mean of a tensor over all processes, in place; the tensor itself when there is one."""
    if dist.is_initialized():
        dist.all_reduce(values)
        values /= dist.get_world_size()
    return values

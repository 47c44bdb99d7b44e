"""Bytes and FLOPs of a training step on a GPU, counted operator by operator without a GPU; published data of
GPUs.

Runs the eager `train_step` on fake CPU tensors, which have shapes but no memory. `CudaAutocast` imitates the
autocast of CUDA; torch's fused attention on a CPU reads and writes the same tensors as the kernels of a GPU.
"""

import copy
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import repeat
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import flop_registry

from dino_sparo.data.color import blur_taps
from dino_sparo.data.device_views import BLUR, Photos
from dino_sparo.data.loader import Batch, Crops, PhotoBatch, crops_of, normalized
from dino_sparo.data.views import CropKind, crop_sizes
from dino_sparo.errors import UserError
from dino_sparo.parallel.precision import LossScale, autocast
from dino_sparo.training.pretrain import train_step
from dino_sparo.training.schedules import Hyperparameters
from dino_sparo.training.state import TrainState

BANDWIDTH_SHARE, PEAK_SHARE = 0.8, 0.6  # fraction of the published values that operators reach (assumed)
OPERATOR_SECONDS = 2.5e-6  # shortest time of an operator (assumed)
HALF = (torch.bfloat16, torch.float16)
CPU = torch.device("cpu")
aten = torch.ops.aten
FLOPS: dict[Any, Callable[..., int]] = {
    **flop_registry,
    aten._scaled_dot_product_flash_attention_for_cpu: flop_registry[aten._scaled_dot_product_flash_attention],
    aten._scaled_dot_product_flash_attention_for_cpu_backward: flop_registry[
        aten._scaled_dot_product_flash_attention_backward
    ],
}


class Gpu(NamedTuple):
    """One kind of GPU. All values are *published* by the manufacturer, dense peaks
    without sparsity.

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
    """The kind of a GPU by its device name; None if it is unknown, or a part of a GPU."""
    if "MIG" in name or "GH200" in name:
        return None
    return next((kind for kind, gpu in GPUS.items() if gpu.part in name), None)


def check_gpus(kinds: Sequence[str]) -> None:
    """Raises UserError if a kind of GPU is unknown."""
    for kind in kinds:
        if kind not in GPUS:
            raise UserError(f"gpu is {kind!r}; expected one or more of {', '.join(GPUS)}")


class Operator(NamedTuple):
    """One operator that reads or writes memory.

    Attributes:
        bytes: read and written.
        flops: of matrix products and attention; a multiply-add is two.
        half: whether it computes in half precision.
    """

    bytes: int
    flops: int
    half: bool


class Operators(TorchDispatchMode):
    """Records every operator that runs within the mode, and the peak memory of live tensors.

    Args:
        fused: do not count pointwise operators and conversions to larger types, as if they were fused into
            neighboring kernels.
    """

    def __init__(self, *, fused: bool = False) -> None:
        super().__init__()
        self.fused = fused
        self.found: list[Operator] = []
        self.alive: set[int] = set()
        self.live_bytes = self.peak_bytes = 0

    @property
    def bytes(self) -> int:
        """Bytes read and written by all operators."""
        return sum(operator.bytes for operator in self.found)

    @property
    def flops(self) -> int:
        """FLOPs of all matrix products and attention; a multiply-add is two."""
        return sum(operator.flops for operator in self.found)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is aten._local_scalar_dense.default:
            return 0  # a fake tensor has no value
        if func.namespace != "aten":
            return func(*args, **kwargs)
        with self:
            parts = func.decompose(*args, **kwargs)  # inference mode does not decompose these operators
        if parts is not NotImplemented:
            return parts
        outputs = func(*args, **kwargs)
        given = {name: value for name, value in kwargs.items() if name != "out"}
        read, written = _tensors((args, given)), _tensors(outputs)
        if func._schema.is_mutable and not written:  # in-place operators on lists
            inputs = zip(func._schema.arguments, args, strict=False)
            written = _tensors([value for of, value in inputs if of.alias_info and of.alias_info.is_write])
        for tensor in (*read, *written):
            self._note(tensor)
        own = {_storage(tensor) for tensor in read}
        is_view = not func._schema.is_mutable and all(_storage(tensor) in own for tensor in written)
        if is_view or "empty" in func.__name__ or (self.fused and _is_fused(func, read, written)):
            return outputs
        distinct = {(_storage(t), t.storage_offset(), t.numel()): _bytes(t) for t in read}
        flops = 0
        if func._overloadpacket in FLOPS:
            flops = FLOPS[func._overloadpacket](*args, **kwargs, out_val=outputs)
        half = any(tensor.dtype in HALF for tensor in read[:1])
        moved = sum(distinct.values()) + sum(map(_bytes, written))
        self.found.append(Operator(moved, flops, half))
        return outputs

    def _note(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self.alive:
            return
        num_bytes = -(-storage.nbytes() // 512) * 512  # the CUDA allocator rounds up to 512
        self.alive.add(key)
        self.live_bytes += num_bytes
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)
        weakref.finalize(storage, self._freed, key, num_bytes)

    def _freed(self, key: int, num_bytes: int) -> None:
        self.alive.discard(key)
        self.live_bytes -= num_bytes


def _is_fused(func: Any, read: Sequence[Tensor], written: Sequence[Tensor]) -> bool:
    if func is aten._to_copy.default:
        return written[0].element_size() > read[0].element_size()
    return torch.Tag.pointwise in func.tags


def _tensors(values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _bytes(tensor: Tensor) -> int:
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())


class CudaAutocast(TorchFunctionMode):
    """Makes CPU autocast compute the same functions in float32 as CUDA autocast."""

    IN_FLOAT32 = frozenset({"layer_norm", "softmax", "log_softmax", "sum", "norm", "pow", "exp"})

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if getattr(func, "__name__", "") in self.IN_FLOAT32 and torch.is_autocast_enabled("cpu"):
            args = tree_map(lambda x: x.float() if isinstance(x, Tensor) and x.dtype in HALF else x, args)
        return func(*args, **(kwargs or {}))


def count_step(
    state: TrainState,
    sizes: list[tuple[int, int]],
    batch_size: int,
    accumulation: int,
    hyper: Hyperparameters,
    *,
    clip_norm: float,
    precision: str,
) -> Operators:
    """The operators of one training step; `state` is not changed. Takes seconds on a CPU.

    Args:
        sizes: (crops, side) of the global and of the local crops.
        batch_size: images per micro-batch.
        accumulation: micro-batches per step.
    """
    state = replace(state, loss_scale=LossScale(CPU, enabled=precision == "fp16"))
    fake, counted = FakeTensorMode(), Operators()
    with FakeCopyMode(fake):
        state = copy.deepcopy(state)
    with fake, counted, CudaAutocast():
        crops = [torch.empty(count, batch_size, 3, side, side) for count, side in sizes if count]
        for _ in range(2):  # the first step creates the optimizer state
            counted.found.clear()
            counted.peak_bytes = 0
            mixed = autocast(precision, CPU)
            train_step(state, repeat(crops), accumulation, hyper, clip_norm=clip_norm, autocast=mixed)
    return counted


def count_views(kinds: Sequence[CropKind], batch_size: int, max_side: int | None) -> Operators:
    """The operators that make the crops on a GPU in compiled code, and normalize them.

    Args:
        kinds: of all crops.
        max_side: assumed width and height of the images. None: workers make the crops.
    """
    meta, counted = torch.device("meta"), Operators(fused=True)
    pixels = [
        torch.empty(count, batch_size, 3, side, side, dtype=torch.uint8) for count, side in crop_sizes(kinds)
    ]
    batch: Batch = Crops(pixels[0], pixels[1])
    if max_side:
        taps = max(blur_taps(kind.blur_radius[1]) for kind in kinds)
        places = torch.tensor([(number * max_side**2, max_side, max_side) for number in range(batch_size)])
        photos = torch.empty(batch_size * 3 * max_side**2, dtype=torch.uint8, device=meta)
        numbers = torch.empty(len(kinds), batch_size, BLUR.start + taps, device=meta)
        batch = PhotoBatch(Photos(photos, places, numbers))
    with counted:
        crops = crops_of(batch, kinds, meta)
        counted.fused = False
        normalized(crops)
    return counted


def seconds_on(gpu: Gpu, operators: Sequence[Operator], *, tf32: bool) -> float:
    """Estimated time of operators on a GPU, one after the other, from their bytes and FLOPs."""
    peaks = {True: gpu.half, False: gpu.tf32 if tf32 else gpu.fp32}
    return sum(
        max(
            operator.bytes / (BANDWIDTH_SHARE * gpu.bandwidth),
            operator.flops / (PEAK_SHARE * peaks[operator.half]),
            OPERATOR_SECONDS,
        )
        for operator in operators
    )

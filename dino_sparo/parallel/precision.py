"""In which numbers the networks compute: autocast, loss scaling, TF32, and bit-equal runs on a GPU."""

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

INITIAL_SCALE = 2.0**16
GROWTH_STEPS = 2000
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def choose_precision(name: str, device: torch.device) -> str:
    """`auto` is bf16 on a GPU that has it, fp16 on an older GPU, fp32 on the CPU."""
    if name != "auto":
        return name
    if device.type != "cuda":
        return "fp32"
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"


def multiplies_bfloat16() -> bool:
    """Whether the processor itself multiplies matrices in bfloat16: by AMX, or AVX-512 with BF16."""
    found: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # older torch has none
    return bool(found.get("amx_bf16") or found.get("avx512_bf16"))


def autocast(precision: str, device: torch.device) -> AbstractContextManager[Any]:
    """Mixed precision for forward passes; nothing for fp32."""
    if precision == "fp32":
        return nullcontext()
    return torch.autocast(device.type, DTYPES[precision])


@contextmanager
def plain_attention(precision: str, device: torch.device) -> Iterator[None]:
    """Attention by plain products in mixed precision on a CPU, where torch's fused one is slow backward.

    To be held around a whole step: what backward computes again must be computed in the same way.
    """
    if device.type != "cpu" or precision == "fp32":
        yield
        return
    allowed = torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed()  # not of CUDA alone
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(allowed)


def set_numerics(*, tf32: bool, deterministic: bool) -> None:
    """TF32 in float32 products, and deterministic algorithms; before the first work on a GPU."""
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = tf32
    if deterministic:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # what cuBLAS needs to be deterministic
    torch.use_deterministic_algorithms(deterministic)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # a help for bugs


class LossScale:
    """Dynamic loss scaling, all on the device: halved by a step that overflows, doubled after 2000 others.

    The rule is that of `torch.amp.GradScaler`; here one flag, computed for every precision, holds back
    optimizer, teacher and center together. Without scaling the scale stays 1.
    """

    def __init__(self, device: torch.device, enabled: bool) -> None:
        self.enabled = enabled
        self.scale = torch.tensor(INITIAL_SCALE if enabled else 1.0, device=device)
        self.good_steps = torch.tensor(0, device=device)

    def scaled(self, loss: Tensor) -> Tensor:
        """The loss to run backward from."""
        return loss * self.scale if self.enabled else loss

    def unscale(self, gradients: list[Tensor]) -> None:
        """Divide gradients by the scale, in place; an overflow stays not finite."""
        if self.enabled:
            torch._foreach_mul_(gradients, self.scale.reciprocal())

    def update(self, finite: Tensor, overflow: Tensor) -> None:
        """Adapt the scale to a step whose gradients were finite, or have overflowed (scalars); or neither."""
        if not self.enabled:
            return
        good_steps = torch.where(overflow, 0, self.good_steps + finite)
        grows = finite & (good_steps == GROWTH_STEPS)
        factor = torch.where(overflow, 0.5, torch.where(grows, 2.0, 1.0))
        self.scale.mul_(factor)
        self.good_steps.copy_(torch.where(grows, 0, good_steps))

    def state_dict(self) -> dict[str, Tensor]:
        """Scale and number of finite steps since it last changed; empty without scaling."""
        return {"scale": self.scale, "good_steps": self.good_steps} if self.enabled else {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Put back what a run in fp16 left; a run that was in another precision left nothing."""
        if self.enabled and state:
            self.scale.copy_(state["scale"])
            self.good_steps.copy_(state["good_steps"])

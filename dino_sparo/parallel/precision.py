"""Mixed precision, loss scaling, TF32, and deterministic algorithms."""

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from dino_sparo.terminal import log

INITIAL_SCALE = 2.0**16
GROWTH_STEPS = 2000
WIDE = 384  # token dimension from which bf16 is faster on a CPU that multiplies it; at 128 it gains nothing
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def choose_precision(name: str, device: torch.device, *, width: int = 0, used: str | None = None) -> str:
    """`auto`: bf16 on a GPU that supports it, fp16 on an older GPU.

    On a CPU, `auto` is what the run has used there before, else bf16 if the CPU multiplies it in hardware and
    the network is wide enough to gain, else fp32.

    Args:
        width: token dimension of the network; 0: fp32 on every CPU.
        used: precision of the last start of the run on a CPU, if there is one.
    """
    if name != "auto":
        return name
    if device.type != "cuda":
        if used == "bf16" and not multiplies_bfloat16():
            log.warning(
                "WARNING: the run continues in bf16, as it was started, although this processor does not "
                "multiply it in hardware; --machine.precision fp32 is faster, with other numbers"
            )
        return used or ("bf16" if width >= WIDE and multiplies_bfloat16() else "fp32")
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"


def multiplies_bfloat16() -> bool:
    """Whether the CPU multiplies matrices in bfloat16 in hardware (AMX, or AVX-512 with BF16)."""
    found: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # absent in older torch
    return bool(found.get("amx_bf16") or found.get("avx512_bf16"))


def autocast(precision: str, device: torch.device) -> AbstractContextManager[Any]:
    """Autocast for forward passes; no change for fp32."""
    if precision == "fp32":
        return nullcontext()
    return torch.autocast(device.type, DTYPES[precision])


@contextmanager
def plain_attention(precision: str, device: torch.device) -> Iterator[None]:
    """Use unfused attention in mixed precision on a CPU, where the backward of torch's fused one is slow.

    Enclose the whole step, so that recomputed activations in the backward pass use the same kernel.
    """
    if device.type != "cpu" or precision == "fp32":
        yield
        return
    allowed = torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed()  # applies to the CPU too
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(allowed)


def set_numerics(*, tf32: bool, deterministic: bool) -> None:
    """Set TF32 for float32 products, and deterministic algorithms; call it before any work on a GPU."""
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = tf32
    if deterministic:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # required for deterministic cuBLAS
    torch.use_deterministic_algorithms(deterministic)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # for debugging


class LossScale:
    """Dynamic loss scaling on the device: halved after an overflow, doubled after 2000 steps without one.

    The rule is that of `torch.amp.GradScaler`, but one flag skips optimizer, teacher, and center together.
    """

    def __init__(self, device: torch.device, enabled: bool) -> None:
        self.enabled = enabled
        self.scale = torch.tensor(INITIAL_SCALE if enabled else 1.0, device=device)
        self.good_steps = torch.tensor(0, device=device)

    def scaled(self, loss: Tensor) -> Tensor:
        """The loss times the scale."""
        return loss * self.scale if self.enabled else loss

    def unscale(self, gradients: list[Tensor]) -> None:
        """Divide gradients by the scale, in place; infinite ones stay infinite."""
        if self.enabled:
            torch._foreach_mul_(gradients, self.scale.reciprocal())

    def update(self, finite: Tensor, overflow: Tensor) -> None:
        """Update the scale after a step. `finite` and `overflow` are bool scalars; both may be false."""
        if not self.enabled:
            return
        good_steps = torch.where(overflow, 0, self.good_steps + finite)
        grows = finite & (good_steps == GROWTH_STEPS)
        factor = torch.where(overflow, 0.5, torch.where(grows, 2.0, 1.0))
        self.scale.mul_(factor)
        self.good_steps.copy_(torch.where(grows, 0, good_steps))

    def state_dict(self) -> dict[str, Tensor]:
        """Scale, and number of finite steps since it last changed; empty without scaling."""
        return {"scale": self.scale, "good_steps": self.good_steps} if self.enabled else {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore the scale; a run in another precision has stored an empty state."""
        if self.enabled and state:
            self.scale.copy_(state["scale"])
            self.good_steps.copy_(state["good_steps"])

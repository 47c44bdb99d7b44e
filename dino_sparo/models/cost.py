"""Cost of networks: parameters, floating point operations, and memory for the backward pass."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from dino_sparo.models.encoder import Encoder


def count_parameters(module: nn.Module) -> int:
    """Number of elements of all parameters."""
    return sum(parameter.numel() for parameter in module.parameters())


@contextmanager
def counting_flops() -> Iterator[FlopCounterMode]:
    """Count operations, with unfused attention: torch before 2.15 does not count the fused one on a CPU."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        yield counter


def encoder_cost(encoder: Encoder, image_size: int) -> dict[str, int]:
    """Parameters and operations of an encoder and of its read-out.

    Args:
        image_size: side of the image in pixels.

    Returns:
        embed_dim: dimension of the encoding.
        parameters, readout_parameters: number of elements of all parameters.
        flops, readout_flops: of a forward pass on one image; a multiply-add counts as two.
    """
    training = encoder.training
    image = torch.zeros(1, 3, image_size, image_size, device=encoder.backbone.cls_token.device)
    try:
        encoder.eval()  # stochastic depth would draw random numbers
        with torch.no_grad():
            with counting_flops() as of_backbone:
                tokens_1ND: Tensor = encoder.tokens(image)
            with counting_flops() as of_readout:
                encoder.read(tokens_1ND)
    finally:
        encoder.train(training)
    parameters, in_backbone = count_parameters(encoder), count_parameters(encoder.backbone)
    return {
        "embed_dim": encoder.embed_dim,
        "parameters": parameters,
        "readout_parameters": parameters - in_backbone,
        "flops": int(of_backbone.get_total_flops() + of_readout.get_total_flops()),
        "readout_flops": int(of_readout.get_total_flops()),
    }


def bytes_saved_for_backward(form: Callable[[Any], object], inputs: Any) -> int:
    """Bytes of the storages that autograd keeps for the backward pass, without parameters."""
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, nn.Parameter) and not isinstance(tensor._base, nn.Parameter):
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = form(inputs)
    del output
    return sum(storages.values())


def describe_cost(cost: dict[str, int]) -> str:
    """The result of `encoder_cost` as text."""
    return (
        f"{cost['parameters'] / 1e6:.2f} M parameters ({cost['readout_parameters'] / 1e6:.2f} M in the "
        f"read-out), {cost['flops'] / 1e9:.3g} GFLOPs per image "
        f"({cost['readout_flops'] / 1e9:.2g} in the read-out)"
    )

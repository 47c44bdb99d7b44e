"""Attention of SPARO's slots and of the CLS token on the grid of patches.

Axis letters: B images, L slots, N tokens, D width.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from dino_sparo.models import Encoder

FULL = 4.0  # multiple of uniform attention that is drawn in the full color


@torch.no_grad()
def slot_attention(encoder: Encoder, images: Tensor) -> tuple[Tensor, Tensor]:
    """Attention of each slot over normalized images (B, 3, height, width).

    Returns:
        attention on the patches (B, L, rows, columns) and on the CLS token (B, L), which sum to one for each
        slot.

    Raises:
        ValueError: the encoder has no slots.
    """
    if encoder.readout is None:
        raise ValueError(f"encoder has no slots (read-out {encoder.readout_name}); expected one with slots")
    attn_BLN = encoder.readout.attention(encoder.tokens(images))
    return _on_grid(attn_BLN, encoder, images), attn_BLN[:, :, 0]


@torch.no_grad()
def cls_attention(encoder: Encoder, images: Tensor) -> Tensor:
    """Attention of the CLS token in the last transformer block over normalized images (B, 3, height, width).

    It is computed from the queries and keys of the block, since fused attention does not return weights.

    Returns:
        attention on the patches (B, heads, rows, columns); the remainder to one is on the CLS token.
    """
    backbone = encoder.backbone
    block, depth = backbone.blocks[-1], len(backbone.blocks)
    x_BND = backbone.block_outputs(images, last=2)[0] if depth > 1 else backbone.embed(images)
    qkv_BN3D = block.attn.qkv(block.norm1(x_BND)).unflatten(-1, (3, -1))  # type: ignore[union-attr, operator]
    query_B1D, key_BND = qkv_BN3D[:, :1, 0], qkv_BN3D[:, :, 1]
    heads = (backbone.num_heads, -1)
    query_Bh1d, key_BhNd = (x.unflatten(-1, heads).transpose(1, 2) for x in (query_B1D, key_BND))
    logits_Bh1N = query_Bh1d @ key_BhNd.transpose(-1, -2) / query_Bh1d.shape[-1] ** 0.5
    return _on_grid(logits_Bh1N.softmax(dim=-1).squeeze(2), encoder, images)


def _on_grid(attn_BxN: Tensor, encoder: Encoder, images: Tensor) -> Tensor:
    """Attention over tokens (B, x, N) as (B, x, rows, columns), without CLS."""
    patch = encoder.backbone.patch_size
    return attn_BxN[:, :, 1:].unflatten(-1, (images.shape[-2] // patch, images.shape[-1] // patch))


def times_uniform(attention: Tensor) -> Tensor:
    """Attention on patches (..., rows, columns) as a multiple of uniform attention, 1 / N for N tokens."""
    return attention * (attention.shape[-2] * attention.shape[-1] + 1)


def strength(times: Tensor) -> Tensor:
    """Strength of the color in a picture for multiples of uniform attention: 0 up to 1, logarithmic between,
    and 1 from `FULL`."""
    return (times.clamp(min=1).log2() / math.log2(FULL)).clamp(max=1)


def distinct_slots(maps: Sequence[Tensor], count: int) -> list[int]:
    """Greedy choice of `count` slots whose pictures differ, starting with the most focused slot.

    Each further slot has the largest cosine distance to the chosen ones, weighted by the norm of its picture.

    Args:
        maps: for each image (L, rows, columns).
    """
    flat_LX = torch.cat([strength(times_uniform(map_Lrc)).flatten(1) for map_Lrc in maps], dim=1)
    shown_L, unit_LX = flat_LX.norm(dim=1), F.normalize(flat_LX, dim=1)
    focus_L = torch.stack([map_Lrc.amax(dim=(1, 2)) for map_Lrc in maps]).mean(dim=0)
    chosen = [int(focus_L.argmax())]
    while len(chosen) < min(count, len(flat_LX)):
        difference_L = (1 - (unit_LX @ unit_LX[chosen].T).amax(dim=1)) * shown_L
        difference_L[chosen] = -1
        chosen.append(int(difference_L.argmax()))
    return chosen

"""Where single slots look: SPARO's attention weights on the grid of patches, and those of the CLS token.

Axis letters: B images, L slots, N tokens, D width.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from dino_sparo.models import Encoder

FULL = 4.0  # times uniform attention that is drawn in the full color


@torch.no_grad()
def slot_attention(encoder: Encoder, images: Tensor) -> tuple[Tensor, Tensor]:
    """Attention of every slot over normalized images (B, 3, height, width).

    Returns:
        the shares of the patches (B, L, rows, columns) and that of the CLS token (B, L); the two of a slot
        sum to one.

    Raises:
        ValueError: the encoder has no slots.
    """
    if encoder.readout is None:
        raise ValueError(f"readout {encoder.readout_name!r} has no slots; expected an encoder with 'sparo'")
    attn_BLN = encoder.readout.attention(encoder.tokens(images))
    return _on_grid(attn_BLN, encoder, images), attn_BLN[:, :, 0]


@torch.no_grad()
def cls_attention(encoder: Encoder, images: Tensor) -> Tensor:
    """Attention of the CLS token in the last transformer block over normalized images (B, 3, height, width).

    The block's fused attention keeps its weights to itself, so this one row of them is computed again from
    its queries and keys.

    Returns:
        (B, heads, rows, columns), the share of each patch; what is missing to one lies on CLS itself.
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
    """Attention over tokens (B, x, N), without CLS, as (B, x, rows, columns)."""
    patch = encoder.backbone.patch_size
    return attn_BxN[:, :, 1:].unflatten(-1, (images.shape[-2] // patch, images.shape[-1] // patch))


def times_uniform(attention: Tensor) -> Tensor:
    """Shares of patches (..., rows, columns) as multiples of uniform attention, 1 / N over all N tokens."""
    return attention * (attention.shape[-2] * attention.shape[-1] + 1)


def strength(times: Tensor) -> Tensor:
    """What is seen of attention in a picture, 0..1: nothing up to uniform, all from `FULL` times uniform, and
    in proportion to the logarithm between."""
    return (times.clamp(min=1).log2() / math.log2(FULL)).clamp(max=1)


def distinct_slots(maps: Sequence[Tensor], count: int) -> list[int]:
    """`count` slots whose pictures differ as much as possible, the most focused one first.

    maps: of each image (L, rows, columns). Each next slot is the one whose picture is least like those
    already chosen; one that shows little comes late.
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

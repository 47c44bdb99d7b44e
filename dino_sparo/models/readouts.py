"""Read-outs that SPARO is compared with. Source: arXiv 2404.15721, Table 6 and appendix B.2.

The authors' public code is for CLIP and does not contain all of these. "Our inference" marks details that the
paper does not state; there we follow its text, and otherwise stay as close to SPARO as possible.

Axis letters and sizes: B images, N tokens, D width (`dim`), L slots (`num_slots`), V slot width (`slot_dim`),
H key width of a head (`key_dim`), A heads (`num_heads`), M encoding.
"""

import math
from typing import Literal

import torch
from torch import Tensor, nn

from dino_sparo.models.readout import Sparo


class MultiHeadSlots(nn.Module):
    """One multi-head cross-attention with L learned queries, which share all heads (Table 6).

    Our inference: as in SPARO's equation 1 the keys are also the values, and one projection W gives the
    slots. All slots share the key projection of A heads, a slot has one query per head, and W reads all heads
    of a slot. With A = L there are as many keys as in SPARO.
    """

    def __init__(
        self, dim: int, num_slots: int = 64, slot_dim: int = 64, key_dim: int = 64, *, num_heads: int
    ) -> None:
        super().__init__()
        self.num_slots, self.slot_dim, self.num_heads = num_slots, slot_dim, num_heads
        self.query = nn.Parameter(torch.randn(num_slots, num_heads * key_dim))  # (L, A*H)
        self.key_proj = nn.Linear(dim, num_heads * key_dim)
        self.value_proj = nn.Linear(num_heads * key_dim, slot_dim)  # initialized as in SPARO
        nn.init.xavier_uniform_(self.key_proj.weight)
        nn.init.zeros_(self.key_proj.bias)
        nn.init.zeros_(self.value_proj.bias)

    def forward(self, tokens_BND: Tensor) -> Tensor:
        """Tokens (B, N, D) -> slots (B, L, V)."""
        keys_BANH = _heads(self.key_proj(tokens_BND), self.num_heads)
        return self.value_proj(_joined(self._attention(keys_BANH) @ keys_BANH))

    def attention(self, tokens_BND: Tensor) -> Tensor:
        """Attention weights (B, L, N), the mean over a slot's heads; each row sums to one."""
        return self._attention(_heads(self.key_proj(tokens_BND), self.num_heads)).mean(dim=1)

    def _attention(self, keys_BANH: Tensor) -> Tensor:
        return _weights(_heads(self.query, self.num_heads), keys_BANH)


class AttentionalPooler(nn.Module):
    """Learned queries, LayerNorm, multi-head attention. Source: CoCa (arXiv 2205.01917); Table 6.

    LayerNorms are applied to queries and tokens, as in the authors' public code for CLIP; LayerNorm and
    projection after it are `output: slots`. Our inference: the encoding is all L outputs, and the pooler
    replaces the last block unless `after_last_block` is set. V is also the dimension of queries, keys and
    values over all heads, so `num_heads` must divide it.
    """

    def __init__(self, dim: int, num_slots: int = 64, slot_dim: int = 64, *, num_heads: int) -> None:
        super().__init__()
        if slot_dim % num_heads:
            raise ValueError(
                f"slot_dim {slot_dim} is not divisible by num_heads {num_heads}: choose a divisor of it"
            )
        self.num_slots, self.slot_dim, self.num_heads = num_slots, slot_dim, num_heads
        self.query = nn.Parameter(torch.randn(num_slots, slot_dim))
        self.query_norm = nn.LayerNorm(slot_dim, eps=1e-6)
        self.token_norm = nn.LayerNorm(dim, eps=1e-6)
        self.query_proj = nn.Linear(slot_dim, slot_dim)
        self.key_proj = nn.Linear(dim, slot_dim)
        self.value_proj = nn.Linear(dim, slot_dim)
        self.out_proj = nn.Linear(slot_dim, slot_dim)  # initialized as in nn.MultiheadAttention
        for projection in (self.query_proj, self.key_proj, self.value_proj):
            nn.init.xavier_uniform_(projection.weight)
        for projection in (self.query_proj, self.key_proj, self.value_proj, self.out_proj):
            nn.init.zeros_(projection.bias)

    def forward(self, tokens_BND: Tensor) -> Tensor:
        """Tokens (B, N, D) -> slots (B, L, V)."""
        tokens_BND = self.token_norm(tokens_BND)
        values_BANH = _heads(self.value_proj(tokens_BND), self.num_heads)
        return self.out_proj(_joined(self._attention(tokens_BND) @ values_BANH))

    def attention(self, tokens_BND: Tensor) -> Tensor:
        """Attention weights (B, L, N), the mean over a slot's heads; each row sums to one."""
        return self._attention(self.token_norm(tokens_BND)).mean(dim=1)

    def _attention(self, normed_BND: Tensor) -> Tensor:
        query_ALH = _heads(self.query_proj(self.query_norm(self.query)), self.num_heads)
        return _weights(query_ALH, _heads(self.key_proj(normed_BND), self.num_heads))


class ProjectedSlots(nn.Module):
    """LayerNorm and a linear layer on the slots of another read-out, per slot or over all slots (Table 6).

    Our inference: input and output have the same size, and per slot all slots share both layers.

    Args:
        slots: the read-out.
        whole: one LayerNorm and one linear layer over all L*V dimensions. Each output slot then depends on
            all slots, while `attention` is still that of the slot with the same index.
    """

    def __init__(self, slots: "Sparo | MultiHeadSlots | AttentionalPooler", *, whole: bool) -> None:
        super().__init__()
        self.num_slots, self.slot_dim, self.whole = slots.num_slots, slots.slot_dim, whole
        width = slots.num_slots * slots.slot_dim if whole else slots.slot_dim
        self.slots = slots
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.proj = nn.Linear(width, width)
        nn.init.zeros_(self.proj.bias)

    def forward(self, tokens_BND: Tensor) -> Tensor:
        """Tokens (B, N, D) -> slots (B, L, V)."""
        slots_BLV = self.slots(tokens_BND)
        if not self.whole:
            return self.proj(self.norm(slots_BLV))
        return self.proj(self.norm(slots_BLV.flatten(1))).view_as(slots_BLV)

    def attention(self, tokens_BND: Tensor) -> Tensor:
        """Attention weights (B, L, N) of the read-out's slots; each row sums to one."""
        return self.slots.attention(tokens_BND)


class LinearBottleneck(nn.Module):
    """Two linear layers, D -> m -> M: a wide encoding of the CLS token with few degrees of freedom (B.2).

    The paper only describes m -> M; the layer D -> m (`bottleneck_dim`) is from the authors' public code for
    CLIP (where it has no bias). Both have PyTorch's default initialization.
    """

    def __init__(self, dim: int, *, bottleneck_dim: int, encoding_dim: int) -> None:
        super().__init__()
        self.encoding_dim = encoding_dim
        self.narrow = nn.Linear(dim, bottleneck_dim)
        self.wide = nn.Linear(bottleneck_dim, encoding_dim)

    def forward(self, cls_BD: Tensor) -> Tensor:
        """CLS tokens (B, D) -> encodings (B, M)."""
        return self.wide(self.narrow(cls_BD))


SlotReadout = Sparo | MultiHeadSlots | AttentionalPooler | ProjectedSlots


def sparo_readout(
    dim: int,
    *,
    heads: Literal["separate", "multi"] = "separate",
    output: Literal["slots", "whole"] | None = None,
    **sizes: int,
) -> SlotReadout:
    """SPARO on tokens of dimension `dim`.

    Args:
        heads: one head per slot, or heads that all slots share.
        output: LayerNorm and linear layer on each slot, on all slots concatenated, or None.
        sizes: num_slots, slot_dim, key_dim; group_size for separate heads, num_heads for multi heads.

    Raises:
        ValueError: `heads` or `output` is unknown, or sizes do not divide.
        TypeError: a size is missing, or not one of this read-out.
    """
    if heads not in ("separate", "multi"):
        raise ValueError(f"heads is {heads!r}, expected separate or multi")
    kind = Sparo if heads == "separate" else MultiHeadSlots
    return _projected(kind(dim, **sizes), output)


def pooler_readout(dim: int, *, output: Literal["slots", "whole"] | None = None, **sizes: int) -> SlotReadout:
    """Attentional pooler on tokens of dimension `dim`; sizes are num_slots, slot_dim, num_heads.

    Raises:
        ValueError, TypeError: as `sparo_readout`.
    """
    return _projected(AttentionalPooler(dim, **sizes), output)


def _projected(
    slots: Sparo | MultiHeadSlots | AttentionalPooler, output: Literal["slots", "whole"] | None
) -> SlotReadout:
    if output not in (None, "slots", "whole"):
        raise ValueError(f"output is {output!r}, expected slots, whole or None")
    return slots if output is None else ProjectedSlots(slots, whole=output == "whole")


def _heads(rows: Tensor, num_heads: int) -> Tensor:
    """(..., n, A*H) -> (..., A, n, H)."""
    return rows.unflatten(-1, (num_heads, -1)).transpose(-3, -2)


def _joined(heads_BALH: Tensor) -> Tensor:
    """(B, A, L, H) -> (B, L, A*H)."""
    return heads_BALH.transpose(1, 2).flatten(2)


def _weights(query_ALH: Tensor, keys_BANH: Tensor) -> Tensor:
    """Queries and keys of A heads -> attention weights (B, A, L, N)."""
    scale = math.sqrt(query_ALH.shape[-1])
    return (query_ALH / scale @ keys_BANH.transpose(-1, -2)).softmax(dim=-1)

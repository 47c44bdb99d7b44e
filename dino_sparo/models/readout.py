"""SPARO: the read-out that turns tokens into separately attended slots (arXiv 2404.15721, eq. 1).

Axis letters: B images, N tokens, D width, L slots, V slot width, H key width, G groups of slots that
share a key projection, S slots in such a group.
"""

import math

import torch
from torch import Tensor, nn


class Sparo(nn.Module):
    """L slots, each computed by one attention head with a learned query. Source: SPARO eq. 1.

    Computed in a folded form: the query is multiplied into the key projection, and key and value projections
    follow the pooling. This equals equation 1 (the key bias adds a constant to all logits of a slot, which
    the softmax cancels, and attention weights sum to one) without a tensor of shape (B, N, L*H). The biases,
    absent from the equation, are those of the paper's appendix A.

    Args:
        dim: token dimension D.
        num_slots: L.
        slot_dim: V.
        key_dim: H (the paper's D).
        group_size: slots l with equal l // group_size share their key projection (appendix A).

    State dict: query (L, H); key_proj.weight (L/group_size*H, D), key_proj.bias; value_proj.weight
    (V, H), value_proj.bias.
    """

    def __init__(
        self, dim: int, num_slots: int = 64, slot_dim: int = 64, key_dim: int = 64, group_size: int = 1
    ) -> None:
        super().__init__()
        if group_size < 1 or num_slots % group_size:
            raise ValueError(
                f"group_size {group_size} does not divide num_slots {num_slots}: choose a divisor of it"
            )
        self.num_slots, self.slot_dim = num_slots, slot_dim
        self.key_dim, self.group_size = key_dim, group_size
        self.num_groups = num_slots // group_size
        self.query = nn.Parameter(torch.randn(num_slots, key_dim))
        self.key_proj = nn.Linear(dim, self.num_groups * key_dim)
        self.value_proj = nn.Linear(key_dim, slot_dim)  # PyTorch's default initial values
        nn.init.xavier_uniform_(self.key_proj.weight)
        nn.init.zeros_(self.key_proj.bias)
        nn.init.zeros_(self.value_proj.bias)

    def forward(self, tokens_BND: Tensor, token_mask: Tensor | None = None) -> Tensor:
        """Tokens (B, N, D), mask (B, N) bool with True = attend -> slots (B, L, V)."""
        pooled_BLD = self.attention(tokens_BND, token_mask) @ tokens_BND
        batch, _, dim = pooled_BLD.shape
        groups, per_group, key_dim = self.num_groups, self.group_size, self.key_dim
        weight_GDH = self.key_proj.weight.view(groups, key_dim, dim).transpose(1, 2)
        bias_G1H = self.key_proj.bias.view(groups, 1, key_dim)
        pooled_GxD = pooled_BLD.view(batch, groups, per_group, dim).transpose(0, 1).flatten(1, 2)  # x = B * S
        heads_GxH = torch.baddbmm(bias_G1H, pooled_GxD, weight_GDH)
        heads_BLH = heads_GxH.view(groups, batch, per_group, key_dim).transpose(0, 1).flatten(1, 2)
        return self.value_proj(heads_BLH)  # (B, L, V)

    def attention(self, tokens_BND: Tensor, token_mask: Tensor | None = None) -> Tensor:
        """Attention weights (B, L, N) of every slot over the tokens; each row sums to one.

        Raises:
            ValueError: the mask hides every token of an image.
        """
        logits_BLN = self._folded_query() @ tokens_BND.transpose(1, 2)
        if token_mask is not None:
            if not bool(token_mask.any(dim=1).all()):
                raise ValueError("token_mask hides every token of an image: at least one must be True")
            logits_BLN = logits_BLN.masked_fill(~token_mask[:, None, :], -math.inf)
        return logits_BLN.softmax(dim=-1)

    def _folded_query(self) -> Tensor:
        """K_l^T q_l / sqrt(H) for every slot: (L, D)."""
        query_GSH = self.query.view(self.num_groups, self.group_size, self.key_dim)
        weight_GHD = self.key_proj.weight.view(self.num_groups, self.key_dim, -1)
        return (query_GSH @ weight_GHD).flatten(0, 1) / math.sqrt(self.key_dim)

"""The DINO projection head. Source: official `DINOHead`.

Axis letters: B images, K prototypes.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

OLD_NAMES = {  # of the older torch.nn.utils.weight_norm
    "last_layer.weight_g": "last_layer.parametrizations.weight.original0",
    "last_layer.weight_v": "last_layer.parametrizations.weight.original1",
}


class DINOHead(nn.Module):
    """MLP to a bottleneck, l2-normalization, weight-normed linear layer to K prototypes.

    Args:
        in_dim: dimension of the encoding.
        num_prototypes: K.
        norm_last_layer: fix the norm g of each prototype at 1 (it stays in the state dict).

    State dict: mlp.0|2|4.weight|bias and last_layer.parametrizations.weight.original0 (g) and
    original1 (v). The older names last_layer.weight_g|weight_v load as well.
    """

    def __init__(
        self,
        in_dim: int,
        num_prototypes: int = 65536,
        hidden_dim: int = 2048,
        bottleneck_dim: int = 256,
        norm_last_layer: bool = True,
    ) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(in_dim, hidden_dim),
            nn.GELU(),
            nn.Linear(hidden_dim, hidden_dim),
            nn.GELU(),
            nn.Linear(hidden_dim, bottleneck_dim),
        )
        for layer in self.mlp:
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02, a=-2.0, b=2.0)
                nn.init.zeros_(layer.bias)
        self.last_layer = weight_norm(nn.Linear(bottleneck_dim, num_prototypes, bias=False))
        length = self.last_layer.parametrizations.weight.original0
        nn.init.ones_(length)
        length.requires_grad_(not norm_last_layer)

    def forward(self, features: Tensor) -> Tensor:
        """Encodings (B, in_dim) -> prototype logits (B, K), float32 also under mixed precision."""
        bottleneck = self.mlp(features)
        with torch.autocast(features.device.type, enabled=False):  # normalizing zeros in float16 gives NaN
            return self.last_layer(F.normalize(bottleneck.float(), dim=-1))

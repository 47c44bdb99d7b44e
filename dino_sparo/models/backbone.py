"""Vision transformer with the parameter names, initial values and numbers of the official DINO code.

The blocks are timm's; where timm's habits differ from the official model, the official one wins
(initial values, resizing of the position embedding).

Axis letters: B images, N tokens (CLS first, then patches row by row), D width.
"""

from functools import partial

import torch
import torch.nn.functional as F
from timm.layers import Mlp
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class VisionTransformer(nn.Module):
    """ViT backbone: images in, normalized tokens out. Source: official `vision_transformer.py`.

    Args:
        image_size: side in pixels at which the position embedding is native.
        patch_size: side of a patch in pixels; must divide `image_size`.
        width: token width D; must be divisible by `num_heads`.
        depth: number of transformer blocks that are really built.
        drop_path_rate: stochastic depth of the last block; it rises linearly from 0 over the blocks.
    """

    def __init__(
        self,
        *,
        image_size: int,
        patch_size: int,
        width: int,
        depth: int,
        num_heads: int,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        if image_size % patch_size:
            raise ValueError(
                f"image_size {image_size} is not divisible by patch_size {patch_size}: choose a patch size "
                f"that divides the image"
            )
        if width % num_heads:
            raise ValueError(
                f"width {width} is not divisible by num_heads {num_heads}: choose a width that is a multiple"
            )
        if depth < 1:
            raise ValueError(f"the backbone needs at least one transformer block, got depth {depth}")
        self.patch_size, self.num_heads = patch_size, num_heads
        self.native_grid = image_size // patch_size
        self.patch_embed = PatchEmbed(patch_size, width)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, self.native_grid**2 + 1, width))
        self.blocks = nn.ModuleList(
            Block(
                width,
                num_heads,
                qkv_bias=True,
                drop_path=drop_path_rate * index / max(1, depth - 1),
                norm_layer=partial(nn.LayerNorm, eps=1e-6),  # type: ignore[arg-type]
                mlp_layer=FrugalMlp,
            )
            for index in range(depth)
        )
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.activation_checkpointing = False  # when True, training keeps no activations within blocks
        self._resize_matrices: dict[tuple[int, int], Tensor] = {}
        self._init_weights()

    def _init_weights(self) -> None:
        nn.init.trunc_normal_(self.pos_embed, std=0.02, a=-2.0, b=2.0)
        nn.init.trunc_normal_(self.cls_token, std=0.02, a=-2.0, b=2.0)
        for module in self.modules():  # the patch convolution keeps PyTorch's default
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02, a=-2.0, b=2.0)
                nn.init.zeros_(module.bias)

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, 3, height, width) -> normalized tokens (B, N, D)."""
        return self.norm(self.block_outputs(images, last=1)[0])

    def block_outputs(self, images: Tensor, last: int) -> list[Tensor]:
        """Unnormalized tokens (B, N, D) after each of the `last` blocks, earliest first."""
        x_BND = self.embed(images)
        outputs = []
        for block in self.blocks:
            if self.activation_checkpointing and x_BND.requires_grad:
                x_BND = checkpoint(block, x_BND, use_reentrant=False)
            else:
                x_BND = block(x_BND)
            outputs.append(x_BND)
            del outputs[:-last]
        return outputs

    def embed(self, images: Tensor) -> Tensor:
        """Images (B, 3, height, width) -> tokens (B, N, D) with CLS and position embedding added."""
        height, width = images.shape[-2:]
        if height % self.patch_size or width % self.patch_size:
            raise ValueError(
                f"an image of {height}x{width} pixels cannot be cut into patches of {self.patch_size}: "
                f"resize it to multiples of the patch size"
            )
        patches_BND = self.patch_embed(images)
        cls_B1D = self.cls_token.expand(images.shape[0], -1, -1)  # len() would fix B in an export
        tokens_BND = torch.cat((cls_B1D, patches_BND), dim=1)
        return tokens_BND + self.position_embedding(height // self.patch_size, width // self.patch_size)

    @torch.compiler.disable  # it keeps what it has made
    def position_embedding(self, rows: int, columns: int) -> Tensor:
        """Position embedding (1, 1 + rows * columns, D) for a grid of patches."""
        if rows == columns == self.native_grid:
            return self.pos_embed
        key = (rows, columns)
        matrix = self._resize_matrices.get(key)
        if matrix is None or matrix.device != self.pos_embed.device or matrix.dtype != self.pos_embed.dtype:
            with torch.inference_mode(False):  # kept for later, also for training
                matrix = resize_matrix(self.native_grid, rows, columns).to(self.pos_embed)
            self._resize_matrices[key] = matrix
        cls_11D, patches_1ND = self.pos_embed[:, :1], self.pos_embed[:, 1:]
        with torch.autocast(self.pos_embed.device.type, enabled=False):
            resized_1ND = matrix @ patches_1ND
        return torch.cat((cls_11D, resized_1ND), dim=1)


class FrugalMlp(Mlp):
    """timm's MLP, which keeps the input of GELU for the backward pass and computes its output again.

    A quarter of what a block keeps, for a hundredth of its time (measured on a CPU); the numbers stay.
    """

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.fc1(x)
        if not hidden.requires_grad:
            return self._project(hidden)
        return checkpoint(self._project, hidden, use_reentrant=False, preserve_rng_state=False)

    def _project(self, hidden: Tensor) -> Tensor:
        return self.fc2(self.act(hidden))  # recomputed up to what fc2 keeps


class PatchEmbed(nn.Module):
    """Images (B, 3, height, width) -> patch tokens (B, N, D) by one convolution named `proj`."""

    def __init__(self, patch_size: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, width, kernel_size=patch_size, stride=patch_size)

    def forward(self, images: Tensor) -> Tensor:
        return self.proj(images).flatten(2).transpose(1, 2)


def resize_matrix(native: int, rows: int, columns: int) -> Tensor:
    """The official bicubic resizing of a native x native grid as a matrix (rows*columns, native**2).

    Bicubic resizing is linear, so resizing every unit grid once gives its matrix: the same numbers as
    the call, deterministic on CUDA and cheaper. The 0.1 in the scale factor is the official code's.
    """
    unit_grids = torch.eye(native**2).reshape(native**2, 1, native, native)
    scale = ((rows + 0.1) / native, (columns + 0.1) / native)
    resized = F.interpolate(unit_grids, scale_factor=scale, mode="bicubic", align_corners=False)
    assert resized.shape[-2:] == (rows, columns)
    return resized.flatten(1).T.contiguous()

"""Vision transformer with the parameter names, initialization and outputs of the official DINO code.

The blocks are timm's; initialization and resizing of the position embedding follow the official code.

Axis letters: B images, N tokens (CLS first, then patches row by row), D width.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm import layers
from timm.models import vision_transformer
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint


class VisionTransformer(nn.Module):
    """ViT backbone: images -> normalized tokens. Source: official `vision_transformer.py`.

    Args:
        image_size: side in pixels of the images whose patch grid is that of the position embedding.
        patch_size: side of a patch in pixels; must divide `image_size`.
        width: token dimension D; must be divisible by `num_heads`.
        depth: number of transformer blocks.
        drop_path_rate: stochastic depth rate of the last block, increasing linearly from 0 at the first.
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
                f"that divides it"
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
                attn_layer=Attention,
                mlp_layer=FrugalMlp,
            )
            for index in range(depth)
        )
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.activation_checkpointing = False  # True: recompute activations of blocks in the backward pass
        self.run_block: Callable[..., Tensor] | None = (
            None  # compiled `run_block`, for `tokens_of_sizes` only
        )
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
        return self._through_blocks(self.embed(images), None, last)

    def tokens_of_sizes(self, groups: Sequence[Tensor]) -> list[Tensor]:
        """Groups of images (B, 3, height, width) of different sizes -> tokens (B, N, D) of each group.

        The result equals `forward` per group, but every layer runs once on the rows of all groups, and only
        attention runs per group. Gradients, which sum over rows, are rounded differently.
        """
        if len(groups) == 1:
            x_BND = self.embed(groups[0])
            return [self.norm(self._through_blocks(x_BND, None, last=1, run=self.run_block)[0])]
        tokens = [self.embed(images) for images in groups]
        shapes = [x_BND.shape for x_BND in tokens]
        x_TD = torch.cat([x_BND.flatten(0, 1) for x_BND in tokens])
        rows = self.norm(self._through_blocks(x_TD, shapes, last=1, run=self.run_block)[0])
        parts = rows.split([num_images * num_tokens for num_images, num_tokens, _ in shapes])
        return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]

    def _through_blocks(
        self,
        x: Tensor,
        shapes: list[torch.Size] | None,
        last: int,
        run: Callable[..., Tensor] | None = None,
    ) -> list[Tensor]:
        """Tokens (B, N, D), or rows (T, D) of groups of these shapes, after each of the `last` blocks.

        Args:
            run: `run_block`, compiled.
        """
        scales = self._branch_scales(x, shapes) if self.training else None
        outputs = []
        for index, block in enumerate(self.blocks):
            of_block = (None, None) if scales is None else (scales[2 * index], scales[2 * index + 1])
            recompute = self.activation_checkpointing and x.requires_grad
            if run is None and not recompute:
                x = block(x, shapes, of_block)
            else:
                weights = dict(block.named_parameters())
                x = (run or run_block)(block, weights, x, shapes, of_block, recompute=recompute)
            outputs.append(x)
            del outputs[:-last]
        return outputs

    def _branch_scales(self, x: Tensor, shapes: list[torch.Size] | None) -> Tensor | None:
        """Stochastic depth: the factor 0 or 1 / (1 - rate) for each branch of each block and each image.

        Shape (2 * blocks, B, 1, 1), or (2 * blocks, T, 1) for rows; None if all rates are 0.
        """
        rates = [
            getattr(drop, "drop_prob", 0.0) for b in self.blocks for drop in (b.drop_path1, b.drop_path2)
        ]
        if not any(rates):
            return None
        num_images = len(x) if shapes is None else sum(shape[0] for shape in shapes)
        scales = torch.ones(len(rates), num_images, device=x.device)
        for of_branch, rate in zip(scales, rates, strict=True):
            if rate:
                of_branch.bernoulli_(1 - rate)
        torch._foreach_div_(list(scales), [1 - rate for rate in rates])
        if shapes is None:
            return scales[:, :, None, None]
        parts = scales.split([shape[0] for shape in shapes], dim=1)
        of_rows = [part.repeat_interleave(shape[1], dim=1) for part, shape in zip(parts, shapes, strict=True)]
        return torch.cat(of_rows, dim=1)[:, :, None]

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

    @torch.compiler.disable  # because of the cache
    def position_embedding(self, rows: int, columns: int) -> Tensor:
        """Position embedding (1, 1 + rows * columns, D) for a grid of patches."""
        if rows == columns == self.native_grid:
            return self.pos_embed
        key = (rows, columns)
        matrix = self._resize_matrices.get(key)
        if matrix is None or matrix.device != self.pos_embed.device or matrix.dtype != self.pos_embed.dtype:
            with torch.inference_mode(False):  # cached for training too
                matrix = resize_matrix(self.native_grid, rows, columns).to(self.pos_embed)
            self._resize_matrices[key] = matrix
        cls_11D, patches_1ND = self.pos_embed[:, :1], self.pos_embed[:, 1:]
        with torch.autocast(self.pos_embed.device.type, enabled=False):
            resized_1ND = matrix @ patches_1ND
        return torch.cat((cls_11D, resized_1ND), dim=1)


def run_block(
    block: nn.Module,
    weights: Mapping[str, Tensor],
    x: Tensor,
    shapes: list[torch.Size] | None,
    scales: tuple[Tensor | None, Tensor | None],
    *,
    recompute: bool,
) -> Tensor:
    """The output of a block with these weights: inside `functional_call` they are the replaced ones.

    Args:
        recompute: whether the backward pass recomputes activations instead of storing them.
    """
    if recompute:
        given = (block, dict(weights), (x, shapes, scales))
        return checkpoint(functional_call, *given, use_reentrant=False, preserve_rng_state=False)
    return functional_call(block, dict(weights), (x, shapes, scales))


class Block(vision_transformer.Block):
    """timm's block, on tokens (B, N, D) or on rows of several groups."""

    def forward(  # type: ignore[override]
        self,
        x: Tensor,
        shapes: list[torch.Size] | None = None,
        scales: tuple[Tensor | None, Tensor | None] = (None, None),
    ) -> Tensor:
        """Tokens (B, N, D), or rows (T, D) of groups of these shapes -> the same shape."""
        x = add_branch(x, self.attn(self.norm1(x), shapes), scales[0])
        return add_branch(x, self.mlp(self.norm2(x)), scales[1])


class Attention(layers.Attention):
    """timm's attention, on tokens (B, N, D) or on rows of several groups."""

    def forward(self, x: Tensor, shapes: list[torch.Size] | None = None) -> Tensor:  # type: ignore[override]
        """Tokens (B, N, D), or rows (T, D) of groups of these shapes -> the same shape."""
        heads = SplitHeads.apply(self.qkv(x), shapes or [x.shape], self.num_heads)
        attended = [
            F.scaled_dot_product_attention(*heads[start : start + 3]).transpose(1, 2).flatten(2)
            for start in range(0, len(heads), 3)
        ]
        if shapes is None:
            return self.proj(attended[0])
        return self.proj(torch.cat([part.flatten(0, 1) for part in attended]))


class SplitHeads(torch.autograd.Function):
    """Rows (..., 3 * D) of groups of shapes (B, N, D) -> query, key, and value of each group, as views.

    Each is (B, heads, N, D / heads). The backward pass copies their gradients once; autograd would need three
    copies.
    """

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, shapes: list[torch.Size], num_heads: int) -> tuple[Tensor, ...]:
        ctx.shapes, ctx.like = shapes, qkv.shape
        parts = qkv.flatten(0, -2).split([shape[0] * shape[1] for shape in shapes])
        views = [part.view(*shape[:2], 3, num_heads, -1) for part, shape in zip(parts, shapes, strict=True)]
        return tuple(x.transpose(1, 2) for view in views for x in view.unbind(2))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        of_qkv = gradients[0].new_empty(ctx.like)
        parts = of_qkv.flatten(0, -2).split([shape[0] * shape[1] for shape in ctx.shapes])
        for number, part in enumerate(parts):
            of_part = [x.transpose(1, 2) for x in gradients[3 * number : 3 * number + 3]]
            batch, num_tokens, num_heads, width = of_part[0].shape
            torch.stack(of_part, dim=2, out=part.view(batch, num_tokens, 3, num_heads, width))
        return of_qkv, None, None


def add_branch(x: Tensor, branch: Tensor, scale: Tensor | None) -> Tensor:
    """x + branch * scale, with one scale per image; None: 1."""
    return x + branch if scale is None else AddBranch.apply(x, branch, scale)


class AddBranch(torch.autograd.Function):
    """x + branch * scale, without a float32 copy of a branch in half precision."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, branch: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(scale)
        ctx.dtype = branch.dtype
        if branch.dtype == x.dtype:  # addcmul rounds only once, which changes the numbers
            return x + branch * scale
        return torch.addcmul(x, branch, scale, out=torch.empty_like(x))  # without `out`, autocast copies it

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        (scale,) = ctx.saved_tensors
        of_branch = torch.empty_like(gradient, dtype=ctx.dtype)
        return gradient, torch.mul(gradient, scale, out=of_branch), None


class FrugalMlp(layers.Mlp):
    """timm's MLP that recomputes the output of GELU in the backward pass instead of storing it.

    Saves a quarter of the activations of a block for 1 % of its time (measured on a CPU), with equal numbers.
    """

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.fc1(x)
        if not hidden.requires_grad:
            return self.fc2(self.act(hidden))
        return GeluLinear.apply(hidden, self.fc2.weight, self.fc2.bias)


class GeluLinear(torch.autograd.Function):
    """Linear layer on GELU of hidden rows (..., H); stores the rows for the backward pass, not their GELU."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(hidden, weight)
        return F.linear(F.gelu(hidden), weight, bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        hidden, weight = ctx.saved_tensors
        rows = gradient.flatten(0, -2)
        of_output = gradient @ weight.to(gradient.dtype)
        of_hidden = torch.ops.aten.gelu_backward(of_output, hidden)
        of_weight = rows.T @ F.gelu(hidden).flatten(0, -2)
        return of_hidden, of_weight.to(weight.dtype), rows.sum(0).to(weight.dtype)


class PatchEmbed(nn.Module):
    """Images (B, 3, height, width) -> patch tokens (B, N, D) by one convolution named `proj`."""

    def __init__(self, patch_size: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, width, kernel_size=patch_size, stride=patch_size)

    def forward(self, images: Tensor) -> Tensor:
        return self.proj(images).flatten(2).transpose(1, 2)


def resize_matrix(native: int, rows: int, columns: int) -> Tensor:
    """The official bicubic resizing of a native x native grid as a matrix (rows*columns, native**2).

    Bicubic resizing is linear, and the resized unit grids are the columns of its matrix. The product gives
    the numbers of F.interpolate, is deterministic on CUDA, and is faster. The official code adds the 0.1.
    """
    unit_grids = torch.eye(native**2).reshape(native**2, 1, native, native)
    scale = ((rows + 0.1) / native, (columns + 0.1) / native)
    resized = F.interpolate(unit_grids, scale_factor=scale, mode="bicubic", align_corners=False)
    assert resized.shape[-2:] == (rows, columns)
    return resized.flatten(1).T.contiguous()

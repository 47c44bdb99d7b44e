"""Encoder (backbone and read-out), its features for evaluation, and encoder with head as DinoModel.

Axis letters: B images, N tokens, D width, C crops, K prototypes.
"""

import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from dino_sparo.errors import UserError
from dino_sparo.models.backbone import VisionTransformer, run_block
from dino_sparo.models.head import DINOHead
from dino_sparo.models.readouts import LinearBottleneck, SlotReadout
from dino_sparo.parallel.device import compiled
from dino_sparo.recipe.readouts import READOUTS

ARCHITECTURES: dict[str, dict[str, int]] = {
    "vit_tiny": {"width": 192, "depth": 12, "num_heads": 3},
    "vit_small": {"width": 384, "depth": 12, "num_heads": 6},
    "vit_base": {"width": 768, "depth": 12, "num_heads": 12},
}
WITH_SLOTS = tuple(name for name, readout in READOUTS.items() if readout.has_slots)
FEATURES = ("encoding", "cls", "patch_mean", "tokens", "blocks", "probe")


def architecture(arch: str | Mapping[str, int]) -> dict[str, int]:
    """Width, depth and num_heads of an architecture by name, or of a mapping. Raises UserError."""
    if isinstance(arch, str) and arch in ARCHITECTURES:
        return ARCHITECTURES[arch]
    sizes = ARCHITECTURES["vit_small"].keys()
    if not isinstance(arch, Mapping) or arch.keys() != sizes:
        raise UserError(
            f"arch is {arch!r}, expected one of {', '.join(ARCHITECTURES)}, or a mapping with "
            f"{', '.join(sizes)}"
        )
    return dict(arch)


class Encoder(nn.Module):
    """Backbone and read-out: images -> one encoding per image.

    Attributes:
        backbone: VisionTransformer with the official parameter names.
        readout: the Sparo module, or another with slots; None for `cls` (normalized CLS token), `gap` (mean
            of normalized patch tokens) and `bottleneck` (two linear layers on the normalized CLS token).
        embed_dim: dimension of the encoding.
        transform: set by `load_encoder`; converts an image (PIL) or its file to the input of the encoder:
            resized, center-cropped, normalized, float32 (3, image_size, image_size).
        value_range: set by `load_encoder`; the pixel values that were black and white in training, for images
            of more than 8 bits; None: those of the image mode.
    """

    transform: Callable[[Any], Tensor]
    value_range: tuple[float, float] | None = None

    def __init__(
        self,
        backbone: VisionTransformer,
        readout_name: str,
        readout: SlotReadout | None = None,
        bottleneck: LinearBottleneck | None = None,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.readout_name = readout_name
        self.readout = readout
        self.bottleneck = bottleneck
        self.embed_dim: int = backbone.cls_token.shape[-1]
        if readout is not None:
            self.embed_dim = readout.num_slots * readout.slot_dim
        elif bottleneck is not None:
            self.embed_dim = bottleneck.encoding_dim

    @property
    def num_slots(self) -> int:
        """Number of slots, each of dimension embed_dim / num_slots; 0 for a read-out without slots."""
        return 0 if self.readout is None else self.readout.num_slots

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.backbone.cls_token.device

    @property
    def width(self) -> int:
        """Token dimension D."""
        return self.backbone.cls_token.shape[-1]

    @property
    def image_size(self) -> int:
        """Side in pixels of the images whose patch grid is that of the position embedding."""
        return self.backbone.native_grid * self.backbone.patch_size

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, 3, height, width) -> encodings (B, embed_dim), not normalized."""
        return self.read(self.tokens(images))

    def tokens(self, images: Tensor) -> Tensor:
        """Images (B, 3, height, width) -> normalized tokens (B, N, D), CLS first."""
        return self.backbone(images)

    def read(self, tokens_BND: Tensor) -> Tensor:
        """Normalized tokens (B, N, D) -> encodings (B, embed_dim)."""
        if self.readout is not None:
            return self.readout(tokens_BND).flatten(1)
        if self.readout_name == "gap":
            return tokens_BND[:, 1:].mean(dim=1)
        return tokens_BND[:, 0] if self.bottleneck is None else self.bottleneck(tokens_BND[:, 0])

    def probe_features(self, images: Tensor, num_blocks: int = 4) -> Tensor:
        """Features (B, F) for a linear probe. Source: official `eval_linear.py`, SPARO appendix C.2.

        - `cls`, `bottleneck`: normalized CLS tokens after the last `num_blocks` blocks, concatenated.
        - read-outs with slots: normalized CLS tokens after the last `num_blocks - 1` blocks, and the
          unnormalized encoding.
        - `gap`: mean normalized patch tokens after the last `num_blocks` blocks.
        """
        available = len(self.backbone.blocks) + (self.readout is not None)
        if not 1 <= num_blocks <= available:
            raise ValueError(f"num_blocks is {num_blocks}, expected 1 to {available} for this encoder")
        return self.features(images, ["probe"], num_blocks)["probe"]

    def features(self, images: Tensor, names: Sequence[str], num_blocks: int = 4) -> dict[str, Tensor]:
        """Features of images (B, 3, height, width) by name, each (B, F), in one pass of the backbone.

        - encoding: the result of `forward`.
        - cls, patch_mean: the normalized CLS token, the mean normalized patch token.
        - tokens: all normalized tokens, concatenated.
        - blocks: patch_mean for `gap`, else cls, after each of the last `num_blocks` blocks (all blocks if
          there are fewer), earliest first, concatenated.
        - probe: the result of `probe_features`.

        Raises:
            ValueError: a name is unknown.
        """
        unknown = [name for name in names if name not in FEATURES]
        if unknown:
            raise ValueError(f"feature {unknown[0]!r} is unknown, expected some of {', '.join(FEATURES)}")
        several = "blocks" in names or "probe" in names
        outputs = self.backbone.block_outputs(images, last=num_blocks if several else 1)
        tokens = [self.backbone.norm(x_BND) for x_BND in outputs]
        encoding = self.read(tokens[-1])
        blocks = [x_BND[:, 1:].mean(dim=1) if self.readout_name == "gap" else x_BND[:, 0] for x_BND in tokens]
        of_probe = blocks
        if self.readout is not None:
            of_probe = [*blocks[max(0, len(blocks) - (num_blocks - 1)) :], encoding]
        every = {
            "encoding": encoding,
            "cls": tokens[-1][:, 0],
            "patch_mean": tokens[-1][:, 1:].mean(dim=1),
            "tokens": tokens[-1].flatten(1),
            "blocks": torch.cat(blocks, dim=-1),
            "probe": torch.cat(of_probe, dim=-1),
        }
        return {name: every[name] for name in names}


class DinoModel(nn.Module):
    """Encoder and head, as student or teacher: groups of crops -> prototype logits."""

    def __init__(self, encoder: Encoder, head: DINOHead) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = head

    def compile_blocks(self) -> None:
        """Compile the blocks for the forward pass of this model; that of `encoder` itself stays uncompiled.

        All blocks are one compiled function, which takes less time to compile than the whole backbone.
        """
        self.encoder.backbone.run_block = compiled(run_block, dynamic=False)

    def forward(self, crop_groups: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Groups of crops of equal size, each (C_i, B, 3, side, side) -> logits (C*B, K), encodings (C*B, E).

        Rows are crop-major. The head runs once on all crops. In mixed precision the backbone also runs once
        on all groups, and all weights are cast at once. In float32 it runs per group, as in the official
        code, so that gradients are rounded in the same way.
        """
        batches = [crops.flatten(0, 1) for crops in crop_groups]
        device = batches[0].device.type
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
            full = {name: weight for name, weight in self._weights().items() if weight.dtype != dtype}
            if full:
                weights = dict(zip(full, CastTogether.apply(dtype, *full.values()), strict=True))
                return functional_call(self, weights, (crop_groups,))
            tokens = self.encoder.backbone.tokens_of_sizes(batches)
        else:
            tokens = [
                tokens for batch in batches for tokens in self.encoder.backbone.tokens_of_sizes([batch])
            ]
        encodings = torch.cat([self.encoder.read(tokens_BND) for tokens_BND in tokens])
        return self.head(encodings), encodings

    def _weights(self) -> dict[str, Tensor]:
        """The parameters that autocast would cast: of linear layers and convolutions, except `last_layer`."""
        return {
            f"{name}.{of_layer}": weight
            for name, layer in self.named_modules()
            if isinstance(layer, nn.Linear | nn.Conv2d)
            for of_layer, weight in layer.named_parameters(recurse=False)
        }


class CastTogether(torch.autograd.Function):
    """Cast tensors to another dtype by one operator, and their gradients back when all of them are there."""

    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        cast = [torch.empty_like(tensor, dtype=dtype) for tensor in tensors]
        torch._foreach_copy_(cast, tensors)
        both = zip(cast, tensors, strict=True)
        ctx.mark_non_differentiable(*(copied for copied, tensor in both if not tensor.requires_grad))
        ctx.dtype = tensors[0].dtype
        return tuple(cast)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        given = [gradient for gradient in gradients if gradient is not None]
        cast = [torch.empty_like(gradient, dtype=ctx.dtype) for gradient in given]
        torch._foreach_copy_(cast, given)
        in_order = iter(cast)
        return None, *(None if gradient is None else next(in_order) for gradient in gradients)


def build_encoder(
    arch: str | Mapping[str, int] = "vit_small",
    patch_size: int = 16,
    image_size: int = 224,
    readout: str = "sparo",
    drop_path_rate: float = 0.0,
    **readout_options: Any,
) -> Encoder:
    """Build a freshly initialized encoder.

    Args:
        arch: vit_tiny | vit_small | vit_base, or a mapping with width, depth, num_heads. Depth counts the
            blocks of the plain ViT; a read-out with slots replaces the last one.
        patch_size: side of a patch in pixels.
        image_size: side in pixels of the images whose patch grid is that of the position embedding.
        readout: sparo | cls | gap | pooler | bottleneck.
        drop_path_rate: stochastic depth rate of the last block.
        readout_options:
            - `sparo`: num_slots, slot_dim, key_dim, output, and group_size (heads="separate", the default) or
              num_heads (heads="multi"), as in `sparo_readout`.
            - `pooler`: num_slots, slot_dim, num_heads, output.
            - `sparo` and `pooler`: after_last_block=True to read the output of the last block.
            - `bottleneck`: bottleneck_dim, encoding_dim.

    Raises:
        ValueError: a name is unknown, or sizes do not divide.
        TypeError: an option is missing, or not one of this read-out.
    """
    arch = architecture(arch)
    if not isinstance(readout, str) or readout not in READOUTS:
        raise ValueError(f"readout is {readout!r}, expected one of {', '.join(READOUTS)}")
    place, has_slots, width = READOUTS[readout].module, READOUTS[readout].has_slots, arch["width"]
    if place is None and readout_options:
        raise ValueError(f"readout {readout!r} takes no options, got {', '.join(readout_options)}")
    replaces_block = has_slots and not readout_options.pop("after_last_block", False)
    backbone = VisionTransformer(
        image_size=image_size,
        patch_size=patch_size,
        width=width,
        depth=arch["depth"] - replaces_block,
        num_heads=arch["num_heads"],
        drop_path_rate=drop_path_rate,
    )
    if place is None:
        return Encoder(backbone, readout)
    module, _, name = place.partition(":")
    built = getattr(importlib.import_module(module), name)(width, **readout_options)
    return Encoder(backbone, readout, built) if has_slots else Encoder(backbone, readout, bottleneck=built)

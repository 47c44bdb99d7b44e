"""Our encoders as models of timm: importing this module registers `vit_{tiny,small,base}_patch16_sparo_224`.

    import timm
    import dino_sparo.interop.timm_models
    model = timm.create_model("local-dir:FOLDER", pretrained=True)  # a folder of `dino-sparo export`

Axis letters: B images, N tokens (CLS first), D width, L slots, V slot width.
"""

from collections.abc import Collection, Mapping
from typing import Any

import torch
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from dino_sparo.interop.timm_folder import PREFIX, SPARO_SIZES, pretrained_config
from dino_sparo.models import Encoder, build_encoder
from dino_sparo.models.backbone import resize_matrix
from dino_sparo.models.encoder import ARCHITECTURES
from dino_sparo.models.readouts import SlotReadout

POOLINGS = ("readout", "")


class SparoVisionTransformer(Encoder):
    """An Encoder with timm's interface and a classifier; its state dict is the Encoder's, plus `head`.

    Images may have any size that the patch size divides, since the position embedding is resized as in the
    official code; `dynamic_img_size` has no effect.

    Args:
        img_size: side in pixels of the images whose patch grid is that of the position embedding.
        num_classes: outputs of the classifier; 0: the model returns the encoding.
        global_pool: "readout", or "" for the tokens without pooling.
        embed_dim, depth, num_heads: of the plain ViT; a read-out that replaces the last block reduces the
            number of blocks by one.
        num_slots, slot_dim, key_dim, group_size: of SPARO.
        readout: another read-out instead, as `name` and the options of `build_encoder`.
        drop_rate: dropout before the classifier.

    As in timm, `num_features` is the dimension of the output of `forward_features`, and `head_hidden_size`
    that of `forward_head` before the classifier: the encoding, L * V with slots.
    """

    def __init__(
        self,
        img_size: int | Collection[int] = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        num_classes: int = 0,
        global_pool: str = "readout",
        embed_dim: int = 384,
        depth: int = 12,
        num_heads: int = 6,
        num_slots: int = SPARO_SIZES["num_slots"],
        slot_dim: int = SPARO_SIZES["slot_dim"],
        key_dim: int = SPARO_SIZES["key_dim"],
        group_size: int = SPARO_SIZES["group_size"],
        readout: Mapping[str, Any] | None = None,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        dynamic_img_size: bool = True,
    ) -> None:
        if in_chans != 3:
            raise ValueError(f"in_chans is {in_chans}, expected 3: the encoder takes RGB images only")
        sides = {img_size} if isinstance(img_size, int) else set(img_size)
        if len(sides) != 1:
            raise ValueError(
                f"img_size is {img_size}, expected a square; leave it out, since any image size is accepted"
            )
        sizes = {"num_slots": num_slots, "slot_dim": slot_dim, "key_dim": key_dim, "group_size": group_size}
        options = dict(readout or {"name": "sparo", **sizes})
        encoder = build_encoder(
            arch={"width": embed_dim, "depth": depth, "num_heads": num_heads},
            patch_size=patch_size,
            image_size=sides.pop(),
            readout=options.pop("name"),
            drop_path_rate=drop_path_rate,
            **options,
        )
        super().__init__(encoder.backbone, encoder.readout_name, encoder.readout, encoder.bottleneck)
        self.in_chans, self.num_features, self.head_hidden_size = in_chans, embed_dim, self.embed_dim
        self.num_prefix_tokens = 1
        self.feature_info = [
            {"module": f"backbone.blocks.{index}", "num_chs": embed_dim, "reduction": patch_size}
            for index in range(len(self.backbone.blocks))
        ]
        self.head_drop = nn.Dropout(drop_rate)
        self.global_pool = global_pool
        self.reset_classifier(num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, 3, height, width) -> logits (B, num_classes), or encodings (B, L * V) if that is 0."""
        return self.forward_head(self.forward_features(images))

    def forward_features(self, images: Tensor) -> Tensor:
        """Images (B, 3, height, width) -> normalized tokens (B, N, D), CLS first."""
        return self.tokens(images)

    def forward_head(self, tokens_BND: Tensor, pre_logits: bool = False) -> Tensor:
        """Normalized tokens (B, N, D) -> logits, or the encodings (B, L * V) before the classifier."""
        pooled = self.head_drop(self.read(tokens_BND) if self.global_pool else tokens_BND)
        return pooled if pre_logits else self.head(pooled)

    def set_input_size(
        self, img_size: int | tuple[int, int] | None = None, patch_size: int | tuple[int, int] | None = None
    ) -> None:
        """As in timm, but without effect: any size is accepted. Raises ValueError: the patches do not fit."""
        side = self.backbone.patch_size
        if patch_size not in (None, side, (side, side)):
            raise ValueError(f"patch_size is {patch_size}, expected {side}, the patch size of the weights")
        sides = (img_size,) if isinstance(img_size, int) else img_size or ()
        if any(one % side for one in sides):
            raise ValueError(f"img_size is {img_size}, expected multiples of the patch size {side}")

    def slots(self, images: Tensor) -> Tensor:
        """Images (B, 3, height, width) -> slots (B, L, V). Raises ValueError: there are none."""
        return self._slot_readout()(self.tokens(images))

    def attention(self, images: Tensor) -> Tensor:
        """Images (B, 3, height, width) -> attention (B, L, N) of every slot. Raises ValueError as `slots`."""
        return self._slot_readout().attention(self.tokens(images))

    def _slot_readout(self) -> SlotReadout:
        if self.readout is None:
            raise ValueError(f"the read-out {self.readout_name!r} has no slots; expected sparo or pooler")
        return self.readout

    def get_classifier(self) -> nn.Module:
        """The classifier; an identity without classes."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier by a new one; the pooling is unchanged unless it is given."""
        pooling = self.global_pool if global_pool is None else global_pool
        if pooling not in POOLINGS:
            raise ValueError(f"global_pool is {pooling!r}, expected 'readout', or '' for no pooling")
        self.num_classes, self.global_pool = num_classes, pooling
        self.head: nn.Module = nn.Identity()
        if num_classes > 0:
            width, like = self.embed_dim if pooling else self.num_features, self.backbone.cls_token
            self.head = nn.Linear(width, num_classes, device=like.device, dtype=like.dtype)
            nn.init.trunc_normal_(self.head.weight, std=0.02)
            nn.init.zeros_(self.head.bias)

    def forward_intermediates(
        self,
        images: Tensor,
        indices: int | list[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """As timm's VisionTransformer: outputs of blocks, as maps (B, D, rows, columns) or "NLC" (B, N-1, D).

        Args:
            indices: number of last blocks, list of blocks, or None for all.
            return_prefix_tokens: return pairs, with the CLS token (B, 1, D) second.
            norm: apply the final norm to the outputs.
            stop_early: no effect: all blocks run; pruned models (`features_only`) have no others.
            intermediates_only: return only the list, else (normalized tokens, list).
        """
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"output_fmt is {output_fmt!r}, expected NCHW or NLC")
        backbone = self.backbone
        taken, _ = feature_take_indices(len(backbone.blocks), indices)
        outputs = backbone.block_outputs(images, last=len(backbone.blocks))
        rows = images.shape[-2] // backbone.patch_size
        intermediates: list[Any] = []
        for index in taken:
            x_BND = backbone.norm(outputs[index]) if norm else outputs[index]
            cls_B1D, patches = x_BND[:, :1], x_BND[:, 1:]
            if output_fmt == "NCHW":
                patches = patches.transpose(1, 2).unflatten(2, (rows, -1)).contiguous()
            intermediates.append((patches, cls_B1D) if return_prefix_tokens else patches)
        return intermediates if intermediates_only else (backbone.norm(outputs[-1]), intermediates)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove the blocks after the last of `indices`, and what follows; returns the indices from 0."""
        taken, last = feature_take_indices(len(self.backbone.blocks), indices)
        self.backbone.blocks = self.backbone.blocks[: last + 1]
        if prune_norm:
            self.backbone.norm = nn.Identity()  # type: ignore[assignment]
        if prune_head:
            self.readout = self.bottleneck = None
            self.reset_classifier(0, "")
        return taken

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute activations of blocks in the backward pass."""
        self.backbone.activation_checkpointing = enable

    def no_weight_decay(self) -> set[str]:
        """Parameters without weight decay in timm's optimizers, as in its own ViT."""
        return {"backbone.pos_embed", "backbone.cls_token"}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Groups for a learning rate by depth: stem, blocks (the norm with the last one), read-out."""
        return {
            "stem": r"^backbone\.(?:cls_token|pos_embed|patch_embed)",
            "blocks": [(r"^backbone\.blocks\.(\d+)", None), (r"^backbone\.norm", (99999,))],
            "readout": r"^(?:readout|bottleneck)\.",
        }


def _fitted(state: dict[str, Tensor], model: SparoVisionTransformer) -> dict[str, Tensor]:
    """A stored state dict, also with the names of timm's own ViT; its position embedding is resized to the
    model's grid."""
    if "cls_token" in state:
        state = {name if name.startswith("head.") else PREFIX + name: value for name, value in state.items()}
    name, grid = f"{PREFIX}pos_embed", model.backbone.native_grid
    stored_1ND = state.get(name)
    if stored_1ND is None or stored_1ND.shape[1] == 1 + grid**2:
        return state
    native = round((stored_1ND.shape[1] - 1) ** 0.5)
    resized_1ND = resize_matrix(native, grid, grid).to(stored_1ND) @ stored_1ND[:, 1:]
    return state | {name: torch.cat((stored_1ND[:, :1], resized_1ND), dim=1)}


def _create(variant: str, pretrained: bool, **kwargs: Any) -> nn.Module:
    arch = ARCHITECTURES[variant.partition("_patch16")[0]]
    sizes = {"embed_dim": arch["width"], "depth": arch["depth"], "num_heads": arch["num_heads"]}
    return build_model_with_cfg(
        SparoVisionTransformer,
        variant,
        pretrained,
        pretrained_filter_fn=_fitted,
        feature_cfg={"out_indices": kwargs.pop("out_indices", 3), "feature_cls": "getter"},
        **(sizes | kwargs),
    )


default_cfgs = generate_default_cfgs(
    {f"{name}_patch16_sparo_224.untrained": pretrained_config(224) for name in ARCHITECTURES}
)


@register_model
def vit_tiny_patch16_sparo_224(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ViT-Ti/16 with SPARO in place of its last block."""
    return _create("vit_tiny_patch16_sparo_224", pretrained, **kwargs)


@register_model
def vit_small_patch16_sparo_224(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ViT-S/16 with SPARO in place of its last block."""
    return _create("vit_small_patch16_sparo_224", pretrained, **kwargs)


@register_model
def vit_base_patch16_sparo_224(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ViT-B/16 with SPARO in place of its last block."""
    return _create("vit_base_patch16_sparo_224", pretrained, **kwargs)

"""A straightforward implementation of training, with which `bench --compare` compares this package.

It imports nothing of this package. It uses networks whose parameters have DINO's official names
(`encoder.backbone`, `encoder.readout`, `head`), and computes the values of `train_step` in the same order,
each part in its simplest form: stored attention weights, SPARO with the keys of every token, a log-softmax
per pair of crops, Python loops over parameters, and host synchronizations for the loss and for every norm.
Mixed precision includes the prototypes, as in the official code. One process, no gradient accumulation.
`plain_batches` makes all views with torchvision in the workers, as float tensors.

Axis letters: B images, C crops, N tokens, D width, L slots, H key width, K prototypes.
"""

import math
import random
from collections.abc import Generator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, RandomSampler
from torchvision.transforms import v2 as T

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet
NUM_GLOBAL_CROPS = 2
ENDLESS = 10**12  # samples of an epoch


@dataclass
class PlainState:
    """The state that `plain_step` updates, and the constants of its loss."""

    student: Any
    teacher: Any
    center: Tensor
    """(1, K)"""
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    student_temp: float
    center_momentum: float


def plain_state(
    student: nn.Module,
    teacher: nn.Module,
    center: Tensor,
    *,
    student_temp: float,
    center_momentum: float,
    loss_scaling: bool,
) -> PlainState:
    """The initial state of a run with these networks and this center (1, K), which others must not use."""
    decayed: list[Tensor] = []
    others: list[Tensor] = []
    for name, parameter in student.named_parameters():
        if parameter.requires_grad:
            (others if name.endswith(".bias") or parameter.ndim == 1 else decayed).append(parameter)
    groups: list[dict[str, Any]] = [{"params": decayed}, {"params": others, "weight_decay": 0.0}]
    return PlainState(
        student=student,
        teacher=teacher,
        center=center,
        optimizer=torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.999), foreach=False, fused=False),
        scaler=torch.amp.GradScaler(center.device.type, enabled=loss_scaling),
        student_temp=student_temp,
        center_momentum=center_momentum,
    )


def plain_step(
    state: PlainState,
    crop_groups: list[Tensor],
    *,
    lr: float,
    weight_decay: float,
    momentum: float,
    teacher_temp: float,
    freeze_last_layer: bool,
    clip_norm: float,
    autocast: AbstractContextManager[Any],
) -> float:
    """One optimizer step on groups of normalized crops (C_i, B, 3, side, side); returns the loss."""
    for group in state.optimizer.param_groups:
        group["lr"] = lr
    state.optimizer.param_groups[0]["weight_decay"] = weight_decay
    with autocast:
        with torch.no_grad():
            teacher_logits = plain_forward(state.teacher, crop_groups[:1])  # (2*B, K)
        student_logits = plain_forward(state.student, crop_groups)  # (C*B, K)
        loss = plain_loss(state, student_logits, teacher_logits, teacher_temp)
    value = float(loss.item())
    if not math.isfinite(value):
        raise RuntimeError(f"the loss of the plain step is {value}")
    for parameter in state.student.parameters():
        parameter.grad = None
    state.scaler.scale(loss).backward()
    plain_update(state, momentum, clip_norm, freeze_last_layer=freeze_last_layer)
    plain_center_update(state, teacher_logits)
    return value


def plain_forward(model: Any, crop_groups: list[Tensor]) -> Tensor:
    """Groups of crops (C_i, B, 3, side, side) -> prototype logits (C*B, K), crop-major."""
    encodings = torch.cat([_encode(model.encoder, crops.flatten(0, 1)) for crops in crop_groups])
    return model.head.last_layer(F.normalize(model.head.mlp(encodings), dim=-1))


def plain_loss(
    state: PlainState, student_logits: Tensor, teacher_logits: Tensor, teacher_temp: float
) -> Tensor:
    """The loss, with one cross-entropy per pair of different crops; logits as for `DINOLoss`."""
    num_crops = 2 * len(student_logits) // len(teacher_logits)
    students = (student_logits / state.student_temp).chunk(num_crops)
    teachers = F.softmax((teacher_logits - state.center) / teacher_temp, dim=-1).detach().chunk(2)
    losses = []
    for teacher_crop, targets_BK in enumerate(teachers):
        for student_crop, scaled_BK in enumerate(students):
            if student_crop != teacher_crop:
                cross_entropy_B = torch.sum(-targets_BK * F.log_softmax(scaled_BK, dim=-1), dim=-1)
                losses.append(cross_entropy_B.mean())
    return torch.stack(losses).sum() / len(losses)


@torch.no_grad()
def plain_update(state: PlainState, momentum: float, clip_norm: float, *, freeze_last_layer: bool) -> None:
    """Clip gradients, drop those of a frozen last layer, step AdamW, update the teacher."""
    state.scaler.unscale_(state.optimizer)
    for parameter in state.student.parameters():
        if clip_norm and parameter.grad is not None:
            factor = clip_norm / (parameter.grad.norm(2) + 1e-6)
            if factor < 1:  # synchronizes the host with the device
                parameter.grad.mul_(factor)
    if freeze_last_layer:
        for parameter in state.student.head.last_layer.parameters():
            parameter.grad = None
    state.scaler.step(state.optimizer)
    state.scaler.update()
    for averaged, current in zip(state.teacher.parameters(), state.student.parameters(), strict=True):
        averaged.mul_(momentum).add_((1 - momentum) * current)


@torch.no_grad()
def plain_center_update(state: PlainState, teacher_logits: Tensor) -> None:
    """Move the center towards the mean of the teacher's logits (2*B, K)."""
    mean_1K = teacher_logits.float().sum(dim=0, keepdim=True) / len(teacher_logits)
    state.center = state.center * state.center_momentum + mean_1K * (1 - state.center_momentum)


def direct_sparo(sparo: Any, tokens_BND: Tensor, token_mask: Tensor | None = None) -> Tensor:
    """SPARO by equation 1 without folding, with keys (B, N, L, H); returns (B, L, V)."""
    keys = sparo.key_proj(tokens_BND).unflatten(-1, (sparo.num_groups, sparo.key_dim))
    keys_BNLH = keys.repeat_interleave(sparo.group_size, dim=2)
    logits_BNL = (keys_BNLH * sparo.query).sum(-1) / math.sqrt(sparo.key_dim)
    if token_mask is not None:
        logits_BNL = logits_BNL.masked_fill(~token_mask[:, :, None], -math.inf)
    pooled_BLH = torch.einsum("bnl,bnlh->blh", logits_BNL.softmax(dim=1), keys_BNLH)
    return sparo.value_proj(pooled_BLH)


def _encode(encoder: Any, images: Tensor) -> Tensor:
    """Images (B, 3, height, width) -> encodings (B, embed_dim)."""
    tokens_BND = _tokens(encoder.backbone, images)
    if type(encoder.readout).__name__ == "Sparo":
        return direct_sparo(encoder.readout, tokens_BND).flatten(1)
    return encoder.read(tokens_BND)  # other read-outs are already in their simplest form


def _tokens(backbone: Any, images: Tensor) -> Tensor:
    """Images (B, 3, height, width) -> normalized tokens (B, N, D)."""
    patches_BND = backbone.patch_embed.proj(images).flatten(2).transpose(1, 2)
    x_BND = torch.cat((backbone.cls_token.expand(len(images), -1, -1), patches_BND), dim=1)
    x_BND = x_BND + _position_embedding(
        backbone, *(side // backbone.patch_size for side in images.shape[-2:])
    )
    for block in backbone.blocks:
        x_BND = x_BND + block.drop_path1(_attend(block.attn, block.norm1(x_BND), backbone.num_heads))
        hidden = F.gelu(block.mlp.fc1(block.norm2(x_BND)))  # (B, N, 4 * D)
        x_BND = x_BND + block.drop_path2(block.mlp.fc2(hidden))
    return backbone.norm(x_BND)


def _attend(attention: Any, tokens_BND: Tensor, num_heads: int) -> Tensor:
    """Self-attention with stored weights (B, heads, N, N); returns (B, N, D)."""
    batch, count, dim = tokens_BND.shape
    qkv = attention.qkv(tokens_BND).reshape(batch, count, 3, num_heads, dim // num_heads)
    query, key, value = qkv.permute(2, 0, 3, 1, 4)  # (B, heads, N, D / heads) each
    weights = (query @ key.transpose(-2, -1) * (dim // num_heads) ** -0.5).softmax(dim=-1)
    return attention.proj((weights @ value).transpose(1, 2).reshape(batch, count, dim))


def _position_embedding(backbone: Any, rows: int, columns: int) -> Tensor:
    """Position embedding (1, 1 + rows * columns, D), resized in every call."""
    native, embedding_1ND = backbone.native_grid, backbone.pos_embed
    if rows == columns == native:
        return embedding_1ND
    grid = embedding_1ND[:, 1:].reshape(1, native, native, -1).permute(0, 3, 1, 2)  # (1, D, native, native)
    scale = ((rows + 0.1) / native, (columns + 0.1) / native)
    grid = F.interpolate(grid, scale_factor=scale, mode="bicubic")  # (1, D, rows, columns)
    return torch.cat((embedding_1ND[:, :1], grid.flatten(2).transpose(1, 2)), dim=1)


class PlainViews(Dataset):
    """A dataset of crops made by torchvision: normalized float32 (3, side, side) each, global crops first.

    Args:
        source: has a length, and `load(number)` returns an RGB PIL image.
        crop_kinds: for each crop the parameters of its augmentation.
    """

    def __init__(self, source: Any, crop_kinds: Sequence[Any]) -> None:
        self.source, self.transforms = source, [_transform(kind) for kind in crop_kinds]

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, sample: int) -> list[Tensor]:
        image = self.source.load(sample)
        return [transform(image) for transform in self.transforms]


def _transform(kind: Any) -> Any:
    """DINO's augmentation of one crop. Source: official `DataAugmentationDINO`."""
    jitter = T.ColorJitter(*kind.jitter_strength)
    return T.Compose(
        [
            T.RandomResizedCrop(kind.size, kind.scale, interpolation=T.InterpolationMode(kind.interpolation)),
            T.RandomHorizontalFlip(kind.flip_probability),
            T.RandomApply([jitter], kind.jitter_probability),
            T.RandomGrayscale(kind.grayscale_probability),
            T.RandomApply([T.Lambda(partial(_blur, radius=kind.blur_radius))], kind.blur_probability),
            T.RandomSolarize(128, kind.solarize_probability),
            T.PILToTensor(),
            T.ToDtype(torch.float32, scale=True),
            T.Normalize(MEAN, STD),
        ]
    )


def _blur(image: Image.Image, radius: tuple[float, float]) -> Image.Image:
    return image.filter(ImageFilter.GaussianBlur(random.uniform(*radius)))


def plain_batches(
    dataset: PlainViews, *, batch_size: int, num_workers: int, prefetch_batches: int, device: torch.device
) -> Generator[list[Tensor]]:
    """Endless groups of crops (C_i, B, 3, side, side) on the device."""
    loader: DataLoader = DataLoader(
        dataset,
        batch_size,
        # An endless epoch: in a short one some workers would get no batch.
        sampler=RandomSampler(dataset, replacement=True, num_samples=ENDLESS),
        num_workers=num_workers,
        prefetch_factor=prefetch_batches if num_workers else None,
        pin_memory=device.type == "cuda",
    )
    for crops in loader:
        yield crop_groups([crop.to(device, non_blocking=True) for crop in crops])


def crop_groups(crops: list[Tensor]) -> list[Tensor]:
    """Crops (B, 3, side, side), global crops first -> one tensor (C_i, B, 3, side, side) per size."""
    groups = (crops[:NUM_GLOBAL_CROPS], crops[NUM_GLOBAL_CROPS:])
    return [torch.stack(group) for group in groups if group]

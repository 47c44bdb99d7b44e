"""Health of slots: attention, variation over images, and differences between slots.

Axis letters: B images, L slots, N tokens (CLS first), V slot width.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from dino_sparo.models import Encoder
from dino_sparo.parallel.distributed import sum_over_ranks

# Squared distances between encodings are sums over slots. A slot with 5 % of the median standard deviation
# contributes 0.25 % of a median slot, too little to change neighbors.
DEAD_RELATIVE_STD = 0.05
# Detects dead slots also if all are dead: the standard deviation relative to the norm of the slot's output.
DEAD_OWN_STD = 0.01
# At most a tenth of the attention of duplicate slots differs.
DUPLICATE_OVERLAP = 0.9
HEALTH_IMAGES = 8  # of a batch of each process, on which training measures the health of slots


def attention_entropy(attn_BLN: Tensor) -> Tensor:
    """Entropy (B, L) of attention over all tokens in nats: ln N if uniform, 0 if on one token."""
    return torch.special.entr(attn_BLN).sum(dim=-1)


def effective_patches(attn_BLN: Tensor) -> Tensor:
    """Effective number of patches (B, L), from 1 to N - 1, independent of the attention on CLS.

    It is exp of the entropy of the attention on patches, normalized to one.
    """
    patches_BLN = attn_BLN[..., 1:]
    total_BL1 = patches_BLN.sum(dim=-1, keepdim=True).clamp(min=torch.finfo(attn_BLN.dtype).tiny)
    return attention_entropy(patches_BLN / total_BL1).exp()


def attention_overlap(attn_BLN: Tensor) -> Tensor:
    """Overlap of the attention of two slots, (B, L, L): the sum over all tokens of the minimum, from 0 to 1.

    Attention over all tokens sums to one, so the overlap is one minus half of the L1 distance.
    """
    return 1 - torch.cdist(attn_BLN, attn_BLN, p=1) / 2


def attention_agreement(attn_BLN: Tensor, other_BLN: Tensor) -> Tensor:
    """Overlap (B, L) of each slot's attention in two encoders."""
    return torch.minimum(attn_BLN, other_BLN).sum(dim=-1)


@dataclass(frozen=True)
class SlotHealth:
    """Statistics of each slot, (L,), as means over images.

    Attributes:
        entropy, effective_patches: as the functions above.
        cls_share: share of attention on the CLS token.
        response_std: root mean square distance of the slot's output from its mean over images.
        dead: whether response_std is below 5 % of the median over slots, or at most 1 % of the root mean
            square norm of the slot's output.
        nearest, overlap: the other slot whose attention overlaps most, and the overlap.
        duplicate: whether overlap is above 0.9.
        agreement: overlap with the same slot of another encoder; None without one.
    """

    entropy: Tensor
    effective_patches: Tensor
    cls_share: Tensor
    response_std: Tensor
    dead: Tensor
    nearest: Tensor
    overlap: Tensor
    duplicate: Tensor
    agreement: Tensor | None


class SlotStatistics:
    """Sums over images of all batches and processes, without storing attention maps."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}

    @torch.no_grad()
    def add(self, attn_BLN: Tensor, slots_BLV: Tensor, other_BLN: Tensor | None = None) -> None:
        """Add attention and output of the slots for a batch, and their attention in another encoder."""
        attn_BLN, slots_BLV = attn_BLN.float(), slots_BLV.double()
        sums = {
            "number": torch.full((1,), len(attn_BLN), dtype=torch.float64, device=attn_BLN.device),
            "entropy": attention_entropy(attn_BLN).double().sum(dim=0),
            "effective_patches": effective_patches(attn_BLN).double().sum(dim=0),
            "cls_share": attn_BLN[..., 0].double().sum(dim=0),
            "output": slots_BLV.sum(dim=0),
            "square": (slots_BLV**2).sum(dim=(0, 2)),
            "overlap": attention_overlap(attn_BLN).double().sum(dim=0),
        }
        if other_BLN is not None:
            sums["agreement"] = attention_agreement(attn_BLN, other_BLN.float()).double().sum(dim=0)
        self._sums = {name: value + self._sums.get(name, 0) for name, value in sums.items()}

    @torch.no_grad()
    def health(self) -> SlotHealth:
        """The statistics, on the device; every process calls it once."""
        flat = sum_over_ranks(torch.cat([value.flatten() for value in self._sums.values()]))
        parts = flat.split([value.numel() for value in self._sums.values()])
        sums = {name: part.view_as(self._sums[name]) for name, part in zip(self._sums, parts, strict=True)}
        number = sums.pop("number")
        mean = {name: value / number for name, value in sums.items()}
        std_L = (mean["square"] - (mean["output"] ** 2).sum(dim=1)).clamp(min=0).sqrt()
        overlap, nearest = mean["overlap"].fill_diagonal_(0).max(dim=1)
        return SlotHealth(
            entropy=mean["entropy"],
            effective_patches=mean["effective_patches"],
            cls_share=mean["cls_share"],
            response_std=std_L,
            dead=(std_L < DEAD_RELATIVE_STD * std_L.quantile(0.5))
            | (std_L <= DEAD_OWN_STD * mean["square"].sqrt()),
            nearest=nearest,
            overlap=overlap,
            duplicate=overlap > DUPLICATE_OVERLAP,
            agreement=mean.get("agreement"),
        )


def look_at_slots(encoder: Encoder, images: Tensor) -> tuple[Tensor, Tensor]:
    """Attention (B, L, N) and output (B, L, V) of the slots for normalized images."""
    assert encoder.readout is not None
    tokens_BND = encoder.tokens(images)
    return encoder.readout.attention(tokens_BND), encoder.readout(tokens_BND)


@torch.no_grad()
def slot_health(teacher: Encoder, student: Encoder, images: Tensor) -> dict[str, Tensor]:
    """Health of the teacher's slots on normalized images (B, 3, height, width); empty without slots.

    Values are scalars on the device. The student is evaluated in evaluation mode, which draws no random
    numbers.

    - slot_entropy: mean entropy of attention over all tokens in nats; ln N if uniform.
    - slot_effective_patches: mean effective number of patches.
    - slot_cls_share: mean share of attention on the CLS token.
    - slots_dead, slots_duplicate: numbers of dead and duplicate slots, as in `SlotHealth`.
    - slot_agreement: mean overlap of attention in teacher and student.
    """
    if teacher.readout is None:
        return {}
    was_training = student.training
    student.eval()
    try:
        assert student.readout is not None
        other_BLN = student.readout.attention(student.tokens(images))
    finally:
        student.train(was_training)
    statistics = SlotStatistics()
    statistics.add(*look_at_slots(teacher, images), other_BLN)
    health = statistics.health()
    assert health.agreement is not None
    return {
        "slot_entropy": health.entropy.mean().float(),
        "slot_effective_patches": health.effective_patches.mean().float(),
        "slot_cls_share": health.cls_share.mean().float(),
        "slots_dead": health.dead.sum().float(),
        "slots_duplicate": health.duplicate.sum().float(),
        "slot_agreement": health.agreement.mean().float(),
    }

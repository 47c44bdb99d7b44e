"""How well the slots do: where they look, whether they vary over images and differ from each other.

Axis letters: B images, L slots, N tokens (CLS first), V slot width.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from dino_sparo.models import Encoder
from dino_sparo.parallel.distributed import sum_over_ranks

# Distances between encodings are sums over slots: of a slot that varies a twentieth as much as the middle one
# 0.25 % of a middle slot's part is left, which changes no neighbor.
DEAD_RELATIVE_STD = 0.05
# Where all slots have died none is below the others: then each is a constant, to within a hundredth.
DEAD_OWN_STD = 0.01
# Of such two slots at most a tenth of the attention differs: they read the same.
DUPLICATE_OVERLAP = 0.9


def attention_entropy(attn_BLN: Tensor) -> Tensor:
    """Entropy (B, L) of attention over all tokens in nats: ln N everywhere alike, 0 on one token."""
    return torch.special.entr(attn_BLN).sum(dim=-1)


def effective_patches(attn_BLN: Tensor) -> Tensor:
    """Number of patches (B, L) that attention is spread over: 1 to N - 1, whatever lies on CLS.

    It is exp of the entropy over the patches, whose shares are scaled to one first.
    """
    patches_BLN = attn_BLN[..., 1:]
    total_BL1 = patches_BLN.sum(dim=-1, keepdim=True).clamp(min=torch.finfo(attn_BLN.dtype).tiny)
    return attention_entropy(patches_BLN / total_BL1).exp()


def attention_overlap(attn_BLN: Tensor) -> Tensor:
    """Attention that each two slots have in common, (B, L, L): sum over the tokens of the lesser share, 0..1.

    All tokens count, CLS too, so that the shares sum to one: then it is one less half of their distance.
    """
    return 1 - torch.cdist(attn_BLN, attn_BLN, p=1) / 2


def attention_agreement(attn_BLN: Tensor, other_BLN: Tensor) -> Tensor:
    """Overlap (B, L) of each slot's attention in one encoder with its attention in another."""
    return torch.minimum(attn_BLN, other_BLN).sum(dim=-1)


@dataclass(frozen=True)
class SlotHealth:
    """Numbers of every slot, each (L,), means over images.

    Attributes:
        entropy, effective_patches: as the functions above.
        cls_share: share of attention on the CLS token.
        response_std: root mean square distance of the slot's output from its mean over images.
        dead: whether that is below 5 % of the middle slot's, or 1 % of the length of its own output.
        nearest, overlap: the other slot whose attention overlaps most, and by how much.
        duplicate: whether that is above 0.9.
        agreement: overlap with the same slot of the other encoder; None without one.
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
    """Sums over images, batch by batch and over all processes: no maps are kept."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}

    @torch.no_grad()
    def add(self, attn_BLN: Tensor, slots_BLV: Tensor, other_BLN: Tensor | None = None) -> None:
        """Attention and output of the slots for some images, and the attention of another encoder's."""
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
        """What the sums say, left on the device; every process calls it, once."""
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
            dead=(std_L < DEAD_RELATIVE_STD * _middle(std_L))
            | (std_L <= DEAD_OWN_STD * mean["square"].sqrt()),
            nearest=nearest,
            overlap=overlap,
            duplicate=overlap > DUPLICATE_OVERLAP,
            agreement=mean.get("agreement"),
        )


def _middle(values: Tensor) -> Tensor:
    """The median; of an even number of values the mean of the two in the middle."""
    ordered = values.sort().values
    return (ordered[(len(values) - 1) // 2] + ordered[len(values) // 2]) / 2


def look_at_slots(encoder: Encoder, images: Tensor) -> tuple[Tensor, Tensor]:
    """Attention (B, L, N) and output (B, L, V) of the slots for normalized images, by one pass."""
    assert encoder.readout is not None
    tokens_BND = encoder.tokens(images)
    return encoder.readout.attention(tokens_BND), encoder.readout(tokens_BND)


@torch.no_grad()
def slot_health(teacher: Encoder, student: Encoder, images: Tensor) -> dict[str, Tensor]:
    """The teacher's slots on some normalized images (B, 3, height, width); nothing without slots.

    Scalars on the device. The student is looked at in evaluation mode, in which no random number is drawn.

    - slot_entropy: mean entropy of a slot's attention over the tokens, in nats; ln N is everywhere alike.
    - slot_effective_patches: mean number of patches that it is spread over.
    - slot_cls_share: mean share of it that lies on the CLS token.
    - slots_dead, slots_duplicate: how many slots are, as in `SlotHealth`.
    - slot_agreement: mean overlap of a slot's attention in teacher and student.
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

"""The DINO loss and its centre. Source: official `DINOLoss`.

Axis letters: B images, C crops, K prototypes.
"""

import torch
from torch import Tensor, nn

from dino_sparo.distributed import mean_over_ranks


class DINOLoss(nn.Module):
    """Cross-entropy between teacher and student views of the same image, all pairs of different crops.

    Each teacher row sums to one, so a pair costs logsumexp(s / temp) - q . s / temp: nothing of the
    logits' size is stored but the scaled logits themselves.

    Args:
        num_prototypes: K.
        student_temp: temperature of the student's softmax.
        center_momentum: share of the old centre kept at an update.
    """

    center: Tensor

    def __init__(self, num_prototypes: int, student_temp: float = 0.1, center_momentum: float = 0.9) -> None:
        super().__init__()
        self.student_temp = student_temp
        self.center_momentum = center_momentum
        self.register_buffer("center", torch.zeros(1, num_prototypes))

    def forward(self, student_logits: Tensor, teacher_logits: Tensor, teacher_temp: float) -> Tensor:
        """Student logits (C*B, K) crop-major, global crops first; teacher logits (2*B, K) -> scalar."""
        batch = len(teacher_logits) // 2
        num_crops = len(student_logits) // batch
        scaled_CBK = (student_logits.float() / self.student_temp).unflatten(0, (num_crops, batch))
        teacher_2BK = teacher_probabilities(teacher_logits, self.center, teacher_temp).unflatten(
            0, (2, batch)
        )

        # A global crop is compared with the other global crop's teacher, a local crop with both.
        log_normaliser_CB = scaled_CBK.logsumexp(dim=-1)
        to_global = 1 * log_normaliser_CB[:2].sum() - (teacher_2BK.flip(0) * scaled_CBK[:2]).sum()
        to_local = 2 * log_normaliser_CB[2:].sum() - (teacher_2BK.sum(0) * scaled_CBK[2:]).sum()
        num_pairs = 2 * (num_crops - 1)
        return (to_global + to_local) / (num_pairs * batch)

    @torch.no_grad()
    def update_center(self, teacher_logits: Tensor) -> None:
        """Move the centre towards the mean of all ranks' teacher logits (2*B, K)."""
        mean_1K = mean_over_ranks(teacher_logits.float().mean(dim=0, keepdim=True))
        self.center.mul_(self.center_momentum).add_(mean_1K, alpha=1 - self.center_momentum)


def teacher_probabilities(teacher_logits: Tensor, center: Tensor, teacher_temp: float) -> Tensor:
    """Centred and sharpened teacher rows, float32, same shape as the logits; no gradient."""
    return ((teacher_logits.detach().float() - center) / teacher_temp).softmax(dim=-1)

"""The DINO loss and its center. Source: official `DINOLoss`.

Axis letters: B images, C crops, K prototypes.
"""

from typing import Any

import torch
from torch import Tensor, nn

from dino_sparo.parallel.distributed import sum_over_ranks, world_size


class DINOLoss(nn.Module):
    """Cross-entropy between teacher and student, averaged over all pairs of different crops of an image.

    Args:
        num_prototypes: K.
        student_temp: temperature of the student's softmax.
        center_momentum: momentum of the center's moving average.
    """

    center: Tensor
    _sum: Tensor

    def __init__(self, num_prototypes: int, student_temp: float = 0.1, center_momentum: float = 0.9) -> None:
        super().__init__()
        self.student_temp = student_temp
        self.center_momentum = center_momentum
        self.register_buffer("center", torch.zeros(1, num_prototypes))
        self.register_buffer("_sum", torch.zeros(1, num_prototypes), persistent=False)

    def forward(self, student_logits: Tensor, teacher_logits: Tensor, teacher_temp: float | Tensor) -> Tensor:
        """Student logits (C*B, K) crop-major, global crops first; teacher logits (2*B, K) -> scalar."""
        teacher = teacher_probabilities(teacher_logits, self.center, teacher_temp)
        teacher_2BK = teacher.unflatten(0, (2, len(teacher) // 2))
        return CrossEntropy.apply(student_logits.float(), teacher_2BK, self.student_temp)

    def update_center(self, teacher_logits: Tensor) -> None:
        """Move the center towards the mean of all ranks' teacher logits (2*B, K)."""
        self.add_to_center(teacher_logits)
        self.commit_center(len(teacher_logits))

    @torch.no_grad()
    def add_to_center(self, teacher_logits: Tensor) -> None:
        """Accumulate the teacher logits (2*B, K) of a micro-batch for the next update of the center."""
        self._sum += teacher_logits.float().sum(dim=0, keepdim=True)

    @torch.no_grad()
    def commit_center(self, num_rows: int, finite: Tensor | bool = True) -> None:
        """Move the center towards the mean of the accumulated rows, `num_rows` per rank, if `finite`."""
        mean_1K = sum_over_ranks(self._sum) / (num_rows * world_size())
        moved_1K = self.center_momentum * self.center + (1 - self.center_momentum) * mean_1K
        self.center.copy_(torch.where(torch.as_tensor(finite, device=moved_1K.device), moved_1K, self.center))
        self._sum.zero_()


class CrossEntropy(torch.autograd.Function):
    """Mean cross-entropy over pairs of crops: student logits (C*B, K), teacher probabilities (2, B, K).

    Each teacher row sums to one, so the loss of a pair is logsumexp(s / temp) - q . s / temp. Only the scaled
    logits are stored for the backward pass, and the gradient overwrites them.
    """

    @staticmethod
    def forward(ctx: Any, student_logits: Tensor, teacher_2BK: Tensor, student_temp: float) -> Tensor:
        batch = teacher_2BK.shape[1]
        num_crops = len(student_logits) // batch
        scaled_CBK = (student_logits / student_temp).unflatten(0, (num_crops, batch))
        # A global crop is compared with the other global crop's teacher, a local crop with both.
        log_normalizer_CB = scaled_CBK.logsumexp(dim=-1)
        to_global = 1 * log_normalizer_CB[:2].sum() - (teacher_2BK.flip(0) * scaled_CBK[:2]).sum()
        to_local = 2 * log_normalizer_CB[2:].sum() - (teacher_2BK.sum(0) * scaled_CBK[2:]).sum()
        ctx.save_for_backward(scaled_CBK, log_normalizer_CB, teacher_2BK)
        ctx.student_temp, ctx.num_terms = student_temp, 2 * (num_crops - 1) * batch
        return (to_global + to_local) / ctx.num_terms

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        scaled_CBK, log_normalizer_CB, teacher_2BK = ctx.saved_tensors
        of_term = gradient / ctx.num_terms
        of_logits = scaled_CBK.sub_(log_normalizer_CB[:, :, None]).exp_()  # the student's probabilities
        of_logits[:2].mul_(of_term).sub_(teacher_2BK.flip(0) * of_term)
        of_logits[2:].mul_(2 * of_term).sub_(teacher_2BK.sum(0) * of_term)
        return of_logits.div_(ctx.student_temp).flatten(0, 1), None, None


def teacher_probabilities(teacher_logits: Tensor, center: Tensor, teacher_temp: float | Tensor) -> Tensor:
    """Centered and sharpened teacher probabilities, float32, same shape as the logits; no gradient."""
    return ((teacher_logits.detach().float() - center) / teacher_temp).softmax(dim=-1)

"""The training state: how to build it, capture it for a checkpoint, and restore it."""

import os
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from dino_sparo.errors import UserError
from dino_sparo.models import DINOHead, DinoModel, build_encoder
from dino_sparo.parallel.precision import LossScale
from dino_sparo.recipe.sections import HeadOptions, LossOptions
from dino_sparo.runs.checkpoint import num_bytes
from dino_sparo.training.loss import DINOLoss
from dino_sparo.training.monitor import TeacherStatistics
from dino_sparo.training.optim import build_optimizer
from dino_sparo.training.stopping import BadSteps


@dataclass(frozen=True)
class TrainState:
    """Student, teacher, center (in the loss), optimizer and loss scale."""

    student: DinoModel
    teacher: DinoModel
    loss_fn: DINOLoss
    optimizer: torch.optim.Optimizer
    loss_scale: LossScale
    overflows: Tensor  # int64 (2,): steps skipped because of overflows of fp16, in total and in a row
    bad_steps: BadSteps  # other steps with a loss or gradients that are not finite, since this start

    def count_step(self, finite_loss: Tensor, finite_gradients: Tensor) -> Tensor:
        """Whether a step may change the state; if not, count it. All are bool scalars, equal on all ranks.

        With loss scaling, gradients that are not finite are an overflow, which only lowers the scale.
        """
        may_continue = self.bad_steps.may_continue()
        overflow = finite_loss & ~finite_gradients & self.loss_scale.enabled & may_continue
        finite = finite_loss & finite_gradients & may_continue
        self.bad_steps.add(~finite & ~overflow & may_continue, finite_loss)
        total, in_a_row = self.overflows
        total += overflow
        in_a_row.copy_(torch.where(overflow, in_a_row + 1, torch.where(finite, 0, in_a_row)))
        self.loss_scale.update(finite, overflow)
        return finite


@dataclass(frozen=True)
class StepOutput:
    """Tensors of one step, on the device."""

    loss: Tensor  # mean over all micro-batches of this process
    images: Tensor  # first global crops of the last micro-batch
    center: Tensor  # before its update
    gradient_norms: Tensor  # (P,), before clipping
    statistics: TeacherStatistics | None = None


def build_state(
    *,
    encoder: dict[str, Any],
    head: HeadOptions,
    loss: LossOptions,
    seed: int,
    drop_path_rate: float,
    freeze_backbone: bool,
    max_bad_steps: int,
    device: torch.device,
    loss_scaling: bool = False,
    activation_checkpointing: bool = False,
    compiled: bool = False,
) -> TrainState:
    """A new state, initialized by the seed; the teacher starts as a copy of the student.

    Args:
        encoder: arguments of `build_encoder` except `drop_path_rate`.
        drop_path_rate: of the student; the teacher has none.
        max_bad_steps: as in the recipe.
        loss_scaling: needed for fp16.

    Raises:
        UserError: the networks are larger than the memory of this machine.
    """

    def network(drop_path_rate: float) -> DinoModel:
        built = build_encoder(drop_path_rate=drop_path_rate, **encoder)
        return DinoModel(built, DINOHead(built.embed_dim, **asdict(head)))

    with torch.device("meta"):
        needed = 2 * num_bytes(network(0.0).state_dict())
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > memory:
        raise UserError(
            f"model: student and teacher need {needed / 2**30:,.0f} GiB of memory, but this machine has "
            f"{memory / 2**30:,.0f} GiB; use smaller sizes in model and head"
        )
    torch.manual_seed(seed)
    student = network(drop_path_rate)
    student.encoder.backbone.requires_grad_(not freeze_backbone)
    teacher = network(0.0)
    teacher.load_state_dict(student.state_dict())
    student.encoder.backbone.activation_checkpointing = activation_checkpointing
    if compiled:
        student.compile_blocks()
        teacher.compile_blocks()
    loss_fn = DINOLoss(head.num_prototypes, loss.student_temp, loss.center_momentum)
    return state_of(
        *(student, teacher, loss_fn, device), loss_scaling=loss_scaling, max_bad_steps=max_bad_steps
    )


def state_of(
    student: DinoModel,
    teacher: DinoModel,
    loss_fn: DINOLoss,
    device: torch.device,
    *,
    loss_scaling: bool,
    max_bad_steps: int = 0,
) -> TrainState:
    """The state for given networks, which are moved to the device."""
    student.to(device).train()
    teacher.to(device).eval().requires_grad_(False)
    return TrainState(
        student=student,
        teacher=teacher,
        loss_fn=loss_fn.to(device),
        optimizer=build_optimizer(student),
        loss_scale=LossScale(device, enabled=loss_scaling),
        overflows=torch.zeros(2, dtype=torch.int64, device=device),
        bad_steps=BadSteps(device, max_bad_steps),
    )


def capture_state(state: TrainState) -> dict[str, Any]:
    """The state as a plain dictionary of tensors and values."""
    return {
        "student": state.student.state_dict(),
        "teacher": state.teacher.state_dict(),
        "center": state.loss_fn.center,
        "optimizer": state.optimizer.state_dict(),
        "loss_scale": state.loss_scale.state_dict(),
        "skipped": state.overflows,  # the name in checkpoints of all versions
    }


def checkpoint_bytes(state: TrainState) -> int:
    """Size of a checkpoint in bytes, including the optimizer state that the first step creates."""
    size = num_bytes(capture_state(state))
    if not state.optimizer.state:
        learning = [p for p in state.student.parameters() if p.requires_grad]
        size += sum(2 * p.nbytes + 4 for p in learning)  # two moments and the step of AdamW
    return size


def restore_state(state: TrainState, captured: dict[str, Any]) -> None:
    """Restore a captured state, bit for bit."""
    state.student.load_state_dict(captured["student"])
    state.teacher.load_state_dict(captured["teacher"])
    state.loss_fn.center.copy_(captured["center"])
    state.optimizer.load_state_dict(captured["optimizer"])
    state.loss_scale.load_state_dict(captured["loss_scale"])
    state.overflows.copy_(captured["skipped"])

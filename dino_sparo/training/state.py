"""All that learning changes, built by a recipe, taken into a checkpoint and restored from it."""

from dataclasses import dataclass
from typing import Any

import torch

from dino_sparo.models import DINOHead, DinoModel
from dino_sparo.training.checkpoint import encoder_of
from dino_sparo.training.loss import DINOLoss
from dino_sparo.training.optim import build_optimizer


@dataclass(frozen=True)
class TrainState:
    """Student, teacher, centre (in the loss) and optimiser."""

    student: DinoModel
    teacher: DinoModel
    loss_fn: DINOLoss
    optimizer: torch.optim.Optimizer


def build_state(config: dict[str, Any], device: torch.device) -> TrainState:
    """Freshly initialised by the recipe's seed; the teacher starts as a copy of the student."""
    torch.manual_seed(config["seed"])
    student = _build_model(config, config["model"]["drop_path_rate"])
    teacher = _build_model(config, drop_path_rate=0.0)
    teacher.load_state_dict(student.state_dict())
    teacher.requires_grad_(False)
    loss = config["loss"]
    loss_fn = DINOLoss(config["head"]["num_prototypes"], loss["student_temp"], loss["center_momentum"])
    student.to(device).train()
    return TrainState(student, teacher.to(device).eval(), loss_fn.to(device), build_optimizer(student))


def capture_state(state: TrainState) -> dict[str, Any]:
    """The state as a plain dictionary of tensors and values."""
    return {
        "student": state.student.state_dict(),
        "teacher": state.teacher.state_dict(),
        "center": state.loss_fn.center,
        "optimizer": state.optimizer.state_dict(),
    }


def restore_state(state: TrainState, captured: dict[str, Any]) -> None:
    """Put a captured state back, bit for bit."""
    state.student.load_state_dict(captured["student"])
    state.teacher.load_state_dict(captured["teacher"])
    state.loss_fn.center.copy_(captured["center"])
    state.optimizer.load_state_dict(captured["optimizer"])


def _build_model(config: dict[str, Any], drop_path_rate: float) -> DinoModel:
    encoder = encoder_of(config, drop_path_rate)
    return DinoModel(encoder, DINOHead(encoder.embed_dim, **config["head"]))

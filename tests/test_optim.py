"""Clipping, freezing, teacher and weight decay against their formulas."""

import pytest
import torch
from torch import nn

from dino_sparo.models import DINOHead, DinoModel, build_encoder
from dino_sparo.training.loss import DINOLoss
from dino_sparo.training.optim import clip_gradients_per_parameter, parameter_groups, update_teacher
from dino_sparo.training.state import state_of
from tests.tiny import one_step


def test_each_tensor_is_clipped_by_its_own_norm():
    small, large, unused = (nn.Parameter(torch.zeros(2)) for _ in range(3))
    small.grad, large.grad = torch.tensor([0.3, 0.4]), torch.tensor([30.0, 40.0])
    norms = clip_gradients_per_parameter([small, large, unused], max_norm=3.0)
    torch.testing.assert_close(norms, torch.tensor([0.5, 50.0]))
    torch.testing.assert_close(small.grad, torch.tensor([0.3, 0.4]), atol=0, rtol=0)
    torch.testing.assert_close(large.grad, torch.tensor([1.8, 2.4]), rtol=1e-6, atol=0)
    assert unused.grad is None


def test_zero_switches_clipping_off():
    parameter = nn.Parameter(torch.zeros(2))
    parameter.grad = torch.tensor([30.0, 40.0])
    norms = clip_gradients_per_parameter([parameter], max_norm=0)
    assert norms.tolist() == [50.0] and parameter.grad.tolist() == [30.0, 40.0]


def test_groups_of_a_sparo_model():
    encoder = build_encoder(
        {"width": 24, "depth": 2, "num_heads": 2}, 8, 16, num_slots=2, slot_dim=4, key_dim=4
    )
    model = DinoModel(encoder, DINOHead(8, 16, 8, 4, norm_last_layer=False))
    names = {id(p): name for name, p in model.named_parameters()}
    with_decay, without_decay = ([names[id(p)] for p in g["params"]] for g in parameter_groups(model))
    lengths_and_directions = {f"head.last_layer.parametrizations.weight.original{i}" for i in (0, 1)}
    assert {"encoder.readout.query", "encoder.backbone.cls_token", "encoder.backbone.pos_embed"} <= set(
        with_decay
    )
    assert lengths_and_directions <= set(with_decay)
    assert {"encoder.readout.key_proj.bias", "encoder.backbone.norm.weight"} <= set(without_decay)
    assert len(with_decay) + len(without_decay) == len(names)
    fixed = DINOHead(8, 16, 8, 4, norm_last_layer=True)
    assert sum(len(g["params"]) for g in parameter_groups(fixed)) == len(list(fixed.parameters())) - 1


def test_teacher_is_a_moving_average():
    teacher, student = nn.Linear(3, 2), nn.Linear(3, 2)
    before = teacher.weight.detach().clone()
    update_teacher(teacher, student, 0.9, torch.tensor(False))
    assert torch.equal(teacher.weight, before)
    update_teacher(teacher, student, 0.9, torch.tensor(True))
    torch.testing.assert_close(teacher.weight, 0.9 * before + 0.1 * student.weight)


@pytest.mark.parametrize("freeze", [True, False])
def test_frozen_last_layer_neither_moves_nor_counts(freeze):
    def model() -> DinoModel:
        encoder = build_encoder({"width": 24, "depth": 2, "num_heads": 2}, 8, 16, readout="cls")
        return DinoModel(encoder, DINOHead(24, 16, 8, 4))

    student = model()
    state = state_of(student, model(), DINOLoss(16), torch.device("cpu"), loss_scaling=False)
    prototypes = student.head.last_layer.parametrizations.weight.original1
    before = prototypes.detach().clone()
    one_step(state, [torch.randn(2, 3, 3, 16, 16)], freeze_last_layer=freeze)
    assert torch.equal(before, prototypes) == freeze
    assert (prototypes in state.optimizer.state) != freeze

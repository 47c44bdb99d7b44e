"""Five optimizer steps of our own training step against the official code's."""

import contextlib
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

from dino_sparo.models import DINOHead, DinoModel, build_encoder
from dino_sparo.parallel.precision import set_numerics
from dino_sparo.training.loss import DINOLoss
from dino_sparo.training.optim import parameter_groups
from dino_sparo.training.pretrain import train_step
from dino_sparo.training.schedules import Hyperparameters
from dino_sparo.training.state import state_of
from dino_sparo.training.steps import NUMBERS, Steps
from tests.conftest import load_golden_arrays
from tests.running import COMPILER

NUM_STEPS = 5
# Float32, five steps: other orders of summation, amplified by AdamW's division.
TOLERANCE = 1e-5
# The true gradient of the key bias is zero (softmax drops it), so AdamW divides rounding by rounding.
KEY_BIAS_TOLERANCE = 1e-2


def assert_near(name: str, ours: torch.Tensor, theirs: torch.Tensor, tolerance: float) -> None:
    """A parameter after some steps of AdamW that differ in the order of summation."""
    tolerances = torch.full_like(theirs, tolerance)
    if name.endswith("qkv.bias"):
        tolerances.chunk(3)[1].fill_(KEY_BIAS_TOLERANCE)
    assert ((ours - theirs).abs() <= tolerances).all(), name


def golden_model() -> DinoModel:
    encoder = build_encoder(
        {"width": 48, "depth": 4, "num_heads": 3}, patch_size=16, image_size=224, readout="cls"
    )
    return DinoModel(encoder, DINOHead(48, num_prototypes=256, hidden_dim=64, bottleneck_dim=16))


def official_name(name: str) -> str:
    name = name.removeprefix("encoder.")
    name = name.replace("last_layer.parametrizations.weight.original0", "last_layer.weight_g")
    return name.replace("last_layer.parametrizations.weight.original1", "last_layer.weight_v")


def load_golden(model: DinoModel, arrays: dict[str, np.ndarray]) -> None:
    model.load_state_dict(
        {name: torch.from_numpy(arrays[f"initial.{official_name(name)}"]) for name in model.state_dict()}
    )


ON_GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.fixture(
    scope="module",
    params=[
        "as it is",
        "numbers on the device",
        pytest.param("compiled", marks=pytest.mark.long),
        pytest.param("GPU", marks=ON_GPU),
        pytest.param("captured", marks=ON_GPU),
    ],
)
def trained(request):
    arrays = load_golden_arrays("trajectory")
    student, teacher = golden_model(), golden_model()
    load_golden(student, arrays)
    load_golden(teacher, arrays)
    if request.param == "compiled":
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch, "compile", partial(torch.compile, backend=COMPILER))
            student.compile_blocks()
            teacher.compile_blocks()
    loss_fn = DINOLoss(num_prototypes=256)
    set_numerics(tf32=False, deterministic=False)
    device = torch.device("cuda" if request.param in ("GPU", "captured") else "cpu")
    state = state_of(student, teacher, loss_fn, device, loss_scaling=False)
    plain = contextlib.nullcontext()
    step_of_state = partial(train_step, state, clip_norm=float(arrays["clip_norm"]), autocast=plain)
    steps = Steps(step_of_state, device, 1, capture=request.param == "captured")
    losses = []
    for step in range(NUM_STEPS):
        crops = [
            torch.from_numpy(arrays[f"{kind}_crops.{step}"]).float().to(device)
            for kind in ("global", "local")
        ]
        hyper = Hyperparameters(
            lr=float(arrays["lr"][step]),
            weight_decay=float(arrays["weight_decay"][step]),
            momentum=float(arrays["momentum"][step]),
            teacher_temp=float(arrays["teacher_temp"][step]),
            freeze_last_layer=step < 1,
        )
        if request.param == "numbers on the device":
            numbers = {name: torch.tensor(getattr(hyper, name), dtype=torch.float64) for name in NUMBERS}
            hyper = replace(hyper, **numbers)
        output = steps.take(iter([crops]), hyper, logged=False)
        losses.append(output.loss.item())
    steps.close()
    return arrays, state_of(student, teacher, loss_fn, torch.device("cpu"), loss_scaling=False), losses


def test_losses(trained):
    arrays, _, losses = trained
    np.testing.assert_allclose(losses, arrays["losses"], rtol=TOLERANCE)


@pytest.mark.parametrize("who", ["student", "teacher"])
def test_every_parameter(trained, who):
    arrays, state, _ = trained
    parameters = getattr(state, who).state_dict()
    assert {f"{who}_after.{official_name(name)}" for name in parameters} == {
        key for key in arrays if key.startswith(f"{who}_after.")
    }
    for name, value in parameters.items():
        assert_near(name, value, torch.from_numpy(arrays[f"{who}_after.{official_name(name)}"]), TOLERANCE)


def test_center(trained):
    arrays, state, _ = trained
    np.testing.assert_allclose(state.loss_fn.center, arrays["center_after"], atol=TOLERANCE, rtol=0)


def test_training_moved_something(trained):
    arrays, state, _ = trained
    name = "encoder.backbone.blocks.0.attn.qkv.weight"
    moved = state.student.state_dict()[name].numpy() - arrays[f"initial.{official_name(name)}"]
    assert np.abs(moved).max() > 100 * TOLERANCE


def test_parameter_groups_by_name(trained):
    arrays, *_ = trained
    model = golden_model()
    names = {id(parameter): official_name(name) for name, parameter in model.named_parameters()}
    with_decay, without_decay = parameter_groups(model)
    assert {names[id(p)] for p in with_decay["params"]} == set(arrays["regularized"])
    assert {names[id(p)] for p in without_decay["params"]} == set(arrays["not_regularized"])
    assert "weight_decay" not in with_decay and without_decay["weight_decay"] == 0

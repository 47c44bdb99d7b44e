"""Mixed precision, loss scaling, and the steps that are skipped."""

import json
import math

import pytest
import torch

from dino_sparo.cli.pretraining import pretrain
from dino_sparo.errors import StuckError, UserError
from dino_sparo.parallel import device, precision
from dino_sparo.parallel.precision import (
    INITIAL_SCALE,
    LossScale,
    autocast,
    choose_precision,
    plain_attention,
    set_numerics,
)
from dino_sparo.runs.checkpoint import load_latest
from dino_sparo.runs.rundir import STARTS_FILE
from dino_sparo.runs.runlog import read_metrics
from dino_sparo.training import setup
from dino_sparo.training.state import StepOutput, TrainState, capture_state
from tests.running import pretrain_until
from tests.tiny import build_state, one_step, prepared, state_hash, tiny_options, write_pictures

CPU = torch.device("cpu")
LOW_SCALE = 2.0**8
# Initial weights of 0.02 make the features of a narrower head so small that their gradients overflow.
HEAD = {"head__hidden_dim": 512, "head__bottleneck_dim": 64}


@pytest.fixture
def low_scale(monkeypatch) -> None:
    monkeypatch.setattr(precision, "INITIAL_SCALE", LOW_SCALE)


@pytest.fixture
def state(tmp_path, low_scale) -> TrainState:
    return build_state(tiny_options(tmp_path, tmp_path / "run", **HEAD), CPU, loss_scaling=True)


def step(state: TrainState) -> StepOutput:
    return one_step(state, [torch.randn(2, 3, 3, 16, 16)], autocast=autocast("fp16", CPU))


def snapshot(state: TrainState) -> dict:
    """The captured state without what counts overflows."""
    return capture_state(state) | {"step": 0, "loss_scale": {}, "skipped": 0}


def test_scaled_and_unscaled_gradients_are_the_same():
    parameter = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    scale = LossScale(CPU, enabled=True)
    loss = (parameter**2).sum()
    scale.scaled(loss).backward()
    assert parameter.grad.tolist() == [2 * INITIAL_SCALE, 4 * INITIAL_SCALE]
    scale.unscale([parameter.grad])
    assert parameter.grad.tolist() == [2, 4]


def test_the_scale_follows_torchs_rule(monkeypatch):
    monkeypatch.setattr(precision, "GROWTH_STEPS", 3)
    ours = LossScale(CPU, enabled=True)
    theirs = torch.amp.GradScaler("cpu", init_scale=INITIAL_SCALE, growth_interval=3)
    seen = []
    for finite in [True] * 7 + [False, True, True, False, False] + [True] * 4:
        parameter = torch.nn.Parameter(torch.ones(1))
        optimizer = torch.optim.SGD([parameter])
        theirs.scale(parameter.sum()).backward()
        if not finite:
            parameter.grad.fill_(torch.inf)
        theirs.step(optimizer)
        theirs.update()
        ours.update(torch.tensor(finite), torch.tensor(not finite))
        seen.append(ours.scale.item())
        assert ours.scale.item() == theirs.get_scale()
    assert max(seen) == 4 * INITIAL_SCALE and seen[-1] == INITIAL_SCALE


def test_an_overflow_skips_optimizer_teacher_and_center_together_and_is_counted(state):
    step(state)
    assert state.overflows.tolist() == [0, 0]
    before = state_hash(snapshot(state))
    state.loss_scale.scale.fill_(2.0**120)  # every gradient overflows in half precision
    output = step(state)
    assert output.loss.isfinite() and not output.gradient_norms.isfinite().all()
    assert state_hash(snapshot(state)) == before
    assert state.overflows.tolist() == [1, 1] and state.loss_scale.scale.item() == 2.0**119
    step(state)
    assert state.overflows.tolist() == [2, 2]
    state.loss_scale.scale.fill_(LOW_SCALE)
    step(state)
    assert state_hash(snapshot(state)) != before
    assert state.overflows.tolist() == [2, 0]


def test_zero_features_give_no_nan(state):
    with torch.no_grad():
        for network in (state.student, state.teacher):
            for value in network.head.mlp.parameters():
                value.zero_()
    output = step(state)
    assert output.loss.isfinite() and state.loss_fn.center.isfinite().all()
    assert all(value.isfinite().all() for value in state.student.parameters())
    assert all(value.isfinite().all() for value in state.teacher.parameters())


@pytest.mark.parametrize("scaling", [True, False])
def test_a_micro_batch_whose_numbers_go_wrong_spoils_the_whole_step(state, scaling):
    state.loss_scale.enabled = scaling
    state.bad_steps.allowed = 2
    step(state)
    before, scale = state_hash(snapshot(state)), state.loss_scale.scale.item()
    good, bad = torch.randn(2, 3, 3, 16, 16), torch.full((2, 3, 3, 16, 16), math.nan)
    for number, batches in enumerate(([good, bad], [bad, good]), start=1):
        one_step(state, *([crops] for crops in batches))
        assert state_hash(snapshot(state)) == before
        assert state.bad_steps.new(first_step=0) == [(number, number + 1, "loss")]
    assert state.overflows.tolist() == [0, 0] and state.loss_scale.scale.item() == scale
    one_step(state, [good], [good])
    assert state_hash(snapshot(state)) != before and state.bad_steps.total == 2


def test_after_one_bad_step_too_many_nothing_changes(state):
    step(state)
    before = state_hash(snapshot(state))
    good, bad = torch.randn(2, 3, 3, 16, 16), torch.full((2, 3, 3, 16, 16), math.nan)
    for crops in (bad, good, bad, good):  # the host looks later
        one_step(state, [crops])
        assert state_hash(snapshot(state)) == before
        assert state.bad_steps.total == 1 and state.overflows.tolist() == [0, 0]


def test_runs_in_mixed_precision_are_near_fp32(tmp_path, low_scale):
    write_pictures(tmp_path / "data", 8)
    losses = {}
    for name in ("fp32", "bf16", "fp16"):
        pretrain(tiny_options(tmp_path / "data", tmp_path / name, machine__precision=name, **HEAD))
        losses[name] = [entry["loss"] for entry in read_metrics(tmp_path / name)]
        assert all(value.dtype == torch.float32 for value in load_latest(tmp_path / name)["teacher"].values())
    for name in ("bf16", "fp16"):
        assert losses[name] != losses["fp32"]  # it was really used
        assert losses[name] == pytest.approx(losses["fp32"], rel=0.02)


def test_logits_and_loss_are_float32_under_bfloat16(tmp_path):
    state = build_state(tiny_options(tmp_path, tmp_path / "run"))
    crops = [torch.randn(2, 3, 3, 16, 16)]
    output = one_step(state, crops, autocast=autocast("bf16", CPU))
    with autocast("bf16", CPU):
        logits, encodings = state.teacher(crops)
    assert encodings.dtype == torch.bfloat16  # it was really used
    assert logits.dtype == output.loss.dtype == torch.float32


def test_a_run_in_fp16_resumes_bit_for_bit(tmp_path, monkeypatch, low_scale):
    write_pictures(tmp_path / "data", 8)
    monkeypatch.setattr(precision, "GROWTH_STEPS", 4)  # the scale grows after the interruption
    changes = HEAD | {"machine__precision": "fp16", "log__checkpoint_every_minutes": 1e-9}
    names = ("whole", "broken")
    options = {name: tiny_options(tmp_path / "data", tmp_path / name, **changes) for name in names}
    pretrain(options["whole"])
    pretrain_until(3, options["broken"], monkeypatch)
    pretrain(options["broken"])
    whole, broken = (load_latest(tmp_path / name) for name in names)
    assert whole["loss_scale"]["scale"].item() == 2 * LOW_SCALE
    assert state_hash(whole) == state_hash(broken)


def test_a_run_may_change_its_precision(tmp_path, monkeypatch):
    write_pictures(tmp_path / "data", 8)
    for first_step, name in enumerate(("fp32", "fp16", "bf16")):
        changes = {"machine__precision": name, "log__checkpoint_every_minutes": 1e-9}
        options = tiny_options(tmp_path / "data", tmp_path / "run", **changes)
        run = prepared(options)
        assert run.first_step == first_step and run.precision == name
        assert run.state.loss_scale.scale.item() == (INITIAL_SCALE if name == "fp16" else 1)
        pretrain_until(1, options, monkeypatch)


@pytest.mark.parametrize(
    ("hardware", "width", "used", "expected"),
    [
        (True, 384, None, "bf16"),
        (True, 383, None, "fp32"),
        (False, 768, None, "fp32"),
        (True, 384, "fp32", "fp32"),
        (False, 64, "bf16", "bf16"),
    ],
)
def test_automatic_precision_on_a_cpu(hardware, width, used, expected, monkeypatch, caplog):
    monkeypatch.setattr(precision, "multiplies_bfloat16", lambda: hardware)
    assert choose_precision("auto", torch.device("cpu"), width=width, used=used) == expected
    assert choose_precision("fp16", torch.device("cpu"), width=width, used=used) == "fp16"
    assert ("does not multiply it in hardware" in caplog.text) == (expected == "bf16" and not hardware)


def test_a_run_keeps_its_automatic_precision(tmp_path, monkeypatch):
    write_pictures(tmp_path / "data", 8)
    changes = {"machine__precision": "auto", "log__checkpoint_every_minutes": 1e-9}
    options = tiny_options(tmp_path / "data", tmp_path / "run", **changes)
    monkeypatch.setattr(precision, "WIDE", 1)
    for hardware in (True, False):
        monkeypatch.setattr(precision, "multiplies_bfloat16", lambda hardware=hardware: hardware)
        assert prepared(options).precision == "bf16"
        pretrain_until(1, options, monkeypatch)


def test_processes_in_different_precisions_are_refused(tmp_path, monkeypatch):
    found = [(0, {}, "pil", precision) for precision in ("bf16", "fp32")]
    monkeypatch.setattr(setup, "gather_objects", lambda own: found)
    with pytest.raises(UserError, match="precision is auto, which is bf16 and fp32 on different machines"):
        setup.check_all_agree(tmp_path, 0, {}, "pil", "bf16")


def test_a_precision_that_does_not_exist_is_not_taken_from_a_run(tmp_path):
    options = tiny_options(tmp_path, tmp_path, machine__precision="auto")
    start = {"time": "", "command": [], "versions": {"torch": "", "timm": ""}, "processes": 1}
    lines = [json.dumps(start | {"device": "cpu", "precision": name}) for name in ("fp32", "int8")]
    (tmp_path / STARTS_FILE).write_text("\n".join(lines) + "\n")
    arch = options.encoder_arguments()["arch"]
    assert setup.use_machine(options.machine, CPU, arch=arch, max_side=None, run_dir=tmp_path)[1] == "fp32"


def test_a_gpu_that_never_finishes_ends_the_run(monkeypatch):
    class Event:
        asked = 0

        def query(self):
            self.asked += 1
            return self.asked == finished

    monkeypatch.setattr(device, "PATIENCE_SECONDS", 0.05)
    finished = 3
    device.wait_for_event(Event())
    device.wait_for_event(None)  # of a CPU
    finished = -1
    with pytest.raises(StuckError, match="has not finished a step"):
        device.wait_for_event(Event())


def test_mixed_precision_on_a_cpu_takes_plain_attention_and_sets_all_back():
    def settings():
        allowed = torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed()
        return torch.backends.cuda.flash_sdp_enabled(), allowed

    before = settings()
    assert before[0] is True
    with plain_attention("fp32", CPU):
        assert settings() == before
    with plain_attention("bf16", CPU):
        assert settings() == (False, True)
        with autocast("bf16", CPU):
            query = torch.randn(2, 3, 10, 8, requires_grad=True)
            attended = torch.nn.functional.scaled_dot_product_attention(query, query, query)
            assert attended.dtype == torch.bfloat16 and "Flash" not in str(attended.grad_fn)
    assert settings() == before
    exact = torch.nn.functional.scaled_dot_product_attention(query, query, query)
    torch.testing.assert_close(attended.float(), exact, rtol=0.02, atol=0.02)


def test_numerics_follow_the_options():
    try:
        set_numerics(tf32=True, deterministic=True)
        assert torch.get_float32_matmul_precision() == "high" and torch.backends.cudnn.allow_tf32
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        set_numerics(tf32=False, deterministic=False)
    assert torch.get_float32_matmul_precision() == "highest" and not torch.backends.cudnn.allow_tf32
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_activation_checkpointing_changes_memory_and_nothing_else(precision, tmp_path):
    write_pictures(tmp_path / "data", 8)
    changes = {"machine__precision": precision, "optim__epochs": 2}
    for name in ("false", "true"):
        changes["machine__activation_checkpointing"] = name
        pretrain(tiny_options(tmp_path / "data", tmp_path / name, **changes))
    hashes = {state_hash(load_latest(tmp_path / name)) for name in ("false", "true")}
    assert len(hashes) == 1


def test_activation_checkpointing_keeps_less_for_backward(tmp_path):
    config = tiny_options(tmp_path, tmp_path / "run", model__arch__depth=9)
    saved = []
    for checkpointing in (False, True):
        student = build_state(config, CPU, activation_checkpointing=checkpointing).student
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda x, sizes=sizes: sizes.append(x.nbytes) or x, lambda x: x
        ):
            student([torch.randn(2, 64, 3, 16, 16)])
        saved.append(sum(sizes))
    assert saved[1] < saved[0] / 3

"""Slot statistics find planted defects, for any batch size; logging them does not change training."""

import math

import pytest
import torch

from dino_sparo.cli.pretraining import pretrain
from dino_sparo.models import build_encoder
from dino_sparo.runs.checkpoint import load_latest
from dino_sparo.runs.runlog import read_metrics
from dino_sparo.slots import statistics as module
from dino_sparo.slots.statistics import (
    SlotStatistics,
    attention_agreement,
    attention_entropy,
    attention_overlap,
    effective_patches,
    slot_health,
)
from dino_sparo.training import periodic
from tests.tiny import state_hash, tiny_options, write_pictures

NAMES = {
    *("slot_entropy", "slot_effective_patches", "slot_cls_share"),
    *("slots_dead", "slots_duplicate", "slot_agreement"),
}
ARCH = {"width": 16, "depth": 2, "num_heads": 2}


def attention(batch=12, slots=5, tokens=10):
    return (2 * torch.randn(batch, slots, tokens)).softmax(-1)


def outputs(batch=12, slots=5, width=3):
    return torch.randn(batch, slots, width) + 1


def health_of(*batches):
    statistics = SlotStatistics()
    for batch in batches:
        statistics.add(*batch)
    return statistics.health()


# --- Single images


def test_one_patch_and_all_patches():
    attn = torch.zeros(1, 4, 10)
    attn[0, 0, 4] = 1
    attn[0, 1] = 1 / 10
    attn[0, 2, 1:] = 0.4 / 9
    attn[0, 2, 0] = 0.6  # on CLS, which does not change how many patches the rest is spread over
    attn[0, 3, 0] = 1
    assert effective_patches(attn)[0].tolist() == pytest.approx([1, 9, 9, 1], rel=1e-5)
    on_cls = -0.6 * math.log(0.6) - 0.4 * math.log(0.4 / 9)
    assert attention_entropy(attn)[0].tolist() == pytest.approx([0, math.log(10), on_cls, 0], rel=1e-5)


def test_overlap_is_the_sum_of_the_lesser_shares():
    attn, other = attention(), attention()
    direct = torch.minimum(attn[:, :, None], attn[:, None]).sum(-1)
    torch.testing.assert_close(attention_overlap(attn), direct)
    torch.testing.assert_close(attention_agreement(attn, attn), torch.ones(12, 5))
    both = torch.stack([attn, other], dim=2).flatten(0, 1)  # (images x slots, 2, tokens)
    expected = attention_overlap(both)[:, 0, 1].view(12, 5)
    torch.testing.assert_close(attention_agreement(attn, other), expected)
    apart = torch.eye(10)[None, :2]
    assert attention_overlap(apart)[0].tolist() == [[1, 0], [0, 1]]


# --- Many images


def test_means_over_images():
    attn, other, slots = attention(), attention(), outputs()
    health = health_of((attn, slots, other))
    torch.testing.assert_close(health.cls_share.float(), attn[..., 0].mean(0))
    torch.testing.assert_close(health.entropy.float(), attention_entropy(attn).mean(0))
    torch.testing.assert_close(health.effective_patches.float(), effective_patches(attn).mean(0))
    torch.testing.assert_close(health.agreement.float(), attention_agreement(attn, other).mean(0))
    std = slots.var(dim=0, correction=0).sum(-1).sqrt()
    torch.testing.assert_close(health.response_std.float(), std)
    assert not health.dead.any() and not health.duplicate.any()


def test_planted_dead_and_duplicate_slots():
    attn, slots = attention(), outputs()
    slots[:, 3] = 7 + 0.02 * torch.randn(12, 3)  # it does vary, but not as the others do
    attn[:, 4] = 0.97 * attn[:, 1] + 0.03 * attn[:, 2]
    health = health_of((attn, slots))
    assert health.dead.tolist() == [False, False, False, True, False]
    assert health.duplicate.tolist() == [False, True, False, False, True]
    assert health.nearest[1] == 4 and health.nearest[4] == 1
    expected = attention_overlap(attn)[:, 1, 4].mean().item()
    assert health.overlap[1].item() == health.overlap[4].item() == pytest.approx(expected)
    assert health.agreement is None


def test_bounds_of_dead_slots():
    directions = torch.nn.functional.normalize(torch.randn(400, 5, 3), dim=-1)
    for scale, dead in ((0.06, False), (0.04, True)):  # of the variation of the others
        factors = torch.tensor([1, 1, scale, 1, 1])[:, None]
        health = health_of((attention(400), directions * factors))
        assert health.dead.tolist() == [False, False, dead, False, False]
    nearly_constant = torch.randn(1, 5, 3) + 0.001 * torch.randn(12, 5, 3)
    for slots in (nearly_constant, torch.zeros(12, 5, 3)):
        assert health_of((attention(), slots)).dead.all()
    alone = health_of((attention(slots=1), outputs(slots=1)))
    assert alone.overlap.tolist() == [0] and not alone.duplicate.any() and not alone.dead.any()


def test_batches_and_processes_make_the_numbers_of_all_images(monkeypatch):
    whole = attention(), outputs(), attention()
    first, *others = zip(*(values.split([5, 4, 3]) for values in whole), strict=True)
    expected = vars(health_of(whole))
    torch.testing.assert_close(vars(health_of(first, *others)), expected)
    theirs = []
    monkeypatch.setattr(module, "sum_over_ranks", lambda values: theirs.append(values) or values)
    health_of(*others)
    monkeypatch.setattr(module, "sum_over_ranks", lambda values: values + theirs[0])
    torch.testing.assert_close(vars(health_of(first)), expected)


# --- In training


def test_the_numbers_of_a_teacher_are_those_of_its_attention():
    teacher, student = (build_encoder(ARCH, 8, 16, num_slots=3, slot_dim=4, key_dim=4) for _ in range(2))
    teacher.eval()
    images = torch.randn(5, 3, 16, 16)
    with torch.no_grad():
        attn, of_student = (net.readout.attention(net.tokens(images)) for net in (teacher, student))
    health = slot_health(teacher, student, images)
    assert health.keys() == NAMES
    assert health["slot_entropy"].item() == pytest.approx(attention_entropy(attn).mean().item(), rel=1e-5)
    assert health["slot_cls_share"].item() == pytest.approx(attn[..., 0].mean().item(), rel=1e-5)
    agreement = attention_agreement(attn, of_student).mean().item()
    assert health["slot_agreement"].item() == pytest.approx(agreement, rel=1e-5)
    with torch.no_grad():
        teacher.readout.query.zero_()  # attention is the same everywhere
    health = slot_health(teacher, teacher, images)
    assert health["slot_entropy"].item() == pytest.approx(math.log(5))
    assert health["slot_cls_share"].item() == pytest.approx(1 / 5)
    assert health["slot_effective_patches"].item() == pytest.approx(4)
    assert health["slots_duplicate"].item() == 3
    assert health["slot_agreement"].item() == 1
    with torch.no_grad():
        teacher.readout.value_proj.weight.zero_()
    assert slot_health(teacher, teacher, images)["slots_dead"].item() == 3


def test_the_student_goes_on_as_it_was_and_no_random_number_is_drawn():
    encoders = [
        build_encoder(ARCH | {"depth": 4}, 8, 16, num_slots=3, slot_dim=4, key_dim=4, drop_path_rate=0.9)
        for _ in range(2)
    ]
    teacher, student = encoders[0].eval(), encoders[1].train()
    images, before = torch.randn(5, 3, 16, 16), torch.get_rng_state()
    first = slot_health(teacher, student, images)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(module.training for module in student.modules())
    assert not teacher.training
    assert first == slot_health(teacher, student, images)
    assert all(parameter.grad is None for parameter in student.parameters())


def test_runs_log_it_and_come_to_the_same_state(tmp_path, monkeypatch):
    write_pictures(tmp_path / "data", 8)
    pretrain(tiny_options(tmp_path / "data", tmp_path / "logged"))
    monkeypatch.setattr(periodic, "slot_health", lambda *_: {})
    pretrain(tiny_options(tmp_path / "data", tmp_path / "silent"))
    logged, silent = (read_metrics(tmp_path / name) for name in ("logged", "silent"))
    assert [entry["step"] for entry in logged if entry.keys() >= NAMES] == [2, 4, 6]  # ends of epochs
    assert len(logged) == 6
    assert not any(NAMES & entry.keys() for entry in silent)
    assert [entry["loss"] for entry in logged] == [entry["loss"] for entry in silent]
    hashes = {state_hash(load_latest(tmp_path / name)) for name in ("logged", "silent")}
    assert len(hashes) == 1


def test_without_slots_there_is_none_of_it(slot_runs):
    encoder = build_encoder(ARCH, 8, 16, readout="cls")
    assert slot_health(encoder, encoder, torch.randn(2, 3, 16, 16)) == {}
    entries = read_metrics(slot_runs["cls"])
    assert entries and not any(name.startswith("slot") for entry in entries for name in entry)

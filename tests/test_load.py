"""Encoders of our own runs: a folder, a checkpoint file, and what does not fit."""

import shutil

import pytest
import torch
import yaml

from dino_sparo import load_encoder
from dino_sparo.cli.pretraining import pretrain
from dino_sparo.errors import UserError
from dino_sparo.recipe.files import stored_recipe
from dino_sparo.runs.checkpoint import load_latest, save_checkpoint
from tests.tiny import build_state, tiny_options


@torch.no_grad()
def test_teacher_student_and_the_initial_weights(run_dir):
    images = torch.randn(2, 3, 16, 16)
    state = load_latest(run_dir)
    outputs = {}
    for which in ("teacher", "student"):
        encoder = load_encoder(run_dir, which)
        assert not encoder.training
        for name, value in encoder.state_dict().items():
            assert torch.equal(value, state[which][f"encoder.{name}"])
        outputs[which] = encoder(images)
    torch.randn(1)  # away from the state in which a load that draws would have left it
    random_state = torch.random.get_rng_state()
    fresh = load_encoder(run_dir, untrained=True)
    assert torch.equal(torch.random.get_rng_state(), random_state)
    initial = build_state(stored_recipe(state["config"], "it")).student.encoder.state_dict()
    assert all(torch.equal(initial[name], value) for name, value in fresh.state_dict().items())
    untrained = fresh(images)
    assert not torch.equal(outputs["teacher"], outputs["student"])
    assert not torch.equal(outputs["teacher"], untrained)


@torch.no_grad()
def test_a_checkpoint_file_with_and_without_its_hash(run_dir, tmp_path):
    images = torch.randn(2, 3, 16, 16)
    file = max((run_dir / "checkpoints").glob("*.pt"))
    copy = tmp_path / "copy.pt"
    shutil.copy(file, copy)
    for path in (str(file), copy):
        assert torch.equal(load_encoder(path)(images), load_encoder(run_dir)(images))
    shutil.copy(file.with_name(file.name + ".sha256"), tmp_path / "copy.pt.sha256")
    content = bytearray(copy.read_bytes())
    content[len(content) // 2] ^= 1
    copy.write_bytes(content)
    with pytest.raises(UserError, match=r"copy.pt is damaged: its SHA-256 differs"):
        load_encoder(copy)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("format", 1, "is not a checkpoint of dino-sparo with format 2"),
        ("config", None, "is not a complete checkpoint of dino-sparo"),
        ("config", {"seed": 0}, "is not a complete checkpoint of dino-sparo"),
        ("teacher", [], "is not a complete checkpoint of dino-sparo"),
    ],
)
def test_a_checkpoint_with_other_content(run_dir, tmp_path, key, value, message):
    torch.save({**load_latest(run_dir), key: value}, tmp_path / "changed.pt")
    with pytest.raises(UserError) as caught:
        load_encoder(tmp_path / "changed.pt")
    assert message in str(caught.value) and "changed.pt" in str(caught.value)


@torch.no_grad()
def test_a_run_from_before_there_were_other_readouts_and_starts(run_dir, tmp_path, caplog):
    images = torch.randn(2, 3, 16, 16)
    shutil.copytree(run_dir, tmp_path / "run")
    state = load_latest(run_dir)
    first = ("name", "num_slots", "slot_dim", "key_dim", "group_size")
    readout = state["config"]["model"]["readout"]
    assert len(readout) > len(first)
    state["config"]["model"]["readout"] = {key: readout[key] for key in first}
    del state["config"]["init"], state["config"]["optim"]["freeze_backbone"]
    for file in (tmp_path / "run" / "checkpoints").iterdir():
        file.unlink()
    save_checkpoint(state, tmp_path / "run", step=3)
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(state["config"]))
    assert torch.equal(load_encoder(tmp_path / "run")(images), load_encoder(run_dir)(images))
    with caplog.at_level("INFO", "dino_sparo"):
        pretrain(tiny_options(run_dir.parent / "data", tmp_path / "run"))
    assert any("is complete" in message for message in caplog.messages)


def test_arch_must_be_that_of_the_run(run_dir):
    load_encoder(run_dir, arch={"width": 16, "depth": 3, "num_heads": 2})
    with pytest.raises(UserError, match=r"arch is 'vit_small' .* has width 16, depth 3 and 2 heads"):
        load_encoder(run_dir, arch="vit_small")


def test_nothing_to_load(run_dir, tmp_path):
    with pytest.raises(ValueError, match="which is 'best', expected 'teacher' or 'student'"):
        load_encoder(run_dir, "best")
    for path in (tmp_path, tmp_path / "absent", tmp_path / "absent.pth"):
        with pytest.raises(
            FileNotFoundError, match=r"(no checkpoint found|does not exist); expected a run folder"
        ):
            load_encoder(path)


@pytest.mark.parametrize("untrained", [False, True])
def test_a_checkpoint_must_hold_every_parameter(run_dir, tmp_path, untrained):
    state = load_latest(run_dir)
    del state["teacher"]["encoder.readout.query"]
    state["teacher"]["encoder.readout.scale"] = torch.zeros(1)
    state["teacher"]["encoder.backbone.norm.bias"] = torch.zeros(3)
    torch.save(state, tmp_path / "changed.pt")
    with pytest.raises(UserError) as caught:
        load_encoder(tmp_path / "changed.pt", untrained=untrained)
    for part in (
        "width 16, depth 3 and 2 heads and read-out 'sparo'",
        "1 missing (readout.query)",
        "1 unexpected (readout.scale)",
        "1 misshapen (backbone.norm.bias (3,) instead of (16,))",
    ):
        assert part in str(caught.value)
    load_encoder(tmp_path / "changed.pt", "student")

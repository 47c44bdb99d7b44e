"""Runs that begin with weights from a file, and runs whose backbone is frozen: saved, killed, resumed."""

import shutil
import subprocess

import pytest
import torch

from dino_sparo import load_encoder
from dino_sparo.__main__ import main
from dino_sparo.cli.pretraining import pretrain
from dino_sparo.errors import UserError
from dino_sparo.runs.checkpoint import load_latest, num_bytes
from dino_sparo.training import periodic, state
from tests.running import command
from tests.test_init import bare, plain
from tests.test_resume import pretrain_until
from tests.tiny import prepared, state_hash, tiny_arguments, tiny_options, write_pictures

BACKBONE = "encoder.backbone."
FROZEN = {"optim__freeze_backbone": "true"}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    write_pictures(folder, 10)
    torch.save(bare(plain(1)), folder / "vit.pth")
    return folder


@pytest.fixture(scope="module", params=[False, True], ids=["learning", "frozen"])
def finished(request, pictures, tmp_path_factory):
    """A run that has ended, and what makes it another than the others."""
    changes = {"init": pictures / "vit.pth"} | (FROZEN if request.param else {})
    run_dir = tmp_path_factory.mktemp("runs") / "run"
    pretrain(tiny_options(pictures, run_dir, **changes))
    return run_dir, changes


def backbones(run_dir) -> list[dict[str, torch.Tensor]]:
    """Of student and teacher in the last checkpoint."""
    found = load_latest(run_dir)
    return [
        {name.removeprefix(BACKBONE): v for name, v in found[which].items() if name.startswith(BACKBONE)}
        for which in ("student", "teacher")
    ]


def test_a_frozen_backbone_stays_and_all_else_learns(finished, pictures):
    run_dir, changes = finished
    given = torch.load(pictures / "vit.pth")
    for backbone in backbones(run_dir):
        assert len(backbone) == len(given) - 12  # the last block
        same = [name for name, value in backbone.items() if torch.equal(value, given[name])]
        assert len(same) == (len(backbone) if changes.keys() >= FROZEN.keys() else 0)
    fresh = load_encoder(run_dir, untrained=True).readout.state_dict()
    for which in ("student", "teacher"):
        readout = load_encoder(run_dir, which).readout.state_dict()
        assert not any(torch.equal(readout[name], fresh[name]) for name in fresh)


def test_a_backbone_is_frozen_in_the_first_epochs_alone(pictures, tmp_path, monkeypatch):
    changes = {"init": pictures / "vit.pth", "optim__freeze_backbone_epochs": 1, "optim__epochs": 2}
    options = tiny_options(pictures, tmp_path / "run", **changes, log__keep_every_epochs=1)
    pretrain(options)
    given = torch.load(pictures / "vit.pth")
    first, last = sorted((tmp_path / "run" / "checkpoints").glob("*.pt"))
    for path, same in ((first, True), (last, False)):
        backbone = load_encoder(path, "student").backbone.state_dict()
        assert all(torch.equal(value, given[name]) == same for name, value in backbone.items())
    fresh = load_encoder(first, untrained=True).readout.query
    assert not torch.equal(load_encoder(first, "student").readout.query, fresh)
    again = tiny_options(pictures, tmp_path / "again", **changes, log__checkpoint_every_minutes=1e-9)
    pretrain_until(1, again, monkeypatch)
    pretrain(again)
    assert state_hash(load_latest(tmp_path / "again")) == state_hash(load_latest(tmp_path / "run"))


@pytest.mark.parametrize("start", [80.0, 70.0], ids=["fallen", "not fallen"])
def test_a_run_warns_when_it_is_worse_than_its_start(pictures, tmp_path, monkeypatch, capfd, start):
    answers = iter({"knn20_top1": top1, "knn20_top5": 90.0, "knn20_images": 60} for top1 in (start, 75.0))
    monkeypatch.setattr(periodic, "evaluate_teacher", lambda *_, **__: next(answers))
    write_pictures(tmp_path / "data", 60, classes=2)
    changes = {"monitor__knn_every_epochs": 1, "optim__epochs": 1, "optim__warmup_epochs": 0}
    pretrain(tiny_options(tmp_path / "data", tmp_path / "run", init=pictures / "vit.pth", **changes))
    said = capfd.readouterr().err
    assert ("20-NN is 75.00 %, below the 80.00 % " in said) == (start == 80)
    assert ("a new run_dir with a lower optim.lr_per_256" in said) == (start == 80)


def test_a_run_resumes_without_the_file_bit_for_bit(finished, pictures, tmp_path, monkeypatch):
    run_dir, changes = finished
    file = tmp_path / "vit.pth"
    shutil.copy(pictures / "vit.pth", file)
    options = tiny_options(
        pictures, tmp_path / "run", **(changes | {"init": file}), log__checkpoint_every_minutes=1e-9
    )
    pretrain_until(4, options, monkeypatch)
    file.unlink()
    pretrain(options)
    assert state_hash(load_latest(tmp_path / "run")) == state_hash(load_latest(run_dir))
    assert load_latest(tmp_path / "run")["config"]["init"] == str(file)


def test_a_finished_run_asked_for_more_epochs_names_the_way(run_dir):
    with pytest.raises(UserError, match=r"optim.epochs was 3, is now 5.*with --init .*/run "):
        pretrain(tiny_options(run_dir.parent / "data", run_dir, optim__epochs=5))


def test_a_run_and_an_exported_encoder_start_another_run(run_dir, pictures, tmp_path):
    assert main(["export", str(run_dir), "--out", str(tmp_path / "exported")]) == 0
    before = load_latest(run_dir)
    for init, parts in ((run_dir, ("student", "teacher")), (tmp_path / "exported", ("teacher", "teacher"))):
        options = tiny_options(pictures, tmp_path / "run", init=init)
        run = prepared(options)
        assert run.first_step == 0 and not run.state.optimizer.state
        for model, part in zip((run.state.student, run.state.teacher), parts, strict=True):
            same = {n: torch.equal(value, before[part][n]) for n, value in model.state_dict().items()}
            assert all(same[name] for name in same if init == run_dir or name.startswith("encoder."))
            assert same["head.mlp.0.weight"] == (init == run_dir)
    with pytest.raises(FileNotFoundError, match=r"none does not exist; expected a run folder"):
        prepared(tiny_options(pictures, tmp_path / "run", init=tmp_path / "none"))


def test_the_optimizer_and_the_graph_leave_a_frozen_backbone_out(pictures, tmp_path):
    options = tiny_options(pictures, tmp_path / "run", init=pictures / "vit.pth", **FROZEN)
    frozen_state = prepared(options).state
    student = frozen_state.student
    held = {id(p) for group in frozen_state.optimizer.param_groups for p in group["params"]}
    learning = [*student.encoder.readout.parameters(), *student.head.parameters()]
    assert held == {id(p) for p in learning if p.requires_grad}
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        tokens = student.encoder.tokens(torch.randn(6, 3, 16, 16))
    assert not saved and not tokens.requires_grad
    logits = [student.train()([torch.ones(2, 3, 3, 16, 16)])[0] for _ in range(2)]
    assert torch.equal(*logits) and logits[0].requires_grad  # no stochastic depth, though the recipe has it
    before = state.checkpoint_bytes(frozen_state)
    moments = sum(2 * p.nbytes + 4 for p in learning if p.requires_grad)  # and a count of steps
    assert before == num_bytes(state.capture_state(frozen_state)) + moments


@pytest.mark.long
def test_two_processes_with_a_frozen_backbone(pictures, tmp_path):
    changes = {"init": pictures / "vit.pth", "optim__epochs": 2} | FROZEN
    arguments = command(pictures, tmp_path / "run", processes=2, **changes)
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr and done.stderr.count("parameters copied") == 1
    given = torch.load(pictures / "vit.pth")
    for backbone in backbones(tmp_path / "run"):
        assert all(torch.equal(value, given[name]) for name, value in backbone.items())


@pytest.mark.long
def test_check_tries_the_starting_weights(pictures, tmp_path, capsys):
    arguments = tiny_arguments(pictures, tmp_path / "run", init=pictures / "vit.pth", **FROZEN)
    assert main(["check", *arguments]) == 0
    assert "vit.pth: 0.01 million parameters copied" in " ".join(capsys.readouterr().out.split())
    torch.save(bare(plain(1, patch_size=4)), tmp_path / "other.pth")
    assert main(["check", *tiny_arguments(pictures, tmp_path / "run", init=tmp_path / "other.pth")]) == 1
    assert "other.pth has patch size 4" in capsys.readouterr().out

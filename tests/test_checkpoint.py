"""Checkpoints: written whole, rotated, checked by hash, read without unpickling code."""

import hashlib
import os
import resource
import subprocess

import pytest
import torch

from dino_sparo.__main__ import main
from dino_sparo.cli.pretraining import pretrain
from dino_sparo.errors import UserError
from dino_sparo.runs.checkpoint import (
    load_checkpoint,
    load_latest,
    save_checkpoint,
    saving,
    set_damaged_aside,
)
from tests.tiny import tiny_arguments, tiny_options, write_pictures


def save_steps(run_dir, *steps, keep_every_steps=0):
    for step in steps:
        save_checkpoint(
            {"step": step, "x": torch.arange(1000)}, run_dir, step=step, keep_every_steps=keep_every_steps
        )


def names(run_dir):
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())


def test_last_two_and_every_so_many_are_kept(tmp_path):
    save_steps(tmp_path, 3, 10, 13, 20, 24, 27, 31, keep_every_steps=10)
    kept = [f"step_{step:09d}.pt" for step in (10, 20, 27, 31)]
    assert names(tmp_path) == sorted(kept + [f"{name}.sha256" for name in kept])


def test_a_checkpoint_before_the_first_step_is_not_kept_and_not_written_twice(tmp_path):
    save_steps(tmp_path, 0)
    path = tmp_path / "checkpoints" / "step_000000000.pt"
    before = path.stat().st_ino
    with saving(tmp_path, keep_every_steps=10, saved=0) as saver:
        saver.save({"step": 0}, 0)
    assert path.stat().st_ino == before
    with saving(tmp_path / "fresh", keep_every_steps=10, saved=0) as saver:
        saver.save({"step": 0}, 0)
    assert load_latest(tmp_path / "fresh")["step"] == 0
    save_steps(tmp_path, 10, 13, 17, keep_every_steps=10)
    assert [name for name in names(tmp_path) if name.endswith("0.pt")] == ["step_000000010.pt"]


def test_damaged_newer_ones_do_not_push_out_what_is_saved_after_a_fallback(tmp_path):
    save_steps(tmp_path, 10, 20, 22, keep_every_steps=10)
    for step in (20, 22):
        (tmp_path / "checkpoints" / f"step_{step:09d}.pt").write_bytes(b"x")
    assert load_latest(tmp_path)["step"] == 10
    set_damaged_aside(tmp_path, 10)
    for step, kept in ((12, {10, 12}), (19, {10, 12, 19}), (23, {10, 19, 23})):
        save_steps(tmp_path, step, keep_every_steps=10)
        assert load_latest(tmp_path)["step"] == step
        assert {int(name[5:14]) for name in names(tmp_path) if name.endswith(".pt")} == kept
    assert "step_000000022.pt.damaged" in names(tmp_path)  # nothing of the user's is deleted


def test_strange_names_are_no_checkpoints(tmp_path):
    save_steps(tmp_path, 5)
    folder = tmp_path / "checkpoints"
    for name in ("step_best.pt", "step_000000011 (copy).pt"):
        (folder / name).write_bytes(b"x")
    assert load_latest(tmp_path)["step"] == 5


def test_one_of_every_so_many_epochs_is_written_for_keeping(tmp_path):
    write_pictures(tmp_path / "data", 4)
    changes = {"log__checkpoint_every_epochs": 2, "log__keep_every_epochs": 3, "optim__epochs": 9}
    pretrain(tiny_options(tmp_path / "data", tmp_path / "run", **changes))
    steps = [int(name[5:14]) for name in names(tmp_path / "run") if name.endswith(".pt")]
    assert steps == [3, 6, 8, 9]


def test_a_checkpoint_without_its_hash_is_refused_by_name_unless_trusted(tmp_path, capsys, caplog):
    write_pictures(tmp_path / "data", 4)
    arguments = ["pretrain", *tiny_arguments(tmp_path / "data", tmp_path / "run", optim__epochs=2)]
    assert main(arguments) == 0
    for file in (tmp_path / "run" / "checkpoints").glob("*.sha256"):
        file.unlink()
    capsys.readouterr()
    assert main(arguments) == 2 and "step_000000002.pt.sha256 is missing" in capsys.readouterr().err
    assert main([*arguments, "--resume_unverified"]) == 0
    assert "step_000000002.pt is not verified" in caplog.text
    assert main(arguments) == 2, "what was trusted once is trusted for good"


def test_hash_file_is_what_sha256sum_reads(tmp_path):
    save_steps(tmp_path, 1)
    folder = tmp_path / "checkpoints"
    digest = hashlib.sha256((folder / "step_000000001.pt").read_bytes()).hexdigest()
    assert (folder / "step_000000001.pt.sha256").read_text() == f"{digest}  step_000000001.pt\n"
    subprocess.run(["sha256sum", "--check", "--quiet", "step_000000001.pt.sha256"], cwd=folder, check=True)


@pytest.mark.parametrize("damage", ["flip", "truncate", "empty", "hash"])
def test_damaged_checkpoint_is_named_and_the_previous_one_used(tmp_path, damage, caplog):
    save_steps(tmp_path, 5, 9)
    path = tmp_path / "checkpoints" / "step_000000009.pt"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= damage == "flip"
    if damage == "hash":
        path.with_name(f"{path.name}.sha256").write_bytes(b"\xff\xfe\x80")
    path.write_bytes({"truncate": content[:-100], "empty": b""}.get(damage, content))
    assert load_latest(tmp_path)["step"] == 5
    assert "step_000000009.pt is damaged" in caplog.text and "WARNING" in caplog.text


def test_all_damaged_is_an_error_not_a_fresh_start(tmp_path):
    save_steps(tmp_path, 5, 9)
    for path in (tmp_path / "checkpoints").glob("*.pt"):
        path.write_bytes(b"x")
    with pytest.raises(UserError, match="all 2 checkpoints are damaged"):
        load_latest(tmp_path)


def test_files_of_others_are_refused_and_their_code_is_not_run(tmp_path):
    class Malicious:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "hacked"),))

    path = tmp_path / "evil.pt"
    torch.save({"format": 1, "x": Malicious()}, path)
    with pytest.raises(UserError, match=r"is refused: it would load posix\.mkdir"):
        load_checkpoint(path)
    assert not (tmp_path / "hacked").exists()
    torch.save({"model": {}}, path)
    with pytest.raises(UserError, match="not a checkpoint of dino-sparo"):
        load_checkpoint(path)


@pytest.mark.parametrize("limit", [1000, 6000])
def test_a_file_that_cannot_be_written_whole_leaves_the_old_ones(tmp_path, limit):
    save_steps(tmp_path, 1, 2)
    before = names(tmp_path)
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, unlimited[1]))
    message = r"step_000000003\.pt \(\d+ bytes\) cannot be written \(File too large\); free some"
    try:
        with pytest.raises(UserError, match=message):
            save_steps(tmp_path, 3)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    assert set(names(tmp_path)) - {"writing.tmp"} == set(before) and load_latest(tmp_path)["step"] == 2
    save_steps(tmp_path, 3)
    assert load_latest(tmp_path)["step"] == 3

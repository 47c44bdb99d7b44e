"""Runs, probes, studies and exports of an earlier version: they load, resume and evaluate to its numbers.

`tests/older` was made by commit 8f69bab on two CPU cores, and `expected.json` holds what that commit computed
when it went on with these files. Other processors sum in another order, hence the tolerances.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dino_sparo import load_encoder
from dino_sparo.__main__ import main

OLDER = Path(__file__).parent / "older"
DEMO = json.dumps(str(OLDER / "recipes" / "demo.yaml"))  # the demo's recipe of that commit
EXPECTED = json.loads((OLDER / "expected.json").read_text().replace('"demo"', DEMO))
RUNS = ("folder", "shards", "parquet")  # by what they learned from


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """A working directory with the images."""
    shutil.copytree(OLDER / "data", tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def log_of(run_dir: Path, key: str) -> list[float]:
    entries = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [entry[key] for entry in entries if key in entry]


def results_of(folder: Path) -> dict[tuple[str, str, str], tuple[float, int]]:
    """Top-1 and number of images by protocol, name and test set."""
    results = json.loads((folder / "results.json").read_text())["results"]
    return {(r["protocol"], r["name"], r["test_set"]): (r["top1"], r["num_images"]) for r in results}


@pytest.mark.long
@pytest.mark.parametrize("name", RUNS)
def test_a_run_stopped_in_mid_epoch_resumes(name, here):
    was = EXPECTED[name]
    assert was["step"] % 3, "not in the middle of an epoch"
    shutil.copytree(OLDER / "stopped" / name, here / "run")
    command = ["-m", "dino_sparo", "pretrain", *was["arguments"], f"--nproc={was['processes']}"]
    subprocess.run([sys.executable, *command], check=True)
    for key, done in (("loss", was["loss"]), ("gradient_norm", was["gradient_norm"])):
        now = log_of(here / "run", key)
        assert now[: was["step"]] == done[: was["step"]] and now == pytest.approx(done, rel=1e-3), key
    assert log_of(here / "run", "knn20_top1") == was["knn"]


@pytest.mark.parametrize("which", ["teacher", "student"])
@pytest.mark.parametrize("name", ["folder", "shards"])
def test_encoders_load(name, which):
    expected = torch.tensor(EXPECTED[name]["encodings"][which])
    with torch.no_grad():
        found = load_encoder(OLDER / "stopped" / name, which)(images())
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("file", ["timm", "official.pth"])
def test_exports_load(file):
    expected = torch.tensor(EXPECTED["folder"]["encodings"]["teacher"])
    with torch.no_grad():
        found = load_encoder(OLDER / "exported" / file, arch={"width": 16, "depth": 2, "num_heads": 2})(
            images()
        )
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def images() -> torch.Tensor:
    return torch.linspace(-2, 2, 2 * 3 * 16 * 16).view(2, 3, 16, 16)


@pytest.mark.parametrize("resumed", [False, True], ids=["anew", "resumed"])
def test_evaluations_give_the_same_numbers(resumed, here):
    run = str(shutil.copytree(OLDER / "stopped" / "folder", here / "run"))
    if resumed:  # after two of three epochs
        shutil.copytree(OLDER / "probe" / "linear", here / "run" / "linear")
    assert main(["knn", run, "--data.path", "folder", "--k", "[5,20]", "--num_workers", "0"]) == 0
    options = ["--epochs", "3", "--batch_size", "8", "--num_workers", "0", "--views", "pil"]
    assert main(["linear", run, "--data.path", "folder", *options]) == 0
    (here / "expected").mkdir()
    (here / "expected" / "results.json").write_text(json.dumps(EXPECTED["results"]))
    assert results_of(here / "run") == results_of(here / "expected")


def test_a_probe_without_its_hash_is_refused_unless_trusted(here, capsys):
    run = str(shutil.copytree(OLDER / "stopped" / "folder", here / "run"))
    shutil.copytree(OLDER / "probe" / "linear", here / "run" / "linear")
    (here / "run" / "linear" / "checkpoints" / "step_000000006.pt.sha256").unlink()
    command = ["linear", run, "--data.path", "folder", "--epochs=3", "--batch_size=8", "--num_workers=0"]
    assert main(command) == 2 and "step_000000006.pt.sha256 is missing" in capsys.readouterr().err
    assert main([*command, "--resume_unverified"]) == 0


@pytest.mark.long
def test_a_study_that_has_ended_gives_the_same_table(here):
    shutil.copytree(OLDER / "study", here / "study")
    shutil.copy(OLDER / "variants.yaml", here)
    trained = {path: path.read_bytes() for path in (here / "study").glob("*/checkpoints/*")}
    assert main(EXPECTED["study_command"]) == 0
    assert trained == {path: path.read_bytes() for path in (here / "study").glob("*/checkpoints/*")}
    assert json.loads((here / "study" / "study.json").read_text()) == EXPECTED["study"]
    for file in (here / "study").rglob("*.sha256"):
        file.unlink()
    assert main(EXPECTED["study_command"]) == 1, "checkpoints without their hashes were believed"
    assert main([*EXPECTED["study_command"], "--resume_unverified"]) == 0


@pytest.mark.long
@pytest.mark.parametrize("recipe", sorted((OLDER / "recipes").iterdir()), ids=lambda path: path.stem)
def test_recipes_are_read(recipe, here, capsys):
    """One with views by tensors and read-out fields that are null, as the version before had them."""
    small = ["--optim.global_batch_size=8", "--monitor.knn_every_epochs=0", "--machine.device=cpu"]
    command = ["pretrain", f"--config={recipe}", "--data.path=folder", "--run_dir=run", *small]
    assert main([*command, "--dry-run"]) in (0, 1), capsys.readouterr().err
    assert "24 " in capsys.readouterr().out

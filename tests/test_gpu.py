"""What needs a GPU: runs in every precision, and runs that are bit-equal."""

import pytest
import torch

from dino_sparo.training import pretrain as program
from dino_sparo.training.checkpoint import load_latest
from dino_sparo.training.runlog import read_metrics
from tests.tiny import state_hash, tiny_options, write_pictures

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
HEAD = {"head__hidden_dim": 512, "head__bottleneck_dim": 64}  # narrower ones overflow in half precision


def run(tmp_path, name, **changes):
    if not (tmp_path / "data").exists():
        write_pictures(tmp_path / "data", 60, classes=3)
    common = {"machine__device": "cuda", "monitor__knn_every_epochs": 1, **HEAD}
    options = tiny_options(tmp_path / "data", tmp_path / name, **(common | changes))
    program.pretrain(options)
    return load_latest(tmp_path / name)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_tiny_run(precision, tmp_path):
    state = run(tmp_path, "run", machine__precision=precision)
    assert state["step"] == 45
    entries = [entry for entry in read_metrics(tmp_path / "run") if "loss" in entry]
    assert all(entry["loss"] < 10 for entry in entries)
    assert all(value.dtype == torch.float32 for value in state["teacher"].values())
    assert entries[-1]["skipped_steps"] < 15


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_deterministic_runs_are_bit_equal(precision, tmp_path):
    changes = {"machine__deterministic": "true", "machine__precision": precision}
    try:
        hashes = {state_hash(run(tmp_path, name, **changes)) for name in ("one", "other")}
    finally:
        torch.use_deterministic_algorithms(False)
    assert len(hashes) == 1


def test_accumulation_is_near_the_whole_batch(tmp_path):
    common = {"model__drop_path_rate": 0.0, "machine__precision": "fp32"}
    whole = run(tmp_path, "whole", **common)
    parts = run(tmp_path, "parts", machine__batch_size_per_gpu=1, **common)
    torch.testing.assert_close(whole["center"], parts["center"], atol=1e-3, rtol=1e-3)

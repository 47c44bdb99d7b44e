"""What needs a GPU: a run in float32 and in bfloat16."""

import pytest
import torch

from dino_sparo.training import pretrain as program
from dino_sparo.training.checkpoint import load_latest
from dino_sparo.training.runlog import read_metrics
from tests.tiny import tiny_options, write_pictures

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_tiny_run(precision, tmp_path):
    write_pictures(tmp_path / "data", 10)
    options = tiny_options(
        tmp_path / "data", tmp_path / "run", machine__device="cuda", machine__precision=precision
    )
    program.pretrain(options)
    state = load_latest(tmp_path / "run")
    assert state["step"] == 6
    assert all(entry["loss"] < 10 for entry in read_metrics(tmp_path / "run"))
    assert all(value.dtype == torch.float32 for value in state["teacher"].values())

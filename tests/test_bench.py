"""The benchmarks of read-out, safety and index: what can be asserted without a clock."""

import re
import subprocess
import sys
import tempfile

import pytest
import torch
from timm.models.vision_transformer import Block

from dino_sparo.bench.index import bench_index
from dino_sparo.bench.plain import direct_sparo
from dino_sparo.errors import UserError
from dino_sparo.models import Sparo
from dino_sparo.models.cost import bytes_saved_for_backward


def test_bytes_saved_are_below_those_of_the_block_and_of_the_direct_form():
    sparo, block = Sparo(384), Block(384, 6, qkv_bias=True)
    tokens = torch.randn(2, 197, 384, requires_grad=True)
    ours = bytes_saved_for_backward(sparo, tokens)
    assert 5 * ours < bytes_saved_for_backward(block, tokens)
    assert 5 * ours < bytes_saved_for_backward(lambda x: direct_sparo(sparo, x), tokens)
    assert ours >= tokens.untyped_storage().nbytes()  # the tokens themselves are among them


def test_counting_sees_what_a_product_keeps():
    left, right = (torch.randn(10, 10, requires_grad=True) for _ in range(2))
    assert bytes_saved_for_backward(lambda x: x @ right, left) == 2 * 400


@pytest.mark.long
def test_safety_is_measured():
    arguments = [sys.executable, "-m", "dino_sparo", "bench", "--what=safety", "--config=demo", "--rounds=1"]
    said = subprocess.run(arguments, capture_output=True, text=True, check=True).stdout
    pattern = r"demo, 2 processes .*: a step (\d+) ms, being .* watched ([\d.]+) ms, ([\d.]+) % .*\n"
    step, added, share = map(float, re.fullmatch(pattern, said).groups())
    assert step > 0 and added > 0 and share == pytest.approx(100 * added / step, rel=0.1, abs=0.02)


@pytest.mark.long
def test_index_prints_its_table_and_removes_its_files(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    bench_index(num_files=20_000, ranks=2, workers=2)
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if line.lstrip()[:1].isdigit()]
    assert [int(row[0]) for row in rows] == [2000, 10_000, 20_000]
    for column in (3, 4):  # the index file and a list of the names
        sizes = [float(row[column]) for row in rows]
        assert sizes[0] < sizes[1] < sizes[2]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"num_files": 9}, "index_files is 9"),
        ({"ranks": 0}, "index_processes is 0"),
        ({"workers": 0}, "index_workers is 0"),
    ],
)
def test_index_refuses_numbers_too_small(wrong, message):
    with pytest.raises(UserError, match=f"^{message}, expected"):
        bench_index(**{"num_files": 10, "ranks": 1, "workers": 1, **wrong})

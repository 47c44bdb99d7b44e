"""The benchmark of the read-out: what can be asserted without a clock."""

import re
import subprocess
import sys

import pytest
import torch
from timm.models.vision_transformer import Block

from dino_sparo.bench import bytes_saved_for_backward, direct_sparo
from dino_sparo.models import Sparo


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
    arguments = [sys.executable, "-m", "dino_sparo", "bench", "--what=safety", "--recipe=demo", "--rounds=1"]
    said = subprocess.run(arguments, capture_output=True, text=True, check=True).stdout
    pattern = r"demo, 2 processes .*: a step (\d+) ms, being .* watched ([\d.]+) ms, ([\d.]+) % .*\n"
    step, added, share = map(float, re.fullmatch(pattern, said).groups())
    assert step > 0 and added > 0 and share == pytest.approx(100 * added / step, rel=0.1, abs=0.02)

"""The benchmark of the read-out: what can be asserted without a clock."""

import torch
from timm.models.vision_transformer import Block

from dino_sparo.bench.plain import direct_sparo
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

"""Folded SPARO against the golden arrays and against equation 1 computed directly."""

import math

import numpy as np
import pytest
import torch

from dino_sparo.bench.plain import direct_sparo
from dino_sparo.models import Sparo

# Golden and direct values are float64; sums over 21 tokens and 48 dimensions round at about 1e-15.
FLOAT64_TOLERANCE = 1e-12


def golden_sparo(arrays: dict[str, np.ndarray], group_size: int) -> Sparo:
    num_slots, key_dim = arrays["query"].shape
    slot_dim, dim = arrays["value_weight"].shape[0], arrays["tokens"].shape[-1]
    sparo = Sparo(dim, num_slots, slot_dim, key_dim, group_size).double()
    names = {
        "query": "query",
        "key_proj.weight": "key_weight",
        "key_proj.bias": "key_bias",
        "value_proj.weight": "value_weight",
        "value_proj.bias": "value_bias",
    }
    sparo.load_state_dict({ours: torch.from_numpy(arrays[theirs]) for ours, theirs in names.items()})
    return sparo


@pytest.mark.parametrize("group_size", [1, 2])
def test_golden_slots_attention_and_mask(golden, group_size):
    arrays = golden(f"sparo_group{group_size}")
    sparo = golden_sparo(arrays, group_size)
    tokens = torch.from_numpy(arrays["tokens"])
    np.testing.assert_allclose(sparo(tokens).detach(), arrays["slots"], atol=FLOAT64_TOLERANCE, rtol=0)
    np.testing.assert_allclose(
        sparo.attention(tokens).detach(), arrays["attention"], atol=FLOAT64_TOLERANCE, rtol=0
    )
    mask = torch.arange(tokens.shape[1])[None] <= torch.from_numpy(arrays["last_valid_token"])[:, None]
    np.testing.assert_allclose(
        sparo(tokens, mask).detach(), arrays["slots_masked"], atol=FLOAT64_TOLERANCE, rtol=0
    )
    assert (sparo.attention(tokens, mask).masked_select(~mask[:, None]) == 0).all()


@pytest.mark.parametrize("group_size", [1, 2, 4])
@pytest.mark.parametrize("masked", [False, True])
def test_folded_equals_direct_in_values_and_gradients(group_size, masked):
    sparo = Sparo(24, num_slots=8, slot_dim=6, key_dim=10, group_size=group_size).double()
    with torch.no_grad():
        for bias in (sparo.key_proj.bias, sparo.value_proj.bias):
            bias.normal_()  # zero initial biases would hide a missing term
    tokens = torch.randn(3, 17, 24, dtype=torch.float64, requires_grad=True)
    mask = torch.rand(3, 17) < 0.6 if masked else None
    weights = torch.randn(3, 8, 6, dtype=torch.float64)
    inputs = [tokens, *sparo.parameters()]
    results = []
    for function in (sparo, lambda x, m: direct_sparo(sparo, x, m)):
        slots = function(tokens, mask)
        results.append((slots, torch.autograd.grad((slots * weights).sum(), inputs)))
    (folded, folded_grads), (direct, direct_grads) = results
    torch.testing.assert_close(folded, direct, atol=FLOAT64_TOLERANCE, rtol=0)
    for mine, reference in zip(folded_grads, direct_grads, strict=True):
        torch.testing.assert_close(mine, reference, atol=FLOAT64_TOLERANCE, rtol=0)


@torch.no_grad()
def test_initial_values_follow_appendix_a():
    sparo = Sparo(384, num_slots=64, slot_dim=64, key_dim=64)
    bound = math.sqrt(6 / (384 + 64 * 64))  # Xavier over the whole (L*H, d) matrix
    assert sparo.key_proj.weight.abs().max() <= bound
    assert sparo.key_proj.weight.std() == pytest.approx(bound / math.sqrt(3), rel=0.01)
    assert sparo.query.std() == pytest.approx(1, abs=0.05)
    assert not sparo.key_proj.bias.any() and not sparo.value_proj.bias.any()
    assert sparo.value_proj.weight.abs().max() <= 1 / 8
    assert {name: tuple(value.shape) for name, value in sparo.state_dict().items()} == {
        "query": (64, 64),
        "key_proj.weight": (4096, 384),
        "key_proj.bias": (4096,),
        "value_proj.weight": (64, 64),
        "value_proj.bias": (64,),
    }


def test_clear_errors():
    with pytest.raises(ValueError, match="group_size 3 does not divide num_slots 8"):
        Sparo(16, num_slots=8, group_size=3)
    mask = torch.tensor([[True, True], [False, False]])
    with pytest.raises(ValueError, match="hides every token"):
        Sparo(16)(torch.randn(2, 2, 16), mask)

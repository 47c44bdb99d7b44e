"""The DINO head against the official head."""

import numpy as np
import pytest
import torch

from dino_sparo.models import DINOHead


def golden_head(arrays, old_names: bool) -> DINOHead:
    head = DINOHead(48, num_prototypes=256, hidden_dim=64, bottleneck_dim=16)
    weights = {k.removeprefix("weight."): torch.from_numpy(v) for k, v in arrays.items() if "weight." in k}
    if not old_names:
        weights["last_layer.parametrizations.weight.original0"] = weights.pop("last_layer.weight_g")
        weights["last_layer.parametrizations.weight.original1"] = weights.pop("last_layer.weight_v")
    head.load_state_dict(weights)
    return head


@pytest.mark.parametrize("old_names", [True, False])
def test_golden_output(golden, old_names):
    arrays = golden("head")
    head = golden_head(arrays, old_names)
    output = head(torch.from_numpy(arrays["input"])).detach()
    # Cosines below one in size, float32.
    np.testing.assert_allclose(output, arrays["output"], atol=1e-6, rtol=1e-5)


@torch.no_grad()
def test_initial_values_and_fixed_length():
    head = DINOHead(48, num_prototypes=512, hidden_dim=64, bottleneck_dim=256)
    assert head.mlp[0].weight.std() == pytest.approx(0.02, rel=0.05)
    assert not head.mlp[0].bias.any()
    length, direction = head.last_layer.parametrizations.weight.parameters()
    assert (length == 1).all() and not length.requires_grad and direction.requires_grad
    assert direction.abs().max() <= 1 / 16  # PyTorch's default for a linear layer with 256 inputs
    assert DINOHead(
        48, norm_last_layer=False, num_prototypes=8
    ).last_layer.parametrizations.weight.original0.requires_grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_logits_stay_float32_under_mixed_precision_and_zeros_give_no_nan(dtype):
    head = DINOHead(48, num_prototypes=16, hidden_dim=32, bottleneck_dim=8)
    with torch.autocast("cpu", dtype):
        logits = head(torch.zeros(2, 48))
    assert logits.dtype == torch.float32 and logits.isfinite().all()

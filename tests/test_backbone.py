"""The backbone against the official model's numbers and initial values."""

from functools import partial

import numpy as np
import pytest
import torch
from timm.layers import Mlp
from timm.models.vision_transformer import Block

from dino_sparo.models import build_encoder
from dino_sparo.models.backbone import FrugalMlp, VisionTransformer
from dino_sparo.models.cost import bytes_saved_for_backward

NORM = partial(torch.nn.LayerNorm, eps=1e-6)
SIZES = ["224x224", "96x96", "160x224"]


def golden_backbone(arrays: dict[str, np.ndarray]) -> VisionTransformer:
    backbone = VisionTransformer(image_size=224, patch_size=16, width=48, depth=4, num_heads=3).eval()
    prefix = "weight."
    weights = {k.removeprefix(prefix): torch.from_numpy(v) for k, v in arrays.items() if k.startswith(prefix)}
    backbone.load_state_dict(weights)  # strict: official names, nothing missing, nothing added
    return backbone


@pytest.mark.parametrize("size", SIZES)
@torch.no_grad()
def test_golden_features(golden, size):
    arrays = golden("backbone")
    backbone = golden_backbone(arrays)
    images = torch.from_numpy(arrays[f"input.{size}"]).float()
    # Float32 sums in another order (fused attention, resize as a matrix): 1e-5 on values of order one.
    np.testing.assert_allclose(backbone(images)[:, 0], arrays[f"features.{size}"], atol=1e-5, rtol=1e-5)
    outputs = backbone.block_outputs(images, last=4)
    assert len(outputs) == 4
    for index, tokens in enumerate(outputs):
        expected = arrays[f"block{index}_normed_cls.{size}"]
        np.testing.assert_allclose(backbone.norm(tokens)[:, 0], expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_initial_values_are_the_official_ones():
    backbone = VisionTransformer(image_size=224, patch_size=16, width=384, depth=2, num_heads=6)
    for name, parameter in backbone.named_parameters():
        if name in ("cls_token", "pos_embed") or (name.startswith("blocks") and parameter.ndim == 2):
            assert parameter.std() == pytest.approx(0.02, rel=0.15 if name == "cls_token" else 0.02), name
        elif "norm" in name and name.endswith("weight"):
            assert (parameter == 1).all(), name
        elif name.startswith("blocks"):
            assert (parameter == 0).all(), name
    bound = 1 / (3 * 16 * 16) ** 0.5  # PyTorch's default for a convolution
    assert 0.99 * bound < backbone.patch_embed.proj.weight.abs().max() <= bound
    assert backbone.patch_embed.proj.bias.any()


def test_inference_mode_first_does_not_spoil_training():
    backbone = VisionTransformer(image_size=32, patch_size=8, width=12, depth=1, num_heads=2)
    images = torch.randn(1, 3, 16, 16)
    with torch.inference_mode():
        backbone(images)
    backbone(images).sum().backward()
    assert backbone.pos_embed.grad is not None


def test_stochastic_depth_rises_over_the_blocks_that_exist():
    blocks = build_encoder("vit_tiny", readout="sparo", drop_path_rate=0.1).backbone.blocks
    rates = [getattr(block.drop_path1, "drop_prob", 0.0) for block in blocks]
    np.testing.assert_allclose(rates, np.linspace(0, 0.1, 11), atol=1e-7)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"patch_size": 15}, "image_size 224 is not divisible by patch_size 15"),
        ({"num_heads": 5}, "width 48 is not divisible by num_heads 5"),
        ({"depth": 0}, "at least one transformer block"),
    ],
)
def test_sizes_that_do_not_divide(change, message):
    sizes = {"image_size": 224, "patch_size": 16, "width": 48, "depth": 1, "num_heads": 3}
    with pytest.raises(ValueError, match=message):
        VisionTransformer(**(sizes | change))
    with pytest.raises(ValueError, match="40x32 pixels cannot be cut into patches of 16"):
        VisionTransformer(**sizes)(torch.zeros(1, 3, 40, 32))


def test_the_frugal_mlp_is_timms_and_keeps_less():
    torch.manual_seed(0)
    ours, theirs = FrugalMlp(16, 64), Mlp(16, 64)
    theirs.load_state_dict(ours.state_dict())
    tokens = torch.randn(3, 5, 16)
    outputs = []
    for module in (ours, theirs):
        given = tokens.clone().requires_grad_()
        output = module(given)
        (output**2).sum().backward()
        outputs.append([output, given.grad, *(p.grad for p in module.parameters())])
    for mine, other in zip(*outputs, strict=True):
        assert torch.equal(mine, other)
    kept = [bytes_saved_for_backward(module, tokens) for module in (theirs, ours)]
    assert kept[0] - kept[1] == 4 * 3 * 5 * 64  # the output of GELU
    with torch.no_grad():
        assert torch.equal(ours(tokens), theirs(tokens))


def half(precision: str) -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16")


def with_gradients(outputs, module):
    """Outputs, and the gradients of the sum of their squares."""
    loss = sum((output.float() ** 2).sum() for output in outputs)
    return [*outputs, *torch.autograd.grad(loss, list(module.parameters()))]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(("precision", "rate"), [("fp32", 0.5), ("bf16", 0.0)])
def test_blocks_are_timms_to_the_bit_and_draw_the_same_random_numbers(precision, rate, checkpointing):
    """Only with stochastic depth in bf16 they are not: timm rounds its scale to bf16 too."""
    sizes = {"image_size": 32, "patch_size": 8, "width": 16, "depth": 3, "num_heads": 2}
    ours = VisionTransformer(**sizes, drop_path_rate=rate)
    ours.activation_checkpointing = checkpointing
    theirs = torch.nn.Sequential(
        *(Block(16, 2, qkv_bias=True, drop_path=rate * n / 2, norm_layer=NORM) for n in range(3))
    )
    theirs.load_state_dict(ours.blocks.state_dict())
    images = torch.randn(9, 3, 32, 32)
    found = []
    for blocks in (ours.blocks, theirs):
        torch.manual_seed(0)
        with half(precision):
            tokens = ours.block_outputs(images, 1)[0] if blocks is ours.blocks else theirs(ours.embed(images))
        found.append(with_gradients([tokens], blocks))
    for mine, other in zip(*found, strict=True):
        assert torch.equal(mine, other)


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-6), ("bf16", 0.02)])
def test_two_sizes_at_once_give_the_tokens_and_gradients_of_each(precision, tolerance):
    """In float32 up to the order of sums; in bf16 the gradients of a weight are rounded once, not twice."""
    backbone = VisionTransformer(image_size=32, patch_size=8, width=16, depth=3, num_heads=2)
    for parameter in backbone.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    groups = [torch.randn(4, 3, 32, 32), torch.randn(6, 3, 16, 16)]
    found = []
    for tokens_of in (backbone.tokens_of_sizes, lambda groups: [backbone(images) for images in groups]):
        with half(precision):
            found.append(with_gradients(tokens_of(groups), backbone))
    for at_once, each in zip(*found, strict=True):
        assert (at_once - each).norm() <= tolerance * each.norm()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@torch.no_grad()
def test_stochastic_depth_of_two_sizes_drops_branches_of_whole_images(precision):
    backbone = VisionTransformer(
        image_size=32, patch_size=8, width=16, depth=2, num_heads=2, drop_path_rate=0.5
    )
    backbone.norm = torch.nn.Identity()
    for block in backbone.blocks:  # each branch then adds one
        for last in (block.attn.proj, block.mlp.fc2):
            torch.nn.init.zeros_(last.weight)
            torch.nn.init.ones_(last.bias)
    groups = [torch.randn(40, 3, 32, 32), torch.randn(60, 3, 16, 16)]
    with half(precision):
        outputs = backbone.tokens_of_sizes(groups)
        added = [after - backbone.embed(images) for after, images in zip(outputs, groups, strict=True)]
    of_image = torch.cat([x[:, 0, 0] for x in added]).round()
    assert set(of_image.tolist()) == {2.0, 4.0, 6.0}  # 1 + 1, and twice 0 or 1 / 0.5
    assert all((x - x[:, :1, :1]).abs().max() < 1e-5 for x in added)

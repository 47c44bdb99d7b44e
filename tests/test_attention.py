"""Slot maps land on the right patches, and the picture shows them there."""

import numpy as np
import pytest
import torch
from PIL import Image
from timm import layers

from dino_sparo.models import build_encoder
from dino_sparo.slots.attention import cls_attention, distinct_slots, slot_attention
from dino_sparo.slots.drawing import COLORS, OPACITIES, draw_slot_maps, overlay
from tests.test_readout import FLOAT64_TOLERANCE, golden_sparo

SMALL = {"width": 48, "depth": 3, "num_heads": 3}


@pytest.mark.parametrize("group_size", [1, 2])
def test_golden_attention_of_the_direct_form_on_the_grid(golden, group_size, monkeypatch):
    arrays = golden(f"sparo_group{group_size}")
    encoder = build_encoder(SMALL, patch_size=8, image_size=32, num_slots=8, slot_dim=6, key_dim=5)
    encoder.readout = golden_sparo(arrays, group_size)
    tokens = torch.from_numpy(arrays["tokens"])
    monkeypatch.setattr(encoder, "tokens", lambda images: tokens)
    maps, cls_share = slot_attention(encoder, torch.zeros(len(tokens), 3, 4 * 8, 5 * 8))  # 1 + 4 * 5 tokens
    expected = torch.from_numpy(arrays["attention"])
    torch.testing.assert_close(cls_share, expected[:, :, 0], atol=FLOAT64_TOLERANCE, rtol=0)
    for row in range(4):
        of_row = expected[:, :, 1 + 5 * row : 1 + 5 * (row + 1)]
        torch.testing.assert_close(maps[:, :, row], of_row, atol=FLOAT64_TOLERANCE, rtol=0)


@pytest.mark.parametrize("depth", [2, 3])  # of which SPARO replaces one
@torch.no_grad()
def test_cls_row_is_that_of_the_explicit_softmax(depth):
    arch = SMALL | {"depth": depth}
    encoder = build_encoder(arch, patch_size=8, image_size=32, num_slots=4, slot_dim=6, key_dim=5).eval()
    for parameter in encoder.parameters():
        parameter.normal_(std=0.3)
    images = torch.randn(2, 3, 16, 32)
    seen = []
    attention = encoder.backbone.blocks[-1].attn
    attention.fused_attn = False  # timm's explicit softmax then passes through attn_drop
    attention.attn_drop.register_forward_hook(lambda module, given, weights: seen.append(weights))
    attention.register_forward_pre_hook(lambda module, given: layers.Attention.forward(module, given[0]))
    encoder(images)
    row = seen[-1][:, :, 0]
    maps = cls_attention(encoder, images)
    assert maps.shape == (2, 3, 2, 4)
    torch.testing.assert_close(maps.flatten(2), row[:, :, 1:])
    torch.testing.assert_close(maps.sum((2, 3)) + row[:, :, 0], torch.ones(2, 3))


@pytest.mark.parametrize("place", [(0, 0), (1, 3), (2, 4)])
@torch.no_grad()
def test_a_slot_that_looks_for_one_patch_finds_it_on_an_image_that_is_not_square(place):
    encoder = build_encoder(SMALL, patch_size=8, image_size=32, num_slots=2, slot_dim=6, key_dim=5).eval()
    row, column = place
    images = torch.zeros(1, 3, 24, 40)
    images[:, :, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8] = 3.0
    backbone = encoder.backbone
    backbone.pos_embed.zero_()
    for block in backbone.blocks:  # tokens are then the patches alone
        block.attn.proj.weight.zero_()
        block.mlp.fc2.weight.zero_()
    direction = backbone.norm(backbone.patch_embed(images[..., 8 * row : 8 * row + 8, 8 * column :][..., :8]))
    others = backbone.norm(backbone.patch_embed.proj.bias)
    contrast = direction[0, 0] - others
    encoder.readout.query[1] = torch.tensor([1.0, 0, 0, 0, 0])
    encoder.readout.key_proj.weight[5] = 10 * contrast  # the first key number of slot 1
    maps, _ = slot_attention(encoder, images)
    assert maps.shape[-2:] == (3, 5)
    assert divmod(int(maps[0, 1].argmax()), 5) == place
    assert maps[0, 1, row, column] > 0.9


def test_encoder_without_slots():
    encoder = build_encoder(SMALL, patch_size=8, image_size=32, readout="cls")
    with pytest.raises(ValueError, match="readout 'cls' has no slots"):
        slot_attention(encoder, torch.zeros(1, 3, 32, 32))


def test_distinct_slots_prefers_different_places():
    maps = torch.zeros(1, 4, 2, 2)  # of one image
    maps[0, 0, 0, 0], maps[0, 1, 0, 0], maps[0, 2, 1, 1] = 0.9, 0.8, 0.7
    maps[0, 3] = 0.25
    assert distinct_slots(list(maps), 2) == [0, 2]
    assert distinct_slots(list(maps), 9) == [0, 2, 3, 1]


def test_picture_is_bright_where_the_slot_looks(tmp_path):
    pixels = torch.full((1, 3, 32, 32), 40, dtype=torch.uint8)
    maps = torch.zeros(1, 1, 4, 4)
    maps[0, 0, 0, 3] = 1.0
    draw_slot_maps(list(pixels), list(maps), [0], tmp_path / "slots.png")
    picture = np.asarray(Image.open(tmp_path / "slots.png").convert("L"), dtype=float)
    height, width = picture.shape
    overlay = np.where(picture == 255, 0, picture)[height // 4 :, width // 2 :]  # without margin and title
    row, column = np.unravel_index(overlay.argmax(), overlay.shape)
    assert row < overlay.shape[0] / 2
    assert column > overlay.shape[1] / 2


def test_overlay_has_the_images_size_and_colors_by_the_peak():
    pixels = torch.full((3, 24, 40), 100, dtype=torch.uint8)
    attention = torch.zeros(3, 5)
    attention[2, 1] = 0.4
    bright, half = (overlay(pixels, attention, peak).sum(2, dtype=int) for peak in (0.4, 0.8))
    assert bright.shape == (24, 40)
    assert bright[16:, 8:16].min() > bright[:8].max()
    assert bright.max() > half.max() > half.min() == bright.min()
    assert (overlay(pixels, attention * 0, 0.0).sum(2, dtype=int) == bright.min()).all()  # looks at CLS only
    least, most = OPACITIES
    quarter = overlay(pixels, torch.full((3, 5), 0.1), 0.4)[0, 0]  # of the peak: halfway up the colors
    middle, opacity = 255 * np.asarray(COLORS(0.5))[:3], (least + most) / 2
    np.testing.assert_allclose(quarter, (1 - opacity) * 100 + opacity * middle, atol=1)

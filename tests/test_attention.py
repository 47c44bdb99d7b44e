"""Attention maps are at the right patches, and pictures show them there."""

import numpy as np
import pytest
import torch
from PIL import Image
from timm import layers

from dino_sparo.data.sources import open_images
from dino_sparo.models import build_encoder
from dino_sparo.slots.attention import FULL, cls_attention, distinct_slots, slot_attention
from dino_sparo.slots.drawing import COLOR, OPACITY, SeenImages, draw_attention
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
    with pytest.raises(ValueError, match=r"has no slots .read-out cls"):
        slot_attention(encoder, torch.zeros(1, 3, 32, 32))


def test_distinct_slots_prefers_different_places():
    maps = torch.zeros(1, 4, 2, 2)  # of one image
    maps[0, 0, 0, 0], maps[0, 1, 0, 0], maps[0, 2, 1, 1] = 0.9, 0.8, 0.7
    maps[0, 3] = 0.25
    assert distinct_slots(list(maps), 2) == [0, 2]
    assert distinct_slots(list(maps), 9) == [0, 2, 3, 1]


def test_slots_that_show_little_come_after_all_that_differ():
    maps = torch.full((1, 4, 4, 4), 1 / 17)
    maps[0, 1, 0, 0], maps[0, 2, 3, 3], maps[0, 3, 0, 3] = 0.3, 0.2, 0.065
    assert distinct_slots(list(maps), 4) == [1, 2, 3, 0]


def test_color_tells_attention_relative_to_uniform_and_the_rest_is_gray():
    picture = torch.zeros(3, 240, 400, dtype=torch.uint8)
    picture[0] = 200  # red
    attention = torch.full((3, 5), 1 / 16)  # uniform over 15 patches and CLS
    attention[0, 4], attention[2, 0], attention[2, 4] = FULL / 16, 3 * FULL / 16, FULL**0.5 / 16
    attention[0, 0] = 0
    drawn = draw_attention(picture, attention).astype(int)
    assert drawn.shape == (240, 400, 3)
    uniform, none, half, full, more = (
        drawn[place] for place in ((120, 200), (40, 40), (200, 360), (40, 360), (200, 40))
    )
    assert uniform.max() == uniform.min() and (none == uniform).all()
    assert (full == more).all()
    np.testing.assert_allclose(full, (1 - OPACITY) * uniform + OPACITY * np.array(COLOR), atol=1)
    np.testing.assert_allclose(half, (uniform + full) / 2, atol=1)


def test_photograph_is_drawn_at_its_own_resolution_where_the_encoder_sees_it(tmp_path):
    image = Image.new("RGB", (600, 300))
    image.paste((255, 255, 255), (300, 0, 600, 300))
    image.save(tmp_path / "0.png")
    source = open_images(str(tmp_path))
    for short_side, size in ((None, (262, 262)), (32, (300, 600))):  # 7 / 8 of 300; whole patches
        seen = SeenImages(source, 8, 48, short_side)[0]
        assert seen.pixels.shape == ((3, 48, 48) if short_side is None else (3, 32, 64))
        assert seen.picture.shape[1:] == size
        middle = size[1] // 2
        assert seen.picture[..., : middle - 3].max() == 0 and seen.picture[..., middle + 3 :].min() == 255
    Image.new("RGB", (40, 40)).save(tmp_path / "0.png")
    assert SeenImages(source, 8, 48)[0].picture.shape[1:] == (224, 224)  # small ones are enlarged

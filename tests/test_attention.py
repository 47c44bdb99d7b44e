"""Slot maps land on the right patches, and the picture shows them there."""

import numpy as np
import pytest
import torch
from PIL import Image

from dino_sparo.models import build_encoder
from dino_sparo.slots.attention import distinct_slots, draw_slot_maps, slot_maps

SMALL = {"width": 48, "depth": 3, "num_heads": 3}


def test_maps_are_the_readouts_attention_on_the_grid():
    encoder = build_encoder(SMALL, patch_size=8, image_size=32, num_slots=4, slot_dim=6, key_dim=5).eval()
    images = torch.randn(2, 3, 16, 32)
    maps = slot_maps(encoder, images)
    with torch.no_grad():
        attention = encoder.readout.attention(encoder.tokens(images))
    assert maps.shape == (2, 4, 2, 4)
    torch.testing.assert_close(maps.sum((2, 3)) + attention[:, :, 0], torch.ones(2, 4))
    torch.testing.assert_close(maps[1, 2, 1, 3], attention[1, 2, 1 + 4 + 3])


def test_encoder_without_slots():
    encoder = build_encoder(SMALL, patch_size=8, image_size=32, readout="cls")
    with pytest.raises(ValueError, match="readout 'cls' has no slots"):
        slot_maps(encoder, torch.zeros(1, 3, 32, 32))


def test_distinct_slots_prefers_different_places():
    maps = torch.zeros(1, 4, 2, 2)
    maps[0, 0, 0, 0], maps[0, 1, 0, 0], maps[0, 2, 1, 1] = 0.9, 0.8, 0.7
    maps[0, 3] = 0.25
    assert distinct_slots(maps, 2) == [0, 2]
    assert distinct_slots(maps, 9) == [0, 2, 3, 1]


def test_picture_is_bright_where_the_slot_looks(tmp_path):
    pixels = torch.full((1, 3, 32, 32), 40, dtype=torch.uint8)
    maps = torch.zeros(1, 1, 4, 4)
    maps[0, 0, 0, 3] = 1.0
    draw_slot_maps(pixels, maps, [0], tmp_path / "slots.png")
    picture = np.asarray(Image.open(tmp_path / "slots.png").convert("L"), dtype=float)
    height, width = picture.shape
    overlay = np.where(picture == 255, 0, picture)[height // 4 :, width // 2 :]  # without margin and title
    row, column = np.unravel_index(overlay.argmax(), overlay.shape)
    assert row < overlay.shape[0] / 2
    assert column > overlay.shape[1] / 2

"""Where single slots look: SPARO's attention weights drawn over the image.

Axis letters: B images, L slots, N tokens.
"""

from pathlib import Path

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor

from dino_sparo.models import Encoder


@torch.no_grad()
def slot_maps(encoder: Encoder, images: Tensor) -> Tensor:
    """Attention of every slot over the patches of normalised images (B, 3, height, width).

    Returns:
        (B, L, rows, columns), the share of each patch; what is missing to one lies on the CLS token.

    Raises:
        ValueError: the encoder has no slots.
    """
    if encoder.readout is None:
        raise ValueError(f"readout {encoder.readout_name!r} has no slots; expected an encoder with 'sparo'")
    patch = encoder.backbone.patch_size
    rows, columns = images.shape[-2] // patch, images.shape[-1] // patch
    attn_BLN = encoder.readout.attention(encoder.tokens(images))
    return attn_BLN[:, :, 1:].unflatten(-1, (rows, columns))


def distinct_slots(maps: Tensor, count: int) -> list[int]:
    """`count` slots that look at places as different as possible, the most focused one first.

    maps: (B, L, rows, columns). Each next slot is the one least similar to those already chosen.
    """
    flat_LX = F.normalize(maps.transpose(0, 1).flatten(1), dim=1)
    focus_L = maps.amax(dim=(2, 3)).mean(dim=0)
    chosen = [int(focus_L.argmax())]
    while len(chosen) < min(count, maps.shape[1]):
        similarity_L = (flat_LX @ flat_LX[chosen].T).amax(dim=1)
        similarity_L[chosen] = torch.inf
        chosen.append(int(similarity_L.argmin()))
    return chosen


def draw_slot_maps(pixels: Tensor, maps: Tensor, slots: list[int], path: Path) -> None:
    """Write a PNG: one row an image, the picture itself and then each slot's attention over it.

    pixels: uint8 (B, 3, height, width); maps: (B, L, rows, columns). Bright is where the slot looks; each
    map is scaled by its own largest value.
    """
    pictures = pixels.permute(0, 2, 3, 1).numpy() / 255
    enlarged = F.interpolate(maps[:, slots].float(), size=pixels.shape[-2:], mode="bilinear")
    heat = (enlarged / enlarged.amax(dim=(2, 3), keepdim=True)).numpy()
    colours = matplotlib.colormaps["inferno"]
    figure = Figure(figsize=(1.3 * (len(slots) + 1), 1.3 * len(pictures) + 0.3), layout="constrained")
    axes = figure.subplots(len(pictures), len(slots) + 1, squeeze=False)
    for row, picture in zip(range(len(pictures)), pictures, strict=True):
        axes[row][0].imshow(picture)
        for column, slot in enumerate(slots):
            overlay = 0.4 * picture + 0.6 * np.asarray(colours(heat[row, column]))[..., :3]
            axes[row][column + 1].imshow(overlay)
            axes[0][column + 1].set_title(f"slot {slot}", fontsize=8)
    axes[0][0].set_title("image", fontsize=8)
    for axis in axes.flat:
        axis.set_axis_off()
    figure.savefig(path, dpi=110)

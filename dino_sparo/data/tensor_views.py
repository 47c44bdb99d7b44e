"""Views by tensors: the second executor of the numbers that `views` draws, one image at a time on a CPU.

The same pixels as `pil_views` but for single steps of brightness where numbers round otherwise, several
times faster. `device_views` does the same for whole batches on a GPU.
"""

import logging
import time
from collections.abc import Callable, Sequence
from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from dino_sparo.data import colour
from dino_sparo.data.views import CropRecipe, View

log = logging.getLogger("dino_sparo")

BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)
SLOW_SECONDS = 5.0


def execute(image: Tensor, view: View, blur_taps: int) -> Tensor:
    """One crop of an RGB image, uint8 (height, width, 3), by the view's numbers: uint8 (3, size, size).

    Each number of `blur_taps` compiles a blur of its own, so give what the largest radius needs.
    """
    with torch.no_grad():
        crop = resized_crop(image, view)
        if view.flip:
            crop = crop.flip(3)
        if view.jitter_order or view.grayscale:
            order = view.jitter_order
            hue_last = HUE in order and order.index(HUE) > order.index(CONTRAST)
            jitter = _compiled(colour.jitter_hue_last if hue_last else colour.jitter_hue_first)
            crop = jitter(crop, torch.tensor([jitter_steps(view)]))
        if view.blur_radius > 0:
            weights = colour.blur_weights(view.blur_radius, blur_taps)
            crop = _compiled(colour.blur)(crop, torch.tensor([weights]))
        if view.solarize:
            crop = _compiled(colour.solarize)(crop, torch.tensor([True]))
        return crop[0]


def resized_crop(image: Tensor, view: View) -> Tensor:
    """The view's part of an image, uint8 (height, width, 3), as uint8 (1, 3, size, size), not flipped."""
    box = image[view.top : view.top + view.height, view.left : view.left + view.width]
    size = (view.size, view.size)
    crop = F.interpolate(box.permute(2, 0, 1)[None], size, mode=view.interpolation, antialias=True)
    return crop.contiguous()


def jitter_steps(view: View) -> list[float]:
    """The steps of `colour.jitter` for a view; such that change nothing for one without."""
    steps = [[*colour.NOTHING], [*colour.NOTHING]]
    part, places = 0, [*colour.BLENDS_BEFORE]
    contrast = 1.0
    for adjustment in view.jitter_order:
        factor = view.jitter_factors[adjustment]
        if adjustment == CONTRAST:
            contrast, part, places = factor, 1, [*colour.BLENDS_BEFORE]
        elif adjustment == HUE:
            steps[part][colour.SHIFT] = float(np.int32(factor * 255) % 256)
            places = [*colour.BLENDS_AFTER]
        else:
            kind_at, factor_at = places.pop(0)
            steps[part][kind_at] = float(adjustment == SATURATION)
            steps[part][factor_at] = factor
    return [*steps[0], contrast, *steps[1], float(view.grayscale)]


def to_pixels(image: Image.Image) -> Tensor:
    """PIL RGB -> uint8 (height, width, 3)."""
    return torch.from_numpy(np.array(image))


def blur_taps(recipes: Sequence[CropRecipe]) -> int:
    """Weights of the largest blur of these recipes."""
    return max(colour.blur_taps(recipe.blur_radius[1]) for recipe in recipes)


def warm_up(recipes: Sequence[CropRecipe]) -> str:
    """Compile all that views of these recipes may need; why it cannot be, empty if it can.

    Before worker processes start: where they are forked they inherit it, and one of them must not begin to
    compile. It takes some seconds, the first time on a machine up to a minute. With one thread, as workers
    have, or they would compile again.
    """
    threads, started = torch.get_num_threads(), time.monotonic()
    torch.set_num_threads(1)
    try:
        image = torch.zeros(40, 40, 3, dtype=torch.uint8)
        for order in (HUE, CONTRAST), (CONTRAST, HUE):
            execute(image, _everything(recipes, order), blur_taps(recipes))
    except Exception as error:  # of the compiler, whatever is wrong with it
        return str(error).strip().split("\n")[0]
    finally:
        torch.set_num_threads(threads)
    if time.monotonic() - started > SLOW_SECONDS:
        log.info("compiled the views in %.0f s; this is kept for the next start", time.monotonic() - started)
    return ""


def _everything(recipes: Sequence[CropRecipe], order: tuple[int, ...]) -> View:
    """A view with all that those of the recipes may have."""
    jitter = any(recipe.jitter_probability > 0 for recipe in recipes)
    return View(
        top=0,
        left=0,
        height=40,
        width=40,
        size=224,
        flip=False,
        jitter_order=order if jitter else (),
        jitter_factors=(1.0, 1.0, 1.0, 0.0),
        grayscale=any(recipe.grayscale_probability > 0 for recipe in recipes),
        blur_radius=max(recipe.blur_radius[1] * (recipe.blur_probability > 0) for recipe in recipes),
        solarize=any(recipe.solarize_probability > 0 for recipe in recipes),
    )


@cache
def _compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """One kernel for all sizes, without threads of its own: each worker process has one core."""
    return torch.compile(function, fullgraph=True, dynamic=True, options={"cpp.threads": 1})

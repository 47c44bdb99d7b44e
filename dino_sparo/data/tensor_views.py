"""Views by tensors: the second executor of the numbers that `views` draws, one image at a time on a CPU.

The same pixels as `pil_views` but for single steps of brightness where numbers round otherwise, several
times faster. `device_views` does the same for whole batches on a GPU.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from itertools import permutations

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from dino_sparo.data import colour
from dino_sparo.data.views import CropRecipe, View
from dino_sparo.device import compiled

log = logging.getLogger("dino_sparo")

BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)


def execute(image: Tensor, views: Sequence[View]) -> list[Tensor]:
    """Crops of an RGB image, uint8 (height, width, 3), by the views' numbers: uint8 (3, size, size) each.

    One operation on all of them before the next: a tenth faster than one crop after the other.
    """
    with torch.no_grad():
        crops = [resized_crop(image, view) for view in views]
        for number, view in enumerate(views):
            if view.jitter_order or view.grayscale:
                order, numbers = jitter_numbers(view)
                crops[number] = _compiled(colour.jitter_by(order))(crops[number], torch.tensor([numbers]))
        for number, view in enumerate(views):
            if view.blur_radius > 0:
                weights = colour.blur_weights(view.blur_radius, colour.blur_taps(view.blur_radius))
                crops[number] = _compiled(colour.blur)(crops[number], torch.tensor([weights]))
        for number, view in enumerate(views):
            if view.solarize:
                crops[number] = _compiled(colour.solarize)(crops[number], torch.tensor([True]))
        return [crop[0] for crop in crops]


def resized_crop(image: Tensor, view: View) -> Tensor:
    """The view's part of an image, uint8 (height, width, 3), as uint8 (1, 3, size, size)."""
    box = image[view.top : view.top + view.height, view.left : view.left + view.width]
    size = (view.size, view.size)
    crop = F.interpolate(box.permute(2, 0, 1)[None], size, mode=view.interpolation, antialias=True)
    return crop.flip(3) if view.flip else crop.contiguous()


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


def jitter_numbers(view: View) -> tuple[str, list[float]]:
    """The order of `colour.jitter_by` for a view, and the numbers that its function takes."""
    order = ""
    numbers: list[float] = []
    for adjustment in view.jitter_order:
        factor = view.jitter_factors[adjustment]
        if adjustment == HUE:
            order, numbers = order + "H", [*numbers, float(np.int32(factor * 255) % 256)]
        elif adjustment == CONTRAST:
            order, numbers = order + "C", [*numbers, factor]
        else:
            order, numbers = order + "B", [*numbers, float(adjustment == SATURATION), factor]
    return order, [*numbers, float(view.grayscale)]


def to_pixels(image: Image.Image) -> Tensor:
    """PIL RGB -> uint8 (height, width, 3)."""
    return torch.from_numpy(np.array(image))


def warm_up(recipes: Sequence[CropRecipe]) -> str:
    """Compile all that views of these recipes may need; why it cannot be, empty if it can.

    Before worker processes start: where they are forked they inherit it, and one of them must not begin to
    compile. It takes 15 seconds, the first time on a machine two minutes. With one thread, as workers have,
    or they would compile again.
    """
    views = _views_of_all_kinds(recipes)
    if views:
        log.info("compiling the views: some 15 s, the first time on a machine two minutes")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        execute(torch.zeros(40, 40, 3, dtype=torch.uint8), views)
    except Exception as error:  # of the compiler, whatever is wrong with it
        return str(error).strip().split("\n")[0]
    finally:
        torch.set_num_threads(threads)
    return ""


def _views_of_all_kinds(recipes: Sequence[CropRecipe]) -> list[View]:
    """Views that together need every kernel that one of these recipes may need."""
    plain = View(
        top=0,
        left=0,
        height=40,
        width=40,
        size=224,
        flip=False,
        jitter_order=(),
        jitter_factors=(1.0, 1.0, 1.0, 0.0),
        grayscale=False,
        blur_radius=0.0,
        solarize=False,
    )
    views = []
    if any(recipe.jitter_probability > 0 for recipe in recipes):  # brightness and saturation share a kernel
        orders = sorted(set(permutations((BRIGHTNESS, BRIGHTNESS, CONTRAST, HUE))))
        views += [replace(plain, jitter_order=order) for order in orders]
    if any(recipe.grayscale_probability > 0 for recipe in recipes):
        views.append(replace(plain, grayscale=True))
    radii = [radius for recipe in recipes if recipe.blur_probability > 0 for radius in recipe.blur_radius]
    if radii:
        one_each = {colour.blur_taps(radius): radius for radius in np.linspace(min(radii), max(radii), 100)}
        views += [replace(plain, blur_radius=radius) for radius in one_each.values()]
    if any(recipe.solarize_probability > 0 for recipe in recipes):
        views.append(replace(plain, solarize=True))
    return views


@cache
def _compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """One kernel for all sizes, without threads of its own: each worker process has one core."""
    return compiled(function, fullgraph=True, dynamic=True, options={"cpp.threads": 1})

"""Views made by PIL, with torchvision's functions: the reference executor, and the evaluation crop.

Resizing rounds to 8 bits after each direction. Pillow up to 12 always resized horizontally first; Pillow 13
resizes some tall images vertically first, so each direction is a separate call here.
"""

from PIL import Image, ImageFilter
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as TF

from dino_sparo.data.views import View

SOLARIZE_THRESHOLD = 128
JITTER = (TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation, TF.adjust_hue)


def execute(image: Image.Image, view: View) -> Image.Image:
    """One crop of an RGB image with the view's numbers: RGB, size x size."""
    crop = TF.crop(image, view.top, view.left, view.height, view.width)
    crop = _resize(crop, view.size, view.size, InterpolationMode(view.interpolation))
    if view.flip:
        crop = TF.hflip(crop)
    for adjustment in view.jitter_order:
        crop = JITTER[adjustment](crop, view.jitter_factors[adjustment])
    if view.grayscale:
        crop = TF.rgb_to_grayscale(crop, num_output_channels=3)
    if view.blur_radius > 0:
        crop = crop.filter(ImageFilter.GaussianBlur(radius=view.blur_radius))
    if view.solarize:
        crop = TF.solarize(crop, SOLARIZE_THRESHOLD)
    return crop


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """The evaluation crop: short side to round(size * 256 / 224), bicubic, then the central square."""
    short, target = min(image.size), round(size * 256 / 224)
    width, height = (int(target * side / short) for side in image.size)  # rounded down, as in torchvision
    return TF.center_crop(_resize(image, width, height, InterpolationMode.BICUBIC), [size, size])


def _resize(image: Image.Image, width: int, height: int, interpolation: InterpolationMode) -> Image.Image:
    """Resize horizontally, then vertically."""
    lines = TF.resize(image, [image.height, width], interpolation)
    return TF.resize(lines, [height, width], interpolation)

"""Views by PIL, through torchvision's own functions: the reference executor, and the evaluation crop."""

from PIL import Image, ImageFilter
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as TF

from dino_sparo.data.views import View

SOLARIZE_THRESHOLD = 128
JITTER = (TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation, TF.adjust_hue)


def execute(image: Image.Image, view: View) -> Image.Image:
    """One crop of an RGB image by the view's numbers: RGB, size x size."""
    size = [view.size, view.size]
    interpolation = InterpolationMode(view.interpolation)
    crop = TF.resized_crop(image, view.top, view.left, view.height, view.width, size, interpolation)
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
    resized = TF.resize(image, [round(size * 256 / 224)], InterpolationMode.BICUBIC)
    return TF.center_crop(resized, [size, size])

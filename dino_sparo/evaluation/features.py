"""One pass of a frozen encoder over a source of images."""

import sys

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from dino_sparo.data.loader import CenterCrops, UnreadableImage, collate_images, ignore_interrupt, normalize
from dino_sparo.data.sources import ImageSource
from dino_sparo.models import Encoder


@torch.no_grad()
def extract_features(
    encoder: Encoder,
    source: ImageSource,
    *,
    image_size: int,
    batch_size: int = 64,
    num_workers: int = 0,
    description: str = "features",
) -> Tensor:
    """Encodings of all images in order: float32 (len(source), embed_dim) on the CPU.

    Every image is resized and cropped in the middle as in the official evaluation. The encoder is used
    as it is, on its device; put it into evaluation mode before.

    Raises:
        UserError: an image cannot be read.
    """
    device = encoder.backbone.cls_token.device
    features = torch.empty(len(source), encoder.embed_dim)
    batches = DataLoader(
        CenterCrops(source, image_size),
        batch_size=batch_size,
        num_workers=num_workers,
        collate_fn=collate_images,
        pin_memory=device.type == "cuda",
        worker_init_fn=ignore_interrupt,
    )
    done = 0
    with tqdm(
        total=len(source), desc=description, unit="img", leave=False, disable=not sys.stderr.isatty()
    ) as bar:
        for batch in batches:
            if isinstance(batch, UnreadableImage):
                batch.raise_error()
            encodings = encoder(normalize(batch.to(device, non_blocking=True)))
            features[done : done + len(batch)] = encodings.float().cpu()
            done += len(batch)
            bar.update(len(batch))
    assert done == len(source)
    return features

"""One pass of a frozen encoder over a source of images, shared among all processes."""

import sys

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from dino_sparo.data.loader import CenterCrops, UnreadableImage, collate_images, normalize
from dino_sparo.data.sources import ImageSource
from dino_sparo.data.workers import WatchedLoader
from dino_sparo.distributed import rank, world_size
from dino_sparo.models import Encoder


@torch.no_grad()
def extract_features(
    encoder: Encoder,
    source: ImageSource,
    *,
    image_size: int,
    batch_size: int = 64,
    num_workers: int = 0,
    timeout_seconds: float = 600.0,
    description: str = "features",
) -> Tensor:
    """Encodings of this process's share of the images: float32 (len(share), embed_dim) on the CPU.

    Of R processes number r takes images r, r + R, r + 2R, ...: one process takes all, in order. Every
    image is resized and cropped in the middle as in the official evaluation. The encoder is used as it is,
    on its device; put it into evaluation mode before.

    Raises:
        UserError: an image cannot be read, or the workers that load images failed.
    """
    device = encoder.backbone.cls_token.device
    share = source.subset(np.arange(rank(), len(source), world_size()))
    features = torch.empty(len(share), encoder.embed_dim)
    batches = WatchedLoader(
        CenterCrops(share, image_size),
        image_of=int,
        name=share.name,
        num_workers=num_workers,
        timeout_seconds=timeout_seconds,
        batch_size=batch_size,
        collate_fn=collate_images,
        pin_memory=device.type == "cuda",
    )
    silent = rank() > 0 or not sys.stderr.isatty()
    bar = tqdm(total=len(share), desc=description, unit="img", leave=False, disable=silent)
    done = 0
    with bar, batches.failures_explained():
        for batch in batches:
            if isinstance(batch, UnreadableImage):
                batch.raise_error()
            encodings = encoder(normalize(batch.to(device, non_blocking=True)))
            features[done : done + len(batch)] = encodings.float().cpu()
            done += len(batch)
            bar.update(len(batch))
    assert done == len(share)
    return features

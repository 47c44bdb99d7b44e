"""One pass of a frozen encoder over a source of images, shared among all processes."""

import sys
from contextlib import nullcontext

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from dino_sparo.data.loader import CenterCrops, UnreadableImage, collate_images, normalize
from dino_sparo.data.sources import ImageSource
from dino_sparo.data.workers import Watched, start_worker
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
    images = Watched(CenterCrops(share, image_size), image_of=int, name=share.name, num_workers=num_workers)
    batches = DataLoader(
        images,
        batch_size=batch_size,
        num_workers=num_workers,
        collate_fn=collate_images,
        pin_memory=device.type == "cuda",
        worker_init_fn=start_worker,
        timeout=timeout_seconds if num_workers else 0,
    )
    silent = rank() > 0 or not sys.stderr.isatty()
    bar = tqdm(total=len(share), desc=description, unit="img", leave=False, disable=silent)
    done = 0
    with bar, images.failures_explained(timeout_seconds) if num_workers else nullcontext():
        for batch in batches:
            if isinstance(batch, UnreadableImage):
                batch.raise_error()
            encodings = encoder(normalize(batch.to(device, non_blocking=True)))
            features[done : done + len(batch)] = encodings.float().cpu()
            done += len(batch)
            bar.update(len(batch))
    assert done == len(share)
    return features

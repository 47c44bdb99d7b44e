"""The simulated GPU has no cuDNN: the patch convolution is one matrix product, and attention is flash."""

import os
import sys
from datetime import timedelta
from importlib.abc import MetaPathFinder
from importlib.util import find_spec

BACKBONE = "dino_sparo.models.backbone"


def without_cudnn(module):
    import torch

    torch.backends.cudnn.enabled = False
    torch.backends.cuda.enable_cudnn_sdp(False)

    def forward(self, images):
        side = self.proj.kernel_size[0]
        batch, channels, height, width = images.shape
        grid = images.reshape(batch, channels, height // side, side, width // side, side)
        patches = grid.permute(0, 2, 4, 1, 3, 5).reshape(batch, -1, channels * side * side)
        return torch.nn.functional.linear(patches, self.proj.weight.flatten(1), self.proj.bias)

    module.PatchEmbed.forward = forward
    if "FAKEGPU_PATIENCE" in os.environ:
        from dino_sparo.parallel import device, distributed

        device.PATIENCE_SECONDS = float(os.environ["FAKEGPU_PATIENCE"])
        distributed.PATIENCE = timedelta(seconds=device.PATIENCE_SECONDS)
    if "RANK" in os.environ and os.environ["RANK"] == os.environ.get("FAKEGPU_NO_CAPTURE"):
        torch.cuda.CUDAGraph.capture_begin = no_capture


def no_capture(*_, **__):
    raise RuntimeError("this process cannot capture")


class Finder(MetaPathFinder):
    def find_spec(self, fullname, path, target=None):
        if fullname != BACKBONE or self not in sys.meta_path:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        run = spec.loader.exec_module

        def exec_module(module):
            run(module)
            without_cudnn(module)

        spec.loader.exec_module = exec_module
        return spec


if os.environ.get("FAKEGPU"):
    sys.meta_path.insert(0, Finder())

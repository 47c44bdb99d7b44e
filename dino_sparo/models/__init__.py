"""Networks, built from plain arguments."""

from dino_sparo.models.encoder import DinoModel, Encoder, build_encoder
from dino_sparo.models.head import DINOHead
from dino_sparo.models.readout import Sparo

__all__ = ["DINOHead", "DinoModel", "Encoder", "Sparo", "build_encoder"]

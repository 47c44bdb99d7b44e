"""Self-supervised pretraining with DINO and the SPARO read-out.

Importing the package is quick: torch is imported when a name that needs it is used.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dino_sparo.evaluation.features import embed as embed
    from dino_sparo.evaluation.knn import knn_classify as knn_classify
    from dino_sparo.interop.load import load_encoder as load_encoder
    from dino_sparo.models import DINOHead as DINOHead
    from dino_sparo.models import Encoder as Encoder
    from dino_sparo.models import Sparo as Sparo
    from dino_sparo.models import build_encoder as build_encoder
    from dino_sparo.slots.attention import slot_attention as slot_attention
    from dino_sparo.training.loss import DINOLoss as DINOLoss
    from dino_sparo.training.notebook import pretrain as pretrain

__version__ = "0.1.0"
_HOMES = {
    "DINOHead": "dino_sparo.models",
    "DINOLoss": "dino_sparo.training.loss",
    "Encoder": "dino_sparo.models",
    "Sparo": "dino_sparo.models",
    "build_encoder": "dino_sparo.models",
    "embed": "dino_sparo.evaluation.features",
    "knn_classify": "dino_sparo.evaluation.knn",
    "load_encoder": "dino_sparo.interop.load",
    "pretrain": "dino_sparo.training.notebook",
    "slot_attention": "dino_sparo.slots.attention",
}
__all__ = ["__version__", *_HOMES]  # noqa: PLE0604


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'dino_sparo' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

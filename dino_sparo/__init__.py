"""Self-supervised pretraining with DINO and the SPARO read-out.

Importing the package is quick: torch is imported when a name that needs it is used.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dino_sparo.interop.load import load_encoder

__all__ = ["load_encoder"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from dino_sparo.interop.load import load_encoder

        return load_encoder
    raise AttributeError(f"module 'dino_sparo' has no attribute {name!r}")

"""Self-supervised FCMAE pretraining of ConvNeXt V2 with a sparse encoder."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fcmae.model import FCMAE, FCMAEOutput, create_model

__version__ = "0.1.0"
__all__ = ["FCMAE", "FCMAEOutput", "create_model"]


def __getattr__(name: str) -> Any:
    # torch takes seconds to import; a mistyped option must be answered before that.
    if name in __all__:
        from fcmae import model

        return getattr(model, name)
    raise AttributeError(f"module 'fcmae' has no attribute {name!r}")

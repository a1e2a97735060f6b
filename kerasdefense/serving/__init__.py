"""A client for models that TF Serving serves, over gRPC or REST; needs the extra `serving`.

Its modules are imported when one of the names below is first asked for: the package itself imports without the extra,
which is how `python -m kerasdefense.serving` can say what it lacks.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kerasdefense.serving.client import Client, Prediction
    from kerasdefense.serving.errors import (
        DeadlineError,
        InvalidImageError,
        InvalidRequestError,
        MergedError,
        NotFoundError,
        ServingError,
        UnavailableError,
    )
    from kerasdefense.serving.transport import ModelVersion

__all__ = [
    "Client",
    "DeadlineError",
    "InvalidImageError",
    "InvalidRequestError",
    "MergedError",
    "ModelVersion",
    "NotFoundError",
    "Prediction",
    "ServingError",
    "UnavailableError",
]
_MODULES = {"Client": "client", "Prediction": "client", "ModelVersion": "transport"}
"""Where a name is defined; all others are errors."""


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES.get(name, 'errors')}"), name)

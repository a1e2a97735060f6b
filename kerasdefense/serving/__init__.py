"""A client for models that TF Serving serves, over gRPC or REST; needs the extra `serving`."""

from kerasdefense.serving.client import Client, Prediction
from kerasdefense.serving.errors import (
    DeadlineError,
    InvalidImageError,
    InvalidRequestError,
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
    "ModelVersion",
    "NotFoundError",
    "Prediction",
    "ServingError",
    "UnavailableError",
]

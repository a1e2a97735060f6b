"""How a model is reached: its address, what it is asked for and what it answers; gRPC and REST are the two ways."""

from __future__ import annotations

import dataclasses
import urllib.parse
from collections.abc import Iterable, Mapping
from typing import Any, Optional, Protocol

import numpy as np

from kerasdefense.serving.errors import (
    DeadlineError,
    InvalidRequestError,
    MergedError,
    NotFoundError,
    ServingError,
    UnavailableError,
)
from kerasdefense.types import UsageError

MODEL = "classifier"
"""The model's name where neither address nor caller gives one."""
SCHEMES = ("grpc", "http", "https")
_OUTPUTS: Mapping[str, Any] = {
    "label": np.int64,
    "class_name": object,
    "probabilities": np.float32,
    "logits": np.float32,
    "anomaly_score": np.float32,
    "accepted": bool,
    "valid": bool,
}
"""What a signature returns: outputs with as many rows as there were images."""
_LABEL = "Unrecognized servable version label"
"""How TF Serving's message begins where a label is unknown; its code is INVALID_ARGUMENT."""
_MERGED = "from different tasks have different shapes"
"""A part of its message to all whose requests were merged, where one of them has another shape; FAILED_PRECONDITION."""

_LAST_VERSION = 2**63 - 1

Outputs = Mapping[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Target:
    """The model that is asked: its server `host:port`, its name, and its version by number or label, if chosen."""

    scheme: str
    server: str
    name: str
    version: Optional[int] = None
    label: Optional[str] = None

    def __str__(self) -> str:
        """Return what it is called in messages."""
        chosen = "" if self.version is None else f", version {self.version}"
        chosen += "" if self.label is None else f", label {self.label}"
        return f"{self.name}{chosen} at {self.scheme}://{self.server}"


@dataclasses.dataclass(frozen=True)
class ModelVersion:
    """A version that a server knows: its number, its state (`AVAILABLE`, `LOADING`, ...), what went wrong if any."""

    version: int
    state: str
    error: str = ""


class Transport(Protocol):
    """A way to a server. Each call takes the seconds that it may last, and raises one of our errors."""

    def predict(self, signature: str, argument: str, rows: np.ndarray, timeout: float) -> Outputs:
        """Return the outputs of a signature for its one input, float32 [n, h, w, c] or bytes objects [n]."""

    def status(self, timeout: float) -> list[ModelVersion]:
        """Return the versions that the server knows."""

    def close(self) -> None:
        """Let go of connections."""


def parse(address: str, *, name: Optional[str], version: Optional[int], label: Optional[str]) -> Target:
    """Return the target that an address and a caller's choice name.

    Raises:
        UsageError: another form of address, or both a version and a label.
    """
    parts, port = _split(address)
    path = parts.path.strip("/")
    if parts.scheme not in SCHEMES or not parts.hostname or port is None or "/" in path or parts.query:
        raise UsageError(f"an address is grpc://host:port, http://host:port or either with /model, not {address!r}")
    for text in (address, name or "", label or ""):
        if not text.isprintable():
            raise UsageError(f"addresses, names and labels are of characters that can be printed, unlike {text!r}")
    if version is not None and label is not None:
        raise UsageError("choose a version or a version label, not both")
    if version is not None and not 0 <= version <= _LAST_VERSION:
        raise UsageError(f"a version is a number from 0 to 2^63 - 1, not {version}")
    return Target(parts.scheme, parts.netloc, name or path or MODEL, version, label)


def _split(address: str) -> tuple[urllib.parse.SplitResult, Optional[int]]:
    """Return the parts of an address and its port, without a host where it has no such form."""
    try:
        parts = urllib.parse.urlsplit(address)
        return parts, parts.port
    except ValueError:  # brackets that do not close, or a port that is no number
        return urllib.parse.SplitResult("", "", "", "", ""), None


def checked(outputs: Mapping[str, Any], count: int, target: Target) -> Outputs:
    """Return outputs as arrays of their types, or raise a ServingError where one is missing or of other size."""
    missing = [name for name in _OUTPUTS if name not in outputs]
    if missing:
        found = ", ".join(sorted(outputs)) or "none"
        raise ServingError(f"{target} has no output {missing[0]}, only: {found}; export it anew with --mode=export")
    try:
        arrays = {name: np.asarray(outputs[name], kind) for name, kind in _OUTPUTS.items()}
    except (TypeError, ValueError, OverflowError) as error:
        raise ServingError(f"{target} gave outputs of other types: {one_line(str(error))}") from error
    for name, array in arrays.items():
        if array.ndim != (2 if name in ("probabilities", "logits") else 1) or len(array) != count:
            raise ServingError(f"{target} gave {name} of shape {array.shape} for {count} images")
    arrays["class_name"] = np.array([_text(each) for each in arrays["class_name"]], object)
    return arrays


def _text(value: Any) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


def refusal(code: str, message: str, target: Target) -> ServingError:
    """Return the error for a status code of gRPC by name and the server's message."""
    line = one_line(message)
    if _MERGED in message:
        return MergedError(f"{target} merged the request with one of another shape, and refused both: {line}")
    if code == "UNAVAILABLE":
        return UnavailableError(f"{target} is not available: {line}")
    if code == "DEADLINE_EXCEEDED":
        return DeadlineError(f"{target} did not answer in time")
    if code == "NOT_FOUND" or _LABEL in message:
        return NotFoundError(f"the server has no {target}: {line}")
    if code in ("INVALID_ARGUMENT", "FAILED_PRECONDITION"):
        return InvalidRequestError(f"{target} refused the request: {line}")
    if code == "RESOURCE_EXHAUSTED":
        return ServingError(f"{target} had no room for the request, a smaller batch_size may help: {line}")
    return ServingError(f"{target} failed: {code}: {line}")


def one_line(message: str) -> str:
    """Return the beginning of a message in one line."""
    text = " ".join(message.split()) or "no reason given"
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]} ..."


_LONGEST = 300


def objects(values: Iterable[bytes]) -> np.ndarray:
    """Return files as an array of objects [n], whatever zero bytes they end in."""
    files = list(values)
    array = np.empty(len(files), object)
    array[:] = files
    return array

"""Digests that tell one model from another."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import keras


def of_file(path: Path) -> str:
    """Return the SHA-256 of a file, or of the names and contents of all files in a folder but its card.

    The card says what was measured, and so changes when the model does not.
    """
    if path.is_file():
        return _of_content(path).hexdigest()
    whole = hashlib.sha256()
    for name, file in sorted((file.relative_to(path).as_posix(), file) for file in path.rglob("*") if file.is_file()):
        if name == "card.json":
            continue
        whole.update(name.encode() + b"\0" + _of_content(file).digest())
    return whole.hexdigest()


def _of_content(file: Path) -> Any:
    whole = hashlib.sha256()
    with file.open("rb") as stream:
        for block in iter(lambda: stream.read(1 << 20), b""):
            whole.update(block)
    return whole


def of_object(model: Any) -> str:
    """Return the SHA-256 of a Keras model's configuration and weights, "" for anything else."""
    if not isinstance(model, keras.Model):
        return ""
    has_config = type(model).get_config is not keras.Model.get_config  # a subclassed model need not have one
    config = json.dumps(model.get_config(), sort_keys=True, default=str) if has_config else type(model).__qualname__
    whole = hashlib.sha256(config.encode())
    for each in model.get_weights() if model.built else ():
        whole.update(f"{each.dtype}{each.shape}".encode() + each.tobytes())
    return whole.hexdigest()

"""Writes that happen whole or not at all: a temporary name beside the target, then a rename; and a check."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tensorflow as tf

from kerasdefense.types import InputError


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a temporary path to write a file or a folder to, which takes the name `path` when the block ends well.

    The temporary path has the same suffix and lies beside `path`. If the block raises, nothing stays behind.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=".writing-", dir=path.parent))
    try:
        temporary = folder / path.name
        yield temporary
        os.replace(temporary, path)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file atomically."""
    write_text(path, json.dumps(content, indent=2, sort_keys=True, allow_nan=False) + "\n")


def check_schema(content: Any, schema: Path, name: str) -> None:
    """Raise an InputError that says where `content`, of the file called `name`, leaves a JSON schema."""
    import jsonschema  # takes a second or more to import, of every worker of a pipeline too

    try:
        jsonschema.validate(content, json.loads(schema.read_text(encoding="utf-8")))
    except jsonschema.ValidationError as error:
        raise InputError(f"{name} does not follow its schema: {error.json_path}: {error.message}") from error


def write_error(error: tf.errors.OpError, what: str) -> OSError:
    """Return what the file system said, out of TensorFlow's report that `what` could not be written."""
    code = errno.ENOSPC if isinstance(error, tf.errors.ResourceExhaustedError) else errno.EIO
    said = (error.message or "").split("; ")[-1].split(" [Op:")[0]
    return OSError(code, f"{what} could not be written: {said}")

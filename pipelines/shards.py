"""Outcomes of blocks of images as files, each written once, in a folder that may lie on another machine."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import tensorflow as tf

from kerasdefense.evaluation.journal import Arrays
from kerasdefense.files import write_error
from kerasdefense.types import InputError

SETTINGS = "settings.json"
_ADVICE = "pass another folder, or --evaluate_resume=never to begin anew"


class Shards:
    """One file for each block of images, keyed by its number; a key that is there is never written again.

    Workers on several machines may write to one folder: a file appears whole, by a rename, and what two of them write
    under one key is the same.

    Args:
        folder: a path or a URL that TensorFlow can write to.
    """

    def __init__(self, folder: str) -> None:
        self.folder = folder.rstrip("/")

    def open(self, settings: Mapping[str, Any], *, anew: bool = False) -> None:
        """Make the folder hold blocks of these settings, those that it has already or, anew, none, and no failures.

        Raises:
            InputError: it has blocks of other settings.
        """
        settings = json.loads(json.dumps(settings))
        path = f"{self.folder}/{SETTINGS}"
        if anew and tf.io.gfile.exists(self.folder):
            tf.io.gfile.rmtree(self.folder)
        if tf.io.gfile.exists(path):
            there = json.loads(tf.io.gfile.GFile(path).read())
            differing = [name for name in settings if there.get(name) != settings[name]]
            if differing:
                what = differing[0].replace("_", " ")
                raise InputError(f"{self.folder} holds an evaluation of another {what}; {_ADVICE}")
            for failure in tf.io.gfile.glob(f"{self.folder}/error-*.txt"):
                tf.io.gfile.remove(failure)
            return
        tf.io.gfile.makedirs(self.folder)
        self._put(path, json.dumps(settings, indent=2, sort_keys=True).encode())

    def has(self, number: int) -> bool:
        """Return whether a block is through."""
        return bool(tf.io.gfile.exists(self._path(number)))

    def write(self, number: int, arrays: Arrays) -> None:
        """Store a block, unless it is there already."""
        if self.has(number):
            return
        content = io.BytesIO()
        np.savez_compressed(content, **arrays)
        self._put(self._path(number), content.getvalue())

    def read(self, number: int) -> Arrays:
        """Return a block.

        Raises:
            InputError: it is not there, or damaged.
        """
        path = self._path(number)
        try:
            with tf.io.gfile.GFile(path, "rb") as file, np.load(io.BytesIO(file.read()), allow_pickle=False) as stored:
                return {name: stored[name] for name in stored.files}
        except Exception as error:  # TensorFlow, numpy and zipfile have a kind each for every way to be damaged
            raise InputError(f"{path} cannot be read ({error!r}); {_ADVICE}") from error

    def fail(self, number: int, line: str) -> None:
        """Note in one line why a block cannot be attacked, as error-NUMBER.txt."""
        self._put(f"{self.folder}/error-{number:05d}.txt", f"{line}\n".encode())

    def failures(self) -> list[tuple[int, str]]:
        """Return what was noted since the folder was opened: blocks, ascending, and why they cannot be attacked."""
        found = []
        for path in sorted(tf.io.gfile.glob(f"{self.folder}/error-*.txt")):
            with tf.io.gfile.GFile(path) as file:
                found.append((int(path.rsplit("/error-", 1)[1].removesuffix(".txt")), file.read().strip()))
        return found

    def _path(self, number: int) -> str:
        return f"{self.folder}/block-{number:05d}.npz"

    def _put(self, path: str, content: bytes) -> None:
        token = int.from_bytes(np.random.default_rng().bytes(8), "little")
        temporary = f"{path}.{token:016x}.writing"
        try:
            with tf.io.gfile.GFile(temporary, "wb") as file:
                file.write(content)
            tf.io.gfile.rename(temporary, path, overwrite=True)
        except tf.errors.OpError as error:
            with contextlib.suppress(tf.errors.OpError):
                tf.io.gfile.remove(temporary)
            raise write_error(error, path) from error

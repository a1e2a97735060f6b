"""What an evaluation has found so far, on disk: it goes on from there after it was stopped or killed."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Optional

import numpy as np

from kerasdefense.files import replacing, write_json
from kerasdefense.types import InputError

SETTINGS, CURRENT = "settings.json", "current.npz"
_ADVICE = "use another --run_dir, or --evaluate_resume=never to begin anew"

Arrays = dict[str, np.ndarray]


class Journal:
    """The blocks of images that are through, and the one at work, in a folder or in memory.

    Writes are atomic: a kill leaves the state of the last one.

    Args:
        folder: where it is kept, or None to keep it in memory (without images) and lose it with the process.
        settings: what the outcomes depend on, as plain data; a journal of other settings is refused.
        seconds: how often, at most, the block at work is written; it is done less often where writing is slow.
    """

    def __init__(self, folder: Optional[Path], settings: Mapping[str, Any], *, seconds: float = 30.0) -> None:
        self._folder = folder
        self._settings = json.loads(json.dumps(settings))
        self._pause = seconds
        self._next = time.monotonic() + seconds
        self._memory: list[Arrays] = []
        if folder is None:
            return
        if (folder / SETTINGS).is_file():
            self._check(folder)
        else:
            write_json(folder / SETTINGS, self._settings)

    def _check(self, folder: Path) -> None:
        try:
            there = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise InputError(f"{folder / SETTINGS} cannot be read ({error}); {_ADVICE}") from error
        differing = [name for name in self._settings if there.get(name) != self._settings[name]]
        if differing:
            name = differing[0]
            raise InputError(
                f"{folder} holds an evaluation of another {name.replace('_', ' ')} "
                f"({_short(there.get(name))} there, {_short(self._settings[name])} now); {_ADVICE}"
            )

    @property
    def keeps_images(self) -> bool:
        """Whether blocks are stored with their images."""
        return self._folder is not None

    def blocks(self) -> Iterator[Arrays]:
        """Yield the blocks that are through, in order, up to the first that is not."""
        number = 0
        while (block := self.block(number)) is not None:
            yield block
            number += 1

    def block(self, number: int) -> Optional[Arrays]:
        """Return a block by its number, None where it is not through."""
        if self._folder is None:
            return self._memory[number] if number < len(self._memory) else None
        path = self.path_of(number)
        return _read(path) if path.is_file() else None

    def current(self) -> Optional[Arrays]:
        """Return the block at work, if any is stored."""
        if self._folder is None or not (self._folder / CURRENT).is_file():
            return None
        return _read(self._folder / CURRENT)

    @property
    def is_due(self) -> bool:
        """Whether it is time to write the block at work."""
        return self._folder is not None and time.monotonic() >= self._next

    def write_current(self, arrays: Arrays) -> None:
        """Store the block at work."""
        if self._folder is None:
            return
        started = time.monotonic()
        _write(self._folder / CURRENT, arrays)
        now = time.monotonic()
        self._next = now + max(self._pause, 50 * (now - started))

    def finish_block(self, number: int, arrays: Arrays) -> None:
        """Store a block that is through, by its number; none is at work then. In memory they come in order."""
        if self._folder is None:
            self._memory.append({name: each for name, each in arrays.items() if not name.startswith("image")})
            return
        _write(self.path_of(number), arrays)
        (self._folder / CURRENT).unlink(missing_ok=True)

    def path_of(self, number: int) -> Path:
        """Return where a block is stored, in a journal that has a folder."""
        assert self._folder is not None
        return self._folder / f"block-{number:05d}.npz"


def _write(path: Path, arrays: Arrays) -> None:
    with replacing(path) as temporary:
        np.savez(temporary, **arrays)


def _read(path: Path) -> Arrays:
    try:
        with np.load(path, allow_pickle=False) as stored:
            return {name: stored[name] for name in stored.files}
    except Exception as error:  # numpy, zipfile and zlib have a kind each for every way to be damaged
        raise InputError(f"{path} cannot be read ({error!r}); {_ADVICE}") from error


def _short(value: Any) -> str:
    text = json.dumps(value, sort_keys=True)
    return text if len(text) <= 60 else f"{text[:57]}..."

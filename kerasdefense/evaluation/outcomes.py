"""Outcomes per example: kept in memory as bits, with the worst images streamed to disk."""

from __future__ import annotations

import shutil
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Optional

import numpy as np

from kerasdefense.files import replacing


class OutcomeWriter:
    """Collects, chunk by chunk, who survived what; on leaving its context it writes an .npz file if it was given one.

    The file holds `index` [n], `label` [n], `clean` bool [n], `survived` bool [n, attacks], `attacks` (names) and
    `image_adv` float32 [n, h, w, c], the first image that fooled the model; where none did, the last one tried; the
    image itself where it was wrong clean. The file appears under its name only when it is complete.

    Args:
        names: the attacks, in the order of the columns of `survived`.
        save: file to write, or None.
    """

    def __init__(self, names: Sequence[str], save: Optional[Path] = None) -> None:
        self._names = list(names)
        self._save = save
        self._parts: dict[str, list[np.ndarray]] = {"index": [], "label": [], "clean": [], "survived": []}
        self._images: Optional[IO[bytes]] = None
        self._shape: tuple[int, ...] = ()

    def __enter__(self) -> OutcomeWriter:
        """Open the stream of images."""
        if self._save is not None:
            self._save.parent.mkdir(parents=True, exist_ok=True)
            self._images = tempfile.TemporaryFile(dir=self._save.parent)
        return self

    def add(
        self,
        index: np.ndarray,
        label: np.ndarray,
        image_adv: np.ndarray,
        *,
        clean: np.ndarray,
        survived: np.ndarray,
    ) -> None:
        """Add a chunk: index [n], label [n], image_adv [n, h, w, c], clean bool [n], survived bool [n, attacks]."""
        for name, values in (("index", index), ("label", label), ("clean", clean), ("survived", survived)):
            self._parts[name].append(values)
        if self._images is not None:
            self._shape = image_adv.shape[1:]
            self._images.write(np.ascontiguousarray(image_adv, np.float32).tobytes())

    @property
    def examples(self) -> int:
        """How many examples were added."""
        return sum(len(part) for part in self._parts["clean"])

    @property
    def clean(self) -> np.ndarray:
        """Whether each example is right clean, bool [n]."""
        return np.concatenate(self._parts["clean"])

    @property
    def survived(self) -> np.ndarray:
        """Whether each example is right clean and after each attack, bool [n, attacks]."""
        return np.concatenate(self._parts["survived"])

    @property
    def robust(self) -> np.ndarray:
        """Whether each example survives every attack, bool [n]."""
        return self.clean & self.survived.all(axis=1)

    def __exit__(
        self,
        kind: Optional[type[BaseException]],
        error: Optional[BaseException],
        trace: Optional[TracebackType],
    ) -> None:
        """Write the file, unless something failed."""
        if self._images is None:
            return
        with self._images:
            if error is None and self.examples:
                self._write()

    def _write(self) -> None:
        assert self._save is not None and self._images is not None
        arrays = {name: np.concatenate(parts) for name, parts in self._parts.items()}
        arrays["attacks"] = np.array(self._names)
        with (
            replacing(self._save) as temporary,
            zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED) as archive,
        ):
            for name, array in arrays.items():
                with archive.open(f"{name}.npy", "w") as member:
                    np.lib.format.write_array(member, array, allow_pickle=False)
            with archive.open("image_adv.npy", "w", force_zip64=True) as member:
                header = {"descr": "<f4", "fortran_order": False, "shape": (self.examples, *self._shape)}
                np.lib.format.write_array_header_1_0(member, header)
                self._images.seek(0)
                shutil.copyfileobj(self._images, member, 1 << 20)

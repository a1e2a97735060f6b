"""Outcomes per example, as an evaluation collects them block by block and writes them to one .npz file."""

from __future__ import annotations

import dataclasses
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from kerasdefense.evaluation.journal import Arrays
from kerasdefense.files import replacing

_KEPT = ("index", "label", "clean", "survived", "rounded")


@dataclasses.dataclass(frozen=True, eq=False)
class Outcomes:
    """Who survived what.

    Attributes:
        index: int32 [n], the images' numbers in their source split.
        label: int32 [n].
        clean: bool [n], right without an attack.
        survived: bool [n, attacks], right clean and not broken by each attack (or not attacked by it).
        rounded: bool [n], right clean and after the worst image found was rounded to 256 levels.
        met: int [attacks], how many images each attack was run on.
        unconfirmed: int [attacks], images that an attack took for fooled and the exact path did not.
        seconds: float [attacks].
    """

    index: np.ndarray
    label: np.ndarray
    clean: np.ndarray
    survived: np.ndarray
    rounded: np.ndarray
    met: np.ndarray
    unconfirmed: np.ndarray
    seconds: np.ndarray

    @property
    def robust(self) -> np.ndarray:
        """Whether each example survives every attack, bool [n]."""
        return self.clean & self.survived.all(axis=1)


def collect(blocks: Iterable[Arrays]) -> Outcomes:
    """Return the outcomes of all blocks, one at least."""
    light = [{name: block[name] for name in (*_KEPT, "met", "unconfirmed", "seconds")} for block in blocks]
    joined = {name: np.concatenate([block[name] for block in light]) for name in _KEPT}
    added = {name: np.sum([block[name] for block in light], axis=0) for name in ("met", "unconfirmed", "seconds")}
    return Outcomes(**joined, **added)


def write_outcomes(path: Path, names: Sequence[str], outcomes: Outcomes, images: Iterator[np.ndarray]) -> None:
    """Write `index`, `label`, `clean`, `survived`, `attacks` and the adversarial images to an .npz file, atomically.

    `image_adv` float32 [n, h, w, c] is the first image that fooled the model, or of a model that draws at random, the
    one that did so by the highest margin; where none did, the one of highest margin; the image itself where it was
    wrong clean. `image_adv_uint8` is the same in 256 levels.

    Args:
        path: the file.
        names: the attacks, in the order of the columns of `survived`.
        outcomes: who survived what.
        images: float32 [m, h, w, c] of each block in turn.
    """
    arrays = {name: getattr(outcomes, name) for name in _KEPT} | {"attacks": np.array(names)}
    count = len(outcomes.index)
    with replacing(path) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED) as archive:
        rounded = temporary.with_name("image_adv_uint8.npy")
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w") as member:
                np.lib.format.write_array(member, array, allow_pickle=False)
        with archive.open("image_adv.npy", "w", force_zip64=True) as member, rounded.open("wb") as levels:
            for number, block in enumerate(images):
                if not number:
                    for stream, kind in ((member, "<f4"), (levels, "|u1")):
                        header = {"descr": kind, "fortran_order": False, "shape": (count, *block.shape[1:])}
                        np.lib.format.write_array_header_1_0(stream, header)
                member.write(np.ascontiguousarray(block, np.float32).tobytes())
                levels.write(to_levels(block).tobytes())
        archive.write(rounded, rounded.name)


def to_levels(image: np.ndarray) -> np.ndarray:
    """Return images in [0, 1] as uint8, in the nearest of 256 levels."""
    return np.rint(image * 255).astype(np.uint8)


def from_levels(image: np.ndarray) -> np.ndarray:
    """Return uint8 images as float32 in [0, 1]."""
    return image.astype(np.float32) / 255

"""The reject option: a fitted detector and the anomaly score above which an image is refused."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any, NamedTuple, Optional

import numpy as np

from kerasdefense.detectors.base import Detector
from kerasdefense.detectors.registry import DETECTORS
from kerasdefense.files import replacing
from kerasdefense.types import InputError, look_up

_HEADER = "header"
_STATE = "state/"


class RejectOption(NamedTuple):
    """A detector that is fitted, and the threshold that goes with it.

    Attributes:
        name: key of DETECTORS.
        detector: fitted.
        threshold: images of higher anomaly score are refused.
        retention: share of clean validation images of known classes that the threshold was set to accept.
        fit_on: what the detector was fitted on: "clean" images, "adv"ersarial ones, or "both".
        fit_attack: settings of the attack that made the latter; None for clean ones.
        images: how many training images that were, and on how many validation images the threshold was set.
    """

    name: str
    detector: Detector
    threshold: float
    retention: float
    fit_on: str
    fit_attack: Optional[dict[str, Any]]
    images: tuple[int, int]

    def described(self) -> dict[str, Any]:
        """Return what a model card says of it."""
        return {
            "detector": self.name,
            "settings": self.detector.recorded(),
            "notes": list(self.detector.notes),
            "threshold": self.threshold,
            "retention": self.retention,
            "fit_on": self.fit_on,
            "fit_attack": self.fit_attack,
            "fit_images": self.images[0],
            "validation_images": self.images[1],
        }


def write(path: Path, option: RejectOption, *, model: str) -> None:
    """Write a reject option to an .npz file, atomically.

    Args:
        path: the file.
        option: what is written.
        model: digest of the model that it belongs to.
    """
    header = {**option.described(), "config": option.detector.get_config(), "model": model}
    arrays = {_STATE + name: array for name, array in option.detector.state().items()}
    with replacing(path) as temporary:
        np.savez(temporary, **{_HEADER: np.array(json.dumps(header))}, **arrays)


def read(path: Path, *, model: str) -> RejectOption:
    """Return the reject option in a file.

    Args:
        path: the file.
        model: digest of the model that it must belong to.

    Raises:
        InputError: the file is missing, damaged, or of another model.
    """
    if not path.is_file():
        raise InputError(f"there is no {path}; evaluate with --detector_name={path.stem} first")
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
            header = json.loads(str(stored[_HEADER]))
            state = {name[len(_STATE) :]: stored[name] for name in stored.files if name.startswith(_STATE)}
        detector = look_up(DETECTORS, header["detector"], "detector")(**header["config"])
        detector.restore(state, notes=tuple(header["notes"]))
        if not detector.is_fitted:
            raise ValueError("what the detector was fitted to is missing")
        images = (int(header["fit_images"]), int(header["validation_images"]))
        numbers = float(header["threshold"]), float(header["retention"])
        fit_on, fit_attack, fitted_to = header["fit_on"], header["fit_attack"], header["model"]
    except (KeyError, TypeError, ValueError, zipfile.BadZipFile, EOFError) as error:
        raise InputError(
            f"{path} holds no complete detector ({error!r}); evaluate with --detector_name again"
        ) from error
    if fitted_to != model:
        raise InputError(f"{path} was fitted on another model; evaluate this one with --detector_name={path.stem}")
    return RejectOption(header["detector"], detector, *numbers, fit_on, fit_attack, images)

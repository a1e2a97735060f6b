"""A published model exported anew, from what its folder holds alone."""

from __future__ import annotations

import inspect
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Optional

import numpy as np
import tensorflow as tf

from kerasdefense import integrity
from kerasdefense.defenses import Defense
from kerasdefense.detectors import DETECTORS
from kerasdefense.detectors.rejection import RejectOption
from kerasdefense.export.bundle import write_bundle
from kerasdefense.export.keras_file import classifier_file, load_model
from kerasdefense.export.saved_model import TOLERANCE, save, versions_of
from kerasdefense.export.signatures import DIAGNOSE
from kerasdefense.files import replacing
from kerasdefense.integrity import CARD, MODEL, OUTCOMES
from kerasdefense.types import InputError, look_up


def republish(folder: Path, into: Path, *, version: int = 0) -> Path:
    """Export a published model as this version of the package exports, from its model.keras and its card.

    Figures, labels, configuration and threat model are the card's; a detector is taken out of the newest SavedModel.
    What is there already stays as it is.

    Args:
        folder: the published folder.
        into: the model's folder to write to, which may be the same.
        version: number of the version; 0 = one above the highest there.

    Returns:
        The new version's folder.

    Raises:
        InputError: the folder holds no published defense, its files are not those of its card, or its detector
            cannot be taken out of the SavedModel.
    """
    card, numbers = integrity.read_card(folder / CARD), versions_of(folder)
    if card is None or not numbers:
        raise InputError(f"{folder} is no published folder: it needs {CARD}, {MODEL} and a version")
    defense, newest = load_model(folder), folder / str(numbers[-1])
    if not isinstance(defense, Defense):
        raise InputError(f"{folder / MODEL} holds a {type(defense).__name__}, which is no defense")
    integrity.check(newest)
    before = tf.saved_model.load(str(newest))
    reject = _reject_option(card, before)
    if reject is not None:
        _check_scores(before, defense, reject)
    kept = {key: value for key, value in card.items() if key not in ("files", "beside")}
    with classifier_file(defense, into) as keras_import:
        path = save(
            defense,
            into,
            labels=card["data"]["labels"],
            version=version,
            card={**kept, "keras_import": keras_import},
            reject=reject,
            diagnostics=DIAGNOSE in before.signatures or bool(card["config"].get("export", {}).get("diagnostics")),
        )
    for name in (MODEL, OUTCOMES):
        if (folder / name).is_file() and folder.resolve() != into.resolve():
            with replacing(into / name) as temporary:
                shutil.copyfile(folder / name, temporary)
    write_bundle(into)
    return path


def _reject_option(card: Mapping[str, Any], saved: Any) -> Optional[RejectOption]:
    """Return the detector and threshold that a card describes, fitted by the arrays in its SavedModel."""
    described = card.get("rejection")
    if described is None:
        return None
    kind = look_up(DETECTORS, described["detector"], "detector")
    known = inspect.signature(kind).parameters
    detector = kind(**{name: value for name, value in described["settings"].items() if name in known})
    arrays = {each.name.split(":")[0]: each.numpy() for each in saved.weights}
    missing = [name for name in kind.fitted if name not in arrays]
    if missing:
        raise InputError(f"the SavedModel holds no {', '.join(missing)} of its detector {described['detector']}")
    detector.restore({name: arrays[name] for name in kind.fitted}, notes=tuple(described["notes"]))
    return RejectOption(
        described["detector"],
        detector,
        described["threshold"],
        described["retention"],
        described["fit_on"],
        described["fit_attack"],
        (described["fit_images"], described["validation_images"]),
    )


def _check_scores(before: Any, defense: Defense, reject: RejectOption) -> None:
    """Raise an InputError unless a detector scores random images as the SavedModel does that it was taken out of."""
    image = tf.constant(np.random.default_rng(0).random((16, *defense.backbone.input_shape[1:]), np.float32))
    expected = before.signatures["serving_default"](image=image)["anomaly_score"].numpy()
    found = reject.detector.score_image(defense.activations, image).numpy()
    difference = float(np.max(np.abs(found - expected)) / max(1.0, np.max(np.abs(expected))))
    if not difference <= TOLERANCE:
        raise InputError(f"the detector {reject.name} differs by {difference:.1e} from that of the SavedModel")

"""A trained model as others take it: `<name>/` with model.keras, card.json, outcomes.npz and `<version>/` to serve."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np

from kerasdefense.defenses import Defense, as_kept
from kerasdefense.export.saved_model import CARD
from kerasdefense.files import replacing

MODEL, OUTCOMES = "model.keras", "outcomes.npz"


def publish(defense: Defense, version: Path, adversarial: Path) -> None:
    """Put beside an exported version its Keras model without optimizer slots, its card, and every image's outcomes.

    Args:
        defense: what was exported.
        version: the version's folder, `<name>/<version>`.
        adversarial: the evaluation's .npz file; its images stay where they are.
    """
    with np.load(adversarial) as found:
        outcomes = {name: found[name] for name in found.files if name != "image_adv"}
    folder = version.parent
    with replacing(folder / MODEL) as temporary:
        as_kept(defense, optimizer=False).save(temporary)
    with replacing(folder / OUTCOMES) as temporary:
        np.savez_compressed(temporary, **outcomes)
    with replacing(folder / CARD) as temporary:
        shutil.copyfile(version / CARD, temporary)

"""A trained model as others take it: `<name>/` with model.keras, card.json, outcomes.npz and `<version>/` to serve."""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from kerasdefense.defenses import Defense, as_kept
from kerasdefense.export.card import about, check_card, figures
from kerasdefense.export.saved_model import CARD
from kerasdefense.files import replacing, write_json
from kerasdefense.types import InputError

MODEL, OUTCOMES = "model.keras", "outcomes.npz"


def publish(defense: Defense, version: Path, adversarial: Path) -> None:
    """Put beside an exported version its Keras model without optimizer slots, its card, and every image's outcomes.

    Args:
        defense: what was exported.
        version: the version's folder, `<name>/<version>`.
        adversarial: the evaluation's .npz file; its images stay where they are.
    """
    folder = version.parent
    with replacing(folder / MODEL) as temporary:
        as_kept(defense, optimizer=False).save(temporary)
        _compress(temporary)
    _write_outcomes(folder, adversarial)
    card = json.loads((version / CARD).read_text(encoding="utf-8"))
    if card["figures"]:  # of the run's file, which has the same weights and the optimizer's besides
        card["figures"]["model_digest"] = hashlib.sha256((folder / MODEL).read_bytes()).hexdigest()
    for path in (version / CARD, folder / CARD):
        write_json(path, card)


def _compress(path: Path) -> None:
    """Rewrite an archive that Keras stored as it is, compressed; Keras reads it alike."""
    with zipfile.ZipFile(path) as stored:
        contents = {info: stored.read(info) for info in stored.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as compressed:
        for info, content in contents.items():
            compressed.writestr(info.filename, content)


def publish_figures(folder: Path, results: Mapping[str, Any], adversarial: Path) -> None:
    """Replace what the cards of a published folder say was measured, and every image's outcomes.

    Args:
        folder: the published folder.
        results: what the evaluation of its model wrote to results.json.
        adversarial: the evaluation's .npz file.

    Raises:
        InputError: figures that are incomplete, of another model or of another data set than the card's.
    """
    _check_match(folder, results)
    cards = [folder / CARD, *(path / CARD for path in sorted(folder.iterdir()) if path.name.isdecimal())]
    for path in cards:
        card = json.loads(path.read_text(encoding="utf-8"))
        budget = results["attack_budget"]
        card["figures"] = figures({**results, "attack_budget": 0 if budget is None else budget})
        card["about"] = about(card["defense"]["name"], card["figures"])
        check_card(card)
        write_json(path, card)
    _write_outcomes(folder, adversarial)


def _check_match(folder: Path, results: Mapping[str, Any]) -> None:
    card = json.loads((folder / CARD).read_text(encoding="utf-8"))
    if not results["complete"]:
        raise InputError("the evaluation is not complete; figures that are an upper bound do not go on a card")
    evaluated = {name: results["config"]["data"][name] for name in ("name", "open_set_split")}
    described = {name: card["data"][name] for name in evaluated}
    if evaluated != described:
        raise InputError(f"the model was evaluated on {evaluated}, but its card is of {described}")


def _write_outcomes(folder: Path, adversarial: Path) -> None:
    with np.load(adversarial) as found:
        outcomes = {name: found[name] for name in found.files if not name.startswith("image_adv")}
    with replacing(folder / OUTCOMES) as temporary:
        np.savez_compressed(temporary, **outcomes)

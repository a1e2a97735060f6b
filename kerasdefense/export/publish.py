"""A trained model as others take it: `<name>/` with model.keras, card.json, outcomes.npz and `<version>/` to serve."""

from __future__ import annotations

import contextlib
import json
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Optional

import numpy as np

from kerasdefense.defenses import Defense, as_kept
from kerasdefense.export.bundle import write_bundle
from kerasdefense.export.card import about, figures
from kerasdefense.export.saved_model import versions_of
from kerasdefense.files import replacing, write_json
from kerasdefense.integrity import CARD, MODEL, OUTCOMES, check_card, claimed_beside, sha256
from kerasdefense.types import InputError


@contextlib.contextmanager
def published(defense: Defense, folder: Path, adversarial: Optional[Path]) -> Iterator[str]:
    """Put the Keras model without optimizer slots and every image's outcomes into a folder, when the block ends well.

    In the block the version that belongs to them is written, which so is whole before they take their names.

    Args:
        defense: what is published.
        folder: the model's folder.
        adversarial: the evaluation's .npz file, whose images stay where they are; None = outcomes stay as they are.

    Yields:
        The SHA-256 of `model.keras`, for the card.
    """
    with contextlib.ExitStack() as stack:
        model = stack.enter_context(replacing(folder / MODEL))
        as_kept(defense, optimizer=False).save(model)
        _compress(model)
        if adversarial is not None:
            _store_outcomes(stack.enter_context(replacing(folder / OUTCOMES)), adversarial)
        yield sha256(model)


def _compress(path: Path) -> None:
    """Rewrite an archive that Keras stored as it is, compressed; Keras reads it alike."""
    with zipfile.ZipFile(path) as stored:
        contents = {info: stored.read(info) for info in stored.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as compressed:
        for info, content in contents.items():
            compressed.writestr(info.filename, content)


def publish_figures(folder: Path, results: Mapping[str, Any], adversarial: Path) -> None:
    """Replace what a published folder's card and that of its newest version say was measured, and all outcomes.

    The model beside the versions is the newest version's; what is said of older ones stays.

    Args:
        folder: the published folder.
        results: what the evaluation of its model wrote to results.json.
        adversarial: the evaluation's .npz file.

    Raises:
        InputError: figures that are incomplete, of another model or of another data set than the card's.
    """
    _check_match(folder, results)
    path = folder / str(versions_of(folder)[-1]) / CARD
    write_json(path, with_figures(json.loads(path.read_text(encoding="utf-8")), results))
    with replacing(folder / OUTCOMES) as temporary:
        _store_outcomes(temporary, adversarial)
    write_bundle(folder)


def with_figures(card: Mapping[str, Any], results: Mapping[str, Any]) -> dict[str, Any]:
    """Return a complete card that says what an evaluation of its model wrote to results.json."""
    budget = results["attack_budget"]
    measured = figures({**results, "attack_budget": 0 if budget is None else budget})
    complete = {**card, "figures": measured, "about": about(card["defense"]["name"], measured)}
    check_card(complete)
    return complete


def check_evaluated(folder: Path, digest: str) -> None:
    """Raise an InputError unless a model of this digest is the model.keras that a published folder's card is of."""
    if digest != claimed_beside(json.loads((folder / CARD).read_text(encoding="utf-8"))).get(MODEL):
        raise InputError(f"the evaluation is not of {folder / MODEL}, which the figures on its card are of")


def _check_match(folder: Path, results: Mapping[str, Any]) -> None:
    card = json.loads((folder / CARD).read_text(encoding="utf-8"))
    if not results["complete"]:
        raise InputError("the evaluation is not complete; figures that are an upper bound do not go on a card")
    check_evaluated(folder, results["model"]["digest"])
    evaluated = {name: results["config"]["data"][name] for name in ("name", "open_set_split")}
    described = {name: card["data"][name] for name in evaluated}
    if evaluated != described:
        raise InputError(f"the model was evaluated on {evaluated}, but its card is of {described}")


def _store_outcomes(path: Path, adversarial: Path) -> None:
    with np.load(adversarial) as found:
        outcomes = {name: found[name] for name in found.files if not name.startswith("image_adv")}
    np.savez_compressed(path, **outcomes)

"""Whether files are those that a card was written of: SHA-256 digests, and the refusal of what differs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Optional

from kerasdefense.files import check_schema
from kerasdefense.types import InputError

CARD, SAVED_MODEL = "card.json", "saved_model.pb"
MODEL, OUTCOMES = "model.keras", "outcomes.npz"
CONFIGS = ("models.config", "batching.config", "monitoring.config", "docker-compose.yml")
"""Files beside the versions of a model that a server is started by."""
BESIDE = (MODEL, "classifier.keras", OUTCOMES, *CONFIGS)
"""Files beside the versions of a model whose digests its card has."""
_SCHEMA = Path(__file__).with_name("card.schema.json")


def sha256(file: Path) -> str:
    """Return the SHA-256 of a file."""
    whole = hashlib.sha256()
    with file.open("rb") as stream:
        for block in iter(lambda: stream.read(1 << 20), b""):
            whole.update(block)
    return whole.hexdigest()


def digests(version: Path) -> dict[str, str]:
    """Return `{path relative to the version's folder: SHA-256}` of every file in it but the card."""
    files = sorted(file for file in version.rglob("*") if file.is_file() and file != version / CARD)
    return {file.relative_to(version).as_posix(): sha256(file) for file in files}


def beside(folder: Path) -> dict[str, str]:
    """Return `{name: SHA-256}` of those files of BESIDE that a model's folder holds."""
    return {name: sha256(folder / name) for name in sorted(BESIDE) if (folder / name).is_file()}


def claimed_beside(card: Mapping[str, Any]) -> dict[str, str]:
    """Return the digests that a card has of files beside the versions; older ones have that of the evaluated model."""
    if "beside" in card:
        return dict(card["beside"])
    evaluated = (card.get("figures") or {}).get("model_digest")
    return {MODEL: evaluated} if evaluated else {}


def check(path: Path) -> None:
    """Raise an InputError where a version's folder or a published file is not what the card with it was written of.

    A folder or file that no card.json lies with is not looked at.

    Args:
        path: folder of a SavedModel, or a file in one or beside versions.
    """
    if not (path / SAVED_MODEL if path.is_dir() else path).is_file():
        return
    card = read_card((path if path.is_dir() else path.parent) / CARD)
    if card is None:
        return
    if path.is_dir():
        claimed, found = card["files"], digests(path)
    else:
        is_of_version = path.name in card["files"] or (path.parent / SAVED_MODEL).is_file()
        every, found = card["files"] if is_of_version else claimed_beside(card), {path.name: sha256(path)}
        claimed = {name: every[name] for name in found if name in every}
        if not every:  # a card of before digests of files beside the versions were kept
            return
    for name in sorted({*claimed, *found}):
        if claimed.get(name) != found.get(name):
            why = "is not in the card" if name not in claimed else "is missing" if name not in found else "was changed"
            raise InputError(f"{name} {why}: {path} is not what {CARD} was written of; fetch or export it anew")


def read_card(file: Path) -> Optional[dict[str, Any]]:
    """Return the card in a file, None where there is none.

    Raises:
        InputError: what is there cannot be read as JSON, or is no card of an exported model.
    """
    if not file.is_file():
        return None
    try:
        card = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{file} holds no JSON: {error}") from error
    check_card(card, str(file))
    return card


def check_card(content: Mapping[str, Any], name: str = CARD) -> None:
    """Raise an InputError that names the file unless a complete card follows the package's JSON schema of card.json."""
    check_schema(content, _SCHEMA, name)

"""What a model's folder holds beside its versions: how TF Serving is to serve them, and the card to read."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from kerasdefense import integrity
from kerasdefense.attacks.norms import radius
from kerasdefense.export.saved_model import model_name, versions_of
from kerasdefense.files import write_json, write_text
from kerasdefense.integrity import CARD, CONFIGS, check_card
from kerasdefense.types import InputError

MODEL_CARD = "MODEL_CARD.md"
MAX_BATCH = 128
"""Images that TF Serving answers at once, of one request or of several."""
IMAGE = "2.15.1"
"""Version of the stock image tensorflow/serving."""


def write_bundle(folder: Path) -> None:
    """Write beside the versions in a model's folder what describes and serves them.

    `models.config`, `batching.config`, `monitoring.config` and `docker-compose.yml` are for TensorFlow Serving;
    `card.json` is the newest version's with the digests of files beside the versions, and `MODEL_CARD.md` is the same
    for people. Each is replaced at once. It comes after a new version: a server that reads `models.config` anew finds
    the version that the label `stable` names.

    Args:
        folder: the model's folder, with at least one version in it.

    Raises:
        InputError: there is no version.
        OSError: a write failed.
    """
    numbers = versions_of(folder)
    if not numbers:
        raise InputError(f"{folder} holds no version to serve")
    known = {"name": model_name(folder), "max_batch": MAX_BATCH, "image": IMAGE, "stable": numbers[-1]}
    for name in CONFIGS:
        write_text(folder / name, _render(name, {**known, "previous": numbers[-2] if len(numbers) > 1 else None}))
    version = folder / str(numbers[-1])
    card = json.loads((version / CARD).read_text(encoding="utf-8"))
    card = {**card, "beside": integrity.beside(folder)}
    check_card(card)
    write_text(folder / MODEL_CARD, model_card(card, version=version.name))
    write_json(folder / CARD, card)


def model_card(card: Mapping[str, Any], *, version: str) -> str:
    """Return a complete card as Markdown.

    Args:
        card: what `card.json` holds.
        version: name of the version's folder.
    """
    figures = card["figures"] and {**_NO_FIGURES, **card["figures"]}
    known = {"card": {**_NOTHING, **card, "figures": figures}, "version": version}
    return re.sub(r"\n{3,}", "\n\n", _render(MODEL_CARD, known))


_TEMPLATES = {MODEL_CARD: "model_card.md.j2"}
_NOTHING = dict.fromkeys(("about", "beside", "keras_import", "rejection"))
"""What cards need not have."""
_NO_FIGURES = dict.fromkeys(("rounded_accuracy", "cascade", "complete", "trusted", "sanity", "open_set", "randomised"))


def _render(name: str, known: Mapping[str, Any]) -> str:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(percent=_percent, interval=_interval, ball=_ball, having=_having, together=_together)
    return environment.get_template(_TEMPLATES.get(name, f"{name}.j2")).render(known)


def _percent(share: float) -> str:
    return f"{100 * share:.2f} %"


def _interval(bounds: Sequence[float]) -> str:
    return f"{100 * bounds[0]:.2f} to {100 * bounds[1]:.2f} %"


def _ball(threat: Mapping[str, Any]) -> str:
    return f"the {threat['norm']} ball of radius {radius(threat['epsilon'])}"


def _having(flags: Mapping[str, str], status: str) -> str:
    return ", ".join(sorted((name for name in flags if flags[name] == status), key=lambda name: int(name[1:])))


def _together(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {json.dumps(value)}" for name, value in settings.items() if value != "")

"""What an evaluation has recorded of a model, read back from its run directory or its published folder."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Optional

import numpy as np

from kerasdefense.evaluation.report import check_results, radius
from kerasdefense.types import InputError

_ADVICE = "evaluate it first with --mode=evaluate (and publish a published model again)"


@dataclasses.dataclass(frozen=True, eq=False)
class Outcomes:
    """What an evaluation found, image by image.

    `index` int [n] numbers the images in their source split, `label` is int [n]; `clean`, `robust` (right after every
    attack on every path), each value of `survived` (right after one attack on every path) and of `by_path` (right after
    every attack on one path that met all images, for paths with such attacks) are bool [n]. `setting` is what runs must
    share to be compared, in words: data_set, open_set_split, threat_model, suite.
    """

    folder: Path
    name: str
    index: np.ndarray
    label: np.ndarray
    clean: np.ndarray
    survived: Mapping[str, np.ndarray]
    by_path: Mapping[str, np.ndarray]
    robust: np.ndarray
    setting: Mapping[str, str]
    note: str
    attack_seed: int
    training_seed: Optional[int]
    attack_budget: Optional[int]


def read_outcomes(folder: Path) -> Outcomes:
    """Read the outcomes in a run directory (evaluation/) or in the folder of a published model (card.json).

    Raises:
        InputError: a file is missing or damaged, or the two of them are not of one evaluation.
    """
    is_card = (folder / "card.json").is_file()
    described = folder / ("card.json" if is_card else "evaluation/results.json")
    stored = folder / ("outcomes.npz" if is_card else "evaluation/adversarial.npz")
    with _reading(described):
        content = json.loads(described.read_text(encoding="utf-8"))
        results = {**content["figures"], "config": content["config"]} if is_card else content
        attacks = results["attacks"]
        threat = results["threat_model"] if is_card else attacks[0]["threat_model"]
        facts, claims = _facts(results, threat), _claims(results)
        names = [attack["name"] for attack in attacks]
        columns = [_column(attack["name"], attack["path"]) for attack in attacks]
        alone = [attack["path"] if attack.get("alone") else "" for attack in attacks]
    with _reading(stored):
        arrays = _arrays(stored)
        clean, survived = arrays["clean"], arrays["survived"]
        robust = clean & survived.all(axis=1)
        found = [len(clean), clean.mean(), robust.mean(), *survived.mean(axis=0)]
        stored_columns = [each.removesuffix(":exact") for each in arrays["attacks"].tolist()]
        if stored_columns != columns or not np.allclose(found, claims, rtol=0, atol=1e-6):
            raise ValueError(f"other images, attacks or accuracies than in {described}")
    place = folder.resolve()
    return Outcomes(
        folder=folder,
        name=place.name if is_card else f"{place.parent.name}/{place.name}",
        index=arrays["index"],
        label=arrays["label"],
        clean=clean,
        survived={name: survived[:, np.array(names) == name].all(axis=1) for name in names},
        by_path={path: survived[:, np.array(alone) == path].all(axis=1) for path in filter(None, alone)},
        robust=robust,
        **facts,
    )


def read_results(run_dir: Path) -> dict[str, Any]:
    """Return results.json of a run directory, checked.

    Raises:
        InputError: it is missing, damaged or does not follow its schema.
    """
    path = run_dir / "evaluation/results.json"
    with _reading(path):
        results = json.loads(path.read_text(encoding="utf-8"))
    check_results(results)
    return results


def _column(attack: str, path: str) -> str:
    return attack if path == "exact" else f"{attack}:{path}"


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turn whatever is wrong with a file into one line that names it."""
    if not path.is_file():
        raise InputError(f"there is no {path}; {_ADVICE}")
    try:
        yield
    except Exception as error:  # json, numpy, zipfile and zlib have a kind each for every way to be damaged
        raise InputError(f"{path} holds no complete evaluation ({error!r}); {_ADVICE}") from error


def _facts(results: Mapping[str, Any], threat: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of Outcomes that are in words or numbers."""
    data, budget = results["config"]["data"], results.get("attack_budget")
    place = f" in {data['dir']}" if data["name"] == "folder" else ""
    size = f" at {data['image_size']} pixels" if data["image_size"] else ""
    attacks = ", ".join(dict.fromkeys(attack["name"] for attack in results["attacks"]))
    setting = {
        "data_set": f"{data['name']}{place}{size}",
        "open_set_split": data["open_set_split"] or "none",
        "threat_model": f"{threat['norm']} ball of radius {radius(threat['epsilon'])}",
        "suite": f"{results['suite']} ({attacks})",
    }
    return {
        "setting": setting,
        "note": " ".join(results["note"].split()),
        "attack_seed": int(results["seed"]),
        "training_seed": results["config"].get("train", {}).get("seed"),
        "attack_budget": None if budget is None else int(budget),
    }


def _claims(results: Mapping[str, Any]) -> list[float]:
    """Return the number of images and the accuracies: clean, robust, and after each attack."""
    clean, robust = results["clean_accuracy"], results["robust_accuracy"]
    accuracies = (clean["value"], robust["value"], *(attack["accuracy"] for attack in results["attacks"]))
    return [float(claim) for claim in (clean["n"], *accuracies)]


def _arrays(path: Path) -> dict[str, np.ndarray]:
    """Return the arrays of an .npz file of outcomes, but not its images."""
    with path.open("rb") as stream, np.load(stream, allow_pickle=False) as saved:
        arrays = {name: saved[name] for name in ("index", "label", "clean", "survived", "attacks")}
    images, attacks = len(np.unique(arrays["index"])), arrays["attacks"].size
    shapes = [arrays[name].shape for name in ("index", "label", "clean", "survived")]
    if not images or shapes != [(images,)] * 3 + [(images, attacks)]:
        raise ValueError("not one outcome per image and attack")
    if not arrays["clean"].dtype == arrays["survived"].dtype == bool:
        raise ValueError("outcomes that are not true or false")
    return arrays

"""The entry of a model as RobustBench's model_info files have it, with blocks of our own behind it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Optional

from kerasdefense.evaluation.report import met_all, radius
from kerasdefense.files import check_schema

_SCHEMA = Path(__file__).with_name("robustbench.schema.json")
_AUTOATTACK = ("autoattack", "plus")
_BOARDS = {
    ("cifar10", "linf", 8 / 255): 10_000,
    ("cifar10", "l2", 0.5): 10_000,
    ("cifar100", "linf", 8 / 255): 10_000,
    ("imagenet", "linf", 4 / 255): 5_000,
}
"""The leaderboards of bounded perturbations, and the images they are measured on."""


@dataclasses.dataclass(frozen=True)
class About:
    """What an entry says of a publication; the data set is by default the one that was evaluated on.

    Attributes:
        authors: names, comma-separated.
        link: address of the publication.
        venue: where and when it appeared.
        architecture: of the network.
        dataset: as RobustBench calls it.
        additional_data: whether training saw images beyond the data set's own.
        number_forward_passes: per answer.
        external: share of images that stand against the strongest known attack from outside; None = none is known.
        footnote: what else a reader must know.
    """

    authors: str = ""
    link: str = ""
    venue: str = "N/A"
    architecture: str = ""
    dataset: str = ""
    additional_data: bool = False
    number_forward_passes: int = 1
    external: Optional[float] = None
    footnote: str = ""


def entry(
    results: Mapping[str, Any], *, name: str, claimed: Optional[Mapping[str, float]] = None, about: About = About()
) -> dict[str, Any]:
    """Return the entry of a model, which follows robustbench.schema.json.

    Args:
        results: what results.json holds.
        name: title of the publication, or name of the model.
        claimed: the publication's own figures, `clean` and `robust` as shares, each where it states one.
        about: what the entry says of the publication.

    Returns:
        RobustBench's fields, accuracies as strings in percent; `autoattack_acc` is there only for what AutoAttack found
        on one of RobustBench's threat models, and `footnote` says why it is not. Then `claimed`, `measured`, `flags`,
        `sanity`, `attacks`, `n`, `indices_sha256`, `ci95`, `versions` and `randomised`.

    Raises:
        InputError: something in it does not follow the schema, a share above 1 for instance.
    """
    threat = results["threat_model"]
    dataset = about.dataset or results["config"].get("data", {}).get("name", "")
    images = _board(dataset, threat)
    reasons = list(_no_autoattack(results, images))
    record = {
        "link": about.link,
        "name": name,
        "authors": about.authors,
        "additional_data": about.additional_data,
        "number_forward_passes": about.number_forward_passes,
        "dataset": dataset,
        "venue": about.venue,
        "architecture": about.architecture,
        "eps": radius(threat["epsilon"]) if threat["norm"] == "linf" else f"{threat['epsilon']:g}",
        "clean_acc": _percent(results["clean_accuracy"]["value"]),
        "footnote": " ".join(filter(None, [about.footnote, *_remarks(results, reasons, images)])),
        "unreliable": not results["trusted"],
    }
    if claimed and "robust" in claimed:
        record["reported"] = _percent(claimed["robust"])
    if not reasons:
        record["autoattack_acc"] = _percent(results["robust_accuracy"]["value"])
    if about.external is not None:
        record["external"] = _percent(about.external)
    record |= {"claimed": None if claimed is None else dict(claimed), **_own_blocks(results)}
    check_schema(record, _SCHEMA, "the RobustBench entry")
    return record


def _board(dataset: str, threat: Mapping[str, Any]) -> int:
    """Return how many images RobustBench's leaderboard of a threat model has, or 0 where there is none."""
    return next(
        (
            images
            for (name, norm, epsilon), images in _BOARDS.items()
            if (name, norm) == (dataset, threat["norm"]) and math.isclose(epsilon, threat["epsilon"], rel_tol=1e-6)
        ),
        0,
    )


def _no_autoattack(results: Mapping[str, Any], images: int) -> Iterator[str]:
    """Yield why the robust accuracy is not what RobustBench calls autoattack_acc."""
    if results["suite"] not in _AUTOATTACK:
        yield f"the suite was {results['suite']}"
    if not results["complete"]:
        yield "the evaluation was stopped early"
    if not images:
        yield "RobustBench has no such data set and threat model"
    if results["flags"].get("randomised"):
        yield "the model draws at random"
    replaced = [attack["replaces"] for attack in results["attacks"] if attack["replaces"]]
    if replaced:
        yield f"attacks were replaced ({'; '.join(replaced)})"


def _remarks(results: Mapping[str, Any], reasons: list[str], images: int) -> Iterator[str]:
    count = results["clean_accuracy"]["n"]
    if reasons:
        yield f"No AutoAttack accuracy: {', '.join(reasons)}."
    if count < images:
        yield f"Measured on {count} of {images} test images."
    paths = sorted({attack["path"] for attack in results["attacks"]} - {"exact"})
    if paths:
        yield f"Attacks also searched on {', '.join(paths)}."
    if not any(item["status"] != "not_run" for item in results["sanity"]):
        yield "The evaluation was not checked: its sanity battery did not run."


def _own_blocks(results: Mapping[str, Any]) -> dict[str, Any]:
    clean, robust = results["clean_accuracy"], results["robust_accuracy"]
    return {
        "measured": {
            "clean": clean["value"],
            "robust": robust["value"],
            "n": robust["n"],
            "ci95": {"clean": list(clean["ci95"]), "robust": list(robust["ci95"])},
            "suite": results["suite"],
            "complete": results["complete"],
        },
        "flags": dict(results["flags"]),
        "sanity": {item["id"]: item["status"] for item in results["sanity"]},
        "attacks": [
            {
                "name": attack["name"],
                "path": attack["path"],
                "hp": {"objective": attack["objective"], "draws": attack["draws"], **attack["settings"]},
                "ra_alone": attack["own_accuracy"]["value"] if met_all(attack, results) else None,
                "ra_cascade": attack["cascaded_accuracy"],
                "seconds": attack["seconds"],
            }
            for attack in results["attacks"]
        ],
        "n": robust["n"],
        "indices_sha256": results["indices_sha256"],
        "ci95": list(robust["ci95"]),
        "versions": dict(results["versions"]),
        "randomised": results["randomised"],
    }


def _percent(share: float) -> str:
    return f"{100 * share:.2f}"

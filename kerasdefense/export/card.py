"""The model card: what a user of an exported model must know, as data that follow a JSON schema."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Optional

from kerasdefense import config
from kerasdefense.attacks.norms import radius
from kerasdefense.defenses import DEFENSES, weight_perturbation
from kerasdefense.detectors.rejection import RejectOption
from kerasdefense.types import look_up

AUTOATTACK = ("apgd_ce", "apgd_t", "fab_t", "square")
"""Its members by the names of attacks, as the suites have them."""
NEXT_TO_NOTHING = 0.05
"""Robust accuracy that is no defense."""


def card(
    run: config.Run,
    *,
    results: Optional[Mapping[str, Any]],
    labels: Sequence[str],
    image_shape: Sequence[int],
    versions: Mapping[str, str],
    reject: Optional[RejectOption] = None,
) -> dict[str, Any]:
    """Return the card of the model of a run; `export.save` adds `files`, the SHA-256 of every file.

    Args:
        run: the configuration that the model was trained by.
        results: what its evaluation wrote to results.json, or None if it was not evaluated.
        labels: class names, in label order.
        image_shape: (height, width, channels) of the images it takes.
        versions: of Python and the packages, by name.
        reject: detector and threshold that the exported model holds; None = none.
    """
    perturbed = " with weight perturbation" if run.defense.awp_gamma else ""
    split = f", open-set split {run.data.open_set_split}" if run.data.open_set_split else ""
    measured = None if results is None else figures(results)
    return {
        "schema_version": 1,
        "about": about(run.defense.name, measured),
        "name": f"{run.defense.name}{perturbed} on {run.data.name}{split}",
        "threat_model": {"norm": run.attack.norm, "epsilon": run.attack.epsilon},
        "data": {
            "name": run.data.name,
            "image_shape": list(image_shape),
            "classes": len(labels),
            "labels": list(labels),
            "open_set_split": run.data.open_set_split,
        },
        "defense": {
            "name": run.defense.name,
            "preset": run.defense.preset,
            "deviations": _deviations(look_up(DEFENSES, run.defense.name, "defense"), run.defense.awp_gamma),
        },
        "backbone": Path(run.defense.classifier).name or Path(run.backbone.path).name or run.backbone.name,
        "figures": measured,
        "rejection": None if reject is None else reject.described(),
        "config": dataclasses.asdict(_without_places(run)),
        "versions": dict(versions),
        "seed": run.train.seed,
    }


def about(defense: str, measured: Optional[Mapping[str, Any]]) -> list[str]:
    """Return what a card says first: what stands under attack, and the method's caveat unless that refutes it.

    Args:
        defense: key of DEFENSES.
        measured: what `figures` gave, None if the model was not evaluated.
    """
    caveat = look_up(DEFENSES, defense, "defense").caveat
    said = [caveat] if caveat else []
    if measured is None:
        return ["Not evaluated: how far it holds up under attack is not known.", *said]
    robust, clean, threat = measured["robust_accuracy"], measured["clean_accuracy"], measured["threat_model"]
    low, high = (100 * bound for bound in robust["ci95"])
    ball = f"the {threat['norm']} ball of radius {radius(threat['epsilon'])}"
    bound = "" if measured["complete"] else "at most "
    line = (
        f"The suite {measured['suite']} leaves {bound}{100 * robust['value']:.1f} % of {robust['n']:,} test images "
        f"right in {ball} (95 % interval {low:.1f} to {high:.1f} %); clean accuracy {100 * clean['value']:.1f} %."
    )
    line += "" if measured["trusted"] else " Not to be trusted: the sanity battery failed."
    gap = _gap(measured)
    is_sure = measured["suite"] == "adaptive" and measured["complete"] and measured["trusted"]
    return [line, *gap] if is_sure and robust["ci95"][0] > NEXT_TO_NOTHING else [line, *gap, *said]


def _gap(measured: Mapping[str, Any]) -> list[str]:
    """Return how far PGD-20 alone flatters the model, where it met every image beside AutoAttack."""
    attacks = {each["name"]: each for each in measured["attacks"] if each["path"] == "exact"}
    clean, robust = measured["clean_accuracy"], measured["robust_accuracy"]
    met = attacks["pgd20"]["attacked"] if "pgd20" in attacks else 0
    if not (
        measured["complete"] and {"pgd20", *AUTOATTACK} <= set(attacks) and met == round(clean["value"] * clean["n"])
    ):
        return []
    alone = attacks["pgd20"]["accuracy"]
    if alone - robust["value"] < 0.5 / clean["n"]:  # not one image
        return []
    return [
        f"PGD-20 alone leaves {100 * alone:.1f} %, and so flatters the model: all attacks together, AutoAttack among "
        f"them, leave {100 * (alone - robust['value']):.1f} points less."
    ]


def _without_places(run: config.Run) -> config.Run:
    """Return the configuration without folders, which say nothing of the model and something of a machine."""
    return dataclasses.replace(
        run,
        run_dir="",
        runs="",
        data=dataclasses.replace(run.data, dir=Path(run.data.dir).name if run.data.name in config.OWN_IMAGES else ""),
        backbone=dataclasses.replace(run.backbone, path=Path(run.backbone.path).name),
        defense=dataclasses.replace(
            run.defense,
            teacher=Path(run.defense.teacher).name,
            classifier=Path(run.defense.classifier).name,
            purifier=Path(run.defense.purifier).name,
            crafted="",
        ),
        export=dataclasses.replace(run.export, dir=""),
    )


def figures(results: Mapping[str, Any]) -> dict[str, Any]:
    """Return what was measured, and all that one must know to read it."""
    taken = ("attack_budget", "clean_accuracy", "robust_accuracy", "rounded_accuracy", "suite", "note", "seed")
    judged = ("threat_model", "cascade", "complete", "trusted")
    of_attack = ("name", "path", "accuracy", "cascaded_accuracy", "ci95", "attacked", "alone")
    return {
        **{key: results[key] for key in (*taken, *judged)},
        "attacks": [{key: attack[key] for key in of_attack if key in attack} for attack in results["attacks"]],
        "sanity": {item["id"]: item["status"] for item in results["sanity"]},
        "open_set": results.get("open_set"),
        "randomised": results.get("randomised"),
        "model_digest": results["model"]["digest"],
    }


def _deviations(kind: type, awp_gamma: float) -> str:
    """Return what the docstrings of a defense, and of weight perturbation if used, say of deviations, in one line."""
    texts = [inspect.getdoc(kind)] + ([inspect.getdoc(weight_perturbation)] if awp_gamma else [])
    found = [re.search(r"Deviations: (.*?)(\n\n|$)", text or "", re.DOTALL) for text in texts]
    stated = [" ".join(each.group(1).split()).rstrip(".") if each else "not stated" for each in found]
    return "; weight perturbation: ".join(stated)

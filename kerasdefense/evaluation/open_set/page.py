"""Open-set results on the report page: tables as rows of cells, and pictures that stand in the page itself."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Optional

from kerasdefense.evaluation.examples import data_uri

_COLUMNS = {
    "auroc": "AUROC",
    "fpr_at_95_id_tpr": "FPR95 (A)",
    "fpr_at_95_ood_tpr": "FPR95 (B)",
    "oscr": "OSCR",
    "f1_binary": "F1 binary",
    "f1_macro": "F1 macro",
}
_CELLS = {
    "clean": "Clean",
    "known_attacked": "Known attacked",
    "unknown_attacked": "Unknown attacked",
    "both_attacked": "Both attacked",
}
_FIT_ON = {"clean": "clean", "adv": "attacked", "both": "clean and attacked"}
_CHANCE = 0.5


class Cell(NamedTuple):
    """A share, its 95 % interval where it has one, and whether chance does better; None = not run."""

    share: Optional[float]
    ci95: Optional[Sequence[float]] = None
    is_worse_than_chance: bool = False


class Table(NamedTuple):
    """A table with a row of cells for each detector, by its name."""

    heading: str
    words: str
    columns: Sequence[str]
    rows: Mapping[str, Sequence[Cell]]


def unknown_images(found: Optional[Mapping[str, Any]], pictures: Mapping[str, Path]) -> Optional[dict[str, Any]]:
    """Return what the page shows of the block `open_set` of results.json, None where it was not measured.

    Args:
        found: the block.
        pictures: .png files that `write_pictures` wrote, as "scores" and "roc"; read only if there is a block.
    """
    if not found:
        return None
    attack = found["attack"]
    return {
        **found,
        "fit_on": _FIT_ON[found["fit_on"]],
        "tables": [*_of_sets(found), *_of_groups(found)],
        "attacked_tables": [_who_is_attacked(found), _both_attacked(found)] if attack else [],
        "attacks": _in_words(attack["attacks"]) if attack else "",
        "joint_attacks": _in_words(attack["joint_attacks"]) if attack else "",
        "pictures": [
            {"heading": heading, "alt": alt, "source": data_uri(pictures[name].read_bytes())}
            for name, (heading, alt) in _described(attacked=bool(attack)).items()
            if name in pictures
        ],
    }


def _of_sets(found: Mapping[str, Any]) -> Iterator[Table]:
    """Yield the table of each set of unknown images."""
    for name, facts in found["sets"].items():
        rows = {}
        for detector, entry in found["detectors"].items():
            figures = entry["sets"][name]
            cells = [Cell(figures[key], figures["auroc_ci95"] if key == "auroc" else None) for key in _COLUMNS]
            rows[detector] = [*cells, _accuracy(figures["accepted"])]
        group = f" ({facts['group']})" if facts["group"] else ""
        words = f"{found['known']['n']:,} known test images, {facts['n']:,} unknown ones."
        columns = [*_COLUMNS.values(), "Accepted at threshold"]
        yield Table(f"Known against {name}{group}", words, columns, rows)


def _of_groups(found: Mapping[str, Any]) -> Iterator[Table]:
    """Yield the means over the near sets and over the far ones, where there are some."""
    for group in ("near", "far"):
        members = [name for name, facts in found["sets"].items() if facts["group"] == group]
        if members:
            means = {detector: entry["means"][group] for detector, entry in found["detectors"].items()}
            rows = {detector: [Cell(each[key]) for key in _COLUMNS] for detector, each in means.items()}
            yield Table(f"Mean over the {group} sets", f"{', '.join(members)}.", [*_COLUMNS.values()], rows)


def _who_is_attacked(found: Mapping[str, Any]) -> Table:
    rows = {}
    for detector, entry in found["detectors"].items():
        of = {cell: entry["grid"][cell] for cell in _CELLS}
        rows[detector] = [
            Cell(each["auroc"], each["auroc_ci95"], cell == "both_attacked" and each["auroc"] < _CHANCE)
            for cell, each in of.items()
        ]
    return Table("AUROC by who is attacked", "", [*_CELLS.values()], rows)


def _both_attacked(found: Mapping[str, Any]) -> Table:
    rows = {}
    for detector, entry in found["detectors"].items():
        clean, both, reject = entry["grid"]["clean"], entry["grid"]["both_attacked"], entry["reject"]
        rows[detector] = [
            Cell(clean["oscr"]),
            Cell(both["oscr"]),
            _rest(both["known_accepted"]),
            _accuracy(both["unknown_accepted"]),
            _accuracy(reject["robust_accuracy_with_reject"]) if reject else Cell(None),
        ]
    words = "Known refused and unknown accepted: at the threshold, while both are attacked."
    columns = ("OSCR, clean", "OSCR, both", "Known refused", "Unknown accepted", "Robust accuracy with reject")
    return Table("What the attacks leave", words, columns, rows)


def _accuracy(found: Mapping[str, Any]) -> Cell:
    return Cell(found["value"], found["ci95"])


def _rest(found: Mapping[str, Any]) -> Cell:
    """Return the share of the others, with its interval."""
    low, high = found["ci95"]
    return Cell(1 - found["value"], (1 - high, 1 - low))


def _in_words(attacks: Sequence[Mapping[str, Any]]) -> str:
    return " and ".join(map(_attack_in_words, attacks))


def _attack_in_words(attack: Mapping[str, Any]) -> str:
    """Return an attack's name and its effort."""
    efforts = (("steps", "step"), ("queries", "query"), ("restarts", "start"))
    plural = {"step": "steps", "query": "queries", "start": "starts"}
    said = [f"{attack[key]:,} {word if attack[key] == 1 else plural[word]}" for key, word in efforts if key in attack]
    kind = "orthogonal " if attack.get("orthogonal") else ""
    return f"{kind}{attack['name']} ({', '.join(said)})"


def _described(*, attacked: bool) -> dict[str, tuple[str, str]]:
    """Return heading and alternative text of each picture."""
    lines = ", attacked ones as lines" if attacked else ""
    curve = ", dashed while both are attacked" if attacked else ""
    return {
        "scores": (
            "How the scores spread",
            f"Histograms, one for each detector: anomaly scores of known and unknown images as areas{lines}, and the "
            "threshold",
        ),
        "roc": (
            "ROC curves",
            f"Line charts, one for each detector: share of unknown images refused over share of known ones refused, a "
            f"curve for each set{curve}; the tables above have the areas under them",
        ),
    }

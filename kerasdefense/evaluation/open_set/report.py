"""Open-set results for people: one printed table per set of unknown images, and the four cells under attack."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich import box
from rich.table import Table

from kerasdefense.evaluation.report import radius

COLUMNS = {
    "auroc": "AUROC",
    "aupr_in": "AUPR\nin",
    "aupr_out": "AUPR\nout",
    "fpr_at_95_id_tpr": "FPR95\n(A)",
    "fpr_at_95_ood_tpr": "FPR95\n(B)",
    "detection_error": "det.\nerror",
    "oscr": "OSCR",
    "f1_binary": "F1\nbin.",
    "f1_macro": "F1\nmacro",
}
_WORDS = (
    "(A) unknown images accepted where 95 % of the known ones are; (B) known images refused where 95 % of the unknown "
    "ones are. F1 at the threshold: bin. of refusing the unknown, macro over the known classes and one for all others."
)
CELLS = {
    "clean": "AUROC\nclean",
    "known_attacked": "known\natt.",
    "unknown_attacked": "unkn.\natt.",
    "both_attacked": "both\natt.",
}


def open_set_tables(results: Mapping[str, Any]) -> Iterator[Table]:
    """Yield what to print of the block `open_set` of results.json, nothing where it was not measured."""
    found = results.get("open_set")
    if not found:
        return
    for name, facts in found["sets"].items():
        yield _of_set(found, name, facts)
    for group in ("near", "far"):
        if any(group in entry["means"] for entry in found["detectors"].values()):
            yield _of_group(found, group)
    yield _threshold(found)
    if found["attack"]:
        yield _grid(found)


def _table(title: str, caption: str, headings: Sequence[str]) -> Table:
    table = Table(
        title=title,
        caption=caption,
        caption_justify="left",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        padding=0,
    )
    table.add_column("detector", no_wrap=True)
    for heading in headings:
        table.add_column(heading, justify="right", overflow="fold")
    return table


def _percent(value: float) -> str:
    return f"{100 * value:.1f}"


def _of_set(found: Mapping[str, Any], name: str, facts: Mapping[str, Any]) -> Table:
    known = found["known"]
    caption = f"in %; {known['n']:,} known images, {facts['n']:,} unknown. {_WORDS}"
    group = f" ({facts['group']})" if facts["group"] else ""
    table = _table(f"known against {name}{group}", caption, [*COLUMNS.values()])
    for detector, entry in found["detectors"].items():
        table.add_row(detector, *(_percent(entry["sets"][name][key]) for key in COLUMNS))
    return table


def _of_group(found: Mapping[str, Any], group: str) -> Table:
    table = _table(f"mean over the {group} sets", "in %", [*COLUMNS.values()])
    for detector, entry in found["detectors"].items():
        table.add_row(detector, *(_percent(entry["means"][group][key]) for key in COLUMNS))
    return table


def _threshold(found: Mapping[str, Any]) -> Table:
    caption = (
        f"in %; thresholds accept {_percent(found['retention'])} % of {found['validation_images']:,} clean validation "
        f"images of known classes; fitted on {found['fit_images']:,} training images ({found['fit_on']})."
        + ("" if found["attack"] else " Scores were not attacked.")
    )
    table = _table("accepted at the threshold", caption, ["threshold", "known", "and right", *found["sets"]])
    for detector, entry in found["detectors"].items():
        shares = [entry["accepted"], entry["accepted_and_right"]]
        shares += [entry["sets"][name]["accepted"] for name in found["sets"]]
        table.add_row(detector, f"{entry['threshold']:.4g}", *(_percent(each["value"]) for each in shares))
        for note in entry["notes"]:
            table.add_row(f"  {note}", *[""] * (3 + len(found["sets"])))
    return table


def _grid(found: Mapping[str, Any]) -> Table:
    attack = found["attack"]
    threat = attack["threat_model"]
    kinds = ", ".join(f"{each['name']} {each.get('steps') or each.get('queries')}" for each in attack["attacks"])
    images = f"{attack['known']} known and {attack['unknown']} unknown images ({attack['set']})"
    ball = f"{threat['norm']} ball of radius {radius(threat['epsilon'])}"
    caption = (
        f"in %; {images}, {ball}, {kinds} on the score, seed {attack['seed']}. AUROC of the four cells of who is "
        "attacked: under 50 is worse than chance. At the threshold, both attacked: known refused, unknown accepted. "
        "Robust with reject: right and accepted, and no point found that is wrong and accepted."
    )
    headings = [*CELLS.values(), "OSCR\nclean", "OSCR\nboth", "known\nref.", "unkn.\nacc.", "rob.\nrej."]
    table = _table("attacks on the score", caption, headings)
    for detector, entry in found["detectors"].items():
        grid = entry["grid"]
        cells = [_percent(grid[cell]["auroc"]) for cell in CELLS]
        cells += [_percent(grid[cell]["oscr"]) for cell in ("clean", "both_attacked")]
        both, reject = grid["both_attacked"], entry["reject"]
        cells += [_percent(1 - both["known_accepted"]["value"]), _percent(both["unknown_accepted"]["value"])]
        cells.append(_percent(reject["robust_accuracy_with_reject"]["value"]) if reject else "not run")
        table.add_row(detector, *cells)
    return table

"""Open-set results over several trials (splits into known and unknown classes, or seeds): means and their spread."""

from __future__ import annotations

import csv
import dataclasses
import io
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Optional

import numpy as np
from rich.markup import escape
from rich.table import Table

from kerasdefense.evaluation.open_set.report import CELLS, COLUMNS, _table
from kerasdefense.evaluation.recorded import read_results
from kerasdefense.evaluation.report import radius
from kerasdefense.types import InputError, UsageError

FIGURES = ("auroc", "oscr", "fpr_at_95_id_tpr", "f1_macro")
_ADVICE = "evaluate it with --detector_name and --evaluate_open_set or --evaluate_ood"
_FLAGS = {
    "data_set": "--data_name, --data_dir and --data_image_size",
    "known_classes": "--data_open_set_split with as many known classes",
    "defense": "--defense_name",
    "fit_on": "--detector_fit_on",
    "retention": "--detector_retention",
    "threat_model": "--evaluate_norm and --evaluate_epsilon",
    "attack": "--evaluate_score_steps, --evaluate_score_starts and --evaluate_score_queries",
    "attacked_images": "--evaluate_score_examples, --evaluate_open_set and --evaluate_ood",
}


class Trial(NamedTuple):
    """What tells a trial from others: its known classes, its seed and its model; `name` is its run directory."""

    name: str
    open_set_split: str
    training_seed: Optional[int]
    model: str


@dataclasses.dataclass(frozen=True, eq=False)
class Trials:
    """Figures of several trials, as fractions; every array is float64 [trials].

    Attributes:
        trials: in the order of the runs.
        setting: what the trials share, in words.
        accuracy: closed-set accuracy on clean known images.
        sets: `sets[unknown set][detector][figure]`, with `FIGURES` as keys.
        cells: `cells[detector][cell]`, AUROC of the four cells of who is attacked; none unless every run has them.
        attacked_set: the unknown set of `cells`, "" where there are none.
        left_out: detectors, unknown sets and cells that not all runs have, in words.
    """

    trials: tuple[Trial, ...]
    setting: Mapping[str, str]
    accuracy: np.ndarray
    sets: Mapping[str, Mapping[str, Mapping[str, np.ndarray]]]
    cells: Mapping[str, Mapping[str, np.ndarray]]
    attacked_set: str
    left_out: tuple[str, ...] = ()


def trials(run_dirs: Sequence[Path]) -> Trials:
    """Read the open-set results of several runs of one experiment.

    Args:
        run_dirs: at least two evaluated run directories that differ in their split, their training seed or their model.

    Raises:
        UsageError: fewer than two runs, or the same trial twice.
        InputError: a run without open-set results, or runs that were not made and measured alike.
    """
    if len(run_dirs) < 2:
        raise UsageError(f"trials need at least two evaluated runs, not {len(run_dirs)}; give one per split or seed")
    runs = [_read(Path(folder)) for folder in run_dirs]
    for one, other in itertools.combinations(runs, 2):
        _check_pair(one, other)
    detectors, other_detectors = _common([list(each.cells) for each in runs], "detectors")
    sets, other_sets = _common([list(each.sets) for each in runs], "unknown sets")
    is_attacked = all(each.attacked_set and each.cells[name] for each in runs for name in detectors)
    without_cells = "" if is_attacked or not any(each.attacked_set for each in runs) else "the cells under attack"
    return Trials(
        tuple(each.trials[0] for each in runs),
        {what: words for what, words in runs[0].setting.items() if all(what in each.setting for each in runs)},
        np.concatenate([each.accuracy for each in runs]),
        {of: {name: _joined([each.sets[of][name] for each in runs]) for name in detectors} for of in sets},
        {name: _joined([each.cells[name] for each in runs]) for name in detectors} if is_attacked else {},
        runs[0].attacked_set if is_attacked else "",
        tuple(filter(None, (other_detectors, other_sets, without_cells))),
    )


def _read(folder: Path) -> Trials:
    """Return what one run says, with all its detectors and sets; `cells` has all detectors, attacked or not."""
    results = read_results(folder)
    found, config = results.get("open_set"), results["config"]
    if not found:
        raise InputError(f"{folder} has no open-set results; {_ADVICE}")
    try:
        seed = config.get("train", {}).get("seed")
        trial = Trial(str(folder), config["data"].get("open_set_split", ""), seed, results["model"]["digest"])
        entries = found["detectors"].items()
        sets = {of: {name: _arrays(entry["sets"][of], FIGURES) for name, entry in entries} for of in found["sets"]}
        grids = {name: entry["grid"] or {} for name, entry in entries}
        aurocs = {name: {cell: each["auroc"] for cell, each in grid.items()} for name, grid in grids.items()}
        cells = {name: _arrays(each, CELLS if each else ()) for name, each in aurocs.items()}
        accuracy, attack = _arrays(found["known"]["accuracy"], ["value"])["value"], found["attack"] or {}
        return Trials((trial,), _setting(results), accuracy, sets, cells, attack.get("set", ""))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{folder} holds no complete open-set results ({error!r}); {_ADVICE}") from error


def _arrays(found: Mapping[str, Any], names: Iterable[str]) -> dict[str, np.ndarray]:
    return {name: np.array([found[name]], np.float64) for name in names}


def _joined(figures: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    return {name: np.concatenate([each[name] for each in figures]) for name in figures[0]}


def _common(names: Sequence[Sequence[str]], what: str) -> tuple[list[str], str]:
    """Return the names that all runs have, and the others in words; raise where there are none."""
    common = [name for name in names[0] if all(name in each for each in names)]
    if not common:
        raise InputError(f"the runs have no {what} in common; {_ADVICE}, the same for all")
    others = [name for name in dict.fromkeys(itertools.chain(*names)) if name not in common]
    return common, f"{what} {', '.join(others)}" if others else ""


def _setting(results: Mapping[str, Any]) -> dict[str, str]:
    """Return, in words, what trials must share; without the defense or the attack where there is none."""
    config, found = results["config"], results["open_set"]
    data, attack = config["data"], found["attack"]
    name = f"folder in {data['dir']}" if data["name"] == "folder" else data["name"]
    size = f" at {data['image_size']} pixels" if data.get("image_size") else ""
    setting = {"data_set": f"{name}{size}", "known_classes": str(results["flags"]["classes"])}
    setting |= {"defense": config["defense"]["name"]} if "defense" in config else {}
    setting |= {"fit_on": found["fit_on"], "retention": f"{found['retention']:g}"}
    if attack:
        # What was asked for: a set that is smaller differs from split to split, and is no other experiment.
        count = config.get("evaluate", {}).get("score_examples", max(attack["known"], attack["unknown"]))
        norm, epsilon = (attack["threat_model"][key] for key in ("norm", "epsilon"))
        setting["threat_model"] = f"{norm} ball of radius {radius(epsilon)}"
        setting["attack"] = " and ".join(map(_in_words, attack["attacks"]))
        setting["attacked_images"] = f"up to {count} known and unknown ({attack['set']})"
    return setting


def _in_words(attack: Mapping[str, Any]) -> str:
    told = [f"{key} {value}" for key, value in sorted(attack.items()) if key not in ("name", "norm", "epsilon")]
    return f"{attack['name']} ({', '.join(told)})"


def _check_pair(one: Trials, other: Trials) -> None:
    """Raise where two runs are the same trial, or were not made and measured alike."""
    (first,), (second,) = one.trials, other.trials
    both = f"{first.name} and {second.name} are"
    if first[1:] == second[1:]:
        same = f"open-set split {first.open_set_split or 'none'}, training seed {_seed(first)}, the same model"
        raise UsageError(f"{both} one trial ({same}); give each once, or train with another split or seed")
    for what, wanted in one.setting.items():
        found = other.setting.get(what, wanted)
        if found != wanted:
            differ = f"{what.replace('_', ' ')} {wanted} is not {found}; run both with the same {_FLAGS[what]}"
            raise InputError(f"{both} no trials of one experiment: {differ}")


def _seed(trial: Trial) -> str:
    return "unknown" if trial.training_seed is None else str(trial.training_seed)


def _spread(values: np.ndarray) -> str:
    return f"{100 * values.mean():.1f} ± {100 * values.std(ddof=1):.1f}"


def _sheets(found: Trials) -> Iterator[tuple[str, str, list[str], list[list[str]]]]:
    """Yield the title, caption, headings (but the first, "detector") and rows of each table, as people read them."""
    setting, notes = found.setting, _notes(found)
    words = (
        f"Closed-set accuracy {_spread(found.accuracy)}. (A) unknown images accepted where 95 % of the known ones are. "
        "F1 macro is over the known classes and one for all others, at a threshold that accepts "
        f"{100 * float(setting['retention']):g} % of the validation images."
    )
    for of, detectors in found.sets.items():
        rows = [[name, *(_spread(each[key]) for key in FIGURES)] for name, each in detectors.items()]
        yield f"known against {of}", f"{words}\n{notes}", [COLUMNS[key] for key in FIGURES], rows
    if found.cells:
        words = (
            f"AUROC of the four cells of who is attacked: {setting['threat_model']}, {setting['attack']} on the score, "
            f"images: {setting['attacked_images']}. Under 50 is worse than chance."
        )
        rows = [[name, *(_spread(each[cell]) for cell in CELLS)] for name, each in found.cells.items()]
        yield "attacks on the score", f"{words}\n{notes}", [*CELLS.values()], rows


def _notes(found: Trials) -> str:
    """Return what one must know to read the spread, and a line of what was left out."""
    count, setting = len(found.trials), found.setting
    splits = ", ".join(dict.fromkeys(each.open_set_split or "none" for each in found.trials))
    seeds = ", ".join(dict.fromkeys(_seed(each) for each in found.trials))
    few = f" The standard deviation of {count} trials says little." if count < 4 else ""
    left_out = f"\nLeft out, since not all runs have them: {'; '.join(found.left_out)}." if found.left_out else ""
    return (
        f"In %, mean ± sample standard deviation over {count} trials: their spread, not an interval.{few}\n"
        f"Open-set splits: {splits}; training seeds: {seeds}; {setting['data_set']}, {setting['known_classes']} known "
        f"classes; defense {setting.get('defense', 'unknown')}; detectors fitted on: {setting['fit_on']}.{left_out}"
    )


def trials_tables(found: Trials) -> Iterator[Table]:
    """Yield a table for the terminal per set of unknown images, and one of the four cells where all runs have them."""
    for title, caption, headings, rows in _sheets(found):
        table = _table(escape(title), escape(caption), headings)
        for row in rows:
            table.add_row(*map(escape, row))
        yield table


def trials_markdown(found: Trials) -> str:
    """Return the same as GitHub tables, each below its title in bold and above its caption."""
    blocks = []
    for title, caption, headings, rows in _sheets(found):
        lines = [["detector", *headings], ["---", *["---:"] * len(headings)], *rows]
        table = [" | ".join(cell.replace("\n", " ").replace("|", r"\|") for cell in cells) for cells in lines]
        blocks += [f"**{title}**", "\n".join(f"| {line} |" for line in table), caption]
    return "\n\n".join(blocks) + "\n"


def trials_csv(found: Trials) -> str:
    """Return CSV with a line per set, detector and trial, figures as fractions, each with its mean and deviation."""
    lines: list[dict[str, Any]] = []
    for of, name in itertools.product(found.sets, next(iter(found.sets.values()))):
        figures = {"accuracy": found.accuracy, **found.sets[of][name]}
        if of == found.attacked_set:
            figures |= {f"auroc_{cell}": values for cell, values in found.cells[name].items()}
        for number, trial in enumerate(found.trials):
            lines.append({"set": of, "detector": name, **trial._asdict(), **found.setting})
            for key, values in figures.items():
                lines[-1] |= {key: values[number], f"{key}_mean": values.mean(), f"{key}_std": values.std(ddof=1)}
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(itertools.chain(*lines))), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()

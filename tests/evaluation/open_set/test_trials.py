"""Open-set results over trials: means and deviations by hand, what is left out, and what does not belong together."""

from __future__ import annotations

import copy
import csv
import hashlib
import io
import itertools
import json
import math
import re

import numpy as np
import pytest
from rich.console import Console

from kerasdefense.evaluation.open_set.trials import FIGURES, Trial, trials, trials_csv, trials_markdown, trials_tables
from kerasdefense.evaluation.report import check_results, wilson
from kerasdefense.types import InputError, UsageError

UNKNOWN = "unknown classes"
CELLS = ("clean", "known_attacked", "unknown_attacked", "both_attacked")
APGD = {"name": "APGD", "norm": "linf", "epsilon": 8 / 255, "steps": 100, "rho": 0.75, "restarts": 1, "targets": 0}


def separation(auroc, oscr=0.5, fpr=0.25):
    others = dict.fromkeys(("aupr_in", "aupr_out", "fpr_at_95_ood_tpr", "detection_error"), 0.5)
    return {**others, "auroc": auroc, "auroc_ci95": [0.0, 1.0], "oscr": oscr, "fpr_at_95_id_tpr": fpr}


def detector(auroc, sets):
    accepted = wilson(19, 20)
    entry = {"settings": {}, "notes": [], "threshold": 1.0, "accepted": accepted, "accepted_and_right": accepted}
    figures = {**separation(auroc), "accepted": accepted, "f1_binary": 0.5, "f1_macro": auroc / 2}
    grid = {cell: separation(auroc - 0.1 * place) for place, cell in enumerate(CELLS)}
    return {**entry, "sets": dict.fromkeys(sets, figures), "means": {}, "grid": grid, "reject": None}


def open_set(aurocs, sets=(UNKNOWN,), accuracy=16):
    return {
        "retention": 0.95,
        "fit_on": "clean",
        "fit_images": 600,
        "validation_images": 60,
        "known": {"n": 20, "accuracy": wilson(accuracy, 20)},
        "sets": {name: {"group": "", "n": 20} for name in sets},
        "scoring_seconds": {},
        "attack": {
            "threat_model": {"norm": "linf", "epsilon": 8 / 255},
            "known": 10,
            "unknown": 10,
            "set": sets[0] if sets else "",
            "seed": 0,
            "attacks": [APGD],
            "joint_attacks": [],
            "candidates": 0,
        },
        "detectors": {name: detector(auroc, sets) for name, auroc in aurocs.items()},
    }


@pytest.fixture
def write(results, tmp_path):
    """Return a function that writes a run of a split, with what else is to be set by its path in results.json."""

    def write(name, split, aurocs, *, seed=0, digest="", changes=(), **options):
        content = copy.deepcopy({**results, "open_set": open_set(aurocs, **options)})
        content["config"]["data"]["open_set_split"] = split
        content["config"] |= {"train": {"seed": seed}, "defense": {"name": "pgd_at"}}
        content["model"]["digest"] = digest or hashlib.sha256(f"{split} {seed}".encode()).hexdigest()
        for path, value in dict(changes).items():
            *parents, last = path.split("/")
            place = content
            for each in parents:
                place = place[int(each) if isinstance(place, list) else each]
            place[last] = value
        check_results(content)
        path = tmp_path / name / "evaluation/results.json"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(content))
        return tmp_path / name

    return write


@pytest.fixture
def three(write):
    """Return three splits: AUROC of msp 0.7, 0.8, 0.9, of openmax_shifted always 0.9, and 14, 16, 18 of 20 right."""
    values = zip("012", (0.7, 0.8, 0.9), (14, 16, 18))
    sets = {"sets": (UNKNOWN, "textures")}
    return [
        write(split, split, {"msp": auroc, "openmax_shifted": 0.9}, accuracy=right, **sets)
        for split, auroc, right in values
    ]


def shown(found, width=80):
    console = Console(width=width, record=True, file=io.StringIO())
    for table in trials_tables(found):
        console.print(table)
    return console.export_text()


def flat(text):
    return " ".join(text.split())


def test_figures_are_those_of_the_runs_in_their_order(three):
    found = trials(three)
    assert [(each.name, each.open_set_split, each.training_seed) for each in found.trials] == [
        (str(folder), split, 0) for folder, split in zip(three, "012")
    ]
    assert len({each.model for each in found.trials}) == 3 and isinstance(found.trials[0], Trial)
    assert list(found.sets) == [UNKNOWN, "textures"] and tuple(found.sets[UNKNOWN]["msp"]) == FIGURES
    np.testing.assert_allclose(found.accuracy, [0.7, 0.8, 0.9])
    for figures in (each["msp"] for each in found.sets.values()):
        np.testing.assert_allclose(figures["auroc"], [0.7, 0.8, 0.9])
        np.testing.assert_allclose(figures["f1_macro"], [0.35, 0.4, 0.45])
        np.testing.assert_allclose(figures["oscr"], [0.5] * 3)
        np.testing.assert_allclose(figures["fpr_at_95_id_tpr"], [0.25] * 3)
    np.testing.assert_allclose(found.cells["msp"]["both_attacked"], [0.4, 0.5, 0.6])
    assert found.attacked_set == UNKNOWN and found.left_out == ()
    assert found.setting == {
        "data_set": "cifar10",
        "known_classes": "10",
        "defense": "pgd_at",
        "fit_on": "clean",
        "retention": "0.95",
        "threat_model": "linf ball of radius 8/255",
        "attack": "APGD (restarts 1, rho 0.75, steps 100, targets 0)",
        "attacked_images": "up to 10 known and unknown (unknown classes)",
    }


def test_tables_show_means_and_sample_deviations_worked_by_hand(three):
    text = shown(trials(three))
    assert "…" not in text and max(map(len, text.splitlines())) <= 80
    rows = [flat(line) for line in text.splitlines() if re.match(" *(msp|openmax_shifted) ", line)]
    # 0.7, 0.8, 0.9: mean 0.8, deviation sqrt((0.01 + 0 + 0.01) / 2) = 0.1; half of it for F1
    of_set = ["msp 80.0 ± 10.0 50.0 ± 0.0 25.0 ± 0.0 40.0 ± 5.0"]
    of_set.append("openmax_shifted 90.0 ± 0.0 50.0 ± 0.0 25.0 ± 0.0 45.0 ± 0.0")
    cells = ["msp 80.0 ± 10.0 70.0 ± 10.0 60.0 ± 10.0 50.0 ± 10.0"]
    cells.append("openmax_shifted 90.0 ± 0.0 80.0 ± 0.0 70.0 ± 0.0 60.0 ± 0.0")
    assert rows == [*of_set, *of_set, *cells]
    for words in (
        "known against unknown classes",
        "known against textures",
        "attacks on the score",
        "Closed-set accuracy 80.0 ± 10.0.",
        "accepts 95 % of the validation images",
        "linf ball of radius 8/255, APGD (restarts 1, rho 0.75, steps 100, targets 0) on the score, "
        "images: up to 10 known and unknown (unknown classes)",
        "mean ± sample standard deviation over 3 trials: their spread, not an interval. "
        "The standard deviation of 3 trials says little.",
        "Open-set splits: 0, 1, 2; training seeds: 0; cifar10, 10 known classes; defense pgd_at; detectors fitted on: "
        "clean.",
    ):
        assert words in flat(text)
    assert "Left out" not in text


def test_the_deviation_of_two_trials_is_that_of_a_sample(write):
    folders = [write(name, "6:0", {"msp": auroc}, seed=seed) for name, auroc, seed in (("a", 0.6, 3), ("b", 0.8, 4))]
    text = flat(shown(trials(folders)))
    assert f"msp 70.0 ± {100 * math.sqrt(0.02):.1f} " in text and "± 14.1" in text
    assert "over 2 trials" in text and "The standard deviation of 2 trials says little." in text
    assert "Open-set splits: 6:0; training seeds: 3, 4;" in text


def test_four_trials_have_no_warning_of_so_few(write):
    folders = [write(split, split, {"msp": 0.8}) for split in "0123"]
    text = shown(trials(folders))
    assert "over 4 trials" in flat(text) and "says little" not in text


def test_models_of_unknown_training_are_told_apart_by_their_digests(write):
    changes = {"config/train": {}, "config/data/open_set_split": ""}
    folders = [write(name, "", {"msp": 0.8}, digest=name * 64, changes=changes) for name in "ab"]
    assert "Open-set splits: none; training seeds: unknown;" in flat(shown(trials(folders)))


def test_markdown_has_a_table_per_set_and_one_of_the_cells(three):
    text = trials_markdown(trials(three))
    blocks = text.rstrip("\n").split("\n\n")
    assert [each for each in blocks if each.startswith("**")] == [
        "**known against unknown classes**",
        "**known against textures**",
        "**attacks on the score**",
    ]
    assert blocks[1].split("\n") == [
        "| detector | AUROC | OSCR | FPR95 (A) | F1 macro |",
        "| --- | ---: | ---: | ---: | ---: |",
        "| msp | 80.0 ± 10.0 | 50.0 ± 0.0 | 25.0 ± 0.0 | 40.0 ± 5.0 |",
        "| openmax_shifted | 90.0 ± 0.0 | 50.0 ± 0.0 | 25.0 ± 0.0 | 45.0 ± 0.0 |",
    ]
    assert blocks[7].startswith("| detector | AUROC clean | known att. | unkn. att. | both att. |")
    assert all("over 3 trials: their spread, not an interval" in blocks[place] for place in (2, 5, 8))


def test_csv_gives_every_figure_back(three):
    found = trials(three)
    rows = list(csv.DictReader(io.StringIO(trials_csv(found))))
    assert len(rows) == 2 * 2 * 3
    for row, (place, name, trial) in zip(rows, itertools.product(found.sets, found.cells, range(3))):
        assert (row["set"], row["detector"], row["name"]) == (place, name, str(three[trial]))
        assert (row["open_set_split"], row["training_seed"]) == (str(trial), "0")
        assert row["model"] == found.trials[trial].model and row["defense"] == "pgd_at"
        arrays = {"accuracy": found.accuracy, **found.sets[place][name]}
        cells = {f"auroc_{cell}": values for cell, values in found.cells[name].items()}
        for key, values in {**arrays, **(cells if place == UNKNOWN else {})}.items():
            assert float(row[key]) == values[trial]
            assert float(row[f"{key}_mean"]) == values.mean() and float(row[f"{key}_std"]) == values.std(ddof=1)
        assert (row["auroc_both_attacked"] == "") == (place != UNKNOWN)


def test_what_not_all_runs_have_is_left_out_and_named(write):
    first = write("a", "0", {"msp": 0.7, "odin": 0.7, "vim": 0.7}, sets=(UNKNOWN, "textures"))
    second = write("b", "1", {"knn": 0.9, "vim": 0.9, "msp": 0.9}, sets=(UNKNOWN, "[bold]svhn"))
    found = trials([first, second])
    assert list(found.sets) == [UNKNOWN] and list(found.sets[UNKNOWN]) == list(found.cells) == ["msp", "vim"]
    words = "Left out, since not all runs have them: detectors odin, knn; unknown sets textures, [bold]svhn."
    assert words in flat(shown(found)) and words in trials_markdown(found)


def test_cells_are_left_out_where_a_run_was_not_attacked(write):
    first = write("a", "0", {"msp": 0.7})
    changes = {"open_set/attack": None, "open_set/detectors/msp/grid": None}
    second, third = (write(name, split, {"msp": 0.9}, changes=changes) for name, split in ("b1", "c2"))
    found = trials([first, second])
    assert found.cells == {} and found.attacked_set == "" and "attack" not in found.setting
    assert "Left out, since not all runs have them: the cells under attack." in flat(shown(found))
    neither = trials([second, third])
    assert "att" not in shown(neither) and "Left out" not in shown(neither)
    assert "auroc_clean" in trials_csv(trials([first, write("d", "3", {"msp": 0.7})]))
    assert "auroc_clean" not in trials_csv(neither) and "auroc_clean" not in trials_csv(found)


@pytest.mark.parametrize("count", [0, 1])
def test_fewer_than_two_runs_are_refused(count, three):
    with pytest.raises(UsageError, match=f"at least two evaluated runs, not {count}; give one per split or seed"):
        trials(three[:count])


@pytest.mark.parametrize("missing", [None, ...])
def test_a_run_without_open_set_results_is_refused(missing, three, results, tmp_path):
    path = tmp_path / "plain/evaluation/results.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(results if missing is ... else {**results, "open_set": None}))
    with pytest.raises(InputError, match="plain has no open-set results; evaluate it with --detector_name") as error:
        trials([*three, tmp_path / "plain"])
    assert "\n" not in str(error.value)
    with pytest.raises(InputError, match=r"there is no .*nowhere"):
        trials([*three, tmp_path / "nowhere"])


def test_incomplete_open_set_results_are_refused(three, write):
    changes = {f"open_set/detectors/msp/sets/{UNKNOWN}": separation(0.5)}  # follows the schema, but has no F1
    broken = write("broken", "3", {"msp": 0.5}, changes=changes)
    with pytest.raises(InputError, match=r"broken holds no complete open-set results \(KeyError\('f1_macro'\)\)"):
        trials([*three, broken])


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"config/data/name": "svhn_cropped"}, "data set cifar10 is not svhn_cropped; .*--data_name"),
        ({"config/data/image_size": 16}, "data set cifar10 is not cifar10 at 16 pixels"),
        ({"config/data": {"name": "folder", "dir": "mine"}}, "data set cifar10 is not folder in mine"),
        ({"flags/classes": 6}, "known classes 10 is not 6; .*--data_open_set_split"),
        ({"config/defense/name": "trades"}, "defense pgd_at is not trades; .*--defense_name"),
        ({"open_set/fit_on": "adv"}, "fit on clean is not adv; .*--detector_fit_on"),
        ({"open_set/retention": 0.9}, "retention 0.95 is not 0.9; .*--detector_retention"),
        ({"open_set/attack/threat_model/norm": "l2"}, "threat model linf ball of radius 8/255 is not l2 ball"),
        ({"open_set/attack/threat_model/epsilon": 4 / 255}, "is not linf ball of radius 4/255; .*--evaluate_epsilon"),
        ({"open_set/attack/attacks/0/steps": 50}, "attack .*steps 100.* is not .*steps 50.*--evaluate_score_steps"),
        ({"open_set/attack/attacks/0/restarts": 5}, r"attack APGD \(restarts 1.* is not APGD \(restarts 5"),
        ({"open_set/attack/attacks": [APGD, APGD]}, r"attack APGD \(.*\) is not APGD \(.*\) and APGD"),
        ({"open_set/attack/unknown": 30}, "attacked images up to 10 .* is not up to 30 .*--evaluate_score_examples"),
        ({"open_set/attack/set": "textures"}, r"known and unknown \(unknown classes\) is not .*\(textures\)"),
    ],
)
def test_runs_that_were_not_made_and_measured_alike_are_refused(changes, words, three, write):
    other = write("other", "3", {"msp": 0.5}, changes=changes)
    with pytest.raises(InputError, match=f"are no trials of one experiment: .*{words}") as error:
        trials([*three, other])
    told = str(error.value)
    assert str(three[0]) in told and str(other) in told and "\n" not in told


def test_a_run_is_compared_with_all_others_and_not_only_with_the_first(write):
    foreign = write("a", "0", {"msp": 0.5})
    path = foreign / "evaluation/results.json"
    content = json.loads(path.read_text())
    del content["config"]["defense"], content["config"]["train"]  # a model from elsewhere
    path.write_text(json.dumps(content))
    one, other = write("b", "1", {"msp": 0.5}), write("c", "2", {"msp": 0.5}, changes={"config/defense/name": "mart"})
    assert "defense" not in trials([foreign, one]).setting
    with pytest.raises(InputError, match=r"/b and .*/c are no trials of one experiment: defense pgd_at is not mart"):
        trials([foreign, one, other])


def test_sets_smaller_than_what_was_asked_for_may_differ_in_size(write):
    folders = [
        write(
            name, name, {"msp": 0.5}, changes={"config/evaluate/score_examples": 300, "open_set/attack/unknown": count}
        )
        for name, count in (("0", 143), ("1", 145))
    ]
    assert trials(folders).setting["attacked_images"] == "up to 300 known and unknown (unknown classes)"


def test_the_same_trial_twice_is_refused(three, write):
    again = three[0] / ".." / "1"
    with pytest.raises(UsageError, match=r"are one trial \(open-set split 1, training seed 0, the same model\); give"):
        trials([*three, again])
    twin = [write(name, "3", {"msp": 0.5}, seed=2, digest="c" * 64) for name in ("p", "q")]
    with pytest.raises(UsageError, match=r"/p and .*/q are one trial .*training seed 2"):
        trials(twin)


def test_runs_without_a_common_detector_or_set_are_refused(write):
    first = write("a", "0", {"msp": 0.5}, sets=("textures",))
    with pytest.raises(InputError, match="no detectors in common; evaluate it with --detector_name"):
        trials([first, write("b", "1", {"vim": 0.5}, sets=("textures",))])
    changes = {"open_set/attack": None, "open_set/detectors/msp/grid": None}
    with pytest.raises(InputError, match="no unknown sets in common"):
        trials([first, write("c", "2", {"msp": 0.5}, sets=(), changes=changes)])

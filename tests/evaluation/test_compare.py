from __future__ import annotations

import csv
import io
import json
import re
import shutil

import numpy as np
import pytest
from rich.console import Console

from kerasdefense.evaluation import compare, comparison_table, read_outcomes, to_csv, to_markdown
from kerasdefense.evaluation.compare import paired_difference
from kerasdefense.types import InputError, UsageError

ATTACKS = (("fgsm", "exact"), ("pgd20", "exact"), ("pgd20", "smoothed"))


def bits(text):
    return np.array([each == "1" for each in text])


def write(folder, clean, *survived, index=None, label=None, published=False, attacks=ATTACKS, **changes):
    """Write an evaluation of strings of bits, one per attack, as run.py or (published) an export leaves it."""
    clean = bits(clean)
    survived = clean[:, None] & np.stack([bits(each) for each in survived], axis=1)
    changed = {"name": "digits", "split": "", "size": 0, "dir": "", "norm": "linf", "epsilon": 8 / 255, "seed": 0}
    changed |= {"budget": {"attack_budget": 10}, "suite": "quick", "note": "Not an AutoAttack result."} | changes
    threat = {"norm": changed["norm"], "epsilon": changed["epsilon"]}
    data = {"name": changed["name"], "dir": changed["dir"]}
    data |= {"open_set_split": changed["split"], "image_size": changed["size"]}
    config = {"data": data, "train": {"seed": changed["seed"]}}
    whole = {"clean_accuracy": clean, "robust_accuracy": survived.all(axis=1)}
    figures = {
        **{name: {"value": right.mean(), "n": len(right), "ci95": [0.0, 1.0]} for name, right in whole.items()},
        "attacks": [
            {"name": name, "path": path, "accuracy": right.mean(), "ci95": [0.0, 1.0], "threat_model": threat}
            for (name, path), right in zip(attacks, survived.T)
        ],
        **{name: changed[name] for name in ("suite", "note")},
        **changed["budget"],
        "seed": 3,
    }
    content = {**figures, "config": config}
    if published:
        content = {"figures": {**figures, "threat_model": threat}, "config": config, "seed": changed["seed"]}
    described = folder / ("card.json" if published else "evaluation/results.json")
    described.parent.mkdir(parents=True, exist_ok=True)
    described.write_text(json.dumps(content))
    index = np.arange(len(clean), dtype=np.int32) if index is None else np.array(index, np.int32)
    np.savez(
        folder / ("outcomes.npz" if published else "evaluation/adversarial.npz"),
        index=index,
        label=index % 3 if label is None else np.array(label, np.int32),
        clean=clean,
        survived=survived,
        attacks=np.array([f"{name}:{path}" for name, path in attacks]),
    )
    return folder


@pytest.fixture
def reference(tmp_path):
    return write(tmp_path / "digits" / "plain", "11111110", "11000000", "11000000", "10000000", budget={})


def figures(*folders):
    return [row.figures for row in compare([read_outcomes(folder) for folder in folders]).rows]


def test_compare_gives_the_accuracies_and_differences_worked_by_hand(reference, tmp_path):
    other = write(tmp_path / "digits" / "hard", "01111100", "01111000", "01111100", "01111100")
    first, second = figures(reference, other)
    values = {name: (figure["value"], figure["n"]) for name, figure in second.items()}
    assert values == {
        "clean_accuracy": (5 / 8, 8),
        "fgsm_accuracy": (4 / 8, 8),
        "pgd20_accuracy": (5 / 8, 8),
        "robust_accuracy": (4 / 8, 8),
        "clean_difference": (-2 / 8, 8),
        "robust_difference": (3 / 8, 8),  # image 0 is lost, images 1 to 4 are won
    }
    assert {name: figure["value"] for name, figure in first.items()} == {
        "clean_accuracy": 7 / 8,
        "fgsm_accuracy": 2 / 8,
        "pgd20_accuracy": 1 / 8,  # on the worse of its two paths
        "robust_accuracy": 1 / 8,
    }
    low, high = first["clean_accuracy"]["ci95"]
    assert 0.5 < low < 7 / 8 < high < 1


def test_paired_difference_has_the_interval_of_an_independent_bootstrap():
    random = np.random.default_rng(0)
    draw = random.choice(3, size=300, p=[0.15, 0.6, 0.25])
    right, reference = draw == 2, draw == 0
    found = paired_difference(right, reference)
    shares = np.bincount(draw) / 300
    resampled = np.random.default_rng(1).multinomial(300, shares, size=20_000) @ [-1, 0, 1] / 300
    np.testing.assert_allclose(found["ci95"], np.quantile(resampled, [0.025, 0.975]), atol=0.005)
    assert found["ci95"][0] < 0.1 < found["ci95"][1] and found["value"] == pytest.approx(shares[2] - shares[0])
    assert found["n"] == 300 and found == paired_difference(right, reference, seed=0)


@pytest.mark.parametrize("right, reference, value", [("0110", "0110", 0.0), ("111", "000", 1.0), ("0", "1", -1.0)])
def test_paired_difference_of_equal_differences_is_one_point(right, reference, value):
    found = paired_difference(bits(right), bits(reference))
    assert found == {"value": value, "n": len(right), "ci95": [value, value], "significant": value != 0}


@pytest.mark.parametrize("won, lost, significant", [(20, 5, True), (5, 20, True), (12, 10, False), (10, 12, False)])
def test_paired_difference_is_significant_where_its_interval_excludes_zero(won, lost, significant):
    rest = 40 - won - lost
    found = paired_difference(bits("1" * won + "0" * lost + "1" * rest), bits("0" * won + "1" * lost + "1" * rest))
    assert found["significant"] is significant
    assert (found["ci95"][0] > 0 or found["ci95"][1] < 0) is significant


def test_compare_matches_images_by_index_whatever_their_order(reference, tmp_path):
    turned = write(tmp_path / "turned", "01111111", "00000011", "00000011", "00000001", index=range(7, -1, -1))
    for name in ("clean_difference", "robust_difference"):
        assert figures(reference, turned)[1][name]["ci95"] == [0.0, 0.0]


def test_compare_pairs_only_the_common_images(reference, tmp_path):
    other = write(tmp_path / "other", "0111", "0111", "0111", "0111", index=[6, 7, 8, 9])
    second = figures(reference, other)[1]
    assert (second["clean_accuracy"]["value"], second["clean_accuracy"]["n"]) == (3 / 4, 4)
    assert (second["clean_difference"]["value"], second["clean_difference"]["n"]) == (0.0, 2)
    assert (second["robust_difference"]["value"], second["robust_difference"]["n"]) == (0.5, 2)


def test_compare_gives_a_run_the_same_interval_whatever_the_other_runs_are(reference, tmp_path):
    one, two = (write(tmp_path / name, "01111100", *["01111000"] * 3) for name in ("one", "two"))
    _, first, second = figures(reference, one, two)
    assert first == second == figures(reference, two)[1]


def test_read_outcomes_finds_the_same_in_a_published_model(reference, tmp_path):
    folder = write(tmp_path / "saved", "11111110", "11000000", "11000000", "10000000", budget={}, published=True)
    run, model = read_outcomes(reference), read_outcomes(folder)
    assert (run.name, model.name) == ("digits/plain", "saved")
    assert run.setting == model.setting and run.setting["suite"] == "quick (fgsm, pgd20)"
    assert [run.attack_seed, run.training_seed, run.attack_budget] == [3, 0, None]
    assert [model.attack_seed, model.training_seed, model.attack_budget] == [3, 0, None]
    for name in ("index", "label", "clean", "robust"):
        np.testing.assert_array_equal(getattr(run, name), getattr(model, name))
    assert figures(reference, folder)[1]["robust_difference"]["ci95"] == [0.0, 0.0]


def test_compare_calls_runs_of_one_name_by_their_folders(reference, tmp_path):
    twin = tmp_path / "elsewhere" / "digits" / "plain"
    shutil.copytree(reference, twin)
    third = write(tmp_path / "digits" / "third", "11111110", *["11000000"] * 3)
    rows = compare([read_outcomes(folder) for folder in (reference, twin, third)]).rows
    assert [row.run.name for row in rows] == [str(reference), str(twin), "digits/third"]


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"name": "cifar10"}, "data set digits is not cifar10"),
        ({"size": 16}, "data set digits is not digits at 16 pixels"),
        ({"name": "folder", "dir": "mine"}, "data set digits is not folder in mine"),
        ({"split": "6:0"}, "open set split none is not 6:0"),
        ({"norm": "l2"}, "threat model linf ball of radius 8/255 is not l2 ball of radius 8/255"),
        ({"epsilon": 4 / 255}, "threat model linf ball of radius 8/255 is not linf ball of radius 4/255"),
        (
            {"attacks": (("fgsm", "exact"), ("pgd50", "exact"), ("pgd50", "smoothed"))},
            r"suite .*pgd20.* is not .*pgd50",
        ),
        ({"index": range(8, 16)}, "no image in common"),
        ({"label": [0, 1, 2, 0, 2, 2, 0, 1]}, "image 4 has another label"),
    ],
)
def test_compare_refuses_runs_that_were_not_attacked_alike(changes, words, reference, tmp_path):
    other = write(tmp_path / "other", "11111110", *["11000000"] * 3, **changes)
    with pytest.raises(InputError, match=words) as error:
        figures(reference, other)
    assert str(reference) in str(error.value) and str(other) in str(error.value) and "\n" not in str(error.value)


def test_compare_refuses_fewer_than_two_runs_and_one_run_twice(reference):
    run = read_outcomes(reference)
    for runs in ([], [run]):
        with pytest.raises(UsageError, match="at least two evaluated runs: --mode=compare RUN RUN"):
            compare(runs)
    with pytest.raises(UsageError, match=r"plain and .*plain are the same run"):
        compare([run, read_outcomes(reference / ".." / "plain")])


@pytest.mark.parametrize("published, described", [(False, "evaluation/results.json"), (True, "card.json")])
@pytest.mark.parametrize(
    "change, words",
    [
        (lambda text: text.replace('"note"', '"remark"'), "KeyError.*note"),
        (lambda text: text[:-9], "JSONDecodeError"),
        (lambda text: text.replace('"value": 0.75', '"value": "most"'), "ValueError"),
        (lambda text: '{"figures": null, "config": {}}', "no complete evaluation"),
    ],
)
def test_read_outcomes_refuses_an_incomplete_description(published, described, change, words, tmp_path):
    folder = write(tmp_path / "a", "1110", *["1100"] * 3, published=published)
    path = folder / described
    path.write_text(change(path.read_text()))
    with pytest.raises(InputError, match=rf"{path} .*{words}.*--mode=evaluate"):
        read_outcomes(folder)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"clean": bits("1111")}, "other images, attacks or accuracies than in .*results.json"),
        ({"attacks": np.array(["fgsm:exact", "pgd20:exact", "pgd20:bare"])}, "other images, attacks"),
        ({"index": np.array([0, 1, 2, 2])}, "not one outcome per image"),
        ({"label": np.zeros(5, int)}, "not one outcome per image"),
        ({"survived": np.zeros([4, 2], bool)}, "not one outcome per image"),
        ({"clean": np.array([1, 1, 1, 0])}, "not true or false"),
        ({"survived": None}, "survived"),
    ],
)
def test_read_outcomes_refuses_arrays_that_do_not_fit(changes, words, tmp_path):
    folder = write(tmp_path / "a", "1110", *["1100"] * 3)
    path = folder / "evaluation" / "adversarial.npz"
    with np.load(path) as saved:
        arrays = {**saved, **changes}
    np.savez(path, **{name: array for name, array in arrays.items() if array is not None})
    with pytest.raises(InputError, match=rf"{path} .*{words}.*--mode=evaluate"):
        read_outcomes(folder)


def test_read_outcomes_names_the_file_that_is_missing_or_damaged(reference, tmp_path):
    with pytest.raises(
        InputError, match=r"no .*nowhere/evaluation/results.json; evaluate it first with --mode=evaluate"
    ):
        read_outcomes(tmp_path / "nowhere")
    path = reference / "evaluation" / "adversarial.npz"
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(InputError, match=f"{path} holds no complete evaluation"):
        read_outcomes(reference)
    path.unlink()
    with pytest.raises(InputError, match=f"there is no {path}"):
        read_outcomes(reference)


@pytest.fixture
def comparison(reference, tmp_path):
    """Return a comparison of three runs: 40 images on which the second wins 30 and loses none, the third is alike."""
    plain = write(tmp_path / "a" / "plain", "1" * 40, *["0" * 40] * 3, budget={})
    hard = write(tmp_path / "a" / "har|d", "1" * 38 + "00", *["1" * 30 + "0" * 10] * 3, budget={"attack_budget": 1200})
    alike = write(tmp_path / "a" / "alike", "1" * 40, *["0" * 40] * 3, seed=1, note="Preliminary.", published=True)
    return compare([read_outcomes(folder) for folder in (plain, hard, alike)], seed=5)


def test_to_markdown_is_a_table_with_a_caption_in_one_line(comparison):
    heading, rule, *lines, empty, caption, end = to_markdown(comparison).replace(r"\|", "/").split("\n")
    assert empty == end == "" and set(rule) == set("|-: ")
    names, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in (heading, *lines)]
    plain, hard, alike = [dict(zip(names, row)) for row in rows]
    assert {len(row) for row in rows} == {len(names)} == {rule.count("|") - 1}
    assert (plain["run"], plain["attack budget"], plain["Δ worst"], plain["pairs"]) == ("a/plain", "?", "-", "-")
    assert (hard["run"], hard["attack budget"], hard["n"], hard["pairs"]) == ("a/har/d", "1,200", "40", "40")
    assert hard["clean"] == "95.0 % (83.5 to 98.6)" and hard["PGD-20"] == hard["worst"] == "75.0 % (59.8 to 85.8)"
    assert hard["Δ worst"].startswith("+75.0 (+6") and hard["Δ worst"].endswith(")*")
    assert hard["Δ clean"].startswith("-5.0 (-12.5 to ") and not hard["Δ clean"].endswith("*")
    assert alike["run"] == "alike" and alike["Δ worst"] == "+0.0 (+0.0 to +0.0)"
    for words in (
        "digits; linf ball of radius 8/255; suite quick (fgsm, pgd20); n = 40; attack seed 3, training seed 0 or 1 ",
        "paired on the same images, percentile bootstrap with 9,999 resamples and seed 5;",
        "Not an AutoAttack result. Preliminary.",
    ):
        assert words in caption


def test_to_csv_gives_every_figure_back(comparison):
    rows = list(csv.DictReader(io.StringIO(to_csv(comparison))))
    assert [row["run"] for row in rows] == ["a/plain", "a/har|d", "alike"]
    assert [row["attack_budget"] for row in rows] == ["", "1200", "10"]
    assert [row["robust_difference_significant"] for row in rows] == ["", "*", ""]
    assert {row["threat_model"] for row in rows} == {"linf ball of radius 8/255"}
    for read, row in zip(rows, comparison.rows):
        for name, figure in row.figures.items():
            cells = [float(read[each]) for each in (name, f"{name}_low", f"{name}_high", f"{name}_n")]
            assert cells == [figure["value"], *figure["ci95"], figure["n"]]


def test_comparison_table_shows_every_run_and_makes_significant_differences_bold(comparison):
    console = Console(width=160, file=io.StringIO(), force_terminal=True, color_system="standard")
    console.print(comparison_table(comparison))
    shown = console.file.getvalue()
    for words in ("a/plain", "a/har|d", "alike", "1,200", "75.0 %", "attack budget", "Not an AutoAttack result."):
        assert words in shown
    bold = "".join(re.findall(r"\x1b\[1m([^\x1b]*)", shown)).replace("PGD-20", "")
    assert re.findall(r"[-+\d.]+", bold) == re.findall(r"[-+\d.]+", "+75.0 (+60.0 to +87.5)*")


def test_comparison_without_pgd20_has_no_column_of_it(tmp_path):
    folders = [write(tmp_path / name, "10", "10", attacks=(("fgsm", "exact"),)) for name in "ab"]
    assert "PGD-20" not in to_markdown(compare([read_outcomes(folder) for folder in folders]))


def test_comparison_under_the_suite_gap_shows_what_each_attack_leaves_alone(tmp_path):
    attacks = tuple((name, "exact") for name in ("pgd20", "pgd100", "pgd100_margin", "feature_matching", "apgd_ce"))
    left = ("1110", "1100", "1000", "1111", "1111")  # APGD-CE met only what stood: what it left is no figure of its own
    folders = [write(tmp_path / name, "1111", *left, attacks=attacks, suite="gap") for name in "ab"]
    heading, _, row, *_ = to_markdown(compare([read_outcomes(folder) for folder in folders])).splitlines()
    cells = dict(zip(*([each.strip() for each in line.strip("|").split("|")] for line in (heading, row))))
    assert "APGD-CE" not in cells and "transfer" not in cells
    expected = {"PGD-20": "75.0 %", "PGD-100": "50.0 %", "margin": "25.0 %", "features": "100.0 %", "worst": "25.0 %"}
    assert {name: cells[name].split(" (")[0] for name in expected} == expected


def test_comparison_under_the_suite_purified_shows_what_stands_on_each_path(tmp_path):
    paths = ("exact", "bpda_identity", "oblivious")
    attacks = (
        *((name, path) for name in ("pgd20", "apgd_ce") for path in paths),
        ("cafa", "exact"),
        ("square", "exact"),
    )
    left = ("1110", "1111", "1111", "1100", "1110", "0111", "1110", "1000")  # Square met only what stood
    behind = write(tmp_path / "behind", "1111", *left, attacks=attacks, suite="purified")
    exact = [number for number, (_, path) in enumerate(attacks) if path == "exact"]
    plain = write(
        tmp_path / "plain",
        "1111",
        *(left[number] for number in exact),
        attacks=[attacks[number] for number in exact],
        suite="purified",
    )
    for folder in (behind, plain):
        described = folder / "evaluation/results.json"
        content = json.loads(described.read_text())
        content["attacks"] = [{**each, "alone": each["name"] != "square"} for each in content["attacks"]]
        described.write_text(json.dumps(content))
    compared = compare([read_outcomes(behind), read_outcomes(plain)])
    heading, _, *rows = to_markdown(compared).splitlines()
    first, second = (
        dict(zip(*([each.strip() for each in line.strip("|").split("|")] for line in (heading, row))))
        for row in rows[:2]
    )
    expected = {"clean": "100.0 %", "oblivious": "75.0 %", "BPDA": "75.0 %", "exact": "50.0 %", "worst": "0.0 %"}
    assert {name: first[name].split(" (")[0] for name in expected} == expected
    assert (second["oblivious"], second["BPDA"], second["exact"].split(" (")[0]) == ("-", "-", "50.0 %")
    lines = list(csv.DictReader(io.StringIO(to_csv(compared))))
    assert [line["oblivious_path_accuracy"] for line in lines] == ["0.75", ""]
    assert [line["exact_path_accuracy"] for line in lines] == ["0.5", "0.5"]

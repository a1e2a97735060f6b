"""The gate: each condition by itself, on results made by hand."""

from __future__ import annotations

import numpy as np
import pytest

from kerasdefense import config
from kerasdefense.evaluation.recorded import Outcomes
from kerasdefense.evaluation.report import wilson
from kerasdefense.types import InputError, UsageError
from pipelines import gate

GATE = config.Gate(clean_accuracy=0.9, robust_accuracy=0.5)
RUN = config.Run(gate=GATE)


def outcomes(clean, robust, count=400):
    right = {name: np.arange(count) < share * count for name, share in (("clean", clean), ("robust", robust))}
    known = dict.fromkeys(("folder", "name", "label", "setting", "note", "attack_seed", "training_seed"))
    return Outcomes(index=np.arange(count), survived={}, by_path={}, attack_budget=None, **right, **known)


def results(clean=380, robust=240, total=400, sanity=("pass", "pass"), **changed):
    items = [{"id": f"S{number}", "gates": True, "status": status} for number, status in enumerate(sanity, start=1)]
    accuracies = {"clean_accuracy": wilson(clean, total), "robust_accuracy": wilson(robust, total)}
    return {**accuracies, "sanity": items, "complete": True, "open_set": None, **changed}


def failed(run=RUN, measured=None, found=None, **others):
    conditions = gate.judge(run, measured or results(), found or outcomes(0.95, 0.6), **others)
    return [each.asks for each in conditions if not each.holds]


def test_model_that_holds_up_is_blessed():
    conditions = gate.judge(RUN, results(), outcomes(0.95, 0.6), is_evaluator_content=True)
    assert gate.is_blessed(conditions) and gate.verdict(conditions) == "blessed: every condition holds"
    assert len(conditions) == 4


def test_lower_bound_counts_and_not_the_accuracy_itself():
    assert wilson(220, 400)["value"] == 0.55 and wilson(220, 400)["ci95"][0] > 0.5
    assert failed(measured=results(robust=220)) == []
    assert wilson(210, 400)["value"] > 0.5 > wilson(210, 400)["ci95"][0]
    assert failed(measured=results(robust=210)) == ["lower 95 % bound of robust accuracy is at least 50.0 %"]
    assert failed(measured=results(clean=365)) == ["lower 95 % bound of clean accuracy is at least 90.0 %"]


def test_reason_is_told_with_figures():
    conditions = gate.judge(RUN, results(robust=40), outcomes(0.95, 0.1))
    assert gate.verdict(conditions).startswith("not blessed, nothing is pushed: lower 95 % bound of robust accuracy")
    assert "10.0 % (7.4 % to 13.3 %) of 400 images" in gate.verdict(conditions)


@pytest.mark.parametrize("sanity", [("pass", "fail"), (), ("not_run", "not_run")])
def test_sanity_battery_that_failed_or_did_not_run_blocks(sanity):
    assert failed(measured=results(sanity=sanity)) == ["the sanity battery is clean"]


def test_item_that_does_not_gate_does_not_block():
    items = [
        {"id": "S1", "gates": True, "status": "pass"},
        {"id": "S12", "gates": False, "status": "fail"},
    ]
    assert failed(measured=results() | {"sanity": items}) == []


def test_evaluation_that_was_cut_short_blocks():
    assert failed(measured=results(complete=False)) == ["the sanity battery is clean"]


def test_verdict_of_the_evaluator_blocks():
    assert failed(is_evaluator_content=False) == ["TFX's Evaluator blesses it"]


def test_significant_loss_against_the_last_blessed_model_blocks_and_a_small_one_does_not():
    asks = "no significant loss of {} accuracy against the last blessed model"
    assert failed(baseline=outcomes(0.95, 0.7)) == [asks.format("robust")]
    assert failed(baseline=outcomes(1.0, 0.6)) == [asks.format("clean")]
    assert failed(baseline=outcomes(0.95, 0.605)) == []
    assert failed(baseline=outcomes(0.8, 0.2)) == []


def test_comparison_on_too_few_images_is_refused():
    found = [outcomes(0.95, 0.6, count) for count in (199, 200)]
    assert len(failed(found=found[0], baseline=found[0])) == 2
    assert failed(found=found[1], baseline=found[1]) == []


def test_comparison_on_other_images_is_an_error():
    with pytest.raises(InputError, match="not measured on the same images"):
        failed(baseline=outcomes(0.95, 0.6, 300))


def with_detector(low):
    figures = {"auroc": 0.9, "auroc_ci95": [low, 0.95]}
    return {"detectors": {"knn": {"sets": {"svhn": figures}}, "msp": {"sets": {"svhn": {**figures, "auroc": 0.1}}}}}


def test_auroc_of_the_exported_detector_counts_by_its_lower_bound():
    run = config.Run(gate=config.Gate(robust_accuracy=0.5, auroc=0.85), detector=config.Detector(name="knn,msp"))
    assert failed(run, results(open_set=with_detector(0.86))) == []
    assert failed(run, results(open_set=with_detector(0.84))) == [
        "lower 95 % bound of AUROC of knn on svhn is at least 0.850"
    ]
    with pytest.raises(InputError, match="no unknown images were measured"):
        failed(run, results())


@pytest.mark.parametrize(
    ("thresholds", "message"),
    [
        ({}, "a pipeline needs --gate_robust_accuracy"),
        ({"robust_accuracy": 0.8, "clean_accuracy": 0.7}, "robust_accuracy=0.8 is above --gate_clean_accuracy=0.7"),
        ({"robust_accuracy": 0.5, "auroc": 0.9}, "--gate_auroc needs unknown images"),
        ({"robust_accuracy": 1.0}, "cannot be reached"),
    ],
)
def test_thresholds_that_cannot_be_are_refused(thresholds, message):
    with pytest.raises(UsageError, match=message):
        gate.check_gate(config.Run(gate=config.Gate(**thresholds)))


@pytest.mark.parametrize("wanted", [{"preprocessor": "jpeg"}, {"minutes": 1.0}, {"model": "other.keras"}])
def test_evaluation_of_another_model_or_part_is_refused(wanted):
    with pytest.raises(UsageError, match="a pipeline measures the model that it pushes"):
        gate.check_gate(config.Run(gate=GATE, evaluate=config.Evaluate(**wanted)))


def test_pipeline_without_a_sanity_battery_is_refused():
    with pytest.raises(UsageError, match="sanity"):
        gate.check_gate(config.Run(gate=GATE, evaluate=config.Evaluate(sanity_examples=0)))

"""The pipeline as it is made: its steps, what they take, what is refused; nothing runs."""

from __future__ import annotations

import dataclasses
import json
import re

import pytest
from google.protobuf import json_format
from tfx.types import standard_artifacts
from tfx.utils import import_utils

import pipelines
from kerasdefense import config, flags
from kerasdefense.types import UsageError
from pipelines import kubeflow_runner, resolving
from pipelines.artifacts import Images
from pipelines.pipeline import Places, create_pipeline, eval_config

GATE = config.Gate(clean_accuracy=0.9, robust_accuracy=0.5)
RUN = config.Run(gate=GATE, run_dir="elsewhere", defense=config.Defense(name="pgd_at"))
IMAGES = Images("/examples", ("train", "eval"), "digits", ("0", "1"), (8, 8, 1))
PLACES = Places("/artifacts", "/pushed", "/state")


@pytest.fixture(scope="module")
def made():
    pipeline = create_pipeline("digits", RUN, IMAGES, PLACES, metadata_path="/metadata.sqlite")
    return {component.id: component for component in pipeline.components}


def test_steps_are_there_and_validation_comes_before_training(made):
    steps = {"ImportExampleGen", "StatisticsGen", "SchemaGen", "ExampleValidator", "Trainer"}
    assert set(made) == steps | {"latest_blessed_model", "Evaluator", "RobustnessEvaluator", "Pusher"}
    assert made["ExampleValidator"] in made["Trainer"].upstream_nodes


def test_pusher_takes_the_blessing_of_our_evaluator(made):
    blessing = made["Pusher"].inputs["model_blessing"]
    assert blessing.producer_component_id == "RobustnessEvaluator"
    assert made["RobustnessEvaluator"].inputs["evaluator_blessing"].producer_component_id == "Evaluator"


def test_trainer_and_evaluator_get_one_run(made):
    trained = flags.parse(json.loads(made["Trainer"].exec_properties["custom_config"])["flags"])
    attacked = flags.parse(json.loads(made["RobustnessEvaluator"].exec_properties["flags"]))
    same = {"run_dir": "", "progress": True}
    assert dataclasses.replace(attacked, **same) == dataclasses.replace(RUN, **same)
    others = {"evaluate": RUN.evaluate, "gate": RUN.gate}
    assert dataclasses.replace(trained, **same, **others) == dataclasses.replace(RUN, **same)


def test_other_thresholds_and_attacks_do_not_train_again(made):
    wanted = {"gate": config.Gate(robust_accuracy=0.1), "evaluate": config.Evaluate(suite="quick", examples=300)}
    pipeline = create_pipeline("digits", dataclasses.replace(RUN, **wanted), IMAGES, PLACES)
    others = {component.id: component for component in pipeline.components}
    assert others["Trainer"].exec_properties == made["Trainer"].exec_properties
    assert others["RobustnessEvaluator"].exec_properties != made["RobustnessEvaluator"].exec_properties


def test_evaluator_measures_by_class_and_bounds_the_whole():
    told = json_format.MessageToDict(eval_config(0.9))
    (metrics,) = told["metricsSpecs"]
    (threshold,) = metrics["metrics"][1]["perSliceThresholds"]
    assert told["slicingSpecs"] == [{}, {"featureKeys": ["label"]}] and threshold["slicingSpecs"] == [{}]
    assert threshold["threshold"]["valueThreshold"]["lowerBound"] == 0.9
    assert "perSliceThresholds" not in json_format.MessageToDict(eval_config(None))["metricsSpecs"][0]["metrics"][1]


def test_orchestrator_with_own_strategies_only_gets_one_kind_of_blessing():
    pipeline = create_pipeline("digits", RUN, IMAGES, PLACES, own_resolver=False)
    robustness = next(each for each in pipeline.components if each.id == "RobustnessEvaluator")
    assert "evaluator_blessing" not in robustness.inputs and "baseline_model" in robustness.inputs


def test_contradicting_thresholds_are_refused():
    run = dataclasses.replace(RUN, gate=config.Gate(clean_accuracy=0.5, robust_accuracy=0.9))
    with pytest.raises(UsageError, match="is above --gate_clean_accuracy"):
        create_pipeline("digits", run, IMAGES, PLACES)


def artifact(kind, number, **properties):
    found = kind()
    found.id = number
    for name, value in properties.items():
        found.set_int_custom_property(name, value)
    return found


def test_candidate_is_held_against_the_last_other_blessed_model():
    models = [artifact(standard_artifacts.Model, number) for number in (1, 2, 3)]
    blessings = [
        artifact(standard_artifacts.ModelBlessing, 10 + number, current_model_id=number, blessed=blessed)
        for number, blessed in ((1, 1), (2, 0), (3, 1))
    ]

    def resolved(candidate):
        inputs = {"model": list(models), "model_blessing": list(blessings), "candidate": [models[candidate - 1]]}
        found = resolving.LatestOtherBlessedModel().resolve_artifacts(None, inputs)
        return [each.id for each in found["model"]]

    assert (resolved(3), resolved(2), resolved(1)) == ([1], [3], [3])
    blessings.append(artifact(standard_artifacts.ModelBlessing, 20, current_model_id=1, blessed=1))  # again, and last
    assert (resolved(2), resolved(1)) == ([1], [3])
    blessings.append(artifact(standard_artifacts.ModelBlessing, 21, current_model_id=3, blessed=0))  # no longer
    assert (resolved(2), resolved(1)) == ([1], [])
    nothing = {"model": models[:1], "model_blessing": blessings[:1], "candidate": models[:1]}
    assert resolving.LatestOtherBlessedModel().resolve_artifacts(None, nothing)["model"] == []


def test_type_of_the_report_can_be_imported_by_its_name():
    report = pipelines.RobustnessReport
    assert re.fullmatch(r"[a-z][a-z0-9-_]{2,20}[.][A-Z][a-zA-Z0-9-_]{2,49}", report.TYPE_NAME)
    assert import_utils.import_class_by_path(report.TYPE_NAME) is report


@pytest.mark.parametrize("given", ["8x8", "8x8x", "0x8x1", "axbxc"])
def test_image_shape_that_is_none_is_refused(given):
    with pytest.raises(UsageError, match="height x width x channels, as 32x32x3"):
        kubeflow_runner.shape_of(given)

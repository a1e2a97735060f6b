"""What our evaluator leaves behind: the report, the blessing, and what later examples are held against."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Optional

import numpy as np
import tensorflow as tf
from tfx import types
from tfx.components.evaluator import constants
from tfx.types import artifact

from kerasdefense import config
from kerasdefense.data import Splits
from kerasdefense.files import write_json
from pipelines import gate
from pipelines.artifacts import copy_folder
from pipelines.components.example_validator import SHARES
from pipelines.evaluate import SHARDS

GATE = "gate.json"
"""The thresholds of a push, its conditions and what became of them, in the report."""
BLESSED = "blessed"
"""Folder of the state for what was blessed last."""


class RobustnessReport(artifact.Artifact):
    """What an evaluation found: results.json, report.html, gate.json, and the shards with adversarial images.

    Its custom properties are `clean_accuracy`, `robust_accuracy` and `verdict`.
    """

    TYPE_NAME = "pipelines.RobustnessReport"  # which Kubeflow imports it by


def write_report(
    report: types.Artifact,
    evaluation: Path,
    shards: str,
    *,
    results: Mapping[str, Any],
    conditions: Sequence[gate.Condition],
    thresholds: config.Gate,
) -> None:
    """Copy what an evaluation left into the artifact, shards included, with the conditions of the gate.

    Args:
        report: the artifact.
        evaluation: folder with results.json and all that comes with it.
        shards: folder of the shards.
        results: what results.json holds.
        conditions: what was asked and found.
        thresholds: of the gate.
    """
    verdict = gate.verdict(conditions)
    content = {"blessed": gate.is_blessed(conditions), "verdict": verdict}
    content |= {"conditions": [dataclasses.asdict(each) for each in conditions]}
    write_json(evaluation / GATE, {**content, "thresholds": dataclasses.asdict(thresholds)})
    copy_folder(str(evaluation), report.uri)
    copy_folder(shards, f"{report.uri}/{SHARDS}")
    for name in ("clean_accuracy", "robust_accuracy"):
        report.set_float_custom_property(name, float(results[name]["value"]))
    report.set_string_custom_property("verdict", verdict)


def write_label_shares(splits: Splits, state: str) -> None:
    """Write how many training images of each class there are, those held out for validation included."""
    label = np.concatenate([part.label[part.index] for part in (splits.train, splits.validation)])
    path = f"{state}/{BLESSED}/{SHARES}"
    tf.io.gfile.makedirs(f"{state}/{BLESSED}")
    with tf.io.gfile.GFile(f"{path}.writing", "w") as file:
        file.write(json.dumps({"train": np.bincount(label, minlength=len(splits.labels)).tolist()}))
    tf.io.gfile.rename(f"{path}.writing", path, overwrite=True)


def write_blessing(
    blessing: types.Artifact, model: types.Artifact, baseline: Optional[types.Artifact], is_blessed: bool
) -> None:
    """Write a blessing as TFX's Evaluator does, for the Pusher and for resolvers."""
    for role, each in (("CURRENT", model), ("BASELINE", baseline)):
        if each is not None:
            uri, number = (getattr(constants, f"ARTIFACT_PROPERTY_{role}_MODEL_{what}_KEY") for what in ("URI", "ID"))
            blessing.set_string_custom_property(uri, each.uri)
            blessing.set_int_custom_property(number, each.id)
    value = constants.BLESSED_VALUE if is_blessed else constants.NOT_BLESSED_VALUE
    name = constants.BLESSED_FILE_NAME if is_blessed else constants.NOT_BLESSED_FILE_NAME
    blessing.set_int_custom_property(constants.ARTIFACT_PROPERTY_BLESSED_KEY, value)
    tf.io.gfile.makedirs(blessing.uri)
    with tf.io.gfile.GFile(f"{blessing.uri}/{name}", "w") as file:
        file.write("")

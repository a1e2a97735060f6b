"""The TFX component that attacks a model in Beam's workers, reports what stands, and blesses it or does not."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import tempfile
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Optional

import numpy as np
import tensorflow as tf
from rich.console import Console
from tfx import types
from tfx.components.evaluator import constants
from tfx.dsl.components.base import base_beam_component, base_beam_executor, executor_spec
from tfx.types import artifact, artifact_utils, standard_artifacts
from tfx.types.component_spec import ChannelParameter, ComponentSpec, ExecutionParameter

from kerasdefense import assess, config, evaluation, flags
from kerasdefense.data import Splits
from kerasdefense.data.examples import split_folders
from kerasdefense.evaluation import read_outcomes, read_results
from kerasdefense.evaluation.recorded import Outcomes
from kerasdefense.files import write_json
from pipelines import gate, jobs
from pipelines.artifacts import copy_folder, digest_of, model_file, read_splits
from pipelines.blocks import local
from pipelines.components.example_validator import SHARES
from pipelines.evaluate import SHARDS, Workers, check_keyed, evaluate, work_line

BLESSED = "blessed"
"""Folder of the state for what was blessed last."""
GATE = "gate.json"
"""The conditions of a push and what became of them, in the report."""


class RobustnessReport(artifact.Artifact):
    """What an evaluation found: results.json, report.html, gate.json, and the shards with adversarial images.

    Its custom properties are `clean_accuracy`, `robust_accuracy`, `verdict`, and `shards`, where these are kept.
    """

    TYPE_NAME = "pipelines.RobustnessReport"  # which Kubeflow imports it by


class RobustnessEvaluatorSpec(ComponentSpec):
    """Inputs, outputs and settings of the component."""

    PARAMETERS: ClassVar = {
        "flags": ExecutionParameter(type=str),
        "labels": ExecutionParameter(type=str),
        "data_name": ExecutionParameter(type=str),
        "state_dir": ExecutionParameter(type=str),
        "threads": ExecutionParameter(type=int),
    }
    INPUTS: ClassVar = {
        "examples": ChannelParameter(type=standard_artifacts.Examples),
        "model": ChannelParameter(type=standard_artifacts.Model),
        "baseline_model": ChannelParameter(type=standard_artifacts.Model, optional=True),
        "evaluator_blessing": ChannelParameter(type=standard_artifacts.ModelBlessing, optional=True),
    }
    OUTPUTS: ClassVar = {
        "report": ChannelParameter(type=RobustnessReport),
        "blessing": ChannelParameter(type=standard_artifacts.ModelBlessing),
    }


class Measured(NamedTuple):
    """What was found of a model, and the folder that holds it."""

    results: dict[str, Any]
    outcomes: Outcomes
    run_dir: Path
    shards: str


class Executor(base_beam_executor.BaseBeamExecutor):
    """Attack the candidate and the last blessed model, and judge."""

    def Do(  # noqa: N802 - TFX's name
        self,
        input_dict: dict[str, list[types.Artifact]],
        output_dict: dict[str, list[types.Artifact]],
        exec_properties: dict[str, Any],
    ) -> None:
        """Write the report and the blessing of the model.

        Args:
            input_dict: `examples`, `model`, perhaps `baseline_model` and `evaluator_blessing`.
            output_dict: `report` and `blessing`.
            exec_properties: `flags`, JSON of the lines of a flag file; `labels`, JSON of the class names; `data_name`;
                `state_dir`, where outcomes are kept by the digests of model, images and settings, and how many images
                of each class the blessed model was trained on, which later examples are held against; `threads`,
                TensorFlow's in a worker process.
        """
        self._log_startup(input_dict, output_dict, exec_properties)
        run = flags.parse(json.loads(exec_properties["flags"]))
        gate.check_gate(run)
        root = artifact_utils.get_single_uri(input_dict["examples"])
        splits = read_splits(run, root, labels=json.loads(exec_properties["labels"]), name=exec_properties["data_name"])
        candidate = artifact_utils.get_single_instance(input_dict["model"])
        baseline = next(iter(input_dict.get("baseline_model") or []), None)
        console = Console()
        measured = self._measure(run, splits, candidate.uri, root, exec_properties)
        assess.show(measured.results, f"{run.defense.name} on {splits.name}", console)
        before = self._baseline(run, splits, baseline, candidate, root, exec_properties)
        conditions = gate.judge(
            run, measured.results, measured.outcomes, baseline=before, is_evaluator_content=_content(input_dict)
        )
        gate.show(conditions, console)
        report = artifact_utils.get_single_instance(output_dict["report"])
        _write_report(report, measured, conditions)
        blessing = artifact_utils.get_single_instance(output_dict["blessing"])
        _write_blessing(blessing, candidate, baseline, gate.is_blessed(conditions))
        if gate.is_blessed(conditions):
            _write_label_shares(splits, f"{exec_properties['state_dir'].rstrip('/')}/{BLESSED}")

    def _baseline(
        self,
        run: config.Run,
        splits: Splits,
        baseline: Optional[types.Artifact],
        candidate: types.Artifact,
        root: str,
        exec_properties: dict[str, Any],
    ) -> Optional[Outcomes]:
        """Return the outcomes of the last blessed model; None where there is none, or it is this one."""
        if baseline is None or baseline.uri == candidate.uri:
            return None
        return self._measure(run, splits, baseline.uri, root, exec_properties).outcomes

    def _measure(
        self, run: config.Run, splits: Splits, uri: str, root: str, exec_properties: dict[str, Any]
    ) -> Measured:
        """Measure a model, or read what was found of it before."""
        model = evaluation.load_model(local(model_file(uri)))._replace(name=run.defense.name)
        evaluation.check_fits(model, splits.image_shape, len(splits.labels), splits.name)
        key = _key(run, splits, model.digest)
        state = f"{exec_properties['state_dir'].rstrip('/')}/outcomes/{key}"
        run_dir = Path(tempfile.mkdtemp(prefix="kerasdefense-report-") if "://" in state else state)
        shards = f"{state}/{SHARDS}"
        if (run_dir / assess.RESULTS).is_file():
            return Measured(read_results(run_dir), read_outcomes(run_dir), run_dir, shards)
        wanted = dataclasses.replace(run.evaluate, model=model_file(uri))
        run = dataclasses.replace(run, run_dir=str(run_dir), evaluate=wanted, progress=False)
        files = [f"{split_folders(root)['eval']}/*"]
        check_keyed(files)
        found = evaluate(run, splits, model, files, self._workers(shards, exec_properties["threads"]))
        print(work_line(found.work, found.results["clean_accuracy"]["n"]))
        return Measured(found.results, read_outcomes(run_dir), run_dir, shards)

    def _workers(self, shards: str, threads: int) -> Workers:
        """Return the workers that Beam's options ask for; without any, processes of this machine."""
        if self._beam_pipeline_args:
            is_local = jobs.is_multi_processing(self._beam_pipeline_args)
            return Workers(self._make_beam_pipeline, threads if is_local else 0, shards)
        arguments = jobs.beam_arguments([])
        return Workers(lambda: jobs.make_pipeline(arguments), threads, shards)


class RobustnessEvaluator(base_beam_component.BaseBeamComponent):
    """Attack a model in Beam's workers and bless it where it holds up.

    The outputs are `report` and `blessing`; a Pusher that takes the blessing pushes nothing else. A model is blessed
    where all conditions of `pipelines.gate` hold: the lower 95 % bounds of clean accuracy, robust accuracy and AUROC
    reach the thresholds of the flags --gate_*, the sanity battery is clean, TFX's Evaluator blessed it, and it loses
    nothing for sure against the last blessed model on the same images.
    """

    SPEC_CLASS = RobustnessEvaluatorSpec
    EXECUTOR_SPEC = executor_spec.BeamExecutorSpec(Executor)

    def __init__(
        self,
        examples: types.BaseChannel,
        model: types.BaseChannel,
        *,
        settings: dict[str, Any],
        baseline_model: Optional[types.BaseChannel] = None,
        evaluator_blessing: Optional[types.BaseChannel] = None,
    ) -> None:
        """Make the component.

        Args:
            examples: with a split `eval`, keyed by `index`.
            model: the candidate.
            settings: the parameters of `RobustnessEvaluatorSpec`.
            baseline_model: the last blessed model.
            evaluator_blessing: the verdict of TFX's Evaluator.
        """
        spec = RobustnessEvaluatorSpec(
            **settings,
            examples=examples,
            model=model,
            baseline_model=baseline_model,
            evaluator_blessing=evaluator_blessing,
            report=types.Channel(type=RobustnessReport),
            blessing=types.Channel(type=standard_artifacts.ModelBlessing),
        )
        super().__init__(spec=spec)


def _key(run: config.Run, splits: Splits, digest: str) -> str:
    """Return the name of the folder for what was found of a model on these images by these settings."""
    asked = [dataclasses.asdict(part) for part in (run.evaluate, run.detector)]
    text = json.dumps([digest, digest_of(splits), asked, tf.__version__], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _content(input_dict: dict[str, list[types.Artifact]]) -> Optional[bool]:
    given = input_dict.get("evaluator_blessing")
    if not given:
        return None
    return given[0].get_int_custom_property(constants.ARTIFACT_PROPERTY_BLESSED_KEY) == constants.BLESSED_VALUE


def _write_report(report: types.Artifact, measured: Measured, conditions: list[gate.Condition]) -> None:
    """Copy what an evaluation left into the artifact, shards included, with the conditions of the gate."""
    verdict = {"blessed": gate.is_blessed(conditions), "verdict": gate.verdict(conditions)}
    write_json(
        measured.run_dir / assess.FOLDER / GATE,
        {**verdict, "conditions": [dataclasses.asdict(each) for each in conditions]},
    )
    copy_folder(measured.run_dir / assess.FOLDER, report.uri)
    if "://" not in measured.shards:
        copy_folder(Path(measured.shards), f"{report.uri}/{SHARDS}")
    for name in ("clean_accuracy", "robust_accuracy"):
        report.set_float_custom_property(name, float(measured.results[name]["value"]))
    report.set_string_custom_property("verdict", verdict["verdict"])
    report.set_string_custom_property(SHARDS, measured.shards)


def _write_label_shares(splits: Splits, folder: str) -> None:
    """Write how many training images of each class there are, those held out for validation included."""
    label = np.concatenate([part.label[part.index] for part in (splits.train, splits.validation)])
    tf.io.gfile.makedirs(folder)
    with tf.io.gfile.GFile(f"{folder}/{SHARES}", "w") as file:
        file.write(json.dumps({"train": np.bincount(label, minlength=len(splits.labels)).tolist()}))


def _write_blessing(
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

"""The TFX component that attacks a model in Beam's workers, reports what stands, and blesses it or does not."""

from __future__ import annotations

import atexit
import dataclasses
import hashlib
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Optional

import tensorflow as tf
from rich.console import Console
from tfx import types
from tfx.components.evaluator import constants
from tfx.dsl.components.base import base_beam_component, base_beam_executor, executor_spec
from tfx.types import artifact_utils, standard_artifacts
from tfx.types.component_spec import ChannelParameter, ComponentSpec, ExecutionParameter

from kerasdefense import assess, config, evaluation, flags
from kerasdefense.data import Splits
from kerasdefense.data.examples import split_folders
from kerasdefense.evaluation import read_outcomes, read_results
from kerasdefense.evaluation.recorded import Outcomes
from pipelines import gate, jobs
from pipelines.artifacts import copy_folder, digest_of, model_file, read_splits
from pipelines.blocks import local
from pipelines.components.report import RobustnessReport, write_blessing, write_label_shares, write_report
from pipelines.evaluate import SHARDS, Workers, check_keyed, evaluate, work_line


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


class Subject(NamedTuple):
    """What models are measured by, and on.

    Attributes:
        run: says how.
        splits: the data.
        examples: the artifact that they were read from.
        state: where outcomes are kept.
        threads: TensorFlow's in a worker process.
    """

    run: config.Run
    splits: Splits
    examples: str
    state: str
    threads: int


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
        subject = _subject(artifact_utils.get_single_uri(input_dict["examples"]), exec_properties)
        run = subject.run
        candidate = artifact_utils.get_single_instance(input_dict["model"])
        baseline = next(iter(input_dict.get("baseline_model") or []), None)
        console = Console()
        measured = self._measure(subject, candidate.uri)
        assess.show(measured.results, f"{run.defense.name} on {subject.splits.name}", console)
        before = None
        if baseline is not None and baseline.uri != candidate.uri:
            before = self._measure(subject, baseline.uri).outcomes
        conditions = gate.judge(
            run, measured.results, measured.outcomes, baseline=before, is_evaluator_content=_content(input_dict)
        )
        gate.show(conditions, console)
        write_report(
            artifact_utils.get_single_instance(output_dict["report"]),
            measured.run_dir / assess.FOLDER,
            measured.shards,
            results=measured.results,
            conditions=conditions,
            thresholds=run.gate,
        )
        is_blessed = gate.is_blessed(conditions)
        blessing = artifact_utils.get_single_instance(output_dict["blessing"])
        write_blessing(blessing, candidate, baseline, is_blessed)
        if is_blessed:
            write_label_shares(subject.splits, subject.state)

    def _measure(self, subject: Subject, uri: str) -> Measured:
        """Measure a model, or read what was found of it before by the same settings on the same images."""
        run, splits = subject.run, subject.splits
        model = evaluation.load_model(local(model_file(uri)))._replace(name=run.defense.name)
        evaluation.check_fits(model, splits.image_shape, len(splits.labels), splits.name)
        state = f"{subject.state}/outcomes/{_key(run, splits, model.digest)}"
        shards, is_remote = f"{state}/{SHARDS}", "://" in state
        run_dir = Path(_temporary() if is_remote else state)
        finished = tf.io.gfile.exists(f"{state}/{assess.REPORT}")  # which is written last
        if finished and run.evaluate.resume != "never":
            if is_remote:
                copy_folder(f"{state}/{assess.FOLDER}", str(run_dir / assess.FOLDER))
            return Measured(read_results(run_dir), read_outcomes(run_dir), run_dir, shards)
        wanted = dataclasses.replace(run.evaluate, model=model_file(uri))
        run = dataclasses.replace(run, run_dir=str(run_dir), evaluate=wanted, progress=False)
        files = [f"{split_folders(subject.examples)['eval']}/*"]
        check_keyed(files)
        found = evaluate(run, splits, model, files, self._workers(shards, subject.threads))
        print(work_line(found.work, found.results["clean_accuracy"]["n"]))
        if is_remote:
            copy_folder(str(run_dir / assess.FOLDER), f"{state}/{assess.FOLDER}")
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


def _subject(examples: str, exec_properties: dict[str, Any]) -> Subject:
    run = attacked_alike(flags.parse(json.loads(exec_properties["flags"])))
    gate.check_gate(run)
    labels, name = json.loads(exec_properties["labels"]), exec_properties["data_name"]
    splits = read_splits(run, examples, labels=labels, name=name)
    return Subject(run, splits, examples, exec_properties["state_dir"].rstrip("/"), exec_properties["threads"])


def attacked_alike(run: config.Run) -> config.Run:
    """Return the run with the ball of its attacks said, so that no model is attacked in one of its own."""
    norm, epsilon = run.evaluate.norm or run.attack.norm, run.evaluate.epsilon or run.attack.epsilon
    return dataclasses.replace(run, evaluate=dataclasses.replace(run.evaluate, norm=norm, epsilon=epsilon))


def _temporary() -> str:
    folder = tempfile.mkdtemp(prefix="kerasdefense-report-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


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

"""The TFX component that pushes a blessed model with a card of what was measured, and what a server needs beside it."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any, ClassVar

import tensorflow as tf
from tfx import types
from tfx.components.pusher import executor
from tfx.dsl.components.base import base_component, executor_spec
from tfx.proto import pusher_pb2
from tfx.types import artifact_utils, standard_artifacts, standard_component_specs
from tfx.types.component_spec import ChannelParameter

from kerasdefense import export
from kerasdefense.files import write_json
from kerasdefense.integrity import CARD
from pipelines.blocks import local
from pipelines.components.robustness_evaluator import RobustnessReport


class PusherSpec(standard_component_specs.PusherSpec):
    """Inputs, outputs and settings of the component: those of TFX's, and the report."""

    INPUTS: ClassVar = {
        **standard_component_specs.PusherSpec.INPUTS,
        "report": ChannelParameter(type=RobustnessReport),
    }


class Executor(executor.Executor):
    """Push as TFX does, after the card was given its figures."""

    def Do(  # noqa: N802 - TFX's name
        self,
        input_dict: dict[str, list[types.Artifact]],
        output_dict: dict[str, list[types.Artifact]],
        exec_properties: dict[str, Any],
    ) -> None:
        """Push the model where it was blessed, and write beside its version what describes and serves it.

        Args:
            input_dict: `model`, `model_blessing` and `report`.
            output_dict: `pushed_model`.
            exec_properties: `push_destination`.
        """
        self._folder = Path(tempfile.mkdtemp(prefix="kerasdefense-push-"))
        try:
            super().Do(input_dict, output_dict, exec_properties)
        finally:
            shutil.rmtree(self._folder)
        pushed = artifact_utils.get_single_instance(output_dict["pushed_model"])
        place = pushed.get_string_custom_property("pushed_destination")
        if place and "://" not in place:  # elsewhere servers are told in other ways
            export.write_bundle(Path(place).parent)

    def GetModelPath(self, input_dict: dict[str, list[types.Artifact]]) -> str:  # noqa: N802
        """Return a copy of the model whose card says what the report found."""
        served = super().GetModelPath(input_dict)
        copy = self._folder / "model"
        shutil.copytree(local(served), copy)
        report = artifact_utils.get_single_uri(input_dict["report"])
        with tf.io.gfile.GFile(f"{report}/results.json") as file:
            results = json.loads(file.read())
        card = json.loads((copy / CARD).read_text(encoding="utf-8"))
        write_json(copy / CARD, export.with_figures(card, results))
        return str(copy)


class Pusher(base_component.BaseComponent):
    """Push a blessed model into a folder that TF Serving watches, whole under a number that rises."""

    SPEC_CLASS = PusherSpec
    EXECUTOR_SPEC = executor_spec.ExecutorClassSpec(Executor)

    def __init__(
        self, model: types.BaseChannel, *, model_blessing: types.BaseChannel, report: types.BaseChannel, folder: str
    ) -> None:
        """Make the component.

        Args:
            model: the candidate.
            model_blessing: of our evaluator.
            report: of the same.
            folder: where versions go.
        """
        filesystem = pusher_pb2.PushDestination.Filesystem(base_directory=folder)
        spec = PusherSpec(
            model=model,
            model_blessing=model_blessing,
            report=report,
            push_destination=pusher_pb2.PushDestination(filesystem=filesystem),
            pushed_model=types.Channel(type=standard_artifacts.PushedModel),
        )
        super().__init__(spec=spec)

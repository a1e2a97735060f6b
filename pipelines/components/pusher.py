"""The TFX component that pushes a blessed model with a card of what was measured, and what a server needs beside it."""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import tensorflow as tf
from tfx import types
from tfx.components.pusher import executor
from tfx.dsl.components.base import base_component, executor_spec
from tfx.proto import pusher_pb2
from tfx.types import artifact_utils, standard_artifacts, standard_component_specs
from tfx.types.component_spec import ChannelParameter, ExecutionParameter
from tfx.utils import io_utils, proto_utils

from kerasdefense import export
from kerasdefense.export.saved_model import versions_of
from kerasdefense.files import replacing, write_json
from kerasdefense.integrity import CARD
from pipelines.artifacts import copy_folder
from pipelines.components.report import GATE, RobustnessReport


class PusherSpec(standard_component_specs.PusherSpec):
    """Inputs, outputs and settings of the component: those of TFX's, the report, and what is in the folder."""

    PARAMETERS: ClassVar = {
        **standard_component_specs.PusherSpec.PARAMETERS,
        "there": ExecutionParameter(type=str),
    }
    INPUTS: ClassVar = {
        **standard_component_specs.PusherSpec.INPUTS,
        "report": ChannelParameter(type=RobustnessReport),
    }


class Executor(executor.Executor):
    """Push a model with a card that has its figures; into a folder of this machine at once, elsewhere as TFX does."""

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
            exec_properties: `push_destination`; `there`, which makes TFX ask again where the folder has changed.
        """
        destination = pusher_pb2.PushDestination()
        proto_utils.json_to_proto(exec_properties["push_destination"], destination)
        folder = destination.filesystem.base_directory
        with self._complete(input_dict) as self._model:
            if "://" in folder or not self.CheckBlessing(input_dict):
                super().Do(input_dict, output_dict, exec_properties)
                return
            version = push(self._model, Path(folder), artifact_utils.get_single_uri(input_dict["model"]))
        pushed = artifact_utils.get_single_instance(output_dict["pushed_model"])
        io_utils.copy_dir(str(version), pushed.uri)
        self._MarkPushed(pushed, pushed_destination=str(version), pushed_version=version.name)

    def GetModelPath(self, input_dict: dict[str, list[types.Artifact]]) -> str:  # noqa: N802 - TFX's name
        """Return the copy of the model whose card has its figures."""
        return str(self._model)

    @contextlib.contextmanager
    def _complete(self, input_dict: dict[str, list[types.Artifact]]) -> Iterator[Path]:
        """Give a copy of the model whose card says what the report found, and what was asked."""
        served = super().GetModelPath(input_dict)
        report = artifact_utils.get_single_uri(input_dict["report"])
        results, gate = (_read(f"{report}/{name}") for name in ("results.json", GATE))
        with tempfile.TemporaryDirectory(prefix="kerasdefense-push-") as temporary:
            copy = Path(temporary) / "model"
            copy_folder(served, str(copy))
            card = json.loads((copy / CARD).read_text(encoding="utf-8"))
            evaluated = {**results["config"]["evaluate"], "model": ""}  # where it lay says nothing of it
            card["config"] |= {"evaluate": evaluated, "gate": gate["thresholds"]}
            write_json(copy / CARD, export.with_figures(card, results))
            yield copy


def push(model: Path, folder: Path, artifact: str) -> Path:
    """Push a model into a folder of this machine, unless it is the newest there; return its version's folder.

    It appears whole under a number above all others, or not at all.

    Args:
        model: the version.
        folder: where versions are.
        artifact: of TFX, which may hold a `classifier.keras` to go beside them.
    """
    numbers = versions_of(folder)
    newest = folder / str(numbers[-1]) if numbers else None
    if newest is not None and (newest / CARD).is_file() and _files(newest) == _files(model):
        export.write_bundle(folder)  # perhaps it was stopped before
        return newest
    version = folder / str(max(int(time.time()), (numbers[-1] if numbers else 0) + 1))
    with replacing(version) as temporary:
        shutil.copytree(model, temporary)
    try:
        _place_classifier(f"{artifact}/{export.CLASSIFIER}", folder / export.CLASSIFIER)
        export.write_bundle(folder)
    except BaseException:
        shutil.rmtree(version)
        raise
    return version


def _place_classifier(source: str, target: Path) -> None:
    """Put a version's classifier beside the versions, in place of that of the one before."""
    if not tf.io.gfile.exists(source):
        target.unlink(missing_ok=True)
        return
    with replacing(target) as temporary:
        tf.io.gfile.copy(source, str(temporary))


def _files(version: Path) -> Any:
    return _read(str(version / CARD))["files"]


def _read(path: str) -> Mapping[str, Any]:
    with tf.io.gfile.GFile(path) as file:
        content: Mapping[str, Any] = json.loads(file.read())
    return content


class Pusher(base_component.BaseComponent):
    """Push a blessed model into a folder that TF Serving watches, under a number that rises."""

    SPEC_CLASS = PusherSpec
    EXECUTOR_SPEC = executor_spec.ExecutorClassSpec(Executor)

    def __init__(
        self,
        model: types.BaseChannel,
        *,
        model_blessing: types.BaseChannel,
        report: types.BaseChannel,
        folder: str,
        there: Sequence[str] = (),
    ) -> None:
        """Make the component.

        Args:
            model: the candidate.
            model_blessing: of our evaluator.
            report: of the same.
            folder: where versions go.
            there: versions that are there now.
        """
        filesystem = pusher_pb2.PushDestination.Filesystem(base_directory=folder)
        spec = PusherSpec(
            model=model,
            model_blessing=model_blessing,
            report=report,
            push_destination=pusher_pb2.PushDestination(filesystem=filesystem),
            there=json.dumps(list(there)),
            pushed_model=types.Channel(type=standard_artifacts.PushedModel),
        )
        super().__init__(spec=spec)

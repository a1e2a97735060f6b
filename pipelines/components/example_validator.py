"""The TFX component that validates images and labels, and stops a pipeline whose examples are not what they should be.

It is TFX's ExampleValidator, which holds statistics against the schema, with a look at every image beside it; its
anomalies are where TFX and TensorFlow Data Validation look for them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from tensorflow_metadata.proto.v0 import anomalies_pb2
from tfx import types
from tfx.components.example_validator import executor as tfx_executor
from tfx.components.statistics_gen import stats_artifact_utils
from tfx.dsl.components.base import base_beam_component, base_beam_executor, executor_spec
from tfx.types import artifact_utils, standard_artifacts
from tfx.types.component_spec import ChannelParameter, ComponentSpec, ExecutionParameter
from tfx.utils import io_utils, writer_utils

from kerasdefense.data.records import ImageShape
from kerasdefense.types import InputError
from pipelines import inspection
from pipelines.anomalies import SHIFTED, Defect, defects_of, in_words, labels_of, tightened, validate
from pipelines.inspection import Inspected
from pipelines.label_shift import label_shifts

SHARES = "label_shares.json"
"""Images of each class by split, beside the anomalies: the reference of a later validation."""
LISTED = "anomalies.txt"
"""All anomalies in words, one a line, in the folder that outlives a failure."""

_NAMED = 3


class ImageExampleValidatorSpec(ComponentSpec):
    """Inputs, outputs and settings of the component."""

    PARAMETERS = {  # noqa: RUF012 (declared by the base class)
        "image_shape": ExecutionParameter(type=str),
        "classes": ExecutionParameter(type=int),
        "max_label_shift": ExecutionParameter(type=float),
        "state_dir": ExecutionParameter(type=str),
        "reference": ExecutionParameter(type=str),
    }
    INPUTS = {  # noqa: RUF012
        "examples": ChannelParameter(type=standard_artifacts.Examples),
        "statistics": ChannelParameter(type=standard_artifacts.ExampleStatistics),
        "schema": ChannelParameter(type=standard_artifacts.Schema),
    }
    OUTPUTS = {"anomalies": ChannelParameter(type=standard_artifacts.ExampleAnomalies)}  # noqa: RUF012


class Executor(base_beam_executor.BaseBeamExecutor):
    """Find anomalies, write them down, and raise where there are any."""

    def Do(  # noqa: N802 - TFX's name
        self,
        input_dict: dict[str, list[types.Artifact]],
        output_dict: dict[str, list[types.Artifact]],
        exec_properties: dict[str, Any],
    ) -> None:
        """Validate every split.

        Args:
            input_dict: `examples`, their `statistics` and a `schema`.
            output_dict: `anomalies`; TFX removes them where this raises.
            exec_properties: as the component's arguments, `image_shape` as JSON.

        Raises:
            InputError: there are anomalies; it names some, and where all of them are.
        """
        self._log_startup(input_dict, output_dict, exec_properties)
        classes, state_dir = exec_properties["classes"], exec_properties["state_dir"]
        examples, statistics, schema = (
            artifact_utils.get_single_instance(input_dict[name]) for name in ("examples", "statistics", "schema")
        )
        output = artifact_utils.get_single_instance(output_dict["anomalies"])
        found = self._inspect(examples, output.uri, json.loads(exec_properties["image_shape"]), classes)
        counts = {
            name: [each.label[label] for label in range(classes)] for name, each in found.items() if name != "unknown"
        }
        defects = {name: defects_of(each) for name, each in found.items()}
        for name, shift in label_shifts(
            counts, exec_properties["max_label_shift"], exec_properties["reference"]
        ).items():
            defects[name].append(Defect("label", shift, kind=SHIFTED))
        expected = io_utils.SchemaReader().read(io_utils.get_only_uri_in_dir(schema.uri))
        anomalies = {
            name: validate(
                stats_artifact_utils.load_statistics(statistics, name).proto(),
                tightened(expected, labels_of(name, classes)),
                defects[name],
            )
            for name in found
        }
        lines = {name: in_words(name, anomalies[name], defects[name]) for name in found}
        _describe(output, lines)
        _write(output.uri, anomalies, counts)
        listed = [line for each in lines.values() for line in each]
        if state_dir:
            _write(state_dir, anomalies, counts)
            io_utils.write_string_file(f"{state_dir}/{LISTED}", "".join(f"{line}\n" for line in listed))
        _stop_if_any(listed, f"{state_dir}/{LISTED}" if state_dir else "")

    def _inspect(
        self, examples: types.Artifact, folder: str, image_shape: ImageShape, classes: int
    ) -> dict[str, Inspected]:
        """Look at every example of every split, and keep what was found in a folder."""
        names = artifact_utils.decode_split_names(examples.split_names)
        targets = {name: f"{folder}/inspected-{name}.json" for name in names}
        with self._make_beam_pipeline() as pipeline:
            for name in names:
                files = f"{artifact_utils.get_split_uri([examples], name)}/*"
                look = inspection.Inspect(image_shape, labels_of(name, classes))
                inspection.inspect(pipeline, name, files, targets[name], look)
        return {name: inspection.read(target) for name, target in targets.items()}


class ImageExampleValidator(base_beam_component.BaseBeamComponent):
    """Validates examples of images, and fails where there is anything wrong with them.

    What is looked for: an image, a label or an index that is missing or of another type; an image that cannot be
    decoded or has another shape; a label of no class; classes in other shares than in the training images;
    and whatever else TFDV finds against the schema. Images of the split `unknown` have the label -1.
    """

    SPEC_CLASS = ImageExampleValidatorSpec
    EXECUTOR_SPEC = executor_spec.BeamExecutorSpec(Executor)

    def __init__(
        self,
        examples: types.BaseChannel,
        statistics: types.BaseChannel,
        schema: types.BaseChannel,
        *,
        image_shape: ImageShape,
        classes: int,
        max_label_shift: float = 0.1,
        state_dir: str = "",
        reference: str = "",
    ):
        """Describe the component, whose id is ExampleValidator.

        Args:
            examples: of ExampleGen.
            statistics: of StatisticsGen, on all of their splits.
            schema: of SchemaGen, or a curated one.
            image_shape: (height, width, channels) of every image.
            classes: number of classes.
            max_label_shift: total variation distance of the shares of classes that is let pass, in [0, 1].
            state_dir: folder where anomalies are kept after a failure too; empty = nowhere.
            reference: label_shares.json of an earlier validation, against which training images are held; empty = none.
        """
        spec = ImageExampleValidatorSpec(
            examples=examples,
            statistics=statistics,
            schema=schema,
            image_shape=json.dumps(list(image_shape)),
            classes=classes,
            max_label_shift=float(max_label_shift),
            state_dir=state_dir.rstrip("/"),
            reference=reference,
            anomalies=types.Channel(type=standard_artifacts.ExampleAnomalies),
        )
        super().__init__(spec=spec)
        self.with_id("ExampleValidator")


def _describe(output: types.Artifact, lines: Mapping[str, list[str]]) -> None:
    """Say in the artifact which splits it is of, and which of them are blessed, as TFX's ExampleValidator does."""
    blessed, not_blessed = tfx_executor.BLESSED_VALUE, tfx_executor.NOT_BLESSED_VALUE
    output.split_names = artifact_utils.encode_split_names(list(lines))
    output.set_json_value_custom_property(
        tfx_executor.ARTIFACT_PROPERTY_BLESSED_KEY,
        {name: not_blessed if each else blessed for name, each in lines.items()},
    )


def _write(folder: str, anomalies: Mapping[str, anomalies_pb2.Anomalies], counts: Mapping[str, list[int]]) -> None:
    for name, each in anomalies.items():
        writer_utils.write_anomalies(f"{folder}/Split-{name}/{tfx_executor.DEFAULT_FILE_NAME}", each)
    io_utils.write_string_file(f"{folder}/{SHARES}", json.dumps(counts, sort_keys=True))


def _stop_if_any(listed: list[str], path: str) -> None:
    """Print every anomaly, and raise an InputError where there are any."""
    for line in listed:
        print(f"ExampleValidator: {line}")
    if listed:
        more = f"; and {len(listed) - _NAMED} more" if len(listed) > _NAMED else ""
        raise InputError(f"examples are not valid: {'; '.join(listed[:_NAMED])}{more}{path and f'; all are in {path}'}")

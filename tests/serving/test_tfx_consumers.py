"""What is exported, read by TFX: BulkInferrer's logs and TensorFlow Model Analysis agree with the model itself."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf
import tensorflow_model_analysis as tfma
from apache_beam.options.pipeline_options import PipelineOptions
from tensorflow_serving.apis import prediction_log_pb2
from tfx.components.bulk_inferrer.executor import Executor
from tfx.dsl.components.base.base_beam_executor import BaseBeamExecutor
from tfx.proto import bulk_inferrer_pb2
from tfx.types import artifact_utils, standard_artifacts
from tfx.utils import proto_utils

from pipelines.pipeline import eval_config

from .conftest import example

IN_MEMORY = ["--runner=DirectRunner", "--direct_running_mode=in_memory", "--direct_num_workers=1"]


def write(path, rows):
    path.parent.mkdir(parents=True)
    with tf.io.TFRecordWriter(str(path), "GZIP") as writer:
        for row in rows:
            writer.write(row)


def artifact(kind, uri, names=None):
    made = kind()
    made.uri = str(uri)
    if names is not None:
        made.split_names = artifact_utils.encode_split_names(names)
    return made


@pytest.fixture(params=[pytest.param("", marks=pytest.mark.slow), "mahalanobis"], ids=["alone", "with_detector"])
def exported_defense(exported_defenses, request):
    return exported_defenses(request.param)


@pytest.fixture
def infer(exported_defense, tmp_path):
    """Return what has BulkInferrer ask the signature `examples`; it returns outputs by name, by serialised example."""

    def infer(rows):
        write(tmp_path / "examples/Split-eval/data_tfrecord-00000-of-00001.gz", rows)
        (tmp_path / "model").mkdir()
        (tmp_path / "model/Format-Serving").symlink_to(exported_defense.version)
        model = artifact(standard_artifacts.Model, tmp_path / "model")
        model.set_string_custom_property("tfx_version", "1.15.1")
        inputs = {
            "examples": [artifact(standard_artifacts.Examples, tmp_path / "examples", ["eval"])],
            "model": [model],
        }
        asked = bulk_inferrer_pb2.ModelSpec(model_signature_name=["examples"])
        properties = {
            "model_spec": proto_utils.proto_to_json(asked),
            "data_spec": proto_utils.proto_to_json(bulk_inferrer_pb2.DataSpec()),
        }
        outputs = {"inference_result": [artifact(standard_artifacts.InferenceResult, tmp_path / "found")]}
        context = BaseBeamExecutor.Context(beam_pipeline_args=IN_MEMORY, tmp_dir=str(tmp_path), unique_id="1")
        Executor(context).Do(inputs, outputs, properties)
        return dict(logged(tmp_path / "found"))

    return infer


def logged(folder):
    """Yield the input and the outputs of every prediction that BulkInferrer logged."""
    for record in tf.data.TFRecordDataset([str(path) for path in folder.glob("*.gz")], "GZIP"):
        log = prediction_log_pb2.PredictionLog.FromString(record.numpy()).predict_log
        (row,) = tf.make_ndarray(log.request.inputs["examples"])
        yield row, {name: tf.make_ndarray(each)[0] for name, each in log.response.outputs.items()}


def test_bulk_inferrer_logs_what_the_model_says_and_goes_on_past_what_is_no_image(exported_defense, infer):
    rows, broken = exported_defense.examples, example(b"no image", 1)
    found = infer([*rows[:2], broken, *rows[2:]])
    told = found.pop(broken)
    assert set(found) == set(rows)
    exported_defense.check({name: np.array([found[row][name] for row in rows]) for name in told}, has_names=False)
    assert {name: told[name] for name in ("valid", "accepted", "label")} == {
        "valid": False,
        "accepted": False,
        "label": -1,
    }


def test_model_analysis_finds_the_accuracy_of_the_model_and_of_each_class(exported_defense, tmp_path):
    write(tmp_path / "data/examples-00000-of-00001.gz", exported_defense.examples)
    asked = eval_config(0.0)
    found = tfma.run_model_analysis(
        eval_shared_model=tfma.default_eval_shared_model(str(exported_defense.version), eval_config=asked),
        eval_config=asked,
        data_location=str(tmp_path / "data/*"),
        output_path=str(tmp_path / "analysis"),
        pipeline_options=PipelineOptions(IN_MEMORY),
    )
    is_right = exported_defense.expected()["label"] == exported_defense.label
    assert is_right.mean() == 0.75
    expected = {(): is_right} | {
        (("label", label),): is_right[exported_defense.label == label] for label in set(exported_defense.label.tolist())
    }
    for of_slice, right in expected.items():
        metrics = found.get_metrics_for_slice(of_slice)
        assert metrics["sparse_categorical_accuracy"]["doubleValue"] == pytest.approx(right.mean(), abs=1e-6)
        assert metrics["example_count"]["doubleValue"] == len(right)

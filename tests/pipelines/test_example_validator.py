import io
import json

import numpy as np
import pytest
import sklearn.datasets
import tensorflow as tf
import tensorflow_data_validation as tfdv
from PIL import Image
from tensorflow_data_validation.statistics import stats_impl
from tensorflow_metadata.proto.v0 import anomalies_pb2
from tfx.components import ImportExampleGen, SchemaGen, StatisticsGen
from tfx.dsl.component.experimental.annotations import InputArtifact
from tfx.dsl.component.experimental.decorators import component
from tfx.dsl.components.base.base_beam_executor import BaseBeamExecutor
from tfx.orchestration import metadata
from tfx.orchestration.local.local_dag_runner import LocalDagRunner
from tfx.orchestration.pipeline import Pipeline
from tfx.proto import example_gen_pb2
from tfx.types import artifact_utils, standard_artifacts
from tfx_bsl.coders.example_coder import ExamplesToRecordBatchDecoder

from kerasdefense.types import InputError
from pipelines.components.example_validator import Executor, ImageExampleValidator
from pipelines.inspection import Inspect, Sum

SHAPE = (8, 8, 1)
IN_MEMORY = ["--runner=DirectRunner", "--direct_running_mode=in_memory", "--direct_num_workers=1"]


def png(pixels):
    encoded = io.BytesIO()
    Image.fromarray(pixels).save(encoded, "PNG")
    return encoded.getvalue()


def feature(value):
    if isinstance(value, bytes):
        return tf.train.Feature(bytes_list=tf.train.BytesList(value=[value]))
    return tf.train.Feature(int64_list=tf.train.Int64List(value=np.atleast_1d(value)))


def example(**values):
    features = {name: feature(value) for name, value in values.items() if value is not None}
    return tf.train.Example(features=tf.train.Features(feature=features)).SerializeToString()


def digits(split):
    """Return feature values of the 300 first digits as training images, and of 200 others for the evaluation."""
    bunch = sklearn.datasets.load_digits()
    images, labels = (bunch.images * 15).astype(np.uint8), bunch.target
    chosen = range(300) if split == "train" else range(1000, 1200)
    return [{"image": png(images[place]), "label": labels[place], "index": place} for place in chosen]


def write(folder, splits, prefix="Split-"):
    for name, rows in splits.items():
        path = folder / f"{prefix}{name}" / "data_tfrecord-00000-of-00001.gz"
        path.parent.mkdir(parents=True)
        with tf.io.TFRecordWriter(str(path), "GZIP") as writer:
            for row in rows:
                writer.write(example(**row))


def statistics_of(rows):
    """Return what StatisticsGen finds, without Beam."""
    batch = ExamplesToRecordBatchDecoder().DecodeBatch([example(**row) for row in rows])
    return stats_impl.generate_statistics_in_memory(batch, tfdv.StatsOptions())


def artifact(kind, uri, names=None):
    made = kind()
    made.uri = str(uri)
    if names is not None:
        made.split_names = artifact_utils.encode_split_names(names)
    return made


@pytest.fixture
def validate(tmp_path):
    """Run the executor on splits of examples; return the anomalies' folder and artifact."""

    def run(splits, *, most=0.1, reference=""):
        names = list(splits)
        write(tmp_path / "examples", splits)
        statistics = {}
        for name in names:
            statistics[name] = statistics_of(splits[name])
            target = tmp_path / "statistics" / f"Split-{name}" / "FeatureStats.pb"
            target.parent.mkdir(parents=True)
            target.write_bytes(statistics[name].SerializeToString())
        (tmp_path / "schema").mkdir()
        schema = tfdv.infer_schema(statistics["train"], infer_feature_shape=True)
        tfdv.write_schema_text(schema, str(tmp_path / "schema" / "schema.pbtxt"))
        output = artifact(standard_artifacts.ExampleAnomalies, tmp_path / "anomalies")
        context = BaseBeamExecutor.Context(beam_pipeline_args=IN_MEMORY, tmp_dir=str(tmp_path), unique_id="1")
        given = artifact(standard_artifacts.ExampleStatistics, tmp_path / "statistics", names)
        given.set_string_custom_property("tfx_version", "1.15.1")
        inputs = {
            "examples": [artifact(standard_artifacts.Examples, tmp_path / "examples", names)],
            "statistics": [given],
            "schema": [artifact(standard_artifacts.Schema, tmp_path / "schema")],
        }
        properties = {
            "image_shape": json.dumps(SHAPE),
            "classes": 10,
            "max_label_shift": most,
            "state_dir": str(tmp_path / "state"),
            "reference": reference,
        }
        Executor(context).Do(inputs, {"anomalies": [output]}, properties)
        return output

    return run


def anomalies_in(folder, split):
    found = anomalies_pb2.Anomalies()
    found.ParseFromString((folder / f"Split-{split}" / "SchemaDiff.pb").read_bytes())
    return found


def looked_at(*, labels=(0, 9), **values):
    row = {**digits("eval")[0], **values}
    return next(Inspect(SHAPE, labels).process(example(**row)))


def test_images_of_unknown_classes_are_looked_at_and_their_label_is_minus_one(tmp_path):
    assert looked_at(labels=(-1, -1), label=-1).defects == {}
    assert list(looked_at(labels=(-1, -1), label=4).defects) == [("label", "label 4 is outside -1")]


@pytest.mark.parametrize(
    ("values", "defects"),
    [
        ({}, []),
        ({"label": 9}, []),
        ({"image": None}, [("image", "has no value")]),
        ({"label": None}, [("label", "has no value")]),
        ({"index": None}, [("index", "has no value")]),
        ({"label": [1, 2]}, [("label", "has 2 values instead of one")]),
        ({"label": b"seven"}, [("label", "has a bytes_list instead of an int64_list")]),
        ({"label": 10}, [("label", "label 10 is outside 0..9")]),
        ({"label": -1}, [("label", "label -1 is outside 0..9")]),
        ({"image": b"no image"}, [("image", "not a readable image")]),
        ({"image": png(np.zeros((8, 8), np.uint8))[:-20]}, [("image", "not a readable image")]),
        ({"image": png(np.zeros((9, 8), np.uint8))}, [("image", "is 9x8 instead of 8x8 pixels")]),
        ({"image": png(np.zeros((8, 8, 3), np.uint8))}, [("image", "is in colour, with 1 channels wanted")]),
    ],
)
def test_each_defect_is_seen_and_named_by_its_example(values, defects):
    found = looked_at(**values)
    assert list(found.defects) == defects
    number = [-1 if "index" in values else 1000]
    assert found.named == dict.fromkeys(defects, number)
    label = digits("eval")[0]["label"] if "label" not in values else values["label"]
    assert dict(found.label) == ({label: 1} if isinstance(label, (int, np.integer)) else {})


def test_sums_name_the_lowest_numbers_whatever_the_bundles():
    found = [looked_at(label=99, index=number) for number in (7, 3, 9, 1, 8, 5, 2)]
    adding = Sum()
    parts = [adding.add_input(adding.create_accumulator(), each) for each in found]
    total = adding.extract_output(adding.merge_accumulators([adding.merge_accumulators(parts[:4]), *parts[4:]]))
    defect = ("label", "label 99 is outside 0..9")
    assert (total.examples, total.label, total.defects) == (7, {99: 7}, {defect: 7})
    assert total.named == {defect: [1, 2, 3, 5, 7]}


def test_clean_examples_pass(validate, tmp_path, capsys):
    unknown = [{**row, "label": -1} for row in digits("eval")[:30]]
    output = validate({"train": digits("train"), "eval": digits("eval"), "unknown": unknown})
    for folder in (tmp_path / "anomalies", tmp_path / "state"):
        for split in ("train", "eval", "unknown"):
            assert not anomalies_in(folder, split).anomaly_info
        counts = json.loads((folder / "label_shares.json").read_text())
        assert counts["eval"] == np.bincount([row["label"] for row in digits("eval")]).tolist()
        assert list(counts) == ["eval", "train"]
    assert (tmp_path / "state" / "anomalies.txt").read_text() == ""
    assert output.get_json_value_custom_property("blessed") == {"train": 1, "eval": 1, "unknown": 1}
    assert json.loads(output.split_names) == ["train", "eval", "unknown"]
    assert capsys.readouterr().out == ""


def test_anomalies_are_written_printed_and_raised(validate, tmp_path, capsys):
    train, held = digits("train"), digits("eval")
    train[4]["label"] = train[17]["label"] = None
    train[30]["image"] = png(np.zeros((8, 9), np.uint8))
    held[3]["image"] = b"no image"
    held[5]["label"] = 12
    held[6]["photographer"] = b"Ann"
    with pytest.raises(InputError) as error:
        validate({"train": train, "eval": held})
    listed = (tmp_path / "state" / "anomalies.txt").read_text().splitlines()
    assert listed[:4] == [
        "train: label has no value (2 examples: index 4, 17)",
        "train: image is 8x9 instead of 8x8 pixels (1 example: index 30)",
        "eval: image not a readable image (1 example: index 1003)",
        "eval: label label 12 is outside 0..9 (1 example: index 1005)",
    ]
    assert len(listed) == 5 and listed[4].startswith("eval: photographer: New column")
    assert capsys.readouterr().out == "".join(f"ExampleValidator: {line}\n" for line in listed)
    assert str(error.value) == (
        f"examples are not valid: {'; '.join(listed[:3])}; and 2 more; all are in {tmp_path}/state/anomalies.txt"
    )
    label = anomalies_in(tmp_path / "state", "train").anomaly_info["label"]
    assert label.severity == anomalies_pb2.AnomalyInfo.ERROR
    assert "index 4, 17" in label.description
    assert len(label.reason) >= 2  # what TFDV sees in the statistics, and the examples by number
    assert "label" in anomalies_in(tmp_path / "anomalies", "eval").anomaly_info


def test_labels_that_are_shifted_are_an_anomaly(validate, tmp_path):
    held = [row for row in digits("eval") if row["label"] < 3]
    with pytest.raises(InputError, match=r"examples are not valid: eval: label of class . has a share of 3[0-9.]+%"):
        validate({"train": digits("train"), "eval": held})
    info = anomalies_in(tmp_path / "state", "eval").anomaly_info["label"]
    assert [reason.type for reason in info.reason] == [anomalies_pb2.AnomalyInfo.COMPARATOR_L_INFTY_HIGH]


def test_split_without_examples_is_an_anomaly(validate):
    with pytest.raises(InputError, match="eval: has no examples"):
        validate({"train": digits("train"), "eval": []})


@component
def Reached(examples: InputArtifact[standard_artifacts.Examples]):  # noqa: N802
    """Stand for a trainer."""
    raise AssertionError(f"reached with {examples.uri}")


@pytest.mark.slow
def test_pipeline_stops_before_what_comes_after_validation(tmp_path):
    held = digits("eval")
    held[3]["label"] = None
    write(tmp_path / "set", {"train": digits("train"), "eval": held}, prefix="")
    splits = [example_gen_pb2.Input.Split(name=name, pattern=f"{name}/*") for name in ("train", "eval")]
    gen = ImportExampleGen(input_base=str(tmp_path / "set"), input_config=example_gen_pb2.Input(splits=splits))
    statistics = StatisticsGen(examples=gen.outputs["examples"])
    schema = SchemaGen(statistics=statistics.outputs["statistics"], infer_feature_shape=True)
    validator = ImageExampleValidator(
        gen.outputs["examples"],
        statistics.outputs["statistics"],
        schema.outputs["schema"],
        image_shape=SHAPE,
        classes=10,
        state_dir=str(tmp_path / "state"),
    )
    after = Reached(examples=gen.outputs["examples"])
    after.add_upstream_node(validator)
    store = str(tmp_path / "metadata.sqlite")
    pipeline = Pipeline(
        pipeline_name="broken",
        pipeline_root=str(tmp_path / "root"),
        components=[gen, statistics, schema, validator, after],
        metadata_connection_config=metadata.sqlite_metadata_connection_config(store),
        beam_pipeline_args=IN_MEMORY,
    )
    with pytest.raises(InputError, match=r"eval: label has no value \(1 example: index 1003\); all are in"):
        LocalDagRunner().run(pipeline)
    assert "index 1003" in anomalies_in(tmp_path / "state", "eval").anomaly_info["label"].description
    with metadata.Metadata(metadata.sqlite_metadata_connection_config(store)) as handle:
        types = {each.id: each.name for each in handle.store.get_execution_types()}
        ran = {types[each.type_id] for each in handle.store.get_executions()}
    assert {name.rsplit(".", 1)[-1] for name in ran} == {
        "ImportExampleGen",
        "StatisticsGen",
        "SchemaGen",
        "ImageExampleValidator",
    }

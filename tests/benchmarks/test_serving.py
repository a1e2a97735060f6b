from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf

from benchmarks import __main__ as benchmark
from benchmarks import groups, serving
from benchmarks.serving import BATCH_SIZES, ServingCase
from benchmarks.timing import Timing
from benchmarks.training_step import Measurement

SIGNATURES, SIZES = (group for group in groups.GROUPS if group.kind == "serving")
CASES = (ServingCase(groups.TINY_CNN), ServingCase(groups.TINY_CNN, detector="mahalanobis"))


def measurement(**milliseconds):
    """Return what would be measured if a call of the defended path took 10 ms, and decoding 5."""
    times = {"path": 10.0, "decoding": 5.0, "serving_default": 10.0, "image_bytes": 15.0, **milliseconds}
    seconds = {name: [value / 1000] * 3 for name, value in times.items()}
    return Measurement(Timing(seconds, seconds), {})


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_floor_gives_what_the_signatures_give_and_no_more(case):
    defense, reject = case.make()
    signatures, image = serving.signatures_of(defense, reject), case.images(6)
    files = [tf.io.encode_png(each) for each in np.rint(255 * image).astype(np.uint8)]
    floor = serving.defended_path(defense, reject)(tf.constant(image))
    assert len(floor) == (2 if case.detector else 1)
    for outputs in (signatures["serving_default"](image=image), signatures["image_bytes"](image_bytes=files)):
        assert outputs["valid"].numpy().all()
        for name, each in zip(("logits", "anomaly_score"), floor):
            np.testing.assert_allclose(outputs[name], each, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("measured", "missed"),
    [
        (measurement(), []),
        (measurement(serving_default=10.5, image_bytes=16.0), []),
        (measurement(serving_default=10.6), ["serving_default: ours/floor is 1.06, must be at most 1.05"]),
        (measurement(image_bytes=15.9), ["image_bytes: ours/floor is 1.06, must be at most 1.05"]),
    ],
)
def test_benchmark_fails_exactly_where_a_signature_adds_more_than_it_may(monkeypatch, capsys, measured, missed):
    monkeypatch.setattr(benchmark, "GROUPS", (SIGNATURES._replace(measure=lambda case, rounds: measured),))
    assert benchmark.main(["--quick", "--only=serving"]) == (1 if missed else 0)
    assert capsys.readouterr().err.splitlines() == [f"with mahalanobis, {miss}" for miss in missed]


def test_rows_of_signatures_tell_decoding_apart():
    of_images, of_files = serving.rows_of_signatures(CASES[0], measurement(serving_default=11.0, image_bytes=20.0))
    assert of_images["decoding_ms"] == 0 and of_images["over_floor"] == pytest.approx(1.1)
    assert of_files["decoding_ms"] == pytest.approx(5) and of_files["floor_ms"] == pytest.approx(16)
    for row in (of_images, of_files):
        assert row["over_floor"] == pytest.approx(row["over_floor_processor"])
        assert row["images_per_second"] == pytest.approx(1000 * 4 / row["ours_ms"])


def test_rows_of_sizes_tell_the_median_and_the_slowest_in_a_hundred():
    seconds = {f"batch {size}": [size / 1000] * 98 + [1.0] * 2 for size in BATCH_SIZES}
    rows = serving.rows_of_batch_sizes(CASES[0], Measurement(Timing(seconds, seconds), {}))
    assert [row["strategy"] for row in rows] == ["batch 1", "batch 8", "batch 32", "batch 128"]
    for size, row in zip(BATCH_SIZES, rows):
        assert (row["p50_ms"], row["p99_ms"]) == (pytest.approx(size), pytest.approx(1000))
        assert row["images_per_second"] == pytest.approx(1000)


def test_served_models_are_measured_with_and_without_detector():
    for group in (SIGNATURES, SIZES):
        assert {case.name for case in group.cases} == {"with mahalanobis", "without detector"}
        assert {(case.model_name, case.model.batch_size) for case in group.cases} == {("resnet8-16 32x32x3", 32)}

"""The assertion and the validation metric for other projects, on linear models whose robust accuracy is known."""

from __future__ import annotations

import dataclasses

import keras
import numpy as np
import pytest
import tensorflow as tf

from kerasdefense import PGD
from kerasdefense.evaluation import (
    SUITES,
    Options,
    PlannedAttack,
    RobustValidation,
    ThreatModel,
    assert_robust,
    evaluate,
    sanity,
    testing,
)
from kerasdefense.evaluation.batches import as_batches, first_images
from kerasdefense.evaluation.models import as_paths
from kerasdefense.types import InputError, UsageError

layers = keras.layers
EPSILON = 0.05
_random = np.random.default_rng(0)
WEIGHTS = _random.normal(size=[64, 2]).astype("float32")
IMAGES = _random.uniform(0.1, 0.9, size=[60, 8, 8, 1]).astype("float32")
MARGIN = IMAGES.reshape(-1, 64) @ (WEIGHTS[:, 0] - WEIGHTS[:, 1])
LABELS = np.int64(MARGIN < 0)
LABELS[::10] = 1 - LABELS[::10]
# In linf the corner of the ball that lowers the margin most lies inside the box.
IS_ROBUST = (np.abs(MARGIN) > EPSILON * np.abs(WEIGHTS[:, 0] - WEIGHTS[:, 1]).sum()) & ((MARGIN < 0) == LABELS)
EXACT = float(IS_ROBUST.mean())


@pytest.fixture(autouse=True)
def same_start(monkeypatch):
    """Fix the initial weights, and leave three radii of the security curve, those that items of the battery ask for."""
    keras.utils.set_random_seed(0)
    monkeypatch.setattr(sanity, "LEVELS", (0, 128))


def linear(image):
    return tf.reshape(image, [-1, 64]) @ WEIGHTS


def make_model(*end):
    """A trainable model whose dropout and batch normalisation tell training from inference."""
    first = [keras.Input((8, 8, 1)), layers.Conv2D(3, 3, strides=2), layers.BatchNormalization(), layers.ReLU()]
    return keras.Sequential([*first, layers.Flatten(), layers.Dropout(0.2), *(end or [layers.Dense(2)])])


def compiled(model, *, from_logits=True, learning_rate=0.05):
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=from_logits)
    model.compile(keras.optimizers.SGD(learning_rate), loss)
    return model


def computed(model, *, outputs="logits", norm="linf", epsilon=EPSILON, steps=10):
    """Return robust and clean accuracy as an evaluation gives them."""
    threat_model = ThreatModel(norm, epsilon)
    suite = [PlannedAttack("pgd", PGD(*threat_model, steps=steps))]
    paths, batches = as_paths(model, outputs=outputs).attack_paths, as_batches((IMAGES, LABELS))
    results = evaluate(paths, batches, threat_model, suite, options=Options(), sanity_examples=0)
    return results["robust_accuracy"]["value"], results["clean_accuracy"]["value"]


# The assertion.


def test_linear_model_has_the_robust_accuracy_that_is_required():
    assert 0.2 < EXACT < 0.8
    results = assert_robust(linear, (IMAGES, LABELS[:, None]), epsilon=EPSILON, at_least=EXACT)
    assert results["robust_accuracy"]["value"] == EXACT and results["trusted"]
    assert results["clean_accuracy"]["value"] == 0.9


def test_model_file_that_falls_short_fails_in_one_line_with_all_figures(tmp_path, monkeypatch):
    monkeypatch.setattr(testing, "_SANITY_EXAMPLES", 0)
    dense = layers.Dense(2, use_bias=False)
    model = keras.Sequential([keras.Input((8, 8, 1)), layers.Flatten(), dense])
    dense.set_weights([WEIGHTS])
    model.save(tmp_path / "linear.keras")
    share = 100 * IS_ROBUST[:40].mean()
    required = (share + 1) / 100
    with pytest.raises(AssertionError) as caught:
        assert_robust(tmp_path / "linear.keras", (IMAGES, LABELS), epsilon=EPSILON, at_least=required, examples=40)
    begin, rest = str(caught.value).split(" (95 % interval ")
    assert begin == f"robust accuracy {share:.1f} %"
    interval, rest = rest.split(", n = 40), ")
    low, high = (float(each) for each in interval.removesuffix(" %").split(" to "))
    assert low < share < high
    assert rest == (
        f"required {share + 1:.1f} % in the linf ball of radius 0.05; "
        f"worst attack of the suite quick: fgsm ({share:.1f} %)"
    )


def test_model_that_masks_its_gradients_fails_whatever_its_accuracy(monkeypatch):
    monkeypatch.setattr(sanity, "LEVELS", ())
    monkeypatch.setitem(SUITES, "quick", dataclasses.replace(SUITES["quick"], checks=("S10",)))

    def masked(image):
        return linear(tf.round(255 * image) / 255)

    with pytest.raises(
        AssertionError, match=r"; not to be trusted, S10 failed: no input gradient is all .*\(1, must be at most "
    ):
        assert_robust(masked, (IMAGES[:24], LABELS[:24]), epsilon=EPSILON, at_least=0)


@pytest.mark.parametrize(
    "model, data, at_least, error, message",
    [
        (linear, (IMAGES, LABELS), 41, UsageError, r"at_least is an accuracy in \[0, 1\], not 41"),
        ("missing.keras", (IMAGES, LABELS), 0.4, InputError, "missing.keras: no such file or folder"),
        (
            make_model(),
            (IMAGES[:, :4], LABELS),
            0.4,
            InputError,
            r"wrong image shape: .*those of the data are \(4, 8, 1\)",
        ),
        (linear, (255 * IMAGES, LABELS), 0.4, InputError, r"scale images to \[0, 1\]"),
    ],
)
def test_what_cannot_be_asserted_is_refused(model, data, at_least, error, message):
    with pytest.raises(error, match=message):
        assert_robust(model, data, epsilon=EPSILON, at_least=at_least)


# Data.


def dataset(element, *, batch_size=0):
    made = tf.data.Dataset.from_tensor_slices(element)
    return made.batch(batch_size) if batch_size else made


@pytest.mark.parametrize(
    "data, first",
    [
        ([IMAGES, LABELS[:, None]], 0),
        (dataset((IMAGES, LABELS)), 0),
        (dataset((IMAGES, LABELS[:, None]), batch_size=7), 0),
        (dataset({"image": IMAGES, "label": LABELS, "name": LABELS}, batch_size=7), 0),
        (dataset({"image": IMAGES, "label": LABELS, "index": np.arange(5, 65)}), 5),
    ],
)
def test_arrays_and_datasets_give_the_same_images(data, first):
    for examples in (0, 23):
        chunk = first_images(as_batches(data), examples)
        count = examples or 60
        np.testing.assert_array_equal(chunk.image, IMAGES[:count])
        np.testing.assert_array_equal(chunk.label, LABELS[:count])
        np.testing.assert_array_equal(chunk.index, first + np.arange(count))


@pytest.mark.parametrize(
    "data, message",
    [
        (IMAGES, r"data must be a pair \(image, label\), or a dataset of"),
        (dataset((IMAGES, LABELS, LABELS)), r"data must be a pair"),
        (dataset({"image": IMAGES}), r"data must be a pair"),
        ((IMAGES, LABELS[:7]), r"labels \[n\] are needed, not \(60, 8, 8, 1\) and \(7,\)"),
        ((IMAGES[..., 0], LABELS), r"images \[n, height, width, channels\] .* not \(60, 8, 8\)"),
        ((IMAGES, np.eye(2)[LABELS]), r"class numbers \[n\], not \(None, 2\); of one-hot labels take the argmax"),
        (dataset((IMAGES[:, 0, 0, 0], LABELS), batch_size=2), r"images must be \[n, height, width, channels\]"),
        ((IMAGES[:0], LABELS[:0]), "there are no images"),
    ],
)
def test_other_data_are_refused(data, message):
    with pytest.raises(InputError, match=message):
        first_images(as_batches(data), 0)


# The metric.


def test_metric_of_a_linear_model_is_its_exact_robust_accuracy():
    dense = layers.Dense(2, use_bias=False)
    model = compiled(keras.Sequential([keras.Input((8, 8, 1)), layers.Flatten(), dense]), learning_rate=0.0)
    dense.set_weights([WEIGHTS])
    validation = RobustValidation((IMAGES, LABELS), epsilon=EPSILON)
    logs = model.fit(IMAGES, LABELS, callbacks=[validation], verbose=0).history
    assert logs["robust_accuracy"] == [EXACT] and logs["robust_clean_accuracy"] == [0.9]


@pytest.mark.parametrize("outputs", ["logits", "probabilities"])
def test_metric_is_that_of_an_evaluation_and_leaves_the_model_as_it_was(outputs):
    keras.utils.set_random_seed(1)
    end = layers.Dense(2, activation="softmax" if outputs == "probabilities" else None)
    model = compiled(make_model(end), from_logits=outputs == "logits")
    seen = []

    class Witness(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            variables = [*self.model.variables, *self.model.optimizer.variables]
            seen.append([variable.numpy() for variable in variables])

    validation = RobustValidation((IMAGES, LABELS), epsilon=0.02, steps=4, outputs=outputs)
    logs = model.fit(IMAGES, LABELS, epochs=2, callbacks=[Witness(), validation, Witness()], verbose=0).history
    for before, after in (seen[:2], seen[2:]):
        for one, two in zip(before, after):
            np.testing.assert_array_equal(one, two)
    found = logs["robust_accuracy"][-1], logs["robust_clean_accuracy"][-1]
    assert found == computed(model, outputs=outputs, epsilon=0.02, steps=4) and 0 < found[0] < found[1]


def test_model_is_traced_for_the_first_epoch_only():
    class Counting(keras.Model):
        def __init__(self):
            super().__init__()
            self.dense, self.flatten, self.traces = layers.Dense(2), layers.Flatten(), 0

        def call(self, image):
            self.traces += 1
            return self.dense(self.flatten(image))

    model = compiled(Counting())
    traces = keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: logs.update(traces=model.traces))
    validation = RobustValidation((IMAGES, LABELS), epsilon=EPSILON, steps=2, examples=20)
    logs = model.fit(IMAGES, LABELS, epochs=3, callbacks=[validation, traces], verbose=0).history
    assert len(set(logs["traces"])) == 1
    before = model.traces
    model.fit(IMAGES, LABELS, callbacks=[validation], verbose=0)
    assert model.traces == before


def test_early_stopping_and_checkpoints_go_by_the_metric(tmp_path):
    end = [layers.Flatten(), layers.Dense(2, activation="softmax")]
    model = compiled(keras.Sequential([keras.Input((8, 8, 1)), *end]), from_logits=False, learning_rate=0.0)
    validation = RobustValidation((IMAGES, LABELS), epsilon=0.01, steps=2, outputs="probabilities")
    stopping = keras.callbacks.EarlyStopping(monitor="robust_accuracy", patience=2)
    files = str(tmp_path / "{epoch}.keras")
    saving = keras.callbacks.ModelCheckpoint(files, monitor="robust_accuracy", save_best_only=True)
    logs = model.fit(IMAGES, LABELS, epochs=9, callbacks=[validation, stopping, saving], verbose=0).history
    assert len(set(logs["robust_accuracy"])) == 1 and stopping.stopped_epoch == 2  # nothing gets better
    assert stopping.monitor_op is saving.monitor_op is np.greater
    assert [path.name for path in tmp_path.iterdir()] == ["1.keras"]
    saved = keras.models.load_model(tmp_path / "1.keras")
    np.testing.assert_array_equal(saved(IMAGES), model(IMAGES))  # with its softmax


def test_metric_comes_every_few_epochs():
    class Record(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            has_metric.append("robust_accuracy" in logs)

    has_metric = []
    validation = RobustValidation(dataset((IMAGES, LABELS)), epsilon=EPSILON, steps=1, examples=8, every=2)
    compiled(make_model()).fit(IMAGES, LABELS, epochs=4, callbacks=[validation, Record()], verbose=0)
    assert has_metric == [False, True, False, True]


@pytest.mark.parametrize(
    "end, label, settings, message",
    [
        (None, LABELS + 1, {}, "validation labels go from 1 to 2, but the model has classes 0 to 1"),
        (None, LABELS, {"outputs": "probabilities"}, "does not return probabilities"),
        ([layers.Dense(2, activation="softmax")], LABELS, {}, "probabilities"),
    ],
)
def test_model_that_cannot_be_attacked_is_refused_before_training(end, label, settings, message):
    model = compiled(make_model(*(end or [])))
    before = model.get_weights()
    with pytest.raises(InputError, match=message):
        model.fit(IMAGES, LABELS, callbacks=[RobustValidation((IMAGES, label), epsilon=0.1, **settings)], verbose=0)
    for one, two in zip(before, model.get_weights()):
        np.testing.assert_array_equal(one, two)


@pytest.mark.parametrize("settings", [{"every": 0}, {"examples": -1}, {"norm": "l3"}, {"epsilon": -1}, {"steps": 0}])
def test_settings_that_make_no_sense_are_refused(settings):
    with pytest.raises(UsageError):
        RobustValidation((IMAGES, LABELS), **{"epsilon": 0.1, **settings})

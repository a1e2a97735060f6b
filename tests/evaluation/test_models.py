"""Classifiers of every origin as what an evaluation takes, and everything that is none."""

from __future__ import annotations

import shutil
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf

from kerasdefense import PGD, Standard
from kerasdefense.backbones import small_cnn, with_orthogonal_head
from kerasdefense.defenses import DFA
from kerasdefense.evaluation import PlannedAttack, ThreatModel, evaluate
from kerasdefense.evaluation.models import Loaded, as_paths, check_fits, load_model
from kerasdefense.types import InputError, UsageError

layers = keras.layers
pytestmark = pytest.mark.filterwarnings("ignore:You are saving your model as an HDF5:UserWarning")
PUBLISHED = Path(__file__).parents[2] / "saved_models/pgd_at_cifar10_mini"
IMAGE = np.random.default_rng(0).uniform(size=(3, 4, 4, 3)).astype("float32")


def answer(loaded, image=IMAGE, path="exact"):
    return loaded.attack_paths[path](tf.constant(image), tf.zeros([len(image), 2], tf.int32)).numpy()


def gradient(loaded):
    image = tf.constant(IMAGE)
    with tf.GradientTape() as tape:
        tape.watch(image)
        score = tf.reduce_sum(loaded.attack_paths["exact"](image, tf.zeros([3, 2], tf.int32))[:, 1])
    return tape.gradient(score, image).numpy()


def make_model(*end, classes=5):
    """A functional model whose dropout and batch normalisation tell training from inference."""
    image = keras.Input((4, 4, 3), name="picture")
    tensor = layers.BatchNormalization()(layers.Conv2D(4, 3, activation="relu")(layers.Rescaling(2.0, -1.0)(image)))
    tensor = layers.Dropout(0.5)(layers.Flatten()(tensor))
    for layer in end or (layers.Dense(classes),):
        tensor = layer(tensor)
    return keras.Model(image, tensor, name="mine")


class Subclassed(keras.Model):
    def __init__(self):
        super().__init__()
        self.flatten, self.dense = layers.Flatten(), layers.Dense(5)

    def call(self, image):
        return self.dense(self.flatten(image))


class Exported(tf.Module):
    """A SavedModel without Keras, of the outputs and with the input that a test needs."""

    def __init__(self, outputs, *specs):
        super().__init__()
        self.weight = tf.Variable(tf.random.stateless_normal([48, 5], [1, 2]))
        self.serve = tf.function(lambda *images: outputs(*images, self.weight), input_signature=specs)

    def save(self, folder, name="serving_default"):
        tf.saved_model.save(self, str(folder), signatures={name: self.serve})
        return folder


def spec(*shape, dtype=tf.float32, name="image"):
    return tf.TensorSpec(shape, dtype, name)


PIXELS = spec(None, 4, 4, 3)


def linear(image, weight):
    return {"logits": tf.reshape(image, [-1, 48]) @ weight}


def make_defense():
    backbone = small_cnn(image_shape=(8, 8, 1), classes=3)
    return Standard(backbone, attack=PGD("l2", 0.5, steps=3), name="hardened")


# Files and folders.


@pytest.mark.parametrize("suffix", [".keras", ".h5", ""])
def test_keras_file_answers_as_the_model_in_inference_mode(suffix, tmp_path):
    model = make_model()
    model.compile("sgd", "mse")
    model.save(tmp_path / f"file{suffix}")
    loaded = load_model(tmp_path / f"file{suffix}")
    np.testing.assert_allclose(answer(loaded), model(IMAGE, training=False), rtol=1e-5, atol=1e-6)
    assert loaded[1:4] == ((4, 4, 3), 5, "file")
    assert (loaded.is_randomised, loaded.features, loaded.threat_model, loaded.attack_budget) == (None,) * 4


def test_subclassed_model_in_a_folder_of_keras_needs_no_class(tmp_path):
    model = Subclassed()
    expected = model(IMAGE)
    model.save(tmp_path / "file")
    loaded = load_model(tmp_path / "file")
    np.testing.assert_allclose(answer(loaded), expected, rtol=1e-5, atol=1e-6)
    assert loaded.image_shape == (4, 4, 3) and loaded.classes is None


def test_gradients_flow_through_a_serving_signature_as_through_the_keras_model(tmp_path):
    model = make_model()
    model.export(tmp_path / "served")
    loaded = load_model(tmp_path / "served")
    np.testing.assert_allclose(answer(loaded), model(IMAGE, training=False), rtol=1e-5, atol=1e-6)
    expected = gradient(as_paths(model))
    assert np.abs(expected).max() > 0
    np.testing.assert_allclose(gradient(loaded), expected, rtol=1e-4, atol=1e-6)
    assert loaded[1:4] == ((4, 4, 3), 5, "served")


def test_serving_signature_is_asked_for_its_logits_embedding_and_precision(tmp_path):
    def outputs(image, weight):
        flat = tf.cast(tf.reshape(image, [-1, 48]), tf.float32)
        logits = flat @ weight
        return {"logits": logits, "probabilities": tf.nn.softmax(logits), "embedding": flat}

    module = Exported(outputs, spec(None, None, None, 3, dtype=tf.float64, name="pixels"))
    loaded = load_model(module.save(tmp_path / "1"))
    np.testing.assert_allclose(answer(loaded), IMAGE.reshape(3, 48) @ module.weight.numpy(), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(loaded.features(tf.constant(IMAGE)), IMAGE.reshape(3, 48))
    assert loaded[1:4] == ((None, None, 3), 5, tmp_path.name) and answer(loaded).dtype == np.float32
    shifted = answer(load_model(tmp_path / "1", outputs="probabilities"))
    np.testing.assert_allclose(shifted - shifted[:, :1], answer(loaded) - answer(loaded)[:, :1], atol=1e-4)


def test_published_model_is_the_same_as_folder_file_and_version():
    image = np.random.default_rng(0).uniform(size=(4, 32, 32, 3)).astype("float32")
    folder, file, version = (load_model(PUBLISHED / name) for name in ("", "model.keras", "1"))
    np.testing.assert_array_equal(answer(folder, image), answer(file, image))
    np.testing.assert_allclose(answer(version, image), answer(file, image), atol=1e-5)
    assert {each.name for each in (folder, file, version)} == {"pgd_at_cifar10_mini"}
    assert {each[1:3] for each in (folder, file, version)} == {((32, 32, 3), 10)}
    assert folder.digest == file.digest != version.digest
    assert file.threat_model == ThreatModel("linf", 8 / 255) and file.attack_budget > 0 and file.is_randomised is None
    assert file.features(tf.constant(image)).shape.rank == 2 and version.features is None


@pytest.mark.parametrize("kind", ["file", "content", "name"])
def test_digest_changes_with_a_byte_and_is_the_same_for_a_copy(kind, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    if kind == "file":
        make_model().save(first := tmp_path / "first.h5")
        shutil.copy(first, second := tmp_path / "second.h5")
    else:
        Exported(linear, PIXELS).save(first)
        (first / "assets/notes.txt").write_bytes(b"one")
        shutil.copytree(first, second)
    digest = load_model(first).digest
    assert load_model(second).digest == digest and len(digest) == 64
    if kind == "file":
        second.write_bytes(second.read_bytes() + b"\0")
    elif kind == "content":
        (second / "assets/notes.txt").write_bytes(b"onf")
    else:
        (second / "assets/notes.txt").rename(second / "assets/notes2.txt")
    assert load_model(second).digest != digest


# Objects in memory.


def test_keras_models_functions_and_what_was_loaded_answer_as_they_do_themselves():
    model = make_model()
    expected = model(IMAGE, training=False)
    sequential = keras.Sequential([layers.Flatten(), layers.Dense(5)], name="unbuilt")
    for given, image_shape, classes, name in (
        (model, (4, 4, 3), 5, "mine"),
        (lambda image: model(image, training=False), (None,) * 3, None, "<lambda>"),
        (sequential, (None,) * 3, None, "unbuilt"),
    ):
        loaded = as_paths(given)
        assert loaded[1:4] == (image_shape, classes, name)
        np.testing.assert_array_equal(answer(loaded), expected if given is not sequential else sequential(IMAGE))
        assert as_paths(loaded) is loaded
    assert as_paths(sequential).image_shape == (4, 4, 3)  # it has been called now


def test_defense_keeps_its_paths_threat_model_and_embedding():
    defense = make_defense()
    image = IMAGE.mean(axis=3, keepdims=True).repeat(2, axis=1).repeat(2, axis=2)
    loaded = as_paths(defense)
    np.testing.assert_array_equal(answer(loaded, image), defense(image))
    np.testing.assert_array_equal(loaded.features(image), defense.activations(image)["embedding"])
    assert loaded[1:4] == ((8, 8, 1), 3, "hardened") and loaded.threat_model == ThreatModel("l2", 0.5)
    assert loaded.attack_budget == defense.attack_budget


@pytest.mark.parametrize("kind", ["in memory", "defense", ".keras", "SavedModel of Keras"])
def test_frozen_axes_are_the_head_wherever_the_model_comes_from(kind, tmp_path):
    backbone = with_orthogonal_head(small_cnn((8, 8, 1), 3, width=2), seed=4)
    if kind == "defense":
        loaded = as_paths(DFA(backbone, attack=PGD(epsilon=0.1)))
    elif kind == "in memory":
        loaded = as_paths(backbone)
    else:
        path = tmp_path / ("model.keras" if kind == ".keras" else "model")
        backbone.save(path)
        loaded = load_model(path)
    kernel = backbone.get_layer("logits").kernel.numpy()
    assert not loaded.head.is_linear and loaded.head.bias is None
    np.testing.assert_array_equal(loaded.head.kernel, kernel)
    found = loaded.activations(tf.constant(IMAGE.mean(axis=3, keepdims=True).repeat(2, axis=1).repeat(2, axis=2)))
    length = np.linalg.norm(found["embedding"], axis=1, keepdims=True)
    np.testing.assert_allclose(found["logits"], np.abs(found["embedding"] @ kernel / length), atol=1e-5)


def test_object_with_paths_of_its_own_needs_nothing_else():
    class Paths:
        is_randomized = True

        def attack_paths(self):
            return {"exact": lambda image, seed: image[:, 0, 0], "smoothed": lambda image, seed: image[:, 1, 1]}

        def activations(self, image):
            return {"logits": image[:, 0, 0], "embedding": image[:, 0, 0]}

    loaded = as_paths(Paths())
    assert loaded.is_randomised is True and loaded.image_shape == (None,) * 3 and loaded.digest == ""
    assert loaded.activations is None and not loaded.has_embedding  # they would be of another draw than the logits
    assert (loaded.threat_model, loaded.features, loaded.attack_budget) == (None,) * 3
    np.testing.assert_array_equal(answer(loaded, path="smoothed"), IMAGE[:, 1, 1])


def test_dict_of_outputs_gives_logits_and_embedding():
    image = keras.Input((4, 4, 3))
    flat = layers.Flatten()(image)
    model = keras.Model(image, {"logits": layers.Dense(5)(flat), "embedding": flat})
    loaded = as_paths(model)
    np.testing.assert_array_equal(answer(loaded), model(IMAGE)["logits"])
    np.testing.assert_array_equal(loaded.features(IMAGE), IMAGE.reshape(3, 48))
    assert loaded.classes == 5


def test_digest_of_an_object_changes_with_weights_and_configuration():
    model = make_model()
    digest = as_paths(model).digest
    assert as_paths(model).digest == digest and len(digest) == 64
    model.layers[-1].bias.assign_add(np.float32([0, 0, 0, 0, 1e-6]))
    assert as_paths(model).digest != digest
    scaled = [
        keras.Sequential([keras.Input((4, 4, 3), name="i"), layers.Rescaling(by, name="r")], "s") for by in (1, 2)
    ]
    digests = {as_paths(keras.Sequential([each, layers.Flatten(name="f")], "m")).digest for each in scaled}
    assert len(digests) == 2


# Probabilities.


def with_softmax(kind):
    """Return a model that ends in a softmax of some kind, and the dense layer before it."""
    activation = {"dense": "softmax", "nested": "softmax", "sequential": "softmax", "tensorflow": tf.nn.softmax}.get(
        kind
    )
    dense = layers.Dense(5, activation=activation, use_bias=kind != "nested")
    if kind == "sequential":
        return keras.Sequential([keras.Input((4, 4, 3)), layers.Flatten(), dense]), dense
    end = {
        "layer": [dense, layers.Softmax()],
        "activation": [dense, layers.Activation("softmax")],
        "cast": [dense, layers.Activation("softmax"), layers.Activation("linear", dtype="float32")],
        "nested": [keras.Sequential([keras.Input((16,)), dense])],
    }
    return make_model(*end.get(kind, [dense])), dense


def logits_by_hand(model, dense):
    """Return the logits by the model's own features and the weights of its dense layer."""
    if model.name != "mine":
        features = IMAGE.reshape(3, 48)
    else:
        flat = next(layer for layer in model.layers if isinstance(layer, layers.Dropout))
        features = keras.Model(model.input, flat.output)(IMAGE, training=False).numpy()
    return features @ dense.kernel.numpy() + (dense.bias.numpy() if dense.use_bias else 0)


@pytest.mark.parametrize("kind", ["dense", "tensorflow", "layer", "activation", "cast", "nested", "sequential"])
def test_softmax_at_the_end_is_taken_off(kind):
    model, dense = with_softmax(kind)
    dense.kernel.assign(1000 * dense.kernel)  # so far saturated that no logarithm could give the logits back
    before = model(IMAGE, training=False).numpy()
    loaded = as_paths(model, outputs="probabilities")
    expected = logits_by_hand(model, dense)
    assert np.abs(expected).max() > 100
    np.testing.assert_allclose(answer(loaded), expected, rtol=1e-4, atol=1e-2)
    assert loaded.classes == 5 and np.isfinite(gradient(loaded)).all() and np.abs(gradient(loaded)).max() > 1
    np.testing.assert_array_equal(model(IMAGE, training=False), before)


def test_softmax_in_a_file_is_taken_off(tmp_path):
    model, dense = with_softmax("sequential")
    for name in ("file.keras", "folder"):
        model.save(tmp_path / name)
        found = answer(load_model(tmp_path / name, outputs="probabilities"))
        np.testing.assert_allclose(found, logits_by_hand(model, dense), rtol=1e-4, atol=1e-5)


def test_other_probabilities_become_logits_up_to_a_shift_by_their_logarithm(tmp_path):
    plain = make_model()
    logits = plain(IMAGE, training=False).numpy()
    image = keras.Input((4, 4, 3))
    lambda_model = keras.Model(image, tf.nn.softmax(plain(image)))  # ends in no layer of Keras
    plain_signature = Exported(
        lambda image, weight: tf.nn.softmax(linear(image, weight)["logits"]), spec(None, 4, 4, 3)
    )
    for given, expected in (
        (lambda_model, logits),
        (lambda image: tf.nn.softmax(plain(image, training=False)), logits),
        (load_model(plain_signature.save(tmp_path / "s"), outputs="probabilities"), None),
    ):
        found = answer(as_paths(given, outputs="probabilities"))
        if expected is None:
            expected = linear(IMAGE, plain_signature.weight)["logits"].numpy()
        np.testing.assert_allclose(found - found[:, :1], expected - expected[:, :1], atol=1e-4)
        np.testing.assert_allclose(np.exp(found).sum(axis=1), 1, atol=1e-5)


def test_probabilities_that_vanish_give_finite_logits_and_gradients():
    loaded = as_paths(lambda image: tf.nn.softmax(1e4 * image[:, 0, 0]), outputs="probabilities")
    assert np.isfinite(answer(loaded)).all() and np.isfinite(gradient(loaded)).all()


def test_classifier_that_returns_no_probabilities_is_refused_at_the_latest_by_an_evaluation():
    with pytest.raises(InputError, match="model mine: it does not return probabilities that sum to 1; use outputs="):
        as_paths(make_model(), outputs="probabilities")
    with pytest.raises(InputError, match="does not return probabilities"):
        as_paths(make_model(layers.Dense(5, activation="sigmoid")), outputs="probabilities")
    loaded = as_paths(lambda image: image[:, 0, 0], outputs="probabilities")
    batches = tf.data.Dataset.from_tensors((IMAGE, np.int32([0, 1, 2])))
    with pytest.raises(InputError, match="does not return probabilities"):
        evaluate(loaded.attack_paths, batches, ThreatModel("linf", 0.1), [PlannedAttack("pgd", PGD("linf", 0.1))])


def test_probabilities_passed_off_as_logits_are_refused_by_an_evaluation():
    loaded = as_paths(make_model(layers.Dense(5, activation="softmax")))
    batches = tf.data.Dataset.from_tensors((IMAGE, np.int32([0, 1, 2])))
    with pytest.raises(InputError, match="probabilities"):
        evaluate(loaded.attack_paths, batches, ThreatModel("linf", 0.1), [PlannedAttack("pgd", PGD("linf", 0.1))])


# What is no classifier of float images.


def two_inputs():
    one, two = keras.Input((4, 4, 3)), keras.Input((4, 4, 3))
    return keras.Model([one, two], layers.Dense(5)(layers.Flatten()(layers.Add()([one, two]))))


def integer_input():
    image = keras.Input((4, 4, 3), dtype="uint8")
    return keras.Model(image, layers.Dense(5)(layers.Flatten()(layers.Rescaling(1 / 255)(image))))


def two_outputs(key=None):
    image = keras.Input((4, 4, 3))
    first, second = layers.Dense(5)(layers.Flatten()(image)), layers.Dense(2)(layers.Flatten()(image))
    return keras.Model(image, [first, second] if key is None else {key: first, "second": second})


NOT_IMAGES = r"not one batch of float images \(batch, height, width, channels\)"


@pytest.mark.parametrize(
    "make, message",
    [
        (two_inputs, rf"takes float32 \(None, 4, 4, 3\) and float32 \(None, 4, 4, 3\), {NOT_IMAGES}"),
        (lambda: keras.Sequential([keras.Input((16,)), layers.Dense(5)]), rf"takes float32 \(None, 16\), {NOT_IMAGES}"),
        (integer_input, rf"takes uint8 \(None, 4, 4, 3\), {NOT_IMAGES}"),
        (two_outputs, "returns 2 outputs; return one, or a dict with the key logits"),
        (lambda: two_outputs("first"), "returns first, second; the output that counts must have the name logits"),
        (lambda: make_model(layers.Dense(1)), r"returns \(None, 1\), not \(batch, classes\) with at least 2 classes"),
        (lambda: make_model(layers.Reshape((4, 4))), r"returns \(None, 4, 4\), not \(batch, classes\)"),
        (lambda: "model.keras", "a str is no classifier; give a Keras model, a defense or a function"),
    ],
)
def test_object_that_is_no_classifier_is_refused_in_one_line(make, message):
    with pytest.raises(InputError, match=message) as caught:
        as_paths(make())
    assert "\n" not in str(caught.value)


def test_keras_file_that_is_no_classifier_is_refused_with_its_path(tmp_path):
    integer_input().save(tmp_path / "integers.keras")
    with pytest.raises(InputError, match=rf"integers.keras: it takes uint8 \(None, 4, 4, 3\), {NOT_IMAGES}"):
        load_model(tmp_path / "integers.keras")


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("missing.keras", None, "missing.keras: no such file or folder"),
        ("text.txt", "no model", "text.txt: Keras cannot load it: "),
        ("broken.keras", "no zip", "broken.keras: Keras cannot load it: "),
        ("broken.h5", "no hdf5", "broken.h5: Keras cannot load it: "),
        ("folder/notes.txt", "", "folder: not a model: the folder holds neither saved_model.pb nor model.keras"),
        ("folder/saved_model.pb", "no protocol buffer", "folder: TensorFlow cannot load it: "),
    ],
)
def test_path_without_a_model_is_refused_in_one_line(name, content, message, tmp_path):
    path = tmp_path / name
    if content is not None:
        path.parent.mkdir(exist_ok=True)
        path.write_text(content)
    with pytest.raises(InputError, match=message) as caught:
        load_model(path if path.parent == tmp_path else path.parent)
    assert "\n" not in str(caught.value)


def test_code_in_a_file_is_not_run(tmp_path):
    make_model(layers.Lambda(lambda x: x), layers.Dense(5)).save(tmp_path / "code.keras")
    with pytest.raises(InputError, match=r"code.keras: Keras cannot load it: .*lambda"):
        load_model(tmp_path / "code.keras")


def without_gradient(image, weight):
    return linear(tf.cast(tf.cast(255 * image, tf.int32), tf.float32), weight)


def unregistered_gradient(image, weight):
    return linear(tf.image.adjust_hue(image, 0.1), weight)


@pytest.mark.parametrize(
    "outputs, specs, message",
    [
        (
            linear,
            (spec(None, 4, 4, 3, dtype=tf.float16), spec(None, name="age")),
            r"takes .*float32 \(None,\).*, not one",
        ),
        (linear, (spec(None, 48),), rf"takes float32 \(None, 48\), {NOT_IMAGES}"),
        (linear, (spec(None, 4, 4, 3, dtype=tf.uint8),), rf"takes uint8 \(None, 4, 4, 3\), {NOT_IMAGES}"),
        (linear, (spec(None, dtype=tf.string),), rf"takes string \(None,\), {NOT_IMAGES}"),
        (linear, (spec(2, 4, 4, 3),), "takes batches of 2; export it with a batch of any size, None"),
        (
            lambda image, weight: {"scores": image[:, 0, 0], "label": image[:, 0, 0]},
            (PIXELS,),
            "returns label, scores; the output that counts must have the name logits",
        ),
        (lambda image, weight: {"logits": image[:, 0]}, (PIXELS,), r"returns \(None, 4, 3\), not \(batch, classes\)"),
        (without_gradient, (PIXELS,), "has no gradient for attacks to follow: no differentiable operations lead from"),
        (unregistered_gradient, (PIXELS,), "has no gradient for attacks to follow: .*AdjustHue"),
    ],
)
def test_signature_that_is_no_classifier_is_refused_in_one_line(outputs, specs, message, tmp_path):
    def served(*images_and_weight):
        image, weight = images_and_weight[0], images_and_weight[-1]
        if image.dtype == tf.string:
            image = tf.zeros([tf.shape(image)[0], 48])
        return outputs(image if image.dtype == tf.float32 else tf.cast(image, tf.float32), weight)

    folder = Exported(served, *specs).save(tmp_path / "served")
    with pytest.raises(InputError, match=f"served: it {message}") as caught:
        load_model(folder)
    assert "\n" not in str(caught.value)


def test_folder_without_serving_signature_is_refused(tmp_path):
    folder = Exported(linear, PIXELS).save(tmp_path / "served", name="training")
    with pytest.raises(InputError, match="it has no signature serving_default, only: training"):
        load_model(folder)


def test_word_for_outputs_that_does_not_exist_is_refused():
    for call in (lambda: as_paths(make_model(), outputs="logit"), lambda: load_model("x", outputs="logit")):
        with pytest.raises(UsageError, match="outputs must be one of logits, probabilities, not 'logit'"):
            call()


# Model and data.


@pytest.mark.parametrize(
    "loaded_shape, image_shape, classes, message",
    [
        ((4, 4, 3), (4, 4, 3), 5, None),
        ((None, None, 3), (9, 7, 3), 5, None),
        ((4, 4, 3), (None, None, 3), None, None),
        ((4, 4, 3), (4, 4, 1), 5, r"wrong image shape: model m takes images \(4, 4, 3\), but .*digits are \(4, 4, 1\)"),
        ((None, None, 3), (9, 7), 5, "wrong image shape"),
        ((4, 4, 3), (4, 4, 3), 10, "wrong class count: model m has 5 classes, but digits has 10"),
    ],
)
def test_model_and_data_must_fit(loaded_shape, image_shape, classes, message):
    loaded = Loaded({}, loaded_shape, 5, "m")
    if message is None:
        return check_fits(loaded, image_shape, classes, "digits")
    with pytest.raises(InputError, match=message):
        check_fits(loaded, image_shape, classes, "digits")
    return None


def test_model_of_unknown_classes_fits_any():
    check_fits(Loaded({}), (4, 4, 3), 7, "digits")


def test_classifier_behind_something_tells_its_own_activations_and_class_activation_features():
    keras.utils.set_random_seed(0)
    backbone = small_cnn((4, 4, 3), 5)
    plain = as_paths(backbone)
    assert plain.bare is None
    told = backbone(IMAGE, training=False)
    winner = plain.head.kernel[:, tf.argmax(told["logits"], axis=1)].T
    expected = told["feature_map"] * winner[:, None, None, :]
    np.testing.assert_allclose(plain.class_activation(IMAGE), expected, atol=1e-6)
    np.testing.assert_allclose(plain.bare_class_activation(IMAGE), expected, atol=1e-6)

    class Behind(Standard):
        def bare_activations(self, image):
            return self.backbone(image, training=False)

        def activations(self, image):
            return self.backbone(1 - image, training=False)

    behind = as_paths(Behind(backbone, attack=PGD()))
    np.testing.assert_allclose(behind.bare(IMAGE)["logits"], told["logits"], atol=1e-6)
    np.testing.assert_allclose(behind.bare_class_activation(IMAGE), expected, atol=1e-6)
    np.testing.assert_allclose(behind.class_activation(1 - IMAGE), expected, atol=1e-5)


def test_model_that_does_not_tell_has_no_class_activation_features():
    assert as_paths(lambda image: tf.reduce_mean(image, [1, 2])).class_activation is None
    assert as_paths(make_model()).class_activation is None  # there is no global pooling

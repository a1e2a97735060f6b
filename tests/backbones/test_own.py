"""A user's own Keras model as a backbone, and every model that cannot be one."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf

from kerasdefense import config
from kerasdefense.attacks import PGD
from kerasdefense.backbones import as_backbone, build, read, small_cnn, with_precision
from kerasdefense.defenses import PGDAT
from kerasdefense.types import InputError

layers = keras.layers


def random_image(side=8, channels=3):
    return np.random.default_rng(0).uniform(size=(3, side, side, channels)).astype("float32")


def make_base(pooling=None):
    """A nested trunk with dropout and batch normalisation, which tell training from inference."""
    image = keras.Input((8, 8, 3))
    tensor = layers.BatchNormalization()(layers.Conv2D(4, 3, strides=2, activation="relu", name="conv")(image))
    tensor = layers.Dropout(0.5)(tensor)
    if pooling:
        tensor = layers.GlobalAveragePooling2D()(tensor)
    return keras.Model(image, tensor, name="base")


def make_model(*end, shape=(8, 8, 3)):
    """A functional model of a convolution and the given layers."""
    image = tensor = keras.Input(shape)
    for layer in (layers.Conv2D(4, 3, activation="relu", name="conv"), *end):
        tensor = layer(tensor)
    return keras.Model(image, tensor, name="mine")


def pooled(*end, **kwargs):
    return make_model(layers.GlobalAveragePooling2D(name="pool"), *end, **kwargs)


def functional_with_softmax_layer():
    return pooled(layers.Dropout(0.5), layers.Dense(5), layers.Softmax())


def functional_with_float32_softmax():
    return pooled(layers.Dense(5, use_bias=False), layers.Activation("softmax", dtype="float32"))


def functional_kept_dimensions():
    pool = layers.GlobalMaxPooling2D(keepdims=True)
    return make_model(pool, layers.Flatten(), layers.LayerNormalization(), layers.Dense(5, activation="softmax"))


def functional_any_size():
    return pooled(layers.Reshape((4,)), layers.Dense(5, activation="softmax"), shape=(None, None, 3))


def sequential_with_nested_trunk():
    trunk = make_base()
    return keras.Sequential([keras.Input((8, 8, 3)), trunk, layers.GlobalAveragePooling2D(), layers.Dense(5)])


def sequential_with_nested_pooling():
    return keras.Sequential(
        [make_base(pooling=True), layers.Dropout(0.5), layers.Dense(5, activation="softmax", name="top")]
    )


def sequential_with_nested_head():
    head = keras.Sequential([keras.Input((3, 3, 4)), layers.GlobalAveragePooling2D(), layers.Dense(5)])
    return keras.Sequential([make_base(), head, layers.Softmax()])


def whole_classifier_behind_its_preprocessing():
    return keras.Sequential([keras.Input((8, 8, 3)), layers.Rescaling(2, offset=-1), functional_with_softmax_layer()])


MODELS = [
    functional_with_softmax_layer,
    functional_with_float32_softmax,
    functional_kept_dimensions,
    functional_any_size,
    sequential_with_nested_trunk,
    sequential_with_nested_pooling,
    sequential_with_nested_head,
    whole_classifier_behind_its_preprocessing,
]


def assert_same_classifier(backbone, model, *, image, image_for_model=None):
    """Same answers, from the same variables, as logits; returns the outputs."""
    outputs = backbone(image)
    expected = model(image if image_for_model is None else image_for_model).numpy()
    if np.allclose(expected.sum(axis=1), 1):
        np.testing.assert_allclose(tf.nn.softmax(outputs["logits"]), expected, atol=1e-5)
    else:
        np.testing.assert_allclose(outputs["logits"], expected, atol=1e-5)
    assert {id(variable) for variable in backbone.variables} == {id(variable) for variable in model.variables}
    logits = backbone.get_layer("logits")
    affine = outputs["embedding"] @ logits.kernel + (0 if logits.bias is None else logits.bias)
    np.testing.assert_allclose(outputs["logits"], affine, atol=1e-5)
    return outputs


@pytest.mark.parametrize("make", MODELS)
def test_as_backbone_gives_the_logits_of_the_model(make):
    model = make()
    image = random_image()
    before = model(image).numpy()
    backbone = as_backbone(model)
    assert backbone.inputs[0].name == "image"
    assert backbone.input_shape == model.input_shape
    assert set(backbone.output_shape) == {"feature_map", "embedding", "logits"}
    outputs = assert_same_classifier(backbone, model, image=image)
    np.testing.assert_array_equal(model(image), before)
    feature_map = outputs["feature_map"]
    assert feature_map.shape[1] > 1
    if make is not functional_kept_dimensions:
        np.testing.assert_allclose(outputs["embedding"], tf.reduce_mean(feature_map, axis=(1, 2)), atol=1e-6)


def test_as_backbone_takes_mobilenet():
    keras.utils.set_random_seed(0)
    model = keras.applications.MobileNetV2(weights=None, input_shape=(32, 32, 3), classes=5, alpha=0.35)
    image = random_image(32)
    for layer in model.layers:
        if isinstance(layer, layers.BatchNormalization):
            layer.momentum = 0.0
    model(2 * image - 1, training=True)  # sets the statistics: without them every image has the same logits
    backbone = as_backbone(model, preprocess=layers.Rescaling(2, offset=-1))
    assert not np.allclose(model(image), model(2 * image - 1), atol=0.01)
    assert_same_classifier(backbone, model, image=image, image_for_model=2 * image - 1)
    assert backbone.output_shape == {
        "feature_map": (None, 1, 1, 1280),
        "embedding": (None, 1280),
        "logits": (None, 5),
    }


def test_preprocess_maps_images_to_what_the_model_takes():
    model, image = functional_with_softmax_layer(), random_image()
    backbone = as_backbone(model, preprocess=layers.Rescaling(255))
    assert not np.allclose(model(image), model(255 * image), atol=0.01)
    assert_same_classifier(backbone, model, image=image, image_for_model=255 * image)


@pytest.mark.parametrize("make", [functional_with_softmax_layer, sequential_with_nested_pooling])
def test_as_backbone_can_be_repeated(make):
    model, image = make(), random_image()
    first = as_backbone(model)
    assert_same_classifier(as_backbone(model), model, image=image)
    assert as_backbone(first) is first


def test_as_backbone_of_a_defense_is_its_backbone():
    backbone = small_cnn((8, 8, 3), 5, width=1)
    defense = PGDAT(backbone, attack=PGD())
    assert as_backbone(defense) is backbone
    with pytest.raises(InputError, match="leave preprocess out"):
        as_backbone(defense, preprocess=layers.Rescaling(2))


def test_a_model_that_calls_some_layer_its_backbone_is_no_defense():
    model = sequential_with_nested_pooling()
    model.backbone = model.layers[0]
    assert_same_classifier(as_backbone(model), model, image=random_image())


@pytest.mark.parametrize("make", [functional_with_softmax_layer, sequential_with_nested_pooling])
def test_own_backbone_comes_back_from_its_file(make, tmp_path):
    backbone, image = as_backbone(make()), random_image()
    backbone(image, training=True)
    backbone.save(tmp_path / "mine.keras")
    again = keras.models.load_model(tmp_path / "mine.keras")
    tf.nest.map_structure(np.testing.assert_array_equal, again(image), backbone(image))


@pytest.mark.parametrize("pooling", [True, False])
def test_nested_trunk_stays_in_inference_mode_where_it_was_called_so(pooling):
    image = keras.Input((8, 8, 3))
    tensor = make_base(pooling)(image, training=False)
    if not pooling:
        tensor = layers.GlobalAveragePooling2D()(tensor)
    backbone = as_backbone(keras.Model(image, layers.Dense(5)(tensor)))
    trained, fixed = backbone(random_image(), training=True), backbone(random_image(), training=False)
    np.testing.assert_array_equal(trained["feature_map"], fixed["feature_map"])
    np.testing.assert_array_equal(trained["logits"], fixed["logits"])


def test_frozen_layers_stay_frozen():
    model = sequential_with_nested_pooling()
    model.get_layer("base").trainable = False
    backbone = as_backbone(model)
    assert [variable.shape for variable in backbone.trainable_variables] == [(4, 5), (5,)]


def test_regularisation_stays_in_force():
    model = pooled(layers.Dense(5, activation="softmax", kernel_regularizer="l2"))
    backbone = as_backbone(model)
    assert float(tf.add_n(backbone.losses)) == pytest.approx(float(tf.add_n(model.losses))) != 0


def test_adapted_normalisation_keeps_its_statistics():
    normalisation = layers.Normalization()
    normalisation.adapt(5 * random_image() + 3)
    model = keras.Sequential([keras.Input((8, 8, 3)), normalisation, functional_with_softmax_layer()])
    assert_same_classifier(as_backbone(model), model, image=random_image())


def test_logits_of_a_mixed_precision_model_are_float32():
    keras.mixed_precision.set_global_policy("mixed_bfloat16")
    try:
        model = pooled(layers.Dense(5, activation="softmax", dtype="float32"))
    finally:
        keras.mixed_precision.set_global_policy("float32")
    outputs = as_backbone(model)(random_image())
    assert outputs["feature_map"].dtype == tf.bfloat16
    assert outputs["logits"].dtype == tf.float32


def test_pooling_layer_can_be_named():
    model = make_model(layers.AveragePooling2D(6, name="average"), layers.Flatten(name="flat"), layers.Dense(5))
    with pytest.raises(InputError, match=r"no global pooling before .*pass pooling_layer .*one of: average$"):
        as_backbone(model)
    backbone = as_backbone(model, pooling_layer="average")
    assert backbone.output_shape["feature_map"] == (None, 6, 6, 4)
    assert_same_classifier(backbone, model, image=random_image())


def test_pooling_layer_can_be_named_before_a_nested_model():
    head = [layers.AveragePooling2D(3, name="average"), layers.Flatten(), layers.Dense(5)]
    model = keras.Sequential([make_base(), *head])
    with pytest.raises(InputError, match=r"one of: average$"):
        as_backbone(model)
    assert_same_classifier(as_backbone(model, pooling_layer="average"), model, image=random_image())


def test_logits_layer_can_be_named():
    model = pooled(layers.Dense(7, activation="relu", name="hidden"), layers.Dense(5, name="top"))
    with pytest.raises(InputError, match=r"2 dense layers .*\(hidden, top\): pass logits_layer=top"):
        as_backbone(model)
    backbone = as_backbone(model, logits_layer="top")
    assert backbone.output_shape["embedding"] == (None, 7)
    assert_same_classifier(backbone, model, image=random_image())


def test_hidden_dense_after_nested_pooling_needs_the_name_too():
    model = keras.Sequential([make_base(pooling=True), layers.Dense(7, name="hidden"), layers.Dense(5, name="top")])
    with pytest.raises(InputError, match=r"\(hidden, top\)"):
        as_backbone(model)
    assert_same_classifier(as_backbone(model, logits_layer="top"), model, image=random_image())


class Subclassed(keras.Model):
    def call(self, image):
        return image


def subclassed_model():
    model = Subclassed()
    model(random_image())
    return model


def two_inputs():
    images = [keras.Input((8, 8, 3)), keras.Input((8, 8, 3))]
    tensor = layers.GlobalAveragePooling2D()(layers.Add()(images))
    return keras.Model(images, layers.Dense(5)(tensor))


def two_outputs():
    model = pooled(layers.Dense(5))
    return keras.Model(model.input, [model.output, model.output])


def two_poolings():
    image = keras.Input((8, 8, 3))
    both = [layers.GlobalAveragePooling2D()(image), layers.GlobalMaxPooling2D()(image)]
    return keras.Model(image, layers.Dense(5, name="top")(layers.Concatenate()(both)))


def bytes_model():
    image = keras.Input((8, 8, 3), dtype="uint8")
    return keras.Model(image, layers.Dense(5)(layers.GlobalAveragePooling2D()(layers.Rescaling(1 / 255)(image))))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: len, "builtin_function_or_method is no Keras model"),
        (
            lambda: keras.Sequential([layers.Dense(5)], name="mine"),
            "'mine' is not built: begin it with keras.Input",
        ),
        (subclassed_model, "is a subclassed model"),
        (two_inputs, r"float32 \(None, 8, 8, 3\) and float32 .*, not float images"),
        (bytes_model, r"takes uint8 \(None, 8, 8, 3\), not float images"),
        (
            lambda: keras.Sequential([keras.Input((4,)), layers.Dense(5)]),
            r"takes float32 \(None, 4\), not float",
        ),
        (two_outputs, "has 2 outputs"),
        (two_poolings, "no global pooling before dense layer 'top'; a backbone needs"),
        (
            lambda: make_model(layers.Flatten(), layers.Dense(5, name="top")),
            "no global pooling before .* 'top'; a",
        ),
        (lambda: pooled(), r"ends in layer 'pool' \(GlobalAveragePooling2D\)"),
        (lambda: pooled(layers.Dense(1, activation="sigmoid", name="top")), "'top' has a single output"),
        (
            lambda: pooled(layers.Dense(5, activation="sigmoid")),
            "ends in sigmoid; it must end in softmax or nothing",
        ),
        (lambda: pooled(layers.Dense(5), layers.Activation("sigmoid")), r"ends in layer .*\(Activation\)"),
        (
            lambda: make_model(layers.GlobalAveragePooling2D(keepdims=True), layers.Dense(5), layers.Softmax()),
            r"takes \(None, 1, 1, 4\), not one vector per image",
        ),
    ],
)
def test_as_backbone_refuses(make, message):
    with pytest.raises(InputError, match=message) as caught:
        as_backbone(make())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ({"logits_layer": "pool"}, "logits_layer=pool: the last dense layer is 'top'"),
        ({"pooling_layer": "pol"}, "no layer named 'pol' before .*one of: pool$"),
        (
            {"pooling_layer": "conv"},
            r"pooling_layer=conv takes \(None, 8, 8, 3\) and does not give one value",
        ),
    ],
)
def test_as_backbone_refuses_wrong_names(names, message):
    with pytest.raises(InputError, match=message):
        as_backbone(pooled(layers.Dense(5, name="top")), **names)


def test_as_backbone_refuses_preprocessing_before_a_backbone():
    with pytest.raises(InputError, match="leave preprocess out"):
        as_backbone(small_cnn((8, 8, 1), 2, width=1), preprocess=layers.Rescaling(2))


def save(model, path):
    if path.suffix == ".h5":
        with pytest.warns(UserWarning, match="HDF5"):
            model.save(path)
    else:
        model.save(path)


@pytest.mark.parametrize("file_name", ["mine.keras", "mine.h5", "mine"])
def test_build_loads_the_model_of_a_path(file_name, tmp_path):
    model, image = functional_any_size(), random_image()
    save(model, tmp_path / file_name)
    backbone = build(config.Backbone(path=str(tmp_path / file_name)), image_shape=(8, 8, 3), classes=5)
    np.testing.assert_allclose(tf.nn.softmax(backbone(image)["logits"]), model(image), atol=1e-6)


@pytest.mark.parametrize("place", ["run/model.keras", "run"])
def test_build_and_read_take_a_defense_and_a_folder_with_its_model(place, tmp_path):
    defense, image = PGDAT(small_cnn((8, 8, 3), 5, width=1), attack=PGD()), random_image()
    (tmp_path / "run/1").mkdir(parents=True)
    defense.save(tmp_path / "run/model.keras")
    found = read(tmp_path / place)
    assert isinstance(found, PGDAT) and found.optimizer is None
    backbone = build(config.Backbone(path=str(tmp_path / place)), image_shape=(8, 8, 3), classes=5)
    for one, two in zip(backbone.get_weights(), defense.backbone.get_weights(), strict=True):
        np.testing.assert_array_equal(one, two)
    np.testing.assert_allclose(backbone(image)["logits"], defense(image), atol=1e-6)


def test_build_passes_the_names_on(tmp_path):
    model = pooled(layers.Dense(7, name="hidden"), layers.Dense(5, name="top"))
    model.save(tmp_path / "mine.keras")
    backbone = config.Backbone(path=str(tmp_path / "mine.keras"), pooling_layer="pool", logits_layer="top")
    assert build(backbone, image_shape=(8, 8, 3), classes=5).output_shape["embedding"] == (None, 7)


@pytest.mark.parametrize(
    ("image_shape", "classes", "message"),
    [
        ((8, 8, 1), 5, r"images of \(8, 8, 3\), but those of the data are \(8, 8, 1\)"),
        ((8, 8, 3), 10, "the model has 5 classes, but the data has 10"),
    ],
)
def test_build_refuses_a_model_that_does_not_fit_the_data(image_shape, classes, message, tmp_path):
    functional_with_softmax_layer().save(tmp_path / "mine.keras")
    with pytest.raises(InputError, match=rf"--backbone_path=.*mine\.keras: .*{message}"):
        build(config.Backbone(path=str(tmp_path / "mine.keras")), image_shape=image_shape, classes=classes)


def missing(folder):
    return folder / "none.keras"


def broken_folder(folder):
    (folder / "published").mkdir()
    (folder / "published/model.keras").write_bytes(b"not a model")
    return folder / "published"


def broken(folder):
    path = folder / "broken.keras"
    path.write_bytes(b"not a model")
    return path


def empty_folder(folder):
    return folder


def module_without_keras(folder):
    tf.saved_model.save(tf.Module(), str(folder / "module"))
    return folder / "module"


def hidden_code(suffix):
    def write(folder):
        save(pooled(layers.Lambda(lambda tensor: 2 * tensor), layers.Dense(5)), folder / f"code{suffix}")
        return folder / f"code{suffix}"

    return write


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (missing, "no such file or folder"),
        (broken, "Keras cannot load it: "),
        (empty_folder, "Keras cannot load it: "),
        (broken_folder, "Keras cannot load it: "),
        (module_without_keras, "is no Keras model"),
        (hidden_code(".keras"), "Keras cannot load it: .*Lambda"),
        (hidden_code(".h5"), "Keras cannot load it: .*Lambda"),
    ],
)
def test_build_refuses_what_is_no_model(write, message, tmp_path):
    with pytest.raises(InputError, match=rf"^--backbone_path={tmp_path}.*: .*{message}") as caught:
        build(config.Backbone(path=str(write(tmp_path))), image_shape=(8, 8, 3), classes=5)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("side", [8, None])
def test_own_model_computes_in_mixed_precision_but_for_its_logits(tmp_path, side):
    image = keras.Input((side, side, 1))
    hidden = keras.layers.GlobalAveragePooling2D()(keras.layers.Conv2D(4, 3, name="convolution")(image))
    keras.Model(image, keras.layers.Dense(3, activation="softmax")(hidden)).save(tmp_path / "own.keras")
    own = build(config.Backbone(path=str(tmp_path / "own.keras")), image_shape=(8, 8, 1), classes=3)
    mixed = with_precision(own, "mixed_bfloat16")
    layers = {layer.name: layer for layer in mixed.submodules if isinstance(layer, keras.layers.Layer)}
    assert layers["convolution"].compute_dtype == "bfloat16" and layers["convolution"].variable_dtype == "float32"
    noise = np.random.default_rng(0).random((4, 8, 8, 1), np.float32)
    found = mixed(noise)["logits"]
    assert found.dtype == tf.float32
    np.testing.assert_allclose(found, own(noise)["logits"], atol=0.05)
    back = with_precision(mixed, "float32")
    np.testing.assert_array_equal(back(noise)["logits"], own(noise)["logits"])

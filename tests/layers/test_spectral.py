"""The spectrally normalised convolution: its norm, what training changes, precision, saving, replicas."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf

from kerasdefense.layers import SpectralConv2D
from kerasdefense.training import mirrored

IMAGE = np.random.default_rng(0).uniform(size=(4, 6, 6, 2)).astype(np.float32)


def built(filters=3, **settings):
    keras.utils.set_random_seed(0)
    layer = SpectralConv2D(filters, 3, padding="same", **settings)
    layer.build(tf.TensorShape([None, 6, 6, 2]))
    return layer


def warmed(layer, steps=40):
    for _ in range(steps):
        layer(IMAGE[:1], training=True)
    return layer


def norm(kernel):
    return np.linalg.svd(np.reshape(kernel, [-1, np.shape(kernel)[-1]]), compute_uv=False).max()


# AToP P3: the norm of the kernel as it is used is one
@pytest.mark.parametrize("filters", [1, 3, 40])
def test_kernel_is_divided_by_its_largest_singular_value(filters):
    layer = built(filters)
    layer.kernel.assign(5 * layer.kernel)
    warmed(layer)
    assert norm(layer.divided(layer.kernel)) == pytest.approx(1, abs=1e-2)
    expected = tf.nn.conv2d(IMAGE, layer.kernel / norm(layer.kernel), 1, "SAME")
    np.testing.assert_allclose(layer(IMAGE), expected, rtol=2e-2, atol=1e-3)


# AToP P3: the stored kernel is untouched; one power iteration in training, none otherwise
def test_forward_passes_keep_the_kernel_and_turn_u_in_training_alone():
    layer = built()
    kernel, u = layer.kernel.numpy(), layer.u.numpy()
    layer(IMAGE)
    layer(IMAGE, training=False)
    np.testing.assert_array_equal(layer.u, u)
    layer(IMAGE, training=True)
    matrix = kernel.reshape(-1, 3)
    turned = matrix.T @ matrix @ u
    np.testing.assert_allclose(layer.u, turned / np.linalg.norm(turned), rtol=1e-4)
    np.testing.assert_array_equal(layer.kernel, kernel)
    assert [each.name for each in layer.trainable_variables] == [layer.kernel.name, layer.bias.name]


def test_training_and_inference_divide_alike():
    layer = built()
    np.testing.assert_array_equal(layer(IMAGE, training=True), layer(IMAGE, training=False))


def test_u_starts_the_same_in_every_layer_of_a_size():
    one, two = built(), built()
    np.testing.assert_array_equal(one.u, two.u)
    assert np.abs(one.u).min() > 1e-3


# the output does not depend on the length of the kernel, and so no gradient lengthens it
def test_gradient_flows_through_the_norm():
    layer = warmed(built())
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(layer(IMAGE, training=True) ** 2)
    gradient = tape.gradient(loss, layer.kernel)
    size = float(tf.norm(gradient) * tf.norm(layer.kernel))
    assert size > 0.1 and abs(float(tf.reduce_sum(gradient * layer.kernel))) < 1e-4 * size


def test_kernel_of_zero_gives_the_bias():
    layer = built(kernel_initializer="zeros")
    layer.bias.assign([1.0, 2.0, 3.0])
    np.testing.assert_array_equal(layer(IMAGE, training=True)[0, 0, 0], [1, 2, 3])
    assert np.isfinite(layer(IMAGE, training=True)).all()


# sigma is computed in float32: in float16 the squares of this kernel overflow
def test_norm_is_computed_in_the_type_of_the_weights():
    layer, mixed = built(use_bias=True), built(use_bias=True, dtype="mixed_float16")
    for each in (layer, mixed):
        each.kernel.assign(1e5 * each.kernel)
        each.bias.assign([0.5, 0.0, -0.5])
    output = mixed(IMAGE, training=True)
    assert output.dtype == tf.float16 and mixed.u.dtype == mixed.kernel.dtype == tf.float32
    np.testing.assert_allclose(output, layer(IMAGE, training=True), atol=5e-3)
    np.testing.assert_array_equal(mixed.u, layer.u)


class Trainer(keras.Model):
    """Train a model by a step of its own, as defenses do."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def call(self, image):
        return self.model(image)

    def train_step(self, image):
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean((self.model(image, training=True) - 1) ** 2)
        self.optimizer.minimize(loss, self.model.trainable_variables, tape)
        return {"loss": loss}


def test_layer_trains_in_a_step_of_its_own_and_is_saved(tmp_path):
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input(IMAGE.shape[1:]), SpectralConv2D(3, 3)])
    trainer, u = Trainer(model), model.layers[0].u.numpy()
    trainer.compile(keras.optimizers.SGD(0.1))
    losses = [trainer.train_on_batch(IMAGE) for _ in range(5)]
    assert losses[-1] < losses[0] and np.abs(model.layers[0].u - u).max() > 1e-3
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(loaded.layers[0].u, model.layers[0].u)
    np.testing.assert_array_equal(loaded(IMAGE), model(IMAGE))


def test_two_replicas_turn_u_as_one_does():
    strategy, one = mirrored(("/device:CPU:0", "/device:CPU:1")), built()
    with strategy.scope():
        two = built()
        two.set_weights(one.get_weights())
    parts = strategy.experimental_distribute_values_from_function(
        lambda context: tf.constant(np.split(IMAGE, 2)[context.replica_id_in_sync_group])
    )

    @tf.function
    def forward(image):
        return strategy.run(lambda each: two(each, training=True), [image])

    for _ in range(3):
        expected, found = one(IMAGE, training=True), forward(parts)
        found = np.concatenate(strategy.experimental_local_results(found))
        np.testing.assert_allclose(found, expected, atol=1e-6)
    for each in strategy.experimental_local_results(two.u):
        np.testing.assert_allclose(each, one.u, atol=1e-6)
    np.testing.assert_allclose(two.get_weights()[-1], one.u, atol=1e-6)

"""The two denoising blocks, against transcriptions of their formulas in NumPy."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import scipy.signal
import scipy.special
import tensorflow as tf

from kerasdefense.layers import DENOISERS, DualAttention, NonLocal
from kerasdefense.training import mirrored
from kerasdefense.types import UsageError

X = np.random.default_rng(0).normal(size=(2, 8, 6, 4)).astype("float32")
BLOCKS = pytest.mark.parametrize("block", [DualAttention(reduction=2).get_config(), NonLocal(16).get_config()])


def made(layer, x=X):
    """Build a layer and give it random weights and statistics; return it with them by name."""
    layer(x)
    random = np.random.default_rng(1)
    for variable in layer.weights:
        values = random.normal(scale=0.5, size=variable.shape)
        variable.assign(np.abs(values) + 0.1 if "variance" in variable.name else values)
    return layer, {variable.name.split("/", 1)[1][:-2]: variable.numpy() for variable in layer.weights}


def normalised(x, weights, name):
    scale = weights[f"{name}/gamma"] / np.sqrt(weights[f"{name}/moving_variance"] + 1e-5)
    return (x - weights[f"{name}/moving_mean"]) * scale + weights[f"{name}/beta"]


def pointwise(x, weights, name):
    return x @ weights[f"{name}/kernel"][0, 0] + weights.get(f"{name}/bias", 0)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def dual_attention(x, weights):
    """Return channel gate, spatial gate and output in NumPy."""

    def mlp(vector):
        middle = np.maximum(vector @ weights["squeeze/kernel"] + weights["squeeze/bias"], 0)
        return middle @ weights["expand/kernel"] + weights["expand/bias"]

    features = np.maximum(normalised(pointwise(x, weights, "conv"), weights, "bn"), 0)
    channel = sigmoid(mlp(features.mean(axis=(1, 2))) + mlp(features.max(axis=(1, 2))))
    features = features * channel[:, None, None]
    pooled = np.stack([features.max(axis=-1), features.mean(axis=-1)], axis=-1)
    kernel = weights["spatial_conv/kernel"]
    seen = [
        sum(scipy.signal.correlate2d(one[..., place], kernel[:, :, place, 0], "same") for place in (0, 1))
        for one in pooled
    ]
    spatial = sigmoid(normalised(np.stack(seen)[..., None], weights, "spatial_bn"))
    return channel, spatial, np.maximum(x + features * spatial, 0)


def non_local(x, pooled, weights):
    """Return attention and output in NumPy; `pooled` is what phi and g see."""
    rows = pointwise(x.reshape(len(x), -1, x.shape[-1]), weights, "theta")
    pooled = pooled.reshape(len(x), -1, x.shape[-1])
    attention = scipy.special.softmax(rows @ pointwise(pooled, weights, "phi").transpose(0, 2, 1), axis=-1)
    average = (attention @ pointwise(pooled, weights, "g")).reshape(*x.shape[:3], -1)
    return attention, x + normalised(pointwise(average, weights, "projection"), weights, "bn")


# osdn_caml 3
@pytest.mark.parametrize("reduction", [2, 16])
def test_dual_attention_matches_numpy(reduction):
    layer, weights = made(DualAttention(reduction))
    channel, spatial, output = dual_attention(X, weights)
    found = layer.gates(X)
    np.testing.assert_allclose(found[0], channel, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found[1], spatial, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(layer(X), output, rtol=1e-4, atol=1e-5)
    assert weights["squeeze/kernel"].shape == (4, 4 // reduction or 1)


# osdn_caml 3: shape, sign, gates in (0, 1)
def test_dual_attention_keeps_the_shape_and_gates_in_zero_one():
    layer, _ = made(DualAttention())
    output, gates = layer(X), layer.gates(X)
    assert output.shape == X.shape and tf.reduce_min(output) >= 0
    assert [gate.shape for gate in gates] == [(2, 4), (2, 8, 6, 1)]
    assert all(tf.reduce_min(gate) > 0 and tf.reduce_max(gate) < 1 for gate in gates)


# osdn_caml 3: a silent convolution leaves the residual
@pytest.mark.parametrize("training", [False, True])
def test_dual_attention_without_its_convolution_rectifies(training):
    layer, _ = made(DualAttention())
    for variable in (layer.convolution.kernel, layer.normalisation.beta, layer.normalisation.moving_mean):
        variable.assign(tf.zeros_like(variable))
    np.testing.assert_allclose(layer(X, training=training), np.maximum(X, 0), atol=1e-6)


# osdn_caml 4
@pytest.mark.parametrize(("max_positions", "factor"), [(48, 1), (47, 2), (12, 2), (4, 4)])
def test_non_local_matches_numpy_at_any_pooling(max_positions, factor):
    layer, weights = made(NonLocal(max_positions))
    heights, widths = (-(-side // factor) for side in X.shape[1:3])
    pooled = np.zeros((2, heights, widths, 4))
    for row, column in np.ndindex(heights, widths):  # a border narrower than `factor` is averaged over what it has
        at = np.s_[:, row * factor : (row + 1) * factor, column * factor : (column + 1) * factor]
        pooled[:, row, column] = X[at].mean(axis=(1, 2))
    attention, output = non_local(X, pooled, weights)
    assert layer.attention(X).shape == (2, 48, heights * widths)
    np.testing.assert_allclose(layer.attention(X), attention, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(layer(X), output, rtol=1e-4, atol=1e-4)


# osdn_caml 4: identity at first, rows sum to 1, a constant image is attended evenly
@pytest.mark.parametrize("training", [False, True])
def test_non_local_starts_as_the_identity(training):
    np.testing.assert_array_equal(NonLocal()(X, training=training), X)


def test_non_local_attention_rows_sum_to_one_and_are_even_on_a_constant_image():
    layer, _ = made(NonLocal())
    np.testing.assert_allclose(tf.reduce_sum(layer.attention(X), axis=-1), np.ones((2, 48)), rtol=1e-5)
    np.testing.assert_allclose(layer.attention(np.ones_like(X)), np.full((2, 48, 48), 1 / 48), rtol=1e-5)


# osdn_caml 4: without pooling the block does not know where a pixel is
def test_non_local_commutes_with_permuting_pixels():
    layer, _ = made(NonLocal())
    order = np.random.default_rng(2).permutation(48)

    def permuted(x):
        return np.reshape(np.reshape(x, (2, 48, 4))[:, order], x.shape)

    np.testing.assert_allclose(layer(permuted(X)), permuted(layer(X)), rtol=1e-4, atol=1e-5)


def test_non_local_convolutions_start_small_without_bias_and_not_alike():
    layer = NonLocal()
    layer(np.zeros((1, 2, 2, 64), "float32"))
    for convolution in (layer.theta, layer.phi):
        np.testing.assert_allclose(np.std(convolution.kernel), 0.01, rtol=0.1)
        assert not np.any(convolution.bias)
    assert not np.allclose(layer.theta.kernel, layer.phi.kernel)


@BLOCKS
def test_denoising_block_has_the_same_gradients_compiled(block):
    layer, _ = made((DualAttention if "reduction" in block else NonLocal).from_config(block))

    def gradients(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            loss = tf.reduce_mean(layer(x, training=True) ** 2)
        return tape.gradient(loss, [x, *layer.trainable_variables])

    compiled = tf.function(gradients, jit_compile=True)(tf.constant(X))
    for one, other in zip(gradients(tf.constant(X)), compiled):
        np.testing.assert_allclose(other, one, rtol=1e-3, atol=1e-4)


def test_denoising_blocks_normalise_as_the_backbones_do():
    dual, other = made(DualAttention())[0], made(NonLocal())[0]
    found = [dual.normalisation, other.normalisation, dual.spatial_normalisation]
    assert [layer.momentum for layer in found] == [0.9, 0.9, 0.99]
    assert all(layer.epsilon == 1e-5 and layer.fused and not layer.synchronized for layer in found)


@BLOCKS
def test_denoising_block_is_synchronized_over_replicas(block):
    devices = [device.name for device in tf.config.list_logical_devices("CPU")]
    with mirrored(tuple(devices)).scope():
        layer = (DualAttention if "reduction" in block else NonLocal).from_config(block)
        keras.Model(image := keras.Input((4, 4, 3)), layer(image))
    assert layer.normalisation.synchronized
    assert all(each.synchronized for each in layer._flatten_layers() if hasattr(each, "synchronized"))


@BLOCKS
def test_denoising_block_comes_back_from_its_file(block, tmp_path):
    layer = (DualAttention if "reduction" in block else NonLocal).from_config(block)
    model = keras.Sequential([keras.Input(X.shape[1:]), layer])
    made(layer)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(loaded(X), model(X))
    assert loaded.layers[0].get_config() == block


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
@pytest.mark.parametrize("name", DENOISERS)
def test_denoising_block_attends_in_float32_under_mixed_precision(name, policy):
    layer, _ = made(DENOISERS[name](dtype=policy))
    full, _ = made(DENOISERS[name]())
    assert layer(X).dtype == layer.compute_dtype != "float32"
    assert all(variable.dtype == tf.float32 for variable in layer.weights)
    gates = layer.gates(X) if name == "cbam" else [layer.attention(X)]
    assert all(gate.dtype == tf.float32 for gate in gates)
    np.testing.assert_allclose(tf.cast(layer(X), tf.float32), full(X), rtol=0.05, atol=0.1)


def test_non_local_attention_does_not_overflow_float16():
    layer, _ = made(NonLocal(dtype="mixed_float16"))
    assert np.isfinite(layer.attention(1000 * X)).all() and np.isfinite(layer(1000 * X)).all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DualAttention(0), "the reduction of DualAttention must be at least 1, not 0"),
        (lambda: NonLocal(0), "max_positions of NonLocal must be at least 1, not 0"),
        (lambda: DualAttention(name="a")(X[0]), r"layer 'a' takes \(batch, height, width, channels\), not \(8, 6, 4\)"),
        (lambda: NonLocal(name="a")(X[0]), r"layer 'a' takes \(batch, height, width, channels\), not \(8, 6, 4\)"),
        (
            lambda: NonLocal(name="a")(keras.Input((None, 8, 3))),
            r"layer 'a' needs images of a fixed size, not \(None, None, 8, 3\)",
        ),
    ],
)
def test_denoising_block_refuses(make, message):
    with pytest.raises(UsageError, match=f"^{message}$"):
        make()

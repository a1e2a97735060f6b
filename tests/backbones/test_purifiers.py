"""The purifiers: the acceptance properties of AToP's specification, sizes, precision, saving, training, errors."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf
from sklearn.datasets import load_digits

from kerasdefense import backbones
from kerasdefense.backbones import PURIFIERS, build_purifier
from kerasdefense.backbones.masked_autoencoder import masked_autoencoder
from kerasdefense.layers import RandomTransform
from kerasdefense.types import UsageError

SHAPE = (8, 8, 2)
WIDTHS = {"gated_inpainter": 4, "gated_unet": 8, "masked_autoencoder": 8}
"""Tiny ones."""
SEED = tf.constant([[1, 2], [3, 4], [5, 6]])


def small(name, image_shape=SHAPE):
    keras.utils.set_random_seed(0)
    depth = {"depth": 1, "decoder_depth": 1} if name == "masked_autoencoder" else {}
    return PURIFIERS[name](image_shape, width=WIDTHS[name], **depth)


@pytest.fixture(scope="module", params=sorted(PURIFIERS))
def purifier(request):
    return small(request.param)


def image_of(image_shape, batch=3):
    """Return images so far from 0 and 1 that no noise is clipped."""
    return tf.constant(np.random.default_rng(0).uniform(0.4, 0.6, size=(batch, *image_shape)), tf.float32)


def masked(image_shape=SHAPE):
    image = image_of(image_shape)
    mask = np.random.default_rng(1).uniform(size=(3, *image_shape[:2], 1)) < 0.25
    mask = tf.constant(mask, tf.float32)
    return [image * (1 - mask) + 0.5 * mask, mask]


def dilations(inpainter):
    return [inpainter.get_layer(f"coarse_low{number}_conv").dilation_rate[0] for number in range(1, 6)]


def parameters(model):
    return sum(int(np.prod(each.shape)) for each in model.trainable_variables)


def test_every_purifier_is_tested():
    assert sorted(WIDTHS) == sorted(PURIFIERS)


# AToP P1: shape and range, whatever is missing
@pytest.mark.parametrize("missing", [0.0, 1.0])
def test_images_are_whole_and_in_range(purifier, missing):
    image = tf.fill([3, *SHAPE], 0.5) if missing else image_of(SHAPE)
    restored = purifier([image, tf.fill([3, *SHAPE[:2], 1], missing)])
    assert sorted(restored) == ["coarse", "refined"] and purifier.input_names == ["image", "mask"]
    for each in restored.values():
        assert each.shape == image.shape and each.dtype == tf.float32
        assert np.isfinite(each).all() and np.min(each) >= 0 and np.max(each) <= 1


# AToP 3: a purifier of one stage gives its image twice, one of two stages two
def test_stages_differ_where_there_are_two(purifier):
    restored = purifier(masked())
    is_same = np.array_equal(restored["coarse"], restored["refined"])
    assert is_same == (purifier.name != "gated_inpainter")


# AToP P2: what is left out does not reach the image, what is visible does
@pytest.mark.parametrize("kind", [1, 2])
def test_left_out_pixels_do_not_reach_the_restored_image(purifier, kind):
    transform, image = RandomTransform(kind, sigma=0.05), image_of(SHAPE)
    with tf.GradientTape() as tape:
        tape.watch(image)
        given, mask = transform(image, SEED)
        total = tf.reduce_sum(purifier([given, mask])["refined"])
    gradient = np.abs(tape.gradient(total, image))
    is_missing = np.broadcast_to(mask.numpy() == 1, gradient.shape)
    assert 0 < is_missing.mean() < 1
    assert gradient[is_missing].max() == 0 and gradient[~is_missing].min() > 0


def test_mask_reaches_the_restored_image(purifier):
    image, mask = masked()
    shifted = tf.roll(mask, 1, axis=1)
    assert np.abs(purifier([image, mask])["refined"] - purifier([image, shifted])["refined"]).max() > 1e-4


def test_purifier_is_saved_whole(purifier, tmp_path):
    purifier.save(tmp_path / "purifier.keras")
    loaded = keras.models.load_model(tmp_path / "purifier.keras")
    for name, each in purifier(masked()).items():
        np.testing.assert_array_equal(loaded(masked())[name], each)


# AToP 14: images, and so the losses on them, stay float32
def test_mixed_precision_keeps_images_in_float32(purifier):
    mixed, given = backbones.with_precision(purifier, "mixed_bfloat16"), masked()
    policies = {
        each.dtype_policy.name
        for each in mixed.layers
        if each.weights and each.name not in ("coarse", "refined", "restored")
    }
    assert policies == {"mixed_bfloat16"}
    for name, each in purifier(given).items():
        restored = mixed(given)[name]
        assert restored.dtype == tf.float32
        np.testing.assert_allclose(restored, each, atol=0.05)


def test_one_head_alone_may_stay_in_float32():
    mixed = backbones.with_precision(small("gated_unet"), "mixed_bfloat16", but="restored")
    assert mixed(masked())["refined"].dtype == tf.float32


# AToP 3.1: sides that cannot be halved
@pytest.mark.parametrize("name", ["gated_inpainter", "gated_unet"])
def test_images_may_have_odd_sides(name):
    model, given = small(name, (9, 7, 1)), masked((9, 7, 1))
    assert model(given)["refined"].shape == (3, 9, 7, 1)


# AToP 3.3: the small purifier
def test_parameters_of_the_unet_are_those_of_its_sizes():
    assert parameters(build_purifier("gated_unet", (32, 32, 3))) == 78_283


# AToP 3.1: each gated convolution has k^2 i weights and a bias for both halves of its outputs; c = 48
def test_parameters_of_the_inpainter_are_those_of_the_specification():
    def gates(*sizes, kernel=3):
        return sum((kernel**2 * before + 1) * 2 * after for before, after in sizes)

    middle, up = (96, 96), [(96, 48), (48, 48), (48, 24), (24, 12)]
    head = 9 * 12 * 3 + 3
    coarse = gates((5, 24), kernel=5) + gates((24, 48), (48, 48), (48, 96), (96, 96), *[middle] * 7, *up) + head
    dilated = gates((3, 24), kernel=5) + gates((24, 24), (24, 48), (48, 48), (48, 96), *[middle] * 5)
    plain = gates((3, 24), kernel=5) + gates((24, 24), (24, 48), (48, 96), (96, 96), *[middle] * 3)
    joined = gates((192, 96), middle, *up) + head
    model = build_purifier("gated_inpainter", (128, 128, 3))
    assert dilations(model) == [1, 2, 4, 8, 16]
    assert parameters(model) == coarse + dilated + plain + joined == 4_052_478
    assert [each.name for each in model.layers if getattr(each, "activation", "") == "relu"] == ["plain_low_gate"]


# AToP 3.1: dilated convolutions see more than the pixel that they are centred on
@pytest.mark.parametrize(("side", "expected"), [(8, [1, 1, 1, 1, 1]), (32, [1, 2, 4, 4, 4])])
def test_dilations_are_at_most_half_the_side(side, expected):
    assert dilations(build_purifier("gated_inpainter", (side, side, 1), width=4)) == expected


# AToP 3.1: the second stage sees what the first restored where pixels are missing, and the image elsewhere
def test_second_stage_sees_the_composite():
    model, (image, mask) = small("gated_inpainter"), masked()
    seen = keras.Model(model.input, [model.get_layer("scaled_composite").output, model.output["coarse"]])
    composite, coarse = seen([image, mask])
    np.testing.assert_allclose(composite, 2 * (coarse * mask + image * (1 - mask)) - 1, atol=1e-6)


# AToP 3.2: heads divide the width; encoder and decoder are as deep as they are told
@pytest.mark.parametrize(("width", "heads"), [(8, 1), (192, 3), (200, 2), (131, 1)])
def test_heads_of_the_attention_divide_the_width(width, heads):
    model = masked_autoencoder((8, 8, 1), width=width, depth=2, decoder_depth=1)
    attention = [each for each in model.layers if isinstance(each, keras.layers.MultiHeadAttention)]
    assert [each.name for each in attention] == ["encoder1_attention", "encoder2_attention", "decoder1_attention"]
    assert [each.get_config()["num_heads"] for each in attention] == 3 * [heads]


# a new purifier passes something of the image on, through however many gates
def test_restored_images_depend_on_the_image_before_training(purifier):
    image, mask = masked()
    for each in purifier([image, tf.repeat(mask[:1], 3, axis=0)]).values():
        assert np.std(each, axis=0).mean() > 1e-4


# AToP S3, on digits: the L1 distance of what RT2 left
@pytest.mark.parametrize("name", sorted(PURIFIERS))
def test_loss_falls_within_fifty_steps(name, digits_of_rt2):
    model, optimizer = small(name, (8, 8, 1)), keras.optimizers.Adam(0.01)

    @tf.function
    def step(image, given, mask):
        with tf.GradientTape() as tape:
            restored = model([given, mask], training=True).values()
            loss = tf.add_n([tf.reduce_mean(tf.abs(image - each)) for each in restored])
        optimizer.minimize(loss, model.trainable_variables, tape)
        return loss

    losses = [float(step(*batch)) for batch in digits_of_rt2]
    assert len(losses) == 50 and np.mean(losses[-10:]) < 0.65 * np.mean(losses[:3])


@pytest.fixture(scope="module")
def digits_of_rt2():
    """Return 50 batches of images, of what RT2 left of them, and of masks."""
    image = tf.constant(load_digits().images[:800, ..., None] / 16, tf.float32)
    seed = tf.stack([tf.range(800), tf.range(800)], axis=1)
    given, mask = tf.function(RandomTransform(2))(image, seed)
    return list(zip(*(tf.split(each, 50) for each in (image, given, mask))))


# 0 is the width that a purifier has by default
def test_purifiers_are_built_by_name():
    for width, channels in ((0, 20), (9, 9)):
        model = build_purifier("gated_unet", (8, 8, 1), width=width)
        assert model.name == "gated_unet" and model.get_layer("down1_1_gate").output_shape[-1] == channels


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: build_purifier("unet", SHAPE), "unknown purifier 'unet'; valid: gated_inpainter, gated_unet, masked"),
        (lambda: build_purifier("gated_unet", SHAPE, width=-1), "at least 1, or 0 for its default, not -1"),
        (lambda: PURIFIERS["gated_unet"](SHAPE, width=0), "the width of a purifier must be at least 1, not 0"),
        (lambda: build_purifier("gated_inpainter", SHAPE, width=3), "of two stages must be at least 4, not 3"),
        (lambda: build_purifier("gated_inpainter", (8, 8)), r"image_shape must be \(height, width, channels\)"),
        (lambda: masked_autoencoder((9, 8, 1), width=8), "patches of 4 pixels do not divide images of 9 x 8"),
        (lambda: masked_autoencoder(SHAPE, width=1), "a masked autoencoder must be at least 2, not 1"),
        (lambda: masked_autoencoder(SHAPE, patch=0), "the size of a patch must be at least 1 pixel, not 0"),
        (lambda: masked_autoencoder(SHAPE, depth=0), "encoder and decoder need at least 1 block each, not 0 and 2"),
    ],
)
def test_purifiers_refuse(make, message):
    with pytest.raises(UsageError, match=message):
        make()

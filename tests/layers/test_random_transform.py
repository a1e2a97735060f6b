"""The random transforms: the acceptance properties T1 to T5 of AToP's specification, seeds, sizes, saving, errors."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf

from kerasdefense import UsageError
from kerasdefense.layers import RandomTransform

SHAPE, BATCH = (8, 8, 2), 5
SEED = tf.constant([[3, 1], [3, 2], [4, 1], [-7, 9], [2**31 - 1, -(2**31)]])
GREY = tf.fill([BATCH, *SHAPE], 0.5)


def image_of(batch=BATCH, shape=SHAPE):
    return tf.constant(np.random.default_rng(0).uniform(size=(batch, *shape)), tf.float32)


def blocks_of(mask, size):
    """Return masks [batch, h, w, 1] as [batch, blocks, pixels of a block]."""
    batch, height, width, _ = mask.shape
    parts = np.reshape(mask, [batch, height // size, size, width // size, size]).transpose(0, 1, 3, 2, 4)
    return parts.reshape(batch, -1, size * size)


# AToP T1: so many blocks of each image, whole ones, 0 or 1
@pytest.mark.parametrize("kind", [1, 2])
@pytest.mark.parametrize(
    ("shape", "rate", "size"),
    [((8, 8, 2), 0.25, 0), ((8, 8, 2), 0.3, 2), ((16, 24, 1), 0.99, 4), ((6, 4, 3), 0.5, 2), ((16, 16, 1), 0.25, 0)],
)
def test_so_many_whole_blocks_of_each_image_are_left_out(kind, shape, rate, size):
    _, mask = RandomTransform(kind, missing_rate=rate, block_size=size)(image_of(shape=shape), SEED)
    side = size or shape[0] // 8
    blocks = blocks_of(mask.numpy(), side)
    assert mask.shape == (BATCH, *shape[:2], 1) and set(np.unique(blocks)) <= {0, 1}
    assert (blocks == blocks[..., :1]).all()
    assert (blocks[..., 0].sum(axis=1) == int(rate * shape[0] * shape[1] / side**2)).all()


# AToP T1: each block is as likely as any other
def test_every_block_is_left_out_equally_often():
    seed = tf.stack([tf.range(1000), tf.range(1000) // 7], axis=1)
    draw = tf.function(RandomTransform(1, missing_rate=0.25, block_size=4).drawn_masks)
    mask = draw(seed, 8, 8).numpy()
    np.testing.assert_allclose(mask.mean(axis=0), 0.25, atol=4 * np.sqrt(0.25 * 0.75 / 1000))


# AToP T2: every pixel comes from a pass in which it was left out, and from one only
@pytest.mark.parametrize("masks", [2, 3, 4, 16])
def test_union_of_all_passes_is_of_what_was_left_out(masks):
    transform = RandomTransform(3, masks=masks, block_size=2)
    given, mask = transform(image_of(), SEED)
    assert given.shape == (BATCH * masks, *SHAPE)
    parts = mask.numpy().reshape(BATCH, masks, *SHAPE[:2], 1)
    np.testing.assert_array_equal(parts.sum(axis=1), 1)
    seven_where_missing = tf.broadcast_to(7 * mask, given.shape)
    np.testing.assert_array_equal(transform.join(seven_where_missing, mask), np.full((BATCH, *SHAPE), 7))
    np.testing.assert_array_equal(transform.join(given, mask), np.full((BATCH, *SHAPE), 0.5))


# AToP T2: each pass takes its own part of a purifier that answers another thing in each
def test_each_pass_gives_its_own_blocks():
    transform = RandomTransform(3, masks=4, block_size=2)
    given, mask = transform(image_of(), SEED)
    number = tf.reshape(tf.tile(tf.range(4.0), [BATCH]), [-1, 1, 1, 1]) + tf.zeros_like(given)
    parts = mask.numpy().reshape(BATCH, 4, *SHAPE[:2], 1)
    expected = np.broadcast_to(parts.argmax(axis=1), (BATCH, *SHAPE))
    np.testing.assert_array_equal(transform.join(number, mask), expected)


# AToP 2: equal parts, the last mask with what is left over
@pytest.mark.parametrize(("masks", "parts"), [(3, [5, 5, 6]), (7, [2] * 6 + [4]), (9, [1] * 8 + [8])])
def test_remaining_blocks_go_to_the_last_mask(masks, parts):
    _, mask = RandomTransform(3, masks=masks, block_size=2)(image_of(), SEED)
    counts = blocks_of(mask.numpy(), 2)[..., 0].sum(axis=1).reshape(BATCH, masks)
    np.testing.assert_array_equal(counts, [parts] * BATCH)


# AToP 2: one noise tensor for all passes of an image
def test_passes_of_an_image_share_their_noise():
    given, mask = RandomTransform(3, masks=2, block_size=2)(image_of(), SEED)
    one, two = (given[each::2].numpy() for each in (0, 1))
    noisy = np.where(mask[::2] == 1, two, one)
    np.testing.assert_array_equal(noisy, RandomTransform(2, missing_rate=0.0)(image_of(), SEED)[0])


# AToP T3: without noise and holes images pass bit for bit, and noise is all that RT2 has besides RT1
@pytest.mark.parametrize("settings", [{"kind": 0}, {"kind": 1, "missing_rate": 0.0}, {"kind": 2, "missing_rate": 0.0}])
def test_transform_of_nothing_is_the_identity(settings):
    transform = RandomTransform(**settings, sigma=0.0)
    given, mask = transform(image_of(), SEED)
    np.testing.assert_array_equal(given, image_of())
    np.testing.assert_array_equal(mask, np.zeros((BATCH, *SHAPE[:2], 1)))
    np.testing.assert_array_equal(transform.join(given, mask), image_of())
    assert not transform.is_random and transform.passes == 1


# AToP T3: RT1 is RT2 without noise
def test_first_transform_is_the_second_without_noise():
    first, second = (RandomTransform(kind, sigma=sigma)(image_of(), SEED) for kind, sigma in ((1, 0.5), (2, 0.0)))
    for one, two in zip(first, second):
        np.testing.assert_array_equal(one, two)


# AToP T4: noise of the standard deviation that was asked for, in range
def test_noise_has_its_standard_deviation():
    grey = tf.fill([8, 64, 64, 3], 0.5)
    seed = tf.stack([tf.range(8), tf.range(8)], axis=1)
    change = RandomTransform(2, sigma=0.1, missing_rate=0.0)(grey, seed)[0].numpy() - 0.5
    assert change.std() == pytest.approx(0.1, rel=0.02) and abs(change.mean()) < 0.002
    assert np.abs(change).max() <= 0.5
    apart = np.corrcoef(change.reshape(8, -1)) - np.eye(8)
    assert np.abs(apart).max() < 0.05


# AToP T4: clipped after the noise, before the holes
def test_images_stay_in_range():
    given, mask = RandomTransform(2, sigma=2.0)(image_of(), SEED)
    assert given.numpy().min() == 0 and given.numpy().max() == 1
    np.testing.assert_array_equal(given.numpy()[np.broadcast_to(mask == 1, given.shape)], 0.5)


# AToP 2: holes are grey, what is visible is as it was
def test_holes_are_filled_with_grey():
    image = image_of()
    given, mask = RandomTransform(1)(image, SEED)
    np.testing.assert_array_equal(given, np.where(mask == 1, np.float32(0.5), image))


# AToP T5: the same seed gives the same, another gives another, and images of a batch differ
@pytest.mark.parametrize("kind", [1, 2, 3])
def test_what_is_drawn_depends_on_the_seed(kind):
    transform = RandomTransform(kind)
    one, again, other = (transform(GREY, seed) for seed in (SEED, SEED, SEED + 5))
    for first, second in zip(one, again):
        np.testing.assert_array_equal(first, second)
    own, others = (each[1].numpy().reshape(BATCH, transform.passes, -1) for each in (one, other))
    assert (own != others).any(axis=2).all()
    assert len({each.tobytes() for each in own}) == BATCH
    if kind > 1:
        noise = one[0].numpy().reshape(BATCH, -1)
        assert (noise != other[0].numpy().reshape(BATCH, -1)).any(axis=1).all() and len(np.unique(noise, axis=0)) == 5


# AToP T5: an image is transformed alike in any batch and at any place in it
@pytest.mark.parametrize("kind", [1, 2, 3])
def test_transformed_image_does_not_depend_on_its_batch(kind):
    transform, image = RandomTransform(kind), image_of()
    whole = [each.numpy().reshape(BATCH, transform.passes, -1) for each in transform(image, SEED)]
    for rows in ([3], [4, 0], [2, 2, 1, 0, 4, 3]):
        part = transform(tf.gather(image, rows), tf.gather(SEED, rows))
        for found, expected in zip(part, whole):
            np.testing.assert_array_equal(found.numpy().reshape(len(rows), transform.passes, -1), expected[rows])


# AToP T5, 2: one mask for a batch, noise for each image
def test_images_of_a_batch_may_share_the_mask_of_the_first():
    _, own = RandomTransform(2)(GREY, SEED)
    given, mask = RandomTransform(2, scope="batch")(GREY, SEED)
    np.testing.assert_array_equal(mask, np.repeat(own[:1], BATCH, axis=0))
    assert len({each.tobytes() for each in given.numpy()}) == BATCH
    _, parts = RandomTransform(3, scope="batch")(GREY, SEED)
    np.testing.assert_array_equal(parts, np.tile(parts[:4], [BATCH, 1, 1, 1]))


# AToP T5: without a seed nobody can foresee what is drawn, in a graph that was traced once either
def test_fresh_draws_differ_from_call_to_call():
    transform = RandomTransform(2)
    tf.random.set_seed(1)
    compiled = tf.function(transform)
    for call in (transform, compiled):
        drawn = []
        for _ in range(3):
            tf.random.set_seed(1)
            drawn += [np.concatenate([each.numpy().ravel() for each in call(GREY)])]
        assert len({each.tobytes() for each in drawn}) == 3
    assert compiled.experimental_get_tracing_count() == 1
    _, mask = compiled(GREY)
    assert len({each.tobytes() for each in mask.numpy()}) > 1


def test_two_transforms_in_one_graph_draw_apart():
    transform = RandomTransform(2)
    one, two = tf.function(lambda image: (transform(image)[0], transform(image)[0]))(GREY)
    assert (one.numpy() != two.numpy()).any(axis=(1, 2, 3)).all()


def test_noise_moves_gradients_and_holes_stop_them():
    image = 0.4 + 0.2 * image_of()
    with tf.GradientTape() as tape:
        tape.watch(image)
        given, mask = RandomTransform(2, sigma=0.01)(image, SEED)
    np.testing.assert_array_equal(tape.gradient(given, image), np.broadcast_to(1 - mask, image.shape))


@pytest.mark.parametrize(
    ("settings", "is_random"),
    [
        ({"kind": 1}, True),
        ({"kind": 1, "missing_rate": 0.0, "sigma": 0.5}, False),
        ({"kind": 2, "missing_rate": 0.0}, True),
        ({"kind": 2, "sigma": 0.0}, True),
        ({"kind": 3, "missing_rate": 0.0, "sigma": 0.0}, True),
    ],
)
def test_transform_says_whether_it_draws(settings, is_random):
    assert RandomTransform(**settings).is_random == is_random
    one, two = (RandomTransform(**settings)(image_of(), seed) for seed in (SEED, SEED + 5))
    assert any(np.any(first != second) for first, second in zip(one, two)) == is_random


def test_every_setting_comes_back_from_the_configuration():
    settings = {"kind": 3, "sigma": 0.5, "missing_rate": 0.125, "block_size": 2, "masks": 5, "scope": "batch"}
    transform = RandomTransform(**settings, name="transform")
    config = transform.get_config()
    assert {name: config[name] for name in settings} == settings
    rebuilt = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(transform))
    assert type(rebuilt) is RandomTransform and rebuilt.name == "transform"
    for one, two in zip(transform(GREY, SEED), rebuilt(GREY, SEED)):
        np.testing.assert_array_equal(one, two)


@pytest.mark.parametrize(
    ("size", "shape", "grid"),
    [(0, (8, 8), (8, 8)), (0, (32, 32), (8, 8)), (0, (16, 24), (8, 12)), (0, (6, 5), (6, 5)), (4, (8, 12), (2, 3))],
)
def test_blocks_are_an_eighth_of_the_height_unless_given(size, shape, grid):
    assert RandomTransform(1, block_size=size).grid(*shape) == grid


@pytest.mark.parametrize(
    ("settings", "shape", "message"),
    [
        ({"block_size": 3}, (8, 8, 1), "blocks of 3 pixels do not divide images of 8 x 8: give a size that divides"),
        ({"block_size": 4}, (8, 6, 1), "blocks of 4 pixels do not divide images of 8 x 6"),
        ({}, (28, 28, 1), "blocks of an eighth of the height do not divide images of 28 x 28"),
        ({}, (16, 9, 1), "blocks of an eighth of the height do not divide images of 16 x 9"),
        ({"kind": 3, "masks": 5, "block_size": 4}, (8, 8, 1), "5 masks cannot share 4 blocks"),
    ],
)
def test_images_without_whole_blocks_are_refused(settings, shape, message):
    with pytest.raises(UsageError, match=message):
        RandomTransform(**settings).grid(*shape[:2])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": 4}, "a random transform is 1, 2 or 3, or 0 for none, not 4"),
        ({"kind": -1}, "a random transform is 1, 2 or 3, or 0 for none, not -1"),
        ({"sigma": -0.1}, r"the noise of a random transform must be finite and at least 0, not -0\.1"),
        ({"sigma": float("inf")}, "must be finite and at least 0, not inf"),
        ({"sigma": float("nan")}, "must be finite and at least 0, not nan"),
        ({"missing_rate": 1.0}, r"the share of blocks left out must be in \[0, 1\), not 1\.0"),
        ({"missing_rate": -0.1}, r"must be in \[0, 1\), not -0\.1"),
        ({"missing_rate": float("nan")}, r"must be in \[0, 1\), not nan"),
        ({"block_size": -1}, "the size of a block must be at least 1 pixel, or 0 for an eighth, not -1"),
        ({"masks": 1}, "RT3 needs at least 2 masks, not 1"),
        ({"scope": "pixel"}, "masks are drawn for each image or batch, not for each pixel"),
    ],
)
def test_settings_that_say_nothing_are_refused(settings, message):
    with pytest.raises(UsageError, match=message):
        RandomTransform(**settings)

"""Optimizers that begin anew: they step as fresh ones do, at the learning rate of where training stands."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from kerasdefense.defenses import forgetting

GRADIENTS = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)


def schedule():
    return keras.optimizers.schedules.PolynomialDecay(0.5, 10, 0.1)


@pytest.mark.parametrize("kind", [keras.optimizers.Adam, lambda rate: keras.optimizers.SGD(rate, momentum=0.9)])
@pytest.mark.parametrize("rate", [0.3, None], ids=["constant", "schedule"])
def test_optimizer_that_has_forgotten_steps_as_a_fresh_one(kind, rate):
    step, variable = tf.Variable(0, dtype=tf.int64), tf.Variable([1.0, 2.0, 3.0])
    optimizer = kind(rate or schedule())
    optimizer.build([variable])
    forgetting.follow(optimizer, step)
    for gradient in GRADIENTS[:3]:
        optimizer.apply_gradients([(tf.constant(gradient), variable)])
        step.assign_add(1)
    forgetting.forget(optimizer)
    other = tf.Variable(variable)
    fresh = kind(rate or float(schedule()(3)))
    before = variable.numpy()
    for each, moved in ((optimizer, variable), (fresh, other)):
        each.apply_gradients([(tf.constant(GRADIENTS[3]), moved)])
    np.testing.assert_allclose(variable, other, rtol=1e-6)
    assert np.abs(variable.numpy() - before).max() > 0.01


def test_optimizer_that_follows_a_counter_is_saved_with_its_own_schedule():
    optimizer, step = keras.optimizers.Adam(schedule()), tf.Variable(0, dtype=tf.int64)
    expected = keras.saving.serialize_keras_object(optimizer)
    forgetting.follow(optimizer, step)
    assert forgetting.serialised(optimizer) == expected
    assert isinstance(optimizer._learning_rate, forgetting.ByStep)

"""Optimizers and their schedules."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from kerasdefense import config, training
from kerasdefense.types import UsageError


def rates(steps=100, **train):
    rate = training.make_optimizer(config.Train(learning_rate=0.4, **train), steps)._learning_rate
    return [float(rate(step)) for step in (0, 25, 50, 75, 100)]


def test_triangular_rate_rises_to_middle_and_falls_to_zero():
    np.testing.assert_allclose(rates(schedule="triangular"), [0, 0.2, 0.4, 0.2, 0], atol=1e-6)


def test_cosine_rate_falls_from_start_to_zero():
    expected = 0.2 * (1 + np.cos(np.pi * np.array([0, 0.25, 0.5, 0.75, 1])))
    np.testing.assert_allclose(rates(schedule="cosine"), expected, atol=1e-6)


def test_step_rate_drops_tenfold_after_given_shares():
    np.testing.assert_allclose(rates(schedule="step", drops="0.3,0.7"), [0.4, 0.4, 0.04, 0.004, 0.004], atol=1e-7)


def test_property_18_rate_is_multiplied_by_the_factor_after_epochs_60_120_and_160():
    train = config.Train(learning_rate=0.1, schedule="step", drops="0.3,0.6,0.8", drop_factor=0.2)
    rate = training.make_optimizer(train, 200 * 375)._learning_rate

    def at(epoch):
        return float(rate(375 * (epoch - 1))), float(rate(375 * epoch - 1))  # its first and its last step

    expected = {1: 0.1, 60: 0.1, 61: 0.02, 120: 0.02, 121: 0.004, 160: 0.004, 161: 0.0008, 200: 0.0008}
    for epoch, value in expected.items():
        np.testing.assert_allclose(at(epoch), value, rtol=1e-6, err_msg=f"epoch {epoch}")


def test_factor_of_nothing_is_refused():
    with pytest.raises(UsageError, match="--train_drop_factor=0 must be above 0 and at most 1"):
        rates(schedule="step", drop_factor=0.0)


@pytest.mark.parametrize("drops", ["", "half", "0.7,0.3", "0.5,0.5", "0,0.5", "0.5,1"])
def test_drops_that_do_not_rise_within_the_run_are_refused(drops):
    with pytest.raises(UsageError, match="rising shares of the run"):
        rates(schedule="step", drops=drops)


def test_optimizer_does_not_decay_offsets_and_scales():
    optimizer = training.make_optimizer(config.Train(learning_rate=0.1, schedule="constant", weight_decay=0.5), 10)
    image = keras.Input([3])
    model = keras.Model(image, keras.layers.BatchNormalization()(keras.layers.Dense(3)(image)))
    optimizer.exclude_from_weight_decay(var_names=["gamma", "beta", "bias"])
    optimizer.build(model.trainable_variables)
    before = [variable.numpy() for variable in model.trainable_variables]
    optimizer.apply_gradients((tf.zeros_like(each), each) for each in model.trainable_variables)
    for variable, value in zip(model.trainable_variables, before):
        factor = 0.95 if "kernel" in variable.name else 1.0
        np.testing.assert_allclose(variable, value * factor, atol=1e-6)

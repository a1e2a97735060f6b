"""Gates: both halves, either activation, saving."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf

from kerasdefense.layers import Gate
from kerasdefense.types import UsageError

FEATURES = np.random.default_rng(0).normal(0, 2, [2, 3, 3, 6]).astype(np.float32)


@pytest.mark.parametrize("activation", ["elu", "relu"])
def test_one_half_of_the_channels_gates_the_other(activation):
    gate = Gate.from_config(Gate(activation).get_config())
    first, second = np.split(FEATURES, 2, axis=-1)
    passed = np.maximum(first, 0) if activation == "relu" else np.where(first > 0, first, np.expm1(first))
    np.testing.assert_allclose(gate(tf.constant(FEATURES)), passed / (1 + np.exp(-second)), rtol=1e-5, atol=1e-6)


def test_unknown_activation_is_refused():
    with pytest.raises(UsageError, match="unknown activation of a gate 'tanh'; valid: elu, relu"):
        Gate("tanh")

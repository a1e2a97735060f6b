"""Layers that draw at random, such as Dropout in a user's own model: seeded anew at every epoch.

Only so does training that is resumed draw what it would have drawn: Keras does not save the state of a layer's
generator and, by default, gives it none that could be set.
"""

from __future__ import annotations

from typing import Any, Optional

import keras
import numpy as np


def use_generators() -> None:
    """Have layers that are made from now on draw from a generator whose state can be set."""
    keras.backend.experimental.enable_tf_random_generator()


class SeedEpochs(keras.callbacks.Callback):
    """Begin an epoch: every layer's generator is set from the run's seed, the epoch and the layer's place.

    Before that the defense does what it does once an epoch.
    """

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.seed = seed

    def on_epoch_begin(self, epoch: int, logs: Optional[dict[str, Any]] = None) -> None:
        """Set the generators."""
        self.model.begin_epoch()
        layers = [each for each in self.model.submodules if isinstance(each, keras.__internal__.layers.BaseRandomLayer)]
        for place, layer in enumerate(layers):
            generator = layer._random_generator._generator
            if generator is None:  # the layer draws by seeds of its own
                continue
            seed = np.random.SeedSequence([self.seed, epoch, place]).generate_state(1)[0]
            generator.reset_from_seed(int(seed))

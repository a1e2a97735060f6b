"""A random transform and the purifier that restores what it destroyed, as one model in front of any classifier."""

from __future__ import annotations

from typing import Any, Optional

import keras
import tensorflow as tf

from kerasdefense.layers import RandomTransform


def purified(
    transform: RandomTransform, purifier: keras.Model, image: tf.Tensor, seed: Optional[tf.Tensor] = None
) -> tf.Tensor:
    """Return images [batch, h, w, c] in [0, 1] that were transformed at random and restored.

    Args:
        transform: of one pass or several, which the purifier restores together.
        purifier: from `[image, mask]` to `coarse` and `refined`, of which the second is taken.
        image: float32 [batch, h, w, c] in [0, 1].
        seed: int32 [batch, 2], what each image is transformed by; None = fresh ones.
    """
    given, mask = transform(image, seed)
    restored = tf.cast(purifier([given, mask], training=False)["refined"], tf.float32)
    return transform.join(restored, mask)


@keras.saving.register_keras_serializable(package="kerasdefense")
class Purification(keras.Model):
    """Images to images in [0, 1], transformed at random and restored; differentiable.

    Args:
        transform: the random transform.
        purifier: from `[image, mask]` to `coarse` and `refined`, as `build_purifier` returns it.
    """

    def __init__(self, transform: RandomTransform, purifier: keras.Model, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.transform = transform
        self.purifier = purifier
        self(keras.Input(purifier.input_shape[0][1:]))  # so that Keras takes the image, and no seed, for its input

    @property
    def is_randomized(self) -> bool:
        """Whether two calls differ."""
        return self.transform.is_random

    def call(self, image: tf.Tensor, training: bool = False, seed: Optional[tf.Tensor] = None) -> tf.Tensor:
        """Return images of `image` [batch, h, w, c], by `seed` int32 [batch, 2], or by fresh noise without it."""
        del training
        return purified(self.transform, self.purifier, image, seed)

    def get_config(self) -> dict[str, Any]:
        """Return every constructor argument."""
        parts = ("transform", "purifier")
        return {"name": self.name, **{part: keras.saving.serialize_keras_object(getattr(self, part)) for part in parts}}

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: Optional[dict[str, Any]] = None) -> Purification:
        """Build the model, with fresh weights, from `get_config()`."""
        parts = {
            part: keras.saving.deserialize_keras_object(config[part], custom_objects=custom_objects)
            for part in ("transform", "purifier")
        }
        return cls(**{**config, **parts})

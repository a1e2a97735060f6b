"""The features by which a frozen classifier decides, and what its last layer makes of them."""

from __future__ import annotations

import keras
import tensorflow as tf

from kerasdefense import backbones, losses
from kerasdefense.defenses import teaching
from kerasdefense.types import UsageError


class ActivationFeatures:
    """Features and class activation features of a classifier, in inference mode; `kernel` is that of its last layer.

    Args:
        classifier: backbone.
        layer: whose output the features are; "" = what enters global pooling, "last_conv" = the last convolution. Where
            "" is given and the classifier does not pool by the mean, they are its embedding, a map of one place.
        released: whether class activation features are those of `losses.released_maps`.

    Raises:
        UsageError: it has no such layer that gives a feature map of as many channels as its last layer weights.
        InputError: its last layer has no kernel.
    """

    def __init__(self, classifier: keras.Model, layer: str = "", *, released: bool = False) -> None:
        self.kernel, self._released = backbones.last_kernel(classifier), released
        name = _last_convolution(classifier) if layer == "last_conv" else layer
        self._has_map = bool(layer) or backbones.pools_by_mean(classifier)
        self._watched = teaching.watched(classifier, name)
        channels, width = self._watched.output["watched"][0].shape[-1], self.kernel.shape[0]
        if layer and channels != width:
            raise UsageError(
                f"layer {name!r} of {classifier.name} has {channels} channels, but its last layer weights {width}; "
                "--defense_feature_layer must name one of as many"
            )

    def __call__(self, image: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """Return features float32 [batch, h, w, c] and logits [batch, classes] of images [batch, h, w, channels]."""
        outputs = self._watched(image, training=False)
        features = outputs["watched"][0] if self._has_map else outputs["embedding"][:, None, None, :]
        return tf.cast(features, tf.float32), outputs["logits"]

    def weighted(self, image: tf.Tensor) -> tf.Tensor:
        """Return class activation features float32 [batch, h, w, c] of images."""
        found = losses.class_activation_features(*self(image), self.kernel)
        return losses.released_maps(found, image.shape[1:3]) if self._released else found


def _last_convolution(classifier: keras.Model) -> str:
    maps = backbones.maps_of(classifier)
    found = [name for name, (layer, _) in maps.items() if isinstance(layer, keras.layers.Conv2D)]
    if not found:
        raise UsageError(f"{classifier.name} has no convolution among its layers for feature_layer=last_conv to mean")
    return found[-1]

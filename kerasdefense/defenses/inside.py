"""What backbones of a known make tell of their inside, as figures per image [batch]."""

from __future__ import annotations

import keras
import tensorflow as tf

from kerasdefense.attacks import norms
from kerasdefense.backbones import denoising_places, maps_of, orthogonal_head


def block_noise(backbone: keras.Model, image: tf.Tensor, image_adv: tf.Tensor) -> dict[str, tf.Tensor]:
    """Return the distance of attacked from clean features over the length of the clean ones, around denoising blocks.

    `noise_before_block_<place>` and `noise_after_block_<place>`, which are the same where a ResNet has no block at its
    place; none in other backbones.
    """
    tensors = {
        f"noise_{when}_block_{place}": tensor
        for place, around in denoising_places(backbone).items()
        for when, tensor in zip(("before", "after"), around)
    }
    if not tensors:
        return {}
    inside = keras.Model(backbone.input, tensors)
    clean, attacked = (inside(each, training=False) for each in (image, image_adv))
    return {name: norms.relative_distance(attacked[name], clean[name]) for name in tensors}


def axis_cosines(
    backbone: keras.Model, image: tf.Tensor, image_adv: tf.Tensor, label: tf.Tensor
) -> dict[str, tf.Tensor]:
    """Return how the embedding lies to the frozen axes of the classes; none in a backbone that has another head.

    `cosine_to_own_axis`: the absolute cosine with the axis of `label`; `cosine_to_other_axes`: the mean of those with
    the others; both in [0, 1]. `adversarial_cosine_to_own_axis`, `adversarial_cosine_to_other_axes`: of `image_adv`.
    """
    head = orthogonal_head(backbone)
    if head is None:
        return {}
    figures = {}
    for prefix, each in (("", image), ("adversarial_", image_adv)):
        direction = head.direction(backbone(each, training=False)["embedding"])
        cosine = tf.abs(head.signed_scores(direction)) / head.gain
        own = tf.gather(cosine, label, batch_dims=1)
        figures[f"{prefix}cosine_to_own_axis"] = own
        figures[f"{prefix}cosine_to_other_axes"] = (tf.reduce_sum(cosine, axis=1) - own) / (head.classes - 1)
    return figures


def layer_errors(backbone: keras.Model, image: tf.Tensor, changed: tf.Tensor) -> dict[str, tf.Tensor]:
    """Return how far the outputs of layers are off where images are changed, relative to those of `image`.

    `error_00_image`, and `error_<number>_<layer>` of every rectifier that gives a feature map, numbered from 01 on; of
    every convolution, where the backbone has no rectifiers of their own.
    """
    maps = maps_of(backbone)
    kinds: tuple[type, ...] = (keras.layers.ReLU, keras.layers.Activation)
    if not any(isinstance(layer, kinds) for layer, _ in maps.values()):
        kinds = (keras.layers.Conv2D,)
    tensors = {name: tensor for name, (layer, tensor) in maps.items() if isinstance(layer, kinds)}
    names = [f"error_{number:02d}_{name}" for number, name in enumerate(tensors, start=1)]
    figures = {"error_00_image": norms.relative_distance(changed, image)}
    if tensors:
        inside = keras.Model(backbone.input, list(tensors.values()))
        pairs = zip(*(tf.nest.flatten(inside(each, training=False)) for each in (changed, image)))
        distances = (norms.relative_distance(*(tf.cast(each, tf.float32) for each in pair)) for pair in pairs)
        figures |= dict(zip(names, distances))
    return figures

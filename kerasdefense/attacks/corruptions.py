"""Common corruptions: noise, blur, light and compression, as a reference that nobody chose in order to fool.

Every corruption takes images float32 [batch, h, w, c] in [0, 1], a severity from 1 to 5 and seeds int32 [batch, 2], and
returns images of that shape and range; an example's draw depends on its own seed alone. They run eagerly. A corruption
has no ball and searches for nothing: accuracy on corrupted images is no robust accuracy.

Source: Hendrycks & Dietterich 2019, "Benchmarking neural network robustness to common corruptions and perturbations".
Deviations: eight of their fifteen, and two of their extra ones; the constants are ours, for small images, and some
operations are simpler (light is added to all channels alike, motion is a straight line in any direction), so that
figures are not CIFAR-10-C or ImageNet-C figures.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Callable, Union

import numpy as np
import scipy.ndimage
import tensorflow as tf

from kerasdefense.attacks import seeds
from kerasdefense.types import UsageError

CorruptionFn = Callable[[tf.Tensor, int, tf.Tensor], tf.Tensor]
"""`corruption(image, severity, seed) -> image`."""

SEVERITIES = (1, 2, 3, 4, 5)


def _at(severity: int, constants: Sequence[Any]) -> Any:
    """Return the constant of a severity."""
    if severity not in SEVERITIES:
        raise UsageError(f"severity must be one of {', '.join(map(str, SEVERITIES))}, not {severity}")
    return constants[severity - 1]


def _clipped(image: Union[tf.Tensor, np.ndarray]) -> tf.Tensor:
    return tf.clip_by_value(tf.cast(image, tf.float32), 0.0, 1.0)


def _each(corrupt: Callable[[tf.Tensor, tf.Tensor], tf.Tensor], image: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
    """Return the images corrupted one by one, `corrupt(image [h, w, c], seed [2])`, and clipped."""
    each = (tf.convert_to_tensor(image, tf.float32), tf.convert_to_tensor(seed, tf.int32))
    return _clipped(tf.map_fn(lambda pair: corrupt(*pair), each, fn_output_signature=tf.float32))


def gaussian_noise(image: tf.Tensor, severity: int, seed: tf.Tensor) -> tf.Tensor:
    """Add normal noise."""
    deviation = _at(severity, (0.04, 0.06, 0.08, 0.12, 0.16))

    def noisy(one: tf.Tensor, one_seed: tf.Tensor) -> tf.Tensor:
        return one + deviation * tf.random.stateless_normal(tf.shape(one), one_seed)

    return _each(noisy, image, seed)


def shot_noise(image: tf.Tensor, severity: int, seed: tf.Tensor) -> tf.Tensor:
    """Count photons, which come at random: the fewer there are, the noisier the image."""
    photons = _at(severity, (500.0, 250.0, 100.0, 75.0, 50.0))

    def counted(one: tf.Tensor, one_seed: tf.Tensor) -> tf.Tensor:
        return tf.random.stateless_poisson(tf.shape(one), one_seed, one * photons, tf.float32) / photons

    return _each(counted, image, seed)


def impulse_noise(image: tf.Tensor, severity: int, seed: tf.Tensor) -> tf.Tensor:
    """Set a share of the values to 0 or 1."""
    share = _at(severity, (0.01, 0.02, 0.03, 0.05, 0.07))

    def sprinkled(one: tf.Tensor, one_seed: tf.Tensor) -> tf.Tensor:
        draw = tf.random.stateless_uniform(tf.shape(one), one_seed)
        return tf.where(draw < share, tf.where(draw < share / 2, 0.0, 1.0), one)

    return _each(sprinkled, image, seed)


def gaussian_blur(image: tf.Tensor, severity: int, seed: tf.Tensor) -> tf.Tensor:
    """Blur with a Gaussian kernel."""
    deviation = _at(severity, (0.4, 0.6, 0.7, 0.8, 1.0))
    return _clipped(scipy.ndimage.gaussian_filter(np.asarray(image), (0, deviation, deviation, 0)))


def motion_blur(image: tf.Tensor, severity: int, seed: tf.Tensor) -> tf.Tensor:
    """Blur along a line of a random direction."""
    pixels = _at(severity, (3, 5, 7, 9, 11))
    line = np.zeros([pixels, pixels])
    line[pixels // 2] = 1
    angles = 180 * seeds.uniform(tf.convert_to_tensor(seed), tf.zeros([len(seed)], tf.int32), 1)[:, 0]

    def moved(one: np.ndarray, angle: float) -> np.ndarray:
        turned = scipy.ndimage.rotate(line, angle, reshape=False, order=1)
        return scipy.ndimage.convolve(one, (turned / turned.sum())[:, :, None], mode="nearest")

    return _clipped(np.stack([moved(*each) for each in zip(np.asarray(image), angles.numpy())]))


def contrast(image: tf.Tensor, severity: int, seed: tf.Tensor) -> tf.Tensor:
    """Pull every value towards its channel's mean."""
    return _clipped(tf.image.adjust_contrast(image, _at(severity, (0.75, 0.5, 0.4, 0.3, 0.15))))


def brightness(image: tf.Tensor, severity: int, seed: tf.Tensor) -> tf.Tensor:
    """Add light."""
    return _clipped(tf.image.adjust_brightness(image, _at(severity, (0.05, 0.1, 0.15, 0.2, 0.3))))


def saturate(image: tf.Tensor, severity: int, seed: tf.Tensor) -> tf.Tensor:
    """Deepen the colours."""
    if image.shape[-1] != 3:
        raise UsageError(f"saturate needs images with 3 colour channels, not {image.shape[-1]}")
    return _clipped(tf.image.adjust_saturation(image, _at(severity, (1.5, 2.0, 3.0, 5.0, 10.0))))


def pixelate(image: tf.Tensor, severity: int, seed: tf.Tensor) -> tf.Tensor:
    """Average over fewer, larger pixels."""
    share = _at(severity, (0.9, 0.8, 0.7, 0.6, 0.5))
    size = image.shape[1:3]
    fewer = [max(1, round(share * side)) for side in size]
    return _clipped(tf.image.resize(tf.image.resize(image, fewer, "area"), size, "nearest"))


def jpeg(image: tf.Tensor, severity: int, seed: tf.Tensor) -> tf.Tensor:
    """Compress as JPEG."""
    quality = _at(severity, (80, 65, 58, 50, 40))
    return _each(lambda one, _: tf.image.adjust_jpeg_quality(one, quality), image, seed)


CORRUPTIONS: dict[str, CorruptionFn] = {
    "brightness": brightness,
    "contrast": contrast,
    "gaussian_blur": gaussian_blur,
    "gaussian_noise": gaussian_noise,
    "impulse_noise": impulse_noise,
    "jpeg": jpeg,
    "motion_blur": motion_blur,
    "pixelate": pixelate,
    "saturate": saturate,
    "shot_noise": shot_noise,
}

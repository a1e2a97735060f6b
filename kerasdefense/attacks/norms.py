"""Geometry of the threat model: L-inf and L2 balls around an image, inside the box [0, 1]."""

from __future__ import annotations

import tensorflow as tf

from kerasdefense.types import UsageError

NORMS = ("linf", "l2")
_TINY, _HUGE = 1e-12, 1e30


def check_norm(norm: str) -> None:
    """Raise a UsageError unless `norm` is one of NORMS."""
    if norm not in NORMS:
        raise UsageError(f"unknown norm {norm!r}; valid: {', '.join(NORMS)}")


def length(delta: tf.Tensor, norm: str) -> tf.Tensor:
    """Return the norm of each example of `delta` [batch, ...], as [batch]."""
    flat = tf.reshape(delta, [tf.shape(delta)[0], -1])
    if norm == "linf":
        return tf.reduce_max(tf.abs(flat), axis=1)
    return tf.norm(flat, axis=1)


def relative_distance(tensor: tf.Tensor, reference: tf.Tensor) -> tf.Tensor:
    """Return the L2 distance of each example of two tensors [batch, ...], over the length of the second, as [batch]."""
    return tf.math.divide_no_nan(length(tensor - reference, "l2"), length(reference, "l2"))


def column(values: tf.Tensor, like: tf.Tensor) -> tf.Tensor:
    """Return `values` [batch] with as many axes of length 1 behind it as `like` [batch, ...] has."""
    return tf.reshape(values, [-1] + [1] * (like.shape.rank - 1))


def direction(gradient: tf.Tensor, norm: str) -> tf.Tensor:
    """Return the unit step of steepest ascent: the sign (linf) or the gradient over its length (l2).

    Where the gradient is NaN there is no step, so that no search leaves the ball by it.
    """
    gradient = tf.where(tf.math.is_nan(gradient), tf.zeros_like(gradient), gradient)
    if norm == "linf":
        return tf.sign(gradient)
    # Scaled first, so that the squares of a confident classifier's tiny gradient do not vanish.
    gradient = tf.clip_by_value(gradient, -_HUGE, _HUGE)
    scaled = tf.math.divide_no_nan(gradient, column(length(gradient, "linf"), gradient))
    return tf.math.divide_no_nan(scaled, column(length(scaled, norm), scaled))


def project(image_adv: tf.Tensor, image: tf.Tensor, *, epsilon: float, norm: str) -> tf.Tensor:
    """Return the point of the ball of radius `epsilon` around `image`, inside [0, 1], that replaces `image_adv`.

    For l2 the difference is shrunk first and clipped to the box after, which is feasible (clipping towards a box
    that holds `image` only shortens it) but not always the nearest feasible point.
    """
    if norm == "linf":
        image_adv = tf.clip_by_value(image_adv, image - epsilon, image + epsilon)
    else:
        delta = image_adv - image
        image_adv = image + delta * column(tf.minimum(1.0, epsilon / tf.maximum(length(delta, norm), _TINY)), delta)
    return tf.clip_by_value(image_adv, 0.0, 1.0)


def random_point(image: tf.Tensor, *, epsilon: float, norm: str, seed: tf.Tensor, on_sphere: bool = False) -> tf.Tensor:
    """Return a point drawn uniformly from the ball around each image, clipped to [0, 1].

    Args:
        image: float32 [batch, height, width, channels] in [0, 1].
        epsilon: radius, as a fraction of the [0, 1] range.
        norm: one of NORMS.
        seed: int32 [batch, 2]; an example's draw depends on its own seed only.
        on_sphere: whether the draw is then scaled to the length `epsilon`, before it is clipped.

    Returns:
        float32, the shape of `image`.
    """
    shape = tf.shape(image)[1:]

    def draw(one_seed: tf.Tensor) -> tf.Tensor:
        if norm == "linf":
            return tf.random.stateless_uniform(shape, one_seed, minval=-1.0, maxval=1.0)
        normal = tf.random.stateless_normal(shape, one_seed)
        radius = tf.random.stateless_uniform([], one_seed + [0, 1 << 30]) ** (
            1.0 / tf.cast(tf.size(normal), tf.float32)
        )
        return normal / tf.maximum(tf.norm(normal), _TINY) * radius

    delta = tf.map_fn(draw, seed, fn_output_signature=tf.float32, parallel_iterations=32)
    delta = tf.ensure_shape(delta, image.shape)
    if on_sphere:
        delta = delta / column(tf.maximum(length(delta, norm), _TINY), delta)
    return project(image + epsilon * delta, image, epsilon=epsilon, norm=norm)


def radius(epsilon: float) -> str:
    """Return a radius as people write it: 8/255 where it is a whole number of grey levels, else a decimal."""
    levels = epsilon * 255
    return f"{round(levels)}/255" if abs(levels - round(levels)) < 1e-6 else f"{epsilon:g}"

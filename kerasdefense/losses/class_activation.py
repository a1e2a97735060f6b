"""Class activation features: what the last dense layer makes a classifier's decision of, place by place."""

from __future__ import annotations

from collections.abc import Sequence

import tensorflow as tf

from kerasdefense.types import Activations, UsageError

WEIGHT_TERMS = ("soft", "hard", "joint")
"""Ways to compare the weights of the predicted class in `class_activation_terms`."""


def winning_weights(logits: tf.Tensor, kernel: tf.Tensor) -> tf.Tensor:
    """Return the column of `kernel` [c, classes] that belongs to each image's predicted class, float32 [batch, c]."""
    return tf.gather(tf.transpose(tf.cast(kernel, tf.float32)), tf.argmax(logits, axis=-1))


def soft_weights(logits: tf.Tensor, kernel: tf.Tensor, *, temperature: float = 1.0) -> tf.Tensor:
    """Return the mean of the columns of `kernel` [c, classes] under softmax(logits / temperature), [batch, c]."""
    shares = tf.nn.softmax(tf.cast(logits, tf.float32) / temperature)
    return tf.matmul(shares, tf.cast(kernel, tf.float32), transpose_b=True)


def class_activation_features(feature_map: tf.Tensor, logits: tf.Tensor, kernel: tf.Tensor) -> tf.Tensor:
    """Return `feature_map[b, u, v, c] * kernel[c, k(b)]`, k being the class that each image is predicted to be of.

    Where the logits are one dense layer on the mean of the feature map, their mean over places, summed over channels,
    and the bias of k make the winning logit; summed over channels they are the class activation map.

    Args:
        feature_map: float [batch, h, w, c].
        logits: float [batch, classes], of the same images.
        kernel: float [c, classes], of the dense layer.

    Returns:
        float32 [batch, h, w, c].

    Source: Zhou et al. 2021, "Removing Adversarial Noise in Class Activation Feature Space", by their code. Deviations:
    none.
    """
    return tf.cast(feature_map, tf.float32) * winning_weights(logits, kernel)[:, None, None, :]


def features_of(activations: Activations, kernel: tf.Tensor) -> tf.Tensor:
    """Return the features [batch, h, w, c] in the outputs of a classifier that `kernel` [c, classes] weights.

    Its feature map; where that is not among the outputs, or has not c channels, what enters the last layer, as a map of
    one place.
    """
    found = activations.get("feature_map")
    if found is None or found.shape[-1] != kernel.shape[0]:
        found = activations["embedding"][:, None, None, :]
    return tf.cast(found, tf.float32)


def released_maps(activation_features: tf.Tensor, size: Sequence[int]) -> tf.Tensor:
    """Return class activation features as the authors' attack compares them: a batch together, [batch, *size, c].

    Rectified, brought to [0, 1] by the extremes of the whole batch, and resized, so that what becomes of an image
    depends on those beside it; where all are equal they are NaN.
    """
    rectified = tf.nn.relu(activation_features)
    lowest, highest = tf.reduce_min(rectified), tf.reduce_max(rectified)
    return tf.image.resize((rectified - lowest) / (highest - lowest), size)


def squared_distance(tensor: tf.Tensor, reference: tf.Tensor) -> tf.Tensor:
    """Return the squared L2 distance of each example of two tensors [batch, ...], float32 [batch]."""
    difference = tf.math.squared_difference(tf.cast(tensor, tf.float32), tf.cast(reference, tf.float32))
    return tf.reduce_sum(tf.reshape(difference, [tf.shape(difference)[0], -1]), axis=1)


def class_activation_terms(
    denoised: tuple[tf.Tensor, tf.Tensor],
    clean: tuple[tf.Tensor, tf.Tensor],
    kernel: tf.Tensor,
    *,
    lam_f: float = 1e3,
    lam_w: float = 1e-3,
    weight_term: str = "soft",
    temperature: float = 1.0,
) -> dict[str, tf.Tensor]:
    """Return how far the class activation features of denoised images are from those of the clean ones, by terms.

    `soft` and `hard`: `lam_f mean (F' - F)^2`, named feature_loss, and `lam_w mean (w' - w)^2`, weight_loss, with w
    `soft_weights` or `winning_weights`, of which the latter have no gradient. `joint`: `lam_f mean (F' w - F w)^2` with
    the weights of the clean image's class for both, feature_loss alone.

    Args:
        denoised: features F' [batch, h, w, c] and logits [batch, classes] of the denoised images.
        clean: F and logits of the clean images, to which no gradient flows.
        kernel: [c, classes], of the last dense layer.
        lam_f: weight of the first term; 0 = 0.
        lam_w: weight of the second.
        weight_term: one of WEIGHT_TERMS.
        temperature: of the softmax of `soft`.

    Returns:
        float32 [batch] each.

    Raises:
        UsageError: an unknown `weight_term`.

    Source: the code released with CAFD (Zhou et al. 2021), which is `hard`. Deviations: its features are resized to the
    image first; `soft` and `joint` are ours.
    """
    check_weight_term(weight_term)
    (features, logits), (target, clean_logits) = denoised, map(tf.stop_gradient, clean)
    if weight_term == "joint":
        weights = winning_weights(clean_logits, kernel)[:, None, None, :]
        return {"feature_loss": lam_f * _mean_square(features * weights, target * weights)}
    terms = {"feature_loss": lam_f * _mean_square(features, target)}
    if weight_term == "soft":
        weights, aim = (soft_weights(each, kernel, temperature=temperature) for each in (logits, clean_logits))
    else:
        weights, aim = (winning_weights(each, kernel) for each in (logits, clean_logits))
    terms["weight_loss"] = lam_w * _mean_square(weights, aim)
    return terms


def check_weight_term(weight_term: str) -> None:
    """Raise a UsageError for what `class_activation_terms` does not know."""
    if weight_term not in WEIGHT_TERMS:
        raise UsageError(f"weight_term must be one of {', '.join(WEIGHT_TERMS)}, not {weight_term!r}")


def _mean_square(tensor: tf.Tensor, reference: tf.Tensor) -> tf.Tensor:
    difference = tf.math.squared_difference(tensor, reference)
    return tf.reduce_mean(tf.reshape(difference, [tf.shape(difference)[0], -1]), axis=1)

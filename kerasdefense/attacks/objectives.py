"""What an attack maximises: objectives built on a classifier's logits.

An objective turns `logits_fn` into `loss_fn(image, context) -> [batch]`. What it needs of an example (its label,
its target, its clean logits) stands in `context`, never in a closure, so that rows can be dropped, padded and
restarted and one function is traced once.
"""

from __future__ import annotations

from typing import Callable

import tensorflow as tf

from kerasdefense import losses
from kerasdefense.types import Context, InputError, LogitsFn, LossFn, PathFn, SuccessFn


def cross_entropy(logits_fn: LogitsFn) -> LossFn:
    """Return the cross-entropy of `context["label"]`, an untargeted objective."""

    def loss_fn(image: tf.Tensor, context: Context) -> tf.Tensor:
        return losses.cross_entropy(logits_fn(image), context["label"])

    return loss_fn


def scaled_cross_entropy(scale: float) -> Callable[[LogitsFn], LossFn]:
    """Return the cross-entropy of `context["label"]` on logits times `scale`, an untargeted objective.

    Where logits are bounded, as cosines are, the cross-entropy of the logits themselves pushes all other classes up
    alike, and not the one that is nearest.
    """

    def objective(logits_fn: LogitsFn) -> LossFn:
        return cross_entropy(lambda image: scale * logits_fn(image))

    return objective


def targeted_cross_entropy(logits_fn: LogitsFn) -> LossFn:
    """Return `log softmax` at `context["target"]`, an objective that pulls towards the target."""

    def loss_fn(image: tf.Tensor, context: Context) -> tf.Tensor:
        return -losses.cross_entropy(logits_fn(image), context["target"])

    return loss_fn


def margin(logits_fn: LogitsFn) -> LossFn:
    """Return the margin by which another class beats `context["label"]`."""

    def loss_fn(image: tf.Tensor, context: Context) -> tf.Tensor:
        return losses.margin(logits_fn(image), context["label"])

    return loss_fn


def dlr(logits_fn: LogitsFn) -> LossFn:
    """Return the difference of logits ratio of `context["label"]`, which no scale of the logits can flatten."""

    def loss_fn(image: tf.Tensor, context: Context) -> tf.Tensor:
        return losses.dlr(logits_fn(image), context["label"])

    return loss_fn


def targeted_dlr(logits_fn: LogitsFn) -> LossFn:
    """Return the difference of logits ratio that pulls from `context["label"]` to `context["target"]`."""

    def loss_fn(image: tf.Tensor, context: Context) -> tf.Tensor:
        return losses.targeted_dlr(logits_fn(image), context["label"], context["target"])

    return loss_fn


def kl_divergence(logits_fn: LogitsFn) -> LossFn:
    """Return the divergence of the output from `context["logits"]`, those of the clean image (label-free)."""

    def loss_fn(image: tf.Tensor, context: Context) -> tf.Tensor:
        return losses.kl_divergence(context["logits"], logits_fn(image))

    return loss_fn


def logit_matching(logits_fn: LogitsFn) -> LossFn:
    """Return minus the mean squared distance of the logits to `context["reference"]`, those of another image."""
    return matching(logits_fn)


def matching(feature_fn: Callable[[tf.Tensor], tf.Tensor]) -> LossFn:
    """Return minus the mean squared distance of `feature_fn(image)` to `context["reference"]`, both [batch, ...]."""

    def loss_fn(image: tf.Tensor, context: Context) -> tf.Tensor:
        difference = tf.math.squared_difference(feature_fn(image), context["reference"])
        return -tf.reduce_mean(tf.reshape(difference, [tf.shape(difference)[0], -1]), axis=1)

    return loss_fn


def class_activation(feature_fn: Callable[[tf.Tensor], tf.Tensor]) -> LossFn:
    """Return the squared distance of the class activation features of an image from `context["reference"]`.

    Label-free: the reference are those of the clean image, where the gradient is 0, so that a search must start
    elsewhere.

    Args:
        feature_fn: from images to class activation features, [batch, h, w, c].
    """

    def loss_fn(image: tf.Tensor, context: Context) -> tf.Tensor:
        return losses.squared_distance(feature_fn(image), context["reference"])

    return loss_fn


def feature_matching(feature_fn: Callable[[tf.Tensor], tf.Tensor]) -> LossFn:
    """Return how well `feature_fn(image)` [batch, d] lies on the line of `context["reference"]`, |cosine| - 1."""

    def loss_fn(image: tf.Tensor, context: Context) -> tf.Tensor:
        directions = [tf.math.l2_normalize(each, axis=-1) for each in (feature_fn(image), context["reference"])]
        return tf.abs(tf.reduce_sum(directions[0] * directions[1], axis=-1)) - 1

    return loss_fn


def signed_target(scores_fn: LogitsFn) -> LossFn:
    """Return the lead of one side of a class's axis over the label's axis, for classifiers of absolute scores.

    The logits are `|scores|`, so that a class is reached at either end of its axis: `context["target"]` in
    [0, 2 classes) is the positive end of class t, or t + classes the negative one. The gradient follows the end that is
    meant, also where the score has the other sign.

    Args:
        scores_fn: from images to signed scores [batch, classes].
    """

    def loss_fn(image: tf.Tensor, context: Context) -> tf.Tensor:
        scores = scores_fn(image)
        ends = tf.concat([scores, -scores], axis=-1)
        own = tf.abs(tf.gather(scores, context["label"], batch_dims=1))
        return tf.gather(ends, context["target"], batch_dims=1) - own

    return loss_fn


OBJECTIVES: dict[str, Callable[[LogitsFn], LossFn]] = {
    "class_activation": class_activation,
    "cross_entropy": cross_entropy,
    "cross_entropy_x10": scaled_cross_entropy(10.0),
    "cross_entropy_x50": scaled_cross_entropy(50.0),
    "dlr": dlr,
    "feature_matching": feature_matching,
    "kl_divergence": kl_divergence,
    "logit_matching": logit_matching,
    "margin": margin,
    "signed_target": signed_target,
    "targeted_cross_entropy": targeted_cross_entropy,
    "targeted_dlr": targeted_dlr,
}


FEATURE_DISTANCE = "class_activation"
"""The objective that needs a classifier's features, and `context["reference"]`, those of the clean image."""


TARGETED = ("feature_matching", "logit_matching", "signed_target", "targeted_cross_entropy", "targeted_dlr")
"""Objectives that need something to go to: `context["target"]`, or `context["reference"]`, what is to be matched."""


TO_CLASS = ("targeted_cross_entropy", "targeted_dlr")
"""Those of them that go to a class by its logit, `context["target"]`."""


def misclassified(logits_fn: LogitsFn) -> SuccessFn:
    """Return the goal of untargeted attacks: the predicted class is not `context["label"]`."""

    def success_fn(image: tf.Tensor, context: Context) -> tf.Tensor:
        return tf.argmax(logits_fn(image), axis=-1, output_type=tf.int32) != context["label"]

    return success_fn


def hit_target(logits_fn: LogitsFn) -> SuccessFn:
    """Return the goal of targeted attacks: the predicted class is `context["target"]`."""

    def success_fn(image: tf.Tensor, context: Context) -> tf.Tensor:
        return tf.argmax(logits_fn(image), axis=-1, output_type=tf.int32) == context["target"]

    return success_fn


def ranked_targets(logits: tf.Tensor, label: tf.Tensor, count: int) -> tf.Tensor:
    """Return the `count` classes of highest logits other than the label, the likeliest first.

    Args:
        logits: float [batch, classes], more than `count` classes.
        label: int [batch].
        count: at least 1.

    Returns:
        int32 [batch, count].
    """
    is_label = tf.one_hot(label, logits.shape[-1], on_value=True, off_value=False, dtype=tf.bool)
    return tf.math.top_k(tf.where(is_label, logits.dtype.min, logits), count).indices


def share_pass(path: PathFn) -> PathFn:
    """Return `path` with its last result kept, so that a loss and a success function share one pass in a graph.

    Both ask for the logits of the same tensor object one after the other; any other tensor is computed anew. Only for
    use inside one traced function: the weights must not change between the two.
    """
    last: list[tf.Tensor] = []

    def shared_path(image: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
        if not last or last[0] is not image:
            last[:] = [image, path(image, seed)]
        return last[1]

    return shared_path


def check_logits(logits: tf.Tensor, *, advice: str = "") -> None:
    """Raise an InputError where a classifier's output (eager, [batch, classes]) is no batch of logits.

    Probabilities flatten every gradient an attack would follow, so an attack on them measures nothing; `advice` is what
    else to say to those who have them.
    """
    if not tf.is_tensor(logits):
        raise InputError(f"an attack needs logits of shape [batch, classes >= 2], not a {type(logits).__name__}")
    if logits.shape.rank != 2 or logits.shape[1] < 2:
        raise InputError(f"an attack needs logits of shape [batch, classes >= 2], not {tuple(logits.shape)}")
    if not bool(tf.reduce_all(tf.math.is_finite(logits))):
        raise InputError("the classifier returns NaN or infinite logits; check its weights and its input range")
    in_range = tf.reduce_all((logits >= -1e-5) & (logits <= 1 + 1e-5))
    sums_to_one = tf.reduce_all(tf.abs(tf.reduce_sum(logits, axis=1) - 1) < 1e-5)
    if bool(in_range & sums_to_one):
        needed = "an attack needs logits, the values before the softmax"
        raise InputError(f"the classifier returns probabilities; {needed}{advice}")

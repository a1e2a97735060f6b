"""What a classifier with a purifier in front of it must be attacked by: true gradients, a stand-in, and none at all."""

from __future__ import annotations

from typing import Callable

import tensorflow as tf

from kerasdefense.attacks.wrappers import bpda
from kerasdefense.types import LogitsFn, PathFn

Purify = Callable[[tf.Tensor, tf.Tensor], tf.Tensor]
"""`purify(image, seed) -> image`, both [batch, h, w, c] in [0, 1]."""

BPDA, OBLIVIOUS = "bpda_identity", "oblivious"


def purified_paths(logits_fn: LogitsFn, purify: Purify, *, is_differentiable: bool = True) -> dict[str, PathFn]:
    """Return the paths by which images that pass `purify` on their way to a classifier must be attacked.

    `exact`: the whole path, with its own gradient. `bpda_identity`: the same logits with the gradient of the classifier
    at the purified image, as if purifying, clipping to [0, 1] included, were the identity. `oblivious`: the classifier
    alone, as one sees it who does not know of the purifier; what is found there is scored on the whole path.

    Args:
        logits_fn: the classifier.
        purify: what images pass before.
        is_differentiable: whether `purify` has a useful gradient; else `exact` has that of `bpda_identity`, which is
            then not listed apart.

    Source: Athalye et al. 2018, "Obfuscated gradients give a false sense of security", section 4.1, for the second.
    """

    def exact(image: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
        return logits_fn(purify(image, seed))

    def bpda_identity(image: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
        return logits_fn(bpda(lambda each: purify(each, seed))(image))

    def oblivious(image: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
        del seed
        return logits_fn(image)

    if not is_differentiable:
        return {"exact": bpda_identity, OBLIVIOUS: oblivious}
    return {"exact": exact, BPDA: bpda_identity, OBLIVIOUS: oblivious}

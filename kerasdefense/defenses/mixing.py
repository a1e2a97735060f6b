"""Who is mixed with whom, and by how much: drawn over the global batch, so that replicas change nothing."""

from __future__ import annotations

from typing import NamedTuple

import tensorflow as tf

from kerasdefense.attacks import seeds
from kerasdefense.types import UsageError

PER = ("batch", "sample")
"""What has a mixing weight of its own."""
LEAST_ALPHA = 0.05
"""Below it too many draws are smaller than any number in float32."""
_SHUFFLE, _FIRST, _SECOND, _NOISE = -1, -2, -3, -4  # no image has such an index


class Mixture(NamedTuple):
    """A partner for every image of a batch.

    Attributes:
        place: int32 [batch], where the images are in the global batch.
        partner: int32 [batch], where their partners are; over the global batch a permutation.
        share: float32 [batch], the weight in [0, 1] of the image itself; its partner has the rest.
        key: int32 [2], a seed of whatever else is drawn for the batch.
    """

    place: tf.Tensor
    partner: tf.Tensor
    share: tf.Tensor
    key: tf.Tensor

    def of_partners(self, values: tf.Tensor) -> tf.Tensor:
        """Return `values` [batch, ...] of the partners, wherever these are; gradients flow to them."""
        return tf.gather(_over_replicas(values), self.partner)

    def mixed(self, own: tf.Tensor, partners: tf.Tensor) -> tf.Tensor:
        """Return `share own + (1 - share) partners` [batch, ...]."""
        share = tf.reshape(self.share, [-1, *[1] * (own.shape.rank - 1)])
        return share * own + (1 - share) * partners

    def noise(self, values: tf.Tensor, std: float) -> tf.Tensor:
        """Return Gaussian noise of the shape of `values` [batch, d]."""
        size = tf.reduce_sum(_over_replicas(tf.shape(values)[:1]))
        noise = tf.random.stateless_normal([size, values.shape[-1]], self.key, stddev=std)
        return tf.gather(noise, self.place)


def draw(index: tf.Tensor, seed: int, step: tf.Tensor, *, alpha: float, per: str) -> Mixture:
    """Return partners and weights of the images of a batch.

    The draws are keyed by seed and step; partners are a permutation of the global batch, and weights are from
    Beta(alpha, alpha), one of all images or one of each.

    Args:
        index: int32 [batch], of the images; its length counts.
        seed: the run's seed.
        step: int64 scalar, the training step.
        alpha: at least LEAST_ALPHA.
        per: "batch" or "sample".
    """
    sizes = _over_replicas(tf.shape(index)[:1])
    replica = tf.distribute.get_replica_context().replica_id_in_sync_group
    size = tf.reduce_sum(sizes)
    place = tf.reduce_sum(sizes[:replica]) + tf.range(tf.shape(index)[0])
    keys = seeds.per_example(seed, step, tf.constant([_SHUFFLE, _FIRST, _SECOND, _NOISE]))
    permutation = tf.random.experimental.stateless_shuffle(tf.range(size), keys[0])
    count = size if per == "sample" else tf.constant(1)
    first, second = (tf.random.stateless_gamma([count], key, alpha) for key in (keys[1], keys[2]))
    share = tf.math.divide_no_nan(first, first + second) + tf.zeros([size])
    return Mixture(place, tf.gather(permutation, place), tf.gather(share, place), keys[3])


def check_mixing(alpha: float, per: str) -> None:
    """Raise a UsageError for what `draw` cannot draw."""
    if not LEAST_ALPHA <= alpha < float("inf"):
        need = f"finite and at least {LEAST_ALPHA}"
        raise UsageError(f"mix_alpha, of the Beta distribution, must be {need}, not {alpha:g}")
    if per not in PER:
        raise UsageError(f"mix_per must be one of {', '.join(PER)}, not {per!r}")


def _over_replicas(values: tf.Tensor) -> tf.Tensor:
    """Return the tensors of all replicas one behind the other, as they are in the global batch."""
    replica = tf.distribute.get_replica_context()
    if replica.num_replicas_in_sync == 1:
        return values
    gathered = replica.all_gather(values, axis=0)
    return tf.reshape(gathered, tf.shape(gathered))  # so that its gradient is dense: all_gather takes no sparse one

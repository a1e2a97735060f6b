"""Partners, shares and noise: their distributions, what they are keyed by, and that replicas change nothing."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf
from scipy import stats

from kerasdefense.defenses import mixing
from kerasdefense.training import mirrored
from kerasdefense.types import UsageError

BATCH, STD = 7, 0.05
VALUES = np.random.default_rng(0).normal(size=(BATCH, 3)).astype("float32")


def draw(size=BATCH, *, seed=0, step=0, alpha=1.0, per="batch"):
    return mixing.draw(tf.range(size), seed, tf.constant(step, tf.int64), alpha=alpha, per=per)


# dfa 6: the distribution of shares
@pytest.mark.parametrize("alpha", [0.2, 1.0, 4.0])
def test_shares_are_of_the_beta_distribution(alpha):
    share = draw(20_000, alpha=alpha, per="sample").share.numpy()
    assert share.dtype == np.float32 and share.min() >= 0 and share.max() <= 1
    counts, edges = np.histogram(share, bins=10, range=(0, 1))
    expected = share.size * np.diff(stats.beta(alpha, alpha).cdf(edges))
    assert stats.chisquare(counts, expected).pvalue > 0.01
    assert share.mean() == pytest.approx(0.5, abs=0.01)
    assert share.var() == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.03)
    assert (min(counts[0], counts[-1]) > 2 * counts[1:-1].max()) == (alpha == 0.2)  # U-shaped


def test_one_share_is_drawn_for_a_batch_and_another_for_the_next():
    shares = np.stack([draw(step=step).share for step in range(100)])
    assert shares.shape == (100, BATCH) and (shares == shares[:, :1]).all()
    assert stats.kstest(shares[:, 0], "uniform").pvalue > 0.01


def test_shares_of_samples_differ():
    assert len(set(draw(per="sample").share.numpy().tolist())) == BATCH


def test_partners_are_a_permutation_of_the_batch():
    places = np.stack([draw(step=step).partner for step in range(100)])
    np.testing.assert_array_equal(np.sort(places, axis=1), np.tile(np.arange(BATCH), (100, 1)))
    counts = np.array([np.bincount(places[:, column], minlength=BATCH) for column in range(BATCH)])
    assert stats.chisquare(counts[:-1, :-1].ravel(), np.full(36, counts[:-1, :-1].mean())).pvalue > 0.01


@pytest.mark.parametrize("per", mixing.PER)
def test_draws_are_keyed_by_seed_and_step_alone(per):
    one, again = draw(32, seed=1, step=5, per=per), draw(32, seed=1, step=5, per=per)
    values = np.zeros([32, 4], np.float32)
    for name in ("place", "partner", "share", "key"):
        np.testing.assert_array_equal(getattr(again, name), getattr(one, name))
    for other in (draw(32, seed=1, step=6, per=per), draw(32, seed=2, step=5, per=per)):
        assert not np.array_equal(other.partner, one.partner)
        assert not np.array_equal(other.share, one.share)
        assert not np.array_equal(other.noise(values, STD), one.noise(values, STD))
    np.testing.assert_array_equal(again.noise(values, STD), one.noise(values, STD))


def test_mixture_weighs_images_and_partners():
    mixture = draw(per="sample")
    image = np.random.default_rng(1).uniform(size=(BATCH, 2, 2, 1)).astype("float32")
    place, share = mixture.partner.numpy(), mixture.share.numpy()
    expected = [share[row] * image[row] + (1 - share[row]) * image[place[row]] for row in range(BATCH)]
    image = tf.constant(image)
    np.testing.assert_allclose(mixture.mixed(image, mixture.of_partners(image)), expected, atol=1e-6)
    np.testing.assert_array_equal(mixture.of_partners(np.arange(BATCH)), place)


# dfa 8: the distribution of noise
def test_noise_is_normal_of_the_given_deviation():
    noise = draw(64).noise(tf.zeros([64, 100]), STD).numpy()
    assert noise.shape == (64, 100)
    assert stats.kstest(noise.ravel() / STD, "norm").pvalue > 0.01
    assert np.mean(noise**2) == pytest.approx(STD**2, abs=3 * STD**2 * np.sqrt(2 / noise.size))  # standard errors
    assert np.abs(np.corrcoef(noise)[np.triu_indices(64, 1)]).max() < 0.5  # each image has its own


def on_replicas(sizes, per):
    """Return draws, looked-up values, noise and a gradient on replicas with a part of the batch each, put together."""
    ends = np.cumsum(sizes)
    weights = np.arange(BATCH, dtype=np.float32)[:, None]

    def step(part):
        values, weight = part["values"], part["weight"]
        mixture = mixing.draw(part["index"], 3, tf.constant(2, tf.int64), alpha=1.0, per=per)
        with tf.GradientTape() as tape:
            tape.watch(values)
            of_partners = mixture.of_partners(values)
            total = tf.reduce_sum(weight * of_partners)
        return {
            "place": mixture.place,
            "partner": mixture.partner,
            "share": mixture.share,
            "of_partners": of_partners,
            "mixed": mixture.mixed(values, of_partners),
            "noise": mixture.noise(values, STD),
            "gradient": tf.convert_to_tensor(tape.gradient(total, values)),
        }

    def part(context):
        replica = context.replica_id_in_sync_group
        own = slice(ends[replica] - sizes[replica], ends[replica])
        whole = {"index": np.arange(BATCH, dtype=np.int32), "values": VALUES, "weight": weights}
        return {name: tf.constant(value[own]) for name, value in whole.items()}

    strategy = mirrored(("/device:CPU:0", "/device:CPU:1")[: len(sizes)])
    parts = strategy.experimental_distribute_values_from_function(part)
    found = tf.function(lambda parts: strategy.run(step, args=(parts,)))(parts)
    return {name: np.concatenate(strategy.experimental_local_results(value)) for name, value in found.items()}


@pytest.mark.parametrize("per", mixing.PER)
def test_replicas_of_any_size_draw_what_one_draws(per):
    alone, together = on_replicas([BATCH], per), on_replicas([3, 4], per)
    for name, value in alone.items():
        np.testing.assert_allclose(together[name], value, atol=1e-7, err_msg=name)
    assert not np.array_equal(alone["partner"][:3] < 3, np.ones(3))  # some partner is on the other replica
    np.testing.assert_array_equal(alone["gradient"][alone["partner"], 0], np.arange(BATCH))


@pytest.mark.parametrize(
    ("alpha", "per", "message"),
    [
        (0.0, "batch", "mix_alpha, of the Beta distribution, must be finite and at least 0.05, not 0"),
        (-1.0, "batch", "finite and at least 0.05, not -1"),
        (float("nan"), "batch", "finite and at least 0.05, not nan"),
        (float("inf"), "batch", "finite and at least 0.05, not inf"),
        (1.0, "image", "mix_per must be one of batch, sample, not 'image'"),
    ],
)
def test_check_mixing_refuses(alpha, per, message):
    with pytest.raises(UsageError, match=f"{message}$"):
        mixing.check_mixing(alpha, per)

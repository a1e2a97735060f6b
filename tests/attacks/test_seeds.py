from __future__ import annotations

import numpy as np
import pytest
import scipy.stats
import tensorflow as tf

from kerasdefense.attacks import seeds


def test_per_example_seeds_are_int32_pairs():
    keys = seeds.per_example(0, 0, tf.range(5))
    assert keys.shape == [5, 2] and keys.dtype == tf.int32


def test_per_example_seeds_do_not_depend_on_the_place_in_the_batch():
    keys = seeds.per_example(7, 3, tf.range(100)).numpy()
    np.testing.assert_array_equal(seeds.per_example(7, 3, tf.constant([42, 5, 99])), keys[[42, 5, 99]])


def test_per_example_seeds_differ_over_seeds_streams_and_examples():
    streams = (-1, 0, 1, 2, 1000)
    keys = [seeds.per_example(seed, stream, tf.range(1000)).numpy() for seed in (0, 1, 2) for stream in streams]
    assert len(np.unique(np.concatenate(keys), axis=0)) == 3 * 5 * 1000


@pytest.mark.parametrize("dtype", [tf.int32, tf.int64])
def test_per_example_seeds_take_a_stream_of_any_integer_type_in_a_graph(dtype):
    in_graph = tf.function(lambda stream: seeds.per_example(1, stream, tf.range(3)))
    np.testing.assert_array_equal(in_graph(tf.constant(9, dtype)), seeds.per_example(1, 9, tf.range(3)))


def draws(examples=300, counts=3, numbers=7):
    """Return draws [counts, examples, numbers] of neighbouring examples, counts and places."""
    keys = seeds.per_example(0, 0, tf.range(examples))
    return np.stack([seeds.uniform(keys, tf.fill([examples], count), numbers) for count in range(counts)])


def test_uniform_draws_are_in_the_half_open_unit_interval_and_uniform():
    found = draws(3000)
    assert found.dtype == np.float32 and found.shape == (3, 3000, 7)
    assert found.min() >= 0 and found.max() < 1
    for some in (found, found[:, :, 0], found[0], found[1, :, 3]):
        assert scipy.stats.kstest(some.ravel(), "uniform").pvalue > 0.01
    for seed in ([[0, 0]], [[-1, -1]], [[2**31 - 1, -(2**31)]]):
        found = seeds.uniform(tf.constant(seed), tf.constant([0]), 5000).numpy()
        assert scipy.stats.kstest(found.ravel(), "uniform").pvalue > 0.01


def test_uniform_draws_of_neighbouring_seeds_counts_and_places_are_independent():
    found = draws(3000)
    pairs = {
        "examples": (found[:, :-1], found[:, 1:]),
        "counts": (found[:-1], found[1:]),
        "places": (found[..., :-1], found[..., 1:]),
        "example and count": (found[:-1, 1:], found[1:, :-1]),
        "example and place": (found[:, :-1, 1:], found[:, 1:, :-1]),
        "count and place": (found[:-1, :, 1:], found[1:, :, :-1]),
    }
    for name, (first, second) in pairs.items():
        assert scipy.stats.pearsonr(first.ravel(), second.ravel()).pvalue > 0.001, name
        table = np.histogram2d(first.ravel(), second.ravel(), bins=8, range=[[0, 1], [0, 1]])[0]
        assert scipy.stats.chisquare(table.ravel()).pvalue > 0.001, name


def test_uniform_draws_of_small_integers_as_seeds_are_independent():
    first, second = np.meshgrid(np.arange(40, dtype=np.int32), np.arange(40, dtype=np.int32))
    keys = tf.constant(np.stack([first.ravel(), second.ravel()], axis=1))
    found = seeds.uniform(keys, tf.zeros([1600], tf.int32), 4).numpy()
    assert scipy.stats.kstest(found.ravel(), "uniform").pvalue > 0.01
    assert len(np.unique(found, axis=0)) == 1600
    assert np.abs(np.corrcoef(np.concatenate([found.T, [first.ravel(), second.ravel()]])) - np.eye(6)).max() < 0.1


def test_uniform_draws_do_not_depend_on_the_batch_or_on_how_many_there_are():
    keys, count = seeds.per_example(3, 1, tf.range(20)), tf.range(20) % 4
    found = seeds.uniform(keys, count, 6).numpy()
    rows = [7, 0, 19, 7]
    np.testing.assert_array_equal(seeds.uniform(tf.gather(keys, rows), tf.gather(count, rows), 6), found[rows])
    np.testing.assert_array_equal(seeds.uniform(keys, count, 2), found[:, :2])
    in_graph = tf.function(lambda keys, count: seeds.uniform(keys, count, 6))
    np.testing.assert_array_equal(in_graph(keys, count), found)


def test_uniform_draws_differ_over_seeds_and_counts():
    found = draws(1000, 5, 2)
    assert len(np.unique(found.reshape([-1, 2]), axis=0)) == 5000


def test_advanced_seeds_differ_over_draws_and_examples_and_not_over_places():
    keys = seeds.per_example(0, 0, tf.range(200))
    found = [seeds.advance(keys, tf.fill([200], count)).numpy() for count in range(20)]
    assert len(np.unique(np.concatenate(found), axis=0)) == 20 * 200
    assert found[0].dtype == np.int32 and found[0].shape == (200, 2)
    np.testing.assert_array_equal(
        seeds.advance(tf.gather(keys, [5, 3]), tf.constant([1, 19])), [found[1][5], found[19][3]]
    )

from __future__ import annotations

import numpy as np
import pytest
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

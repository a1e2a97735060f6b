from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import tensorflow as tf

from kerasdefense.data.augment import Augmentation
from kerasdefense.data.records import Records
from kerasdefense.data.splits import Split, TrainSplit
from kerasdefense.training import mirrored
from kerasdefense.types import InputError, UsageError

EXAMPLES = 60
PIXELS = np.random.RandomState(0).randint(0, 256, (EXAMPLES, 6, 5, 1), np.uint8)
LABEL = np.arange(EXAMPLES, dtype=np.int32) % 3


def decode(record):
    return tf.reshape(tf.io.decode_raw(record, tf.uint8), (6, 5, 1))


RECORDS = Records(
    LABEL, lambda: tf.data.Dataset.from_tensor_slices([pixels.tobytes() for pixels in PIXELS]), decode, str
)
TRAIN = TrainSplit(
    records=RECORDS,
    index=np.setdiff1d(np.arange(EXAMPLES), [3, 4, 59]),
    label=LABEL,
    image_shape=(6, 5, 1),
    cache="memory",
    augmentation=Augmentation(2, flip=True),
    shuffle_buffer=1000,
)
STEPS = 5


def batches_of(train, batch_size=11, **epochs):
    return list(train.epochs(batch_size, **{"seed": 5, "epochs": 1, **epochs}).as_numpy_iterator())


def assert_same(batches, others):
    assert len(batches) == len(others)
    for batch, other in zip(batches, others):
        for key in ("image", "label", "index"):
            np.testing.assert_array_equal(batch[key], other[key])


def index_of(batches):
    return np.concatenate([batch["index"] for batch in batches]).tolist()


def image_of_index(batches):
    return {index: image for batch in batches for index, image in zip(batch["index"], batch["image"])}


def test_batches_hold_every_example_once_and_in_order():
    split = Split(RECORDS, np.array([1, 2, 7, 8, 50]), -LABEL, (6, 5, 1), "none")
    batches = list(split.batches(2).as_numpy_iterator())
    assert [batch["index"].tolist() for batch in batches] == [[1, 2], [7, 8], [50]]
    assert [batch["label"].tolist() for batch in batches] == [[-1, -2], [-1, -2], [-2]]
    np.testing.assert_array_equal(batches[1]["image"], PIXELS[[7, 8]].astype(np.float32) / np.float32(255))
    assert {key: value.dtype.name for key, value in batches[0].items()} == {
        "image": "float32",
        "label": "int32",
        "index": "int32",
    }


@pytest.mark.parametrize("cache", ["memory", "none"])
def test_grey_levels_are_the_same_pass_as_it_is_kept(cache):
    train = dataclasses.replace(TRAIN, cache=cache)
    batches, others = (list(read(11).as_numpy_iterator()) for read in (train.grey_levels, train.batches))
    assert len(batches) == 6 and len(batches[-1]["label"]) == 2
    assert {key: value.dtype.name for key, value in batches[0].items()} == {
        "image": "uint8",
        "label": "int32",
        "index": "int32",
    }
    assert index_of(batches) == TRAIN.index.tolist()
    np.testing.assert_array_equal(np.concatenate([batch["image"] for batch in batches]), PIXELS[TRAIN.index])
    assert_same([{**batch, "image": batch["image"] / np.float32(255)} for batch in batches], others)
    with pytest.raises(UsageError, match="at least 1 image, not 0"):
        train.grey_levels(0)


def test_epochs_are_full_batches_of_distinct_examples():
    assert TRAIN.steps_per_epoch(11) == STEPS
    stream = TRAIN.epochs(11, seed=0, epochs=3)
    assert len(stream) == 3 * STEPS
    assert stream.element_spec["image"].shape == (11, 6, 5, 1)
    batches = list(stream.as_numpy_iterator())
    orders = [index_of(batches[start : start + STEPS]) for start in (0, STEPS, 2 * STEPS)]
    for order in orders:
        assert len(set(order)) == 55
        assert set(order) <= set(TRAIN.index)
        assert order != sorted(order)
    assert orders[0] != orders[1] != orders[2]


def test_epochs_are_a_function_of_the_seed():
    first = batches_of(TRAIN, epochs=2)
    tf.random.set_seed(99)
    again = batches_of(dataclasses.replace(TRAIN), epochs=2)
    assert_same(first, again)
    assert index_of(first) != index_of(batches_of(TRAIN, seed=6, epochs=2))


@pytest.mark.parametrize("cache", ["memory", "disk", "none"])
def test_epochs_resumed_are_the_rest_of_the_stream(cache):
    whole = batches_of(TRAIN, epochs=4)
    resumed = batches_of(dataclasses.replace(TRAIN, cache=cache), epochs=4, first_epoch=2)
    assert_same(whole[2 * STEPS :], resumed)
    assert batches_of(TRAIN, epochs=4, first_epoch=4) == []


def test_epochs_do_not_depend_on_how_many_are_asked_for_or_who_reads_too():
    reader = TRAIN.epochs(11, seed=5, epochs=1).as_numpy_iterator()
    first = next(reader)
    assert_same(batches_of(TRAIN, epochs=2)[:STEPS], [first, *reader])


def test_epochs_are_the_same_under_two_replicas():
    strategy = mirrored(("/device:CPU:0", "/device:CPU:1"))
    distributed = strategy.experimental_distribute_dataset(TRAIN.epochs(10, seed=5, epochs=1))
    joined = [
        {key: tf.concat(strategy.experimental_local_results(value), 0).numpy() for key, value in batch.items()}
        for batch in distributed
    ]
    assert_same(batches_of(TRAIN, 10), joined)


def test_augmentation_depends_on_seed_epoch_and_index_but_not_on_the_batch():
    some = image_of_index(batches_of(TRAIN, 11))
    others = image_of_index(batches_of(dataclasses.replace(TRAIN, shuffle_buffer=7), 19))
    common = set(some) & set(others)
    assert len(common) > 50
    assert all((some[index] == others[index]).all() for index in common)
    for changed in ({"seed": 6}, {"epochs": 2, "first_epoch": 1}):
        later = image_of_index(batches_of(TRAIN, 11, **changed))
        common = set(some) & set(later)
        assert sum((some[index] == later[index]).all() for index in common) < 0.2 * len(common)


def test_epochs_without_augmentation_show_the_images_as_they_are():
    train = dataclasses.replace(TRAIN, augmentation=Augmentation(0, flip=False))
    for batch in batches_of(train):
        np.testing.assert_array_equal(batch["image"], PIXELS[batch["index"]].astype(np.float32) / np.float32(255))
        np.testing.assert_array_equal(batch["label"], LABEL[batch["index"]])


@pytest.mark.parametrize(("cache", "times"), [("memory", 1), ("disk", 1), ("none", 3)])
def test_images_are_decoded_once_where_they_are_cached(cache, times):
    decoded = []

    def decode_and_count(record):
        tf.py_function(lambda: decoded.append(1), [], [])
        return decode(record)

    train = dataclasses.replace(TRAIN, records=dataclasses.replace(RECORDS, decode=decode_and_count), cache=cache)
    assert len(batches_of(train, epochs=2)) == 2 * STEPS
    assert len(list(train.batches(1))) == train.examples
    assert len(decoded) == times * train.examples


def test_disk_cache_is_removed_at_exit(monkeypatch, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    at_exit = []
    monkeypatch.setattr("atexit.register", lambda call, *args, **kwargs: at_exit.append((call, args, kwargs)))
    batches_of(dataclasses.replace(TRAIN, cache="disk"))
    assert sum(path.stat().st_size for path in tmp_path.rglob("*")) > TRAIN.examples * 30
    for call, args, kwargs in at_exit:
        call(*args, **kwargs)
    assert list(tmp_path.iterdir()) == []


def test_epochs_refuse_a_batch_that_cannot_be_filled():
    assert TRAIN.steps_per_epoch(57) == 1
    with pytest.raises(UsageError, match="--train_batch_size=58 exceeds the 57 training images"):
        TRAIN.epochs(58, seed=0, epochs=1)
    with pytest.raises(UsageError, match="at least 1 image, not 0"):
        TRAIN.batches(0)


def test_images_that_cannot_be_read_are_refused_in_one_line():
    records = dataclasses.replace(
        RECORDS, decode=lambda record: tf.reshape(tf.io.decode_raw(record, tf.uint8), (-1, 5, 1))
    )
    train = dataclasses.replace(TRAIN, records=records, image_shape=(7, 5, 1))
    with pytest.raises(InputError, match=r"cannot be read or cached: .*shape") as error:
        train.batches(3)
    assert "\n" not in str(error.value)

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kerasdefense.data.partition import holdout, partition
from kerasdefense.data.records import Records, Source
from kerasdefense.types import InputError, UsageError


def records(label):
    return Records(np.array(label, np.int32), read=None, decode=None, name=str)


def source(train, **splits):
    parts = {name: records(label) for name, label in splits.items()}
    return Source("toy", ("a", "b"), (8, 8, 1), records(train), **parts)


@given(st.lists(st.integers(0, 4), min_size=1, max_size=200), st.floats(0.01, 0.99), st.integers(0, 2**31))
def test_holdout_takes_the_share_of_every_class(label, fraction, seed):
    label = np.array(label)
    held = holdout(label, fraction, seed)
    assert len(held) == round(fraction * len(label))
    assert (np.diff(held) > 0).all()
    share = len(held) / len(label)
    for count, total in zip(np.bincount(label[held], minlength=5), np.bincount(label, minlength=5)):
        assert abs(count - share * total) < 1 + 1e-9


def test_holdout_never_changes():
    assert holdout(np.arange(20) % 2, 0.2, 7).tolist() == [5, 7, 16, 18]


def test_holdout_depends_on_the_seed():
    label = np.zeros(50, int)
    assert holdout(label, 0.2, 0).tolist() != holdout(label, 0.2, 1).tolist()


def test_partition_keeps_the_test_split_whole():
    parts = partition(source([0, 1] * 20, test=[0, 1] * 5), 0.1)
    assert [len(part.index) for part in (parts.train, parts.validation, parts.test)] == [36, 4, 10]
    assert parts.validation.records is parts.train.records
    assert parts.test.records is not parts.train.records
    assert not np.intersect1d(parts.train.index, parts.validation.index).size


def test_partition_holds_out_a_fifth_where_there_is_no_test_split():
    parts = partition(source([0, 1] * 50), 0.1)
    assert [len(part.index) for part in (parts.train, parts.validation, parts.test)] == [72, 8, 20]
    together = np.concatenate([parts.train.index, parts.validation.index, parts.test.index])
    assert np.sort(together).tolist() == list(range(100))


def test_partition_uses_the_validation_split_of_the_source():
    parts = partition(source([0, 1] * 20, validation=[0, 1], test=[0, 1]), 0.1)
    assert [len(part.index) for part in (parts.train, parts.validation)] == [40, 2]
    assert parts.validation.records is not parts.train.records


def test_partition_refuses_an_empty_part():
    with pytest.raises(UsageError, match=r"validation_fraction=0.01 of 40 .* 40 for training and 0 for valid"):
        partition(source([0, 1] * 20, test=[0, 1]), 0.01)
    with pytest.raises(InputError, match="2 images are too few"):
        partition(source([0, 1]), 0.5)

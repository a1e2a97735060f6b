from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kerasdefense.data.open_set import known_classes, relabel
from kerasdefense.types import UsageError


@pytest.mark.parametrize(
    ("split", "known"),
    [("0", "012459"), ("1", "035789"), ("2", "015678"), ("3", "345789"), ("4", "012378"), ("", "0123456789")],
)
def test_known_classes_are_the_published_ones(split, known):
    assert "".join(map(str, known_classes(split, 10))) == known


@given(st.integers(3, 200), st.data(), st.integers(0, 2**32 - 1))
def test_known_classes_of_a_seed_are_ascending_and_reproducible(classes, data, seed):
    count = data.draw(st.integers(2, classes - 1))
    known = known_classes(f"{count}:{seed}", classes)
    assert len(set(known)) == count
    assert list(known) == sorted(known)
    assert set(known) <= set(range(classes))
    assert known == known_classes(f"{count}:{seed}", classes)


def test_known_classes_of_one_seed_are_nested():
    assert set(known_classes("3:5", 20)) < set(known_classes("9:5", 20))
    assert known_classes("9:5", 20) != known_classes("9:6", 20)


@pytest.mark.parametrize("split", ["5", "10", "six", "6", "6:", ":1", "-6:1", "6:-1", "6:4294967296", "1:0", "10:0"])
def test_known_classes_refuses(split):
    with pytest.raises(UsageError, match="--data_open_set_split="):
        known_classes(split, 10)


def test_known_classes_of_published_splits_need_ten_classes():
    with pytest.raises(UsageError, match="this set has 4; pass K:SEED, for example 2:0"):
        known_classes("0", 4)


def test_relabel_numbers_known_classes_in_order():
    assert relabel((1, 4, 5), 7).tolist() == [-1, 0, -1, -1, 1, 2, -1]

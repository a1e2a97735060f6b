from __future__ import annotations

import json

import numpy as np
import pytest

from kerasdefense.types import InputError
from pipelines.label_shift import label_shift, label_shifts

EVEN = [1000] * 10


def test_shares_that_differ_by_more_than_is_let_pass_are_shifted():
    shifted = [400, *[100] * 9]
    told = "of class 0 has a share of 30.8% instead of 10.0%, and all classes together differ by 20.8%"
    assert label_shift(shifted, EVEN, 0.1) == told
    assert label_shift(shifted, EVEN, 0.21) == ""
    assert label_shift([1100, *[1000] * 9], EVEN, 0.1) == ""


def test_many_classes_that_differ_by_little_each_are_shifted():
    shifted = [*[2] * 50, *[40] * 50]
    assert label_shift(shifted, [100] * 100, 0.1).endswith("and all classes together differ by 45.2%")
    assert label_shift(shifted, [100] * 100, 0.46) == ""


@pytest.mark.parametrize("steepness", [0, 1])
def test_chance_among_many_classes_raises_no_alarm(steepness):
    random = np.random.default_rng(0)
    shares = np.arange(1, 101.0) ** -steepness / np.sum(np.arange(1, 101.0) ** -steepness)
    pairs = [
        (random.multinomial(count, shares), random.multinomial(5000, shares))
        for count in (50, 200, 1000)
        for _ in range(300)
    ]
    distance = [np.abs(found / found.sum() - other / other.sum()).sum() / 2 for found, other in pairs]
    assert np.mean(np.array(distance) > 0.1) > 0.5  # what a threshold alone would call shifted
    assert sum(bool(label_shift(found, other, 0.1)) for found, other in pairs) <= 5


def test_few_images_of_the_same_shares_raise_no_alarm():
    random = np.random.default_rng(0)
    drawn = [random.multinomial(count, [0.1] * 10) for count in (10, 20, 40, 80) for _ in range(250)]
    largest = [np.abs(each / each.sum() - 0.1).max() for each in drawn]
    assert np.mean(np.array(largest) > 0.1) > 0.2  # what a threshold alone would call shifted
    assert sum(bool(label_shift(each, EVEN, 0.1)) for each in drawn) <= 5


def test_class_that_is_missing_is_a_shift_unless_by_chance():
    assert label_shift([0, *[40] * 9], EVEN, 0.5) == "of class 0 is missing, and has a share of 10.0% elsewhere"
    assert label_shift([0, *[4] * 9], EVEN, 0.5) == ""
    assert label_shift([0, 50, 50], [0, 10, 10], 0.1) == ""
    assert label_shift([0, 0], [5, 5], 0.1) == ""


def test_training_images_are_held_against_an_earlier_validation(tmp_path):
    reference = tmp_path / "label_shares.json"
    reference.write_text(json.dumps({"train": [100, 300], "eval": [1, 3]}))
    counts = {"train": [200, 200], "eval": [50, 50]}
    assert label_shifts(counts, 0.1, "") == {}
    shift = {"train": "of class 0 has a share of 50.0% instead of 25.0%, and all classes together differ by 25.0%"}
    assert label_shifts(counts, 0.1, str(reference)) == shift
    with pytest.raises(InputError, match=r"label_shares.json: is of 2 classes, but the examples have 3"):
        label_shifts({"train": [1, 2, 3]}, 0.1, str(reference))
    for content in ("no JSON", "{}", "[1]", '{"train": [null]}'):
        reference.write_text(content)
        with pytest.raises(InputError, match=r"label_shares.json: no file of label shares"):
            label_shifts(counts, 0.1, str(reference))
    assert label_shifts(counts, 0.1, str(tmp_path / "not there yet")) == {}

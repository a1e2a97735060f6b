from __future__ import annotations

import numpy as np
import pytest

from kerasdefense.data.augment import Augmentation
from kerasdefense.types import InputError, UsageError


def members(split):
    return split.label[split.index]


def test_load_validates_on_the_same_examples_in_every_run(digits):
    plain, other = digits(), digits(augment="none", cache="none", shuffle_buffer=1)
    np.testing.assert_array_equal(plain.validation.index, other.validation.index)
    assert not np.intersect1d(plain.train.index, plain.validation.index).size
    assert plain.validation.records is plain.train.records


def test_load_of_an_open_set_split_leaves_known_classes_only(digits):
    closed, opened = digits(), digits(open_set_split="0")
    known = [0, 1, 2, 4, 5, 9]
    assert opened.labels == tuple(map(str, known))
    for name in ("train", "validation", "test"):
        before, after = getattr(closed, name), getattr(opened, name)
        is_known = np.isin(members(before), known)
        np.testing.assert_array_equal(after.index, before.index[is_known])
        np.testing.assert_array_equal(np.array(known)[members(after)], members(before)[is_known])
    is_unknown = ~np.isin(members(closed.test), known)
    np.testing.assert_array_equal(opened.unknown.index, closed.test.index[is_unknown])


def test_load_of_an_open_set_split_labels_what_it_streams(digits):
    opened = digits(open_set_split="3:11")
    unknown = next(opened.unknown.batches(1000).as_numpy_iterator())
    assert (unknown["label"] == -1).all()
    np.testing.assert_array_equal(unknown["index"], opened.unknown.index)
    test = next(opened.test.batches(1000).as_numpy_iterator())
    assert set(test["label"]) == {0, 1, 2}
    np.testing.assert_array_equal(test["index"], opened.test.index)


def test_load_hands_the_settings_to_the_training_split(digits):
    train = digits(augment="crop_flip", crop_padding=2, shuffle_buffer=7, cache="disk").train
    assert (train.augmentation, train.shuffle_buffer, train.cache) == (Augmentation(2, flip=True), 7, "disk")


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("validation_fraction", 0.0),
        ("validation_fraction", 1.0),
        ("validation_fraction", float("nan")),
        ("validation_fraction", 1e-5),
        ("validation_fraction", 0.9999),
        ("image_size", -1),
        ("shuffle_buffer", 0),
        ("cache", "tape"),
        ("augment", "blur"),
        ("crop_padding", 8),
        ("crop_padding", -1),
        ("open_set_split", "1:0"),
    ],
)
def test_load_refuses_a_setting_and_names_its_flag(digits, setting, value):
    with pytest.raises(UsageError, match=f"--data_{setting}=") as error:
        digits(**{setting: value})
    assert "\n" not in str(error.value)


def test_load_refuses_a_class_without_training_images(write_images, load_folder):
    for name, count in (("train/a", 9), ("train/b", 9), ("test/a", 1), ("test/b", 1)):
        write_images(name, count)
    with pytest.raises(InputError, match=r"no training image of class '[ab]' is left"):
        load_folder(validation_fraction=17 / 18)


def test_load_refuses_an_open_set_split_without_unknown_images(write_images, load_folder):
    for name in ("a", "b", "c"):
        write_images(f"train/{name}", 9)
    known = load_folder(open_set_split="2:0").labels
    for name in known:
        write_images(f"test/{name}", 1)
    with pytest.raises(InputError, match="no image is left for the unknown split"):
        load_folder(open_set_split="2:0")

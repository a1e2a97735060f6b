from __future__ import annotations

import io
import json

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from kerasdefense import config, data
from kerasdefense.data import examples
from kerasdefense.types import InputError, UsageError


def png(pixels):
    encoded = io.BytesIO()
    Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).save(encoded, "PNG")
    return encoded.getvalue()


def example(image=None, label=None, index=None):
    feature = {}
    if image is not None:
        feature["image"] = tf.train.Feature(bytes_list=tf.train.BytesList(value=[image]))
    for name, value in (("label", label), ("index", index)):
        if value is not None:
            feature[name] = tf.train.Feature(int64_list=tf.train.Int64List(value=np.atleast_1d(value)))
    return tf.train.Example(features=tf.train.Features(feature=feature)).SerializeToString()


def write(path, records):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tf.io.TFRecordWriter(str(path), "GZIP" if path.suffix == ".gz" else "") as writer:
        for record in records:
            writer.write(record)


def examples_of(*splits):
    """Return the examples of splits that share their numbering, in its order."""
    found = {}
    for batch in (batch for split in splits for batch in split.grey_levels(500).as_numpy_iterator()):
        for image, label, index in zip(batch["image"], batch["label"], batch["index"]):
            found[index] = example(png(image), label, index)
    return [found[index] for index in sorted(found)]


def write_set(folder, labels=("a", "b"), **splits):
    (folder / "labels.txt").write_text("\n".join(labels) + "\n")
    for name, records in splits.items():
        write(folder / name / "data_tfrecord-00000-of-00001.gz", records)


def mixed(records, seed=3):
    return [records[place] for place in np.random.RandomState(seed).permutation(len(records))]


def load(folder, **settings):
    return data.load(config.Data(name="examples", dir=str(folder), **settings))


def everything(split):
    batches = list(split.batches(500).as_numpy_iterator())
    return {key: np.concatenate([batch[key] for batch in batches]) for key in batches[0]}


def assert_same(split, other):
    np.testing.assert_array_equal(split.index, other.index)
    one, two = everything(split), everything(other)
    for key in ("image", "label", "index"):
        np.testing.assert_array_equal(one[key], two[key])


def assert_same_stream(train, other):
    streams = [list(each.epochs(64, seed=5, epochs=2, first_epoch=1).as_numpy_iterator()) for each in (train, other)]
    assert len(streams[0]) == len(streams[1]) > 3
    for one, two in zip(*streams):
        for key in ("image", "label", "index"):
            np.testing.assert_array_equal(one[key], two[key])


def few(count=8, side=4, first=0):
    """Return examples of two classes whose pixels are their number."""
    return [
        example(png(np.full((side, side, 1), number, np.uint8)), number % 2, number)
        for number in range(first, first + count)
    ]


def test_examples_of_digits_give_the_same_splits_and_training_stream(digits, tmp_path):
    original = digits()
    train, test = mixed(examples_of(original.train, original.validation)), mixed(examples_of(original.test))
    (tmp_path / "labels.txt").write_text("".join(f"{label}\n" for label in original.labels))
    (tmp_path / "examples.json").write_text(json.dumps({"name": "digits"}))
    write(tmp_path / "train" / "0.tfrecord", train[:1000])
    write(tmp_path / "train" / "1.tfrecord.gz", train[1000:])
    write(tmp_path / "eval" / "data_tfrecord-00000-of-00001.gz", test)
    read = load(tmp_path)
    for name in ("train", "validation", "test"):
        assert_same(getattr(read, name), getattr(original, name))
    assert_same_stream(read.train, original.train)
    assert read.unknown is None
    assert (read.labels, read.image_shape, read.name) == (original.labels, original.image_shape, "digits")


def test_examples_of_an_open_set_split_keep_their_numbers(digits, tmp_path):
    original = digits(open_set_split="6:0")
    splits = {"train": original.train, "validation": original.validation, "eval": original.test}
    splits["unknown"] = original.unknown
    write_set(
        tmp_path, original.labels, **{f"Split-{name}": mixed(examples_of(split)) for name, split in splits.items()}
    )
    read = load(tmp_path, augment="crop")
    for name in ("train", "validation", "test", "unknown"):
        assert_same(getattr(read, name), getattr(original, name))
    assert_same_stream(read.train, original.train)
    assert read.labels == original.labels
    number = int(read.test.index[-1])
    assert read.test.records.name(number).startswith(f"{tmp_path}/Split-eval/data_tfrecord-00000-of-00001.gz record")
    with pytest.raises(UsageError, match=r"--data_open_set_split=6:0: the classes of .* were divided"):
        load(tmp_path, open_set_split="6:0")


def test_examples_of_all_classes_can_be_divided_when_read(digits, tmp_path):
    closed, opened = digits(), digits(open_set_split="6:0")
    write_set(
        tmp_path, closed.labels, train=examples_of(closed.train, closed.validation), eval=examples_of(closed.test)
    )
    read = load(tmp_path, open_set_split="6:0")
    for name in ("train", "validation", "test", "unknown"):
        assert_same(getattr(read, name), getattr(opened, name))


def test_files_that_are_handed_over_are_read_as_the_run_describes(digits, tmp_path):
    original = digits(open_set_split="6:0")
    files = {"train": original.train, "validation": original.validation, "eval": original.test}
    files["unknown"] = original.unknown
    for name, split in files.items():
        write(tmp_path / f"Split-{name}" / "data_tfrecord-00000-of-00001.gz", examples_of(split))
    source = examples.read_examples(
        {name: [f"{tmp_path}/Split-{name}/*"] for name in files}, labels=original.labels, name="digits"
    )
    read = data.load(config.Data(open_set_split="6:0"), source=source)
    for name in ("train", "validation", "test", "unknown"):
        assert_same(getattr(read, name), getattr(original, name))
    assert read.train.augmentation == original.train.augmentation
    assert read.name == "digits"


def test_examples_without_numbers_are_numbered_file_by_file(tmp_path):
    bare = [example(png(np.full((4, 4, 1), number, np.uint8)), number % 2) for number in range(10)]
    write(tmp_path / "train" / "b.tfrecord", bare[6:])
    write(tmp_path / "train" / "a.tfrecord", bare[:6])
    write(tmp_path / "train" / "_SUCCESS", [])
    write_set(tmp_path, eval=few(3))
    splits = load(tmp_path, validation_fraction=0.3)
    for split in (splits.train, splits.validation):
        part = everything(split)
        np.testing.assert_array_equal(np.round(part["image"][:, 0, 0, 0] * 255), part["index"])
        np.testing.assert_array_equal(part["label"], part["index"] % 2)
    assert splits.train.records.name(7) == f"{tmp_path}/train/b.tfrecord record 1"


def test_examples_are_resized_and_in_colour_if_one_is(tmp_path):
    colour = example(png(np.full((6, 4, 3), (9, 99, 199), np.uint8)), 1, 8)
    write_set(tmp_path, train=[*few(8), colour], eval=few(3))
    with pytest.raises(InputError, match=r"train/data.*gz record 8: is 6x4 .* but .* record 0 is 4x4; .*_image_size"):
        load(tmp_path)
    splits = load(tmp_path, image_size=5, validation_fraction=0.3)
    assert splits.image_shape == (5, 5, 3)
    assert everything(splits.test)["image"].shape == (3, 5, 5, 3)


BLANK = png(np.zeros((4, 4, 1), np.uint8))
RIGHT = {"train": few(8), "eval": few(3)}


@pytest.mark.parametrize(
    ("splits", "message"),
    [
        ({"train": few(8)}, "has no eval/; it must hold"),
        ({"eval": few(8)}, "has no train/; it must hold"),
        ({**RIGHT, "test": few(2)}, "test: beside train/ and eval/ only"),
        ({**RIGHT, "Split-train": few(2)}, "train is there too"),
        ({**RIGHT, "eval": []}, "eval: its files hold no examples; the split eval is empty"),
        (
            {**RIGHT, "eval": [*few(2), example(None, 1, 7)]},
            "gz record 2: needs one value of the feature 'image' in its bytes_list; it has 0",
        ),
        ({**RIGHT, "eval": [*few(2), example(BLANK, None, 7)]}, "'label'"),
        ({**RIGHT, "eval": [*few(2), example(BLANK, [0, 1], 7)]}, "'label' .* it has 2"),
        ({**RIGHT, "eval": [*few(2), example(BLANK, 0)]}, "record 2: .*'index'"),
        ({**RIGHT, "eval": [*few(2), example(BLANK, 0, -4)]}, r"index is -4, not"),
        ({**RIGHT, "eval": [*few(2), example(b"no image", 1, 7)]}, "record 2: not a readable image"),
        ({**RIGHT, "eval": [*few(2), example(b"", 1, 7)]}, "record 2: not a readable image"),
        ({**RIGHT, "eval": [*few(2), b"\xff\xff"]}, "record 2: not a tf.Example"),
        ({**RIGHT, "train": [*few(8), example(BLANK, 2, 8)]}, "0..1"),
        ({**RIGHT, "train": [*few(8), example(BLANK, -1, 8)]}, "record 8: has label -1, not one of"),
        ({**RIGHT, "unknown": few(2)}, "record 0: has label 0, not -1, as unknown images have"),
        ({**RIGHT, "train": [*few(8), *few(1, first=3)]}, "record 8: has index 3, as .* record 3 has"),
    ],
)
def test_examples_that_are_broken_are_refused_in_one_line(tmp_path, splits, message):
    write_set(tmp_path, **splits)
    with pytest.raises(InputError, match=message) as error:
        load(tmp_path)
    assert "\n" not in str(error.value)
    assert str(tmp_path) in str(error.value)


def test_label_that_is_no_number_is_refused(tmp_path):
    feature = tf.train.Feature(bytes_list=tf.train.BytesList(value=[b"cat"]))
    record = tf.train.Example.FromString(few(1)[0])
    record.features.feature["label"].CopyFrom(feature)
    write_set(tmp_path, train=few(8), eval=[record.SerializeToString()])
    with pytest.raises(InputError, match=r"record 0: needs one value of the feature 'label' in its int64_list"):
        load(tmp_path)


def test_file_that_is_cut_off_or_not_compressed_is_refused(tmp_path):
    write_set(tmp_path, train=few(8), eval=few(8))
    path = tmp_path / "eval" / "data_tfrecord-00000-of-00001.gz"
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(InputError, match=r"eval/.*gz: not a readable TFRecord file: ") as error:
        load(tmp_path)
    assert "\n" not in str(error.value)
    write(tmp_path / "eval" / "plain", few(8))
    (tmp_path / "eval" / "plain").replace(path)
    with pytest.raises(InputError, match=r"eval/.*gz: not a readable TFRecord file: "):
        load(tmp_path)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ("a\n", "has 1 class names; at least 2"),
        ("a\n\nb\n", "labels.txt: line 2 names no class"),
        ("a\nb\na\n", "two classes are called 'a'"),
        (None, "labels.txt: no readable file of class names"),
    ],
)
def test_class_names_that_are_wrong_are_refused(tmp_path, labels, message):
    write_set(tmp_path, train=few(8), eval=few(3))
    (tmp_path / "labels.txt").unlink()
    if labels is not None:
        (tmp_path / "labels.txt").write_text(labels)
    with pytest.raises(InputError, match=message):
        load(tmp_path)


def test_folder_or_files_that_are_not_there_are_refused(tmp_path):
    with pytest.raises(UsageError, match="--data_name=examples needs --data_dir"):
        data.load(config.Data(name="examples"))
    with pytest.raises(InputError, match=r"nowhere: no such folder; it must hold"):
        load(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"nowhere/.: no such file; the split train needs"):
        examples.read_examples({"train": [f"{tmp_path}/nowhere/*"]}, labels=("a", "b"))
    write_set(tmp_path, train=few(8), eval=few(3))
    (tmp_path / "examples.json").write_text("{}")
    with pytest.raises(InputError, match=r"examples.json: does not name the data set"):
        load(tmp_path)

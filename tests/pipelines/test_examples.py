from __future__ import annotations

import json

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image
from rich.console import Console

from kerasdefense import config, data
from kerasdefense.types import InputError, UsageError
from pipelines import examples


@pytest.fixture(scope="module")
def digits_folder(tmp_path_factory):
    return str(tmp_path_factory.mktemp("tfds"))


@pytest.fixture
def digits(digits_folder):
    return lambda **settings: data.load(config.Data(dir=digits_folder, **settings))


def read(folder, **settings):
    return data.load(config.Data(name="examples", dir=str(folder), **settings))


def assert_same(split, other):
    one, two = (next(each.batches(2000).as_numpy_iterator()) for each in (split, other))
    for key in ("image", "label", "index"):
        np.testing.assert_array_equal(one[key], two[key])


def files(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_examples_of_digits_are_read_as_digits(digits, tmp_path):
    original = digits()
    written = examples.write_examples(original, tmp_path / "set", shards=2)
    assert written.is_new
    assert files(tmp_path / "set") == [
        "eval/examples-00000-of-00002.tfrecord.gz",
        "eval/examples-00001-of-00002.tfrecord.gz",
        "examples.json",
        "labels.txt",
        "train/examples-00000-of-00002.tfrecord.gz",
        "train/examples-00001-of-00002.tfrecord.gz",
    ]
    again = read(tmp_path / "set")
    for name in ("train", "validation", "test"):
        assert_same(getattr(again, name), getattr(original, name))
    assert (again.name, again.labels) == ("digits", original.labels)
    assert again.train.augmentation == original.train.augmentation


def test_examples_of_resized_images_of_an_open_set_split_are_read_as_they_were(digits, tmp_path):
    original = digits(open_set_split="6:0", image_size=12)
    written = examples.write_examples(original, tmp_path / "set")
    assert list(written.about["splits"]) == ["train", "validation", "eval", "unknown"]
    for settings in ({}, {"image_size": 12}):
        again = read(tmp_path / "set", **settings)
        for name in ("train", "validation", "test", "unknown"):
            assert_same(getattr(again, name), getattr(original, name))
    assert examples.write_examples(again, tmp_path / "copy").about == written.about


def test_examples_of_a_set_that_was_not_divided_are_divided_as_it_is(tmp_path):
    for number in range(40):
        folder = tmp_path / "images" / "ab"[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((4, 4, 3), (number, 0, 99), np.uint8)).save(folder / f"{number}.png")
    original = data.load(config.Data(name="folder", dir=str(tmp_path / "images")))
    examples.write_examples(original, tmp_path / "set")
    again = read(tmp_path / "set")
    for name in ("train", "validation", "test"):
        assert_same(getattr(again, name), getattr(original, name))
    assert again.name == "images"


def test_examples_that_are_there_are_kept(digits, tmp_path):
    splits, folder = digits(), tmp_path / "set"
    folder.mkdir()
    first = examples.write_examples(splits, folder)
    times = [path.stat().st_mtime_ns for path in sorted(folder.rglob("*"))]
    second = examples.write_examples(splits, folder)
    assert (first.is_new, second.is_new, second.about) == (True, False, first.about)
    assert times == [path.stat().st_mtime_ns for path in sorted(folder.rglob("*"))]
    with pytest.raises(InputError, match="set: holds other examples; remove it"):
        examples.write_examples(digits(image_size=9), folder)
    with pytest.raises(InputError, match="set: holds other examples; remove it"):
        examples.write_examples(splits, folder, shards=3)
    (folder / "eval" / "examples-00000-of-00001.tfrecord.gz").unlink()
    with pytest.raises(InputError, match=r"eval/examples-00000-of-00001.tfrecord.gz: missing; remove "):
        examples.write_examples(splits, folder)


def test_folder_of_other_things_is_left_alone(digits, tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(InputError, match="holds no examples; remove it, or name another folder"):
        examples.write_examples(digits(), tmp_path)
    assert files(tmp_path) == ["thesis.txt"]


def test_writing_that_fails_leaves_nothing(digits, tmp_path, monkeypatch):
    def encode(image):
        raise tf.errors.ResourceExhaustedError(None, None, "no space left")

    monkeypatch.setattr(tf.io, "encode_png", encode)
    with pytest.raises(tf.errors.ResourceExhaustedError):
        examples.write_examples(digits(), tmp_path / "set")
    assert list(tmp_path.iterdir()) == []


def test_command_writes_and_counts(digits_folder, tmp_path, capsys):
    given = [f"--data_dir={digits_folder}", "--data_open_set_split=3:11", f"--examples_dir={tmp_path}/set"]
    assert examples.main(given) == 0
    about = json.loads((tmp_path / "set" / "examples.json").read_text())
    table = capsys.readouterr().out
    assert f"{tmp_path}/set: written" in table
    assert about["splits"]["unknown"]["classes"] == {"(unknown)": about["splits"]["unknown"]["examples"]}
    for split in about["splits"].values():
        assert sum(split["classes"].values()) == split["examples"]
        assert str(split["examples"]) in table
    assert (tmp_path / "set" / "labels.txt").read_text().splitlines() == about["labels"]
    assert examples.main(given) == 0
    assert "kept, it holds the same examples already" in capsys.readouterr().out


def test_many_classes_are_summed_up(tmp_path, capsys):
    labels = [f"class {number}" for number in range(60)]
    split = {"examples": 150, "files": 1, "classes": dict(zip(labels, [1, 4] + [2] * 58))}
    about = {"name": "many", "labels": labels, "image_shape": [4, 4, 1], "splits": {"train": split}}
    examples.show(examples.Written(tmp_path, about, True), Console())
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [row[-2] for row in rows if "(least" in row or "(most" in row] == ["1", "4"]


@pytest.mark.parametrize(
    "given",
    [[], ["--examples_dir=gs://bucket/set"], ["--examples_dir=set", "--examples_shards=-1"]],
)
def test_command_refuses_places_and_numbers_that_are_wrong(given):
    with pytest.raises(UsageError, match=r"--examples_(dir|shards)"):
        examples.main(given)

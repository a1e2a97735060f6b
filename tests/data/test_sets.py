from __future__ import annotations

from typing import ClassVar

import numpy as np
import pytest
import tensorflow_datasets as tfds

from kerasdefense import config, data
from kerasdefense.data import sets
from kerasdefense.types import InputError, UsageError


class TinyImages(tfds.core.GeneratorBasedBuilder):
    """Images whose every pixel is their label times 40 plus their number, in splits that a test chooses."""

    VERSION = tfds.core.Version("1.0.0")
    classes = 4
    splits: ClassVar[dict] = {}
    image = tfds.features.Image(shape=(4, 4, 1))
    sizes: tuple = (4,)

    def _info(self):
        features = {
            "image": self.image,
            "label": tfds.features.ClassLabel(num_classes=self.classes),
            "id": tfds.features.Text(),
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {name: self._generate_examples(label) for name, label in self.splits.items()}

    def _generate_examples(self, label):
        for place, value in enumerate(label):
            side = self.sizes[place % len(self.sizes)]
            pixels = np.full(
                (side, side, self.image.shape[-1]), (max(value, 0) * 40 + place) % 256, self.image.np_dtype
            )
            yield place, {"image": pixels, "label": value, "id": f"{place}"}


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    """Describe the set and load it under its name."""

    def load(*, name="tiny_images", settings=None, **attributes):
        for attribute, value in attributes.items():
            monkeypatch.setattr(TinyImages, attribute, value)
        return data.load(
            config.Data(name=name, dir=str(tmp_path), augment="none", validation_fraction=0.25, **(settings or {}))
        )

    return load


def everything(split):
    batches = list(split.batches(3).as_numpy_iterator())
    return {key: np.concatenate([batch[key] for batch in batches]) for key in batches[0]}


SPLITS = {"train": [0, 1, 2, 3] * 4, "test": [0, 1, 2, 3] * 2}


def test_set_is_prepared_after_saying_where(tiny, capsys, tmp_path):
    splits = tiny(splits=SPLITS)
    assert capsys.readouterr().out == (
        f"downloading tiny_images/1.0.0 (size unknown) into {tmp_path}/tiny_images/1.0.0\n"
    )
    assert [split.examples for split in (splits.train, splits.validation, splits.test)] == [12, 4, 8]
    assert splits.labels == ("0", "1", "2", "3")
    for split in (splits.train, splits.validation, splits.test):
        part = everything(split)
        pixel = np.round(part["image"][:, 0, 0, 0] * 255)
        assert (pixel // 40 == part["label"]).all()
        np.testing.assert_array_equal(part["index"], split.index)
    assert tiny().train.examples == 12
    assert capsys.readouterr().out == ""


def test_set_in_several_files_is_read_one_file_after_the_other(monkeypatch, tmp_path):
    monkeypatch.setattr(TinyImages, "splits", {"train": [place % 4 for place in range(200)]})
    builder = tfds.builder("tiny_images", data_dir=tmp_path)
    builder.download_and_prepare(download_config=tfds.download.DownloadConfig(num_shards=3))
    files = [builder.as_dataset(split=f"train[{file}shard]") for file in range(3)]
    expected = [example["image"].numpy() for file in files for example in file]
    records = sets.read(config.Data(name="tiny_images", dir=str(tmp_path))).train
    np.testing.assert_array_equal([records.decode(encoded) for encoded in records.read()], expected)


def test_set_with_validation_but_no_labelled_test_is_tested_on_it(tiny):
    splits = tiny(splits={"train": [0, 1, 2, 3] * 4, "validation": [0, 1, 2, 3], "test": [-1] * 5})
    assert [split.examples for split in (splits.train, splits.validation, splits.test)] == [12, 4, 4]


def test_set_with_train_only_is_divided(tiny):
    splits = tiny(splits={"train": [0, 1, 2, 3] * 5})
    assert [split.examples for split in (splits.train, splits.validation, splits.test)] == [12, 4, 4]


def test_set_without_train_is_refused(tiny):
    with pytest.raises(UsageError, match="no labelled train split; it has test"):
        tiny(splits={"test": [0, 1, 2, 3]})


def test_set_with_a_label_out_of_range_is_refused(tiny):
    tiny(splits=SPLITS)
    with pytest.raises(InputError, match=r"tiny_images/1.0.0 train: example \d+ has label 3, not one .* 0..2 of its 3"):
        tiny(classes=3)


def test_set_with_images_that_differ_in_size_needs_an_image_size(tiny):
    unsized = {"splits": SPLITS, "image": tfds.features.Image(shape=(None, None, 3)), "sizes": (4, 6)}
    with pytest.raises(InputError, match=r"differ in size: test .* \((4x4|6x6)\) and .* pass --data_image_size"):
        tiny(**unsized)
    splits = tiny(settings={"image_size": 8})
    part = everything(splits.test)
    assert part["image"].shape == (8, 8, 8, 3)
    assert (np.round(part["image"][:, 3, 3, 0] * 255) // 40 == part["label"]).all()


def test_set_with_undeclared_but_equal_sizes_is_read(tiny):
    assert tiny(splits=SPLITS, image=tfds.features.Image(shape=(None, None, 3))).image_shape == (4, 4, 3)


def test_set_of_other_images_is_refused(tiny):
    with pytest.raises(UsageError, match="4 channels of uint8; only uint8 images of 1 or 3 channels"):
        tiny(splits=SPLITS, image=tfds.features.Image(shape=(4, 4, 4)))


def test_set_with_a_broken_file_is_refused(tiny, tmp_path):
    tiny(splits=SPLITS)
    file = next((tmp_path / "tiny_images" / "1.0.0").glob("*test.tfrecord*"))
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(InputError, match=f"cannot read test in {tmp_path}/tiny_images/1.0.0: truncated record"):
        tiny()


def test_set_that_cannot_be_downloaded_is_refused_in_one_line(tiny, monkeypatch, tmp_path, capsys):
    closed = "http://127.0.0.1:9/images.zip"
    monkeypatch.setattr(TinyImages, "url_infos", {closed: type("UrlInfo", (), {"size": 3 * 2**20})()})
    with pytest.raises(InputError, match=r"cannot prepare tiny_images/1.0.0 in .*refused.*--data_dir") as error:
        tiny(splits=SPLITS)
    assert "\n" not in str(error.value)
    assert "(3 MiB)" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_set_that_another_process_prepared_meanwhile_is_read(tiny, monkeypatch):
    prepare = TinyImages.download_and_prepare

    def prepare_and_lose_the_race(self):
        prepare(self)
        raise OSError("Directory not empty")

    monkeypatch.setattr(TinyImages, "download_and_prepare", prepare_and_lose_the_race)
    assert tiny(splits=SPLITS).train.examples == 12


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mnits", "mnits is not a TFDS set; did you mean mnist or .* valid: digits, folder"),
        ("zzzzzz", "zzzzzz is not a TFDS set; valid: digits, folder"),
        ("emnist/nope", "BuilderConfig nope not found"),
        ("a/b/c", "Parsing builder name string a/b/c failed"),
        ("ag_news_subset", "not an image-classification set .*; its features are description, label, title"),
        ("coco", "not an image-classification set"),
    ],
)
def test_set_name_that_is_wrong_is_refused(tmp_path, name, message):
    with pytest.raises(UsageError, match=message) as error:
        data.load(config.Data(name=name, dir=str(tmp_path)))
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []

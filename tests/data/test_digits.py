from __future__ import annotations

import os

import numpy as np
import sklearn.datasets

from kerasdefense import config, data


def everything(split):
    batches = list(split.batches(1000).as_numpy_iterator())
    return {key: np.concatenate([batch[key] for batch in batches]) for key in batches[0]}


def test_digits_are_the_ones_of_scikit_learn(digits):
    splits = digits()
    parts = [everything(split) for split in (splits.train, splits.validation, splits.test)]
    found = np.concatenate([np.c_[part["image"].reshape(-1, 64), part["label"]] for part in parts])
    bunch = sklearn.datasets.load_digits()
    grey = np.floor(bunch.data * 255 / 16 + 0.5).astype(np.float32) / 255
    expected = np.c_[grey, bunch.target]
    np.testing.assert_allclose(found[np.lexsort(found.T)], expected[np.lexsort(expected.T)], atol=1e-6)


def test_digits_have_their_splits(digits):
    splits = digits()
    assert [split.examples for split in (splits.train, splits.validation, splits.test)] == [1294, 144, 359]
    assert splits.unknown is None
    assert splits.name == "digits"
    assert splits.labels == tuple("0123456789")
    assert splits.image_shape == (8, 8, 1)
    for split, least in ((splits.validation, 14), (splits.test, 34)):
        assert np.bincount(split.label[split.index]).min() >= least


def test_digits_prepare_themselves_in_silence(tmp_path, capfd):
    data.load(config.Data(dir=str(tmp_path)))
    assert (tmp_path / "digits" / "1.0.0" / "dataset_info.json").is_file()
    printed = capfd.readouterr()
    assert printed.out == ""
    assert printed.err == ""


def test_digits_need_no_writable_folder_once_they_are_prepared(digits_folder, monkeypatch):
    monkeypatch.setattr("tensorflow_datasets.core.DatasetBuilder.download_and_prepare", None)
    assert data.load(config.Data(dir=digits_folder)).train.examples == 1294


def test_digits_land_in_the_folder_of_tfds_by_default():
    data.load(config.Data())
    assert os.path.isdir(os.path.join(os.environ["TFDS_DATA_DIR"], "digits"))

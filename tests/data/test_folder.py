from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from kerasdefense import config, data
from kerasdefense.types import InputError, UsageError


def everything(split):
    batches = list(split.batches(3).as_numpy_iterator())
    return {key: np.concatenate([batch[key] for batch in batches]) for key in batches[0]}


def refused(load, *words, **settings):
    with pytest.raises(InputError) as error:
        load(**settings)
    message = str(error.value)
    assert "\n" not in message
    for word in words:
        assert str(word) in message


def test_folder_holds_out_a_stratified_fifth_for_the_test(write_images, load_folder, tmp_path):
    for name, count in (("zebra", 20), ("ant", 30), (".hidden", 1)):
        write_images(name, count)
    (tmp_path / "ant" / "notes.txt").write_text("not an image")
    splits = load_folder()
    assert splits.labels == ("ant", "zebra")
    assert splits.name == tmp_path.name
    assert splits.image_shape == (8, 8, 3)
    assert [split.examples for split in (splits.train, splits.validation, splits.test)] == [36, 4, 10]
    assert np.bincount(splits.test.label[splits.test.index]).tolist() == [6, 4]
    index = [everything(split)["index"] for split in (splits.train, splits.validation, splits.test)]
    assert np.sort(np.concatenate(index)).tolist() == list(range(50))


def test_folder_reads_the_pixels_and_labels_of_its_files(write_images, load_folder, tmp_path):
    write_images("a", 6)
    write_images("b", 6)
    expected = {
        np.asarray(Image.open(path)).tobytes(): "ab".index(path.parent.name) for path in tmp_path.rglob("*.png")
    }
    splits = load_folder(validation_fraction=0.3)
    found = {}
    for split in (splits.train, splits.validation, splits.test):
        part = everything(split)
        pixels = np.round(part["image"] * 255).astype(np.uint8)
        found.update({image.tobytes(): label for image, label in zip(pixels, part["label"])})
    assert found == expected


def test_folder_order_mixes_the_classes_and_never_changes(write_images, load_folder):
    write_images("a", 20)
    write_images("b", 20)
    label = load_folder().train.records.label
    assert label.sum() == 20
    assert 10 < np.abs(np.diff(label)).sum() < 30
    assert load_folder().train.records.name(0) == load_folder().train.records.name(0)
    np.testing.assert_array_equal(label, load_folder().train.records.label)


def test_folder_uses_its_own_splits(write_images, load_folder):
    for split, count in (("train", 5), ("validation", 2), ("test", 3)):
        for name in ("cat", "dog"):
            write_images(f"{split}/{name}", count)
    splits = load_folder()
    assert [split.examples for split in (splits.train, splits.validation, splits.test)] == [10, 4, 6]
    assert all("/validation/" in splits.validation.records.name(place) for place in range(4))
    assert splits.labels == ("cat", "dog")


def test_folder_with_a_class_called_train_is_not_divided(write_images, load_folder):
    write_images("train", 6)
    write_images("tram", 6)
    assert load_folder(validation_fraction=0.3).labels == ("train", "tram")


@pytest.mark.parametrize("suffix", ["png", "jpg", "jpeg", "bmp", "gif", "PNG"])
def test_folder_decodes_every_format(write_images, load_folder, suffix):
    write_images("a", 4, suffix=suffix)
    write_images("b", 4, suffix=suffix)
    splits = load_folder(validation_fraction=0.3)
    record = splits.train.records
    for index, image in zip(everything(splits.train)["index"], everything(splits.train)["image"]):
        with Image.open(record.name(index)) as reference:
            expected = np.asarray(reference.convert("RGB")) / 255
        np.testing.assert_allclose(image, expected, atol=5.1 / 255 if suffix.startswith("j") else 1e-6)


def test_folder_of_grey_images_has_one_channel_until_one_is_colour(write_images, load_folder):
    write_images("a", 5, mode="L")
    write_images("b", 5, mode="L")
    assert load_folder(validation_fraction=0.3).image_shape == (8, 8, 1)
    write_images("c", 5, mode="RGBA")
    splits = load_folder(validation_fraction=0.3)
    assert splits.image_shape == (8, 8, 3)
    part = everything(splits.train)
    grey = part["image"][part["label"] < 2]
    assert (grey == grey[..., :1]).all()


def test_folder_resizes_smoothly(write_images, load_folder, tmp_path):
    write_images("a", 5, size=(16, 24))
    write_images("b", 5, size=(9, 8))
    splits = load_folder(image_size=8, validation_fraction=0.3)
    assert splits.image_shape == (8, 8, 3)
    part = everything(splits.train)
    for index, image in zip(part["index"], part["image"]):
        with Image.open(splits.train.records.name(index)) as reference:
            expected = np.asarray(reference.resize((8, 8), Image.Resampling.BILINEAR)) / 255
        np.testing.assert_allclose(image, expected, atol=2.1 / 255)


def test_folder_with_sizes_that_differ_names_one(write_images, load_folder):
    write_images("a", 5, size=(8, 10))
    odd = write_images("b", 1, size=(8, 9)) / "0.png"
    refused(load_folder, odd, "8x9", "8x10", "--data_image_size")


@pytest.mark.parametrize("suffix", ["png", "jpg", "bmp", "gif"])
def test_folder_names_a_truncated_image(write_images, load_folder, suffix):
    write_images("a", 3, suffix=suffix, size=(32, 32))
    broken = write_images("b", 3, suffix=suffix, size=(32, 32)) / f"1.{suffix}"
    broken.write_bytes(broken.read_bytes()[:-300])
    refused(load_folder, broken, "not a readable image")


@pytest.mark.parametrize("content", [b"", b"\xff", b"not an image"])
def test_folder_names_a_file_that_is_no_image(write_images, load_folder, content):
    write_images("a", 3)
    broken = write_images("b", 3) / "1.jpg"
    broken.write_bytes(content)
    refused(load_folder, broken, "not a readable image")


def test_folder_names_an_image_that_tensorflow_cannot_decode(write_images, load_folder):
    write_images("a", 3)
    folder = write_images("b", 3)
    Image.new("RGB", (8, 8)).save(folder / "3.png", format="TIFF")
    refused(load_folder, folder / "3.png", "is TIFF; convert it to PNG or JPEG")
    Image.new("L", (8, 8)).save(folder / "3.bmp")
    (folder / "3.png").unlink()
    refused(load_folder, folder / "3.bmp", "24 bits")


@pytest.mark.parametrize("cache", ["memory", "disk"])
def test_folder_names_an_image_that_breaks_after_it_was_checked(write_images, load_folder, cache):
    write_images("a", 6)
    write_images("b", 6)
    train = load_folder(cache=cache, validation_fraction=0.3).train
    path = train.records.name(int(train.index[2]))
    with open(path, "wb") as file:
        file.write(b"gone")
    refused(lambda: train.epochs(2, seed=0, epochs=1), path, "Unknown image file format")


def test_folder_missing_or_empty_is_refused(tmp_path, load_folder, write_images):
    with pytest.raises(UsageError, match="--data_name=folder needs --data_dir"):
        data.load(config.Data(name="folder"))
    with pytest.raises(InputError, match="nowhere: no such folder"):
        data.load(config.Data(name="folder", dir=str(tmp_path / "nowhere")))
    refused(load_folder, tmp_path, "0 subfolders of classes; at least 2")
    write_images("a", 3)
    refused(load_folder, tmp_path, "1 subfolders of classes; at least 2")
    (tmp_path / "b").mkdir()
    refused(load_folder, tmp_path / "b", "holds no image")


def test_folder_with_a_strange_split_or_class_is_refused(write_images, load_folder, tmp_path):
    write_images("train/a", 3)
    write_images("train/b", 3)
    write_images("val/a", 3)
    refused(load_folder, tmp_path / "val", "only test/ and validation/ are expected")
    (tmp_path / "val").rename(tmp_path / "test")
    (tmp_path / "test" / "a").rename(tmp_path / "test" / "c")
    refused(load_folder, tmp_path / "test" / "c", "no such class in the training images, which have a, b")


def test_folder_split_without_classes_is_refused(write_images, load_folder, tmp_path):
    write_images("train/a", 3)
    write_images("train/b", 3)
    (tmp_path / "test").mkdir()
    refused(load_folder, tmp_path / "test", "holds no class folders")

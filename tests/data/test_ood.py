from __future__ import annotations

import zlib
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import tensorflow as tf
import tensorflow_datasets as tfds
from PIL import Image

from kerasdefense.data import ood
from kerasdefense.types import InputError, UsageError

SHARED = Path(__file__).parents[3] / "shared" / "tensorflow_datasets"


class UnlabelledImages(tfds.core.GeneratorBasedBuilder):
    """Coloured images of several sizes without labels, every pixel their number, in splits that a test chooses."""

    VERSION = tfds.core.Version("1.0.0")
    splits: ClassVar[dict] = {}
    features: ClassVar[dict] = {"photo": tfds.features.Image(shape=(None, None, 3))}

    def _info(self):
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(self.features))

    def _split_generators(self, dl_manager):
        return {name: self._generate_examples(count) for name, count in self.splits.items()}

    def _generate_examples(self, count):
        for place in range(count):
            yield place, {key: np.full((4 + place, 5, 3), place, np.uint8) for key in self.features}


def everything(split, batch_size=3):
    batches = list(split.batches(batch_size).as_numpy_iterator())
    return {key: np.concatenate([batch[key] for batch in batches]) for key in batches[0]}


def levels(split):
    """Return the images as uint8, which they must be to rounding."""
    image = everything(split)["image"]
    assert image.dtype == np.float32
    np.testing.assert_allclose(image * 255, np.round(image * 255), atol=1e-4)
    return np.round(image * 255).astype(np.uint8)


def pixels(*shape):
    return np.random.RandomState(zlib.crc32(bytes(shape))).randint(0, 256, shape).astype(np.uint8)


def refused(source, *words, error=InputError, shape=(8, 8, 3), **settings):
    with pytest.raises(error) as raised:
        ood.read(str(source), shape, **settings)
    message = str(raised.value)
    assert "\n" not in message
    for word in words:
        assert str(word) in message


@pytest.fixture
def save(tmp_path):
    def write(images, name="outside.npz", key="images"):
        np.savez(tmp_path / name, **{key: images})
        return str(tmp_path / name)

    return write


MIXED = ood._mixed


@pytest.fixture(autouse=True)
def in_order(monkeypatch):
    """Leave images in the order of their source, so that tests know which is which."""
    monkeypatch.setattr(ood, "_mixed", np.arange)


# Files of arrays.


def test_file_is_streamed_as_unknown_images(save):
    images = pixels(7, 8, 8, 3)
    split = ood.read(save(images), (8, 8, 3))
    assert split.examples == 7
    batches = list(split.batches(3).as_numpy_iterator())
    assert [batch["image"].shape for batch in batches] == [(3, 8, 8, 3), (3, 8, 8, 3), (1, 8, 8, 3)]
    found = everything(split)
    assert found["label"].dtype == found["index"].dtype == np.int32
    assert (found["label"] == -1).all() and found["index"].tolist() == list(range(7))
    np.testing.assert_array_equal(levels(split), images)
    assert "outside.npz image 2" in split.records.name(2)


@pytest.mark.parametrize("shape", [(3, 8, 8), (3, 8, 8, 1)])
def test_file_of_grey_images_is_repeated_into_colours(save, shape):
    images = pixels(*shape)
    grey = levels(ood.read(save(images), (8, 8, 1)))
    np.testing.assert_array_equal(grey, images.reshape(3, 8, 8, 1))
    np.testing.assert_array_equal(levels(ood.read(save(images), (8, 8, 3))), np.repeat(grey, 3, -1))


def test_file_of_coloured_images_is_turned_to_grey(save):
    images = pixels(3, 8, 8, 3)
    found = levels(ood.read(save(images), (8, 8, 1)))
    assert found.shape == (3, 8, 8, 1)
    luminance = images @ [0.2989, 0.587, 0.114]
    assert np.abs(found[..., 0] - luminance).max() < 0.51


@pytest.mark.parametrize("size", [(8, 8), (16, 12), (5, 9)])
def test_file_is_resized_smoothly(save, size):
    images = pixels(3, *size, 3)
    found = levels(ood.read(save(images), (8, 6, 3)))
    for each, image in zip(found, images):
        expected = np.asarray(Image.fromarray(image).resize((6, 8), Image.Resampling.BILINEAR))
        np.testing.assert_allclose(each, np.float32(expected), atol=2.1)


def test_images_of_a_file_and_a_folder_are_mixed(save, write_images, tmp_path, monkeypatch):
    monkeypatch.setattr(ood, "_mixed", MIXED)
    images = pixels(60, 8, 8, 3)
    split = ood.read(save(images), (8, 8, 3))
    order = [int(split.records.name(place).split()[-1]) for place in range(60)]
    assert sorted(order) == list(range(60)) and order != sorted(order)
    np.testing.assert_array_equal(levels(split), images[order])
    np.testing.assert_array_equal(levels(ood.read(save(images), (8, 8, 3))), images[order])  # always the same
    for name in ("one", "two"):
        write_images(f"classes/{name}", 12)
    split = ood.read(str(tmp_path / "classes"), (8, 8, 3))
    first = [Path(split.records.name(place)).parent.name for place in range(12)]
    assert set(first) == {"one", "two"}


def test_file_that_is_not_such_an_array_is_refused(save, tmp_path):
    refused(save(np.zeros((2, 8, 8, 3), np.float32)), "outside.npz", "float32", "uint8 in 0..255 is expected")
    refused(save(pixels(2, 8, 8, 3), key="photos"), "no array 'images'", "it has photos")
    refused(save(pixels(2, 8, 8, 4)), "(2, 8, 8, 4)", "[n, height, width, 1 or 3] is expected")
    refused(save(pixels(2, 8)), "(2, 8)", "is expected")
    refused(save(np.zeros((2, 0, 8, 3), np.uint8)), "(2, 0, 8, 3)", "is expected")
    refused(save(np.zeros((0, 8, 8, 3), np.uint8)), "outside.npz: holds no images")
    refused(save(np.array([{}, {}])), "not a readable .npz file", "allow_pickle")
    path = Path(save(pixels(2, 8, 8, 3)))
    path.write_bytes(path.read_bytes()[:-30])
    refused(path, path, "neither a whole .npz file nor a folder of images")
    np.save(tmp_path / "outside.npy", pixels(2, 8, 8, 3))
    refused(tmp_path / "outside.npy", "outside.npy", "neither a whole .npz file")


def test_file_with_a_flipped_bit_is_refused(save):
    path = Path(save(pixels(2, 8, 8, 3)))
    content = bytearray(path.read_bytes())
    content[300] ^= 1
    path.write_bytes(content)
    refused(path, path, "not a readable .npz file", "CRC")


@pytest.mark.parametrize("source", ["nowhere.npz", "some/where.npz", "/nowhere", "./nowhere", "nowhere/images"])
def test_source_that_looks_like_a_path_must_exist(source, tmp_path):
    refused(source, f"{Path(source)}: no such file or folder", data_dir=str(tmp_path))


# Folders of images.


def test_folder_is_read_flat_and_nested_in_the_order_of_its_paths(write_images, tmp_path):
    write_images("b/deep/er", 2)
    write_images("a", 2, size=(16, 24))
    Image.fromarray(pixels(9, 7)).save(tmp_path / "flat.PNG")
    Image.fromarray(pixels(8, 8, 3)).save(tmp_path / "photo.jpg")
    (tmp_path / "a" / "notes.txt").write_text("not an image")
    for hidden in ("a/._0.png", ".cache/0.png", "__MACOSX/0.png"):
        (tmp_path / hidden).parent.mkdir(exist_ok=True)
        (tmp_path / hidden).write_bytes(b"no image")
    split = ood.read(str(tmp_path), (8, 8, 3))
    names = [str(Path(split.records.name(place)).relative_to(tmp_path)) for place in range(split.examples)]
    assert names == ["a/0.png", "a/1.png", "b/deep/er/0.png", "b/deep/er/1.png", "flat.PNG", "photo.jpg"]
    found = everything(split)
    assert (found["label"] == -1).all()
    for name, image in zip(names, found["image"] * 255):
        with Image.open(tmp_path / name) as stored:
            shrunk = stored.convert("RGB").resize((8, 8), Image.Resampling.BILINEAR)
        np.testing.assert_allclose(image, np.float32(shrunk), atol=5.1 if name.endswith("jpg") else 2.1)
    np.testing.assert_array_equal(np.ptp(found["image"][4], axis=-1), 0)


@pytest.mark.parametrize(
    ("suffix", "mode"), [("png", "L"), ("png", "RGBA"), ("bmp", "RGB"), ("gif", "P"), ("jpg", "L")]
)
def test_folder_of_every_format_becomes_grey(write_images, tmp_path, suffix, mode):
    write_images("a", 2, suffix=suffix, mode=mode)
    found = levels(ood.read(str(tmp_path), (8, 8, 1)))
    for place, image in enumerate(found):
        with Image.open(tmp_path / "a" / f"{place}.{suffix}") as stored:
            expected = np.asarray(stored.convert("RGB")) @ [0.2989, 0.587, 0.114]
        np.testing.assert_allclose(image[..., 0], expected, atol=5.1 if suffix == "jpg" else 0.6)


def test_folder_names_an_unreadable_image(write_images, tmp_path):
    broken = write_images("a", 3, size=(32, 32)) / "1.png"
    broken.write_bytes(broken.read_bytes()[:-300])
    refused(tmp_path, broken, "not a readable image")


def test_folder_without_images_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("not an image")
    refused(tmp_path, f"{tmp_path}: holds no images")


# Sets of TFDS.


def test_set_gives_its_test_images(digits_folder, digits):
    split = ood.read("digits", (8, 8, 1), data_dir=digits_folder)
    expected = everything(digits().test, 64)
    found = everything(split, 64)
    np.testing.assert_array_equal(found["image"], expected["image"])
    assert (found["label"] == -1).all() and (found["index"] == expected["index"]).all()
    assert "digits" in split.records.name(3) and "test example 3" in split.records.name(3)


def test_set_is_shaped(digits_folder, digits):
    found = everything(ood.read("digits", (12, 12, 3), data_dir=digits_folder), 64)["image"][:5]
    assert found.shape == (5, 12, 12, 3)
    source = next(iter(digits().test.batches(5)))["image"]
    expected = tf.image.grayscale_to_rgb(tf.image.resize(source, (12, 12), antialias=True))
    np.testing.assert_allclose(found, expected, atol=0.51 / 255)


@pytest.mark.parametrize(
    ("splits", "count"),
    [({"test": 2, "train": 4}, 2), ({"train": 4, "validation": 3}, 3), ({"train": 4, "other": 1}, 4)],
)
def test_set_without_labels_gives_the_best_of_its_splits(monkeypatch, tmp_path, capsys, splits, count):
    monkeypatch.setattr(UnlabelledImages, "splits", splits)
    split = ood.read("unlabelled_images", (4, 4, 3), data_dir=str(tmp_path))
    assert "downloading unlabelled_images/1.0.0" in capsys.readouterr().out
    assert sorted(levels(split)[:, 0, 0, 0]) == list(range(count))


def test_set_that_cannot_be_read_is_refused(monkeypatch, tmp_path):
    settings = {"data_dir": str(tmp_path), "error": UsageError}
    refused("zzzzzz", "zzzzzz: no .npz file, folder or set of", **settings)
    refused("emnist/nope", "BuilderConfig nope not found", **settings)
    refused("near:by:it", "near:by:it", **settings)
    refused("ag_news_subset", "not a set of uint8 images; its features are description, label, title", **settings)
    monkeypatch.setattr(UnlabelledImages, "splits", {"other": 2})
    refused("unlabelled_images", "no test, validation or train split; it has other", **settings)


@pytest.mark.skipif(not (SHARED / "cifar100").is_dir(), reason="CIFAR-100 is not beside the project")
def test_set_of_another_known_set_is_near():
    (found,) = ood.load("cifar100", "cifar10", (32, 32, 3), data_dir=str(SHARED))
    assert (found.name, found.group, found.split.examples) == ("cifar100", "near", 10_000)
    assert next(iter(found.split.batches(20)))["image"].shape == (20, 32, 32, 3)


# Lists of sets.


@pytest.mark.parametrize(
    ("text", "known", "expected"),
    [
        ("", "cifar10", []),
        (" ", "cifar10", []),
        ("cifar100,mnist", "cifar10", [("near", "cifar100"), ("far", "mnist")]),
        (
            "cifar10 , svhn_cropped:3.1.0,dtd",
            "cifar100",
            [("near", "cifar10"), ("far", "svhn_cropped:3.1.0"), ("far", "dtd")],
        ),
        ("x/tinyimagenet_resize.npz", "cifar10:3.0.2", [("near", "x/tinyimagenet_resize.npz")]),
        ("places365_small,emnist/letters", "cifar10", [("far", "places365_small"), ("", "emnist/letters")]),
        ("cifar100,mnist", "digits", [("", "cifar100"), ("", "mnist")]),
        ("cifar10", "cifar10", [("", "cifar10")]),
        (
            "far:cifar100, near: mnist,near:./own",
            "cifar10",
            [("far", "cifar100"), ("near", "mnist"), ("near", "./own")],
        ),
    ],
)
def test_parse_finds_groups(text, known, expected):
    assert ood.parse(text, known) == expected


def test_parse_knows_a_folder_by_its_name(tmp_path):
    (tmp_path / "textures").mkdir()
    assert ood.parse(f"{tmp_path}/textures/", "cifar10") == [("far", f"{tmp_path}/textures/")]


@pytest.mark.parametrize("text", ["mnist,", ",mnist", "mnist,,dtd", "near:", "mnist, far: "])
def test_parse_refuses_an_empty_item(text):
    with pytest.raises(UsageError, match=r"names no set; write \[near:\|far:\]SOURCE"):
        ood.parse(text, "cifar10")


@pytest.mark.parametrize("text", ["mnist,mnist", "near:mnist,far:mnist", "a/mnist.npz,mnist", "a/x.npz,b/x.npz"])
def test_parse_refuses_two_of_one_name(text):
    with pytest.raises(UsageError, match=r"two are called '(mnist|x)'"):
        ood.parse(text, "cifar10")


def test_load_opens_every_set(save, write_images, digits_folder, tmp_path):
    file = save(pixels(4, 9, 9), "svhn.npz")
    images = write_images("own/inner", 5).parent
    text = f"{file}, near:{images}, digits"
    found = ood.load(text, "cifar10", (8, 8, 3), data_dir=digits_folder)
    assert [each[:2] for each in found] == [("svhn", "far"), ("own", "near"), ("digits", "")]
    for each in found:
        assert next(iter(each.split.batches(4)))["image"].shape == (4, 8, 8, 3)
    assert ood.load("", "cifar10", (8, 8, 3)) == []
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="empty: holds no images"):
        ood.load(f"{file},{tmp_path}/empty", "cifar10", (8, 8, 3))

"""Data sets small enough to read in every test."""

from __future__ import annotations

import zlib

import numpy as np
import pytest
from PIL import Image

from kerasdefense import config, data


@pytest.fixture(scope="session")
def digits_folder(tmp_path_factory):
    """A TFDS folder in which digits are prepared once."""
    folder = tmp_path_factory.mktemp("tfds")
    data.load(config.Data(dir=str(folder)))
    return str(folder)


@pytest.fixture
def digits(digits_folder):
    """Load digits with any other settings."""
    return lambda **settings: data.load(config.Data(dir=digits_folder, **settings))


@pytest.fixture
def write_images(tmp_path):
    """Write `count` random images of one class; return the class folder."""

    def write(name, count, *, size=(8, 8), suffix="png", mode="RGB"):
        folder = tmp_path / name
        folder.mkdir(parents=True)
        random = np.random.RandomState(zlib.crc32(name.encode()))
        for place in range(count):
            pixels = random.randint(0, 256, (*size, 3), np.uint8)
            Image.fromarray(pixels).convert(mode).save(folder / f"{place}.{suffix}")
        return folder

    return write


@pytest.fixture
def load_folder(tmp_path):
    """Load `tmp_path` as a folder of images."""
    return lambda **settings: data.load(config.Data(name="folder", dir=str(tmp_path), **settings))

"""Images as callers have them, as what a signature takes."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Union

import numpy as np
from PIL import Image

from kerasdefense.serving.transport import objects
from kerasdefense.types import InputError

Images = Union[np.ndarray, bytes, str, "os.PathLike[str]", Sequence[Any]]
_MODES = {1: "L", 3: "RGB", 4: "RGBA"}


class Request(NamedTuple):
    """What a signature is sent: its name, that of its input, and one row for each image; and what images are called."""

    signature: str
    argument: str
    rows: np.ndarray
    names: Sequence[str]


def to_request(images: Images) -> Request:
    """Return images of one kind as a request.

    Args:
        images: float arrays [h, w, c] or [n, h, w, c] in [0, 1], which go to `serving_default` as float32; uint8 arrays
            of those shapes, which become PNG files without loss and go to `image_bytes` as files do; paths of image
            files; their contents as bytes; or a list of one of these kinds, arrays [h, w, c] then.

    Raises:
        InputError: another kind, a list of several, or a file that cannot be read.
    """
    if isinstance(images, (bytes, bytearray, memoryview, str, os.PathLike)):
        images = [images]
    if not isinstance(images, (list, tuple)):
        return _of_array(_array(images))
    kinds = sorted({_kind(each) for each in images})
    if len(kinds) > 1:
        raise InputError(f"images of one call are of one kind, not {' and '.join(kinds)}")
    if not images or kinds == ["bytes"]:
        return _files([bytes(each) for each in images], _numbered(len(images)))
    if kinds == ["paths"]:
        return _files([_read(Path(each)) for each in images], [str(each) for each in images])
    return _of_list([_array(each) for each in images])


def _kind(image: Any) -> str:
    if isinstance(image, (bytes, bytearray, memoryview)):
        return "bytes"
    if isinstance(image, (str, os.PathLike)):
        return "paths"
    dtype = _array(image).dtype
    return f"{'float' if np.issubdtype(dtype, np.floating) else dtype.name} arrays"


def _array(image: Any) -> np.ndarray:
    try:
        return np.asarray(image)
    except (TypeError, ValueError) as error:
        raise InputError(f"an image is no array: {' '.join(str(error).split())}") from error


def _of_array(array: np.ndarray) -> Request:
    if array.ndim not in (3, 4):
        raise InputError(f"images are [n, height, width, channels] or one [height, width, channels], not {array.shape}")
    array = array[None] if array.ndim == 3 else array
    if array.dtype == np.uint8:
        return _files([_png(each) for each in array], _numbered(len(array)))
    if not np.issubdtype(array.dtype, np.floating):
        raise InputError(f"images are floats in [0, 1] or uint8, not {array.dtype}")
    with np.errstate(over="ignore"):  # what float32 cannot hold is infinite, and refused as such
        rows = np.ascontiguousarray(array, np.float32)
    return Request("serving_default", "image", rows, _numbered(len(rows)))


def _of_list(arrays: list[np.ndarray]) -> Request:
    """Return arrays [h, w, c] of one type; those of uint8 may differ in size."""
    shapes = {array.shape for array in arrays}
    ranks = {len(shape) for shape in shapes}
    if ranks != {3}:
        raise InputError(f"a list of images holds arrays [height, width, channels], not {sorted(shapes)[0]}")
    if arrays[0].dtype == np.uint8:
        return _files([_png(array) for array in arrays], _numbered(len(arrays)))
    if len(shapes) > 1:
        raise InputError(f"float images of one call have one shape, not {len(shapes)}: the server does not resize them")
    return _of_array(np.stack(arrays))


def _files(files: list[bytes], names: Sequence[str]) -> Request:
    return Request("image_bytes", "image_bytes", objects(files), names)


def _png(image: np.ndarray) -> bytes:
    """Return a uint8 image [h, w, c] as a PNG file."""
    height, width, channels = image.shape
    if channels not in _MODES or not height or not width:
        raise InputError(f"uint8 images have 1, 3 or 4 channels and some pixels, not the shape {image.shape}")
    stream = io.BytesIO()
    Image.fromarray(image[..., 0] if channels == 1 else image, _MODES[channels]).save(stream, "PNG")
    return stream.getvalue()


def _read(path: Path) -> bytes:
    try:
        return path.expanduser().read_bytes()
    except (OSError, RuntimeError, ValueError) as error:  # also no such user behind ~, or a zero byte
        raise InputError(f"{str(path)!r:.200} cannot be read: {getattr(error, 'strerror', None) or error}") from error


def _numbered(count: int) -> list[str]:
    return [f"image {number}" for number in range(count)]

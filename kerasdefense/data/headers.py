"""What an image file says of itself before it is decoded: its size, and whether it can be read at all."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import BinaryIO, NamedTuple

from PIL import Image

from kerasdefense.data.records import ImageShape
from kerasdefense.types import InputError

_FORMATS = ("PNG", "JPEG", "MPO", "BMP", "GIF")
_GREY_MODES = ("1", "L", "LA", "I", "I;16", "I;16B")


class Header(NamedTuple):
    """The size of an image in pixels, and whether it has colours."""

    height: int
    width: int
    colour: bool


def read_header(file: BinaryIO, name: str) -> Header:
    """Read the header of an image, or raise an InputError that says why the image called `name` cannot be decoded."""
    try:
        with Image.open(file) as image:
            header = Header(image.height, image.width, image.mode not in _GREY_MODES)
            image_format = image.format
            if image_format == "PNG":
                image.verify()
            elif image_format not in ("JPEG", "MPO") or not _ends_as_jpeg(file):
                image.load()
        bits = _bits_of_bmp(file) if image_format == "BMP" else 0
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        raise InputError(f"{name}: not a readable image ({error})") from error
    if image_format not in _FORMATS:
        raise InputError(f"{name}: is {image_format}; convert it to PNG or JPEG")
    if image_format == "BMP" and bits != 24:
        raise InputError(f"{name}: a BMP image must have 24 bits per pixel; convert it to PNG")
    return header._replace(colour=header.colour or image_format in ("BMP", "GIF"))


def common_shape(headers: Iterable[tuple[str, Header]], image_size: int) -> ImageShape:
    """Return the shape that all images get, in colour if one of them is.

    Args:
        headers: name and header of each image, of at least one.
        image_size: side in pixels to which they are resized; 0 = all have one size already.

    Raises:
        InputError: two of them differ in size and `image_size` is 0.
    """
    first: tuple[str, Header] | None = None
    channels = 1
    for name, header in headers:
        first = first or (name, header)
        channels = 3 if header.colour else channels
        if header[:2] != first[1][:2] and not image_size:
            raise InputError(
                f"{name}: is {header.height}x{header.width} (height x width) but {first[0]} is "
                f"{first[1].height}x{first[1].width}; pass --data_image_size=N to resize all images to N x N"
            )
    if first is None:
        raise InputError("there are no images")
    height, width = (image_size, image_size) if image_size else first[1][:2]
    return height, width, channels


def _ends_as_jpeg(file: BinaryIO) -> bool:
    """Return whether a file ends with the end marker, without which a JPEG image may be truncated."""
    place = file.tell()
    file.seek(-2, os.SEEK_END)
    end = file.read()
    file.seek(place)
    return end == b"\xff\xd9"


def _bits_of_bmp(file: BinaryIO) -> int:
    """Return the bits per pixel that the header of a BMP file declares."""
    file.seek(28)
    return int.from_bytes(file.read(2), "little")

"""What is wrong with one row of a batch is told by that row, and the others are as if it were a good one."""

import io
import struct
import warnings
import zlib

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from kerasdefense import export
from kerasdefense.export.decoding import LARGEST

BROKEN = (
    "empty",
    "no_image",
    "text",
    "svg",
    "webp",
    "tiff",
    "png_signature_alone",
    "png_cut_in_header",
    "png_cut_in_data",
    "png_without_end",
    "png_with_a_flipped_bit",
    "png_with_a_wrong_checksum",
    "png_of_broken_zlib",
    "png_of_no_pixels",
    "png_bomb",
    "png_of_negative_size",
    "jpeg_signature_alone",
    "jpeg_cut",
    "jpeg_bomb",
    "png_with_a_chunk_before_its_header",
    "png_bomb_with_a_chunk_before_its_header",
    "gif",
    "gif_of_comments",
    "bmp",
    "bmp_of_a_palette",
)


def chunk(name, content):
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def png(width, height, data):
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def replaced(content, place, part):
    return content[:place] + part + content[place + len(part) :]


def broken(name, encode, pixels):
    """Return a file that cannot be read, or is too large to be."""
    whole = {kind: encode(pixels, kind.upper()) for kind in ("png", "jpeg", "gif", "bmp", "webp", "tiff")}
    start = whole["jpeg"].index(b"\xff\xc0")
    ancillary = chunk(b"prVt", struct.pack(">II", 8, 8))
    row = zlib.compress(bytes(1000))
    return {
        "empty": b"",
        "no_image": b"not an image",
        "text": "Bild".encode("utf-16"),
        "svg": b"<svg xmlns='http://www.w3.org/2000/svg' width='8' height='8'/>",
        "webp": whole["webp"],
        "tiff": whole["tiff"],
        "png_signature_alone": whole["png"][:8],
        "png_cut_in_header": whole["png"][:20],
        "png_cut_in_data": whole["png"][:-40],
        "png_without_end": whole["png"][: whole["png"].index(b"IDAT") + 4],
        "png_with_a_flipped_bit": replaced(whole["png"], 60, bytes([whole["png"][60] ^ 1])),
        "png_with_a_wrong_checksum": replaced(whole["png"], 29, bytes(4)),
        "png_of_broken_zlib": png(8, 8, b"\x78\x9c" + bytes(range(200))),
        "png_of_no_pixels": png(0, 8, row),
        "png_bomb": png(LARGEST, 2, row),
        "png_of_negative_size": png(2**31 + 8, 8, row),
        "jpeg_signature_alone": whole["jpeg"][:4],
        "jpeg_cut": whole["jpeg"][: start + 60],
        "jpeg_bomb": replaced(whole["jpeg"], start + 5, b"\xff\xdc\xff\xdc"),
        "png_with_a_chunk_before_its_header": whole["png"][:8] + ancillary + whole["png"][8:],
        "png_bomb_with_a_chunk_before_its_header": png(LARGEST, 2, row)[:8] + ancillary + png(LARGEST, 2, row)[8:],
        "gif": whole["gif"],
        "gif_of_comments": whole["gif"][:-1] + b"!\xfe" + b"\x01a" * 130_000 + b"\0;",
        "bmp": whole["bmp"],
        "bmp_of_a_palette": encode(pixels, "BMP", "P"),
    }[name]


def example(file, key="image"):
    feature = {key: tf.train.Feature(bytes_list=tf.train.BytesList(value=[file]))}
    return tf.train.Example(features=tf.train.Features(feature=feature)).SerializeToString()


def check_rows(found, good, bad):
    """Assert that rows `bad` are told to be so, by finite numbers, and the others answer as in `good`."""
    found, good = ({key: each.numpy() for key, each in outputs.items()} for outputs in (found, good))
    valid = ~np.isin(np.arange(len(found["label"])), bad)
    np.testing.assert_array_equal(found["valid"], valid)
    assert good["valid"].all()
    for key, value in found.items():
        np.testing.assert_array_equal(value[valid], good[key][valid], err_msg=key)
    fillers = {"logits": 0, "probabilities": 0, "label": -1, "class_name": b"", "accepted": False}
    fillers["anomaly_score"] = np.finfo(np.float32).max
    for key in set(fillers) & set(found):
        filler = fillers[key]
        assert (found[key][~valid] == filler).all(), key


@pytest.mark.parametrize("name", BROKEN)
def test_broken_file_is_told_by_its_row(signatures, encode, pixels, name):
    files = [encode(each) for each in pixels]
    good = signatures["image_bytes"](image_bytes=tf.constant(files))
    bad = [*files[:2], broken(name, encode, pixels[2]), *files[3:]]
    check_rows(signatures["image_bytes"](image_bytes=tf.constant(bad)), good, [2])
    check_rows(signatures["examples"](examples=tf.constant([example(each) for each in bad])), good, [2])


def test_batch_of_broken_files_alone_is_answered(signatures, encode, pixels):
    files = [broken(name, encode, pixels[0]) for name in BROKEN]
    found = signatures["image_bytes"](image_bytes=tf.constant(files))
    assert not found["valid"].numpy().any() and not found["accepted"].numpy().any()


@pytest.mark.parametrize("row", [b"\xff\xff no example", b"", example(b"", key="picture"), "numbers", "two"])
def test_example_that_is_none_is_told_by_its_row(signatures, encode, pixels, row):
    files = [encode(each) for each in pixels]
    if row == "numbers":
        numbers = {"image": tf.train.Feature(float_list=tf.train.FloatList(value=[0.5]))}
        row = tf.train.Example(features=tf.train.Features(feature=numbers)).SerializeToString()
    if row == "two":
        both = {"image": tf.train.Feature(bytes_list=tf.train.BytesList(value=files[:2]))}
        row = tf.train.Example(features=tf.train.Features(feature=both)).SerializeToString()
    rows = [example(each) for each in files]
    good = signatures["examples"](examples=tf.constant(rows))
    check_rows(signatures["examples"](examples=tf.constant([row, *rows[1:]])), good, [0])


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, -1e-3, 1.001, 255])
def test_image_out_of_range_is_told_by_its_row(signatures, pixels, value):
    image = pixels / np.float32(255)
    good = signatures["serving_default"](image=tf.constant(image))
    bad = image.copy()
    bad[1, 7, 7, 2] = bad[4, 0, 0, 0] = value
    check_rows(signatures["serving_default"](image=tf.constant(bad)), good, [1, 4])


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 3e38, -1e-6, 1.000001])
def test_value_out_of_range_is_told_wherever_it_stands(signatures, value):
    places = np.arange(8 * 8 * 3)
    bad = np.full([len(places), len(places)], 0.5, np.float32)
    bad[places, places] = value
    found = signatures["serving_default"](image=tf.constant(bad.reshape(-1, 8, 8, 3)))
    assert not found["valid"].numpy().any() and not found["logits"].numpy().any()


def test_ends_of_the_range_are_valid(signatures):
    image = np.stack([np.zeros([8, 8, 3], np.float32), np.ones([8, 8, 3], np.float32)])
    assert signatures["serving_default"](image=tf.constant(image))["valid"].numpy().all()


@pytest.mark.parametrize("name", ["knn", "odin", "openmax"])
def test_bad_row_is_refused_by_a_detector_and_changes_no_other(name, defense, reject_option, labels, pixels):
    serve = export.serving_module(defense, labels, reject_option(name)).serving_default
    image = pixels / np.float32(255)
    bad = image.copy()
    bad[3] = np.nan
    check_rows(serve(tf.constant(bad)), serve(tf.constant(image)), [3])


def test_largest_image_is_decoded_and_one_more_row_is_not(signatures, encode):
    side = 1 << 12
    assert side * side == LARGEST
    files = [encode(np.zeros((height, side), np.uint8)) for height in (side, side + 1)]
    np.testing.assert_array_equal(signatures["image_bytes"](image_bytes=tf.constant(files))["valid"], [True, False])


def test_polyglot_is_read_as_what_it_begins_with(signatures, encode, pixels):
    png, jpeg = encode(pixels[0]), encode(pixels[1], "JPEG")
    archive = png + b"PK\x03\x04" + bytes(100) + b"<script>"
    found = signatures["image_bytes"](image_bytes=tf.constant([png, archive, png + jpeg, jpeg, jpeg + png]))
    assert found["valid"].numpy().all()
    logits = found["logits"].numpy()
    np.testing.assert_allclose(logits[[1, 2, 4]], logits[[0, 0, 3]], atol=1e-6)


def test_file_that_pillow_and_the_graph_decode_from_every_cut_is_no_crash(signatures, encode, pixels):
    for kind in ("PNG", "JPEG"):
        whole = encode(pixels[0], kind)
        cuts = [whole[:length] for length in range(0, len(whole) - 2, max(1, len(whole) // 40))]
        valid = signatures["image_bytes"](image_bytes=tf.constant([*cuts, whole]))["valid"].numpy()
        assert valid[-1] and not valid[: len(valid) // 2].any(), kind
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            readable = [is_readable(each) for each in cuts]
        assert not (valid[:-1] & ~np.array(readable)).any(), kind  # nothing is answered that Pillow refuses


def is_readable(file):
    try:
        Image.open(io.BytesIO(file)).load()
    except Exception:
        return False
    return True

"""Requests that are wrong in every way that came to mind: each is answered with a reason, and the server goes on.

What is wrong with a request as such is refused with a status code. What is wrong with one image is told by its row,
`valid=False`, and by our client as an error; the rows beside it are answered as ever. The model is exported as ours
are, behind TensorFlow Serving where it is installed and a stub elsewhere; the names of the tests say which.
"""

from __future__ import annotations

import base64
import io
import json
import struct
import threading
import zlib
from concurrent.futures import ThreadPoolExecutor

import grpc
import keras
import numpy as np
import pytest
import requests
import tensorflow as tf
from PIL import Image
from tensorflow_serving.apis import predict_pb2, prediction_service_pb2_grpc

from kerasdefense import backbones, config, export
from kerasdefense.attacks import PGD
from kerasdefense.defenses import Standard
from kerasdefense.serving import Client, InvalidImageError, InvalidRequestError, MergedError

from .stub import binary, bundled, serving

SHAPE = (8, 8, 3)
FILLERS = {"label": -1, "class_name": b"", "accepted": False, "logits": 0, "probabilities": 0}
IMAGE = np.random.default_rng(0).uniform(0.1, 0.9, size=SHAPE).astype(np.float32)
LEVELS = np.rint(IMAGE * 255).astype(np.uint8)
URL = "/v1/models/classifier"


def encoded(kind, levels=LEVELS, **settings):
    stream = io.BytesIO()
    Image.fromarray(levels).save(stream, kind, **settings)
    return stream.getvalue()


def chunk(name, content):
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def png_of(width, height, data, *, depth=8):
    header = struct.pack(">IIBBBBB", width, height, depth, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def png_behind_a_chunk():
    """One that no decoder of ours may look into: where its header tells its size, another chunk stands."""
    return PNG[:8] + chunk(b"prVt", struct.pack(">II", 8, 8)) + PNG[8:]


def png_bomb():
    """A real image of 30,000 x 30,000 black pixels, in 0.1 MB."""
    return png_of(30_000, 30_000, zlib.compress(bytes(30_000 // 8 + 1) * 30_000, 9), depth=1)


def changed(value):
    image = IMAGE.copy()
    image[3, 4, 1] = value
    return image


PNG, JPEG = encoded("PNG"), encoded("JPEG")
BAD_FLOATS = {
    "nan": changed(np.nan),
    "infinity": changed(np.inf),
    "minus_infinity": changed(-np.inf),
    "above_one": changed(1.001),
    "below_zero": changed(-0.001),
    "levels_of_255": LEVELS.astype(np.float32),
    "largest_float": changed(np.finfo(np.float32).max),
}
BAD_FILES = {
    "empty_file": b"",
    "zeros": bytes(1000),
    "text": b"no image",
    "html": b"<html><body>404</body></html>",
    "svg": b"<svg xmlns='http://www.w3.org/2000/svg' width='8' height='8'/>",
    "tiff": encoded("TIFF"),
    "webp": encoded("WEBP"),
    "png_signature_alone": PNG[:8],
    "truncated_png": PNG[:-30],
    "truncated_jpeg": JPEG[: len(JPEG) // 4],
    "gif": encoded("GIF"),
    "bmp": encoded("BMP"),
    "png_behind_a_chunk": png_behind_a_chunk(),
    "png_with_a_flipped_bit": PNG[:60] + bytes([PNG[60] ^ 1]) + PNG[61:],
    "png_of_no_pixels": png_of(0, 0, zlib.compress(b"")),
    "png_that_promises_more": png_of(100_000, 100_000, zlib.compress(bytes(100))),
    "png_bomb": png_bomb(),
    "png_of_2_to_31_pixels_a_side": png_of(2**31 - 1, 2**31 - 1, zlib.compress(bytes(100))),
    "polyglot_of_jpeg_in_png": PNG[:33] + JPEG,
    "polyglot_of_png_behind_a_script": b"<script>alert(1)</script>" + PNG,
    "base64_in_place_of_bytes": base64.b64encode(PNG),
}


def example(file, key="image"):
    feature = {key: tf.train.Feature(bytes_list=tf.train.BytesList(value=[file]))}
    return tf.train.Example(features=tf.train.Features(feature=feature)).SerializeToString()


BAD_EXAMPLES = {
    "no_example": b"no example",
    "example_without_image": example(PNG, key="picture"),
    "example_of_a_broken_file": example(PNG[:-30]),
}
ROWS = [
    *(("serving_default", "image", name, IMAGE, bad) for name, bad in BAD_FLOATS.items()),
    *(("image_bytes", "image_bytes", name, PNG, bad) for name, bad in BAD_FILES.items()),
    *(("examples", "examples", name, example(PNG), bad) for name, bad in BAD_EXAMPLES.items()),
]
GOOD = {"image": IMAGE[None]}
FILES = np.array([PNG], object)
GRPC = [
    ("rank_of_one_image", {"inputs": {"image": IMAGE}}, "INVALID_ARGUMENT"),
    ("rank_of_a_channel_less", {"inputs": {"image": IMAGE[None, ..., 0]}}, "INVALID_ARGUMENT"),
    ("rank_five", {"inputs": {"image": IMAGE[None, None]}}, "INVALID_ARGUMENT"),
    ("scalar", {"inputs": {"image": np.float32(0.5)}}, "INVALID_ARGUMENT"),
    ("larger_images", {"inputs": {"image": np.zeros([1, 9, 8, 3], np.float32)}}, "INVALID_ARGUMENT"),
    ("images_of_no_pixels", {"inputs": {"image": np.zeros([1, 0, 8, 3], np.float32)}}, "INVALID_ARGUMENT"),
    ("grey_images", {"inputs": {"image": IMAGE[None, ..., :1]}}, "INVALID_ARGUMENT"),
    ("channels_first", {"inputs": {"image": np.moveaxis(IMAGE, 2, 0)[None]}}, "INVALID_ARGUMENT"),
    ("doubles", {"inputs": {"image": IMAGE[None].astype(np.float64)}}, "INVALID_ARGUMENT"),
    ("levels", {"inputs": {"image": LEVELS[None]}}, "INVALID_ARGUMENT"),
    ("files_as_images", {"inputs": {"image": FILES}}, "INVALID_ARGUMENT"),
    ("images_as_files", {"signature": "image_bytes", "inputs": {"image_bytes": IMAGE[None]}}, "INVALID_ARGUMENT"),
    ("one_file_alone", {"signature": "image_bytes", "inputs": {"image_bytes": FILES[0]}}, "INVALID_ARGUMENT"),
    ("files_of_rank_two", {"signature": "image_bytes", "inputs": {"image_bytes": FILES[None]}}, "INVALID_ARGUMENT"),
    ("wrong_key", {"inputs": {"images": IMAGE[None]}}, "INVALID_ARGUMENT"),
    ("one_more_key", {"inputs": {**GOOD, "seed": np.zeros([1, 2], np.int32)}}, "INVALID_ARGUMENT"),
    ("no_input", {"inputs": {}}, "INVALID_ARGUMENT"),
    ("key_of_another_signature", {"signature": "examples", "inputs": GOOD}, "INVALID_ARGUMENT"),
    (
        "content_shorter_than_its_shape",
        {"inputs": {"image": IMAGE[None, :4]}, "claims": [1, 8, 8, 3]},
        "INVALID_ARGUMENT",
    ),
    ("unknown_signature", {"signature": "denoise", "inputs": GOOD}, "FAILED_PRECONDITION"),
    ("unknown_model", {"name": "other", "inputs": GOOD}, "NOT_FOUND"),
    ("unknown_version", {"version": 7, "inputs": GOOD}, "NOT_FOUND"),
    ("unknown_label", {"label": "canary", "inputs": GOOD}, "INVALID_ARGUMENT"),
]
ROW, B64 = IMAGE.tolist(), {"b64": base64.b64encode(PNG).decode()}
REST = [
    ("no_json", ":predict", b"image=1", 400),
    ("empty_body", ":predict", b"", 400),
    ("json_that_is_no_object", ":predict", [ROW], 400),
    ("neither_inputs_nor_instances", ":predict", {"image": [ROW]}, 400),
    ("both_inputs_and_instances", ":predict", {"inputs": [ROW], "instances": [ROW]}, 400),
    ("no_instances", ":predict", {"instances": []}, 400),
    ("one_image_without_a_list", ":predict", {"inputs": ROW}, 400),
    ("ragged_image", ":predict", {"instances": [[ROW[0], ROW[1][:3], *ROW[2:]]]}, 400),
    ("words_for_numbers", ":predict", {"instances": [[["a"]]]}, 400),
    ("null_for_a_number", ":predict", {"instances": [[[[None] * 3] * 8] * 8]}, 400),
    ("larger_images", ":predict", {"instances": [[[[0.5] * 3] * 9] * 9]}, 400),
    ("wrong_key", ":predict", {"instances": [{"images": ROW}]}, 400),
    ("wrong_key_in_columns", ":predict", {"inputs": {"images": [ROW]}}, 400),
    ("wrong_base64", ":predict", {"signature_name": "image_bytes", "instances": [{"b64": "!!!"}]}, 400),
    ("numbers_for_files", ":predict", {"signature_name": "image_bytes", "instances": [1]}, 400),
    ("base64_for_an_image", ":predict", {"instances": [B64]}, 400),
    ("unknown_signature", ":predict", {"signature_name": "denoise", "instances": [ROW]}, 400),
    ("unknown_model", None, {"instances": [ROW]}, 404),
    ("unknown_version", "/versions/7:predict", {"instances": [ROW]}, 404),
    ("unknown_label", "/labels/canary:predict", {"instances": [ROW]}, 400),
    ("version_that_is_no_number", "/versions/first:predict", {"instances": [ROW]}, 400),
    ("unknown_verb", ":judge", {"instances": [ROW]}, 400),
]


def test_table_is_as_long_as_it_is_said_to_be():
    assert len(ROWS) + len(GRPC) + len(REST) > 70
    for names in ([each[2] for each in ROWS], [each[0] for each in GRPC], [each[0] for each in REST]):
        assert len(set(names)) == len(names)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    keras.utils.set_random_seed(0)
    backbone = backbones.build(config.Backbone(name="small_cnn", width=4), image_shape=SHAPE, classes=3)
    module = export.serving_module(Standard(backbone, attack=PGD(epsilon=0.1)), ("cat", "dog", "bird"))
    folder = tmp_path_factory.mktemp("exported")
    signatures = {name: getattr(module, name) for name in export.SIGNATURES}
    tf.saved_model.save(module, str(folder / "1"), signatures=signatures)
    return folder


@pytest.fixture(scope="module", params=["tensorflow_model_server" if binary() else "stub"])
def server(exported):
    with serving(exported) as found:
        yield found


@pytest.fixture(scope="module")
def predict(server):
    with grpc.insecure_channel(server.grpc.removeprefix("grpc://")) as channel:
        yield lambda **asked: prediction_service_pb2_grpc.PredictionServiceStub(channel).Predict(
            request_of(**asked), timeout=30
        )


def request_of(*, inputs, name="classifier", signature="serving_default", version=None, label=None, claims=None):
    request = predict_pb2.PredictRequest()
    request.model_spec.name, request.model_spec.signature_name = name, signature
    if version is not None:
        request.model_spec.version.value = version
    if label is not None:
        request.model_spec.version_label = label
    for key, each in inputs.items():
        dtype = tf.string if np.asarray(each).dtype == object else None
        request.inputs[key].CopyFrom(tf.make_tensor_proto(each, dtype))
        if claims is not None:
            request.inputs[key].tensor_shape.CopyFrom(tf.TensorShape(claims).as_proto())
    return request


def outputs_of(answer):
    return {name: tf.make_ndarray(each) for name, each in answer.outputs.items()}


def check_still_serves(predict):
    assert outputs_of(predict(inputs=GOOD))["valid"].tolist() == [True]


@pytest.mark.parametrize(("asked", "code"), [each[1:] for each in GRPC], ids=[each[0] for each in GRPC])
def test_bad_request_is_refused_with_a_reason(asked, code, predict):
    with pytest.raises(grpc.RpcError) as caught:
        predict(**asked)
    assert caught.value.code().name == code
    assert len(caught.value.details()) > 5
    check_still_serves(predict)


@pytest.mark.parametrize(("path", "body", "code"), [each[1:] for each in REST], ids=[each[0] for each in REST])
def test_bad_request_over_rest_is_refused_with_a_reason(path, body, code, server, predict):
    address = f"{server.rest}{URL}{path}" if path else f"{server.rest}/v1/models/other:predict"
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    with requests.post(address, data=content, timeout=30) as answer:
        assert answer.status_code == code
        assert len(answer.json()["error"]) > 5
    check_still_serves(predict)


@pytest.mark.parametrize(
    ("signature", "key", "good", "bad"),
    [(each[0], each[1], *each[3:]) for each in ROWS],
    ids=[each[2] for each in ROWS],
)
def test_bad_image_is_told_by_its_row_and_its_neighbours_are_not_affected(signature, key, good, bad, predict):
    def rows(*values):
        if key == "image":
            return np.stack(values)
        array = np.empty(len(values), object)
        array[:] = values
        return array

    found = outputs_of(predict(signature=signature, inputs={key: rows(good, bad, good)}))
    expected = outputs_of(predict(signature=signature, inputs={key: rows(good, good, good)}))
    assert found["valid"].tolist() == [True, False, True] and expected["valid"].all()
    for name in set(FILLERS) & set(found):
        assert np.all(found[name][1] == FILLERS[name]), name
    assert found["anomaly_score"][1] == np.finfo(np.float32).max
    for name, each in expected.items():
        np.testing.assert_array_equal(found[name][[0, 2]], each[[0, 2]], err_msg=name)


@pytest.mark.parametrize("way", ["grpc", "rest"])
def test_client_names_bad_images(way, server):
    with Client(getattr(server, way)) as client:
        for bad, good in ((list(BAD_FLOATS.values()), IMAGE), (list(BAD_FILES.values()), PNG)):
            with pytest.raises(InvalidImageError) as caught:
                client.predict([good, *bad, good])
            assert caught.value.rows == tuple(range(1, len(bad) + 1))


def test_empty_batch_has_an_empty_answer(predict):
    empty = {"image": np.zeros([0, *SHAPE], np.float32)}
    empty |= {key: np.zeros([0], object) for key in ("image_bytes", "examples")}
    for key, rows in empty.items():
        signature = "serving_default" if key == "image" else key
        outputs = outputs_of(predict(signature=signature, inputs={key: rows}))
        assert outputs["logits"].shape == (0, 3) and outputs["valid"].shape == (0,)


@pytest.mark.parametrize(("good", "bad"), [(IMAGE, BAD_FLOATS["nan"]), (PNG, BAD_FILES["truncated_png"])])
def test_requests_of_others_that_the_server_merges_are_not_affected(good, bad, exported):
    found = {}

    def ask(number):
        found[number] = client.predict([bad if number == 1 else good], on_invalid="return")[0]

    with serving(exported, merge=3) as server, Client(server.grpc) as client:
        threads = [threading.Thread(target=ask, args=[number]) for number in range(3)]
        for each in threads:
            each.start()
        for each in threads:
            each.join()
        assert server.engine.merged == [3]
    assert [found[number].valid for number in range(3)] == [True, False, True]
    np.testing.assert_array_equal(found[0].logits, found[2].logits)


def check_each_gets_its_own_answer(address, exported):
    """Ask for a good image, a bad one and one of another size at a time, as three clients do."""
    bad = np.full_like(exported.image[0], np.nan)
    together = threading.Barrier(3)

    def ask(image):
        with Client(address, timeout=20) as client:
            together.wait(10)
            try:
                return client.predict(image, on_invalid="return")[0]
            except (InvalidRequestError, MergedError) as error:
                return error

    for row in range(3):
        with ThreadPoolExecutor(3) as pool:
            good, invalid, refused = pool.map(ask, [exported.image[row], bad, np.zeros([9, 9, 1])])
        assert good.valid and not invalid.valid and not invalid.accepted
        np.testing.assert_allclose(good.logits, exported.expected()["logits"][row], rtol=1e-4, atol=1e-5)
        assert isinstance(refused, (InvalidRequestError, MergedError))


@pytest.mark.skipif(binary() is None, reason="tensorflow_model_server is not installed: a stub stood in for it")
@pytest.mark.parametrize("way", ["grpc", "rest"])
def test_requests_of_three_clients_at_a_time_are_each_answered_with_batching_on(way, exported_defenses, tmp_path):
    exported = exported_defenses("")
    folder = exported.version.parent
    with bundled(folder, tmp_path) as server:
        check_each_gets_its_own_answer(f"{getattr(server, way)}/{folder.name}", exported)


@pytest.mark.parametrize("way", ["grpc", "rest"])
def test_batch_above_the_servers_limit_is_refused(way, exported):
    with serving(exported, max_batch_size=4) as server, Client(getattr(server, way), batch_size=5) as client:
        with pytest.raises(InvalidRequestError, match="larger than maximum input batch size 4"):
            client.predict(np.repeat(IMAGE[None], 5, axis=0))
        assert len(client.predict(np.repeat(IMAGE[None], 4, axis=0))) == 4

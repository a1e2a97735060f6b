"""The client: what it takes, what it returns, how it fails, against a server over gRPC and REST."""

from __future__ import annotations

import io
import json
import os
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from urllib3.util import connection

from kerasdefense.serving import (
    Client,
    DeadlineError,
    InvalidImageError,
    InvalidRequestError,
    MergedError,
    NotFoundError,
    ServingError,
    UnavailableError,
    transport_rest,
)
from kerasdefense.serving.retries import Deadline, attempted, pause
from kerasdefense.serving.transport import _OUTPUTS
from kerasdefense.serving.transport_rest import RESTTransport
from kerasdefense.types import InputError, UsageError

from .stub import binary, serving


def levels(image):
    return np.rint(image * 255).astype(np.uint8)


def png(image):
    stream = io.BytesIO()
    Image.fromarray(levels(image)[..., 0]).save(stream, "PNG")
    return stream.getvalue()


def expected(digits, image):
    return {name: each.numpy() for name, each in digits.module.serving_default(image).items()}


@pytest.fixture
def free_port():
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]


def test_predictions_are_the_models(digits, address):
    image = digits.image[:70]
    answers = expected(digits, image)
    with Client(address, version=1) as client:
        predictions = client.predict(image)
    assert len(predictions) == 70  # of three batches
    for name in ("label", "accepted", "valid"):
        np.testing.assert_array_equal([getattr(each, name) for each in predictions], answers[name])
    for name in ("logits", "probabilities", "anomaly_score"):
        np.testing.assert_allclose([getattr(each, name) for each in predictions], answers[name], rtol=1e-5, atol=1e-5)
    assert [each.class_name for each in predictions] == [each.decode() for each in answers["class_name"]]
    assert 0 < sum(each.accepted for each in predictions) < 70
    with pytest.raises(AttributeError):
        predictions[0].label = 3


def test_kinds_of_images_agree(digits, address, tmp_path):
    image = digits.image[:3]
    paths = []
    for number, each in enumerate(image):
        paths.append(tmp_path / f"{number}.png")
        paths[-1].write_bytes(png(each))
    kinds = [
        levels(image),
        list(levels(image)),
        levels(image) / 255,
        list(levels(image).astype(np.float32) / 255),
        paths,
        [str(path) for path in paths],
        [png(each) for each in image],
        tuple(bytearray(png(each)) for each in image),
    ]
    with Client(address, version=1) as client:
        logits = [[each.logits for each in client.predict(kind)] for kind in kinds]
        for one, of_first in ((levels(image)[0], 0), (levels(image)[0] / 255, 0), (paths[1], 1), (png(image[2]), 2)):
            (alone,) = client.predict(one)
            np.testing.assert_allclose(alone.logits, logits[0][of_first], rtol=1e-5, atol=1e-5)
        assert client.predict([]) == client.predict(image[:0]) == []
    for each in logits[1:]:
        np.testing.assert_allclose(each, logits[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ([b"file", "path.png"], "of one kind, not bytes and paths"),
        ([np.zeros([8, 8, 1]), np.zeros([8, 8, 1], np.uint8)], "of one kind, not float arrays and uint8 arrays"),
        ([np.zeros([8, 8, 1]), np.zeros([9, 8, 1])], "have one shape"),
        (np.zeros([8, 8]), "not (8, 8)"),
        ([np.zeros([8, 8])], "not (8, 8)"),
        (np.zeros([2, 8, 8, 1], np.int64), "uint8, not int64"),
        (np.zeros([2, 8, 8, 2], np.uint8), "1, 3 or 4 channels"),
        (np.zeros([2, 0, 8, 1], np.uint8), "some pixels"),
        ("no/such/file.png", "cannot be read: No such file"),
        (None, "not ()"),
        ([[[0.5], [0.5, 0.5]]], "an image is no array"),
        ("a\0b", "cannot be read: embedded null byte"),
        ("~nosuchuser/x", "cannot be read"),
    ],
)
def test_images_of_other_kinds_are_refused_before_anything_is_sent(images, message, free_port):
    with Client(f"grpc://localhost:{free_port}") as client, pytest.raises(InputError) as caught:
        client.predict(images)
    assert message in str(caught.value) and not isinstance(caught.value, ServingError)


def test_invalid_images_are_named_or_returned(digits, address):
    image = digits.image[:40].copy()
    image[[3, 35], 0, 0, 0] = np.nan, 1.5
    image[17, 0, 0, 0] = -np.inf
    with Client(address, version=1) as client:
        with pytest.raises(InvalidImageError, match="image 3, image 17, image 35") as caught:
            client.predict(image)
        predictions = client.predict(image, on_invalid="return")
        with pytest.raises(UsageError, match="on_invalid"):
            client.predict(image, on_invalid="ignore")
    assert caught.value.rows == (3, 17, 35)
    assert [row for row, each in enumerate(predictions) if not each.valid] == [3, 17, 35]
    bad = predictions[35]
    assert (bad.label, bad.class_name, bad.accepted, bad.anomaly_score) == (-1, "", False, np.finfo(np.float32).max)
    assert not bad.logits.any()
    others = np.delete(np.arange(40), [3, 17, 35])
    found = [predictions[row].logits for row in others]
    np.testing.assert_allclose(found, expected(digits, image[others])["logits"], rtol=1e-5, atol=1e-5)


def test_versions_and_labels_are_chosen(digits, address):
    image, labels = digits.image[:4], {}
    choices = {"newest": {}, "first": {"version": 1}, "second": {"version": 2}, "label": {"version_label": "stable"}}
    for key, choice in choices.items():
        with Client(f"{address}/classifier", **choice) as client:
            labels[key] = [each.label for each in client.predict(image)]
            states = [(each.version, each.state) for each in client.status()]
        known = {"newest": [2, 1], "first": [1], "second": [2], "label": [1]}[key]
        assert states == [(version, "AVAILABLE") for version in known]
    assert labels["newest"] == labels["second"] != labels["first"] == labels["label"]


@pytest.mark.parametrize(
    "choice", [{"name": "other"}, {"version": 7}, {"version_label": "canary"}], ids=["name", "version", "label"]
)
def test_what_the_server_does_not_have_is_not_found(choice, digits, address):
    with Client(address, **choice) as client:
        for ask in (client.status, lambda: client.predict(digits.image[:1])):
            with pytest.raises(NotFoundError) as caught:
                ask()
            assert str(next(iter(choice.values()))) in str(caught.value) and "\n" not in str(caught.value)


def test_request_that_the_server_refuses_is_one_line(address):
    with Client(address) as client, pytest.raises(InvalidRequestError) as caught:
        client.predict(np.zeros([2, 9, 9, 1]))
    assert "refused the request" in str(caught.value) and "\n" not in str(caught.value)


def test_model_without_the_outputs_is_refused(digits, tmp_path):
    import tensorflow as tf

    class Bare(tf.Module):
        @tf.function(input_signature=[tf.TensorSpec([None, 8, 8, 1], tf.float32, "image")])
        def serving_default(self, image):
            return {"logits": tf.reshape(image, [-1, 64])}

    module = Bare()
    tf.saved_model.save(module, str(tmp_path / "1"), signatures={"serving_default": module.serving_default})
    with serving(tmp_path) as server:
        for address in (server.grpc, server.rest):
            with Client(address) as client:
                with pytest.raises(ServingError, match="no output label, only: logits"):
                    client.predict(digits.image[:1])
                with pytest.raises(InvalidRequestError, match="image_bytes"):
                    client.predict(b"file")


@pytest.mark.parametrize(
    ("address", "choice"),
    [
        ("localhost:8500", {}),
        ("ftp://localhost:8500", {}),
        ("grpc://localhost", {}),
        ("grpc://localhost:port", {}),
        ("grpc://localhost:1/a/b", {}),
        ("grpc://localhost:1", {"version": 1, "version_label": "stable"}),
        ("grpc://[::1:8500", {}),
        ("grpc://localhost:1/\udc80", {}),
        ("grpc://localhost:1", {"version": -1}),
        ("grpc://localhost:1", {"version": 2**63}),
        ("grpc://localhost:1", {"name": "\udc80"}),
        ("http://localhost:1", {"version_label": "\udc80"}),
        ("grpc://localhost:1", {"timeout": 0}),
        ("grpc://localhost:1", {"timeout": float("nan")}),
        ("http://localhost:1", {"timeout": float("inf")}),
        ("http://localhost:1", {"timeout": 1e12}),
        ("grpc://localhost:1", {"retries": -1}),
        ("grpc://localhost:1", {"batch_size": 0}),
    ],
)
def test_wrong_usage_is_told(address, choice):
    with pytest.raises(UsageError):
        Client(address, **choice)


def test_longest_timeout_and_last_version_can_be_sent(digits, address):
    with Client(address, timeout=1e6) as client:
        assert len(client.predict(digits.image[:1])) == 1
    with Client(address, version=2**63 - 1, timeout=1e6) as client, pytest.raises(NotFoundError):
        client.predict(digits.image[:1])


def test_closed_client_is_told(digits, address):
    with Client(address) as client:
        client.predict(digits.image[:1])
    for ask in (client.status, lambda: client.predict(digits.image[:1])):
        with pytest.raises(UsageError, match="closed"):
            ask()


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ({"outputs": {"class_name": [{"b64": 1}]}}, "base64 that cannot be read"),
        ({"outputs": {"class_name": [{"b64": "a"}]}}, "base64 that cannot be read"),
        ({"outputs": {name: [2**70] for name in _OUTPUTS}}, "outputs of other types"),
        ({"outputs": {name: [None] for name in _OUTPUTS}}, "outputs of other types"),
        ({"outputs": []}, "no outputs by name"),
        ([], "failed"),
    ],
)
def test_answer_that_cannot_be_read_is_told(answer, message, digits, monkeypatch):
    monkeypatch.setattr(RESTTransport, "_ask", lambda self, *rest: self._read(200, json.dumps(answer).encode()))
    with Client("http://localhost:1") as client, pytest.raises(ServingError, match=message) as caught:
        client.predict(digits.image[:1])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("versions", [[{"state": "AVAILABLE"}], [{"version": "one", "state": "END"}], 3, ["1"]])
def test_status_that_cannot_be_read_is_told(versions, monkeypatch):
    monkeypatch.setattr(RESTTransport, "_ask", lambda *rest: {"model_version_status": versions})
    with Client("http://localhost:1") as client, pytest.raises(ServingError, match="no status that can be read"):
        client.status()


def test_nested_answer_is_told(digits, monkeypatch):
    monkeypatch.setattr(RESTTransport, "_ask", lambda self, *rest: self._read(200, b"[" * 100_000))
    with Client("http://localhost:1") as client, pytest.raises(ServingError, match="failed"):
        client.predict(digits.image[:1])


def test_package_says_which_extra_its_command_lacks():
    program = (
        "import runpy, sys\n"
        "sys.modules['grpc'] = None\n"
        "runpy.run_module('kerasdefense.serving', run_name='__main__', alter_sys=True)"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("error: ") and "pip install '.[serving]'" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("scheme", ["grpc", "http"])
def test_no_server_is_tried_again_within_the_deadline(scheme, digits, free_port):
    for retries, timeout, within in ((2, 5, (0.14, 1.5)), (50, 0.5, (0.1, 0.55))):
        started = time.monotonic()
        client = Client(f"{scheme}://localhost:{free_port}", retries=retries, timeout=timeout)
        with client, pytest.raises(UnavailableError, match="not available"):
            client.predict(digits.image[:1])
        assert within[0] < time.monotonic() - started < within[1]


@pytest.mark.parametrize("way", ["grpc", "rest"])
def test_server_that_is_unavailable_at_first_is_tried_again(way, digits):
    faults = dict.fromkeys((1, 2, 4), "unavailable")
    with serving(digits.folder, fault=faults.get) as server:
        with Client(getattr(server, way), version=1, batch_size=4) as client:
            predictions = client.predict(digits.image[:8])
        assert server.engine.requests == 5 and len(server.engine.answered) == 2
        with Client(getattr(server, way), retries=0) as client:
            server.engine.fault = lambda number: "unavailable"
            with pytest.raises(UnavailableError, match="shutting down"):
                client.predict(digits.image[:1])
        assert server.engine.requests == 6
    np.testing.assert_allclose(
        [each.logits for each in predictions], expected(digits, digits.image[:8])["logits"], rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("way", ["grpc", "rest"])
def test_other_errors_are_not_tried_again(way, digits):
    with serving(digits.folder, max_batch_size=3) as server:
        with Client(getattr(server, way)) as client, pytest.raises(InvalidRequestError, match="larger than maximum"):
            client.predict(digits.image[:4])
        assert server.engine.requests == 1


@pytest.mark.parametrize("way", ["grpc", "rest"])
def test_deadline_is_of_all_batches_together(way, digits):
    with serving(digits.folder, fault=lambda number: 0.2) as server:
        started = time.monotonic()
        with Client(getattr(server, way), batch_size=1, timeout=0.5) as client, pytest.raises(DeadlineError):
            client.predict(digits.image[:10])
        assert 0.45 < time.monotonic() - started < 0.7
        assert server.engine.requests <= 4


def test_answer_that_trickles_is_cut_at_the_deadline(digits):
    stop = threading.Event()

    class Slow(BaseHTTPRequestHandler):
        def do_POST(self):
            self.send_response(200)
            self.end_headers()
            for _ in range(4):
                self.wfile.write(b" ")
                self.wfile.flush()
                stop.wait(0.1)
            stop.wait(5)

        def log_message(self, *arguments):
            pass

    server = HTTPServer(("localhost", 0), Slow)
    thread = threading.Thread(target=server.handle_request)
    thread.start()
    started = time.monotonic()
    try:
        with Client(f"http://localhost:{server.server_port}", timeout=0.6) as client, pytest.raises(DeadlineError):
            client.predict(digits.image[:1])
        assert 0.5 < time.monotonic() - started < 0.8
    finally:
        stop.set()
        thread.join()
        server.server_close()


def test_deadline_is_of_connecting_and_answering_together(digits, monkeypatch):
    connect = connection.create_connection

    def slowly(*arguments, **settings):
        time.sleep(0.8)
        return connect(*arguments, **settings)

    monkeypatch.setattr(connection, "create_connection", slowly)
    with serving(digits.folder, fault=lambda number: 3.0) as server:
        started = time.monotonic()
        with Client(server.rest, timeout=1.2) as client, pytest.raises(DeadlineError):
            client.predict(digits.image[:1])
        assert 1.1 < time.monotonic() - started < 1.7


def test_answer_that_ends_as_the_deadline_passes_is_read_in_silence(monkeypatch):
    raised, cut = [], threading.Event()
    monkeypatch.setattr(threading, "excepthook", raised.append)

    class Released:
        @property
        def raw(self):
            return self

        def shutdown(self):
            cut.set()
            raise RuntimeError("Cannot shutdown as connection has already been released to the pool")

        @property
        def content(self):
            assert cut.wait(5)
            return b"whole"

    assert transport_rest._body(Released(), time.monotonic()) == b"whole"
    assert not raised


@pytest.mark.parametrize("way", ["grpc", "rest"])
def test_sixteen_threads_lose_nothing_and_ask_nothing_twice(way, digits):
    """Each request is refused or slow at random; each image is its own, and must be answered once and to its sender."""
    random, lock = np.random.default_rng(0), threading.Lock()

    def fault(number):
        with lock:
            draw = random.random()
        return "unavailable" if draw < 0.2 else 0.02 * (draw > 0.6)

    threads, calls, late = 16, 4, []
    image = digits.image[: threads * calls * 2]
    logits = expected(digits, image)["logits"]
    found = np.full_like(logits, np.nan)

    def work(thread):
        for call in range(calls):
            rows = slice((thread * calls + call) * 2, (thread * calls + call) * 2 + 2)
            started = time.monotonic()
            found[rows] = [each.logits for each in client.predict(image[rows])]
            late.append(time.monotonic() - started)

    with serving(digits.folder, fault=fault) as server:
        with Client(getattr(server, way), version=1, timeout=20, retries=20, batch_size=1) as client:
            workers = [threading.Thread(target=work, args=[number]) for number in range(threads)]
            for each in workers:
                each.start()
            for each in workers:
                each.join()
        np.testing.assert_allclose(found, logits, rtol=1e-5, atol=1e-5)
        assert sorted(server.engine.answered) == sorted(each.tobytes() for each in image)
        assert server.engine.requests > len(image)
        assert len(late) == threads * calls and max(late) < 20


@pytest.mark.parametrize("way", ["grpc", "rest"])
def test_sixteen_threads_keep_their_deadlines(way, digits):
    def fault(number):
        return "unavailable" if number % 3 else 1.5

    outcomes = []

    def work():
        started = time.monotonic()
        try:
            client.predict(digits.image[:1])
        except (DeadlineError, UnavailableError) as error:
            outcomes.append((type(error), time.monotonic() - started))

    with serving(digits.folder, fault=fault) as server:
        with Client(getattr(server, way), timeout=0.8, retries=20) as client:
            workers = [threading.Thread(target=work) for _ in range(16)]
            for each in workers:
                each.start()
            for each in workers:
                each.join()
        server.engine.fault = lambda number: None
    assert len(outcomes) == 16 and max(seconds for _, seconds in outcomes) < 1.2


def test_requests_that_the_server_merges_do_not_affect_each_other(digits):
    image = digits.image[:4].copy()
    image[2] = np.nan
    found = {}

    def work(row):
        found[row] = client.predict(image[row], on_invalid="return")[0]

    with serving(digits.folder, merge=4) as server, Client(server.grpc, version=1) as client:
        workers = [threading.Thread(target=work, args=[row]) for row in range(4)]
        for each in workers:
            each.start()
        for each in workers:
            each.join()
        assert server.engine.merged == [4]
    assert [found[row].valid for row in range(4)] == [True, True, False, True]
    rows = [0, 1, 3]
    np.testing.assert_allclose(
        [found[row].logits for row in rows], expected(digits, image[rows])["logits"], rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("way", ["grpc", "rest"])
def test_request_that_was_merged_with_a_wrong_one_is_tried_again(way, digits):
    def fault(number):
        if number > 2:
            server.engine.merges = False

    errors = []

    def ask_wrongly():
        try:
            client.predict(np.zeros([1, 9, 9, 1]))
        except InvalidRequestError as error:
            errors.append(str(error))

    with serving(digits.folder, merge=2, fault=fault) as server, Client(getattr(server, way), version=1) as client:
        other = threading.Thread(target=ask_wrongly)
        other.start()
        (prediction,) = client.predict(digits.image[0])
        other.join()
        assert server.engine.requests == 4
    assert prediction.label == digits.module.serving_default(digits.image[:1])["label"]
    assert len(errors) == 1 and "refused the request" in errors[0]


def test_wrong_request_is_merged_with_others_three_times_at_most():
    asked = []

    def refuse(seconds):
        asked.append(seconds)
        raise MergedError("merged")

    with pytest.raises(MergedError):
        attempted(refuse, Deadline(10), retries=20)
    assert len(asked) == 3


def test_large_requests_pass_and_a_limit_can_be_set(digits):
    image = np.repeat(digits.image[:1], 40_000, axis=0)  # 10 MB, above gRPC's 4 MB
    with serving(digits.folder, max_batch_size=100_000) as server:
        with Client(server.grpc, batch_size=40_000) as client:
            assert len(client.predict(image)) == 40_000
        client = Client(server.grpc, batch_size=40_000, max_message_bytes=1 << 20)
        with client, pytest.raises(ServingError, match="smaller batch_size"):
            client.predict(image)


def test_pauses_grow_and_differ():
    pauses = [[pause(attempt) for _ in range(20)] for attempt in range(8)]
    assert all(len(set(each)) > 1 for each in pauses)
    assert all(0.5 * min(5, 0.1 * 2**n) <= each <= min(5, 0.1 * 2**n) for n, of in enumerate(pauses) for each in of)


@pytest.mark.skipif(binary() is None, reason="tensorflow_model_server is not installed: a stub stood in for it")
def test_tensorflow_serving_itself_answers_alike(digits):
    with serving(digits.folder) as server:
        for address in (server.grpc, server.rest):
            with Client(address, version=1) as client:
                found = [each.logits for each in client.predict(digits.image[:5])]
            np.testing.assert_allclose(found, expected(digits, digits.image[:5])["logits"], rtol=1e-5)

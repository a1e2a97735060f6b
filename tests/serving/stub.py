"""Thin servers over an engine, and TensorFlow Serving's own instead where there is one.

gRPC is made of tensorflow-serving-api's own service definitions, REST of the standard library's server. Codes and
messages were written after TensorFlow Serving's sources; the server itself was not at hand to compare them with.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import json
import os
import re
import shutil
import socket
import subprocess
import threading
import time
from concurrent import futures
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple, Optional

import grpc
import numpy as np
import requests
import tensorflow as tf
from google.protobuf import json_format
from tensorflow_serving.apis import (
    get_model_status_pb2,
    model_service_pb2_grpc,
    predict_pb2,
    prediction_service_pb2_grpc,
)

from .engine import Engine, Refused

HTTP = {"INVALID_ARGUMENT": 400, "FAILED_PRECONDITION": 400, "NOT_FOUND": 404, "RESOURCE_EXHAUSTED": 429}
HTTP |= {"UNAVAILABLE": 503, "DEADLINE_EXCEEDED": 504, "INTERNAL": 500}
PATH = re.compile(r"/v1/models/([^/:]+)(?:/versions/(\d+)|/labels/([^/:]+))?(:predict)?")


def binary():
    """Return the path of tensorflow_model_server, None where there is none."""
    return os.environ.get("TF_SERVING_BIN") or shutil.which("tensorflow_model_server")


class Server(NamedTuple):
    """Where a server listens, what it is, and the engine of a stub."""

    grpc: str
    rest: str
    kind: str
    engine: Optional[Engine]


@contextlib.contextmanager
def serving(folder, *, name="classifier", labels=None, **behaviour):
    """Serve `folder/<version>/` by TensorFlow Serving where it is installed, else, or with `behaviour`, by a stub."""
    if binary() and not behaviour and not labels:
        with _real(folder, name) as server:
            yield server
        return
    versions = {int(path.name): path for path in folder.iterdir() if path.name.isdecimal()}
    engine = Engine({name: versions}, labels={name: labels or {}}, **behaviour)
    with grpc_stub(engine) as grpc_address, rest_stub(engine) as rest_address:
        yield Server(grpc_address, rest_address, "stub over the SavedModel", engine)


@contextlib.contextmanager
def bundled(folder, configuration):
    """Serve an exported model's folder by TensorFlow Serving, started as its docker-compose.yml starts it.

    Files that name the place of the folder in a container are copied into the folder `configuration`, with its own.
    """
    inside = f"/models/{folder.name}"
    for path in folder.glob("*.config"):
        (configuration / path.name).write_text(path.read_text().replace(inside, str(folder.resolve())))
    options = re.findall(r"- (--\S+)", (folder / "docker-compose.yml").read_text())
    with _started([each.replace(inside, str(configuration)) for each in options], folder.name) as server:
        yield server


@contextlib.contextmanager
def _real(folder, name):
    with _started([f"--model_name={name}", f"--model_base_path={folder.resolve()}"], name) as server:
        yield server


@contextlib.contextmanager
def _started(options, name):
    ports = []
    for _ in range(2):
        with socket.socket() as free:
            free.bind(("localhost", 0))
            ports.append(free.getsockname()[1])
    command = [binary(), f"--port={ports[0]}", f"--rest_api_port={ports[1]}", *options]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    try:
        rest = f"http://localhost:{ports[1]}"
        _wait(f"{rest}/v1/models/{name}")
        yield Server(f"grpc://localhost:{ports[0]}", rest, binary(), None)
    finally:
        process.terminate()
        process.wait()


def _wait(address):
    end = time.monotonic() + 60
    while time.monotonic() < end:
        with contextlib.suppress(requests.ConnectionError):
            if "AVAILABLE" in requests.get(address, timeout=5).text:
                return
        time.sleep(0.1)
    raise TimeoutError(f"no model at {address}")


@contextlib.contextmanager
def grpc_stub(engine):
    pool = futures.ThreadPoolExecutor(32)
    server = grpc.server(pool, options=[("grpc.max_receive_message_length", -1), ("grpc.so_reuseport", 0)])
    prediction_service_pb2_grpc.add_PredictionServiceServicer_to_server(_Prediction(engine), server)
    model_service_pb2_grpc.add_ModelServiceServicer_to_server(_Model(engine), server)
    port = server.add_insecure_port("localhost:0")
    server.start()
    try:
        yield f"grpc://localhost:{port}"
    finally:
        server.stop(None).wait()
        pool.shutdown()


def _chosen(engine, spec):
    version = spec.version.value if spec.WhichOneof("version_choice") == "version" else None
    return engine.version(spec.name, version, spec.version_label or None)


class _Prediction(prediction_service_pb2_grpc.PredictionServiceServicer):
    def __init__(self, engine):
        self._engine = engine

    def Predict(self, request, context):  # noqa: N802 - gRPC's name
        spec = request.model_spec
        try:
            version = _chosen(self._engine, spec)
            inputs = {name: _array(name, each) for name, each in request.inputs.items()}
            signature = spec.signature_name or "serving_default"
            outputs = self._engine.predict(spec.name, version, signature, inputs)
        except Refused as refused:
            context.abort(getattr(grpc.StatusCode, refused.code), refused.message)
        answer = predict_pb2.PredictResponse()
        answer.model_spec.name, answer.model_spec.signature_name = spec.name, signature
        answer.model_spec.version.value = version
        for name, each in outputs.items():
            answer.outputs[name].CopyFrom(tf.make_tensor_proto(each))
        return answer


def _array(name, proto):
    try:
        return tf.make_ndarray(proto)
    except (TypeError, ValueError) as error:
        raise Refused("INVALID_ARGUMENT", f"tensor parsing error: {name}") from error


class _Model(model_service_pb2_grpc.ModelServiceServicer):
    def __init__(self, engine):
        self._engine = engine

    def GetModelStatus(self, request, context):  # noqa: N802 - gRPC's name
        try:
            return _status(self._engine, request.model_spec)
        except Refused as refused:
            context.abort(getattr(grpc.StatusCode, refused.code), refused.message)


def _status(engine, spec):
    chosen = _chosen(engine, spec)
    has_choice = spec.WhichOneof("version_choice") is not None
    answer = get_model_status_pb2.GetModelStatusResponse()
    for version in [chosen] if has_choice else sorted(engine.loaded[spec.name], reverse=True):
        answer.model_version_status.add(
            version=version, state=get_model_status_pb2.ModelVersionStatus.State.Value("AVAILABLE")
        )
    return answer


@contextlib.contextmanager
def rest_stub(engine):
    class Handler(_Handler):
        of = engine

    server = ThreadingHTTPServer(("localhost", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield f"http://localhost:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    of: Engine

    def log_message(self, *arguments):
        pass

    def do_GET(self):
        self._answer(lambda name, version, label, body: self._status(name, version, label))

    def do_POST(self):
        self._answer(self._predict)

    def _answer(self, work):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        try:
            found = PATH.fullmatch(self.path)
            if not found or bool(found[4]) != (self.command == "POST"):
                raise Refused("INVALID_ARGUMENT", f"Malformed request: {self.command} {self.path}")
            code, answer = 200, work(found[1], found[2] and int(found[2]), found[3], body)
        except Refused as refused:
            code, answer = HTTP[refused.code], {"error": refused.message}
        content = json.dumps(answer).encode()
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # of one who did not wait
            self.send_response(code)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

    def _status(self, name, version, label):
        request = get_model_status_pb2.GetModelStatusRequest()
        request.model_spec.name = name
        if version is not None:
            request.model_spec.version.value = version
        if label is not None:
            request.model_spec.version_label = label
        answer = _status(self.of, request.model_spec)
        return json_format.MessageToDict(answer, including_default_value_fields=True, preserving_proto_field_name=True)

    def _predict(self, name, version, label, body):
        version = self.of.version(name, version, label)
        asked = _parsed(body)
        signature = asked.get("signature_name", "serving_default")
        function = self.of.signature(name, version, signature, missing="INVALID_ARGUMENT")
        spec = function.structured_input_signature[1]
        in_rows = "instances" in asked
        if in_rows == ("inputs" in asked):
            raise Refused("INVALID_ARGUMENT", "Missing 'inputs' or 'instances' key")
        inputs = _from_rows(asked["instances"], spec) if in_rows else _from_columns(asked["inputs"], spec)
        outputs = {
            name: _to_json(name, each) for name, each in self.of.predict(name, version, signature, inputs).items()
        }
        if not in_rows:
            return {"outputs": outputs}
        return {"predictions": [dict(zip(outputs, row)) for row in zip(*outputs.values())]}


def _parsed(body):
    try:
        asked = json.loads(body)
    except ValueError as error:
        raise Refused("INVALID_ARGUMENT", f"JSON Parse error: {error}") from error
    if not isinstance(asked, dict):
        raise Refused("INVALID_ARGUMENT", "JSON Value: is not object")
    return asked


def _from_rows(rows, spec):
    if not isinstance(rows, list) or not rows:
        raise Refused("INVALID_ARGUMENT", "'instances' key must be a list with at least one element")
    named = [isinstance(row, dict) and set(row) != {"b64"} for row in rows]
    if not any(named):
        (argument,) = spec
        return {argument: _values(argument, rows, spec[argument])}
    if not all(named) or any(set(row) != set(rows[0]) for row in rows):
        raise Refused("INVALID_ARGUMENT", "Failed to process element: all instances must have the same keys")
    return {name: _values(name, [row[name] for row in rows], spec.get(name)) for name in rows[0]}


def _from_columns(columns, spec):
    if not isinstance(columns, dict) or set(columns) == {"b64"}:
        (argument,) = spec
        return {argument: _values(argument, columns, spec[argument])}
    return {name: _values(name, each, spec.get(name)) for name, each in columns.items()}


def _values(name, values, spec):
    if spec is None:
        raise Refused("INVALID_ARGUMENT", f"Failed to process element: {name} is not an input of the signature")
    try:
        if spec.dtype == tf.string:
            files = [_bytes(each) for each in values]
            rows = np.empty(len(files), object)
            rows[:] = files
            return rows
        rows = np.array(values)
        if rows.dtype.kind not in "fi":
            raise ValueError(f"JSON Value is not of expected type: {spec.dtype.name}")
        return rows.astype(spec.dtype.as_numpy_dtype)
    except (TypeError, ValueError, KeyError, binascii.Error) as error:
        raise Refused("INVALID_ARGUMENT", f"Failed to process {name}: {error}") from error


def _bytes(value):
    if isinstance(value, str):
        return value.encode()
    if not isinstance(value, dict) or set(value) != {"b64"}:
        raise ValueError("JSON Value is not of expected type: string")
    return base64.b64decode(value["b64"], validate=True)


def _to_json(name, values):
    return [each.decode() for each in values] if values.dtype == object else values.tolist()

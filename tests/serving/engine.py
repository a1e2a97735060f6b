"""What a stub server knows: loaded SavedModels, asked and refused as TensorFlow Serving does it.

Codes and messages follow its sources: a missing model or version is NOT_FOUND, a missing label INVALID_ARGUMENT, a
missing signature FAILED_PRECONDITION over gRPC (over REST, where the signature is looked up to read the JSON,
INVALID_ARGUMENT), inputs of another name or type INVALID_ARGUMENT. Shapes are left to the graph, as there. Where
requests are merged and their shapes differ, all of the batch get FAILED_PRECONDITION.
"""

from __future__ import annotations

import threading
import time

import numpy as np
import tensorflow as tf


class Refused(Exception):  # noqa: N818 - an answer, as far as the server is concerned
    """What a server says instead of outputs: a status code of gRPC by name, and a message."""

    def __init__(self, code, message):
        super().__init__(message)
        self.code, self.message = code, message


class Engine:
    """Models by name and version, and how their server behaves.

    Args:
        versions: `{name: {version: folder}}`.
        labels: `{name: {label: version}}`.
        fault: `fault(number of the request) -> None | "unavailable" | seconds to wait`.
        merge: requests that are run as one batch; 1 = each alone.
        max_batch_size: rows of a request at most.
    """

    def __init__(self, versions, *, labels=None, fault=lambda number: None, merge=1, max_batch_size=1000):
        self.loaded = {
            name: {version: tf.saved_model.load(str(folder)) for version, folder in found.items()}
            for name, found in versions.items()
        }
        self.labels = labels or {}
        self.fault = fault
        self.max_batch_size = max_batch_size
        self.requests = 0
        self.answered = []
        self.merged = []
        self._lock = threading.Lock()
        self.merges = merge > 1
        self._merger = _Merger(self._run, merge)

    def version(self, name, version=None, label=None):
        found = self.loaded.get(name)
        if found is None:
            raise Refused("NOT_FOUND", f"Servable not found for request: Latest({name})")
        if label is not None:
            if label not in self.labels.get(name, {}):
                raise Refused("INVALID_ARGUMENT", f"Unrecognized servable version label: {label}")
            version = self.labels[name][label]
        if version is None:
            return max(found)
        if version not in found:
            raise Refused("NOT_FOUND", f"Servable not found for request: Specific({name}, {version})")
        return version

    def signature(self, name, version, signature, *, missing="FAILED_PRECONDITION"):
        signatures = self.loaded[name][version].signatures
        if signature not in signatures:
            raise Refused(missing, f'Serving signature key "{signature}" not found.')
        return signatures[signature]

    def predict(self, name, version, signature, inputs):
        """Return the outputs of a signature, after what `fault` says of this request."""
        with self._lock:
            self.requests += 1
            number = self.requests
        fault = self.fault(number)
        if fault == "unavailable":
            raise Refused("UNAVAILABLE", "the server is shutting down")
        if fault:
            time.sleep(fault)
        function = self.signature(name, version, signature)
        spec = function.structured_input_signature[1]
        if set(inputs) != set(spec):
            found, wanted = ",".join(sorted(inputs)), ",".join(sorted(spec))
            if len(inputs) == len(spec):
                text = f"input tensor alias not found in signature: {found}. Inputs expected to be in {{{wanted}}}."
            else:
                text = (
                    f"input size does not match signature: {len(inputs)}!={len(spec)} len({{{found}}}) ({{{wanted}}})."
                )
            raise Refused("INVALID_ARGUMENT", text)
        (argument, rows), *_ = inputs.items()
        if rows.ndim and len(rows) > self.max_batch_size:
            text = f"Task size {len(rows)} is larger than maximum input batch size {self.max_batch_size}"
            raise Refused("INVALID_ARGUMENT", text)
        key = name, version, signature
        outputs = self._merger.run(key, argument, rows) if self.merges else self._run(key, argument, rows)
        with self._lock:
            self.answered.append(rows.tobytes() if rows.dtype != object else b"".join(rows))
        return outputs

    def _run(self, key, argument, rows):
        name, version, signature = key
        function = self.signature(name, version, signature)
        spec = function.structured_input_signature[1][argument]
        dtype = tf.string if rows.dtype == object else tf.as_dtype(rows.dtype)
        if dtype != spec.dtype:
            text = f"Expects arg[0] to be {spec.dtype.name} but {dtype.name} is provided"
            raise Refused("INVALID_ARGUMENT", text)
        try:
            outputs = function(**{argument: tf.constant(rows, spec.dtype)})
        except tf.errors.OpError as error:
            code = {3: "INVALID_ARGUMENT", 8: "RESOURCE_EXHAUSTED"}.get(error.error_code, "INTERNAL")
            raise Refused(code, error.message) from error
        self.merged.append(len(rows))
        return {name: each.numpy() for name, each in outputs.items()}


class _Merger:
    """Runs requests of several threads as one batch: as many as it waits for, or those of a short while."""

    def __init__(self, run, size):
        self._run, self._size = run, size
        self._changed = threading.Condition()
        self._waiting = []

    def run(self, key, argument, rows):
        mine = {"key": key, "argument": argument, "rows": rows, "outputs": None}
        with self._changed:
            self._waiting.append(mine)
            if len(self._waiting) == self._size:
                self._finish()
            self._changed.wait_for(lambda: mine["outputs"] is not None, timeout=2)
            if mine["outputs"] is None:
                self._finish()
        if isinstance(mine["outputs"], Refused):
            raise mine["outputs"]
        return mine["outputs"]

    def _finish(self):
        batch, self._waiting = self._waiting, []
        try:
            outputs = self._together(batch)
        except Refused as refused:
            outputs = [refused] * len(batch)
        for one, found in zip(batch, outputs):
            one["outputs"] = found
        self._changed.notify_all()

    def _together(self, batch):
        if len({(one["key"], one["rows"].shape[1:], one["rows"].dtype) for one in batch}) > 1:
            raise Refused("FAILED_PRECONDITION", "Tensors with name 'x' from different tasks have different shapes")
        outputs = self._run(batch[0]["key"], batch[0]["argument"], np.concatenate([one["rows"] for one in batch]))
        ends = np.cumsum([len(one["rows"]) for one in batch])[:-1]
        split = {name: np.split(each, ends) for name, each in outputs.items()}
        return [{name: parts[number] for name, parts in split.items()} for number in range(len(batch))]

"""TF Serving's REST interface."""

from __future__ import annotations

import base64
import contextlib
import json
import queue
import threading
import time
import urllib.parse
from collections.abc import Iterator
from typing import Any, Optional

import numpy as np
import requests
import urllib3

from kerasdefense.serving.errors import DeadlineError, ServingError, UnavailableError
from kerasdefense.serving.transport import ModelVersion, Outputs, Target, checked, one_line, refusal

_CODES = {
    400: "INVALID_ARGUMENT",
    404: "NOT_FOUND",
    413: "RESOURCE_EXHAUSTED",
    429: "RESOURCE_EXHAUSTED",
    503: "UNAVAILABLE",
    504: "DEADLINE_EXCEEDED",
}
"""What TF Serving's HTTP codes stand for; 400 is FAILED_PRECONDITION too."""


class RESTTransport:
    """Connections to one model, as many as there are threads that ask at a time.

    Values travel as decimals that give the same float32 back; NaN and infinite ones as the words that TF Serving reads
    and writes, which strict JSON does not know. Files travel in base64.
    """

    def __init__(self, target: Target) -> None:
        self._target = target
        base = f"{target.scheme}://{target.server}/v1/models/{urllib.parse.quote(target.name, safe='')}"
        if target.version is not None:
            base += f"/versions/{target.version}"
        if target.label is not None:
            base += f"/labels/{urllib.parse.quote(target.label, safe='')}"
        self._address = base
        self._idle: queue.LifoQueue[requests.Session] = queue.LifoQueue()

    def predict(self, signature: str, argument: str, rows: np.ndarray, timeout: float) -> Outputs:
        """Return the outputs of a signature, as `Transport` says."""
        is_files = rows.dtype == object
        values = [{"b64": base64.b64encode(each).decode()} for each in rows] if is_files else rows.tolist()
        body = json.dumps({"signature_name": signature, "inputs": {argument: values}}).encode()
        outputs = self._ask(f"{self._address}:predict", body, timeout).get("outputs")
        if not isinstance(outputs, dict):
            raise ServingError(f"{self._target} gave no outputs by name")
        try:
            decoded = {name: _decoded(each) for name, each in outputs.items()}
        except (TypeError, ValueError) as error:
            raise ServingError(f"{self._target} gave base64 that cannot be read: {one_line(str(error))}") from error
        return checked(decoded, len(rows), self._target)

    def status(self, timeout: float) -> list[ModelVersion]:
        """Return the versions that the server knows."""
        versions = self._ask(self._address, None, timeout).get("model_version_status", [])
        try:
            return [
                ModelVersion(int(each["version"]), each["state"], each.get("status", {}).get("error_message", ""))
                for each in versions
            ]
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ServingError(f"{self._target} gave no status that can be read: {versions!r:.200}") from error

    def close(self) -> None:
        """Close the connections that no call is using."""
        with contextlib.suppress(queue.Empty):
            while True:
                self._idle.get_nowait().close()

    @contextlib.contextmanager
    def _session(self) -> Iterator[requests.Session]:
        """Give a session that no other thread has at the time; requests does not promise that they may share one."""
        try:
            session = self._idle.get_nowait()
        except queue.Empty:
            session = requests.Session()
        try:
            yield session
        except BaseException:  # its connection may hold the rest of an answer
            session.close()
            raise
        self._idle.put(session)

    def _ask(self, address: str, body: Optional[bytes], timeout: float) -> dict[str, Any]:
        """Return what the server answers to a GET, or to a POST of a body."""
        deadline = time.monotonic() + timeout
        limit: Any = urllib3.Timeout(total=timeout)  # a number would be for connecting, and once more for the answer
        try:
            with self._session() as session:
                method, headers = ("GET", {}) if body is None else ("POST", {"Content-Type": "application/json"})
                with session.request(
                    method, address, data=body, headers=headers, timeout=limit, stream=True, allow_redirects=False
                ) as answer:
                    content = _body(answer, deadline)
        except requests.RequestException as error:
            raise self._typed(error, is_late=time.monotonic() >= deadline) from error
        if time.monotonic() >= deadline:
            raise self._late()
        return self._read(answer.status_code, content)

    def _late(self) -> DeadlineError:
        return DeadlineError(f"{self._target} did not answer in time")

    def _typed(self, error: requests.RequestException, *, is_late: bool) -> ServingError:
        """Return the error for a connection that could not be made, which can be tried again, or that broke."""
        reason = getattr(error.args[0] if error.args else None, "reason", None)
        said = one_line(str(reason or error))
        if is_late or isinstance(error, requests.Timeout):
            return self._late()
        if isinstance(reason, urllib3.exceptions.NewConnectionError):
            return UnavailableError(f"{self._target} is not available: {said.rpartition(': ')[2]}")
        return ServingError(f"{self._target} broke the connection: {said}")

    def _read(self, code: int, content: bytes) -> dict[str, Any]:
        try:
            answer = json.loads(content)
        except (ValueError, RecursionError):
            answer = None
        if code == 200 and isinstance(answer, dict) and "error" not in answer:
            return answer
        said = answer.get("error") if isinstance(answer, dict) else content[:1000].decode("utf-8", "replace")
        raise refusal(_CODES.get(code, f"HTTP {code}"), str(said), self._target)


def _body(answer: requests.Response, deadline: float) -> bytes:
    """Return an answer's body, of what came before the deadline; requests itself only limits the time between bytes."""

    def cut() -> None:
        with contextlib.suppress(RuntimeError):  # it has been read to its end just now
            answer.raw.shutdown()

    watch = threading.Timer(max(0.0, deadline - time.monotonic()), cut)
    watch.start()
    try:
        return answer.content
    finally:
        watch.cancel()
        watch.join()


def _decoded(values: Any) -> Any:
    """Return an output with its base64 values as bytes."""
    if not isinstance(values, list):
        return values
    return [base64.b64decode(each["b64"]) if isinstance(each, dict) and "b64" in each else each for each in values]

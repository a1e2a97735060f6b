"""The client: images in, typed predictions out."""

from __future__ import annotations

import dataclasses
from types import TracebackType
from typing import Optional

import numpy as np

from kerasdefense.serving.errors import InvalidImageError
from kerasdefense.serving.images import Images, Request, to_request
from kerasdefense.serving.retries import Deadline, attempted
from kerasdefense.serving.transport import ModelVersion, Outputs, Transport, parse
from kerasdefense.serving.transport_grpc import GRPCTransport
from kerasdefense.serving.transport_rest import RESTTransport
from kerasdefense.types import UsageError

_RAISE, _RETURN = "raise", "return"
LONGEST_TIMEOUT = 1e6
"""Seconds; the waits of sockets are 2^31 ms at most."""


@dataclasses.dataclass(frozen=True, eq=False)
class Prediction:
    """What a model says of one image.

    Attributes:
        label: class of the highest logit; -1 where the image is not valid.
        class_name: its name; "" where the image is not valid.
        probabilities: float32 [classes].
        logits: float32 [classes].
        anomaly_score: higher = more unknown.
        accepted: whether the model answers for it: it is valid, and the score is not above the model's threshold.
        valid: whether the model could judge it at all.
    """

    label: int
    class_name: str
    probabilities: np.ndarray
    logits: np.ndarray
    anomaly_score: float
    accepted: bool
    valid: bool


class Client:
    """A model that TF Serving serves; threads may share one client.

    Close it after use, or use it in a `with` statement.

    Args:
        address: `grpc://host:port` or `http://host:port`, each perhaps with `/model`.
        name: the model's name; None = that of the address, else `classifier`.
        version: number of a version; None = the server's choice, the newest as a rule.
        version_label: label of a version, instead of a number.
        timeout: seconds that a call may take in all, with its batches, attempts and pauses; at most a million.
        retries: attempts after the first where the server is not available (UNAVAILABLE, HTTP 503, connection refused),
            or, twice at most, has merged the request with one of another shape; nothing else is tried again.
        batch_size: images that are sent at once.
        max_message_bytes: largest request and answer of gRPC; -1 = any size.

    Raises:
        UsageError: another form of address, or an illegal setting.
    """

    def __init__(
        self,
        address: str,
        *,
        name: Optional[str] = None,
        version: Optional[int] = None,
        version_label: Optional[str] = None,
        timeout: float = 30.0,
        retries: int = 5,
        batch_size: int = 32,
        max_message_bytes: int = -1,
    ) -> None:
        if not 0 < timeout <= LONGEST_TIMEOUT or retries < 0 or batch_size < 1:
            legal = f"above 0 and at most {LONGEST_TIMEOUT:g}, retries at least 0 and batch_size at least 1"
            raise UsageError(f"timeout must be {legal}, not {timeout}, {retries} and {batch_size}")
        self.target = parse(address, name=name, version=version, label=version_label)
        self.timeout = timeout
        self.retries = retries
        self.batch_size = batch_size
        self._transport: Transport = (
            GRPCTransport(self.target, max_message_bytes=max_message_bytes)
            if self.target.scheme == "grpc"
            else RESTTransport(self.target)
        )
        self._is_closed = False

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self,
        kind: Optional[type[BaseException]],
        error: Optional[BaseException],
        traceback: Optional[TracebackType],
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let go of connections; the client asks nothing any more."""
        self._is_closed = True
        self._transport.close()

    def status(self) -> list[ModelVersion]:
        """Return the versions of the model that the server knows, or the chosen one.

        Raises:
            UsageError: the client has been closed.
            ServingError: as `predict` does.
        """
        self._check_open()
        return attempted(self._transport.status, Deadline(self.timeout), self.retries)

    def predict(self, images: Images, *, on_invalid: str = _RAISE) -> list[Prediction]:
        """Return a prediction for each image, in their order.

        Args:
            images: float arrays [h, w, c] or [n, h, w, c] in [0, 1] of the model's own size; uint8 arrays of any size,
                which are sent as PNG files without loss; paths or contents of image files; or a list of one of these
                kinds, arrays [h, w, c] then. What is not of the model's size is resized there, if it is no float array.
            on_invalid: "raise", or "return" to get predictions that say `valid=False`.

        Raises:
            InvalidImageError: images that the model could not judge, by their numbers.
            InputError: images of no kind above or of several, or a file that cannot be read.
            InvalidRequestError: the model takes no such images.
            NotFoundError: no such model, version or label.
            UnavailableError: no server took the request.
            DeadlineError: no answer in time.
            ServingError: whatever else a server does wrong.
            UsageError: another `on_invalid`, or the client has been closed.
        """
        if on_invalid not in (_RAISE, _RETURN):
            raise UsageError(f"on_invalid is {_RAISE!r} or {_RETURN!r}, not {on_invalid!r}")
        self._check_open()
        request = to_request(images)
        if not len(request.rows):
            return []
        outputs = self._outputs(request)
        bad = np.flatnonzero(~outputs["valid"])
        if bad.size and on_invalid == _RAISE:
            raise InvalidImageError(bad.tolist(), [request.names[row] for row in bad])
        return [_prediction(outputs, row) for row in range(len(request.rows))]

    def _check_open(self) -> None:
        if self._is_closed:
            raise UsageError("the client has been closed: make another one")

    def _outputs(self, request: Request) -> Outputs:
        """Return the outputs for all rows of a request, batch by batch within one deadline."""
        deadline, parts = Deadline(self.timeout), []
        for first in range(0, len(request.rows), self.batch_size):
            rows = request.rows[first : first + self.batch_size]
            parts.append(self._batch(request, rows, deadline))
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def _batch(self, request: Request, rows: np.ndarray, deadline: Deadline) -> Outputs:
        def ask(seconds: float) -> Outputs:
            return self._transport.predict(request.signature, request.argument, rows, seconds)

        return attempted(ask, deadline, self.retries)


def _prediction(outputs: Outputs, row: int) -> Prediction:
    return Prediction(
        label=int(outputs["label"][row]),
        class_name=outputs["class_name"][row],
        probabilities=outputs["probabilities"][row],
        logits=outputs["logits"][row],
        anomaly_score=float(outputs["anomaly_score"][row]),
        accepted=bool(outputs["accepted"][row]),
        valid=bool(outputs["valid"][row]),
    )

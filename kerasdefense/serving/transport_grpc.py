"""TF Serving's gRPC interface."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import grpc
import numpy as np
import tensorflow as tf
from tensorflow_serving.apis import (
    get_model_status_pb2,
    model_pb2,
    model_service_pb2_grpc,
    predict_pb2,
    prediction_service_pb2_grpc,
)

from kerasdefense.serving.errors import InvalidRequestError, ServingError
from kerasdefense.serving.transport import ModelVersion, Outputs, Target, checked, one_line, refusal

_RECONNECT = (("grpc.initial_reconnect_backoff_ms", 100), ("grpc.max_reconnect_backoff_ms", 2000))
"""A server that comes back is found within the pauses between attempts; by default a channel waits up to 2 minutes."""


class GRPCTransport:
    """A channel to one model, for any number of threads.

    Args:
        target: the model.
        max_message_bytes: largest request and answer; -1 = any size.
    """

    def __init__(self, target: Target, *, max_message_bytes: int) -> None:
        self._target = target
        sizes = [(f"grpc.max_{way}_message_length", max_message_bytes) for way in ("send", "receive")]
        self._channel = grpc.insecure_channel(target.server, options=(*sizes, *_RECONNECT))
        self._predict = prediction_service_pb2_grpc.PredictionServiceStub(self._channel).Predict
        self._status = model_service_pb2_grpc.ModelServiceStub(self._channel).GetModelStatus

    def predict(self, signature: str, argument: str, rows: np.ndarray, timeout: float) -> Outputs:
        """Return the outputs of a signature, as `Transport` says."""
        request = predict_pb2.PredictRequest(model_spec=self._spec(signature))
        try:
            request.inputs[argument].CopyFrom(tf.make_tensor_proto(rows))
        except ValueError as error:  # above 2 GB
            raise InvalidRequestError(f"{self._target} cannot be sent so much: {one_line(str(error))}") from error
        answer = self._asked(self._predict, request, timeout)
        try:
            outputs = {name: tf.make_ndarray(each) for name, each in answer.outputs.items()}
        except (TypeError, ValueError) as error:
            raise ServingError(f"{self._target} gave outputs that cannot be read: {one_line(str(error))}") from error
        return checked(outputs, len(rows), self._target)

    def status(self, timeout: float) -> list[ModelVersion]:
        """Return the versions that the server knows."""
        request = get_model_status_pb2.GetModelStatusRequest(model_spec=self._spec(""))
        answer = self._asked(self._status, request, timeout)
        names = {number: name for name, number in get_model_status_pb2.ModelVersionStatus.State.items()}
        return [
            ModelVersion(each.version, names.get(each.state, str(each.state)), each.status.error_message)
            for each in answer.model_version_status
        ]

    def close(self) -> None:
        """Close the channel."""
        self._channel.close()

    def _spec(self, signature: str) -> model_pb2.ModelSpec:
        spec = model_pb2.ModelSpec(name=self._target.name, signature_name=signature)
        if self._target.version is not None:
            spec.version.value = self._target.version
        if self._target.label is not None:
            spec.version_label = self._target.label
        return spec

    def _asked(self, call: Callable[..., Any], request: Any, timeout: float) -> Any:
        """Return what the server answers to a request."""
        try:
            return call(request, timeout=timeout)
        except grpc.RpcError as error:
            raise refusal(error.code().name, error.details() or "", self._target) from error
        except ValueError as error:  # another thread has closed the channel
            raise ServingError(f"{self._target} cannot be asked: {one_line(str(error))}") from error

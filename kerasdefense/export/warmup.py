"""Requests that TF Serving replays when it loads a version, so that no client waits for the first answers."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
from PIL import Image

from kerasdefense.types import InputError

WARM_UP = "assets.extra/tf_serving_warmup_requests"
BATCHES = (1, 2)
"""Images of each request to a signature."""


def write_warm_up(version: Path, name: str) -> bool:
    """Write requests to every signature of a SavedModel where TF Serving looks for them, and answer each once.

    The records are protos of tensorflow-serving-api, which the extra `serving` installs. Without it nothing is
    written, and a line on standard error says so: TF Serving loads the version all the same, and its first answers take
    longer.

    Args:
        version: folder of the SavedModel.
        name: what the server calls the model.

    Returns:
        Whether they were written.

    Raises:
        InputError: the SavedModel does not answer a request, or calls an image of it invalid.
    """
    try:
        from tensorflow_serving.apis import predict_pb2, prediction_log_pb2
    except ImportError:
        print(
            "the version has no warm-up requests, so its first answers take longer: install tensorflow-serving-api "
            "(the extra serving) and export again to have them",
            file=sys.stderr,
        )
        return False
    path = version / WARM_UP
    path.parent.mkdir()
    signatures = tf.saved_model.load(str(version)).signatures
    with tf.io.TFRecordWriter(str(path)) as writer:
        for signature, inputs in _requests(signatures):
            request = predict_pb2.PredictRequest()
            request.model_spec.name, request.model_spec.signature_name = name, signature
            for key, value in inputs.items():
                request.inputs[key].CopyFrom(tf.make_tensor_proto(value))
            log = prediction_log_pb2.PredictLog(request=request)
            writer.write(prediction_log_pb2.PredictionLog(predict_log=log).SerializeToString(deterministic=True))
    _replay(path, signatures, prediction_log_pb2.PredictionLog)
    return True


def _requests(signatures: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, np.ndarray]]]:
    """Yield requests as the name of a signature and its inputs, a few to each."""
    shape = signatures["serving_default"].structured_input_signature[1]["image"].shape[1:]
    for signature in sorted(signatures):
        for batch in BATCHES:
            images = _images(batch, shape)
            files = np.array([_file(each, kind) for each, kind in zip(images, ("PNG", "JPEG") * batch)], object)
            inputs = {
                "image": images / np.float32(255),
                "image_bytes": files,
                "examples": np.array([_example(each) for each in files], object),
                "seed": np.arange(2 * batch, dtype=np.int32).reshape(batch, 2),
            }
            takes = signatures[signature].structured_input_signature[1]
            yield signature, {key: inputs[key] for key in takes}


def _images(batch: int, shape: Sequence[int]) -> np.ndarray:
    """Return smooth images uint8 [batch, height, width, channels], coarse noise made larger, from a fixed seed."""
    coarse = tf.random.stateless_uniform([batch, 4, 4, shape[2]], [0, batch])
    smooth = tf.image.resize(coarse, shape[:2], "bicubic")
    return np.asarray(tf.cast(tf.clip_by_value(smooth, 0, 1) * 255, tf.uint8))


def _file(image: np.ndarray, kind: str) -> bytes:
    file = io.BytesIO()
    picture = Image.fromarray(np.squeeze(image, axis=2) if image.shape[2] == 1 else image)
    (picture.convert("RGB") if kind == "JPEG" else picture).save(file, kind)
    return file.getvalue()


def _example(file: bytes) -> bytes:
    feature = {"image": tf.train.Feature(bytes_list=tf.train.BytesList(value=[file]))}
    return tf.train.Example(features=tf.train.Features(feature=feature)).SerializeToString(deterministic=True)


def _replay(path: Path, signatures: Mapping[str, Any], log_type: Any) -> None:
    """Answer every request in a file of them; raise an InputError where that fails."""
    for record in tf.data.TFRecordDataset(str(path)).as_numpy_iterator():
        request = log_type.FromString(record).predict_log.request
        name = request.model_spec.signature_name
        inputs = {key: tf.constant(tf.make_ndarray(value)) for key, value in request.inputs.items()}
        try:
            answers = signatures[name](**inputs)
        except tf.errors.OpError as error:
            raise InputError(f"the SavedModel does not answer a warm-up request to {name}: {error.message}") from error
        if not np.all(answers.get("valid", True)):  # which denoise and diagnose do not tell
            raise InputError(f"the SavedModel calls images of a warm-up request to {name} invalid; it was not kept")

"""Attack a served model from outside: what a client reaches, as what `evaluate` takes.

This joins serving and evaluation, which know nothing of each other. Such a model gives no gradient.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Optional

import numpy as np
import tensorflow as tf

from kerasdefense import config
from kerasdefense.attacks import has_foolbox
from kerasdefense.evaluation import Loaded
from kerasdefense.types import InputError, UsageError

if TYPE_CHECKING:
    from kerasdefense.serving import Client

SUITE = "blackbox"
_REFUSED = ("model", "preprocessor", "card", "open_set", "ood", "internals", "nonadaptive", "oblivious", "unseen")
"""Flags of --evaluate_ that need more of a model than its answers."""
_TIMEOUT, _RETRIES = 120.0, 20


def check(run: config.Run) -> None:
    """Raise a UsageError for flags that do not go with an endpoint, where one is named."""
    wanted = run.evaluate
    if not wanted.endpoint:
        return
    if run.mode != "evaluate":
        raise UsageError(f"--evaluate_endpoint goes with --mode=evaluate, not with --mode={run.mode}")
    refused = [f"--evaluate_{name}" for name in _REFUSED if getattr(wanted, name)]
    refused += ["--detector_name"] if run.detector.name else []
    if refused:
        raise UsageError(f"{refused[0]} needs the model itself, not an endpoint: leave it or --evaluate_endpoint out")
    if wanted.suite != SUITE:
        raise UsageError(
            f"an endpoint gives no gradient, which --evaluate_suite={wanted.suite} needs; use --evaluate_suite={SUITE}"
        )
    if not has_foolbox():
        raise UsageError("the hard-label attack on an endpoint needs foolbox; install it with: pip install '.[bench]'")


@contextlib.contextmanager
def opened(address: str) -> Iterator[Loaded]:
    """Give the model behind an address for as long as the block lasts.

    It is the newest version that the server has then, and no other one while it is attacked. What goes wrong in a
    request is raised at the end of the block as the client's own error, whatever TensorFlow made of it.

    Args:
        address: grpc://host:port or http://host:port, each perhaps with /model.

    Raises:
        UsageError: another form of address, or the extra `serving` is not installed.
        InputError: a server that has no such model, or does not answer as it should.
    """
    try:
        from kerasdefense.serving import Client
    except ImportError as error:
        raise UsageError(
            "an endpoint is asked by the extra serving; install it with: pip install '.[serving]'"
        ) from error
    with Client(address, timeout=_TIMEOUT) as client:
        available = [each.version for each in client.status() if each.state == "AVAILABLE"]
        if not available:
            raise InputError(f"{client.target} has no version that is available")
        name, version = client.target.name, max(available)
    with Client(address, version=version, timeout=_TIMEOUT, retries=_RETRIES) as client:
        asked = _Asked(client)
        facts = {"address": f"{client.target.scheme}://{client.target.server}", "name": name, "version": version}
        digest = hashlib.sha256(str(client.target).encode()).hexdigest()
        try:
            yield Loaded(
                {"exact": asked.exact},
                name=name,
                digest=digest,
                endpoint=lambda: {**facts, "images": asked.images},
            )
        except tf.errors.OpError as error:
            if asked.error is None:
                raise
            raise asked.error from error


class _Asked:
    """A client as a path, which counts the images that it sends."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self.images = 0
        self.error: Optional[Exception] = None

    def exact(self, image: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
        """Return the logits [batch, classes] that the server gives for images [batch, h, w, c]."""
        del seed
        logits: Any = tf.numpy_function(self._ask, [image], tf.float32)
        logits.set_shape([image.shape[0], None])
        return logits

    def _ask(self, image: np.ndarray) -> np.ndarray:
        # Rows that only fill a batch up repeat others.
        _, first, place = np.unique([each.tobytes() for each in image], return_index=True, return_inverse=True)
        self.images += len(first)
        try:
            predictions = self._client.predict(image[first])
        except InputError as error:
            self.error = error
            raise
        return np.stack([each.logits for each in predictions])[place]

"""What a detector is fitted to, checked once for all of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple, Optional

import numpy as np

from kerasdefense.types import InputError, UsageError


class Head(NamedTuple):
    """The last layer of a classifier.

    Attributes:
        kernel: [d, classes].
        bias: [classes], or None.
        is_linear: whether `logits = embedding @ kernel + bias`; otherwise they are the cosines of the embedding with
            the columns of the kernel times the lengths of these, with or without their signs.
    """

    kernel: np.ndarray
    bias: Optional[np.ndarray] = None
    is_linear: bool = True


@dataclasses.dataclass(frozen=True)
class Training:
    """Activations of training images, all finite and float64.

    Attributes:
        logits: [n, classes]; empty unless the detector needs them.
        embedding: [n, d]; empty unless the detector needs it.
        label: int [n], in [0, classes).
        classes: how many.
        kernel: [d, classes]; empty unless the detector needs the head.
        bias: [classes], zeros where the head has none; empty unless the detector needs the head.
    """

    logits: np.ndarray
    embedding: np.ndarray
    label: np.ndarray
    classes: int
    kernel: np.ndarray
    bias: np.ndarray


def check_training(
    activations: Mapping[str, np.ndarray],
    label: np.ndarray,
    head: Optional[Head],
    *,
    needs: tuple[str, ...],
    needs_head: bool,
) -> Training:
    """Return what a fit works on.

    The classes are counted by the logits, else by the head, else by the highest label.

    Args:
        activations: `logits` float [n, classes], `embedding` float [n, d]; those in `needs` are checked.
        label: int [n].
        head: of the classifier; checked if `needs_head`.
        needs: names of activations.
        needs_head: whether the head has to be there.

    Returns:
        Training.

    Raises:
        UsageError: something is missing.
        InputError: no images, other lengths or shapes, NaN or infinity, or a label outside [0, classes).
    """
    label = _label(label)
    found = {name: _activation(activations, name, len(label)) for name in needs}
    kernel, bias = _head(head, found) if needs_head else (np.zeros([0, 0]), np.zeros([0]))
    if "logits" in activations:
        classes = np.shape(activations["logits"])[-1]
    else:
        classes = int(label.max()) + 1 if head is None else np.shape(head.kernel)[-1]
    outside = label[(label < 0) | (label >= classes)]
    if outside.size:
        raise InputError(
            f"a detector is fitted to known classes, labels 0 to {classes - 1}, not {outside[0]}; leave others out"
        )
    empty = np.zeros([len(label), 0])
    return Training(found.get("logits", empty), found.get("embedding", empty), label, classes, kernel, bias)


def _label(label: np.ndarray) -> np.ndarray:
    label = np.asarray(label)
    if label.ndim != 1 or not np.issubdtype(label.dtype, np.integer):
        raise InputError(f"label must be integers [n], not {label.dtype} {list(label.shape)}")
    if not label.size:
        raise InputError("a detector needs training images to be fitted to; there are none")
    return label


def _activation(activations: Mapping[str, np.ndarray], name: str, count: int) -> np.ndarray:
    if name not in activations:
        raise UsageError(f"the detector is fitted to {name}, which is missing; there is: {', '.join(activations)}")
    array = _finite(activations[name], name)
    if array.ndim != 2 or len(array) != count:
        raise InputError(f"{name} must be [{count}, ...], a row for every label, not {list(array.shape)}")
    return array


def _head(head: Optional[Head], activations: Mapping[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    if head is None:
        raise UsageError("the detector needs the head, (kernel, bias) of the classifier's last layer; it is missing")
    kernel = _finite(head.kernel, "the kernel of the head")
    rows = activations["embedding"].shape[1]
    columns = activations["logits"].shape[1] if "logits" in activations else kernel.shape[-1]
    if kernel.shape != (rows, columns):
        raise InputError(f"the kernel of the head must be [{rows}, {columns}], not {list(kernel.shape)}")
    bias = np.zeros([columns]) if head.bias is None else _finite(head.bias, "the bias of the head")
    if bias.shape != (columns,):
        raise InputError(f"the bias of the head must be [{columns}], not {list(bias.shape)}")
    return kernel, bias


def _finite(array: np.ndarray, name: str) -> np.ndarray:
    array = np.asarray(array, np.float64)
    if not np.isfinite(array).all():
        raise InputError(f"{name} must be finite numbers, not NaN or infinity, for a detector to be fitted to")
    return array

"""Labelled images as people have them, arrays or datasets, as the batches that an evaluation reads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Optional

import numpy as np
import tensorflow as tf

from kerasdefense.evaluation.robustness import checked
from kerasdefense.evaluation.search import Chunk
from kerasdefense.types import InputError

_BATCH = 256
_NEEDED = "data must be a pair (image, label), or a dataset of such pairs or of dicts with image and label"


def as_batches(data: Any) -> tf.data.Dataset:
    """Return batches of dicts with image, label and index.

    Args:
        data: arrays `(image, label)`, or a dataset of such pairs or of dicts with `image`, `label` and perhaps `index`,
            batched or not; images [n, h, w, c], labels class numbers [n] or [n, 1].

    Raises:
        InputError: for other data.
    """
    if not isinstance(data, tf.data.Dataset):
        data = _of_arrays(data)
    spec = data.element_spec
    is_dict = isinstance(spec, Mapping) and {"image", "label"} <= set(spec)
    if not is_dict and (not isinstance(spec, tuple) or len(spec) != 2):
        raise InputError(_NEEDED)
    image, label = _image_and_label(data)
    if image.shape.rank == 3:
        data = data.batch(_BATCH)
        image, label = _image_and_label(data)
    if image.shape.rank not in (None, 4):
        raise InputError(f"images must be [n, height, width, channels], not {tuple(image.shape)}")
    if label.shape.rank is not None and label.shape[1:] not in ([], [1]):
        raise InputError(
            f"labels must be class numbers [n], not {tuple(label.shape)}; of one-hot labels take the argmax"
        )
    if is_dict and "index" in spec:
        return data.map(_with_flat_labels)
    # Batches of one size, so that numbers do not depend on that of the data.
    singles = data.map(_as_pair).unbatch().enumerate()
    return singles.map(_numbered).batch(_BATCH)


def image_shape_of(batches: tf.data.Dataset) -> Optional[tuple[Optional[int], ...]]:
    """Return (height, width, channels) of the images in batches, None where the dataset does not say."""
    shape = _image_and_label(batches)[0].shape
    return None if shape.rank is None else tuple(shape[1:])


def first_images(batches: tf.data.Dataset, examples: int) -> Chunk:
    """Return the first images of what `as_batches` returned, all of them for 0, checked."""
    dataset = batches.unbatch().take(examples or -1).batch(_BATCH)
    taken = [checked(batch) for batch in dataset.as_numpy_iterator()]
    if not taken:
        raise InputError("there are no images to evaluate on")
    return Chunk(*(np.concatenate([getattr(each, name) for each in taken]) for name in ("image", "label", "index")))


def _of_arrays(data: Any) -> tf.data.Dataset:
    if not isinstance(data, (tuple, list)) or len(data) != 2:
        raise InputError(_NEEDED)
    image, label = (np.asarray(each) for each in data)
    if image.ndim != 4 or not label.ndim or len(image) != len(label):
        raise InputError(
            f"images [n, height, width, channels] and labels [n] are needed, not {image.shape} and {label.shape}"
        )
    return tf.data.Dataset.from_tensor_slices((image, label)).batch(_BATCH)


def _image_and_label(data: tf.data.Dataset) -> tuple[tf.TensorSpec, tf.TensorSpec]:
    spec = data.element_spec
    return (spec["image"], spec["label"]) if isinstance(spec, Mapping) else spec


def _with_flat_labels(batch: Mapping[str, tf.Tensor]) -> dict[str, tf.Tensor]:
    return {**batch, "label": tf.reshape(batch["label"], [-1])}


def _as_pair(*batch: Any) -> tuple[tf.Tensor, tf.Tensor]:
    image, label = batch if len(batch) == 2 else (batch[0]["image"], batch[0]["label"])
    return image, tf.reshape(label, [-1])


def _numbered(index: tf.Tensor, pair: tuple[tf.Tensor, tf.Tensor]) -> dict[str, tf.Tensor]:
    return {"image": pair[0], "label": pair[1], "index": tf.cast(index, tf.int32)}

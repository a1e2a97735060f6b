"""The streams of images that training and evaluation read."""

from __future__ import annotations

import atexit
import dataclasses
import functools
import os
import shutil
import tempfile

import numpy as np
import tensorflow as tf

from kerasdefense.data.augment import Augmentation
from kerasdefense.data.records import ImageShape, Records, first_line
from kerasdefense.types import InputError, UsageError

_STREAM = 0xDA7A


@dataclasses.dataclass(frozen=True, eq=False)
class Split:
    """Some examples of a source split, streamed in its order.

    An element of a stream is {"image": float32 [batch, height, width, channels] in [0, 1], "label": int32
    [batch], "index": int32 [batch]}, the index being the example's place in its source split.

    Attributes:
        records: the source split.
        index: int64 [examples], ascending: the examples of the source split that belong to this one.
        label: int32 [highest index of the source split + 1], the label that a model sees (-1 = unknown class).
        image_shape: (height, width, channels).
        cache: where decoded images are kept: "memory", "disk" (until the process ends) or "none".
    """

    records: Records
    index: np.ndarray
    label: np.ndarray
    image_shape: ImageShape
    cache: str

    @property
    def examples(self) -> int:
        """Return the number of examples."""
        return len(self.index)

    def batches(self, batch_size: int) -> tf.data.Dataset:
        """Return one pass in order, without augmentation; the last batch may be smaller."""
        return self.grey_levels(batch_size).map(_to_float, tf.data.AUTOTUNE).prefetch(tf.data.AUTOTUNE)

    def grey_levels(self, batch_size: int) -> tf.data.Dataset:
        """Return the same pass with images as they are kept, uint8 in 0..255."""
        _check_batch_size(batch_size)
        return self._decoded.batch(batch_size)

    @functools.cached_property
    def _decoded(self) -> tf.data.Dataset:
        """Single uint8 examples in order, cached as asked."""
        kept = np.zeros(len(self.label), bool)
        kept[self.index] = True
        is_kept, label = tf.constant(kept), tf.constant(self.label, tf.int32)

        def decode(index: tf.Tensor, record: tf.Tensor) -> dict[str, tf.Tensor]:
            image = tf.ensure_shape(self.records.decode(record), self.image_shape)
            return {"image": image, "label": label[index], "index": tf.cast(index, tf.int32)}

        numbered = self.records.numbered().filter(lambda index, _: is_kept[index])
        decoded = numbered.map(decode, tf.data.AUTOTUNE, deterministic=True)
        if self.cache == "none":
            return decoded
        cached = decoded.cache(_temporary_file() if self.cache == "disk" else "")
        # Filled in one pass, so that a reader that stops early does not leave it half-written.
        try:
            cached.reduce(np.int64(0), lambda count, _: count + 1)
        except tf.errors.OpError as error:
            raise InputError(f"{self._broken()}: {first_line(error)}") from error
        return cached

    def _broken(self) -> str:
        """Return the name of the first image that cannot be decoded."""
        for index, record in self.records.numbered():
            try:
                self.records.decode(record)
            except tf.errors.OpError:
                return self.records.name(int(index))
        return "images cannot be read or cached"


@dataclasses.dataclass(frozen=True, eq=False)
class TrainSplit(Split):
    """The training examples, which can also be shuffled and augmented.

    Attributes:
        augmentation: what is done to each image.
        shuffle_buffer: examples held to shuffle.
    """

    augmentation: Augmentation
    shuffle_buffer: int

    def steps_per_epoch(self, batch_size: int) -> int:
        """Return the number of full batches of one epoch.

        Raises:
            UsageError: not one batch can be filled.
        """
        _check_batch_size(batch_size)
        if batch_size > self.examples:
            raise UsageError(f"--train_batch_size={batch_size} exceeds the {self.examples} training images")
        return self.examples // batch_size

    def epochs(
        self, batch_size: int, *, seed: int, epochs: int, first_epoch: int = 0, steps_per_epoch: int = 0
    ) -> tf.data.Dataset:
        """Return full, shuffled and augmented batches of the epochs `first_epoch` .. `epochs - 1`.

        Order and augmentation of a pass over the examples are functions of `seed` and its number alone (the
        augmentation of an example, of its index as well): a stream that starts later is the rest of one that started
        earlier.

        Args:
            batch_size: examples per batch; what does not fill the last batch of a pass is left out.
            seed: the run's seed.
            epochs: number of the epoch to stop before.
            first_epoch: number of the epoch to start with.
            steps_per_epoch: batches of an epoch; 0 = one pass. An epoch may end, and the next begin, within a pass.

        Raises:
            UsageError: not one batch can be filled.
        """
        steps_per_pass = self.steps_per_epoch(batch_size)
        steps_per_epoch = steps_per_epoch or steps_per_pass
        first, end = first_epoch * steps_per_epoch, max(first_epoch, epochs) * steps_per_epoch
        first_pass, skipped = divmod(first, steps_per_pass)

        decoded, buffer = self._decoded, min(self.shuffle_buffer, self.examples)

        def one_pass(number: tf.Tensor) -> tf.data.Dataset:
            # Only for this traced function: else the order would depend on the global seed too.
            tf.random.set_seed(1)
            key = tf.random.experimental.stateless_fold_in(tf.constant([seed, _STREAM], tf.int64), number)
            order = tf.random.stateless_uniform([], key, None, None, tf.int64)
            draw = self.augmentation.draw(len(self.label), key + 1)

            def augment(batch: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
                image = self.augmentation(batch["image"], tf.gather(draw, batch["index"]))
                return _to_float({**batch, "image": image})

            shuffled = decoded.shuffle(buffer, seed=order, reshuffle_each_iteration=False)
            rest = shuffled.batch(batch_size, drop_remainder=True).skip(
                skipped * tf.cast(number == first_pass, tf.int64)
            )
            return rest.map(augment, tf.data.AUTOTUNE, deterministic=True)

        stream = tf.data.Dataset.range(first_pass, -(-end // steps_per_pass)).flat_map(one_pass).take(end - first)
        return stream.apply(tf.data.experimental.assert_cardinality(end - first)).prefetch(tf.data.AUTOTUNE)


@dataclasses.dataclass(frozen=True, eq=False)
class Splits:
    """A data set, ready for training and evaluation.

    Attributes:
        train: training images of the known classes.
        validation: held out of the training images.
        test: test images of the known classes.
        unknown: test images of the unknown classes, label -1; None without an open-set split.
        labels: names of the known classes, in label order.
        image_shape: (height, width, channels).
        name: what the data set is called.
    """

    train: TrainSplit
    validation: Split
    test: Split
    unknown: Split | None
    labels: tuple[str, ...]
    image_shape: ImageShape
    name: str


def _to_float(batch: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
    return {**batch, "image": tf.cast(batch["image"], tf.float32) / 255}


def _check_batch_size(batch_size: int) -> None:
    if batch_size < 1:
        raise UsageError(f"a batch must hold at least 1 image, not {batch_size}")


def _temporary_file() -> str:
    folder = tempfile.mkdtemp(prefix="kerasdefense-images-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return os.path.join(folder, "cache")

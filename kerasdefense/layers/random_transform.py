"""Random transforms that destroy perturbations: noise, and blocks of pixels that are left out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Callable, Optional

import keras
import tensorflow as tf

from kerasdefense.types import UsageError

FILL = 0.5
"""What stands where pixels are left out."""
SCOPES = ("image", "batch")
_GRID = 8
"""Blocks along a side, where their size is not given."""


@keras.saving.register_keras_serializable(package="kerasdefense")
class RandomTransform(keras.layers.Layer):
    """Add noise to images and leave out some of their blocks, at random for each image: RT1, RT2, RT3, or nothing.

    RT1: `int(missing_rate * blocks)` blocks of each image are left out. RT2: noise `sigma * N(0, 1)` is added before,
    clipped to [0, 1]. RT3: RT2 with `masks` disjoint masks which together cover the image; `join` takes of each pass
    what was left out in it, so that no pixel that comes out was seen. 0: images as they are.

    1. `x~ = clip(x + sigma n)`, `n` drawn once for each image.
    2. Masks `m`, 1 where blocks are left out: the first of a random order of the blocks; for RT3 as many equal parts of
       that order as there are masks, the last one with what is left over.
    3. `(1 - m) x~ + 0.5 m`.

    Args:
        kind: 0, 1, 2 or 3.
        sigma: standard deviation of the noise in RT2 and RT3, in units of the [0, 1] range, at least 0.
        missing_rate: share of blocks that RT1 and RT2 leave out, in [0, 1).
        block_size: pixels along the side of a block, which must divide the sides of the image; 0 = an eighth.
        masks: passes of RT3, at least 2.
        scope: whether each image has a mask of its own, or the images of a "batch" that of the first one, as in the
            authors' code (of several replicas each its own); noise is drawn for each image.

    Source: Lin et al. 2024, "Adversarial training on purification", its released code and discussion; RT3 after Ughini
    et al. 2022, "Trust-no-pixel". Deviations: a mask for each image, theirs one for each batch.
    """

    def __init__(
        self,
        kind: int = 2,
        *,
        sigma: float = 0.25,
        missing_rate: float = 0.25,
        block_size: int = 0,
        masks: int = 4,
        scope: str = "image",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if kind not in (0, 1, 2, 3):
            raise UsageError(f"a random transform is 1, 2 or 3, or 0 for none, not {kind}")
        if not 0 <= sigma < float("inf"):
            raise UsageError(f"the noise of a random transform must be finite and at least 0, not {sigma}")
        if not 0 <= missing_rate < 1:
            raise UsageError(f"the share of blocks left out must be in [0, 1), not {missing_rate}")
        if block_size < 0:
            raise UsageError(f"the size of a block must be at least 1 pixel, or 0 for an eighth, not {block_size}")
        if masks < 2:
            raise UsageError(f"RT3 needs at least 2 masks, not {masks}")
        if scope not in SCOPES:
            raise UsageError(f"masks are drawn for each image or batch, not for each {scope}")
        self.kind, self.sigma, self.missing_rate = kind, sigma, missing_rate
        self.block_size, self.masks, self.scope = block_size, masks, scope

    @property
    def is_random(self) -> bool:
        """Whether anything is drawn."""
        return self.kind == 3 or (self.kind > 0 and self.missing_rate > 0) or (self.kind == 2 and self.sigma > 0)

    @property
    def passes(self) -> int:
        """Images that are made of each."""
        return self.masks if self.kind == 3 else 1

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Return the blocks along height and width of an image, or raise a UsageError where they do not divide it."""
        size = self.block_size or max(1, height // _GRID)
        if height % size or width % size or (not self.block_size and height % _GRID and height > _GRID):
            given = f"{size} pixels" if self.block_size else "an eighth of the height"
            raise UsageError(
                f"blocks of {given} do not divide images of {height} x {width}: give a size that divides both sides"
            )
        rows, columns = height // size, width // size
        if self.kind == 3 and self.masks > rows * columns:
            raise UsageError(f"{self.masks} masks cannot share {rows * columns} blocks")
        return rows, columns

    def call(self, image: tf.Tensor, seed: Optional[tf.Tensor] = None) -> tuple[tf.Tensor, tf.Tensor]:
        """Return images [batch * passes, h, w, c] with blocks left out, and masks [batch * passes, h, w, 1].

        The passes of an image are together.

        Args:
            image: float32 [batch, h, w, c] in [0, 1].
            seed: int32 [batch, 2], what each image is drawn by; None = fresh ones.
        """
        height, width = image.shape[1:3]
        if self.kind == 0:
            return image, tf.zeros_like(image[..., :1])
        seed = fresh_seeds(image) if seed is None else seed
        noisy = image
        if self.kind > 1 and self.sigma:
            noisy = tf.clip_by_value(image + self.sigma * self.noise(seed, image.shape[1:]), 0.0, 1.0)
        mask = self.drawn_masks(seed, height, width)
        if self.passes > 1:
            noisy = tf.repeat(noisy, self.passes, axis=0)
        return noisy * (1 - mask) + FILL * mask, mask

    def join(self, image: tf.Tensor, mask: tf.Tensor) -> tf.Tensor:
        """Return images [batch, h, w, c] of the restored ones of all passes, [batch * passes, h, w, c].

        With one pass, these; with several, of each pass what was left out in it.
        """
        if self.passes == 1:
            return image
        return tf.reduce_sum(tf.reshape(image * mask, [-1, self.passes, *image.shape[1:]]), axis=1)

    @staticmethod
    def noise(seed: tf.Tensor, shape: Sequence[int]) -> tf.Tensor:
        """Return draws from N(0, 1), float32 [batch, *shape], by `seed` alone."""
        return _for_each(lambda one_seed: tf.random.stateless_normal(shape, one_seed), seed, shape)

    def drawn_masks(self, seed: tf.Tensor, height: int, width: int) -> tf.Tensor:
        """Return masks float32 [batch * passes, height, width, 1], 1 where pixels are left out; by `seed` alone."""
        rows, columns = self.grid(height, width)
        count = rows * columns
        numbers = _for_each(
            lambda one_seed: tf.random.stateless_uniform([count], one_seed + [0, 1 << 30]), seed, [count]
        )
        if self.scope == "batch":
            numbers = tf.repeat(numbers[:1], tf.shape(numbers)[0], axis=0)
        rank = tf.argsort(tf.argsort(numbers, stable=True), stable=True)
        if self.kind == 3:
            part = tf.minimum(rank // (count // self.masks), self.masks - 1)
            out = tf.reshape(part[:, None] == tf.range(self.masks)[None, :, None], [-1, count])
        else:
            out = rank < int(self.missing_rate * count)
        mask = tf.reshape(tf.cast(out, tf.float32), [-1, rows, columns, 1])
        return tf.repeat(tf.repeat(mask, height // rows, axis=1), width // columns, axis=2)

    def get_config(self) -> dict[str, Any]:
        """Return every constructor argument."""
        own = ("kind", "sigma", "missing_rate", "block_size", "masks", "scope")
        return {**super().get_config(), **{name: getattr(self, name) for name in own}}


def fresh_seeds(image: tf.Tensor) -> tf.Tensor:
    """Return seeds int32 [batch, 2] from a generator that the system seeds: others at each call, also once exported."""
    return tf.raw_ops.NonDeterministicInts(shape=tf.stack([tf.shape(image)[0], 2]), dtype=tf.int32)


def _for_each(draw: Callable[[tf.Tensor], tf.Tensor], seed: tf.Tensor, shape: Sequence[int]) -> tf.Tensor:
    """Return what `draw` gives of each of seeds [batch, 2], float32 [batch, *shape]."""
    drawn = tf.map_fn(draw, seed, fn_output_signature=tf.float32, parallel_iterations=32)
    return tf.ensure_shape(drawn, [None, *shape])

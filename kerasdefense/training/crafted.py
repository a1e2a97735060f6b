"""Training images that are attacked once, before training, and kept on disk for every run that can use them."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Optional

import keras
import numpy as np
import tensorflow as tf
from tqdm import tqdm

from kerasdefense import backbones, config
from kerasdefense.data import Splits
from kerasdefense.data.augment import Augmentation
from kerasdefense.defenses import DEFENSES, Defense
from kerasdefense.defenses.cafd import IMAGE_ADV
from kerasdefense.files import write_json
from kerasdefense.types import InputError, UsageError

IMAGES, STATE = "images.npy", "crafted.json"
_BLOCK = 1024
"""Images between two writes."""


class Crafted:
    """Attacked training images, float32 in a file that is mapped into memory.

    Args:
        image: [n, h, w, c].
        index: int [n], their numbers in the source split.
    """

    def __init__(self, image: np.ndarray, index: np.ndarray) -> None:
        self.image = image
        self._place = np.full(int(index.max()) + 1, -1)
        self._place[index] = np.arange(len(index))

    def beside(self, batch: Mapping[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        """Return a batch with the attacked images beside those as they are."""
        image_adv = tf.numpy_function(self._rows, [batch["index"]], tf.float32)
        return {**batch, IMAGE_ADV: tf.ensure_shape(image_adv, batch["image"].shape)}

    def _rows(self, index: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(self.image[self._place[index]])


def with_own_images(run: config.Run, splits: Splits) -> Splits:
    """Return the data that a run's method trains on: where it attacks images before, those, and as they are.

    Raises:
        UsageError: fewer images are to be attacked than fill a batch.
    """
    wanted, train = run.defense, splits.train
    if not DEFENSES[wanted.name].crafts_before(wanted):
        if wanted.crafted or wanted.crafted_examples:
            raise UsageError("--defense_crafted and --defense_crafted_examples are for images attacked before training")
        return splits
    index = train.index
    if wanted.crafted_examples:
        if not run.train.batch_size <= wanted.crafted_examples <= len(index):
            raise UsageError(
                f"--defense_crafted_examples={wanted.crafted_examples} must be 0 (all), or at least a batch of "
                f"{run.train.batch_size} and at most the {len(index)} training images"
            )
        chosen = np.random.default_rng(run.train.seed).permutation(index)[: wanted.crafted_examples]
        index = np.sort(chosen)
    as_it_is = Augmentation(padding=0, flip=False)
    return dataclasses.replace(splits, train=dataclasses.replace(train, index=index, augmentation=as_it_is))


def make_crafted(
    run: config.Run, splits: Splits, defense: Defense, folder: Path, strategy: tf.distribute.Strategy
) -> Crafted:
    """Return the training images of a run as its method attacks them before training, from `folder` or into it.

    The folder holds `images.npy` and `crafted.json`, which says for which classifier, attack and images they are, and
    the digest of every block that is done. What is there is checked, and only what is missing is crafted.

    Args:
        run: the configuration.
        splits: `with_own_images`.
        defense: with the method `craft_before`.
        folder: where the images are kept; made if need be.
        strategy: over whose replicas batches are divided.

    Raises:
        InputError: the folder holds images of another classifier, attack or data set, or damaged ones.
    """
    index, shape = splits.train.index, splits.image_shape
    settings = _settings(run, splits, defense)
    done = _read(folder, settings)
    if done is None or len(done) * _BLOCK < len(index):
        size = len(index) * np.prod(shape) * 4 / 1e6
        print(f"attacking {len(index):,} training images once, into {folder} ({size:,.0f} MB)", file=sys.stderr)
    folder.mkdir(parents=True, exist_ok=True)
    mode = "w+" if done is None else "r+"
    image = np.lib.format.open_memmap(folder / IMAGES, mode, np.dtype(np.float32), (len(index), *shape))
    done = done or []
    _check_blocks(folder, image, done)
    with strategy.scope():
        crafter = _Crafter(defense)
        crafter.compile()
    firsts = range(0, len(index), _BLOCK)
    blocks = tqdm(splits.train.batches(_BLOCK), total=len(firsts), desc="attacking", disable=not run.progress)
    for number, block in enumerate(blocks):
        if number < len(done):
            continue
        batches = tf.data.Dataset.from_tensor_slices(block).batch(run.train.batch_size)
        rows = slice(firsts[number], firsts[number] + _BLOCK)
        image[rows] = crafter.predict(batches, verbose=0)
        image.flush()
        done.append(_digest(image[rows]))
        write_json(folder / STATE, {"settings": settings, "blocks": done})
    return Crafted(np.load(folder / IMAGES, mmap_mode="r"), index)


class _Crafter(keras.Model):
    """What Keras predicts with: a defense that attacks, over all replicas."""

    def __init__(self, defense: Defense) -> None:
        super().__init__()
        self.defense = defense

    def predict_step(self, data: Any) -> tf.Tensor:
        """Return the attacked images of a batch."""
        return self.defense.craft_before(self.defense.unpack(data))


def _settings(run: config.Run, splits: Splits, defense: Defense) -> dict[str, str]:
    """Return in words what the images depend on."""
    attack = {"kind": type(defense.attack).__name__, **defense.attack.get_config()}
    own = {name: getattr(defense, name) for name in ("objective", "legacy_cam", "feature_layer", "seed")}
    index = splits.train.index.astype("<i8")
    return {
        "classifier": _of_weights(defense.backbone),
        "precision": backbones.precision_of(defense.backbone),
        "attack": json.dumps({**attack, **own}, sort_keys=True),
        "images": f"{len(index)} of {splits.name}, {hashlib.sha256(index.tobytes()).hexdigest()}",
        "labels": hashlib.sha256(splits.train.label[index].astype("<i4").tobytes()).hexdigest(),
        "shape": "x".join(map(str, splits.image_shape)),
    }


def _of_weights(model: keras.Model) -> str:
    """Return the SHA-256 of a model's weights; what its layers are called is no part of it."""
    whole = hashlib.sha256()
    for each in model.get_weights():
        whole.update(f"{each.dtype}{each.shape}".encode() + each.tobytes())
    return whole.hexdigest()


def _digest(rows: np.ndarray) -> str:
    return hashlib.sha256(rows.tobytes()).hexdigest()


def _read(folder: Path, settings: Mapping[str, str]) -> Optional[list[str]]:
    """Return the digests of the blocks that are done in a folder, None where nothing is there."""
    path = folder / STATE
    if not path.is_file():
        if (folder / IMAGES).exists() or not folder.exists() or not any(folder.iterdir()):
            return None  # nothing, or a first block that was cut off
        raise InputError(f"{folder} holds other files and no {STATE}; pass another --defense_crafted")
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
        there, blocks = dict(state["settings"]), list(state["blocks"])
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is damaged; remove {folder}, or pass another --defense_crafted") from error
    for name, now in settings.items():
        before = str(there.get(name))
        if before != now:
            raise InputError(
                f"the attacked images in {folder} were made for another {_WORDS.get(name, name)} ({before[:12]} there, "
                f"{now[:12]} now): remove them, or pass another --defense_crafted"
            )
    return blocks


_WORDS = {"images": "choice of images", "labels": "set of labels", "shape": "shape of images"}


def _check_blocks(folder: Path, image: np.ndarray, done: list[str]) -> None:
    """Raise an InputError where a block is not what was written."""
    for number, digest in enumerate(done):
        if _digest(image[number * _BLOCK : (number + 1) * _BLOCK]) != digest:
            raise InputError(f"block {number} of {folder / IMAGES} is damaged: remove {folder} to attack them again")

"""Training images that are attacked once, before training, and kept on disk for every run that can use them."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from tqdm import tqdm

from kerasdefense import backbones, config
from kerasdefense.data import Split, Splits
from kerasdefense.data.augment import Augmentation
from kerasdefense.defenses import DEFENSES, Defense
from kerasdefense.defenses.batch import IMAGE_ADV
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
    run: config.Run, splits: Splits, crafter: Crafter, folder: Path, strategy: tf.distribute.Strategy
) -> Crafted:
    """Return the training images of a run as its method attacks them before training, from `folder` or into it.

    The folder holds `images.npy` and `crafted.json`, which says for which classifier, attack and images they are, and
    digests of every block that is done. What is there is checked, and only what is missing is crafted.

    Args:
        run: the configuration.
        splits: `with_own_images`.
        crafter: of the defense.
        folder: where the images are kept; made if need be.
        strategy: over whose replicas batches are divided.

    Raises:
        InputError: the folder holds images of another classifier, attack or data set, or damaged ones; or there is no
            room for them.
    """
    index, shape = splits.train.index, (len(splits.train.index), *splits.image_shape)
    settings = _settings(run, splits, crafter.defense, strategy)
    done = _read(folder, settings)
    state = {"settings": settings, "blocks": done}
    image = _open(folder, shape, state)
    firsts = range(0, len(index), _BLOCK)
    if len(done) < len(firsts):
        print(f"attacking {len(index):,} training images once, into {folder}", file=sys.stderr)
    blocks = tqdm(splits.train.batches(_BLOCK), total=len(firsts), desc="attacking", disable=not run.progress)
    for number, block in enumerate(blocks):
        rows, clean = slice(firsts[number], firsts[number] + _BLOCK), _digest(block["image"].numpy())
        if number < len(done):
            if done[number] != [clean, _digest(image[rows])]:
                raise InputError(f"block {number} of {folder / IMAGES} is damaged or of other images: remove {folder}")
            continue
        image[rows] = _attacked(crafter, block, run.train.batch_size)
        image.flush()
        done.append([clean, _digest(image[rows])])
        write_json(folder / STATE, state)
    return Crafted(np.load(folder / IMAGES, mmap_mode="r"), index)


def crafted_in_memory(run: config.Run, split: Split, crafter: Crafter) -> Crafted:
    """Return the images of a split, the validation one say, as a run's method attacks them before training."""
    parts = [_attacked(crafter, block, run.train.batch_size) for block in split.batches(_BLOCK)]
    return Crafted(np.concatenate(parts), split.index)


class Crafter(keras.Model):
    """What Keras predicts with: a defense whose `craft_before` is asked, over all replicas if made in their scope.

    Args:
        defense: whose images are attacked.
    """

    def __init__(self, defense: Defense) -> None:
        super().__init__()
        self.defense = defense
        self.compile()

    def predict_step(self, data: Any) -> tf.Tensor:
        """Return the attacked images of a batch."""
        return self.defense.craft_before(self.defense.unpack(data))


def _attacked(crafter: Crafter, block: Mapping[str, tf.Tensor], batch_size: int) -> np.ndarray:
    attacked: np.ndarray = crafter.predict(tf.data.Dataset.from_tensor_slices(block).batch(batch_size), verbose=0)
    return attacked


def _settings(
    run: config.Run, splits: Splits, defense: Defense, strategy: tf.distribute.Strategy
) -> dict[str, dict[str, Any]]:
    """Return what the images depend on, by what a message calls it."""
    attack = {"attack": type(defense.attack).__name__, **defense.attack.get_config(), **defense.craft_settings()}
    if attack.get("legacy_cam"):  # which compares the images of a batch together
        attack |= {"batch size": run.train.batch_size, "replicas": strategy.num_replicas_in_sync}
    index = splits.train.index.astype("<i8")
    images = {"name": splits.name, "images": len(index), "choice": _digest(index), "shape": list(splits.image_shape)}
    classifier = {"classifier": _of_model(defense.backbone), "precision": backbones.precision_of(defense.backbone)}
    settings = {"classifier": classifier, "attack": attack, "data set": images}
    found: dict[str, dict[str, Any]] = json.loads(json.dumps(settings))  # as they are read back
    return found


def _of_model(model: keras.Model) -> str:
    """Return the SHA-256 of a model's weights and of what its layers are; what they are called is no part of it."""
    whole = hashlib.sha256()
    layers = [each for each in model.submodules if isinstance(each, keras.layers.Layer)]
    for layer in layers:
        if not any(isinstance(part, keras.layers.Layer) for part in layer.submodules):
            kept = {name: value for name, value in layer.get_config().items() if name not in ("name", "trainable")}
            whole.update(f"{type(layer).__name__} {json.dumps(kept, sort_keys=True, default=str)}".encode())
    for each in model.get_weights():
        whole.update(f"{each.dtype}{each.shape}".encode() + each.tobytes())
    return whole.hexdigest()


def _digest(rows: np.ndarray) -> str:
    return hashlib.sha256(rows.tobytes()).hexdigest()


def _read(folder: Path, settings: Mapping[str, Mapping[str, Any]]) -> list[list[str]]:
    """Return the digests of the blocks that are done in a folder, which must be of these settings or empty."""
    path = folder / STATE
    if not path.is_file():
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise InputError(f"{folder} holds something else, and no {STATE}: pass another --defense_crafted")
        return []
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
        there = {name: dict(state["settings"][name]) for name in settings}
        blocks = [[str(clean), str(attacked)] for clean, attacked in state["blocks"]]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is damaged: remove {folder}, or pass another --defense_crafted") from error
    for what, now in settings.items():
        keys = [key for key in now if there[what].get(key) != now[key]]
        if keys:
            words = ", ".join(f"{key} {_short(there[what].get(key))} there and {_short(now[key])} now" for key in keys)
            raise InputError(
                f"the attacked images in {folder} were made for another {what} ({words}): remove them, or pass another "
                "--defense_crafted"
            )
    return blocks


def _short(value: Any) -> str:
    return str(value)[:12]


def _open(folder: Path, shape: tuple[int, ...], state: Mapping[str, Any]) -> Any:
    """Return the file of the images, made if none is done."""
    path = folder / IMAGES
    folder.mkdir(parents=True, exist_ok=True)
    if state["blocks"]:
        try:
            image: np.ndarray = np.load(path, mmap_mode="r+")
        except (OSError, ValueError) as error:
            raise InputError(f"{path} is missing or damaged: remove {folder} to attack anew") from error
        if image.shape != shape or image.dtype != np.float32:
            raise InputError(f"{path} is damaged: remove {folder} to attack anew")
        return image
    needed, free = 4 * int(np.prod(shape)), shutil.disk_usage(folder).free
    if needed > free:
        raise InputError(
            f"the attacked images take {needed / 1e6:,.0f} MB, but {folder} has room for {free / 1e6:,.0f}"
        )
    write_json(folder / STATE, state)
    return np.lib.format.open_memmap(path, "w+", np.dtype(np.float32), shape)

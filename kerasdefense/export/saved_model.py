"""A defense on disk as TF Serving reads it: <folder>/<version>/, there whole or not at all."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Callable, Optional

import keras
import numpy as np
import tensorflow as tf

from kerasdefense.defenses import Defense
from kerasdefense.detectors.rejection import RejectOption
from kerasdefense.export.signatures import (
    DENOISE,
    DIAGNOSE,
    SIGNATURES,
    is_randomised,
    purified,
    seeded,
    serving_module,
)
from kerasdefense.export.warmup import write_warm_up
from kerasdefense.files import replacing, write_error, write_json
from kerasdefense.integrity import CARD, check_card, digests
from kerasdefense.types import InputError, UsageError

LABELS, DENOISER = "labels.txt", "denoiser.keras"
TOLERANCE = 1e-5
OF_RUNS = "saved_model"
"""The model's folder in a run directory."""


def save(
    defense: Defense,
    folder: Path,
    *,
    labels: Sequence[str],
    version: int,
    card: Mapping[str, Any],
    reject: Optional[RejectOption] = None,
    diagnostics: bool = False,
) -> Path:
    """Write the SavedModel `folder/<version>/` with labels, card and requests to warm up by, and with `denoiser.keras`.

    The last is there where something purifies images: what they pass before the classifier, to be put in front of any
    other, a model of Keras' own layers, or, where it draws at random, of layers of ours, which load after
    `import kerasdefense`.

    It is loaded back and compared with the defense before it appears under its name, one that draws at random by what
    it makes of given seeds. If anything fails, nothing stays behind.

    Args:
        defense: what is exported.
        folder: the model's folder, which TF Serving calls its base path.
        labels: class names, in label order; one a line in `assets/labels.txt`.
        version: number of the version, from 1 on; 0 = one above the highest there.
        card: what `export.card` returned; `card.json` is this and the SHA-256 of every other file.
        reject: detector and threshold that the SavedModel judges images by as well; None = none.
        diagnostics: whether it also gets the signature `denoise(image)` where it purifies images, and
            `diagnose(image, seed)` where it draws at random.

    Returns:
        The version's folder.

    Raises:
        UsageError: a version that is there already, or diagnostics of a defense that neither draws at random nor
            purifies images.
        InputError: a model, labels or card that cannot be exported, or a SavedModel unlike the defense.
        OSError: a write failed.
    """
    path = folder / str(_version(folder, version))
    module = serving_module(defense, labels, reject, diagnostics=diagnostics)
    with replacing(path) as temporary:
        _write(module, temporary, labels)
        purifier = defense.purification()
        if purifier is not None:
            purifier.save(temporary / DENOISER)
        _compare(defense, reject, temporary)
        write_warm_up(temporary, model_name(folder))
        complete = {**card, "files": digests(temporary)}
        check_card(complete)
        write_json(temporary / CARD, complete)
    return path


def model_name(folder: Path) -> str:
    """Return what a server calls the model in a folder: as the folder, or the run that this belongs to, is called."""
    folder = folder.resolve()
    name = folder.parent.name if folder.name == OF_RUNS else folder.name
    return re.sub(r"[^A-Za-z0-9_.-]", "_", name)


def versions_of(folder: Path) -> list[int]:
    """Return the numbers of the versions in a model's folder, ascending."""
    return sorted(int(path.name) for path in folder.glob("*") if path.name.isdecimal())


def _version(folder: Path, version: int) -> int:
    """Return the number to write, `version` or for 0 the next one."""
    numbers = versions_of(folder)
    free = max(numbers, default=0) + 1
    if version < 0:
        raise UsageError(f"a version is a number from 1 on, or 0 for the next one, not {version}")
    if version in numbers:
        raise UsageError(f"version {version} is in {folder} already; the next free one is {free}")
    return version or free


def _write(module: tf.Module, path: Path, labels: Sequence[str]) -> None:
    """Write the SavedModel with its labels asset, which is copied from a file beside it."""
    source = path.with_name(LABELS)
    source.write_text("".join(f"{label}\n" for label in labels), encoding="utf-8")
    module.labels = tf.saved_model.Asset(str(source))
    signatures = {name: getattr(module, name) for name in (*SIGNATURES, DENOISE, DIAGNOSE) if hasattr(module, name)}
    try:
        tf.saved_model.save(module, str(path), signatures=signatures)
    except tf.errors.OpError as error:
        raise write_error(error, "the SavedModel") from error


def _compare(defense: Defense, reject: Optional[RejectOption], path: Path) -> None:
    """Raise an InputError unless what is at `path` gives the defense's logits, scores and images on random images."""
    shape = defense.backbone.input_shape[1:]
    image = tf.constant(np.random.default_rng(0).random((4, *shape), np.float32))
    loaded = tf.saved_model.load(str(path))
    answers = loaded.signatures["serving_default"](image=image)
    found = answers["logits"].numpy()
    if not np.isfinite(found).all():
        raise InputError("the model gives logits that are NaN or infinite; it was not exported")
    if is_randomised(defense):
        _compare_draws(defense, loaded, image)
    else:
        _check_close(found, tf.cast(defense(image, training=False), tf.float32).numpy(), "logits")
    purifier = defense.purification()
    if purifier is not None:
        _compare_purifier(purifier, loaded, path, image)
    if reject is not None:
        score = reject.detector.score_image(defense.activations, tf.constant(image)).numpy()
        _check_close(answers["anomaly_score"].numpy(), score, "anomaly scores")


def _compare_draws(defense: Defense, loaded: Any, image: tf.Tensor) -> None:
    """Raise an InputError unless a defense's graph answers as it does, has its weights and draws anew at each call.

    Where the signature `diagnose` is exported, its answers to given seeds are compared, else those of its like that is
    not. The signatures without a seed hold the same graph, whose answers differ each time.
    """
    seed = _seeds(image)
    of_seed = seeded(defense)
    diagnose = loaded.signatures.get(DIAGNOSE)
    found = of_seed(image, seed) if diagnose is None else diagnose(image=image, seed=seed)
    expected = tf.cast(defense(image, training=False, seed=seed), tf.float32).numpy()
    _check_close(found["logits"].numpy(), expected, "logits")
    weights = of_seed.get_concrete_function().graph.variables
    if not _contents(weights) <= _contents(loaded.weights):
        raise InputError("the SavedModel has other weights than the model; it was not kept")
    serve = loaded.signatures["serving_default"]
    _check_fresh(lambda: serve(image=image)["logits"], lambda: defense(image, training=False), "logits")


def _compare_purifier(purifier: Any, loaded: Any, path: Path, image: tf.Tensor) -> None:
    """Raise an InputError unless `denoiser.keras` and, where it is exported, `denoise` give a purifier's images."""
    seed = _seeds(image)
    expected = purified(purifier, image, seed).numpy()
    denoise = loaded.signatures.get(DENOISE)
    if denoise is not None and is_randomised(purifier):
        _check_fresh(lambda: denoise(image=image)["image_denoised"], lambda: purifier(image, training=False), "images")
    elif denoise is not None:
        _check_close(denoise(image=image)["image_denoised"].numpy(), expected, "denoised images")
    diagnose = loaded.signatures.get(DIAGNOSE)
    if diagnose is not None:
        _check_close(diagnose(image=image, seed=seed)["image_denoised"].numpy(), expected, "denoised images")
    alone = keras.models.load_model(path / DENOISER, compile=False)
    _check_close(purified(alone, image, seed).numpy(), expected, f"the images of {DENOISER}")


def _seeds(image: tf.Tensor) -> tf.Tensor:
    """Return different seeds for each image."""
    return tf.reshape(tf.range(2 * image.shape[0]), [-1, 2])


def _contents(variables: Iterable[tf.Variable]) -> set[tuple[str, str]]:
    """Return what variables hold, whatever their names and order."""
    return {(str(each.shape), hashlib.sha256(each.numpy().tobytes()).hexdigest()) for each in variables}


def _check_fresh(exported: Callable[[], tf.Tensor], own: Callable[[], tf.Tensor], what: str) -> None:
    """Raise an InputError where what is exported answers alike twice, and the model itself does not."""
    first, second, *of_model = (ask().numpy() for ask in (exported, exported, own, own))
    if not np.isfinite(first).all():
        raise InputError(f"the model gives {what} that are NaN or infinite; it was not exported")
    if np.array_equal(first, second) and not np.array_equal(*of_model):
        raise InputError(f"the SavedModel gives the same {what} twice, with its noise frozen; it was not kept")


def _check_close(found: np.ndarray, expected: np.ndarray, what: str) -> None:
    difference = float(np.max(np.abs(found - expected)) / max(1.0, np.max(np.abs(expected))))
    if not difference <= TOLERANCE:
        raise InputError(f"the SavedModel differs from the model by {difference:.1e} in {what}; it was not kept")

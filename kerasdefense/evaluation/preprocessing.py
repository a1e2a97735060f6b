"""Something in front of any model: a Keras model from images to images, or a codec or filter of another library."""

from __future__ import annotations

import hashlib
import importlib.util
import warnings
from pathlib import Path
from typing import Any, Callable, NamedTuple

import keras
import numpy as np
import tensorflow as tf

from kerasdefense.attacks.wrappers import FIXED_NOISE, bpda, fixed_noise
from kerasdefense.backbones.own import read
from kerasdefense.defenses.purifying import Purify, purified_paths
from kerasdefense.evaluation import digests, interfaces
from kerasdefense.evaluation.models import Loaded, name_of
from kerasdefense.types import InputError, UsageError

QUALITY = 75
"""Of JPEG, from 1 to 100."""
_SEED = 0
_ROUNDING = 1e-6
_FLAG = "--evaluate_preprocessor"


class Preprocessor(NamedTuple):
    """What images pass before a model.

    Attributes:
        name: what it may be called in a report.
        digest: tells it from others.
        purify: `purify(image, seed) -> image`, a function of the image, and of the seed where it draws at random.
        is_differentiable: whether it has a useful gradient.
        image_shape: height, width and channels of the images that it takes; None where any will do.
        is_randomised: whether it draws at random.
    """

    name: str
    digest: str
    purify: Purify
    is_differentiable: bool = True
    image_shape: interfaces.Shape = interfaces.UNKNOWN
    is_randomised: bool = False


def preprocessor(name: str) -> Preprocessor:
    """Return what a name stands for.

    Args:
        name: a Keras model from images in [0, 1] to images of the same shape in [0, 1] (a file, or a folder), which is
            called in inference mode, and through which gradients flow; one whose `is_randomized` is true draws by the
            argument `seed` of its call, int32 [n, 2]. `jpeg`: JPEG of quality 75 and back.
            `total_variance`: a third of the pixels is kept, drawn once for all images, and the others are filled in
            with little total variance; each image is a minimisation of its own, some milliseconds at 32 x 32 pixels,
            and so each step of an attack on a thousand images takes many seconds. These two have no gradient.

    Raises:
        InputError: there is no such model, or Keras cannot load it.
        UsageError: the library that `jpeg` and `total_variance` come from is not installed.

    Source: of the last two, Guo et al. 2018, "Countering adversarial images using input transformations", in the
    adversarial-robustness-toolbox at its defaults. Deviations: levels are rounded, not cut off, before JPEG (which
    leaves 8-bit images as they are), of quality 75, not 50; the pixels that are kept do not change from call to call.
    """
    if name in _TRANSFORMS:
        transform = _TRANSFORMS[name](_import_art())
        settings = f"{name} {QUALITY} {_SEED}"
        digest = hashlib.sha256(settings.encode()).hexdigest()
        return Preprocessor(name, digest, _in_numpy(transform), is_differentiable=False)
    path = Path(name).expanduser()
    try:
        model = read(path)
        is_randomised = bool(getattr(model, "is_randomized", False))
        inputs = interfaces.inputs_of(model)
        image_shape = interfaces.image_shape_of(inputs and inputs[:1] if is_randomised else inputs)
    except InputError as error:
        raise InputError(f"{_FLAG}={name}: {error}") from error
    purify = _by_random_model(model) if is_randomised else _by_model(model)
    told: dict[str, Any] = {"image_shape": image_shape, "is_randomised": is_randomised}
    return Preprocessor(name_of(path), digests.of_file(path), purify, **told)


def check_preprocessor(given: Preprocessor, image: np.ndarray) -> None:
    """Raise an InputError unless a preprocessor makes images in [0, 1] of images float32 [n, h, w, c]."""
    who = f"preprocessor {given.name}"
    pairs = zip(given.image_shape, image.shape[1:])
    if any(None not in pair and pair[0] != pair[1] for pair in pairs):
        takes, found = interfaces.in_words(given.image_shape), interfaces.in_words(image.shape[1:])
        raise InputError(f"wrong image shape: {who} takes images {takes}, but those of the data are {found}")
    made = given.purify(tf.constant(image), tf.zeros([len(image), 2], tf.int32))
    if not tf.is_tensor(made) or made.shape != image.shape:
        found = interfaces.in_words(made.shape) if tf.is_tensor(made) else f"a {type(made).__name__}"
        raise InputError(f"{who} makes {found} of {interfaces.in_words(image.shape)}, not images of the same shape")
    if not bool(tf.reduce_all(tf.math.is_finite(made))):
        raise InputError(f"{who} makes pixels that are NaN or infinite; check its weights")
    low, high = float(tf.reduce_min(made)), float(tf.reduce_max(made))
    if low < -_ROUNDING or high > 1 + _ROUNDING:
        raise InputError(f"{who} makes pixels from {low:.3g} to {high:.3g}, not in [0, 1]; end it by clipping")


def preprocessed(model: Loaded, given: Preprocessor) -> Loaded:
    """Return a model whose images pass a preprocessor first.

    Its paths are those of `purified_paths` around the model's own exact path, its activations go the whole way, `bare`
    are those of the model alone. What the model tells of its inside, and other paths of its own, are left behind.
    With a preprocessor that draws at random there is the path `fixed_noise` too, and no activations are told.

    Raises:
        UsageError: the model draws at random.
    """
    if model.is_randomised:
        raise UsageError(f"{_FLAG} needs a model that draws nothing at random")
    exact, activations = model.attack_paths["exact"], model.activations

    def logits_fn(image: tf.Tensor) -> tf.Tensor:
        return exact(image, _no_seed(image))

    def purify(image: tf.Tensor) -> tf.Tensor:
        return given.purify(image, _no_seed(image))

    follow = purify if given.is_differentiable else bpda(purify)
    paths = purified_paths(logits_fn, given.purify, is_differentiable=given.is_differentiable)
    told = None if activations is None or given.is_randomised else lambda image: activations(follow(image))
    if given.is_randomised:
        paths[FIXED_NOISE] = fixed_noise(paths["exact"])
    return model._replace(
        attack_paths=paths,
        is_randomised=True if given.is_randomised else None,  # what declares nothing may draw all the same
        name=f"{given.name}+{model.name}",
        digest=hashlib.sha256(f"{given.digest} {model.digest}".encode()).hexdigest(),
        activations=told,
        bare=activations,
        internals=None,
    )


def has_art() -> bool:
    """Return whether the adversarial-robustness-toolbox is installed."""
    return importlib.util.find_spec("art") is not None


def _import_art() -> Any:
    if not has_art():
        raise UsageError(
            f"{_FLAG}={' and '.join(_TRANSFORMS)} need adversarial-robustness-toolbox, which is not installed; install "
            "it with: pip install '.[bench]'"
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the libraries that it does without
        from art.defences import preprocessor as transforms
    return transforms


Transform = Callable[[np.ndarray], np.ndarray]
"""From images float32 [n, h, w, c] in [0, 1] to others."""


def _jpeg(transforms: Any) -> Transform:
    codec = transforms.JpegCompression(clip_values=(0, 255), quality=QUALITY)
    return lambda image: codec(np.rint(255 * np.clip(image, 0, 1)))[0] / 255


def _total_variance(transforms: Any) -> Transform:
    minimise = transforms.TotalVarMin(clip_values=(0, 1))

    def transform(image: np.ndarray) -> np.ndarray:
        state = np.random.get_state()
        try:
            return np.concatenate([_seeded(minimise, image[row : row + 1]) for row in range(len(image))])
        finally:
            np.random.set_state(state)

    return transform


def _seeded(minimise: Any, image: np.ndarray) -> np.ndarray:
    np.random.seed(_SEED)
    return minimise(image)[0]


_TRANSFORMS: dict[str, Callable[[Any], Transform]] = {"jpeg": _jpeg, "total_variance": _total_variance}


def _in_numpy(transform: Transform) -> Purify:
    def call(image: np.ndarray) -> np.ndarray:
        return transform(image).astype(np.float32) if len(image) else image

    def purify(image: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
        del seed
        return tf.ensure_shape(tf.numpy_function(call, [image], tf.float32), image.shape)

    return purify


def _by_model(model: keras.Model) -> Purify:
    def purify(image: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
        del seed
        return model(image, training=False)

    return purify


def _by_random_model(model: keras.Model) -> Purify:
    return lambda image, seed: model(image, training=False, seed=seed)


def _no_seed(image: tf.Tensor) -> tf.Tensor:
    return tf.zeros([tf.shape(image)[0], 2], tf.int32)

"""The graph functions of an exported model: the whole defended path behind three kinds of input.

They are made of core TensorFlow operations only, so that TF Serving loads them as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Optional

import tensorflow as tf

from kerasdefense.defenses import Defense
from kerasdefense.detectors.rejection import RejectOption
from kerasdefense.export.decoding import examples_as_images, files_as_images
from kerasdefense.types import InputError, UsageError

SIGNATURES = ("serving_default", "image_bytes", "examples")
DENOISE = "denoise"
"""One more, only where it is asked for, of a defense that purifies images before they are classified."""
DIAGNOSE = "diagnose"
"""One more, only where it is asked for, of a defense that draws at random: whoever calls it chooses the noise."""
_CHANNELS = (1, 3, 4)


def serving_module(
    defense: Defense, labels: Sequence[str], reject: Optional[RejectOption] = None, *, diagnostics: bool = False
) -> tf.Module:
    """Return a module with one `tf.function` per name in SIGNATURES.

    They take a batch of any size, empty ones too:

    - `serving_default(image)`: float32 [batch, height, width, channels] in [0, 1];
    - `image_bytes(image_bytes)`: string [batch], PNG or JPEG files of any size up to `decoding.LARGEST`
      pixels, which are decoded, converted to the model's channels and resized as training images are;
    - `examples(examples)`: string [batch], serialised `tf.train.Example` with such a file as feature `image`; it leaves
      `class_name` out, since TFX's BulkInferrer fails on outputs that are one string for each image.

    Each returns `logits` and `probabilities` float32 [batch, classes], `label` int64 [batch] (the class of
    the highest logit), `class_name` string [batch], `anomaly_score` float32 [batch], higher = more unknown, `accepted`
    bool [batch] and `valid` bool [batch]. With a reject option the score is its detector's, and valid images are
    accepted where it is at most the option's threshold. Without one it is 1 - the highest probability (Hendrycks and
    Gimpel 2017), and every valid image is accepted.

    Since servers merge requests into batches, what is wrong with the content of one row is told by that row alone: its
    neighbours are answered as if it were a good one. A row with NaN, infinity or a value outside [0, 1], a file that
    cannot be decoded or whose header tells of more than `decoding.LARGEST` pixels, or an example that cannot be parsed
    or lacks the feature has `valid` and `accepted` false, logits and probabilities 0, label -1, class name "" and as
    anomaly score the largest float32.

    Diagnostics of a defense that purifies images are `denoise(image)`, of the input of `serving_default`, which returns
    `image_denoised` float32 [batch, height, width, channels] in [0, 1]; those of one that draws at random are
    `diagnose(image, seed)`, as `seeded` describes it. Whoever attacks the model learns from either.

    A defense that draws at random draws anew for each image of each request; only `diagnose` takes a seed.

    Args:
        defense: what is exported; its `call` is the whole defended path.
        labels: class names, in label order.
        reject: a fitted detector and its threshold; None = every image is answered.
        diagnostics: whether there are `denoise` and `diagnose` as well, each where it has something to tell.

    Raises:
        InputError: not one label per class, or a model that images in files cannot feed.
        UsageError: diagnostics of a model that neither draws at random nor purifies images.
    """
    purifier: Any = defense.purification()
    if diagnostics and purifier is None and not is_randomised(defense):
        raise UsageError("--export_diagnostics is for models that draw at random or purify images; leave it out")
    image_shape = _image_shape(defense, labels)
    of_images = _of_images(image_shape)
    answer = _answering(defense, labels, reject)

    @tf.function(input_signature=[of_images])
    def serving_default(image: tf.Tensor) -> dict[str, tf.Tensor]:
        image = _of_shape(image)
        return answer(image, _in_range(image))

    @tf.function(input_signature=[tf.TensorSpec([None], tf.string, "image_bytes")])
    def image_bytes(image_bytes: tf.Tensor) -> dict[str, tf.Tensor]:
        return answer(*files_as_images(_of_shape(image_bytes), image_shape))

    @tf.function(input_signature=[tf.TensorSpec([None], tf.string, "examples")])
    def examples(examples: tf.Tensor) -> dict[str, tf.Tensor]:
        answers = answer(*examples_as_images(_of_shape(examples), image_shape))
        del answers["class_name"]
        return answers

    @tf.function(input_signature=[of_images])
    def denoise(image: tf.Tensor) -> dict[str, tf.Tensor]:
        return {"image_denoised": purifier(_filled(_of_shape(image)), training=False)[: tf.shape(image)[0]]}

    module = tf.Module(name="serving")
    module.serving_default, module.image_bytes, module.examples = serving_default, image_bytes, examples
    if diagnostics and purifier is not None:
        module.denoise = denoise
    if diagnostics and is_randomised(defense):
        module.diagnose = seeded(defense)
    # Only these are saved: no optimizer, metrics or Keras classes, which a loader would have to know.
    module.weights = list(answer.get_concrete_function().graph.variables)
    return module


def _answering(defense: Defense, labels: Sequence[str], reject: Optional[RejectOption]) -> Any:
    """Return `answer(image, valid)`, the `tf.function` of images and bool [batch] that every signature ends in."""
    names = tf.constant([*labels, ""])

    @tf.function(
        input_signature=[_of_images(defense.backbone.input_shape[1:]), tf.TensorSpec([None], tf.bool, "valid")]
    )
    def answer(image: tf.Tensor, valid: tf.Tensor) -> dict[str, tf.Tensor]:
        size, image = tf.shape(image)[0], _fed(image, valid)
        if reject is None:
            logits = tf.cast(defense(image, training=False), tf.float32)[:size]
            probabilities = tf.nn.softmax(logits)
            score, accepted = 1 - tf.reduce_max(probabilities, axis=-1), valid
        else:
            activations = defense.activations(image)
            logits = tf.cast(activations["logits"], tf.float32)[:size]
            probabilities = tf.nn.softmax(logits)
            score = reject.detector.score_with(activations, defense.activations, image)[:size]
            accepted = valid & (score <= reject.threshold)
        label = tf.argmax(logits, axis=-1)
        return {
            "logits": tf.where(valid[:, None], logits, 0.0),
            "probabilities": tf.where(valid[:, None], probabilities, 0.0),
            "label": tf.where(valid, label, -1),
            "class_name": tf.gather(names, tf.where(valid, label, len(labels))),
            "anomaly_score": tf.where(valid, score, tf.float32.max),
            "accepted": accepted,
            "valid": valid,
        }

    return answer


def is_randomised(model: Any) -> bool:
    """Return whether a defense or a purifier says that it draws at random."""
    return bool(getattr(model, "is_randomized", False))


def seeded(defense: Defense) -> Any:
    """Return `diagnose(image, seed)`, a `tf.function` of images and the seeds int32 [batch, 2] that each is drawn by.

    It returns `logits` and `probabilities` float32 [batch, classes], and where something purifies images before they
    are classified, `image_denoised` float32 [batch, height, width, channels].
    """
    purifier = defense.purification()
    of_images = _of_images(defense.backbone.input_shape[1:])

    @tf.function(input_signature=[of_images, tf.TensorSpec([None, 2], tf.int32, "seed")])
    def diagnose(image: tf.Tensor, seed: tf.Tensor) -> dict[str, tf.Tensor]:
        size, image, seed = tf.shape(image)[0], _filled(_of_shape(image)), _filled(_of_shape(seed))
        logits = tf.cast(defense(image, training=False, seed=seed), tf.float32)[:size]
        found = {"logits": logits, "probabilities": tf.nn.softmax(logits)}
        if purifier is not None:
            found["image_denoised"] = purified(purifier, image, seed)[:size]
        return found

    return diagnose


def purified(purifier: Any, image: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
    """Return what a purifier makes of images [batch, h, w, c], by seeds int32 [batch, 2] if it draws at random."""
    return purifier(image, training=False, **({"seed": seed} if is_randomised(purifier) else {}))


def _of_images(image_shape: Sequence[int]) -> tf.TensorSpec:
    return tf.TensorSpec([None, *image_shape], tf.float32, "image")


def _of_shape(fed: tf.Tensor) -> tf.Tensor:
    """Return what a signature is given as it is; the graph raises InvalidArgument where its shape is not the input's.

    TF Serving feeds a session, which does not look at the shapes of placeholders. To the graph the shape is unknown
    here, else its optimiser would take the check for needless.
    """
    return tf.ensure_shape(tf.compat.v1.placeholder_with_default(fed, shape=None), fed.shape)


def _in_range(image: tf.Tensor) -> tf.Tensor:
    """Return whether all values of each image are in [0, 1], bool [batch].

    Only the sum is NaN on every device where a value is; to compare every value takes several times as long.
    """
    axes = [1, 2, 3]
    is_number = tf.reduce_sum(image, axes) >= 0
    return is_number & (tf.reduce_min(image, axes) >= 0) & (tf.reduce_max(image, axes) <= 1)


def _fed(image: tf.Tensor, valid: tf.Tensor) -> tf.Tensor:
    """Return the images that the model gets, zeros in place of those that are not valid, and one where there is none.

    Copying a batch takes a small model a twentieth of its own time, so a good one is passed on as it is.
    """
    is_good = tf.reduce_all(valid) & (tf.size(valid) > 0)
    return tf.cond(is_good, lambda: image, lambda: _filled(tf.where(valid[:, None, None, None], image, 0.0)))


def _filled(image: tf.Tensor) -> tf.Tensor:
    """Return a batch of images or seeds, an empty one with one: oneDNN's convolutions give that a wrong shape."""
    filler = tf.zeros([tf.cast(tf.shape(image)[0] == 0, tf.int32), *image.shape[1:]], image.dtype)
    return tf.concat([image, filler], axis=0)


def _image_shape(defense: Defense, labels: Sequence[str]) -> tuple[int, int, int]:
    """Return the (height, width, channels) of a defense that can be exported with these labels."""
    shape, classes = defense.backbone.input_shape[1:], defense.backbone.output_shape["logits"][-1]
    if len(labels) != classes:
        raise InputError(f"a model of {classes} classes cannot be exported with {len(labels)} labels")
    if None in shape:
        raise InputError(f"a model that takes images {shape} cannot be exported; give its input a fixed size")
    if shape[2] not in _CHANNELS:
        raise InputError(f"a model of {shape[2]} channels cannot be exported: image files have 1, 3 or 4")
    return shape

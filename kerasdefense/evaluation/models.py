"""Any classifier as what `evaluate` takes: a model of Keras, a SavedModel, a defense or a plain function."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Callable, NamedTuple, Optional, Union

import keras
import tensorflow as tf

from kerasdefense import integrity
from kerasdefense.backbones.head import layer_of, weights, without_softmax
from kerasdefense.backbones.own import as_backbone, read
from kerasdefense.defenses.axes import axis_paths
from kerasdefense.detectors import Head
from kerasdefense.evaluation import digests, interfaces
from kerasdefense.evaluation.interfaces import UNKNOWN, Shape, classes_of, image_shape_of, in_words, selected
from kerasdefense.evaluation.suites import ThreatModel
from kerasdefense.layers import OrthogonalHead
from kerasdefense.losses import class_activation_features, features_of
from kerasdefense.types import ActivationsFn, InputError, LogitsFn, PathFn

MODEL, SIGNATURE = "model.keras", "serving_default"


class Loaded(NamedTuple):
    """A classifier, and what is known of it.

    Attributes:
        attack_paths: `{name: fn(image, seed) -> logits}`, with `exact` among the names.
        image_shape: (height, width, channels); None where any will do, or where it is not known.
        classes: how many, None where it is not known before it was asked.
        name: what it may be called in a report.
        digest: SHA-256 that tells it from other models, "" where it is a plain function.
        is_randomised: whether it declares to draw at random; None = it declares nothing.
        activations: `activations(image) -> {"logits": [n, classes], "embedding": [n, d]}` of a model that draws nothing
            at random; without the embedding, what enters the last layer, where it does not tell.
        has_embedding: whether it tells.
        bare: the activations of the classifier alone, where something stands in front of it.
        head: the last layer, where it is known and of a kind that detectors know.
        kernels: trainable kernels of the defended path, where they can be moved.
        internals: `internals(batch, image_adv, attack, seed) -> {name: [n]}` of a defense that tells of its inside.
        threat_model: norm and radius of a defense's own attack.
        attack_budget: input gradients that a defense's training spent on an image.
        endpoint: of a model that a server answers for, what is known of it, and how many images it was sent so far. It
            gives no gradient.
    """

    attack_paths: Mapping[str, PathFn]
    image_shape: Shape = UNKNOWN
    classes: Optional[int] = None
    name: str = ""
    digest: str = ""
    is_randomised: Optional[bool] = None
    activations: Optional[ActivationsFn] = None
    has_embedding: bool = False
    bare: Optional[ActivationsFn] = None
    head: Optional[Head] = None
    kernels: Sequence[tf.Variable] = ()
    internals: Optional[Callable[..., Mapping[str, tf.Tensor]]] = None
    threat_model: Optional[ThreatModel] = None
    attack_budget: Optional[int] = None
    endpoint: Optional[Callable[[], dict[str, Any]]] = None

    @property
    def features(self) -> Optional[LogitsFn]:
        """`features(image) -> [n, d]`, what enters the last layer, if the model tells."""
        activations = self.activations
        return None if activations is None or not self.has_embedding else lambda image: activations(image)["embedding"]

    @property
    def class_activation(self) -> Optional[LogitsFn]:
        """`class_activation(image) -> [n, h, w, c]`, the class activation features, if the model tells them."""
        return self._class_activation(self.activations)

    @property
    def bare_class_activation(self) -> Optional[LogitsFn]:
        """The same of the classifier alone, which the model itself is where nothing stands in front of it."""
        return self._class_activation(self.activations if self.bare is None else self.bare)

    def _class_activation(self, activations: Optional[ActivationsFn]) -> Optional[LogitsFn]:
        if activations is None or self.head is None or not self.has_embedding:
            return None
        kernel, tell = tf.constant(self.head.kernel, tf.float32), activations

        def features(image: tf.Tensor) -> tf.Tensor:
            told = tell(image)
            return class_activation_features(features_of(told, kernel), told["logits"], kernel)

        return features


def load_model(path: Union[str, Path], *, outputs: str = "logits") -> Loaded:
    """Return the classifier in a file or folder.

    Args:
        path: a model of Keras (.keras, .h5 or SavedModel folder), a SavedModel folder of any origin with a signature
            `serving_default` of one image input, or a folder that holds `model.keras`. The model takes float images
            in [0, 1], and so holds its preprocessing. Python code in it is not run; custom layers must be registered
            with Keras.
        outputs: as in `as_paths`.

    Raises:
        InputError: if there is no such model, it is no classifier of float images, or a file is not the one that the
            card of the model was written of.
    """
    interfaces.check_outputs(outputs)
    path = Path(path).expanduser()
    try:
        file = _file(path)
        is_plain = file.is_dir() and not (file / "keras_metadata.pb").is_file()
        loaded = _of_saved_model(file, outputs) if is_plain else _of_object(read(file), outputs)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    return loaded._replace(name=name_of(path), digest=digests.of_file(file))


def as_paths(model: Any, *, outputs: str = "logits") -> Loaded:
    """Return a classifier in memory as what `evaluate` takes.

    Args:
        model: Keras model, which is attacked in inference mode; a defense, or any other object with `attack_paths()`;
            or a function from float32 images [n, h, w, c] in [0, 1] to logits [n, classes]. Of a dict of outputs the
            one with the key `outputs` is taken. What was returned here or by `load_model` is returned as it is.
        outputs: "logits", or "probabilities" where the model ends in a softmax. A softmax at the end of a functional or
            Sequential model is taken off. Any other is undone by `log(max(p, 1e-30))`, which is the logits up to a
            shift of all classes. That holds as far as float32 does: where a softmax saturates, its gradient is lost,
            attacks get weak and a model looks more robust than it is. So hand in the logits where you can.

    Raises:
        InputError: if it is no classifier of float images, or does not return what `outputs` says.
    """
    interfaces.check_outputs(outputs)
    if isinstance(model, Loaded):
        return model
    name = _object_name(model)
    try:
        loaded = _of_object(model, outputs)
    except InputError as error:
        raise InputError(f"model {name}: {error}") from error
    return loaded._replace(name=name, digest=digests.of_object(model))


def check_fits(loaded: Loaded, image_shape: Sequence[Optional[int]], classes: Optional[int], data_name: str) -> None:
    """Raise an InputError if a model takes other images than those of the data, or tells apart other classes.

    Args:
        loaded: the model.
        image_shape: (height, width, channels) of the data; None where it is not known.
        classes: number of classes of the data; None = not known.
        data_name: what the data are called.
    """
    who = f"model {loaded.name}" if loaded.name else "the model"
    pairs = zip(loaded.image_shape, image_shape)
    if len(image_shape) != 3 or any(None not in pair and pair[0] != pair[1] for pair in pairs):
        takes, found = in_words(loaded.image_shape), in_words(image_shape)
        raise InputError(f"wrong image shape: {who} takes images {takes}, but those of {data_name} are {found}")
    if None not in (loaded.classes, classes) and loaded.classes != classes:
        raise InputError(f"wrong class count: {who} has {loaded.classes} classes, but {data_name} has {classes}")


def _of_object(model: Any, outputs: str) -> Loaded:
    if callable(getattr(model, "attack_paths", None)):
        return _as_logits(_of_defense(model), outputs)
    if isinstance(model, keras.Model):
        return _of_keras(model, outputs)
    if not callable(model):
        raise InputError(f"a {type(model).__name__} is no classifier; give a Keras model, a defense or a function")
    return _as_logits(_of_function(model, outputs), outputs)


def _of_defense(model: Any) -> Loaded:
    """Return an object that names its own paths; its backbone, if it has one, says what images it takes."""
    image_shape, classes, threat_model, head, kernels = UNKNOWN, None, None, None, []
    backbone, attack = getattr(model, "backbone", None), getattr(model, "attack", None)
    if isinstance(backbone, keras.Model):
        image_shape = image_shape_of(interfaces.inputs_of(backbone))
        logits = selected(interfaces.output_of(backbone), "logits")
        classes, head, kernels = classes_of(logits), _head(logits), _kernels(backbone)
    if attack is not None and hasattr(attack, "norm") and hasattr(attack, "epsilon"):
        threat_model = ThreatModel(attack.norm, attack.epsilon)
    is_random = _declared(model)
    activations = None if is_random else getattr(model, "activations", None)  # of another draw than the logits
    return Loaded(
        model.attack_paths(),
        image_shape,
        classes,
        is_randomised=is_random,
        activations=activations,
        has_embedding=activations is not None,
        bare=getattr(model, "bare_activations", None),
        head=head,
        kernels=kernels,
        internals=getattr(model, "internals", None),
        threat_model=threat_model,
        attack_budget=getattr(model, "attack_budget", None),
    )


def _of_keras(model: keras.Model, outputs: str) -> Loaded:
    image_shape, every = image_shape_of(interfaces.inputs_of(model)), interfaces.output_of(model)
    output = selected(every, outputs)
    classes = classes_of(output)
    bare = without_softmax(model, output) if outputs == "probabilities" and output is not None else None
    answer, given = (model, outputs) if bare is None else (bare, "logits")
    loaded = _of_function(lambda image: answer(image, training=False), given)._replace(
        image_shape=image_shape,
        classes=classes,
        is_randomised=_declared(model),
        kernels=_kernels(model),
    )
    return _with_embedding(loaded, answer, every) if given == "logits" else _as_logits(loaded, given)


def _with_embedding(loaded: Loaded, model: keras.Model, outputs: Any) -> Loaded:
    """Return a Keras model of logits with what enters its last layer, if it names that or it can be found."""
    if isinstance(outputs, Mapping) and "embedding" in outputs:
        logits, tells = outputs["logits"], model
    else:
        try:
            tells = as_backbone(model)
        except InputError:  # no global pooling, say: its logits are all there is
            return loaded
        logits = tells.output["logits"]
    return loaded._replace(
        attack_paths={**loaded.attack_paths, **axis_paths(tells)},
        activations=functools.partial(tells, training=False),
        has_embedding=True,
        head=_head(logits),
    )


def _head(logits: Any) -> Optional[Head]:
    """Return the layer that gives symbolic logits, None where it is neither a dense one nor one of frozen axes."""
    found, layer = weights(logits), layer_of(logits)
    if found is not None:
        kernel, bias = found
        return Head(kernel.numpy(), None if bias is None else bias.numpy())
    return Head(layer.kernel.numpy(), is_linear=False) if isinstance(layer, OrthogonalHead) else None


def _kernels(model: keras.Model) -> list[tf.Variable]:
    """Return the trainable weights of a model that have an input and an output axis, none before it has weights."""
    return [variable for variable in model.trainable_variables if variable.shape.rank > 1] if model.built else []


def _of_saved_model(folder: Path, outputs: str) -> Loaded:
    """Return a SavedModel by its serving signature, whatever it was made with."""
    integrity.check(folder)
    try:
        saved = tf.saved_model.load(str(folder))
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"TensorFlow cannot load it: {reason}") from error
    signatures = getattr(saved, "signatures", {})
    if SIGNATURE not in signatures:
        raise InputError(f"it has no signature {SIGNATURE}, only: {', '.join(sorted(signatures)) or 'none at all'}")
    inputs = signatures[SIGNATURE].structured_input_signature[1]
    answers = signatures[SIGNATURE].structured_outputs
    image_shape = image_shape_of(list(inputs.values()))
    argument, spec = next(iter(inputs.items()))
    if spec.shape.rank and spec.shape[0] is not None:
        raise InputError(f"it takes batches of {spec.shape[0]}; export it with a batch of any size, None")
    key = next(iter(answers)) if len(answers) == 1 else outputs
    classes = classes_of(selected(answers, key))

    def answer(image: tf.Tensor) -> Mapping[str, tf.Tensor]:
        # By way of `saved`: the variables live as long as it does.
        return saved.signatures[SIGNATURE](**{argument: tf.cast(image, spec.dtype)})

    loaded = _of_function(answer, key)._replace(image_shape=image_shape, classes=classes)
    interfaces.check_gradient(loaded.attack_paths["exact"], image_shape)
    if "embedding" in answers and outputs == "logits":
        loaded = loaded._replace(activations=answer, has_embedding=True)
    return _as_logits(loaded, outputs)


def _of_function(answer: Callable[[tf.Tensor], Any], key: str) -> Loaded:
    """Return a model that is one function from images to outputs, of which `key` is the one that counts."""

    def exact(image: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
        del seed
        return tf.cast(selected(answer(image), key), tf.float32)

    return Loaded({"exact": exact}, activations=_logits_alone(exact))


def _logits_alone(path: PathFn) -> ActivationsFn:
    """Return the activations of a model that tells no more than its logits."""
    return lambda image: {"logits": path(image, tf.zeros([tf.shape(image)[0], 2], tf.int32))}


def _as_logits(loaded: Loaded, outputs: str) -> Loaded:
    """Return a model whose paths give logits, if `outputs` are not such already."""
    if outputs == "logits":
        return loaded
    paths = {name: interfaces.logarithm(path) for name, path in loaded.attack_paths.items()}
    if None not in loaded.image_shape:  # else the first images will tell
        paths["exact"](tf.random.stateless_uniform([2, *loaded.image_shape], [0, 0]), tf.zeros([2, 2], tf.int32))
    return loaded._replace(attack_paths=paths, activations=_logits_alone(paths["exact"]), has_embedding=False)


def _declared(model: Any) -> Optional[bool]:
    declared = getattr(model, "is_randomized", None)
    return None if declared is None else bool(declared)


def _file(path: Path) -> Path:
    """Return the file or SavedModel folder that a path stands for."""
    if not path.exists():
        raise InputError("no such file or folder")
    if not path.is_dir() or (path / "saved_model.pb").is_file():
        return path
    if (path / MODEL).is_file():
        return path / MODEL
    raise InputError(f"not a model: the folder holds neither saved_model.pb nor {MODEL}")


def name_of(path: Path) -> str:
    """Return `<name>` of <name>, <name>.keras, <name>/model.keras and <name>/<version>."""
    path = path.resolve()
    if path.name == MODEL or path.name.isdecimal():
        return path.parent.name
    return path.stem if path.is_file() else path.name


def _object_name(model: Any) -> str:
    name = getattr(model, "name", None) or getattr(model, "__name__", None)
    return name if isinstance(name, str) else type(model).__name__

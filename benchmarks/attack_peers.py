"""Attacks of other libraries, called on a Keras model as their documentation does.

Each is returned warm: its functions are traced, and it has run for a few steps. Each attacks all images in one batch,
without progress bars, and returns its candidates, float32 [n, h, w, c].

Settings are those of `Budget`. What differs between the libraries, and is left as each has it:

- PGD of cleverhans, Foolbox and ART returns the last iterate, ours the best one.
- ART's APGD returns the last iterate, or the start where that does not fool. Its first step is set to 2 epsilon, as in
  the paper; by default it would be 0.1. It takes two passes a step, a gradient and a loss.
- ART's Square begins at the clean image where the stripes do not help, and draws one square for all images. It takes
  three passes a query, and leaves out what has fallen.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from types import ModuleType
from typing import Any, Callable

import keras
import numpy as np
import tensorflow as tf
from cleverhans.tf2.attacks.projected_gradient_descent import projected_gradient_descent

from benchmarks.attack_case import Budget, Target
from benchmarks.peers import has_art, import_art
from benchmarks.timing import Step
from kerasdefense.attacks import has_foolbox

FEW = 2
"""Steps of a warm-up."""


def attack_peers(budget: Budget, target: Target) -> dict[str, Step]:
    """Return the attacks of the other libraries that are installed and have this one, by name."""
    steps: dict[str, Step] = {}
    if budget.kind == "pgd":
        steps["cleverhans"] = cleverhans(budget, target)
        if has_foolbox():
            steps["Foolbox"] = foolbox(budget, target)
    if has_art():
        steps["ART"] = art(budget, target)
    return steps


def cleverhans(budget: Budget, target: Target) -> Step:
    """Return PGD of cleverhans, which compiles its gradient and loops in Python."""
    step_size = 2.5 * budget.epsilon / budget.steps

    def logits(image: tf.Tensor) -> tf.Tensor:
        return target.model(image, training=False)

    def step(steps: int = budget.steps) -> np.ndarray:
        image, label = tf.constant(target.image), tf.constant(target.label)
        box = {"clip_min": 0.0, "clip_max": 1.0}
        found = projected_gradient_descent(
            logits, image, budget.epsilon, step_size, steps, np.inf, y=label, rand_init=True, **box
        )
        return found.numpy()

    step(FEW)
    return step


def import_foolbox() -> ModuleType:
    """Return Foolbox."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # it imports from where SciPy had its filters once
        import foolbox
    return foolbox


def foolbox(budget: Budget, target: Target) -> Step:
    """Return PGD of Foolbox, which is eager."""
    library = import_foolbox()

    def logits(image: tf.Tensor) -> tf.Tensor:
        return target.model(image, training=False)

    model = library.TensorFlowModel(logits, bounds=(0, 1), device=tf.constant(0.0).device)
    step_size = 2.5 / budget.steps

    def step(steps: int = budget.steps) -> np.ndarray:
        image, label = tf.constant(target.image), tf.constant(target.label, tf.int64)  # what it compares them with
        attack = library.attacks.LinfPGD(rel_stepsize=step_size, steps=steps, random_start=True)
        _, found, _ = attack(model, image, label, epsilons=budget.epsilon)
        return found.numpy()

    step(FEW)
    return step


@contextlib.contextmanager
def without_advice() -> Iterator[None]:
    """Keep off the screen what TensorFlow has to say of the retracing of another library."""
    logger = tf.get_logger()
    level = logger.level
    logger.setLevel("ERROR")
    try:
        yield
    finally:
        logger.setLevel(level)


def import_art_attacks() -> ModuleType:
    """Return the module of ART's evasion attacks."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that PyTorch is not installed
        from art.attacks import evasion
    return evasion


def art_classifier(target: Target) -> Any:
    """Return ART's wrapper of the model."""
    _, make_classifier = import_art()
    return make_classifier(
        model=target.model,
        nb_classes=target.model.output_shape[-1],
        input_shape=target.image.shape[1:],
        loss_object=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        clip_values=(0.0, 1.0),
    )


def art(budget: Budget, target: Target) -> Step:
    """Return an attack of ART, PGD as it is chosen for a TensorFlow model."""
    library, epsilon = import_art_attacks(), budget.epsilon
    make, settings = {
        "pgd": (library.ProjectedGradientDescent, _art_pgd(budget)),
        "apgd": (
            library.AutoProjectedGradientDescent,
            {"eps_step": 2 * epsilon, "nb_random_init": 1, "loss_type": "cross_entropy"},
        ),
        "square": (library.SquareAttack, {"p_init": 0.8, "nb_restarts": 1}),
    }[budget.kind]
    return _art_step(make, settings, budget, target)


def art_in_numpy(budget: Budget, target: Target) -> Step:
    """Return the PGD of ART that steps in NumPy, which ART chooses for models of other frameworks."""
    pgd = import_art_attacks().projected_gradient_descent.projected_gradient_descent_numpy
    return _art_step(pgd.ProjectedGradientDescentNumpy, _art_pgd(budget), budget, target)


def _art_pgd(budget: Budget) -> dict[str, Any]:
    return {"eps_step": 2.5 * budget.epsilon / budget.steps, "num_random_init": 1}


def _art_step(make: Callable[..., Any], settings: dict[str, Any], budget: Budget, target: Target) -> Step:
    common = {"eps": budget.epsilon, "max_iter": FEW, "batch_size": len(target.label), "verbose": False}
    attack = make(art_classifier(target), **common, **settings)

    def step() -> np.ndarray:
        with without_advice():
            return attack.generate(target.image, target.label)

    step()
    attack.set_params(max_iter=budget.steps)
    return step

"""Robustness in the tests and the training of other projects: an assertion, and a validation metric."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Optional

import keras
import tensorflow as tf

from kerasdefense.attacks import PGD
from kerasdefense.evaluation.batches import as_batches, first_images, image_shape_of
from kerasdefense.evaluation.block import Block
from kerasdefense.evaluation.evaluate import evaluate
from kerasdefense.evaluation.models import Loaded, as_paths, check_fits, load_model
from kerasdefense.evaluation.report import radius, relation
from kerasdefense.evaluation.robustness import Options
from kerasdefense.evaluation.search import FRESH_DRAWS, ExactPath, Search
from kerasdefense.evaluation.suites import PlannedAttack, ThreatModel
from kerasdefense.types import InputError, UsageError

ROBUST_ACCURACY, CLEAN_ACCURACY = "robust_accuracy", "robust_clean_accuracy"
_SANITY_EXAMPLES, _CHUNK = 32, 256


def assert_robust(
    model: Any,
    data: Any,
    *,
    epsilon: float,
    at_least: float,
    norm: str = "linf",
    suite: str = "quick",
    examples: int = 0,
    seed: int = 0,
) -> dict[str, Any]:
    """Raise an AssertionError unless a classifier keeps an accuracy under attack, and that can be trusted.

    Args:
        model: path of a model, as `load_model` takes it, or an object, as `as_paths` does. For a model that returns
            probabilities hand in `as_paths(model, outputs="probabilities")`, or the same of `load_model`.
        data: pair of arrays `(image, label)`, or dataset of such pairs or of dicts with `image` and `label`, batched or
            not; images [n, h, w, c] in [0, 1], labels class numbers [n] or [n, 1].
        epsilon: radius, as a fraction of the [0, 1] range.
        at_least: robust accuracy that is required, in [0, 1].
        norm: "linf" or "l2".
        suite: key of SUITES.
        examples: how many images to take from the start; 0 = all.
        seed: seed of the attacks.

    Returns:
        What `evaluate` returns.

    Raises:
        AssertionError: too low an accuracy, or an item of the sanity battery that gates and failed; in one line.
        InputError: a model or data that cannot be evaluated.
        UsageError: a requirement outside [0, 1], or what `evaluate` refuses.
    """
    __tracebackhide__ = True  # pytest shows the line of the caller
    if not 0 <= at_least <= 1:
        raise UsageError(f"at_least is an accuracy in [0, 1], not {at_least}")
    loaded = load_model(model) if isinstance(model, (str, Path)) else as_paths(model)
    batches = as_batches(data)
    _check_images(loaded, batches)
    results = evaluate(
        loaded.attack_paths,
        batches,
        ThreatModel(norm, epsilon),
        suite,
        options=Options(examples=examples, seed=seed, model=loaded.digest),
        is_randomised=loaded.is_randomised,
        sanity_examples=_SANITY_EXAMPLES,
        features=loaded.features,
        class_activation=loaded.class_activation,
    )
    failed = [item for item in results["sanity"] if item["gates"] and item["status"] == "fail"]
    if results["robust_accuracy"]["value"] < at_least or not results["trusted"]:
        raise AssertionError(_verdict(results, failed, at_least=at_least, suite=suite))
    return results


def _verdict(results: Mapping[str, Any], failed: list[Mapping[str, Any]], *, at_least: float, suite: str) -> str:
    """Return in one line what was measured, what was asked for, and why it is not to be trusted."""
    robust, threat = results["robust_accuracy"], results["threat_model"]
    low, high = (100 * each for each in robust["ci95"])
    worst = min(results["attacks"], key=lambda attack: attack["accuracy"])
    parts = [
        f"robust accuracy {100 * robust['value']:.1f} % (95 % interval {low:.1f} to {high:.1f} %, n = {robust['n']}), "
        f"required {100 * at_least:.1f} % in the {threat['norm']} ball of radius {radius(threat['epsilon'])}",
        f"worst attack of the suite {suite}: {worst['name']} ({100 * worst['accuracy']:.1f} %)",
    ]
    for item in failed:
        measured = (
            "" if item["value"] is None else f" ({item['value']:.3g}, must be {relation(item)} {item['threshold']:.3g})"
        )
        parts.append(f"not to be trusted, {item['id']} failed: {item['asks']}{measured}")
    return "; ".join(parts)


class RobustValidation(keras.callbacks.Callback):
    """Measure accuracy under attack after epochs of `fit`, as a metric that other callbacks can monitor.

    Adds to `logs` `robust_accuracy`, the share of images that PGD leaves right, and `robust_clean_accuracy`, that of
    the same images before it. It must stand before the callbacks that monitor these. The model is attacked in inference
    mode, along all of its paths, with the same random starts each time, by what is compiled once; its weights and
    statistics stay as they are. This is a quick look at one attack, no evaluation.

    Args:
        data: as for `assert_robust`, images in [0, 1], which are held in memory.
        epsilon: radius, as a fraction of the [0, 1] range.
        norm: "linf" or "l2".
        steps: steps of PGD.
        examples: how many images to take from the start; 0 = all.
        every: epochs from one measurement to the next; in between `logs` has neither entry.
        outputs: "logits" or "probabilities", as for `as_paths`.
        seed: seed of the random starts.

    Raises:
        InputError: when training begins: data or a model that cannot be attacked.
    """

    def __init__(
        self,
        data: Any,
        *,
        epsilon: float,
        norm: str = "linf",
        steps: int = 10,
        examples: int = 512,
        every: int = 1,
        outputs: str = "logits",
        seed: int = 0,
    ) -> None:
        super().__init__()
        if every < 1 or examples < 0:
            raise UsageError(f"every must be at least 1 and examples at least 0, not {every} and {examples}")
        self.planned = PlannedAttack(f"pgd{steps}", PGD(norm, epsilon, steps=steps))
        self.every = every
        self.outputs = outputs
        self.seed = seed
        self._batches = as_batches(data)
        self._chunk = first_images(self._batches, examples)
        self._bound: Optional[keras.Model] = None

    def on_train_begin(self, logs: Optional[dict[str, Any]] = None) -> None:
        """Check that the model can be attacked."""
        if self._bound is self.model:
            return
        loaded = as_paths(self.model, outputs=self.outputs)
        _check_images(loaded, self._batches)
        settings: dict[str, Any] = {"seed": self.seed, "chunk_size": _CHUNK}
        draws = FRESH_DRAWS if loaded.is_randomised else 1
        self._exact = ExactPath(loaded.attack_paths["exact"], draws=draws, **settings)
        classes = self._exact.check(self._chunk)
        if not ((self._chunk.label >= 0) & (self._chunk.label < classes)).all():
            raise InputError(
                f"validation labels go from {self._chunk.label.min()} to {self._chunk.label.max()}, but the "
                f"model has classes 0 to {classes - 1}"
            )
        own = [(name, path) for name, path in loaded.attack_paths.items() if self.planned.is_for(name)]
        self._searches = [
            Search(self.planned, name, path, stream=stream, **settings) for stream, (name, path) in enumerate(own)
        ]
        self._bound = self.model

    def on_epoch_end(self, epoch: int, logs: Optional[dict[str, Any]] = None) -> None:
        """Attack the model as it is now, and add the two accuracies to `logs`."""
        if (epoch + 1) % self.every or logs is None:
            return
        block = Block(self._chunk, self._exact, self._searches, first=0, cascade=False)
        block.attack(lambda: None)
        logs[ROBUST_ACCURACY] = float(block.standing.mean())
        logs[CLEAN_ACCURACY] = float(block.clean.mean())


def _check_images(loaded: Loaded, batches: tf.data.Dataset) -> None:
    image_shape = image_shape_of(batches)
    if image_shape is not None:
        check_fits(loaded, image_shape, None, "the data")

"""Open-set recognition as it is measured: fit, set a threshold, score the known and the unknown, attack the score."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Callable, NamedTuple, Optional

import numpy as np
import tensorflow as tf
from sklearn.preprocessing import normalize

from kerasdefense.attacks import PGD
from kerasdefense.detectors import Detector, Head
from kerasdefense.detectors.rejection import RejectOption
from kerasdefense.evaluation.models import Loaded
from kerasdefense.evaluation.open_set import metrics
from kerasdefense.evaluation.open_set.attacked import Attacked
from kerasdefense.evaluation.open_set.options import Images, OpenSetOptions
from kerasdefense.evaluation.open_set.scoring import Scored, Scorer, activations_of
from kerasdefense.evaluation.report import accuracy_interval
from kerasdefense.evaluation.search import Chunk, mover
from kerasdefense.evaluation.suites import ThreatModel
from kerasdefense.types import ActivationsFn, InputError, UsageError

FIT_STEPS = 10
"""Steps of the attack that makes adversarial images to fit on."""
_LOOK, _AGREEMENT = 8, 1e-2


class OpenSet(NamedTuple):
    """What was measured: the block of results.json, and scores as arrays by name."""

    results: dict[str, Any]
    arrays: dict[str, np.ndarray]


DEFAULT_OPTIONS = OpenSetOptions()


def fit_detectors(
    model: Loaded,
    detectors: Mapping[str, Detector],
    images: Images,
    threat_model: ThreatModel,
    options: OpenSetOptions = DEFAULT_OPTIONS,
) -> list[RejectOption]:
    """Fit detectors to training images, and set their thresholds on clean validation images.

    A threshold is the smallest that accepts the share `options.retention` of the validation images.

    Args:
        model: with activations that draw nothing at random.
        detectors: by name, to be fitted here.
        images: of known classes; no others and no test images are looked at.
        threat_model: of the attack that makes adversarial images to fit on, where the options ask for such.
        options: how they are fitted.

    Raises:
        InputError: an empty set, activations that are missing or not finite, labels of no known class.
        UsageError: an option that cannot be, or a model that draws at random.
    """
    options.check()
    activations_fn = _activations_fn(model, images.train)
    attack = None if options.fit_on == "clean" else PGD(*threat_model, steps=FIT_STEPS, keep="last")
    moves = {"clean": (None,), "adv": (attack,), "both": (None, attack)}[options.fit_on]
    found = [
        activations_of(
            activations_fn,
            images.train,
            examples=options.fit_examples,
            moved=None if each is None else _mover(model, each, options.seed),
        )
        for each in moves
    ]
    activations = {name: np.concatenate([each[name] for each, _ in found]) for name in found[0][0]}
    label = np.concatenate([each for _, each in found])
    head = _agreeing(model.head, activations)
    for detector in detectors.values():
        detector.fit(activations, label, head)
    validation = Scorer(activations_fn, detectors)(images.validation)
    fit_attack = None if attack is None else attack.get_config()
    return [
        RejectOption(
            name,
            detector,
            metrics.threshold_at(validation.score[name], options.retention),
            options.retention,
            options.fit_on,
            fit_attack,
            (len(found[0][1]), len(validation.label)),
        )
        for name, detector in detectors.items()
    ]


def measure_open_set(
    model: Loaded,
    fitted: Sequence[RejectOption],
    images: Images,
    threat_model: ThreatModel,
    options: OpenSetOptions = DEFAULT_OPTIONS,
) -> OpenSet:
    """Measure how well fitted detectors tell known from unknown images, clean and while their score is attacked.

    1. Score all known and unknown test images; metrics for each set, means over the near and the far ones apart.
    2. Attack the score of the first images: raise it for known ones, lower it for unknown ones, and report the four
       cells {clean, known attacked, unknown attacked, both} and the rates at the threshold, which stays where it was.
    3. Look for known images that are mistaken and accepted; what stands is the robust accuracy with a reject option.

    Args:
        model: the one that the detectors were fitted to.
        fitted: what `fit_detectors` returned.
        images: of known and unknown classes.
        threat_model: norm and radius of the ball in which images are moved.
        options: how it is measured.

    Raises:
        InputError: an empty set, or scores that are NaN.
        UsageError: an option that cannot be.
    """
    options.check()
    scorer = Scorer(_activations_fn(model, images.train), {each.name: each.detector for each in fitted})
    scores = _Scores(
        scorer(images.validation),
        scorer(images.known),
        {each.name: scorer(each.images) for each in images.unknown},
        {each.name: each.group for each in images.unknown},
    )
    attacked = Attacked(model, images, threat_model, options) if options.examples and images.unknown else None
    entries: dict[str, dict[str, Any]] = {}
    arrays: dict[str, np.ndarray] = {}
    for option in fitted:
        entries[option.name] = scores.entry(option, model.classes)
        arrays |= scores.arrays(option.name)
        if attacked is not None:
            half = metrics.threshold_at(scores.validation.score[option.name], 0.5)
            entries[option.name] |= attacked.measure(option.name, option.detector, (option.threshold, half))
            arrays |= {f"{option.name}/{key}": array for key, array in attacked.arrays.items()}
    first = fitted[0]
    results = {
        "retention": first.retention,
        "fit_on": first.fit_on,
        "fit_attack": first.fit_attack,
        "fit_images": first.images[0],
        "validation_images": first.images[1],
        "known": {"n": len(scores.known.label), "accuracy": accuracy_interval(scores.known.right)},
        "sets": {key: {"group": scores.groups[key], "n": len(each.label)} for key, each in scores.unknown.items()},
        "scoring_seconds": {name: round(seconds, 3) for name, seconds in scorer.seconds.items()},
        "attack": None if attacked is None else attacked.described(),
        "detectors": entries,
    }
    return OpenSet(results, arrays)


def _activations_fn(model: Loaded, images: tf.data.Dataset) -> ActivationsFn:
    """Return the activations of a model, or raise a UsageError where they are missing or drawn at random."""
    if model.activations is None:
        raise UsageError("detectors need a model that tells its activations")
    batch = next(images.take(1).as_numpy_iterator(), None)
    if batch is None:
        raise InputError("there are no training images to fit detectors on")
    few = batch["image"][:_LOOK]
    first, second = (model.activations(tf.constant(few))["logits"].numpy() for _ in range(2))
    if model.is_randomised or not np.array_equal(first, second, equal_nan=True):
        raise UsageError("detectors need a model that draws nothing at random; this one answers otherwise each time")
    return model.activations


def _agreeing(head: Optional[Head], activations: Mapping[str, np.ndarray]) -> Optional[Head]:
    """Return the head if it leads from the embeddings to the logits, else None: it is that of another layer."""
    if head is None or "embedding" not in activations:
        return None
    embedding, logits = activations["embedding"], activations["logits"]
    if len(head.kernel) != embedding.shape[1]:
        return None
    if head.is_linear:
        found = embedding @ head.kernel + (0 if head.bias is None else head.bias)
    else:  # up to the signs
        found, logits = np.abs(normalize(embedding) @ head.kernel), np.abs(logits)
    largest = max(1.0, float(np.max(np.abs(logits))))
    return head if np.max(np.abs(found - logits)) <= _AGREEMENT * largest else None


def _mover(model: Loaded, attack: PGD, seed: int) -> Callable[[Chunk], np.ndarray]:
    """Return what attacks the images of a chunk, on the whole defended path."""
    find = mover(model.attack_paths["exact"], attack, seed)

    def moved(chunk: Chunk) -> np.ndarray:
        if (chunk.label < 0).any():
            raise InputError("detectors are fitted to known classes; leave out images with label -1")
        return find(chunk)

    return moved


class _Scores(NamedTuple):
    """Scores of all images by all detectors; `unknown` and `groups` by the name of the set."""

    validation: Scored
    known: Scored
    unknown: dict[str, Scored]
    groups: dict[str, str]

    def entry(self, option: RejectOption, classes: Optional[int]) -> dict[str, Any]:
        """Return what results.json says of a detector while nobody attacks it."""
        accepted = self.known.score[option.name] <= option.threshold
        sets = {key: self._of_set(option, scored, classes) for key, scored in self.unknown.items()}
        return {
            **option.described(),
            "accepted": accuracy_interval(accepted),
            "accepted_and_right": accuracy_interval(accepted & self.known.right),
            "sets": sets,
            "means": self._means(sets),
            "grid": None,
            "reject": None,
        }

    def arrays(self, name: str) -> dict[str, np.ndarray]:
        """Return all scores of a detector by their names in open_set.npz."""
        of = {f"sets/{key}": scored for key, scored in self.unknown.items()}
        of |= {"validation": self.validation, "known": self.known}
        return {f"{name}/{key}": scored.score[name] for key, scored in of.items()}

    def _of_set(self, option: RejectOption, unknown: Scored, classes: Optional[int]) -> dict[str, Any]:
        known, of_known, of_unknown = self.known, self.known.score[option.name], unknown.score[option.name]
        predicted = known.prediction, known.label, of_unknown, unknown.prediction
        classes = classes or int(max(each.max() for each in (known.label, known.prediction, unknown.prediction))) + 1
        return {
            **metrics.summary(of_known, known.right, of_unknown),
            "auroc_ci95": metrics.auroc_interval(of_known, of_unknown),
            "accepted": accuracy_interval(of_unknown <= option.threshold),
            "f1_binary": metrics.f1_binary(of_known, of_unknown, option.threshold),
            "f1_macro": metrics.f1_macro(of_known, *predicted, option.threshold, classes=classes),
        }

    def _means(self, sets: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, float]]:
        """Return the mean of each figure over the near sets and over the far ones, where there are some."""
        means = {}
        for group in sorted({*self.groups.values()} - {""}):
            members = [sets[key] for key, each in self.groups.items() if each == group]
            figures = [key for key, value in members[0].items() if isinstance(value, float)]
            means[group] = {key: float(np.mean([each[key] for each in members])) for key in figures}
        return means

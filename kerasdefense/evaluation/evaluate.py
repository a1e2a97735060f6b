"""Evaluate a classifier: clean and robust accuracy under a suite, with the checks that say whether to trust it."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Callable, Optional, Union

import tensorflow as tf

from kerasdefense.attacks import FEATURE_DISTANCE, norms
from kerasdefense.evaluation import randomised
from kerasdefense.evaluation.batches import as_batches, first_images
from kerasdefense.evaluation.probes import Radii, Subject
from kerasdefense.evaluation.report import accuracy_interval
from kerasdefense.evaluation.robustness import Course, Measured, Options, measure
from kerasdefense.evaluation.sanity import battery, security_curve
from kerasdefense.evaluation.search import FEATURES, Chunk, ExactPath
from kerasdefense.evaluation.suites import (
    AVERAGED,
    EOT_DRAWS,
    FEW,
    SUITES,
    SURROGATE,
    PlannedAttack,
    Suite,
    ThreatModel,
    blind,
)
from kerasdefense.evaluation.unseen import unseen
from kerasdefense.types import InputError, PathFn, UsageError, look_up

SANITY_EXAMPLES, RANDOM_SANITY_EXAMPLES = 128, 32
"""Images on which the sanity battery and the security curve are measured; the second where every answer takes draws."""
LONG_EXAMPLES = 128
"""Images that the long attacks on models that draw at random meet."""
_LOOK = 64
DEFAULT_OPTIONS = Options()


def evaluate(
    attack_paths: Mapping[str, PathFn],
    data: Any,
    threat_model: ThreatModel,
    suite: Union[str, Sequence[PlannedAttack]] = "standard",
    *,
    options: Options = DEFAULT_OPTIONS,
    alone: bool = False,
    is_randomised: Optional[bool] = None,
    sanity_examples: int = SANITY_EXAMPLES,
    long_examples: int = LONG_EXAMPLES,
    features: Optional[Callable[[tf.Tensor], tf.Tensor]] = None,
    class_activation: Optional[Callable[[tf.Tensor], tf.Tensor]] = None,
    look_outside: bool = False,
    queries: int = 0,
    save: Optional[Path] = None,
    save_outside: Optional[Path] = None,
    ahead: Optional[Callable[[Course], None]] = None,
) -> dict[str, Any]:
    """Measure clean and robust accuracy under a suite of attacks, and check the measurement itself.

    Args:
        attack_paths: `{name: fn(image, seed) -> logits}`. `exact`, the whole defended path, must be there; every image
            that an attack finds on any path is scored by it. Paths whose names begin with `surrogate:` are other
            models, on which transfer attacks look.
        data: arrays `(image, label)`, or a dataset of such pairs or of dicts with `image`, `label` and perhaps `index`,
            which numbers the images; images float32 [n, h, w, c] in [0, 1], labels int [n] or [n, 1].
        threat_model: norm and radius of the ball.
        suite: key of SUITES, or planned attacks of that threat model.
        options: how images are attacked. `cascade` and `is_randomised` are set here.
        alone: run every attack on every image that is right clean, also where the suite spares those that have fallen.
        is_randomised: whether the model draws at random; None = find out, and one that is said not to is looked at all
            the same. It then gets the protocol for such models in place of a suite's attacks, as the suite says.
        sanity_examples: images for the sanity battery and the security curve, from the first on; 0 = neither.
        long_examples: images, from the first on, for R3, R4 and R5 of that protocol, and for `look_outside`; 0 = all.
        features: `features(image) -> [n, d]`, what enters the last layer; for attacks that match it, which do not run
            without, and for S16, which else looks at the logits.
        class_activation: `class_activation(image) -> [n, h, w, c]`, the class activation features of the path `exact`;
            for attacks that go away from those of the clean image, which do not run without.
        look_outside: measure accuracy on corrupted images and after StAdv too.
        queries: of a model that gives no gradient: passes that each attack may spend on an image, its scoring aside; a
            suite with attacks that need one is refused, and so is a model that draws at random. 0 = it gives one.
        save: .npz file that receives, per example, the worst image found and every outcome.
        save_outside: .npz file that receives, per example, what `look_outside` measures.
        ahead: called with the attacks, before any runs here; it may put blocks of images that were attacked elsewhere
            in the journal of the options.

    Returns:
        What results.json holds of the measurement: `clean_accuracy`, `robust_accuracy` and `rounded_accuracy` as
        `{value, n, ci95}`; `attacks`; `sanity`, one entry per item, `trusted`, whether none of those that gate failed;
        `curve`, accuracy by radius; `randomised`, the protocol's figures or null; `unseen`, those outside the ball or
        null; `complete`, false where the time was up, and the robust accuracy is then an upper bound.

    Raises:
        InputError: no images, images outside [0, 1] or not finite, labels out of range, outputs that are no logits, or
            a journal of another evaluation.
        UsageError: no path `exact`, an empty or mixed suite, an illegal radius or option.
    """
    _check(attack_paths, threat_model, options, long_examples)
    dataset = as_batches(data)
    few = first_images(dataset, min(options.examples or _LOOK, _LOOK))
    attack_paths, classes = shaped(attack_paths, few, options)
    exact = attack_paths["exact"]
    flags = randomised.look(exact, few, seed=options.seed)
    is_random = flags["differs"] or bool(is_randomised)
    chosen = _chosen(suite, threat_model, classes)
    has_protocol = is_random and chosen.on_random != AVERAGED
    asked: dict[str, Any] = {"long_examples": long_examples, "few": chosen.on_random == FEW}
    left_out: tuple[str, ...] = ()
    if queries:
        plan, left_out = _blind_plan(chosen.plan(*threat_model, classes), queries, is_random=is_random)
    elif has_protocol:
        plan = randomised.plan(*threat_model, classes, paths=tuple(attack_paths), **asked)
    else:
        plan = chosen.plan(*threat_model, classes)
        plan = randomised.averaged(plan) if is_random else plan
    options = dataclasses.replace(
        options, cascade=chosen.cascade and not alone and not has_protocol, is_randomised=is_random
    )
    with contextlib.ExitStack() as stack:
        if options.journal is None and (is_random or save is not None):
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            options = dataclasses.replace(options, journal=folder)
        told = {"features": features, "class_activation": class_activation}
        measured = measure(attack_paths, dataset, plan, options, **told, save=save, ahead=ahead)
        results = summary(measured, threat_model)
        skipped = [*_skipped(plan, attack_paths, told), *left_out]
        results["flags"] = {**flags, "randomised": is_random, "classes": classes, "skipped": skipped}
        results["flags"] |= {"queries": queries} if queries else {}
        size = min(RANDOM_SANITY_EXAMPLES, sanity_examples) if is_random else sanity_examples
        size = min(size, options.examples or size)
        if size and measured.complete:
            subject = Subject(attack_paths, first_images(dataset, size), threat_model, classes, options, features)
            radii = Radii(subject, draws=EOT_DRAWS if is_random else 1)
            results["curve"] = [] if queries else security_curve(radii)
            results["sanity"] = battery(radii, chosen.checks, measured, has_gradient=not queries)
        if look_outside and measured.complete:
            chunk = first_images(dataset, min(long_examples or options.examples, options.examples or long_examples))
            outside = unseen(Subject(attack_paths, chunk, threat_model, classes, options, features))
            results["unseen"] = outside.results
            if save_outside is not None:
                outside.write(save_outside)
        if has_protocol and measured.complete:
            model = randomised.RandomModel(exact, dataset, threat_model, classes, options, **asked)
            blocks = measured.journal.blocks()
            results["randomised"] = randomised.protocol(model, blocks, results["attacks"], flags)
    results["trusted"] = all(item["status"] != "fail" for item in results["sanity"] if item["gates"])
    return results


def shaped(attack_paths: Mapping[str, PathFn], few: Chunk, options: Options) -> tuple[dict[str, PathFn], int]:
    """Return paths that say of how many classes their logits are, checked on a few images, and that number."""
    classes = check_paths(attack_paths, few, options)
    return {name: _with_classes(path, classes) for name, path in attack_paths.items()}, classes


def _blind_plan(
    plan: Sequence[PlannedAttack], queries: int, *, is_random: bool
) -> tuple[tuple[PlannedAttack, ...], tuple[str, ...]]:
    """Return a plan for a model that gives no gradient, and the names of what is left out of it."""
    if is_random:
        raise InputError("the model draws at random, and its protocol needs gradients: evaluate the model itself")
    limited = blind(plan, queries)
    kept = {planned.name for planned in limited}
    return limited, tuple(planned.name for planned in plan if planned.name not in kept)


def check_paths(attack_paths: Mapping[str, PathFn], few: Chunk, options: Options) -> int:
    """Check on a few images that every path gives logits of as many classes, and return of how many."""
    classes = {}
    for name, path in attack_paths.items():
        try:
            classes[name] = ExactPath(path, seed=options.seed, chunk_size=options.chunk_size).check(few)
        except InputError as error:
            raise error if name == "exact" else InputError(f"path {name}: {error}") from error
        if classes[name] != classes["exact"]:
            raise InputError(f"path {name} has {classes[name]} classes, the exact path {classes['exact']}")
    return classes["exact"]


def _with_classes(path: PathFn, classes: int) -> PathFn:
    """Return a path whose logits have a known number of classes also where its graph does not say."""

    def shaped(image: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
        return tf.ensure_shape(path(image, seed), [None, classes])

    return shaped


def _skipped(plan: Sequence[PlannedAttack], attack_paths: Mapping[str, PathFn], told: Mapping[str, Any]) -> list[str]:
    """Return the attacks that did not run, for want of a surrogate to look on or of features to compare."""
    has_surrogate = any(name.startswith(SURROGATE) for name in attack_paths)
    needed = {FEATURES: told["features"], FEATURE_DISTANCE: told["class_activation"]}
    return [
        planned.name
        for planned in plan
        if (planned.transfer and not has_surrogate) or needed.get(planned.objective, planned) is None
    ]


def summary(measured: Measured, threat_model: ThreatModel) -> dict[str, Any]:
    """Return what results.json says of outcomes: accuracies, and an entry per attack and path."""
    outcomes, attacks = measured.outcomes, []
    cascade = outcomes.clean.copy()
    for column, search in enumerate(measured.searches):
        survived = outcomes.survived[:, column]
        cascade &= survived
        attacks.append(
            {
                "name": search.planned.name,
                "path": search.path_name,
                "objective": search.planned.objective,
                "draws": search.planned.draws,
                "replaces": search.planned.replaces,
                "alone": search.planned.alone,
                "threat_model": threat_model._asdict(),
                "attacked": int(outcomes.met[column]),
                "own_accuracy": accuracy_interval(survived[: search.planned.examples or None]),
                "accuracy": float(survived.mean()),
                "ci95": accuracy_interval(survived)["ci95"],
                "cascaded_accuracy": float(cascade.mean()),
                "unconfirmed": int(outcomes.unconfirmed[column]),
                "seconds": round(float(outcomes.seconds[column]), 3),
                "settings": search.attack.get_config(),
            }
        )
    return {
        "threat_model": threat_model._asdict(),
        "clean_accuracy": accuracy_interval(outcomes.clean),
        "robust_accuracy": accuracy_interval(outcomes.robust),
        "rounded_accuracy": accuracy_interval(outcomes.rounded),
        "indices_sha256": hashlib.sha256(outcomes.index.astype("<i8").tobytes()).hexdigest(),
        "attacks": attacks,
        "cascade": measured.cascade,
        "complete": measured.complete,
        "curve": [],
        "sanity": [],
        "randomised": None,
        "unseen": None,
    }


def _chosen(suite: Union[str, Sequence[PlannedAttack]], threat_model: ThreatModel, classes: int) -> Suite:
    if isinstance(suite, str):
        return look_up(SUITES, suite, "suite")
    if not suite:
        raise UsageError("an evaluation needs at least one attack; give it a suite")
    for planned in suite:
        if (planned.attack.norm, planned.attack.epsilon) != tuple(threat_model):
            raise UsageError(f"attack {planned.name} is not of the threat model {tuple(threat_model)}")
    return Suite(lambda *_: tuple(suite), False, SUITES["quick"].checks, "attacks of your own choice", AVERAGED)


def _check(attack_paths: Mapping[str, PathFn], threat_model: ThreatModel, options: Options, long_examples: int) -> None:
    if "exact" not in attack_paths:
        raise UsageError(
            f"an evaluation needs the path 'exact', the whole defended path; given: {sorted(attack_paths)}"
        )
    norms.check_norm(threat_model.norm)
    if not 0 < threat_model.epsilon <= 1e6:
        raise UsageError(f"epsilon must be a finite number above 0, not {threat_model.epsilon}")
    if options.chunk_size < 1 or options.examples < 0 or options.minutes < 0:
        given = f"{options.chunk_size}, {options.examples} and {options.minutes}"
        raise UsageError(f"chunk_size must be at least 1, examples and minutes at least 0, not {given}")
    if long_examples < 0:
        raise UsageError(f"long_examples must be at least 0, not {long_examples}")

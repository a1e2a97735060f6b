"""Models that draw at random: whether one does, and the protocol that such a model gets.

One lucky draw neither breaks nor saves an image here: attacks follow the mean loss over many draws, and an image counts
as fooled by the mean probabilities of fresh ones.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Callable, Optional

import numpy as np
import tensorflow as tf

from kerasdefense.attacks import PGD, Iterative, Square, seeds
from kerasdefense.attacks.wrappers import draws_of, fixed_noise
from kerasdefense.evaluation.journal import Arrays
from kerasdefense.evaluation.probes import Subject
from kerasdefense.evaluation.report import accuracy_interval
from kerasdefense.evaluation.search import Chunk, compiled
from kerasdefense.evaluation.suites import EOT_DRAWS, SUITES, PlannedAttack
from kerasdefense.types import PathFn

SCALING = (1, 5, 20, 64, 128)
"""Draws over which R5 looks whether more of them break more."""
_LOOKS = 5
_FINAL_DRAWS, _ANY_OF = 20, 10
_R3_STEP = 0.007 / (8 / 255)
"""The step of R3 relative to the radius."""


def look(path: PathFn, chunk: Chunk, *, seed: int) -> dict[str, bool]:
    """Return whether a path answers otherwise at another draw (`differs`), and alike at the same one (`keyed`)."""
    few = chunk.rows(np.arange(min(len(chunk.label), 64)))
    image, index = tf.constant(few.image), tf.constant(few.index)
    ask = compiled(path, image, seeds.per_example(seed, 0, index))

    def directions(stream: int) -> tuple[np.ndarray, int]:
        logits = ask(image, seeds.per_example(seed, stream, index)).numpy()
        length = np.maximum(np.linalg.norm(logits, axis=1, keepdims=True), 1e-12)
        return logits / length, int((logits.argmax(1) == few.label).sum())

    def same(first: tuple[np.ndarray, int], second: tuple[np.ndarray, int]) -> bool:
        return first[1] == second[1] and bool(np.abs(first[0] - second[0]).max() <= 1e-4)

    first = directions(0)
    keyed = all(same(first, directions(0)) for _ in range(_LOOKS - 1))
    return {"differs": not keyed or not all(same(first, directions(look)) for look in range(1, _LOOKS)), "keyed": keyed}


def plan(norm: str, epsilon: float, classes: int) -> tuple[PlannedAttack, ...]:
    """Return the attacks of the protocol: AutoAttack rand (R2), PGD with EOT (R3), and averaged Square (R4)."""
    long = PGD(norm, epsilon, steps=200, step_size=_R3_STEP * epsilon, random_start=False)
    return (
        *SUITES["rand"].plan(norm, epsilon, classes),
        PlannedAttack("pgd200_eot", long, draws=EOT_DRAWS, examples=128),
        PlannedAttack("square", Square(norm, epsilon, queries=1000), "margin", EOT_DRAWS),
    )


def averaged(planned: Sequence[PlannedAttack]) -> tuple[PlannedAttack, ...]:
    """Return attacks that follow the mean over EOT draws where they can."""
    return tuple(
        each._replace(draws=max(each.draws, EOT_DRAWS)) if isinstance(each.attack, Iterative) else each
        for each in planned
    )


def final_scoring(path: PathFn, blocks: Iterable[Arrays], *, seed: int, chunk_size: int) -> dict[str, Any]:
    """Return what fresh draws say of the worst images (R6).

    Args:
        path: the exact path.
        blocks: index, label, clean, image_adv of the images.
        seed: seed of the evaluation.
        chunk_size: images passed at once, with all their draws.

    Returns:
        `single_draw`, the expected accuracy of one draw; `majority_vote` and `any_of_10`, the share of images that are
        right by the vote of all draws, and in every one of ten (an attacker may try again).
    """
    size = max(1, chunk_size // _FINAL_DRAWS)
    right = []
    ask: Optional[Callable[..., Any]] = None

    def all_draws(image: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
        return draws_of(path, image, seed, _FINAL_DRAWS)

    for block in blocks:
        for first in range(0, len(block["label"]), size):
            image, index = (tf.constant(block[name][first : first + size]) for name in ("image_adv", "index"))
            drawn = seeds.per_example(seed, -2, index)
            ask = ask or compiled(all_draws, image, drawn)
            logits = ask(image, drawn).numpy()
            answer = logits.argmax(axis=1).reshape(-1, _FINAL_DRAWS)
            right.append(answer == block["label"][first : first + size, None])
    votes = np.concatenate(right)
    return {
        "single_draw": {"value": float(votes.mean()), "n": len(votes), "draws": _FINAL_DRAWS},
        "majority_vote": accuracy_interval(votes.mean(axis=1) > 0.5),
        "any_of_10": accuracy_interval(votes[:, :_ANY_OF].all(axis=1)),
    }


def scaling(subject: Subject) -> list[dict[str, Any]]:
    """Return the accuracy under PGD-20 by the number of draws it averages over (R5)."""
    curve = []
    for draws in SCALING:
        planned = PlannedAttack("pgd20", subject.attack(PGD, steps=20), draws=draws)
        curve.append({"draws": draws, **accuracy_interval(subject.attacked([planned]).standing)})
    return curve


def fixed(subject: Subject) -> dict[str, Any]:
    """Return the accuracy of the model with its draw held fixed under AutoAttack standard (R1)."""
    exact = fixed_noise(subject.attack_paths["exact"])
    options = dataclasses.replace(subject.options, is_randomised=False)
    still = dataclasses.replace(subject, attack_paths={"exact": exact}, options=options)
    plan = SUITES["autoattack"].plan(*subject.threat_model, subject.classes)
    return accuracy_interval(still.attacked(plan, cascade=True).standing)


def protocol(
    subject: Subject, blocks: Iterable[Arrays], attacks: Sequence[Mapping[str, Any]], flags: Mapping[str, bool]
) -> dict[str, Any]:
    """Return the figures R1 to R6.

    Args:
        subject: the paths and the images of R1 and R5.
        blocks: the worst images that the evaluation found, for R6.
        attacks: what it found by attack, R2 to R4 among them.
        flags: what `look` returned.
    """
    by_name = {each["name"]: each["own_accuracy"] for each in attacks if each["path"] == "exact"}
    options = subject.options
    return {
        "R1_fixed_noise": fixed(subject) if flags["keyed"] else None,
        "R2_autoattack_rand": {name: by_name[name] for name in by_name if name.startswith("apgd")},
        "R3_pgd200_eot": by_name.get("pgd200_eot"),
        "R4_square": by_name.get("square"),
        "R5_scaling": scaling(subject),
        "R6_fresh_draws": final_scoring(
            subject.attack_paths["exact"], blocks, seed=options.seed, chunk_size=options.chunk_size
        ),
        "keyed": flags["keyed"],
    }

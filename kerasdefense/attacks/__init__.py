"""Attacks: searches in a ball for images on which an objective is high."""

from __future__ import annotations

from kerasdefense import config
from kerasdefense.attacks import norms, seeds
from kerasdefense.attacks.base import Attack, AttackResult
from kerasdefense.attacks.cleverhans import (
    CleverHansCWL2,
    CleverHansFGM,
    CleverHansMIM,
    CleverHansPGD,
    CleverHansSPSA,
)
from kerasdefense.attacks.objectives import OBJECTIVES, check_logits, hit_target, misclassified, share_pass
from kerasdefense.attacks.pgd import FGSM, FGSMRS, PGD
from kerasdefense.types import UsageError, look_up

ATTACKS: dict[str, type[Attack]] = {
    "cleverhans_cw_l2": CleverHansCWL2,
    "cleverhans_fgm": CleverHansFGM,
    "cleverhans_mim": CleverHansMIM,
    "cleverhans_pgd": CleverHansPGD,
    "cleverhans_spsa": CleverHansSPSA,
    "fgsm": FGSM,
    "fgsm_rs": FGSMRS,
    "pgd": PGD,
}


def build(attack: config.Attack) -> PGD:
    """Return the training attack that a configuration describes; it keeps its last iterate."""
    kind = look_up(ATTACKS, attack.name, "attack")
    if not issubclass(kind, PGD):
        names = ", ".join(sorted(name for name, each in ATTACKS.items() if issubclass(each, PGD)))
        raise UsageError(f"--attack_name={attack.name} cannot craft training images; use one of: {names}")
    if attack.objective:
        look_up(OBJECTIVES, attack.objective, "objective")
    settings = {"norm": attack.norm, "epsilon": attack.epsilon, "keep": "last"}
    if attack.steps:
        settings["steps"] = attack.steps
    if attack.step_size:
        settings["step_size"] = attack.step_size
    if kind is PGD:
        settings["random_start"] = attack.random_start
    elif kind.random_start and not attack.random_start:
        raise UsageError(f"--attack_name={attack.name} is defined by its random start; without one use fgsm")
    return kind(**settings)


__all__ = [
    "ATTACKS",
    "FGSM",
    "FGSMRS",
    "OBJECTIVES",
    "PGD",
    "Attack",
    "AttackResult",
    "build",
    "check_logits",
    "hit_target",
    "misclassified",
    "norms",
    "seeds",
    "share_pass",
]

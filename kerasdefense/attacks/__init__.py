"""Attacks: searches in a ball for images on which an objective is high."""

from __future__ import annotations

from kerasdefense import config
from kerasdefense.attacks import norms, seeds
from kerasdefense.attacks.apgd import APGD
from kerasdefense.attacks.base import Attack, AttackResult
from kerasdefense.attacks.cafa import CAFA
from kerasdefense.attacks.carlini_wagner import CarliniWagner
from kerasdefense.attacks.cleverhans import (
    CleverHansCWL2,
    CleverHansFGM,
    CleverHansMIM,
    CleverHansPGD,
    CleverHansSPSA,
)
from kerasdefense.attacks.corruptions import CORRUPTIONS
from kerasdefense.attacks.deepfool import DeepFool
from kerasdefense.attacks.fab import FAB
from kerasdefense.attacks.foolbox import FoolboxBoundary, FoolboxDDN, FoolboxHopSkipJump, has_foolbox
from kerasdefense.attacks.iterative import Iterative
from kerasdefense.attacks.joint import JointPGD, Pair
from kerasdefense.attacks.momentum import BIM, MIFGSM, TIDIM
from kerasdefense.attacks.noise import RandomNoise
from kerasdefense.attacks.objectives import (
    FEATURE_DISTANCE,
    OBJECTIVES,
    TARGETED,
    TO_CLASS,
    check_logits,
    hit_target,
    misclassified,
    ranked_targets,
    share_pass,
)
from kerasdefense.attacks.pgd import FGSM, FGSMRS, PGD
from kerasdefense.attacks.spatial import StAdv
from kerasdefense.attacks.square import Square
from kerasdefense.types import UsageError, look_up

ATTACKS: dict[str, type[Attack]] = {
    "apgd": APGD,
    "bim": BIM,
    "cafa": CAFA,
    "cleverhans_cw_l2": CleverHansCWL2,
    "cleverhans_fgm": CleverHansFGM,
    "cleverhans_mim": CleverHansMIM,
    "cleverhans_pgd": CleverHansPGD,
    "cleverhans_spsa": CleverHansSPSA,
    "cw_l2": CarliniWagner,
    "deepfool": DeepFool,
    "fab": FAB,
    "fgsm": FGSM,
    "fgsm_rs": FGSMRS,
    "foolbox_boundary": FoolboxBoundary,
    "foolbox_ddn": FoolboxDDN,
    "foolbox_hop_skip_jump": FoolboxHopSkipJump,
    "mi_fgsm": MIFGSM,
    "noise": RandomNoise,
    "pgd": PGD,
    "square": Square,
    "ti_dim": TIDIM,
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
        raise UsageError(f"--attack_name={attack.name} is defined by its random start; without one use pgd or fgsm")
    return kind(**settings)


__all__ = [
    "APGD",
    "ATTACKS",
    "BIM",
    "CAFA",
    "CORRUPTIONS",
    "FAB",
    "FEATURE_DISTANCE",
    "FGSM",
    "FGSMRS",
    "MIFGSM",
    "OBJECTIVES",
    "PGD",
    "TARGETED",
    "TIDIM",
    "TO_CLASS",
    "Attack",
    "AttackResult",
    "CarliniWagner",
    "DeepFool",
    "Iterative",
    "JointPGD",
    "Pair",
    "RandomNoise",
    "Square",
    "StAdv",
    "build",
    "check_logits",
    "has_foolbox",
    "hit_target",
    "misclassified",
    "norms",
    "ranked_targets",
    "seeds",
    "share_pass",
]

"""Suites: which attacks an evaluation runs, in order."""

from __future__ import annotations

from typing import Callable, NamedTuple

from kerasdefense.attacks import ATTACKS, FGSM, PGD, Attack


class PlannedAttack(NamedTuple):
    """An attack of a suite: the name it is reported under, the attack, and the objective it maximises.

    The objective is `cross_entropy` or `margin`, which need no more of an example than its label; an attack that takes
    logits has an objective of its own, named here for the report.
    """

    name: str
    attack: Attack
    objective: str = "cross_entropy"


def _quick(norm: str, epsilon: float) -> tuple[PlannedAttack, ...]:
    return (
        PlannedAttack("fgsm", FGSM(norm, epsilon)),
        PlannedAttack("pgd20", PGD(norm, epsilon, steps=20)),
    )


def _standard(norm: str, epsilon: float) -> tuple[PlannedAttack, ...]:
    return (
        *_quick(norm, epsilon),
        PlannedAttack("pgd50x5", PGD(norm, epsilon, steps=50, restarts=5)),
        PlannedAttack("pgd50_margin", PGD(norm, epsilon, steps=50), "margin"),
    )


def _cleverhans(norm: str, epsilon: float) -> tuple[PlannedAttack, ...]:
    names = ("cleverhans_fgm", "cleverhans_pgd", "cleverhans_mim") + (("cleverhans_cw_l2",) if norm == "l2" else ())
    return tuple(PlannedAttack(name, ATTACKS[name](norm=norm, epsilon=epsilon), "its own") for name in names)


SUITES: dict[str, Callable[[str, float], tuple[PlannedAttack, ...]]] = {
    "cleverhans": _cleverhans,
    "quick": _quick,
    "standard": _standard,
}

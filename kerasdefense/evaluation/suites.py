"""Suites: which attacks an evaluation runs, in order, and how."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Callable, NamedTuple

from kerasdefense.attacks import (
    APGD,
    ATTACKS,
    CAFA,
    FAB,
    FEATURE_DISTANCE,
    FGSM,
    PGD,
    Attack,
    CarliniWagner,
    FoolboxHopSkipJump,
    RandomNoise,
    Square,
    has_foolbox,
)
from kerasdefense.defenses.purifying import OBLIVIOUS
from kerasdefense.types import UsageError

SURROGATE = "surrogate:"
"""What the names of paths begin with that are not the model's own."""
AIDS = ("signed", "smoothed")
"""Families of paths that are there for attacks made for them: the absolute values of `signed` are the logits, and
`smoothed:<length>` are the logits with a gradient that is rounded off where those jump."""
EXACT = "exact"
"""The whole defended path."""
EOT_DRAWS = 20
AVERAGED, FEW, PROTOCOL = "averaged", "few", "protocol"
"""What a suite does on a model that draws at random: it runs its own attacks over mean losses, or gives its place to
few attacks for such models or to their whole protocol."""
TARGETS = 9
BLIND = ("square", "noise", "spsa", "hop_skip_jump")
"""Names of attacks that see no gradient of the model, and look on no surrogate."""
_SCALES = ("x10", "x50")
"""Scales of the logits, as the keys of OBJECTIVES have them, at which cross-entropy is attacked besides 1."""


class ThreatModel(NamedTuple):
    """What an attacker may do to an image: move it within a ball, inside the box [0, 1].

    `norm` is "linf" or "l2", `epsilon` the radius as a fraction of the [0, 1] range.
    """

    norm: str
    epsilon: float


class PlannedAttack(NamedTuple):
    """An attack of a suite.

    Attributes:
        name: what it is reported under.
        attack: the attack.
        objective: what it maximises, a key of OBJECTIVES; an attack that takes logits has an objective of its own,
            named here for the report.
        draws: passes whose loss and probabilities are averaged at each point, for models that draw at random.
        examples: how many images are attacked at most, from the first on; 0 = all. The others count as standing.
        transfer: whether it is aimed at surrogates, and only what it finds on them is tried on the model.
        path: the path that it is for, by its name or family; "" = every path but those of AIDS and surrogates.
        alone: whether it meets every image that is right clean, also in a cascade.
        replaces: what it stands in for, and why, where a suite's own attack cannot run on so few classes.
    """

    name: str
    attack: Attack
    objective: str = "cross_entropy"
    draws: int = 1
    examples: int = 0
    transfer: bool = False
    replaces: str = ""
    path: str = ""
    alone: bool = False

    def is_for(self, path: str) -> bool:
        """Return whether the attack is to be tried on the path of this name."""
        if path.startswith(SURROGATE):
            return self.transfer
        family = path.split(":")[0]
        families = (family,) if family in AIDS else ("", family)
        return not self.transfer and self.path in families


@dataclasses.dataclass(frozen=True)
class Suite:
    """Attacks and the way they are run.

    Attributes:
        plan: returns the attacks for a norm, a radius and a number of classes.
        cascade: whether an attack only meets images that stand after those before it; else each meets all that are
            right clean, which costs more and says how strong each is alone.
        checks: the items of the sanity battery that go with it.
        words: what the headline may be called.
        on_random: what becomes of it on a model that draws at random.
    """

    plan: Callable[[str, float, int], tuple[PlannedAttack, ...]]
    cascade: bool
    checks: tuple[str, ...]
    words: str
    on_random: str = PROTOCOL


def _quick(norm: str, epsilon: float, classes: int) -> tuple[PlannedAttack, ...]:
    return (
        PlannedAttack("fgsm", FGSM(norm, epsilon)),
        PlannedAttack("pgd20", PGD(norm, epsilon, steps=20)),
    )


def _standard(norm: str, epsilon: float, classes: int) -> tuple[PlannedAttack, ...]:
    return (
        *_quick(norm, epsilon, classes),
        PlannedAttack("pgd50x5", PGD(norm, epsilon, steps=50, restarts=5)),
        PlannedAttack("pgd50_margin", PGD(norm, epsilon, steps=50), "margin"),
    )


def _apgd_ce(norm: str, epsilon: float, *, restarts: int = 1, draws: int = 1) -> PlannedAttack:
    return PlannedAttack("apgd_ce", APGD(norm, epsilon, restarts=restarts), draws=draws)


def _apgd_dlr(norm: str, epsilon: float, classes: int, *, restarts: int = 1, draws: int = 1) -> PlannedAttack:
    attack = APGD(norm, epsilon, restarts=restarts)
    if classes >= 3:
        return PlannedAttack("apgd_dlr", attack, "dlr", draws)
    why = f"apgd_dlr: the DLR loss needs 3 classes, there are {classes}"
    return PlannedAttack("apgd_margin", attack, "margin", draws, replaces=why)


def _apgd_t(norm: str, epsilon: float, classes: int) -> PlannedAttack:
    attack = APGD(norm, epsilon, targets=min(TARGETS, classes - 1))
    if classes >= 4:
        return PlannedAttack("apgd_t", attack, "targeted_dlr")
    why = f"apgd_t: the targeted DLR loss needs 4 classes, there are {classes}"
    if classes == 3:
        return PlannedAttack("apgd_t_ce", attack, "targeted_cross_entropy", replaces=why)
    return PlannedAttack("apgd_margin", APGD(norm, epsilon), "margin", replaces=why)


def _fab_t(norm: str, epsilon: float, classes: int) -> PlannedAttack:
    return PlannedAttack("fab_t", FAB(norm, epsilon, targets=min(TARGETS, classes - 1)), "distance")


def _square(norm: str, epsilon: float, *, queries: int = 5000, draws: int = 1) -> PlannedAttack:
    return PlannedAttack("square", Square(norm, epsilon, queries=queries), "margin", draws)


def _autoattack(norm: str, epsilon: float, classes: int) -> tuple[PlannedAttack, ...]:
    return (
        _apgd_ce(norm, epsilon),
        _apgd_t(norm, epsilon, classes),
        _fab_t(norm, epsilon, classes),
        _square(norm, epsilon),
    )


def _plus(norm: str, epsilon: float, classes: int) -> tuple[PlannedAttack, ...]:
    return (
        _apgd_ce(norm, epsilon, restarts=5),
        _apgd_dlr(norm, epsilon, classes, restarts=5),
        PlannedAttack("fab", FAB(norm, epsilon, restarts=5), "distance"),
        _square(norm, epsilon),
        *_distinct(_apgd_t(norm, epsilon, classes), classes),
        _fab_t(norm, epsilon, classes),
    )


def _distinct(planned: PlannedAttack, classes: int) -> tuple[PlannedAttack, ...]:
    """Return the attack, unless another already stands in its place."""
    return (planned,) if classes > 2 else ()


def _rand(norm: str, epsilon: float, classes: int) -> tuple[PlannedAttack, ...]:
    return (
        _apgd_ce(norm, epsilon, draws=EOT_DRAWS),
        _apgd_dlr(norm, epsilon, classes, draws=EOT_DRAWS),
    )


def _cleverhans(norm: str, epsilon: float, classes: int) -> tuple[PlannedAttack, ...]:
    names = ("cleverhans_fgm", "cleverhans_pgd", "cleverhans_mim") + (("cleverhans_cw_l2",) if norm == "l2" else ())
    return tuple(PlannedAttack(name, ATTACKS[name](norm=norm, epsilon=epsilon), "its own") for name in names)


def _apgd_signed(norm: str, epsilon: float, classes: int) -> PlannedAttack:
    """Return APGD on signed scores, to both ends of the axis of each of the nine likeliest classes."""
    attack = APGD(norm, epsilon, targets=2 * min(TARGETS, classes - 1))
    return PlannedAttack("apgd_signed", attack, "signed_target", path="signed")


def _adaptive(norm: str, epsilon: float, classes: int) -> tuple[PlannedAttack, ...]:
    return (
        _apgd_ce(norm, epsilon, restarts=5),
        *(PlannedAttack(f"apgd_ce_{by}", APGD(norm, epsilon, restarts=5), f"cross_entropy_{by}") for by in _SCALES),
        _apgd_dlr(norm, epsilon, classes, restarts=5),
        *_distinct(_apgd_t(norm, epsilon, classes), classes),
        PlannedAttack("apgd_smoothed", APGD(norm, epsilon, restarts=2), "margin", path="smoothed"),
        _apgd_signed(norm, epsilon, classes),
        PlannedAttack("feature_matching", APGD(norm, epsilon, restarts=5), "feature_matching"),
        PlannedAttack("logit_matching", APGD(norm, epsilon, restarts=5), "logit_matching"),
        _fab_t(norm, epsilon, classes),
        *((PlannedAttack("cw_l2", CarliniWagner(norm, epsilon), "distance"),) if norm == "l2" else ()),
        _square(norm, epsilon),
        PlannedAttack("pgd1000x10_margin", PGD(norm, epsilon, steps=1000, restarts=10), "margin"),
        *_transfer(norm, epsilon),
    )


def _transfer(norm: str, epsilon: float) -> tuple[PlannedAttack, ...]:
    return (
        PlannedAttack("transfer_mi_fgsm", ATTACKS["mi_fgsm"](norm=norm, epsilon=epsilon), transfer=True),
        PlannedAttack("transfer_apgd_ce", APGD(norm, epsilon), transfer=True),
        PlannedAttack("transfer_apgd_margin", APGD(norm, epsilon), "margin", transfer=True),
    )


def _gap(norm: str, epsilon: float, classes: int) -> tuple[PlannedAttack, ...]:
    each_alone = (
        PlannedAttack("pgd20", PGD(norm, epsilon, steps=20)),
        PlannedAttack("pgd100", PGD(norm, epsilon, steps=100)),
        PlannedAttack("pgd100_margin", PGD(norm, epsilon, steps=100), "margin"),
        PlannedAttack("feature_matching", APGD(norm, epsilon), "feature_matching"),
        PlannedAttack("transfer_apgd_margin", APGD(norm, epsilon), "margin", transfer=True),
    )
    return (*(each._replace(alone=True) for each in each_alone), *_autoattack(norm, epsilon, classes))


def _purified(norm: str, epsilon: float, classes: int) -> tuple[PlannedAttack, ...]:
    each_alone = (
        PlannedAttack("pgd20", PGD(norm, epsilon, steps=20)),
        _apgd_ce(norm, epsilon),
        _apgd_t(norm, epsilon, classes),
        PlannedAttack("cafa", CAFA(norm, epsilon), FEATURE_DISTANCE, path=EXACT),
    )
    return (
        *(each._replace(alone=True) for each in each_alone),
        _fab_t(norm, epsilon, classes),
        _square(norm, epsilon)._replace(path=EXACT),  # the values of other paths are its own, or another model's
    )


def _ablation(norm: str, epsilon: float, classes: int) -> tuple[PlannedAttack, ...]:
    through = (
        PlannedAttack("pgd20", PGD(norm, epsilon, steps=20)),
        _apgd_ce(norm, epsilon),
        _apgd_t(norm, epsilon, classes),
    )
    planned = (
        *(each._replace(path=EXACT) for each in through),
        _apgd_ce(norm, epsilon)._replace(path=OBLIVIOUS),
    )
    return tuple(each._replace(alone=True) for each in planned)  # as on models that draw at random, in other rows


def _blackbox(norm: str, epsilon: float, classes: int) -> tuple[PlannedAttack, ...]:
    planned = [
        PlannedAttack("noise", ATTACKS["noise"](norm=norm, epsilon=epsilon), "margin"),
        *_transfer(norm, epsilon),
        _square(norm, epsilon),
    ]
    if norm == "linf":
        spsa = ATTACKS["cleverhans_spsa"](norm=norm, epsilon=epsilon)
        planned.append(PlannedAttack("spsa", spsa, "margin", examples=100))
    if has_foolbox():
        hop_skip_jump = ATTACKS["foolbox_hop_skip_jump"](norm=norm, epsilon=epsilon)
        planned.append(PlannedAttack("hop_skip_jump", hop_skip_jump, "decision", examples=100))
    return tuple(planned)


def blind(plan: Sequence[PlannedAttack], queries: int) -> tuple[PlannedAttack, ...]:
    """Return the attacks of a plan for a model that gives no gradient, without those that keep to no number of passes.

    Args:
        plan: the attacks.
        queries: passes that each may spend on an image. Those that transfer spend theirs on surrogates.

    Raises:
        UsageError: an attack needs a gradient of the model.
    """
    limited = []
    for planned in plan:
        attack = planned.attack
        if planned.transfer:
            limited.append(planned)
        elif isinstance(
            attack, Square
        ):  # one more pass than queries, the first; few of them ask for its whole schedule
            attack = dataclasses.replace(attack, queries=queries - 1, rescale=True)
            limited.append(planned._replace(attack=attack))
        elif isinstance(attack, RandomNoise):
            limited.append(planned._replace(attack=dataclasses.replace(attack, draws=min(attack.draws, queries))))
        elif isinstance(attack, FoolboxHopSkipJump):
            limited.append(planned._replace(attack=dataclasses.replace(attack, queries=queries)))
        elif planned.name not in BLIND:
            raise UsageError(f"{planned.name} needs a gradient, which this model does not give; use blackbox")
    return tuple(limited)


_QUICK_CHECKS = ("S1", "S3", "S5", "S6", "S10", "S11")
_STANDARD_CHECKS = (*_QUICK_CHECKS, "S2", "S4", "S7", "S8", "S9", "S14")
_AUTOATTACK_CHECKS = (*_STANDARD_CHECKS, "S12", "S13", "S15", "S17")
_NOT_AUTOATTACK = "not an AutoAttack result, true robustness is at most this"

SUITES: dict[str, Suite] = {
    "ablation": Suite(_ablation, True, _QUICK_CHECKS, f"few attacks, for ablations: {_NOT_AUTOATTACK}", FEW),
    "adaptive": Suite(
        _adaptive, True, (*_AUTOATTACK_CHECKS, "S16"), "AutoAttack's members with more restarts, and stronger attacks"
    ),
    "autoattack": Suite(_autoattack, True, _AUTOATTACK_CHECKS, "AutoAttack standard"),
    "blackbox": Suite(_blackbox, True, _QUICK_CHECKS, f"gradient-free and transferred attacks only, {_NOT_AUTOATTACK}"),
    "cleverhans": Suite(_cleverhans, False, _QUICK_CHECKS, _NOT_AUTOATTACK),
    "gap": Suite(
        _gap,
        True,
        _AUTOATTACK_CHECKS,
        "AutoAttack standard, besides PGD, margin, features and transfer, each alone",
    ),
    "plus": Suite(_plus, True, _AUTOATTACK_CHECKS, "AutoAttack plus"),
    "purified": Suite(
        _purified,
        True,
        _AUTOATTACK_CHECKS,
        "AutoAttack standard, besides PGD-20 and CAFA, through what purifies images and past it",
    ),
    "quick": Suite(_quick, False, _QUICK_CHECKS, _NOT_AUTOATTACK, AVERAGED),
    "rand": Suite(_rand, True, _AUTOATTACK_CHECKS, "AutoAttack rand"),
    "standard": Suite(_standard, False, _STANDARD_CHECKS, _NOT_AUTOATTACK),
}

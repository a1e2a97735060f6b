"""The sanity battery: an evaluation that tests itself, and the security curve that it needs.

Each item looks at one way in which a robust accuracy can be too high: an attack that did not converge, a gradient that
says nothing, a model that a blind search breaks more easily. Items S1 to S17 follow the check lists of Carlini et al.
2019, Croce & Hein 2020, Pintor et al. 2022 ("Indicators of attack failure") and Zimmermann et al. 2022. Thresholds are
at least two images.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Callable, Optional

import numpy as np

from kerasdefense.attacks import APGD, ATTACKS, FGSM, PGD, Square
from kerasdefense.evaluation.planted import planted_goals_found
from kerasdefense.evaluation.probes import (
    Radii,
    climb,
    dead_gradients,
    first_step,
    instability,
    swapped,
)
from kerasdefense.evaluation.report import accuracy_interval
from kerasdefense.evaluation.robustness import Measured
from kerasdefense.evaluation.suites import BLIND, EOT_DRAWS, SURROGATE, PlannedAttack

PASS, FAIL, NOT_RUN = "pass", "fail", "not_run"
_GRADIENT_FREE = ("S11", "S13", "S15")
"""Items that need no gradient of the model."""
REPORTED = ("S12", "S15")
"""Items that are reported and do not gate."""
LEVELS = (0, 1, 2, 4, 8, 16, 32, 64, 128, 255)
"""Radii of the security curve in linf, of 255."""
SHARES = (0, 0.125, 0.25, 0.5, 1, 2, 4, 8, 16, 64)
"""Radii of the security curve in l2, relative to the threat model's."""


@dataclasses.dataclass(frozen=True)
class Item:
    """One check: its number, what it asks, its verdict, what was measured and what it is held against."""

    id: str
    asks: str
    status: str
    value: Optional[float] = None
    threshold: Optional[float] = None
    detail: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Return the item as results.json holds it."""
        return {**dataclasses.asdict(self), "gates": self.id not in REPORTED}


def security_curve(radii: Radii) -> list[dict[str, Any]]:
    """Return accuracy by radius, `{epsilon, value, n, ci95}`, under APGD on two losses."""
    norm, epsilon = radii.subject.threat_model
    levels = [level / 255 for level in LEVELS] if norm == "linf" else [share * epsilon for share in SHARES]
    return [{"epsilon": radius, **accuracy_interval(radii.standing(radius))} for radius in sorted({*levels, epsilon})]


class Battery:
    """The items, each a method of its number, over what they share."""

    def __init__(self, radii: Radii, measured: Measured) -> None:
        subject = self.subject = radii.subject
        self.radii = radii
        self.measured = measured
        self.count = len(subject.chunk.label)
        self.clean = subject.exact.is_right(subject.chunk)
        self.standing = measured.outcomes.robust[: self.count]
        self.is_random = subject.options.is_randomised
        self.draws = EOT_DRAWS if self.is_random else 1

    def least(self, stated: float) -> float:
        """Return a threshold on shares of images: what is stated, but two images at least."""
        return max(stated, 2 / self.count)

    def errors(self, *accuracies: float, times: float = 2) -> float:
        """Return so many standard errors of the difference of accuracies on the images, two images at least."""
        return self.least(times * float(np.sqrt(sum(each * (1 - each) for each in accuracies) / self.count)))

    def at(self, radius: float) -> float:
        """Return the accuracy at a radius."""
        return float(self.radii.standing(radius).mean())

    def planned(self, kind: type, objective: str = "cross_entropy", **settings: Any) -> PlannedAttack:
        """Return an attack of the threat model."""
        return PlannedAttack(kind.__name__, self.subject.attack(kind, **settings), objective, self.draws)

    def s1(self) -> Item:
        """Check: radius zero."""
        slack = self.errors(self.clean.mean()) if self.is_random else 0.0
        gap = abs(self.at(0) - float(self.clean.mean()))
        return _judged("S1", "accuracy at radius 0 is the clean accuracy", gap, slack)

    def s2(self) -> Item:
        """Check: rising curve."""
        values = [point["value"] for point in security_curve(self.radii)]
        rise = max(float(np.max(np.diff(values))), 0.0)
        slack = self.errors(max(values)) if self.is_random else 1 / self.count
        return _judged("S2", "accuracy does not rise with the radius", rise, slack)

    def s3(self) -> Item:
        """Check: grey images."""
        if self.subject.threat_model.norm != "linf":
            return Item("S3", "accuracy at half the range is chance", NOT_RUN, detail="asked in linf only")
        chance = 1 / self.subject.classes
        limit = chance + 3 * float(np.sqrt(chance * (1 - chance) / self.count))
        return _judged(
            "S3", "accuracy at 128/255, where any image can be made grey, is chance", self.at(128 / 255), limit
        )

    def s4(self) -> Item:
        """Check: swapped images."""
        rows = np.flatnonzero(self.radii.standing(self.radii.unbounded))
        left = float(swapped(self.subject, rows).sum() / self.count) if rows.size else 0.0
        return _judged("S4", "nothing stands when any image may be swapped for any other", left, self.least(0))

    def s5(self) -> Item:
        """Check: order of attacks."""
        plan = [
            PlannedAttack("noise", self.subject.attack(ATTACKS["noise"], draws=100), "margin"),
            self.planned(FGSM),
            self.planned(PGD, steps=10),
            self.planned(PGD, steps=50),
        ]
        block = self.subject.attacked(plan)
        values, names = list(block.survived.mean(axis=0)), ["noise", "FGSM", "PGD-10", "PGD-50"]
        if not all(self._is_blind):  # a suite that sees no gradient may well be weaker than PGD
            values.append(self.standing.mean())
            names.append("the suite")
        detail = ", ".join(f"{name} {100 * value:.1f} %" for name, value in zip(names, values))
        asks = "a stronger attack leaves no higher accuracy: noise, FGSM, PGD-10, PGD-50, the suite"
        pairs = list(zip(values, values[1:]))
        rise, slack = max(
            (after - before - self.errors(before, after), self.errors(before, after)) for before, after in pairs
        )
        return _judged("S5", asks, max(rise + slack, 0.0), slack, detail)

    def s6(self) -> Item:
        """Check: label leaking."""
        after, clean = float(first_step(self.subject, self.planned(FGSM)).mean()), float(self.clean.mean())
        asks = "FGSM does not raise the accuracy (no label leaking, no catastrophic overfitting)"
        return _judged("S6", asks, after - clean, self.errors(after, clean))

    def s7(self) -> Item:
        """Check: twice the steps."""
        rows = np.flatnonzero(self.clean)
        if not rows.size:
            return Item("S7", "twice the steps change nothing", NOT_RUN, detail="no image is right clean")
        short, long = (climb(self.subject, self.planned(PGD, steps=steps), rows) for steps in (50, 100))
        drop = float((long.fell.sum() - short.fell.sum()) / self.count)
        stands = ~short.fell & ~long.fell  # the loss of what has fallen may grow without end
        ends = [each.loss[-1][stands].mean() if stands.any() else 1.0 for each in (short, long)]
        gain = float(ends[1] / max(ends[0], 1e-12) - 1)
        asks = "100 steps of PGD for 50 break at most 0.5 points more, and raise the loss of what stands by at most 2 %"
        detail = f"{100 * drop:+.2f} points, loss {100 * gain:+.2f} %"
        if drop > self.least(0.005):
            return Item("S7", asks, FAIL, drop, self.least(0.005), detail)
        return _judged("S7", asks, gain, 0.02, detail)

    def s8(self) -> Item:
        """Check: twice the restarts."""
        plan = [self.planned(PGD, steps=20, restarts=5)] * 2
        block = self.subject.attacked(plan, cascade=True)
        drop = float((~block.survived[:, 1] & block.clean).sum() / self.count)
        return _judged("S8", "10 restarts of PGD for 5 break at most 0.5 points more", drop, self.least(0.005))

    def s9(self) -> Item:
        """Check: blind search."""
        asks = "what sees no gradient breaks no image that gradients do not"
        by_blind = self._blind_only()
        if by_blind is None:
            rows = np.flatnonzero(self.standing & self.clean)
            if not rows.size:
                return _judged("S9", asks, 0.0, self.least(0.002), "nothing is left to break")
            left = dataclasses.replace(self.subject, chunk=self.subject.chunk.rows(rows))
            block = left.attacked([self.planned(Square, "margin", queries=1000, rescale=True)])
            won = int((block.clean & ~block.standing).sum())
            return _judged("S9", asks, won / self.count, self.least(0.002), "Square with 1,000 queries")
        won, total = int(by_blind.sum()), len(by_blind)
        return _judged("S9", asks, won / total, max(0.002, 2 / total), "by the suite's own attacks")

    def s10(self) -> Item:
        """Check: dead gradients."""
        dead = dead_gradients(self.subject)
        return _judged("S10", "no input gradient is all zero or not finite", dead, self.least(0))

    def s11(self) -> Item:
        """Check: silent success."""
        asks = "no attack passed by an image that fools and returned one that does not"
        own = [
            number
            for number, search in enumerate(self.measured.searches)
            if search.path_name == "exact" and search.is_iterative
        ]
        if self.is_random or not own:
            why = "a random model may answer otherwise each time" if self.is_random else "no attack keeps its iterates"
            return Item("S11", asks, NOT_RUN, detail=why)
        total = len(self.measured.outcomes.clean)
        share = float(self.measured.outcomes.unconfirmed[own].max() / total)
        # Rounding may tell an image on the very boundary otherwise in a batch of another size.
        return _judged("S11", asks, share, 2 / total)

    def s12(self) -> Item:
        """Check: incomplete search."""
        if not self.clean.any():
            return Item("S12", "the loss has converged", NOT_RUN, detail="no image is right clean")
        loss = climb(self.subject, self.planned(APGD, steps=50), np.flatnonzero(self.clean)).loss
        scaled = (loss - loss[0]) / np.maximum(loss[-1] - loss[0], 1e-12)
        share = float(np.mean(scaled[-1] - scaled[-11] > 0.05))
        asks = "share of images whose loss still rises by over 5 % in the last 10 of 50 steps of APGD (reported)"
        return Item("S12", asks, PASS if share <= 0.05 else FAIL, share, 0.05)

    def s13(self) -> Item:
        """Check: unstable predictions."""
        asks = "the mean margin changes by at most 10 % under small noise"
        return _judged("S13", asks, instability(self.subject), 0.1)

    def s14(self) -> Item:
        """Check: unbounded radius."""
        left = self.at(self.radii.unbounded)
        return _judged("S14", "an unbounded gradient attack breaks every image", left, self.least(0))

    def s15(self) -> Item:
        """Check: black box within white box."""
        asks = "images that only a blind search breaks (reported)"
        by_blind = self._blind_only()
        if by_blind is None:
            return Item("S15", asks, NOT_RUN, detail="the suite has no such attack")
        exceptions = self.measured.outcomes.index[by_blind]
        return Item("S15", asks, FAIL if exceptions.size else PASS, float(exceptions.size), 0.0, _listed(exceptions))

    def s16(self) -> Item:
        """Check: planted goals."""
        asks = "PGD finds 95 % of the adversarial points that were planted for it"
        found = planted_goals_found(self.subject)
        if found is None:
            return Item("S16", asks, NOT_RUN, detail="no point could be planted")
        return Item("S16", asks, PASS if found >= 0.95 else FAIL, found, 0.95)

    def s17(self) -> Item:
        """Check: exact gradients."""
        asks = "exact gradients are no weaker than the identity in their place (BPDA)"
        if "bpda_identity" not in self.subject.attack_paths:
            return Item("S17", asks, NOT_RUN, detail="the model names no path bpda_identity")
        plan = [self.planned(PGD, steps=20)]
        exact, identity = (
            float(self.subject.attacked(plan, path=path).standing.mean()) for path in ("exact", "bpda_identity")
        )
        return _judged("S17", asks, exact - identity, self.errors(exact, identity))

    @property
    def _is_blind(self) -> list[bool]:
        """Whether each search sees no gradient of the model."""
        searches = self.measured.searches
        return [search.path_name.startswith(SURROGATE) or search.planned.name in BLIND for search in searches]

    def _blind_only(self) -> Optional[np.ndarray]:
        """Return which images only attacks without the model's gradients broke, bool [n]; None if there were none."""
        outcomes, blind = self.measured.outcomes, self._is_blind
        if not any(blind) or all(blind):
            return None
        seeing = outcomes.survived[:, ~np.array(blind)].all(axis=1)
        return outcomes.clean & seeing & ~outcomes.survived[:, np.array(blind)].all(axis=1)


def battery(
    radii: Radii, asked: Sequence[str], measured: Measured, *, has_gradient: bool = True
) -> list[dict[str, Any]]:
    """Return all items of the battery; those that are not asked have the status `not_run`.

    Args:
        radii: the images on which items are measured, at any radius.
        asked: ids of the items to run.
        measured: the outcomes of the suite, of which those images are the first.
        has_gradient: whether the model gives one; without it, items that need one have that status too.
    """
    run = Battery(radii, measured)
    methods: dict[str, Callable[[], Item]] = {f"S{number}": getattr(run, f"s{number}") for number in range(1, 18)}
    items = []
    for name, method in methods.items():
        words = (method.__doc__ or "").removeprefix("Check: ").rstrip(".")
        if name not in asked:
            item = Item(name, words, NOT_RUN, detail="not part of the suite")
        elif not has_gradient and name not in _GRADIENT_FREE:
            item = Item(name, words, NOT_RUN, detail="the model gives no gradient")
        else:
            item = method()
        items.append(item.to_dict())
    return items


def _judged(name: str, asks: str, value: float, threshold: float, detail: str = "") -> Item:
    """Return an item that passes where a value is at most a threshold."""
    return Item(name, asks, PASS if value <= threshold + 1e-9 else FAIL, float(value), float(threshold), detail)


def _listed(index: np.ndarray) -> str:
    shown = ", ".join(map(str, index[:10]))
    return f"images {shown}{' ...' if len(index) > 10 else ''}" if len(index) else ""

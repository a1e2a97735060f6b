from __future__ import annotations

import numpy as np

from kerasdefense.attacks import CORRUPTIONS, PGD
from kerasdefense.evaluation import Options, PlannedAttack, ThreatModel, evaluate, unseen_lines

THREAT = ThreatModel("linf", 0.1)
SUITE = [PlannedAttack("pgd", PGD(*THREAT, steps=2))]


def test_what_lies_outside_the_ball_is_measured_on_request_and_counts_for_nothing(digits_classifier):
    settings = {"options": Options(examples=24), "sanity_examples": 24, "is_randomised": False}
    given = ({"exact": digits_classifier.path}, digits_classifier.batches(), THREAT, SUITE)
    plain, more = evaluate(*given, **settings), evaluate(*given, **settings, look_outside=True)
    assert plain["unseen"] is None and unseen_lines(plain) == []
    assert plain["robust_accuracy"] == more["robust_accuracy"]
    found = more["unseen"]
    assert set(found["corruptions"]) == set(CORRUPTIONS) - {"saturate"}  # digits have no colour
    values = [each["value"] for by_severity in found["corruptions"].values() for each in by_severity.values()]
    assert found["mean_corrupted"] == np.mean(values) and found["st_adv"]["n"] == 24
    assert found["st_adv"]["value"] < plain["clean_accuracy"]["value"]
    (line,) = unseen_lines(more)
    assert line.startswith("outside the ball (n = 24, not part of the robust accuracy): corrupted images")

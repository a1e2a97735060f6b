from __future__ import annotations

import pytest

from kerasdefense.attacks import ATTACKS, OBJECTIVES, PGD, norms
from kerasdefense.evaluation import SUITES, PlannedAttack
from kerasdefense.evaluation.search import Search
from kerasdefense.types import UsageError


@pytest.mark.parametrize("norm", norms.NORMS)
@pytest.mark.parametrize("name", SUITES)
def test_suite_has_one_threat_model_and_known_parts(name, norm):
    suite = SUITES[name](norm, 0.07)
    assert suite and len({planned.name for planned in suite}) == len(suite)
    for planned in suite:
        assert type(planned.attack) in ATTACKS.values()
        assert (planned.objective in OBJECTIVES) == (planned.attack.takes == "loss")
        assert (planned.attack.norm, planned.attack.epsilon) == (norm, 0.07)


def test_standard_suite_holds_pgd50_with_five_restarts_and_a_second_loss():
    suite = {planned.name: planned for planned in SUITES["standard"]("linf", 0.1)}
    attack = suite["pgd50x5"].attack
    assert (attack.steps, attack.restarts, attack.random_start, attack.keep) == (50, 5, True, "best")
    assert {planned.objective for planned in suite.values()} == {"cross_entropy", "margin"}
    assert set(SUITES["quick"]("linf", 0.1)) <= set(suite.values())


@pytest.mark.parametrize("objective", ["kl_divergence", "targeted_cross_entropy"])
def test_search_refuses_an_objective_that_needs_more_than_a_label(objective):
    planned = PlannedAttack("mine", PGD(epsilon=0.1), objective)
    with pytest.raises(UsageError, match="must maximise cross_entropy or margin"):
        Search(planned, "exact", lambda image, seed: image, stream=0, seed=0, chunk_size=4)

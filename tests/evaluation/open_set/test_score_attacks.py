"""Attacks on anomaly scores: they never help the one who defends, and they do what they are for."""

import numpy as np
import pytest
import tensorflow as tf

from kerasdefense.attacks import APGD, JointPGD, Square, norms
from kerasdefense.detectors import DETECTORS, Detector
from kerasdefense.evaluation.open_set import metrics
from kerasdefense.evaluation.open_set.score_attacks import Target, fool_unnoticed, move_scores
from kerasdefense.evaluation.open_set.scoring import Scorer
from kerasdefense.evaluation.search import Chunk

EPSILON, COUNT = 0.1, 20


def target_of(name, digits, **settings):
    detector = digits.fitted(name)
    scorer = Scorer(digits.loaded.activations, {name: detector})
    return Target(name, detector, digits.loaded.activations, scorer, chunk_size=16, **settings)


def together(digits, count=COUNT):
    rows = np.arange(count)
    known, unknown = digits.known.rows(rows), digits.unknown.rows(rows)
    joined = [np.concatenate([getattr(known, key), getattr(unknown, key)]) for key in ("image", "label", "index")]
    return Chunk(*joined), np.repeat([1.0, -1.0], count)


@pytest.mark.parametrize("name", sorted(DETECTORS))
def test_attacked_scores_move_against_the_defender(name, open_digits):
    """evaluation 13: attacked unknown <= clean, attacked known >= clean, AUROC(both) <= AUROC(one) <= AUROC(clean)."""
    target = target_of(name, open_digits)
    chunk, sign = together(open_digits)
    clean = target.scorer.of_chunk(chunk).score[name]
    moved = move_scores(target, chunk, sign, (APGD(epsilon=EPSILON, steps=8),))
    assert (sign * moved.score >= sign * clean).all()
    assert (sign * (moved.score - clean) > 0).mean() > 0.9  # it does move
    np.testing.assert_array_equal(
        target.scorer.of_chunk(Chunk(moved.image, chunk.label, chunk.index)).score[name], moved.score
    )
    distance = norms.length(tf.constant(moved.image - chunk.image), "linf").numpy()
    assert (distance <= EPSILON * (1 + 1e-5) + 1e-7).all() and moved.image.min() >= 0 and moved.image.max() <= 1
    known, unknown, known_adv, unknown_adv = clean[:COUNT], clean[COUNT:], moved.score[:COUNT], moved.score[COUNT:]
    one = metrics.auroc(known_adv, unknown), metrics.auroc(known, unknown_adv)
    assert metrics.auroc(known_adv, unknown_adv) <= min(one) <= max(one) <= metrics.auroc(known, unknown)
    assert metrics.auroc(known_adv, unknown_adv) < metrics.auroc(known, unknown) - 0.1


def test_score_attack_at_radius_zero_changes_nothing(open_digits):
    target = target_of("energy", open_digits)
    chunk, sign = together(open_digits, 5)
    moved = move_scores(target, chunk, sign, (APGD(epsilon=0.0, steps=3),))
    np.testing.assert_array_equal(moved.image, chunk.image)
    np.testing.assert_array_equal(moved.score, target.scorer.of_chunk(chunk).score["energy"])


def test_score_attack_does_not_depend_on_the_chunk(open_digits):
    chunk, sign = together(open_digits, 10)
    attacks = (APGD(epsilon=EPSILON, steps=6, restarts=2), Square(epsilon=EPSILON, queries=20))
    small, large = (
        move_scores(target_of("mahalanobis", open_digits)._replace(chunk_size=size), chunk, sign, attacks)
        for size in (7, 64)
    )
    np.testing.assert_allclose(small.score, large.score, rtol=1e-3)


def test_more_starts_and_square_never_leave_the_attack_weaker(open_digits):
    target = target_of("vim", open_digits)
    chunk, sign = together(open_digits, 10)
    once = move_scores(target, chunk, sign, (APGD(epsilon=EPSILON, steps=6),))
    thrice = move_scores(target, chunk, sign, (APGD(epsilon=EPSILON, steps=6, restarts=3),))
    with_square = move_scores(
        target, chunk, sign, (APGD(epsilon=EPSILON, steps=6), Square(epsilon=EPSILON, queries=40))
    )
    for more in (thrice, with_square):
        assert (sign * more.score >= sign * once.score).all()


class Flat(Detector):
    """A score in steps, whose gradient is zero, with a smooth stand-in."""

    def __init__(self, with_stand_in):
        super().__init__()
        self.with_stand_in = with_stand_in

    def _score(self, activations):
        return tf.round(-4 * tf.reduce_max(activations["logits"], axis=-1)) / 4

    def _stand_ins(self):
        smooth = {"smooth": lambda activations: -tf.reduce_max(activations["logits"], axis=-1)}
        return smooth if self.with_stand_in else {}


def test_stand_in_moves_a_score_that_has_no_gradient(open_digits):
    chunk, sign = together(open_digits, 10)
    found = {}
    for with_stand_in in (False, True):
        detector = Flat(with_stand_in)
        scorer = Scorer(open_digits.loaded.activations, {"flat": detector})
        target = Target("flat", detector, open_digits.loaded.activations, scorer)
        found[with_stand_in] = move_scores(target, chunk, sign, (APGD(epsilon=EPSILON, steps=8),)).score
    assert (sign * found[True] >= sign * found[False]).all()
    assert (sign * found[True]).sum() > (sign * found[False]).sum() + 1


def test_joint_attack_finds_images_that_are_mistaken_and_accepted(open_digits):
    name = "max_logit"
    target = target_of(name, open_digits)
    chunk = open_digits.known.rows(np.arange(COUNT))
    clean = target.scorer.of_chunk(chunk)
    attack = JointPGD(epsilon=0.25, steps=25)
    lowest = fool_unnoticed(target, chunk, (attack,))
    wrong = np.isfinite(lowest)
    assert wrong.mean() > 0.5
    assert (lowest[~clean.right] <= clean.score[name][~clean.right]).all()
    # Following the classifier's loss alone fools as well, but at higher scores.
    alone = fool_unnoticed(target, chunk, (JointPGD(epsilon=0.25, steps=25, slack=1e6),))
    both = wrong & np.isfinite(alone)
    assert lowest[both].mean() < alone[both].mean()
    more = fool_unnoticed(target, chunk, (attack, JointPGD(epsilon=0.25, steps=25, orthogonal=False)))
    assert (more <= lowest).all()


def test_joint_attack_without_room_finds_nothing(open_digits):
    target = target_of("energy", open_digits)
    chunk = open_digits.known.rows(np.flatnonzero(target.scorer.of_chunk(open_digits.known).right)[:4])
    assert np.isinf(fool_unnoticed(target, chunk, (JointPGD(epsilon=1e-6, steps=2),))).all()

"""cleverhans as an independent reference for our attacks, and our adapter to it."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf

from kerasdefense import losses
from kerasdefense.attacks import ATTACKS, FGSM, OBJECTIVES, PGD, norms, seeds
from kerasdefense.attacks.cleverhans import CleverHansAttack, CleverHansFGM, CleverHansPGD
from kerasdefense.types import UsageError

EPSILON = {"linf": 0.1, "l2": 0.6}


@pytest.fixture(scope="session")
def seed(trained):
    return seeds.per_example(0, 0, tf.range(len(trained.label)))


def ours(attack, trained, seed):
    return attack(OBJECTIVES["cross_entropy"](trained.logits_fn), trained.image, {"label": trained.label}, seed)


def theirs(attack, trained, seed):
    return attack(trained.logits_fn, trained.image, trained.label, seed)


def accuracy(trained, image):
    return np.mean(tf.argmax(trained.logits_fn(image), axis=1, output_type=tf.int32) == trained.label)


@pytest.mark.parametrize("norm", norms.NORMS)
def test_fgsm_equals_cleverhans(norm, trained, seed):
    reference = theirs(CleverHansFGM(norm, EPSILON[norm]), trained, seed)
    found = ours(FGSM(norm, EPSILON[norm]), trained, seed)
    np.testing.assert_allclose(found.image, reference.image, rtol=0, atol=1e-5)
    np.testing.assert_allclose(found.loss, reference.loss, rtol=1e-4, atol=1e-5)
    assert len(trained.label) > 100 and accuracy(trained, found.image) < 0.9


@pytest.mark.parametrize("norm", norms.NORMS)
def test_pgd_without_random_start_is_at_least_as_strong_as_cleverhans_on_every_image(norm, trained, seed):
    reference = theirs(CleverHansPGD(norm, EPSILON[norm], steps=8, random_start=False), trained, seed)
    found = ours(PGD(norm, EPSILON[norm], steps=8, random_start=False), trained, seed)
    assert (found.loss.numpy() >= reference.loss.numpy() - 1e-3).all()
    assert accuracy(trained, found.image) <= accuracy(trained, reference.image)


@pytest.mark.parametrize("norm", norms.NORMS)
def test_pgd_is_at_least_as_strong_as_cleverhans(norm, trained, seed):
    reference = theirs(CleverHansPGD(norm, EPSILON[norm], steps=8), trained, seed)
    found = ours(PGD(norm, EPSILON[norm], steps=8), trained, seed)
    # The random starts differ, and with them the mean by some tenths of a per cent.
    assert np.mean(found.loss) >= 0.995 * np.mean(reference.loss)
    assert accuracy(trained, found.image) <= accuracy(trained, reference.image) < 0.7


@pytest.mark.parametrize("norm", norms.NORMS)
def test_pgd_is_at_least_as_strong_as_the_momentum_method(norm, trained, seed):
    reference = theirs(ATTACKS["cleverhans_mim"](norm=norm, epsilon=EPSILON[norm], steps=8), trained, seed)
    found = ours(PGD(norm, EPSILON[norm], steps=8), trained, seed)
    assert np.mean(reference.loss) > np.mean(losses.cross_entropy(trained.logits_fn(trained.image), trained.label))
    assert np.mean(found.loss) >= 0.98 * np.mean(reference.loss)


def test_carlini_wagner_finds_perturbations_smaller_than_epsilon(trained, seed):
    image, label = trained.image[:32], trained.label[:32]
    result = ATTACKS["cleverhans_cw_l2"](epsilon=1.5, steps=60)(trained.logits_fn, image, label, seed[:32])
    length = norms.length(result.image - image, "l2").numpy()
    success = result.success.numpy()
    assert success.mean() > 0.5
    assert np.median(length[success]) < 0.75
    np.testing.assert_array_equal(length[~success], 0)


def test_carlini_wagner_gives_back_what_it_moved_out_of_the_ball(trained, seed):
    image, label = trained.image[:8], trained.label[:8]
    result = ATTACKS["cleverhans_cw_l2"](epsilon=1e-3, steps=20)(trained.logits_fn, image, label, seed[:8])
    np.testing.assert_allclose(result.image, image, rtol=0, atol=1e-3)
    assert not result.success.numpy().any()


def test_spsa_raises_the_margin_without_gradients(trained, seed):
    image, label = trained.image[:2], trained.label[:2]

    def without_gradient(each):
        return tf.stop_gradient(trained.logits_fn(each))

    result = ATTACKS["cleverhans_spsa"](epsilon=0.15, steps=8)(without_gradient, image, label, seed[:2])
    before = losses.margin(trained.logits_fn(image), label).numpy()
    after = losses.margin(trained.logits_fn(result.image), label).numpy()
    assert (after > before + 0.2).all()


def test_adapter_repeats_itself_from_equal_seeds(trained, seed):
    attack = CleverHansPGD("linf", 0.1, steps=1)
    first, again, other = (theirs(attack, trained, each).image for each in (seed, seed, seed + 1))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


@pytest.mark.parametrize(
    "name, settings, message",
    [
        ("cleverhans_cw_l2", {"norm": "linf"}, "CleverHansCWL2 attacks in the l2 norm only, not linf"),
        ("cleverhans_spsa", {"norm": "l2"}, "CleverHansSPSA attacks in the linf norm only, not l2"),
        ("cleverhans_pgd", {"steps": 0}, "steps must be at least 1, not 0"),
        ("cleverhans_fgm", {"epsilon": -1}, "epsilon must be a finite number of at least 0, not -1"),
        ("cleverhans_mim", {"norm": "l0"}, "unknown norm 'l0'; valid: linf, l2"),
    ],
)
def test_adapter_refuses_illegal_settings(name, settings, message):
    with pytest.raises(UsageError, match=message):
        ATTACKS[name](**settings)


def test_adapter_without_an_attack_is_refused(trained, seed):
    with pytest.raises(UsageError, match="use one of the cleverhans attacks"):
        theirs(CleverHansAttack(), trained, seed)

"""AToP: the claims E1 to E6 of its specification, on the bundled digits; pytest -m slow -s prints the figures.

Accuracies are those of the mean over fresh draws; differences are of the same images, and count where they exceed two
standard errors.
"""

from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf

from kerasdefense import backbones, config, data
from kerasdefense.attacks import FGSM, FGSMRS, PGD, seeds
from kerasdefense.defenses import AToP, Standard
from kerasdefense.evaluation import Options, PlannedAttack
from kerasdefense.evaluation.robustness import measure

pytestmark = pytest.mark.slow
EPSILON, COUNT, DRAWS, CHANCE = 0.15, 256, 8, 0.1
TRAINING_ATTACK = FGSMRS(epsilon=EPSILON)


@pytest.fixture(scope="session")
def digits(tmp_path_factory):
    return data.load(config.Data(dir=str(tmp_path_factory.mktemp("digits")), validation_fraction=0.15))


@pytest.fixture(scope="session")
def tested(digits):
    """Return the test images that are attacked."""
    return {name: each.numpy() for name, each in next(iter(digits.test.batches(COUNT))).items()}


def batches(digits):
    batch = next(iter(digits.train.batches(digits.train.examples)))
    return tf.data.Dataset.from_tensor_slices(batch).shuffle(2000, seed=0).batch(64)


def natural(digits, width, seed):
    """Return a classifier trained on clean images."""
    keras.utils.set_random_seed(seed)
    backbone = backbones.build(config.Backbone(name="small_cnn", width=width), image_shape=(8, 8, 1), classes=10)
    defense = Standard(backbone, attack=TRAINING_ATTACK)
    defense.compile(keras.optimizers.Adam(0.005))
    defense.fit(batches(digits), epochs=8, verbose=0)
    return defense.backbone


def atop(classifier, purifier, **settings):
    return AToP(classifier, purifier=purifier, attack=TRAINING_ATTACK, **{"lam_gan": 0.0, **settings})


def trained(defense, digits, epochs, learning_rate):
    defense.compile(keras.optimizers.Adam(learning_rate))
    defense.fit(batches(digits), epochs=epochs, verbose=0)
    return defense


@pytest.fixture(scope="session")
def classifiers(digits):
    return [natural(digits, width, seed) for width, seed in ((8, 1), (12, 2))]


@pytest.fixture(scope="session")
def before(digits, classifiers):
    """Return the defense with a purifier that was pre-trained only."""
    keras.utils.set_random_seed(3)
    purifier = backbones.build_purifier("gated_unet", (8, 8, 1), width=8)
    trained(atop(classifiers[0], purifier, lam_ce=0.0), digits, 25, 0.005)
    return atop(classifiers[0], purifier)


@pytest.fixture(scope="session")
def after(digits, classifiers, before):
    """Return the defense with the same purifier, tuned through the classifier under attack."""
    purifier = type(before.purifier).from_config(before.purifier.get_config())
    purifier.set_weights(before.purifier.get_weights())
    return trained(atop(classifiers[0], purifier), digits, 15, 0.002)


def pgd(epsilon=EPSILON, draws=DRAWS, path="exact"):
    return PlannedAttack("pgd", PGD(epsilon=epsilon, steps=10), draws=draws, path=path)


def standing(paths, tested, plan, is_randomised=True):
    """Return which images stand under each attack, bool [attacks, images], scored on the exact path."""
    options = Options(chunk_size=COUNT * DRAWS, is_randomised=is_randomised)
    found = measure(paths, tf.data.Dataset.from_tensors(tested), plan, options).outcomes
    return (found.clean[:, None] & found.survived).T


@pytest.fixture(scope="session")
def outcomes(before, after, tested):
    """Return by name which images stand."""
    radii = {f"{share} epsilon": pgd(share * EPSILON) for share in (0.5, 2)}
    plan = {
        "eot": pgd(),
        "one draw": pgd(draws=1),
        "bpda": pgd(path="bpda_identity"),
        "transfer": pgd(draws=1, path="oblivious"),
        "fgsm": PlannedAttack("fgsm", FGSM(epsilon=EPSILON), path="exact"),
        "fgsm, transfer": PlannedAttack("fgsm", FGSM(epsilon=EPSILON), path="oblivious"),
        "128/255": pgd(128 / 255),
        **radii,
    }
    paths = after.attack_paths()
    fixed = paths.pop("fixed_noise")
    found = dict(zip(plan, standing(paths, tested, list(plan.values()))))
    (found["fixed noise"],) = standing({"exact": fixed}, tested, [pgd(draws=1)], is_randomised=False)
    (found["before"],) = standing({"exact": before.attack_paths()["exact"]}, tested, [pgd()])
    print("\nstanding:", {name: round(float(np.mean(each)), 3) for name, each in found.items()})
    return found


def rights(defense, image, label, draws=10):
    """Return the share of draws in which each image is right."""
    answer = tf.function(defense)
    index = tf.range(len(label))
    found = [np.argmax(answer(image, seed=seeds.per_example(0, draw, index)), axis=1) for draw in range(draws)]
    return np.mean(np.array(found) == label, axis=0)


def two_errors(*values):
    """Return two standard errors of the mean difference of values of the same images, or of the mean of one."""
    difference = np.subtract(*np.array(values, np.float64)) if len(values) > 1 else np.array(values[0], np.float64)
    return 2 * difference.std() / np.sqrt(len(difference))


def assert_no_more_stand(stronger, weaker):
    assert np.mean(stronger) <= np.mean(weaker) + two_errors(stronger, weaker)


# AToP E1: tuning raises accuracy under PGD with EOT, transform and classifier the same
def test_tuning_raises_accuracy_under_attacks_that_average(outcomes):
    gain = np.mean(outcomes["eot"]) - np.mean(outcomes["before"])
    error = two_errors(outcomes["eot"], outcomes["before"])
    print(f"\nE1: gain {gain:.3f} +- {error:.3f}")
    assert gain > error


# AToP E2: and does not cost clean accuracy
def test_tuning_does_not_cost_clean_accuracy(before, after, tested):
    old, new = (rights(each, tested["image"], tested["label"]) for each in (before, after))
    print(f"\nE2: clean {old.mean():.3f} before, {new.mean():.3f} after, +- {two_errors(new, old):.3f}")
    assert new.mean() >= old.mean() - 0.01


# AToP E3: accuracy falls with the radius, to chance and to nothing
def test_accuracy_falls_with_the_radius_to_nothing(after, outcomes, tested):
    clean = rights(after, tested["image"], tested["label"])
    falling = [clean, *(outcomes[name] for name in ("0.5 epsilon", "eot", "2 epsilon", "128/255"))]
    print("\nE3: clean and at 0.5, 1 and 2 epsilon and 128/255:", [round(float(np.mean(each)), 3) for each in falling])
    for weaker, stronger in zip(falling, falling[1:]):
        assert_no_more_stand(stronger, weaker)
    assert np.mean(falling[-1]) <= CHANCE
    is_left = np.ones(COUNT, bool)
    for shift in range(1, 9):  # at a radius of 1 any image may be swapped for any other
        is_left &= rights(after, np.roll(tested["image"], shift, axis=0), tested["label"], draws=1) == 1
    assert not is_left.any()


# AToP E4: averages, true gradients and noise that is held fixed make attacks no weaker
def test_attacks_that_know_more_are_at_least_as_strong(outcomes):
    for stronger, weaker in (("eot", "one draw"), ("eot", "bpda"), ("fixed noise", "eot")):
        difference = np.mean(outcomes[weaker]) - np.mean(outcomes[stronger])
        error = two_errors(outcomes[weaker], outcomes[stronger])
        print(f"\nE4: {stronger} breaks {difference:.3f} +- {error:.3f} more than {weaker}")
        assert_no_more_stand(outcomes[stronger], outcomes[weaker])


# AToP E5: attacks on the whole are no weaker than those that know of the classifier alone
def test_attacks_on_the_whole_are_at_least_as_strong_as_transfer(outcomes):
    fgsm = np.mean(outcomes["fgsm, transfer"]) - np.mean(outcomes["fgsm"])
    gap = np.mean(outcomes["transfer"]) - np.mean(outcomes["eot"])
    print(f"\nE5: on the whole FGSM breaks {fgsm:.3f}, PGD with EOT {gap:.3f} more than what transfers")
    if fgsm < 0:
        print("E5: the anomaly of gradients of one draw: FGSM on the whole is weaker than what transfers")
    assert_no_more_stand(outcomes["eot"], outcomes["transfer"])


# AToP E6: what is tuned through one classifier serves another; of interest, and no condition
def test_share_of_the_gain_before_another_classifier(before, after, classifiers, outcomes, tested):
    found = []
    for defense in (before, after):
        other = atop(classifiers[1], defense.purifier)
        found += list(standing({"exact": other.attack_paths()["exact"]}, tested, [pgd()]))
    gain, own = np.mean(found[1]) - np.mean(found[0]), np.mean(outcomes["eot"]) - np.mean(outcomes["before"])
    print(
        f"\nE6: {np.mean(found[0]):.3f} before, {np.mean(found[1]):.3f} after: {gain / max(own, 1e-6):.0%} of the gain"
    )

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import tensorflow as tf

from kerasdefense import evaluation
from kerasdefense.attacks import ATTACKS, FGSM, PGD, Attack, AttackResult, norms
from kerasdefense.evaluation import SUITES, Options, PlannedAttack, ThreatModel
from kerasdefense.evaluation.pool import Pool
from kerasdefense.evaluation.search import Chunk, ExactPath, Search
from kerasdefense.evaluation.suites import Suite
from kerasdefense.types import InputError, UsageError

CLASSES, SHIFT = 4, 0.2


def make_batches(image, label, *, batch_size=4, first_index=0):
    index = first_index + np.arange(len(label), dtype=np.int32)
    elements = {"image": np.float32(image), "label": np.int32(label), "index": index}
    return tf.data.Dataset.from_tensor_slices(elements).batch(batch_size)


def evaluate(paths, batches, suite, *, save=None, is_randomised=False, **options):
    """Evaluate under the suite's own threat model, without the sanity battery."""
    threat_model = ThreatModel(suite[0].attack.norm, suite[0].attack.epsilon) if suite else ThreatModel("linf", 0.1)
    settings = {"options": Options(**options), "is_randomised": is_randomised, "sanity_examples": 0, "save": save}
    return evaluation.evaluate(paths, batches, threat_model, suite, **settings)


def accuracies(results):
    return [
        (attack["name"], attack["path"], attack["accuracy"], attack["cascaded_accuracy"])
        for attack in results["attacks"]
    ]


# A classifier and attacks with known outcomes: pixel (0, 0) of an image says its class, pixel (0, 1) its number.


def coded_images(label):
    image = np.full([len(label), 8, 8, 1], 0.5, np.float32)
    image[:, 0, 0, 0] = SHIFT * np.float32(label)
    image[:, 0, 1, 0] = np.arange(len(label)) / 100
    return image


def read_class(image, seed):
    """Return logits that are highest at the class that pixel (0, 0) says."""
    return -tf.square(image[:, 0, 0] / SHIFT - tf.range(CLASSES, dtype=tf.float32))


@dataclasses.dataclass(frozen=True)
class Scripted(Attack):
    """Moves the images of given numbers to another class, leaves the others, and keeps account of whom it met."""

    takes = "logits"
    restarts = 1

    epsilon: float = SHIFT
    moves: tuple[int, ...] = ()
    met: list = dataclasses.field(default_factory=list, compare=False)

    def __call__(self, logits_fn, image, label, seed):
        number = np.rint(image[:, 0, 1, 0].numpy() * 100).astype(int)
        self.met.extend(number)
        found = image.numpy()
        moved = np.isin(number, self.moves)
        found[moved, 0, 0, 0] += np.where(found[moved, 0, 0, 0] < 0.5, SHIFT, -SHIFT)
        none = tf.zeros_like(label)
        return AttackResult(tf.constant(found), none, none, none)


def test_robust_accuracy_is_the_worst_case_of_each_example_not_the_worst_mean():
    label = np.arange(10) % CLASSES
    suite = [PlannedAttack("first", Scripted(moves=(0, 1, 2))), PlannedAttack("second", Scripted(moves=(2, 7)))]
    results = evaluate({"exact": read_class}, make_batches(coded_images(label), label), suite, chunk_size=3)
    assert results["clean_accuracy"]["value"] == 1
    assert accuracies(results) == [("first", "exact", 0.7, 0.7), ("second", "exact", 0.8, 0.6)]
    assert results["robust_accuracy"]["value"] == 0.6 and results["robust_accuracy"]["n"] == 10


def test_order_of_attacks_does_not_change_the_robust_accuracy():
    label = np.arange(10) % CLASSES
    suite = [PlannedAttack("first", Scripted(moves=(0, 1, 2))), PlannedAttack("second", Scripted(moves=(2, 7)))]
    results = evaluate({"exact": read_class}, make_batches(coded_images(label), label), suite[::-1], chunk_size=3)
    assert accuracies(results) == [("second", "exact", 0.8, 0.8), ("first", "exact", 0.7, 0.6)]
    assert results["robust_accuracy"]["value"] == 0.6


def test_misclassified_images_are_never_attacked_and_not_robust():
    label = np.arange(10) % CLASSES
    image = coded_images(label)
    label[[3, 8]] = (label[[3, 8]] + 1) % CLASSES
    attack = Scripted(moves=(1, 3))
    results = evaluate({"exact": read_class}, make_batches(image, label), [PlannedAttack("a", attack)], chunk_size=4)
    assert set(attack.met) == set(range(10)) - {3, 8}
    assert results["clean_accuracy"]["value"] == 0.8
    assert results["robust_accuracy"]["value"] == 0.7


def test_later_attacks_meet_all_images_and_keep_what_earlier_ones_found(tmp_path):
    label = np.arange(8) % CLASSES
    first, second = Scripted(moves=(0, 1)), Scripted(moves=())
    suite = [PlannedAttack("first", first), PlannedAttack("second", second)]
    results = evaluate({"exact": read_class}, make_batches(coded_images(label), label), suite, save=tmp_path / "a.npz")
    assert set(first.met) == set(second.met) == set(range(8))
    assert accuracies(results) == [("first", "exact", 0.75, 0.75), ("second", "exact", 1.0, 0.75)]
    with np.load(tmp_path / "a.npz") as saved:
        predicted = np.argmax(read_class(saved["image_adv"], None), axis=1)
    np.testing.assert_array_equal(predicted != label, np.isin(np.arange(8), first.moves))


def test_attack_that_stands_alone_meets_all_images_in_a_cascade_too(tmp_path, monkeypatch):
    label = np.arange(8) % CLASSES
    label[5] = (label[5] + 1) % CLASSES  # wrong clean
    image = coded_images(np.arange(8) % CLASSES)
    script = {"first": (0, 1), "alone": (1, 2), "later": (0, 1, 2, 3), "last": ()}
    attacks = {name: Scripted(moves=moves) for name, moves in script.items()}
    plan = tuple(PlannedAttack(name, attack, alone=name == "alone") for name, attack in attacks.items())
    monkeypatch.setitem(SUITES, "mine", Suite(lambda *_: plan, True, (), ""))
    settings = {"sanity_examples": 0, "is_randomised": False, "save": tmp_path / "a.npz"}
    threat_model = ThreatModel("linf", SHIFT)
    results = evaluation.evaluate(
        {"exact": read_class},
        make_batches(image, label),
        threat_model,
        "mine",
        options=Options(chunk_size=3),
        **settings,
    )
    right = set(range(8)) - {5}
    assert {name: set(attack.met) for name, attack in attacks.items()} == {
        "first": right,
        "alone": right,
        "later": right - {0, 1, 2},
        "last": right - {0, 1, 2, 3},
    }
    # Each on its own; together with those before it; met.
    expected = {"first": (5, 5, 7), "alone": (5, 4, 7), "later": (6, 3, 4), "last": (7, 3, 3)}
    for found in results["attacks"]:
        own, together, met = expected[found["name"]]
        assert (found["accuracy"], found["cascaded_accuracy"]) == (own / 8, together / 8)
        assert found["own_accuracy"]["value"] == own / 8 and found["attacked"] == met
        assert found["alone"] == (found["name"] == "alone")
    assert results["cascade"] and results["robust_accuracy"]["value"] == 3 / 8
    with np.load(tmp_path / "a.npz") as saved:  # what has fooled once is kept
        fooled = np.argmax(read_class(saved["image_adv"], None), axis=1) != label
    np.testing.assert_array_equal(fooled, np.isin(np.arange(8), [0, 1, 2, 3, 5]))


# Paths that differ.


def soft_class(image, seed):
    """Return what `read_class` returns of rounded images, in a form that a gradient passes through."""
    return -tf.abs(image[:, 0, 0] / SHIFT - tf.range(CLASSES, dtype=tf.float32))


def rounded(image, seed):
    """Return the logits of images rounded to the nearest class: piecewise constant, so without a gradient."""
    return read_class(SHIFT * tf.round(image / SHIFT), seed)


def other_pixel(image, seed):
    """Return the logits of a classifier that looks at pixel (0, 2) instead."""
    return -tf.abs(image[:, 0, 2] / SHIFT - tf.range(CLASSES, dtype=tf.float32))


PATH_SUITE = [PlannedAttack("pgd", PGD("linf", 0.15, steps=5, random_start=False))]


def test_images_found_on_another_path_count_if_they_fool_the_exact_one():
    label = np.array([1, 2, 1, 2, 1])
    batches = make_batches(coded_images(label), label)
    alone = evaluate({"exact": rounded}, batches, PATH_SUITE)
    assert alone["robust_accuracy"]["value"] == 1  # its gradient is zero, and it masks that it is weak
    both = evaluate({"exact": rounded, "bpda_identity": soft_class}, batches, PATH_SUITE)
    assert accuracies(both) == [("pgd", "exact", 1, 1), ("pgd", "bpda_identity", 0, 0)]
    assert both["robust_accuracy"]["value"] == 0


def test_images_that_fool_only_another_path_do_not_count(tmp_path):
    label = np.array([2, 2, 2])
    image = coded_images(label)
    image[:, 0, 2] = 0.42
    paths, save = {"exact": rounded, "oblivious": other_pixel}, tmp_path / "a.npz"
    results = evaluate(paths, make_batches(image, label), PATH_SUITE, save=save)
    assert accuracies(results) == [("pgd", "exact", 1, 1), ("pgd", "oblivious", 1, 1)]
    assert results["robust_accuracy"]["value"] == 1
    with np.load(save) as saved:
        assert (np.argmax(read_class(saved["image_adv"], None), axis=1) == label).all()


# A real attack on a linear classifier.

_random = np.random.default_rng(0)
WEIGHTS = _random.normal(size=[64, 3]).astype(np.float32)
IMAGES = _random.uniform(size=[45, 8, 8, 1]).astype(np.float32)
LABELS = np.argmax(IMAGES.reshape(-1, 64) @ WEIGHTS, axis=1).astype(np.int32)
LABELS[::9] = (LABELS[::9] + 1) % 3
LINEAR_SUITE = [
    PlannedAttack("fgsm", FGSM("linf", 0.03)),
    PlannedAttack("pgd", PGD("linf", 0.03, steps=2, restarts=3)),
    PlannedAttack("margin", PGD("linf", 0.03, steps=2), "margin"),
]


def linear(image, seed):
    return tf.reshape(image, [-1, 64]) @ WEIGHTS


def noisy(image, seed):
    return linear(norms.random_point(image, epsilon=0.03, norm="linf", seed=seed), seed)


def run_linear(path, suite, folder, *, batch_size, chunk_size):
    results = evaluate(
        {"exact": path},
        make_batches(IMAGES, LABELS, batch_size=batch_size, first_index=100),
        suite,
        chunk_size=chunk_size,
        save=folder / "a.npz",
    )
    for attack in results["attacks"]:
        del attack["seconds"]
    with np.load(folder / "a.npz") as saved:
        return results, dict(saved)


@pytest.mark.parametrize("path, suite", [(linear, LINEAR_SUITE), (noisy, LINEAR_SUITE[1:2])], ids=["linear", "noisy"])
def test_results_do_not_depend_on_batch_and_chunk_size(path, suite, tmp_path):
    results, saved = run_linear(path, suite, tmp_path, batch_size=45, chunk_size=64)
    assert 0 < results["robust_accuracy"]["value"] < results["clean_accuracy"]["value"] < 1
    other, other_saved = run_linear(path, suite, tmp_path, batch_size=7, chunk_size=13)
    assert other == results
    for name in ("index", "label", "clean", "survived"):
        np.testing.assert_array_equal(other_saved[name], saved[name])
    np.testing.assert_allclose(other_saved["image_adv"], saved["image_adv"], atol=1e-6)


def test_seed_of_the_evaluation_changes_the_random_starts(tmp_path):
    saved = []
    for seed in (0, 1):
        suite = [PlannedAttack("pgd", PGD("l2", 0.01, steps=1))]
        evaluate({"exact": linear}, make_batches(IMAGES, LABELS), suite, seed=seed, save=tmp_path / "a.npz")
        with np.load(tmp_path / "a.npz") as file:
            saved.append(file["image_adv"])
    assert not np.array_equal(*saved)


def test_saved_images_score_the_reported_accuracy_again_and_lie_in_the_ball(tmp_path):
    results, saved = run_linear(linear, LINEAR_SUITE, tmp_path, batch_size=45, chunk_size=45)
    right = np.argmax(linear(saved["image_adv"], None), axis=1) == saved["label"]
    assert right.mean() == results["robust_accuracy"]["value"]
    np.testing.assert_array_equal(right, saved["clean"] & saved["survived"].all(axis=1))
    delta = saved["image_adv"].astype(np.float64) - IMAGES
    assert np.abs(delta).max() <= 0.03 * (1 + 1e-5) + 1e-7
    assert saved["image_adv"].min() >= 0 and saved["image_adv"].max() <= 1
    np.testing.assert_array_equal(saved["index"], 100 + np.arange(45))
    np.testing.assert_array_equal(saved["label"], LABELS)
    assert list(saved["attacks"]) == ["fgsm", "pgd", "margin"]
    for column, attack in enumerate(results["attacks"]):
        assert saved["survived"][:, column].mean() == pytest.approx(attack["accuracy"])
    np.testing.assert_array_equal(saved["image_adv"][~saved["clean"]], IMAGES[~saved["clean"]])


def test_linear_classifier_has_the_robust_accuracy_of_its_closed_form():
    """On two classes, linf attacks reach the corner that lowers the margin most."""
    image, weights = IMAGES * 0.8 + 0.1, WEIGHTS[:, :2]
    margin = image.reshape(-1, 64) @ (weights[:, 0] - weights[:, 1])
    label = np.int32(margin < 0)
    right = np.abs(margin) > 0.05 * np.abs(weights[:, 0] - weights[:, 1]).sum()
    results = evaluate(
        {"exact": lambda image, seed: tf.reshape(image, [-1, 64]) @ weights},
        make_batches(image, label),
        [PlannedAttack("pgd", PGD("linf", 0.05, steps=8))],
    )
    assert results["robust_accuracy"]["value"] == pytest.approx(right.mean()) and 0 < right.mean() < 1


@pytest.mark.parametrize("norm", norms.NORMS)
def test_attacks_of_cleverhans_run_in_an_evaluation(norm):
    suite = [
        planned._replace(attack=dataclasses.replace(planned.attack, steps=min(planned.attack.steps, 3)))
        for planned in SUITES["cleverhans"].plan(norm, 0.05, 3)
    ]
    results = evaluate({"exact": linear}, make_batches(IMAGES[:6], LABELS[:6]), suite)
    assert len(results["attacks"]) == {"linf": 3, "l2": 4}[norm]
    assert results["robust_accuracy"]["value"] <= min(attack["accuracy"] for attack in results["attacks"])


def test_examples_takes_the_first_images():
    label = np.arange(10) % CLASSES
    attack = Scripted(moves=(0, 9))
    results = evaluate(
        {"exact": read_class}, make_batches(coded_images(label), label), [PlannedAttack("a", attack)], examples=6
    )
    assert results["robust_accuracy"]["n"] == 6 and set(attack.met) == set(range(6))
    assert results["robust_accuracy"]["value"] == pytest.approx(5 / 6)


def test_each_search_is_traced_once_over_many_chunks():
    traced = []

    def path(image, seed):
        traced.append(image.shape)
        return linear(image, seed)

    label = np.argmax(IMAGES.reshape(-1, 64) @ WEIGHTS, axis=1)
    suite = [PlannedAttack("pgd", PGD("linf", 1e-4, steps=4, restarts=2))]  # too weak to fool anyone

    def passes(examples):
        traced.clear()
        results = evaluate({"exact": path}, make_batches(IMAGES, label), suite, chunk_size=4, examples=examples)
        assert results["robust_accuracy"]["value"] == 1
        return len(traced)

    # Two checks of a few images, which are not traced; one trace each of the exact path, of the look, and of a step.
    assert passes(8) == passes(40) == 5


def test_each_search_is_traced_once_however_many_survive():
    traced = []

    def path(image, seed):
        traced.append(image.shape)
        return linear(image, seed)

    suite = [PlannedAttack("pgd", PGD("linf", 0.03, steps=4, restarts=3))]
    evaluate({"exact": path}, make_batches(IMAGES, LABELS), suite, chunk_size=8)
    assert len(traced) == 5  # one of them by the look whether it draws at random


def test_search_that_takes_logits_is_not_traced_anew_for_each_chunk():
    traced = []

    def path(image, seed):
        if tf.inside_function():
            traced.append(image.shape)
        return linear(image, seed)

    label = np.argmax(IMAGES.reshape(-1, 64) @ WEIGHTS, axis=1)
    suite = [PlannedAttack("fgm", ATTACKS["cleverhans_fgm"](epsilon=1e-4))]
    evaluate({"exact": path}, make_batches(IMAGES, label), suite, chunk_size=4, examples=40)
    assert len(traced) == 3  # one gradient, one exact path, one look whether it draws at random


# Bad input.


def with_pixel(value):
    image = IMAGES.copy()
    image[7, 3, 3, 0] = value
    return image


def with_label(value):
    label = LABELS.copy()
    label[7] = value
    return label


@pytest.mark.parametrize(
    "image, label, message",
    [
        (with_pixel(np.nan), LABELS, r"test image 7 has pixels that are NaN or outside \[0, 1\]"),
        (with_pixel(np.inf), LABELS, "test image 7 has pixels"),
        (with_pixel(1.01), LABELS, "test image 7 has pixels"),
        (with_pixel(-0.01), LABELS, "test image 7 has pixels"),
        (255 * IMAGES, LABELS, r"test image 0 has pixels .* scale images to \[0, 1\]"),
        (IMAGES, with_label(3), "test image 7 has label 3, but the model has classes 0 to 2"),
        (IMAGES, with_label(-1), "test image 7 has label -1, but the model has classes 0 to 2"),
        (IMAGES[:0], LABELS[:0], "there are no images to evaluate on"),
    ],
)
def test_bad_data_are_refused_with_one_line_and_no_file(image, label, message, tmp_path):
    with pytest.raises(InputError, match=message) as caught:
        evaluate({"exact": linear}, make_batches(image, label), LINEAR_SUITE[:1], chunk_size=4, save=tmp_path / "a.npz")
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "path, message",
    [
        (lambda image, seed: tf.nn.softmax(linear(image, seed)), "the classifier returns probabilities"),
        (lambda image, seed: {"logits": linear(image, seed)}, r"not a dict"),
        (lambda image, seed: linear(image, seed)[:, :1], r"logits of shape \[batch, classes >= 2\]"),
        (lambda image, seed: linear(image, seed) / 0.0, "NaN or infinite logits"),
    ],
    ids=["probabilities", "dict", "one_class", "nan"],
)
def test_outputs_that_are_no_logits_are_refused(path, message):
    with pytest.raises(InputError, match=message):
        evaluate({"exact": path}, make_batches(IMAGES, LABELS), LINEAR_SUITE)


@pytest.mark.parametrize(
    "paths, suite, settings, message",
    [
        ({"smoothed": linear}, LINEAR_SUITE, {}, r"needs the path 'exact', .* given: \['smoothed'\]"),
        ({"exact": linear}, [], {}, "an evaluation needs at least one attack"),
        ({"exact": linear}, LINEAR_SUITE, {"chunk_size": 0}, "chunk_size must be at least 1"),
        ({"exact": linear}, LINEAR_SUITE, {"examples": -1}, "examples and minutes at least 0"),
    ],
)
def test_wrong_usage_is_refused(paths, suite, settings, message):
    with pytest.raises(UsageError, match=message):
        evaluate(paths, make_batches(IMAGES, LABELS), suite, **settings)


def test_failure_in_the_middle_keeps_the_file_of_an_earlier_evaluation(tmp_path):
    save = tmp_path / "adversarial.npz"
    evaluate({"exact": linear}, make_batches(IMAGES, LABELS), LINEAR_SUITE[:1], save=save)
    before = save.read_bytes()
    with pytest.raises(InputError):
        evaluate({"exact": linear}, make_batches(with_pixel(2), LABELS), LINEAR_SUITE[:1], chunk_size=4, save=save)
    assert save.read_bytes() == before and list(tmp_path.iterdir()) == [save]


def test_attack_on_class_activation_features_leaves_those_of_its_own_image_and_is_skipped_without_them():
    label = np.arange(10) % CLASSES
    seen = []

    def features(image):
        tf.py_function(lambda each: seen.append(each.numpy()), [image], [])
        return tf.reshape(image, [-1, 1, 1, 64])

    batches, suite = make_batches(coded_images(label), label), SUITES["purified"].plan("linf", SHIFT, CLASSES)
    cafa = next(planned for planned in suite if planned.name == "cafa")
    paths = {"exact": read_class, "oblivious": read_class}
    results = evaluation.evaluate(
        paths,
        batches,
        ThreatModel("linf", SHIFT),
        [PlannedAttack("fgsm", FGSM(epsilon=SHIFT)), cafa],
        options=Options(chunk_size=4),
        sanity_examples=0,
        class_activation=features,
    )
    entries = [(each["name"], each["path"]) for each in results["attacks"]]
    assert entries == [("fgsm", "exact"), ("fgsm", "oblivious"), ("cafa", "exact")]
    assert results["flags"]["skipped"] == [] and results["attacks"][-1]["objective"] == "class_activation"
    np.testing.assert_array_equal(np.concatenate(seen[:3])[:10], coded_images(label))  # what each is compared with
    search = Search(cafa, "exact", read_class, stream=0, seed=0, chunk_size=4, class_activation=features)
    block = Chunk(coded_images(label), label.astype(np.int32), np.arange(10, dtype=np.int32))
    logits = read_class(block.image, None).numpy()
    pool = Pool(search, block, logits, np.array([3, 7]), ExactPath(read_class, seed=0, chunk_size=4))
    np.testing.assert_array_equal(pool._references(np.array([3, 7])).reshape(2, 8, 8, 1), block.image[[3, 7]])
    without = evaluate(paths, batches, [PlannedAttack("fgsm", FGSM(epsilon=SHIFT)), cafa])
    assert without["flags"]["skipped"] == ["cafa"] and len(without["attacks"]) == 2

"""What holds for every detector of the registry. It is described once, in CASES; all tests run over the table."""

from __future__ import annotations

import dataclasses
import functools
import io
import json
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from kerasdefense.detectors import DETECTORS, Detector, Head
from kerasdefense.types import InputError, UsageError


@dataclasses.dataclass(frozen=True)
class Case:
    """How to try a detector: settings that suit the small data, and what the contract says of it.

    `stand_ins` are the names of its stand-ins, `is_monotone` says that each is an increasing function of the score.
    """

    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    stand_ins: tuple[str, ...] = ()
    is_monotone: bool = False


CASES = {
    "energy": Case({"temperature": 2.0}),
    "gen": Case({"gamma": 0.2, "top": 3}),
    "knn": Case({"bank": 60, "k": 5, "seed": 3}, ("mean_distance",)),
    "mahalanobis": Case({"floor": 1e-5}),
    "max_cosine": Case(),
    "max_logit": Case(),
    "msp": Case(stand_ins=("log_odds",), is_monotone=True),
    # The paper's temperature leaves differences that float32 hardly holds.
    "odin": Case({"temperature": 2.0, "step": 0.01}, ("unperturbed",)),
    "openmax": Case({"tail": 10, "alpha": 2}, ("distance",)),
    "openmax_paper": Case({"tail": 10}, ("distance",)),
    "openmax_shifted": Case({"tail": 10}, ("distance",)),
    "react": Case({"percentile": 95.0}, ("unclipped",)),
    "relative_mahalanobis": Case({"floor": 1e-5}),
    "subspace": Case(stand_ins=("cosine",), is_monotone=True),
    "vim": Case({"components": 5}),
}
EVERY = pytest.mark.parametrize("name", CASES)
PER_CLASS, CLASSES, SIZE = 40, 4, 8
SHAPE = [2, 4, 1]

# Class c lies about 6 on axis c of eight; the last four axes hold nothing but noise.
_random = np.random.default_rng(0)
LABEL = np.repeat(np.arange(CLASSES), PER_CLASS)
MEANS = 6 * np.eye(CLASSES, SIZE, dtype=np.float32)
EMBEDDING = (MEANS[LABEL] + 0.5 * _random.normal(size=[len(LABEL), SIZE])).astype(np.float32)
KERNEL = (np.eye(SIZE, CLASSES) + 0.05 * _random.normal(size=[SIZE, CLASSES])).astype(np.float32)
BIAS = np.float32([0.1, -0.1, 0.2, 0.0])
HEAD = KERNEL, BIAS
FAR = np.float32([[0, 0, 0, 0, 11, 10, 12, 11], [0.1, 0.2, 0, 0.1, 9, -12, 10, 10]])
WEIGHTS = 12 * np.eye(SIZE, dtype=np.float32)


def activations_of(embedding):
    return {"logits": embedding @ KERNEL + BIAS, "embedding": embedding}


def classifier(image):
    return activations_of(tf.matmul(tf.reshape(image, [-1, SIZE]), WEIGHTS))


def images_of(embedding):
    return np.reshape(embedding / 12, [-1, *SHAPE]).astype(np.float32)


def make(name, **settings) -> Detector:
    return DETECTORS[name](**{**CASES[name].settings, **settings})


TRAINING = activations_of(EMBEDDING)


@functools.cache
def fitted(name):
    return make(name).fit(TRAINING, LABEL, HEAD)


def scored(detector, embedding):
    """Return scores by whichever way the detector scores."""
    return detector.score_image(classifier, images_of(embedding)).numpy()


def through_file(detector, name):
    file = io.BytesIO()
    np.savez(file, **detector.state())
    config = json.loads(json.dumps(detector.get_config()))
    file.seek(0)
    with np.load(file) as stored:
        return DETECTORS[name](**config).restore(dict(stored), notes=detector.notes)


def needing(kind):
    return pytest.mark.parametrize("name", [name for name in CASES if kind(make(name))])


def test_table_describes_every_detector_of_the_registry():
    assert set(CASES) == set(DETECTORS)


@EVERY
def test_detector_has_defaults_and_its_settings_reach_it(name):
    config = make(name).get_config()
    assert config.items() >= CASES[name].settings.items()
    assert set(config) == set(DETECTORS[name]().get_config())
    assert json.loads(json.dumps(config)) == config
    json.dumps(fitted(name).recorded(), allow_nan=False)


@EVERY
def test_detector_scores_the_far_above_the_known(name):
    # evaluation 9: higher = more unknown, everywhere.
    assert scored(fitted(name), FAR).min() > scored(fitted(name), MEANS).max()


@EVERY
def test_detector_scores_one_float32_per_image(name):
    score = fitted(name).score_image(classifier, images_of(np.abs(EMBEDDING[:7])))
    assert score.dtype == tf.float32 and score.shape == [7] and np.isfinite(score).all()
    alone = [scored(fitted(name), np.abs(EMBEDDING[row : row + 1]))[0] for row in range(7)]
    np.testing.assert_allclose(alone, score, rtol=1e-4, atol=1e-5)


@EVERY
def test_detector_scores_images_or_activations_as_it_declares(name):
    detector, activations = fitted(name), activations_of(EMBEDDING[:5])
    if detector.scores_images:
        with pytest.raises(UsageError, match="use score_image"):
            detector.score(activations)
        return
    np.testing.assert_array_equal(
        detector.score(activations), detector.score_image(lambda _: activations, tf.zeros([5, 1, 1, 1]))
    )
    needed = {key: activations[key] for key in detector.needs}
    np.testing.assert_array_equal(detector.score(needed), detector.score(activations))
    half = {key: tf.cast(value, tf.float16) for key, value in activations.items()}
    assert detector.score(half).dtype == tf.float32


@EVERY
def test_detector_needs_no_more_than_it_names(name):
    detector, fresh = fitted(name), make(name)
    needed = {key: TRAINING[key] for key in detector.needs}
    fresh.fit(needed, LABEL, HEAD if detector.needs_head else None)
    np.testing.assert_array_equal(scored(fresh, EMBEDDING[:9]), scored(detector, EMBEDDING[:9]))
    assert set(detector.needs) <= {"logits", "embedding"}


@EVERY
def test_detector_scores_batches_of_any_size_in_one_graph(name):
    detector, traced = fitted(name), []

    @tf.function(input_signature=[tf.TensorSpec([None, *SHAPE])])
    def score(image):
        traced.append(name)
        stand_ins = detector.stand_ins()
        return detector.score_image(classifier, image), [stand_ins[each](classifier(image)) for each in stand_ins]

    for count in (0, 1, 6):
        images = images_of(np.abs(EMBEDDING[:count]))
        own, others = score(images)
        assert own.shape == [count] and len(traced) == 1
        np.testing.assert_allclose(own, detector.score_image(classifier, images), rtol=1e-4, atol=1e-5)
        for key, other in zip(detector.stand_ins(), others):
            np.testing.assert_allclose(other, detector.stand_ins()[key](classifier(images)), rtol=1e-4, atol=1e-4)


EXTREMES = {
    "ordinary": activations_of(EMBEDDING[::20]),
    "class mean": activations_of(MEANS),
    "zero embedding": activations_of(np.zeros([2, SIZE], np.float32)),
    "saturated": {"logits": 1e4 * np.eye(CLASSES, dtype=np.float32), "embedding": 1e4 * MEANS},
    "all low": {"logits": np.full([1, CLASSES], -1e4, np.float32), "embedding": -1e4 * MEANS[:1]},
    "equal logits": {"logits": np.full([1, CLASSES], 3.0, np.float32), "embedding": EMBEDDING[:1]},
}


@EVERY
@pytest.mark.parametrize("extreme", EXTREMES)
def test_detector_has_finite_scores_and_gradients(name, extreme):
    given, random = EXTREMES[extreme], np.random.default_rng(1)
    weights = {key: random.normal(size=[SIZE, value.shape[1]]).astype(np.float32) for key, value in given.items()}

    def activations_fn(image):
        return {key: value + tf.matmul(tf.reshape(image, [-1, SIZE]), weights[key]) for key, value in given.items()}

    detector = fitted(name)
    image = tf.zeros([len(given["logits"]), *SHAPE])
    functions = {key: lambda image, fn=fn: fn(activations_fn(image)) for key, fn in detector.stand_ins().items()}
    functions["own"] = lambda image: detector.score_image(activations_fn, image)
    for key, function in functions.items():
        with tf.GradientTape() as tape:
            tape.watch(image)
            score = function(image)
        gradient = tape.gradient(score, image)
        assert np.isfinite(score).all(), key
        assert np.isfinite(gradient).all(), key


@EVERY
def test_detector_has_the_gradient_of_its_score(name):
    # Central differences along one direction, at the edge of a class, where no score is flat.
    embedding = np.float32([[5.0, 0.5, 0.3, 0.4, 0.3, 0.8, 0.5, 0.4]])
    image, move = images_of(embedding), np.reshape(np.float32([1, -2, 1, 0.5, -1, 2, 1, -1]) / 4, [1, *SHAPE])
    functions = {"own": lambda image: fitted(name).score_image(classifier, image)}
    for key, stand_in in fitted(name).stand_ins().items():
        functions[key] = lambda image, stand_in=stand_in: stand_in(classifier(image))
    for key, function in functions.items():
        image = tf.constant(image)
        with tf.GradientTape() as tape:
            tape.watch(image)
            score = function(image)
        along = np.sum(tape.gradient(score, image) * move)
        step = 2e-3
        difference = (function(image + step * move) - function(image - step * move)).numpy()[0] / (2 * step)
        assert abs(along) > 1e-3, key
        np.testing.assert_allclose(along, difference, rtol=0.03, err_msg=key)


@EVERY
def test_detector_stand_ins_are_those_of_the_contract(name):
    detector = fitted(name)
    stand_ins = detector.stand_ins()
    assert tuple(stand_ins) == CASES[name].stand_ins
    assert detector.follows_own is not CASES[name].is_monotone
    embedding = np.clip(np.concatenate([0.6 * EMBEDDING[::4] + 2, FAR, MEANS]), 0, 12).astype(np.float32)
    own = scored(detector, embedding)
    for stand_in in stand_ins.values():
        score = stand_in(activations_of(embedding))
        assert score.dtype == tf.float32 and score.shape == own.shape
        assert stand_in(activations_of(FAR[:1]))[0] > tf.reduce_max(stand_in(activations_of(MEANS)))
        if CASES[name].is_monotone:
            gaps = np.diff(score.numpy()[np.argsort(own, kind="stable")])
            assert (gaps >= -1e-5).all()


@EVERY
def test_detector_is_restored_bit_for_bit(name):
    detector = fitted(name)
    restored = through_file(detector, name)
    embedding = np.abs(np.concatenate([EMBEDDING, FAR]))
    np.testing.assert_array_equal(scored(restored, embedding), scored(detector, embedding))
    assert restored.get_config() == detector.get_config() and restored.recorded() == detector.recorded()
    for key, array in detector.state().items():
        assert isinstance(array, np.ndarray) and array.dtype == restored.state()[key].dtype
        np.testing.assert_array_equal(restored.state()[key], array)


@EVERY
def test_detector_keeps_its_arrays_in_variables_that_do_not_train(name):
    detector = fitted(name)
    assert len(detector.variables) == len(detector.state()) == len(detector.fitted)
    assert detector.trainable_variables == ()


def test_detectors_are_exported_with_their_variables(tmp_path):
    module = tf.Module()
    module.detectors = {name: fitted(name) for name in CASES}

    @tf.function(input_signature=[tf.TensorSpec([None, *SHAPE])])
    def score(image):
        return {name: detector.score_image(classifier, image) for name, detector in module.detectors.items()}

    module.score = score
    tf.saved_model.save(module, str(tmp_path))
    loaded = tf.saved_model.load(str(tmp_path))
    embedding = np.abs(EMBEDDING[::16])
    for name, found in loaded.score(images_of(embedding)).items():
        np.testing.assert_allclose(found, scored(fitted(name), embedding), rtol=1e-4, atol=1e-5)
        for key in fitted(name).fitted:
            np.testing.assert_array_equal(getattr(loaded.detectors[name], key), fitted(name).state()[key])
    captured = {each.ref() for each in loaded.score.concrete_functions[0].variables}
    assert len(captured) == sum(len(fitted(name).fitted) for name in CASES)


@EVERY
def test_detector_fit_repeats_itself_whatever_the_global_random_state(name):
    np.random.seed(1)
    tf.random.set_seed(1)
    first = make(name).fit(TRAINING, LABEL, HEAD).state()
    np.random.seed(2)
    tf.random.set_seed(2)
    activations = {key: array.copy() for key, array in TRAINING.items()}
    second = make(name).fit(activations, LABEL, HEAD).state()
    for key in first:
        np.testing.assert_array_equal(first[key], second[key])
    for key, array in activations.items():
        np.testing.assert_array_equal(array, TRAINING[key])


@needing(lambda detector: detector.fitted)
def test_detector_fit_replaces_the_one_before(name):
    noise = np.random.default_rng(5).normal(size=EMBEDDING.shape).astype(np.float32)
    other, head = activations_of(1.5 * EMBEDDING + 0.3 * noise), (KERNEL + 0.1 * noise[:SIZE, :CLASSES], BIAS)
    detector = make(name).fit(TRAINING, LABEL, HEAD)
    assert detector.fit(other, LABEL, head) is detector
    fresh = make(name).fit(other, LABEL, head)
    np.testing.assert_array_equal(scored(detector, MEANS), scored(fresh, MEANS))
    assert not np.allclose(scored(detector, MEANS), scored(fitted(name), MEANS), rtol=1e-3)


@needing(lambda detector: detector.fitted)
def test_detector_that_is_not_fitted_says_so(name):
    detector = make(name)
    assert not detector.is_fitted and detector.state() == {} and detector.recorded() is not None
    with pytest.raises(UsageError, match="is not fitted; call fit or restore before it scores"):
        detector.score(TRAINING)
    for stand_in in detector.stand_ins().values():
        with pytest.raises(UsageError, match="is not fitted"):
            stand_in(TRAINING)
    assert not detector.restore({}).is_fitted


@needing(lambda detector: not detector.fitted)
def test_detector_without_a_fit_scores_at_once(name):
    detector = make(name)
    assert detector.is_fitted and detector.state() == {}
    np.testing.assert_array_equal(scored(detector, MEANS), scored(fitted(name), MEANS))
    assert scored(detector.restore({}), MEANS).shape == (CLASSES,)


@EVERY
def test_detector_refuses_a_state_of_another(name):
    with pytest.raises(InputError, match=f"state of a fitted {type(make(name)).__name__} holds .*, not foreign"):
        make(name).restore({"foreign": np.zeros(3)})


@EVERY
def test_detector_refuses_activations_that_lack_what_it_scores(name):
    with pytest.raises(UsageError, match="missing: "):
        fitted(name).score_image(lambda image: {"feature_map": image}, images_of(MEANS))


BAD = {
    "none": ({key: array[:0] for key, array in TRAINING.items()}, LABEL[:0], InputError, "there are none"),
    "other lengths": (TRAINING, LABEL[:-1], InputError, r"must be \[159, ...\], a row for every label, not \[160, "),
    "unknown class": (TRAINING, np.where(LABEL == 2, -1, LABEL), InputError, "labels 0 to 3, not -1; leave others out"),
    "class too high": (TRAINING, LABEL + 1, InputError, "labels 0 to 3, not 4"),
    "float labels": (TRAINING, LABEL.astype(float), InputError, "label must be integers"),
    "column of labels": (TRAINING, LABEL[:, np.newaxis], InputError, r"label must be integers \[n\]"),
    "nothing": ({"feature_map": EMBEDDING}, LABEL, UsageError, "is missing; there is: feature_map"),
    "flat": ({key: array[:, 0] for key, array in TRAINING.items()}, LABEL, InputError, r"not \[160\]"),
}


@EVERY
@pytest.mark.parametrize("bad", BAD)
def test_detector_refuses_to_be_fitted_to_bad_data(name, bad):
    activations, label, error, message = BAD[bad]
    detector = make(name)
    with pytest.raises(error, match=message):
        detector.fit(activations, label, HEAD)
    assert detector.state() == {}


@EVERY
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_detector_refuses_what_is_not_finite_in_what_it_needs_alone(name, value):
    for key, array in TRAINING.items():
        spoilt = array.copy()
        spoilt[3, 1] = value
        if key in make(name).needs:
            with pytest.raises(InputError, match=f"{key} must be finite numbers"):
                make(name).fit({**TRAINING, key: spoilt}, LABEL, HEAD)
        else:
            make(name).fit({**TRAINING, key: spoilt}, LABEL, HEAD)


@needing(lambda detector: detector.needs_head)
def test_detector_that_needs_the_head_refuses_to_go_without_or_with_a_wrong_one(name):
    with pytest.raises(UsageError, match=r"needs the head.* is missing"):
        make(name).fit(TRAINING, LABEL)
    with pytest.raises(InputError, match="the kernel of the head must be finite"):
        make(name).fit(TRAINING, LABEL, (np.full_like(KERNEL, np.nan), BIAS))
    with pytest.raises(InputError, match=r"the kernel of the head must be \[8, 4\], not \[7, 4\]"):
        make(name).fit(TRAINING, LABEL, (KERNEL[:7], BIAS))
    with pytest.raises(InputError, match=r"the bias of the head must be \[4\], not \[3\]"):
        make(name).fit(TRAINING, LABEL, (KERNEL, BIAS[:3]))


@needing(lambda detector: detector.needs_head and not detector.takes_cosines)
def test_detector_that_computes_logits_anew_refuses_a_head_of_cosines(name):
    message = r"needs logits = embedding @ kernel \+ bias, but those of this model are cosines"
    with pytest.raises(UsageError, match=message):
        make(name).fit(TRAINING, LABEL, Head(KERNEL, is_linear=False))


@needing(lambda detector: detector.takes_cosines or not detector.needs_head)
def test_detector_that_computes_no_logits_takes_a_head_of_cosines(name):
    other = make(name).fit(TRAINING, LABEL, Head(KERNEL, is_linear=False))
    np.testing.assert_array_equal(scored(other, FAR), scored(fitted(name), FAR))


@needing(lambda detector: detector.needs_head)
def test_detector_takes_a_head_without_bias_as_one_of_zeros(name):
    none, zeros = (make(name).fit(TRAINING, LABEL, (KERNEL, bias)) for bias in (None, np.zeros(CLASSES)))
    np.testing.assert_array_equal(scored(none, FAR), scored(zeros, FAR))

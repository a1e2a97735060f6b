"""AGKD-BML from a configuration: a clean teacher, then its student, and what is refused before either is trained."""

from __future__ import annotations

import dataclasses
import json
import shutil

import keras
import numpy as np
import pytest

from kerasdefense import backbones, config, data, defenses, training
from kerasdefense.defenses import AGKDBML, Standard
from kerasdefense.training import fitting
from kerasdefense.types import InputError, UsageError


@pytest.fixture(scope="module")
def make_run(small_run):
    """Return a function from the settings of a defense to a run of a few steps."""

    def make(**settings):
        run = small_run(epochs=1, steps_per_epoch=3, validation_steps=1)
        return dataclasses.replace(run, defense=config.Defense(**{"name": "agkd_bml", **settings}))

    return make


def keep_beginnings(patch, *, train):
    """Keep what every training begins with: the run, the defense and its weights; go on with it or stop there."""
    fit, begun = fitting._fit, []

    def keeping(run, splits, defense, *given):
        begun.append((run, defense, defense.backbone.get_weights()))
        if not train:
            raise Stopped
        fit(run, splits, defense, *given)

    patch.setattr(fitting, "_fit", keeping)
    patch.setattr(fitting, "_displays", lambda *given: [])
    return begun


class Stopped(Exception):  # noqa: N818 - nothing went wrong
    """Stands for a kill: nothing after it is done."""


@pytest.fixture(scope="module")
def trained(digits, make_run, tmp_path_factory):
    """Return the folder of a run of both stages, and how each began."""
    folder = tmp_path_factory.mktemp("agkd_bml")
    with pytest.MonkeyPatch.context() as patch:
        begun = keep_beginnings(patch, train=True)
        training.train(make_run(teacher_epochs=2), digits, folder)
    return folder, begun


@pytest.fixture
def begun(monkeypatch):
    return keep_beginnings(monkeypatch, train=False)


def assert_same(weights, others):
    for one, two in zip(weights, others, strict=True):
        np.testing.assert_array_equal(one, two)


def test_teacher_is_trained_on_clean_images_with_a_half_of_the_mass_on_other_classes(trained):
    folder, ((run, *_), _) = trained
    teacher = keras.models.load_model(folder / "teacher" / training.MODEL)
    assert isinstance(teacher, Standard) and teacher.label_smoothing == pytest.approx(0.5 * 10 / 9)
    assert (run.defense.name, run.train.epochs) == ("standard", 2)
    history = json.loads((folder / "teacher" / training.HISTORY).read_text())
    assert history["monitor"] == "val_clean_accuracy" and len(history["epochs"]) == 2


def test_student_starts_from_its_teacher_and_keeps_it(trained):
    folder, (_, (run, defense, weights)) = trained
    teacher = keras.models.load_model(folder / "teacher" / training.MODEL).backbone
    assert isinstance(defense, AGKDBML) and run.train.epochs == 1
    assert_same(weights, teacher.get_weights())
    kept = keras.models.load_model(folder / training.MODEL)
    assert_same(kept.teacher.get_weights(), teacher.get_weights())
    assert not any(np.array_equal(one, two) for one, two in zip(kept.backbone.get_weights(), weights))
    history = json.loads((folder / training.HISTORY).read_text())
    assert history["monitor"] == "val_adversarial_accuracy" and set(kept.terms) <= set(history["epochs"][0])


def test_run_goes_on_after_its_teacher(digits, make_run, trained, begun, tmp_path, capsys):
    shutil.copytree(trained[0] / "teacher", tmp_path / "teacher")  # as if killed when the student began
    with pytest.raises(Stopped):
        training.train(make_run(teacher_epochs=2), digits, tmp_path)
    ((_, defense, weights),) = begun
    assert isinstance(defense, AGKDBML) and f"teacher/{training.MODEL} is trained already" in capsys.readouterr().err
    assert_same(weights, trained[1][1][2])
    with pytest.raises(
        UsageError, match=r"other settings \(--train_epochs 2 there, 3 now\)"
    ):  # a teacher of other settings is not taken for this one
        training.train(make_run(teacher_epochs=3), digits, tmp_path)


@pytest.mark.parametrize("place", ["teacher/model.keras", "published"])
def test_saved_teacher_is_not_trained_again(digits, make_run, trained, begun, tmp_path, place):
    (tmp_path / "published/1").mkdir(parents=True)
    shutil.copy(trained[0] / training.MODEL, tmp_path / "published")  # a student can be a teacher
    path = (tmp_path if place == "published" else trained[0]) / place
    with pytest.raises(Stopped):
        training.train(make_run(teacher=str(path)), digits, tmp_path / "run")
    ((_, defense, weights),) = begun
    saved = keras.models.load_model(path / training.MODEL if path.is_dir() else path).backbone
    assert isinstance(defense, AGKDBML) and not (tmp_path / "run/teacher").exists()
    for found in (weights, defense.teacher.get_weights()):
        assert_same(found, saved.get_weights())
    assert not defense.teacher.trainable_variables


def test_a_keras_classifier_of_ones_own_can_be_the_teacher(digits, make_run, begun, tmp_path):
    layers = keras.layers
    ends = [layers.GlobalAveragePooling2D(), layers.Dense(10, activation="softmax")]
    own = keras.Sequential([keras.Input((8, 8, 1)), layers.Conv2D(3, 3, activation="relu"), *ends])
    own.save(tmp_path / "own.keras")
    run = make_run(teacher=str(tmp_path / "own.keras"), init_from_teacher=False)
    with pytest.raises(Stopped):
        training.train(run, digits, tmp_path / "run")
    assert_same(begun[0][1].teacher.get_weights(), own.get_weights())


def test_training_draws_from_the_training_images(digits, make_run, trained):
    (_, standard, _), (_, defense, _) = trained[1]
    assert not hasattr(standard, "bank")
    assert len(defense.bank.label) == digits.train.examples


@pytest.mark.parametrize(
    ("settings", "train", "expected"),
    [
        ({}, {"epochs": 7}, (0.5, "others", 7, 1)),
        ({"teacher_epochs": 3}, {"epochs": 7, "validate_every": 5}, (0.5, "others", 3, 3)),
        ({"label_smoothing": 0.1, "awp_gamma": 0.01, "w_kd": 0.5}, {"epochs": 7}, (0.1, "all", 7, 1)),
        ({"label_smoothing": -1.0}, {"epochs": 7, "validate_every": 2}, (-1.0, "all", 7, 2)),
    ],
)
def test_teacher_is_trained_by_the_flags_of_its_student(make_run, settings, train, expected):
    run = make_run(**settings)
    run = dataclasses.replace(
        run,
        train=dataclasses.replace(run.train, **train),
        attack=dataclasses.replace(run.attack, norm="l2", epsilon=0.5, warmup_epochs=1),
    )
    (stage,) = defenses.stages(run)
    found = stage.run
    assert (stage.name, stage.saved, found.defense.name, found.defense.awp_gamma) == ("teacher", "", "standard", 0)
    smoothing = (found.defense.label_smoothing, found.defense.smoothing_over)
    assert (*smoothing, found.train.epochs, found.train.validate_every) == expected
    assert found.attack == config.Attack(norm="l2", epsilon=0.5)
    assert (found.data, found.backbone, found.train.seed) == (run.data, run.backbone, run.train.seed)


# What is refused, and before anything is trained


def saved_network(folder, width=4, image_shape=(8, 8, 1), classes=10):
    backbone = backbones.build(config.Backbone("small_cnn", width), image_shape=image_shape, classes=classes)
    backbone.save(folder / "teacher.keras")
    return folder / "teacher.keras"


@pytest.mark.parametrize(
    ("network", "settings", "error", "message"),
    [
        ({"classes": 5}, {}, InputError, "the teacher does not fit its student: the model has 5 classes, but"),
        (
            {"image_shape": (16, 8, 1)},
            {},
            InputError,
            r"teacher does not fit its student: the model takes images of \(16, 8",
        ),
        ({"width": 2}, {}, UsageError, "not built as its teacher .* pass --nodefense_init_from_teacher, or a teacher"),
        ({}, {"teacher_epochs": 2}, UsageError, "--defense_teacher_epochs is for a teacher that is trained"),
        (None, {"teacher": "none.keras"}, InputError, "--defense_teacher=none.keras cannot stand in .*: no such file"),
        (None, {"bank_per_class": 1}, UsageError, "--defense_bank_per_class=1 leaves nothing to draw"),
        (None, {"bank_limit_mb": 0}, UsageError, "exceeds --defense_bank_limit_mb=0: pass a higher limit"),
    ],
)
def test_what_cannot_train_is_refused_before_anything_is_trained(
    digits, make_run, begun, tmp_path, network, settings, error, message
):
    if network is not None:
        settings = {"teacher": str(saved_network(tmp_path, **network)), **settings}
    with pytest.raises(error, match=message):
        training.train(make_run(**settings), digits, tmp_path / "run")
    assert begun == []


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"attn_layers": "nowhere"}, "small_cnn has no layer 'nowhere' that gives a feature map"),
        ({"w_kl": 1.0}, "--defense_w_kl is no setting of agkd_bml"),
    ],
)
def test_settings_of_the_student_are_refused_before_its_teacher_is_trained(
    digits, make_run, begun, tmp_path, settings, message
):
    with pytest.raises(UsageError, match=message):
        training.train(make_run(**settings), digits, tmp_path)
    assert begun == []


def test_two_classes_are_refused_where_their_labels_are_smoothed_by_a_half(make_run, begun, tmp_path):
    splits = data.load(config.Data(dir=str(tmp_path), open_set_split="2:0"))
    with pytest.raises(UsageError, match=r"a label mass of 0.5 .* leaves nothing to learn.* --defense_label_smoothing"):
        training.train(make_run(), splits, tmp_path / "run")
    assert begun == []


def test_class_with_a_single_training_image_is_refused(digits, make_run, begun, tmp_path):
    label = digits.train.label[digits.train.index]
    kept = np.sort(np.append(digits.train.index[label != 3], digits.train.index[label == 3][0]))
    splits = dataclasses.replace(digits, train=dataclasses.replace(digits.train, index=kept))
    with pytest.raises(InputError, match="class '3' has 1 training image; a method that draws images of a class needs"):
        training.train(make_run(), splits, tmp_path)
    assert begun == []

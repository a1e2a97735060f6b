"""Training from a configuration to a saved model, stages included."""

import dataclasses
import json

import keras
import numpy as np
import pytest
import tensorflow as tf

from kerasdefense import backbones, config, defenses, training
from kerasdefense.attacks import PGD
from kerasdefense.defenses import PGDAT, Stage, Standard
from kerasdefense.training import fitting
from kerasdefense.types import InputError, UsageError


def test_trained_model_is_best_epoch(digits, small_run, tmp_path):
    defense, select, _ = training.train(small_run(epochs=3, learning_rate=0.3), digits, tmp_path)
    best = max(epoch["val_adversarial_accuracy"] for epoch in select.history)
    found = defense.evaluate(digits.validation.batches(64), verbose=0, return_dict=True)
    assert found["adversarial_accuracy"] == pytest.approx(best, abs=1e-6) == pytest.approx(select.best, abs=1e-6)
    assert (tmp_path / "tensorboard").is_dir() and (tmp_path / "checkpoints").is_dir()


def test_same_seed_gives_same_weights(digits, small_run, tmp_path):
    weights = [training.train(small_run(), digits, tmp_path / name)[0].get_weights() for name in ("one", "two")]
    for one, two in zip(*weights):
        np.testing.assert_array_equal(one, two)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epochs": 0}, "--train_epochs must be at least 1"),
        ({"epochs": 2, "validate_every": 3}, "must not exceed --train_epochs"),
        ({"epochs": 2, "validate_every": 0}, "must be at least 1"),
        ({"batch_size": 33, "strategy": "mirrored"}, "does not divide over 2 replicas"),
    ],
)
def test_contradictory_settings_are_refused(digits, small_run, tmp_path, change, message):
    with pytest.raises(UsageError, match=message):
        training.train(small_run(**change), digits, tmp_path)


def test_averages_are_validated_selected_and_saved(digits, small_run, tmp_path):
    run = small_run(epochs=2, ema_decay=0.9, learning_rate=0.3)
    defense, select, _ = training.train(run, digits, tmp_path)
    ((optimizer, variables),) = defense.optimizers()
    for variable, average in zip(variables, optimizer._model_variables_moving_average, strict=True):
        np.testing.assert_array_equal(variable, average)  # of the best epoch
    saved = keras.models.load_model(tmp_path / training.MODEL)
    found = saved.evaluate(digits.validation.batches(64), verbose=0, return_dict=True)
    assert found["adversarial_accuracy"] == pytest.approx(select.best, abs=1e-6)
    raw = tf.train.load_checkpoint(str(tmp_path / f"checkpoints/epochs/epoch-{select.best_epoch}"))
    kernel = defense.backbone.get_layer("logits").kernel
    shapes = raw.get_variable_to_shape_map().items()
    names = [name for name, shape in shapes if name.startswith("model/backbone") and shape == list(kernel.shape)]
    assert names and all(np.abs(raw.get_tensor(name) - kernel).max() > 0 for name in names)


def test_property_18_momentum_is_kept_from_epoch_to_epoch(digits, small_run):
    # Once the rate is next to nothing, weights coast: each epoch of 3 steps moves them 0.9^3 times as far as the last.
    schedule = {"schedule": "step", "drops": "0.3334", "drop_factor": 1e-9, "weight_decay": 0.0}
    run = small_run(defense="standard", epochs=3, steps_per_epoch=3, validate_every=4, **schedule)
    defense, kernels = training.build(run, digits), []
    kernel = defense.backbone.get_layer("logits").kernel
    keep = keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: kernels.append(kernel.numpy()))
    fitting._fit(run, digits, defense, 0, [keep])
    second, third = np.diff(kernels, axis=0)
    assert np.abs(second).max() > 1e-4
    np.testing.assert_allclose(third, 0.9**3 * second, rtol=1e-3, atol=1e-6)


def test_averaged_puts_raw_weights_back_exactly():
    backbone = backbones.build(config.Backbone(name="small_cnn", width=4), image_shape=(8, 8, 1), classes=3)
    defense = PGDAT(backbone, attack=PGD(epsilon=0.1, steps=1, keep="last"))
    defense.compile(keras.optimizers.SGD(0.5, use_ema=True, ema_momentum=0.5))
    random = np.random.default_rng(0)
    image, label = random.uniform(size=(8, 8, 8, 1)).astype(np.float32), np.arange(8) % 3
    start = defense.backbone.get_layer("logits").get_weights()[0]
    defense.train_on_batch(image, label)
    raw = defense.get_weights()
    with defense.averaged():
        kernel = defense.backbone.get_layer("logits").get_weights()[0]
    moved = defense.backbone.get_layer("logits").get_weights()[0]
    np.testing.assert_allclose(kernel, (start + moved) / 2, atol=1e-6)
    assert np.abs(moved - start).max() > 1e-3
    for value, expected in zip(defense.get_weights(), raw):
        np.testing.assert_array_equal(value, expected)


def test_finished_training_is_not_run_again(digits, small_run, tmp_path, capsys):
    training.train(small_run(), digits, tmp_path)
    before = (tmp_path / training.MODEL).read_bytes()
    _, select, is_new = training.train(small_run(), digits, tmp_path)
    assert not is_new and len(select.history) == 2 and "is trained already" in capsys.readouterr().err
    assert (tmp_path / training.MODEL).read_bytes() == before
    assert training.train(small_run(resume="never"), digits, tmp_path).is_new


def test_warm_up_trains_on_clean_images_and_the_radius_then_rises(digits, small_run, tmp_path):
    run = small_run(attack={"warmup_epochs": 1, "ramp_epochs": 0.5})
    defense = training.build(run, digits)
    steps = digits.train.steps_per_epoch(64)
    assert (defense.warmup_steps, defense.ramp_steps) == (steps, round(steps / 2))
    batch = defense.unpack(next(iter(digits.train.epochs(64, seed=0, epochs=1))))
    for step, share in ((0, 0), (steps - 1, 0), (steps, 1 / defense.ramp_steps), (10 * steps, 1)):
        defense.step.assign(step)
        moved = np.abs(defense.craft(batch, defense.attack) - batch.image).max()
        assert moved == pytest.approx(share * 0.1, abs=1e-6)


@pytest.mark.parametrize(
    ("attack", "train", "message"),
    [
        ({"warmup_epochs": 2}, {}, "--attack_warmup_epochs=2 leaves no epoch for the attack"),
        ({}, {"ema_decay": 1.0}, "--train_ema_decay=1 must be below 1"),
        ({}, {"drops": "half"}, "--train_drops='half' must be rising shares"),
    ],
)
def test_settings_that_cannot_train_are_refused(digits, small_run, tmp_path, attack, train, message):
    with pytest.raises(UsageError, match=message):
        training.train(small_run(attack=attack, **train), digits, tmp_path)


@keras.saving.register_keras_serializable(package="tests")
class Taught(PGDAT):
    """Adversarial training that is told of a classifier trained before it."""

    def __init__(self, backbone, *, teacher=None, **kwargs):
        super().__init__(backbone, **kwargs)
        self.teacher = teacher or keras.models.clone_model(backbone)
        self.teacher.trainable = False

    @classmethod
    def stages(cls, run):
        clean = dataclasses.replace(run, defense=config.Defense(name="standard"))
        return (Stage("teacher", clean, take=lambda model: model.backbone, saved=cls.saved),)

    def get_config(self):
        return {**super().get_config(), "teacher": keras.saving.serialize_keras_object(self.teacher)}

    @classmethod
    def from_config(cls, config, custom_objects=None):
        return super().from_config({**config, "teacher": keras.saving.deserialize_keras_object(config["teacher"])})


class TestStages:
    @pytest.fixture(autouse=True)
    def staged(self, monkeypatch):
        monkeypatch.setitem(defenses.DEFENSES, "taught", Taught)
        monkeypatch.setattr(Taught, "saved", "", raising=False)

    def test_stage_is_selected_saved_and_not_run_again(self, digits, small_run, tmp_path, capsys):
        run = small_run(defense="taught", epochs=1)
        defense, _, _ = training.train(run, digits, tmp_path)
        teacher = keras.models.load_model(tmp_path / "teacher" / training.MODEL)
        assert isinstance(teacher, Standard)
        history = json.loads((tmp_path / "teacher" / training.HISTORY).read_text())
        assert history["monitor"] == "val_clean_accuracy" and history["best_epoch"] == 1
        for one, two in zip(defense.teacher.get_weights(), teacher.backbone.get_weights()):
            np.testing.assert_array_equal(one, two)
        (tmp_path / training.HISTORY).unlink()  # as if killed before the end of the second stage
        assert training.train(run, digits, tmp_path).is_new
        assert f"teacher/{training.MODEL} is trained already" in capsys.readouterr().err

    def test_saved_model_stands_in_for_stage(self, digits, small_run, tmp_path, monkeypatch):
        training.train(small_run(defense="standard", epochs=1), digits, tmp_path / "other")
        monkeypatch.setattr(Taught, "saved", str(tmp_path / "other" / training.MODEL))
        defense, _, _ = training.train(small_run(defense="taught", epochs=1), digits, tmp_path / "run")
        assert not (tmp_path / "run/teacher").exists()
        other = keras.models.load_model(tmp_path / "other" / training.MODEL)
        for one, two in zip(defense.teacher.get_weights(), other.backbone.get_weights()):
            np.testing.assert_array_equal(one, two)
        monkeypatch.setattr(Taught, "saved", str(tmp_path / "none.keras"))
        with pytest.raises(InputError, match=r"--defense_teacher=.*none.keras cannot stand in"):
            training.train(small_run(defense="taught", epochs=1), digits, tmp_path / "third")


@pytest.mark.parametrize("name", ["standard", "pgd_at"])
def test_xla_trains_alike(name, digits, small_run):
    batch = next(iter(digits.train.epochs(16, seed=0, epochs=1)))
    histories, kernels = [], []
    for jit_compile in (False, True):
        run = small_run(defense=name, learning_rate=0.01, schedule="constant", jit_compile=jit_compile)
        defense = training.build(run, digits)
        histories.append(defense.fit(tf.data.Dataset.from_tensors(batch), verbose=0).history)
        kernels.append(defense.backbone.get_layer("logits").kernel.numpy())
    assert histories[0]["cross_entropy_loss"] == pytest.approx(histories[1]["cross_entropy_loss"], rel=0.05)
    if name == "standard":  # the sign of a gradient near zero turns on rounding
        np.testing.assert_allclose(*kernels, atol=1e-5)

"""The selection of the best epoch, and the guard against catastrophic overfitting."""

import contextlib

import keras
import numpy as np
import pytest
import tensorflow as tf

from kerasdefense import backbones, config, data, training
from kerasdefense.attacks import FGSM, OBJECTIVES, PGD, misclassified, seeds
from kerasdefense.defenses import PGDAT
from kerasdefense.types import InputError, UsageError


@pytest.fixture(scope="module")
def digits_as_they_are(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("digits"))
    return data.load(config.Data(dir=folder, validation_fraction=0.15, augment="none"))


def pgd_accuracy(defense, split, epsilon):
    attack = PGD(epsilon=epsilon, steps=20)

    @tf.function
    def survived(batch):
        seed, context = seeds.per_example(1, 0, batch["index"]), {"label": batch["label"]}
        objective, goal = OBJECTIVES["cross_entropy"](defense), misclassified(defense)
        return ~attack(objective, batch["image"], context, seed, goal).success

    return np.concatenate([survived(batch) for batch in split.batches(256)]).mean()


class TestSelectBest:
    """Selection on scripted validation values, with a real model and real checkpoints."""

    def fit(self, folder, values, *, guard=True, guard_after=0, **more):
        image = keras.Input([1])
        model = keras.Model(image, keras.layers.Dense(1, use_bias=False, kernel_initializer="zeros")(image))
        model.compile("sgd", "mse")
        model.averaged = contextlib.nullcontext
        select = training.SelectBest(folder, monitor="adversarial_accuracy", guard=guard, guard_after=guard_after)
        select.set_model(model)
        select.on_train_begin()
        model.stop_training = False
        for epoch, value in enumerate(values):
            model.set_weights([np.full([1, 1], epoch + 1.0)])
            logs = {} if value is None else {"val_adversarial_accuracy": value}
            select.on_epoch_end(epoch, {"adversarial_accuracy": 0.55, **logs, **more})
            if model.stop_training:
                break
        select.on_train_end()
        return select, float(model.get_weights()[0][0, 0])

    def test_restores_weights_of_best_epoch(self, tmp_path):
        select, weight = self.fit(tmp_path, [0.2, 0.5, 0.4, 0.45])
        assert (select.best, select.best_epoch, select.collapsed_epoch, weight) == (0.5, 2, None, 2.0)

    def test_skips_epochs_without_validation(self, tmp_path):
        select, weight = self.fit(tmp_path, [None, 0.3, None, 0.2])
        assert (select.best_epoch, weight) == (2, 2.0)

    def test_guard_stops_on_collapse_and_says_so(self, tmp_path, capsys):
        select, weight = self.fit(tmp_path, [0.2, 0.5, 0.1, 0.6])
        assert (select.collapsed_epoch, select.best_epoch, weight) == (3, 2, 2.0)
        assert "catastrophic overfitting in epoch 3" in capsys.readouterr().err

    def test_guard_stops_where_training_is_blind_from_the_start(self, tmp_path, capsys):
        select, _ = self.fit(tmp_path, [0.02, 0.03, 0.04])
        assert (select.collapsed_epoch, select.best_epoch) == (1, 1)
        assert "far below that under the training attack; training stopped, epoch 1" in capsys.readouterr().err
        assert self.fit(tmp_path / "near", [0.06, 0.07])[0].collapsed_epoch is None

    def test_guard_lets_the_warm_up_pass(self, tmp_path):
        select, _ = self.fit(tmp_path, [0.2, 0.05, 0.3, 0.1], guard_after=2)
        assert (select.collapsed_epoch, select.best_epoch) == (4, 3)

    def test_without_guard_training_goes_on(self, tmp_path):
        select, weight = self.fit(tmp_path, [0.2, 0.5, 0.1, 0.6], guard=False)
        assert (select.collapsed_epoch, select.best_epoch, weight) == (None, 4, 4.0)

    def test_guard_lets_a_fall_pass_that_training_shares(self, tmp_path):
        select, _ = self.fit(tmp_path, [0.10, 0.04, 0.3], adversarial_accuracy=0.12)
        assert (select.collapsed_epoch, select.best_epoch) == (None, 3)

    def test_loss_that_is_not_finite_ends_the_run(self, tmp_path):
        with pytest.raises(InputError, match="not finite after epoch 1; lower --train_learning_rate"):
            self.fit(tmp_path, [0.2], cross_entropy_loss=float("nan"))

    def test_run_that_is_never_validated_is_refused(self, tmp_path):
        with pytest.raises(UsageError, match="no epoch was validated"):
            self.fit(tmp_path, [None, None])


def test_guard_restores_best_epoch_after_real_collapse(digits_as_they_are, tmp_path):
    """Trained on with FGSM without a random start, a model learns to mask that attack and falls to PGD."""
    epsilon = 0.35
    keras.utils.set_random_seed(0)
    backbone = backbones.build(config.Backbone(name="small_cnn"), image_shape=(8, 8, 1), classes=10)
    validation_attack = PGD(epsilon=epsilon, steps=10, keep="last")
    defense = PGDAT(backbone, attack=PGD(epsilon=epsilon, steps=3, keep="last"), validation_attack=validation_attack)
    select = training.SelectBest(tmp_path, monitor="adversarial_accuracy", guard=True)
    last_weights = []

    def fit(first_epoch, epochs):
        defense.compile(keras.optimizers.Adam(0.003))
        train, validation = digits_as_they_are.train, digits_as_they_are.validation
        keep = keras.callbacks.LambdaCallback(
            on_epoch_end=lambda epoch, logs: last_weights.__setitem__(slice(None), defense.get_weights())
        )
        return defense.fit(
            train.epochs(64, seed=0, epochs=epochs, first_epoch=first_epoch),
            initial_epoch=first_epoch,
            epochs=epochs,
            steps_per_epoch=train.steps_per_epoch(64),
            validation_data=validation.batches(256),
            callbacks=[keep, select],
            verbose=0,
        ).history

    hardened = fit(0, 8)
    before = defense.get_weights()
    defense.attack = FGSM(epsilon=epsilon)
    masked = fit(8, 16)

    assert select.collapsed_epoch is not None and len(masked["adversarial_accuracy"]) == select.collapsed_epoch - 8
    assert masked["adversarial_accuracy"][-1] > max(hardened["adversarial_accuracy"])  # of its own attack
    for found, expected in zip(defense.backbone.get_weights(), before):
        np.testing.assert_array_equal(found, expected)
    restored = pgd_accuracy(defense, digits_as_they_are.validation, epsilon)
    defense.set_weights(last_weights)
    collapsed = pgd_accuracy(defense, digits_as_they_are.validation, epsilon)
    assert collapsed < 0.05 and collapsed < restored

"""The packages that the project is asked to be built on are used by shipped code, and what they do for it works."""

import ast
from pathlib import Path

import cleverhans
import keras
import numpy as np
import pytest
import tensorflow as tf

import kerasdefense
from kerasdefense import attacks, config, data, flags, training
from kerasdefense.training import fitting

PACKAGE = Path(kerasdefense.__file__).parent
ASKED = ("tensorflow", "keras", "tensorflow_datasets", "cleverhans", "tensorflow_addons", "absl")


def imported():
    found = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                found.add(node.module.partition(".")[0])
    return found


@pytest.mark.parametrize("package", ASKED)
def test_design_card_package_is_imported_by_shipped_code(package):
    assert package in imported()


def test_design_card_tensorflow_datasets_builds_digits(tmp_path):
    splits = data.load(config.Data(dir=str(tmp_path)))
    assert splits.test.examples > 300
    assert list(tmp_path.rglob("dataset_info.json"))  # TFDS' own format on disk


def test_design_card_cleverhans_attack_lowers_accuracy():
    assert cleverhans.__version__.startswith("4.")
    kernel = tf.constant(np.random.default_rng(0).normal(size=(16, 3)), tf.float32)

    def logits_fn(image):
        return tf.reshape(image, [-1, 16]) @ kernel

    image = tf.random.stateless_uniform([20, 4, 4, 1], [1, 2])
    label = tf.argmax(logits_fn(image), axis=1, output_type=tf.int32)
    attack = attacks.ATTACKS["cleverhans_pgd"](epsilon=0.3)
    result = attack(logits_fn, image, label, attacks.seeds.per_example(0, 0, tf.range(20)))
    assert np.mean(result.success) > 0.5


def test_design_card_tensorflow_addons_sets_rate_and_progress(capsys):
    rate = training.make_optimizer(config.Train(learning_rate=0.4), steps=100)._learning_rate
    assert type(rate).__module__.startswith("tensorflow_addons")
    model = keras.Sequential([keras.layers.Dense(1)])
    model.compile(keras.optimizers.SGD(rate), "mse")
    model.fit(np.ones([4, 1]), np.ones([4, 1]), verbose=0, callbacks=[fitting.TQDMProgressBar()])
    assert "1/1" in capsys.readouterr().err


def test_design_card_absl_parses_flags():
    assert flags.parse(["--attack_epsilon=8/255"]).attack.epsilon == 8 / 255

import subprocess
import sys

import keras
import numpy as np

from kerasdefense import config, training


def test_keras_file_restores_class_attack_and_optimizer_slots(defense, pixels, tmp_path):
    defense.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    image = pixels / np.float32(255)
    assert type(loaded) is type(defense)
    assert loaded.attack == defense.attack and loaded.validation_attack == defense.validation_attack
    np.testing.assert_allclose(loaded(image), defense(image), atol=1e-5)
    assert len(loaded.optimizer.variables) == len(defense.optimizer.variables) > 2 * len(defense.trainable_variables)
    for restored, original in zip(loaded.optimizer.variables, defense.optimizer.variables):
        np.testing.assert_array_equal(restored, original)
    assert max(np.abs(slot).max() for slot in defense.optimizer.variables[2:]) > 0


def test_keras_file_of_a_default_run_loads_after_importing_the_package(make, pixels, tmp_path):
    defense = make()
    defense.compile(training.make_optimizer(config.Train(), steps=4))
    image = pixels / np.float32(255)
    defense.fit(image, np.arange(6, dtype=np.int32) % 3, verbose=0)
    defense.save(tmp_path / "model.keras")
    np.save(tmp_path / "image.npy", image)
    script = """
import sys, keras, kerasdefense, numpy as np
model = keras.models.load_model(sys.argv[1] + "/model.keras")
np.save(sys.argv[1] + "/logits.npy", model(np.load(sys.argv[1] + "/image.npy")))
"""
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    np.testing.assert_allclose(np.load(tmp_path / "logits.npy"), defense(image), atol=1e-5)

"""Your own model: a Keras classifier made elsewhere, trained by compile() + fit() on plain pairs."""

import keras
import numpy as np
import tensorflow as tf

from kerasdefense import PGD, PGDAT, as_backbone


def test_own_model_mobilenet_trains_adversarially(tmp_path):
    model = keras.applications.MobileNetV2(weights=None, input_shape=(32, 32, 3), classes=3, alpha=0.35)
    backbone = as_backbone(model, preprocess=keras.layers.Rescaling(2.0, offset=-1.0))
    defense = PGDAT(backbone, attack=PGD(epsilon=8 / 255, steps=1, keep="last"))
    defense.compile(keras.optimizers.Adam(1e-3))
    random = np.random.default_rng(0)
    label = random.integers(3, size=8)
    image = random.uniform(size=(8, 32, 32, 3)).astype(np.float32)
    history = defense.fit(tf.data.Dataset.from_tensor_slices((image, label)).batch(4), epochs=2, verbose=0).history
    assert np.isfinite(history["cross_entropy_loss"]).all()
    defense.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_allclose(loaded(image), defense(image), atol=1e-5)

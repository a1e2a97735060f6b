"""Your own model: a Keras classifier made elsewhere, trained by compile() + fit() on plain pairs."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from kerasdefense import FGSMRS, PGD, PGDAT, UsageError, as_backbone
from kerasdefense.backbones import with_orthogonal_head
from kerasdefense.defenses import DEFENSES, ExampleBank


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


@pytest.mark.parametrize("name", DEFENSES)
def test_own_model_trains_under_every_defense(name):
    image = keras.Input([8, 8, 1])
    pooled = keras.layers.GlobalAveragePooling2D()(keras.layers.Conv2D(4, 3, activation="relu")(image))
    backbone = as_backbone(keras.Model(image, keras.layers.Dense(3, activation="softmax")(pooled)))
    if name in ("dfa", "dfa_at"):
        backbone = with_orthogonal_head(backbone)
    width = {"atop": "purifier_width", "cafd": "denoiser_width"}.get(name)
    small = {width: 2, "critic_width": 2} if width else {}
    defense = DEFENSES[name](backbone, attack=FGSMRS(epsilon=0.1), **small)
    defense.compile("sgd")
    trained = [*backbone.trainable_variables]
    if name == "cafd":  # which leaves the classifier as it is; a first step from the identity moves the last layer only
        trained = [defense.denoiser.get_layer("residual").kernel, *defense.critic.trainable_variables[:1]]
    if name == "atop":
        trained = [*defense.purifier.trainable_variables, *defense.critic.trainable_variables[:1]]
    before = [variable.numpy() for variable in trained]
    images = np.random.default_rng(0).uniform(size=(8, 8, 8, 1)).astype(np.float32)
    label = np.arange(8)[:, None] % 3  # as keras.datasets gives them
    if defense.needs_bank:
        defense.bank = ExampleBank((images * 255).astype(np.uint8), label[:, 0], classes=3)
    defense.fit(images, label, batch_size=4, verbose=0)
    assert not any(np.array_equal(one, two) for one, two in zip(before, trained, strict=True))
    assert np.abs(defense(images).numpy().sum(axis=1) - 1).min() > 1e-3  # logits, though the model ends in a softmax


def test_weights_and_one_hot_labels_are_refused():
    image = keras.Input([8, 8, 1])
    backbone = as_backbone(
        keras.Model(
            image, keras.layers.Dense(3)(keras.layers.GlobalAveragePooling2D()(keras.layers.Conv2D(2, 3)(image)))
        )
    )
    defense = PGDAT(backbone, attack=FGSMRS(epsilon=0.1))
    images, label = np.zeros([4, 8, 8, 1], np.float32), np.zeros(4, np.int32)
    with pytest.raises(UsageError, match="weights are not used"):
        defense.unpack((images, label, np.ones(4)))
    with pytest.raises(UsageError, match="not one-hot"):
        defense.unpack((images, np.eye(3)[label]))

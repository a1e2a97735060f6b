"""One suite over every entry of DEFENSES: each is described once, in CASES, and must pass everything here."""

import inspect

import keras
import numpy as np
import pytest
import tensorflow as tf

from kerasdefense import backbones, config
from kerasdefense.attacks import FGSMRS, PGD, seeds
from kerasdefense.backbones import blocks, gated
from kerasdefense.defenses import DEFENSES, Defense, ExampleBank
from kerasdefense.training import mirrored

SHAPE, CLASSES, BATCH = (8, 8, 1), 3, 8
ORTHOGONAL = config.Backbone(name="small_cnn", width=4, head="orthogonal")
CASES = {
    "agkd_bml": {"attack": PGD(epsilon=0.1, steps=2, keep="last")},
    "atop": {
        "attack": PGD(epsilon=0.1, steps=1, keep="last"),
        "sigma": 0.1,
        "missing_rate": 0.1,
        "lam_ce": 1.0,
        "validation_draws": 1,
    },
    "cafd": {"attack": PGD(epsilon=0.1, steps=2, keep="last"), "lam_f": 1.0},
    "dfa": {"attack": PGD(epsilon=0.1, steps=2, keep="last"), "architecture": ORTHOGONAL},
    "dfa_at": {"attack": PGD(epsilon=0.1, steps=2, keep="last"), "architecture": ORTHOGONAL},
    "fgsm_rs": {"attack": FGSMRS(epsilon=0.1)},
    "mart": {"attack": PGD(epsilon=0.1, steps=2, keep="last")},
    "mixup": {"attack": PGD(epsilon=0.1, steps=2, keep="last")},
    "osdn_caml": {"attack": PGD(epsilon=0.1, steps=2, keep="last")},
    "pgd_at": {"attack": PGD(epsilon=0.1, steps=2, keep="last")},
    "standard": {"attack": PGD(epsilon=0.1, steps=2, keep="last")},
    "trades": {"attack": PGD(epsilon=0.1, steps=2, keep="last")},
}
PURIFYING = ("atop", "cafd")
"""Defenses that train what images pass before a classifier, which stays as it is."""
LEARNT = {"atop": "adversarial_accuracy", "cafd": "restoration"}
"""What must rise in their training: the classifier knows its classes before."""
WITHOUT_NOISE = {"atop": {"rt": 0}}
"""Settings with which a defense that draws at random does not."""
SMALL = config.Backbone(name="small_cnn", width=4)


def make(name, optimizer=None, precision="float32", **kwargs):
    keras.utils.set_random_seed(3)
    settings = {"architecture": SMALL, **CASES[name], **kwargs}
    architecture = settings.pop("architecture")
    backbone = backbones.build(architecture, image_shape=SHAPE, classes=CLASSES)
    if precision != "float32":
        backbone = backbones.with_precision(backbone, precision)
    if name in PURIFYING:
        settings |= small_networks(name, precision)
    validation = PGD(epsilon=0.1, steps=2, keep="last")
    defense = DEFENSES[name](backbone, validation_attack=validation, **settings)
    defense.compile(optimizer or keras.optimizers.SGD(0.1, momentum=0.9))
    return with_bank(defense)


def with_bank(defense):
    """Give a defense that draws from the training images what it draws from."""
    if defense.needs_bank:
        data = make_data()
        image = np.round(data["image"] * 255).astype(np.uint8)
        defense.bank = ExampleBank(image, data["label"], classes=CLASSES)
    return defense


def small_networks(name, precision):
    """Return networks that are traced in a moment, as what the constructor of a defense takes."""
    return {"atop": small_purifier, "cafd": small_denoiser}[name](precision)


def small_purifier(precision):
    """Return a purifier and a critic, from image and mask."""
    inputs, both = gated.begin(SHAPE)
    hidden = blocks.relu(blocks.convolution(both, 4, 3, name="hidden"), name="hidden_relu")
    coarse = gated.head(both, 1, name="coarse")
    refined = gated.head(keras.layers.Concatenate()([both, hidden]), 1, name="refined")
    purifier = gated.end(inputs, coarse, refined, name="purifier")
    kernel = purifier.get_layer("refined").kernel
    kernel.assign(kernel + np.pad([[[[3.0]]]], ((1, 1), (1, 1), (0, 6), (0, 0))))  # not far from the identity
    hidden = keras.layers.LeakyReLU(0.2)(blocks.convolution(both, 2, 3, stride=2, name="half"))
    critic = keras.Model(inputs, keras.layers.Flatten(dtype="float32", name="judgements")(hidden), name="critic")
    return {
        "purifier": backbones.with_precision(purifier, precision),
        "critic": backbones.with_precision(critic, precision, but="judgements"),
    }


def small_denoiser(precision):
    """Return a denoiser and a critic, from images."""
    image = keras.Input(SHAPE, name="image")
    hidden = blocks.relu(blocks.normalised_convolution(image, 4, 3, name="hidden"), name="hidden_relu")
    start = keras.initializers.RandomNormal(stddev=0.05)  # not the identity
    last = keras.layers.Conv2D(1, 1, kernel_initializer=start, dtype="float32", name="residual")
    denoiser = keras.Model(image, last(hidden), name="denoiser")
    hidden = keras.layers.Flatten()(blocks.relu(blocks.convolution(image, 2, 3, stride=2, name="half"), name="relu"))
    critic = keras.Model(image, keras.layers.Dense(1, dtype="float32", name="critic_logit")(hidden), name="critic")
    return {
        "denoiser": backbones.with_precision(denoiser, precision, but="residual"),
        "critic": backbones.with_precision(critic, precision, but="critic_logit"),
    }


def classifier_of(name, data):
    """Return the classifier that a defense is put before, trained for a moment, as what its constructor takes."""
    if name not in PURIFYING:
        return {}
    standard = make("standard", keras.optimizers.Adam(0.01))
    standard.fit(dataset(data), epochs=20, verbose=0)
    return {"classifier": standard.backbone}


def make_data(batches=2):
    random = np.random.default_rng(5)
    label = random.integers(CLASSES, size=batches * BATCH).astype(np.int32)
    image = random.uniform(size=(batches * BATCH, *SHAPE)).astype(np.float32)
    image[:, :4] *= label[:, None, None, None] / CLASSES  # something to learn
    return {"image": image, "label": label, "index": np.arange(len(label), dtype=np.int32)}


def answers(defense, data):
    """Return logits by seeds that depend on the images' indices alone."""
    return defense(data["image"], seed=seeds.per_example(0, 0, tf.constant(data["index"])))


def dataset(data):
    return tf.data.Dataset.from_tensor_slices(data).batch(BATCH)


def without_bessels_correction(defense):
    """Undo what Keras does to the moving variance of fused layers only, and so not of synchronized ones."""
    for layer in defense.submodules:
        if isinstance(layer, keras.layers.BatchNormalization):
            layer.fused = False
    return defense


def check_replicas(name, **kwargs):
    """Assert that two replicas train and report as one does."""
    data = make_data(1)
    defenses, histories = [], []
    for devices in (1, 2):
        with mirrored(("/device:CPU:0", "/device:CPU:1")[:devices]).scope():
            made = make(name, keras.optimizers.SGD(0.1), **kwargs)
            defenses.append(without_bessels_correction(made))
        histories.append(defenses[-1].fit(dataset(data), verbose=0).history)
    for one, two in zip(*(defense.get_weights() for defense in defenses)):
        np.testing.assert_allclose(one, two, atol=1e-5)
    for key, (mean,) in histories[0].items():  # what fit reports is the mean over both replicas
        np.testing.assert_allclose(histories[1][key], mean, atol=1e-5)


@pytest.mark.slow
def test_two_replicas_equal_one_through_denoising_blocks():
    check_replicas("osdn_caml", architecture=config.Backbone(name="osdn_resnet8", width=2))


def test_cases_cover_registry():
    assert set(CASES) == set(DEFENSES)


@pytest.mark.parametrize("name", DEFENSES)
class TestDefense:
    def test_config_holds_every_constructor_argument(self, name):
        arguments = {
            parameter.name
            for kind in (DEFENSES[name], Defense)
            for parameter in inspect.signature(kind.__init__).parameters.values()
            if parameter.kind is not inspect.Parameter.VAR_KEYWORD and parameter.name != "self"
        }
        objective = "targeted_dlr" if DEFENSES[name].is_targeted else "margin"
        defense = make(name, objective=objective, label_smoothing=0.1, seed=11)
        held = defense.get_config()
        assert arguments <= set(held)
        rebuilt = type(defense).from_config(held)
        assert rebuilt.attack == defense.attack and rebuilt.validation_attack == defense.validation_attack
        assert (rebuilt.objective, rebuilt.label_smoothing, rebuilt.seed) == (objective, 0.1, 11)

    def test_keras_file_restores_model_and_optimizer(self, name, tmp_path):
        data = make_data()
        defense = make(name)
        defense.fit(dataset(data), verbose=0)
        defense.save(tmp_path / "model.keras")
        loaded = keras.models.load_model(tmp_path / "model.keras")
        assert type(loaded) is DEFENSES[name] and loaded.attack == defense.attack
        np.testing.assert_array_equal(answers(loaded, data), answers(defense, data))
        for (restored, _), (original, _) in zip(loaded.optimizers(), defense.optimizers(), strict=True):
            for one, two in zip(restored.variables, original.variables, strict=True):
                np.testing.assert_array_equal(one, two)
        assert int(loaded.step) == int(defense.step) == 2
        for model in (with_bank(loaded), defense):  # training goes on alike
            model.fit(dataset(data), verbose=0)
        np.testing.assert_allclose(answers(loaded, data), answers(defense, data), atol=1e-5)

    def test_fit_takes_plain_pairs(self, name):
        data = make_data()
        by_dict, by_pair = make(name), make(name)
        by_dict.fit(dataset(data), verbose=0)
        history = by_pair.fit(data["image"], data["label"], batch_size=BATCH, shuffle=False, verbose=0).history
        assert set(by_pair.terms) <= set(history)
        if name == "standard":  # no random start, so that the missing indices change nothing
            np.testing.assert_allclose(by_pair(data["image"]), by_dict(data["image"]), atol=1e-6)

    def test_training_learns(self, name):
        data = make_data(4)
        defense = make(name, keras.optimizers.Adam(0.01), **classifier_of(name, data))
        before = defense.evaluate(dataset(data), verbose=0, return_dict=True)
        defense.fit(dataset(data), epochs=20, verbose=0)
        after = defense.evaluate(dataset(data), verbose=0, return_dict=True)
        least = -1 if name in PURIFYING else before["clean_accuracy"]
        assert after["clean_accuracy"] > max(least, 0.6)
        learnt = LEARNT.get(name)
        assert learnt is None or after[learnt] > before[learnt]
        assert after["adversarial_accuracy"] <= after["clean_accuracy"]

    def test_paths_give_differentiable_logits(self, name):
        data = make_data()
        paths = make(name).attack_paths()
        assert "exact" in paths
        seed = seeds.per_example(0, 0, tf.constant(data["index"]))
        for path in paths.values():
            image = tf.constant(data["image"])
            with tf.GradientTape() as tape:
                tape.watch(image)
                logits = path(image, seed)
            assert logits.shape == (len(data["label"]), CLASSES)
            assert np.abs(tape.gradient(logits, image)).max() > 0

    def test_call_and_activations_agree(self, name):
        image = make_data()["image"]
        defense = make(name, **WITHOUT_NOISE.get(name, {}))
        activations = defense.activations(image)
        assert set(activations) == {"feature_map", "embedding", "logits"}
        np.testing.assert_allclose(activations["logits"], defense(image), atol=1e-6)

    def test_attack_changes_no_variable(self, name):
        data = make_data()
        defense = make(name)
        before = [variable.numpy() for variable in defense.variables]
        batch = defense.unpack(data)
        image_adv = defense.craft(batch, defense.attack)
        assert 0 < np.abs(image_adv - data["image"]).max() <= defense.attack.epsilon * (1 + 1e-5) + 1e-7
        for variable, value in zip(defense.variables, before):
            np.testing.assert_array_equal(variable, value)

    def test_two_replicas_equal_one(self, name):
        check_replicas(name)

    def test_perturbed_weights_are_put_back_exactly(self, name):
        """With a learning rate of 0 nothing moves but the statistics of the one pass at the perturbed weights."""
        data = make_data(1)
        plain, perturbed = make(name, keras.optimizers.SGD(0.0)), make(name, keras.optimizers.SGD(0.0), awp_gamma=0.01)
        before = [variable.numpy() for variable in perturbed.trainable_variables]
        histories = [each.fit(dataset(data), verbose=0).history for each in (plain, perturbed)]
        assert sum(histories[1][term][0] for term in plain.terms) > sum(histories[0][term][0] for term in plain.terms)
        for variable, value in zip(perturbed.trainable_variables, before):
            np.testing.assert_array_equal(variable, value)

    def test_float16_trains_with_a_working_loss_scale(self, name):
        data = {key: value[:4] for key, value in make_data(1).items()}
        defense = make(name, keras.optimizers.SGD(0.01), precision="mixed_float16", awp_gamma=0.01)
        assert isinstance(defense.optimizer, keras.mixed_precision.LossScaleOptimizer)
        scale = float(defense.optimizer.loss_scale)
        for _ in range(3):
            losses = defense.train_on_batch(data["image"], data["label"], return_dict=True)
            assert all(np.isfinite(loss) for loss in losses.values())
        assert float(defense.optimizer.loss_scale) == scale  # no gradient overflowed
        (_, trained), *_ = defense.optimizers()
        before = [variable.numpy() for variable in trained]
        overflowing = np.float32(2.0) ** 126
        defense.optimizer._loss_scale._current_loss_scale.assign(overflowing)
        defense.train_on_batch(data["image"], data["label"])
        assert float(defense.optimizer.loss_scale) == overflowing / 2  # the step was left out
        for found, expected in zip(trained, before, strict=True):
            np.testing.assert_array_equal(found, expected)

    def test_no_retrace_after_first_step(self, name):
        defense = make(name)
        train = defense.make_train_function()
        train(iter(dataset(make_data())))  # traces twice: the optimizer's slots are made in it
        traced = defense.train_tf_function.experimental_get_tracing_count()
        for _ in range(3):
            train(iter(dataset(make_data())))
        assert defense.train_tf_function.experimental_get_tracing_count() == traced

    def test_bad_batches_stop_with_a_reason(self, name):
        data = make_data(1)
        defense = make(name)
        bright = {**data, "image": data["image"] * 255}
        with pytest.raises(tf.errors.InvalidArgumentError, match=r"images must be in \[0, 1\]"):
            defense.fit(dataset(bright), verbose=0)
        missing = {**data, "image": np.full_like(data["image"], np.nan)}
        with pytest.raises(tf.errors.InvalidArgumentError, match="not NaN"):
            defense.fit(dataset(missing), verbose=0)
        unknown = {**data, "label": data["label"] + CLASSES}
        with pytest.raises(tf.errors.InvalidArgumentError, match=r"labels must be in \[0, 3\)"):
            defense.fit(dataset(unknown), verbose=0)

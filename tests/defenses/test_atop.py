"""AToP: the acceptance properties S1 to S9 of its specification, and a step against a transcription of the algorithm.

T1 to T5 are in tests/layers, P1 to P4 in tests/backbones, tests/layers and tests/losses, E1 to E6 in
test_atop_claims.py.
"""

from __future__ import annotations

import functools

import keras
import numpy as np
import pytest
import tensorflow as tf

from kerasdefense import InputError, UsageError, backbones, config, defenses
from kerasdefense.attacks import FGSM, FGSMRS, PGD, seeds
from kerasdefense.backbones import blocks, gated
from kerasdefense.defenses import AToP
from kerasdefense.defenses.batch import Batch
from kerasdefense.layers import RandomTransform
from kerasdefense.run import load_defense

SHAPE, CLASSES, BATCH, EPSILON, RATE = (8, 8, 1), 4, 6, 0.1, 0.05
ONE_STEP = FGSM(epsilon=EPSILON)
SEED = seeds.per_example(7, 3, tf.range(BATCH))
SMALL = {"purifier_width": 2, "critic_width": 2}


@functools.cache
def untrained(width=2, image_shape=SHAPE, classes=CLASSES):
    """Return one classifier for all tests, as none is ever changed."""
    keras.utils.set_random_seed(2)
    image = keras.Input(image_shape, name="image")
    hidden = blocks.relu(blocks.normalised_convolution(image, 2 * width, 3, stride=2, name="half"), name="half_relu")
    last = keras.layers.Dense(classes, kernel_initializer=keras.initializers.RandomNormal(stddev=5.0), name="logits")
    return backbones.as_backbone(keras.Model(image, last(keras.layers.GlobalAveragePooling2D(name="pooled")(hidden))))


def small_purifier(image_shape=SHAPE, precision="float32"):
    """Return a purifier of two stages that is traced in a moment."""
    inputs, tensor = gated.begin(image_shape)
    hidden = blocks.convolution(tensor, 6, 3, name="hidden", use_bias=True)
    heads = [gated.head(each, image_shape[-1], name=name) for each, name in ((tensor, "coarse"), (hidden, "refined"))]
    purifier = gated.end(inputs, *heads, name="purifier")
    for variable in purifier.trainable_variables:  # so that what it gives is not all grey
        variable.assign(3 * variable)
    return backbones.with_precision(purifier, precision)


def small_critic(precision="float32"):
    image, mask = keras.Input(SHAPE, name="image"), keras.Input((*SHAPE[:2], 1), name="mask")
    hidden = blocks.convolution(keras.layers.Concatenate()([image, mask]), 3, 3, stride=2, name="half", use_bias=True)
    last = keras.layers.Flatten(dtype="float32", name="judgements")
    critic = keras.Model([image, mask], last(keras.layers.LeakyReLU(0.2)(hidden)), name="critic")
    return backbones.with_precision(critic, precision, but="judgements")


def make(optimizer=None, attack=ONE_STEP, backbone=None, **kwargs):
    keras.utils.set_random_seed(3)
    if "purifier" not in kwargs:
        kwargs["purifier"] = small_purifier()
    if "critic" not in kwargs and kwargs.get("lam_gan", 1):
        kwargs["critic"] = small_critic()
    defense = AToP(backbone or untrained(), attack=attack, **{"sigma": 0.1, **kwargs})
    defense.compile(optimizer or keras.optimizers.SGD(RATE))
    return defense


@pytest.fixture(scope="module")
def still():
    """Return a defense for all tests that train nothing."""
    return make()


def make_data(size=BATCH):
    random = np.random.default_rng(7)
    return {
        "image": random.uniform(size=(size, *SHAPE)).astype(np.float32),
        "label": random.integers(CLASSES, size=size).astype(np.int32),
        "index": np.arange(5, 5 + size, dtype=np.int32),
    }


def batch_of(data):
    return Batch(*(tf.constant(data[key]) for key in ("image", "label", "index")))


def copy_of(model):
    copy = type(model).from_config(model.get_config())
    copy.set_weights(model.get_weights())
    return copy


def assert_same(weights, others):
    for one, two in zip(weights, others, strict=True):
        np.testing.assert_array_equal(one, two)


def assert_differ(weights, others):
    assert not any(np.array_equal(one, two) for one, two in zip(weights, others, strict=True))


def changed(one, two):
    return np.abs(np.subtract(one, two)).max(axis=(1, 2, 3))


# The algorithm of the class docstring, on models of one's own


def f(image):
    return untrained()(image, training=False)["logits"]


def cross_entropy(logits, label):
    return tf.nn.sparse_softmax_cross_entropy_with_logits(label, logits)


def draw_of(data, draw, step=0):
    """Return the seeds of one of the draws of a step: -1 that of the attack, -2 that of an update of its own."""
    seed = seeds.per_example(0, step, tf.constant(data["index"]))
    return seeds.advance(seed, tf.fill([len(data["index"])], draw))


def t(image, seed, **settings):
    """Return what noise and holes leave of images, and the holes."""
    transform = RandomTransform(2, sigma=0.1, **settings)
    mask = transform.drawn_masks(seed, *SHAPE[:2])
    noisy = np.clip(image + 0.1 * transform.noise(seed, SHAPE), 0, 1)
    return tf.where(mask == 1, 0.5, noisy), mask


def g(purifier, image, seed):
    """Return y1, y2 and the holes, with a gradient by the image."""
    transform = RandomTransform(2, sigma=0.1)
    mask = transform.drawn_masks(seed, *SHAPE[:2])
    noisy = tf.clip_by_value(image + 0.1 * transform.noise(seed, SHAPE), 0, 1)
    restored = purifier([noisy * (1 - mask) + 0.5 * mask, mask])
    return restored["coarse"], restored["refined"], mask


def fgsm(image, loss_fn, epsilon=EPSILON):
    image = tf.constant(image)
    with tf.GradientTape() as tape:
        tape.watch(image)
        loss = loss_fn(image)
    return np.clip(image + epsilon * np.sign(tape.gradient(loss, image)), 0, 1)


def attacked(purifier, data, through="pipeline", draws=2, step=0):
    """Return images after step 1."""
    label, shared = data["label"], draw_of(data, -1, step)
    if through == "classifier":
        return fgsm(data["image"], lambda image: cross_entropy(f(image), label))
    ways = [shared] if through == "pipeline" else [shared, *(advanced(shared, draw) for draw in range(1, draws))]

    def mean_loss(image):
        return sum(cross_entropy(f(g(purifier, image, seed)[1]), label) for seed in ways) / len(ways)

    return fgsm(data["image"], mean_loss)


def advanced(seed, draw):
    return seeds.advance(seed, tf.fill([len(seed)], draw))


def terms_of(
    purifier, critic, data, image_adv, seed, *, lam_ce=0.1, lam_l1=2.0, lam_gan=0.01, recon_input="adv",
    recon_target="clean", smoothing=0.0, is_on=True,
):  # fmt: skip
    """Return the terms of steps 4 and 5."""
    target = data["image"] if recon_target == "clean" else image_adv
    y1, y2, mask = g(purifier, image_adv if recon_input == "adv" else data["image"], seed)
    terms = {}
    if lam_l1:
        terms["reconstruction_loss"] = lam_l1 * (tf.reduce_mean(abs(target - y1)) + tf.reduce_mean(abs(target - y2)))
    if lam_gan:
        terms["adversarial_loss"] = -lam_gan * tf.reduce_mean(critic([y2, mask], training=True))
    if lam_ce:
        log_probability = tf.nn.log_softmax(f(g(purifier, image_adv, seed)[1]))
        aim = (1 - smoothing) * tf.one_hot(data["label"], CLASSES) + smoothing / CLASSES
        terms["cross_entropy_loss"] = -is_on * lam_ce * tf.reduce_mean(tf.reduce_sum(aim * log_probability, axis=1))
    return terms


def descend(model, loss_fn):
    """Take a step of SGD and return the loss before it."""
    with tf.GradientTape() as tape:
        loss = loss_fn()
    for variable, each in zip(model.trainable_variables, tape.gradient(loss, model.trainable_variables)):
        if each is not None:
            variable.assign_sub(RATE * each)
    return loss


def transcribed_step(purifier, critic, data, *, through="pipeline", share_noise=True, step=0, is_on=True, **weights):
    """Take the step on models of one's own, with SGD; return the terms of the losses by name."""
    is_attacked = weights.get("lam_ce", 0.1) and is_on
    image_adv = attacked(purifier, data, through, step=step) if is_attacked else data["image"]
    seed, terms = draw_of(data, -1 if share_noise else -2, step), {}
    _, fake, mask = g(purifier, image_adv if weights.get("recon_input") != "clean" else data["image"], seed)
    real = image_adv if weights.get("recon_target") == "adv" else data["image"]

    def of_critic():
        d_real, d_fake = critic([real, mask], training=True), critic([fake, mask], training=True)
        return tf.reduce_mean(tf.nn.relu(1 - d_real)) / 2 + tf.reduce_mean(tf.nn.relu(1 + d_fake)) / 2

    if weights.get("lam_gan", 1):
        terms["critic_loss"] = descend(critic, of_critic)

    def of_purifier():
        terms.update(terms_of(purifier, critic, data, image_adv, seed, is_on=is_on, **weights))
        return sum(value for name, value in terms.items() if name != "critic_loss")

    descend(purifier, of_purifier)
    return terms


@pytest.mark.parametrize(
    "settings",
    [
        {"lam_ce": 0.5, "lam_gan": 0.5, "smoothing": 0.2},
        {"lam_ce": 0.5, "recon_input": "clean", "recon_target": "adv", "lam_gan": 0.2},
        {"lam_ce": 0.5, "recon_input": "clean", "share_noise": False, "lam_gan": 0.0},
        {"lam_ce": 0.5, "lam_l1": 0.0, "through": "classifier", "recon_target": "adv"},
        {"lam_ce": 2.0, "lam_l1": 0.0, "lam_gan": 0.0, "through": "pipeline-eot"},
        {"lam_ce": 0.0, "lam_gan": 0.5},
    ],
    ids=lambda settings: ", ".join(f"{name}={value}" for name, value in settings.items()),
)
def test_step_is_the_transcribed_one(settings):
    own = {
        {"through": "attack_through", "smoothing": "label_smoothing"}.get(key, key): settings[key] for key in settings
    }
    defense, data = make(**own), make_data()
    purifier, critic = copy_of(defense.purifier), copy_of(defense.critic) if defense.critic else None
    for step in range(2):
        expected = transcribed_step(purifier, critic, data, step=step, **settings)
        found = defense.train_step(data)
        assert set(expected) == set(defense.terms) == set(found) - {"adversarial_accuracy"}
        assert ("adversarial_accuracy" in found) == (settings["lam_ce"] > 0)
        for name, value in expected.items():
            assert float(found[name]) == pytest.approx(float(value), rel=1e-4, abs=1e-6)
        for mean in defense.metrics:
            mean.reset_state()
    for part, copy in ((defense.purifier, purifier), (defense.critic, critic)):
        for one, two in zip(part.get_weights() if part else (), copy.get_weights() if copy else (), strict=True):
            np.testing.assert_allclose(one, two, atol=1e-5)


# AToP S5: while warming up images are clean and labels count for nothing
@pytest.mark.parametrize("recon_input", ["adv", "clean"])
def test_warm_up_is_the_transcribed_step_without_attack_and_labels(recon_input):
    defense, data = make(warmup_steps=2, lam_ce=0.5, recon_input=recon_input), make_data()
    purifier, critic = copy_of(defense.purifier), copy_of(defense.critic)
    for step in range(3):
        is_on = step == 2
        weights = {"lam_ce": 0.5, "recon_input": recon_input}
        expected = transcribed_step(purifier, critic, data, step=step, is_on=is_on, **weights)
        assert np.array_equal(defense.craft(batch_of(data), ONE_STEP), data["image"]) != is_on
        found = defense.train_step(data)
        assert (float(found["cross_entropy_loss"]) > 0.1) == is_on
        for name, value in expected.items():
            assert float(found[name]) == pytest.approx(float(value), rel=1e-4, abs=1e-6)
        for mean in defense.metrics:
            mean.reset_state()
    for one, two in zip(defense.purifier.get_weights(), purifier.get_weights()):
        np.testing.assert_allclose(one, two, atol=1e-5)


# AToP S5: by whole runs too, in a graph that is traced once
def test_cross_entropy_has_no_weight_while_warming_up_in_a_graph():
    defense, data = make(warmup_steps=2), make_data()
    losses = [defense.train_on_batch(data["image"], data["label"], return_dict=True) for _ in range(4)]
    assert [each["cross_entropy_loss"] > 0 for each in losses] == [False, False, True, True]


# AToP S1: a run trains purifier and critic, and never the classifier
def test_training_changes_purifier_and_critic_and_never_the_classifier():
    given = copy_of(untrained())
    defense = make(keras.optimizers.SGD(RATE, momentum=0.9, weight_decay=0.1), backbone=given)
    before, parts = given.get_weights(), [defense.purifier.get_weights(), defense.critic.get_weights()]
    assert any("moving" in each.name for each in defense.backbone.weights)
    data = make_data()
    defense.fit(data["image"], data["label"], batch_size=3, epochs=2, verbose=0)
    assert_same(defense.backbone.get_weights(), before)
    assert_same(given.get_weights(), before)
    for part, old in zip((defense.purifier, defense.critic), parts):
        assert_differ(part.get_weights(), old)
    assert given.trainable_variables and not defense.backbone.trainable_variables
    owners = [[id(each) for each in variables] for _, variables in defense.optimizers()]
    assert owners == [[id(each) for each in part.trainable_variables] for part in (defense.purifier, defense.critic)]


# AToP S2: each loss moves its own network alone
@pytest.mark.parametrize("resting", [0, 1])
def test_each_loss_moves_its_own_network_alone(resting):
    defense = make()
    (optimizer, rests), (_, moves) = [defense.optimizers()[each] for each in (resting, 1 - resting)]
    optimizer.learning_rate.assign(0)
    before = [[each.numpy() for each in part] for part in (rests, moves)]
    defense.train_step(make_data())
    assert_same(rests, before[0])
    assert_differ(moves, before[1])


# AToP S3: without labels and critic it is plain inpainting, which learns 32 images by heart
def test_without_critic_and_labels_it_learns_to_inpaint():
    data, ramp = make_data(32), np.linspace(0, 1, 8, dtype=np.float32)
    data["image"] = ramp[:, None, None] * data["image"][:, :1, :1] * np.ones(SHAPE, np.float32)
    purifier = backbones.build_purifier("gated_unet", SHAPE, width=4)
    defense = make(keras.optimizers.Adam(0.01), lam_ce=0.0, lam_gan=0.0, rt=1, purifier=purifier)
    assert defense.terms == ("reconstruction_loss",) and defense.critic is None and len(defense.optimizers()) == 1
    found = defense.fit(data["image"], data["label"], batch_size=32, epochs=60, verbose=0).history
    assert found["reconstruction_loss"][-1] < 0.4 * found["reconstruction_loss"][0]
    assert list(found) == ["reconstruction_loss"]


# AToP S4: the critic's judgement moves the purifier
def test_judgement_of_the_critic_moves_what_gives_the_refined_image():
    defense = make(lam_ce=0.0, lam_l1=0.0, lam_gan=1.0)
    refining = [each for each in defense.purifier.trainable_variables if "coarse" not in each.name]
    before = [each.numpy() for each in refining]
    defense.critic_optimizer.learning_rate.assign(0)
    losses = [float(defense.train_step(make_data())["adversarial_loss"])]
    assert_differ(refining, before)
    for _ in range(3):
        defense.reset_metrics()
        defense.step.assign(0)
        losses.append(float(defense.train_step(make_data())["adversarial_loss"]))
    assert losses == sorted(losses, reverse=True)


# AToP S6: attacking stays in ball and box, and changes no variable
@pytest.mark.parametrize("attack_through", ["classifier", "pipeline", "pipeline-eot"])
@pytest.mark.parametrize("attack", [FGSMRS(epsilon=EPSILON), PGD(norm="l2", epsilon=0.5, steps=2, keep="last")])
def test_attack_stays_in_the_ball_and_changes_no_variable(attack_through, attack):
    defense, batch = make(attack=attack, attack_through=attack_through), batch_of(make_data())
    before = [variable.numpy() for variable in defense.variables]
    delta = defense.craft(batch, attack) - batch.image
    length = changed(delta, 0) if attack.norm == "linf" else np.linalg.norm(np.reshape(delta, [BATCH, -1]), axis=1)
    assert (length > attack.epsilon / 3).all() and (length <= attack.epsilon + 1e-6).all()
    assert 0 <= np.min(batch.image + delta) <= np.max(batch.image + delta) <= 1
    assert_same(defense.variables, before)
    still = FGSMRS(epsilon=0.0)
    np.testing.assert_array_equal(defense.craft(batch, still), batch.image)


# AToP S7: on the draw that it saw, a small step raises the loss of the whole path
def test_attack_through_the_pipeline_raises_the_loss_on_the_same_draw():
    data, attack = make_data(64), FGSM(epsilon=0.002)
    batch, seed = batch_of(data), draw_of(data, -1)

    def raised(defense):
        before, after = (
            cross_entropy(f(g(defense.purifier, image, seed)[1]), batch.label)
            for image in (batch.image, defense.craft(batch, attack))
        )
        return np.mean(after > before)

    assert raised(make(attack=attack)) >= 0.95
    assert raised(make(attack=attack, attack_through="classifier")) < 0.95


# AToP S8: a small step descends on the same noise, holes and perturbations
def test_small_step_lowers_the_loss_on_the_same_draw():
    defense, data = make(keras.optimizers.SGD(0.01), lam_ce=1.0, lam_gan=0.1), make_data()
    before = copy_of(defense.purifier)
    image_adv, seed = defense.craft(batch_of(data), ONE_STEP).numpy(), draw_of(data, -1)
    defense.train_step(data)
    old, new = (
        sum(terms_of(each, defense.critic, data, image_adv, seed, lam_ce=1.0, lam_gan=0.1).values())
        for each in (before, defense.purifier)
    )
    assert new < old


# AToP S9: in float16 no loss and no weight ever overflows
def test_float16_trains_for_fifty_steps():
    networks = {"purifier": small_purifier(precision="mixed_float16"), "critic": small_critic("mixed_float16")}
    backbone = backbones.with_precision(untrained(), "mixed_float16")
    defense, data = make(keras.optimizers.Adam(1e-3), backbone=backbone, **networks), make_data()
    assert defense.purifier.get_layer("hidden").compute_dtype == "float16"
    assert all(isinstance(each, keras.mixed_precision.LossScaleOptimizer) for each, _ in defense.optimizers())
    scale, before = float(defense.optimizer.loss_scale), defense.purifier.get_weights()
    for _ in range(50):
        losses = defense.train_on_batch(data["image"], data["label"], return_dict=True)
        assert all(np.isfinite(each) for each in losses.values())
    assert all(np.isfinite(each).all() for each in (*defense.get_weights(), defense(data["image"])))
    assert float(defense.optimizer.loss_scale) == scale and int(defense.optimizer.iterations) == 50
    assert_differ(defense.purifier.get_weights(), before)


# AToP 6: what each way to attack attacks


@pytest.mark.parametrize("through", ["classifier", "pipeline", "pipeline-eot"])
def test_attack_is_that_of_the_transcription(through):
    defense, data = make(attack_through=through, eot_draws=3), make_data()
    for step in (0, 4):
        defense.step.assign(step)
        found = defense.craft(batch_of(data), ONE_STEP)
        expected = attacked(defense.purifier, data, through, draws=3, step=step)
        np.testing.assert_allclose(found, expected, atol=1e-6)
        assert defense.attack_budget == {"pipeline-eot": 3}.get(through, 1)


# AToP 6: the released code's attack knows of the classifier alone
def test_attack_through_the_classifier_does_not_know_of_the_purifier():
    data = batch_of(make_data())
    expected = fgsm(data.image, lambda image: cross_entropy(f(image), data.label))
    for purifier in (small_purifier(), backbones.build_purifier("gated_unet", SHAPE, width=1)):
        defense = make(attack_through="classifier", purifier=purifier)
        np.testing.assert_array_equal(defense.craft(data, ONE_STEP), expected)


def test_ways_to_attack_differ():
    data = batch_of(make_data())
    ways = ("classifier", "pipeline", "pipeline-eot")
    found = [make(attack_through=way).craft(data, ONE_STEP) for way in ways]
    for one, two in ((0, 1), (0, 2), (1, 2)):
        assert (changed(found[one], found[two]) > EPSILON / 2).all()
    np.testing.assert_array_equal(make(attack_through="pipeline-eot", eot_draws=1).craft(data, ONE_STEP), found[1])


@pytest.mark.parametrize(
    ("settings", "budget"),
    [
        ({}, 6),
        ({"attack_through": "classifier"}, 6),
        ({"attack_through": "pipeline-eot", "eot_draws": 5}, 30),
        ({"lam_ce": 0.0, "attack_through": "pipeline-eot"}, 0),
    ],
)
def test_budget_counts_gradients_of_every_draw(settings, budget):
    attack = PGD(epsilon=EPSILON, steps=3, restarts=2, keep="last")
    assert make(attack=attack, **settings).attack_budget == budget


def test_attack_by_predictions_takes_no_label():
    attack, data = PGD(epsilon=EPSILON, steps=2, keep="last"), make_data()
    other = {**data, "label": (data["label"] + 1) % CLASSES}
    for objective in ("cross_entropy", "kl_divergence"):
        defense = make(attack=attack, objective=objective)
        one, two = (defense.craft(batch_of(each), attack) for each in (data, other))
        assert np.array_equal(one, two) == (objective == "kl_divergence")
        assert changed(one, data["image"]).min() > EPSILON / 2


# AToP D6: masks of a batch, as in the released code, in training alone
def test_masks_of_a_batch_are_for_training_alone():
    defense, image = make(mask_scope="batch"), make_data()["image"]
    masks = [each(image, SEED)[1].numpy() for each in (defense.training_transform, defense.transform)]
    assert [len({each.tobytes() for each in part}) for part in masks] == [1, BATCH]


# AToP 7: one mask in training, however many are deployed
def test_third_transform_trains_as_the_second():
    data = make_data()
    weights = []
    for rt in (2, 3):
        defense = make(rt=rt)
        defense.train_step(data)
        weights.append(defense.purifier.get_weights())
    assert_same(*weights)
    assert defense.transform.kind == 3 and defense.transform.passes == 4


# AToP 5: pre-training knows neither labels nor attacks


@pytest.mark.parametrize("recon_target", ["clean", "adv"])
def test_pre_training_takes_no_labels_and_attacks_nothing(monkeypatch, recon_target):
    data, weights = make_data(), []
    monkeypatch.setattr(FGSM, "__call__", None)
    for shift in (0, 1):
        defense = make(lam_ce=0.0, recon_target=recon_target)
        found = defense.train_step({**data, "label": (data["label"] + shift) % CLASSES})
        assert set(found) == {"reconstruction_loss", "adversarial_loss", "critic_loss"} == set(defense.terms)
        weights.append(defense.purifier.get_weights())
    assert_same(*weights)
    assert defense.monitor == "restoration" and defense.attack_budget == 0


def test_restoration_is_the_negative_distance_of_both_stages_on_draws_of_its_own():
    defense, data = make(lam_ce=0.0), make_data()
    found = defense.test_step(data)
    assert list(found) == ["restoration"]
    seed = seeds.per_example(0, -3, tf.constant(data["index"]))
    y1, y2, _ = g(defense.purifier, data["image"], seed)
    expected = -np.mean(np.abs(y1 - data["image"])) - np.mean(np.abs(y2 - data["image"]))
    assert float(found["restoration"]) == pytest.approx(expected, rel=1e-4)
    defense.step.assign(9)
    defense.reset_metrics()
    assert float(defense.test_step(data)["restoration"]) == pytest.approx(expected, rel=1e-4)


def test_validation_is_by_one_fresh_draw_and_an_attack_over_the_mean_of_several():
    data, attack = make_data(), FGSM(epsilon=EPSILON)
    defense = make(validation_attack=attack, validation_draws=3)
    batch, own = batch_of(data), seeds.per_example(0, -5, tf.constant(data["index"]))
    assert defense.monitor == "adversarial_accuracy"

    def mean_loss(image):
        ways = [own, *(advanced(own, draw) for draw in (1, 2))]
        return sum(cross_entropy(f(g(defense.purifier, image, seed)[1]), batch.label) for seed in ways) / 3

    image_adv = fgsm(data["image"], mean_loss)
    np.testing.assert_allclose(defense.attacked(batch), image_adv, atol=1e-6)
    np.testing.assert_array_equal(defense.pictured(batch), defense.attacked(batch))
    found = defense.test_step(data)
    fresh = seeds.per_example(0, -3, batch.index)
    for name, image in (("clean_accuracy", data["image"]), ("adversarial_accuracy", image_adv)):
        right = np.argmax(defense(image, seed=fresh), axis=1) == data["label"]
        assert float(found[name]) == pytest.approx(right.mean())
    defense.step.assign(9)
    np.testing.assert_array_equal(defense.attacked(batch), defense.attacked(batch))


# The defended path


def test_defended_path_is_the_classifier_on_restored_images(still):
    image = make_data()["image"]
    given, mask = t(image, SEED)
    expected = still.purifier([given, mask])["refined"]
    np.testing.assert_allclose(still.purified(image, SEED), expected, atol=1e-6)
    np.testing.assert_allclose(still(image, seed=SEED), f(expected), atol=1e-5)
    assert changed(still.purified(image, SEED), image).min() > 0.05
    assert set(still.activations(image)) == {"feature_map", "embedding", "logits"}
    np.testing.assert_array_equal(still.bare_activations(image)["logits"], f(image))


# AToP 9: fresh noise at each call, in a graph too
def test_two_calls_without_a_seed_differ(still):
    image = make_data()["image"]
    for call in (still, tf.function(still), still.purified, lambda image: still.activations(image)["embedding"]):
        assert (np.abs(call(image) - call(image)).reshape(BATCH, -1).max(axis=1) > 1e-6).all()
    assert still.is_randomized


# AToP 2: the third transform answers with the union of what was left out in each pass
def test_purified_image_of_the_third_transform_is_the_union():
    defense, image = make(rt=3, masks=3), make_data()["image"]
    given, mask = RandomTransform(3, sigma=0.1, masks=3)(image, SEED)
    restored = defense.purifier([given, mask])["refined"].numpy()
    expected = np.zeros_like(image)
    for number in range(3):
        is_missing = mask.numpy()[number::3] == 1
        expected[is_missing] = restored[number::3][is_missing]
    np.testing.assert_allclose(defense.purified(image, SEED), expected, atol=1e-6)
    np.testing.assert_allclose(defense(image, seed=SEED), f(expected), atol=1e-5)


# AToP T2: no pixel that comes out was seen
def test_no_visible_pixel_leaves_the_third_transform():
    inputs, _ = gated.begin(SHAPE)
    seven = keras.layers.Rescaling(0.7)(inputs[1])
    purifier = gated.end(inputs, seven, seven, name="seven_where_missing")
    defense = AToP(untrained(), attack=ONE_STEP, rt=3, purifier=purifier, lam_gan=0.0)
    np.testing.assert_allclose(defense.purified(make_data()["image"]), np.full((BATCH, *SHAPE), 0.7), rtol=1e-6)


# AToP 9: the answer is the mean of probabilities over draws
def test_votes_are_the_logarithm_of_mean_probabilities():
    defense, image = make(votes=3), make_data()["image"]
    draws = [f(defense.purified(image, each)) for each in (advanced(SEED, 0), advanced(SEED, 1), advanced(SEED, 2))]
    expected = np.log(np.mean([tf.nn.softmax(each) for each in draws], axis=0))
    np.testing.assert_allclose(defense(image, seed=SEED), expected, atol=1e-4)
    np.testing.assert_allclose(np.exp(defense(image)).sum(axis=1), 1, atol=1e-4)
    assert np.abs(defense(image) - defense(image)).max() > 1e-4
    np.testing.assert_array_equal(make(votes=3, rt=0)(image), make(rt=0)(image))


def with_gradient(path, image):
    with tf.GradientTape() as tape:
        tape.watch(image)
        logits = path(image)
    return logits, tape.gradient(logits, image)


# AToP 9, 11: gradients pass noise and purifier, or skip them, or know nothing of them
def test_paths_have_the_logits_and_the_gradients_that_they_promise(still):
    image = tf.constant(make_data()["image"])
    paths = {name: functools.partial(path, seed=SEED) for name, path in still.attack_paths().items()}
    assert list(paths) == ["exact", "bpda_identity", "oblivious", "fixed_noise"]
    logits, gradient = with_gradient(paths["exact"], image)
    np.testing.assert_array_equal(logits, still(image, seed=SEED))
    _, expected = with_gradient(lambda image: f(g(still.purifier, image, SEED)[1]), image)
    np.testing.assert_allclose(gradient, expected, atol=1e-6)
    assert (np.abs(gradient).max(axis=(1, 2, 3)) > 0).all()
    logits, of_classifier = with_gradient(paths["bpda_identity"], image)
    np.testing.assert_array_equal(logits, still(image, seed=SEED))
    np.testing.assert_allclose(of_classifier, with_gradient(f, still.purified(image, SEED))[1], atol=1e-6)
    assert np.abs(of_classifier - gradient).max() > 1e-3
    for one, two in zip(with_gradient(paths["oblivious"], image), with_gradient(f, image)):
        np.testing.assert_array_equal(one, two)


# AToP T5: each path answers by image and seed alone
@pytest.mark.parametrize("settings", [{}, {"rt": 3}, {"votes": 2}, {"rt": 1, "mask_scope": "batch"}])
def test_paths_answer_an_image_alike_in_any_batch(settings):
    image = tf.constant(make_data()["image"])
    for path in make(**settings).attack_paths().values():
        whole = path(image, SEED).numpy()
        for rows in ([4], [5, 1, 1, 0]):
            found = path(tf.gather(image, rows), tf.gather(SEED, rows))
            np.testing.assert_allclose(found, whole[rows], atol=1e-5)


@pytest.mark.parametrize("votes", [1, 2])
def test_noise_that_is_held_fixed_is_that_of_every_seed_and_image(votes):
    defense, image = make(votes=votes), make_data()["image"]
    fixed = defense.attack_paths()["fixed_noise"]
    np.testing.assert_array_equal(fixed(image, SEED), fixed(image, SEED + 9))
    same = fixed(np.repeat(image[:1], BATCH, axis=0), SEED)
    np.testing.assert_allclose(same, np.repeat(same[:1], BATCH, axis=0), atol=1e-6)


# AToP T3: what draws nothing is deterministic, and has no noise to hold fixed
@pytest.mark.parametrize("settings", [{"rt": 0}, {"rt": 1, "missing_rate": 0.0}])
def test_purifier_without_noise_is_deterministic(settings):
    defense, image = make(**settings), make_data()["image"]
    assert not defense.is_randomized and not defense.purification().is_randomized
    assert list(defense.attack_paths()) == ["exact", "bpda_identity", "oblivious"]
    expected = f(defense.purifier([image, tf.zeros_like(image)])["refined"])
    for path in (defense, lambda image: defense.attack_paths()["exact"](image, SEED)):
        np.testing.assert_allclose(path(image), expected, atol=1e-5)
    np.testing.assert_array_equal(defense(image), defense(image, seed=SEED))


# AToP 14: the purifier serves in front of any classifier, from a file
def test_purification_is_saved_whole(tmp_path):
    defense, image = make(rt=3, masks=2), make_data()["image"]
    defense.purification().save(tmp_path / "purification.keras")
    loaded = keras.models.load_model(tmp_path / "purification.keras")
    assert type(loaded) is backbones.Purification and loaded.is_randomized
    np.testing.assert_array_equal(loaded(image, seed=SEED), defense.purified(image, SEED))
    assert (changed(loaded(image), loaded(image)) > 1e-6).all()
    assert loaded.predict(image, verbose=0).shape == image.shape
    assert loaded.transform.get_config() == defense.transform.get_config()


def test_drawn_images_are_the_same_at_every_call(still):
    image = tf.constant(make_data()["image"])
    found, again = still.drawn(image), still.drawn(image)
    assert list(found) == ["transformed", "purified"]
    seed = seeds.per_example(0, -4, tf.range(BATCH))
    np.testing.assert_allclose(found["transformed"], t(image, seed)[0], atol=1e-6)
    np.testing.assert_array_equal(found["purified"], still.purified(image, seed))
    assert_same(found.values(), again.values())


# Settings


def run_of(name="fgsm", warmup_epochs=0.0, epochs=4, validate_every=2, **flags):
    return config.Run(
        attack=config.Attack(name=name, epsilon=8 / 255, warmup_epochs=warmup_epochs),
        defense=config.Defense(name="atop", **flags),
        train=config.Train(epochs=epochs, validate_every=validate_every),
    )


# AToP D1, D3, D6: what the released code does otherwise
def test_released_preset_sets_what_the_authors_code_does():
    found = defenses.build(run_of(preset="released", purifier_width=2), untrained())
    assert found.attack == FGSM(epsilon=8 / 255) and found.attack_through == "classifier"
    assert (found.lam_ce, found.lam_gan, found.mask_scope, found.critic) == (0.05, 0.0, "batch", None)
    assert found.training_transform.scope == "batch" and found.transform.scope == "image"
    again = defenses.build(run_of(preset="released", purifier_width=2, lam_ce=0.2), untrained())
    assert again.lam_ce == 0.2 and again.attack_through == "classifier"


def test_recommended_settings_are_those_of_the_specification():
    found = defenses.build(run_of(purifier_width=2, critic_width=2), untrained())
    assert (found.attack_through, found.share_noise, found.mask_scope) == ("pipeline", True, "image")
    assert (found.lam_ce, found.lam_l1, found.recon_input, found.recon_target) == (0.1, 2.0, "adv", "clean")
    assert (found.rt, found.sigma, found.missing_rate, found.masks, found.votes) == (2, 0.25, 0.25, 4, 1)
    assert found.purifier.name == "gated_unet" and found.critic.name == "patch_critic"
    assert found.transform.grid(32, 32) == (8, 8)


def test_every_setting_comes_back_from_the_configuration():
    settings = {
        "rt": 3, "sigma": 0.5, "missing_rate": 0.5, "block_size": 2, "masks": 3, "mask_scope": "batch",
        "attack_through": "pipeline-eot", "eot_draws": 3, "share_noise": False, "lam_ce": 0.5, "lam_l1": 3.0,
        "lam_gan": 0.25, "recon_input": "clean", "recon_target": "adv", "votes": 2, "validation_draws": 3,
        "purifier_name": "masked_autoencoder", "purifier_width": 3, "critic_width": 4,
    }  # fmt: skip
    defense = make(**settings)
    assert {*AToP.settings} == {*settings}
    rebuilt = AToP.from_config(defense.get_config())
    assert {name: getattr(rebuilt, name) for name in settings} == settings
    names = ("cross_entropy", "reconstruction", "adversarial", "critic")
    assert rebuilt.terms == tuple(f"{name}_loss" for name in names)
    assert rebuilt.purifier.name == "purifier" and not rebuilt.backbone.trainable


def test_purifier_of_a_run_is_the_one_that_it_names():
    settings = {"purifier_name": "gated_inpainter", "purifier_width": 4, "critic_width": 2}
    assert defenses.build(run_of(**settings), untrained()).purifier.name == "gated_inpainter"


# Stages


def test_a_run_trains_classifier_and_purifier_before():
    run = run_of(classifier_epochs=1, warmup_epochs=1.0, sigma=0.1, **SMALL)
    classifier, purifier = defenses.stages(run)
    assert (classifier.name, classifier.saved, purifier.name, purifier.saved) == ("classifier", "", "purifier", "")
    assert classifier.must_know and classifier.run.defense == config.Defense()
    assert (classifier.run.train.epochs, classifier.run.train.validate_every) == (1, 1)
    own = purifier.run.defense
    assert (own.name, own.lam_ce, own.sigma, own.purifier_width) == ("atop", 0, 0.1, 2)
    assert (purifier.run.train.epochs, purifier.run.attack.warmup_epochs) == (4, 0)
    made = defenses.build(purifier.run, untrained())
    assert made.monitor == "restoration" and purifier.take(made) is made.purifier


@pytest.mark.parametrize(
    ("flags", "epochs"),
    [({"pretrain_epochs": 1}, 1), ({"pretrain_epochs": 9}, 9), ({"pretrain_epochs": 0}, None), ({"lam_ce": 0.0}, None)],
)
def test_purifier_is_pre_trained_for_so_many_epochs(flags, epochs):
    found = {stage.name: stage.run.train for stage in defenses.stages(run_of(**flags))}
    assert list(found) == ["classifier", *(["purifier"] if epochs else [])]
    if epochs:
        assert (found["purifier"].epochs, found["purifier"].validate_every) == (epochs, min(2, epochs))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"lam_ce": 0.0, "pretrain_epochs": 2}, "--defense_lam_ce=0 is pre-training itself"),
        ({"purifier": "there", "purifier_width": 2}, "--defense_purifier_width is for a purifier that is made here"),
        ({"purifier": "there", "pretrain_epochs": 2}, "--defense_pretrain_epochs is for a purifier that is made here"),
        ({"classifier": "there", "classifier_epochs": 2}, "--defense_classifier_epochs is for a classifier that is tr"),
    ],
)
def test_flags_that_contradict_each_other_are_refused(flags, message):
    with pytest.raises(UsageError, match=message):
        defenses.stages(run_of(**flags))


# AToP 9: from whatever holds it
def test_purifier_is_taken_from_a_defense_a_purification_or_a_file_of_its_own(tmp_path):
    defense, image = make(), make_data()["image"]
    _, stage = defenses.stages(run_of(purifier=str(tmp_path)))
    assert stage.saved == str(tmp_path)
    for model in (defense, defense.purification(), defense.purifier):
        model.save(tmp_path / "model.keras")
        found = stage.take(backbones.read(tmp_path / "model.keras"))
        for name, each in defense.purifier(list(t(image, SEED))).items():
            np.testing.assert_array_equal(found(list(t(image, SEED)))[name], each)


def two_inputs(**outputs):
    image, mask = keras.Input(SHAPE, name="image"), keras.Input((*SHAPE[:2], 1), name="mask")
    return keras.Model([image, mask], {name: make(image, mask) for name, make in outputs.items()}, name="other")


@pytest.mark.parametrize(
    "model",
    [
        untrained,
        small_critic,
        lambda: two_inputs(refined=lambda image, mask: image + mask),
        lambda: two_inputs(logits=lambda image, mask: image + mask),
    ],
    ids=["classifier", "critic", "one stage", "other outputs"],
)
def test_model_that_is_no_purifier_is_refused(model):
    model = model()
    message = f"model '{model.name}' is no purifier, which takes .image, mask. and returns coarse and refined images"
    _, stage = defenses.stages(run_of(purifier="there"))
    for give in (stage.take, lambda model: make(purifier=model)):
        with pytest.raises(InputError, match=message):
            give(model)


def test_purifier_of_another_range_is_refused():
    model = two_inputs(**{name: lambda image, mask: 2 * image + mask - 1 for name in ("coarse", "refined")})
    _, stage = defenses.stages(run_of(purifier="there"))
    with pytest.raises(InputError, match=r"purifier 'other' makes pixels from -0\.9.* to 1\.9.*, not in \[0, 1\]"):
        stage.take(model)


def test_flag_of_the_path_that_the_model_was_not_made_with_is_refused(tmp_path):
    make().save(tmp_path / "model.keras")
    run = config.Run(run_dir=str(tmp_path), attack=config.Attack(epsilon=EPSILON), defense=config.Defense("atop", rt=3))
    with pytest.raises(UsageError, match=r"model\.keras was made with --defense_rt=2, not 3: leave the flag as it was"):
        load_defense(run, None)


@pytest.mark.parametrize("image_shape", [(16, 8, 1), (8, 8, 3)])
def test_purifier_of_other_images_is_refused(image_shape):
    shapes = rf"the purifier makes images \({', '.join(map(str, image_shape))}\) of .*, but .* are \(8, 8, 1\)"
    with pytest.raises(InputError, match=shapes):
        make(purifier=small_purifier(image_shape))


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"classes": 5}, "the model has 5 classes, but the data has 4"),
        ({"image_shape": (16, 8, 1)}, r"the model takes images of \(16, 8, 1\), but .* are \(8, 8, 1\)"),
    ],
)
def test_classifier_of_other_images_or_classes_is_refused(other, message):
    with pytest.raises(InputError, match=message):
        make(classifier=untrained(**other))


def test_classifier_stands_in_for_the_backbone():
    other = untrained(width=3)
    defense, image = make(classifier=other), make_data()["image"]
    np.testing.assert_array_equal(defense.bare_activations(image)["logits"], other(image, training=False)["logits"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lam_ce": -0.5}, "lam_ce must be a finite number of at least 0, not -0.5"),
        ({"lam_l1": float("nan")}, "lam_l1 must be a finite number of at least 0, not nan"),
        ({"lam_gan": float("inf")}, "lam_gan must be a finite number of at least 0, not inf"),
        ({"eot_draws": 0}, "eot_draws must be at least 1, not 0"),
        ({"votes": 0}, "votes must be at least 1, not 0"),
        ({"validation_draws": 0}, "validation_draws must be at least 1, not 0"),
        ({"attack_through": "purifier"}, "attack_through must be classifier, pipeline or pipeline-eot, not 'purifier'"),
        ({"recon_input": "noisy"}, "recon_input must be adv or clean, not 'noisy'"),
        ({"recon_target": "noisy"}, "recon_target must be adv or clean, not 'noisy'"),
        ({"rt": 4}, "a random transform is 1, 2 or 3, or 0 for none, not 4"),
        ({"block_size": 3}, "blocks of 3 pixels do not divide images of 8 x 8"),
        ({"rt": 3, "masks": 65}, "65 masks cannot share 64 blocks"),
        ({"mask_scope": "set"}, "masks are drawn for each image or batch, not for each set"),
        ({"lam_ce": 0.0, "lam_l1": 0.0, "lam_gan": 0.0}, "all 0 there is nothing to train a purifier by"),
        ({"lam_gan": 0.0, "critic": small_critic}, "with lam_gan=0 nothing is learnt from a critic; leave critic out"),
        ({"purifier_name": "magic"}, "unknown purifier 'magic'; valid: gated_inpainter, gated_unet"),
        ({"purifier_width": -1}, "the width of a purifier must be at least 1, or 0 for its default"),
    ],
)
def test_atop_refuses(settings, message):
    settings = {name: value() if callable(value) else value for name, value in settings.items()}
    with pytest.raises(UsageError, match=message):
        make(**{"purifier": None, "lam_gan": 0.0, **settings})

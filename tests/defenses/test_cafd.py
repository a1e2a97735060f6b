"""CAFD: the acceptance properties of its specification, and a step against a transcription of the algorithm.

Properties 1, 2 and 7 to 9 are in tests/losses, 3 to 6 in tests/attacks, 10 to 12 in tests/backbones too.
"""

from __future__ import annotations

import functools

import keras
import numpy as np
import pytest
import tensorflow as tf

from kerasdefense import InputError, UsageError, backbones, config, defenses
from kerasdefense.attacks import CAFA, FGSM, PGD, norms
from kerasdefense.backbones import blocks
from kerasdefense.defenses import CAFD, Standard, inside
from kerasdefense.defenses.batch import Batch
from kerasdefense.defenses.cafd import IMAGE_ADV

SHAPE, CLASSES, BATCH, EPSILON, RATE = (8, 8, 1), 4, 8, 0.1, 0.05
TWO_STEPS = CAFA(epsilon=EPSILON, steps=2, step_size=0.05)
SMALL = {"denoiser_width": 2, "critic_width": 2}


def classifier(width=2, image_shape=SHAPE, classes=CLASSES):
    settings = config.Backbone(name="small_cnn", width=width)
    return backbones.build(settings, image_shape=image_shape, classes=classes)


@functools.cache
def untrained(**kwargs):
    """Return one classifier for all tests, as none is ever changed."""
    keras.utils.set_random_seed(2)
    return classifier(**kwargs)


def small_denoiser(width=4, stddev=0.05):
    """Return a denoiser that is quicker than a U-Net, and not the identity unless `stddev` is 0."""
    image = keras.Input(SHAPE, name="image")
    hidden = blocks.relu(blocks.normalised_convolution(image, width, 3, name="one"), name="one_relu")
    hidden = blocks.relu(blocks.normalised_convolution(hidden, width, 3, name="two"), name="two_relu")
    start = keras.initializers.RandomNormal(stddev=stddev) if stddev else "zeros"
    return keras.Model(image, keras.layers.Conv2D(1, 3, padding="same", kernel_initializer=start, name="last")(hidden))


def small_critic():
    image = keras.Input(SHAPE, name="image")
    hidden = blocks.relu(blocks.normalised_convolution(image, 4, 3, stride=2, name="half"), name="half_relu")
    last = keras.layers.Dense(1, use_bias=False, name="critic_logit")  # a bias cancels out in its losses
    return keras.Model(image, last(keras.layers.Flatten()(hidden)))


def make(optimizer=None, attack=TWO_STEPS, backbone=None, **kwargs):
    keras.utils.set_random_seed(3)
    networks = {"denoiser": small_denoiser()} | ({"critic": small_critic()} if kwargs.get("lam_a", 1) else {})
    defense = CAFD(backbone or untrained(), attack=attack, **{"lam_f": 10.0, **networks, **kwargs})
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
        "index": np.arange(size, dtype=np.int32),
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


# CAFD 3: attacking, once or at a step, stays in ball and box and changes no variable
@pytest.mark.parametrize("dynamic", [False, True])
def test_attack_stays_in_the_ball_and_changes_no_variable(dynamic):
    defense, batch = make(dynamic=dynamic), batch_of(make_data())
    before = [variable.numpy() for variable in defense.variables]
    for image_adv in (defense.craft(batch, defense.attack), defense.craft_before(batch)):
        change = np.abs(image_adv - batch.image)
        assert EPSILON / 2 < change.max() <= EPSILON + 1e-6
        assert 0 <= np.min(image_adv) <= np.max(image_adv) <= 1
    assert_same(defense.variables, before)


# CAFD 4: the search must not start at the image
def test_attack_without_a_random_start_is_refused():
    with pytest.raises(UsageError, match="objective class_activation needs an attack with a random start: its gradi"):
        make(attack=PGD(epsilon=EPSILON, steps=2, random_start=False, keep="last"))
    with pytest.raises(UsageError, match="objective class_activation needs an attack with a random start"):
        make(attack=FGSM(epsilon=EPSILON))


# CAFD 5: what is made of an image before training does not depend on its batch, but with the authors' maps
@pytest.mark.parametrize("legacy_cam", [False, True])
def test_images_attacked_before_training_are_the_same_in_any_batch(legacy_cam):
    defense, data = make(legacy_cam=legacy_cam), make_data()
    found = defense.craft_before(batch_of(data)).numpy()
    part = defense.craft_before(batch_of({key: value[5:6] for key, value in data.items()}))
    differing = np.mean(np.abs(part - found[5:6]) > 1e-5)
    assert differing > 0.05 if legacy_cam else differing < 0.05  # but for a gradient that rounding turns


# CAFD 6: keyed by seed and image alone, at whatever step
def test_images_attacked_before_training_depend_on_the_seed_alone(still):
    batch = batch_of(make_data())
    found = still.craft_before(batch)
    later = make()
    later.step.assign(5)
    np.testing.assert_array_equal(later.craft_before(batch), found)
    assert np.abs(make(seed=1).craft_before(batch) - found).max() > EPSILON / 2
    assert np.abs(later.craft(batch, later.attack) - still.craft(batch, still.attack)).max() > EPSILON / 2


# CAFD 10: before training the denoiser is the identity
def test_untrained_denoiser_changes_neither_images_nor_logits():
    defense = CAFD(untrained(), attack=TWO_STEPS, **SMALL)
    image = make_data()["image"]
    np.testing.assert_array_equal(defense.denoised(image), image)
    np.testing.assert_array_equal(defense(image), untrained()(image, training=False)["logits"])
    np.testing.assert_array_equal(defense.purification()(image), image)


# CAFD 10: a trained one changes both, and what leaves it is clipped
def test_defended_path_is_the_classifier_on_the_clipped_sum(still):
    image = np.clip(3 * make_data()["image"] - 1, 0, 1)
    whole = image + still.denoiser(image, training=False)
    assert np.min(whole) < 0 or np.max(whole) > 1
    expected = still.backbone(np.clip(whole, 0, 1), training=False)
    np.testing.assert_allclose(still(image), expected["logits"], atol=1e-5)
    assert np.abs(still(image) - still.backbone(image, training=False)["logits"]).max() > 1e-3
    for name, found in still.activations(image).items():
        np.testing.assert_allclose(found, expected[name], atol=1e-5)
    np.testing.assert_allclose(still.purification()(image), np.clip(whole, 0, 1), atol=1e-6)


# CAFD 13: a step trains denoiser and critic, and never the classifier
def test_training_changes_denoiser_and_critic_and_never_the_classifier():
    given = classifier()
    defense = make(keras.optimizers.SGD(RATE, momentum=0.9, weight_decay=0.1), backbone=given)
    before = given.get_weights()
    parts = [[each.numpy() for each in part.trainable_variables] for part in (defense.denoiser, defense.critic)]
    for _ in range(2):
        defense.train_step(make_data())
    assert_same(defense.backbone.get_weights(), before)
    assert_same(given.get_weights(), before)
    for part, old in zip((defense.denoiser, defense.critic), parts):
        assert not any(np.array_equal(one, two) for one, two in zip(part.trainable_variables, old, strict=True))
    assert given.trainable_variables and not defense.backbone.trainable_variables


# CAFD 13: each loss moves its own network alone
@pytest.mark.parametrize("resting", [0, 1])
def test_each_loss_moves_its_own_network_alone(resting):
    defense = make()
    (optimizer, rests), (_, moves) = [defense.optimizers()[each] for each in (resting, 1 - resting)]
    optimizer.learning_rate.assign(0)
    before = [[each.numpy() for each in part] for part in (rests, moves)]
    defense.train_step(make_data())
    assert_same(rests, before[0])
    assert not any(np.array_equal(one, two) for one, two in zip(moves, before[1]))


# CAFD 14: labels, or none, are all the same to training
def test_labels_change_nothing_in_training():
    data, weights = make_data(), []
    without = {key: value for key, value in data.items() if key != "label"}
    for each in (data, {**data, "label": (data["label"] + 1) % CLASSES}, without):
        defense = make()
        found = [defense.train_step(each) for _ in range(2)]
        weights.append([*defense.denoiser.get_weights(), *defense.critic.get_weights()])
        assert ("adversarial_accuracy" in found[1]) == ("label" in each)
        assert set(defense.test_step(each)) == (
            {"restoration", "clean_accuracy", "adversarial_accuracy"} if "label" in each else {"restoration"}
        )
    assert_same(weights[1], weights[0])
    assert_same(weights[2], weights[0])


# CAFD 14: images alone are enough
def test_images_alone_train():
    defense = make()
    before = defense.denoiser.get_weights()
    defense.fit(make_data()["image"], batch_size=BATCH, verbose=0)
    assert not any(np.array_equal(one, two) for one, two in zip(defense.denoiser.get_weights(), before))


# CAFD 15: gradients pass the denoiser, or skip it
def test_paths_have_the_logits_and_the_gradients_that_they_promise(still):
    image, seed = tf.constant(make_data()["image"]), tf.zeros([BATCH, 2], tf.int32)

    def with_gradient(path, image):
        with tf.GradientTape() as tape:
            tape.watch(image)
            logits = path(image)
        return logits, tape.gradient(logits, image)

    def bare(image):
        return still.backbone(image, training=False)["logits"]

    paths = {name: functools.partial(path, seed=seed) for name, path in still.attack_paths().items()}
    assert list(paths) == ["exact", "bpda_identity", "oblivious"]
    logits, gradient = with_gradient(paths["exact"], image)
    np.testing.assert_array_equal(logits, still(image))
    assert np.isfinite(gradient).all() and (np.abs(gradient).max(axis=(1, 2, 3)) > 0).all()
    logits, of_classifier = with_gradient(paths["bpda_identity"], image)
    np.testing.assert_array_equal(logits, still(image))
    np.testing.assert_allclose(of_classifier, with_gradient(bare, still.denoised(image))[1], atol=1e-6)
    assert np.abs(of_classifier - gradient).max() > 1e-3
    for one, two in zip(with_gradient(paths["oblivious"], image), with_gradient(bare, image)):
        np.testing.assert_array_equal(one, two)


# One step of section 7, by the formulas of sections 3 and 6


def binary_cross_entropy(logits, target):
    return tf.nn.sigmoid_cross_entropy_with_logits(tf.fill(tf.shape(logits), float(target)), logits)


def relativistic(critic, image, denoised, of_real):
    real, fake = (critic(each, training=True)[:, 0] for each in (image, denoised))
    r, f = real - tf.reduce_mean(fake), fake - tf.reduce_mean(real)
    return tf.reduce_mean(binary_cross_entropy(r, of_real) + binary_cross_entropy(f, 1 - of_real)) / 2


def weights_of(logits, kernel, weight_term, temperature):
    if weight_term == "soft":
        return tf.nn.softmax(logits / temperature) @ tf.transpose(kernel)
    return tf.gather(tf.transpose(kernel), tf.argmax(logits, axis=1))


def transcribed_step(
    denoiser, critic, image, image_adv, *, lam_f=1e3, lam_w=1e-3, lam_a=5e-3, lam_p=0.0, weight_term="soft",
    temperature=1.0, feature_layer="",
):  # fmt: skip
    """Take the step on models of one's own, with SGD; return the terms of the loss by name."""
    p = untrained()
    layer = {"": "feature_map", "last_conv": "block5_conv"}[feature_layer]
    extract = keras.Model(p.input, [p.get_layer(layer).output, p.output["logits"]])
    kernel, terms = p.get_layer("logits").kernel, {}
    target, clean_logits = extract(image, training=False)
    aim = weights_of(clean_logits, kernel, weight_term, temperature)
    with tf.GradientTape() as tape:
        denoised = image_adv + denoiser(image_adv, training=True)
        if lam_a:
            with tf.GradientTape() as own:
                terms["critic_loss"] = relativistic(critic, image, tf.stop_gradient(denoised), 1)
            for variable, each in zip(
                critic.trainable_variables, own.gradient(terms["critic_loss"], critic.trainable_variables)
            ):
                variable.assign_sub(RATE * each)
        features, logits = extract(denoised, training=False)
        difference = features - target
        if weight_term == "joint":
            difference *= aim[:, None, None, :]
        else:
            weights = weights_of(logits, kernel, weight_term, temperature)
            terms["weight_loss"] = lam_w * tf.reduce_mean((weights - aim) ** 2)
        terms["feature_loss"] = lam_f * tf.reduce_mean(difference**2)
        if lam_p:
            terms["pixel_loss"] = lam_p * tf.reduce_mean((denoised - image) ** 2)
        if lam_a:
            terms["adversarial_loss"] = lam_a * relativistic(critic, image, denoised, 0)
        total = tf.add_n([each for name, each in terms.items() if name != "critic_loss"])
    for variable, each in zip(denoiser.trainable_variables, tape.gradient(total, denoiser.trainable_variables)):
        variable.assign_sub(RATE * each)
    return terms


@pytest.mark.parametrize(
    "settings",
    [
        {"lam_a": 2.0, "lam_w": 3.0, "temperature": 0.5},
        {"lam_a": 0.5, "weight_term": "hard", "lam_p": 2.0, "feature_layer": "last_conv"},
        {"lam_a": 0.0, "weight_term": "joint"},
    ],
)
def test_step_is_the_transcribed_one(settings):
    settings = {"lam_f": 10.0, **settings}
    defense, data = make(**settings), make_data()
    batch = batch_of(data)
    image_adv = defense.craft_before(batch)
    denoiser, critic = copy_of(defense.denoiser), copy_of(defense.critic) if settings["lam_a"] else None
    expected = transcribed_step(denoiser, critic, batch.image, image_adv, **settings)
    found = defense.train_step({**data, IMAGE_ADV: image_adv})
    assert set(expected) == set(defense.terms) == set(found) - {"adversarial_accuracy"}
    for name, value in expected.items():
        assert float(found[name]) == pytest.approx(float(value), rel=1e-4, abs=1e-6)
    for own, copy in ((defense.denoiser, denoiser), (defense.critic, critic)):
        if copy is None:
            assert own is None
            continue
        for one, two in zip(own.get_weights(), copy.get_weights(), strict=True):
            np.testing.assert_allclose(one, two, atol=1e-5)


def test_step_takes_the_images_that_come_with_the_batch_unless_dynamic():
    data = make_data()
    for dynamic in (False, True):
        weights = []
        for image_adv in (data["image"], 1 - data["image"]):
            defense = make(dynamic=dynamic)
            defense.train_step({**data, IMAGE_ADV: image_adv})
            weights.append(defense.denoiser.get_weights())
        assert all(np.array_equal(*pair) for pair in zip(*weights)) == dynamic


def test_dynamic_attack_goes_through_the_denoiser():
    data = batch_of(make_data())
    attack = CAFA(epsilon=EPSILON, steps=1, step_size=1e-3)
    of_path, of_classifier = (
        make(attack=attack, dynamic=each, denoiser=small_denoiser(stddev=1.0)).craft(data, attack)
        for each in (True, False)
    )
    differing = np.mean(np.abs(of_path - of_classifier) > 1e-4)
    assert 0.05 < differing < 1


def test_some_images_are_left_clean():
    data = make_data(400)
    batch, image_adv = batch_of(data), 1 - data["image"]
    defense = make(clean_fraction=0.25)
    chosen = []
    for step in (0, 1):
        defense.step.assign(step)
        found = defense._attacked_images({**data, IMAGE_ADV: image_adv}, batch).numpy()
        is_clean = (found == data["image"]).all(axis=(1, 2, 3))
        np.testing.assert_array_equal(found[~is_clean], image_adv[~is_clean])
        assert is_clean.mean() == pytest.approx(0.25, abs=0.08)
        chosen.append(is_clean)
    assert 0.2 < np.mean(chosen[0] != chosen[1]) < 0.6


@pytest.mark.parametrize("reset", [False, True])
def test_optimizers_forget_their_moments_at_an_epoch_where_they_are_asked_to(reset):
    defense, data = make(keras.optimizers.Adam(1e-3), reset_each_epoch=reset), make_data()
    defense.train_step(data)
    defense.begin_epoch()
    for optimizer, _ in defense.optimizers():
        assert all((np.abs(each).max() == 0) == reset for each in optimizer._momentums)
        assert int(optimizer.iterations) == (0 if reset else 1)
    assert int(defense.step) == 1


def test_kernels_of_denoiser_and_critic_decay_in_their_gradients():
    defense = CAFD(untrained(), attack=TWO_STEPS, coupled_decay=0.5, **SMALL)
    for network in (defense.denoiser, defense.critic):
        variables = network.trainable_variables
        with tf.GradientTape() as tape:
            total = tf.add_n(network.losses)
        for variable, gradient in zip(variables, tape.gradient(total, variables)):
            if "kernel" in variable.name:
                np.testing.assert_allclose(gradient, 0.5 * variable, rtol=1e-5)
            else:
                assert gradient is None


def test_pictures_are_denoised_images_and_what_changed(still):
    batch = batch_of(make_data())
    np.testing.assert_array_equal(still.pictured(batch), still.craft_before(batch))
    found = still.drawn(batch.image)
    assert list(found) == ["denoised", "residual"]
    np.testing.assert_array_equal(found["denoised"], still.denoised(batch.image))
    residual = 0.5 + (found["denoised"] - batch.image) / (2 * EPSILON)
    np.testing.assert_allclose(found["residual"], np.clip(residual, 0, 1), atol=1e-5)


def test_internals_are_errors_layer_by_layer_with_and_without_the_denoiser(still):
    batch = batch_of(make_data())
    found = still.internals(batch, batch.image, TWO_STEPS, 0)
    names = [name for name in found if not name.startswith("undenoised_")]
    assert set(found) == {*names, *(f"undenoised_{name}" for name in names)}
    assert names[0] == "error_00_image" and names[-1].endswith("feature_map") and len(names) == 6
    for each in found.values():
        assert each.shape == (BATCH,) and (each > 0).numpy().all() and np.isfinite(each).all()
    untouched = make(denoiser=small_denoiser(stddev=0)).internals(batch, batch.image, TWO_STEPS, 0)
    for name in names:
        np.testing.assert_allclose(untouched[name], found[f"undenoised_{name}"], rtol=1e-4)


# On a classifier of images with a bright bar, nearer to the top by class, and a pattern of its class


STRENGTH = 0.16


def bars(seed, size):
    random = np.random.default_rng(1)
    pattern = 0.1 * np.sign(random.normal(size=(CLASSES, *SHAPE)))
    random = np.random.default_rng(seed)
    label = (np.arange(size) % CLASSES).astype(np.int32)
    image = random.uniform(0.2, 0.4, size=(size, *SHAPE)) + pattern[label]
    for row, own in enumerate(label):
        image[row, 2 * own : 2 * own + 2] += 0.4
    return {"image": image.clip(0, 1).astype(np.float32), "label": label, "index": np.arange(size, dtype=np.int32)}


TRAINING, HELD_OUT = bars(1, 128), bars(2, 64)


@pytest.fixture(scope="module")
def natural():
    keras.utils.set_random_seed(3)
    defense = Standard(classifier(4), attack=TWO_STEPS)
    defense.compile(keras.optimizers.Adam(0.02))
    defense.fit(tf.data.Dataset.from_tensor_slices(TRAINING).batch(16), epochs=8, verbose=0)
    return defense.backbone


def purified(natural, epochs=0):
    """Return a defense of the natural classifier, trained for some epochs of 8 steps on images attacked before."""
    attack = CAFA(epsilon=STRENGTH, steps=8, step_size=STRENGTH / 4)
    keras.utils.set_random_seed(4)
    denoiser = small_denoiser(8, stddev=0)
    weak = PGD(epsilon=STRENGTH, steps=1, keep="last")  # of no interest here
    settings = {"denoiser": denoiser, "lam_f": 1e3, "validation_attack": weak}
    defense = make(keras.optimizers.Adam(0.01), attack, natural, **settings)
    if epochs:
        data = {**TRAINING, IMAGE_ADV: defense.craft_before(batch_of(TRAINING))}
        defense.fit(tf.data.Dataset.from_tensor_slices(data).batch(16), epochs=epochs, verbose=0)
    return defense


@pytest.fixture(scope="module")
def before(natural):
    return purified(natural)


@pytest.fixture(scope="module")
def after(natural):
    return purified(natural, epochs=13)


def accuracy(defense, image):
    return np.mean(defense(image).numpy().argmax(axis=1) == HELD_OUT["label"])


def pgd(defense, epsilon, path="exact"):
    """Return held-out images attacked on one of the paths of a defense."""
    batch, path = batch_of(HELD_OUT), defense.attack_paths()[path]
    attack = PGD(epsilon=epsilon, steps=10, step_size=epsilon / 4, keep="best")
    seed = tf.stack([batch.index, batch.index], axis=1)

    def loss_fn(image, context):
        logits = path(image, seed)
        return tf.nn.sparse_softmax_cross_entropy_with_logits(context["label"], logits)

    return attack(loss_fn, batch.image, {"label": batch.label}, seed).image


# CAFD 16: the attack goes farther than its start, and farther with more steps and a larger radius
def test_attack_raises_the_distance_of_features_with_steps_and_radius(before):
    batch = batch_of(HELD_OUT)
    clean = before.features.weighted(batch.image).numpy()

    def distance(epsilon, steps):
        attack = CAFA(epsilon=epsilon, steps=steps, step_size=epsilon / 4)
        features = before.features.weighted(before.craft(batch, attack)).numpy()
        return np.sqrt(((features - clean) ** 2).sum(axis=(1, 2, 3))).mean()

    by_steps = [distance(STRENGTH, steps) for steps in (0, 2, 8)]
    by_radius = [distance(epsilon, 8) for epsilon in (STRENGTH / 4, STRENGTH / 2, STRENGTH)]
    assert by_steps[0] * 2 < by_steps[2] and by_steps == sorted(by_steps) and by_radius == sorted(by_radius)


# CAFD 17: it knows no label, and does not help
def test_attack_does_not_raise_accuracy(before):
    batch = batch_of(HELD_OUT)
    clean = accuracy(before, batch.image)
    assert clean > 0.95
    assert accuracy(before, before.craft(batch, before.attack)) <= clean + 0.02


# CAFD 18: training restores features of unseen images, and leaves clean ones alone
def test_training_restores_features_at_little_cost(before, after):
    held_out = tf.data.Dataset.from_tensors(HELD_OUT)
    found = [defense.evaluate(held_out, verbose=0, return_dict=True) for defense in (before, after)]
    loss, trained_loss = (-each["restoration"] for each in found)
    assert 0 < trained_loss < 0.6 * loss
    assert found[1]["clean_accuracy"] >= found[0]["clean_accuracy"] - 0.05


# CAFD 19: what fools the classifier is undone
def test_denoiser_undoes_attacks_that_do_not_know_of_it(before, after):
    image_adv = pgd(before, STRENGTH)
    np.testing.assert_array_equal(pgd(after, STRENGTH, "oblivious"), image_adv)
    assert accuracy(after, image_adv) >= accuracy(before, image_adv) + 0.2


# CAFD 20: but not those that know of it
def test_attacks_that_know_of_the_denoiser_are_stronger_and_large_ones_always_succeed(after):
    for epsilon in (STRENGTH / 4, STRENGTH / 2, STRENGTH, 3 * STRENGTH):
        white_box = accuracy(after, pgd(after, epsilon))
        assert white_box <= accuracy(after, pgd(after, epsilon, "oblivious")) + 0.02
    assert white_box < 0.05


# Settings


def build(steps=0, step_size=0.0, name="pgd", objective="", **flags):
    attack = config.Attack(name=name, epsilon=8 / 255, steps=steps, step_size=step_size, objective=objective)
    run = config.Run(attack=attack, defense=config.Defense(name="cafd", **flags))
    small = {"denoiser": small_denoiser(), "critic": small_critic()}
    return defenses.build(run, untrained(), stages={} if "denoiser_width" in flags else small)


def test_attack_of_a_run_is_cafa_unless_another_is_asked_for():
    assert build().attack == CAFA(epsilon=8 / 255) and build().objective == "class_activation"
    assert build(steps=3, step_size=0.02).attack == CAFA(epsilon=8 / 255, steps=3, step_size=0.02)
    other = build(steps=3, objective="cross_entropy")
    assert type(other.attack) is PGD and other.objective == "cross_entropy"


def test_released_preset_sets_what_the_authors_code_does():
    found = build(preset="released", **SMALL)
    assert (found.weight_term, found.feature_layer, found.attack.steps) == ("hard", "last_conv", 100)
    assert found.legacy_cam and found.legacy_stride and found.reset_each_epoch
    assert found.denoiser.get_layer("up1_1_conv").strides == (2, 2)
    recommended = build()
    assert (recommended.lam_f, recommended.lam_w, recommended.lam_a, recommended.lam_p) == (1e3, 1e-3, 5e-3, 0)
    assert (recommended.weight_term, recommended.feature_layer, recommended.attack.steps) == ("soft", "", 40)


def test_every_setting_comes_back_from_the_configuration():
    settings = {
        "lam_f": 2.0, "lam_w": 0.5, "lam_a": 0.25, "lam_p": 0.125, "weight_term": "hard", "temperature": 0.5,
        "feature_layer": "last_conv", "legacy_cam": True, "clean_fraction": 0.25, "reset_each_epoch": True,
        "coupled_decay": 0.5, "denoiser_width": 3, "critic_width": 4, "legacy_stride": True,
    }  # fmt: skip
    defense = make(dynamic=True, **settings)
    assert {*CAFD.settings} == {*settings, "dynamic"}
    rebuilt = CAFD.from_config(defense.get_config())
    assert {name: getattr(rebuilt, name) for name in settings} == settings and rebuilt.is_dynamic
    assert set(rebuilt.terms) == {f"{name}_loss" for name in ("feature", "weight", "pixel", "adversarial", "critic")}


def test_objectives_besides_its_own_take_labels():
    data = make_data()
    for objective in ("cross_entropy", "kl_divergence"):
        attack = PGD(epsilon=EPSILON, steps=2, keep="last")
        defense = make(attack=attack, objective=objective)
        one, two = (
            defense.craft_before(batch_of({**data, "label": (data["label"] + shift) % CLASSES})) for shift in (0, 1)
        )
        assert np.array_equal(one, two) == (objective == "kl_divergence")
        assert norms.length(one - data["image"], "linf").numpy().min() > EPSILON / 2


def test_layers_of_a_classifier_made_elsewhere_are_found():
    image = keras.Input(SHAPE)
    tensor = keras.layers.Conv2D(3, 3, activation="relu", name="first")(image)
    tensor = keras.layers.Conv2D(4, 3, activation="relu", name="second")(tensor)
    pooled = keras.layers.GlobalAveragePooling2D()(tensor)
    own = backbones.as_backbone(keras.Model(image, keras.layers.Dense(CLASSES, "softmax")(pooled)))
    images = tf.constant(make_data()["image"])
    expected = own(images)["feature_map"]
    for layer in ("", "last_conv", "second"):
        features, _ = make(backbone=own, feature_layer=layer).features(images)
        np.testing.assert_allclose(features, expected, atol=1e-6)
    with pytest.raises(UsageError, match=r"has no layer .third. .*; it has first, second"):
        make(backbone=own, feature_layer="third")
    errors = inside.layer_errors(own, images, 1 - images)
    assert list(errors) == ["error_00_image", "error_01_first", "error_02_second"]
    assert all((each.numpy() > 0).all() for each in errors.values())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"warmup_steps": 1}, "warm-up and a rising radius are for attacks while training"),
        ({"critic": "own", "lam_a": 0.0}, "nothing is learnt from a critic"),
    ],
)
def test_settings_without_effect_are_refused(settings, message):
    settings = {**settings, "critic": small_critic()} if "critic" in settings else settings
    with pytest.raises(UsageError, match=message):
        make(**settings)


def test_classifier_on_frozen_axes_is_refused():
    architecture = config.Backbone(name="small_cnn", width=4, head="orthogonal")
    with pytest.raises(InputError, match="they must be those of a dense layer"):
        make(backbone=backbones.build(architecture, image_shape=SHAPE, classes=CLASSES))


def test_features_of_a_classifier_that_does_not_pool_by_the_mean_are_its_embedding():
    image = keras.Input(SHAPE)
    feature_map = keras.layers.Conv2D(5, 3, activation="relu")(image)
    hidden = keras.layers.Dense(6)(keras.layers.GlobalMaxPooling2D()(feature_map))
    model = keras.Model(image, keras.layers.Dense(CLASSES)(hidden))
    own = backbones.as_backbone(model, logits_layer=model.layers[-1].name)
    features, logits = make(backbone=own).features(tf.constant(make_data()["image"]))
    outputs = own(make_data()["image"])
    np.testing.assert_allclose(features, outputs["embedding"][:, None, None, :], atol=1e-6)
    np.testing.assert_allclose(logits, outputs["logits"], atol=1e-6)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lam_f": -1.0}, "lam_f must be at least 0, not -1.0"),
        ({"lam_w": float("nan")}, "lam_w must be at least 0, not nan"),
        ({"coupled_decay": -1.0}, "coupled_decay must be at least 0, not -1.0"),
        ({"temperature": 0.0}, r"temperature must be above 0, not 0\.0"),
        ({"clean_fraction": 1.0}, r"clean_fraction must be in \[0, 1\), not 1\.0"),
        ({"weight_term": "firm"}, "weight_term must be one of soft, hard, joint, not 'firm'"),
        ({"lam_f": 0.0, "lam_w": 0.0, "lam_a": 0.0}, "all 0 there is nothing to train a denoiser by"),
        ({"feature_layer": "nowhere"}, "small_cnn has no layer 'nowhere' that gives a feature map; it has normalis"),
        ({"feature_layer": "block1_relu"}, "layer 'block1_relu' of small_cnn has 2 channels, but its last layer weigh"),
        ({"objective": "targeted_dlr"}, "objective targeted_dlr needs targets"),
        ({"denoiser": lambda: small_critic()}, r"the denoiser must give \(8, 8, 1\), not \(1,\)"),
    ],
)
def test_cafd_refuses(settings, message):
    with pytest.raises(UsageError, match=message):
        make(**{name: value() if callable(value) else value for name, value in settings.items()})


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

"""AGKD-BML: the acceptance properties of its specification, and a step against a transcription of the algorithm.

Properties 5, 6, 8 to 12 are in tests/losses, of what the loss is made of; 3 is in test_bank.py too.
"""

from __future__ import annotations

import functools

import keras
import numpy as np
import pytest
import tensorflow as tf

from kerasdefense import InputError, UsageError, backbones, config, defenses
from kerasdefense.attacks import PGD
from kerasdefense.defenses import AGKDBML, ExampleBank, Standard, descent
from kerasdefense.defenses.batch import Batch

SHAPE, CLASSES, BATCH, EPSILON, RATE = (8, 8, 1), 4, 8, 0.1, 0.2
TWO_STEPS = PGD(epsilon=EPSILON, steps=2, keep="last")
FROM_THE_IMAGE = PGD(epsilon=EPSILON, steps=2, random_start=False, keep="last")
KEPT = np.random.default_rng(11).integers(0, 256, (24, *SHAPE), np.uint8)
LABEL_OF_KEPT = np.arange(24, dtype=np.int32) % CLASSES


def encoder(width=2, image_shape=SHAPE, classes=CLASSES):
    settings = config.Backbone(name="small_cnn", width=width)
    return backbones.build(settings, image_shape=image_shape, classes=classes)


@functools.cache
def untrained(**kwargs):
    """Return one encoder for all tests that train nothing."""
    return encoder(**kwargs)


def fine_encoder():
    """Return a classifier whose feature maps are four times as fine as those of `encoder`, with five channels."""
    image = keras.Input(SHAPE)
    hidden = keras.layers.Conv2D(5, 3, padding="same", activation="relu")(image)
    hidden = keras.layers.GlobalAveragePooling2D()(hidden)
    return backbones.as_backbone(keras.Model(image, keras.layers.Dense(CLASSES)(hidden)))


def make(optimizer=None, attack=TWO_STEPS, **kwargs):
    keras.utils.set_random_seed(3)
    defense = AGKDBML(kwargs.pop("backbone", None) or encoder(), attack=attack, **kwargs)
    defense.compile(optimizer or keras.optimizers.SGD(RATE))
    defense.bank = ExampleBank(KEPT, LABEL_OF_KEPT, classes=CLASSES)
    return defense


def apart(*, teacher=None, **kwargs):
    """Return a defense of two unlike networks, with statistics that tell inference from training mode."""
    keras.utils.set_random_seed(8)
    defense = make(teacher=teacher or encoder(), init_from_teacher=False, **kwargs)
    random = np.random.default_rng(5)
    for network in (defense.backbone, defense.teacher):
        for variable in network.variables:
            if "moving" in variable.name:
                variable.assign(variable + random.uniform(0, 0.3, variable.shape))
    return defense


@pytest.fixture(scope="module")
def still():
    """Return such a defense for all tests that train nothing."""
    return apart()


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


def of_class(logits, classes):
    return tf.gather(tf.nn.softmax(logits), classes, batch_dims=1).numpy()


# agkd_bml 1: the most confusing class
def test_most_confusing_class_is_the_likeliest_other_one(still):
    defense, data = still, make_data(64)
    found = defense.most_confusing(batch_of(data)).numpy()
    logits = defense.backbone(data["image"], training=False)["logits"].numpy()
    predicted, rows = logits.argmax(axis=1), np.arange(64)
    logits[rows, data["label"]] -= 1e4
    np.testing.assert_array_equal(found, logits.argmax(axis=1))
    assert (found != data["label"]).all()
    wrong = predicted != data["label"]
    assert 0 < wrong.sum() < 64 and (found == predicted)[wrong].all()


# agkd_bml 2: both attacks stay in the ball and in the box
def test_both_attacks_stay_in_the_ball_and_the_box(still):
    defense, data = still, make_data()
    level = np.arange(BATCH, dtype=np.float32)[:, None, None, None] % 2  # half of the images dark, half of them bright
    batch = batch_of({**data, "image": np.clip(data["image"] + level - 0.5, 0, 1)})
    drawn = defense.draw(batch)
    for clean, image_adv in zip((batch.image, drawn.image), defense.craft_pair(batch, drawn)):
        change = np.abs(image_adv - clean)
        assert EPSILON / 2 < change.max() <= EPSILON + 1e-6
        assert 0 <= np.min(image_adv) <= np.max(image_adv) <= 1


# agkd_bml 3: what is drawn is of the most confusing class
def test_images_drawn_are_of_the_most_confusing_class(still):
    defense, batch = still, batch_of(make_data(64))
    drawn, names = defense.draw(batch), {image.tobytes(): label for image, label in zip(KEPT, LABEL_OF_KEPT)}
    of_drawn = [names[np.rint(image * 255).astype(np.uint8).tobytes()] for image in drawn.image.numpy()]
    np.testing.assert_array_equal(of_drawn, defense.most_confusing(batch))
    np.testing.assert_array_equal(drawn.label, of_drawn)
    assert drawn.label.dtype == batch.label.dtype == tf.int32 and drawn.image.dtype == tf.float32


# agkd_bml 4: attacks change no variable
def test_attacks_change_no_variable_and_look_at_each_image_alone(still):
    defense, data = still, make_data()
    batch, before = batch_of(data), [variable.numpy() for variable in defense.variables]
    drawn = defense.draw(batch)
    found = defense.craft_pair(batch, drawn)
    assert_same(defense.variables, before)
    part = batch_of({key: value[5:6] for key, value in data.items()})
    drawn_of_part = defense.draw(part)
    np.testing.assert_array_equal(drawn_of_part.image, drawn.image[5:6])
    for one, many in zip(defense.craft_pair(part, drawn_of_part), found):  # but for a gradient that rounding turns
        assert np.mean(np.abs(one - many[5:6]) > 1e-5) < 0.05


# agkd_bml 4: nor does training change the teacher
def test_training_changes_the_student_and_not_the_teacher():
    defense = make(keras.optimizers.SGD(RATE, momentum=0.9, weight_decay=0.1))
    before = defense.teacher.get_weights()
    assert_same(defense.backbone.get_weights(), before)
    for _ in range(2):
        defense.train_step(make_data())
    assert_same(defense.teacher.get_weights(), before)
    assert not any(np.array_equal(one, two) for one, two in zip(defense.backbone.get_weights(), before))
    assert {id(each) for each in defense.trainable_variables} == {
        id(each) for each in defense.backbone.trainable_variables
    }


# agkd_bml 7: attention and embedding have the same total
def test_attention_sums_to_the_embedding(still):
    defense, image = still, make_data()["image"]
    outputs = defense.backbone(image, training=False)
    attention = outputs["feature_map"].numpy().sum(axis=-1)
    total = outputs["embedding"].numpy().sum(axis=1)
    assert total.min() > 0.01
    np.testing.assert_allclose(attention.mean(axis=(1, 2)), total, rtol=1e-5)
    lowest, highest = (extreme(attention, axis=(1, 2), keepdims=True) for extreme in (np.min, np.max))
    found = defense.attention(image, image)["student_feature_map"]
    np.testing.assert_allclose(found, (attention - lowest) / (highest - lowest), atol=1e-5)


# agkd_bml 8: zero where student and teacher are one and nothing is attacked
def test_attention_terms_are_zero_of_the_teacher_itself_and_at_most_two():
    batch = batch_of(make_data())
    found = make().internals(batch, batch.image, FROM_THE_IMAGE, 0)
    np.testing.assert_array_equal(found["attention_distance"], np.zeros(BATCH))
    np.testing.assert_array_equal(found["adversarial_attention_distance"], np.zeros(BATCH))
    assert 0.01 < float(apart().train_step(make_data())["attention_loss"]) <= 2


# agkd_bml 13: where gradients go
def test_gradients_reach_every_variable_of_the_student_its_head_by_cross_entropy_alone(monkeypatch):
    defense, descended = apart(), []

    def without_descending(forward, model, optimizer, variables, awp_gamma=0.0, tape=None):
        with tf.GradientTape(persistent=True) as tape:
            terms, outputs = forward()
            total = tf.add_n(list(terms.values()))
            others = tf.add_n([term for name, term in terms.items() if name != "cross_entropy_loss"])
        assert variables is defense.trainable_variables or list(variables) == defense.backbone.trainable_variables
        assert all(np.abs(gradient).max() > 0 for gradient in tape.gradient(total, variables))
        assert tape.gradient(total, defense.teacher.variables) == [None] * len(defense.teacher.variables)
        head = defense.backbone.get_layer("logits").trainable_variables
        assert len(head) == 2 and tape.gradient(others, head) == [None, None]
        descended.append(list(terms))
        return terms, outputs

    monkeypatch.setattr(descent, "descend", without_descending)
    defense.train_step(make_data())
    assert [sorted(each) for each in descended] == [sorted(defense.terms)]


# agkd_bml 13: nor do they pass through attacks
def test_no_gradient_passes_through_the_attacks(still):
    defense, batch = still, batch_of(make_data())
    drawn = defense.draw(batch)
    with tf.GradientTape() as tape:
        tape.watch([batch.image, drawn.image])
        both = tf.concat(defense.craft_pair(batch, drawn), axis=0)
    sources = [batch.image, drawn.image, *defense.backbone.variables]
    assert tape.gradient(both, sources) == [None] * len(sources)


# agkd_bml 14: without its own terms it is targeted adversarial training, but for statistics of three batches
def test_without_weights_and_smoothing_the_loss_is_hard_cross_entropy():
    defense, data = apart(w_kd=0.0, w_bml=0.0, label_smoothing=0.0), make_data()
    batch, model = batch_of(data), copy_of(defense.backbone)
    drawn = defense.draw(batch)
    image_adv, drawn_adv = defense.craft_pair(batch, drawn)
    cross_entropy = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    alone = cross_entropy(batch.label, copy_of(model)(image_adv, training=True)["logits"])
    logits = model(tf.concat([image_adv, batch.image, drawn_adv], axis=0), training=True)["logits"]
    expected = float(cross_entropy(batch.label, logits[:BATCH]))
    found = defense.train_step(data)
    assert set(found) == {"cross_entropy_loss", "clean_accuracy", "adversarial_accuracy"}
    assert float(found["cross_entropy_loss"]) == pytest.approx(expected, rel=1e-5)
    assert abs(expected - float(alone)) > 1e-3


# agkd_bml 15: the same seed, the same attacks, draws and loss
def test_everything_is_keyed_by_seed_step_and_example(monkeypatch):
    def crafted(defense):
        batch = batch_of(make_data())
        drawn = defense.draw(batch)
        return [drawn.image, *defense.craft_pair(batch, drawn)]

    one, two = apart(), apart()
    first = crafted(one)
    assert_same(crafted(two), first)
    for name, value in (("seed", 1), ("step", tf.constant(1, tf.int64))):
        with monkeypatch.context() as patch:
            patch.setattr(two, name, value)
            assert not any(np.array_equal(each, other) for each, other in zip(first, crafted(two)))
    assert_same(one.train_step(make_data()).values(), two.train_step(make_data()).values())
    assert_same(one.backbone.get_weights(), two.backbone.get_weights())


def test_both_attacks_of_an_image_start_apart(still, monkeypatch):
    image = tf.fill([BATCH, *SHAPE], 0.5)
    batch = Batch(image, tf.constant(make_data()["label"]), tf.range(BATCH))
    monkeypatch.setattr(still, "attack", PGD(epsilon=EPSILON, steps=1, step_size=1e-6, keep="last"))
    image_adv, drawn_adv = still.craft_pair(batch, Batch(image, (batch.label + 1) % CLASSES, ~batch.index))
    assert np.abs(image_adv - drawn_adv).reshape(BATCH, -1).mean(axis=1).min() > EPSILON / 3


# One step of section 5, by the formulas of sections 3 and 4


def towards(logits_fn, image, target):
    """Return images attacked towards a class: section 3.2, without its random start."""
    found = image
    for _ in range(FROM_THE_IMAGE.steps):
        with tf.GradientTape() as tape:
            tape.watch(found)
            log_p = tf.math.log(tf.nn.softmax(logits_fn(found)))
            loss = -tf.reduce_sum(tf.gather(log_p, target, batch_dims=1))
        stepped = found - FROM_THE_IMAGE.length * tf.sign(tape.gradient(loss, found))
        found = tf.clip_by_value(tf.clip_by_value(stepped, image - EPSILON, image + EPSILON), 0, 1)
    return found


def map_of(features, power, norm):
    total = tf.reduce_sum(tf.abs(features) ** power, axis=-1)
    if norm == "l2":
        return total / tf.sqrt(tf.reduce_sum(total**2, axis=(1, 2), keepdims=True))
    lowest, highest = (extreme(total, axis=(1, 2), keepdims=True) for extreme in (tf.reduce_min, tf.reduce_max))
    return (total - lowest) / (highest - lowest)


def angle(one, two, absolute=True):
    cosine = tf.reduce_sum(one * two, axis=1) / tf.norm(one, axis=1) / tf.norm(two, axis=1)
    return 1 - (tf.abs(cosine) if absolute else cosine)


def smoothed(logits, label, mass):
    q = tf.one_hot(label, CLASSES, on_value=1 - mass, off_value=mass / (CLASSES - 1))
    return tf.reduce_mean(-tf.reduce_sum(q * tf.math.log(tf.nn.softmax(logits)), axis=1))


def transcribed_step(
    student, teacher, batch, drawn, *, mass=0.5, w_kd=1.0, w_bml=2.0, w_norm=0.001, margin=0.03, beta=0.0, clean=0.0,
    backward=0.0, both_ways=True, power=1, norm="minmax", p=1, layers=("feature_map",),
):  # fmt: skip
    """Take the step on models of one's own, with SGD; return the terms of the loss by name."""
    image, label = tf.constant(batch["image"]), tf.constant(batch["label"])

    def logits_fn(image):
        return student(image, training=False)["logits"]

    target = tf.argmax(logits_fn(image) - 1e4 * tf.one_hot(label, CLASSES), axis=1, output_type=tf.int32)
    image_adv = towards(logits_fn, image, target)
    drawn_adv = towards(logits_fn, drawn, label) if both_ways else drawn
    eyes = [
        keras.Model(each.input, [each.output, [each.get_layer(name).output for name in layers]])
        for each in (student, teacher)
    ]
    aims = [map_of(each, power, norm) for each in eyes[1](tf.concat([image, drawn], axis=0), training=False)[1]]
    terms = {}
    with tf.GradientTape() as tape:
        outputs, features = eyes[0](tf.concat([image_adv, image, drawn_adv], axis=0), training=True)
        z_adv, z, z_drawn = tf.split(outputs["logits"], 3)
        h_adv, h, h_drawn = tf.split(outputs["embedding"], 3)
        terms["cross_entropy_loss"] = smoothed(z_adv, label, mass)
        if w_kd:
            distances = []
            for each, aim in zip(features, aims):
                of_adv, _, of_drawn = tf.split(map_of(each, power, norm), 3)
                pairs = zip((of_adv, of_drawn), tf.split(aim, 2))
                distances.append(tf.add_n([tf.reduce_mean(tf.abs(own - other) ** p) for own, other in pairs]))
            terms["attention_loss"] = w_kd * tf.add_n(distances) / len(layers)
        if w_bml:
            triplet = tf.maximum(0.0, margin + angle(h_adv, h) - angle(h_adv, h_drawn))
            terms["triplet_loss"] = w_bml * tf.reduce_mean(triplet)
            terms["norm_loss"] = w_bml * w_norm * tf.add_n([tf.reduce_mean(each**2) for each in (h_adv, h, h_drawn)])
        if clean:
            terms["clean_cross_entropy_loss"] = clean * smoothed(z, label, mass)
        if backward:
            terms["backward_cross_entropy_loss"] = backward * smoothed(z_drawn, target, mass)
        if beta:
            q, q_adv, own = tf.nn.softmax(z), tf.nn.softmax(z_adv), tf.one_hot(label, CLASSES)
            terms["runner_up_loss"] = tf.reduce_mean(-tf.math.log(1.0001 - tf.reduce_max(q_adv * (1 - own), axis=1)))
            divergence = tf.reduce_sum(q * (tf.math.log(q) - tf.math.log(q_adv)), axis=1)
            doubt = 1 - tf.reduce_sum(q * own, axis=1)
            terms["weighted_kl_divergence_loss"] = beta * tf.reduce_mean(divergence * doubt)
        loss = tf.add_n(list(terms.values()))
    variables = student.trainable_variables
    for variable, gradient in zip(variables, tape.gradient(loss, variables)):
        variable.assign_sub(RATE * gradient)
    accuracies = [np.mean(logits.numpy().argmax(axis=1) == label) for logits in (z, z_adv)]
    return terms, dict(zip(("clean_accuracy", "adversarial_accuracy"), accuracies))


@pytest.mark.parametrize(
    ("settings", "transcribed"),
    [
        ({}, {}),
        (
            {"mart_beta": 6.0, "ce_clean": 0.3, "ce_backward": 0.7, "label_smoothing": 0.1 * 4 / 3, "w_norm": 0.5},
            {"beta": 6.0, "clean": 0.3, "backward": 0.7, "mass": 0.1, "w_norm": 0.5},
        ),
        (
            {"bidirectional": False, "w_kd": 0.0, "w_bml": 0.5, "triplet_margin": 0.4},
            {"both_ways": False, "w_kd": 0.0, "w_bml": 0.5, "margin": 0.4},
        ),
        (
            {"attn_power": 2.0, "attn_norm": "l2", "attn_p": 2.0, "w_kd": 3.0, "w_bml": 0.0},
            {"power": 2, "norm": "l2", "p": 2, "w_kd": 3.0, "w_bml": 0.0},
        ),
        ({"attn_layers": "block3_relu, feature_map"}, {"layers": ("block3_relu", "feature_map")}),
    ],
    ids=["default", "every_term", "bml_forward", "agkd_only", "layers"],
)
def test_step_equals_a_transcription_of_the_algorithm(settings, transcribed):
    data, defense = make_data(), apart(attack=FROM_THE_IMAGE, **settings)
    student, teacher = (copy_of(each) for each in (defense.backbone, defense.teacher))
    drawn = defense.draw(batch_of(data)).image
    terms, accuracies = transcribed_step(student, teacher, data, drawn, **transcribed)
    found = defense.train_step(data)
    assert set(found) == {*defense.terms, *accuracies} and set(defense.terms) == set(terms)
    for name, expected in {**terms, **accuracies}.items():
        assert float(found[name]) == pytest.approx(float(expected), rel=1e-5, abs=1e-6), name
    assert int(defense.step) == 1
    for value, expected in zip(defense.backbone.get_weights(), student.get_weights(), strict=True):
        np.testing.assert_allclose(value, expected, atol=2e-5)


def test_statistics_move_in_one_pass_of_training():
    defense = make(keras.optimizers.SGD(0.0))
    variance = next(each for each in defense.backbone.non_trainable_variables if "variance" in each.name)
    variance.assign(tf.zeros_like(variance) - 1e6)  # so that what the passes add is as nothing
    defense.train_step(make_data())
    np.testing.assert_allclose(variance, -1e6 * 0.9, rtol=1e-3)


# The teacher


def test_student_starts_from_its_teacher_unless_it_is_told_not_to():
    keras.utils.set_random_seed(8)
    teacher, own = encoder(), encoder()
    weights = own.get_weights()
    assert_same(make(backbone=own, teacher=teacher, init_from_teacher=False).backbone.get_weights(), weights)
    defense = make(backbone=own, teacher=teacher)
    assert not defense.teacher.trainable_variables and teacher.trainable_variables  # a copy of it is kept
    assert_same(defense.teacher.get_weights(), teacher.get_weights())
    assert_same(defense.backbone.get_weights(), teacher.get_weights())
    networks = (own, teacher, defense.teacher)
    assert len({id(each) for network in networks for each in network.variables}) == 3 * len(own.variables)
    without = make(backbone=own)
    assert_same(without.teacher.get_weights(), own.get_weights())
    assert without.teacher is not own and without.backbone is own and own.trainable_variables


@pytest.mark.parametrize("teacher", [lambda: encoder(width=4), fine_encoder], ids=["width", "resolution"])
def test_teacher_may_have_other_channels_and_finer_maps(teacher):
    defense, data = apart(teacher=teacher()), make_data()
    before = [each.get_weights() for each in (defense.teacher, defense.backbone)]
    found = defense.train_step(data)
    assert all(np.isfinite(float(each)) for each in found.values()) and float(found["attention_loss"]) > 0.01
    assert_same(defense.teacher.get_weights(), before[0])
    assert not any(np.array_equal(one, two) for one, two in zip(defense.backbone.get_weights(), before[1]))


@pytest.mark.parametrize("teacher", [encoder, fine_encoder], ids=["alike", "finer"])
def test_internals_are_distances_of_maps_and_angles_of_attacks(teacher):
    defense, data = apart(teacher=teacher()), make_data()
    data["label"][:4] = np.arange(4)
    batch = Batch(*(each[:4] for each in batch_of(data)))  # one image of each class, so that none is drawn by chance
    image_adv = tf.clip_by_value(batch.image + EPSILON, 0, 1)
    found = {name: each.numpy() for name, each in defense.internals(batch, image_adv, FROM_THE_IMAGE, 5).items()}
    names = {"attention_distance", "adversarial_attention_distance", "embedding_length"}
    assert set(found) == {*names, "forward_angle", "backward_angle"}

    def logits_fn(image):
        return defense.backbone(image, training=False)["logits"]

    def embed(image):
        return defense.backbone(image, training=False)["embedding"]

    features = defense.teacher(batch.image, training=False)["feature_map"].numpy()
    if features.shape[1] == 8:  # bilinear at a quarter of the side: the mean of the four pixels around each place
        rows = features[:, [1, 5]] + features[:, [2, 6]]
        features = (rows[:, :, [1, 5]] + rows[:, :, [2, 6]]) / 4
    aim = map_of(features, 1, "minmax")
    for name, image in (("attention_distance", batch.image), ("adversarial_attention_distance", image_adv)):
        student = map_of(defense.backbone(image, training=False)["feature_map"], 1, "minmax")
        np.testing.assert_allclose(found[name], np.abs(student - aim).mean(axis=(1, 2)), atol=1e-5)
    np.testing.assert_allclose(found["embedding_length"], np.linalg.norm(embed(batch.image), axis=1), rtol=1e-5)
    target = defense.most_confusing(batch)
    forward = towards(logits_fn, batch.image, target)
    backward = towards(logits_fn, tf.gather(batch.image, target), batch.label)
    np.testing.assert_allclose(found["forward_angle"], angle(embed(forward), embed(batch.image)), atol=1e-5)
    np.testing.assert_allclose(found["backward_angle"], angle(embed(forward), embed(backward)), atol=1e-5)
    for name in found:
        assert (found[name] >= 0).all() and (found[name].max() <= 1 or name == "embedding_length")


def test_internals_have_no_backward_angle_where_the_batch_has_no_such_class(still):
    data = make_data()
    data["label"][:] = 0
    found = still.internals(batch_of(data), tf.constant(data["image"]), FROM_THE_IMAGE, 0)
    assert np.isnan(found.pop("backward_angle")).all()
    assert all(np.isfinite(each).all() for each in found.values())


def test_attention_is_the_teachers_of_clean_and_the_students_of_attacked_images():
    image = make_data()["image"]
    image_adv = np.clip(image + EPSILON, 0, 1)
    for layers in ("feature_map", "block3_relu, feature_map"):
        defense = apart(attn_power=2.0, attn_norm="l2", attn_layers="" if layers == "feature_map" else layers)
        expected = {
            f"{name}_{layer}": keras.Model(network.input, network.get_layer(layer).output)(looked_at)
            for name, network, looked_at in (
                ("teacher", defense.teacher, image),
                ("student", defense.backbone, image_adv),
            )
            for layer in layers.split(", ")
        }
        found = defense.attention(image, image_adv)
        assert list(found) == list(expected)
        for name, features in expected.items():
            np.testing.assert_allclose(found[name], map_of(features, 2, "minmax"), atol=1e-5)
    assert Standard(encoder(), attack=TWO_STEPS).attention(image, image_adv) is None


# Training on images with a bright bar, nearer to the top by class, and a pattern of its class that attacks can hide


STRENGTH = 0.16
STRONG = PGD(epsilon=STRENGTH, steps=8, step_size=STRENGTH / 4, random_start=False, keep="last")


def bars(size=128):
    random = np.random.default_rng(1)
    label = (np.arange(size) % CLASSES).astype(np.int32)
    image = random.uniform(0.2, 0.4, size=(size, *SHAPE))
    image += 0.1 * np.sign(random.normal(size=(CLASSES, *SHAPE)))[label]
    for row, own in enumerate(label):
        image[row, 2 * own : 2 * own + 2] += 0.4
    return np.rint(255 * image.clip(0, 1)).astype(np.uint8), label


def seen():
    """Return the batch that accuracies are measured on."""
    return Batch(*(each[:64] for each in batch_of(batches()[0])))


def batches():
    image, label = bars()
    data = {"image": image.astype(np.float32) / 255, "label": label, "index": np.arange(len(label), dtype=np.int32)}
    return data, tf.data.Dataset.from_tensor_slices(data).batch(16)


@pytest.fixture(scope="module")
def natural():
    keras.utils.set_random_seed(3)
    defense = Standard(encoder(4), attack=TWO_STEPS)
    defense.compile(keras.optimizers.Adam(0.02))
    defense.fit(batches()[1], epochs=8, verbose=0)
    return defense.backbone


def taught(natural, epochs=0, **kwargs):
    """Return a student of a copy of the natural teacher, trained for some epochs."""
    attack = PGD(epsilon=STRENGTH, steps=2, keep="last")
    defense = make(keras.optimizers.Adam(0.02), attack, backbone=encoder(4), teacher=copy_of(natural), **kwargs)
    defense.bank = ExampleBank(*bars(), classes=CLASSES)
    if epochs:
        defense.fit(batches()[1], epochs=epochs, verbose=0)
    return defense


@pytest.fixture(scope="module")
def students(natural):
    return {w_kd: taught(natural, epochs=4, w_kd=w_kd) for w_kd in (0.0, 1.0)}


def accuracy(defense, image, label):
    return np.mean(defense(image).numpy().argmax(axis=1) == label)


# agkd_bml 16, 18: the attack reaches for its class, and farther with more steps
def test_forward_attack_raises_the_probability_of_the_target_and_more_steps_raise_it_more(natural):
    defense, batch = taught(natural), seen()
    target = defense.most_confusing(batch)
    before, probability = of_class(defense(batch.image), target), []
    for steps in (1, 3, 8):
        attack = PGD(epsilon=STRENGTH, steps=steps, step_size=STRENGTH / 4, random_start=False, keep="last")
        image_adv = defense.craft(batch, attack)
        probability.append(of_class(defense(image_adv), target))
    assert np.mean(probability[-1]) > np.mean(before) + 0.1 and np.mean(probability[-1] > before) > 0.95
    means = [before.mean(), *(each.mean() for each in probability)]
    assert all(later >= earlier - 1e-3 for earlier, later in zip(means, means[1:]))
    assert accuracy(defense, batch.image, batch.label) > 0.95 > 0.3 + accuracy(defense, image_adv, batch.label)


# agkd_bml 17: the attack on what is drawn reaches back for the class of the first image
def test_backward_attack_lowers_the_cross_entropy_of_the_first_class(natural):
    defense, batch = taught(natural), seen()
    drawn = defense.draw(batch)
    _, drawn_adv = defense.craft_pair(batch, drawn)
    before, after = (-np.log(of_class(defense(image), batch.label)) for image in (drawn.image, drawn_adv))
    assert after.mean() < before.mean() - 0.1 and np.mean(after < before) > 0.95


# agkd_bml 19: a natural teacher's student becomes robust
def test_training_from_a_natural_teacher_gives_robustness_at_little_cost(natural, students):
    batch, found = seen(), []
    for defense in (taught(natural), students[1.0]):
        image_adv = defense.craft(batch, STRONG)
        found.append([accuracy(defense, image, batch.label) for image in (batch.image, image_adv)])
    (clean_before, robust_before), (clean, robust) = found
    assert robust >= robust_before + 0.3 and clean >= clean_before - 0.1


# agkd_bml 20: the teacher's attention is kept where it is asked for
def test_distillation_keeps_the_attention_of_the_teacher(students):
    batch, distance = seen(), {}
    for w_kd, defense in students.items():
        maps = defense.attention(batch.image, defense.craft(batch, STRONG))
        distance[w_kd] = np.mean(np.abs(maps["student_feature_map"] - maps["teacher_feature_map"]))
    assert distance[1.0] < 0.7 * distance[0.0]


# Settings


def build(steps=0, step_size=0.0, name="pgd", **flags):
    attack = config.Attack(name=name, epsilon=8 / 255, steps=steps, step_size=step_size)
    return defenses.build(config.Run(attack=attack, defense=config.Defense(name="agkd_bml", **flags)), untrained())


@pytest.mark.parametrize(
    ("preset", "steps", "step_size", "mart_beta"),
    [
        ("recommended", 10, 2 / 255, 0.0),
        ("agkd_bml", 10, 2 / 255, 0.0),
        ("agkd_bml_few", 2, 10 / 255, 0.0),
        ("agkd_bml_7", 7, 2 / 255, 0.0),
        ("released", 10, 2 / 255, 6.0),
    ],
)
def test_presets_set_the_attack_and_the_term_of_mart(preset, steps, step_size, mart_beta):
    defense = build(preset=preset)
    assert (defense.attack.steps, defense.attack.restarts, defense.attack.random_start) == (steps, 1, True)
    assert defense.attack.length == pytest.approx(step_size, rel=1e-6) and defense.attack.epsilon == 8 / 255
    assert defense.mart_beta == mart_beta and ("runner_up_loss" in defense.terms) == bool(mart_beta)
    assert (defense.w_kd, defense.w_bml, defense.w_norm, defense.triplet_margin) == (1.0, 2.0, 0.001, 0.03)
    assert defense.label_smoothing == pytest.approx(0.5 * 4 / 3) and defense.init_from_teacher
    assert defense.attack_budget == 2 * steps


def test_flags_go_before_presets():
    assert build(preset="released", mart_beta=1.0).mart_beta == 1.0
    for steps in (0, 7):
        attack = build(steps=steps, step_size=0.01, preset="agkd_bml_7").attack
        assert (attack.steps, attack.length) == (7, 0.01)
    for preset in ("released", "agkd_bml"):  # which say nothing of the attack
        attack = build(steps=3, preset=preset).attack
        assert (attack.steps, attack.length) == (3, pytest.approx(2.5 / 3 * 8 / 255))


def test_presets_are_refused_with_other_steps_another_attack_or_another_method():
    with pytest.raises(UsageError, match="--defense_preset=agkd_bml_7 takes 7 steps of pgd, not --attack_steps=3"):
        build(steps=3, preset="agkd_bml_7")
    with pytest.raises(UsageError, match="--defense_preset=agkd_bml_few takes 2 steps of pgd, not --attack_name=fgsm"):
        build(name="fgsm", preset="agkd_bml_few")
    with pytest.raises(UsageError, match=r"--defense_preset=agkd_bml_7 is no preset of trades; it has: recommended$"):
        defenses.build(config.Run(defense=config.Defense(name="trades", preset="agkd_bml_7")), untrained())


def test_flags_can_say_nothing_and_can_say_zero():
    flags = {"w_kd": 0.0, "w_bml": 0.0, "w_norm": 0.0, "triplet_margin": 0.0, "bidirectional": False}
    defense = build(**flags, label_smoothing=-1.0)
    assert {name: getattr(defense, name) for name in flags} == flags and defense.label_smoothing == 0
    assert defense.terms == ("cross_entropy_loss",)
    assert build(label_smoothing=0.3, smoothing_over="others").label_smoothing == pytest.approx(0.4)
    assert build(label_smoothing=0.3).label_smoothing == 0.3


@pytest.mark.parametrize(
    "flags", [{"w_kd": 0.5}, {"mart_beta": 6.0}, {"teacher": "teacher.keras"}, {"bank_per_class": 4}]
)
def test_its_settings_are_refused_of_other_methods(flags):
    run = config.Run(defense=config.Defense(name="pgd_at", **flags))
    (name,) = flags
    with pytest.raises(UsageError, match=f"--defense_{name} is no setting of pgd_at; it is one of: agkd_bml$"):
        defenses.build(run, untrained())


def test_every_setting_comes_back_from_the_configuration():
    settings = {
        "init_from_teacher": False, "w_kd": 0.5, "w_bml": 0.7, "w_norm": 0.1, "triplet_margin": 0.2,
        "absolute_angle": False, "bidirectional": False, "ce_clean": 0.3, "ce_backward": 0.4, "mart_beta": 6.0,
        "attn_power": 2.0, "attn_norm": "l2", "attn_p": 2.0, "attn_layers": "block3_relu,feature_map",
        "label_smoothing": 0.25,
    }  # fmt: skip
    assert {*AGKDBML.settings, "label_smoothing"} == set(settings)
    rebuilt = AGKDBML.from_config(make(backbone=untrained(), **settings).get_config())
    assert {name: getattr(rebuilt, name) for name in settings} == settings
    every = {"attention", "triplet", "norm", "clean_cross_entropy", "backward_cross_entropy", "runner_up"}
    every |= {"cross_entropy", "weighted_kl_divergence"}
    assert {f"{name}_loss" for name in every} == set(rebuilt.terms)


def test_attack_budget_counts_both_attacks():
    assert (
        make(backbone=untrained()).attack_budget == 4
        and make(backbone=untrained(), bidirectional=False).attack_budget == 2
    )


def test_absolute_angle_counts_opposite_embeddings_as_equal():
    one = tf.constant(np.abs(np.random.default_rng(0).normal(size=(BATCH, 8))), tf.float32)
    for absolute, expected in ((True, 0.03), (False, 2.03)):
        found = make(backbone=untrained(), absolute_angle=absolute)._metric_terms(
            one, one, -one
        )  # towards x1, which is opposite
        np.testing.assert_allclose(found["triplet_loss"], 2 * np.full(BATCH, expected), atol=1e-5)


def test_warm_up_trains_on_images_as_they_are():
    defense, batch = make(warmup_steps=3), batch_of(make_data())
    drawn = defense.draw(batch)
    for step, is_attacked in ((2, False), (3, True)):
        defense.step.assign(step)
        for image, clean in zip(defense.craft_pair(batch, drawn), (batch.image, drawn.image)):
            assert (np.abs(image - clean).max() > 0) == is_attacked


def test_training_without_a_bank_is_refused():
    defense = make()
    defense.bank = None
    with pytest.raises(UsageError, match="agkd_bml draws images of other classes: set `bank` to an ExampleBank"):
        defense.train_step(make_data())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"w_kd": -0.5}, "w_kd must be at least 0, not -0.5"),
        ({"triplet_margin": float("nan")}, "triplet_margin must be at least 0, not nan"),
        ({"mart_beta": -1.0}, "mart_beta must be at least 0, not -1.0"),
        ({"attn_power": 0.5}, r"attn_power must be at least 1, not 0\.5"),
        ({"attn_norm": "l1"}, "attn_norm must be one of minmax, l2, not 'l1'"),
        ({"attn_p": 0.5}, r"attn_p must be at least 1, not 0\.5"),
        (
            {"attn_layers": "nowhere"},
            "small_cnn has no layer 'nowhere' that gives a feature map; it has normalisation, block1",
        ),
        ({"attn_layers": "feature_map,logits"}, "small_cnn has no layer 'logits' that gives a feature map; it has nor"),
        ({"objective": "margin"}, "objective margin goes to no class; the method's attack takes targeted_cross_ent"),
        (
            {"backbone": lambda: encoder(classes=2)},
            r"mass of 0\.5 over the other 1 of 2 classes leaves nothing to learn",
        ),
        ({"teacher": lambda: encoder(width=4)}, r"not built as its teacher \(small_cnn.*--nodefense_init_from_teacher"),
    ],
)
def test_agkd_bml_refuses(settings, message):
    settings = {name: value() if callable(value) else value for name, value in settings.items()}
    with pytest.raises(UsageError, match=message):
        make(**{"backbone": untrained(), **settings})


@pytest.mark.parametrize(
    ("teacher", "message"),
    [
        ({"classes": 5}, "the teacher does not fit its student: the model has 5 classes, but the data has 4"),
        (
            {"image_shape": (16, 8, 1)},
            r"the teacher does not fit its student: the model takes images of \(16, 8, 1\), but .* are \(8, 8, 1\)",
        ),
    ],
)
@pytest.mark.parametrize("init_from_teacher", [True, False])
def test_teacher_of_other_images_or_classes_is_refused(teacher, message, init_from_teacher):
    with pytest.raises(InputError, match=message):
        make(backbone=untrained(), teacher=untrained(**teacher), init_from_teacher=init_from_teacher)


def test_two_classes_train_with_less_smoothing():
    defense = make(backbone=encoder(classes=2), label_smoothing=0.1)
    defense.bank = ExampleBank(KEPT, LABEL_OF_KEPT % 2, classes=2)
    data = make_data()
    found = defense.train_step({**data, "label": data["label"] % 2})
    assert all(np.isfinite(float(each)) for each in found.values())

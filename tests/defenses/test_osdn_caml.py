"""OSDN-CAML: the acceptance properties of its specification, and a step against a transcription of the algorithm."""

from __future__ import annotations

import collections
import functools

import keras
import numpy as np
import pytest
import tensorflow as tf

from kerasdefense import UsageError, backbones, config, data, defenses, training
from kerasdefense.attacks import FGSM, PGD
from kerasdefense.defenses import OSDNCAML, as_kept, descent
from kerasdefense.defenses.batch import Batch

SHAPE, CLASSES, BATCH, EPSILON, RATE = (8, 8, 1), 4, 8, 0.1, 0.2
TWO_STEPS = PGD(epsilon=EPSILON, steps=2, keep="last")


def encoder(image_shape=SHAPE, classes=CLASSES, **settings):
    settings = config.Backbone(**{"name": "small_cnn", "width": 2, **settings})
    return backbones.build(settings, image_shape=image_shape, classes=classes)


def make(optimizer=None, attack=TWO_STEPS, **kwargs):
    keras.utils.set_random_seed(3)
    defense = OSDNCAML(kwargs.pop("backbone", None) or encoder(), attack=attack, **kwargs)
    defense.compile(optimizer or keras.optimizers.SGD(RATE))
    return defense


def make_data(size=BATCH):
    random = np.random.default_rng(7)
    return {
        "image": random.uniform(size=(size, *SHAPE)).astype(np.float32),
        "label": random.integers(CLASSES, size=size).astype(np.int32),
        "index": np.arange(size, dtype=np.int32),
    }


def attacked_batches(defense, batch):
    """Return the batch and the turned one, each with its attacked images, crafted as `train_step` does."""
    turned, found = defense.turned(batch, defense.seed, defense.step), {}
    for name, each, logits_fn in (("class", batch, defense), ("rotation", turned, defense.rotation_logits)):

        def loss_fn(image, context, logits_fn=logits_fn):
            return tf.nn.sparse_softmax_cross_entropy_with_logits(context["label"], logits_fn(image))

        image_adv = defense.craft(each, defense.attack, loss_fn=loss_fn, context={"label": each.label})
        found[name] = (each, image_adv, functools.partial(loss_fn, context={"label": each.label}))
    return found


# osdn_caml 1: shapes and signs
@pytest.mark.parametrize("side", [8, 28, 32, 64])
def test_encoder_heads_and_decoder_have_the_shapes_of_the_data(side):
    defense = make(backbone=encoder((side, side, 3), 6, name="osdn_resnet8"))
    image = np.random.default_rng(0).uniform(size=(2, side, side, 3)).astype(np.float32)
    outputs = defense.activations(image)
    assert outputs["embedding"].shape == (2, 16) and np.min(outputs["embedding"]) >= 0
    assert outputs["logits"].shape == (2, 6) and defense.rotation_logits(image).shape == (2, 4)
    drawn = defense.decoder(outputs["embedding"])
    assert drawn.shape == image.shape and np.abs(drawn).max() < 1
    np.testing.assert_allclose(defense.reconstructed(image), (drawn + 1) / 2, atol=1e-6)


# osdn_caml 2: the counts of section 2.4, beside those of the encoder
def test_parameter_counts_are_those_of_the_paper():
    defense = OSDNCAML(encoder((32, 32, 3), 6, name="osdn_resnet18", width=64), attack=TWO_STEPS)
    counts = {
        part: sum(variable.shape.num_elements() for variable in getattr(defense, part).trainable_variables)
        for part in defense.parts
    }
    expected = {"backbone": 11_832_436 + 3_078, "rotation_head": 2_052, "decoder": 7_872_259, "peer": 11_171_910}
    assert counts == expected


# osdn_caml 7, beside tests/losses: each step descends by its own variables, all of them
def test_each_step_has_gradients_for_its_own_network_alone(monkeypatch):
    defense = make(bn_update_on_recompute=True)
    peer = defense.peer.trainable_variables
    descended = []

    def without_descending(forward, model, optimizer, variables, awp_gamma=0.0, tape=None):
        tape = tape or tf.GradientTape()
        with tape:
            terms, outputs = forward()
            total = tf.add_n([tf.reduce_sum(term) for term in terms.values()])
        others = defense.trainable_variables if variables[0] is peer[0] else peer
        gradients = tape.gradient(total, [*variables, *others])
        assert not any(gradient is None for gradient in gradients[: len(variables)])
        assert all(gradient is None for gradient in gradients[len(variables) :])
        descended.append(list(terms))
        return terms, outputs

    monkeypatch.setattr(descent, "descend", without_descending)
    defense.train_step(make_data())
    assert descended == [list(defense.terms[:4]), list(defense.terms[4:])]
    every = {id(each) for each in (*defense.trainable_variables, *peer)}
    assert every == {id(variable) for variable in defense.trainable_weights}


# osdn_caml 11: rotation
def test_turns_are_uniform_one_per_image_and_of_the_image_itself():
    batch = Batch(*(tf.constant(each) for each in make_data(4000).values()))
    turned = make().turned(batch, 0, 0)
    counts = collections.Counter(turned.label.numpy().tolist())
    assert set(counts) == {0, 1, 2, 3}
    assert max(abs(count - 1000) for count in counts.values()) < 4 * np.sqrt(4000 * 3 / 16)  # standard deviations
    assert turned.image.shape == batch.image.shape
    for image, turns, found in list(zip(batch.image, turned.label.numpy(), turned.image))[:20]:
        np.testing.assert_array_equal(found, tf.image.rot90(image, int(turns)))
        np.testing.assert_array_equal(tf.image.rot90(found, 4 - int(turns)), image)


def test_turns_are_keyed_by_seed_step_and_example():
    defense, batch = make(), make_data(64)
    found = defense.turned(defense.unpack(batch), 0, 0)
    part = defense.turned(defense.unpack({key: value[40:] for key, value in batch.items()}), 0, 0)
    np.testing.assert_array_equal(part.label, found.label[40:])
    for seed, step in ((0, 1), (1, 0)):
        assert not np.array_equal(defense.turned(defense.unpack(batch), seed, step).label, found.label)


# osdn_caml 12, 13: both attacks stay in the ball, change no variable and see no other image
def test_both_attacks_change_no_variable_and_look_at_each_image_alone():
    defense, batch = make(), make_data()
    before = [variable.numpy() for variable in defense.variables]
    found = attacked_batches(defense, defense.unpack(batch))
    for variable, value in zip(defense.variables, before):
        np.testing.assert_array_equal(variable, value)
    for clean, image_adv, _ in found.values():
        change = np.abs(image_adv - clean.image)
        assert 0 < change.max() <= EPSILON + 1e-6 and 0 <= np.min(image_adv) <= np.max(image_adv) <= 1
    alone = attacked_batches(defense, defense.unpack({key: value[5:6] for key, value in batch.items()}))
    for name, (_, image_adv, _) in alone.items():  # but for a gradient that rounding turns round
        assert np.mean(np.abs(image_adv - found[name][1][5:6]) > 1e-5) < 0.05


# osdn_caml 14: each attack raises the loss that it looks for
def test_each_attack_raises_its_own_cross_entropy():
    defense = make()
    for clean, image_adv, loss_fn in attacked_batches(defense, defense.unpack(make_data(32))).values():
        assert np.mean(loss_fn(image_adv)) > np.mean(loss_fn(clean.image)) + 1e-3


# osdn_caml 20: classes are re-indexed, and no unknown one reaches a loss
def test_known_classes_are_numbered_in_order_and_unknown_ones_never_trained_on(tmp_path):
    splits = data.load(config.Data(dir=str(tmp_path), open_set_split="6:0", augment="none"))
    assert list(splits.labels) == sorted(splits.labels, key=int) and len(splits.labels) == 6
    seen = np.concatenate([batch["label"].numpy() for batch in splits.train.epochs(64, seed=0, epochs=1)])
    assert set(seen.tolist()) == set(range(6))
    run = config.Run(backbone=config.Backbone("osdn_resnet8", width=2), defense=config.Defense("osdn_caml"))
    defense = training.build(run, splits)
    assert defense.backbone.output_shape["logits"] == defense.peer.output_shape["logits"] == (None, 6)
    with pytest.raises(tf.errors.InvalidArgumentError, match=r"labels must be in \[0, 6\)"):
        defense.unpack({**make_data(), "label": np.full(BATCH, 6, np.int32)})


# osdn_caml 21: it learns, and its peer is of no use to it afterwards
def test_both_losses_fall_and_predictions_do_without_the_peer():
    random = np.random.default_rng(1)
    label = (np.arange(64) % CLASSES).astype(np.int32)
    image = random.uniform(0, 0.4, size=(64, *SHAPE)).astype(np.float32)
    for row, of_class in enumerate(label):  # a bright bar, nearer to the top by class
        image[row, 2 * of_class : 2 * of_class + 2] += 0.5
    attack = PGD(epsilon=0.05, steps=3, keep="last")
    backbone = encoder(width=8)
    defense = make(keras.optimizers.Adam(0.01), attack, backbone=backbone, validation_attack=attack)
    history = defense.fit(image, label, batch_size=16, epochs=15, verbose=0).history
    for terms in (defense.terms[:4], defense.terms[4:]):
        first, last = (sum(history[term][epoch] for term in terms) for epoch in (0, -1))
        assert last < 0.7 * first
    assert defense.evaluate(image, label, verbose=0, return_dict=True)["adversarial_accuracy"] > 0.5
    before = defense.predict(image, verbose=0)
    for part in ("peer", "decoder", "rotation_head"):
        model = getattr(defense, part)
        model.set_weights([np.zeros_like(value) for value in model.get_weights()])
    np.testing.assert_array_equal(defense.predict(image, verbose=0), before)


# osdn_caml 9, 10: one step, and with w_kl = 0 that of 2020


def cross_entropy(logits, label):
    rows = tf.range(tf.shape(label)[0])
    return -tf.math.log(tf.gather_nd(tf.nn.softmax(logits), tf.stack([rows, label], axis=1)))


def divergence(p, q):
    return tf.reduce_sum(p * (tf.math.log(p) - tf.math.log(q)), axis=1)


def fast_gradient_sign(logits_fn, image, label):
    with tf.GradientTape() as tape:
        tape.watch(image)
        loss = tf.reduce_sum(cross_entropy(logits_fn(image), label))
    return tf.clip_by_value(image + EPSILON * tf.sign(tape.gradient(loss, image)), 0, 1)


def descend(tape, loss, models):
    variables = [variable for model in models for variable in model.trainable_variables]
    for variable, gradient in zip(variables, tape.gradient(loss, variables)):
        variable.assign_sub(RATE * gradient)


def transcribed_step(models, batch, turns, *, kl, clean=0.0, recompute=False):
    """Take section 4's step on models of one's own, with SGD; the losses are those of section 3, by their formulas."""
    backbone, rotation_head, decoder, peer = models
    image, label = tf.constant(batch["image"]), tf.constant(batch["label"])
    turned = tf.stack([tf.image.rot90(each, k) for each, k in zip(image, turns)])
    image_adv = fast_gradient_sign(lambda image: backbone(image)["logits"], image, label)
    turned_adv = fast_gradient_sign(lambda image: rotation_head(backbone(image)["embedding"]), turned, turns)
    peer_tape = tf.GradientTape()
    with peer_tape:
        p = tf.nn.softmax(peer(image, training=True)["logits"]) if kl else None
    with tf.GradientTape() as tape:
        outputs = backbone(image_adv, training=True)
        of_turned = rotation_head(backbone(turned_adv, training=True)["embedding"])
        error = tf.square(decoder(outputs["embedding"], training=True) - (2 * image - 1))
        loss = tf.reduce_mean(cross_entropy(outputs["logits"], label)) + tf.reduce_mean(cross_entropy(of_turned, turns))
        loss += tf.reduce_sum(error) / tf.size(error, tf.float32)
        if clean:
            loss += clean * tf.reduce_mean(cross_entropy(backbone(image, training=True)["logits"], label))
        if kl:
            loss += kl * tf.reduce_mean(divergence(tf.stop_gradient(p), tf.nn.softmax(outputs["logits"])))
    descend(tape, loss, models[:3])
    if not kl:
        return float(loss)
    q = tf.stop_gradient(tf.nn.softmax(backbone(image_adv, training=recompute)["logits"]))
    with peer_tape:
        rows = tf.stack([tf.range(BATCH), label], axis=1)
        peer_loss = tf.reduce_mean(-tf.math.log(tf.gather_nd(p, rows)) + kl * divergence(q, p))
    descend(peer_tape, peer_loss, [peer])
    return float(loss + peer_loss)


@pytest.mark.parametrize(
    ("settings", "transcribed"),
    [
        ({}, {"kl": 2.0}),
        ({"w_kl": 0.0}, {"kl": 0.0}),
        (
            {"w_kl": 0.5, "clean_weight": 0.3, "bn_update_on_recompute": True},
            {"kl": 0.5, "clean": 0.3, "recompute": True},
        ),
    ],
    ids=["2022", "2020", "options"],
)
def test_step_equals_a_transcription_of_the_algorithm(settings, transcribed):
    batch, defense = make_data(), make(attack=FGSM(epsilon=EPSILON), **settings)
    parts = [getattr(defense, part) for part in defense.parts]
    models = [part and type(part).from_config(part.get_config()) for part in parts]
    for model, part in zip(models, parts):
        if part is not None:
            model.set_weights(part.get_weights())
    turns = defense.turned(defense.unpack(batch), defense.seed, defense.step).label
    expected = transcribed_step(models, batch, turns, **transcribed)
    found = defense.train_step(batch)
    assert sum(float(found[term]) for term in defense.terms) == pytest.approx(expected, rel=1e-5)
    assert int(defense.step) == 1
    for model, part in zip(models, parts):
        for value, wanted in zip(part.get_weights() if part else [], model.get_weights() if model else []):
            np.testing.assert_allclose(value, wanted, atol=2e-5)


# osdn_caml 10: bit for bit, with the blocks of 2020
def test_without_peer_the_step_descends_on_the_three_losses_of_2020_and_nothing_else():
    backbone = encoder(name="osdn_resnet8", denoise="nonlocal")
    defense, batch = make(backbone=backbone, w_kl=0), make_data()
    models = [type(each).from_config(each.get_config()) for each in (backbone, defense.rotation_head, defense.decoder)]
    for model, part in zip(models, (backbone, defense.rotation_head, defense.decoder)):
        model.set_weights(part.get_weights())
    found = attacked_batches(defense, defense.unpack(batch))
    (_, image_adv, _), (turned, turned_adv, _) = found["class"], found["rotation"]
    with tf.GradientTape() as tape:
        outputs = models[0](image_adv, training=True)
        turns = models[1](models[0](turned_adv, training=True)["embedding"])
        drawn = models[2](outputs["embedding"], training=True)
        of_classes = tf.nn.sparse_softmax_cross_entropy_with_logits(batch["label"], outputs["logits"])
        of_turns = tf.nn.sparse_softmax_cross_entropy_with_logits(turned.label, turns)
        error = tf.reduce_mean(tf.math.squared_difference(drawn, 2 * batch["image"] - 1), axis=(1, 2, 3))
        loss = tf.add_n([tf.reduce_sum(each) / BATCH for each in (of_classes, of_turns, error)])
    descend(tape, loss, models)
    defense.train_step(batch)
    for model, part in zip(models, (defense.backbone, defense.rotation_head, defense.decoder)):
        for value, expected in zip(part.get_weights(), model.get_weights(), strict=True):
            np.testing.assert_array_equal(value, expected)


def test_without_divergence_there_is_no_peer(tmp_path):
    defense = make(w_kl=0)
    assert defense.peer is None and len(defense.optimizers()) == 1 and not hasattr(defense, "peer_optimizer")
    found = defense.train_step(make_data())
    expected = {"cross_entropy_loss", "rotation_loss", "reconstruction_loss", "adversarial_accuracy"}
    assert set(found) == expected and {id(each) for each in defense.trainable_weights} == {
        id(each) for each in defense.trainable_variables
    }
    defense.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert loaded.peer is None and loaded.terms == defense.terms and loaded.w_kl == 0
    for one, two in zip(loaded.get_weights(), defense.get_weights(), strict=True):
        np.testing.assert_array_equal(one, two)


@pytest.mark.parametrize("precision", ["float32", "mixed_float16"])
def test_a_kept_copy_has_everything_in_float32_with_both_optimizers(precision, tmp_path):
    backbone = encoder()
    if precision != "float32":
        backbone = backbones.with_precision(backbone, precision)
    defense = make(keras.optimizers.Adam(0.01), backbone=backbone)
    for part in (defense.backbone, defense.decoder, defense.peer):
        assert backbones.precision_of(part) == precision
    defense.train_step(make_data(4))
    kept = as_kept(defense, optimizer=True)
    kept.save(tmp_path / "model.keras")
    for copy in (kept, keras.models.load_model(tmp_path / "model.keras")):
        for part in copy.parts:
            assert backbones.precision_of(getattr(copy, part)) == "float32"
            for one, two in zip(getattr(copy, part).get_weights(), getattr(defense, part).get_weights(), strict=True):
                np.testing.assert_array_equal(one, two)
        for (one, _), (two, _) in zip(copy.optimizers(), defense.optimizers(), strict=True):
            assert type(one) is type(two)
            for slot, expected in zip(one.variables, two.variables, strict=True):
                np.testing.assert_array_equal(slot, expected)


def test_averages_of_both_optimizers_stand_in_and_go_again():
    defense = make(keras.optimizers.SGD(RATE, use_ema=True, ema_momentum=0.5))
    defense.train_step(make_data())
    raw = defense.get_weights()
    averages = [[each.numpy() for each in one._model_variables_moving_average] for one, _ in defense.optimizers()]
    with defense.averaged():
        for (_, variables), values in zip(defense.optimizers(), averages):
            for variable, value in zip(variables, values, strict=True):
                np.testing.assert_array_equal(variable, value)
    for one, two in zip(defense.get_weights(), raw):
        np.testing.assert_array_equal(one, two)


@pytest.mark.parametrize(("update", "passes"), [(False, 2), (True, 3)])
def test_statistics_of_the_encoder_move_in_each_pass_of_training(update, passes):
    defense = make(keras.optimizers.SGD(0.0), bn_update_on_recompute=update)
    variance = next(each for each in defense.backbone.non_trainable_variables if "variance" in each.name)
    variance.assign(tf.zeros_like(variance) - 1e6)  # so that what the passes add is as nothing
    defense.train_step(make_data())
    np.testing.assert_allclose(variance, -1e6 * 0.9**passes, rtol=1e-3)


@pytest.mark.parametrize("denoise", ["cbam", "none"])
def test_internals_are_noise_around_each_block_and_what_heads_decoder_and_peer_do(denoise):
    defense, batch = (
        make(backbone=encoder(name="osdn_resnet8", denoise=denoise)),
        {key: tf.constant(each) for key, each in make_data().items()},
    )
    image, image_adv = batch["image"], tf.clip_by_value(batch["image"] + EPSILON, 0, 1)
    attack = PGD(epsilon=0.02, steps=1, keep="last")
    found = defense.internals(Batch(**batch), image_adv, attack, 5)
    for place, before in enumerate(("stem_relu", "stage1_block1_relu", "stage2_block1_relu", "stage3_block1_relu")):
        after = before if denoise == "none" else f"denoise_{place}"
        for when, name in (("before", before), ("after", after)):
            tells = keras.Model(defense.backbone.input, defense.backbone.get_layer(name).output)
            clean, attacked = (tells(each).numpy().reshape(BATCH, -1) for each in (image, image_adv))
            noise = np.linalg.norm(attacked - clean, axis=1) / np.linalg.norm(clean, axis=1)
            np.testing.assert_allclose(found[f"noise_{when}_block_{place}"], noise, rtol=1e-4)
    error = np.mean((defense.reconstructed(image_adv) - image) ** 2, axis=(1, 2, 3))
    np.testing.assert_allclose(found["adversarial_decoded_psnr"], -10 * np.log10(error), rtol=1e-4)
    np.testing.assert_allclose(found["mean_colour_psnr"], -10 * np.log10(np.var(image, axis=(1, 2, 3))), rtol=1e-4)
    np.testing.assert_array_equal(
        found["peer_accuracy"], defense.peer(image)["logits"].numpy().argmax(1) == batch["label"]
    )
    turned = defense.turned(Batch(**batch), 5, -1)
    right = defense.rotation_logits(turned.image).numpy().argmax(1) == turned.label
    np.testing.assert_array_equal(found["rotation_accuracy"], right)
    assert np.sum(found["adversarial_rotation_accuracy"]) <= np.sum(right)


def test_internals_are_finite_where_an_image_is_even_and_the_attack_changes_nothing():
    image = tf.fill([2, *SHAPE], 0.25)
    batch = Batch(image, tf.zeros(2, tf.int32), tf.range(2))
    found = make(w_kl=0, w_rot=0).internals(batch, image, TWO_STEPS, 0)
    assert set(found) == {"mean_colour_psnr", "adversarial_psnr", "decoded_psnr", "adversarial_decoded_psnr"}
    np.testing.assert_array_equal(found["mean_colour_psnr"], [100, 100])
    np.testing.assert_array_equal(found["adversarial_psnr"], [100, 100])
    assert np.max(found["decoded_psnr"]) < 100


def test_without_rotation_no_image_is_turned():
    defense = make(keras.optimizers.SGD(0.0), w_rot=0)
    variance = next(each for each in defense.backbone.non_trainable_variables if "variance" in each.name)
    variance.assign(tf.zeros_like(variance) - 1e6)
    found = defense.train_step(make_data())
    np.testing.assert_allclose(variance, -1e6 * 0.9, rtol=1e-3)  # of one pass in training mode
    assert "rotation_loss" not in found and set(defense.terms) < set(found) and defense.attack_budget == 2


def test_released_preset_passes_the_recomputation_in_training_mode():
    run = config.Run(defense=config.Defense(name="osdn_caml", preset="released", w_kl=1.0))
    defense = defenses.build(run, encoder())
    assert defense.bn_update_on_recompute and defense.w_kl == 1
    assert not defenses.build(config.Run(defense=config.Defense(name="osdn_caml")), encoder()).bn_update_on_recompute
    with pytest.raises(UsageError, match="released is no preset of trades"):
        defenses.build(config.Run(defense=config.Defense(name="trades", preset="released")), encoder())


def test_attack_budget_counts_both_attacks():
    assert make().attack_budget == 4


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({}, {"w_cls": 1.0, "w_rot": 1.0, "w_rec": 1.0, "w_kl": 2.0, "clean_weight": 0.0}),
        (
            {"w_kl": 0.0, "w_rot": 0.0, "clean_weight": 0.5},
            {"w_rot": 0.0, "w_rec": 1.0, "w_kl": 0.0, "clean_weight": 0.5},
        ),
    ],
)
def test_flags_can_say_nothing_and_can_say_zero(flags, expected):
    run = config.Run(defense=config.Defense(name="osdn_caml", **flags))
    defense = defenses.build(run, encoder())
    assert {name: getattr(defense, name) for name in expected} == expected
    other = config.Run(defense=config.Defense(name="trades", w_kl=0.0))
    with pytest.raises(UsageError, match="--defense_w_kl is no setting of trades; it is one of: osdn_caml"):
        defenses.build(other, encoder())


@pytest.mark.parametrize(
    ("backbone", "settings", "message"),
    [
        ({"image_shape": (8, 12, 1)}, {}, r"takes square ones of a fixed size, not \(8, 12, 1\)"),
        ({"image_shape": (16, 16, 1)}, {}, r"the decoder draws images of 8x8, 28x28, 32x32, 64x64 pixels"),
        ({"classes": 2}, {}, "osdn_caml needs at least 3 known classes, not 2"),
        ({}, {"w_rot": -0.5}, "w_rot must be at least 0, not -0.5"),
        ({}, {"w_kl": float("nan")}, "w_kl must be at least 0, not nan"),
        ({}, {"peer": lambda: encoder(classes=5)}, "peer must have 4 classes, not 5"),
        (
            {},
            {"decoder": lambda: backbones.decoder(8, (28, 28, 1))},
            r"must draw images \(8, 8, 1\), not \(28, 28, 1\)",
        ),
        (
            {},
            {"rotation_head": lambda: keras.Sequential([keras.Input((8,)), keras.layers.Dense(3)])},
            "must have 4 outputs, not 3",
        ),
        ({}, {"w_kl": 0, "peer": encoder}, "with w_kl=0 nothing is learnt from a peer; leave peer out"),
    ],
)
def test_osdn_caml_refuses(backbone, settings, message):
    settings = {name: value() if callable(value) else value for name, value in settings.items()}
    with pytest.raises(UsageError, match=message):
        OSDNCAML(encoder(**backbone), attack=TWO_STEPS, **settings)

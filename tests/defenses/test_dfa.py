"""DFA: the acceptance properties of its specification, and a step against a transcription of the algorithm."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf

from kerasdefense import UsageError, backbones, config, defenses, losses
from kerasdefense.attacks import PGD
from kerasdefense.defenses import DFA, DFAAT, mixing

SHAPE, CLASSES, BATCH, RATE = (8, 8, 1), 4, 8, 0.2
TWO_STEPS = PGD(epsilon=0.1, steps=2, keep="last")
REVERSED = np.arange(BATCH)[::-1].copy()
"""Partners that are each other's."""


def encoder(width=2, head="orthogonal"):
    architecture = config.Backbone(name="small_cnn", width=width, head=head)
    return backbones.build(architecture, image_shape=SHAPE, classes=CLASSES)


def make(kind=DFA, optimizer=None, width=2, **kwargs):
    keras.utils.set_random_seed(3)
    defense = kind(encoder(width), attack=TWO_STEPS, **kwargs)
    defense.compile(optimizer or keras.optimizers.SGD(RATE))
    return defense


def make_data(size=BATCH):
    random = np.random.default_rng(7)
    return {
        "image": random.uniform(size=(size, *SHAPE)).astype(np.float32),
        "label": random.integers(CLASSES, size=size).astype(np.int32),
        "index": np.arange(size, dtype=np.int32),
    }


@pytest.fixture
def fix(monkeypatch):
    """Have every batch mixed by a given share with given partners."""

    def fix(share, partner=REVERSED):
        place = tf.range(len(partner))
        mixture = mixing.Mixture(place, tf.constant(partner), tf.fill([len(partner)], share), tf.constant([1, 2]))
        monkeypatch.setattr(mixing, "draw", lambda *given, **settings: mixture)
        return mixture

    return fix


@pytest.fixture
def seen(monkeypatch):
    """What the two losses of the last step were given, and what they returned."""
    seen = {}
    cross_entropy, aggregation = losses.mixed_cross_entropy, losses.aggregation

    def of_classes(logits, *given, **settings):
        seen["logits"], seen["cross_entropy"] = logits, cross_entropy(logits, *given, **settings)
        return seen["cross_entropy"]

    def of_embeddings(mixed, target, **settings):
        seen["mixed"], seen["target"] = mixed, target
        seen["aggregation"] = aggregation(mixed, target, **settings)
        return seen["aggregation"]

    monkeypatch.setattr(losses, "mixed_cross_entropy", of_classes)
    monkeypatch.setattr(losses, "aggregation", of_embeddings)
    return seen


# The step of section 3, by its formulas, on a model of one's own


def transcribed_step(model, batch, mixture, *, noise=0.05, weight=1.0, distance="mse", reduction="mean", stop="target"):
    """Take the step with three passes and SGD; return both terms of the loss."""
    image, label = tf.constant(batch["image"]), batch["label"]
    partner, share = mixture.partner.numpy(), mixture.share[:, None]
    image_of_partner, axes = tf.gather(image, partner), model.get_layer("logits").kernel

    def embed(image):
        embedding = model(image, training=True)["embedding"]
        return embedding / tf.norm(embedding, axis=1, keepdims=True)

    def cross_entropy(logits, label):
        return -tf.math.log(tf.gather(tf.nn.softmax(logits), label, batch_dims=1))

    with tf.GradientTape() as tape:
        z_mixed = embed(share[..., None, None] * image + (1 - share[..., None, None]) * image_of_partner)
        z_bar = share * embed(image) + (1 - share) * embed(image_of_partner)
        logits = tf.abs(z_bar @ axes) + tf.abs(z_mixed @ axes)
        of_classes = share[:, 0] * cross_entropy(logits, label)
        of_classes = tf.reduce_mean(of_classes + (1 - share[:, 0]) * cross_entropy(logits, label[partner]))
        target = z_bar + (mixture.noise(z_bar, noise) if noise else 0)
        mixed = tf.stop_gradient(z_mixed) if stop == "mixed" else z_mixed
        target = tf.stop_gradient(target) if stop == "target" else target
        if distance == "cosine":
            dot = tf.reduce_sum(mixed * target, axis=1)
            of_embeddings = tf.reduce_mean(1 - dot / tf.norm(mixed, axis=1) / tf.norm(target, axis=1))
        else:
            per_example = tf.reduce_sum((mixed - target) ** 2, axis=1)
            of_embeddings = tf.reduce_mean(per_example) / (axes.shape[0] if reduction == "mean" else 1)
        loss = of_classes + weight * of_embeddings
    variables = model.trainable_variables
    for variable, gradient in zip(variables, tape.gradient(loss, variables)):
        variable.assign_sub(RATE * gradient)
    return float(of_classes), float(weight * of_embeddings)


# dfa 11, 13, 17: where each gradient goes, with one pass of the images or two, and the weight of each term
@pytest.mark.parametrize(
    ("settings", "transcribed"),
    [
        ({}, {}),
        ({"share_forward": False}, {}),
        ({"agg_weight": 30.0}, {"weight": 30.0}),
        ({"agg_weight": 30.0, "agg_stop": "mixed"}, {"weight": 30.0, "stop": "mixed"}),
        (
            {"agg_stop": "none", "agg_reduction": "sum", "noise_std": 0.2},
            {"stop": "none", "reduction": "sum", "noise": 0.2},
        ),
        ({"agg_distance": "cosine", "mix_per": "sample"}, {"distance": "cosine"}),
        ({"agg_weight": 0.0, "noise_std": 0.0}, {"weight": 0.0, "noise": 0.0}),
    ],
    ids=["default", "three_passes", "weight", "mixed", "none_sum", "cosine_sample", "no_aggregation"],
)
def test_step_equals_a_transcription_of_the_algorithm(settings, transcribed):
    batch, defense = make_data(), make(**settings)
    model = keras.models.clone_model(defense.backbone)
    model.set_weights(defense.backbone.get_weights())
    per = settings.get("mix_per", "batch")
    mixture = mixing.draw(batch["index"], defense.seed, defense.step, alpha=1.0, per=per)
    expected = transcribed_step(model, batch, mixture, **transcribed)
    found = defense.train_step(batch)
    assert [float(found[term]) for term in defense.terms] == pytest.approx(expected, rel=1e-4)
    for one, two in zip(defense.backbone.trainable_variables, model.trainable_variables, strict=True):
        np.testing.assert_allclose(one, two, atol=2e-5)
    statistics = zip(defense.backbone.non_trainable_variables, model.non_trainable_variables, strict=True)
    differ = any(np.abs(one - two).max() > 1e-4 for one, two in statistics)
    assert differ == settings.get("share_forward", True)  # which counts each image once


# dfa 2: axes stay as they were drawn, to the bit
def test_optimizer_does_not_touch_the_axes():
    defense = make(optimizer=keras.optimizers.SGD(0.1, momentum=0.9, weight_decay=0.1))
    kernel, before = defense.head.kernel.numpy(), [each.numpy() for each in defense.trainable_variables]
    assert not any(variable is defense.head.kernel for variable in defense.trainable_variables)
    for _ in range(10):
        defense.train_step(make_data())
    np.testing.assert_array_equal(defense.head.kernel, kernel)
    assert not any(np.array_equal(one, two) for one, two in zip(defense.trainable_variables, before))


# dfa 7: nothing to aggregate where the mixed image is an image
@pytest.mark.parametrize(
    ("share", "partner"), [(1.0, REVERSED), (0.0, REVERSED), (0.3, np.arange(BATCH))], ids=["own", "partner", "same"]
)
def test_aggregation_is_zero_where_nothing_is_mixed(share, partner, fix):
    fix(share, partner)
    found = make(noise_std=0.0, agg_reduction="sum").train_step(make_data())
    assert float(found["aggregation_loss"]) <= 1e-10


# dfa 8: what noise alone leaves
def test_noise_alone_leaves_its_variance(fix):
    fix(1.0, np.arange(256))
    defense = make(width=8)
    found = float(defense.train_step(make_data(256))["aggregation_loss"])
    numbers = 256 * defense.backbone.output_shape["embedding"][-1]
    assert found == pytest.approx(0.0025, abs=3 * 0.0025 * np.sqrt(2 / numbers))  # standard errors


# dfa 9: swapping both images and the share
def test_swapping_images_and_share_changes_nothing(fix, seen):
    batch, values = make_data(), []
    for share, order in ((0.3, np.arange(BATCH)), (0.7, REVERSED)):
        fix(share)
        defense = make(noise_std=0.0)
        defense.train_step({name: value[order] for name, value in batch.items()})
        values.append([seen[name].numpy() for name in sorted(seen)] + [each.numpy() for each in defense.variables])
    for one, two in zip(*values, strict=True):
        np.testing.assert_allclose(one, two, atol=1e-5)


# dfa 10: lengths
def test_embeddings_have_length_one_and_mixtures_of_them_less(fix, seen):
    fix(0.4)
    defense, batch = make(noise_std=0.0), make_data()
    z = defense.directions(batch["image"], training=True).numpy()
    defense.train_step(batch)
    for each in (z, seen["mixed"]):
        np.testing.assert_allclose(np.linalg.norm(each, axis=1), 1, atol=1e-5)
    cosine = np.sum(z * z[REVERSED], axis=1)
    length = np.sqrt(0.4**2 + 0.6**2 + 2 * 0.4 * 0.6 * cosine)  # so of orthogonal ones the first two summands
    np.testing.assert_allclose(np.linalg.norm(seen["target"], axis=1), length, atol=1e-5)
    assert length.max() < 1


# dfa 14: logits of both branches are added
@pytest.mark.parametrize("share", [1.0, 0.0])
def test_logits_of_an_image_that_is_not_mixed_count_twice(share, fix, seen):
    fix(share)
    defense, batch = make(), make_data()
    own = np.arange(BATCH) if share else REVERSED
    logits = 2 * defense.backbone(batch["image"][own], training=True)["logits"]
    found = defense.train_step(batch)
    np.testing.assert_allclose(seen["logits"], logits, atol=1e-5)
    expected = tf.reduce_mean(losses.cross_entropy(logits, batch["label"][own]))
    assert float(found["cross_entropy_loss"]) == pytest.approx(float(expected), rel=1e-5)


# dfa 16: noise is on the target alone
def test_noise_does_not_enter_the_logits(fix, seen):
    fix(0.4)
    found = []
    for noise_std in (0.0, 0.05):
        make(noise_std=noise_std).train_step(make_data())
        found.append(dict(seen))
    np.testing.assert_array_equal(found[0]["logits"], found[1]["logits"])
    assert np.abs(found[0]["target"] - found[1]["target"]).max() > 0.01


# dfa 17: the sum of both terms
def test_terms_are_both_losses_and_the_weight_of_aggregation(seen):
    found = make(agg_weight=5.0).train_step(make_data())
    assert float(found["cross_entropy_loss"]) == pytest.approx(np.mean(seen["cross_entropy"]), rel=1e-5)
    assert float(found["aggregation_loss"]) == pytest.approx(5 * np.mean(seen["aggregation"]), rel=1e-5)


# dfa 20, 21: it learns, and embeddings of classes stay apart


def bars(size=256):
    """Return images with a bright bar, nearer to the top by class, and their classes."""
    random = np.random.default_rng(1)
    label = (np.arange(size) % CLASSES).astype(np.int32)
    image = random.uniform(0, 0.4, size=(size, *SHAPE)).astype(np.float32)
    for row, of_class in enumerate(label):
        image[row, 2 * of_class : 2 * of_class + 2] += 0.5
    return image, label


def test_embeddings_gather_on_the_axes_of_their_classes():
    image, label = bars()
    own = np.eye(CLASSES, dtype=bool)[label]
    defense = make(optimizer=keras.optimizers.SGD(0.1, momentum=0.9), width=4)
    history = defense.fit(image, label, batch_size=32, epochs=25, verbose=0).history["cross_entropy_loss"]
    fresh = make(width=4)
    fresh.backbone(image, training=True)
    z, before = defense.directions(image).numpy(), fresh.directions(image, training=True).numpy()
    cosines, cosines_before = (np.abs(each @ defense.head.kernel.numpy()) for each in (z, before))
    floor = np.log(1 + (CLASSES - 1) * np.exp(-2))  # of images that are not mixed
    assert floor < history[-1] < history[0] - 0.1
    assert np.mean(cosines.argmax(axis=1) == label) > 0.9
    assert cosines[own].mean() > cosines_before[own].mean() + 0.2
    assert cosines[~own].mean() < cosines_before[~own].mean()
    assert np.abs(z @ z.T)[label[:, None] != label].mean() < 0.5


def test_aggregation_without_classes_draws_embeddings_together(monkeypatch):
    monkeypatch.setattr(losses, "mixed_cross_entropy", lambda logits, label, partner, share, smoothing: 0 * share)
    image, label = bars(64)
    defense = make(optimizer=keras.optimizers.Adam(0.02), width=4, agg_reduction="sum")

    def spread():
        z = defense.directions(image, training=True).numpy()
        return np.linalg.norm(z[:, None] - z, axis=-1).mean()

    before = spread()
    defense.fit(image, label, batch_size=64, epochs=60, verbose=0)
    assert spread() < 0.7 * before


# The adversarial variant


def test_adversarial_variant_takes_the_step_of_dfa_on_crafted_images():
    batch, attacked, plain = make_data(), make(DFAAT), make()
    image_adv = attacked.craft(attacked.unpack(batch), TWO_STEPS).numpy()
    assert 0 < np.abs(image_adv - batch["image"]).max() <= 0.1 + 1e-6
    found = attacked.train_step(batch)
    expected = plain.train_step({**batch, "image": image_adv})
    assert set(found) == {*DFA.terms, "adversarial_accuracy"} and set(expected) == {*DFA.terms, "clean_accuracy"}
    for name, other in (*zip(DFA.terms, DFA.terms), ("adversarial_accuracy", "clean_accuracy")):
        assert float(found[name]) == float(expected[other])
    for one, two in zip(attacked.backbone.get_weights(), plain.backbone.get_weights(), strict=True):
        np.testing.assert_array_equal(one, two)


def test_attack_budget_is_that_of_the_variant_alone():
    assert make().attack_budget == 0 and make(DFAAT).attack_budget == 2
    assert DFA.monitor == "clean_accuracy" and DFAAT.monitor == "adversarial_accuracy"


# What can go wrong


def test_embedding_of_zero_stops_the_step():
    defense = make()
    last = defense.backbone.get_layer("block5_bn")
    for variable in (last.gamma, last.beta):
        variable.assign(tf.zeros_like(variable))
    assert np.isfinite(defense(make_data()["image"])).all()
    with pytest.raises(tf.errors.InvalidArgumentError, match="embedding of a training image is zero, which has no dir"):
        defense.train_step(make_data())
    assert int(defense.step) == 0


@pytest.mark.parametrize("name", ["dfa", "dfa_at"])
def test_flags_can_say_nothing_and_can_say_zero(name):
    zero = config.Run(defense=config.Defense(name=name, noise_std=0.0, agg_weight=0.0, mix_per="sample"))
    for run, expected in (
        (config.Run(defense=config.Defense(name=name)), (1.0, "batch", 0.05, 1.0, "mean", "mse", "target", True)),
        (zero, (1.0, "sample", 0.0, 0.0, "mean", "mse", "target", True)),
    ):
        defense = defenses.build(run, encoder())
        assert tuple(getattr(defense, setting) for setting in DFA.settings) == expected
    other = config.Run(defense=config.Defense(name="standard", noise_std=0.0))
    with pytest.raises(UsageError, match="--defense_noise_std is no setting of standard; it is one of: dfa, dfa_at"):
        defenses.build(other, encoder())


def test_release_passes_partners_separately_and_has_no_adversarial_variant():
    assert not defenses.build(config.Run(defense=config.Defense("dfa", "released")), encoder()).share_forward
    with pytest.raises(UsageError, match="released is no preset of dfa_at"):
        defenses.build(config.Run(defense=config.Defense("dfa_at", "released")), encoder())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mix_alpha": 0.0}, r"mix_alpha, .* must be finite and at least 0\.05, not 0"),
        ({"mix_per": "image"}, "mix_per must be one of batch, sample, not 'image'"),
        ({"noise_std": -0.1}, "noise_std and agg_weight must be at least 0, not -0.1 and 1"),
        ({"noise_std": float("nan")}, "must be at least 0, not nan and 1"),
        ({"agg_weight": -2.0}, "must be at least 0, not 0.05 and -2"),
        ({"agg_reduction": "max"}, "agg_reduction must be one of mean, sum, not 'max'"),
        ({"agg_distance": "l1"}, "agg_distance must be one of mse, cosine, not 'l1'"),
        ({"agg_stop": "both"}, "agg_stop must be one of target, mixed, none, not 'both'"),
    ],
)
def test_dfa_refuses_settings(settings, message):
    with pytest.raises(UsageError, match=f"{message}$"):
        DFA(encoder(), attack=TWO_STEPS, **settings)


@pytest.mark.parametrize("kind", [DFA, DFAAT])
def test_dfa_refuses_other_heads(kind):
    dense = encoder(head="dense")
    for backbone in (dense, backbones.with_orthogonal_head(dense, use_abs=False)):
        with pytest.raises(UsageError, match="absolute cosines are the logits; pass --backbone_head=orthogonal"):
            kind(backbone, attack=TWO_STEPS)

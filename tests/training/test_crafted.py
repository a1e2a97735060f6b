"""CAFD from a configuration: images attacked once before training, the classifier that they are made for, and both."""

from __future__ import annotations

import dataclasses
import json
import shutil

import keras
import numpy as np
import pytest
import tensorflow as tf

from kerasdefense import backbones, config, defenses, training
from kerasdefense.attacks import PGD
from kerasdefense.defenses import CAFD, Standard
from kerasdefense.defenses.batch import Batch
from kerasdefense.defenses.cafd import IMAGE_ADV
from kerasdefense.training import crafted, fitting, mirrored
from kerasdefense.training.crafted import IMAGES, STATE, Crafter, make_crafted, with_own_images
from kerasdefense.training.strategy import make_strategy
from kerasdefense.types import InputError, UsageError

BLOCK = 64


def small_denoiser(image_shape, **kwargs):
    image = keras.Input(image_shape, name="image")
    return keras.Model(image, keras.layers.Conv2D(1, 1, kernel_initializer="zeros", name="residual")(image))


def small_critic(image_shape, **kwargs):
    image = keras.Input(image_shape, name="image")
    return keras.Model(image, keras.layers.Dense(1, name="critic_logit")(keras.layers.Flatten()(image)))


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Have few images in a block, and networks that are compiled in a moment."""
    monkeypatch.setattr(crafted, "_BLOCK", BLOCK)
    monkeypatch.setattr(fitting, "_displays", lambda *given: [])
    monkeypatch.setattr(backbones, "residual_unet", small_denoiser)
    monkeypatch.setattr(backbones, "critic", small_critic)


@pytest.fixture(scope="module")
def few(digits):
    """Return the digits with 150 of their training images."""
    kept = np.sort(np.random.default_rng(0).permutation(digits.train.index)[:150])
    return dataclasses.replace(digits, train=dataclasses.replace(digits.train, index=kept))


@pytest.fixture(scope="module")
def make_run(small_run):
    """Return a function from the settings of a defense to a run of a step or two."""

    def make(attack=None, train=None, **settings):
        settings_of_train = {
            "epochs": 1,
            "batch_size": 32,
            "steps_per_epoch": 2,
            "validation_steps": 1,
            **(train or {}),
        }
        run = small_run(attack=attack, **settings_of_train)
        return dataclasses.replace(run, defense=config.Defense(**{"name": "cafd", **settings}))

    return make


def defense_of(shift=0.0, **settings):
    """Return a defense with few layers, whose classifier is the same every time but for `shift`."""
    keras.utils.set_random_seed(3)
    backbone = backbones.small_cnn((8, 8, 1), 10, width=2)
    bias = backbone.get_layer("logits").bias
    bias.assign(bias + shift)
    attack = PGD(epsilon=0.1, steps=1, keep="last")
    return CAFD(backbone, attack=attack, lam_a=0.0, **settings)


def craft(run, splits, folder, defense=None):
    own = with_own_images(run, splits)
    strategy = make_strategy(run.train)
    with strategy.scope():
        crafter = Crafter(defense or defense_of())
    return make_crafted(run, own, crafter, folder, strategy)


def images_of(splits):
    """Return the training images as they are, in the order of their numbers."""
    return np.concatenate([batch["image"].numpy() for batch in splits.train.batches(64)])


@pytest.fixture(scope="module")
def kept(few, make_run, tmp_path_factory):
    """Return a folder of attacked images, and what was in it when it was made."""
    folder = tmp_path_factory.mktemp("crafted") / "images"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(crafted, "_BLOCK", BLOCK)
        made = craft(make_run(), few, folder)
    return folder, np.array(made.image)


@pytest.fixture
def copied(kept, tmp_path):
    shutil.copytree(kept[0], tmp_path / "images")
    return tmp_path / "images"


def test_every_image_is_attacked_once_as_the_defense_attacks_it(few, make_run, kept):
    folder, image = kept
    index = few.train.index
    label = few.train.label[index]
    batch = Batch(tf.constant(images_of(few)), tf.constant(label, tf.int32), tf.constant(index, tf.int32))
    np.testing.assert_allclose(image, defense_of().craft_before(batch), atol=1e-6)
    assert image.shape == (150, 8, 8, 1) and image.dtype == np.float32
    assert 0.09 < np.abs(image - batch.image).max() <= 0.1 + 1e-6
    state = json.loads((folder / STATE).read_text())
    assert len(state["blocks"]) == 3 and (folder / IMAGES).is_file()


def test_images_are_made_once_and_reused_bit_for_bit(few, make_run, kept, copied, monkeypatch, capsys):
    monkeypatch.setattr(CAFD, "craft_before", None)  # whatever calls it fails
    made = craft(make_run(), few, copied)
    np.testing.assert_array_equal(made.image, kept[1])
    assert "attacking" not in capsys.readouterr().err


def test_crafting_goes_on_where_it_was_cut_off(few, make_run, kept, copied, capsys):
    state = json.loads((copied / STATE).read_text())
    (copied / STATE).write_text(json.dumps({**state, "blocks": state["blocks"][:1]}))
    image = np.load(copied / IMAGES, mmap_mode="r+")
    image[BLOCK:] = 0  # as if nothing but the first block had been written
    image.flush()
    made = craft(make_run(), few, copied)
    np.testing.assert_array_equal(made.image, kept[1])
    assert json.loads((copied / STATE).read_text()) == state
    assert "attacking 150 training images once" in capsys.readouterr().err


def test_crafting_begins_anew_where_its_first_block_was_cut_off(few, make_run, kept, copied):
    state = json.loads((copied / STATE).read_text())
    (copied / STATE).write_text(json.dumps({**state, "blocks": []}))
    np.save(copied / IMAGES, np.zeros(5, np.float32))
    np.testing.assert_array_equal(craft(make_run(), few, copied).image, kept[1])


def test_damaged_block_is_refused(few, make_run, copied):
    image = np.load(copied / IMAGES, mmap_mode="r+")
    image[BLOCK + 3, 0, 0] += 0.5
    image.flush()
    with pytest.raises(InputError, match=rf"^block 1 of .*{IMAGES} is damaged or of other images: remove .*/images$"):
        craft(make_run(), few, copied)


@pytest.mark.parametrize("text", ["{", "[]", '{"settings": {}}'])
def test_damaged_state_is_refused(few, make_run, copied, text):
    (copied / STATE).write_text(text)
    with pytest.raises(InputError, match=rf"{STATE} is damaged: remove .*, or pass another --defense_crafted$"):
        craft(make_run(), few, copied)


def test_folder_of_other_files_is_refused(few, make_run, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match=rf"holds something else, and no {STATE}: pass another --defense_crafted$"):
        craft(make_run(), few, tmp_path)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"defense": {"shift": 1.0}}, "classifier"),
        ({"defense": {"seed": 1}}, "attack"),
        ({"defense": {"legacy_cam": True}}, "attack"),
        ({"run": {"crafted_examples": 100}}, "data set"),
        ({"precision": "mixed_bfloat16"}, "classifier"),
    ],
)
def test_images_made_for_something_else_are_refused(few, make_run, copied, change, what):
    defense = defense_of(**change.get("defense", {}))
    if "precision" in change:
        defense.backbone = backbones.with_precision(defense.backbone, change["precision"])
    with pytest.raises(InputError) as refused:
        craft(make_run(**change.get("run", {})), few, copied, defense)
    message = str(refused.value)
    assert f"were made for another {what} (" in message and "\n" not in message
    assert message.endswith("): remove them, or pass another --defense_crafted")


def test_names_of_layers_and_batches_make_no_other_images(few, make_run, kept, copied):
    keras.layers.Conv2D(1, 1)(keras.Input((8, 8, 1)))  # so that automatic names go on counting
    made = craft(make_run(train={"batch_size": 16}), few, copied)
    np.testing.assert_array_equal(made.image, kept[1])


def test_subset_is_chosen_by_the_seed(few, make_run):
    chosen = [
        with_own_images(make_run(crafted_examples=40, train={"seed": seed}), few).train.index for seed in (0, 0, 1)
    ]
    for each in chosen:
        assert len(each) == 40 and set(each) <= set(few.train.index) and (np.diff(each) > 0).all()
    np.testing.assert_array_equal(chosen[0], chosen[1])
    assert len({*chosen[0]} & {*chosen[2]}) < 30
    np.testing.assert_array_equal(with_own_images(make_run(), few).train.index, few.train.index)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"crafted_examples": 31}, "--defense_crafted_examples=31 must be 0 .*, or at least a batch of 32 and at most"),
        ({"crafted_examples": 151}, "--defense_crafted_examples=151 must be 0 .* and at most the 150 training images"),
        ({"crafted_examples": 40, "dynamic": True}, "crafted_examples are for images attacked before training"),
        ({"crafted": "somewhere", "dynamic": True}, "--defense_crafted and .* are for images attacked before training"),
    ],
)
def test_subsets_and_folders_that_make_no_sense_are_refused(few, make_run, settings, message):
    with pytest.raises(UsageError, match=message):
        with_own_images(make_run(**settings), few)


def test_batches_hold_the_images_as_they_are_and_what_was_made_of_them(few, make_run, tmp_path):
    run = make_run(crafted_examples=40)
    own = with_own_images(run, few)
    made = craft(run, few, tmp_path)
    as_they_are = dict(zip(own.train.index, images_of(own)))
    seen = []
    for batch in own.train.epochs(8, seed=0, epochs=1).map(made.beside):
        attacked = defense_of().craft_before(Batch(batch["image"], batch["label"], batch["index"]))
        np.testing.assert_allclose(batch[IMAGE_ADV], attacked, atol=1e-6)
        for number, image in zip(batch["index"].numpy(), batch["image"].numpy()):
            np.testing.assert_array_equal(image, as_they_are[number])
            seen.append(number)
    assert sorted(seen) == list(own.train.index)


def test_two_replicas_make_the_same_images(few, make_run, kept, tmp_path):
    strategy = mirrored(("/device:CPU:0", "/device:CPU:1"))
    with strategy.scope():
        crafter = Crafter(defense_of())
    own = with_own_images(make_run(), few)
    made = make_crafted(make_run(), own, crafter, tmp_path, strategy)
    assert np.mean(np.abs(made.image - kept[1]) > 1e-5) < 0.01  # but for a gradient that rounding turns


# The classifier: a stage, or a saved model


class Stopped(Exception):  # noqa: N818 - nothing went wrong
    """Stands for a kill: nothing after it is done."""


@pytest.fixture
def begun(monkeypatch):
    """Return the defenses whose training begins, and stop there."""
    found = []

    def stop(run, splits, defense, *given):
        found.append(defense)
        raise Stopped

    monkeypatch.setattr(fitting, "_fit", stop)
    return found


def own_classifier(scale=1.0, softmax=True, two_dense=False, side=8):
    """Return a Keras classifier that knows the digits, from images in [0, `scale`]."""
    keras.utils.set_random_seed(5)
    layers = keras.layers
    image = keras.Input((side, side, 1))
    tensor = layers.Conv2D(16, 3, activation="relu", padding="same")(layers.Rescaling(1 / scale)(image))
    tensor = layers.Conv2D(32, 3, activation="relu", strides=2)(tensor)
    tensor = layers.GlobalAveragePooling2D()(tensor)
    if two_dense:
        tensor = layers.Dense(16, activation="relu", name="hidden")(tensor)
    tensor = layers.Dense(10, activation="softmax" if softmax else None, name="last")(tensor)
    return keras.Model(image, tensor)


@pytest.fixture(scope="module")
def saved(digits, tmp_path_factory):
    """Return a function that saves such a classifier, trained for a moment, and gives its path and itself."""
    folder, image, label = tmp_path_factory.mktemp("saved"), images_of(digits), digits.train.label[digits.train.index]
    found = {}

    def save(name, scale=1.0, side=8, **settings):
        if name not in found:
            model = own_classifier(scale=scale, side=side, **settings)
            if side == 8:
                model.compile(keras.optimizers.Adam(0.01), "sparse_categorical_crossentropy")
                model.fit(scale * image, label, epochs=3, verbose=0)
            model.save(folder / f"{name}.keras")
            found[name] = (str(folder / f"{name}.keras"), model)
        return found[name]

    return save


def test_classifier_is_trained_first_and_kept(few, make_run, tmp_path):
    run = make_run(classifier_epochs=2)
    defense, select, _ = training.train(run, few, tmp_path)
    trained = keras.models.load_model(tmp_path / "classifier" / training.MODEL)
    assert isinstance(trained, Standard) and isinstance(defense, CAFD)
    for one, two in zip(defense.backbone.get_weights(), trained.backbone.get_weights(), strict=True):
        np.testing.assert_array_equal(one, two)
    history = json.loads((tmp_path / "classifier" / training.HISTORY).read_text())
    assert history["monitor"] == "val_clean_accuracy" and len(history["epochs"]) == 2
    history = json.loads((tmp_path / training.HISTORY).read_text())
    assert history["monitor"] == "val_restoration" and select.best == history["epochs"][0]["val_restoration"] < 0
    assert {IMAGES, STATE} == {path.name for path in (tmp_path / "crafted").iterdir()}
    index, own = few.train.index, np.load(tmp_path / "crafted" / IMAGES)
    label = few.train.label[index]
    batch = Batch(tf.constant(images_of(few)), tf.constant(label, tf.int32), tf.constant(index, tf.int32))
    assert np.mean(np.abs(own - defense.craft_before(batch)) > 1e-5) < 0.01


@pytest.mark.parametrize(
    ("settings", "train", "expected"),
    [({}, {"epochs": 7}, (7, 1)), ({"classifier_epochs": 3}, {"epochs": 7, "validate_every": 5}, (3, 3))],
)
def test_classifier_is_trained_by_the_flags_of_the_run_on_clean_images(make_run, settings, train, expected):
    run = make_run(attack={"norm": "l2", "epsilon": 0.5, "warmup_epochs": 1}, train=train, **settings)
    (stage,) = defenses.stages(run)
    found = stage.run
    assert (stage.name, stage.saved, found.defense.name) == ("classifier", "", "standard")
    assert (found.train.epochs, found.train.validate_every) == expected
    assert found.attack == config.Attack(norm="l2", epsilon=0.5)
    assert (found.data, found.backbone, found.train.seed) == (run.data, run.backbone, run.train.seed)


def test_saved_classifier_is_taken_without_its_softmax(few, make_run, saved, begun, tmp_path):
    path, model = saved("plain")
    with pytest.raises(Stopped):
        training.train(make_run(classifier=path, crafted=str(tmp_path / "elsewhere")), few, tmp_path / "run")
    (defense,) = begun
    image = images_of(few)[:20]
    logits = keras.Model(model.input, model.layers[-2].output)(image) @ model.layers[-1].kernel + model.layers[-1].bias
    np.testing.assert_allclose(defense(image), logits, atol=1e-5)
    np.testing.assert_allclose(tf.nn.softmax(defense(image)), model(image), atol=1e-6)
    assert not (tmp_path / "run/classifier").exists() and not (tmp_path / "run/crafted").exists()
    assert (tmp_path / "elsewhere" / IMAGES).is_file()


def test_classifier_with_two_dense_layers_is_taken_where_the_last_is_named(few, make_run, saved, begun, tmp_path):
    path, model = saved("two", two_dense=True)
    with pytest.raises(
        InputError, match=r"2 dense layers follow the global pooling \(hidden, last\): pass logits_layer"
    ):
        training.train(make_run(classifier=path), few, tmp_path / "run")
    named = dataclasses.replace(make_run(classifier=path), backbone=config.Backbone("small_cnn", logits_layer="last"))
    with pytest.raises(Stopped):
        training.train(named, few, tmp_path / "run")
    (defense,) = begun
    image = images_of(few)[:20]
    np.testing.assert_allclose(tf.nn.softmax(defense(image)), model(image), atol=1e-6)
    features, _ = defense.features(tf.constant(image))
    assert features.shape == (20, 1, 1, 16)  # what enters the last layer


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"name": "bytes", "scale": 255.0},
            "% of [0-9]+ validation images right, no more than by chance: it must take i",
        ),
        (
            {"name": "large", "side": 16},
            r"the model takes images of \(16, 16, 1\), but those of the data are \(8, 8, 1",
        ),
    ],
)
def test_classifier_of_other_images_is_refused(few, make_run, saved, begun, tmp_path, settings, message):
    path, _ = saved(**settings)
    with pytest.raises(InputError, match=rf"^--defense_classifier=.* cannot stand in for its stage: .*{message}"):
        training.train(make_run(classifier=path), few, tmp_path)
    assert begun == []


def test_classifier_that_knows_images_better_in_another_range_is_refused(few, make_run, saved, begun, tmp_path):
    _, model = saved("plain")
    image = keras.Input((8, 8, 1))
    shifted = keras.Model(image, model(keras.layers.Rescaling(0.5, 0.5)(image)))  # of images in [-1, 1]
    shifted.save(tmp_path / "shifted.keras")
    with pytest.raises(
        InputError, match=r"% of [0-9]+ validation images right.*, and [0-9.]+ % in \[-1, 1\]: put a keras"
    ):
        training.train(make_run(classifier=str(tmp_path / "shifted.keras")), few, tmp_path)
    assert begun == []


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"classifier": "none.keras"}, InputError, "--defense_classifier=none.keras cannot stand in .*: no such file"),
        (
            {"classifier": "none.keras", "classifier_epochs": 2},
            UsageError,
            "--defense_classifier_epochs is for a class",
        ),
        ({"weight_term": "firm"}, UsageError, "weight_term must be one of soft, hard, joint"),
        ({"crafted_examples": 5}, UsageError, "--defense_crafted_examples=5 must be 0"),
        ({"name": "pgd_at", "crafted": "x"}, UsageError, "--defense_crafted and .* are for images attacked bef"),
    ],
)
def test_what_cannot_train_is_refused_before_the_classifier_is_trained(
    few, make_run, begun, tmp_path, settings, error, message
):
    with pytest.raises(error, match=message):
        training.train(make_run(**settings), few, tmp_path)
    assert begun == []


def test_activation_and_range_of_a_classifier_make_other_images_at_the_same_weights():
    def model(scale, activation):
        image = keras.Input((8, 8, 1))
        scaled = keras.layers.Rescaling(scale)(image)
        return keras.Model(image, keras.layers.Conv2D(2, 3, activation=activation, kernel_initializer="ones")(scaled))

    digests = [crafted._of_model(model(*each)) for each in ((1, "relu"), (1, "relu"), (255, "relu"), (1, "tanh"))]
    assert digests[0] == digests[1] and len({*digests}) == 3


def test_images_that_are_missing_beside_their_state_are_refused(few, make_run, copied):
    (copied / IMAGES).unlink()
    with pytest.raises(InputError, match=rf"{IMAGES} is missing or damaged: remove"):
        craft(make_run(), few, copied)

"""Example pictures in TensorBoard's files."""

import dataclasses

import numpy as np
import tensorflow as tf
from matplotlib import colormaps
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from kerasdefense import training
from kerasdefense.training.pictures import COUNT, SHOWN_SIDE, Pictures

SMALL = {"purifier_width": 1, "critic_width": 1, "validation_draws": 1}


def test_pictures_are_clean_attacked_and_the_change(digits, small_run, tmp_path):
    defense = training.build(small_run(), digits)
    pictures = Pictures(tmp_path, digits.validation)
    pictures.set_model(defense)
    pictures.on_train_begin()
    pictures.on_epoch_end(0, {"loss": 1.0})  # not validated: no pictures
    pictures.on_epoch_end(1, {"val_clean_accuracy": 0.5})
    events = EventAccumulator(str(tmp_path / "pictures"), size_guidance={"tensors": 0}).Reload()
    shown = {}
    for tag in ("clean", "adversarial", "perturbation"):
        (event,) = events.Tensors(tag)
        assert event.step == 2
        encoded = tf.make_ndarray(event.tensor_proto)[2:]  # after width and height
        shown[tag] = np.stack([tf.io.decode_png(each).numpy() for each in encoded]) / 255
        assert shown[tag].shape == (COUNT, 8, 8, 1)
    change = shown["adversarial"] - shown["clean"]
    assert 0 < np.abs(change).max() <= 0.1 + 1 / 255
    np.testing.assert_allclose(shown["perturbation"], 0.5 + change / 0.2, atol=0.03)


def test_what_a_method_draws_anew_is_shown_and_kept_in_the_run_directory(digits, small_run, tmp_path):
    defense = training.build(small_run(defense="osdn_caml"), digits)
    pictures = Pictures(tmp_path / "tensorboard", digits.validation)
    pictures.set_model(defense)
    pictures.on_train_begin()
    pictures.on_epoch_end(0, {"val_clean_accuracy": 0.5})
    events = EventAccumulator(str(tmp_path / "tensorboard/pictures"), size_guidance={"tensors": 0}).Reload()
    encoded = tf.make_ndarray(events.Tensors("decoded")[0].tensor_proto)[2:]  # after width and height
    shown = np.concatenate([tf.io.decode_png(each).numpy() for each in encoded], axis=1)
    kept = tf.io.decode_png((tmp_path / "reconstructions.png").read_bytes()).numpy()
    assert kept.shape == (3 * SHOWN_SIDE, COUNT * SHOWN_SIDE, 1)
    kept = kept[:: SHOWN_SIDE // 8, :: SHOWN_SIDE // 8]
    clean, attacked, decoded = np.split(kept.astype(int), 3)
    np.testing.assert_allclose(clean, np.concatenate(list(255 * pictures.batch["image"]), axis=1), atol=1)
    assert 0 < np.abs(clean - attacked).max() <= 255 * 0.1 + 1
    np.testing.assert_allclose(decoded, shown.astype(int), atol=1)


def test_where_networks_look_is_shown_and_kept_in_the_run_directory(digits, small_run, tmp_path):
    defense = training.build(small_run(defense="agkd_bml"), digits)
    defense.backbone.get_layer("block1_conv").kernel.assign_add(tf.ones([3, 3, 1, 4]))  # no longer as its teacher
    pictures = Pictures(tmp_path / "tensorboard", digits.validation)
    pictures.set_model(defense)
    pictures.on_train_begin()
    pictures.on_epoch_end(0, {"loss": 1.0})  # not validated: no pictures
    assert not (tmp_path / "attention.png").exists()
    pictures.on_epoch_end(1, {"val_clean_accuracy": 0.5})
    assert not (tmp_path / "reconstructions.png").exists()
    kept = tf.io.decode_png((tmp_path / "attention.png").read_bytes()).numpy()
    assert kept.shape == (4 * SHOWN_SIDE, COUNT * SHOWN_SIDE, 3)
    kept = kept[:: SHOWN_SIDE // 8, :: SHOWN_SIDE // 8]
    clean, attacked, teacher, student = np.split(kept.astype(int), 4)
    for grey in (clean, attacked):
        np.testing.assert_array_equal(grey, np.repeat(grey[..., :1], 3, axis=-1))
    np.testing.assert_allclose(clean[..., :1], np.concatenate(list(255 * pictures.batch["image"]), axis=1), atol=1)
    assert 0 < np.abs(clean - attacked).max() <= 255 * 0.1 + 1
    events = EventAccumulator(str(tmp_path / "tensorboard/pictures"), size_guidance={"tensors": 0}).Reload()
    image_adv = pictures.attacked(defense.unpack(pictures.batch))
    for name, found in zip(("teacher_feature_map", "student_feature_map"), (teacher, student)):
        maps = defense.attention(pictures.batch["image"], image_adv)[name]
        large = tf.image.resize(maps[..., None], (8, 8))[..., 0].numpy()
        coloured = 255 * np.concatenate(list(colormaps["viridis"](large)[..., :3]), axis=1)
        np.testing.assert_allclose(found, coloured, atol=1.5)
        (event,) = events.Tensors(f"attention_of_{name}")
        encoded = tf.make_ndarray(event.tensor_proto)[2:]  # after width and height
        shown = np.concatenate([tf.io.decode_png(each).numpy() for each in encoded], axis=1)
        np.testing.assert_allclose(shown.astype(int), found, atol=1)
        assert event.step == 2
    assert np.abs(teacher - student).max() > 20


def test_denoised_images_and_what_changed_are_kept_in_the_run_directory(digits, small_run, tmp_path):
    run = small_run(defense="cafd")
    run = dataclasses.replace(run, defense=dataclasses.replace(run.defense, denoiser_width=1, critic_width=1))
    defense = training.build(run, digits)
    defense.denoiser.get_layer("residual").bias.assign([0.05])
    pictures = Pictures(tmp_path / "tensorboard", digits.validation)
    pictures.set_model(defense)
    pictures.on_train_begin()
    pictures.on_epoch_end(0, {"val_restoration": -0.5})
    events = EventAccumulator(str(tmp_path / "tensorboard/pictures"), size_guidance={"tensors": 0}).Reload()
    assert {"clean", "adversarial", "perturbation", "denoised", "residual"} <= set(events.Tags()["tensors"])
    kept = tf.io.decode_png((tmp_path / "reconstructions.png").read_bytes()).numpy()
    assert kept.shape == (4 * SHOWN_SIDE, COUNT * SHOWN_SIDE, 1)
    kept = kept[:: SHOWN_SIDE // 8, :: SHOWN_SIDE // 8]
    clean, attacked, denoised, residual = np.split(kept / 255, 4)
    np.testing.assert_allclose(clean, np.concatenate(list(pictures.batch["image"]), axis=1), atol=1 / 255)
    expected = np.concatenate(list(defense.craft_before(defense.unpack(pictures.batch))), axis=1)
    np.testing.assert_allclose(attacked, expected, atol=1 / 255)
    np.testing.assert_allclose(denoised, np.clip(expected + 0.05, 0, 1), atol=1 / 255)
    np.testing.assert_allclose(residual, 0.5 + (np.clip(expected + 0.05, 0, 1) - expected) / 0.2, atol=1 / 255)
    assert 0 < np.abs(attacked - clean).max() <= 0.1 + 2 / 255


def test_transformed_and_purified_images_are_kept_in_the_run_directory(digits, small_run, tmp_path):
    run = small_run(defense="atop")
    run = dataclasses.replace(run, defense=dataclasses.replace(run.defense, **SMALL))
    defense = training.build(run, digits)
    pictures = Pictures(tmp_path / "tensorboard", digits.validation)
    pictures.set_model(defense)
    pictures.on_train_begin()
    pictures.on_epoch_end(0, {"val_adversarial_accuracy": 0.5})
    events = EventAccumulator(str(tmp_path / "tensorboard/pictures"), size_guidance={"tensors": 0}).Reload()
    assert {"clean", "adversarial", "perturbation", "transformed", "purified"} <= set(events.Tags()["tensors"])
    kept = tf.io.decode_png((tmp_path / "reconstructions.png").read_bytes()).numpy()
    assert kept.shape == (4 * SHOWN_SIDE, COUNT * SHOWN_SIDE, 1)
    clean, attacked, transformed, purified = np.split(kept[:: SHOWN_SIDE // 8, :: SHOWN_SIDE // 8] / 255, 4)
    np.testing.assert_allclose(clean, np.concatenate(list(pictures.batch["image"]), axis=1), atol=1 / 255)
    image_adv = pictures.attacked(defense.unpack(pictures.batch))
    np.testing.assert_allclose(attacked, np.concatenate(list(image_adv), axis=1), atol=1 / 255)
    for found, expected in zip((transformed, purified), defense.drawn(image_adv).values()):
        np.testing.assert_allclose(found, np.concatenate(list(expected), axis=1), atol=1 / 255)
    assert 0 < np.abs(attacked - clean).max() <= 0.1 + 2 / 255
    assert np.isclose(transformed, 127 / 255).mean() > 0.2 and np.abs(purified - transformed).max() > 0.2

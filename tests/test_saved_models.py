"""The published models in saved_models/: whole, small, described truly, and loadable."""

import dataclasses
import json
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf

from kerasdefense import evaluation, export, flags
from kerasdefense.export.saved_model import digests

ROOT = Path(__file__).parents[1]
MODELS = sorted(path.name for path in (ROOT / "saved_models").iterdir() if path.is_dir())
CONTROLS = ("standard", "pgd_at", "trades", "mart", "trades_awp")
MEGABYTES = {"atop_cifar10_mini": 5, "cafd_cifar10_mini": 5, "osdn_caml_cifar10_mini": 5}
"""Sizes where they are not 2: with model.keras come purifier or denoiser and critic, or decoder and peer."""


def test_every_control_and_method_is_published():
    purified = ("standard_vgg19", "cafd", "standard_resnet8", "atop")
    names = {f"{name}_cifar10_mini" for name in (*CONTROLS, "osdn_caml", "dfa", "agkd_bml", *purified)}
    assert names | {"standard_cifar10_split0_mini", "pgd_at_cifar10_split0_mini"} <= set(MODELS)


@pytest.mark.parametrize("name", MODELS)
def test_published_model_is_whole_small_and_of_its_configuration(name):
    folder = ROOT / "saved_models" / name
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    assert size < 1_000_000 * MEGABYTES.get(name, 2)
    card = json.loads((folder / "card.json").read_text())
    export.check_card(card)
    assert digests(folder / "1") == card["files"] and json.loads((folder / "1/card.json").read_text()) == card
    evaluation.read_outcomes(folder)  # figures and outcomes are of one evaluation
    config = ROOT / "configs/cifar10" / (name.replace("_cifar10", "") + ".cfg")
    run = flags.parse([f"--flagfile={config}"])
    places = {name: Path(getattr(run.defense, name)).name for name in ("classifier", "purifier")}
    named = dataclasses.replace(run.defense, **places)  # as cards name them
    run = dataclasses.replace(run, defense=named)
    for section in ("backbone", "attack", "defense"):
        asked = {key: value for key, value in card["config"][section].items() if key in vars(getattr(run, section))}
        assert asked.items() <= vars(getattr(run, section)).items()
    trained = {key: card["config"]["train"][key] for key in ("epochs", "precision", "learning_rate", "seed")}
    assert trained.items() <= vars(run.train).items()


def test_published_keras_model_and_saved_model_answer_alike():
    folder = ROOT / "saved_models" / MODELS[0]
    model = keras.models.load_model(folder / "model.keras")
    assert model.optimizer is None and {layer.compute_dtype for layer in model.backbone.layers} == {"float32"}
    image = np.random.default_rng(0).random((3, 32, 32, 3), np.float32)
    served = tf.saved_model.load(str(folder / "1")).signatures["serving_default"](image=tf.constant(image))
    np.testing.assert_allclose(served["logits"], model(image), atol=1e-4)


@pytest.mark.parametrize("name", ["atop_cifar10_mini", "cafd_cifar10_mini"])
def test_published_model_with_a_critic_loads_with_all_its_weights(name):
    model = keras.models.load_model(ROOT / "saved_models" / name / "model.keras")
    assert {id(each) for each in model.critic.weights} <= {id(each) for each in model.weights}

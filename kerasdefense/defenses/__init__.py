"""Defenses: Keras models with their own `train_step`, one per method."""

from __future__ import annotations

import dataclasses

import keras
import tensorflow as tf

from kerasdefense import attacks, config
from kerasdefense.attacks import PGD
from kerasdefense.defenses.adversarial_training import FGSMRSAT, PGDAT
from kerasdefense.defenses.base import ADVERSARIAL_ACCURACY, CLEAN_ACCURACY, Defense
from kerasdefense.defenses.standard import Standard
from kerasdefense.types import UsageError, look_up

DEFENSES: dict[str, type[Defense]] = {
    "fgsm_rs": FGSMRSAT,
    "pgd_at": PGDAT,
    "standard": Standard,
}


def build(run: config.Run, backbone: keras.Model) -> Defense:
    """Return the uncompiled defense that a run describes, around `backbone`."""
    name = run.defense.name
    kind = look_up(DEFENSES, name, "defense")
    if run.defense.preset == "released":
        raise UsageError(f"--defense_preset=released: {name} has no release to follow; use recommended")
    training_attack = run.attack
    if name == "fgsm_rs":
        if run.attack.steps > 1:
            raise UsageError(
                f"fgsm_rs takes one step, not --attack_steps={run.attack.steps}; use --defense_name=pgd_at"
            )
        if run.attack.name not in ("pgd", "fgsm_rs"):
            raise UsageError(
                f"fgsm_rs trains with --attack_name=fgsm_rs, not {run.attack.name}; use --defense_name=pgd_at"
            )
        training_attack = dataclasses.replace(run.attack, name="fgsm_rs")
    attack = attacks.build(training_attack)
    if run.backbone.path:
        image = tf.random.stateless_uniform([8, *backbone.input_shape[1:]], [0, 0])
        attacks.check_logits(backbone(image, training=False)["logits"])
    return kind(
        backbone,
        attack=attack,
        objective=run.attack.objective,
        validation_attack=PGD(norm=attack.norm, epsilon=attack.epsilon, steps=run.train.validation_steps, keep="last"),
        label_smoothing=run.defense.label_smoothing,
        seed=run.train.seed,
        name=name,
    )


__all__ = [
    "ADVERSARIAL_ACCURACY",
    "CLEAN_ACCURACY",
    "DEFENSES",
    "FGSMRSAT",
    "PGDAT",
    "Defense",
    "Standard",
    "build",
]

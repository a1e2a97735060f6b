"""Defenses: Keras models with their own `train_step`, one per method."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import keras
import tensorflow as tf

from kerasdefense import attacks, config
from kerasdefense.attacks import PGD
from kerasdefense.defenses.adversarial_training import FGSMRSAT, PGDAT
from kerasdefense.defenses.base import ADVERSARIAL_ACCURACY, CLEAN_ACCURACY, Defense
from kerasdefense.defenses.dfa import DFA, DFAAT
from kerasdefense.defenses.keeping import as_kept
from kerasdefense.defenses.mart import MART
from kerasdefense.defenses.mixup import Mixup
from kerasdefense.defenses.osdn_caml import OSDNCAML
from kerasdefense.defenses.stage import Stage
from kerasdefense.defenses.standard import Standard
from kerasdefense.defenses.trades import TRADES
from kerasdefense.types import UsageError, look_up

DEFENSES: dict[str, type[Defense]] = {
    "dfa": DFA,
    "dfa_at": DFAAT,
    "fgsm_rs": FGSMRSAT,
    "mart": MART,
    "mixup": Mixup,
    "osdn_caml": OSDNCAML,
    "pgd_at": PGDAT,
    "standard": Standard,
    "trades": TRADES,
}


def stages(run: config.Run) -> tuple[Stage, ...]:
    """Return the stages that the defense of a run is trained in before itself."""
    return look_up(DEFENSES, run.defense.name, "defense").stages(run)


def build(
    run: config.Run, backbone: keras.Model, *, steps_per_epoch: int = 1, stages: Mapping[str, keras.Model] = {}
) -> Defense:
    """Return the uncompiled defense that a run describes, around `backbone`.

    Args:
        run: the configuration.
        backbone: functional model with named outputs.
        steps_per_epoch: what an epoch of the warm-up is.
        stages: what its stages have trained, by name.
    """
    name = run.defense.name
    kind = look_up(DEFENSES, name, "defense")
    if run.defense.preset == "released" and kind.released is None:
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
        objective=run.attack.objective or None,
        validation_attack=PGD(norm=attack.norm, epsilon=attack.epsilon, steps=run.train.validation_steps, keep="last"),
        label_smoothing=run.defense.label_smoothing,
        awp_gamma=run.defense.awp_gamma,
        warmup_steps=round(run.attack.warmup_epochs * steps_per_epoch),
        ramp_steps=round(run.attack.ramp_epochs * steps_per_epoch),
        seed=run.train.seed,
        name=name,
        **_own_settings(run.defense, kind),
        **stages,
    )


def _own_settings(defense: config.Defense, kind: type[Defense]) -> dict[str, Any]:
    """Return the method's own constructor arguments that flags or preset set, and refuse those of other methods."""
    every = sorted({name for each in DEFENSES.values() for name in each.settings})
    unset = config.Defense()
    given = {name: getattr(defense, name) for name in every if getattr(defense, name) != getattr(unset, name)}
    for name in given:
        if name not in kind.settings:
            takers = ", ".join(key for key, each in DEFENSES.items() if name in each.settings)
            raise UsageError(f"--defense_{name} is no setting of {defense.name}; it is one of: {takers}")
    released = kind.released if defense.preset == "released" else None
    return {**(released or {}), **given}


__all__ = [
    "ADVERSARIAL_ACCURACY",
    "CLEAN_ACCURACY",
    "DEFENSES",
    "DFA",
    "DFAAT",
    "FGSMRSAT",
    "MART",
    "OSDNCAML",
    "PGDAT",
    "TRADES",
    "Defense",
    "Mixup",
    "Stage",
    "Standard",
    "as_kept",
    "build",
    "stages",
]

"""Defenses: Keras models with their own `train_step`, one per method."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import keras
import tensorflow as tf

from kerasdefense import attacks, config, losses
from kerasdefense.attacks import PGD
from kerasdefense.defenses.adversarial_training import FGSMRSAT, PGDAT
from kerasdefense.defenses.agkd_bml import AGKDBML
from kerasdefense.defenses.atop import AToP
from kerasdefense.defenses.bank import ExampleBank
from kerasdefense.defenses.base import ADVERSARIAL_ACCURACY, CLEAN_ACCURACY, Defense
from kerasdefense.defenses.cafd import CAFD
from kerasdefense.defenses.dfa import DFA, DFAAT
from kerasdefense.defenses.keeping import as_kept
from kerasdefense.defenses.mart import MART
from kerasdefense.defenses.mixup import Mixup
from kerasdefense.defenses.osdn_caml import OSDNCAML
from kerasdefense.defenses.preset import Preset
from kerasdefense.defenses.stage import Stage
from kerasdefense.defenses.standard import Standard
from kerasdefense.defenses.trades import TRADES
from kerasdefense.types import UsageError, look_up

DEFENSES: dict[str, type[Defense]] = {
    "agkd_bml": AGKDBML,
    "atop": AToP,
    "cafd": CAFD,
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


_NO_SMOOTHING = -1.0
"""Label smoothing where a method that has its own shall have none."""


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
    preset = _preset(run.defense, kind)
    training_attack = preset.attack(run.attack, run.defense.preset)
    if name == "fgsm_rs":
        if run.attack.steps > 1:
            raise UsageError(
                f"fgsm_rs takes one step, not --attack_steps={run.attack.steps}; use --defense_name=pgd_at"
            )
        if run.attack.name not in ("pgd", "fgsm_rs"):
            raise UsageError(
                f"fgsm_rs trains with --attack_name=fgsm_rs, not {run.attack.name}; use --defense_name=pgd_at"
            )
        training_attack = dataclasses.replace(training_attack, name="fgsm_rs")
    is_own = run.attack.objective in ("", kind.own_objective)
    if training_attack.name == "pgd" and is_own:
        training_attack = dataclasses.replace(training_attack, name=kind.own_attack)
    if training_attack.name == "cafa" and not (is_own and kind.own_attack == "cafa"):
        raise UsageError("--attack_name=cafa goes with --defense_name=cafd and its own objective; others take pgd")
    if training_attack.name == "cafa" and not training_attack.random_start:
        raise UsageError("--noattack_random_start leaves cafa where its gradient is zero: leave the flag out")
    attack = attacks.build(training_attack)
    if run.backbone.path:
        image = tf.random.stateless_uniform([8, *backbone.input_shape[1:]], [0, 0])
        attacks.check_logits(backbone(image, training=False)["logits"])
    return kind(
        backbone,
        attack=attack,
        objective=run.attack.objective or None,
        validation_attack=PGD(norm=attack.norm, epsilon=attack.epsilon, steps=run.train.validation_steps, keep="last"),
        awp_gamma=run.defense.awp_gamma,
        warmup_steps=round(run.attack.warmup_epochs * steps_per_epoch),
        ramp_steps=round(run.attack.ramp_epochs * steps_per_epoch),
        seed=run.train.seed,
        name=name,
        **_label_smoothing(run.defense, backbone.output_shape["logits"][-1]),
        **{**preset.settings, **_own_settings(run.defense, kind)},
        **stages,
    )


def _preset(defense: config.Defense, kind: type[Defense]) -> Preset:
    """Return the preset that a run names, or raise a UsageError where the method has none of that name."""
    if defense.preset == "recommended":
        return Preset()
    if defense.preset not in kind.presets:
        valid = ", ".join(("recommended", *kind.presets))
        raise UsageError(f"--defense_preset={defense.preset} is no preset of {defense.name}; it has: {valid}")
    return kind.presets[defense.preset]


def _label_smoothing(defense: config.Defense, classes: int) -> dict[str, float]:
    """Return the label smoothing that flags ask for, none where they leave it to the method."""
    mass = defense.label_smoothing
    if not mass:
        return {}
    if mass == _NO_SMOOTHING:
        return {"label_smoothing": 0.0}
    if mass < 0:
        raise UsageError(f"--defense_label_smoothing={mass:g} must be in [0, 1), or {_NO_SMOOTHING:g} for none")
    is_over_all = defense.smoothing_over == "all"
    return {"label_smoothing": mass if is_over_all else losses.smoothing_over_others(mass, classes)}


def _own_settings(defense: config.Defense, kind: type[Defense]) -> dict[str, Any]:
    """Return the method's own constructor arguments that flags set, and refuse what is of other methods."""
    every = sorted({name for each in DEFENSES.values() for name in (*each.settings, *each.run_settings)})
    unset = config.Defense()
    given = {name: getattr(defense, name) for name in every if getattr(defense, name) != getattr(unset, name)}
    for name in given:
        if name not in (*kind.settings, *kind.run_settings):
            takers = ", ".join(key for key, each in DEFENSES.items() if name in (*each.settings, *each.run_settings))
            raise UsageError(f"--defense_{name} is no setting of {defense.name}; it is one of: {takers}")
    return {name: value for name, value in given.items() if name in kind.settings}


__all__ = [
    "ADVERSARIAL_ACCURACY",
    "AGKDBML",
    "CAFD",
    "CLEAN_ACCURACY",
    "DEFENSES",
    "DFA",
    "DFAAT",
    "FGSMRSAT",
    "MART",
    "OSDNCAML",
    "PGDAT",
    "TRADES",
    "AToP",
    "Defense",
    "ExampleBank",
    "Mixup",
    "Stage",
    "Standard",
    "as_kept",
    "build",
    "stages",
]

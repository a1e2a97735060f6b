"""Every entry of DEFENSES goes on from a checkpoint bit for bit, weight perturbation and averages included."""

import shutil

import numpy as np
import pytest

from kerasdefense import config, data, defenses, training
from kerasdefense.defenses import DEFENSES
from kerasdefense.training import fitting

HEADS = {"dfa": "orthogonal", "dfa_at": "orthogonal"}
"""Defenses whose classes are frozen axes."""
SETTINGS = {
    "atop": {
        "purifier_width": 2,
        "critic_width": 2,
        "classifier_epochs": 1,
        "pretrain_epochs": 1,
        "validation_draws": 1,
    },
    "cafd": {"denoiser_width": 2, "critic_width": 2, "lam_f": 1.0, "classifier_epochs": 1},
}


@pytest.fixture(scope="module")
def splits(tmp_path_factory):
    return data.load(config.Data(dir=str(tmp_path_factory.mktemp("digits")), validation_fraction=0.05))


def variables(defense):
    optimizers = [variable for optimizer, _ in defense.optimizers() for variable in optimizer.variables]
    weights = [variable for part in defense.parts for variable in getattr(defense, part).weights]
    return [variable.numpy() for variable in (defense.step, *weights, *optimizers)]


@pytest.mark.parametrize("name", DEFENSES)
def test_resume_goes_on_bit_for_bit(name, splits, tmp_path, monkeypatch):
    monkeypatch.setattr(fitting, "_displays", lambda *given: [])
    run = config.Run(
        backbone=config.Backbone(name="small_cnn", width=4, head=HEADS.get(name, "dense")),
        attack=config.Attack(epsilon=0.1, steps=1),
        defense=config.Defense(name=name, awp_gamma=0.01, **SETTINGS.get(name, {})),
        train=config.Train(
            epochs=3, steps_per_epoch=4, validate_every=3, validation_steps=1, ema_decay=0.8, strategy="none"
        ),
    )
    whole = training.train(run, splits, tmp_path / "whole")
    shutil.copytree(tmp_path / "whole/checkpoints", tmp_path / "killed/checkpoints")
    for stage in defenses.stages(run):
        shutil.copytree(tmp_path / "whole" / stage.name, tmp_path / "killed" / stage.name)
    for left in ("best", "epochs/epoch-2.*", "epochs/epoch-3.*"):  # as it was when the second epoch was killed
        for path in (tmp_path / "killed/checkpoints").glob(left):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    resumed = training.train(run, splits, tmp_path / "killed")
    assert resumed.is_new and len(resumed.selection.history) == 3
    optimizers = {id(optimizer) for optimizer, _ in resumed.defense.optimizers()}
    assert len(optimizers) == (2 if name in ("atop", "cafd", "osdn_caml") else 1)
    for one, two in zip(variables(whole.defense), variables(resumed.defense), strict=True):
        np.testing.assert_array_equal(one, two)

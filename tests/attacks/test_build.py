from __future__ import annotations

import dataclasses

import pytest

from kerasdefense import attacks, config
from kerasdefense.attacks import FGSM, FGSMRS, PGD
from kerasdefense.types import UsageError


@pytest.mark.parametrize(
    "settings, expected",
    [
        ({}, PGD("linf", 8 / 255, keep="last")),
        (
            {"norm": "l2", "epsilon": 0.5, "steps": 7, "step_size": 0.1, "random_start": False},
            PGD("l2", 0.5, steps=7, step_size=0.1, random_start=False, keep="last"),
        ),
        ({"name": "fgsm"}, FGSM("linf", 8 / 255)),
        ({"name": "fgsm_rs", "step_size": 0.02}, FGSMRS("linf", 8 / 255, step_size=0.02)),
    ],
)
def test_build_follows_the_configuration(settings, expected):
    built = attacks.build(dataclasses.replace(config.Attack(), **settings))
    assert type(built) is type(expected) and built == expected


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"name": "newton"}, "unknown attack 'newton'; valid: apgd, .*cleverhans_cw_l2, .*pgd"),
        ({"objective": "hinge"}, "unknown objective 'hinge'; valid: class_activation, cross_entropy, .*dlr, .*margin"),
        (
            {"name": "cleverhans_pgd"},
            "--attack_name=cleverhans_pgd cannot craft training images; use one of: .*fgsm, fgsm_rs, .*pgd",
        ),
        ({"name": "fgsm", "steps": 3}, "FGSM takes one step, not 3"),
        ({"epsilon": -1.0}, "epsilon must be a finite number of at least 0"),
        ({"norm": "l1"}, "unknown norm 'l1'; valid: linf, l2"),
    ],
)
def test_build_refuses_with_one_line(settings, message):
    with pytest.raises(UsageError, match=message) as caught:
        attacks.build(dataclasses.replace(config.Attack(), **settings))
    assert "\n" not in str(caught.value)

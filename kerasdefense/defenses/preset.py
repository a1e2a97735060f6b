"""A preset: settings of a method that go together and have a name."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from kerasdefense import config
from kerasdefense.types import UsageError


@dataclasses.dataclass(frozen=True)
class Preset:
    """What a value of --defense_preset sets where no flag says otherwise.

    Attributes:
        settings: constructor arguments of the method.
        steps: gradient steps of the training attack; 0 = the attack's own.
        step_share: length of a step as a share of the radius; 0 = the attack's own.
    """

    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    steps: int = 0
    step_share: float = 0.0

    def attack(self, given: config.Attack, name: str) -> config.Attack:
        """Return the training attack that a run describes, with what the preset of this `name` says of it.

        Raises:
            UsageError: the run says something else.
        """
        if not self.steps:
            return given
        has_steps = given.name in ("pgd", "cafa")
        if given.steps not in (0, self.steps) or not has_steps:
            other = f"--attack_steps={given.steps}" if has_steps else f"--attack_name={given.name}"
            raise UsageError(f"--defense_preset={name} takes {self.steps} steps of pgd, not {other}; leave one out")
        step_size = given.step_size or self.step_share * given.epsilon
        return dataclasses.replace(given, steps=self.steps, step_size=step_size)

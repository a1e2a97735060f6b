"""Exact resume: at every epoch's end all that training needs to go on, bit for bit, from there."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Optional

import keras
import tensorflow as tf

from kerasdefense import config
from kerasdefense.data import Splits
from kerasdefense.defenses import Defense
from kerasdefense.training import saving
from kerasdefense.training.selection import SelectBest
from kerasdefense.types import InputError, UsageError

NAMED = 4
"""How many differing settings are named before the rest is counted."""

_WITHOUT_EFFECT = ("--data_cache", "--defense_crafted", "--train_resume", "--train_strategy")
_STATE = "state/.ATTRIBUTES/VARIABLE_VALUE"


class Checkpoints(keras.callbacks.Callback):
    """Write the defense, its optimizers, the selection and the settings after every epoch; keep the last three.

    The weights are the raw ones, whatever averages an optimizer keeps besides.

    Args:
        folder: where the checkpoints are kept, `epoch-N.*`.
        defense: compiled, its optimizers built.
        select: the selection, which goes on with training.
        settings: what training depends on, by flag; a run with other settings does not go on from here.
    """

    def __init__(self, folder: Path, defense: Defense, select: SelectBest, settings: Mapping[str, Any]) -> None:
        super().__init__()
        self.folder = folder
        self.select = select
        self.settings = settings
        with tf.device("CPU"):
            self.state = tf.Variable("", dtype=tf.string, trainable=False)
        self.checkpoint = tf.train.Checkpoint(model=defense, state=self.state)

    def on_train_begin(self, logs: Optional[dict[str, float]] = None) -> None:
        """Open the folder."""
        self.manager = saving.open_folder(self.checkpoint, self.folder, "epoch")

    def on_epoch_end(self, epoch: int, logs: Optional[dict[str, float]] = None) -> None:
        """Write the checkpoint of the epoch."""
        state = {"epoch": epoch + 1, "settings": self.settings, "selection": self.select.state()}
        self.state.assign(json.dumps(state))
        saving.save(self.manager, epoch + 1)

    def restore(self, *, whatever_settings: bool = False) -> int:
        """Go back to the newest checkpoint that can be read, and return how many epochs it has behind it.

        Args:
            whatever_settings: whether to take a checkpoint of other settings too, without its best epoch.

        Returns:
            0 where there is none.

        Raises:
            UsageError: the checkpoint is of other settings, and these are refused or do not fit its variables.
            InputError: there are checkpoints, and none can be read.
        """
        paths = list(newest_first(self.folder))
        for path in paths:
            try:
                state = read_state(path)
                differing = differences(state["settings"], self.settings)
                if differing and not whatever_settings:
                    refuse(differing, path.parent)
                self._read(path, differing)
            except (tf.errors.OpError, RuntimeError, AssertionError, LookupError, json.JSONDecodeError) as error:
                reason = (str(error).strip() or type(error).__name__).splitlines()[0]
                print(f"checkpoint {path} cannot be read ({reason}); going back to the one before", file=sys.stderr)
                continue
            self.select.load_state(state["selection"], same_settings=not differing)
            return int(state["epoch"])
        if paths:
            raise InputError(f"no checkpoint in {self.folder} can be read; --train_resume=never begins anew")
        return 0

    def _read(self, path: Path, differing: Sequence[str]) -> None:
        try:
            self.checkpoint.restore(str(path)).assert_existing_objects_matched()
        except (AssertionError, ValueError) as error:  # other variables, or of other shapes
            if not differing:
                raise
            raise UsageError(
                f"{path} does not fit a model of these settings ({'; '.join(differing[:NAMED])}): "
                "take another --run_dir, or pass --train_resume=never to begin anew"
            ) from error


def settings_of(run: config.Run, splits: Splits) -> dict[str, Any]:
    """Return what training depends on, by flag, and of the data what tells it from another set of its name."""
    settings = _flags_of(run)
    images = f"{splits.train.examples} of {splits.image_shape} in {len(splits.labels)} classes"
    return {**settings, "training images": images, "labels": ", ".join(splits.labels)}


def _flags_of(run: config.Run) -> dict[str, Any]:
    """Return the flags that training depends on, files as whole paths."""
    data_dir = (
        str(Path(run.data.dir).resolve()) if run.data.name in config.OWN_IMAGES else ""
    )  # a set keeps its name elsewhere
    sections = {
        "data": dataclasses.replace(run.data, dir=data_dir),
        "backbone": dataclasses.replace(run.backbone, path=_whole(run.backbone.path)),
        "defense": dataclasses.replace(
            run.defense,
            teacher=_whole(run.defense.teacher),
            classifier=_whole(run.defense.classifier),
            purifier=_whole(run.defense.purifier),
        ),
        **{section: getattr(run, section) for section in ("attack", "train")},
    }
    return {
        f"--{section}_{name}": value
        for section, content in sections.items()
        for name, value in dataclasses.asdict(content).items()
        if f"--{section}_{name}" not in _WITHOUT_EFFECT
    }


def _whole(path: str) -> str:
    return str(Path(path).expanduser().resolve()) if path else ""


def newest_first(folder: Path) -> Iterator[Path]:
    """Yield the checkpoints in a folder, as the common start of their files' names."""
    numbers = [path.stem.removeprefix("epoch-") for path in folder.glob("epoch-*.index")]
    for number in sorted((int(each) for each in numbers if each.isdecimal()), reverse=True):
        yield folder / f"epoch-{number}"


def read_state(path: Path) -> dict[str, Any]:
    """Return what a checkpoint says of itself: epoch, settings, selection."""
    return json.loads(tf.train.load_checkpoint(str(path)).get_tensor(_STATE))


def differences(there: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return in words where the settings of a checkpoint are not those of this run.

    A setting that the checkpoint does not know had the default of today.
    """
    before = {**_flags_of(config.Run()), **there}
    now = json.loads(json.dumps(now))
    return [f"{name} {before.get(name)} there, {now[name]} now" for name in now if before.get(name) != now[name]]


def refuse(differing: Sequence[str], folder: Path) -> None:
    """Raise the UsageError that names what differs."""
    more = f", and {len(differing) - NAMED} more" if len(differing) > NAMED else ""
    raise UsageError(
        f"{folder} was begun with other settings ({'; '.join(differing[:NAMED])}{more}): take another --run_dir, "
        "or pass --train_resume=always to go on all the same, --train_resume=never to begin anew"
    )

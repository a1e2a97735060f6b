"""From a configuration and data to a trained defense on disk, through every stage that the method declares."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Callable, NamedTuple

import keras
import numpy as np
import tensorflow as tf
from scipy import stats

from kerasdefense import backbones, config, defenses
from kerasdefense.data import Splits
from kerasdefense.defenses import Defense, Stage, as_kept
from kerasdefense.files import replacing, write_json
from kerasdefense.training.averages import ValidateAverages
from kerasdefense.training.bank import check_bank, make_bank
from kerasdefense.training.checkpoints import Checkpoints, differences, refuse, settings_of
from kerasdefense.training.crafted import Crafted, Crafter, crafted_in_memory, make_crafted, with_own_images
from kerasdefense.training.optimizer import make_optimizer
from kerasdefense.training.pictures import Pictures
from kerasdefense.training.randomness import SeedEpochs, use_generators
from kerasdefense.training.selection import SelectBest
from kerasdefense.training.strategy import check_together, is_chief, make_strategy
from kerasdefense.types import InputError, UsageError, look_up

with warnings.catch_warnings():
    warnings.simplefilter("ignore", UserWarning)  # the notice of TFA's end of life
    from tensorflow_addons.callbacks import TQDMProgressBar

MODEL, HISTORY = "model.keras", "history.json"
_KNOWN = 512
"""Validation images by which a saved classifier is told to know its classes."""
_ONE_SIDED = 0.9
"""Share of one class among them from which on they say nothing."""


class Trained(NamedTuple):
    """A trained defense, the record of its selection, and whether anything was trained for it just now."""

    defense: Defense
    selection: SelectBest
    is_new: bool


def build(run: config.Run, splits: Splits, stages: Mapping[str, keras.Model] = {}) -> Defense:
    """Return the compiled defense of a run; call it in the scope of the strategy.

    Args:
        run: the configuration.
        splits: data, for shapes and counts.
        stages: what the defense's stages have trained, by name.
    """
    keras.utils.set_random_seed(run.train.seed)
    use_generators()
    described = run.backbone
    if run.defense.classifier:  # whose layers these are
        described = dataclasses.replace(described, pooling_layer="", logits_layer="")
    backbone = backbones.build(described, image_shape=splits.image_shape, classes=len(splits.labels))
    if run.train.precision != "float32":
        backbone = backbones.with_precision(backbone, run.train.precision)
    steps = _steps_per_epoch(run, splits)
    stages = {name: backbones.with_precision(model, run.train.precision) for name, model in stages.items()}
    defense = defenses.build(run, backbone, steps_per_epoch=steps, stages=stages)
    optimizer = make_optimizer(run.train, run.train.epochs * steps)
    defense.compile(optimizer=optimizer, jit_compile=run.train.jit_compile or None)
    return defense


def train(run: config.Run, splits: Splits, run_dir: Path, *, on_saved: Callable[[], None] = lambda: None) -> Trained:
    """Train the defense of a run, its stages first, and return it at its best epoch.

    What is in `run_dir` already is gone on with, according to `run.train.resume`; what is finished is not trained
    again. A stage's folder is `run_dir/<stage>`.

    Args:
        run: the run's configuration.
        splits: data to train and validate on.
        run_dir: folder that receives `checkpoints/`, `tensorboard/`, `model.keras` and, last, `history.json`.
        on_saved: called when a new model is written, before `history.json` says that training is finished.

    Raises:
        UsageError: settings that contradict each other, or `run_dir` was begun with other ones.
        InputError: none of its checkpoints can be read.
    """
    if run.train.epochs < 1:
        raise UsageError(f"--train_epochs must be at least 1, not {run.train.epochs}")
    if not 1 <= run.train.validate_every <= run.train.epochs:
        raise UsageError("--train_validate_every must be at least 1, and must not exceed --train_epochs")
    if 0 < run.train.epochs <= run.attack.warmup_epochs:
        raise UsageError(f"--attack_warmup_epochs={run.attack.warmup_epochs:g} leaves no epoch for the attack")
    if look_up(defenses.DEFENSES, run.defense.name, "defense").needs_bank:
        check_bank(run, splits)
    strategy = make_strategy(run.train)
    is_one_of_several = strategy.cluster_resolver is not None and strategy.cluster_resolver.task_type
    if is_one_of_several and defenses.DEFENSES[run.defense.name].crafts_before(run.defense):
        raise UsageError(
            f"{run.defense.name} attacks images before training on one machine: pass another --train_strategy, or "
            "--defense_dynamic"
        )

    def take_stages() -> dict[str, keras.Model]:
        taken = saved_stages(run, splits, strategy)
        missing = [stage for stage in defenses.stages(run) if stage.name not in taken]
        if missing:
            with strategy.scope():  # so that what is wrong with its settings is said before its stages are trained
                build(run, with_own_images(run, splits), taken)
        for stage in missing:
            taken[stage.name] = stage.take(_train(stage.run, splits, run_dir / stage.name, strategy, dict).defense)
        return taken

    return _train(run, splits, run_dir, strategy, take_stages, on_saved)


def saved_stages(run: config.Run, splits: Splits, strategy: tf.distribute.Strategy) -> dict[str, keras.Model]:
    """Return what the saved models hand on that stand in for stages of a run, by the names of these.

    Raises:
        InputError: one of them cannot.
    """
    return {stage.name: _saved(stage, splits, strategy) for stage in defenses.stages(run) if stage.saved}


def _saved(stage: Stage, splits: Splits, strategy: tf.distribute.Strategy) -> keras.Model:
    try:
        with strategy.scope():
            model = stage.take(backbones.read(stage.saved))
        if stage.must_know:
            _check_knows(model, splits)
        return model
    except InputError as error:
        raise InputError(f"--defense_{stage.name}={stage.saved} cannot stand in for its stage: {error}") from error


def _check_knows(classifier: keras.Model, splits: Splits) -> None:
    """Raise an InputError where a saved classifier knows validation images no better than by chance, or scaled."""
    batch = next(iter(splits.validation.batches(_KNOWN)))
    image, label = batch["image"], batch["label"].numpy()
    classes = len(splits.labels)
    fitted = backbones.fitted(classifier, image_shape=splits.image_shape, classes=classes)

    def is_right(image: tf.Tensor) -> np.ndarray:
        return fitted(image, training=False)["logits"].numpy().argmax(axis=1) == label

    right = is_right(image)
    share = np.bincount(label, minlength=classes).max() / len(label)
    if share < _ONE_SIDED and stats.binomtest(int(right.sum()), len(label), share, "greater").pvalue > 0.01:
        raise InputError(
            f"it gets {100 * right.mean():.1f} % of {len(label)} validation images right, no more than by chance: it "
            "must take images in [0, 1] (a keras.layers.Rescaling at its beginning brings them to any other range) and "
            f"know the classes {', '.join(splits.labels)} in this order"
        )
    for words, scaled in (("[-1, 1]", 2 * image - 1), ("[0, 255]", 255 * image)):
        rescaled = is_right(scaled)
        gained, lost = int((rescaled & ~right).sum()), int((right & ~rescaled).sum())
        if gained and stats.binomtest(gained, gained + lost, 0.5, "greater").pvalue < 0.001:
            raise InputError(
                f"it gets {100 * right.mean():.1f} % of {len(label)} validation images right in [0, 1], and "
                f"{100 * rescaled.mean():.1f} % in {words}: put a keras.layers.Rescaling from [0, 1] at its beginning"
            )


def _train(
    run: config.Run,
    splits: Splits,
    folder: Path,
    strategy: tf.distribute.Strategy,
    take_stages: Callable[[], Mapping[str, keras.Model]],
    on_saved: Callable[[], None] = lambda: None,
) -> Trained:
    """Train one stage, or the defense itself, to its end, and save it; what is finished needs no stages."""
    splits = with_own_images(run, splits)
    settings, resume = settings_of(run, splits), run.train.resume
    finished = _finished(folder, settings, resume)
    if finished:
        print(f"{folder / MODEL} is trained already; --train_resume=never trains it anew", file=sys.stderr)
        return finished
    stages = take_stages()
    with tempfile.TemporaryDirectory() as elsewhere:
        own = folder if is_chief(strategy) else _copy(folder, Path(elsewhere), resume)
        if resume == "never":
            for outdated in ("checkpoints", "tensorboard", "crafted"):
                shutil.rmtree(own / outdated, ignore_errors=True)
        with strategy.scope():
            defense = build(run, splits, stages)
        warm = run.attack.warmup_epochs + run.attack.ramp_epochs
        folder_of_best = own / "checkpoints/best"
        select = SelectBest(folder_of_best, monitor=defense.monitor, guard=run.train.guard, guard_after=warm)
        checkpoints = Checkpoints(own / "checkpoints/epochs", defense, select, settings)
        first_epoch = checkpoints.restore(whatever_settings=resume == "always")
        check_together(strategy, first_epoch)
        if first_epoch >= run.train.epochs and select.best_epoch is None:
            raise UsageError(f"--train_epochs={run.train.epochs} leaves nothing to train after epoch {first_epoch}")
        (own / HISTORY).unlink(missing_ok=True)
        if first_epoch < run.train.epochs and select.collapsed_epoch is None:
            if defense.needs_bank:
                defense.bank = make_bank(run, splits)
            crafted = None
            if defense.crafts_before(run.defense):
                there = Path(run.defense.crafted).expanduser() if run.defense.crafted else own / "crafted"
                with strategy.scope():
                    crafter = Crafter(defense)
                in_training = make_crafted(run, splits, crafter, there, strategy)
                crafted = in_training, crafted_in_memory(run, splits.validation, crafter)
            callbacks = [select, checkpoints, *_displays(run, splits, own)]
            _fit(run, splits, defense, first_epoch, callbacks, crafted)
        else:
            select.restore_best(defense)
        _save(defense, own, optimizer=run.export.optimizer)
        if own == folder:
            on_saved()
        record = {"monitor": f"val_{select.monitor}", **select.state(), "settings": settings}
        write_json(own / HISTORY, record)  # says that the rest is whole
    return Trained(defense, select, is_new=True)


def _copy(folder: Path, elsewhere: Path, resume: str) -> Path:
    """Return a folder for a worker that is not the chief, which saves along and whose files nobody else reads."""
    if resume != "never" and (folder / "checkpoints").is_dir():
        shutil.copytree(folder / "checkpoints", elsewhere / "checkpoints")
    return elsewhere


def _fit(
    run: config.Run,
    splits: Splits,
    defense: Defense,
    first_epoch: int,
    callbacks: list[Any],
    crafted: tuple[Crafted, Crafted] | None = None,
) -> None:
    """Train; `crafted` are the training and the validation images that were attacked before, None if none were."""
    if first_epoch:
        print(f"going on after epoch {first_epoch} of {run.train.epochs}", file=sys.stderr)
    if run.train.schedule == "constant":  # which an optimizer keeps in a variable, and so in its checkpoints
        for optimizer, _ in defense.optimizers():
            optimizer.learning_rate = run.train.learning_rate
    batch_size, steps = run.train.batch_size, run.train.steps_per_epoch
    by_batches = tf.data.Options()  # over several workers, each takes its part of every batch
    by_batches.experimental_distribute.auto_shard_policy = tf.data.experimental.AutoShardPolicy.DATA
    stream = splits.train.epochs(
        batch_size, seed=run.train.seed, epochs=run.train.epochs, first_epoch=first_epoch, steps_per_epoch=steps
    )
    validation = splits.validation.batches(batch_size)
    if crafted is not None:
        stream, validation = (
            each.map(attacked.beside, tf.data.AUTOTUNE, deterministic=True).prefetch(tf.data.AUTOTUNE)
            for each, attacked in zip((stream, validation), crafted)
        )
    defense.fit(
        stream.with_options(by_batches),
        initial_epoch=first_epoch,
        epochs=run.train.epochs,
        steps_per_epoch=_steps_per_epoch(run, splits),
        validation_data=validation.with_options(by_batches),
        validation_freq=run.train.validate_every,
        callbacks=[SeedEpochs(run.train.seed), ValidateAverages(), *callbacks],
        verbose=0,
    )


def _displays(run: config.Run, splits: Splits, folder: Path) -> list[keras.callbacks.Callback]:
    """Return the callbacks that only show how training goes."""
    logs = folder / "tensorboard"
    shown = [keras.callbacks.TensorBoard(str(logs), write_graph=False), Pictures(logs, splits.validation)]
    return [*shown, TQDMProgressBar(show_epoch_progress=sys.stderr.isatty())] if run.progress else shown


def _steps_per_epoch(run: config.Run, splits: Splits) -> int:
    return run.train.steps_per_epoch or splits.train.steps_per_epoch(run.train.batch_size)


def _finished(folder: Path, settings: Mapping[str, Any], resume: str) -> Trained | None:
    """Return what a folder holds, if it was trained to its end with these settings and can be read."""
    history, model = folder / HISTORY, folder / MODEL
    if resume == "never" or not history.is_file() or not model.is_file():
        return None
    try:
        state = json.loads(history.read_text(encoding="utf-8"))
        differing = differences(state["settings"], settings)
        if differing and resume == "always":
            return None
        if differing:
            refuse(differing, folder)
        defense = keras.models.load_model(model)
        select = SelectBest(folder, monitor=defense.monitor, guard=False)
        select.load_state(state)
    except UsageError:
        raise
    except Exception as error:  # json, zipfile, h5py and Keras have a kind each for every way to be damaged
        print(f"{folder} is not complete ({error!r}); going on from its checkpoints", file=sys.stderr)
        return None
    return Trained(defense, select, is_new=False)


def _save(defense: Defense, folder: Path, *, optimizer: bool) -> None:
    with replacing(folder / MODEL) as temporary:
        as_kept(defense, optimizer=optimizer).save(temporary)

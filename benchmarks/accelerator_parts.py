"""The parts of `make gpu-check`: each trains a little on what accelerator is there, and says what came of it."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Callable, NamedTuple, Optional

import keras
import numpy as np
import tensorflow as tf

from kerasdefense import config, data, evaluation, export, training
from kerasdefense.data import Splits
from kerasdefense.defenses import Defense
from kerasdefense.export.saved_model import TOLERANCE

PASS, FAIL, SKIPPED = "PASS", "FAIL", "skipped"
LAP = 5
"""Steps after which the loss and the clock are read."""
FOREVER = 100_000
"""Laps that no part gets through."""
REPLICAS_AGREE = 1e-4
REPEATS = 0.1
"""How far two runs of one seed may end from each other on an accelerator, relative to the way that they went."""


class Check(NamedTuple):
    """What came of a part: PASS, FAIL or skipped, and the figures in words."""

    outcome: str
    figures: str


class Subject(NamedTuple):
    """What the parts train.

    Attributes:
        run: backbone, attack, data and batch size; each part sets the rest.
        splits: the images.
        folder: a folder to write to.
        accelerated: whether an accelerator does the work.
    """

    run: config.Run
    splits: Splits
    folder: Path
    accelerated: bool


Part = Callable[[Subject, float], Check]
"""`part(subject, seconds)` does at least what it must, and measures until so many seconds are over."""


def make_subject(folder: Path, *, devices: int, accelerated: bool) -> Subject:
    """Return ResNet-18 for an accelerator or a small network for the CPU, on digits of 32x32 pixels."""
    backbone = config.Backbone("resnet18", width=64) if accelerated else config.Backbone("small_cnn", width=8)
    images = 128 if accelerated else 16
    train = config.Train(
        batch_size=max(1, images // devices) * devices,
        learning_rate=0.05,
        schedule="constant",
        validation_steps=2,
        guard=False,
    )
    source = config.Data(name="digits", dir=str(folder / "data"), image_size=32)
    settings = config.Run(
        progress=False, data=source, backbone=backbone, attack=config.Attack(epsilon=8 / 255, steps=3), train=train
    )
    return Subject(settings, data.load(source), folder, accelerated)


class Laps(keras.callbacks.Callback):
    """Keep the mean loss and the seconds of every lap; stop after so many seconds, but not before so many laps.

    Args:
        seconds: time to train for.
        at_least: laps that are done however long they take.
    """

    def __init__(self, seconds: float, at_least: int) -> None:
        super().__init__()
        self.time, self.at_least = seconds, at_least
        self.seconds: list[float] = []
        self.losses: list[float] = []

    def on_epoch_begin(self, epoch: int, logs: Optional[dict[str, float]] = None) -> None:
        """Start the clock of a lap."""
        self.start = time.perf_counter()

    def on_epoch_end(self, epoch: int, logs: Optional[dict[str, float]] = None) -> None:
        """Read clock and loss."""
        self.seconds.append(time.perf_counter() - self.start)
        self.losses.append(sum(float((logs or {})[name]) for name in self.model.terms))
        self.model.stop_training = sum(self.seconds) > self.time and len(self.seconds) >= self.at_least


class Fit(NamedTuple):
    """A defense that was trained for some laps, the first of which traces and is not timed."""

    defense: Defense
    losses: list[float]
    images_per_second: float

    @property
    def finite(self) -> bool:
        """Whether the loss of every lap is a number."""
        return bool(np.isfinite(self.losses).all())

    def __str__(self) -> str:
        """Return the figures in words."""
        loss = f"loss {self.losses[0]:.2f} -> {self.losses[-1]:.2f}"
        return f"{loss} in {LAP * len(self.losses)} steps, {self.images_per_second:.0f} images/s"


def fit(settings: config.Run, splits: Splits, seconds: float, *, laps: int = 3) -> Fit:
    """Train the defense of a run for so many seconds, but not for fewer laps."""
    with training.make_strategy(settings.train).scope():
        defense = training.build(settings, splits)
    batch_size, clock = settings.train.batch_size, Laps(seconds, laps)
    stream = splits.train.epochs(batch_size, seed=settings.train.seed, epochs=FOREVER)
    defense.fit(stream, epochs=FOREVER, steps_per_epoch=LAP, callbacks=[clock], verbose=0)
    return Fit(defense, clock.losses, LAP * batch_size / float(np.median(clock.seconds[1:])))


def trains(precision: str) -> Part:
    """Return the part that trains by TRADES with AWP and averages in one precision: losses must be finite and fall."""

    def part(subject: Subject, seconds: float) -> Check:
        settings = with_settings(
            subject.run, defense="trades", awp_gamma=0.005, train={"precision": precision, "ema_decay": 0.99}
        )
        fitted = fit(settings, subject.splits, seconds)
        good, figures = fitted.finite and fitted.losses[-1] < fitted.losses[0], str(fitted)
        if precision == "mixed_float16":
            optimizer = fitted.defense.optimizer
            scale = float(optimizer.loss_scale)
            good = good and 0 < scale < float("inf")
            figures += f", loss scale {optimizer.initial_scale:g} -> {scale:g}"
        return Check(PASS if good else FAIL, f"TRADES + AWP + EMA: {figures}")

    return part


def compiles(subject: Subject, seconds: float) -> Check:
    """Train by PGD on one device, without XLA and with it: losses must be finite."""
    plain, compiled = (
        fit(
            with_settings(subject.run, defense="pgd_at", train={"strategy": "none", "jit_compile": jit}),
            subject.splits,
            seconds / 2,
        )
        for jit in (False, True)
    )
    rates = plain.images_per_second, compiled.images_per_second
    figures = f"{rates[0]:.0f} images/s without, {rates[1]:.0f} with, {rates[1] / rates[0]:.2f} times as many"
    return Check(PASS if plain.finite and compiled.finite else FAIL, f"PGD on one device: {figures}")


def repeats(subject: Subject, seconds: float) -> Check:
    """Train twice from one seed: on the CPU bit for bit the same, on an accelerator close to it."""
    del seconds
    settings = with_settings(subject.run, defense="pgd_at", train={"epochs": 2, "steps_per_epoch": LAP})
    with training.make_strategy(settings.train).scope():
        start = weights_of(training.build(settings, subject.splits))
    folders = (subject.folder / "first", subject.folder / "second")
    defenses = [training.train(settings, subject.splits, folder).defense for folder in folders]
    (first, second), steps = map(weights_of, defenses), int(defenses[0].step.numpy())
    if np.array_equal(first, second):
        return Check(PASS if np.isfinite(first).all() else FAIL, f"bit-identical weights after {steps} steps")
    apart = float(np.linalg.norm(first - second) / np.linalg.norm(first - start))
    figures = f"weights differ by at most {np.abs(first - second).max():.1e} after {steps} steps"
    good = subject.accelerated and apart <= REPEATS
    return Check(PASS if good else FAIL, f"{figures}, {apart:.1e} of the way they went")


def agrees(subject: Subject, seconds: float, devices: Optional[Sequence[str]] = None) -> Check:
    """Take one step of SGD on one device and on all: the weights must agree."""
    del seconds
    kind = "GPU" if subject.accelerated else "CPU"
    devices = devices or [device.name for device in tf.config.list_logical_devices(kind)]
    if len(devices) < 2:
        return Check(SKIPPED, "there is one device")
    settings = with_settings(subject.run, defense="pgd_at", train={"momentum": 0.0, "weight_decay": 0.0})
    reduced = tf.config.experimental.tensor_float_32_execution_enabled()
    tf.config.experimental.enable_tensor_float_32_execution(False)  # it rounds by more than what is looked for
    try:
        one = one_step(settings, subject.splits, tf.distribute.get_strategy())
        all_of_them = one_step(settings, subject.splits, training.mirrored(tuple(devices)))
    finally:
        tf.config.experimental.enable_tensor_float_32_execution(reduced)
    difference = float(np.abs(one - all_of_them).max())
    figures = f"one device and {len(devices)}: weights differ by at most {difference:.1e} after a step"
    return Check(PASS if difference <= REPLICAS_AGREE else FAIL, f"{figures}, limit {REPLICAS_AGREE:.0e}")


def one_step(settings: config.Run, splits: Splits, strategy: tf.distribute.Strategy) -> np.ndarray:
    """Return the trained weights after the first step of a run."""
    with strategy.scope():
        defense = training.build(settings, splits)
    stream = splits.train.epochs(settings.train.batch_size, seed=settings.train.seed, epochs=1)
    defense.fit(stream.take(1), verbose=0)
    return weights_of(defense)


def exports(subject: Subject, seconds: float) -> Check:
    """Train in mixed precision, load what was saved and export it: the SavedModel must give the model's logits."""
    del seconds
    precision, splits = "mixed_float16" if subject.accelerated else "mixed_bfloat16", subject.splits
    settings = with_settings(
        subject.run, defense="pgd_at", train={"precision": precision, "epochs": 2, "steps_per_epoch": LAP}
    )
    folder = subject.folder / "export"
    training.train(settings, splits, folder)
    model = keras.models.load_model(folder / training.MODEL)
    card = export.card(
        settings, results=None, labels=splits.labels, image_shape=splits.image_shape, versions=evaluation.versions()
    )
    version = export.save(model, folder / "saved_model", labels=splits.labels, version=1, card=card)
    image = next(iter(splits.test.batches(64)))["image"]
    served = tf.saved_model.load(str(version)).signatures["serving_default"](image=image)["logits"].numpy()
    expected = model(image, training=False).numpy()
    difference = float(np.abs(served - expected).max() / max(1.0, np.abs(expected).max()))
    figures = f"trained in {precision}: logits of SavedModel and {training.MODEL} differ by {difference:.1e}"
    return Check(PASS if difference <= TOLERANCE else FAIL, f"{figures}, limit {TOLERANCE:.0e}")


def with_settings(settings: config.Run, *, defense: str, awp_gamma: float = 0.0, train: dict[str, Any]) -> config.Run:
    """Return the run with another defense and other settings of its training."""
    return dataclasses.replace(
        settings,
        defense=config.Defense(name=defense, awp_gamma=awp_gamma),
        train=dataclasses.replace(settings.train, **train),
    )


def weights_of(defense: Defense) -> np.ndarray:
    """Return all weights that training changes, as one vector."""
    return np.concatenate([variable.numpy().ravel() for variable in defense.trainable_variables])

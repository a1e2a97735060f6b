"""What TFX's Trainer runs: the training of kerasdefense.run, from the same flags, on the pipeline's examples."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import keras
import tensorflow as tf

from kerasdefense import config, evaluation, export, flags, recognition, training
from kerasdefense.data import Splits
from kerasdefense.evaluation import ThreatModel
from kerasdefense.evaluation.digests import of_file
from kerasdefense.files import write_text
from kerasdefense.training import HISTORY, MODEL
from kerasdefense.training.checkpoints import settings_of
from pipelines.artifacts import copy_folder, read_splits

_KEPT = (HISTORY, flags.CONFIG, "tensorboard")
"""What of a training goes into the pipeline's model_run."""


def run_fn(fn_args: Any) -> None:
    """Train a defense with all its stages, fit its detectors, and export it.

    Args:
        fn_args: TFX's FnArgs. Of the examples all splits are read that lie beside those for training; the eval split
            is not looked at. `custom_config` has `flags` (the lines of a flag file), `labels` (class names in label
            order), `data_name` and `state_dir`, a folder of this machine where a training that was stopped goes on; if
            it is a URL, as on a cluster, training works in a temporary folder instead, and begins anew.

    The model artifact gets the SavedModel, where TFX expects it, `model.keras`, which attacks need, and perhaps
    `classifier.keras`.
    """
    given = fn_args.custom_config
    run = flags.parse(given["flags"])
    root = fn_args.train_files[0].rsplit("/", 2)[0]
    splits = read_splits(run, root, labels=given["labels"], name=given["data_name"])
    with _at_work(given["state_dir"], _key(run, splits, root)) as run_dir:
        training.train(run, splits, run_dir)
        write_text(run_dir / flags.CONFIG, "\n".join(flags.to_lines(run)) + "\n")
        version = export_trained(dataclasses.replace(run, run_dir=str(run_dir)), splits)
        copy_folder(str(version), fn_args.serving_model_dir)
        uri = fn_args.serving_model_dir.rstrip("/").rsplit("/", 1)[0]
        for file in (run_dir / MODEL, version.parent / export.CLASSIFIER):
            if file.is_file():
                tf.io.gfile.copy(str(file), f"{uri}/{file.name}", overwrite=True)
        for name in _KEPT:
            if (run_dir / name).is_dir():
                copy_folder(str(run_dir / name), f"{fn_args.model_run_dir}/{name}")
            elif (run_dir / name).is_file():
                tf.io.gfile.copy(str(run_dir / name), f"{fn_args.model_run_dir}/{name}", overwrite=True)


@contextlib.contextmanager
def _at_work(state_dir: str, key: str) -> Iterator[Path]:
    """Give the folder of this machine where a training is at work, which is removed when it is through."""
    if "://" in state_dir:
        with tempfile.TemporaryDirectory(prefix="kerasdefense-training-") as folder:
            yield Path(folder)
        return
    yield Path(state_dir) / key
    shutil.rmtree(Path(state_dir) / key)


def export_trained(run: config.Run, splits: Splits) -> Path:
    """Return a version's folder of the trained model in a run directory, with the detector that the run asks for.

    Beside it lies `classifier.keras`, where there can be one.
    """
    path = Path(run.run_dir) / MODEL
    model = evaluation.load_model(path)
    recognition.fit(run, splits, model, model.threat_model or ThreatModel(run.attack.norm, run.attack.epsilon))
    reject = recognition.exported(run, of_file(path))
    card = export.card(
        run,
        results=None,
        labels=splits.labels,
        image_shape=splits.image_shape,
        versions=evaluation.versions(),
        reject=reject,
    )
    defense, folder = keras.models.load_model(path), path.parent / export.OF_RUNS
    with export.classifier_file(defense, folder) as card["keras_import"]:
        return export.save(
            defense,
            folder,
            labels=splits.labels,
            version=0,
            card=card,
            reject=reject,
            diagnostics=run.export.diagnostics,
        )


def _key(run: config.Run, splits: Splits, root: str) -> str:
    """Return the name of the folder where a training of these settings on these examples is at work."""
    settings = json.dumps([settings_of(run, splits), root], sort_keys=True)
    return hashlib.sha256(settings.encode()).hexdigest()[:16]

"""What TFX's Trainer runs: the training of the package, which goes on where it was stopped."""

from __future__ import annotations

import json
import tempfile
import types
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf

from kerasdefense import data, flags, training
from kerasdefense.training.checkpoints import Checkpoints
from pipelines import trainer_module
from pipelines.examples import write_examples

FLAGS = (
    "--data_name=digits",
    "--data_augment=none",
    "--data_validation_fraction=0.15",
    "--defense_name=standard",
    "--backbone_name=small_cnn",
    "--backbone_width=4",
    "--train_epochs=2",
    "--train_batch_size=128",
    "--train_optimizer=adam",
    "--train_learning_rate=0.01",
    "--train_validation_steps=1",
    "--train_strategy=none",
    "--noexport_diagnostics",
    "--noprogress",
)


@pytest.fixture(scope="module")
def splits():
    return data.load(flags.parse(FLAGS).data)


@pytest.fixture(scope="module")
def examples(splits, tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "examples"
    write_examples(splits, folder)
    return folder


def arguments(examples, splits, root, state_dir):
    """Return what TFX calls run_fn with, as far as it is looked at, the folders of its artifacts made."""
    for name in ("model", "model_run"):
        (root / name).mkdir(exist_ok=True)
    return types.SimpleNamespace(
        train_files=[f"{examples}/train/*"],
        serving_model_dir=f"{root}/model/Format-Serving",
        model_run_dir=f"{root}/model_run",
        custom_config={
            "flags": list(FLAGS),
            "labels": list(splits.labels),
            "data_name": "digits",
            "state_dir": str(state_dir),
        },
    )


@pytest.fixture(scope="module")
def resumed(examples, splits, tmp_path_factory):
    """The folder of a training that was stopped after its first epoch and begun again, and its epochs in each run."""
    root = tmp_path_factory.mktemp("trainer")
    given = arguments(examples, splits, root, root / "state")
    finish, epochs = Checkpoints.on_epoch_end, ([], [])

    def stopping(self, epoch, logs=None):
        finish(self, epoch, logs)
        epochs[0].append(epoch)
        raise KeyboardInterrupt

    def counting(self, epoch, logs=None):
        finish(self, epoch, logs)
        epochs[1].append(epoch)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Checkpoints, "on_epoch_end", stopping)
        trainer_module.run_fn(given)
    assert not list((root / "model").iterdir()) and not list((root / "model_run").iterdir())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Checkpoints, "on_epoch_end", counting)
        trainer_module.run_fn(given)
    return root, epochs


def test_training_that_was_stopped_goes_on_and_leaves_no_state(resumed):
    root, epochs = resumed
    assert epochs == ([0], [1])
    assert list((root / "state").iterdir()) == []


def test_model_is_the_one_that_the_package_trains_from_the_original_data(resumed, splits, tmp_path):
    root, _ = resumed
    training.train(flags.parse(FLAGS), splits, tmp_path)
    there, expected = (
        keras.models.load_model(path).get_weights() for path in (root / "model/model.keras", tmp_path / "model.keras")
    )
    assert len(there) == len(expected) > 4
    for one, other in zip(there, expected):
        np.testing.assert_array_equal(one, other)


def test_model_has_its_card_and_the_run_its_history_where_tfx_looks(resumed, splits):
    root, _ = resumed
    serving = root / "model/Format-Serving"
    card = json.loads((serving / "card.json").read_text())
    assert card["defense"]["name"] == "standard" and card["data"]["name"] == "digits" and card["figures"] is None
    assert len(json.loads((root / "model_run/history.json").read_text())["epochs"]) == 2
    assert flags.parse([f"--flagfile={root}/model_run/{flags.CONFIG}"]).train.epochs == 2
    image = next(splits.test.batches(16).as_numpy_iterator())["image"]
    served = tf.saved_model.load(str(serving)).signatures["serving_default"](image=tf.constant(image))
    logits = keras.models.load_model(root / "model/model.keras")(image)
    np.testing.assert_array_equal(served["label"].numpy(), np.argmax(logits, -1))


def test_state_behind_a_url_is_kept_in_a_temporary_folder(examples, splits, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folders = []

    def stop(_, __, run_dir):
        folders.append((run_dir, run_dir.is_dir()))
        raise KeyboardInterrupt

    monkeypatch.setattr(training, "train", stop)
    with pytest.raises(KeyboardInterrupt):
        trainer_module.run_fn(arguments(examples, splits, tmp_path, "gs://bucket/state/training"))
    ((folder, was_there),) = folders
    assert was_there and folder.parent == Path(tempfile.gettempdir()) and not folder.exists()
    assert {path.name for path in tmp_path.iterdir()} == {"model", "model_run"}

"""Every configuration in configs/ resolves, and (slow) trains, measures and exports a model that answers."""

from __future__ import annotations

import contextlib
import json
import tempfile
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf
import tensorflow_datasets as tfds

from kerasdefense import flags, run

ROOT = Path(__file__).parents[1]
CONFIGS = sorted(path for path in (ROOT / "configs").rglob("*.cfg") if not path.stem.startswith("base"))
CLASSES = {"cifar10": 10, "cifar100": 100, "digits": 10, "imagenette/320px-v2": 10, "mnist": 10, "svhn_cropped": 10}
KNOWN = 6
"""Classes that a published open-set split leaves of ten."""
FOLDERS = 25
"""Classes of a mocked folder of images; more than the known ones of any configuration."""
IMAGES = 320
"""Images of a mocked split: a configured batch of known classes, and no more to validate on than need be."""

# Counts alone: the model, its attack and its losses stay as they are configured.
FEW = [
    "--train_epochs=1",
    "--defense_classifier_epochs=0",
    "--defense_teacher_epochs=0",
    "--defense_pretrain_epochs=-1",
    "--train_steps_per_epoch=1",
    "--train_batch_size=4",
    "--train_validate_every=1",
    "--train_validation_steps=1",
    "--train_strategy=none",
    "--evaluate_examples=4",
    "--evaluate_suite=quick",
    "--evaluate_chunk_size=4",
    "--evaluate_score_examples=4",
    "--evaluate_score_steps=1",
    "--detector_fit_examples=64",
    "--noprogress",
]

FROM_SCRATCH = [
    "--backbone_path=",
    "--defense_teacher=",
    "--defense_classifier=",
    "--defense_crafted=",
    "--defense_purifier=",
]
"""In place of models that other configurations train."""

every_config = pytest.mark.parametrize("flagfile", CONFIGS, ids=lambda path: f"{path.parent.name}/{path.stem}")


def random_images(builder, **reading):
    """Random images of every class, as `as_dataset` reads a split whose images stay encoded."""
    features = builder.info.features
    shape = [side or 64 for side in features["image"].shape]  # of a set whose images differ in size
    image = np.random.default_rng(0).integers(256, size=(IMAGES, *shape), dtype=np.uint8)
    label = np.arange(IMAGES) % features["label"].num_classes
    encoded = [tf.io.encode_png(each).numpy() for each in image]
    return tf.data.Dataset.from_tensor_slices({"image": encoded, "label": label})


def folder_of_images(folder, count, classes=1):
    """Write so many random images of 64 x 64, class by class."""
    random = np.random.default_rng(0)
    for number in range(count):
        path = folder / f"{number % classes}/{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(tf.io.encode_png(random.integers(256, size=(64, 64, 3), dtype=np.uint8)).numpy())


def unknown_sets(settings, folder):
    """Have the folders of unknown images that a configuration names elsewhere, and give the flags this takes."""
    if not settings.evaluate.ood:
        return []
    items = [each.partition(":") for each in settings.evaluate.ood.split(",")]
    for _, _, name in items:
        folder_of_images(folder / name, 4)
    return ["--evaluate_ood=" + ",".join(f"{group}:{folder / name}" for group, _, name in items)]


@contextlib.contextmanager
def mocked(name, folder):
    """Have TFDS serve random images under the name of a set, or a folder hold some, and give the flags this takes.

    Digits come with scikit-learn and are real.
    """
    if name == "digits":
        yield []
        return
    if name == "folder":
        folder_of_images(folder / "images", IMAGES, FOLDERS)
        yield [f"--data_dir={folder / 'images'}"]
        return
    builder = tfds.builder(name, data_dir=folder)  # of a set that is not there, the mock knows no splits
    splits = [tfds.core.SplitInfo(name=split, shard_lengths=[1], num_bytes=0) for split in ("train", "test")]
    builder.info.set_splits(tfds.core.SplitDict(splits))
    builder.data_path.mkdir(parents=True)
    builder.info.write_to_directory(builder.data_path)
    with tfds.testing.mock_data(data_dir=str(folder), as_dataset_fn=random_images):
        yield []


@pytest.fixture
def run_dir():
    """A run directory that goes at once, as a wide ResNet leaves a gigabyte in it and as much in memory."""
    with tempfile.TemporaryDirectory(prefix="kerasdefense-run-") as folder:
        yield Path(folder)
    keras.backend.clear_session()


def configured(flagfile):
    return flags.parse([f"--flagfile={flagfile}"])


@every_config
def test_every_config_resolves(flagfile, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)  # nested flag files are found from any working directory
    settings = configured(flagfile)
    with mocked(settings.data.name, tmp_path / "sets") as given:
        arguments = [
            f"--flagfile={flagfile}",
            "--dry_run",
            "--backbone_width=3",
            *FROM_SCRATCH,
        ]  # building wide ones takes seconds
        assert run.main([*arguments, *given, *unknown_sets(settings, tmp_path / "unknown")]) == 0
    printed = capsys.readouterr().out
    assert "trainable parameters" in printed and "--attack_epsilon=" in printed
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
@every_config
def test_config_is_alive(flagfile, run_dir, tmp_path, capsys):
    settings = configured(flagfile)
    arguments = [f"--flagfile={flagfile}", *FEW, *FROM_SCRATCH, f"--run_dir={run_dir}"]
    if settings.train.precision == "mixed_float16":  # an input gradient took 100 times as long on CPUs
        arguments.append("--train_precision=float32")
    if settings.detector.fit_on == "adv":  # after one step of training no attacked image may be classified rightly
        arguments.append("--detector_fit_on=both")
    with mocked(settings.data.name, tmp_path) as given:
        code = run.main([*arguments, *given, *unknown_sets(settings, tmp_path / "unknown")])
    assert code == 0, capsys.readouterr().err
    assert (run_dir / run.MODEL).is_file()
    results = json.loads((run_dir / run.RESULTS).read_text())
    assert results["clean_accuracy"]["n"] == 4 and results["config"]["defense"]["name"] == settings.defense.name
    exported = tf.saved_model.load(str(run_dir / "saved_model/1"))
    serve = exported.signatures["serving_default"]
    shape = serve.structured_input_signature[1]["image"].shape
    logits = serve(image=tf.random.stateless_uniform([2, *shape[1:]], [0, 0]))["logits"]
    split = settings.data.open_set_split
    drawn = int(split.partition(":")[0]) if ":" in split else KNOWN
    assert logits.shape == (2, drawn if split else CLASSES[settings.data.name])
    assert np.isfinite(logits).all()

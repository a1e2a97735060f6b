"""What is exported, read by TensorFlow's own command line and by TensorFlow Serving where it is installed."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import requests
from absl.testing import flagsaver
from tensorflow.python.tools import saved_model_cli

from kerasdefense import export
from kerasdefense.serving import Client

from .stub import binary, bundled, serving

OUTPUTS = {"accepted", "anomaly_score", "class_name", "label", "logits", "probabilities", "valid"}


@pytest.fixture
def command(monkeypatch):
    """Return what runs saved_model_cli as its script does, in this process: to import TensorFlow anew takes longer."""

    def command(*arguments):
        monkeypatch.setattr(sys, "argv", ["saved_model_cli", *arguments])
        with flagsaver.flagsaver():
            saved_model_cli.create_parser().parse_args().func()

    return command


def outputs_in(folder):
    """Return what saved_model_cli wrote, a file for each output."""
    return {path.stem: np.load(path, allow_pickle=path.stem == "class_name") for path in folder.glob("*.npy")}


def check_shown(printed):
    for name in export.SIGNATURES:
        shown = printed.split(f"signature_def['{name}']:")[1].split("Method name")[0]
        named = OUTPUTS - {"class_name"} if name == "examples" else OUTPUTS
        assert set(re.findall(r"outputs\['(\w+)'\]", shown)) == named
        (key,) = re.findall(r"inputs\['(\w+)'\]", shown)
        assert key == {"serving_default": "image"}.get(name, name)
        assert ("shape: (-1, 8, 8, 1)" in shown) == (key == "image")


def test_command_line_shows_every_signature(exported_defense, command, capsys):
    command("show", "--all", f"--dir={exported_defense.version}")
    check_shown(capsys.readouterr().out)


@pytest.mark.parametrize("signature", export.SIGNATURES)
def test_command_line_answers_as_the_model_does(signature, exported_defense, command, tmp_path):
    np.save(tmp_path / "image.npy", exported_defense.image[:2])
    files = ["b'" + "".join(f"\\x{byte:02x}" for byte in file) + "'" for file in exported_defense.files[:2]]
    examples = [f"{{'image': [{file}], 'label': [{label}]}}" for file, label in zip(files, exported_defense.label)]
    given = {
        "serving_default": f"--inputs=image={tmp_path / 'image.npy'}",
        "image_bytes": f"--input_exprs=image_bytes=[{','.join(files)}]",
        "examples": f"--input_examples=examples=[{','.join(examples)}]",
    }[signature]
    choice = ("--tag_set=serve", f"--signature_def={signature}", f"--outdir={tmp_path / 'found'}")
    command("run", f"--dir={exported_defense.version}", *choice, given)
    exported_defense.check(outputs_in(tmp_path / "found"), slice(2), has_names=signature != "examples")


@pytest.mark.slow
def test_script_shows_every_signature(exported_defenses):
    script = Path(sys.executable).with_name("saved_model_cli")
    arguments = [sys.executable, str(script), "show", "--all", f"--dir={exported_defenses('mahalanobis').version}"]
    done = subprocess.run(arguments, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    check_shown(done.stdout)


def outputs_of(predictions):
    """Return a client's predictions as arrays by name, class names as a server sends them."""
    found = {name: np.array([getattr(each, name) for each in predictions]) for name in OUTPUTS}
    return {**found, "class_name": np.array([each.class_name.encode() for each in predictions], object)}


@pytest.mark.parametrize("way", ["grpc", "rest"])
def test_client_hears_what_the_model_says(exported_defense, way):
    """Of TensorFlow Serving where it is installed, of a stub over the SavedModel elsewhere."""
    with serving(exported_defense.version.parent) as server, Client(getattr(server, way)) as client:
        for images in (exported_defense.image, exported_defense.levels, exported_defense.files):
            exported_defense.check(outputs_of(client.predict(images)))


@pytest.mark.skipif(binary() is None, reason="tensorflow_model_server is not installed: nothing reads the bundle")
def test_tensorflow_serving_starts_by_the_bundle(exported_defense, tmp_path):
    folder = exported_defense.version.parent
    with bundled(folder, tmp_path) as server:
        for address in (server.grpc, server.rest):
            with Client(address, name=folder.name, version_label="stable") as client:
                exported_defense.check(outputs_of(client.predict(exported_defense.files)))
        assert "tensorflow" in requests.get(f"{server.rest}/monitoring/prometheus/metrics", timeout=5).text

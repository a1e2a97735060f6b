"""The published models in saved_models/: whole, small, described truly, and loadable."""

import dataclasses
import json
import os
import shutil
import subprocess
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf
from tensorflow.core.protobuf import saved_model_pb2

import kerasdefense
from kerasdefense import assess, config, data, evaluation, export, flags
from kerasdefense.attacks.norms import radius
from kerasdefense.integrity import beside, digests

ROOT = Path(__file__).parents[1]
MODELS = sorted(path.name for path in (ROOT / "saved_models").iterdir() if path.is_dir())
CONTROLS = ("standard", "pgd_at", "trades", "mart", "trades_awp")
MEGABYTES = {"atop_cifar10_mini": 6, "cafd_cifar10_mini": 6, "osdn_caml_cifar10_mini": 6}
"""Sizes where they are not 3: with model.keras come purifier or denoiser and critic, or decoder and peer."""


def test_every_control_and_method_is_published():
    purified = ("standard_vgg19", "cafd", "standard_resnet8", "atop")
    names = {f"{name}_cifar10_mini" for name in (*CONTROLS, "osdn_caml", "dfa", "agkd_bml", *purified)}
    assert names | {"standard_cifar10_split0_mini", "pgd_at_cifar10_split0_mini"} <= set(MODELS)


@pytest.mark.parametrize("name", MODELS)
def test_published_model_is_whole_small_and_of_its_configuration(name):
    folder = ROOT / "saved_models" / name
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    assert size < 1_000_000 * MEGABYTES.get(name, 3)
    card = json.loads((folder / "card.json").read_text())
    export.check_card(card)
    assert digests(folder / "1") == card["files"] and beside(folder) == card.pop("beside")
    assert json.loads((folder / "1/card.json").read_text()) == card
    evaluation.read_outcomes(folder)  # figures and outcomes are of one evaluation
    config = ROOT / "configs/cifar10" / (name.replace("_cifar10", "") + ".cfg")
    run = flags.parse([f"--flagfile={config}"])
    places = {name: Path(getattr(run.defense, name)).name for name in ("classifier", "purifier")}
    named = dataclasses.replace(run.defense, **places)  # as cards name them
    run = dataclasses.replace(run, defense=named)
    for section in ("backbone", "attack", "defense"):
        asked = {key: value for key, value in card["config"][section].items() if key in vars(getattr(run, section))}
        assert asked.items() <= vars(getattr(run, section)).items()
    trained = {key: card["config"]["train"][key] for key in ("epochs", "precision", "learning_rate", "seed")}
    assert trained.items() <= vars(run.train).items()


def row(name):
    """Return the line on a model in the table of saved_models/README.md, all of it from its card."""
    card = json.loads((ROOT / "saved_models" / name / "card.json").read_text())
    figures, threat = card["figures"], card["figures"]["threat_model"]

    def share(figure):
        low, high = (100 * bound for bound in figure["ci95"])
        return f"{100 * figure['value']:.1f} % of {figure['n']:,} ({low:.1f} to {high:.1f})"

    backbone = card["backbone"].removesuffix("_cifar10_mini")
    ball = f"{figures['suite']}, {threat['norm']} {radius(threat['epsilon'])}"
    detector = card["rejection"]["detector"] if card.get("rejection") else "none"
    routes = "all" if card["keras_import"]["file"] else "all but `classifier.keras`"
    doubt = "" if figures.get("trusted", True) else ", not to be trusted"
    cells = (f"[`{name}`]({name}/MODEL_CARD.md)", f"{card['name']}, {backbone}", share(figures["clean_accuracy"]))
    cells += (f"{share(figures['robust_accuracy'])}, {ball}{doubt}", detector, routes)
    return f"| {' | '.join(cells)} |"


def test_readme_has_a_row_of_every_model_as_its_card_says():
    lines = (ROOT / "saved_models/README.md").read_text().splitlines()
    assert [line for line in lines if line.startswith("| [")] == [row(name) for name in MODELS]


OUTPUTS = {"logits", "probabilities", "label", "class_name", "anomaly_score", "accepted", "valid"}


def images():
    """Return a batch of images in 256 levels of [0, 1], and their PNG files."""
    levels = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), np.uint8)
    return levels / np.float32(255), [tf.io.encode_png(each).numpy() for each in levels]


def example(file):
    feature = {"image": tf.train.Feature(bytes_list=tf.train.BytesList(value=[file]))}
    return tf.train.Example(features=tf.train.Features(feature=feature)).SerializeToString()


@pytest.mark.parametrize("name", MODELS)
def test_published_model_loads_by_every_route_and_answers_alike(name):
    folder = ROOT / "saved_models" / name
    card = json.loads((folder / "card.json").read_text())
    model = kerasdefense.load_model(folder)
    assert model.optimizer is None and {layer.compute_dtype for layer in model.backbone.layers} == {"float32"}
    image, files = images()
    signatures = tf.saved_model.load(str(folder / "1")).signatures
    answers = [
        signatures["serving_default"](image=tf.constant(image)),
        signatures["image_bytes"](image_bytes=tf.constant(files)),
        signatures["examples"](examples=tf.constant([example(each) for each in files])),
    ]
    assert [set(answer) for answer in answers] == [OUTPUTS, OUTPUTS, OUTPUTS - {"class_name"}]
    assert set(signatures) == set(export.SIGNATURES)
    for answer in answers:
        assert answer["valid"].numpy().all() and answer["logits"].shape == (3, card["data"]["classes"])
        names = [card["data"]["labels"][label] for label in answer["label"]]
        assert "class_name" not in answer or [each.decode() for each in answer["class_name"].numpy()] == names
    if getattr(model, "is_randomized", False):
        assert card["keras_import"]["file"] is None and not (folder / "classifier.keras").exists()
        return
    expected = model(image)
    plain = keras.models.load_model(folder / card["keras_import"]["file"])
    for logits in (*(answer["logits"] for answer in answers), plain(image)):
        np.testing.assert_allclose(logits, expected, atol=1e-5 * max(1, np.abs(expected).max()))
    if card.get("rejection"):
        accepted = answers[0]["anomaly_score"].numpy() <= card["rejection"]["threshold"]
        np.testing.assert_array_equal(answers[0]["accepted"], accepted)


@pytest.mark.parametrize("name", MODELS)
def test_published_graph_has_core_ops_only(name):
    saved = saved_model_pb2.SavedModel.FromString((ROOT / "saved_models" / name / "1/saved_model.pb").read_bytes())
    graph = saved.meta_graphs[0].graph_def
    functions = {function.signature.name for function in graph.library.function}
    nodes = [*graph.node, *(node for function in graph.library.function for node in function.node_def)]
    ops = {node.op for node in nodes} - functions
    assert {"Conv2D", "DecodeImage", "IgnoreErrorsDataset"} <= ops <= set(dir(tf.raw_ops))
    assert not [each for each in ops if "PyFunc" in each or ">" in each]


@pytest.fixture(scope="module")
def cifar10():
    """Return a function from a card to the CIFAR-10 test split of its classes."""
    folder = Path(os.environ.get("CIFAR10_DIR", "~/tensorflow_datasets")).expanduser()
    if not (folder / "cifar10").is_dir():
        pytest.skip(f"there is no CIFAR-10 in {folder}; name the folder of TFDS that has it by CIFAR10_DIR")

    def load(card):
        settings = {"name": "cifar10", "open_set_split": card["data"]["open_set_split"], "dir": str(folder)}
        return data.load(config.Data(**settings)).test

    return load


def right(folder, split, count):
    """Return which of the images that were evaluated the SavedModel classifies right, and which it did then."""
    with np.load(folder / "outcomes.npz") as stored:
        index, label, clean = (stored[key][:count] for key in ("index", "label", "clean"))
    image = assess.images_of(split, index)
    serve = tf.saved_model.load(str(folder / "1")).signatures["serving_default"]
    found = [serve(image=tf.constant(image[start : start + 128]))["label"] for start in range(0, len(image), 128)]
    return np.concatenate(found) == label, clean


@pytest.mark.parametrize("name", MODELS)
def test_published_model_is_as_accurate_as_its_card_says(name, cifar10):
    folder = ROOT / "saved_models" / name
    card = json.loads((folder / "card.json").read_text())
    found, clean = right(folder, cifar10(card), 512)
    assert found.mean() > card["figures"]["clean_accuracy"]["ci95"][0] - 0.05
    assert (found == clean).mean() >= (0.75 if name.startswith("atop") else 0.99)  # which draws anew each time


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in MODELS if not name.startswith("atop")])
def test_published_model_classifies_every_evaluated_image_as_its_card_says(name, cifar10):
    folder = ROOT / "saved_models" / name
    card = json.loads((folder / "card.json").read_text())
    found, clean = right(folder, cifar10(card), None)
    np.testing.assert_array_equal(found, clean)
    assert found.mean() == card["figures"]["clean_accuracy"]["value"]


NEWER = """
import json, sys, numpy as np, keras, tensorflow as tf
from pathlib import Path
image = np.load(sys.argv[2])
found = {}
for folder in map(Path, sys.argv[3:]):
    serve = tf.saved_model.load(str(folder / "1")).signatures["serving_default"]
    plain = folder / "classifier.keras"
    logits = [serve(image=tf.constant(image))["logits"]]
    logits += [keras.models.load_model(plain)(image)] if plain.is_file() else []
    found[folder.name] = [np.asarray(each).tolist() for each in logits]
assert not [name for name in sys.modules if name.startswith("kerasdefense")]
Path(sys.argv[1]).write_text(json.dumps({"keras": keras.__version__, "logits": found}))
"""


@pytest.fixture(scope="module")
def newer_python(tmp_path_factory):
    """Return a Python of 3.12 or later with the newest TensorFlow, in an environment of its own."""
    uv = shutil.which("uv") or next(map(str, (ROOT / ".uv/bin").glob("uv")), None)
    if uv is None:
        pytest.skip("there is no uv to make an environment with; make setup installs it")
    folder = tmp_path_factory.mktemp("newer")
    pythons = ("3.12", "3.13", *sorted(map(str, Path.home().glob(".pyenv/versions/3.1[2-9]*/bin/python"))))
    made = (subprocess.run([uv, "venv", "-q", "--clear", "--python", each, folder]).returncode for each in pythons)
    if all(made):
        pytest.skip("uv finds no Python of 3.12 or later, and could download none")
    python = folder / "bin/python"
    installed = subprocess.run([uv, "pip", "install", "-q", "--python", python, "tensorflow-cpu"])
    if installed.returncode:
        pytest.skip("the newest TensorFlow could not be installed from the registry")
    return python


@pytest.mark.slow
def test_published_models_answer_alike_under_the_newest_tensorflow_and_keras(newer_python, tmp_path):
    image = images()[0]
    np.save(tmp_path / "image.npy", image)
    names = [name for name in MODELS if not name.startswith("atop")]  # which draws at random
    folders = [str(ROOT / "saved_models" / name) for name in names]
    arguments = [newer_python, "-c", NEWER, tmp_path / "found.json", tmp_path / "image.npy", *folders]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(arguments, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    assert int(found["keras"].split(".")[0]) >= 3
    for name, logits in found["logits"].items():
        expected = kerasdefense.load_model(ROOT / "saved_models" / name)(image).numpy()
        assert len(logits) == 2
        for each in logits:
            np.testing.assert_allclose(each, expected, atol=1e-5 * max(1, np.abs(expected).max()))


@pytest.mark.parametrize("name", ["atop_cifar10_mini", "cafd_cifar10_mini"])
def test_published_model_with_a_critic_loads_with_all_its_weights(name):
    model = keras.models.load_model(ROOT / "saved_models" / name / "model.keras")
    assert {id(each) for each in model.critic.weights} <= {id(each) for each in model.weights}

"""Figures of what goes on inside a model, against NumPy, and compared between runs."""

from __future__ import annotations

import json

import keras
import numpy as np
import pytest
import tensorflow as tf
from rich.console import Console

from kerasdefense.evaluation import ThreatModel, as_paths, geometry, internals
from kerasdefense.evaluation.batches import as_batches
from kerasdefense.evaluation.figures import ARRAYS
from kerasdefense.types import InputError

EXAMPLES, SEED, THREAT = 12, 3, ThreatModel("linf", 0.1)
OF_ALL = ("participation_ratio", "class_participation_ratio")


@pytest.fixture(scope="module")
def data():
    random = np.random.default_rng(0)
    return random.random((16, 4, 4, 1), np.float32), random.integers(3, size=16).astype(np.int32)


@pytest.fixture(scope="module")
def classifier():
    keras.utils.set_random_seed(1)
    image = keras.Input((4, 4, 1))
    tensor = keras.layers.Conv2D(5, 3, name="convolution")(image)
    embedding = keras.layers.GlobalAveragePooling2D()(tensor)
    return keras.Model(image, keras.layers.Dense(3, name="dense")(embedding))


@pytest.fixture(scope="module")
def measured(classifier, data):
    return internals.measure_internals(as_paths(classifier), as_batches(data), THREAT, examples=EXAMPLES, seed=SEED)


def cross_entropy(logits, label):
    return np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(len(label)), label]


def test_figures_are_per_image_and_their_means_have_intervals(measured):
    np.testing.assert_array_equal(measured.arrays["index"], np.arange(EXAMPLES))
    shares = [f"{name}_rise_{share}" for share in internals.SHARES for name in ("loss", "adversarial_loss")]
    of_embedding = {"embedding_noise", "intra_class_cosine", "inter_class_cosine", "nearest_other_class"}
    per_image = {"loss", "adversarial_loss", *shares, *of_embedding}
    assert set(measured.arrays) == {"index", *per_image}
    assert set(measured.results["figures"]) == {*per_image, *OF_ALL}
    for name in per_image:
        figure, values = measured.results["figures"][name], measured.arrays[name]
        assert values.shape == (EXAMPLES,) and figure["n"] == EXAMPLES
        assert figure["value"] == pytest.approx(values.mean()) and figure["ci95"][0] < values.mean() < figure["ci95"][1]
    assert measured.results["attack"]["steps"] == internals.STEPS and measured.results["n"] == EXAMPLES


def test_attack_raises_the_loss_and_moves_the_embedding(measured, classifier, data):
    image, label = (each[:EXAMPLES] for each in data)
    np.testing.assert_allclose(measured.arrays["loss"], cross_entropy(classifier(image).numpy(), label), atol=1e-5)
    assert (measured.arrays["adversarial_loss"] > measured.arrays["loss"]).all()
    # All weights are linear here, so that no step of the attack can do more than the one along the gradient's sign.
    tells = keras.Model(classifier.input, classifier.layers[-2].output)
    largest = 0.1 * np.abs(np.array([tells(np.eye(16).reshape(16, 4, 4, 1)) - tells(np.zeros((1, 4, 4, 1)))])).sum()
    clean = np.linalg.norm(tells(image), axis=1)
    assert (measured.arrays["embedding_noise"] > 0).all()
    assert (measured.arrays["embedding_noise"] * clean <= largest).all()


def test_geometry_is_that_of_the_clean_embedding(measured, classifier, data):
    image, label = (each[:EXAMPLES] for each in data)
    embedding = keras.Model(classifier.input, classifier.layers[-2].output)(image).numpy()
    np.testing.assert_allclose(measured.embeddings.clean, embedding, atol=1e-6)
    np.testing.assert_array_equal(measured.embeddings.label, label)
    for name, values in geometry.closeness(embedding, label).items():
        np.testing.assert_allclose(measured.arrays[name], values, atol=1e-6)
    for name, figure in geometry.participation(embedding, label, seed=SEED).items():
        assert measured.results["figures"][name]["value"] == pytest.approx(figure["value"], rel=1e-4)
    moved = np.linalg.norm(measured.embeddings.adversarial - embedding, axis=1) / np.linalg.norm(embedding, axis=1)
    np.testing.assert_allclose(moved, measured.arrays["embedding_noise"], rtol=1e-4)


def test_an_image_alone_in_its_class_is_left_out_of_the_mean():
    figure = internals._interval(np.array([0.25, np.nan, 0.75]), 0)
    assert figure["n"] == 2 and figure["value"] == 0.5


def test_a_figure_that_no_image_has_is_left_out(classifier, data):
    def tell(batch, *_):
        nothing = tf.fill(tf.shape(batch.label), float("nan"))
        return {"never": nothing, "once": tf.where(batch.index == 2, 0.5, nothing), "always": batch.label >= 0}

    model = as_paths(classifier)._replace(internals=tell, kernels=())
    found = internals.measure_internals(model, as_batches(data), THREAT, examples=EXAMPLES)
    figures = found.results["figures"]
    assert "never" not in figures and "never" not in found.arrays
    assert figures["once"] == {"value": 0.5, "n": 1, "ci95": [0.5, 0.5]}
    assert figures["always"]["value"] == 1 and figures["always"]["n"] == EXAMPLES


def test_loss_rise_is_the_mean_over_directions_of_filterwise_noise(measured, classifier, data):
    image, label = (each[:EXAMPLES] for each in data)
    share, before = internals.SHARES[-1], classifier.get_weights()
    rises = []
    for draw in range(internals.DRAWS):
        random = np.random.default_rng([SEED, draw])
        moved = []
        for values in before:
            if values.ndim > 1:
                noise = random.standard_normal(values.shape)
                of_filter = [
                    np.linalg.norm(values[..., each]) / np.linalg.norm(noise[..., each])
                    for each in range(noise.shape[-1])
                ]
                values = values + share * noise * np.array(of_filter)
            moved.append(values)
        classifier.set_weights(moved)
        rises.append(cross_entropy(classifier(image).numpy(), label))
    classifier.set_weights(before)
    expected = np.mean(rises, axis=0) - cross_entropy(classifier(image).numpy(), label)
    np.testing.assert_allclose(measured.arrays[f"loss_rise_{share}"], expected, atol=1e-5)


def test_weights_are_put_back_even_where_measuring_fails(classifier):
    before = classifier.get_weights()
    kernels = as_paths(classifier).kernels
    with pytest.raises(RuntimeError, match="no more"), internals._moved(kernels, 0.5, np.random.default_rng(0)):
        assert not np.array_equal(classifier.get_weights()[0], before[0])
        raise RuntimeError("no more")
    for value, expected in zip(classifier.get_weights(), before):
        np.testing.assert_array_equal(value, expected)


def test_a_plain_function_tells_its_losses_only(classifier, data):
    found = internals.measure_internals(as_paths(lambda image: classifier(image)), as_batches(data), THREAT, examples=0)
    assert set(found.arrays) == {"index", "loss", "adversarial_loss"} and len(found.arrays["index"]) == 16
    assert found.embeddings is None and set(found.results["figures"]) == {"loss", "adversarial_loss"}


def write(folder, measured, results=None, **arrays):
    """Write what an evaluation leaves of the inside, and as little else as results.json may hold."""
    (folder / "evaluation").mkdir(parents=True)
    np.savez(folder / ARRAYS.format("internals"), **{**measured.arrays, **arrays})
    content = {"internals": {**measured.results, **(results or {})}}
    (folder / "evaluation/results.json").write_text(json.dumps(content))
    return folder


@pytest.fixture
def unchecked(monkeypatch):
    """The results here are incomplete."""
    monkeypatch.setattr("kerasdefense.evaluation.recorded.check_results", lambda results: None)


def printed(table):
    console = Console(width=200, record=True, file=None, quiet=False)
    with console.capture() as capture:
        console.print(table)
    return capture.get()


def test_comparison_has_paired_differences_of_what_both_measured(measured, tmp_path, unchecked):
    one = write(tmp_path / "one", measured)
    two = write(tmp_path / "two", measured, loss=measured.arrays["loss"] + 0.25)
    text = printed(internals.compare_internals({"first": one, "second": two}))
    assert "+0.25 (+0.25 to +0.25)*" in text and "+0 (+0 to +0)" in text
    assert internals.compare_internals({"one": one, "none": tmp_path / "none"}) is None


def test_comparison_pairs_the_images_that_have_a_figure(measured, tmp_path, unchecked):
    values = measured.arrays["intra_class_cosine"].copy()
    values[2] = np.nan
    one = write(tmp_path / "one", measured, intra_class_cosine=values)
    two = write(tmp_path / "two", measured, intra_class_cosine=values - 0.125)
    text = printed(internals.compare_internals({"first": one, "second": two}))
    assert "-0.125 (-0.125 to -0.125)*" in text and "nan" not in text


def test_comparison_shows_figures_of_all_images_unpaired(measured, tmp_path, unchecked):
    figures = dict(measured.results["figures"])
    figures["participation_ratio"] = {"value": 9.5, "n": EXAMPLES, "ci95": [8.25, 10.75]}
    del figures["class_participation_ratio"]
    one = write(tmp_path / "one", measured)
    two = write(tmp_path / "two", measured, {"figures": figures})
    assert "class participation" not in printed(internals.compare_internals({"first": one, "second": two}))
    text = printed(internals.compare_internals({"first": one, "second": two, "third": one}))
    low, high = measured.results["figures"]["participation_ratio"]["ci95"]
    assert f"{low:.4g} to {high:.4g} │ 8.25 to 10.75 │" in text and "9.5 │" in text
    assert text.split("class participation ratio")[1].splitlines()[0].split("│")[2].strip() == "-"


@pytest.mark.parametrize("change", [{"seed": 9}, {"attack": {"steps": 1}}])
def test_comparison_refuses_other_attacks_and_images(measured, tmp_path, unchecked, change):
    one = write(tmp_path / "one", measured)
    two = write(tmp_path / "two", measured, change)
    with pytest.raises(
        InputError, match="one and two do not compare inside the models: other images or another attack"
    ):
        internals.compare_internals({"one": one, "two": two})
    three = write(tmp_path / "three", measured, index=measured.arrays["index"] + 1)
    with pytest.raises(InputError, match="one and three do not compare inside"):
        internals.compare_internals({"one": one, "three": three})


def test_table_has_a_row_per_figure(measured):
    results = {"internals": measured.results, "threat_model": THREAT._asdict()}
    text = printed(internals.internals_table(results))
    assert "embedding noise" in text and "class participation ratio" in text and "PGD-20" in text
    assert internals.internals_table({"internals": None}) is None

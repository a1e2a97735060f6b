"""The plot of errors that grow from layer to layer: what is drawn, and when there is nothing to draw."""

import numpy as np

from kerasdefense.evaluation.amplification import errors_of, write_errors

FIRST = {
    "error_00_image": np.array([0.1, 0.3]),
    "error_01_conv": np.array([0.5, 0.7]),
    "undenoised_error_00_image": np.array([0.4, 0.4]),
    "undenoised_error_01_conv": np.array([1.0, 2.0]),
    "embedding_noise": np.array([9.0, 9.0]),
}
SECOND = {**FIRST, "error_01_conv": np.array([0.9, 0.9])}
OF_OTHER_LAYERS = {"error_00_image": np.array([0.1]), "error_01_other": np.array([0.2])}


def test_errors_are_told_from_other_figures_layer_by_layer():
    found = errors_of(FIRST)
    assert list(found["denoised"]) == list(found["undenoised"]) == ["image", "conv"]
    np.testing.assert_array_equal(found["undenoised"]["conv"], [1.0, 2.0])


def test_plot_has_a_line_per_model_of_the_same_layers_and_one_without_denoiser(tmp_path, drawn):
    models = {"features": FIRST, "pixels": SECOND, "elsewhere": OF_OTHER_LAYERS, "none": {"embedding_noise": [1.0]}}
    assert write_errors(tmp_path / "errors.png", models)
    (axes,) = drawn[0].axes
    lines = {line.get_label(): line.get_ydata() for line in axes.get_lines()}
    assert list(lines) == ["without denoiser", "features", "pixels"]
    np.testing.assert_allclose(lines["without denoiser"], [0.4, 1.5])
    np.testing.assert_allclose(lines["features"], [0.2, 0.6])
    np.testing.assert_allclose(lines["pixels"], [0.2, 0.9])
    assert [label.get_text() for label in axes.get_xticklabels()] == ["image", "conv"]


def test_nothing_is_written_without_errors(tmp_path):
    assert not write_errors(tmp_path / "errors.png", {"none": {"embedding_noise": np.ones(2)}})
    assert not (tmp_path / "errors.png").exists()

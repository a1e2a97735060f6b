"""The picture of embeddings in a plane: what is drawn of them, and when there is nothing to draw."""

import numpy as np
import pytest

from kerasdefense.evaluation.geometry import Embeddings
from kerasdefense.evaluation.plane import write_plane

NAMES = ("cat", "dog", "owl")
CLEAN = np.array([[2, 0, 0], [-1, 0, 0], [0, 1, 0], [0, -3, 0]], np.float32)
LABEL = np.array([0, 0, 2, 2])


def test_both_panels_show_the_plane_of_the_clean_ones(tmp_path, drawn):
    adversarial = np.array([[0, 5, 0], [0, 0, 1], [0, 1, 0], [1, 0, 0]], np.float32)
    write_plane(tmp_path / "embedding.png", Embeddings(CLEAN, adversarial, LABEL), NAMES, attack="PGD-20")
    (figure,) = drawn
    clean, attacked = figure.axes
    assert [axis.get_title("left") for axis in figure.axes] == ["clean", "after PGD-20"]
    assert "50 % of the clean variance" in clean.get_xlabel() and "50 %" in clean.get_ylabel()
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["cat", "owl"]
    points = [np.concatenate([np.asarray(each.get_offsets()) for each in axis.collections]) for axis in figure.axes]
    np.testing.assert_allclose(np.linalg.norm(points[0], axis=1), 1, atol=1e-6)
    np.testing.assert_allclose(
        points[0] @ points[1].T, CLEAN / [[2], [1], [1], [3]] @ adversarial.T / [5, 1, 1, 1], atol=1e-6
    )
    assert clean.get_xlim() == attacked.get_xlim() and clean.get_ylim() == attacked.get_ylim()


@pytest.mark.parametrize("clean", [CLEAN[:1], CLEAN[:, :1], np.tile(CLEAN[:1], [4, 1])])
def test_nothing_is_drawn_of_what_spans_no_plane(tmp_path, clean):
    write_plane(tmp_path / "embedding.png", Embeddings(clean, clean, LABEL[: len(clean)]), NAMES, attack="PGD-20")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("classes", [12, 50])
def test_classes_have_colours_of_their_own(tmp_path, drawn, classes):
    embedding, label = np.random.default_rng(0).standard_normal((classes, 3)), np.arange(classes)
    names = [f"class {number}" for number in label]
    write_plane(tmp_path / "embedding.png", Embeddings(embedding, embedding, label), names, attack="PGD-20")
    colours = [tuple(each.get_facecolor()[0]) for each in drawn[0].axes[0].collections]
    assert len(set(colours)) == classes and len(drawn[0].legends[0].get_texts()) == classes

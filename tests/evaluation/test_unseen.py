from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf

from kerasdefense.attacks import CORRUPTIONS, PGD
from kerasdefense.evaluation import Options, PlannedAttack, ThreatModel, evaluate, unseen_lines
from kerasdefense.evaluation.probes import Subject
from kerasdefense.evaluation.search import Chunk, ExactPath
from kerasdefense.evaluation.unseen import moved_pixels

THREAT = ThreatModel("linf", 0.1)
SUITE = [PlannedAttack("pgd", PGD(*THREAT, steps=2))]


def test_what_lies_outside_the_ball_is_measured_on_request_and_counts_for_nothing(digits_classifier, tmp_path):
    settings = {"options": Options(examples=24), "sanity_examples": 24, "is_randomised": False}
    given = ({"exact": digits_classifier.path}, digits_classifier.batches(), THREAT, SUITE)
    kept = tmp_path / "unseen.npz"
    plain = evaluate(*given, **settings, save_outside=kept)
    assert not kept.exists()
    more = evaluate(*given, **settings, look_outside=True, save_outside=kept)
    assert plain["unseen"] is None and unseen_lines(plain) == []
    assert plain["robust_accuracy"] == more["robust_accuracy"]
    found = more["unseen"]
    assert set(found["corruptions"]) == set(CORRUPTIONS) - {"saturate"}  # digits have no colour
    values = [each["value"] for by_severity in found["corruptions"].values() for each in by_severity.values()]
    assert found["mean_corrupted"] == np.mean(values) and found["st_adv"]["n"] == 24
    assert found["st_adv"]["value"] < plain["clean_accuracy"]["value"]
    with np.load(kept) as arrays:
        assert set(arrays) == {"index", "st_adv", "corrupted"} and arrays["index"].tolist() == list(range(24))
        assert found["st_adv"]["value"] == arrays["st_adv"].mean()
        assert found["mean_corrupted"] == pytest.approx(arrays["corrupted"].mean())
    (line,) = unseen_lines(more)
    assert line.startswith("outside the ball (n = 24, not part of the robust accuracy): corrupted images")


def noisy_brightness(image, seed):
    """Tell images by how bright their middle is, and by a number that each draw has anew."""
    drawn = tf.map_fn(lambda each: tf.random.stateless_normal([], each), seed, fn_output_signature=tf.float32)
    score = 8 * (tf.reduce_mean(image[:, 3:5, 3:5, 0], axis=(1, 2)) - 0.5) + 3 * drawn
    return tf.stack([score, -score], axis=1)


def test_spatial_attack_fools_fresh_draws_of_a_random_model_and_not_only_those_that_it_saw():
    """An attack that keeps to its first ten draws, or rests where they are just fooled, leaves many images right."""
    image = np.zeros([24, 8, 8, 1], np.float32)
    image[:, 3:5, 3:5] = 1.0
    image += np.random.default_rng(0).uniform(0, 0.1, image.shape).astype(np.float32)
    chunk = Chunk(np.clip(image, 0, 1), np.zeros(24, np.int32), np.arange(24, dtype=np.int32))
    options = Options(chunk_size=240, is_randomised=True)
    subject = Subject({"exact": noisy_brightness}, chunk, THREAT, 2, options)
    assert subject.exact.is_right(chunk).mean() > 0.9
    moved = Chunk(moved_pixels(subject), chunk.label, chunk.index)
    for seed in (0, 1):  # scored by the evaluation's draws and by others
        exact = ExactPath(noisy_brightness, seed=seed, chunk_size=240, draws=10)
        assert exact.is_right(moved).mean() < 0.1

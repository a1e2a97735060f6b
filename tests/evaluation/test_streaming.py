from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys
from pathlib import Path
import tensorflow as tf
from kerasdefense.attacks import FGSM, PGD
from kerasdefense.evaluation import PlannedAttack, ThreatModel, evaluate

weights = tf.random.stateless_normal([64 * 64 * 3, 10], [0, 0])

def logits(image):
    return tf.reshape(image, [-1, 64 * 64 * 3]) @ weights

def element(index):
    image = tf.random.stateless_uniform([64, 64, 3], tf.stack([index, 0]))
    label = tf.argmax(logits(image), axis=1, output_type=tf.int32)[0]
    return {"image": image, "label": label, "index": tf.cast(index, tf.int32)}

results = evaluate(
    {"exact": lambda image, seed: logits(image)},
    tf.data.Dataset.range(int(sys.argv[1])).map(element).batch(100),
    ThreatModel("linf", 1 / 255),
    [PlannedAttack("fgsm", FGSM("linf", 1 / 255)), PlannedAttack("pgd", PGD("linf", 1 / 255, steps=2))],
    sanity_examples=0,
    save=Path(sys.argv[2]),
)
assert results["robust_accuracy"]["n"] == int(sys.argv[1])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.slow
def test_peak_memory_on_ten_times_the_images_is_within_a_tenth(tmp_path):
    # 10,000 of these images are 490 MB, as much as the whole process may take for 1,000.
    peak = {}
    for examples in (1000, 10_000):
        command = [sys.executable, "-c", PROGRAM, str(examples), str(tmp_path / "adversarial.npz")]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        peak[examples] = int(done.stdout.split()[-1])
    assert peak[10_000] <= 1.1 * peak[1000]

"""Strategies, and TF_CONFIG as people get it wrong."""

import json
import os
import socket
import subprocess
import sys

import keras
import numpy as np
import pytest

from kerasdefense import config, training
from kerasdefense.types import UsageError

WORKERS = {"worker": ["localhost:1", "localhost:2"]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "needs TF_CONFIG as JSON, such as"),
        ("{", "needs TF_CONFIG as JSON, such as"),
        (json.dumps({"cluster": WORKERS}), "needs TF_CONFIG as JSON, such as"),
        (
            json.dumps({"cluster": WORKERS, "task": {"type": "worker", "index": 2}}),
            r"this is worker 2, but its cluster has worker 0\.\.1",
        ),
        (
            json.dumps({"cluster": WORKERS, "task": {"type": "chief", "index": 0}}),
            "this is chief 0, but its cluster has",
        ),
        (json.dumps({"cluster": {"ps": ["localhost:1"]}, "task": {"type": "ps", "index": 0}}), "has no worker"),
    ],
)
def test_cluster_without_such_a_worker_is_refused(monkeypatch, content, message):
    monkeypatch.setenv("TF_CONFIG", content)
    with pytest.raises(UsageError, match=message):
        training.make_strategy(config.Train(strategy="multi_worker"))


def test_xla_on_several_replicas_is_refused():
    with pytest.raises(UsageError, match="--train_jit_compile works on one replica only"):
        training.make_strategy(config.Train(jit_compile=True))


def test_single_machine_is_its_own_chief():
    assert training.is_chief(training.make_strategy(config.Train()))


@pytest.mark.slow
def test_two_workers_train_as_two_replicas(tmp_path):
    """Two processes on loopback against one process without a strategy; SGD, so that rounding stays small."""
    arguments = [
        "--backbone_name=small_cnn", "--backbone_width=4", "--attack_epsilon=0.1", "--attack_steps=1",
        "--defense_name=trades", "--defense_awp_gamma=0.01", "--train_ema_decay=0.9", "--train_learning_rate=0.01",
        "--train_epochs=2", "--train_steps_per_epoch=4", "--train_validation_steps=1", "--mode=train", "--noprogress",
    ]  # fmt: skip

    def start(folder, strategy, environment):
        more = [f"--run_dir={folder}", f"--train_strategy={strategy}"]
        command = [sys.executable, "-m", "kerasdefense.run", *arguments, *more]
        return subprocess.Popen(command, env={**os.environ, **environment}, stderr=subprocess.PIPE, text=True)

    sockets = [socket.create_server(("localhost", 0)) for _ in range(2)]
    hosts = [f"localhost:{each.getsockname()[1]}" for each in sockets]
    for each in sockets:
        each.close()
    workers = []
    for number in range(2):
        task = {"cluster": {"worker": hosts}, "task": {"type": "worker", "index": number}}
        workers.append(start(tmp_path / "two", "multi_worker", {"TF_CONFIG": json.dumps(task)}))
    for process in [*workers, start(tmp_path / "one", "none", {})]:
        said = process.communicate(timeout=300)[1]
        assert process.returncode == 0, said
    one, two = (keras.models.load_model(tmp_path / name / training.MODEL) for name in ("one", "two"))
    for found, expected in zip(two.backbone.trainable_variables, one.backbone.trainable_variables):
        np.testing.assert_allclose(found, expected, atol=1e-4)
    assert len(list((tmp_path / "two").rglob("model.keras"))) == 1

"""What every test finds: quiet TensorFlow, two replicas, repeatable properties, a TFDS folder of its own."""

from __future__ import annotations

import os
import tempfile

import hypothesis

# Both are read when TensorFlow and TFDS are imported; processes that tests start inherit them.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
_tfds_folder = tempfile.TemporaryDirectory(prefix="kerasdefense-tfds-")
os.environ["TFDS_DATA_DIR"] = _tfds_folder.name

import tensorflow as tf  # noqa: E402

tf.config.set_logical_device_configuration(
    tf.config.list_physical_devices("CPU")[0], [tf.config.LogicalDeviceConfiguration()] * 2
)

hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None, max_examples=20)
hypothesis.settings.load_profile("repeatable")


def pytest_unconfigure():
    _tfds_folder.cleanup()

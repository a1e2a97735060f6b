"""Measurements on this machine: `python -m benchmarks` times steps, `python -m benchmarks.accelerator` tries a GPU."""

import kerasdefense  # noqa: F401 - first of all: it keeps other packages' start-up notices off the screen

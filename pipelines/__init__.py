"""Pipelines: TFX from images to a push that robustness gates, and its evaluation on any Beam runner."""

import os
import sys
import warnings
from typing import Any

if sys.argv[:1] == ["-m"]:  # started as `python -m pipelines...`: keep libraries' notices off the screen
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("PYTHONWARNINGS", "ignore")  # of worker processes too
    warnings.filterwarnings("ignore")


def __getattr__(name: str) -> Any:
    """Return the type of artifact that Kubeflow looks for here, without importing TFX in workers that need none."""
    if name != "RobustnessReport":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from pipelines.components.report import RobustnessReport

    return RobustnessReport

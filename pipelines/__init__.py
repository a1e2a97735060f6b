"""Pipelines: TFX from images to a push that robustness gates, and its evaluation on any Beam runner."""

import os
import sys
import warnings

if sys.argv[:1] == ["-m"]:  # started as `python -m pipelines...`: keep libraries' notices off the screen
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("PYTHONWARNINGS", "ignore")  # of worker processes too
    warnings.filterwarnings("ignore")

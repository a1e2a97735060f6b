"""kerasdefense: train, evaluate and serve image classifiers that hold up under attack and on unknown classes."""

import os
import sys
import warnings

if sys.argv[:1] == [
    "-m"
]:  # started as `python -m kerasdefense...`: keep other packages' start-up notices off the screen
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    warnings.filterwarnings("ignore", category=FutureWarning, module="google")

from kerasdefense.attacks import APGD, CAFA, FAB, FGSM, FGSMRS, PGD, AttackResult, Square
from kerasdefense.backbones import as_backbone
from kerasdefense.config import Run
from kerasdefense.defenses import (
    AGKDBML,
    CAFD,
    DFA,
    FGSMRSAT,
    MART,
    OSDNCAML,
    PGDAT,
    TRADES,
    Defense,
    ExampleBank,
    Standard,
)
from kerasdefense.evaluation import RobustValidation, assert_robust, evaluate
from kerasdefense.export import load_model
from kerasdefense.training import train
from kerasdefense.types import InputError, UsageError

__all__ = [
    "AGKDBML",
    "APGD",
    "CAFA",
    "CAFD",
    "DFA",
    "FAB",
    "FGSM",
    "FGSMRS",
    "FGSMRSAT",
    "MART",
    "OSDNCAML",
    "PGD",
    "PGDAT",
    "TRADES",
    "AttackResult",
    "Defense",
    "ExampleBank",
    "InputError",
    "RobustValidation",
    "Run",
    "Square",
    "Standard",
    "UsageError",
    "as_backbone",
    "assert_robust",
    "evaluate",
    "load_model",
    "train",
]

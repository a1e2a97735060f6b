"""Training: the stages of a defense one after the other, each selected, saved, and resumed where it stopped."""

from kerasdefense.training.fitting import HISTORY, MODEL, Trained, build, saved_stages, train
from kerasdefense.training.optimizer import make_optimizer
from kerasdefense.training.selection import SelectBest
from kerasdefense.training.strategy import is_chief, make_strategy, mirrored

__all__ = [
    "HISTORY",
    "MODEL",
    "SelectBest",
    "Trained",
    "build",
    "is_chief",
    "make_optimizer",
    "make_strategy",
    "mirrored",
    "saved_stages",
    "train",
]

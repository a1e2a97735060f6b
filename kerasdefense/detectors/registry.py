"""Every detector by name."""

from __future__ import annotations

import functools
from typing import Union

from kerasdefense.detectors.base import Detector
from kerasdefense.detectors.confidence import GEN, MSP, Energy, MaxLogit
from kerasdefense.detectors.knn import KNN
from kerasdefense.detectors.mahalanobis import Mahalanobis, RelativeMahalanobis
from kerasdefense.detectors.odin import ODIN
from kerasdefense.detectors.openmax import OpenMax
from kerasdefense.detectors.react import ReAct
from kerasdefense.detectors.subspace import MaxCosine, Subspace
from kerasdefense.detectors.vim import ViM

DETECTORS: dict[str, Union[type[Detector], functools.partial[Detector]]] = {
    "energy": Energy,
    "gen": GEN,
    "knn": KNN,
    "mahalanobis": Mahalanobis,
    "max_cosine": MaxCosine,
    "max_logit": MaxLogit,
    "msp": MSP,
    "odin": ODIN,
    "openmax": OpenMax,
    "openmax_paper": functools.partial(OpenMax, variant="paper"),
    "openmax_shifted": functools.partial(OpenMax, variant="shifted"),
    "react": ReAct,
    "relative_mahalanobis": RelativeMahalanobis,
    "subspace": Subspace,
    "vim": ViM,
}
"""Name -> what builds a detector from its settings."""

"""Detectors of images of unknown classes: scores on a classifier's logits and embedding, higher = more unknown."""

from __future__ import annotations

from kerasdefense.detectors.base import Detector
from kerasdefense.detectors.confidence import GEN, MSP, Energy, MaxLogit
from kerasdefense.detectors.knn import KNN
from kerasdefense.detectors.mahalanobis import Mahalanobis, RelativeMahalanobis
from kerasdefense.detectors.odin import ODIN
from kerasdefense.detectors.openmax import OpenMax
from kerasdefense.detectors.react import ReAct
from kerasdefense.detectors.registry import DETECTORS
from kerasdefense.detectors.subspace import MaxCosine, Subspace
from kerasdefense.detectors.training import Head
from kerasdefense.detectors.vim import ViM
from kerasdefense.detectors.weibull import fit_weibull

__all__ = [
    "DETECTORS",
    "GEN",
    "KNN",
    "MSP",
    "ODIN",
    "Detector",
    "Energy",
    "Head",
    "Mahalanobis",
    "MaxCosine",
    "MaxLogit",
    "OpenMax",
    "ReAct",
    "RelativeMahalanobis",
    "Subspace",
    "ViM",
    "fit_weibull",
]

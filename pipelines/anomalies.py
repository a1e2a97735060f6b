"""Anomalies in TensorFlow Data Validation's own form, and in words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import tensorflow_data_validation as tfdv
from tensorflow_metadata.proto.v0 import anomalies_pb2, schema_pb2, statistics_pb2

from pipelines.inspection import Inspected

_TYPES = anomalies_pb2.AnomalyInfo
SHIFTED = _TYPES.COMPARATOR_L_INFTY_HIGH
_KINDS = {"image": schema_pb2.BYTES, "label": schema_pb2.INT, "index": schema_pb2.INT}


class Defect(NamedTuple):
    """Something wrong with a feature of a split, beside what statistics show.

    Attributes:
        feature: its name.
        what: in a few words.
        where: how many examples have it and the numbers of some; empty where it concerns all.
        kind: TFDV's type of anomaly.
    """

    feature: str
    what: str
    where: str = ""
    kind: int = _TYPES.UNKNOWN_TYPE

    @property
    def text(self) -> str:
        """Return all of it in words."""
        return f"{self.feature} {self.what}{self.where and f' ({self.where})'}"


def labels_of(split: str, classes: int) -> tuple[int, int]:
    """Return the lowest and the highest label of a split: -1 for unknown classes alone."""
    return (-1, -1) if split == "unknown" else (0, classes - 1)


def tightened(schema: schema_pb2.Schema, labels: tuple[int, int]) -> schema_pb2.Schema:
    """Return a schema in which every example has one image, one label from the lowest to the highest, and one index."""
    tight = schema_pb2.Schema()
    tight.CopyFrom(schema)
    for name, kind in _KINDS.items():
        for place in reversed([place for place, feature in enumerate(tight.feature) if feature.name == name]):
            del tight.feature[place]
        feature = tight.feature.add(name=name, type=kind)
        feature.presence.min_fraction, feature.presence.min_count = 1.0, 1
        feature.value_count.min = feature.value_count.max = 1
        if name == "label":
            feature.int_domain.min, feature.int_domain.max = labels
            feature.int_domain.is_categorical = True
    return tight


def defects_of(found: Inspected) -> list[Defect]:
    """Return what a look at each example found, the most frequent defects first."""
    defects = []
    for (feature, what), count in found.defects.most_common():
        numbers = [str(number) for number in found.named[feature, what] if number >= 0]
        of = f": index {', '.join(numbers)}{', ...' if count > len(numbers) else ''}" if numbers else ""
        kind = _TYPES.FEATURE_TYPE_LOW_FRACTION_PRESENT if what == "has no value" else _TYPES.UNKNOWN_TYPE
        defects.append(Defect(feature, what, f"{count:,} example{'s' if count > 1 else ''}{of}", kind))
    return defects


def validate(
    statistics: statistics_pb2.DatasetFeatureStatisticsList, schema: schema_pb2.Schema, defects: Sequence[Defect]
) -> anomalies_pb2.Anomalies:
    """Return what TFDV finds in statistics, and the defects beside it."""
    anomalies = tfdv.validate_statistics(statistics, schema)
    for defect in defects:
        info = anomalies.anomaly_info[defect.feature]
        info.path.step[:] = [defect.feature]
        info.severity = _TYPES.ERROR
        info.short_description = "Multiple errors" if info.reason else defect.what
        info.description = f"{info.description} {defect.text}.".strip()
        info.reason.add(type=defect.kind, short_description=defect.what, description=f"{defect.text}.")
    return anomalies


def in_words(split: str, anomalies: anomalies_pb2.Anomalies, defects: Sequence[Defect]) -> list[str]:
    """Return a line for each anomaly: the defects, and what TFDV alone found, its warnings left out."""
    lines = [f"{split}: {defect.text}" for defect in defects]
    if anomalies.HasField("data_missing"):
        lines.append(f"{split}: has no examples")
    for name, info in sorted(anomalies.anomaly_info.items()):
        if info.severity != _TYPES.WARNING and name not in [defect.feature for defect in defects]:
            lines.append(f"{split}: {name}: {info.description}")
    if anomalies.HasField("dataset_anomaly_info"):
        lines.append(f"{split}: {anomalies.dataset_anomaly_info.description}")
    return lines

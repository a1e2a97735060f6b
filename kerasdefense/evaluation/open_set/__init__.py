"""Open-set and out-of-distribution recognition: metrics, protocol, and attacks on the anomaly score."""

from kerasdefense.evaluation.open_set.options import Images, OpenSetOptions, Unknown
from kerasdefense.evaluation.open_set.pictures import write_pictures
from kerasdefense.evaluation.open_set.protocol import OpenSet, fit_detectors, measure_open_set
from kerasdefense.evaluation.open_set.report import open_set_tables
from kerasdefense.evaluation.open_set.trials import trials, trials_csv, trials_markdown, trials_tables

__all__ = [
    "Images",
    "OpenSet",
    "OpenSetOptions",
    "Unknown",
    "fit_detectors",
    "measure_open_set",
    "open_set_tables",
    "trials",
    "trials_csv",
    "trials_markdown",
    "trials_tables",
    "write_pictures",
]

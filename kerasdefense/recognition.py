"""Fit detectors to a model, measure them on unknown images, and keep them for export.

This joins data, detectors and evaluation for a run; each of them knows nothing of the others.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Optional

import numpy as np

from kerasdefense import config
from kerasdefense.data import Splits, ood
from kerasdefense.detectors import DETECTORS, Detector, rejection
from kerasdefense.evaluation import Loaded, ThreatModel
from kerasdefense.evaluation.open_set import (
    Images,
    OpenSetOptions,
    Unknown,
    fit_detectors,
    measure_open_set,
    write_pictures,
)
from kerasdefense.files import replacing
from kerasdefense.types import UsageError, look_up

DEFAULT = "max_logit,mahalanobis,openmax"
UNKNOWN_CLASSES = "unknown classes"
FOLDER, ADVERSARIAL = "evaluation/detectors", "evaluation/adversarial.npz"
SCORES, PICTURES = "evaluation/open_set.npz", "evaluation/open_set_{}.png"


def names_of(run: config.Run) -> tuple[str, ...]:
    """Return the names of the detectors that a run asks for, none where it asks for none."""
    asked = run.evaluate.open_set or run.evaluate.ood
    given = run.detector.name or (DEFAULT if asked else "")
    names = tuple(DETECTORS) if given == config.ALL else tuple(filter(None, given.split(",")))
    if len(set(names)) < len(names):
        raise UsageError(f"--detector_name={given} names a detector twice")
    return names


def exported(run: config.Run, model: str) -> Optional[rejection.RejectOption]:
    """Return the reject option that goes into the export of a run's model, None where no detector is asked for.

    Args:
        run: the run.
        model: digest of its model.
    """
    names = names_of(run)
    name = run.export.detector or (names[0] if names else "")
    if not name:
        return None
    return rejection.read(Path(run.run_dir) / FOLDER / f"{name}.npz", model=model)


def fit(run: config.Run, splits: Splits, model: Loaded, threat_model: ThreatModel) -> list[rejection.RejectOption]:
    """Fit the detectors that a run asks for, and keep them in its directory in place of those of another evaluation.

    Args:
        run: the run.
        splits: its data.
        model: what they are fitted to.
        threat_model: what the model was made for; images to fit on are attacked in its ball, where the run asks so.

    Returns:
        A fitted detector and its threshold for each name, none where no detector is asked for.
    """
    folder = Path(run.run_dir) / FOLDER
    shutil.rmtree(folder, ignore_errors=True)
    detectors: dict[str, Detector] = {name: look_up(DETECTORS, name, "detector")() for name in names_of(run)}
    if not detectors:
        return []
    fitted = fit_detectors(model, detectors, _images(run, splits), threat_model, _options(run))
    for each in fitted:
        rejection.write(folder / f"{each.name}.npz", each, model=model.digest)
    return fitted


def measure(
    run: config.Run,
    splits: Splits,
    model: Loaded,
    threat_model: ThreatModel,
    fitted: Sequence[rejection.RejectOption],
    folder: Optional[Path],
) -> Optional[dict[str, Any]]:
    """Measure fitted detectors, and write what was found to the run's directory.

    Args:
        run: the run; its adversarial images are there already.
        splits: its data.
        model: what was measured.
        threat_model: of the attacks on the score.
        fitted: what `fit` returned.
        folder: for what an evaluation needs to go on after a stop; None = the time is up, scores are not attacked.

    Returns:
        The block `open_set` of results.json, None where nothing was fitted.
    """
    if not fitted:
        return None
    run_dir, options = Path(run.run_dir), _options(run)._replace(folder=folder)
    if folder is None:
        options = options._replace(examples=0)
    images = _images(run, splits)._replace(candidates=_candidates(run))
    found = measure_open_set(model, fitted, images, threat_model, options)
    with replacing(run_dir / SCORES) as temporary:
        np.savez_compressed(temporary, **found.arrays)
    write_pictures(run_dir / PICTURES.format("scores"), run_dir / PICTURES.format("roc"), found)
    return found.results


def check(run: config.Run, splits: Splits) -> None:
    """Raise a UsageError or InputError for what could not be done, before hours go into what precedes it."""
    names = names_of(run)
    if run.mode == "all" and run.export.detector and run.export.detector not in names:
        given = f"--export_detector={run.export.detector}"
        raise UsageError(f"{given} is not among those of --detector_name: {', '.join(names) or 'none'}")
    if not names:
        return
    if run.evaluate.open_set and splits.unknown is None:
        raise UsageError("--evaluate_open_set needs unknown classes: pass --data_open_set_split, 0 or 6:0 for instance")
    _options(run).check()
    _unknown(run, splits)


def _options(run: config.Run) -> OpenSetOptions:
    wanted = run.evaluate
    return OpenSetOptions(
        retention=run.detector.retention,
        fit_on=run.detector.fit_on,
        fit_examples=run.detector.fit_examples,
        examples=wanted.score_examples,
        steps=wanted.score_steps,
        starts=wanted.score_starts,
        queries=wanted.score_queries,
        joint=wanted.joint,
        seed=wanted.seed,
        chunk_size=wanted.chunk_size,
        progress=run.progress,
    )


def _images(run: config.Run, splits: Splits) -> Images:
    size = run.evaluate.chunk_size
    return Images(
        train=splits.train.batches(size),
        validation=splits.validation.batches(size),
        known=splits.test.batches(size),
        unknown=_unknown(run, splits),
    )


def _unknown(run: config.Run, splits: Splits) -> list[Unknown]:
    size, unknown = run.evaluate.chunk_size, []
    if run.evaluate.open_set and splits.unknown is not None:
        unknown.append(Unknown(UNKNOWN_CLASSES, "", splits.unknown.batches(size)))
    if run.evaluate.ood:
        # The folder of a user's own images is no place for those of TensorFlow Datasets.
        data_dir = "" if run.data.name in config.OWN_IMAGES else run.data.dir
        sets = ood.load(run.evaluate.ood, splits.name, splits.image_shape, data_dir=data_dir)
        if splits.name in [each.name for each in sets]:
            raise UsageError(f"--evaluate_ood names {splits.name}, the known set itself; name others")
        unknown += [Unknown(each.name, each.group, each.split.batches(size)) for each in sets]
    return unknown


def _candidates(run: config.Run) -> np.ndarray:
    """Return the adversarial images that the suite's attacks found of the first test images."""
    with np.load(Path(run.run_dir) / ADVERSARIAL) as stored:
        found: np.ndarray = stored["image_adv"][: run.evaluate.score_examples]
    return found

"""The first known and unknown images under attack: four cells of who is attacked, and accuracy with a reject option."""

from __future__ import annotations

import functools
import hashlib
import json
import time
import zipfile
from typing import Any, Optional

import numpy as np
import tensorflow as tf

from kerasdefense.attacks import APGD, Iterative, JointPGD, Square
from kerasdefense.detectors import Detector
from kerasdefense.evaluation.batches import first_images
from kerasdefense.evaluation.models import Loaded
from kerasdefense.evaluation.open_set import metrics
from kerasdefense.evaluation.open_set.options import Images, OpenSetOptions
from kerasdefense.evaluation.open_set.score_attacks import Target, fool_unnoticed, move_scores
from kerasdefense.evaluation.open_set.scoring import Scored, Scorer
from kerasdefense.evaluation.report import accuracy_interval
from kerasdefense.evaluation.search import Chunk
from kerasdefense.evaluation.suites import ThreatModel
from kerasdefense.files import replacing
from kerasdefense.types import ActivationsFn

CELLS = ("clean", "known_attacked", "unknown_attacked", "both_attacked")
"""Who is attacked."""


class Attacked:
    """The images whose score is attacked, the same for every detector.

    Args:
        model: with activations.
        images: the first known ones, and the first ones of the first unknown set, are attacked.
        threat_model: norm and radius of the ball.
        options: how they are attacked.

    After `measure`, `arrays` holds the scores of the detector by name.
    """

    def __init__(self, model: Loaded, images: Images, threat_model: ThreatModel, options: OpenSetOptions) -> None:
        self._activations_fn: ActivationsFn = model.activations  # type: ignore[assignment]
        self._model = model.digest
        self._options = options
        self._threat_model = threat_model
        self._set = images.unknown[0].name
        self._known = first_images(images.known, options.examples)
        self._unknown = first_images(images.unknown[0].images, options.examples)
        self._candidates = _chunk_of(images.candidates, self._known)
        attacks: list[Iterative] = [APGD(*threat_model, steps=options.steps, restarts=options.starts)]
        if options.queries:
            attacks.append(Square(*threat_model, queries=options.queries))
        joint = functools.partial(JointPGD, *threat_model, steps=options.steps, restarts=options.starts)
        self._attacks = tuple(attacks)
        self._joint = (joint(orthogonal=True), joint(orthogonal=False)) if options.joint else ()
        self.arrays: dict[str, np.ndarray] = {}

    def described(self) -> dict[str, Any]:
        """Return what results.json says of the attacks."""
        return {
            "threat_model": self._threat_model._asdict(),
            "known": len(self._known.label),
            "unknown": len(self._unknown.label),
            "set": self._set,
            "seed": self._options.seed,
            "attacks": _settings(self._attacks),
            "joint_attacks": _settings(self._joint),
            "candidates": 0 if self._candidates is None else len(self._candidates.label),
        }

    def measure(self, name: str, detector: Detector, thresholds: tuple[float, float]) -> dict[str, Any]:
        """Return the four cells of a fitted detector, and what stands with its reject option.

        Args:
            name: of the detector.
            detector: fitted.
            thresholds: that of the reject option, and the one that accepts half of the validation images.
        """
        scorer = Scorer(self._activations_fn, {name: detector})
        known, unknown = scorer.of_chunk(self._known), scorer.of_chunk(self._unknown)
        found = self._remembered(name, detector, scorer)
        self.arrays = {
            "known_clean": known.score[name],
            "unknown_clean": unknown.score[name],
            "known_attacked": found["known_attacked"],
            "unknown_attacked": found["unknown_attacked"],
        }
        right_attacked = found["known_prediction"] == self._known.label
        entry = {
            "grid": self._grid(known.right, right_attacked, thresholds[0]),
            "reject": None,
            "attack_seconds": round(float(found["seconds"]), 1),
        }
        if self._joint:
            lowest = found["lowest"]
            if self._candidates is not None:
                scored = scorer.of_chunk(self._candidates)
                of_others = np.full(len(lowest), np.inf, np.float32)
                of_others[: len(scored.label)] = np.where(scored.right, np.inf, scored.score[name])
                lowest = np.minimum(lowest, of_others)
            self.arrays["known_lowest_wrong"] = lowest
            entry["reject"] = self._reject(known, name, thresholds, lowest)
        return entry

    def _grid(self, right: np.ndarray, right_attacked: np.ndarray, threshold: float) -> dict[str, Any]:
        arrays, cells = self.arrays, {}
        for cell in CELLS:
            known_is, unknown_is = cell in CELLS[1::2], cell in CELLS[2:]
            known = arrays["known_attacked" if known_is else "known_clean"]
            unknown = arrays["unknown_attacked" if unknown_is else "unknown_clean"]
            cells[cell] = {
                **metrics.summary(known, right_attacked if known_is else right, unknown),
                "auroc_ci95": metrics.auroc_interval(known, unknown),
                "known_accepted": accuracy_interval(known <= threshold),
                "unknown_accepted": accuracy_interval(unknown <= threshold),
            }
        return cells

    def _reject(self, known: Scored, name: str, thresholds: tuple[float, float], lowest: np.ndarray) -> dict[str, Any]:
        """Return what stands: right and accepted clean, and no point found that is wrong and accepted."""
        threshold, half = thresholds
        stands = known.right & (known.score[name] <= threshold)
        return {
            "clean_accuracy_with_reject": accuracy_interval(stands),
            "robust_accuracy_with_reject": accuracy_interval(stands & (lowest > threshold)),
            "fooled_and_accepted": accuracy_interval(known.right & (lowest <= threshold)),
            "fooled_and_accepted_at_half": accuracy_interval(known.right & (lowest <= half)),
        }

    def _attack(self, name: str, detector: Detector, scorer: Scorer) -> dict[str, np.ndarray]:
        started = time.perf_counter()
        options = self._options
        target = Target(
            name,
            detector,
            self._activations_fn,
            scorer,
            seed=options.seed,
            chunk_size=options.chunk_size,
            progress=options.progress,
        )
        count = len(self._known.label)
        both = _joined(self._known, self._unknown)
        moved = move_scores(target, both, np.where(np.arange(len(both.label)) < count, 1.0, -1.0), self._attacks)
        found = {
            "known_attacked": moved.score[:count],
            "known_prediction": moved.prediction[:count],
            "unknown_attacked": moved.score[count:],
        }
        if self._joint:
            found["lowest"] = fool_unnoticed(target, self._known, self._joint)
        return {**found, "seconds": np.array(time.perf_counter() - started)}

    def _remembered(self, name: str, detector: Detector, scorer: Scorer) -> dict[str, np.ndarray]:
        """Return what attacks find, from the file of an evaluation that was stopped where it is the same."""
        if self._options.folder is None or not self._model:  # without a digest one model looks like another
            return self._attack(name, detector, scorer)
        path = self._options.folder / f"{name}.npz"
        key = self._key(detector)
        try:
            with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
                if str(stored["key"]) == key:
                    return {each: stored[each] for each in stored.files if each != "key"}
        except (OSError, KeyError, ValueError, zipfile.BadZipFile):
            pass  # not there, or broken: attack anew
        found = self._attack(name, detector, scorer)
        with replacing(path) as temporary:
            np.savez(temporary, key=np.array(key), **found)
        return found

    def _key(self, detector: Detector) -> str:
        """Return a digest of all that the outcome depends on."""
        settings = {**self.described(), "chunk_size": self._options.chunk_size, "model": self._model}
        settings |= {"detector": type(detector).__name__, "config": detector.get_config(), "tensorflow": tf.__version__}
        whole = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
        chunks = [each for chunk in (self._known, self._unknown) for each in (chunk.image, chunk.label, chunk.index)]
        for array in (*detector.state().values(), *chunks):
            whole.update(np.ascontiguousarray(array).tobytes())
        return whole.hexdigest()


def _settings(attacks: tuple[Iterative, ...]) -> list[dict[str, Any]]:
    return [{"name": type(each).__name__, **each.get_config()} for each in attacks]


def _chunk_of(candidates: Optional[np.ndarray], known: Chunk) -> Optional[Chunk]:
    """Return adversarial images of the first known ones as a chunk, as many as there are of both."""
    if candidates is None:
        return None
    count = min(len(candidates), len(known.label))
    return Chunk(candidates[:count], known.label[:count], known.index[:count])


def _joined(*chunks: Chunk) -> Chunk:
    return Chunk(*(np.concatenate([getattr(each, name) for each in chunks]) for name in ("image", "label", "index")))

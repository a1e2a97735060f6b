"""What an exported model's signatures take over the work they cannot avoid, and how fast they answer."""

from __future__ import annotations

import dataclasses
import tempfile
from typing import Any, Callable, Optional

import numpy as np
import tensorflow as tf

from benchmarks.case import CLASSES, Case
from benchmarks.tables import Column, Row
from benchmarks.timing import Step, Timing, time_in_turns
from benchmarks.training_step import Measurement
from kerasdefense import defenses
from kerasdefense.defenses import Defense
from kerasdefense.detectors import DETECTORS
from kerasdefense.detectors.rejection import RejectOption
from kerasdefense.export import SIGNATURES, serving_module
from kerasdefense.export.decoding import files_as_images

PATH, DECODING, OF_IMAGES, OF_FILES = "path", "decoding", "serving_default", "image_bytes"
BATCH_SIZES = (1, 8, 32, 128)
CALLS = 25
"""Calls in each round: they are short, and the slowest in a hundred is asked for."""
_FITTED = 500


@dataclasses.dataclass(frozen=True)
class ServingCase:
    """A model with fresh weights that is exported and loaded back, with a detector fitted to noise or none.

    Attributes:
        model: defense, backbone and images; its batch size is that of `measure_signatures`.
        detector: key of DETECTORS; "" = none.
    """

    model: Case
    detector: str = ""

    @property
    def model_name(self) -> str:
        """What is served, in words."""
        return self.model.architecture

    @property
    def name(self) -> str:
        """By what it judges images, in words."""
        return f"with {self.detector}" if self.detector else "without detector"

    @property
    def steps(self) -> int:
        """How many gradient steps an attack takes: none is made."""
        return 0

    def images(self, count: int) -> np.ndarray:
        """Return images of noise, in 256 levels as files hold them, float32 [count, h, w, c]."""
        levels = np.random.default_rng(0).integers(256, size=(count, *self.model.image_shape))
        return levels.astype(np.float32) / np.float32(255)

    def make(self) -> tuple[Defense, Optional[RejectOption]]:
        """Return the defense, and the detector with a threshold."""
        defense = defenses.build(self.model.run, self.model.make_backbone())
        if not self.detector:
            return defense, None
        activations = {key: each.numpy() for key, each in defense.activations(self.images(_FITTED)).items()}
        head = tuple(each.numpy() for each in defense.backbone.get_layer("logits").weights)
        detector = DETECTORS[self.detector]().fit(activations, np.arange(_FITTED) % CLASSES, head)
        return defense, RejectOption(self.detector, detector, 0.0, 0.5, "clean", None, (_FITTED, _FITTED))


def defended_path(defense: Defense, reject: Optional[RejectOption]) -> Callable[[tf.Tensor], Any]:
    """Return the function from images to logits, and to anomaly scores where there is a detector, and nothing else."""

    @tf.function
    def path(image: tf.Tensor) -> tuple[tf.Tensor, ...]:
        if reject is None:
            return (defense(image, training=False),)
        activations = defense.activations(image)
        return activations["logits"], reject.detector.score_with(activations, defense.activations, image)

    return path


def signatures_of(defense: Defense, reject: Optional[RejectOption]) -> Any:
    """Return the signatures of the SavedModel, loaded as a server does it."""
    module = serving_module(defense, [str(label) for label in range(CLASSES)], reject)
    with tempfile.TemporaryDirectory(prefix="kerasdefense-benchmark-") as folder:
        tf.saved_model.save(module, folder, signatures={name: getattr(module, name) for name in SIGNATURES})
        return tf.saved_model.load(folder).signatures


def measure_signatures(case: ServingCase, rounds: int) -> Measurement:
    """Time the defended path alone, decoding alone, and the signatures of images and of files, in turns."""
    defense, reject = case.make()
    signatures, path = signatures_of(defense, reject), defended_path(defense, reject)
    decode = tf.function(lambda files: files_as_images(files, case.model.image_shape))
    image = case.images(case.model.batch_size)
    files = tf.stack([tf.io.encode_png(each) for each in np.rint(255 * image).astype(np.uint8)])
    image = tf.constant(image)
    steps: dict[str, Step] = {
        PATH: lambda: _fetched(path(image)),
        DECODING: lambda: _fetched(decode(files)),
        OF_IMAGES: lambda: _fetched(signatures[OF_IMAGES](image=image)),
        OF_FILES: lambda: _fetched(signatures[OF_FILES](image_bytes=files)),
    }
    return Measurement(_timed(steps, rounds), {})


def measure_batch_sizes(case: ServingCase, rounds: int) -> Measurement:
    """Time `serving_default` on batches of several sizes, in turns."""
    serve = signatures_of(*case.make())[OF_IMAGES]

    def step(size: int) -> Step:
        image = tf.constant(case.images(size))
        return lambda: _fetched(serve(image=image))

    return Measurement(_timed({f"batch {size}": step(size) for size in BATCH_SIZES}, rounds), {})


def _timed(steps: dict[str, Step], rounds: int) -> Timing:
    time_in_turns(steps, rounds=3)  # the first traces, and the others warm up
    return time_in_turns(steps, CALLS * rounds)


def _fetched(outputs: Any) -> list[np.ndarray]:
    return [each.numpy() for each in tf.nest.flatten(outputs)]


def rows_of_signatures(case: ServingCase, measurement: Measurement) -> list[Row]:
    """Return a row for each signature: its floor is the path, for files also their decoding, and what else it takes."""
    timing = measurement.timing
    rows = []
    for name, floor in ((OF_IMAGES, (PATH,)), (OF_FILES, (DECODING, OF_IMAGES))):
        milliseconds, floor_ms = timing.milliseconds(name), sum(timing.milliseconds(part) for part in floor)
        rows.append(
            {
                "strategy": name,
                "decoding_ms": timing.milliseconds(DECODING) if DECODING in floor else 0.0,
                "floor_ms": floor_ms,
                "ours_ms": milliseconds,
                "over_floor": milliseconds / floor_ms,
                "over_floor_processor": 1 / sum(timing.processor_ratio(part, name) for part in floor),
                "images_per_second": 1000 * case.model.batch_size / milliseconds,
            }
        )
    return rows


def rows_of_batch_sizes(case: ServingCase, measurement: Measurement) -> list[Row]:
    """Return a row for each size: how long half of the calls take at most, and 99 in 100, and the rate of images."""
    rows = []
    for size in BATCH_SIZES:
        seconds = measurement.timing.seconds[f"batch {size}"]
        median, slowest = np.quantile(seconds, (0.5, 0.99))
        rows.append(
            {
                "strategy": f"batch {size}",
                "p50_ms": 1000 * median,
                "p99_ms": 1000 * slowest,
                "images_per_second": size / median,
            }
        )
    return rows


SIGNATURE_COLUMNS = (
    Column("decoding ms", "decoding_ms", ".2f"),
    Column("floor ms", "floor_ms", ".2f"),
    Column("ours ms", "ours_ms", ".2f"),
    Column("ours/floor", "over_floor", ".2f", at_most=1.05),
    Column("(CPU time)", "over_floor_processor", ".2f"),
    Column("images/s", "images_per_second", ".0f"),
)
BATCH_SIZE_COLUMNS = (
    Column("p50 ms", "p50_ms", ".2f"),
    Column("p99 ms", "p99_ms", ".2f"),
    Column("images/s", "images_per_second", ".0f"),
)

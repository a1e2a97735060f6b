"""What goes on inside a model under attack, image by image; robust accuracy does not depend on it.

These are figures for the claims that papers make of their methods: less noise in the features, a flatter minimum, a
more compact embedding.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Optional

import numpy as np
import tensorflow as tf
from rich.table import Table

from kerasdefense import losses
from kerasdefense.attacks import PGD, norms
from kerasdefense.defenses.batch import Batch
from kerasdefense.evaluation.batches import first_images
from kerasdefense.evaluation.figures import Figures, compare_figures
from kerasdefense.evaluation.geometry import Embeddings, closeness, participation
from kerasdefense.evaluation.models import Loaded
from kerasdefense.evaluation.report import accuracy_interval, mean_interval, radius
from kerasdefense.evaluation.search import Chunk, ExactPath, compiled, mover
from kerasdefense.evaluation.suites import ThreatModel

STEPS = 20
"""Steps of the attack."""
SHARES = (0.1, 0.2, 0.3)
"""Lengths by which kernels are moved, as shares of their own."""
DRAWS = 5
"""Directions in which kernels are moved."""
_BATCH = 256


def measure_internals(
    model: Loaded, batches: tf.data.Dataset, threat_model: ThreatModel, *, examples: int, seed: int = 0
) -> Figures:
    """Measure a model's inside on the first images of a dataset.

    1. Attack the images by PGD-20 on the exact path.
    2. `embedding_noise`: the distance of the embedding after the attack from that before, as a share of the latter's
       length.
    3. What a defense tells of itself, clean and attacked: see its method `internals`.
    4. `loss_rise_<share>` and `adversarial_loss_rise_<share>`: by how much the cross-entropy of the clean images, and
       of those of step 1, rises when every kernel is moved; the mean over five directions, Gaussian, each filter's
       scaled to that share of its own length.
    5. How compact the clean embedding is, at length 1: `intra_class_cosine`, `inter_class_cosine` and
       `nearest_other_class` of each image, `participation_ratio` and `class_participation_ratio` of all; see geometry.

    What the model does not tell, or cannot have moved, is left out.

    Args:
        model: that draws nothing at random.
        batches: dicts with image, label and index.
        threat_model: the ball of the attack.
        examples: how many images; 0 = all.
        seed: of the attack's start and the directions.

    Source of step 4: Li et al. 2018, Visualizing the Loss Landscape of Neural Nets, section 4 (filter normalisation).
        Deviations: one-dimensional kernels stay as they are.
    """
    attack = PGD(*threat_model, steps=STEPS, keep="last")
    chunk = first_images(batches, examples)
    move = mover(model.attack_paths["exact"], attack, seed)
    count = len(chunk.label)
    parts = [chunk.rows(np.arange(first, min(first + _BATCH, count))) for first in range(0, count, _BATCH)]
    image_adv = np.concatenate([move(part) for part in parts])
    told, embeddings = _told(model, chunk, image_adv, attack, seed)
    told = {name: values for name, values in told.items() if not np.isnan(values).all()}
    figures = {**told, **_loss_rises(model, chunk, image_adv, seed)}
    of_all = {}
    if embeddings is not None:
        figures |= closeness(embeddings.clean, chunk.label)
        of_all = participation(embeddings.clean, chunk.label, seed=seed)
    results = {
        "n": count,
        "attack": attack.get_config(),
        "seed": seed,
        "directions": DRAWS,
        "figures": {**{name: _interval(values, seed) for name, values in figures.items()}, **of_all},
    }
    return Figures(results, {"index": chunk.index, **figures}, embeddings)


def _interval(values: np.ndarray, seed: int) -> dict[str, Any]:
    if values.dtype == bool:
        return accuracy_interval(values)
    return mean_interval(values[~np.isnan(values)], seed=seed)


def _told(
    model: Loaded, chunk: Chunk, image_adv: np.ndarray, attack: PGD, seed: int
) -> tuple[dict[str, np.ndarray], Optional[Embeddings]]:
    """Return the figures of steps 2 and 3, and the embeddings, None where the model does not tell."""

    def tell(image: tf.Tensor, image_adv: tf.Tensor, label: tf.Tensor, index: tf.Tensor) -> tuple[Any, Any]:
        told = model.internals(Batch(image, label, index), image_adv, attack, seed) if model.internals else {}
        if model.features is None:
            return told, {}
        clean, adversarial = model.features(image), model.features(image_adv)
        told = {"embedding_noise": norms.relative_distance(adversarial, clean), **told}
        return told, {"clean": clean, "adversarial": adversarial}

    inputs = [tf.constant(each) for each in (chunk.image, image_adv, chunk.label, chunk.index)]
    function = compiled(tell, *inputs)
    firsts = range(0, len(chunk.label), _BATCH)
    parts = [function(*(each[first : first + _BATCH] for each in inputs)) for first in firsts]
    figures, embeddings = tf.nest.map_structure(lambda *each: np.concatenate(each), *parts)
    return figures, Embeddings(**embeddings, label=chunk.label) if embeddings else None


def _loss_rises(model: Loaded, chunk: Chunk, image_adv: np.ndarray, seed: int) -> dict[str, np.ndarray]:
    """Return the figures of step 4, none where kernels cannot be moved."""
    exact = ExactPath(model.attack_paths["exact"], seed=seed, chunk_size=_BATCH)
    images = {"loss": chunk, "adversarial_loss": Chunk(image_adv, chunk.label, chunk.index)}

    def loss_of(each: Chunk) -> np.ndarray:
        found: np.ndarray = losses.cross_entropy(tf.constant(exact.logits(each)), tf.constant(each.label)).numpy()
        return found

    before = {name: loss_of(each) for name, each in images.items()}
    rises: dict[str, np.ndarray] = {}
    for share in SHARES if model.kernels else ():
        moved: dict[str, list[np.ndarray]] = {name: [] for name in images}
        for draw in range(DRAWS):
            with _moved(model.kernels, share, np.random.default_rng([seed, draw])):
                for name, each in images.items():
                    moved[name].append(loss_of(each) - before[name])
        rises |= {f"{name}_rise_{share}": np.mean(values, axis=0) for name, values in moved.items()}
    return {**before, **rises}


@contextlib.contextmanager
def _moved(kernels: Sequence[tf.Variable], share: float, random: np.random.Generator) -> Iterator[None]:
    """Move every filter (last axis) of every kernel by a share of its length, and put them back at the end."""
    kept = [kernel.numpy() for kernel in kernels]
    try:
        for kernel, values in zip(kernels, kept):
            direction, axes = random.standard_normal(values.shape), tuple(range(values.ndim - 1))
            scale = np.sqrt(np.square(values).sum(axes) / np.square(direction).sum(axes))
            kernel.assign(values + share * scale * direction)
        yield
    finally:
        for kernel, values in zip(kernels, kept):
            kernel.assign(values)


def internals_table(results: Mapping[str, Any]) -> Optional[Table]:
    """Return the figures for the terminal, None where they were not measured."""
    found = results.get("internals")
    if not found:
        return None
    threat = results["threat_model"]
    caption = (
        f"Means over n = {found['n']} images, or ratios of them all; seed {found['seed']}; "
        f"attack: PGD-{found['attack']['steps']}, "
        f"{threat['norm']} ball of radius {radius(threat['epsilon'])}."
    )
    table = Table(title="inside the model", caption=caption, caption_justify="left", title_justify="left")
    for heading in ("figure", "mean", "95 % interval"):
        table.add_column(heading, justify="left" if heading == "figure" else "right")
    for name, figure in found["figures"].items():
        low, high = figure["ci95"]
        table.add_row(name.replace("_", " "), f"{figure['value']:.4g}", f"{low:.4g} to {high:.4g}")
    return table


def compare_internals(folders: Mapping[str, Path], *, seed: int = 0) -> Optional[Table]:
    """Return a table of what runs measured alike of their inside, as `compare_figures` does."""
    return compare_figures(folders, "internals", alike=("attack", "seed"), title="inside the models", seed=seed)

"""One attack by itself, taken to its last step on all images, as papers run it; no suite's economy, no worst case."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Optional

import numpy as np
import tensorflow as tf

from kerasdefense.attacks import PGD, norms
from kerasdefense.evaluation.search import Chunk, Search, merged


def attacked(search: Search, chunk: Chunk, rows: np.ndarray) -> np.ndarray:
    """Return the images of a chunk, those of some rows after an attack: where it keeps its last iterate, that one.

    Args:
        search: of an iterative attack without targets of its own, as many images at a time as it has slots.
        chunk: the images.
        rows: int [n].
    """
    image_adv, attack = chunk.image.copy(), search.attack
    for first in range(0, len(rows), search.slots):
        part = rows[first : first + search.slots]
        run, no_logits = np.zeros(len(part), np.int64), np.zeros([len(part), 0], np.float32)
        reference = search.references(chunk.image[part], no_logits)
        context = search.context(chunk.rows(part), no_logits, run, reference)
        image = tf.constant(chunk.image[part])
        state = search.start(image, context, run)
        keeps_last = isinstance(attack, PGD)
        for _ in range(attack.steps if keeps_last else attack.passes):
            state = search.step(state, image, context)
        image_adv[part] = (state.image if keeps_last else state.best.image).numpy()
    return image_adv


def highest_loss(search: Search, chunk: Chunk) -> np.ndarray:
    """Return of each image of a chunk the point of highest loss that an attack passes, be it one that fools or not.

    Args:
        search: of an iterative attack on a loss that needs no more of an image than its label.
        chunk: the images.
    """
    found = chunk.image.copy()
    for first in range(0, len(found), search.slots):
        rows = np.arange(first, min(first + search.slots, len(found)))
        part = chunk.rows(rows)
        run, no_logits = np.zeros(len(rows), np.int64), np.zeros([len(rows), 0], np.float32)
        image, context = tf.constant(part.image), search.context(part, no_logits, run, no_logits)
        state = search.start(image, context, run)
        untried = state.best._replace(loss=tf.fill([len(rows)], -float("inf")))
        best = untried
        for _ in range(search.attack.passes):
            # The attack itself prefers what fools to what has a higher loss.
            state = state._replace(best=untried._replace(queries=state.best.queries))
            state = search.step(state, image, context)
            best = merged((state.best.loss > best.loss).numpy(), state.best, best)
        found[rows] = best.image.numpy()
    return found


def median_l2(image_adv: np.ndarray, chunk: Chunk, rows: np.ndarray) -> Optional[float]:
    """Return the median L2 norm of what was done to the images that `rows`, bool [n], marks; None if there are none."""
    length = norms.length(tf.constant(image_adv - chunk.image), "l2").numpy()[rows]
    return float(np.median(length)) if length.size else None


def median_in_words(entry: Mapping[str, Any]) -> str:
    """Return the `median_l2` of an attack's entry as people read it, "" where it has none."""
    if "median_l2" not in entry:
        return ""
    return "none fooled" if entry["median_l2"] is None else f"{entry['median_l2']:.3g}"

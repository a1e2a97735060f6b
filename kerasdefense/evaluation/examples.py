"""Example images of a report: which ones are shown, and as what pictures."""

from __future__ import annotations

import base64
import io
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from kerasdefense.evaluation.outcomes import to_levels

EXAMPLES = 12
_SMALL, _LARGE = 96, 224
"""Sides in pixels below which pictures are enlarged, and above which they are reduced."""


class Examples(NamedTuple):
    """Images before and after the attacks, and what the model took them for.

    Attributes:
        image: float [n, h, w, c] in [0, 1].
        image_adv: float [n, h, w, c] in [0, 1].
        label: int [n].
        clean_prediction: int [n].
        adversarial_prediction: int [n].
        labels: the names of the classes, in label order.
    """

    image: np.ndarray
    image_adv: np.ndarray
    label: np.ndarray
    clean_prediction: np.ndarray
    adversarial_prediction: np.ndarray
    labels: Sequence[str]


def choose_examples(
    image: np.ndarray,
    image_adv: np.ndarray,
    label: np.ndarray,
    clean_prediction: np.ndarray,
    adversarial_prediction: np.ndarray,
    labels: Sequence[str],
) -> Examples:
    """Return at most EXAMPLES to show: fooled ones first, then standing, then wrong from the start; classes in turn.

    Takes what `Examples` holds, of any number of images; the same ones always give the same choice.
    """
    right = clean_prediction == label
    fooled = right & (adversarial_prediction != label)
    group = np.where(fooled, 0, np.where(right, 1, 2))
    seen: Counter[tuple[int, int]] = Counter()
    turn = np.zeros(len(group), int)
    for position, pair in enumerate(zip(group.tolist(), label.tolist())):
        turn[position] = seen[pair]
        seen[pair] += 1
    chosen = np.lexsort((np.arange(len(group)), turn, group))[:EXAMPLES]
    return Examples(
        image[chosen],
        image_adv[chosen],
        label[chosen],
        clean_prediction[chosen],
        adversarial_prediction[chosen],
        labels,
    )


def pictures(images: Examples, threat: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield what the page shows of each example; grey in the difference is no change."""
    for image, image_adv, *numbers in zip(*images[:-1]):
        label, before, after = (int(number) for number in numbers)
        change = np.asarray(image_adv, np.float64) - image
        largest = threat["epsilon"] if threat["norm"] == "linf" else np.abs(change).max()
        difference = 0.5 + 0.5 * np.clip(change / max(float(largest), 1e-12), -1, 1)
        kind = "wrong" if before != label else "fooled" if after != label else "stood"
        yield {
            "kind": kind,
            **{
                name: _class_name(images.labels, number)
                for name, number in zip(("label", "before", "after"), (label, before, after))
            },
            "image": _png(image),
            "image_adv": _png(image_adv),
            "difference": _png(difference),
        }


def _class_name(labels: Sequence[str], number: int) -> str:
    return str(labels[number]) if 0 <= number < len(labels) else f"class {number}"


def _png(image: np.ndarray) -> str:
    """Return an image [h, w, c] in [0, 1] as a data URI, with pixels that stay squares however small it is."""
    levels = to_levels(np.clip(image, 0, 1))
    side = max(levels.shape[:2])
    levels = levels.repeat(max(1, _SMALL // side), axis=0).repeat(max(1, _SMALL // side), axis=1)
    picture = Image.fromarray(levels[..., :3] if levels.shape[-1] >= 3 else levels[..., 0])
    picture = picture.reduce(math.ceil(side / _LARGE)) if side > _LARGE else picture
    stream = io.BytesIO()
    picture.save(stream, "PNG")
    return data_uri(stream.getvalue())


def data_uri(png: bytes) -> str:
    """Return a PNG file as an address that holds it."""
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"

"""Models that draw at random: whether one does, and the protocol that such a model gets.

One lucky draw neither breaks nor saves an image here: attacks follow the mean loss over many draws, and an image counts
as fooled by the mean probabilities of fresh ones.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Callable, Optional

import numpy as np
import tensorflow as tf

from kerasdefense import losses
from kerasdefense.attacks import APGD, FGSM, PGD, Iterative, Square, seeds
from kerasdefense.attacks.wrappers import FIXED_NOISE, draws_of, fixed_noise
from kerasdefense.defenses.purifying import BPDA, OBLIVIOUS
from kerasdefense.evaluation.journal import Arrays
from kerasdefense.evaluation.report import accuracy_interval, mean_interval
from kerasdefense.evaluation.robustness import Measured, Options, in_blocks, measure
from kerasdefense.evaluation.search import Chunk, Search, compiled
from kerasdefense.evaluation.single import highest_loss
from kerasdefense.evaluation.suites import AIDS, EOT_DRAWS, EXACT, SUITES, SURROGATE, PlannedAttack, ThreatModel
from kerasdefense.types import PathFn

SCALING = (1, 5, 20, 64)
"""Draws over which R5 looks whether more of them break more."""
_MORE_DRAWS, _FALLS = 128, 0.01
"""Draws that R5 looks at besides where the last step of SCALING lowered accuracy by so much."""
_FEW_DRAWS = 10
_LOOKS = 5
_FINAL_DRAWS, _ANY_OF = 20, 10
_FINAL, _CHOICE = -2, -3
"""Streams of the draws of R6, and of those by which it chooses its images."""
_R6_STREAM = 3000
_R3_STEP = 0.007 / (8 / 255)
"""The step of R3 relative to the radius."""
_KNOWN = (EXACT, OBLIVIOUS, BPDA, FIXED_NOISE)


@dataclasses.dataclass(frozen=True)
class RandomModel:
    """A model that draws at random, with what its figures R1 to R6 are measured on.

    Attributes:
        exact: the whole defended path, `(image, seed) -> logits`.
        dataset: batches of dicts with image, label and index.
        threat_model: norm and radius.
        classes: how many it tells apart.
        options: how images are attacked; its journal keeps R1 and R5 too, in folders of their own.
        long_examples: images of the long attacks R3 to R5, and of that of R6, from the first on; 0 = all.
        few: whether it gets R6 and the gradient attacks of R1 only.
    """

    exact: PathFn
    dataset: tf.data.Dataset
    threat_model: ThreatModel
    classes: int
    options: Options
    long_examples: int = 0
    few: bool = False

    def measured(self, path: PathFn, plan: Sequence[PlannedAttack], name: str, **changed: Any) -> Measured:
        """Return what attacks on one path leave, block by block as in an evaluation.

        Args:
            path: `(image, seed) -> logits`, by which images are scored as well.
            plan: the attacks.
            name: folder of the journal.
            changed: options that are not the model's own.
        """
        journal = self.options.journal and self.options.journal / name
        options = dataclasses.replace(self.options, journal=journal, minutes=0.0, **changed)
        return measure({EXACT: path}, self.dataset, plan, options)


def look(path: PathFn, chunk: Chunk, *, seed: int) -> dict[str, bool]:
    """Return whether a path answers otherwise at another draw (`differs`), and alike at the same one (`keyed`)."""
    few = chunk.rows(np.arange(min(len(chunk.label), 64)))
    image, index = tf.constant(few.image), tf.constant(few.index)
    ask = compiled(path, image, seeds.per_example(seed, 0, index))

    def directions(stream: int) -> tuple[np.ndarray, int]:
        logits = ask(image, seeds.per_example(seed, stream, index)).numpy()
        length = np.maximum(np.linalg.norm(logits, axis=1, keepdims=True), 1e-12)
        return logits / length, int((logits.argmax(1) == few.label).sum())

    def same(first: tuple[np.ndarray, int], second: tuple[np.ndarray, int]) -> bool:
        return first[1] == second[1] and bool(np.abs(first[0] - second[0]).max() <= 1e-4)

    first = directions(0)
    keyed = all(same(first, directions(0)) for _ in range(_LOOKS - 1))
    return {"differs": not keyed or not all(same(first, directions(look)) for look in range(1, _LOOKS)), "keyed": keyed}


def plan(
    norm: str, epsilon: float, classes: int, *, paths: Iterable[str] = (), long_examples: int = 0, few: bool = False
) -> tuple[PlannedAttack, ...]:
    """Return the attacks of the protocol, each for one path.

    On `exact`: FGSM, AutoAttack rand (R2), PGD with EOT (R3) and averaged Square (R4). On `oblivious`, `bpda_identity`
    and `fixed_noise`, where the model has them, what costs less; on other paths of its own APGD over mean losses.

    Args:
        norm: of the ball.
        epsilon: its radius.
        classes: how many the model tells apart.
        paths: names of the model's paths.
        long_examples: images that R3 and R4 meet, from the first on; 0 = all.
        few: return a few attacks only, for the rows of an ablation.
    """
    apgd = PlannedAttack("apgd_ce", APGD(norm, epsilon))
    pgd = PlannedAttack("pgd20", PGD(norm, epsilon, steps=20))
    families = dict.fromkeys(name.split(":")[0] for name in paths if not name.startswith(SURROGATE))
    others = tuple(apgd._replace(draws=EOT_DRAWS, path=family) for family in families if family not in (*_KNOWN, *AIDS))
    elsewhere = (apgd._replace(path=OBLIVIOUS), apgd._replace(path=FIXED_NOISE), *others)
    fgsm = PlannedAttack("fgsm", FGSM(norm, epsilon))
    one_step = (fgsm._replace(path=EXACT), fgsm._replace(path=OBLIVIOUS))
    if few:
        return (*one_step, pgd._replace(draws=_FEW_DRAWS, path=EXACT), *elsewhere)
    long = PGD(norm, epsilon, steps=200, step_size=_R3_STEP * epsilon, random_start=False)
    square = Square(norm, epsilon, queries=1000)
    exact = (
        *SUITES["rand"].plan(norm, epsilon, classes),
        PlannedAttack("pgd200_eot", long, draws=EOT_DRAWS, examples=long_examples),
        PlannedAttack("square", square, "margin", EOT_DRAWS, examples=long_examples),
    )
    return (
        *one_step,
        *elsewhere,
        pgd._replace(draws=EOT_DRAWS, path=BPDA),
        *(each._replace(path=EXACT) for each in exact),
    )


def averaged(planned: Sequence[PlannedAttack]) -> tuple[PlannedAttack, ...]:
    """Return attacks that follow the mean over EOT draws where they can."""
    return tuple(
        each._replace(draws=max(each.draws, EOT_DRAWS)) if isinstance(each.attack, Iterative) else each
        for each in planned
    )


class _FreshDraws:
    """Asks a path about images in so many draws as R6 takes.

    Args:
        path: `(image, seed) -> logits`.
        seed: seed of the evaluation.
        chunk_size: images passed at once, with all their draws.
    """

    def __init__(self, path: PathFn, *, seed: int, chunk_size: int) -> None:
        self._path, self._seed, self._size = path, seed, max(1, chunk_size // _FINAL_DRAWS)
        self._compiled: Optional[Callable[..., Any]] = None

    def logits(self, image: np.ndarray, index: np.ndarray, stream: int) -> np.ndarray:
        """Return logits [n, draws, classes] of images [n, h, w, c], by draws of their index and a stream."""
        parts = []
        for first in range(0, len(index), self._size):
            given = tf.constant(image[first : first + self._size])
            drawn = seeds.per_example(self._seed, stream, tf.constant(index[first : first + self._size]))
            self._compiled = self._compiled or compiled(self._all_draws, given, drawn)
            parts.append(self._compiled(given, drawn).numpy())
        joined = np.concatenate(parts)
        return joined.reshape(-1, _FINAL_DRAWS, joined.shape[-1])

    def _all_draws(self, image: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
        return draws_of(self._path, image, seed, _FINAL_DRAWS)

    def margin(self, chunk: Chunk) -> np.ndarray:
        """Return how far the mean probability of the best other class is above that of the label, float32 [n]."""
        mean = tf.reduce_mean(tf.nn.softmax(self.logits(chunk.image, chunk.index, _CHOICE)), axis=1)
        return losses.margin(mean, tf.constant(chunk.label)).numpy()


def worst_images(model: RandomModel, blocks: Iterable[Arrays]) -> Iterator[Arrays]:
    """Yield what R6 is measured on: index, label, image and image_adv of the images, block by block.

    An evaluation ends an attack on an image that has fooled, be it by little. So of the first `long_examples` images
    the points of highest mean loss of a PGD-20 that goes on to its end stand in where they are worse for the model, by
    the mean probabilities of draws of their own.

    Args:
        model: with the data set that was evaluated.
        blocks: image_adv of the evaluation.
    """
    options = model.options
    settings: dict[str, Any] = {"seed": options.seed, "chunk_size": options.chunk_size}
    fresh = _FreshDraws(model.exact, **settings)
    draws = _FEW_DRAWS if model.few else EOT_DRAWS
    planned = PlannedAttack("pgd20", PGD(*model.threat_model, steps=20), draws=draws)
    search = Search(planned, EXACT, model.exact, stream=_R6_STREAM, **settings)
    seen = 0
    for chunk, block in zip(in_blocks(model.dataset, options), blocks):
        image_adv, count = block["image_adv"].copy(), len(chunk.label)
        looked_at = min(count, max(0, model.long_examples - seen)) if model.long_examples else count
        if looked_at:
            few = chunk.rows(np.arange(looked_at))
            before = dataclasses.replace(few, image=image_adv[:looked_at])
            after = dataclasses.replace(few, image=highest_loss(search, few))
            worse = np.flatnonzero(fresh.margin(after) > fresh.margin(before))
            image_adv[worse] = after.image[worse]
        seen += count
        yield {"index": chunk.index, "label": chunk.label, "image": chunk.image, "image_adv": image_adv}


def final_scoring(path: PathFn, blocks: Iterable[Arrays], *, seed: int, chunk_size: int) -> dict[str, Any]:
    """Return what fresh draws say of the worst images, and of the clean ones (R6).

    Args:
        path: the exact path.
        blocks: index, label, image, image_adv of the images.
        seed: seed of the evaluation.
        chunk_size: images passed at once, with all their draws.

    Returns:
        `single_draw`, the expected accuracy of one draw; `majority_vote` and `any_of_10`, the share of images that are
        right by the vote of all draws, and in every one of ten (an attacker may try again); `clean_single_draw` and
        `clean_majority_vote`, the first two of clean images.
    """
    fresh = _FreshDraws(path, seed=seed, chunk_size=chunk_size)
    right: dict[str, list[np.ndarray]] = {"image_adv": [], "image": []}
    for block in blocks:
        for name, found in right.items():
            answer = fresh.logits(block[name], block["index"], _FINAL).argmax(axis=2)
            found.append(answer == block["label"][:, None])
    attacked, clean = (np.concatenate(found) for found in right.values())
    return {
        **_by_draws(attacked),
        "any_of_10": accuracy_interval(attacked[:, :_ANY_OF].all(axis=1)),
        **{f"clean_{name}": each for name, each in _by_draws(clean).items()},
    }


def _by_draws(right: np.ndarray) -> dict[str, Any]:
    """Return the accuracies of one draw and of the vote of all; `right` bool [n, draws]."""
    return {
        "single_draw": {**mean_interval(right.mean(axis=1)), "draws": right.shape[1]},
        "majority_vote": accuracy_interval(right.mean(axis=1) > 0.5),
    }


def scaling(model: RandomModel) -> list[dict[str, Any]]:
    """Return the accuracy under PGD-20 by the number of draws it averages over (R5).

    More draws than those of SCALING are looked at where the last step to more of them still broke a point more.

    Returns:
        Of each number of draws `{draws, value, n, ci95, is_non_increasing}`, the last being whether no more stands than
        with fewer draws, but for two standard errors of the paired difference or one image.
    """
    limits = [each for each in (model.long_examples, model.options.examples) if each]
    attack = PGD(*model.threat_model, steps=20)
    curve: list[dict[str, Any]] = []
    standing: list[np.ndarray] = []

    def add(draws: int) -> None:
        plan = [PlannedAttack("pgd20", attack, draws=draws)]
        found = model.measured(model.exact, plan, f"R5_{draws}", examples=min(limits, default=0))
        standing.append(found.outcomes.robust)
        fell = len(standing) < 2 or _is_non_increasing(*standing[-2:])
        curve.append({"draws": draws, **accuracy_interval(standing[-1]), "is_non_increasing": fell})

    for draws in SCALING:
        add(draws)
    if len(curve) > 1 and curve[-2]["value"] - curve[-1]["value"] >= _FALLS - 1e-9:
        add(_MORE_DRAWS)
    return curve


def _is_non_increasing(before: np.ndarray, after: np.ndarray) -> bool:
    """Return whether no more images stand than before, bool [n] each, but for chance or one image."""
    rise = after.astype(float) - before
    return bool(rise.mean() <= max(2 * rise.std() / len(rise) ** 0.5, 1 / len(rise)) + 1e-9)


def fixed(model: RandomModel) -> dict[str, Any]:
    """Return the accuracy of the model with its draw held fixed under AutoAttack standard (R1), on all its images.

    Images stream through in blocks of 1024 at most, as in an evaluation, so memory does not grow with their number.

    Returns:
        `{value, n, ci95}`, that of the clean images as `clean`, and as `left`, by attack, what stands after it and
        those before it.
    """
    plan = SUITES["autoattack"].plan(*model.threat_model, model.classes)
    if model.few:
        plan = tuple(each for each in plan if isinstance(each.attack, APGD))
    found = model.measured(fixed_noise(model.exact), plan, "R1", is_randomised=False, cascade=True)
    standing = np.logical_and.accumulate(found.outcomes.survived, axis=1)
    names = [search.name for search in found.searches]
    return {
        **accuracy_interval(found.outcomes.robust),
        "clean": accuracy_interval(found.outcomes.clean),
        "left": {name: accuracy_interval(standing[:, column]) for column, name in enumerate(names)},
    }


def protocol(
    model: RandomModel, blocks: Iterable[Arrays], attacks: Sequence[Mapping[str, Any]], flags: Mapping[str, bool]
) -> dict[str, Any]:
    """Return the figures R1 to R6; null where one was not measured.

    Args:
        model: what R1 and R5 are measured on.
        blocks: the worst images that the evaluation found, among those that R6 looks at.
        attacks: what it found by attack, R2 to R4 among them.
        flags: what `look` returned.
    """
    by_name = {each["name"]: each["own_accuracy"] for each in attacks if each["path"] == EXACT}
    rand = {name: by_name[name] for name in by_name if name.startswith("apgd")}
    options = model.options
    worst = worst_images(model, blocks)
    return {
        "R1_fixed_noise": fixed(model) if flags["keyed"] else None,
        "R2_autoattack_rand": None if model.few else rand,
        "R3_pgd200_eot": by_name.get("pgd200_eot"),
        "R4_square": by_name.get("square"),
        "R5_scaling": None if model.few else scaling(model),
        "R6_fresh_draws": final_scoring(model.exact, worst, seed=options.seed, chunk_size=options.chunk_size),
        "keyed": flags["keyed"],
    }

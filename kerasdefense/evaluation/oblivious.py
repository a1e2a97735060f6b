"""Accuracy on images crafted on the classifier alone, by an attacker who does not know of what stands in front of it.

That is how purifiers are often measured: attacks that they were not made for, all of them on the bare classifier. What
stands there falls to an attacker who knows of the purifier, so it is beside the robust accuracy and never enters it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Callable, Optional, Union

import numpy as np
import tensorflow as tf
from rich.table import Table
from rich.text import Text

from kerasdefense.attacks import (
    CAFA,
    FEATURE_DISTANCE,
    PGD,
    TIDIM,
    Attack,
    CarliniWagner,
    FoolboxDDN,
    Iterative,
    StAdv,
    has_foolbox,
)
from kerasdefense.defenses.purifying import OBLIVIOUS
from kerasdefense.evaluation.batches import first_images
from kerasdefense.evaluation.block import Block
from kerasdefense.evaluation.figures import Figures, compare_figures
from kerasdefense.evaluation.models import Loaded
from kerasdefense.evaluation.report import accuracy_interval, radius
from kerasdefense.evaluation.search import Chunk, ExactPath, Search
from kerasdefense.evaluation.single import attacked, median_in_words, median_l2
from kerasdefense.evaluation.suites import SUITES, PlannedAttack, ThreatModel
from kerasdefense.types import PathFn, look_up

WORDS = (
    "Crafted on the classifier alone by an attacker who does not know of what stands in front; no measure of "
    "robustness."
)
NAMES = ("pgd40", "pgd40_targeted", "cw_l2", "ddn", "st_adv", "ti_dim", "cafa", "autoattack")
"""The attacks, in the order in which they are reported."""
ANYWHERE = ("cw_l2", "ddn", "st_adv")
"""Those that no ball bounds."""
_AUTOATTACK = "autoattack"
_STREAM = 4000
_BATCH = 256


def chosen(names: str) -> tuple[str, ...]:
    """Return the attacks of a comma-separated list in the order of NAMES, all of them for "".

    Raises:
        UsageError: an unknown name.
    """
    given = [each.strip() for each in names.split(",") if each.strip()]
    for each in given:
        look_up(dict.fromkeys(NAMES), each, "attack of --evaluate_oblivious_attacks")
    return tuple(name for name in NAMES if name in given or not given)


def released_target(classes: int) -> Callable[[np.ndarray], np.ndarray]:
    """Return the class that images are pulled to, from labels [n]: class 3, or class 1 where the label is 3.

    Of fewer classes, the remainder of those numbers, and where both are one, the next class.
    """
    first, second = 3 % classes, 1 % classes
    second = (first + 1) % classes if second == first else second
    return lambda label: np.where(label == first, second, first)


def measure_oblivious(
    model: Loaded,
    batches: tf.data.Dataset,
    threat_model: ThreatModel,
    *,
    examples: int,
    seed: int = 0,
    attacks: str = "",
) -> Figures:
    """Measure accuracy under attacks on the classifier alone, on the first images of a dataset.

    1. Attack every image that the classifier alone, the path `oblivious`, gives its label. On a model without such a
       path that is the path `exact`: an undefended model's row.
    2. `bare_accuracy`: the share of images that the classifier alone gets right, clean and after the attack.
    3. `accuracy`: the share of images that the exact path gets right, clean and with what the attack made in their
       place; images that step 1 passed over stay clean.

    `pgd40`, `pgd40_targeted` (see `released_target`), `ti_dim` and `cafa` take 40 steps in the ball and keep the last
    iterate; `autoattack` is the suite, each member on what those before it left, and keeps what fooled; `cw_l2`, `ddn`
    and `st_adv` go however far they must, `median_l2` being the median L2 norm of what fooled the classifier alone,
    None if nothing did.

    Args:
        model: that draws nothing at random.
        batches: dicts with image, label and index.
        threat_model: the ball of all but `cw_l2`, `ddn` and `st_adv`.
        examples: how many images; 0 = all.
        seed: of the attacks.
        attacks: some of NAMES, comma-separated; "" = all. `ddn` is left out where foolbox is not installed, `cafa`
            where the classifier does not tell what enters its last layer, or has none that is known; `left_out` says
            so.

    Raises:
        UsageError: an unknown attack.

    Source: the attack scripts released with CAFD (Zhou et al. 2021). Deviations: CAFA is ours to add, with 40 steps;
    StAdv and TI-DIM are those of this package, which see; images that the classifier gets wrong are not attacked, and
    images are not stored with 8 bits before they are purified. Their attack in the Wasserstein metric cannot be built
    again: of it, neither its settings nor the script that runs it were released.
    """
    names = chosen(attacks)
    chunk = first_images(batches, examples)
    crafter = _Crafter(model, chunk, threat_model, seed)
    exact = ExactPath(model.attack_paths["exact"], seed=seed, chunk_size=_BATCH)
    clean = exact.is_right(chunk)
    arrays = {"clean": clean, "bare_clean": crafter.right}
    entries: list[dict[str, Any]] = []
    settings: dict[str, Any] = {}
    left_out: dict[str, str] = {}
    for name in names:
        missing = crafter.missing(name)
        if missing:
            left_out[name] = missing
            continue
        image_adv, settings[name] = crafter.craft(name)
        found = Chunk(image_adv, chunk.label, chunk.index)
        survived = {name: clean & exact.is_right(found), f"bare_{name}": crafter.right & crafter.bare.is_right(found)}
        arrays |= survived
        accuracy, bare_accuracy = (accuracy_interval(each) for each in survived.values())
        entries.append({"name": name, "accuracy": accuracy, "bare_accuracy": bare_accuracy})
        if name in ANYWHERE:
            entries[-1]["median_l2"] = median_l2(image_adv, chunk, crafter.right & ~survived[f"bare_{name}"])
    results = {
        "n": len(chunk.label),
        "seed": seed,
        "clean_accuracy": accuracy_interval(clean),
        "bare_clean_accuracy": accuracy_interval(crafter.right),
        "has_purifier": OBLIVIOUS in model.attack_paths,
        "attacks": entries,
        "left_out": left_out,
        "settings": settings,
    }
    return Figures(results, {"index": chunk.index, **arrays})


class _Crafter:
    """Makes images on a model's classifier alone; `right` bool [n] says which it gets right clean."""

    def __init__(self, model: Loaded, chunk: Chunk, threat_model: ThreatModel, seed: int) -> None:
        self._path: PathFn = model.attack_paths.get(OBLIVIOUS, model.attack_paths["exact"])
        # Where something stands in front and the classifier is not known alone, its features are not either.
        is_known = model.bare is not None or OBLIVIOUS not in model.attack_paths
        self._class_activation = model.bare_class_activation if is_known else None
        self._chunk, self._threat_model, self._seed = chunk, threat_model, seed
        self.bare = ExactPath(self._path, seed=seed, chunk_size=_BATCH)
        self.classes = self.bare.check(chunk)
        self.right = self.bare.is_right(chunk)

    def missing(self, name: str) -> str:
        """Return for want of what an attack cannot run, "" if it can."""
        if name == "ddn" and not has_foolbox():
            return "foolbox is not installed: pip install '.[bench]'"
        if name == "cafa" and self._class_activation is None:
            return "the model does not tell what enters its last layer"
        return ""

    def craft(self, name: str) -> tuple[np.ndarray, dict[str, Any]]:
        """Return images [n, h, w, c] after an attack of NAMES, and its settings."""
        rows = np.flatnonzero(self.right)
        if name == _AUTOATTACK:
            return self._cascade()
        attack = self._attack(name)
        if isinstance(attack, StAdv):
            return self._moved(attack, rows), attack.get_config()
        objective = {"pgd40_targeted": "targeted_cross_entropy", "cafa": FEATURE_DISTANCE}.get(name, "cross_entropy")
        search = self._search(PlannedAttack(name, attack, objective), _STREAM + NAMES.index(name))
        if isinstance(attack, Iterative):
            return attacked(search, self._chunk, rows), attack.get_config()
        return self._in_batches(search.one_shot, rows), attack.get_config()

    def _attack(self, name: str) -> Union[Attack, StAdv]:
        norm, epsilon = self._threat_model
        anywhere, step = math.sqrt(math.prod(self._chunk.image.shape[1:])), CAFA(norm, epsilon).length
        steps: dict[str, Any] = {"steps": 40, "step_size": step, "keep": "last"}
        if name == "cw_l2":
            return CarliniWagner("l2", anywhere, steps=100, searches=4, constant=1.0, learning_rate=0.01, kappa=1.0)
        if name == "ddn":
            return FoolboxDDN("l2", anywhere, steps=100)
        if name == "st_adv":
            return StAdv()
        if name == "ti_dim":
            return TIDIM(norm, epsilon, probability=0.5, **steps)
        return (CAFA if name == "cafa" else PGD)(norm, epsilon, **steps)

    def _search(self, planned: PlannedAttack, stream: int) -> Search:
        is_targeted = planned.name == "pgd40_targeted"
        return Search(
            planned,
            "exact",
            self._path,
            stream=stream,
            seed=self._seed,
            chunk_size=_BATCH,
            class_activation=self._class_activation,
            target_of=released_target(self.classes) if is_targeted else None,
        )

    def _cascade(self) -> tuple[np.ndarray, dict[str, Any]]:
        plan = SUITES[_AUTOATTACK].plan(*self._threat_model, self.classes)
        first = _STREAM + len(NAMES)
        searches = [self._search(planned, stream) for stream, planned in enumerate(plan, start=first)]
        block = Block(self._chunk, self.bare, searches, first=0, cascade=True)
        block.attack(lambda: None)
        return block.image_adv, {planned.name: planned.attack.get_config() for planned in plan}

    def _moved(self, attack: StAdv, rows: np.ndarray) -> np.ndarray:
        @tf.function(reduce_retracing=True)
        def move(image: tf.Tensor, label: tf.Tensor) -> tf.Tensor:
            no_seed = tf.zeros([tf.shape(image)[0], 2], tf.int32)  # nothing is drawn
            return attack(lambda each: self._path(each, no_seed), image, label, no_seed).image

        return self._in_batches(lambda part: move(tf.constant(part.image), tf.constant(part.label)).numpy(), rows)

    def _in_batches(self, craft: Callable[[Chunk], np.ndarray], rows: np.ndarray) -> np.ndarray:
        image_adv = self._chunk.image.copy()
        for first in range(0, len(rows), _BATCH):
            part = rows[first : first + _BATCH]
            image_adv[part] = craft(self._chunk.rows(part))
        return image_adv


def oblivious_table(results: Mapping[str, Any]) -> Optional[Table]:
    """Return the accuracies for the terminal, None where they were not measured."""
    found = results.get("oblivious")
    if not found:
        return None
    threat = results["threat_model"]
    table = Table(title="under attacks on the classifier alone", caption_justify="left", title_justify="left")
    table.caption = Text(
        f"{WORDS} n = {found['n']}, seed {found['seed']}; in the {threat['norm']} ball of radius "
        f"{radius(threat['epsilon'])}, but {', '.join(ANYWHERE)} however far they go. Median L2: of what fooled the "
        f"classifier alone.{_without(found)}"
    )
    for heading in ("images", "classifier alone", "accuracy", "95 % interval", "median L2"):
        table.add_column(heading, justify="left" if heading == "images" else "right")
    for row in _rows(found):
        low, high = row["accuracy"]["ci95"]
        alone, accuracy = (f"{100 * row[key]['value']:.1f} %" for key in ("bare_accuracy", "accuracy"))
        table.add_row(row["name"], alone, accuracy, f"{100 * low:.1f} to {100 * high:.1f} %", median_in_words(row))
    return table


def _rows(found: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the entries of a block, clean images first."""
    clean = {"name": "clean", "accuracy": found["clean_accuracy"], "bare_accuracy": found["bare_clean_accuracy"]}
    return [clean, *found["attacks"]]


def _without(found: Mapping[str, Any]) -> str:
    """Return what was left out of a block, and that nothing stands in front where that is so; begins with a space."""
    said = [f" Without {name}: {why}." for name, why in found["left_out"].items()]
    if not found["has_purifier"]:
        said.insert(0, " Nothing stands in front of this model.")
    return "".join(said)


def compare_oblivious(folders: Mapping[str, Path], *, seed: int = 0) -> Optional[Table]:
    """Return a table of each attack, on the whole path and on the classifier alone, as `compare_figures` does."""
    return compare_figures(
        folders,
        "oblivious",
        alike=("settings", "seed"),
        title="under attacks on the classifier alone",
        words=f"{WORDS} ",
        in_percent=True,
        seed=seed,
    )

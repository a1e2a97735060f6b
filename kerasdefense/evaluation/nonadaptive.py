"""The figure that papers on new defenses often report: mean accuracy over attacks at their common defaults.

It is an average over attacks that know nothing of the defense; robust accuracy is the worst case. An attack that
fails, for whatever reason, lifts the mean, so it stands beside the robust accuracy and never enters it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Optional

import numpy as np
import tensorflow as tf
from rich.table import Table

from kerasdefense.attacks import BIM, FGSM, PGD, CarliniWagner, DeepFool, Iterative
from kerasdefense.evaluation.batches import first_images
from kerasdefense.evaluation.figures import Figures, compare_figures
from kerasdefense.evaluation.models import Loaded
from kerasdefense.evaluation.report import accuracy_interval, mean_interval, radius
from kerasdefense.evaluation.search import Chunk, ExactPath, Search
from kerasdefense.evaluation.single import attacked, median_in_words, median_l2
from kerasdefense.evaluation.suites import PlannedAttack, ThreatModel

WORDS = "An average over attacks that know nothing of the defense; robust accuracy is the worst case."
_STREAM = 3000
_BATCH = 256


def nonadaptive_attacks(threat_model: ThreatModel, image_shape: Sequence[int]) -> dict[str, Iterative]:
    """Return the attacks by name: three in the ball, on the cross-entropy, and two in L2 that nothing bounds.

    Source: the defaults of torchattacks (Kim 2020) in 2022. Deviations: the first three keep to the ball of the threat
    model; in l2, they take steps of their own default length.
    """
    anywhere = math.sqrt(math.prod(image_shape))
    bim, pgd = (1 / 255, 2 / 255) if threat_model.norm == "linf" else (None, None)
    return {
        "fgsm": FGSM(*threat_model),
        "bim": BIM(*threat_model, steps=10, step_size=bim, keep="last"),
        "pgd40": PGD(*threat_model, steps=40, step_size=pgd, keep="last"),
        "cw_l2": CarliniWagner("l2", anywhere, steps=1000, searches=1, constant=1e-4, learning_rate=0.01),
        "deepfool": DeepFool("l2", anywhere, steps=50, overshoot=0.02),
    }


def measure_nonadaptive(
    model: Loaded, batches: tf.data.Dataset, threat_model: ThreatModel, *, examples: int, seed: int = 0
) -> Figures:
    """Measure accuracy under each of `nonadaptive_attacks`, and its mean, on the first images of a dataset.

    It is an average over attacks that know nothing of the defense; robust accuracy is the worst case.

    1. Attack every image that is right clean on the exact path.
    2. An image counts for an attack where it is right clean and right after it, however far `cw_l2` and `deepfool` had
       to go; `median_l2` is the median L2 norm of what they did to the images that they fooled, None if there is none.
    3. `mean` is, of each image, the share of attacks for which it counts.

    Args:
        model: that draws nothing at random.
        batches: dicts with image, label and index.
        threat_model: the ball of `fgsm`, `bim` and `pgd40`.
        examples: how many images; 0 = all.
        seed: of the random start of `pgd40` and of the bootstrap.
    """
    chunk, path = first_images(batches, examples), model.attack_paths["exact"]
    exact = ExactPath(path, seed=seed, chunk_size=_BATCH)
    clean = exact.is_right(chunk)
    attacks = nonadaptive_attacks(threat_model, chunk.image.shape[1:])
    entries: list[dict[str, Any]] = []
    survived: dict[str, np.ndarray] = {}
    for stream, (name, attack) in enumerate(attacks.items(), start=_STREAM):
        search = Search(PlannedAttack(name, attack), "exact", path, stream=stream, seed=seed, chunk_size=_BATCH)
        image_adv = attacked(search, chunk, np.flatnonzero(clean))
        survived[name] = clean & exact.is_right(Chunk(image_adv, chunk.label, chunk.index))
        entries.append({"name": name, "accuracy": accuracy_interval(survived[name])})
        if attack.takes == "logits":
            entries[-1]["median_l2"] = median_l2(image_adv, chunk, clean & ~survived[name])
    mean = np.mean(list(survived.values()), axis=0)
    results = {
        "n": len(chunk.label),
        "seed": seed,
        "clean_accuracy": accuracy_interval(clean),
        "attacks": entries,
        "mean": mean_interval(mean, seed=seed),
        "settings": {name: attack.get_config() for name, attack in attacks.items()},
    }
    return Figures(results, {"index": chunk.index, **survived, "mean": mean})


def nonadaptive_table(results: Mapping[str, Any]) -> Optional[Table]:
    """Return the accuracies for the terminal, None where they were not measured."""
    found = results.get("nonadaptive")
    if not found:
        return None
    threat = results["threat_model"]
    table = Table(title="under non-adaptive attacks", caption_justify="left", title_justify="left")
    table.caption = (
        f"{WORDS} n = {found['n']}, seed {found['seed']}; fgsm, bim and pgd40 in the {threat['norm']} ball of radius "
        f"{radius(threat['epsilon'])}, cw_l2 and deepfool however far they go. Median L2: of what fooled."
    )
    for heading in ("images", "accuracy", "95 % interval", "median L2"):
        table.add_column(heading, justify="left" if heading == "images" else "right")
    rows = [{"name": "clean", "accuracy": found["clean_accuracy"]}, *found["attacks"]]
    for row in (*rows, {"name": "mean over attacks", "accuracy": found["mean"]}):
        low, high = row["accuracy"]["ci95"]
        accuracy, interval = f"{100 * row['accuracy']['value']:.1f} %", f"{100 * low:.1f} to {100 * high:.1f} %"
        table.add_row(row["name"], accuracy, interval, median_in_words(row))
    return table


def compare_nonadaptive(folders: Mapping[str, Path], *, seed: int = 0) -> Optional[Table]:
    """Return a table of each attack and of the mean over them, as `compare_figures` does."""
    return compare_figures(
        folders,
        "nonadaptive",
        alike=("settings", "seed"),
        title="under non-adaptive attacks",
        words=f"{WORDS} ",
        in_percent=True,
        seed=seed,
    )

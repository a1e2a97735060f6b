"""python -m kerasdefense.demo: an undefended and a hardened classifier of digits, trained, attacked and compared."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import tensorflow as tf
from rich.console import Console

from kerasdefense import data, flags, run
from kerasdefense.boundary import guarded
from kerasdefense.data import Splits
from kerasdefense.evaluation.report import radius
from kerasdefense.files import replacing
from kerasdefense.types import InputError, UsageError

CONFIGS = Path("configs/digits")
FOLDER = Path("runs/demo")
MEASURED = "pgd50x5"


class Outcome(NamedTuple):
    """What became of one model: its results, its worst images [n, h, w, c], its answers to them [n, classes]."""

    results: dict[str, Any]
    image_adv: np.ndarray
    probabilities: np.ndarray
    clean: np.ndarray

    def accuracy(self) -> float:
        """Return the accuracy under the attack that the demo compares by."""
        return next(each["accuracy"] for each in self.results["attacks"] if each["name"] == MEASURED)

    def says(self, row: int) -> str:
        """Return the answer to one attacked image, with its confidence."""
        return f"{self.probabilities[row].argmax()}, {100 * self.probabilities[row].max():.0f} % sure"


def train_and_measure(name: str, console: Console) -> tuple[Outcome, Splits]:
    """Train the digits configuration `name`, evaluate it and print its table."""
    flagfile = CONFIGS / f"{name}.cfg"
    if not flagfile.is_file():
        raise UsageError(f"there is no {flagfile}; start the demo in the project's root folder")
    settings = flags.parse([f"--flagfile={flagfile}", f"--run_dir={FOLDER / name}", "--train_resume=never"])
    console.print(f"\nTraining {name} on digits, {settings.train.epochs} epochs ...", style="bold")
    splits = data.load(settings.data)
    run.train(settings, splits)
    defense = run.load_defense(settings, splits)
    results = run.evaluate(settings, splits, console)
    with np.load(FOLDER / name / run.ADVERSARIAL) as found:
        image_adv, clean = found["image_adv"], found["clean"]
    return Outcome(results, image_adv, tf.nn.softmax(defense.predict(image_adv, verbose=0)).numpy(), clean), splits


def draw(standard: Outcome, hardened: Outcome, splits: Splits, path: Path) -> tuple[int, int]:
    """Draw one test digit: clean, as it fools the standard model, and as it was meant to fool the hardened one.

    It is the standard model's most confident mistake among the digits that it got right clean and that the hardened
    model gets right under an attack of its own.

    Returns:
        The digit's row among the test images, and its label.
    """
    batches = list(splits.test.batches(256).as_numpy_iterator())
    image = np.concatenate([batch["image"] for batch in batches])
    label = np.concatenate([batch["label"] for batch in batches])
    usable = standard.clean & (standard.probabilities.argmax(1) != label) & (hardened.probabilities.argmax(1) == label)
    if not usable.any():
        raise InputError("there is no digit on which the standard model falls and the hardened one stands")
    row = int(np.argmax(np.where(usable, standard.probabilities.max(1), -1)))
    panels = (
        (image[row], f"a {splits.labels[label[row]]}\n"),
        (standard.image_adv[row], f"attacked, standard model:\n{standard.says(row)}"),
        (hardened.image_adv[row], f"attacked, hardened model:\n{hardened.says(row)}"),
    )
    figure, axes = plt.subplots(1, 3, figsize=(8, 3.2), layout="constrained")
    for axis, (picture, title) in zip(axes, panels):
        axis.imshow(picture[..., 0], cmap="gray", vmin=0, vmax=1)
        axis.set_title(title, fontsize=10)
        axis.axis("off")
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=150)
    plt.close(figure)
    return row, int(label[row])


def main() -> None:
    """Run the demo and print its closing lines."""
    console = Console()
    standard, splits = train_and_measure("standard", console)
    hardened, _ = train_and_measure("pgd_at", console)
    picture = FOLDER / "demo.png"
    row, label = draw(standard, hardened, splits, picture)
    epsilon = radius(standard.results["threat_model"]["epsilon"])
    before, after = 100 * standard.accuracy(), 100 * hardened.accuracy()
    lines = (
        f"\nAccuracy under {MEASURED}, every pixel moved by at most {epsilon} of the grey range: "
        f"standard {before:.1f} %, hardened {after:.1f} %, {after - before:+.1f} points.",
        f"Picture: {picture}\n",
        f"1. The standard model takes a perturbed {label} for: {standard.says(row)}.",
        f"2. The hardened model, attacked in its turn, still answers: {hardened.says(row)}.",
        "3. Next: your own images and model, see README.md; all flags: python -m kerasdefense.run --help",
    )
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)


if __name__ == "__main__":
    sys.exit(guarded(main))

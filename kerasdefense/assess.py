"""Evaluate a trained, published or foreign model on a data set, keep what was found, and verify it later.

This joins data, evaluation and export; each of them knows nothing of the others.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Callable, Optional

import numpy as np
import tensorflow as tf
from rich.console import Console

from kerasdefense import config, data, endpoint, evaluation, export, integrity, recognition
from kerasdefense.attacks import norms
from kerasdefense.data import Split, Splits
from kerasdefense.defenses import DEFENSES, Defense
from kerasdefense.evaluation import (
    Loaded,
    Options,
    ThreatModel,
    internals,
    nonadaptive,
    oblivious,
    open_set,
    preprocessing,
)
from kerasdefense.evaluation.amplification import ERRORS, write_errors
from kerasdefense.evaluation.digests import of_file
from kerasdefense.evaluation.figures import ARRAYS, PICTURE, Figures
from kerasdefense.evaluation.html import choose_examples, write_report
from kerasdefense.evaluation.plane import write_plane
from kerasdefense.evaluation.report import note
from kerasdefense.evaluation.robustness import Course
from kerasdefense.evaluation.search import FRESH_DRAWS, Chunk, ExactPath, within
from kerasdefense.evaluation.suites import SURROGATE
from kerasdefense.files import write_json
from kerasdefense.integrity import CARD, MODEL, OUTCOMES, beside, claimed_beside, digests
from kerasdefense.types import InputError, PathFn, UsageError, look_up

FOLDER = "evaluation"
RESULTS, REPORT, ENTRY, STATE = (
    f"{FOLDER}/{name}" for name in ("results.json", "report.html", "robustbench.json", "state")
)
ADVERSARIAL = recognition.ADVERSARIAL
FIGURES: dict[str, Callable[..., Figures]] = {
    "internals": internals.measure_internals,
    "nonadaptive": nonadaptive.measure_nonadaptive,
    "oblivious": oblivious.measure_oblivious,
}
"""What is measured image by image beside the attacks, by block of results.json and flag of --evaluate_."""


def check(run: config.Run) -> None:
    """Raise a UsageError for flags of evaluation and export that do not go together, before anything is trained."""
    oblivious.chosen(run.evaluate.oblivious_attacks)
    if run.evaluate.preprocessor and run.mode != "evaluate":
        raise UsageError(f"--evaluate_preprocessor goes with --mode=evaluate, not with --mode={run.mode}")
    if run.evaluate.preprocessor and run.evaluate.card:
        raise UsageError("--evaluate_card is of the model alone; evaluate it without --evaluate_preprocessor")
    if run.mode == "all":
        _check_draws(run)


def _check_draws(run: config.Run) -> None:
    """Raise a UsageError for flags that do not go with what is to be trained, as it draws at random or does not."""
    name, kind = run.defense.name, look_up(DEFENSES, run.defense.name, "defense")
    is_random = kind.draws_at_random(run.defense)
    purifies = kind.purification is not Defense.purification
    if run.export.diagnostics and not is_random and not purifies:
        raise UsageError(f"--export_diagnostics is for models that draw at random or purify images; {name} does not")
    refused = [f"--evaluate_{block}" for block in FIGURES if getattr(run.evaluate, block)]
    refused += ["--detector_name, --evaluate_open_set or --evaluate_ood"] if recognition.names_of(run) else []
    if is_random and refused:
        raise UsageError(f"{refused[0]} needs a model that draws nothing at random, but {name} does")


def assess(
    run: config.Run,
    splits: Splits,
    model: Loaded,
    *,
    surrogates: Optional[Mapping[str, Loaded]] = None,
    ahead: Optional[Callable[[Course], None]] = None,
) -> dict[str, Any]:
    """Measure a model on the test images, write evaluation/ of the run directory and return the results.

    Args:
        run: the run.
        splits: its data.
        model: what is measured.
        surrogates: those of `load_surrogates`; None = they are loaded from where the run names them.
        ahead: as `evaluation.evaluate` takes it.
    """
    wanted, run_dir = run.evaluate, Path(run.run_dir)
    own = model.threat_model or ThreatModel(run.attack.norm, run.attack.epsilon)
    if wanted.norm and wanted.norm != own.norm and not wanted.epsilon:
        raise UsageError(f"--evaluate_norm={wanted.norm} needs --evaluate_epsilon: the model was made for {own.norm}")
    for block in FIGURES:
        if getattr(wanted, block) and model.is_randomised:
            raise UsageError(f"--evaluate_{block} needs a model that draws nothing at random")
    threat_model = ThreatModel(wanted.norm or own.norm, wanted.epsilon or own.epsilon)
    journal = run_dir / STATE
    if wanted.resume == "never":
        shutil.rmtree(journal, ignore_errors=True)
    fitted = recognition.fit(run, splits, model, own)  # first, so that what cannot be fitted costs no attack
    surrogates = load_surrogates(run.evaluate.surrogates) if surrogates is None else surrogates
    for each in surrogates.values():
        evaluation.check_fits(each, splits.image_shape, len(splits.labels), splits.name)
    outside = run_dir / ARRAYS.format("unseen")
    outside.unlink(missing_ok=True)
    options = Options(
        examples=min(wanted.examples or splits.test.examples, splits.test.examples),
        chunk_size=wanted.chunk_size,
        block=wanted.block,
        seed=wanted.seed,
        minutes=wanted.minutes,
        progress=run.progress,
        journal=journal,
        model=" ".join(each.digest for each in (model, *surrogates.values())),
    )
    results = evaluation.evaluate(
        paths_of(model, surrogates),
        splits.test.batches(wanted.chunk_size),
        threat_model,
        wanted.suite,
        options=options,
        alone=wanted.alone,
        is_randomised=model.is_randomised,
        sanity_examples=wanted.sanity_examples,
        long_examples=wanted.long_examples,
        features=model.features,
        class_activation=model.class_activation,
        look_outside=wanted.unseen,
        queries=wanted.endpoint_queries if model.endpoint else 0,
        save=run_dir / ADVERSARIAL,
        save_outside=outside,
        ahead=ahead,
    )
    folder = journal / "open_set" if results["complete"] else None
    recognised = recognition.measure(run, splits, model, threat_model, fitted, folder)
    results = {
        "schema_version": 2,
        **results,
        "open_set": recognised,
        **_figures(run, splits, model, threat_model, is_randomised=results["flags"]["randomised"]),
        "attack_budget": model.attack_budget,
        "endpoint": None if model.endpoint is None else model.endpoint(),
        "suite": wanted.suite,
        "note": note(results, wanted.suite),
        "config": _config(run),
        "versions": evaluation.versions(),
        "seed": wanted.seed,
        "model": {"name": model.name, "digest": model.digest},
        "adversarial_sha256": of_file(run_dir / ADVERSARIAL),
    }
    _write(run_dir, results, splits, model)
    if results["complete"]:
        shutil.rmtree(journal, ignore_errors=True)
    return results


def _figures(
    run: config.Run, splits: Splits, model: Loaded, threat_model: ThreatModel, *, is_randomised: bool
) -> dict[str, Optional[dict[str, Any]]]:
    """Measure the blocks of FIGURES that flags ask for, keep the figures of each image and return those of all.

    Where embeddings come with them, they are drawn; so is how errors grow from layer to layer.
    """
    blocks: dict[str, Optional[dict[str, Any]]] = {}
    picture, errors = Path(run.run_dir) / PICTURE, Path(run.run_dir) / ERRORS
    for outdated in (picture, errors):
        outdated.unlink(missing_ok=True)
    for block, measure in FIGURES.items():
        path, examples = Path(run.run_dir) / ARRAYS.format(block), getattr(run.evaluate, block)
        path.unlink(missing_ok=True)
        blocks[block] = None
        if examples and not is_randomised:
            batches = splits.test.batches(run.evaluate.chunk_size)
            settings: dict[str, Any] = {"examples": examples, "seed": run.evaluate.seed}
            if block == "oblivious":
                settings["attacks"] = run.evaluate.oblivious_attacks
            found = measure(model, batches, threat_model, **settings)
            found.write(path)
            blocks[block] = found.results
            if block == "internals":
                write_errors(errors, {model.name: found.arrays})
            if found.embeddings is not None:
                write_plane(picture, found.embeddings, splits.labels, attack=f"PGD-{internals.STEPS}")
    return blocks


def _config(run: config.Run) -> dict[str, Any]:
    """Return the configuration; of a model from elsewhere, only what concerns its evaluation."""
    settings = dataclasses.asdict(run)
    if not run.evaluate.model and not run.evaluate.endpoint:
        return settings
    return {name: settings[name] for name in ("mode", "run_dir", "strict", "data", "evaluate", "detector")}


def load_surrogates(given: str, fetch: Callable[[str], Path] = Path) -> dict[str, Loaded]:
    """Return the models of --evaluate_surrogates, by the names that evaluation knows their paths by.

    Args:
        given: their places, comma-separated.
        fetch: returns where on this machine lies what is at a place.
    """
    surrogates: dict[str, Loaded] = {}
    for each in filter(None, given.split(",")):
        model = evaluation.load_model(fetch(each))
        name = f"{SURROGATE}{model.name}"
        if name in surrogates:
            raise UsageError(f"--evaluate_surrogates names two models called {model.name}; rename one")
        surrogates[name] = model
    return surrogates


def paths_of(model: Loaded, surrogates: Mapping[str, Loaded]) -> dict[str, PathFn]:
    """Return all that attacks look at: the paths of a model, and those of surrogates."""
    return {**model.attack_paths, **{name: each.attack_paths["exact"] for name, each in surrogates.items()}}


def show(results: Mapping[str, Any], title: str, console: Console) -> None:
    """Print what was found: the tables that there are, the sanity battery, and what is outside the ball."""
    console.print(evaluation.table(results, title))
    makers = (
        evaluation.randomised_table,
        internals.internals_table,
        nonadaptive.nonadaptive_table,
        oblivious.oblivious_table,
    )
    for each in filter(None, (*open_set.open_set_tables(results), *(make(results) for make in makers))):
        console.print(each)
    for line in (*evaluation.sanity_lines(results), *evaluation.unseen_lines(results)):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _write(run_dir: Path, results: Mapping[str, Any], splits: Splits, model: Loaded) -> None:
    """Write results.json, the report page and the RobustBench entry."""
    evaluation.check_results(results)
    write_json(run_dir / RESULTS, results)
    write_json(run_dir / ENTRY, evaluation.robustbench_entry(results, name=model.name))
    with np.load(run_dir / ADVERSARIAL) as stored:
        arrays = {name: stored[name][:_SHOWN] for name in ("index", "label", "image_adv")}
    image = images_of(splits.test, arrays["index"])
    draws = FRESH_DRAWS if results["flags"]["randomised"] else 1
    exact = ExactPath(model.attack_paths["exact"], seed=results["seed"], chunk_size=256, draws=draws)

    def answers(images: np.ndarray) -> np.ndarray:
        return exact.logits(Chunk(images, arrays["label"], arrays["index"])).argmax(axis=1)

    examples = choose_examples(
        image,
        arrays["image_adv"],
        arrays["label"],
        answers(image),
        answers(arrays["image_adv"]),
        splits.labels,
    )
    pictures = {name: run_dir / recognition.PICTURES.format(name) for name in ("scores", "roc")}
    if (run_dir / PICTURE).is_file():
        pictures["embedding"] = run_dir / PICTURE
    write_report(
        run_dir / REPORT,
        results,
        title=f"{model.name} on {splits.name}",
        images=examples,
        pictures=pictures,
    )


_SHOWN = 512
"""Images among which those of the report are chosen."""


def images_of(split: Split, index: np.ndarray) -> np.ndarray:
    """Return images float32 [n, h, w, c] of a split by their numbers, in the order of `index`."""
    place = {int(number): row for row, number in enumerate(index)}
    found = np.zeros([len(index), *split.image_shape], np.float32)
    missing = set(place)
    for batch in split.batches(512).as_numpy_iterator():
        for number, image in zip(batch["index"], batch["image"]):
            if int(number) in missing:
                found[place[int(number)]] = image
                missing.discard(int(number))
        if not missing:
            return found
    raise InputError(f"the data set has no test image {min(missing)}; it is not the one that was evaluated on")


def verify(folder: Path, data_dir: str) -> tuple[list[str], bool]:
    """Check what a run directory or a published folder claims, in this process and with no state of the evaluation's.

    Digests are computed anew. The adversarial images of a run are checked against ball and box and scored again.

    Args:
        folder: a run directory that was evaluated, or a published folder.
        data_dir: where the data set lies now; empty = where the evaluation found it.

    Returns:
        Lines to print, and whether everything agrees.

    Raises:
        InputError: there is nothing to verify, or a file cannot be read.
    """
    if (folder / CARD).is_file():
        return _verify_published(folder)
    results = evaluation.read_results(folder)
    wanted = results["config"]["evaluate"]
    if wanted.get("endpoint"):
        with endpoint.opened(wanted["endpoint"]) as model:
            return _verify_run(folder, results, model, data_dir)
    model = evaluation.load_model(_model_path(folder, results), outputs=wanted["outputs"])
    if wanted.get("preprocessor"):
        model = preprocessing.preprocessed(model, preprocessing.preprocessor(wanted["preprocessor"]))
    return _verify_run(folder, results, model, data_dir)


def _verify_run(folder: Path, results: Mapping[str, Any], model: Loaded, data_dir: str) -> tuple[list[str], bool]:
    """Check a run directory against the model that it says to be of."""
    checks = [
        ("model", results["model"]["digest"], model.digest),
        (ADVERSARIAL, results["adversarial_sha256"], of_file(folder / ADVERSARIAL)),
    ]
    lines = [_agreement(name, claimed, found) for name, claimed, found in checks]
    right = all(claimed == found for _, claimed, found in checks)
    scored, feasible = _score_again(folder, results, model, data_dir)
    claims = {"clean accuracy": "clean_accuracy", "robust accuracy": "robust_accuracy"}
    for words, key in claims.items():
        claimed, found = results[key]["value"], scored[key]
        agrees = abs(claimed - found) < 1e-9
        excused = results["flags"]["randomised"] and not results["flags"].get("keyed")
        right &= agrees or excused
        verdict = "ok" if agrees else ("a random model without seeds" if excused else "DIFFERS")
        lines.append(f"{words}: {100 * claimed:.2f} % recorded, {100 * found:.2f} % scored again: {verdict}")
    threat = results["threat_model"]
    where = f"{threat['norm']} ball of radius {evaluation.radius(threat['epsilon'])} and box [0, 1]"
    lines.append(
        f"adversarial images: {feasible['outside']} of {feasible['n']} outside the {where}, largest "
        f"distance {feasible['largest']:.6f}"
    )
    return lines, right and not feasible["outside"]


def _model_path(folder: Path, results: Mapping[str, Any]) -> Path:
    return Path(results["config"]["evaluate"]["model"] or folder / "model.keras").expanduser()


def _score_again(
    folder: Path, results: Mapping[str, Any], model: Loaded, data_dir: str
) -> tuple[dict[str, float], dict[str, Any]]:
    """Return the accuracies of the stored images, and how many of them leave ball or box."""
    settings = config.Data(**results["config"]["data"])
    splits = data.load(dataclasses.replace(settings, dir=data_dir or settings.dir))
    with np.load(folder / ADVERSARIAL) as stored:
        image_adv, index, label = (stored[name] for name in ("image_adv", "index", "label"))
    image = images_of(splits.test, index)
    draws = FRESH_DRAWS if results["flags"]["randomised"] else 1
    exact = ExactPath(model.attack_paths["exact"], seed=results["seed"], chunk_size=256, draws=draws)
    clean, attacked = (exact.is_right(Chunk(each, label, index)) for each in (image, image_adv))
    threat = results["threat_model"]
    distance = norms.length(tf.constant(image_adv - image), threat["norm"]).numpy()
    outside = ~within(image_adv, image, threat["norm"], threat["epsilon"])
    accuracies = {"clean_accuracy": float(clean.mean()), "robust_accuracy": float((clean & attacked).mean())}
    return accuracies, {"outside": int(outside.sum()), "n": len(label), "largest": float(distance.max())}


def _verify_published(folder: Path) -> tuple[list[str], bool]:
    lines, right = [], True
    card = integrity.read_card(folder / CARD) or {}
    versions = sorted((path for path in folder.iterdir() if path.name.isdecimal()), key=lambda path: int(path.name))
    if not versions:
        raise InputError(f"{folder} holds no version to verify")
    for version in versions:
        own = integrity.read_card(version / CARD)
        if own is None:
            raise InputError(f"{version} has no {CARD} to verify it by")
        found = digests(version)
        for name in sorted({*own["files"], *found}):
            claimed, there = own["files"].get(name, "not in the card"), found.get(name, "missing")
            right &= claimed == there
            lines.append(_agreement(f"{version.name}/{name}", claimed, there))
    newest = versions[-1].name
    is_newest = own == {key: value for key, value in card.items() if key != "beside"}
    page = folder / export.MODEL_CARD
    is_told = page.is_file() and page.read_bytes() == export.model_card(card, version=newest).encode()
    right &= is_newest and is_told
    lines.append(f"{CARD}: {'ok' if is_newest else f'DIFFERS from that of version {newest}'}")
    lines.append(f"{page.name}: {'ok' if is_told else f'DIFFERS from what {CARD} says'}")
    claimed_files, found_files = claimed_beside(card), beside(folder)
    if "beside" not in card:  # an older one, of the evaluated model alone
        found_files = {name: found_files[name] for name in claimed_files if name in found_files}
    for name in sorted({*claimed_files, *found_files}):
        claimed, there = claimed_files.get(name, "not in the card"), found_files.get(name, "missing")
        right &= claimed == there
        lines.append(_agreement(name, claimed, there))
    evaluated = (card["figures"] or {}).get("model_digest")
    if evaluated and MODEL in found_files:
        right &= evaluated == found_files[MODEL]
        lines.append(_agreement("the model that was evaluated", evaluated, found_files[MODEL]))
    if card["figures"] and (folder / OUTCOMES).is_file():
        outcomes = evaluation.read_outcomes(folder)  # raises where outcomes and figures are not of one evaluation
        accuracies = f"clean {100 * outcomes.clean.mean():.2f} %, robust {100 * outcomes.robust.mean():.2f} %"
        lines.append(f"outcomes of {len(outcomes.clean):,} images agree with the card: {accuracies}")
    lines.append("adversarial images are not published with a model: evaluate it to score some")
    return lines, right


def _agreement(name: str, claimed: str, found: str) -> str:
    verdict = "ok" if claimed == found else f"DIFFERS, {claimed[:12]} recorded, {found[:12]} found"
    return f"{name}: {verdict}"


def published_folder(path: str) -> Path:
    """Return the published folder that a model's path names or lies in, or raise a UsageError."""
    given = Path(path).expanduser()
    folder = given if given.is_dir() else given.parent
    folder = folder.parent if folder.name.isdecimal() else folder
    if not (folder / CARD).is_file():
        raise UsageError(f"--evaluate_card needs --evaluate_model to name a published folder; {folder} has no {CARD}")
    return folder

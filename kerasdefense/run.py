"""python -m kerasdefense.run: flags -> Run -> what the mode says. Thin: the work is done elsewhere."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import keras
import tensorflow as tf
from rich.console import Console

from kerasdefense import assess, config, data, endpoint, evaluation, export, flags, recognition, training
from kerasdefense.assess import ADVERSARIAL, RESULTS
from kerasdefense.boundary import first_line, guarded
from kerasdefense.data import Splits
from kerasdefense.defenses import DEFENSES, Defense
from kerasdefense.evaluation import internals, nonadaptive, oblivious, open_set, preprocessing
from kerasdefense.evaluation.amplification import compare_errors
from kerasdefense.evaluation.batches import first_images
from kerasdefense.evaluation.digests import of_file
from kerasdefense.files import write_text
from kerasdefense.training import MODEL
from kerasdefense.types import InputError, UsageError

_FEW = 8
"""Test images on which a preprocessor is checked before anything is measured through it."""
STRICT = 3
"""The exit code of what was done and is not to be trusted."""


def train(run: config.Run, splits: Splits) -> None:
    """Train into the run directory; a new model gets the config.cfg that it was trained by, and loses old figures."""
    run_dir = Path(run.run_dir)
    kept = dataclasses.replace(run, export=dataclasses.replace(run.export, dir=""))  # not to publish again unasked

    def describe_model() -> None:
        shutil.rmtree(run_dir / assess.FOLDER, ignore_errors=True)  # measured on the model that was there before
        write_text(run_dir / flags.CONFIG, "\n".join(flags.to_lines(kept)) + "\n")

    training.train(run, splits, run_dir, on_saved=describe_model)


def load_defense(run: config.Run, splits: Splits) -> Defense:
    """Return the trained model of the run directory, the one file that evaluation and export start from."""
    path = Path(run.run_dir) / MODEL
    if not path.is_file():
        raise UsageError(f"there is no {path}; train first with --mode=train or --mode=all")
    try:
        defense = keras.models.load_model(path)
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"{path} is not a model that Keras can load: {first_line(error)}") from error
    if type(defense) is not DEFENSES[run.defense.name]:
        raise InputError(f"{path} holds a {type(defense).__name__}, not what --defense_name={run.defense.name} trains")
    if (defense.attack.norm, defense.attack.epsilon) != (run.attack.norm, run.attack.epsilon):
        trained = f"{defense.attack.norm} at {defense.attack.epsilon:g}"
        raise InputError(f"{path} was made for {trained}; to attack it at another radius pass --evaluate_epsilon")
    for name in defense.answers_by:
        has, asked = getattr(defense, name), getattr(run.defense, name)
        if has != asked:
            raise UsageError(f"{path} was made with --defense_{name}={has}, not {asked}: leave the flag as it was")
    shape, classes = defense.backbone.input_shape[1:], defense.backbone.output_shape["logits"][-1]
    if shape != splits.image_shape or classes != len(splits.labels):
        found = f"{splits.name} has images {splits.image_shape} of {len(splits.labels)} classes"
        raise InputError(
            f"{path} takes images {shape} of {classes} classes, but {found}; use its data set or another run_dir"
        )
    return defense


def evaluate(run: config.Run, splits: Splits, console: Console) -> dict[str, Any]:
    """Measure the run's model, or the one that flags name or serve, print what was found and return it."""
    if run.evaluate.endpoint:
        with endpoint.opened(run.evaluate.endpoint) as model:
            return _measure(run, splits, model, console)
    if run.evaluate.model and run.mode != "evaluate":
        raise UsageError(f"--evaluate_model goes with --mode=evaluate, not with --mode={run.mode}")
    if run.evaluate.card:
        folder = assess.published_folder(run.evaluate.model)
    if run.evaluate.model:
        model = evaluation.load_model(Path(run.evaluate.model).expanduser(), outputs=run.evaluate.outputs)
        evaluation.check_fits(model, splits.image_shape, len(splits.labels), splits.name)
        if run.evaluate.card:
            export.check_evaluated(folder, model.digest)
    else:
        model = evaluation.load_model(Path(run.run_dir) / MODEL)._replace(name=run.defense.name)
    if run.evaluate.preprocessor:
        given = preprocessing.preprocessor(run.evaluate.preprocessor)
        preprocessing.check_preprocessor(given, first_images(splits.test.batches(_FEW), _FEW).image)
        model = preprocessing.preprocessed(model, given)
    results = _measure(run, splits, model, console)
    if run.evaluate.card:
        export.publish_figures(folder, results, Path(run.run_dir) / assess.ADVERSARIAL)
    return results


def _measure(run: config.Run, splits: Splits, model: evaluation.Loaded, console: Console) -> dict[str, Any]:
    """Measure a model, print what was found and return it."""
    results = assess.assess(run, splits, model)
    assess.show(results, f"{model.name} on {splits.name}", console)
    console.print(Path(run.run_dir) / assess.REPORT, highlight=False, soft_wrap=True)
    return results


def export_model(run: config.Run, splits: Splits, defense: Defense) -> Path:
    """Write saved_model/<version>/ with its card, from the last evaluation of this run if there is one."""
    run_dir = Path(run.run_dir)
    if run.export.dir:
        evaluation.read_outcomes(run_dir)  # what is published must be there, and of one evaluation
    results = json.loads((run_dir / RESULTS).read_text(encoding="utf-8")) if (run_dir / RESULTS).is_file() else None
    if results is not None:
        evaluation.check_results(results)
        if results["model"]["digest"] != of_file(run_dir / MODEL):
            raise InputError(f"{run_dir / RESULTS} is of another model; evaluate this one with --mode=evaluate")
    reject = recognition.exported(run, of_file(run_dir / MODEL))
    card = export.card(
        run,
        results=results,
        labels=splits.labels,
        image_shape=splits.image_shape,
        versions=evaluation.versions(),
        reject=reject,
    )
    folder = Path(run.export.dir or run_dir / export.OF_RUNS)
    with contextlib.ExitStack() as stack:
        if run.export.dir:
            digest = stack.enter_context(export.published(defense, folder, run_dir / ADVERSARIAL))
            card["figures"]["model_digest"] = digest  # the same weights as in the run's file, without the optimizer's
        card["keras_import"] = stack.enter_context(export.classifier_file(defense, folder))
        version = export.save(
            defense,
            folder,
            labels=splits.labels,
            version=run.export.version,
            card=card,
            reject=reject,
            diagnostics=run.export.diagnostics,
        )
    export.write_bundle(folder)
    return version


def export_again(run: config.Run, console: Console) -> None:
    """Export the model of a published folder anew, and print where the version is."""
    if run.mode != "export":
        raise UsageError(f"--export_published goes with --mode=export, not with --mode={run.mode}")
    folder = Path(run.export.published).expanduser()
    into = Path(run.export.dir).expanduser() if run.export.dir else folder
    version = export.republish(folder, into, version=run.export.version)
    console.print(version, highlight=False, soft_wrap=True)


def compare(run: config.Run, console: Console) -> None:
    """Print one table over runs and published models, and write it to the run directory for people and machines."""
    compared = evaluation.compare(
        [evaluation.read_outcomes(Path(each)) for each in run.runs.split(",") if each], seed=run.evaluate.seed
    )
    console.print(evaluation.comparison_table(compared))
    for name, text in (("md", evaluation.to_markdown(compared)), ("csv", evaluation.to_csv(compared))):
        write_text(Path(run.run_dir) / f"comparison.{name}", text)
        console.print(Path(run.run_dir) / f"comparison.{name}", highlight=False, soft_wrap=True)
    folders = {row.run.name: row.run.folder for row in compared.rows}
    compared_too = (internals.compare_internals, nonadaptive.compare_nonadaptive, oblivious.compare_oblivious)
    for compare_figures in compared_too:
        figures = compare_figures(folders, seed=run.evaluate.seed)
        if figures is not None:
            console.print(figures)
    plot = Path(run.run_dir) / "comparison_errors.png"
    if compare_errors(plot, folders):
        console.print(plot, highlight=False, soft_wrap=True)


def sum_up(run: config.Run, console: Console) -> None:
    """Print mean and spread of the detectors of several runs, and write them to the run directory."""
    found = open_set.trials([Path(each) for each in run.runs.split(",") if each])
    for table in open_set.trials_tables(found):
        console.print(table)
    for name, text in (("md", open_set.trials_markdown(found)), ("csv", open_set.trials_csv(found))):
        write_text(Path(run.run_dir) / f"trials.{name}", text)
        console.print(Path(run.run_dir) / f"trials.{name}", highlight=False, soft_wrap=True)


def describe(run: config.Run, splits: Splits) -> str:
    """Return the resolved configuration and the parameter counts, without training anything."""
    strategy = training.make_strategy(run.train)
    with strategy.scope():
        defense = training.build(run, splits, training.saved_stages(run, splits, strategy))
    deployed = [getattr(defense, part) for part in defense.deployed]
    count = sum(tf.size(each).numpy() for part in deployed for each in part.trainable_variables)
    every = sum(part.count_params() for part in deployed)
    lines = flags.to_lines(run)
    lines.append(f"# images {splits.image_shape}, {len(splits.labels)} classes: {', '.join(splits.labels)}")
    sizes = (splits.train.examples, splits.validation.examples, splits.test.examples)
    lines.append("# {} training, {} validation and {} test images".format(*sizes))
    lines.append(f"# {count:,} trainable parameters, {every:,} in all")
    return "\n".join(lines)


def load_lines(run: config.Run, version: Path) -> str:
    """Return the three lines that load the result."""
    model, base = Path(run.run_dir) / MODEL, version.parent.resolve()
    loaded = f'tf.saved_model.load("{version}").signatures["serving_default"]'
    server = "tensorflow_model_server --rest_api_port=8501 --model_name=classifier"
    return "\n".join(
        (
            f'Keras       import keras, kerasdefense; model = keras.models.load_model("{model}")',
            f"SavedModel  import tensorflow as tf; serve = {loaded}",
            f"TF Serving  {server} --model_base_path={base}",
        )
    )


def verify(run: config.Run, console: Console) -> int:
    """Check run directories and published models against what they claim; return the exit code."""
    folders = [Path(each).expanduser() for each in run.runs.split(",") if each]
    if not folders:
        raise UsageError("name what to verify: --mode=verify RUN_OR_PUBLISHED_FOLDER ...")
    agree = True
    for folder in folders:
        lines, right = assess.verify(folder, run.data.dir)
        agree &= right
        console.print(f"{folder}: {'verified' if right else 'NOT VERIFIED'}", highlight=False, soft_wrap=True)
        for line in lines:
            console.print(f"  {line}", markup=False, highlight=False, soft_wrap=True)
    return 0 if agree else STRICT


def execute(run: config.Run, console: Console) -> int:
    """Carry out a run, print what a reader needs, and return the exit code."""
    if run.mode == "verify":
        return verify(run, console)
    of_results = {"compare": compare, "trials": sum_up}.get(run.mode)
    if of_results is not None or run.export.published:
        (of_results or export_again)(run, console)
        return 0
    if run.mode in ("all", "evaluate"):
        endpoint.check(run)
    trains = run.mode in ("all", "train")
    if trains:  # several workers must find each other before anything else is done
        strategy = training.make_strategy(run.train)
    splits = data.load(run.data)
    if run.mode in ("all", "evaluate"):
        recognition.check(run, splits)
        assess.check(run)
    if run.dry_run:
        print(describe(run, splits))
        return 0
    if trains:
        train(run, splits)
        if not training.is_chief(strategy):
            return 0
    if run.mode == "train":
        console.print(f"trained: {Path(run.run_dir) / MODEL}", highlight=False, soft_wrap=True)
        return 0
    return measure_and_export(run, splits, console)


def measure_and_export(run: config.Run, splits: Splits, console: Console) -> int:
    """Evaluate and export what is trained, as the mode says, and return the exit code."""
    foreign = run.mode == "evaluate" and bool(run.evaluate.model or run.evaluate.endpoint)
    defense = None if foreign else load_defense(run, splits)
    trusted = True
    if run.mode in ("all", "evaluate"):
        results = evaluate(run, splits, console)
        checked = bool(results["sanity"]) and not run.evaluate.endpoint
        trusted = results["trusted"] and checked  # what was not checked is not trusted either
    if defense is not None and run.mode in ("all", "export"):
        version = export_model(run, splits, defense)
        console.print(load_lines(run, version), markup=False, highlight=False, soft_wrap=True)
    return STRICT if run.strict and not trusted else 0


def main(arguments: Sequence[str]) -> int:
    """Run the command line and return its exit code."""
    return guarded(lambda: execute(flags.parse(arguments), Console()), verbosity=flags.verbosity(arguments))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

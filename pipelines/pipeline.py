"""The pipeline: from images to a push that robustness gates. Runners bind its paths."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import Any, Optional

import tensorflow_model_analysis as tfma
from tfx.components import Evaluator, ImportExampleGen, SchemaGen, StatisticsGen, Trainer
from tfx.dsl.components.common.resolver import Resolver
from tfx.dsl.input_resolution.strategies.latest_blessed_model_strategy import LatestBlessedModelStrategy
from tfx.orchestration import metadata
from tfx.orchestration.pipeline import Pipeline
from tfx.proto import example_gen_pb2, trainer_pb2
from tfx.types import BaseChannel, Channel, standard_artifacts

from kerasdefense import config, flags
from pipelines.artifacts import Images
from pipelines.components.example_validator import SHARES, ImageExampleValidator
from pipelines.components.pusher import Pusher
from pipelines.components.report import BLESSED
from pipelines.components.robustness_evaluator import RobustnessEvaluator
from pipelines.gate import check_gate
from pipelines.resolving import CANDIDATE, LatestOtherBlessedModel

TRAINER = "pipelines.trainer_module.run_fn"
RESOLVER = "latest_blessed_model"
LABEL, PROBABILITIES, SIGNATURE = "label", "probabilities", "examples"


@dataclasses.dataclass(frozen=True)
class Places:
    """Where a pipeline keeps what it makes.

    Attributes:
        root: folder of all artifacts.
        push: folder that a server watches; a version is pushed into it.
        state: folder of what is kept for a run that was stopped, and of outcomes by model and images.
        there: versions in the push folder now, which a cached push may not be among; none where that is not known.
    """

    root: str
    push: str
    state: str
    there: tuple[str, ...] = ()


def create_pipeline(
    name: str,
    run: config.Run,
    images: Images,
    places: Places,
    *,
    beam_arguments: Sequence[str] = (),
    metadata_path: Optional[str] = None,
    own_resolver: bool = True,
) -> Pipeline:
    """Return the pipeline; it depends on its arguments alone and touches nothing.

    Examples are brought in, counted and validated, a defense is trained on them and exported, TFX's Evaluator measures
    it class by class, ours attacks it, and it is pushed where both bless it. There is no Transform: what images pass
    before the model (decoding, resizing, scaling) is in the exported graph, where training and serving share it.

    Args:
        name: of the pipeline, by which a run knows what earlier ones did.
        run: says what is trained, how it is evaluated, and what a push needs.
        images: the examples.
        places: folders, or URLs.
        beam_arguments: Beam's pipeline options for all components that use it.
        metadata_path: SQLite file of ML Metadata; None where the orchestrator keeps its own.
        own_resolver: whether the orchestrator runs our strategy that finds the model to hold a candidate against. TFX's
            own cannot tell our blessings from those of TFX's Evaluator, which then gives none: it measures only.

    Raises:
        UsageError: thresholds that are missing or contradict each other.
    """
    check_gate(run)
    example_gen = ImportExampleGen(input_base=images.folder, input_config=_input_config(images.splits))
    examples = example_gen.outputs["examples"]
    validation = _validation(examples, run.gate.label_shift, images, places)
    trainer = _trainer(examples, run, images, places)
    trainer.add_upstream_node(validation[-1])
    model = trainer.outputs["model"]
    resolver = _resolver(model, is_own=own_resolver)
    bound = run.gate.clean_accuracy if own_resolver else None
    evaluator = Evaluator(examples=examples, model=model, eval_config=eval_config(bound), example_splits=["eval"])
    robustness = RobustnessEvaluator(
        examples,
        model,
        baseline_model=resolver.outputs["model"],
        evaluator_blessing=evaluator.outputs["blessing"] if own_resolver else None,
        settings={
            "flags": json.dumps(_lines(run)),
            "labels": json.dumps(images.labels),
            "data_name": images.name,
            "state_dir": places.state,
            "threads": 1,
        },
    )
    outputs = robustness.outputs
    pusher = Pusher(
        model, model_blessing=outputs["blessing"], report=outputs["report"], folder=places.push, there=places.there
    )
    return Pipeline(
        pipeline_name=name,
        pipeline_root=places.root,
        components=[example_gen, *validation, trainer, resolver, evaluator, robustness, pusher],
        enable_cache=True,
        metadata_connection_config=(
            None if metadata_path is None else metadata.sqlite_metadata_connection_config(metadata_path)
        ),
        beam_pipeline_args=[*beam_arguments],
    )


def _lines(run: config.Run) -> list[str]:
    return flags.to_lines(dataclasses.replace(run, run_dir="", mode="all", progress=False))


def _validation(examples: BaseChannel, label_shift: float, images: Images, places: Places) -> list[Any]:
    """Return the steps that look at the examples, the last one of which stops the pipeline."""
    statistics_gen = StatisticsGen(examples=examples)
    statistics = statistics_gen.outputs["statistics"]
    schema_gen = SchemaGen(statistics=statistics, infer_feature_shape=True)
    validator = ImageExampleValidator(
        examples=examples,
        statistics=statistics,
        schema=schema_gen.outputs["schema"],
        image_shape=images.shape,
        classes=len(images.labels),
        max_label_shift=label_shift,
        state_dir=f"{places.state}/anomalies",
        reference=f"{places.state}/{BLESSED}/{SHARES}",
    )
    return [statistics_gen, schema_gen, validator]


def _trainer(examples: BaseChannel, run: config.Run, images: Images, places: Places) -> Trainer:
    """Return the step that trains, which other thresholds or attacks of the evaluation do not repeat."""
    wanted = run.evaluate
    fitted = config.Evaluate(
        open_set=wanted.open_set, ood=wanted.ood, seed=wanted.seed, chunk_size=wanted.chunk_size
    )  # detectors
    return Trainer(
        run_fn=TRAINER,
        examples=examples,
        train_args=trainer_pb2.TrainArgs(splits=["train"]),
        eval_args=trainer_pb2.EvalArgs(splits=["eval"]),
        custom_config={
            "flags": _lines(dataclasses.replace(run, evaluate=fitted, gate=config.Gate())),
            "labels": list(images.labels),
            "data_name": images.name,
            "state_dir": f"{places.state}/training",
        },
    )


def eval_config(least_accuracy: Optional[float]) -> tfma.EvalConfig:
    """Return what TFX's Evaluator measures: accuracy over all images, and by class.

    Args:
        least_accuracy: accuracy over all images below which it does not bless a model; None = it blesses none.
    """
    accuracy = tfma.MetricConfig(class_name="SparseCategoricalAccuracy")
    if least_accuracy is not None:
        bound = tfma.GenericValueThreshold(lower_bound={"value": least_accuracy})
        threshold = tfma.MetricThreshold(value_threshold=bound)
        accuracy.per_slice_thresholds.add(slicing_specs=[tfma.SlicingSpec()], threshold=threshold)
    return tfma.EvalConfig(
        model_specs=[tfma.ModelSpec(signature_name=SIGNATURE, label_key=LABEL, prediction_key=PROBABILITIES)],
        slicing_specs=[tfma.SlicingSpec(), tfma.SlicingSpec(feature_keys=[LABEL])],
        metrics_specs=[tfma.MetricsSpec(metrics=[tfma.MetricConfig(class_name="ExampleCount"), accuracy])],
    )


def _resolver(candidate: BaseChannel, *, is_own: bool) -> Resolver:
    """Return what resolves the last model that was blessed: by our strategy that by our component, and another one."""
    channels = {"model": Channel(type=standard_artifacts.Model), CANDIDATE: candidate}
    by = {"producer_component_id": RobustnessEvaluator.__name__} if is_own else {}
    channels["model_blessing"] = Channel(type=standard_artifacts.ModelBlessing, **by)
    strategy = LatestOtherBlessedModel if is_own else LatestBlessedModelStrategy
    if not is_own:
        del channels[CANDIDATE]
    return Resolver(strategy_class=strategy, **channels).with_id(RESOLVER)


def _input_config(splits: Sequence[str]) -> example_gen_pb2.Input:
    return example_gen_pb2.Input(
        splits=[example_gen_pb2.Input.Split(name=split, pattern=f"{split}/*") for split in splits]
    )

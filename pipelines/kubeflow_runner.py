"""python -m pipelines.kubeflow_runner: the pipeline as a specification for Kubeflow Pipelines 2 or Vertex AI.

    python -m pipelines.kubeflow_runner --flagfile=configs/cifar10/pgd_at.cfg --name=cifar10-pgd-at \
        --examples=gs://BUCKET/examples --labels=labels.txt --image_shape=32x32x3 --root=gs://BUCKET/pipeline \
        --push_dir=gs://BUCKET/served --image=REGISTRY/kerasdefense:TAG --accelerator=NVIDIA_TESLA_T4 \
        --output=pipeline.json [any of Beam's pipeline options]

Nothing is contacted: the file is what a cluster is given. It needs the extra `kubeflow` in an environment of its own,
which `make kubeflow` makes. The image holds this package with its extra `pipelines`, and runs as tfx's own does. A step
that trains works in a folder of its machine: one that was stopped begins anew.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from kerasdefense import flags
from kerasdefense.boundary import guarded
from kerasdefense.data.examples import SPLITS, read_labels
from kerasdefense.files import replacing
from kerasdefense.types import InputError, UsageError
from pipelines import jobs
from pipelines.artifacts import Images
from pipelines.evaluate import of_package
from pipelines.pipeline import Places, create_pipeline


def _parser() -> jobs.Parser:
    parser = jobs.Parser("python -m pipelines.kubeflow_runner", __doc__)
    parser.add_argument("--name", required=True, help="of the pipeline: small letters, digits and hyphens")
    parser.add_argument("--examples", required=True, help="where the folder of python -m pipelines.examples lies")
    parser.add_argument("--splits", default="train,eval", help="folders in it, comma-separated")
    parser.add_argument("--labels", required=True, help="a copy of its labels.txt on this machine")
    parser.add_argument("--image_shape", required=True, help="height x width x channels of its images, as 32x32x3")
    parser.add_argument("--root", required=True, help="where artifacts and states are kept")
    parser.add_argument("--push_dir", required=True, help="where servers look for models")
    parser.add_argument("--image", required=True, help="container image with this package and its extra pipelines")
    parser.add_argument("--accelerator", default="", help="type of the GPU that trains, NVIDIA_TESLA_T4 for instance")
    parser.add_argument("--accelerators", type=int, default=1, help="how many of them")
    parser.add_argument("--cpu", type=float, default=4.0, help="processors of the step that trains")
    parser.add_argument("--memory", type=float, default=16.0, help="its memory in GB")
    parser.add_argument("--output", required=True, help="the JSON file to write")
    return parser


def main(arguments: Sequence[str]) -> int:
    """Compile the specification, say where it is and return the exit code."""
    own, rest = _parser().parse_known_args(arguments)
    ours, rest = of_package(rest)
    given = jobs.beam_arguments(rest) if rest else []
    run = flags.parse([*ours, "--mode=all"])
    splits = tuple(own.splits.split(","))
    strange = [split for split in splits if split not in SPLITS]
    if strange or not {"train", "eval"} <= set(splits):
        raise UsageError(f"--splits={own.splits} must name train, eval and perhaps {', '.join(SPLITS[1::2])}")
    images = Images(own.examples, splits, run.data.name, read_labels(own.labels), shape_of(own.image_shape))
    places = Places(own.root, own.push_dir, f"{own.root.rstrip('/')}/state")
    pipeline = create_pipeline(own.name, run, images, places, beam_arguments=given, own_resolver=False)
    compile_to(Path(own.output).expanduser(), pipeline, own)
    Console().print(f"written: {own.output}", highlight=False, soft_wrap=True)
    return 0


def shape_of(text: str) -> tuple[int, int, int]:
    """Return a shape that is written as 32x32x3."""
    parts = text.split("x")
    if len(parts) != 3 or not all(part.isdecimal() and int(part) for part in parts):
        raise UsageError(f"--image_shape={text} must be height x width x channels, as 32x32x3")
    return int(parts[0]), int(parts[1]), int(parts[2])


def compile_to(path: Path, pipeline: Any, own: argparse.Namespace) -> None:
    """Write the specification of a pipeline, whose training gets the resources that were asked for.

    Raises:
        InputError: the extra `kubeflow` is not installed here, or the pipeline cannot be compiled.
    """
    try:
        from kfp.pipeline_spec import pipeline_spec_pb2
        from tfx.orchestration.kubeflow.v2 import kubeflow_v2_dag_runner as kubeflow
    except ImportError as error:
        raise InputError(f"this environment cannot compile for Kubeflow ({error}); make kubeflow makes one") from error
    container = pipeline_spec_pb2.PipelineDeploymentConfig.PipelineContainerSpec
    resources = container.ResourceSpec(cpu_limit=own.cpu, memory_limit=own.memory)
    if own.accelerator:
        resources.accelerator.CopyFrom(
            container.ResourceSpec.AcceleratorConfig(type=own.accelerator, count=own.accelerators)
        )
    trainer = next(each for each in pipeline.components if each.id == "Trainer")
    trainer.with_platform_config(resources)
    with replacing(path.resolve()) as temporary:
        settings = kubeflow.KubeflowV2DagRunnerConfig(default_image=own.image)
        runner = kubeflow.KubeflowV2DagRunner(settings, str(temporary.parent), temporary.name)
        try:
            runner.run(pipeline, write_out=True)
        except (ValueError, TypeError, NotImplementedError) as error:
            raise InputError(f"Kubeflow's compiler refuses the pipeline: {error}") from error


if __name__ == "__main__":
    sys.exit(guarded(lambda: main(sys.argv[1:]), verbosity=flags.verbosity(sys.argv[1:])))

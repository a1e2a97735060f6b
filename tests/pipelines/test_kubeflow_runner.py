"""The specification for Kubeflow, compiled in an environment of its own."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PYTHON = ROOT / ".venv-kubeflow/bin/python"
BEAM = ("--runner=DataflowRunner", "--project=p", "--region=r", "--temp_location=gs://bucket/tmp")


@pytest.fixture(scope="module")
def specification(tmp_path_factory):
    """Compile with the environment that `make kubeflow` makes, which takes minutes where it is not there."""
    if not PYTHON.exists():
        subprocess.run(["make", "kubeflow"], cwd=ROOT, check=True)
    folder = tmp_path_factory.mktemp("kubeflow")
    (folder / "labels.txt").write_text("".join(f"{label}\n" for label in range(10)))
    given = ["--flagfile=configs/digits/pgd_at.cfg", "--name=digits-pgd-at", "--examples=gs://bucket/examples"]
    given += [f"--labels={folder}/labels.txt", "--image_shape=8x8x1", "--root=gs://bucket/pipeline"]
    given += ["--push_dir=gs://bucket/served", "--image=registry.example/kerasdefense:1"]
    given += ["--accelerator=NVIDIA_TESLA_T4", "--memory=32", f"--output={folder}/pipeline.json", *BEAM]
    command = [str(PYTHON), "-m", "pipelines.kubeflow_runner", *given]
    subprocess.run(command, cwd=ROOT, check=True)
    return json.loads((folder / "pipeline.json").read_text())["pipelineSpec"]


@pytest.mark.slow
def test_all_steps_are_compiled_and_the_push_waits_for_the_gate(specification):
    tasks = specification["root"]["dag"]["tasks"]
    assert {"ExampleValidator", "Trainer", "RobustnessEvaluator", "Pusher"} <= set(tasks)
    assert "RobustnessEvaluator" in tasks["Pusher"]["dependentTasks"]
    assert "ExampleValidator" in tasks["Trainer"]["dependentTasks"]


@pytest.mark.slow
def test_gpu_and_beam_options_reach_their_steps(specification):
    executors = specification["deploymentSpec"]["executors"]
    resources = executors["Trainer_executor"]["container"]["resources"]
    assert resources["accelerator"] == {"type": "NVIDIA_TESLA_T4", "count": "1"} and resources["memoryLimit"] == 32
    told = json.dumps(executors["RobustnessEvaluator_executor"])
    assert all(option in told for option in BEAM)
    images = {each["container"]["image"] for each in executors.values() if "container" in each}
    assert images == {"registry.example/kerasdefense:1"}

"""What the metadata store of a pipeline knows: which runs there were, what each step took and made, what was pushed."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple, Optional

from google.protobuf import json_format, message
from ml_metadata import errors
from ml_metadata.metadata_store import MetadataStore
from ml_metadata.proto import metadata_store_pb2 as mlmd
from rich.console import Console
from rich.table import Table

from kerasdefense.types import InputError

_RUN, _NODE = "pipeline_run", "node"
_OUTPUT = (mlmd.Event.OUTPUT, mlmd.Event.DECLARED_OUTPUT)
_TOLD = ("verdict", "clean_accuracy", "robust_accuracy", "blessed", "pushed", "pushed_version", "split_names")
"""Properties of artifacts that say what became of a run."""
_PUSHER, _ROBUSTNESS = "Pusher", "RobustnessEvaluator"


class Step(NamedTuple):
    """One step of a run: which, what became of it, and the artifacts that went in and came out, by key."""

    name: str
    state: str
    inputs: dict[str, list[mlmd.Artifact]]
    outputs: dict[str, list[mlmd.Artifact]]


def open_store(path: Path, *, new: bool = False) -> MetadataStore:
    """Open the SQLite store at a path.

    Args:
        path: the file.
        new: whether it is made where there is none.

    Raises:
        InputError: there is none, or it is none of this version of ML Metadata.
    """
    if new:
        path.parent.mkdir(parents=True, exist_ok=True)
    elif not path.is_file():
        raise InputError(f"there is no {path}: there was no run of this pipeline yet, or it has another --root")
    connection = mlmd.ConnectionConfig()
    connection.sqlite.filename_uri = str(path)
    connection.sqlite.connection_mode = mlmd.SqliteMetadataSourceConfig.READWRITE_OPENCREATE
    try:
        return MetadataStore(connection)
    except (errors.StatusError, RuntimeError) as error:
        said = str(error).partition(" query:")[0]
        raise InputError(
            f"{path} is no metadata store that this version of ML Metadata reads ({said}); move it away, or pass "
            "another --root: nothing was run or pushed"
        ) from error


def runs(store: MetadataStore) -> list[mlmd.Context]:
    """Return the runs of the pipeline, the first one first."""
    known = {each.name for each in store.get_context_types()}
    return sorted(store.get_contexts_by_type(_RUN), key=lambda each: each.id) if _RUN in known else []


def steps(store: MetadataStore, run: mlmd.Context) -> list[Step]:
    """Return what was done in a run, in order."""
    executions = sorted(store.get_executions_by_context(run.id), key=lambda each: each.id)
    return [_step(store, each) for each in executions]


def outcome(store: MetadataStore) -> tuple[Optional[str], str]:
    """Return where the last run pushed its model, None where it did not, and the verdict on it in words."""
    found = {step.name: step for step in steps(store, runs(store)[-1])}
    report, model = found[_ROBUSTNESS].outputs["report"][0], found[_PUSHER].outputs["pushed_model"][0]
    verdict = f"{report.custom_properties['verdict'].string_value} (report: {report.uri})"
    if not model.custom_properties["pushed"].int_value:
        return None, verdict
    return model.custom_properties["pushed_destination"].string_value, verdict


def show(store: MetadataStore, console: Console) -> None:
    """Print every run's steps with what went in and came out, and the artifacts of the last run."""
    every = runs(store)
    if not every:
        raise InputError("there was no run of this pipeline yet")
    artifacts: dict[int, mlmd.Artifact] = {}
    for run in every:
        table = Table("step", "state", "took", "made", title=f"run {run.name}", title_justify="left")
        artifacts = {}
        for step in steps(store, run):
            table.add_row(step.name, step.state, _words(step.inputs), _words(step.outputs))
            groups = (*step.inputs.values(), *step.outputs.values())
            artifacts |= {artifact.id: artifact for group in groups for artifact in group}
        console.print(table)
    console.print("artifacts of the last run:")
    for number, artifact in sorted(artifacts.items()):
        facts = _facts(artifact)
        line = f"{number:>4} {artifact.type}{facts and f' ({facts})'}: {artifact.uri}"
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _step(store: MetadataStore, execution: mlmd.Execution) -> Step:
    inputs: dict[str, list[mlmd.Artifact]] = {}
    outputs: dict[str, list[mlmd.Artifact]] = {}
    for event in store.get_events_by_execution_ids([execution.id]):
        key = next((step.key for step in event.path.steps if step.HasField("key")), "?")
        group = outputs if event.type in _OUTPUT else inputs
        group.setdefault(key, []).extend(store.get_artifacts_by_id([event.artifact_id]))
    nodes = [each for each in store.get_contexts_by_execution(execution.id) if each.type == _NODE]
    name = nodes[0].name.rpartition(".")[2] if nodes else execution.type
    return Step(name, mlmd.Execution.State.Name(execution.last_known_state).lower(), inputs, outputs)


def _words(group: dict[str, list[mlmd.Artifact]]) -> str:
    return ", ".join(f"{key} {'+'.join(str(each.id) for each in found)}" for key, found in sorted(group.items()))


def _facts(artifact: mlmd.Artifact) -> str:
    every: dict[str, Any] = {**artifact.properties, **artifact.custom_properties}
    return ", ".join(f"{name} {_value(every[name])}" for name in _TOLD if name in every)


def _value(value: mlmd.Value) -> Any:
    found = getattr(value, value.WhichOneof("value"))
    return json_format.MessageToDict(found) if isinstance(found, message.Message) else found

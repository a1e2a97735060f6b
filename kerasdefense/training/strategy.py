"""Where training runs: on one device, on all of a machine, or on several machines."""

from __future__ import annotations

import functools
import json
import os

import tensorflow as tf

from kerasdefense import config
from kerasdefense.types import InputError, UsageError

_EXAMPLE = '{"cluster": {"worker": ["host1:12345", "host2:12345"]}, "task": {"type": "worker", "index": 0}}'


def make_strategy(train: config.Train) -> tf.distribute.Strategy:
    """Return the distribution strategy that a configuration names.

    "none" is the default one; "mirrored" spans all visible GPUs, or logical CPUs where there is none; "multi_worker"
    spans the machines that TF_CONFIG names, and must be made before TensorFlow does anything else.

    Raises:
        UsageError: TF_CONFIG names no such worker, or the batch does not divide over the replicas, or XLA is asked to
            compile for several.
    """
    if train.strategy == "none":
        return tf.distribute.get_strategy()
    if train.strategy == "multi_worker":
        _check_cluster(os.environ.get("TF_CONFIG", ""))
        strategy = _multi_worker()
    else:
        devices = [device.name for device in tf.config.list_logical_devices("GPU")]
        strategy = mirrored(tuple(devices or (device.name for device in tf.config.list_logical_devices("CPU"))))
    if train.batch_size % strategy.num_replicas_in_sync:
        raise UsageError(
            f"--train_batch_size={train.batch_size} does not divide over {strategy.num_replicas_in_sync} replicas"
        )
    if train.jit_compile and strategy.num_replicas_in_sync > 1:
        raise UsageError("--train_jit_compile works on one replica only: pass --train_strategy=none or leave it out")
    return strategy


@functools.cache
def mirrored(devices: tuple[str, ...]) -> tf.distribute.MirroredStrategy:
    """Return this process's one strategy over these devices.

    TensorFlow numbers the collective operations of every strategy from the same start, so that two strategies over the
    same devices can take each other's for their own and abort.
    """
    return tf.distribute.MirroredStrategy(list(devices))


@functools.cache
def _multi_worker() -> tf.distribute.MultiWorkerMirroredStrategy:
    return tf.distribute.MultiWorkerMirroredStrategy()


def is_chief(strategy: tf.distribute.Strategy) -> bool:
    """Return whether this process is the one of its cluster that writes to the run directory."""
    resolver = strategy.cluster_resolver
    if resolver is None or not resolver.task_type:
        return True
    has_chief = "chief" in resolver.cluster_spec().jobs
    return resolver.task_type == "chief" or (not has_chief and resolver.task_id == 0)


def check_together(strategy: tf.distribute.Strategy, epoch: int) -> None:
    """Raise an InputError on every worker unless all of them begin after the same epoch."""
    if strategy.cluster_resolver is None or strategy.num_replicas_in_sync == 1:
        return
    begun = tf.function(lambda: strategy.run(lambda: tf.constant(epoch)))()
    if int(strategy.reduce(tf.distribute.ReduceOp.SUM, begun, axis=None)) != epoch * strategy.num_replicas_in_sync:
        raise InputError("the workers do not find the same checkpoints: --run_dir must be a folder that they share")


def _check_cluster(text: str) -> None:
    """Raise a UsageError unless TF_CONFIG describes a cluster and names this process as one of its workers."""
    try:
        content = json.loads(text)
        cluster, task = content["cluster"], content["task"]
        kind, number = task["type"], int(task["index"])
        workers = {name: len(hosts) for name, hosts in cluster.items() if name in ("chief", "worker")}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"--train_strategy=multi_worker needs TF_CONFIG as JSON, such as {_EXAMPLE}") from error
    if not 0 <= number < workers.get(kind, 0):
        named = ", ".join(f"{name} 0..{count - 1}" for name, count in workers.items()) or "no worker"
        raise UsageError(f"TF_CONFIG says that this is {kind} {number}, but its cluster has {named}")

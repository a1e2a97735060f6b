"""python -m benchmarks.accelerator: what training, mixed precision and export do on the accelerator of this machine."""

from __future__ import annotations

import argparse
import gc
import os
import platform
import sys
import tempfile
import time
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple, Optional

import tensorflow as tf

from benchmarks import accelerator_parts as parts
from benchmarks.accelerator_parts import FAIL, PASS, SKIPPED, Check, Part, Subject

DRIVER = Path("/proc/driver/nvidia/version")
INSTALL = "uv pip install --python .venv/bin/python 'tensorflow[and-cuda]==2.15.1'"
WORDS = {PASS: "passed", FAIL: "failed", SKIPPED: "skipped"}


class Share(NamedTuple):
    """A part, and its share of the time that is left; 0 = it does a fixed piece of work."""

    part: Part
    weight: int


PARTS: dict[str, Share] = {
    "repeat": Share(parts.repeats, 0),
    "replicas": Share(parts.agrees, 0),
    "export": Share(parts.exports, 0),
    "float32": Share(parts.trains("float32"), 1),
    "mixed_float16": Share(parts.trains("mixed_float16"), 1),
    "mixed_bfloat16": Share(parts.trains("mixed_bfloat16"), 1),
    "jit_compile": Share(parts.compiles, 1),
}


def check_devices(driver: Path = DRIVER) -> Check:
    """Say what does the work; an NVIDIA driver without a GPU that TensorFlow sees is a failure."""
    gpus = tf.config.list_physical_devices("GPU")
    if gpus:
        details = [tf.config.experimental.get_device_details(gpu) for gpu in gpus]
        return Check(PASS, ", ".join(_described(each) for each in details))
    if driver.exists() and os.environ.get("CUDA_VISIBLE_DEVICES") not in ("", "-1"):
        return Check(FAIL, f"an NVIDIA driver is here, but TensorFlow sees no GPU; its CUDA libraries: {INSTALL}")
    return Check(SKIPPED, f"no accelerator: everything below ran on {os.cpu_count()} CPUs")


def _described(details: Mapping[str, Any]) -> str:
    capability = ".".join(map(str, details.get("compute_capability", ())))
    return details.get("device_name", "unknown GPU") + (f" (compute capability {capability})" if capability else "")


def run_parts(shares: Mapping[str, Share], subject: Subject, seconds: float) -> dict[str, Check]:
    """Run every part, whatever becomes of the others, and report each on the way."""
    end, checks = time.monotonic() + seconds, {}
    weights = {name: share.weight for name, share in shares.items()}
    for name, (part, weight) in shares.items():
        share = max(0.0, end - time.monotonic()) * weight / max(1, sum(weights.values()))
        del weights[name]
        print(f"{name} ...", end=" ", file=sys.stderr, flush=True)
        try:
            checks[name] = part(subject, share)
        except Exception as error:  # the report must say what went wrong in any of them
            checks[name] = Check(FAIL, f"{type(error).__name__}: {_reason(error)}")
        print(*checks[name], file=sys.stderr, flush=True)
        gc.collect()  # a graph and its weights are only freed here
    return checks


def _reason(error: Exception) -> str:
    """Return the first line of a message that says what happened, not where in a graph."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    said = [line for line in lines if not line.startswith(("Graph execution error", "Detected at node", "File "))]
    return (said or lines or ["no message"])[0]


def versions(driver: Path = DRIVER) -> list[str]:
    """Return what the checks depend on besides the device, in lines."""
    build = tf.sysconfig.get_build_info()
    cuda = "built without CUDA"
    if build.get("is_cuda_build"):
        cuda = f"built for CUDA {build.get('cuda_version')} and cuDNN {build.get('cudnn_version')}"
    return [
        f"kerasdefense {metadata.version('kerasdefense')}, Python {platform.python_version()}, {platform.platform()}",
        f"TensorFlow {metadata.version('tensorflow')} ({cuda}), Keras {metadata.version('keras')}",
        *(driver.read_text(encoding="utf-8").splitlines()[:1] if driver.exists() else []),
    ]


def report(checks: Mapping[str, Check], subject: Subject, seconds: float) -> str:
    """Return the Markdown block to paste into an issue report."""
    run, width = subject.run, max(map(len, checks))
    outcomes = [check.outcome for check in checks.values()]
    counts = ", ".join(f"{outcomes.count(each)} {word}" for each, word in WORDS.items())
    trained = f"{run.backbone.name}-{run.backbone.width} on {run.data.name} of {subject.splits.image_shape}"
    lines = [
        "```text",
        *versions(),
        f"{trained}, batch {run.train.batch_size}, attacks of {run.attack.steps} steps",
        "",
        *(f"{check.outcome:7}  {name:{width}}  {check.figures}" for name, check in checks.items()),
        "",
        f"{counts} in {seconds / 60:.1f} minutes",
        "```",
    ]
    return "\n".join(lines)


def parse(arguments: Optional[list[str]]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.accelerator", description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0, help="about how long to take (default 10)")
    options = parser.parse_args(arguments)
    if not options.minutes > 0:
        parser.error(f"--minutes must be above 0, not {options.minutes:g}")
    return options


def main(arguments: Optional[list[str]] = None) -> int:
    """Run all parts, print the report, and return 1 if a check failed."""
    options, start = parse(arguments), time.monotonic()
    gpus = len(tf.config.list_logical_devices("GPU"))
    with tempfile.TemporaryDirectory(prefix="kerasdefense-accelerator-") as folder:
        devices = gpus or len(tf.config.list_logical_devices("CPU"))
        subject = parts.make_subject(Path(folder), devices=devices, accelerated=gpus > 0)
        checks = {"devices": check_devices(), **run_parts(PARTS, subject, 60 * options.minutes)}
    print(report(checks, subject, time.monotonic() - start))
    return 1 if any(check.outcome == FAIL for check in checks.values()) else 0


if __name__ == "__main__":
    sys.exit(main())

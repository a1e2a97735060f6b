"""The command line: image files in, one line each out."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Optional, Union

from kerasdefense.serving.client import Client, Prediction
from kerasdefense.types import InputError, UsageError

_UNJUDGED = "no image, damaged or too large"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m kerasdefense.serving",
        description="Ask a model that TF Serving serves about image files; one line each.",
        epilog="Exit code 0 where every image was judged, 2 for wrong usage, 1 for anything else.",
    )
    parser.add_argument("image", nargs="+", help="an image file")
    parser.add_argument(
        "--address",
        default="grpc://localhost:8500",
        help="grpc://host:port or http://host:port, each perhaps with /model (default: %(default)s)",
    )
    parser.add_argument("--name", help="the model's name (default: that of the address, else classifier)")
    parser.add_argument("--version", type=int, help="number of a version (default: the server's choice)")
    parser.add_argument("--version_label", help="label of a version, instead of a number")
    parser.add_argument("--timeout", type=float, default=30.0, help="seconds for all images (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print one JSON object a line")
    return parser


def main(arguments: Sequence[str]) -> int:
    """Run the command line and return its exit code."""
    try:
        given = _parser().parse_args(arguments)
    except SystemExit as finished:  # of argparse, after it has said what is wrong or how to use it
        return int(finished.code or 0)
    try:
        return _run(given)
    except (UsageError, InputError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    except KeyboardInterrupt:
        return 130


def _run(given: argparse.Namespace) -> int:
    """Print what the model says of each file; return 1 where one could not be read or judged."""
    contents = [_read(name) for name in given.image]
    files = [each for each in contents if isinstance(each, bytes)]
    with Client(
        given.address,
        name=given.name,
        version=given.version,
        version_label=given.version_label,
        timeout=given.timeout,
    ) as client:
        predictions = iter(client.predict(files, on_invalid="return"))
    judged = True
    for name, content in zip(given.image, contents):
        prediction = next(predictions) if isinstance(content, bytes) else None
        reason = content if isinstance(content, str) else _reason(prediction)
        print(json.dumps(_record(name, prediction, reason)) if given.json else _line(name, prediction, reason))
        judged &= prediction is not None and prediction.valid
    return 0 if judged else 1


def _read(name: str) -> Union[bytes, str]:
    """Return a file's content, or why it cannot be read."""
    try:
        return Path(name).read_bytes()
    except OSError as error:
        return (error.strerror or "cannot be read").lower()
    except ValueError:  # a name with a zero byte
        return "no name of a file"


def _reason(prediction: Optional[Prediction]) -> str:
    return "" if prediction is None or prediction.valid else _UNJUDGED


def _line(name: str, prediction: Optional[Prediction], reason: str) -> str:
    if prediction is None or reason:
        return f"{name}: {reason}"
    sure = f"{100 * float(prediction.probabilities.max()):.1f} %"
    verdict = "accepted" if prediction.accepted else "not accepted"
    return f"{name}: {prediction.class_name}, {sure}, anomaly score {prediction.anomaly_score:.4g}, {verdict}"


def _record(name: str, prediction: Optional[Prediction], reason: str) -> dict[str, Any]:
    if prediction is None or reason:
        return {"file": name, "valid": False, "accepted": False, "reason": reason}
    return {
        "file": name,
        "valid": True,
        "accepted": prediction.accepted,
        "class_name": prediction.class_name,
        "label": prediction.label,
        "probability": float(prediction.probabilities.max()),
        "anomaly_score": prediction.anomaly_score,
    }

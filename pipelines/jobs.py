"""Beam jobs: their options, and what becomes of one whose workers die."""

from __future__ import annotations

import contextlib
import difflib
import io
import logging
import os
import signal
import threading
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # Google's libraries announce the end of their support of Python 3.10
    import apache_beam as beam
    from apache_beam.options.pipeline_options import PipelineOptions

import psutil

from kerasdefense.types import InputError, UsageError
from pipelines.parser import Parser as Parser

MULTI_PROCESSING = "--direct_running_mode=multi_processing"
_LOCAL = (None, "DirectRunner")
_WORKER = "sdk_worker_main"
_DIED = "Worker subprocess exited with return code"


def beam_arguments(given: Sequence[str]) -> list[str]:
    """Return Beam's pipeline options, checked; those of a local run in as many processes as there are processors.

    Raises:
        UsageError: Beam knows no such option, or refuses its value.
    """
    known = _options(given)
    for each in given:
        name = each.lstrip("-").partition("=")[0]
        if each.startswith("-") and name not in known and name.removeprefix("no_") not in known:
            close = difflib.get_close_matches(name, [*known], n=1)
            hint = f"; did you mean --{close[0]}?" if close else ", nor does Beam have a pipeline option of this name"
            raise UsageError(f"unknown flag --{name}{hint}")
    if is_remote(given) or any(each.startswith("--direct_running_mode") for each in given):
        return [*given]
    workers = (
        [] if any(each.startswith("--direct_num_workers") for each in given) else [f"--direct_num_workers={cores()}"]
    )
    return [*given, MULTI_PROCESSING, *workers]


def _options(given: Sequence[str]) -> dict[str, Any]:
    """Return all of Beam's options, whose parser prints a usage of a hundred lines and leaves where one is wrong."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            options: dict[str, Any] = PipelineOptions([*given]).get_all_options()
    except SystemExit as leaving:
        lines = said.getvalue().strip().splitlines() or ["wrong options"]
        raise UsageError(f"Beam: {lines[-1].partition(' error: ')[2] or lines[-1]}") from leaving
    return options


def is_remote(arguments: Sequence[str]) -> bool:
    """Return whether Beam's options name a runner whose workers may be on other machines."""
    return _options(arguments)["runner"] not in _LOCAL


def cores() -> int:
    """Return how many processors this process may use."""
    return len(os.sched_getaffinity(0))


def is_multi_processing(arguments: Sequence[str]) -> bool:
    """Return whether Beam's options ask for workers that are processes of this machine."""
    return bool(_options(arguments)["direct_running_mode"] == "multi_processing")


def make_pipeline(arguments: Sequence[str]) -> beam.Pipeline:
    """Return a pipeline with these options, to be used as a context; of Beam itself only errors are logged.

    Raises:
        UsageError: options do not go together, or one is missing.
    """
    logging.getLogger("apache_beam").setLevel(logging.ERROR)
    try:
        return beam.Pipeline(options=PipelineOptions([*arguments]))
    except ValueError as error:
        raise UsageError(f"Beam: {' '.join(str(error).split())}") from error


@contextlib.contextmanager
def watched(advice: str) -> Iterator[None]:
    """Raise an InputError with an advice when a worker process of the local runner dies, which Beam waits for forever.

    Beam's threads report it, and whatever breaks in them before and after, to `threading.excepthook`. That is where it
    is noticed, and the main thread, which waits, is interrupted. What else threads report is told at the end, unless a
    worker died.
    """
    died: list[str] = []
    others: list[threading.ExceptHookArgs] = []
    otherwise = threading.excepthook

    def notice(arguments: threading.ExceptHookArgs) -> None:
        if not died and _DIED in str(arguments.exc_value):
            died.append(str(arguments.exc_value).removeprefix(_DIED).strip())
            _kill_workers()
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)  # wakes it where it waits for a lock
        else:
            others.append(arguments)

    threading.excepthook = notice
    quiet, logging.raiseExceptions = logging.raiseExceptions, False
    try:
        yield
    except KeyboardInterrupt:
        if not died:
            raise
    except Exception:
        if not died:
            raise
    finally:
        logging.raiseExceptions = quiet
        if not died:
            threading.excepthook = otherwise
            for each in others:
                otherwise(each)
    if died:
        raise InputError(f"a worker process died (exit code {died[0]}), perhaps for want of memory; {advice}")


def _kill_workers() -> None:
    """Kill the worker processes that are left, which would go on alone and complain."""
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if any(_WORKER in part for part in child.cmdline()):
                child.kill()

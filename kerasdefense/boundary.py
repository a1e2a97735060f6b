"""Where command lines meet people: whatever goes wrong inside ends in one line and an exit code."""

from __future__ import annotations

import sys
import traceback
import warnings
from typing import Callable, Optional

import tensorflow as tf
from absl import logging

from kerasdefense import flags
from kerasdefense.types import InputError, UsageError


def guarded(work: Callable[[], Optional[int]], *, verbosity: int = 0) -> int:
    """Do the work of a command line and return its exit code: its own or 0, 2 for wrong usage, 1 for anything else."""
    if verbosity < 1:
        warnings.simplefilter("ignore")
        logging.set_verbosity(logging.ERROR)
        tf.get_logger().setLevel("ERROR")
    try:
        return work() or 0
    except flags.HelpRequested as request:
        print(request)
    except KeyboardInterrupt:
        print("interrupted; what was written so far is complete", file=sys.stderr)
        return 130
    except Exception as error:  # the boundary to people: one line, whatever went wrong
        if verbosity >= 1:
            traceback.print_exc()
        print(f"error: {_one_line(error)}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    return 0


def _one_line(error: Exception) -> str:
    """Return what went wrong in one line; errors that are not ours carry their type and a way to see more."""
    if isinstance(error, (UsageError, InputError)):
        return " ".join(str(error).split())
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror} ({error.filename})" if error.filename else error.strerror
    return f"{type(error).__name__}: {first_line(error)} (--verbosity=1 shows where)"


def first_line(error: Exception) -> str:
    """Return the first line of a message, or the one line in it that our own checks of a batch wrote."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or ["no message"]
    return next((line for line in lines if "assertion failed: [" in line), lines[0])

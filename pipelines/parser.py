"""The command lines of this package: what is wrong with one is a UsageError, and so one line."""

import argparse
from typing import NoReturn

from kerasdefense.types import UsageError


class Parser(argparse.ArgumentParser):
    """A parser that raises UsageError, takes no abbreviations and prints its description as it stands.

    Args:
        prog: what the command is called.
        description: what it does.
    """

    def __init__(self, prog: str, description: str) -> None:
        super().__init__(
            prog=prog,
            description=description,
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    def error(self, message: str) -> NoReturn:
        """Raise a UsageError with argparse's message."""
        raise UsageError(message)

"""What can go wrong between a client and a server, as types."""

from __future__ import annotations

from collections.abc import Sequence

from kerasdefense.types import InputError


class ServingError(InputError):
    """A server that does not answer as it should; one line."""


class UnavailableError(ServingError):
    """No server at the address, or one that does not take the request at the moment; only this is tried again."""


class MergedError(UnavailableError):
    """A request that the server merged with one of another shape, and refused with it; either may be the wrong one."""


class DeadlineError(ServingError):
    """No answer in time."""


class NotFoundError(ServingError):
    """A server without such a model, version or label."""


class InvalidRequestError(ServingError):
    """A request that the server refuses: images of another size, say, or a model without the signature."""


class InvalidImageError(ServingError):
    """Images among those of a call that the model could not judge.

    Attributes:
        rows: their numbers, from 0 on.
    """

    def __init__(self, rows: Sequence[int], names: Sequence[str]) -> None:
        self.rows = tuple(rows)
        shown = ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")
        super().__init__(
            f"the model could not judge {shown}: values that are NaN or outside [0, 1], or a file that is no image, "
            "is damaged or too large"
        )


_SHOWN = 10
